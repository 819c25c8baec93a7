"""Sorted Fine-Tuning with TRL."""

try:
    from .exit_table import ExitTableCallback
    from .sorted_sft_config import SortedSFTConfig
    from .sorted_sft_trainer import SortedSFTTrainer
except ModuleNotFoundError as error:
    raise ImportError(f'{error}: the trainer and what builds on it need pip install "sorted-llama[train]".') from error


__all__ = ["ExitTableCallback", "SortedSFTConfig", "SortedSFTTrainer"]
