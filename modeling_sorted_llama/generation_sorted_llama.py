"""`generate` at moving depth: tokens that leave at an exit, and an exit that drafts for the layers above it."""

import copy
import inspect
import math
import numbers
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput, PromptLookupCandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging

from .cache_sorted_llama import CACHE_NAME, STORAGE_BLOCK, Block, as_sorted_cache, index_tensor, reserve
from .configuration_sorted_llama import as_int, check_exit_layer


logger = logging.get_logger("transformers.modeling_sorted_llama")

# Keyword arguments of `generate`, and fields of a generation config, that transformers does not know
SORTED_GENERATION_FIELDS = (
    "exit_layer",
    "exit_threshold",
    "exit_confidence",
    "min_exit_layer",
    "max_exit_layer",
    "exit_agreement",
)
# Those of transformers' assisted generation that mean the same here
_DRAFT_FIELDS = (
    "assistant_early_exit",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
)
# What transformers' own strategies the loops below stand for
DECODED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What transformers' processors keep for each row of the batch
_VALUES_OF_ROWS = ("prompt_ignore_length", "encoder_input_ids", "generated_ngrams")
# Those that count on one call a token, in order
_STATEFUL_PROCESSORS = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
_CONFIDENCES = ("max_prob", "margin", "entropy")
_MODE_OF = {
    "exit_threshold": "exit_threshold",
    "exit_confidence": "exit_threshold",
    "min_exit_layer": "exit_threshold",
    "max_exit_layer": "exit_threshold",
    "assistant_early_exit": "assistant_early_exit",
    "exit_layer": "exit_layer",
    "exit_agreement": "auto",
}
_MODES = ("exit_threshold", "assistant_early_exit", "exit_layer")
_SCHEDULES = ("constant", "heuristic", "heuristic_transient")


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


# The modes: what a call asks for, checked before any work


@dataclass(frozen=True)
class ConfidenceExit:
    """Each token leaves at the first of `depths` whose confidence reaches its threshold, at the latest at the last."""

    depths: list[int]
    thresholds: list[float]
    confidence: str | Callable

    def measure(self, scores: torch.Tensor, depth: int, input_ids: torch.Tensor) -> torch.Tensor:
        """Confidence of each row of `scores`, `(num_rows, vocab_size)` processed scores: `(num_rows,)`, float32."""
        if callable(self.confidence):
            return self.confidence(scores, depth, input_ids)
        probabilities = scores.softmax(-1, dtype=torch.float32)
        if self.confidence == "max_prob":
            return probabilities.amax(-1)
        if self.confidence == "margin":
            first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
            return first - second
        return (1 - torch.special.entr(probabilities).sum(-1) / math.log(scores.shape[-1])).clamp(min=0)


@dataclass(frozen=True)
class RowDepths:
    """Each row of the batch has its own depth, or takes one of `candidates` by its prompt (`exit_layer="auto"`)."""

    row_depths: list[int] | None
    candidates: list[int]
    agreement: float


@dataclass(frozen=True)
class SelfSpeculation:
    """One of `exits` drafts, the layers up to `depth` verify."""

    depth: int
    exits: list[int]
    num_tokens: int | None  # `None` learns the length while decoding
    schedule: str
    confidence_threshold: float | None
    lookup_tokens: int | None
    lookup_ngram: int


def read_decoding_fields(model, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    What a call says about depth and drafting: its keyword arguments, then its generation config, then the model's,
    then the default depth of the model's config. The most specific that names a mode decides on it; the others add
    what belongs to it. Read before transformers fills in its defaults, which would pass for the user's. `use_cache` is
    `False` where the caller says so, and not where a checkpoint does, which was trained without a cache.
    """
    names = (*SORTED_GENERATION_FIELDS, *_DRAFT_FIELDS)
    fields: dict[str, Any] = dict.fromkeys(names)
    configs = (generation_config, model.generation_config, model.config)
    for source in (kwargs, *({name: getattr(config, name, None) for name in names} for config in configs)):
        mode = _mode(fields)
        for name in names:
            value = source.get(name)
            if value is None or fields[name] is not None:
                continue
            number = as_int(value)  # numpy's integers, and 0-dimensional tensors, are depths as well
            value = value if number is None else number
            is_depth = name == "exit_layer" and type(value) is int and mode not in ("auto", "depths of rows")
            if mode is None or is_depth or _MODE_OF.get(name, mode) == mode:
                fields[name] = value
    of_checkpoint = model.generation_config.use_cache is False
    by_caller = kwargs.get("use_cache", None if of_checkpoint else getattr(generation_config, "use_cache", None))
    return {**fields, "use_cache": by_caller}


def check_continuous_batching(model, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """
    Refuse a depth that continuous batching would pass over: it runs all requests at the depth of the model's config.

    Args:
        model ([`SortedLlamaForCausalLM`]):
            The model.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            Of the requests.
        kwargs (`dict`):
            Keyword arguments beside it.

    Raises:
        ValueError: If another depth than the config's, or a mode of decoding at moving depth, is asked for.
    """
    fields = read_decoding_fields(model, generation_config, kwargs)
    asked = {name: fields[name] for name in _MODES if fields[name] is not None}
    if asked and asked != {"exit_layer": model.model.depth()}:
        raise ValueError(
            f"Continuous batching runs all requests at the depth of the model's config, {model.model.depth()} layers "
            f"now, and cannot honour {asked}: load the model with `exit_layer=k`, or generate without it."
        )


def make_plain(generation_config: GenerationConfig) -> None:
    """Take out what a plain Llama does not know."""
    for name in SORTED_GENERATION_FIELDS:
        if hasattr(generation_config, name):
            delattr(generation_config, name)
    generation_config.assistant_early_exit = None
    if generation_config.num_assistant_tokens == "auto":
        generation_config.num_assistant_tokens = None


def _mode(fields: dict[str, Any]) -> str | None:
    for name in _MODES[:2]:
        if fields[name] is not None:
            return name
    if fields["exit_layer"] is None:
        return None
    if type(fields["exit_layer"]) is int:
        return "depth"
    return "auto" if fields["exit_layer"] == "auto" else "depths of rows"


def choose_decoding(
    model, generation_config: GenerationConfig, fields: dict[str, Any]
) -> ConfidenceExit | RowDepths | SelfSpeculation | None:
    """
    The mode that `fields` ask for, or `None` for one depth and transformers' own decoding.

    Raises:
        ValueError: If a value is out of range, or if two contradict each other.
    """
    layers = len(model.model.layers)
    exit_layer, threshold, draft = fields["exit_layer"], fields["exit_threshold"], fields["assistant_early_exit"]
    by_row = exit_layer is not None and not isinstance(exit_layer, int)
    if not by_row and exit_layer is not None:
        check_exit_layer(exit_layer, layers)

    asked = {
        "exit_threshold": threshold,
        "assistant_early_exit": draft,
        "exit_layer": exit_layer if by_row else None,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) > 1:
        calls = " and ".join(f"`{name}={value!r}`" for name, value in asked.items())
        raise ValueError(f"{calls} contradict each other: each chooses the depth of a token. Pass one of them.")
    for name, owner in _MODE_OF.items():
        if name not in ("exit_layer", *asked) and fields[name] is not None and _mode(fields) != owner:
            with_ = 'exit_layer="auto"' if owner == "auto" else owner
            raise ValueError(f"`{name}={fields[name]!r}` has a meaning only together with `{with_}`.")
    if not asked:
        return None
    (mode,) = asked

    decoding: ConfidenceExit | RowDepths | SelfSpeculation
    if mode == "exit_threshold":
        decoding = _confidence_exit(model, fields, layers)
    elif mode == "exit_layer":
        decoding = _row_depths(model, fields, layers)
    else:
        decoding = _self_speculation(model, fields, layers)
    if fields["use_cache"] is False:
        raise ValueError(f"`{mode}={asked[mode]!r}` needs the cache: `use_cache=False` is not possible.")
    _check_company(mode, asked[mode], decoding, generation_config)
    return decoding


def _confidence_exit(model, fields, layers) -> ConfidenceExit:
    exits = model.config.exit_layers
    if not exits or len(exits) < 2:
        raise ValueError(
            f"`exit_threshold={fields['exit_threshold']!r}` needs exits to leave at, but `config.exit_layers` is "
            f"{exits!r}: load the model with `exit_layers=[...]`."
        )
    confidence = "max_prob" if fields["exit_confidence"] is None else fields["exit_confidence"]
    if not callable(confidence) and confidence not in _CONFIDENCES:
        raise ValueError(
            f"`exit_confidence` must be one of {_CONFIDENCES}, or a callable that takes the processed scores "
            f"`(num_rows, vocab_size)`, the exit layer and the `input_ids` so far, got {confidence!r}."
        )
    thresholds = fields["exit_threshold"]
    if hasattr(thresholds, "tolist"):
        thresholds = thresholds.tolist()
    if isinstance(thresholds, numbers.Real) and not isinstance(thresholds, bool):
        thresholds = [thresholds] * (len(exits) - 1)
    least = -math.inf if callable(confidence) else 0
    if (
        isinstance(thresholds, str)
        or not isinstance(thresholds, Sequence)
        or len(thresholds) != len(exits) - 1
        or any(isinstance(t, bool) or not isinstance(t, numbers.Real) for t in thresholds)
        or not all(t >= least for t in thresholds)  # and no NaN
    ):
        raise ValueError(
            f"`exit_threshold` must be a number of at least {least}, or a list of {len(exits) - 1}, one for each exit "
            f"below full depth ({exits[:-1]}), got {fields['exit_threshold']!r}."
        )
    low, high = 1, layers
    if fields["min_exit_layer"] is not None:
        low = check_exit_layer(fields["min_exit_layer"], layers, "min_exit_layer")
    if fields["max_exit_layer"] is not None:
        high = check_exit_layer(fields["max_exit_layer"], layers, "max_exit_layer")
    elif fields["exit_layer"] is not None:  # the default depth of every call: never deeper
        exits, high = [*(k for k in exits if k < fields["exit_layer"]), fields["exit_layer"]], fields["exit_layer"]
    bounded = [k for k in exits if low <= k <= high]
    if not bounded:
        raise ValueError(
            f"No exit of {exits} lies between `min_exit_layer={low}` and `max_exit_layer={high}`: widen the bounds."
        )
    # No confidence of ours is above 1: nothing is decided there
    open_exits = [
        (k, float(t))
        for k, t in zip(exits, thresholds, strict=False)
        if k in bounded[:-1] and (t <= 1 or callable(confidence))
    ]
    return ConfidenceExit([*(k for k, _ in open_exits), bounded[-1]], [t for _, t in open_exits], confidence)


def _row_depths(model, fields, layers) -> RowDepths:
    depths = fields["exit_layer"]
    agreement = 0.9 if fields["exit_agreement"] is None else fields["exit_agreement"]
    if isinstance(agreement, bool) or not isinstance(agreement, (int, float)) or not 0 <= agreement <= 1:
        raise ValueError(f"`exit_agreement` must be a number from 0 to 1, got {agreement!r}.")
    if depths == "auto":
        if not model.config.exit_layers:
            raise ValueError(
                '`exit_layer="auto"` chooses among the exits of the model, but `config.exit_layers` is None: load the '
                "model with `exit_layers=[...]`."
            )
        return RowDepths(None, list(model.config.exit_layers), float(agreement))
    if hasattr(depths, "tolist"):
        depths = depths.tolist()
    if isinstance(depths, str) or not isinstance(depths, Sequence) or not depths:
        raise ValueError(
            f"`exit_layer` must be an integer from 1 to {layers}, a list of them (one a row of the batch) or "
            f'"auto", got {depths!r}.'
        )
    return RowDepths([check_exit_layer(k, layers) for k in depths], [], float(agreement))


def _self_speculation(model, fields, layers) -> SelfSpeculation:
    depth, draft = fields["exit_layer"] or layers, fields["assistant_early_exit"]
    if draft == "auto":
        trained = [k for k in model.config.exit_layers or () if k < depth]
        exits = trained or sorted({k for k in (depth // 4, depth // 2) if k > 0})
        if not exits:
            raise ValueError(f'`assistant_early_exit="auto"` needs a model of two layers or more, got {depth}.')
    elif isinstance(draft, bool) or not isinstance(draft, int) or not 1 <= draft < depth:
        raise ValueError(
            f"`assistant_early_exit` must be an integer from 1 to {depth - 1}, below the {depth} layers that verify, "
            f'or "auto", got {draft!r}.'
        )
    else:
        exits = [draft]
    num_tokens = fields["num_assistant_tokens"]
    if num_tokens == "auto":
        num_tokens = None
    if num_tokens is not None and (isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1):
        raise ValueError(f'`num_assistant_tokens` must be a positive integer or "auto", got {num_tokens!r}.')
    schedule = fields["num_assistant_tokens_schedule"] or "constant"
    if schedule not in _SCHEDULES:
        raise ValueError(f"`num_assistant_tokens_schedule` must be one of {_SCHEDULES}, got {schedule!r}.")
    if fields["num_assistant_tokens_schedule"] not in (None, "constant") and num_tokens is None:
        num_tokens = 5  # a heuristic needs somewhere to start
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
        value = fields[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    threshold = fields["assistant_confidence_threshold"]
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
        raise ValueError(f"`assistant_confidence_threshold` must be a number, got {threshold!r}.")
    return SelfSpeculation(
        depth=depth,
        exits=exits,
        num_tokens=num_tokens,
        schedule=schedule,
        confidence_threshold=threshold or None,
        lookup_tokens=fields["prompt_lookup_num_tokens"],
        lookup_ngram=fields["max_matching_ngram_size"] or 2,
    )


def _check_company(mode: str, value: Any, decoding, generation_config: GenerationConfig) -> None:
    """Refuse what the loops cannot do exactly."""
    call = f"`{mode}={value!r}`"
    others = copy.copy(generation_config)
    others.assistant_early_exit = None
    if isinstance(decoding, SelfSpeculation):
        others.prompt_lookup_num_tokens = None
    if others.get_generation_mode() not in DECODED_MODES:
        raise ValueError(
            f"{call} works with greedy decoding and sampling, not with {others.get_generation_mode().value} "
            f"(`num_beams={generation_config.num_beams}`, `prompt_lookup_num_tokens="
            f"{generation_config.prompt_lookup_num_tokens}`, ...)."
        )
    if generation_config.cache_implementation not in (None, "dynamic", "static", "offloaded"):
        raise ValueError(
            f"{call} works with `cache_implementation` 'dynamic', 'static' and 'offloaded', got "
            f"{generation_config.cache_implementation!r}."
        )
    if generation_config.output_attentions:
        raise ValueError(f"{call} cannot return attentions, which it computes in blocks: `output_attentions=False`.")
    if generation_config.output_hidden_states and not isinstance(decoding, SelfSpeculation):
        raise ValueError(f"{call} cannot return hidden states, as tokens have no states above their exit.")


def check_company_in_memory(model, logits_processor: LogitsProcessorList) -> None:
    """
    Refuse, before the first pass, what the loops cannot do exactly and no argument of `generate` tells.

    Args:
        model ([`SortedLlamaForCausalLM`]):
            The model.
        logits_processor ([`~transformers.LogitsProcessorList`]):
            Those of the call, a caller's own included.

    Raises:
        ValueError: If a processor keeps state from call to call, if the model has hooks of its own, or if activated
            LoRA counts tokens from the end of a block.
    """
    for processor in logits_processor:
        if isinstance(processor, _STATEFUL_PROCESSORS):
            raise ValueError(
                f"Decoding at moving depth does not work with {type(processor).__name__} (`guidance_scale`, SynthID's "
                "`watermarking_config`), which counts on one call a token: generate with `exit_layer=k` or without it."
            )
    if model._forward_hooks or model._forward_pre_hooks:
        raise ValueError(
            "Decoding at moving depth calls the parts of the model, and so passes over the forward hooks of the model "
            "itself (`fully_shard` sets one): register them on `model.model`, its layers or `model.lm_head`."
        )
    if any("alora_offsets" in hook.keywords for _, _, hook in row_hooks(model)):
        raise ValueError(
            "Decoding at moving depth does not work with activated LoRA (`alora_invocation_tokens`), which counts "
            "tokens from the end of a block: generate with `exit_layer=k` or without it."
        )


def row_hooks(model: torch.nn.Module) -> list[tuple[torch.nn.Module, int, Any]]:
    """
    PEFT's hooks that tell its layers what is each row's: `adapter_names`, `alora_offsets`. PEFT has no other sign of
    them, and takes them out where a call succeeds only.

    Args:
        model (`torch.nn.Module`):
            The model.

    Returns:
        `list[tuple[torch.nn.Module, int, functools.partial]]`: Modules, keys among their hooks, and hooks.
    """
    names = {"adapter_names", "alora_offsets"}
    return [
        (module, key, hook)
        for module in model.modules()
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, partial) and names & hook.keywords.keys()
    ]


# The state of one call, which both loops share


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


# Loop 1: tokens leave at an exit


def decode_with_exits(sequences: Sequences, decoding: ConfidenceExit | RowDepths):
    """
    One token a step; each row leaves at its exit, the others go on to the next one: the paper's instance-aware
    inference, but exact. What a row skips stays pending in the cache, until a later token of it takes it along.
    """
    row_depths: list[int] | None = None
    known: dict[int, torch.Tensor] = {}  # states of the newest token at each exit, where the prefill has shown them
    if isinstance(decoding, ConfidenceExit):
        depths = decoding.depths
        thresholds: dict[int, float] = dict(zip(depths, decoding.thresholds, strict=False))
        sequences.confidences = [[] for _ in sequences.lengths]
        known[depths[0]] = _last(sequences.prefill(depths[0])).last_hidden_state
    elif decoding.row_depths is None:
        row_depths, known = _depths_of_prompts(sequences, decoding)
        depths = sorted(set(row_depths))
    else:
        repeats, rest = divmod(sequences.batch_size, len(decoding.row_depths))
        if rest or repeats < 1 or repeats != max(sequences.config.num_return_sequences or 1, 1):
            raise ValueError(
                f"`exit_layer={decoding.row_depths}` must name one depth for each of the "
                f"{sequences.batch_size // max(sequences.config.num_return_sequences or 1, 1)} rows of the batch."
            )
        row_depths = [k for k in decoding.row_depths for _ in range(repeats)]
        depths = sorted(set(row_depths))
        known[depths[0]] = _last(sequences.prefill(depths[0])).last_hidden_state

    rows = list(range(sequences.batch_size))
    tokens = sequences.ids[:, :0]
    while rows:
        lengths = [sequences.lengths[row] for row in rows]
        chosen = torch.empty(len(rows), dtype=torch.long, device=sequences.device)
        results: dict[int, tuple[int, int, float]] = {}  # row: token, depth, confidence
        going = list(range(len(rows)))  # indices into `rows`
        for depth in depths:
            going_rows = [rows[i] for i in going]
            if depth in known:
                states = known.pop(depth)[sequences.rows_index(going_rows)]
            else:
                states = sequences.forward(tokens[: len(going)], going_rows, depth).last_hidden_state
            tokens = sequences.ids[:, :0]  # the new tokens run once; what goes deeper is pending
            # The head runs only where a decision is open
            deciding = going if row_depths is None else [i for i in going if row_depths[rows[i]] == depth]
            if not deciding:
                continue
            last_states = states[:, -1]
            if len(deciding) < len(going):
                last_states = last_states[sequences.rows_index([going.index(i) for i in deciding])]
            deciding_rows, deciding_lengths = [rows[i] for i in deciding], [lengths[i] for i in deciding]
            logits = sequences.head(last_states, depth, deciding_rows)
            scores = sequences.process(logits, deciding_rows, deciding_lengths)

            confidences = [0.0] * len(deciding)
            leaving = list(range(len(deciding)))  # indices into `deciding`
            picked = None if sequences.do_sample else scores.argmax(-1)
            if isinstance(decoding, ConfidenceExit):
                measured = decoding.measure(scores, depth, sequences.prefixes(deciding_rows, max(lengths)))
                if picked is None:
                    confidences = measured.tolist()
                else:  # one wait for the device, not two
                    confidences, picked_ids = torch.stack([measured.double(), picked.double()]).tolist()
                if depth in thresholds:
                    leaving = [i for i in leaving if confidences[i] >= thresholds[depth]]
            if leaving:
                index = sequences.rows_index(leaving)
                if picked is None:
                    new = sequences.choose(scores[index], [deciding_rows[i] for i in leaving])
                    new_ids = new.tolist()
                else:
                    new = picked[index]
                    new_ids = (
                        [int(picked_ids[i]) for i in leaving] if isinstance(decoding, ConfidenceExit) else new.tolist()
                    )
                chosen[sequences.rows_index([deciding[i] for i in leaving])] = new
                for i, token in zip(leaving, new_ids, strict=True):
                    results[deciding[i]] = (token, depth, confidences[i])
                left_rows, left_lengths = [deciding_rows[i] for i in leaving], [deciding_lengths[i] for i in leaving]
                sequences.record(sequences.scores, scores[index], left_rows, left_lengths)
                sequences.record(sequences.logits, logits[index], left_rows, left_lengths)
                going = [i for i in going if i not in results]
            if not going:
                break
        known.clear()

        sequences.write(rows, lengths, chosen[:, None])
        token_ids, used, sure = zip(*(results[i] for i in range(len(rows))), strict=True)
        sequences.advance(rows, [[t] for t in token_ids], [[k] for k in used], [[c] for c in sure])
        active = sequences.active_rows()
        tokens = chosen[:, None]
        if active != rows:
            tokens = tokens[sequences.rows_index([rows.index(row) for row in active])] if active else tokens[:0]
        rows = active
    return sequences.finish()


def _last(outputs):
    return deque(outputs, maxlen=1)[0]


def _depths_of_prompts(sequences: Sequences, decoding: RowDepths) -> tuple[list[int], dict[int, torch.Tensor]]:
    """
    The shallowest exit of each row whose greedy tokens agree with full depth's on enough of its prompt; and the
    states of the prompt's last token at the exits.
    """
    exits = decoding.candidates
    agreed = torch.zeros(len(exits), sequences.batch_size, device=sequences.device)
    seen = torch.zeros(sequences.batch_size, device=sequences.device)
    mask, start = sequences.prompt.get("attention_mask"), 0
    for outputs in sequences.prefill(exits[-1], exits[:-1]):
        at_exits = zip(exits, outputs.exit_hidden_states or (), strict=False)
        states = [sequences.model.model.exit_norm(k)(s).to(sequences.device) for k, s in at_exits]
        states.append(outputs.last_hidden_state)
        size = min(sequences.config.prefill_chunk_size or sequences.prompt_size, sequences.prompt_size - start)
        states = [s[:, -size:] for s in states]  # before them is what was pending
        valid = torch.ones(sequences.batch_size, size, device=sequences.device)
        if mask is not None:
            own = mask[:, mask.shape[1] - sequences.prompt_size :]
            valid = own[:, start : start + size].to(valid.dtype)
        counted, seen_here = _agreements(sequences, states, exits, valid)
        agreed, seen, start = agreed + counted, seen + seen_here, start + size
    shares = (agreed.double() / seen.clamp(min=1)).T.tolist()
    row_depths = [
        next((k for k, share in zip(exits, row, strict=True) if share >= decoding.agreement), exits[-1])
        for row in shares
    ]
    return row_depths, {k: s[:, -1:] for k, s in zip(exits, states, strict=True)}


def _agreements(
    sequences: Sequences, states: list[torch.Tensor], exits: list[int], valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Count, a row, the tokens on which the greedy choice of each of `states` (normed) is that of the last of them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Agreements, `(len(states), batch_size)`, and tokens, `(batch_size,)`.
    """
    agreed = torch.zeros(len(states), valid.shape[0], device=sequences.device)
    tile = max(1, 256 // valid.shape[0])  # one tile of logits at a time
    for start in range(0, valid.shape[1], tile):
        tiles = [s[:, start : start + tile] for s in states]
        all_rows = range(sequences.batch_size)
        greedy = [sequences.head(s, k, all_rows).argmax(-1) for k, s in zip(exits, tiles, strict=True)]
        for i, tokens in enumerate(greedy):
            agreed[i] += ((tokens == greedy[-1]) * valid[:, start : start + tile]).sum(-1)
    return agreed, valid.sum(-1)


# Loop 2: an exit drafts, the layers above it verify


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

    outputs = _last(sequences.prefill(depth, decoding.exits if learns else None))
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


def decode(
    sequences: Sequences, decoding: ConfidenceExit | RowDepths | SelfSpeculation
) -> SortedGenerateOutput | torch.Tensor:
    """
    Decode in one of the modes: what `generate` calls once transformers has prepared prompt, processors and criteria.

    Returns:
        [`SortedGenerateOutput`] with `return_dict_in_generate`, else the sequences, `(batch_size, length)`.
    """
    if isinstance(decoding, SelfSpeculation):
        return decode_with_drafts(sequences, decoding)
    return decode_with_exits(sequences, decoding)
