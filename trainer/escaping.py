"""Names, commands and messages from outside, as they may stand on a page, in code and in a terminal."""

import json
import re
import unicodedata
from typing import Any
from urllib.parse import quote


_MARK = re.compile(r"<(?=!-- /?sorted-llama:)")
_REORDERS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # shows text in another order


def one_line(text: Any) -> str:
    """Text for a terminal or a picture: one line without what steers either; of an empty exception, its class."""
    line = " ".join("".join(" " if _steers(character) else character for character in str(text)).split())
    return line or (type(text).__name__ if isinstance(text, BaseException) else "")


def _steers(character: str) -> bool:
    return character in _REORDERS or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def markdown(text: Any) -> str:
    """Text for Markdown, a table's cell included: one line that shows what was given."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"[\\`*\[\]|~$#]", r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it means itself
    # The begin of a list, of a quotation or of a rule
    return re.sub(r"^([-+=>]|\d+(?=[.)](?:\s|$)))", lambda start: f"{start[0][:-1]}&#{ord(start[0][-1])};", text)


def code_span(text: Any) -> str:
    """Text as code within a line of Markdown, backticks included; not for a table's cell."""
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def python_literal(text: str) -> str:
    """Text as a string of Python in double quotes, for a block of code on a page."""
    literal = json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")
    return "".join(f"\\u{ord(character):04x}" if _steers(character) else character for character in literal)


def hub_links(ids: str | list[str], kind: str = "") -> str:
    """Markdown's links to models of the Hub, or to data sets with the `kind` `"datasets/"`."""
    ids = [ids] if isinstance(ids, str) else ids
    return ", ".join(f"[{markdown(name)}](https://huggingface.co/{kind}{quote(name)})" for name in ids)


def without_marks(content: str) -> str:
    """The content of a block of a page, in which nothing is the mark of a block any more."""
    return _MARK.sub("&lt;", content)
