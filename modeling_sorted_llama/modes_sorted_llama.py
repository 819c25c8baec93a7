"""
The ways in which `generate` chooses the depth of a token, one dataclass each: its fields are the arguments of
`generate` that belong to it, and its construction checks them. A field added here is known everywhere.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, fields
from functools import partial
from numbers import Real
from typing import Any, ClassVar

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode

from .compat_sorted_llama import CACHE_NAME
from .configuration_sorted_llama import as_int, as_list, check_exit_layer, check_number


def _margin(probabilities: torch.Tensor) -> torch.Tensor:
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return first - second


def _certainty(probabilities: torch.Tensor) -> torch.Tensor:
    """1 minus the entropy, as a share of the largest possible; rounding must not take it below 0."""
    entropy = torch.special.entr(probabilities).sum(-1)
    return (1 - entropy / math.log(probabilities.shape[-1])).clamp(min=0)


# How sure an exit is of its next token: probabilities `(num_rows, vocab_size)` to numbers from 0 to 1, `(num_rows,)`
CONFIDENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max_prob": lambda probabilities: probabilities.amax(-1),
    "margin": _margin,
    "entropy": _certainty,
}


@dataclass
class OneDepth:
    """Every token runs `exit_layer` layers: transformers' own decoding, of a shorter model."""

    chosen_by: ClassVar[str] = "exit_layer"

    model: InitVar[Any]
    exit_layer: int

    def __post_init__(self, model):
        self.exit_layer = check_exit_layer(self.exit_layer, len(model.model.layers))


@dataclass
class RowDepths:
    """Each row of the batch has its own depth."""

    chosen_by: ClassVar[str] = "exit_layer"

    model: InitVar[Any]
    exit_layer: list[int]

    def __post_init__(self, model):
        if isinstance(self.exit_layer, str) and self.exit_layer == "auto":
            raise ValueError(
                '`exit_layer="auto"` was removed, as slower than full depth: let each token choose its depth with '
                "`exit_threshold`, or pass one for each row, `exit_layer=[...]`."
            )
        layers, depths = len(model.model.layers), as_list(self.exit_layer)
        if not depths:
            raise ValueError(
                f"`exit_layer` must be an integer from 1 to {layers} or a list of them, one a row of the batch, got "
                f"{self.exit_layer!r}."
            )
        self.exit_layer = [check_exit_layer(depth, layers) for depth in depths]

    def of_batch(self, batch_size: int, num_return_sequences: int | None) -> list[int]:
        """The depth of every sequence; `ValueError` where there is not one for each prompt."""
        repeats = max(num_return_sequences or 1, 1)
        if len(self.exit_layer) * repeats != batch_size:
            raise ValueError(
                f"`exit_layer={self.exit_layer}` must name a depth for each of {batch_size // repeats} rows."
            )
        return [depth for depth in self.exit_layer for _ in range(repeats)]


@dataclass
class ConfidenceExit:
    """Each token leaves at the first exit whose confidence reaches its threshold, or at the last of `depths`."""

    chosen_by: ClassVar[str] = "exit_threshold"

    model: InitVar[Any]
    exit_threshold: float | Sequence[float]
    exit_confidence: str | Callable = "max_prob"
    exit_layer: int | None = None  # no token goes deeper

    thresholds: dict[int, float] = field(init=False)  # of the exits where tokens may leave early
    depths: list[int] = field(init=False)  # those, and where the other tokens leave

    def __post_init__(self, model):
        exits, layers = model.config.exit_layers, len(model.model.layers)
        if not exits or len(exits) < 2:
            raise ValueError(
                f"`exit_threshold={self.exit_threshold!r}` needs exits to leave at, but `config.exit_layers` is "
                f"{exits!r}: load a model whose exits were trained, or name them, `exit_layers=[...]`."
            )
        is_users = callable(self.exit_confidence)
        if not is_users and self.exit_confidence not in tuple(CONFIDENCES):  # it may be no key
            raise ValueError(
                f"`exit_confidence` must be one of {tuple(CONFIDENCES)}, or a callable that takes the processed "
                "scores `(num_rows, vocab_size)`, the exit layer and the `input_ids` so far, got "
                f"{self.exit_confidence!r}."
            )
        deepest = layers if self.exit_layer is None else check_exit_layer(self.exit_layer, layers)
        thresholds = zip(exits[:-1], self._threshold_of_each(exits[:-1], -math.inf if is_users else 0), strict=True)
        # The confidences above are 1 at most: an exit that asks for more is never taken, and need not be looked at
        self.thresholds = {k: float(t) for k, t in thresholds if k < deepest and (t <= 1 or is_users)}
        self.depths = [*self.thresholds, deepest]

    def _threshold_of_each(self, exits: list[int], least: float) -> list[Any]:
        given: Any = self.exit_threshold
        given = given.tolist() if hasattr(given, "tolist") else given
        thresholds = as_list(given) or [given] * len(exits)
        are_numbers = all(isinstance(t, Real) and not isinstance(t, bool) for t in thresholds)
        if len(thresholds) != len(exits) or not are_numbers or not all(t >= least for t in thresholds):  # NaN is not
            raise ValueError(
                f"`exit_threshold` must be a number of at least {least}, or a list of {len(exits)}, one for each exit "
                f"below full depth ({exits}), got {self.exit_threshold!r}."
            )
        return thresholds

    def leaves(self, depth: int, confidence: float) -> bool:
        """Whether a token leaves at one of `depths`."""
        return depth == self.depths[-1] or confidence >= self.thresholds[depth]

    def measure(self, scores: torch.Tensor, depth: int, input_ids: torch.Tensor) -> torch.Tensor:
        """Confidence of each row of `scores`, `(num_rows, vocab_size)` processed scores: `(num_rows,)`, float32."""
        if callable(self.exit_confidence):
            return self.exit_confidence(scores, depth, input_ids)
        return CONFIDENCES[self.exit_confidence](scores.softmax(-1, dtype=torch.float32))


@dataclass
class SelfSpeculation:
    """One of `exits` drafts, the layers up to `depth` verify."""

    chosen_by: ClassVar[str] = "assistant_early_exit"

    model: InitVar[Any]
    assistant_early_exit: int | str
    exit_layer: int | None = None  # the depth that verifies
    num_assistant_tokens: int | str = "auto"
    assistant_confidence_threshold: float | None = None

    depth: int = field(init=False)
    exits: list[int] = field(init=False)

    def __post_init__(self, model):
        layers, draft, num_tokens = len(model.model.layers), self.assistant_early_exit, self.num_assistant_tokens
        self.depth = layers if self.exit_layer is None else check_exit_layer(self.exit_layer, layers)
        if draft == "auto":
            trained = [k for k in model.config.exit_layers or () if k < self.depth]
            self.exits = trained or sorted({k for k in (self.depth // 4, self.depth // 2) if k > 0})
            if not self.exits:
                raise ValueError(f'`assistant_early_exit="auto"` needs two layers or more, got {self.depth}.')
        else:
            self.exits = [as_int(draft) or 0]
            if not 1 <= self.exits[0] < self.depth:
                raise ValueError(
                    f'`assistant_early_exit` must be "auto" or an integer from 1 to {self.depth - 1}, below the '
                    f"{self.depth} layers that verify, got {draft!r}."
                )
        if num_tokens != "auto" and (as_int(num_tokens) or 0) < 1:
            raise ValueError(f'`num_assistant_tokens` must be a positive integer or "auto", got {num_tokens!r}.')
        if self.assistant_confidence_threshold is not None:
            threshold = check_number(self.assistant_confidence_threshold, "assistant_confidence_threshold")
            self.assistant_confidence_threshold = threshold or None  # no draft is below 0


Mode = OneDepth | RowDepths | ConfidenceExit | SelfSpeculation
MODES = (ConfidenceExit, SelfSpeculation, RowDepths, OneDepth)


def _options(mode: Any) -> list[str]:
    return [option.name for option in fields(mode) if option.init]


_FIELDS = list(dict.fromkeys(name for mode in MODES for name in _options(mode)))
# Arguments of `generate`, and fields of a generation config, that transformers does not know
SORTED_GENERATION_FIELDS = tuple(name for name in _FIELDS if not hasattr(GenerationConfig(), name))
# Those that there were once, and what to use instead
REMOVED_FIELDS = {
    "exit_agreement": "use `exit_threshold`",
    "min_exit_layer": "close an exit with a threshold above 1, `exit_threshold=[2, 0.9]` for example",
    "max_exit_layer": "pass `exit_layer=k` beside `exit_threshold`: no token goes deeper",
}


def _modes_of(fields: dict[str, Any]) -> list[Any]:
    """The modes that fields ask for: more than one contradict each other. To two of them one depth is a bound."""
    modes: list[Any] = [mode for mode in (ConfidenceExit, SelfSpeculation) if mode.chosen_by in fields]
    if type(fields.get("exit_layer", 0)) is not int:
        modes.append(RowDepths)
    return [OneDepth] if "exit_layer" in fields and not modes else modes


def read_decoding_fields(model, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    What a call says about the depth of its tokens: its keyword arguments, then its generation config, then the
    model's, then the default depth of the model's config. The most specific that names a mode decides on it; what is
    more general gives this mode's other fields alone. Read before transformers fills in its defaults, which would pass
    for the user's. Beside the fields that are set stands `use_cache`: `False` where the caller says so, and not where
    a checkpoint does, which was trained without a cache.
    """
    found: dict[str, Any] = {}
    configs = (generation_config, model.generation_config, model.config)
    sources = [kwargs, *(vars(config) for config in configs if config is not None)]
    for source in sources:
        modes = _modes_of(found)
        for name in _FIELDS:
            value = source.get(name)
            number = as_int(value)  # numpy's integers, and 0-dimensional tensors, are depths as well
            value = value if number is None else number
            bounds = name != "exit_layer" or number is not None  # depths of rows are a mode, one depth a bound
            if value is not None and name not in found and (not modes or (name in _options(modes[0]) and bounds)):
                found[name] = value
    # What a checkpoint holds of them had a meaning for this one mode, and was passed over in the others
    asked = sources if ConfidenceExit in _modes_of(found) else sources[: 1 + (generation_config is not None)]
    for name, instead in REMOVED_FIELDS.items():
        value = next((source[name] for source in asked if source.get(name) is not None), None)
        if value is not None:
            raise ValueError(f"`{name}={value!r}` was removed, also from generation_config.json. Instead, {instead}.")
    of_checkpoint = model.generation_config.use_cache is False
    by_caller = kwargs.get("use_cache", None if of_checkpoint else getattr(generation_config, "use_cache", None))
    return {**found, "use_cache": by_caller}


def choose_decoding(model, generation_config: GenerationConfig, fields: dict[str, Any]) -> Mode | None:
    """
    The mode that a call asks for, checked; `None` where it says nothing of depth. `fields` are what
    [`read_decoding_fields`] has found, `generation_config` is the call's, with what it takes over from the model's.
    """
    modes = _modes_of(fields)
    if len(modes) > 1:
        calls = " and ".join(f"`{mode.chosen_by}={fields[mode.chosen_by]!r}`" for mode in modes)
        raise ValueError(f"{calls} contradict each other: each chooses the depth of a token. Pass one of them.")
    mode = modes[0] if modes else None
    options = [] if mode is None else _options(mode)
    for name in SORTED_GENERATION_FIELDS:
        if name in fields and name not in options:
            owner = next(m for m in MODES if name in _options(m))
            raise ValueError(f"`{name}={fields[name]!r}` has a meaning only together with `{owner.chosen_by}`.")
    if mode is None:
        return None
    decoding = mode(model, **{name: fields[name] for name in options if name in fields})
    if mode is not OneDepth:
        call = f"`{mode.chosen_by}={fields[mode.chosen_by]!r}`"
        if fields.get("use_cache") is False:
            raise ValueError(f"{call} needs the cache: `use_cache=False` is not possible.")
        _check_generation_config(generation_config, decoding, call)
    return decoding


# transformers' options that decoding at moving depth cannot honour: what they may be, and why
_NOT_EVERY_LAYER = "not every layer has attentions and hidden states of every token"
_REFUSED = {
    "cache_implementation": ((None, "dynamic", "static"), "its cache is 'dynamic' or 'static'"),
    "output_attentions": ((None, False), _NOT_EVERY_LAYER),
    "output_hidden_states": ((None, False), _NOT_EVERY_LAYER),
}
_LOOKUP = "the exit alone drafts, and prompt lookup works without it and at a fixed `exit_layer=k`: pass one of them"
_REFUSED_WITH_DRAFTS = {
    "prompt_lookup_num_tokens": ((None,), _LOOKUP),
    "max_matching_ngram_size": ((None,), _LOOKUP),
    "num_assistant_tokens_schedule": ((None, "constant"), '`num_assistant_tokens` is a number or "auto"'),
}


def _check_generation_config(generation_config: GenerationConfig, decoding: Mode, call: str) -> None:
    refused = {**_REFUSED_WITH_DRAFTS, **_REFUSED} if isinstance(decoding, SelfSpeculation) else _REFUSED
    for name, (allowed, reason) in refused.items():
        value = getattr(generation_config, name)
        if value not in allowed:
            raise ValueError(f"{call} does not work with `{name}={value!r}`: {reason}.")
    config = copy.copy(generation_config)
    config.assistant_early_exit = None
    strategy = config.get_generation_mode()
    if strategy not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{call} works with greedy decoding and sampling, not with {strategy.value} (`num_beams="
            f"{config.num_beams}`, `prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}`, ...)."
        )


# Processors that keep state from call to call, and so count on one call a token, in order
STATEFUL_PROCESSORS = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


def check_model_and_processors(model, logits_processor: LogitsProcessorList) -> None:
    """Refuse, before the first pass, what decoding at moving depth cannot do exactly and no argument tells of."""
    stateful = [type(one).__name__ for one in logits_processor if isinstance(one, STATEFUL_PROCESSORS)]
    has_alora = any("alora_offsets" in hook.keywords for _, _, hook in row_hooks(model))
    refused = {
        f"{', '.join(stateful)} (`guidance_scale`, `watermarking_config`), which counts on one call a token": stateful,
        "forward hooks of the model itself, which it passes over (`fully_shard` sets one; those of `model.model`, its "
        "layers and `model.lm_head` run)": model._forward_hooks or model._forward_pre_hooks,
        "activated LoRA (`alora_invocation_tokens`), which counts tokens from the end of a block": has_alora,
    }
    for what, found in refused.items():
        if found:
            raise ValueError(
                f"Decoding at moving depth does not work with {what}: generate with `exit_layer=k` or without it."
            )


def check_continuous_batching(model, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """Refuse requests of a depth that continuous batching would pass over: all run at that of the model's config."""
    if CACHE_NAME != "cache":  # an argument that continuous batching had before for a cache of another kind
        raise ValueError("Continuous batching of a sorted model needs transformers 5.24 or newer.")
    fields, depth = read_decoding_fields(model, generation_config, kwargs), model.model.depth()
    asked = {name: fields[name] for name in dict.fromkeys(mode.chosen_by for mode in MODES) if name in fields}
    if asked and asked != {"exit_layer": depth}:
        raise ValueError(
            f"Continuous batching runs all requests at the depth of the model's config, {depth} layers now, and "
            f"cannot honour {asked}: load the model with `exit_layer=k`, or generate without it."
        )


def make_plain(generation_config: GenerationConfig) -> None:
    """Take out what a plain Llama does not know."""
    for name in (*SORTED_GENERATION_FIELDS, *REMOVED_FIELDS):
        if hasattr(generation_config, name):
            delattr(generation_config, name)
    generation_config.assistant_early_exit = None
    if generation_config.num_assistant_tokens == "auto":
        generation_config.num_assistant_tokens = None


def row_hooks(model: torch.nn.Module) -> list[tuple[torch.nn.Module, int, Any]]:
    """
    PEFT's hooks that tell its layers what is each row's: modules, keys among their hooks, and hooks. PEFT has no other
    sign of them, and takes them out only where a call succeeds.
    """
    names = {"adapter_names", "alora_offsets"}
    return [
        (module, key, hook)
        for module in model.modules()
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, partial) and names & hook.keywords.keys()
    ]
