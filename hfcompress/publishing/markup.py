"""Text for Markdown: values of any origin become text that is shown, never markup that is obeyed."""

from __future__ import annotations

import math
import re

_NOT_AVAILABLE = "n/a"
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "@": "&#64;"})


def plain(value: object) -> str:
    """Returns the value on one line, without control characters."""
    printable = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return " ".join(printable.split())


def escape(value: object) -> str:
    """Returns the value as Markdown that shows it, in a paragraph or in a table cell.

    Backslashes stop Markdown's own marks; entities stop HTML, cell borders, bare links and mentions.
    """
    marked = re.sub(r"([\\`*_\[\]~#$])", r"\\\1", plain(value)).translate(_ENTITIES)
    unlinked = marked.replace("://", "&#58;//").replace("www.", "www&#46;")
    # What makes a list, a heading or a rule at the start of a paragraph.
    return re.sub(r"^(\d*)([-+=]|[.)](?=\s|$))", r"\1\\\2", unlinked)


def fenced(text: str, language: str) -> str:
    """Returns a code block that no run of backticks inside can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table of cells that are Markdown already; all columns but the first align right."""
    line = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, line, *rows])


def number(value: float, form: str = ".4f", unit: str = "") -> str:
    """Returns a figure in the given form, or that there is none."""
    return f"{format(value, form)}{unit}" if math.isfinite(value) else _NOT_AVAILABLE


def size(count: int) -> str:
    """Returns bytes in millions, or in thousands where they are few."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def ratio(original: int, compressed: int) -> str:
    """Returns how many times smaller the second is."""
    return number(original / compressed, ".2f", "x") if compressed else _NOT_AVAILABLE
