"""Sorted Fine-Tuning with TRL."""

from .exit_table import ExitTableCallback
from .sorted_sft_config import SortedSFTConfig
from .sorted_sft_trainer import SortedSFTTrainer


__all__ = ["ExitTableCallback", "SortedSFTConfig", "SortedSFTTrainer"]
