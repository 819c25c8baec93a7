"""What every exit is worth, as a table in the terminal."""

import re

from transformers import TrainerCallback
from transformers.utils import is_rich_available

from .escaping import one_line
from .exit_metrics import METRICS


if is_rich_available():
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


class ExitTableCallback(TrainerCallback):
    """
    Prints a table of the exits at each evaluation: a row an exit, a column a metric. [`SortedSFTTrainer`] adds it by
    itself; `trainer.remove_callback(ExitTableCallback)` takes it out. Without `rich` it is an `ImportError`.
    """

    def __init__(self):
        if not is_rich_available():
            raise ImportError("`ExitTableCallback` needs `rich`: pip install rich.")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not state.is_world_process_zero:
            return
        for dataset, rows in _by_exit(metrics or {}).items():
            names = [name for name in METRICS if any(name in values for values in rows.values())]
            title = Text(f"{one_line(dataset)}, step {state.global_step}")
            table = Table("exit", *(name.replace("_", " ") for name in names), title=title)
            for exit_layer, values in rows.items():
                table.add_row(str(exit_layer), *(f"{values[name]:.4g}" if name in values else "" for name in names))
            Console().print(table)


def _by_exit(metrics: dict[str, float]) -> dict[str, dict[int, dict[str, float]]]:
    """`eval_exit_10_loss` and the like: dataset, exit, name of the metric."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for key, value in metrics.items():
        match = re.fullmatch(rf"(.+)_exit_(\d+)_({'|'.join(METRICS)})", key, re.DOTALL)
        if match:
            dataset, exit_layer, name = match.groups()
            found.setdefault(dataset, {}).setdefault(int(exit_layer), {})[name] = value
    # An evaluation set may be called `exit_3` itself: of exits, agreement is known too
    return {dataset: rows for dataset, rows in found.items() if all("agreement" in row for row in rows.values())}
