"""What differs between versions of transformers, and what sharding engines need: asked here and nowhere else."""

import copy
import inspect
import sys
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg


logger = logging.get_logger("transformers.modeling_sorted_llama")  # transformers' verbosity applies to it

# transformers 5.24 renamed `past_key_values` to `cache`, everywhere at once
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
# Where the old name is the only one, it is not deprecated: the version is past, and nothing is told
takes_either_cache_name = deprecate_kwarg(
    "past_key_values", version="5.40.0" if CACHE_NAME == "cache" else "5.0.0", new_name="cache"
)

# Trainer's label smoothing (and pipelines) look a model up here to know that its labels are to be shifted
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["sorted_llama"] = "SortedLlamaForCausalLM"

try:
    from transformers.modeling_utils import slice_logits_to_keep as slice_logits_to_keep
except ImportError:  # before transformers 5.24

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


def share_llamas_adapters() -> None:
    """
    Have PEFT know a sorted Llama's default target modules: a Llama's. It looks them up by model type, after it has
    asked the config for `to_dict`. PEFT is not imported here: remote code that does asks everyone to install it.
    """
    for targets in list(vars(sys.modules.get("peft.utils.constants", object)).values()):
        if isinstance(targets, dict) and "llama" in targets:
            targets.setdefault("sorted_llama", targets["llama"])


class SavedAsItsModel:
    """
    Base of models that are saved as what they are under FSDP2 too, which gives a model a class of its own:
    `save_pretrained` writes the name of the class into the checkpoint, and the code that it finds in its module.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            model_class = next(c for c in cls.__mro__ if not c.__module__.startswith("torch."))
            cls.__module__, cls.__name__ = model_class.__module__, model_class.__name__


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor: FSDP2's shard of a parameter, for example."""
    return hasattr(tensor, "full_tensor")


def whole_weight(head: nn.Module) -> torch.Tensor:
    weight: Any = head.weight
    if not is_sharded(weight):
        return weight
    from torch.distributed.fsdp import FSDPModule  # not in every build of torch, as shards are not
    from torch.distributed.tensor import Partial

    # Where FSDP2 wraps the head alone, its own backward, which averages over the ranks' tokens, does not run
    averaged = [Partial("avg")] * weight.device_mesh.ndim if isinstance(head, FSDPModule) else None
    return weight.full_tensor(grad_placements=averaged)


def gather_in_backward(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """
    Under DeepSpeed ZeRO-3, have parameters made whole for the backward of a `model` that uses them without calling
    their `modules`, in the same order on every process: when their gradients arrive they are sharded again.
    """
    for param in dict.fromkeys(p for module in modules for p in module.parameters() if hasattr(p, "ds_id")):
        sys.modules["deepspeed"].zero.register_external_parameter(model, param)


def gathered(modules: Sequence[nn.Module]):
    """Context with whole parameters: under DeepSpeed ZeRO-3 they are sharded until their module's forward runs."""
    params = dict.fromkeys(param for module in modules for param in module.parameters())
    sharded = [param for param in params if getattr(param, "ds_status", None) is not None and param.numel() == 0]
    if not sharded:
        return nullcontext()
    # No import statement: remote code that names a package asks everyone to install it
    return sys.modules["deepspeed"].zero.GatheredParameters(sharded)


def whole_copy(module: nn.Module) -> nn.Module:
    # What ZeRO-3 notes on a parameter, where its shard is for one, is not the copy's
    sharded = [param for param in module.parameters() if hasattr(param, "ds_id")]
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in sharded}
    # The config is: the copy attends as the model does, also where that is changed
    memo |= {id(one.config): one.config for one in module.modules() if hasattr(one, "config")}
    return copy.deepcopy(module, memo)


# torch has no public way to ask for the hooks of a module or a tensor
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What shards a model hooks its modules to make their parameters whole; who reads `weight` here does that himself
_SHARDING = ("torch.distributed.fsdp.", "deepspeed.")


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, its own or those of all modules, but those that gather shards."""
    everywhere = vars(torch.nn.modules.module)
    hooks = [
        hook for name in _HOOKS for of in (getattr(module, name), everywhere[f"_global{name}"]) for hook in of.values()
    ]
    return not all((getattr(hook, "__module__", None) or "").startswith(_SHARDING) for hook in hooks)


@contextmanager
def without_hooks(tensors: Sequence[torch.Tensor]):
    """Context in which the tensors' own hooks (`register_hook`) do not run."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks
