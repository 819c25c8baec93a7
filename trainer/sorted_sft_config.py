"""Configuration of [`SortedSFTTrainer`]."""

from dataclasses import dataclass, field

from trl import SFTConfig

from modeling_sorted_llama.configuration_sorted_llama import check_exit_layers, check_exit_loss_weights


@dataclass
class SortedSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`SortedSFTTrainer`].

    It adds the exits to [`~trl.SFTConfig`], whose parameters all keep their meaning. The defaults train the objective
    of the paper (arXiv 2309.08968, section 3): every exit at every step, weight 1, summed.

    Parameters:
        exit_layers (`list[int]` or `str`, *optional*):
            Numbers of decoder layers after which to train an exit: ascending, unique, ending in the model's full
            depth. `"every:4"` takes every fourth layer and the full depth. Defaults to the model config's
            `exit_layers`.
        exit_loss_weights (`list[float]`, *optional*):
            Weight of each exit's loss, finite and not negative. Defaults to the model config's, then to 1.0 each.
        exit_loss_reduction (`str`, *optional*, defaults to `"sum"`):
            How the weighted losses are put together: their `"sum"` (the paper's text), or their `"mean"` (its
            formula), which keeps the loss on the scale of ordinary fine-tuning.

    Raises:
        ValueError: At construction, if a value is out of range. What depends on the model's depth is checked by the
            trainer before it touches the data.
    """

    # A list of strings is what the command line gives: `--exit_layers 10 20 30`, `--exit_layers every:4`
    exit_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Numbers of decoder layers after which to train an exit: ascending, ending in the full depth. "
            "`every:4` takes every fourth layer and the full depth. Defaults to the model config's."
        },
    )
    exit_loss_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each exit's loss. Defaults to the model config's, then to 1.0 each."},
    )
    exit_loss_reduction: str = field(
        default="sum",
        metadata={"help": "How the weighted losses of the exits are put together.", "choices": ["sum", "mean"]},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.exit_layers, list) and len(self.exit_layers) == 1 and isinstance(self.exit_layers[0], str):
            if self.exit_layers[0].startswith("every:"):
                self.exit_layers = self.exit_layers[0]
        if isinstance(self.exit_layers, str):
            _spacing(self.exit_layers)
        elif self.exit_layers is not None:
            exits = self.exit_layers
            if isinstance(exits, (list, tuple)):
                exits = [int(k) if isinstance(k, str) and k.isdecimal() else k for k in exits]
            # The full depth is not known here: the last exit stands for it until the trainer has the model
            depth = exits[-1] if isinstance(exits, (list, tuple)) and exits and type(exits[-1]) is int else 1
            self.exit_layers = check_exit_layers(exits, max(depth, 1))
        if self.exit_loss_weights is not None:
            sized = self.exit_layers if isinstance(self.exit_layers, list) else self.exit_loss_weights
            expected = len(sized) if isinstance(sized, (list, tuple)) else 1
            self.exit_loss_weights = check_exit_loss_weights(self.exit_loss_weights, expected)
        if self.exit_loss_reduction not in ("sum", "mean"):
            raise ValueError(f"`exit_loss_reduction` must be 'sum' or 'mean', got {self.exit_loss_reduction!r}.")

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
        if isinstance(self.exit_layers, str):
            spacing = _spacing(self.exit_layers)
            return [*range(spacing, num_hidden_layers, spacing), num_hidden_layers]
        return None if self.exit_layers is None else check_exit_layers(self.exit_layers, num_hidden_layers)


def _spacing(exit_layers: str) -> int:
    """The N of `"every:N"`."""
    spacing = exit_layers.removeprefix("every:")
    if spacing == exit_layers or not spacing.isdecimal() or int(spacing) < 1:
        raise ValueError(
            f"`exit_layers` must be a list of integers or 'every:N' with N of at least 1, got {exit_layers!r}."
        )
    return int(spacing)
