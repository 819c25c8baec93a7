"""What every exit of a checkpoint is worth, measured and shown: the evaluation, the page, the way to the Hub."""

from .evaluation import evaluate
from .record import load_evaluation


__all__ = ["evaluate", "load_evaluation"]
