"""Sorted LLaMA: importing this package registers its config and models with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_sorted_llama import SortedLlamaConfig
from .loss_sorted_llama import MultiExitLossOutput, multi_exit_loss
from .modeling_sorted_llama import (
    SortedCausalLMOutputWithPast,
    SortedLlamaForCausalLM,
    SortedLlamaModel,
    SortedModelOutputWithPast,
)


AutoConfig.register("sorted_llama", SortedLlamaConfig, exist_ok=True)
AutoModel.register(SortedLlamaConfig, SortedLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(SortedLlamaConfig, SortedLlamaForCausalLM, exist_ok=True)

__all__ = [
    "MultiExitLossOutput",
    "SortedCausalLMOutputWithPast",
    "SortedLlamaConfig",
    "SortedLlamaForCausalLM",
    "SortedLlamaModel",
    "SortedModelOutputWithPast",
    "multi_exit_loss",
]
