"""Format short texts for log lines and reports.

Workers import this module, so it imports next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_LISTED = 8
"""Names that ``listed`` writes out before it counts the rest."""
_MAX_HEADLINE = 2000
"""Most characters of each of a headline's two lines."""
_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
"""Units of durations: seconds and name, and those of the smaller unit beside it."""
_TENTHS_BELOW = 9.95
"""Shorter durations, in seconds, are given to a tenth."""


def counted(number: int, noun: str) -> str:
    """Return ``1 node`` or ``2,000 nodes``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    """Return names as a list, as in ``host-a, host-b (2 nodes), host-c and 12 more``."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    shown = [name if count == 1 else f"{name} ({count} nodes)" for name, count in list(counts.items())[:MAX_LISTED]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def ranks_text(ranks: Iterable[int]) -> str:
    """Return ranks as ranges, as in ``0-2,5``."""
    ranges: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def shortened(text: str, limit: int) -> str:
    """Return a text without its middle if it exceeds ``limit`` characters; a line says how many are missing."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def headline(text: str) -> str:
    """Return an error in one line of moderate length: its first line, and the last one if it ends with a traceback."""
    first, *more = text.splitlines() or [""]
    return " ".join(line[:_MAX_HEADLINE] for line in (first, *more[-1:]))


def visible(text: str, *, lines: bool = False) -> str:
    """Return a text with everything that is not printable written as ``repr`` writes it, as in ``\\x1b[2J``.

    Texts from elsewhere go through this before they reach a line or a report. They could clear a screen, or look like
    a line of the launcher's.

    Args:
        text: the text, which may hold surrogates.
        lines: whether line breaks and tabs stay as they are.
    """
    if text.isprintable():
        return text
    if lines:
        return "\n".join("\t".join(map(visible, line.split("\t"))) for line in text.split("\n"))
    return "".join([character if character.isprintable() else repr(character)[1:-1] for character in text])


def duration(seconds: float) -> str:
    """Return a duration in at most two units, as in ``0.4 s``, ``41 s``, ``4 h 10 min`` or ``2 d``."""
    for size, unit, part, part_unit in _UNITS:
        if round(seconds) >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole:,} {unit}" + (f" {rest} {part_unit}" if rest else "")
    return f"{seconds:.1f} s" if seconds < _TENTHS_BELOW else f"{seconds:.0f} s"


def is_loopback(address: str) -> bool:
    """Return whether a numeric IP address reaches only this host."""
    return address.startswith("127.") or address == "::1"
