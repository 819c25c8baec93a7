"""
Sorted LLaMA: one Llama checkpoint that holds many models.

Importing this package registers the model with the Auto classes of transformers. The trainer's names are imported when
they are first asked for, with what they need: `pip install "sorted-llama[train]"`.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


if find_spec(f"{__name__}.modeling_sorted_llama") is None:
    raise ImportError(
        f"`import sorted_llama` found {__file__}, in the source tree, where its parts are in other folders: work in "
        "another folder, or install the tree itself, pip install -e ."
    )

from . import modeling_sorted_llama
from .modeling_sorted_llama import *  # noqa: F403


if TYPE_CHECKING:
    from .trainer import ExitTableCallback, SortedSFTConfig, SortedSFTTrainer

__version__ = version("sorted-llama")

_TRAINER_NAMES = ("ExitTableCallback", "SortedSFTConfig", "SortedSFTTrainer")

__all__ = [*modeling_sorted_llama.__all__]
if find_spec("trl") is not None:  # `import *` works without it
    __all__ += ["ExitTableCallback", "SortedSFTConfig", "SortedSFTTrainer"]


def __getattr__(name: str) -> Any:
    if name in _TRAINER_NAMES:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
