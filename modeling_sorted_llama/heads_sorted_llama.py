"""What an exit owns: one class a kind of `exit_heads`, and which heads are known to be a plain matrix product."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from .compat_sorted_llama import is_hooked, is_sharded, whole_copy


# Modules of a Llama; `{}` is the number of an exit, and so, counted from 0, of the layer that comes next
EMBEDDINGS, LAYER, NORM, HEAD = "model.embed_tokens", "model.layers.{}", "model.norm", "lm_head"
MATRIX = f"{NORM}.matrix"  # what a lens has beside the norm's weight, until it is folded into the head

_FOLD_ERROR = (
    "An exit with `exit_heads='lens'` is a plain Llama once its matrix is folded into the LM head, which takes a "
    "linear head in floating point without bias, hooks or adapters, got {}: dequantize, merge or remove them first."
)


class ExitHead(nn.Module):
    """LM head of an exit with `exit_heads="separate"`: `hidden_states @ weight.T`, `(vocab_size, hidden_size)`."""

    # No `nn.Linear`: quantization and adapters for all linear layers are for the layers of the backbone, and of the
    # heads they know to leave out the one that `get_output_embeddings` names
    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight)

    @classmethod
    def resized(cls, head: Any, shared: torch.Tensor) -> "ExitHead":
        """An exit's head with as many rows as the weight of the shared one, whose rows it takes for those it lacks."""
        rows, kept = shared.detach().clone(), min(len(shared), len(head.weight))
        rows[:kept] = head.weight.detach()[:kept]
        return cls(nn.Parameter(rows, head.weight.requires_grad))


class ExitLens(LlamaRMSNorm):
    """
    Norm of an exit with `exit_heads="lens"`: `(I + A) RMSNorm(h)`, with a gain and a square matrix `A`, at first 0, of
    its own. This is a tuned lens (arXiv 2303.08112) put behind the norm, where it folds into a plain Llama's head.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps)
        self.matrix = nn.Parameter(torch.zeros(hidden_size, hidden_size))  # no `nn.Linear`, as in `ExitHead`

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = super().forward(hidden_states)
        return normed + nn.functional.linear(normed, self.matrix)


class SharedHeads:
    """`exit_heads="shared"`: an exit owns nothing, and reads through the final norm and the LM head."""

    # A plain Llama's modules, and the exit's own that stand in their place
    owned: ClassVar[dict[str, str]] = {}
    # Whether the sub-model's LM head is another than the model's
    has_own_head: ClassVar[bool] = False

    def make_layer(self, config: LlamaConfig, exit_layer: int) -> nn.Module | None:
        """The decoder layer that an exit owns, its weights not yet set."""
        return LlamaDecoderLayer(config, exit_layer) if LAYER in self.owned else None

    def make_norm(self, config: LlamaConfig, exit_layer: int) -> nn.Module | None:
        """The norm that an exit owns, its weights not yet set."""
        return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if NORM in self.owned else None

    def make_head(self, config: LlamaConfig, exit_layer: int) -> nn.Module | None:
        """The LM head that an exit owns, its weights not yet set."""
        if HEAD not in self.owned:
            return None
        return ExitHead(nn.Parameter(torch.empty(config.vocab_size, config.hidden_size)))

    def init_as(self, own: nn.Module, shared: nn.Module) -> None:
        """Have a module of an exit, where it was not loaded, do what the model's does."""
        check_copied(shared)
        for name, weight in shared.named_parameters(recurse=False):
            init.copy_(own.get_parameter(name), weight)

    def copy_layer(self, shared: nn.Module) -> nn.Module:
        """A decoder layer for an exit that does what this one does."""
        check_copied(shared)
        return whole_copy(shared)

    def copy_norm(self, shared: nn.Module) -> nn.Module:
        """A norm for an exit that does what the final norm does."""
        return whole_copy(shared)

    def copy_head(self, shared: nn.Module) -> nn.Module:
        """A head for an exit that does what the LM head does."""
        copied = whole_copy(shared)
        return ExitHead(copied.get_parameter("weight")) if is_matrix_product(shared) else copied

    def to_plain(self, norm: nn.Module, head: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The norm and the LM head with which a plain Llama reads as an exit does with these."""
        return norm, _linear(head.weight) if isinstance(head, ExitHead) else head


class SeparateHeads(SharedHeads):
    """`exit_heads="separate"`: an exit owns a norm and an LM head, copies of the shared ones to begin with."""

    owned: ClassVar[dict[str, str]] = {NORM: "model.exit_norms.{}", HEAD: "exit_lm_heads.{}"}
    has_own_head: ClassVar[bool] = True


class LensHeads(SharedHeads):
    """`exit_heads="lens"`: an exit owns a norm and a matrix before the shared LM head, the identity to begin with."""

    owned: ClassVar[dict[str, str]] = {NORM: "model.exit_norms.{}"}
    has_own_head: ClassVar[bool] = True  # the matrix is folded into it

    def make_norm(self, config: LlamaConfig, exit_layer: int) -> nn.Module:
        return ExitLens(config.hidden_size, eps=config.rms_norm_eps)

    def init_as(self, own: Any, shared: nn.Module) -> None:
        super().init_as(own, shared)
        init.zeros_(own.matrix)

    def copy_norm(self, shared: Any) -> nn.Module:
        lens = ExitLens(len(shared.weight), shared.variance_epsilon).to(shared.weight)
        self.init_as(lens, shared)
        return lens.train(shared.training)

    def to_plain(self, norm: Any, head: Any) -> tuple[nn.Module, nn.Module]:
        if not is_matrix_product(head):
            raise ValueError(_FOLD_ERROR.format(head))
        plain = LlamaRMSNorm(len(norm.weight), norm.variance_epsilon)
        plain.weight = norm.weight
        return plain, _linear(nn.Parameter(fold_lens(head.weight, norm.matrix)))


class LayerHeads(SharedHeads):
    """
    `exit_heads="layer"`: an exit owns a decoder layer, to begin with a copy of the model's next one, and a norm before
    the shared LM head (Balcony, arXiv 2503.05005). So the sub-model has a layer more than the exit counts.
    """

    owned: ClassVar[dict[str, str]] = {LAYER: "model.exit_decoders.{}", NORM: "model.exit_norms.{}"}


# All kinds: the config, the models, the loss, the trainer and whatever reads a checkpoint ask here
EXIT_HEADS = {"shared": SharedHeads(), "separate": SeparateHeads(), "lens": LensHeads(), "layer": LayerHeads()}
OWNING_HEADS = " or ".join(repr(name) for name, kind in EXIT_HEADS.items() if kind.owned)  # for errors


def heads_of(config: Any, exit_layer: int) -> SharedHeads:
    """What reads an exit of a [`SortedLlamaConfig`]: `SharedHeads` at full depth and where nothing was trained."""
    return EXIT_HEADS[config.exit_heads if exit_layer in config.own_exits else "shared"]


def num_layers_of(config: Any, exit_layer: int) -> int:
    """Number of decoder layers of an exit's sub-model: those up to the exit, and the exit's own."""
    return exit_layer + (LAYER in heads_of(config, exit_layer).owned)


def owned_modules(config: Any, exit_layer: int) -> list[str]:
    """Names of the modules that an exit owns, in a model of this config: `model.exit_norms.12`."""
    return [name.format(exit_layer) for name in heads_of(config, exit_layer).owned.values()]


def modules_of_exits(config: Any, make: Callable[[LlamaConfig, int], nn.Module | None]) -> nn.ModuleDict:
    """By the number of the exit, what `make` (`make_norm`, ...) makes for those that own something."""
    made = {str(k): make(config, k) for k in config.own_exits}
    return nn.ModuleDict({k: module for k, module in made.items() if module is not None})


def check_copied(shared: nn.Module) -> None:
    """Refuse to copy quantized weights, which cannot be trained, for an exit."""
    for weight in (*shared.parameters(), *shared.buffers()):
        if not weight.is_floating_point():
            raise ValueError(
                f"`exit_heads='layer'` makes copies of decoder layers to train them, and these are quantized, got "
                f"weights of type {weight.dtype}: make and train the exits of the model as it was, then quantize."
            )


def _linear(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


@torch.no_grad()
def fold_lens(head_weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Weight of the head that reads a plain norm as the head of `head_weight` reads an [`ExitLens`] of `matrix`."""
    if not head_weight.is_floating_point():
        raise ValueError(_FOLD_ERROR.format(head_weight.dtype))
    lens = torch.eye(len(matrix), device=head_weight.device) + matrix.float().to(head_weight.device)
    return (head_weight.float() @ lens).to(head_weight.dtype)


def submodel_name(name: str, config: Any, exit_layer: int) -> str | None:
    """
    What the sub-model of an exit calls a tensor of the checkpoint; `None` if it has no such tensor. A lens keeps its
    `MATRIX`, which [`fold_lens`] folds into the head.
    """
    owned = heads_of(config, exit_layer).owned
    for plain, of_exit in owned.items():
        module = f"{of_exit.format(exit_layer)}."
        if name.startswith(module):
            return f"{plain.format(exit_layer)}.{name.removeprefix(module)}"
    if name.startswith("model.layers."):
        return name if int(name.split(".")[2]) < exit_layer else None
    shared = tuple(f"{plain}." for plain in (EMBEDDINGS, NORM, HEAD) if plain not in owned)
    return name if name.startswith(shared) else None


_FORWARDS = {nn.Linear: nn.Linear.forward, ExitHead: ExitHead.forward}


def is_matrix_product(head: nn.Module) -> bool:
    """
    Whether a head is known to be `hidden_states @ head.weight.T` and nothing else, so that its weight may be read in
    place of a call: an `nn.Linear` itself (adapters, quantization and parametrizations are subclasses) or an
    [`ExitHead`], with the forward of its class, a floating-point matrix, no bias, and no hooks but those for shards.
    """
    # FSDP2 puts a class of its own before the module's
    kind: Any = next(c for c in type(head).__mro__ if not c.__module__.startswith("torch.distributed."))
    if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind] or "forward" in vars(head):
        return False
    weight: Any = head.weight
    return (
        (type(weight) in (torch.Tensor, nn.Parameter) or is_sharded(weight))
        and weight.is_floating_point()
        and weight.ndim == 2
        and getattr(head, "bias", None) is None
        and not is_hooked(head)
    )
