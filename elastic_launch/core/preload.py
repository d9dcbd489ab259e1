"""Choose what can be imported ahead of a program: what it imports before anything that could make a difference.

Nothing is run: the syntax of the program is looked at, and of its own modules that it imports. ``preload_reader``,
which is imported for a program that mentions something slow, follows the statements at the top level in their order. It
notes imports of modules that are known to be safe, and ends at the first statement that could change what a later
import does.
``docs/warm-workers.md`` has the rule as a table, with reasons.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple, Protocol

SLOW = frozenset(
    {"accelerate", "datasets", "numpy", "pandas", "scipy", "sklearn", "torch", "torchvision", "transformers"}
)
"""Packages that take long to import, and are safe: they start no threads that outlive the import, open no device, and
read no variable that differs between ranks. ``tests/processes/test_preload_auto.py`` checks them."""


class Import(NamedTuple):
    """One import of a module, and of names from it, which may be modules as well."""

    module: str
    names: tuple[str, ...] = ()


class Plan(NamedTuple):
    """What can be imported ahead of a program."""

    imports: tuple[Import, ...]
    """In the program's order, to the last one that takes long; empty: the workers should start cold."""
    reason: str
    """Why nothing more can; empty if the program imports nothing more that takes long."""


class Source(NamedTuple):
    """A module of the program's own, or the program."""

    path: str
    text: bytes
    """Empty for a package without a file."""
    is_package: bool = False


class Modules(Protocol):
    """Finds modules by their full name, as Python would. A module's packages are looked for before it."""

    def own(self, name: str) -> Source | None:
        """Return a module of the program's own."""

    def exists(self, name: str) -> bool:
        """Return whether there is such a module, the program's own or not."""


def plan(program: Source, name: str, is_main: bool, modules: Modules, stdlib: Collection[str]) -> Plan:
    """Return what can be imported ahead of a program.

    Args:
        program: the script or module.
        name: its full name as a module, which relative imports start from; empty for a script.
        is_main: whether its ``__name__`` is ``"__main__"``.
        modules: finds modules.
        stdlib: the names of the standard library's modules.
    """
    if not _mentions_slow(program, modules, set()):
        return Plan((), "")
    from elastic_launch.core.preload_reader import follow  # late: the classes of Python's syntax take 2 ms

    found, reason = follow(program, name, is_main, _last_import(program, modules), modules, stdlib)
    while found and found[-1].module.partition(".")[0] not in SLOW:
        found.pop()
    return Plan(tuple(found), reason)


def _mentions_slow(source: Source, modules: Modules, seen: set[bytes]) -> bool:
    """Return whether a file, or a module of the program's own that it imports, may import something slow.

    It decides for most programs that import nothing slow, and takes a tenth of the time that parsing them does.
    """
    for line in source.text.splitlines():
        if b"import" not in line:
            continue
        if _is_relative(line):
            return True
        for word in re.findall(rb"\w+", line):
            if word in seen:
                continue
            seen.add(word)
            name = word.decode(errors="replace")
            if name in SLOW:
                return True
            if (own := modules.own(name)) and (own.is_package or _mentions_slow(own, modules, seen)):
                return True
    return False


def _last_import(source: Source, modules: Modules) -> int:
    """Return the line of the last import that may matter, or a later one if that is hard to tell."""
    last = 0
    for number, line in enumerate(source.text.splitlines(), 1):
        if b"import" not in line:
            continue
        words = {word.decode(errors="replace") for word in re.findall(rb"\w+", line)}
        if _is_relative(line) or not words.isdisjoint(SLOW) or any(map(modules.own, words)):
            last = number
    return last


def _is_relative(line: bytes) -> bool:
    """Return whether a line may be a relative import."""
    return line.partition(b"from")[2].lstrip().startswith(b".")
