"""Format what is shown: tables, times, and lists of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

NONE = "–"
"""Stands for a value that is not known."""


def table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Return rows as lines with aligned columns; the first row is the header. The last column is not padded."""
    texts = [[NONE if cell is None or cell == "" else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]


def clock(seconds: float, now: float) -> str:
    """Return a time of day, with the date if it was not today. Both are in seconds since 1970."""
    then, today = time.localtime(seconds), time.localtime(now)
    form = "%H:%M:%S" if then[:3] == today[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(form, then)


def cut(line: str, width: int) -> str:
    """Return a line of at most ``width`` characters; 0: of any number."""
    return line if not width or len(line) <= width else f"{line[: width - 1]}…"


def span(first: int, last: int) -> str:
    """Return ``0-7``, or ``0`` for one number."""
    return str(first) if first == last else f"{first}-{last}"


def spans(numbers: Iterable[int]) -> str:
    """Return numbers as ranges, as in ``0-2,5``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(span(first, last) for first, last in found)
