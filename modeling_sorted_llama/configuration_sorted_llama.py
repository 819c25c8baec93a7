"""Configuration of Sorted LLaMA: a Llama whose first `k` decoder layers are a model for several `k`."""

import copy
import math
import numbers
import operator
import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from transformers import LlamaConfig, PreTrainedConfig

from .compat_sorted_llama import share_llamas_adapters
from .families_sorted_llama import is_converted, llama_fields
from .heads_sorted_llama import EXIT_HEADS, heads_of, num_layers_of


# Where the Auto classes find the code that `save_pretrained` puts beside the weights
AUTO_MAP = {
    "AutoConfig": "configuration_sorted_llama.SortedLlamaConfig",
    "AutoModel": "modeling_sorted_llama.SortedLlamaModel",
    "AutoModelForCausalLM": "modeling_sorted_llama.SortedLlamaForCausalLM",
}

# What this config adds to Llama's
SORTED_FIELDS = ("exit_layers", "exit_layer", "exit_loss_weights", "exit_heads")
DEPTH_FIELDS = ("num_hidden_layers", *SORTED_FIELDS)


def as_int(value: Any) -> int | None:
    """An integer of any library (Python's, numpy's, a 0-dimensional tensor's) as Python's; `None` for all else."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or getattr(value, "ndim", None) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_list(value: Any) -> list[Any] | None:
    """The entries of a list, tuple, array or tensor; `None` for all else, a text among it."""
    entries = value.tolist() if hasattr(value, "tolist") else value
    return list(entries) if isinstance(entries, Sequence) and not isinstance(entries, str) else None


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; truth values, and integers that no float can hold, are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's count as such
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_int(value: Any, name: str, least: int | None = None, most: int | None = None) -> int:
    """`value` as Python's integer; a `ValueError` that names the argument where it is none, or out of range."""
    number = as_int(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"`{name}` must be an integer{_range(least, most)}, got {value!r}.")
    return number


def check_number(
    value: Any, name: str, least: float | None = None, most: float | None = None, exclusive: bool = False
) -> float:
    """As [`check_int`], for a finite number; with `exclusive`, `least` itself is not allowed."""
    too_small = is_number(value) and least is not None and (value < least or (exclusive and value == least))
    if not is_number(value) or too_small or (most is not None and value > most):
        raise ValueError(f"`{name}` must be a finite number{_range(least, most, exclusive)}, got {value!r}.")
    return float(value)


def check_choice(value: Any, name: str, allowed: Iterable[Any]) -> Any:
    """`value`; a `ValueError` that names the argument where it is none of `allowed`."""
    allowed = list(allowed)
    *others, last = allowed
    if not any(isinstance(value, type(choice)) and value == choice for choice in allowed):  # arrays compare by entry
        choices = f"{', '.join(map(repr, others))} or {last!r}" if others else repr(last)
        raise ValueError(f"`{name}` must be {choices}, got {value!r}.")
    return value


def _range(least: float | None, most: float | None, exclusive: bool = False) -> str:
    """What an error says of the values that are allowed."""
    if least is not None and most is not None and not exclusive:
        return f" from {least} to {most}"
    bounds = [f" {'above' if exclusive else 'of at least'} {least}"] if least is not None else []
    bounds += [f" of at most {most}"] if most is not None else []
    return " and".join(bounds)


def check_exit_layer(exit_layer: Any, num_hidden_layers: int, name: str = "exit_layer") -> int:
    """The number of decoder layers to run, from 1 to all; else a `ValueError` that names the argument."""
    return check_int(exit_layer, name, 1, num_hidden_layers)


def check_exit_layers(exit_layers: Any, num_hidden_layers: int | None, name: str = "exit_layers") -> list[int]:
    """
    The exits that SoFT trains: a list of them, or what `"every:N"` stands for; else a `ValueError` that names them.
    Where `num_hidden_layers` is `None`, not known yet, the last exit may be any, and `"every:N"` stands for none.
    """
    spacing = exit_spacing(exit_layers) if isinstance(exit_layers, str) else None
    if spacing is not None and num_hidden_layers is not None:
        return [*range(spacing, num_hidden_layers, spacing), num_hidden_layers]
    exits = [as_int(entry) or 0 for entry in as_list(exit_layers) or ()]  # what is no integer is refused like 0
    are_ascending = bool(exits) and all(a < b for a, b in pairwise([0, *exits]))
    if not are_ascending or num_hidden_layers not in (None, exits[-1]):
        limit = "the full depth" if num_hidden_layers is None else num_hidden_layers
        hint = "" if spacing is None else ", which needs a model's depth, not known here: pass a list"
        if are_ascending and num_hidden_layers is not None and exits[-1] < num_hidden_layers:
            hint = f": pass {[*exits, num_hidden_layers]}"
        raise ValueError(
            f"`{name}` must be a list of integers from 1 to {limit}, ascending and ending in the full depth, or "
            f"'every:N', got {exit_layers!r}{hint}."
        )
    return exits


def exit_spacing(text: str) -> int | None:
    """The `N` of `"every:N"`; `None` for any other text."""
    spacing = re.fullmatch("every:0*([1-9][0-9]{0,8})", text.strip())
    return int(spacing[1]) if spacing else None


def check_exit_loss_weights(weights: Any, num_exits: int, name: str = "exit_loss_weights") -> list[float]:
    """One weight an exit, finite and not negative, at least one above 0; else a `ValueError` that names them."""
    entries = list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str) else []
    are_weights = all(is_number(entry) and entry >= 0 for entry in entries) and any(entries)
    if len(entries) != num_exits or not are_weights:
        raise ValueError(
            f"`{name}` must be a list of {num_exits} finite numbers of at least 0, one for each of `exit_layers` and "
            f"at least one above 0, got {weights!r}."
        )
    return [float(entry) for entry in entries]


def check_heads_are_kept(own: str, exit_heads: Any, num_hidden_layers: int) -> None:
    """A `ValueError` where a model with the `exit_heads` `own` is to have others, or none."""
    if own not in ("shared", exit_heads):
        raise ValueError(
            f"`exit_heads={exit_heads!r}` would drop what the exits of this model own, which has "
            f"`exit_heads={own!r}`: start from `extract_submodel({num_hidden_layers})`."
        )


class ModelPath(str):
    """
    A model's id or path, with the `DEPTH_FIELDS` that the model has in memory, for whom loads it a second time by
    `config._name_or_path`, as TRL's trainers do for their reference. Copied or written to a file it is the plain text.
    """

    depth_fields: dict[str, Any]

    def __new__(cls, path: str, depth_fields: dict[str, Any]):
        self = super().__new__(cls, path)
        self.depth_fields = depth_fields
        return self

    def __reduce_ex__(self, protocol):
        return str, (str(self),)


# Model cards name the base model by it; transformers has imported PyYAML, remote code may not
if "yaml" in sys.modules:
    _yaml = sys.modules["yaml"].representer
    for _representer in (_yaml.SafeRepresenter, _yaml.Representer):
        _representer.add_representer(ModelPath, _yaml.SafeRepresenter.represent_str)


class SortedLlamaConfig(LlamaConfig):
    r"""
    Configuration of a [`SortedLlamaForCausalLM`]. Every argument of [`~transformers.LlamaConfig`] keeps its meaning;
    a configuration of a Llama, or of a family that is one (Mistral, Qwen2, ...), loads as a sorted one, with no exits
    but the full depth.

    Args:
        exit_layers (`list[int]` or `str`, *optional*):
            The exits that Sorted Fine-Tuning (SoFT) trains: numbers of decoder layers, ascending, ending in
            `num_hidden_layers`; `"every:4"` takes every fourth layer and the full depth. `None` means full depth only.
        exit_layer (`int`, *optional*):
            Number of decoder layers that every call runs unless it asks for another depth. `None` means all.
        exit_loss_weights (`list[float]`, *optional*):
            Weight of each of `exit_layers` in the SoFT loss. `None` means 1.0 each, the paper's sum.
        exit_heads (`str`, *optional*, defaults to `"shared"`):
            `"shared"`: every exit reads through the final norm and the LM head. `"separate"`: each of `exit_layers`
            below full depth has a norm and a head of its own, at first copies of the shared ones, as the paper's
            early-exit baseline (SFT+ICT) has: `hidden_size * vocab_size` weights an exit. `"lens"`: each of them has a
            norm and a square matrix of its own before the shared head, at first the final norm and the identity (a
            tuned lens, arXiv 2303.08112): `hidden_size ** 2` weights an exit. `"layer"`: each of them has a decoder
            layer and a norm of its own before the shared head, at first the model's next layer and the final norm
            (Balcony, arXiv 2503.05005): a layer's weights an exit, whose sub-model is a Llama of `k + 1` layers.
    """

    model_type = "sorted_llama"
    # `Trainer` takes every other output for logits when it evaluates
    keys_to_ignore_at_inference = ["cache", "past_key_values", "exit_losses", "exit_token_accuracies"]
    keys_to_ignore_at_inference += ["exit_agreements", "exit_divergences"]
    # `Any`: for another type transformers raises, before `__post_init__`, an error that is no `ValueError`
    exit_layers: Any = None
    exit_layer: Any = None
    exit_loss_weights: Any = None
    exit_heads: Any = "shared"
    # Of a config as it is read, the family by whose names the tensors beside it are to be split
    fused_tensors_of: ClassVar[str | None] = None

    def __post_init__(self, **kwargs):
        # Another family's fields are a Llama's by `from_llama` alone
        check_choice(kwargs.pop("model_type", self.model_type), "model_type", ["llama", self.model_type])
        super().__post_init__(**kwargs)
        self._check_exits()
        if getattr(self, "auto_map", None) is None:  # TRL reads it from the config of every class it does not know
            self.auto_map = dict(AUTO_MAP)

    def _check_exits(self) -> None:
        if self.exit_layers is not None:
            self.exit_layers = check_exit_layers(self.exit_layers, self.num_hidden_layers)
        if self.exit_layer is not None:
            self.exit_layer = check_exit_layer(self.exit_layer, self.num_hidden_layers)
        if self.exit_loss_weights is not None:
            if self.exit_layers is None:
                raise ValueError(
                    f"`exit_loss_weights` must be None where `exit_layers` is, got {self.exit_loss_weights!r}."
                )
            self.exit_loss_weights = check_exit_loss_weights(self.exit_loss_weights, len(self.exit_layers))
        check_choice(self.exit_heads, "exit_heads", EXIT_HEADS)
        if EXIT_HEADS[self.exit_heads].owned and len(self.exit_layers or ()) < 2:
            raise ValueError(
                f"`exit_heads={self.exit_heads!r}` needs `exit_layers` below full depth, got {self.exit_layers!r}."
            )

    @property
    def _name_or_path(self) -> ModelPath:  # transformers' name
        return ModelPath(self.__dict__.get("_name_or_path", ""), {name: getattr(self, name) for name in DEPTH_FIELDS})

    @_name_or_path.setter
    def _name_or_path(self, path: str) -> None:
        self.__dict__["_name_or_path"] = str(path)

    @property
    def own_exits(self) -> list[int]:
        """The exits that own what they are read through, by `exit_heads`: those below full depth, or none."""
        return self.exit_layers[:-1] if EXIT_HEADS[self.exit_heads].owned else []

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        if is_converted(pretrained_model_name_or_path):  # transformers has read it in the file of an adapter
            raise ValueError(
                f"The base of this adapter is `{pretrained_model_name_or_path}`: load that with "
                "`SortedLlamaForCausalLM.from_pretrained`, then the adapter with `PeftModel.from_pretrained`."
            )
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        length = kwargs.get("max_position_embeddings")
        if length is not None:
            check_int(length, "max_position_embeddings", 1)
        config_dict = llama_fields(config_dict, pretrained_model_name_or_path, length)
        if config_dict:  # any Llama is a sorted model without trained exits
            config_dict["model_type"] = cls.model_type
        if hasattr(pretrained_model_name_or_path, "depth_fields"):  # the Auto classes hand it to `from_dict` so
            kwargs.setdefault("name_or_path", pretrained_model_name_or_path)
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The depth fields depend on one another, so overrides must be there at construction, where they are checked
        overrides = {name: kwargs.pop(name) for name in DEPTH_FIELDS if name in kwargs}
        in_memory = getattr(kwargs.get("name_or_path"), "depth_fields", {})
        config_dict = llama_fields(config_dict, "", kwargs.get("max_position_embeddings"))
        config_dict = {**{key: value for key, value in config_dict.items() if key != "model_type"}, **in_memory}
        if "exit_heads" in overrides:
            depth = config_dict.get("num_hidden_layers", cls.num_hidden_layers)
            check_heads_are_kept(config_dict.get("exit_heads", "shared"), overrides["exit_heads"], depth)
        if "num_hidden_layers" in overrides:
            depth = check_int(config_dict.get("num_hidden_layers", cls.num_hidden_layers), "num_hidden_layers", 1)
            whole = cls(**copy.deepcopy(config_dict) | {"num_hidden_layers": depth})
            config_dict |= whole._cut_exits(overrides["num_hidden_layers"])
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def update(self, config_dict: dict[str, Any]) -> None:
        """See [`~transformers.PreTrainedConfig.update`]. `num_hidden_layers` cuts the exits above it off."""
        if "num_hidden_layers" in config_dict:
            self._check_exits()  # what was assigned to fields is known to be right before it is cut
            config_dict = {**self._cut_exits(config_dict["num_hidden_layers"]), **config_dict}
        super().update(config_dict)
        self._check_exits()

    def _cut_exits(self, num_hidden_layers: Any) -> dict[str, Any]:
        """The exits of the first `num_hidden_layers` layers: those up to the last of them, if it is one."""
        layers = check_int(num_hidden_layers, "num_hidden_layers", 1)
        if self.exit_heads != "shared" and layers != self.num_hidden_layers:
            raise ValueError(
                f"`num_hidden_layers={layers}` cuts off the layers that the final norm and head belong to, and with "
                f"`exit_heads={self.exit_heads!r}` the exits do not read as it does: load the model whole, then "
                f"`extract_submodel({layers})`."
            )
        exits = [k for k in self.exit_layers or () if k <= layers]
        if layers not in exits:  # nothing is known of the new full depth's weight
            exits = []
        return {
            "exit_layers": exits or None,
            "exit_loss_weights": (self.exit_loss_weights or [])[: len(exits)] or None,
            "exit_layer": self.exit_layer if (self.exit_layer or 0) <= layers else None,
        }

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        # A checkpoint loaded from the Hub names the repository of its code here; the new folder has its own
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        share_llamas_adapters()
        fields = super().to_dict()
        fields.pop("fused_tensors_of", None)  # where it is written, they are split
        return fields

    def to_llama(self, num_hidden_layers: int | None = None) -> LlamaConfig:
        """A new plain Llama configuration, of the sub-model of `num_hidden_layers` layers (default: all of them)."""
        fields = self.to_dict()
        for name in ("model_type", "auto_map", "architectures", *SORTED_FIELDS):
            fields.pop(name, None)
        if num_hidden_layers is not None:
            exit_layer = check_int(num_hidden_layers, "num_hidden_layers", 1, self.num_hidden_layers)
            fields["num_hidden_layers"] = num_layers_of(self, exit_layer)
            if heads_of(self, exit_layer).has_own_head:
                fields["tie_word_embeddings"] = False
        return LlamaConfig(**fields, attn_implementation=self._attn_implementation)

    @classmethod
    def from_llama(cls, config: PreTrainedConfig, **kwargs: Any) -> "SortedLlamaConfig":
        """
        A new sorted configuration of a Llama, or of a model of a family that is one; `kwargs` are fields of this class
        (`exit_layers=[...]`).
        """
        fields = llama_fields(config.to_dict(), config.name_or_path)
        fields = {key: value for key, value in fields.items() if key not in ("model_type", "architectures")}
        new = cls(**{**fields, **kwargs}, attn_implementation=config._attn_implementation)
        new.name_or_path = config.name_or_path
        return new


def as_sorted_config(config: PreTrainedConfig) -> SortedLlamaConfig:
    """`config` itself where it is sorted, else that of the same model as a sorted one."""
    # By model type: remote code and an installed package have a class each
    return config if config.model_type == "sorted_llama" else SortedLlamaConfig.from_llama(config)


SortedLlamaConfig.register_for_auto_class()
