"""Configuration of [`SortedSFTTrainer`]."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import SFTConfig

from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import (
    as_int,
    check_exit_layers,
    check_exit_loss_weights,
    exit_spacing,
    is_number,
)


@dataclass
class SortedSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`SortedSFTTrainer`].

    It adds the exits to [`~trl.SFTConfig`], whose parameters all keep their meaning. The defaults train the objective
    of the paper (arXiv 2309.08968, section 3): every exit at every step, weight 1, summed. `bf16` is
    `False` where neither it nor `use_cpu` is set and no accelerator knows bfloat16: [`~trl.SFTConfig`] would refuse.

    Parameters:
        exit_layers (`list[int]` or `str`, *optional*):
            Numbers of decoder layers after which to train an exit: ascending, unique, ending in the model's full
            depth. `"every:4"` takes every fourth layer and the full depth. Defaults to the model config's
            `exit_layers`.
        exit_loss_weights (`list[float]` or `str`, *optional*):
            Weight of each exit's loss, finite and not negative; or a rule: `"linear"` (its share of the layers: an
            exit at a third of the depth weighs 1/3), `"budget:0.3"` (full depth weighs 1, the others share 0.3 evenly,
            so that more exits do not pull more). Defaults to the model config's, then to 1.0 each. Small weights for
            the shallow exits are what full depth loses least by.
        exit_loss_reduction (`str`, *optional*, defaults to `"sum"`):
            How the weighted losses are put together: their `"sum"` (the paper's text), or their `"mean"` (its
            formula), which keeps the loss on the scale of ordinary fine-tuning.
        exit_schedule (`str`, *optional*, defaults to `"all"`):
            Which exits a step trains, the full depth always among them. A step costs what its exits cost. `"all"`:
            every one. `"random"`: `exits_per_step` others, drawn anew each step from the seed and the number of the
            step (SortedNet, arXiv 2309.00255), so the same on every process and after resuming; take it where many
            exits make a step too dear.
        exits_per_step (`int`, *optional*, defaults to `1`):
            With `"random"`, number of exits beside the full depth that a step trains; at most all.
        trainable (`str`, *optional*, defaults to `"all"`):
            `"all"` weights, or `"exits"`: intermediate classifier tuning (ICT, the paper's baseline), which freezes
            the backbone and trains what reads the exits: the final norm and the LM head (a tied head is untied), or,
            with separate exit heads, the norms and heads of the exits below full depth, which leaves full depth as it
            is. Take it to add exits to a model that must not change.
        exit_heads (`str`, *optional*):
            What each exit below full depth owns: with `"shared"` nothing; with `"separate"` a norm and a head, copies
            of the shared ones to begin with; with `"lens"` a norm and a square matrix before the shared head, the
            final norm and the identity to begin with. Defaults to the model config's.
        detach_exits (`bool`, *optional*, defaults to `False`):
            Whether the exits below full depth train only what they own, `exit_heads="lens"` or `"separate"`: full
            depth is trained as without them. Take it, with small `exit_loss_weights` (the norm that `max_grad_norm`
            clips is of all gradients) and a large `exit_learning_rate`, where full depth must not pay.
        exit_learning_rate (`float`, *optional*):
            Learning rate of what the exits own, above 0. Defaults to `learning_rate`.
        self_distillation_weight (`float`, *optional*, defaults to `0.0`):
            Weight of each exit's divergence from full depth, `KL(full depth || exit)` a token, added to its loss; no
            gradient reaches full depth through it.

    Raises:
        ValueError: At construction, if a value is out of range, or if `exits_per_step` would have no effect. What
            depends on the model's depth is checked by the trainer before it touches the data.
    """

    # A list of strings is what the command line gives: `--exit_layers 10 20 30`, `--exit_layers every:4`
    exit_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Numbers of decoder layers after which to train an exit: ascending, ending in the full depth. "
            "`every:4` takes every fourth layer and the full depth. Defaults to the model config's."
        },
    )
    exit_loss_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weight of each exit's loss, or a rule: `linear` in depth, `budget:0.3` (full depth weighs 1, "
            "the others share 0.3). Defaults to the model config's, then to 1.0 each."
        },
    )
    exit_loss_reduction: str = field(
        default="sum",
        metadata={"help": "How the weighted losses of the exits are put together.", "choices": ["sum", "mean"]},
    )
    exit_schedule: str = field(
        default="all",
        metadata={
            "help": "Which exits a step trains beside the full depth: `all`, or `exits_per_step` `random` ones.",
            "choices": ["all", "random"],
        },
    )
    exits_per_step: int = field(
        default=1,
        metadata={"help": "With `random`, number of exits beside the full depth that a step trains."},
    )
    trainable: str = field(
        default="all",
        metadata={
            "help": "`all` weights, or only what reads the `exits`: norm and LM head, the backbone frozen (ICT).",
            "choices": ["all", "exits"],
        },
    )
    exit_heads: str | None = field(
        default=None,
        metadata={
            "help": "What each exit below full depth owns: nothing (`shared`), a norm and a head (`separate`), a norm "
            "and a square matrix before the shared head (`lens`). Defaults to the model's.",
            "choices": ["shared", "separate", "lens"],
        },
    )
    detach_exits: bool = field(
        default=False,
        metadata={"help": "Whether the exits below full depth train only what they own, with `lens` or `separate`."},
    )
    exit_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of what the exits own. Defaults to `learning_rate`."}
    )
    self_distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of each exit's Kullback-Leibler divergence from full depth, added to its loss."},
    )

    def __post_init__(self):
        # `SFTConfig` takes bfloat16 where nothing is said, and then refuses a machine that has no accelerator for it
        can_bf16 = self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
        if self.bf16 is None and not can_bf16:
            self.bf16 = False
        super().__post_init__()
        self.exit_layers = self._read_exit_layers()
        self.exit_loss_weights = self._read_exit_loss_weights()
        _check_choice("exit_loss_reduction", self.exit_loss_reduction, ["sum", "mean"])
        _check_choice("exit_schedule", self.exit_schedule, ["all", "random"])
        _check_choice("trainable", self.trainable, ["all", "exits"])
        _check_choice("exit_heads", self.exit_heads, ["shared", "separate", "lens", None])
        if self.exit_learning_rate is not None:
            _check_number("exit_learning_rate", self.exit_learning_rate, 0, exclusive=True)
        _check_number("self_distillation_weight", self.self_distillation_weight, 0)
        number = as_int(self.exits_per_step)
        if number is None or number < 1:
            raise ValueError(f"`exits_per_step` must be an integer of at least 1, got {self.exits_per_step!r}.")
        self.exits_per_step = number
        if number != 1 and self.exit_schedule != "random":
            raise ValueError(
                f"`exits_per_step={number}` has no effect with `exit_schedule={self.exit_schedule!r}`: "
                "choose 'random'."
            )

    def _read_exit_layers(self) -> Any:
        exits: Any = self.exit_layers
        if isinstance(exits, (list, tuple)):
            exits = read_exit_layers(exits)
        if exits is None or (isinstance(exits, str) and exit_spacing(exits) is not None):
            return exits
        return check_exit_layers(exits, None)

    def _read_exit_loss_weights(self) -> Any:
        weights: Any = self.exit_loss_weights
        if isinstance(weights, (list, tuple)) and all(isinstance(w, str) for w in weights):  # from the command line
            numbers = [_to_float(w) for w in weights]
            if len(weights) == 1 and numbers[0] is None:
                (weights,) = weights
            else:
                weights = [w if number is None else number for w, number in zip(weights, numbers, strict=True)]
        if isinstance(weights, str):
            _rule_of_weights(weights)
        elif weights is not None:
            sized = self.exit_layers if isinstance(self.exit_layers, list) else weights
            weights = check_exit_loss_weights(weights, len(sized) if isinstance(sized, (list, tuple)) else 1)
        return weights

    def exits_of(self, num_hidden_layers: int) -> list[int] | None:
        """
        The exits for a model of a given depth.

        Args:
            num_hidden_layers (`int`):
                Number of decoder layers of the model.

        Returns:
            `list[int]`, or `None` where `exit_layers` is not set.

        Raises:
            ValueError: If the exits do not end in `num_hidden_layers`.
        """
        return None if self.exit_layers is None else check_exit_layers(self.exit_layers, num_hidden_layers)

    def check_exits(self, exit_layers: list[int]) -> None:
        """
        Check what needs exits below full depth.

        Args:
            exit_layers (`list[int]`):
                The exits.

        Raises:
            ValueError: If `exit_schedule`, `exits_per_step` or `self_distillation_weight` would have no effect.
        """
        others = len(exit_layers) - 1
        if self.exit_schedule == "random" and self.exits_per_step > others:
            raise ValueError(
                f"`exits_per_step={self.exits_per_step}` counts exits below full depth, and "
                f"`exit_layers={exit_layers}` has {others} of them."
            )
        if not others and (self.exit_schedule != "all" or self.self_distillation_weight):
            raise ValueError(
                f"`exit_schedule={self.exit_schedule!r}` and `self_distillation_weight="
                f"{self.self_distillation_weight!r}` concern exits below full depth: `exit_layers={exit_layers}` has "
                "none."
            )

    def weights_of(self, exit_layers: list[int], default: list[float] | None = None) -> list[float] | None:
        """
        The weights of the exits of a model.

        Args:
            exit_layers (`list[int]`):
                The exits.
            default (`list[float]`, *optional*):
                Weights where `exit_loss_weights` is not set.

        Returns:
            `list[float]`, or `None` for 1.0 each where nothing is set.

        Raises:
            ValueError: If the weights do not fit the exits, or are all 0.
        """
        weights: Any = default if self.exit_loss_weights is None else self.exit_loss_weights
        if isinstance(weights, str):
            weights = _rule_of_weights(weights)(exit_layers)
        return None if weights is None else check_exit_loss_weights(weights, len(exit_layers))

    def exits_at_step(self, exit_layers: list[int], step: int) -> list[int]:
        """
        The exits that a step trains, by `exit_schedule`.

        Args:
            exit_layers (`list[int]`):
                All exits, ascending, the full depth last.
            step (`int`):
                Number of optimization steps before this one.

        Returns:
            `list[int]`: Some of `exit_layers`, ascending, the full depth last.
        """
        others, full_depth = exit_layers[:-1], exit_layers[-1]
        number = min(self.exits_per_step, len(others))
        if self.exit_schedule == "random":
            others = sorted(random.Random(f"{self.seed} {step}").sample(others, number))
        return [*others, full_depth]


def read_exit_layers(given: Sequence[Any]) -> Any:
    """
    Exits from a command line, as [`check_exit_layers`] takes them; that says what is wrong with them.

    Args:
        given (`Sequence[str]` or `Sequence[int]`):
            Values of the flag: numbers, or one `"every:N"`.

    Returns:
        `list[int]` or `str`
    """
    if len(given) == 1 and isinstance(given[0], str) and not given[0].isdecimal():
        return given[0]
    return [int(k) if isinstance(k, str) and k.isdecimal() and len(k) < 10 else k for k in given]


def _rule_of_weights(rule: str):
    """From exits to their weights."""
    budget = _to_float(rule.removeprefix("budget:")) if rule.startswith("budget:") else None
    if rule == "linear":
        return lambda exits: [k / exits[-1] for k in exits]
    if budget is not None and is_number(budget) and budget >= 0:
        return lambda exits: [budget / (len(exits) - 1) for _ in exits[:-1]] + [1.0]
    raise ValueError(
        "`exit_loss_weights` must be a list of numbers, 'linear' or 'budget:B' with a finite B of at least 0, "
        f"got {rule!r}."
    )


def _to_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be {' or '.join(map(repr, allowed))}, got {value!r}.")


def _check_number(name: str, value: Any, least: float, exclusive: bool = False) -> None:
    if not is_number(value) or value < least or (exclusive and value == least):
        bound = f"above {least}" if exclusive else f"of at least {least}"
        raise ValueError(f"`{name}` must be a finite number {bound}, got {value!r}.")
