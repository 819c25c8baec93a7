"""The modes of `generate` at moving depth: their options, and the rules between them, checked before any work."""

import copy
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode

from .configuration_sorted_llama import as_int, check_exit_layer


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
    if generation_config.cache_implementation not in (None, "dynamic", "static"):
        raise ValueError(
            f"{call} works with `cache_implementation` 'dynamic' and 'static', got "
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
