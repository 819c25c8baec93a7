"""Self-speculation: an exit drafts, the layers above it verify."""

import time
from collections import deque
from statistics import median
from typing import NamedTuple

import torch

from .compat_sorted_llama import logger
from .modes_sorted_llama import SelfSpeculation
from .sequences_sorted_llama import Choice, DraftStatistics, Sequences, SortedGenerateOutput, draw, likeliest


class Drafts(NamedTuple):
    """Draft tokens, `(num_rows, num_drafts)`, and, in sampling, the processed distributions they were drawn from."""

    exit_layer: int
    tokens: torch.Tensor
    probabilities: torch.Tensor | None = None  # (num_rows, num_drafts, vocab_size)


def decode_with_drafts(sequences: Sequences, decoding: SelfSpeculation) -> SortedGenerateOutput | torch.Tensor:
    """
    Cycles of drafting and verifying. Drafting runs the lowest layers token by token, and leaves their states pending
    in the cache; verifying runs the rest for all of them in one pass. So no layer runs twice for a token that stays.
    """
    depth, statistics, passes_before = decoding.depth, DraftStatistics(), sequences.cache.layer_token_passes
    policy = draft_policy(sequences, decoding)

    rows = list(range(sequences.batch_size))
    states = sequences.prefill(depth)[:, -1:]
    drafts = Drafts(depth, sequences.ids[:, :0])
    choices, newest = _verify(states, drafts, rows, sequences, depth)
    _take_over(choices, drafts, rows, sequences, statistics)
    active = sequences.active_rows()
    while active:
        started = time.perf_counter()
        token, rows = sequences.select(newest, rows, active), active
        room = int(min(sequences.max_length - min(map(sequences.length, rows)) - 1, 2**31))
        drafts = _draft(*policy.next(room), token, rows, sequences, decoding.assistant_confidence_threshold)
        num_drafts = drafts.tokens.shape[1]

        # The last draft has not been through any layer yet, the ones before it are pending
        last = torch.cat([token, drafts.tokens], dim=1)[:, -1:]
        states = sequences.forward(last, rows, depth)[:, -(num_drafts + 1) :]
        choices, newest = _verify(states, drafts, rows, sequences, depth)
        _take_over(choices, drafts, rows, sequences, statistics)
        accepted = [len(new) - 1 for new in choices]
        policy.learn(drafts.exit_layer, num_drafts, accepted, time.perf_counter() - started)
        active = sequences.active_rows()

    statistics.layer_token_passes = sequences.cache.layer_token_passes - passes_before
    logger.info(
        f"Drafted {statistics.drafted} tokens at exits {statistics.exit_layers}, {statistics.acceptance_rate:.1%} of "
        f"them accepted; {statistics.new_tokens} new tokens in {statistics.cycles} cycles."
    )
    return sequences.finish(statistics)


def _draft(
    exit_layer: int, number: int, token: torch.Tensor, rows: list[int], sequences: Sequences, threshold: float | None
) -> Drafts:
    """Draft up to `number` tokens behind `token`, `(num_rows, 1)`; their states stay pending at the exit."""
    lengths = [sequences.length(row) for row in rows]
    tokens, distributions = [token[:, :0]], []
    for i in range(number):
        states = sequences.forward(token, rows, exit_layer)[:, -1]
        behind = [length + i for length in lengths]
        scores = sequences.process(sequences.head(states, exit_layer, rows), rows, behind)
        needed = sequences.do_sample or threshold is not None
        probabilities = scores.softmax(-1, dtype=torch.float32) if needed else scores
        token = draw(probabilities) if sequences.do_sample else likeliest(scores)[:, None]
        tokens.append(token)
        distributions.append(probabilities)
        if sequences.processors:  # those of the next drafts read it
            sequences.write(rows, behind, token)
        if threshold is not None and i + 1 < number and bool((probabilities.gather(1, token) < threshold).all()):
            break
    sampled = sequences.do_sample and number > 0
    return Drafts(exit_layer, torch.cat(tokens, dim=1), torch.stack(distributions, dim=1) if sampled else None)


def _verify(
    states: torch.Tensor, drafts: Drafts, rows: list[int], sequences: Sequences, depth: int
) -> tuple[list[list[Choice]], torch.Tensor]:
    """
    Keep the drafts that `depth` agrees with, up to the first that it does not, and choose the token behind them.
    `states`, `(num_rows, num_drafts + 1, hidden_size)`, are those of the newest token and of the drafts, normed.
    Returns the new tokens of each row, written and not yet taken over, and the last of each, `(num_rows, 1)`.
    """
    width = states.shape[1]
    lengths = [sequences.length(row) for row in rows]
    sequences.write(rows, lengths, drafts.tokens)
    logits = sequences.head(states, depth, rows).flatten(0, 1)
    at = [row for row in rows for _ in range(width)], [length + i for length in lengths for i in range(width)]
    scores = sequences.process(logits, *at)
    sequences.record(scores, logits, *at)
    scores = scores.view(len(rows), width, -1)
    accept = accept_sampled if sequences.do_sample else accept_greedy
    accepted, newest = accept(scores, drafts.tokens, drafts.probabilities)
    # A row's count, drafts and new token: the one wait of a cycle
    found = torch.cat([accepted[:, None], drafts.tokens, newest], dim=1).tolist()
    sequences.write(rows, [length + row[0] for length, row in zip(lengths, found, strict=True)], newest)
    choices = []
    for count, *proposed, token in found:
        choices.append([*(Choice(draft, drafts.exit_layer) for draft in proposed[:count]), Choice(token, depth)])
    return choices, newest


def _take_over(
    choices: list[list[Choice]], drafts: Drafts, rows: list[int], sequences: Sequences, statistics: DraftStatistics
) -> None:
    """Take over the new tokens of `rows`, let the cache forget the drafts that were rejected, and count."""
    num_drafts = drafts.tokens.shape[1]
    taken = sequences.advance(rows, choices)
    statistics.cycles += 1
    statistics.new_tokens += sum(taken)
    statistics.drafted += num_drafts * len(rows)
    statistics.accepted += sum(min(len(new) - 1, n) for new, n in zip(choices, taken, strict=True))
    if num_drafts:
        of_exit = statistics.exit_layers.get(drafts.exit_layer, 0)
        statistics.exit_layers[drafts.exit_layer] = of_exit + num_drafts * len(rows)
    cached = list(sequences.cache.lengths)
    for row, n in zip(rows, taken, strict=True):
        cached[row] += n - 1 - num_drafts  # the newest token has no keys and values yet
    sequences.cache.rollback(cached)


def accept_greedy(
    scores: torch.Tensor, drafts: torch.Tensor, probabilities: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`accept_sampled`], where each token is the likeliest."""
    targets = likeliest(scores)
    accepted = (targets[:, :-1] == drafts).long().cumprod(1).sum(1)
    return accepted, targets.gather(1, accepted[:, None])


def accept_sampled(
    scores: torch.Tensor, drafts: torch.Tensor, probabilities: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Speculative sampling (arXiv 2211.17192): keep each draft with probability `min(1, p / q)`, up to the first that is
    not kept, and draw the next token from what `p` has more than `q`. The tokens are distributed as by `p` alone.

    `p` is the softmax of `scores`, `(num_rows, num_drafts + 1, vocab_size)`; `drafts`, `(num_rows, num_drafts)`, were
    drawn from `q`, `probabilities`. Returns numbers of drafts kept, `(num_rows,)`, and next tokens, `(num_rows, 1)`.
    """
    p = scores.softmax(-1, dtype=torch.float32)
    if probabilities is None:
        accepted = torch.zeros(p.shape[0], dtype=torch.long, device=p.device)
        return accepted, draw(p[:, 0])
    q_drafts = probabilities.gather(2, drafts[..., None]).squeeze(-1)
    p_drafts = p[:, :-1].gather(2, drafts[..., None]).squeeze(-1)
    kept = torch.rand_like(q_drafts) * q_drafts < p_drafts
    accepted = kept.long().cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    p_next = p.gather(1, at).squeeze(1)
    q_next = torch.nn.functional.pad(probabilities, (0, 0, 0, 1)).gather(1, at).squeeze(1)
    rest = (p_next - q_next).clamp(min=0)
    # Rounding can leave nothing where both distributions are the same
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_next)
    return accepted, draw(rest)


def draft_policy(sequences: Sequences, decoding: SelfSpeculation) -> "FixedDrafts | LearnedDrafts":
    """Who decides on exit and length of the next drafts: `next(room)`, and `learn(...)` what has become of them."""
    if decoding.num_assistant_tokens != "auto":
        return FixedDrafts(decoding.exits[-1], int(decoding.num_assistant_tokens))
    # What a draft is expected to cost, in plain steps: the weights that it reads
    model = sequences.model
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    head = model.config.hidden_size * model.config.vocab_size
    plain = model.model.num_layers(decoding.depth) * layer + head
    costs = {k: (model.model.num_layers(k) * layer + head) / plain for k in decoding.exits}
    return LearnedDrafts(costs, sequences.max_length - sequences.prompt_length)


class FixedDrafts:
    """Always the same exit and number of tokens."""

    def __init__(self, exit_layer: int, num_tokens: int):
        self.exit_layer, self.num_tokens = exit_layer, num_tokens

    def next(self, room: int) -> tuple[int, int]:
        """Exit and number of tokens to draft, at most `room`."""
        return self.exit_layer, min(self.num_tokens, room)

    def learn(self, exit_layer: int, num_drafts: int, accepted: list[int], seconds: float) -> None:
        """Nothing to learn."""


class LearnedDrafts:
    """
    The exit and the number of drafts that pay most, learned while decoding. A cycle of `n` drafts, each accepted with
    probability `a`, brings `1 + a + ... + a^n` tokens for the time of a plain step and `n` drafts: acceptance is an
    average that forgets, times are medians of the newest. Where nothing pays it decodes plainly, and tries a single
    draft again after 2, 4, ... 256 steps, exit after exit. A draft must be affordable, too: what drafts in vain may
    cost is a share of the `max_tokens` that were asked for, and what accepted drafts have brought. `costs` are what a
    draft of each exit is expected to cost, in plain steps.
    """

    MAX_DRAFTS = 8
    MAX_LOSS = 0.03  # of the time that plain decoding takes for all tokens
    WORTHWHILE = 1.02  # tokens a time, as a multiple of plain decoding
    FIRST_WAIT, LAST_WAIT = 2, 256  # plain steps between tries
    MEMORY = 0.95  # what is left of an average when a token comes
    TIMES = 5  # medians of so many

    def __init__(self, costs: dict[int, float], max_tokens: float):
        self.costs = {k: deque([cost, cost], maxlen=self.TIMES) for k, cost in costs.items()}  # as if measured twice
        self.plain_seconds: deque[float] = deque(maxlen=self.TIMES)
        self.budget = self.MAX_LOSS * max_tokens  # plain steps
        self.accepted, self.tried = dict.fromkeys(costs, 0.5), dict.fromkeys(costs, 1.0)  # a guess, soon forgotten
        self.wait, self.plain_steps, self.tries = self.FIRST_WAIT, 0, 0

    def next(self, room: int) -> tuple[int, int]:
        """Exit and number of tokens to draft, at most `room`; 0 for a plain step."""
        gains = self._affordable_gains(room)
        if len(self.plain_seconds) < 2 or not gains:  # the first steps are slower than others
            return min(self.costs), 0
        gain, exit_layer, num_drafts = max(gains)
        if gain >= self.WORTHWHILE:
            self.wait, self.plain_steps = self.FIRST_WAIT, 0
            return exit_layer, num_drafts
        if self.plain_steps == self.wait:
            self.wait, self.plain_steps, self.tries = min(2 * self.wait, self.LAST_WAIT), 0, self.tries + 1
            exits = list(dict.fromkeys(k for _, k, _ in gains))
            return exits[self.tries % len(exits)], 1
        self.plain_steps += 1
        return exit_layer, 0

    def learn(self, exit_layer: int, num_drafts: int, accepted: list[int], seconds: float) -> None:
        """What has become of a cycle of `num_drafts` a row, of which `accepted` were kept; none are a plain step."""
        if num_drafts == 0:
            self.plain_seconds.append(seconds)
            return
        cost = seconds / median(self.plain_seconds) - 1
        self.costs[exit_layer].append(cost / num_drafts)
        kept = sum(accepted) / len(accepted)
        tried = sum(min(n + 1, num_drafts) for n in accepted) / len(accepted)  # up to the first that was rejected
        left = self.MEMORY**tried
        self.accepted[exit_layer] = left * self.accepted[exit_layer] + kept
        self.tried[exit_layer] = left * self.tried[exit_layer] + tried
        self.budget += kept - min(cost, 2 * num_drafts * self._cost(exit_layer))  # one late cycle is not the rule

    def _cost(self, exit_layer: int) -> float:
        return max(median(self.costs[exit_layer]), 0.01)

    def _affordable_gains(self, room: int) -> list[tuple[float, int, int]]:
        """Tokens a time, as a multiple of plain decoding, by exit and number of drafts."""
        gains = []
        for k in self.costs:
            acceptance, cost, tokens = self.accepted[k] / self.tried[k], self._cost(k), 1.0
            for n in range(1, min(self.MAX_DRAFTS, room) + 1):
                tokens += acceptance**n
                if n * cost <= self.budget:
                    gains.append((tokens / (1 + n * cost), k, n))
        return gains
