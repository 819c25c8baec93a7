"""What an exit owns: its norm and its LM head, and which heads are known to be a plain matrix product."""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .compat_sorted_llama import is_sharded


class ExitHead(nn.Module):
    """
    LM head of an exit with `exit_heads="separate"`: `hidden_states @ weight.T`.

    Args:
        weight (`torch.nn.Parameter` of shape `(vocab_size, hidden_size)`):
            Its matrix.
    """

    # No `nn.Linear`: quantization and adapters for all linear layers are for the layers of the backbone, and of the
    # heads they know to leave out the one that `get_output_embeddings` names
    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight)

    def to_linear(self) -> nn.Linear:
        """The `nn.Linear` around the same weight."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        linear.weight = self.weight
        return linear


FOLD_ERROR = (
    "An exit with `exit_heads='lens'` is a plain Llama once its matrix is folded into the LM head, which takes a "
    "linear head in floating point without bias, hooks or adapters, got {}: dequantize, merge or remove them first."
)


class ExitLens(LlamaRMSNorm):
    """
    Norm of an exit with `exit_heads="lens"`: `(I + A) RMSNorm(h)`, with a gain and a square matrix `A` of its own.

    This is a tuned lens (arXiv 2303.08112) put behind the norm, where it folds into the head of a plain Llama. At the
    start `A` is 0: the exit is read as full depth is.

    Args:
        hidden_size (`int`):
            Width of the hidden states.
        eps (`float`, *optional*, defaults to 1e-6):
            Added to their mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps)
        # No `nn.Linear`: quantization and adapters for all linear layers are for the layers of the backbone
        self.matrix = nn.Parameter(torch.zeros(hidden_size, hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = super().forward(hidden_states)
        return normed + nn.functional.linear(normed, self.matrix)

    @classmethod
    def from_norm(cls, norm: LlamaRMSNorm) -> "ExitLens":
        """The lens that does what `norm` does, around copies."""
        lens = cls(norm.weight.shape[0], norm.variance_epsilon).to(norm.weight)
        lens.weight.data.copy_(norm.weight)
        return lens.train(norm.training)

    def fold(self, head: nn.Module) -> tuple[LlamaRMSNorm, nn.Linear]:
        """A plain norm, around the same gain, and the head that reads it as `head` reads this lens."""
        if not is_matrix_product(head):
            raise ValueError(FOLD_ERROR.format(head))
        norm = LlamaRMSNorm(len(self.weight), self.variance_epsilon)
        norm.weight = self.weight
        weight: Any = head.weight
        folded = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        folded.weight = nn.Parameter(fold_lens(weight, self.matrix))
        return norm, folded


@torch.no_grad()
def fold_lens(head_weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """
    Weight of the head that reads a plain norm as the shared head reads an [`ExitLens`].

    Args:
        head_weight (`torch.Tensor` of shape `(vocab_size, hidden_size)`):
            Weight of the shared head.
        matrix (`torch.Tensor` of shape `(hidden_size, hidden_size)`):
            The lens's.

    Returns:
        `torch.Tensor` of shape `(vocab_size, hidden_size)`: Of `head_weight`'s dtype; multiplied in float32.

    Raises:
        ValueError: If the head is quantized.
    """
    if not head_weight.is_floating_point():
        raise ValueError(FOLD_ERROR.format(head_weight.dtype))
    whole = torch.eye(len(matrix), device=head_weight.device) + matrix.float().to(head_weight.device)
    return (head_weight.float() @ whole).to(head_weight.dtype)


_FORWARDS = {nn.Linear: nn.Linear.forward, ExitHead: ExitHead.forward}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What shards a model hooks its modules to make their parameters whole; who reads `weight` here does that himself
_SHARDING = ("torch.distributed.fsdp.", "deepspeed.")


def is_matrix_product(head: nn.Module) -> bool:
    """
    Whether a head is known to be `hidden_states @ head.weight.T` and nothing else, so that its weight may be read in
    place of a call. This is the one rule; every other head is called.

    Args:
        head (`torch.nn.Module`):
            Any module in an LM head's place.

    Returns:
        `bool`: True for an `nn.Linear` itself (no subclass: adapters, quantization and parametrizations are such) or
        an [`ExitHead`], with the forward of its class, a plain floating-point matrix as weight (also a sharded one),
        no bias, and no hooks, neither on it nor on all modules, but those that gather shards.
    """
    # FSDP2 puts a class of its own before the module's
    kind: Any = next(c for c in type(head).__mro__ if not c.__module__.startswith("torch.distributed."))
    if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind] or "forward" in vars(head):
        return False
    weight: Any = head.weight
    everywhere = vars(torch.nn.modules.module)
    hooks = [
        hook for name in _HOOKS for of in (getattr(head, name), everywhere[f"_global{name}"]) for hook in of.values()
    ]
    return (
        (type(weight) in (torch.Tensor, nn.Parameter) or is_sharded(weight))
        and weight.is_floating_point()
        and weight.ndim == 2
        and getattr(head, "bias", None) is None
        and all((getattr(hook, "__module__", None) or "").startswith(_SHARDING) for hook in hooks)
    )


__all__ = ["ExitHead", "ExitLens", "fold_lens", "is_matrix_product"]
