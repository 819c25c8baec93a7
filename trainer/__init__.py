"""Sorted Fine-Tuning with TRL."""

from .sorted_sft_config import SortedSFTConfig
from .sorted_sft_trainer import SortedSFTTrainer


__all__ = ["SortedSFTConfig", "SortedSFTTrainer"]
