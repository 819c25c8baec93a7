"""Sorted LLaMA: importing this package registers its config and models with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_sorted_llama import SortedCache
from .configuration_sorted_llama import SortedLlamaConfig
from .loss_sorted_llama import ExitLossOptions, MultiExitLossOutput, multi_exit_loss
from .modeling_sorted_llama import (
    SortedCausalLMOutputWithPast,
    SortedLlamaForCausalLM,
    SortedLlamaModel,
    SortedModelOutputWithPast,
)
from .sequences_sorted_llama import DraftStatistics, SortedGenerateOutput


AutoConfig.register("sorted_llama", SortedLlamaConfig, exist_ok=True)
AutoModel.register(SortedLlamaConfig, SortedLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(SortedLlamaConfig, SortedLlamaForCausalLM, exist_ok=True)

__all__ = [
    "DraftStatistics",
    "ExitLossOptions",
    "MultiExitLossOutput",
    "SortedCache",
    "SortedCausalLMOutputWithPast",
    "SortedGenerateOutput",
    "SortedLlamaConfig",
    "SortedLlamaForCausalLM",
    "SortedLlamaModel",
    "SortedModelOutputWithPast",
    "multi_exit_loss",
]
