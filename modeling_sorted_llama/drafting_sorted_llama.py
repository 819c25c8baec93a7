"""Self-speculation: an exit drafts, the layers above it verify."""

import inspect
import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median

import torch
from transformers.generation import PromptLookupCandidateGenerator

from .compat_sorted_llama import logger
from .modes_sorted_llama import SelfSpeculation
from .sequences_sorted_llama import DraftStatistics, HiddenStates, Sequences, last_of


def decode_with_drafts(sequences: Sequences, decoding: SelfSpeculation):
    """
    Cycles of drafting and verifying. Drafting runs the lowest layers token by token, and leaves their states pending
    in the cache; verifying runs the rest for all of them in one pass. So no layer runs twice for a token that stays.
    """
    depth, do_sample = decoding.depth, sequences.do_sample
    learns = decoding.num_tokens is None
    passes_before = sequences.cache.layer_token_passes
    if sequences.config.output_hidden_states:
        sequences.hidden = HiddenStates(sequences.cache, depth)

    outputs = last_of(sequences.prefill(depth, decoding.exits if learns else None))
    plan: LearnedDrafts | FixedDrafts
    if learns:
        plan = LearnedDrafts(decoding, sequences, outputs)
    else:
        plan = FixedDrafts(decoding)
    lookup = _prompt_lookup(sequences, decoding)
    statistics = DraftStatistics()

    rows = list(range(sequences.batch_size))
    states, drafts, drafter, draft_probabilities = outputs.last_hidden_state[:, -1:], sequences.ids[:, :0], 0, None
    while True:
        # Verify: `states` are those of the newest token and of the drafts, `(num_rows, num_drafts + 1, hidden_size)`
        lengths = [sequences.lengths[row] for row in rows]
        num_drafts = drafts.shape[1]
        sequences.write(rows, lengths, drafts)
        logits = sequences.head(states, depth, rows)
        flat_rows = [row for row in rows for _ in range(num_drafts + 1)]
        flat_lengths = [length + i for length in lengths for i in range(num_drafts + 1)]
        scores = sequences.process(logits.flatten(0, 1), flat_rows, flat_lengths).view_as(logits)
        if do_sample:
            accepted, new = _accept_sampled(scores, drafts, draft_probabilities)
        else:
            targets = scores.argmax(-1)
            accepted = (targets[:, :-1] == drafts).long().cumprod(1).sum(1)
            new = targets.gather(1, accepted[:, None])
        counts_and_tokens = torch.cat([accepted[:, None], drafts, new], dim=1).tolist()  # the one wait of a cycle

        counts = [row[0] for row in counts_and_tokens]
        sequences.write(rows, [length + n for length, n in zip(lengths, counts, strict=True)], new)
        if sequences.scores is not None or sequences.logits is not None:
            kept = [j for j in range(len(flat_rows)) if j % (num_drafts + 1) <= counts[j // (num_drafts + 1)]]
            at = [flat_rows[j] for j in kept], [flat_lengths[j] for j in kept]
            index = sequences.rows_index(kept)
            sequences.record(sequences.scores, scores.flatten(0, 1)[index], *at)
            sequences.record(sequences.logits, logits.flatten(0, 1)[index], *at)
        tokens = [row[1 : 1 + n] + row[-1:] for row, n in zip(counts_and_tokens, counts, strict=True)]
        taken = sequences.advance(rows, tokens, [[drafter] * n + [depth] for n in counts])

        statistics.cycles += 1
        statistics.new_tokens += sum(taken)
        statistics.drafted += num_drafts * len(rows)
        statistics.accepted += sum(map(min, counts, taken))
        if num_drafts:
            used = statistics.exit_layers
            used[drafter] = used.get(drafter, 0) + num_drafts * len(rows)
        cached = list(sequences.cache.lengths)
        for row, n in zip(rows, taken, strict=True):
            cached[row] += n - 1 - num_drafts  # the newest token has no keys and values yet
        sequences.cache.rollback(cached)

        active = sequences.active_rows()
        if not active:
            break
        if active != rows:
            new = new[sequences.rows_index([rows.index(row) for row in active])]
        plan.learn(drafter, num_drafts, counts)
        rows, token = active, new

        # Draft: from the text so far, or one token at a time through the lowest layers
        shortest = min(sequences.lengths[row] for row in rows)
        room = int(min(sequences.max_length - shortest - 1, 2**31))
        candidates = None if lookup is None else lookup(rows, room)
        if candidates is not None:
            drafter, drafts = 0, candidates
            draft_probabilities = torch.nn.functional.one_hot(drafts, logits.shape[-1]).float() if do_sample else None
            outputs = sequences.forward(torch.cat([token, drafts], dim=1), rows, depth)
        else:
            drafter, num_drafts = plan.next(room)
            drafts, draft_probabilities = _draft(sequences, decoding, rows, token, drafter, num_drafts)
            token = torch.cat([token, drafts], dim=1)[:, -1:]  # the last draft has not been through any layer
            outputs = sequences.forward(token, rows, depth)
        states = outputs.last_hidden_state[:, -(drafts.shape[1] + 1) :]

    statistics.layer_token_passes = sequences.cache.layer_token_passes - passes_before
    logger.info(
        f"Drafted {statistics.drafted} tokens at exits {statistics.exit_layers}, {statistics.acceptance_rate:.1%} of "
        f"them accepted; {statistics.new_tokens} new tokens in {statistics.cycles} cycles."
    )
    return sequences.finish(draft_statistics=statistics)


def _draft(
    sequences: Sequences, decoding: SelfSpeculation, rows: list[int], token: torch.Tensor, exit_layer: int, number: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Draft up to `number` tokens with the first `exit_layer` layers; their states stay pending there.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: Drafts, `(num_rows, num_drafts)`, and, in sampling, the processed
        distributions that they were drawn from, `(num_rows, num_drafts, vocab_size)`.
    """
    lengths = [sequences.lengths[row] for row in rows]
    limit = decoding.confidence_threshold
    drafts: list[torch.Tensor] = []
    distributions: list[torch.Tensor] = []
    for i in range(number):
        states = sequences.forward(token, rows, exit_layer).last_hidden_state[:, -1]
        behind = [length + i for length in lengths]
        scores = sequences.process(sequences.head(states, exit_layer, rows), rows, behind)
        probabilities = scores.softmax(-1, dtype=torch.float32) if sequences.do_sample or limit is not None else scores
        token = torch.multinomial(probabilities, 1) if sequences.do_sample else scores.argmax(-1, keepdim=True)
        drafts.append(token)
        distributions.append(probabilities)
        if sequences.processors:  # the next ones see it
            sequences.write(rows, behind, token)
        if limit is not None and i + 1 < number and bool((probabilities.gather(1, token) < limit).all()):
            break
    if not drafts:
        return sequences.ids[: len(rows), :0], None
    return torch.cat(drafts, dim=1), torch.stack(distributions, dim=1) if sequences.do_sample else None


def _accept_sampled(
    scores: torch.Tensor, drafts: torch.Tensor, draft_probabilities: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Speculative sampling (arXiv 2211.17192): keep each draft with probability `min(1, p / q)`, up to the first that is
    not kept, and draw the next token from what `p` has more than `q`. The tokens are distributed as by `p` alone.

    Args:
        scores (`torch.Tensor` of shape `(num_rows, num_drafts + 1, vocab_size)`):
            Processed scores of the verifying depth, float32.
        drafts (`torch.LongTensor` of shape `(num_rows, num_drafts)`):
            Draft tokens.
        draft_probabilities (`torch.Tensor` of shape `(num_rows, num_drafts, vocab_size)`, *optional*):
            Processed distributions that they were drawn from; `None` without drafts.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Number of drafts kept, `(num_rows,)`, and next tokens, `(num_rows, 1)`.
    """
    p = scores.softmax(-1, dtype=torch.float32)
    if draft_probabilities is None:
        accepted = torch.zeros(p.shape[0], dtype=torch.long, device=p.device)
        return accepted, torch.multinomial(p[:, 0], 1)
    q_drafts = draft_probabilities.gather(2, drafts[..., None]).squeeze(-1)
    p_drafts = p[:, :-1].gather(2, drafts[..., None]).squeeze(-1)
    kept = torch.rand_like(q_drafts) * q_drafts < p_drafts
    accepted = kept.long().cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    p_next = p.gather(1, at).squeeze(1)
    q_next = torch.nn.functional.pad(draft_probabilities, (0, 0, 0, 1)).gather(1, at).squeeze(1)
    rest = (p_next - q_next).clamp(min=0)
    # Rounding can leave nothing where both distributions are the same
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_next)
    return accepted, torch.multinomial(rest, 1)


def _prompt_lookup(sequences: Sequences, decoding: SelfSpeculation) -> Callable | None:
    """Drafts from the text so far (transformers' prompt lookup): `(rows, room)` to tokens, `(num_rows, n)`."""
    if decoding.lookup_tokens is None:
        return None
    options = {
        "num_output_tokens": decoding.lookup_tokens,
        "max_matching_ngram_size": decoding.lookup_ngram,
        "max_length": 2**31,
        "vocab_size": sequences.model.config.vocab_size,
    }
    known = inspect.signature(PromptLookupCandidateGenerator).parameters
    generator = PromptLookupCandidateGenerator(**{name: v for name, v in options.items() if name in known})

    def look_up(rows: list[int], room: int) -> torch.Tensor | None:
        found = []
        for row in rows:
            ids = sequences.ids[row : row + 1, : sequences.lengths[row]]
            found.append(generator.get_candidates(ids)[0][:, ids.shape[1] :])
        n = min(room, *(f.shape[1] for f in found))
        return torch.cat([f[:, :n] for f in found]) if n > 0 else None

    return look_up


class FixedDrafts:
    """Draft lengths as in transformers: `num_assistant_tokens`, constant or by its heuristic."""

    def __init__(self, decoding: SelfSpeculation):
        assert decoding.num_tokens is not None
        self.exit_layer, self.num_tokens = decoding.exits[-1], decoding.num_tokens
        self.heuristic = decoding.schedule != "constant"

    def next(self, room: int) -> tuple[int, int]:
        """Exit and number of tokens to draft, at most `room`."""
        return self.exit_layer, min(self.num_tokens, room)

    def learn(self, exit_layer: int, num_drafts: int, accepted: list[int]) -> None:
        """What became of the drafts, row by row."""
        if self.heuristic and num_drafts:
            self.num_tokens = self.num_tokens + 2 if min(accepted) == num_drafts else max(1, self.num_tokens - 1)


class LearnedDrafts:
    """
    Draft lengths, and among several exits the one, that pay most. A draft of `n` tokens, each accepted with
    probability `a`, brings `(1 - a^(n+1)) / (1 - a)` tokens for the time of one plain step and `n` draft steps. `a` is
    what the prompt's last tokens show and then what verifying shows; times are measured, cycle by cycle. Where nothing
    pays it decodes plainly, and tries a single draft again after 12, 24, ... 384 steps, exit after exit. Finding out
    may cost a share of what decoding all tokens plainly would take, and no more.

    Args:
        decoding ([`SelfSpeculation`]): Exits and verifying depth.
        sequences ([`Sequences`]): The call.
        outputs: What the prefill has returned, with the states of `decoding.exits`.
    """

    MAX_TOKENS = 8
    MAX_LOSS = 0.04  # of the plain steps for as many tokens as were asked for
    WORTHWHILE = 1.02  # gain from which on it drafts
    FIRST_WAIT, LAST_WAIT = 12, 384
    PROMPT_TOKENS = 32  # through the head, of all rows and exits
    LOOK_AROUND = 32  # cycles
    MEMORY = 0.97  # of an acceptance, at each new one
    EXPECTED = 4  # measurements that the expected cost of a draft weighs as much as: single ones are noisy

    def __init__(self, decoding: SelfSpeculation, sequences: Sequences, outputs):
        self.sequences, self.depth = sequences, decoding.depth
        self.budget = self.MAX_LOSS * (sequences.max_length - sequences.prompt_length)  # plain steps
        states = [*outputs.exit_hidden_states, outputs.last_hidden_state]
        tokens = max(self.PROMPT_TOKENS // (sequences.batch_size * len(states)), 2)
        tokens = min(tokens, sequences.prompt_size, *(s.shape[1] for s in states))
        self.prompt_states: list[torch.Tensor] | None = [s[:, -tokens:].clone() for s in states]
        self.accepted, self.tried = dict.fromkeys(decoding.exits, 0.0), dict.fromkeys(decoding.exits, 0.0)
        # What a draft token costs, in plain steps: the weights that it reads, until most measurements say otherwise
        model = sequences.model
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        head = model.config.hidden_size * model.config.vocab_size
        expected = {k: (k * layer + head) / (decoding.depth * layer + head) for k in decoding.exits}
        self.costs = {k: deque([cost] * self.EXPECTED, maxlen=2 * self.EXPECTED + 1) for k, cost in expected.items()}
        self.plain_seconds: deque[float] = deque(maxlen=5)
        self.wait, self.plain_steps, self.draft_cycles, self.tries = self.FIRST_WAIT, 0, 0, 0
        self.clock: float | None = None

    def next(self, room: int) -> tuple[int, int]:
        """Exit and number of tokens to draft, at most `room`; 0 for a plain step."""
        if self.clock is None:
            self.clock = time.perf_counter()
        exits = list(self.costs)
        if len(self.plain_seconds) < 2 or self.draft_cycles == self.LOOK_AROUND:  # what a plain step takes by now
            self.draft_cycles += 1
            return exits[0], 0
        if self.prompt_states is not None:  # not before: many answers are over by now
            self._look_at_prompt(exits)
        lengths = [(k, n) for k in exits for n in range(1, self.MAX_TOKENS + 1) if self._can_afford(k, n)]
        if not lengths:
            return exits[0], 0
        exits = list(dict.fromkeys(k for k, _ in lengths))
        gain, exit_layer, n = max((self._gain(k, n), k, n) for k, n in lengths)
        if gain >= self.WORTHWHILE:
            self.wait, self.plain_steps = self.FIRST_WAIT, 0
            self.draft_cycles += 1
            if self.draft_cycles > self.LOOK_AROUND:  # and whether another exit has become better
                self.draft_cycles = 0
                return self._next_try(exits), min(1, room)
            return exit_layer, min(n, room)
        self.plain_steps += 1
        if self.plain_steps >= self.wait:
            self.wait, self.plain_steps = min(2 * self.wait, self.LAST_WAIT), 0
            return self._next_try(exits), min(1, room)
        return exit_layer, 0

    def learn(self, exit_layer: int, num_drafts: int, accepted: list[int]) -> None:
        """What became of the drafts, row by row; the time since the last call is theirs."""
        now = time.perf_counter()
        seconds, self.clock = (None if self.clock is None else now - self.clock), now
        if seconds is None or exit_layer not in self.costs:
            return
        if num_drafts == 0:
            self.plain_seconds.append(seconds)
            return
        cost = seconds / median(self.plain_seconds) - 1
        self.costs[exit_layer].append(cost / num_drafts)
        tried = sum(min(n + 1, num_drafts) for n in accepted) / len(accepted)
        kept = self.MEMORY**tried
        mean_accepted = sum(accepted) / len(accepted)
        self.accepted[exit_layer] = kept * self.accepted[exit_layer] + mean_accepted
        self.tried[exit_layer] = kept * self.tried[exit_layer] + tried
        self.budget += mean_accepted - cost

    def _next_try(self, exits: list[int]) -> int:
        self.tries += 1
        return exits[self.tries % len(exits)]

    def _acceptance(self, exit_layer: int) -> float:
        return (self.accepted[exit_layer] + 0.5) / (self.tried[exit_layer] + 1)

    def _cost(self, exit_layer: int) -> float:
        return max(median(self.costs[exit_layer]), 0.0)

    def _can_afford(self, exit_layer: int, n: int) -> bool:
        """Whether `n` drafts may all be in vain; several only once a single one has shown what they cost."""
        costs = self.costs[exit_layer]
        return n * max(self._cost(exit_layer), costs[-1]) <= self.budget and (n == 1 or len(costs) > self.EXPECTED)

    def _gain(self, exit_layer: int, n: int) -> float:
        """Tokens a time, as a multiple of plain decoding."""
        a = self._acceptance(exit_layer)
        return (1 - a ** (n + 1)) / (1 - a) / (1 + n * self._cost(exit_layer))

    def _look_at_prompt(self, exits: list[int]) -> None:
        """On how many of the prompt's last tokens the greedy token of each exit is that of the verifying depth."""
        assert self.prompt_states is not None
        states, sequences = self.prompt_states, self.sequences
        model, depths = sequences.model, [*exits, self.depth]
        normed = [*(model.model.exit_norm(k)(s) for k, s in zip(exits, states, strict=False)), states[-1]]
        all_rows = range(sequences.batch_size)
        if len({model.exit_head(k) for k in depths}) == 1:  # one product
            greedy = sequences.head(torch.cat(normed, dim=1), self.depth, all_rows).argmax(-1)
            greedy = torch.stack(greedy.chunk(len(depths), dim=1))
        else:
            states_of = zip(depths, normed, strict=True)
            greedy = torch.stack([sequences.head(s, k, all_rows).argmax(-1) for k, s in states_of])
        valid = torch.ones_like(greedy[-1], dtype=torch.bool)
        mask = sequences.prompt.get("attention_mask")
        if mask is not None:
            valid = mask[:, -valid.shape[1] :].bool()
        agreed = ((greedy == greedy[-1]) & valid).sum((1, 2)) / valid.sum().clamp(min=1)
        # A prompt is harder to predict than what the model says: of the models measured, those that agreed on a tenth
        # of the prompt accepted a third of the drafts, those on a third more than half. It weighs as six drafts do.
        for k, share in zip(exits, agreed.tolist(), strict=False):
            self.accepted[k], self.tried[k] = 6 * math.sqrt(share), 6.0
        self.prompt_states = None
        self.clock, before = time.perf_counter(), self.clock
        self.budget -= (self.clock - before) / median(self.plain_seconds)
