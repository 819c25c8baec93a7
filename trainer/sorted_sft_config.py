"""Configuration of [`SortedSFTTrainer`]."""

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.hf_argparser import HfArg
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import SFTConfig

from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import (
    check_choice,
    check_exit_layers,
    check_exit_loss_weights,
    check_int,
    check_number,
    exit_spacing,
)
from sorted_llama.modeling_sorted_llama.heads_sorted_llama import EXIT_HEADS


@dataclass
class SortedSFTConfig(SFTConfig):
    r"""
    Configuration of the [`SortedSFTTrainer`]: the exits, beside the parameters of [`~trl.SFTConfig`], which all keep
    their meaning. The defaults train the objective of the paper (arXiv 2309.08968, section 3): every exit at every
    step, weight 1, summed. `bf16` defaults to `False` where no accelerator knows bfloat16: [`~trl.SFTConfig`] refuses.

    Parameters:
        exit_layers (`list[int]` or `str`, *optional*):
            Numbers of decoder layers after which to train an exit: ascending, unique, ending in the model's full
            depth. `"every:4"` takes every fourth layer and the full depth. Defaults to the model config's.
        exit_loss_weights (`list[float]` or `str`, *optional*):
            Weight of each exit's loss, at least 0; or a rule: `"linear"` (its share of the layers), `"budget:0.3"`
            (full depth weighs 1, the others share 0.3 evenly, so that more exits do not pull more). Defaults to the
            model config's, then to 1.0 each.
        exit_loss_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"` of the weighted losses (the paper's text), or their `"mean"` (its formula), on the scale of SFT's.
        exit_schedule (`str`, *optional*, defaults to `"all"`):
            Which exits a step trains beside the full depth: `"all"`; or `"random"`, `exits_per_step` of them, drawn
            from the seed and the number of the step (SortedNet, arXiv 2309.00255), so the same on every process.
        exits_per_step (`int`, *optional*, defaults to `1`):
            Number of exits beside the full depth that a `"random"` step trains.
        trainable (`str`, *optional*, defaults to `"all"`):
            `"all"` weights; or `"exits"`, intermediate classifier tuning (ICT, the paper's baseline): the backbone is
            frozen, and what reads the exits is trained, the final norm and the LM head (a tied head is untied), or
            what the exits below full depth own, which leaves full depth as it is.
        exit_heads (`str`, *optional*):
            What each exit below full depth owns: nothing with `"shared"`; with `"separate"` copies of the norm and the
            head; with `"lens"` a norm and a square matrix, first the identity, before the shared head; with `"layer"`
            a decoder layer, first the model's next one, and a norm (Balcony, arXiv 2503.05005). Defaults to the
            model config's.
        detach_exits (`bool`, *optional*, defaults to `False`):
            Whether the exits below full depth train only what they own, so that full depth is trained as without
            them; with small `exit_loss_weights`, as `max_grad_norm` clips the norm of all gradients.
        exit_learning_rate (`float`, *optional*):
            Learning rate of what the exits own. Defaults to `learning_rate`.
        self_distillation_weight (`float`, *optional*, defaults to `0.0`):
            Weight of `KL(full depth || exit)`, added to each exit's loss; no gradient reaches full depth through it.

    Raises:
        ValueError: At construction, if a value is out of range or would have no effect. What depends on the model is
            checked by the trainer before it touches the data.
    """

    # A list of strings is what the command line gives: `--exit_layers 10 20 30`, `--exit_layers every:4`
    exit_layers: list[str] | None = HfArg(
        default=None, help="Decoder layers after which to train an exit, or `every:4`. Defaults to the model's."
    )
    exit_loss_weights: list[str] | None = HfArg(
        default=None,
        help="Weight of each exit's loss, or a rule: `linear`, `budget:0.3`. Defaults to the model's, else 1.0.",
    )
    exit_loss_reduction: Literal["sum", "mean"] = HfArg(default="sum", help="How the exits' losses are put together.")
    exit_schedule: Literal["all", "random"] = HfArg(
        default="all",
        help="Exits that a step trains beside the full depth: `all`, or `exits_per_step` `random` ones.",
    )
    exits_per_step: int = HfArg(default=1, help="With `random`, number of exits of a step beside the full depth.")
    trainable: Literal["all", "exits"] = HfArg(
        default="all", help="`all` weights, or what reads the `exits` alone, the backbone frozen (ICT)."
    )
    exit_heads: str | None = HfArg(
        default=None,
        help="What each exit below full depth owns: nothing (`shared`), a norm and a head (`separate`), a norm and a "
        "square matrix before the shared head (`lens`), a decoder layer and a norm (`layer`). Default: the model's.",
        metadata={"choices": list(EXIT_HEADS)},
    )
    detach_exits: bool = HfArg(default=False, help="Whether the exits below full depth train only what they own.")
    exit_learning_rate: float | None = HfArg(default=None, help="Learning rate of what exits own.")
    self_distillation_weight: float = HfArg(default=0.0, help="Weight of each exit's divergence from full depth.")

    def __post_init__(self):
        # `SFTConfig` takes bfloat16 where nothing is said, and then refuses a machine that has no accelerator for it
        can_bf16 = self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
        if self.bf16 is None and not can_bf16:
            self.bf16 = False
        super().__post_init__()
        self.exit_layers = self._read_exit_layers()
        self.exit_loss_weights = self._read_exit_loss_weights()
        check_choice(self.exit_loss_reduction, "exit_loss_reduction", ["sum", "mean"])
        check_choice(self.exit_schedule, "exit_schedule", ["all", "random"])
        check_choice(self.trainable, "trainable", ["all", "exits"])
        check_choice(self.exit_heads, "exit_heads", [*EXIT_HEADS, None])
        self.exits_per_step = check_int(self.exits_per_step, "exits_per_step", 1)
        self.self_distillation_weight = check_number(self.self_distillation_weight, "self_distillation_weight", 0)
        if self.exit_learning_rate is not None:
            check_number(self.exit_learning_rate, "exit_learning_rate", 0, exclusive=True)
        if self.exits_per_step != 1 and self.exit_schedule != "random":
            raise ValueError(
                f"`exits_per_step={self.exits_per_step}` has no effect with `exit_schedule='all'`: choose 'random'."
            )

    def _read_exit_layers(self) -> Any:
        exits: Any = self.exit_layers
        if isinstance(exits, (list, tuple)):
            exits = read_exit_layers(exits)
        is_spacing = isinstance(exits, str) and exit_spacing(exits) is not None
        return exits if exits is None or is_spacing else check_exit_layers(exits, None)

    def _read_exit_loss_weights(self) -> Any:
        weights: Any = self.exit_loss_weights
        if isinstance(weights, (list, tuple)) and all(isinstance(w, str) for w in weights):  # from the command line
            try:
                weights = [float(w) for w in weights]
            except ValueError:
                weights = weights[0] if len(weights) == 1 else weights
        if isinstance(weights, str):
            _weights_by_rule(weights, [1])
        elif weights is not None:
            sized = self.exit_layers if isinstance(self.exit_layers, list) else weights
            weights = check_exit_loss_weights(weights, len(sized) if isinstance(sized, (list, tuple)) else 1)
        return weights

    def exits_of(self, num_hidden_layers: int) -> list[int] | None:
        """The exits for a model of `num_hidden_layers`; `None` where `exit_layers` is not set."""
        return None if self.exit_layers is None else check_exit_layers(self.exit_layers, num_hidden_layers)

    def weights_of(self, exit_layers: list[int], default: list[float] | None = None) -> list[float] | None:
        """The weights of these exits' losses, `default` where `exit_loss_weights` is not set; `None` for 1.0 each."""
        weights: Any = default if self.exit_loss_weights is None else self.exit_loss_weights
        if isinstance(weights, str):
            weights = _weights_by_rule(weights, exit_layers)
        return None if weights is None else check_exit_loss_weights(weights, len(exit_layers))

    def exits_at_step(self, exit_layers: list[int], step: int) -> list[int]:
        """Those of all exits that are trained after `step` optimization steps, ascending, the full depth last."""
        if self.exit_schedule == "all":
            return exit_layers
        *others, full_depth = exit_layers
        drawn = random.Random(f"{self.seed} {step}").sample(others, min(self.exits_per_step, len(others)))
        return [*sorted(drawn), full_depth]


def read_exit_layers(given: Sequence[Any]) -> Any:
    """The numbers, or the one `"every:N"`, of a flag, as [`check_exit_layers`] takes them."""
    if len(given) == 1 and isinstance(given[0], str) and not given[0].isdecimal():
        return given[0]
    return [int(k) if isinstance(k, str) and k.isdecimal() and len(k) < 10 else k for k in given]


def _weights_by_rule(rule: str, exit_layers: list[int]) -> list[float]:
    """What `"linear"` and `"budget:0.3"` make of the exits."""
    *others, full_depth = exit_layers
    if rule == "linear":
        return [k / full_depth for k in exit_layers]
    if rule.startswith("budget:"):
        with contextlib.suppress(ValueError):
            budget = check_number(float(rule.removeprefix("budget:")), "budget", 0)
            return [budget / len(others) for _ in others] + [1.0]
    raise ValueError(
        "`exit_loss_weights` must be a list of numbers, 'linear' or 'budget:B' with a finite B of at least 0, "
        f"got {rule!r}."
    )
