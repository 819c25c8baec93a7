"""The tokens of one call of `generate`: how they are chosen, when they end, what is recorded and streamed of them."""

import copy
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from .block_sorted_llama import Block, index_tensor, reserve
from .cache_sorted_llama import STORAGE_BLOCK, as_sorted_cache
from .compat_sorted_llama import CACHE_NAME
from .modes_sorted_llama import row_hooks


# What transformers' processors keep for each row of the batch
_VALUES_OF_ROWS = ("prompt_ignore_length", "encoder_input_ids", "generated_ngrams")


@dataclass
class DraftStatistics:
    """
    What drafting did in one call of `generate`, over all rows.

    Args:
        cycles (`int`): Draft-and-verify cycles and plain steps.
        new_tokens (`int`): Generated tokens.
        drafted (`int`): Draft tokens.
        accepted (`int`): Draft tokens that full depth kept.
        exit_layers (`dict[int, int]`): By the exit that drafted them, number of draft tokens; 0 is prompt lookup.
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
    """
    The tokens of one call: how they are chosen, when they end, and what is recorded and streamed of them.

    Raises:
        ValueError: If the cache is no [`SortedCache`] or holds the whole prompt, or if the prompt has keys and values.
    """

    def __init__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer,
        model_kwargs: dict[str, Any],
    ):
        self.model = model
        self.config = generation_config
        self.cache: Any = as_sorted_cache(model_kwargs[CACHE_NAME])
        self.streamer = streamer
        self.device = input_ids.device
        self.batch_size, self.prompt_length = input_ids.shape
        self.runs_all_rows = bool(row_hooks(model))  # which count the rows of the batch
        self.lengths = [self.prompt_length] * self.batch_size
        self.ids: torch.Tensor = input_ids  # (batch_size, at least max(lengths))
        self.prompt = self._prompt_inputs(input_ids, model_kwargs)
        self.prompt_size: int = self.prompt.get("inputs_embeds", self.prompt.get("input_ids")).shape[1]  # type: ignore
        self.do_sample = generation_config.do_sample

        self._processor_rows: Sequence[int] = ()
        self.processors = LogitsProcessorList(map(self._for_rows, logits_processor))
        self.criteria = stopping_criteria
        # As in transformers: where no criterion has an end token, rows go on until all are done
        self.ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.pad_token_id = int(generation_config._pad_token_tensor) if self.ends_rows else 0
        plain = (EosTokenCriteria, MaxLengthCriteria)
        self.plain_criteria = all(type(criterion) in plain for criterion in stopping_criteria)
        eos = [criterion.eos_token_id for criterion in stopping_criteria if type(criterion) is EosTokenCriteria]
        self.eos_token_ids = {token for ids in eos for token in ids.tolist()}
        self.max_length = stopping_criteria.max_length or math.inf
        self.finished_at: dict[int, int] = {}

        returned = generation_config.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = [] if returned and generation_config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if returned and generation_config.output_logits else None
        self.cache_is_returned = returned or getattr(self.cache, "_is_user_defined", False)
        self.depths: list[list[int]] = [[] for _ in self.lengths]
        self.confidences: list[list[float]] | None = None
        self.hidden: HiddenStates | None = None
        self._streamed = self.prompt_length

    def _prompt_inputs(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the prefill runs: the prompt, or what a continued cache has not seen of it."""
        past, mask = self.cache.get_seq_length(), model_kwargs.get("attention_mask")
        embeds = model_kwargs.get("inputs_embeds")
        known = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", -1)
        new_tokens = None
        if embeds is not None:
            new_tokens = embeds.shape[1] - past
        elif past and known == input_ids.shape[1]:  # else only the new tokens were passed
            new_tokens = input_ids.shape[1] - past
        if new_tokens is not None and new_tokens < 1:
            raise ValueError(
                f"The cache holds {past} tokens and the prompt has no more: it needs at least one new token. "
                "`cache.crop(-1)` forgets the newest."
            )
        inputs = self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=new_tokens, is_first_iteration=True, **model_kwargs
        )
        if any(inputs.get(name) not in (None, self.cache) for name in ("past_key_values", "cache")):
            raise ValueError(
                "Decoding at moving depth keeps keys and values in its `SortedCache`, and cannot take those that "
                "prefix tuning brings along for all layers: generate with `exit_layer=k` or without it."
            )
        return {
            name: inputs[name]
            for name in ("input_ids", "inputs_embeds", "position_ids", "attention_mask")
            if inputs.get(name) is not None
        }

    def prefill(self, depth: int, exit_layers: Sequence[int] | None = None):
        """Run the prompt to `depth`, in chunks where the config asks for them; yields the model's outputs."""
        size = self.prompt_size
        past = self.cache.get_seq_length()
        chunk = self.config.prefill_chunk_size or size
        for start in range(0, size, chunk):
            end = min(start + chunk, size)
            inputs = {
                name: value[:, : past + end]
                if name == "attention_mask" and value.shape[1] > size
                else value[:, start:end]
                for name, value in self.prompt.items()
            }
            yield self._run(list(range(self.batch_size)), depth, exit_layers, **inputs)

    def forward(self, tokens: torch.Tensor, rows: list[int], depth: int):
        """Run `tokens`, `(num_rows, num_tokens)`, and what is pending below `depth` to `depth`."""
        if not self.runs_all_rows or len(rows) == self.batch_size:
            return self._run(rows, depth, input_ids=tokens, one_by_one=True)
        # The other rows come along: what is pending there goes deeper, and a new token of theirs is forgotten at once
        lengths, index = list(self.cache.lengths), self.rows_index(rows)
        tokens_of_all = self.ids.new_full((self.batch_size, tokens.shape[1]), self.pad_token_id)
        tokens_of_all[index] = tokens
        outputs = self._run(list(range(self.batch_size)), depth, input_ids=tokens_of_all, one_by_one=True)
        outputs.last_hidden_state = outputs.last_hidden_state[index]
        self.cache.rollback([n + tokens.shape[1] * (row in rows) for row, n in enumerate(lengths)])
        return outputs

    def _run(self, rows: list[int], depth: int, exit_layers: Sequence[int] | None = None, **inputs: Any):
        inputs[CACHE_NAME] = self.cache
        cache_rows = None if len(rows) == self.batch_size else rows
        if self.hidden is None:
            outputs = self.model.model(**inputs, exit_layer=depth, exit_layers=exit_layers, cache_rows=cache_rows)
            outputs.last_hidden_state = outputs.last_hidden_state.to(self.device)  # of a model over several devices
            return outputs
        exit_layers = [*(exit_layers or ()), depth]  # the states before the norm, which the next segment starts from
        starts = [self.cache.lengths_in(i) for i in range(depth)]
        outputs = self.model.model(
            **inputs, exit_layer=depth, exit_layers=exit_layers, cache_rows=cache_rows, output_hidden_states=True
        )
        self.hidden.add(outputs, rows, starts)
        outputs.exit_hidden_states = outputs.exit_hidden_states[:-1]
        outputs.last_hidden_state = outputs.last_hidden_state.to(self.device)
        return outputs

    def head(self, hidden_states: torch.Tensor, depth: int, rows: Sequence[int]) -> torch.Tensor:
        """Logits of normed states of an exit, `(num_rows, ..., hidden_size)`."""
        head = self.model.exit_head(depth)
        if not self.runs_all_rows or len(rows) == self.batch_size:
            return head(hidden_states).to(self.device)
        index = self.rows_index(rows)
        states_of_all = hidden_states.new_zeros(self.batch_size, *hidden_states.shape[1:])
        states_of_all[index] = hidden_states
        return head(states_of_all).to(self.device)[index]

    def rows_index(self, rows: Sequence[int]) -> torch.Tensor:
        return index_tensor(rows, self.device)

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
            self._processor_rows = [rows[i] for i in members]
            if len(members) == len(rows):
                return self.processors(self.prefixes(self._processor_rows, length), logits)
            index = self.rows_index(members)
            scores[index] = self.processors(self.prefixes(self._processor_rows, length), logits[index])
        return scores

    def _for_rows(self, processor):
        """A processor that works where some of the rows are processed, and not all of one length."""
        if type(processor) is PrefixConstrainedLogitsProcessor:
            allowed = processor._prefix_allowed_tokens_fn
            return PrefixConstrainedLogitsProcessor(lambda row, ids: allowed(self._processor_rows[row], ids), 1)
        if not type(processor).__module__.startswith("transformers."):

            def process_batch(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                if len(self._processor_rows) == self.batch_size:
                    return processor(input_ids, scores)
                index = self.rows_index(self._processor_rows)  # a user's may know the rows of the batch
                batch = scores.new_zeros(self.batch_size, scores.shape[-1])
                batch[index] = scores
                return processor(self.ids[:, : input_ids.shape[1]], batch)[index]

            return process_batch
        own = {name: value for name, value in vars(processor).items() if name in _VALUES_OF_ROWS}
        own = {name: value for name, value in own.items() if isinstance(value, (torch.Tensor, list))}
        if not own:
            return processor

        def process_rows(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            rows, of_rows = self._processor_rows, copy.copy(processor)
            for name, value in own.items():
                is_tensor = isinstance(value, torch.Tensor)
                setattr(of_rows, name, value[self.rows_index(rows)] if is_tensor else [value[row] for row in rows])
            if hasattr(of_rows, "batch_size"):
                of_rows.batch_size = len(rows)
            return of_rows(input_ids, scores)

        return process_rows

    def choose(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Next tokens, `(num_rows,)`, of processed scores, `(num_rows, vocab_size)`."""
        if not self.do_sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1, dtype=torch.float32)
        if len(rows) == self.batch_size:
            return torch.multinomial(probabilities, num_samples=1).squeeze(1)
        # Drawn for the whole batch, as in transformers: the same seed, the same tokens
        index = self.rows_index(rows)
        batch = torch.ones(self.batch_size, scores.shape[-1], device=scores.device)
        batch[index] = probabilities
        return torch.multinomial(batch, num_samples=1).squeeze(1)[index]

    def active_rows(self) -> list[int]:
        """Rows that go on."""
        rows = range(self.batch_size)
        if self.ends_rows:
            return [row for row in rows if row not in self.finished_at]
        if len(self.finished_at) < self.batch_size:
            return list(rows)
        last = max(self.finished_at.values())
        return [row for row in rows if self.lengths[row] < last]

    def advance(
        self, rows: Sequence[int], tokens: list[list[int]], depths: list[list[int]], confidences=None
    ) -> list[int]:
        """
        Take over new tokens, already written, row by row and one by one, as far as the row goes; stream them.

        Returns:
            `list[int]`: Number of tokens taken over, of each row.
        """
        taken = [0] * len(rows)
        ended: set[int] = set()
        for step in range(max(map(len, tokens))):
            members = [i for i, row in enumerate(rows) if step < len(tokens[i]) and i not in ended]
            for i in members:
                self.lengths[rows[i]] += 1
                self.depths[rows[i]].append(depths[i][step])
                if confidences is not None and self.confidences is not None:
                    self.confidences[rows[i]].append(confidences[i][step])
                taken[i] += 1
            ends = self._ends([rows[i] for i in members], [tokens[i][step] for i in members])
            for i, end in zip(members, ends, strict=True):
                if end:
                    self.finished_at.setdefault(rows[i], self.lengths[rows[i]])
                    if self.ends_rows:
                        ended.add(i)
            self._stream()
        return taken

    def _ends(self, rows: list[int], tokens: list[int]) -> list[bool]:
        """Whether each of the rows ends with the token it has just got."""
        if self.plain_criteria:
            return [
                token in self.eos_token_ids or self.lengths[row] >= self.max_length
                for row, token in zip(rows, tokens, strict=True)
            ]
        ends = [False] * len(rows)
        for length, members in _by_value([self.lengths[row] for row in rows]).items():
            scores = None if self.scores is None else tuple(self.scores[: length - self.prompt_length])
            done = self.criteria(self.ids[:, :length], scores).tolist()  # a user's may know the rows of the batch
            for i in members:
                ends[i] = done[rows[i]]
        return ends

    def _stream(self) -> None:
        """Stream the columns that every row has reached: what plain decoding streams, and in its order."""
        if self.streamer is None:
            return
        going = [row for row in range(self.batch_size) if not (self.ends_rows and row in self.finished_at)]
        reached = min((self.lengths[row] for row in going), default=max(self.lengths))
        if not self.ends_rows and len(self.finished_at) == self.batch_size:
            reached = min(reached, max(self.finished_at.values()))
        for column in range(self._streamed, reached):
            step = column - self.prompt_length
            if hasattr(self.streamer, "put_exits"):
                depths = [depths[step] if step < len(depths) else 0 for depths in self.depths]
                sure: Any = self.confidences and [c[step] if step < len(c) else 0.0 for c in self.confidences]
                self.streamer.put_exits(depths, sure)
            token = self.ids[:, column].cpu()
            behind = torch.tensor([length <= column for length in self.lengths], device="cpu")
            self.streamer.put(torch.where(behind, self.pad_token_id, token))
        self._streamed = max(self._streamed, reached)

    def record(self, store: list[torch.Tensor] | None, values: torch.Tensor, rows: Sequence[int], lengths) -> None:
        """Keep `values`, `(n, vocab_size)`: those of the token behind the first `lengths[i]` of `rows[i]`."""
        if store is None:
            return
        for length, members in _by_value(lengths).items():
            step = length - self.prompt_length
            while len(store) <= step:
                store.append(torch.zeros(self.batch_size, values.shape[-1], device=self.device))
            store[step][self.rows_index([rows[i] for i in members])] = values[self.rows_index(members)].float()

    def finish(self, **fields: Any) -> SortedGenerateOutput | torch.Tensor:
        """The end of the call: rows of equal length, a cache as plain decoding leaves it, and the output."""
        length = max(self.lengths) if self.ends_rows else max(self.finished_at.values())
        lengths = [min(n, length) for n in self.lengths]
        columns = torch.arange(length, device=self.device)
        sequences = torch.where(
            columns < index_tensor(lengths, self.device)[:, None], self.ids[:, :length], self.pad_token_id
        )
        if self.streamer is not None:
            self.streamer.end()
        if self.cache_is_returned:
            self._level_cache(sequences, lengths)
        if not self.config.return_dict_in_generate:
            return sequences

        new_tokens = length - self.prompt_length
        for row, end in enumerate(lengths):  # what was drafted behind a row's end
            for store in (self.scores or [], self.logits or []):
                for values in store[end - self.prompt_length : new_tokens]:
                    values[row] = 0
            if self.hidden is not None:
                self.hidden.end(row, self.prompt_size + end - self.prompt_length - 1)
        padded = [(used + [0] * new_tokens)[:new_tokens] for used in self.depths]
        if self.confidences is not None:
            confidences = [(sure + [0.0] * new_tokens)[:new_tokens] for sure in self.confidences]
            fields["exit_confidences"] = torch.tensor(confidences, device=self.device)
        return SortedGenerateOutput(
            sequences=sequences,
            scores=None if self.scores is None else tuple(self.scores[:new_tokens]),
            logits=None if self.logits is None else tuple(self.logits[:new_tokens]),
            hidden_states=None if self.hidden is None else self.hidden.by_step(self.prompt_size, new_tokens),
            exit_layers_used=torch.tensor(padded, device=self.device),
            **{CACHE_NAME: self.cache},
            **fields,
        )

    def _level_cache(self, sequences: torch.Tensor, lengths: list[int]) -> None:
        """All tokens but the newest are in the cache, the padding of ended rows included; no layer runs for it yet."""
        before = max(self.cache.lengths) - (max(self.lengths) - 1)  # tokens of the cache that the call did not see
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
        self.cache.suspend(0, embeds, block)


class HiddenStates:
    """Hidden states by token, put together from passes that run different tokens through different layers."""

    def __init__(self, cache, depth: int):
        self.depth = depth
        self.first = cache.get_seq_length()  # slot of the call's first token
        self.storage: list[Any] = [None] * (depth + 1)  # embeddings, outputs of the layers

    def add(self, outputs, rows: list[int], starts: list[tuple[int, ...]]) -> None:
        """Take over what one pass has run; `starts[i]` is the number of tokens that had passed layer `i` before."""
        states = list(outputs.hidden_states)
        if len(states) <= self.depth:
            states[-1] = outputs.exit_hidden_states[-1]
        for i, values in enumerate(states):
            row_starts = [starts[max(i - 1, 0)][row] for row in rows] if starts[0] else [0] * len(rows)
            block = Block(rows, row_starts, [values.shape[1]] * len(rows))
            storage = self.storage[i]
            batch_size = len(rows) if storage is None else storage.shape[0]
            self.storage[i] = storage = reserve(storage, values, batch_size, block.end, STORAGE_BLOCK)
            block.write(storage, values)

    def end(self, row: int, tokens: int) -> None:
        """Row `row` ends behind its first `tokens` tokens of this call."""
        for storage in self.storage:
            storage[row, self.first + tokens :] = 0

    def by_step(self, prompt_tokens: int, new_tokens: int) -> tuple[tuple[torch.Tensor, ...], ...]:
        """As transformers returns them: those of the prompt, then of one token a step; zeros behind a row's end."""
        first_step = self.first + prompt_tokens
        ends = [self.first, *range(first_step, first_step + new_tokens)]
        return tuple(
            tuple(storage[:, start:end] for storage in self.storage)
            for start, end in zip(ends, ends[1:], strict=False)
        )


def _by_value(values: Sequence[int]) -> dict[int, list[int]]:
    """Indices of `values`, by value."""
    groups = defaultdict(list)
    for index, value in enumerate(values):
        groups[value].append(index)
    return groups


def last_of(outputs):
    """The last of several outputs; the others are let go of."""
    return deque(outputs, maxlen=1)[0]
