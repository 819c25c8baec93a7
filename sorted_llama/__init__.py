"""
Sorted LLaMA: one Llama checkpoint that holds many models.

Importing this package registers the model with the Auto classes of transformers. The trainer's names are imported when
they are first asked for, with what they need: `pip install "sorted-llama[train]"`.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import modeling_sorted_llama
from .modeling_sorted_llama import *  # noqa: F403


if TYPE_CHECKING:
    from .trainer import ExitTableCallback, SortedSFTConfig, SortedSFTTrainer

__version__ = version("sorted-llama")

__all__ = ["ExitTableCallback", "SortedSFTConfig", "SortedSFTTrainer"]
_TRAINER_NAMES = tuple(__all__)
__all__ += modeling_sorted_llama.__all__


def __getattr__(name: str) -> Any:
    if name in _TRAINER_NAMES:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
