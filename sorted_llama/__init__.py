"""
Sorted LLaMA: one Llama checkpoint that holds many models.

Importing this package registers the model with the Auto classes of transformers. The trainer's names, and what they
need (`pip install "sorted-llama[train]"`), are imported when they are asked for.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import modeling_sorted_llama
from .modeling_sorted_llama import *  # noqa: F403


if TYPE_CHECKING:
    from .trainer import ExitTableCallback, SortedSFTConfig, SortedSFTTrainer  # noqa: F401

__version__ = version("sorted-llama")

_OF_THE_TRAINER = ("ExitTableCallback", "SortedSFTConfig", "SortedSFTTrainer")


def __getattr__(name: str) -> Any:
    if name in _OF_THE_TRAINER:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_THE_TRAINER})


__all__ = [*modeling_sorted_llama.__all__, *_OF_THE_TRAINER]
