"""LM heads: the one that an exit owns, and which are known to be a plain matrix product."""

from typing import Any

import torch
from torch import nn


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


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor: FSDP2's shard of a parameter, for example."""
    return hasattr(tensor, "full_tensor")


__all__ = ["ExitHead", "is_matrix_product"]
