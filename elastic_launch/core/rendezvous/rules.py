"""What a field of a record may hold. Each function returns a reader for the table in ``records``.

A reader takes a value as JSON has it, and returns the field's value or raises ``RuleError``. It checks the type, too:
everybody who can reach the store can write to it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

from elastic_launch.core.text import visible

Reader = Callable[[Any], Any]
"""Turns decoded JSON into the value of a field."""

SIGNALS = frozenset(map(int, signal.Signals))
"""The signals that have a name: only these can be reported, and stop a job."""


class RuleError(ValueError):
    """A value breaks a rule. The message says which, after the names of the fields that lead to the value."""


class Rules(NamedTuple):
    """What holds for all records of a type."""

    size: int
    """Most bytes of the record as JSON. They are counted before anything else is looked at."""
    fields: dict[str, Reader]
    """The reader of each field, none left out."""
    relations: tuple[tuple[str, Callable[[Any], bool]], ...] = ()
    """What must hold between the fields: as the message puts it, and as a condition on the record."""


def whole(low: int, high: int, besides: int | None = None) -> Reader:
    """A whole number from ``low`` to ``high``, but not ``besides``."""
    rule = f"must be a whole number from {low} to {high}{'' if besides is None else f', but not {besides}'}"

    def read(value: Any) -> int:
        if type(value) is int and low <= value <= high and value != besides:
            return value
        raise _broken(rule, value)

    return read


def seconds(high: float, low: float = 0.0) -> Reader:
    """A number of seconds from ``low`` to ``high``."""
    rule = f"must be a number of seconds from {low:g} to {high:g}"

    def read(value: Any) -> float:
        if type(value) in (float, int) and low <= value <= high:  # false for NaN
            return float(value)
        raise _broken(rule, value)

    return read


def flag(value: Any) -> bool:
    """Read a truth value."""
    if type(value) is bool:
        return value
    raise _broken("must be true or false", value)


def name(limit: int, least: int = 0) -> Reader:
    """A text for programs, compared or handed on as it is: ``least`` to ``limit`` printable characters."""
    rule = f"must be a text of {least} to {limit} printable characters"

    def read(value: Any) -> str:
        if type(value) is str and least <= len(value) <= limit and value.isprintable():
            return value
        raise _broken(rule, value)

    return read


def line(limit: int, least: int = 0) -> Reader:
    """A text for people of ``least`` to ``limit`` characters, in one line. What is not printable is made visible."""
    rule = f"must be a text of {least} to {limit} characters"

    def read(value: Any) -> str:
        if type(value) is str and least <= len(value) <= limit:
            return value if value.isprintable() else visible(value)[:limit]  # so that it can be passed on
        raise _broken(rule, value)

    return read


def lines(limit: int) -> Reader:
    """A text for people of at most ``limit`` characters. What is not printable is made visible, but for line breaks."""
    rule = f"must be a text of at most {limit} characters"

    def read(value: Any) -> str:
        if type(value) is str and len(value) <= limit:
            return value if value.isprintable() else visible(value, lines=True)[:limit]
        raise _broken(rule, value)

    return read


def one_of(kind: type[StrEnum]) -> Reader:
    """A member of an enumeration."""
    rule = f"must be one of {', '.join(kind)}"

    def read(value: Any) -> StrEnum:
        if type(value) is str and value in kind._value2member_map_:
            return kind(value)
        raise _broken(rule, value)

    return read


def named_signal(value: Any) -> int:
    """Read a signal that has a name; 0: none."""
    if type(value) is int and (value == 0 or value in SIGNALS):
        return value
    raise _broken("must be a signal", value)


def not_sent(value: Any) -> Any:
    """Refuse a field that only its own node sets."""
    raise RuleError("must not be in a record")


def each(read: Reader, limit: int) -> Reader:
    """A list of at most ``limit`` values of one kind."""
    rule = f"must be a list of at most {limit} values"

    def read_each(value: Any) -> tuple[Any, ...]:
        if type(value) is list and len(value) <= limit:
            return tuple(map(read, value))
        raise _broken(rule, value)

    return read_each


def _broken(rule: str, value: Any) -> RuleError:
    if isinstance(value, list | dict):
        found = f"a {type(value).__name__} of {len(value)}"
    else:
        found = repr(value if type(value) is not str else value[:40])
    return RuleError(f"{rule}, not {found if len(found) <= 50 else f'{found[:50]}...'}")
