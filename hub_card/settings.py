"""
The ways to decode that an evaluation compares, in one table: what each asks of `generate`, and how the page and its
plot show it. `evaluation.json` names a setting by its kind and value: `"exit 10"`, `"threshold 0.9"`, `"draft 10"`;
thresholds may be one an exit: `"threshold [2, 0.9]"`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Style:
    """How the plot draws settings of a kind."""

    color: str
    marker: str
    linestyle: str
    direction: int  # in degrees, of a label from its point, where there is room


@dataclass(frozen=True)
class Mode:
    """A kind of setting."""

    argument: str  # of `generate`
    values: str  # a pattern, which every value of the argument matches
    label: str
    style: Style
    lossless: bool = False  # gives full depth's answers, so that only its speed is measured


_EXIT, _NUMBER = r"[1-9]\d{0,8}", r"(0|[1-9]\d*)(\.\d+)?(e[-+]?\d+)?"
_NUMBERS = rf"{_NUMBER}|\[{_NUMBER}(, {_NUMBER})*\]"  # for all exits, or one an exit
# Colors after Okabe and Ito, which colour-blind readers tell apart, the blue lighter: all read on white and on dark
MODES = {
    "exit": Mode("exit_layer", _EXIT, "one exit for all tokens", Style("#1F83C6", "o", "--", 90)),
    "threshold": Mode("exit_threshold", _NUMBERS, "exit_threshold", Style("#D55E00", "s", "-", 180)),
    "draft": Mode(
        argument="assistant_early_exit",
        values=_EXIT,
        label="assistant_early_exit (lossless)",
        style=Style("#009E73", "^", "none", 270),
        lossless=True,
    ),
}


@dataclass(frozen=True)
class Setting:
    """A kind of [`MODES`] and the value of its argument."""

    kind: str
    value: Any  # a number, or a list of them

    @classmethod
    def read(cls, name: str) -> "Setting":
        """The setting of a name in `evaluation.json`; `ValueError` if it is no such name."""
        kind, _, value = name.partition(" ")
        if kind not in MODES or re.fullmatch(MODES[kind].values, value) is None:
            raise ValueError(f"A setting must be one of {', '.join(MODES)} and a value, got {name!r}.")
        return cls(kind, json.loads(value))

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"

    @property
    def mode(self) -> Mode:
        return MODES[self.kind]

    @property
    def arguments(self) -> dict[str, Any]:
        """What `generate` is called with."""
        return {self.mode.argument: self.value}

    @property
    def call(self) -> str:
        """The same as text, to paste into a call."""
        return f"{self.mode.argument}={self.value}"
