"""The tokens of one call of `generate`: how they are chosen, when they end, what is recorded and streamed of them."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from .block_sorted_llama import Block, index_tensor
from .cache_sorted_llama import STORAGE_STEP, SortedCache, as_sorted_cache
from .compat_sorted_llama import CACHE_NAME
from .graphs_sorted_llama import MAX_WIDTH
from .modes_sorted_llama import row_hooks


# transformers' processors that may hold something for each row of the batch
_PROCESSORS_OF_ROWS = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)


class Choice(NamedTuple):
    """A new token, the exit that it comes from, and with what confidence it left there."""

    token: int
    depth: int
    confidence: float | None = None


@dataclass
class DraftStatistics:
    """
    What drafting did in one call of `generate`, over all rows.

    Args:
        cycles (`int`): Draft-and-verify cycles and plain steps.
        new_tokens (`int`): Generated tokens.
        drafted (`int`): Draft tokens.
        accepted (`int`): Draft tokens that full depth kept.
        exit_layers (`dict[int, int]`): By the exit that drafted them, number of draft tokens.
        layer_token_passes (`int`): Number of times that a layer was run for a token, the prompt's included.
    """

    cycles: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    exit_layers: dict[int, int] = field(default_factory=dict)
    layer_token_passes: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the draft tokens that were kept; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class SortedGenerateOutput(GenerateDecoderOnlyOutput):
    """
    [`~transformers.generation.GenerateDecoderOnlyOutput`] with how deep each token was run.

    Args:
        exit_layers_used (`torch.LongTensor` of shape `(batch_size, new_tokens)`):
            The exit that each new token comes from; in drafting, the one that proposed it. 0 behind a row's end.
        exit_confidences (`torch.FloatTensor` of shape `(batch_size, new_tokens)`, *optional*):
            With `exit_threshold`, the confidence with which each token left. 0 behind a row's end.
        draft_statistics ([`DraftStatistics`], *optional*):
            With `assistant_early_exit`, what drafting did.
    """

    exit_layers_used: torch.Tensor | None = None
    exit_confidences: torch.Tensor | None = None
    draft_statistics: DraftStatistics | None = None


class Sequences:
    """The tokens of one call, given as to `_sample`. Rows are numbered as in the batch; lengths count the prompt."""

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ):
        self.model = model
        self._exit_head = lru_cache(model.exit_head)
        self.config = generation_config
        self.streamer = streamer
        self.device = input_ids.device
        self.batch_size, self.prompt_length = input_ids.shape
        self.do_sample = generation_config.do_sample
        self.rows_have_adapters = bool(row_hooks(model))
        self.ids: torch.Tensor = input_ids  # (batch_size, at least the longest row)
        self.choices: list[list[Choice]] = [[] for _ in range(self.batch_size)]
        self.ended_at: dict[int, int] = {}  # by row, its length
        self._streamed = self.prompt_length

        returned, given = generation_config.return_dict_in_generate, model_kwargs.get(CACHE_NAME)
        self.cache: Any = SortedCache(_slots_of(generation_config)) if given is None else as_sorted_cache(given)
        self.compile_config = model.compile_config_for(self.cache, generation_config)
        self.cache_is_returned = returned or given is not None
        self.scores: list[torch.Tensor] | None = [] if returned and generation_config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if returned and generation_config.output_logits else None

        self.processors, self.criteria = processors, criteria
        # As in transformers: where no criterion has an end token, rows go on until all are done
        self.ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.pad_token_id = int(generation_config._pad_token_tensor) if self.ends_rows else 0
        plain = (EosTokenCriteria, MaxLengthCriteria)
        self.criteria_are_plain = all(type(criterion) in plain for criterion in criteria)
        ends = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.eos_token_ids = {token for ids in ends for token in ids.tolist()}
        self.max_length = criteria.max_length or math.inf

        self.prompt = self._prompt_inputs(input_ids, {**model_kwargs, CACHE_NAME: self.cache})

    def _prompt_inputs(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the prefill runs: the prompt, or what a continued cache has not seen of it."""
        past, mask = self.cache.get_seq_length(), model_kwargs.get("attention_mask")
        embeds = model_kwargs.get("inputs_embeds")
        # transformers drops a mask of ones, and notes its length here
        known = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", -1)
        new_tokens = None
        if embeds is not None:
            new_tokens = embeds.shape[1] - past
        elif past and known == input_ids.shape[1]:  # else only the new tokens were passed
            new_tokens = input_ids.shape[1] - past
        if new_tokens is not None and new_tokens < 1:
            raise ValueError(
                f"The cache holds {past} tokens and the prompt no more, but at least one new token is needed: "
                "`cache.crop(-1)` forgets the newest."
            )
        inputs = self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=new_tokens, is_first_iteration=True, **model_kwargs
        )
        if any(inputs.get(name) not in (None, self.cache) for name in ("past_key_values", "cache")):
            raise ValueError(
                "Decoding at moving depth does not work with prefix tuning, whose keys and values are for all layers: "
                "generate with `exit_layer=k` or without it."
            )
        names = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")
        return {name: inputs[name] for name in names if inputs.get(name) is not None}

    # The model

    def prefill(self, depth: int) -> torch.Tensor:
        """Run the prompt to `depth`, in chunks where the config asks for them; the normed states of the last one."""
        tokens = self.prompt["inputs_embeds" if "inputs_embeds" in self.prompt else "input_ids"]
        past, size = self.cache.get_seq_length(), tokens.shape[1]
        chunk = self.config.prefill_chunk_size or size
        for start in range(0, size, chunk):
            end = min(start + chunk, size)
            inputs = {name: value[:, start:end] for name, value in self.prompt.items()}
            mask = self.prompt.get("attention_mask")
            if mask is not None and mask.shape[1] > size:  # it begins with the cached tokens
                inputs["attention_mask"] = mask[:, : past + end]
            states = self._run(range(self.batch_size), depth, **inputs)
        return states

    def forward(self, tokens: torch.Tensor, rows: Sequence[int], depth: int) -> torch.Tensor:
        """
        Run `tokens`, `(num_rows, num_tokens)`, and what is pending below `depth` to `depth`: normed states,
        `(num_rows, at least num_tokens, hidden_size)`, those of `tokens` last.
        """
        if not self.rows_have_adapters or len(rows) == self.batch_size:
            return self._run(rows, depth, input_ids=tokens, one_by_one=True)
        # The other rows come along: what is pending there goes deeper, and a new token of theirs is forgotten at once
        lengths, index = list(self.cache.lengths), self.rows_index(rows)
        tokens_of_all = self.ids.new_full((self.batch_size, tokens.shape[1]), self.pad_token_id)
        tokens_of_all[index] = tokens
        states = self._run(range(self.batch_size), depth, input_ids=tokens_of_all, one_by_one=True)
        self.cache.rollback([n + tokens.shape[1] * (row in rows) for row, n in enumerate(lengths)])
        return states[index]

    def _run(self, rows: Sequence[int], depth: int, **inputs: Any) -> torch.Tensor:
        cache_rows = None if len(rows) == self.batch_size else list(rows)
        inputs |= {CACHE_NAME: self.cache, "cache_rows": cache_rows, "compile_config": self.compile_config}
        outputs = self.model.model(**inputs, exit_layer=depth)
        return outputs.last_hidden_state.to(self.device)  # of a model over several devices

    def head(self, hidden_states: torch.Tensor, depth: int, rows: Sequence[int]) -> torch.Tensor:
        """Logits of normed states of an exit, `(num_rows, ..., hidden_size)`."""
        head = self._exit_head(depth)
        logits = self._as_batch(head, hidden_states, rows) if self.rows_have_adapters else head(hidden_states)
        return logits.to(self.device)

    def _as_batch(self, function: Callable, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """What `function`, which may know the rows of the batch, makes of the `values` of some of them."""
        if len(rows) == self.batch_size:
            return function(values)
        index = self.rows_index(rows)
        batch = values.new_zeros(self.batch_size, *values.shape[1:])
        batch[index] = values
        return function(batch).to(self.device)[index]

    # The tokens

    def length(self, row: int) -> int:
        """Number of tokens of a row."""
        return self.prompt_length + len(self.choices[row])

    def rows_index(self, rows: Sequence[int]) -> torch.Tensor:
        return index_tensor(rows, self.device)

    def select(self, values: torch.Tensor, rows: list[int], some: list[int]) -> torch.Tensor:
        """Of the `values` of `rows`, those of `some` of them."""
        if some == rows:
            return values
        place = {row: i for i, row in enumerate(rows)}
        return values[self.rows_index([place[row] for row in some])]

    def prefixes(self, rows: Sequence[int], length: int) -> torch.Tensor:
        """The first `length` tokens of `rows`."""
        if len(rows) == self.batch_size:
            return self.ids[:, :length]
        return self.ids[self.rows_index(rows), :length]

    def write(self, rows: list[int], lengths: Sequence[int], tokens: torch.Tensor) -> None:
        """Put `tokens`, `(num_rows, num_tokens)`, behind the first `lengths[i]` tokens of `rows[i]`."""
        end = max(lengths) + tokens.shape[1]
        if end > self.ids.shape[1]:
            room = self.ids.new_full((self.batch_size, end + 256 - self.ids.shape[1]), self.pad_token_id)
            self.ids = torch.cat([self.ids, room], dim=1)
        block = Block(None if len(rows) == self.batch_size else rows, lengths, [tokens.shape[1]] * len(rows))
        block.write(self.ids.unsqueeze(-1), tokens.unsqueeze(-1))

    def process(self, logits: torch.Tensor, rows: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Processed scores of `logits`, `(n, vocab_size)`: those after the first `lengths[i]` tokens of `rows[i]`."""
        if not self.processors:
            return logits if not self.do_sample and self.scores is None else logits.float()
        logits = logits.to(torch.float32, copy=True)
        scores = torch.empty_like(logits)
        for length, members in _by_value(lengths).items():
            rows_of_length = [rows[i] for i in members]
            if len(members) == len(rows):
                return self._process_rows(logits, rows_of_length, length)
            index = self.rows_index(members)
            scores[index] = self._process_rows(logits[index], rows_of_length, length)
        return scores

    def _process_rows(self, scores: torch.Tensor, rows: list[int], length: int) -> torch.Tensor:
        input_ids = self.prefixes(rows, length)
        for processor in self.processors:
            is_users = not type(processor).__module__.startswith("transformers.")
            if is_users or isinstance(processor, _PROCESSORS_OF_ROWS):
                scores = self._as_batch(partial(processor, self.ids[:, :length]), scores, rows)
                continue
            if type(processor) is PrefixConstrainedLogitsProcessor:
                # Not as a batch: its function may know no token behind what is in the other rows
                allowed = processor._prefix_allowed_tokens_fn
                processor = PrefixConstrainedLogitsProcessor(lambda i, ids, allowed=allowed: allowed(rows[i], ids), 1)
            scores = processor(input_ids, scores)
        return scores

    def choose(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Next tokens, `(num_rows,)`, of processed scores, `(num_rows, vocab_size)`."""
        if not self.do_sample:
            return likeliest(scores)
        # Drawn for the whole batch, as in transformers: the same seed, the same tokens
        return self._as_batch(lambda batch: draw(batch.softmax(-1, dtype=torch.float32)), scores, rows).squeeze(1)

    def active_rows(self) -> list[int]:
        """Rows that go on."""
        rows, end = range(self.batch_size), self._common_end()
        return [row for row in rows if self.length(row) < end and not (self.ends_rows and row in self.ended_at)]

    def _common_end(self) -> float:
        """Where rows do not end one by one, the length at which all do, as soon as the last has met a criterion."""
        go_on = self.ends_rows or len(self.ended_at) < self.batch_size
        return math.inf if go_on else max(self.ended_at.values())

    def advance(self, rows: Sequence[int], choices: Sequence[Sequence[Choice]]) -> list[int]:
        """
        Take over the new tokens of `rows`, already written, one by one and as far as the row goes; stream them.
        Returned is the number of tokens taken over, of each row.
        """
        before = [self.length(row) for row in rows]
        going = dict(zip(rows, choices, strict=True))
        for step in range(max(map(len, choices))):
            going = {row: new for row, new in going.items() if step < len(new)}
            for row, new in going.items():
                self.choices[row].append(new[step])
            for row in self._rows_at_their_end(list(going)):
                self.ended_at.setdefault(row, self.length(row))
                if self.ends_rows:
                    del going[row]
            self._stream()
        return [self.length(row) - length for row, length in zip(rows, before, strict=True)]

    def _rows_at_their_end(self, rows: list[int]) -> list[int]:
        """Those of `rows` that end with the token they have just got."""
        if self.criteria_are_plain:
            eos, limit = self.eos_token_ids, self.max_length
            return [row for row in rows if self.choices[row][-1].token in eos or self.length(row) >= limit]
        ended = []
        for length, members in _by_value([self.length(row) for row in rows]).items():
            scores = None if self.scores is None else tuple(self.scores[: length - self.prompt_length])
            done = self.criteria(self.ids[:, :length], scores).tolist()  # a user's may know the rows of the batch
            ended += [rows[i] for i in members if done[rows[i]]]
        return ended

    def _stream(self) -> None:
        """Stream the columns that every row has reached: what plain decoding streams, and in its order."""
        if self.streamer is None:
            return
        lengths = [self.length(row) for row in range(self.batch_size)]
        going = [n for row, n in enumerate(lengths) if not (self.ends_rows and row in self.ended_at)]
        reached = int(min(*going, self._common_end())) if going else max(lengths)
        for column in range(self._streamed, reached):
            step = column - self.prompt_length
            if hasattr(self.streamer, "put_exits"):
                self.streamer.put_exits(*self._exits_of(step))
            behind = torch.tensor([length <= column for length in lengths], device="cpu")
            self.streamer.put(torch.where(behind, self.pad_token_id, self.ids[:, column].cpu()))
        self._streamed = max(self._streamed, reached)

    def _exits_of(self, step: int) -> tuple[list[int], list[float] | None]:
        """Depths and, where they were measured, confidences of the rows' tokens of a step; 0 behind a row's end."""
        column = [choices[step] if step < len(choices) else Choice(0, depth=0) for choices in self.choices]
        are_measured = any(choice.confidence is not None for choice in column)
        confidences = [choice.confidence or 0.0 for choice in column] if are_measured else None
        return [choice.depth for choice in column], confidences

    def record(self, scores: torch.Tensor, logits: torch.Tensor, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """
        Keep what is asked for of `scores` and `logits`, `(n, vocab_size)`: those of the token behind the first
        `lengths[i]` of `rows[i]`. What a deeper exit says of a token, or a later cycle, takes their place.
        """
        for store, values in ((self.scores, scores), (self.logits, logits)):
            if store is None:
                continue
            for length, members in _by_value(lengths).items():
                step = length - self.prompt_length
                while len(store) <= step:
                    store.append(torch.zeros(self.batch_size, values.shape[-1], device=self.device))
                store[step][self.rows_index([rows[i] for i in members])] = values[self.rows_index(members)].float()

    # The end

    def finish(self, draft_statistics: DraftStatistics | None = None) -> SortedGenerateOutput | torch.Tensor:
        """Rows of equal length, a cache as plain decoding leaves it, and the output of `generate`."""
        ends = [self.length(row) for row in range(self.batch_size)]
        length = int(min(max(ends), self._common_end()))
        ends = [min(end, length) for end in ends]
        columns = torch.arange(length, device=self.device)
        sequences = torch.where(columns < self.rows_index(ends)[:, None], self.ids[:, :length], self.pad_token_id)
        if self.streamer is not None:
            self.streamer.end()
        if self.cache_is_returned:
            self._level_cache(sequences, ends)
        if not self.config.return_dict_in_generate:
            return sequences

        new_tokens = length - self.prompt_length
        for row, end in enumerate(ends):  # what was drafted behind a row's end
            for store in (self.scores or [], self.logits or []):
                for values in store[end - self.prompt_length : new_tokens]:
                    values[row] = 0
        depths, confidences = zip(*(self._exits_of(step) for step in range(new_tokens)), strict=True)
        are_measured = confidences[0] is not None
        return SortedGenerateOutput(
            sequences=sequences,
            scores=None if self.scores is None else tuple(self.scores[:new_tokens]),
            logits=None if self.logits is None else tuple(self.logits[:new_tokens]),
            exit_layers_used=torch.tensor(depths, device=self.device).T.contiguous(),
            exit_confidences=torch.tensor(confidences, device=self.device).T.contiguous() if are_measured else None,
            draft_statistics=draft_statistics,
            **{CACHE_NAME: self.cache},
        )

    def _level_cache(self, sequences: torch.Tensor, lengths: list[int]) -> None:
        """All tokens but the newest are in the cache, the padding of ended rows included; no layer runs for it yet."""
        longest = max(self.length(row) for row in range(self.batch_size))
        before = max(self.cache.lengths) - (longest - 1)  # tokens of the cache that the call did not see
        target = before + sequences.shape[1] - 1
        self.cache.rollback([min(before + length - 1, target) for length in lengths])
        counts = [target - length for length in self.cache.lengths]
        if max(counts) == 0:
            return
        columns = index_tensor(self.cache.lengths, self.device)[:, None] - before
        columns = (columns + torch.arange(max(counts), device=self.device)).clamp(max=sequences.shape[1] - 1)
        embeds = self.model.model.embed_tokens(sequences.gather(1, columns))
        rotary_emb = self.model.model.rotary_emb
        block = self.cache.append(embeds, counts=counts, rotary_emb=rotary_emb, one_by_one=True)
        self.cache.trunk(0, 1)[0].suspend(embeds, block)


def _slots_of(generation_config: GenerationConfig) -> int:
    """Number of tokens of a row to allocate at once: in steps, so that calls of about a length share their graphs."""
    if generation_config.cache_implementation != "static":
        return 0
    with_cells_of_no_token = generation_config.max_length + MAX_WIDTH
    return -(-with_cells_of_no_token // STORAGE_STEP) * STORAGE_STEP


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """The token with the highest score, `(...)`, of scores `(..., vocab_size)`; the first of several."""
    return scores.max(-1).indices  # `argmax` takes four times as long on a CPU


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """A token, `(num_rows, 1)`, of each distribution, `(num_rows, vocab_size)`."""
    return torch.multinomial(probabilities, num_samples=1)


def _by_value(values: Sequence[int]) -> dict[int, list[int]]:
    """Indices of `values`, by value."""
    groups = defaultdict(list)
    for index, value in enumerate(values):
        groups[value].append(index)
    return groups
