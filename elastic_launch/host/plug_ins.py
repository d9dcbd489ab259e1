"""Load plug-ins: what installed packages offer through entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from elastic_launch.errors import LaunchError, UsageError

T = TypeVar("T")


def offered(group: str) -> set[str]:
    """Return the names of all entry points in a group. Takes some milliseconds."""
    from importlib.metadata import entry_points  # late, here and below: it takes 20 ms, and few jobs need it

    return entry_points(group=group).names


def load(group: str, name: str, subject: str, others: Iterable[str], use: Callable[[Any], T], hint: str = "") -> T:
    """Load an entry point, and return what ``use`` makes of it.

    Args:
        group: the group of the entry point.
        name: the name of the entry point.
        subject: what error messages begin with, as in ``--logs-specs=mine``.
        others: names that need no plug-in, for the error message.
        use: called with the object that the entry point refers to.
        hint: what else the user can do if the name is unknown, as in ``, or call register()``.

    Raises:
        UsageError: no installed package offers it. The message lists the available names.
        LaunchError: it cannot be imported, or ``use`` failed. The message names the entry point and its package.
    """
    from importlib.metadata import entry_points

    for entry_point in entry_points(group=group, name=name):
        try:
            return use(entry_point.load())
        except Exception as error:
            package = f" of {entry_point.dist.name}" if entry_point.dist else ""
            what = f"{subject}: plug-in {entry_point.value}{package} failed"
            raise LaunchError(f"{what}: {type(error).__name__}: {error}") from error
    known = ", ".join(sorted({*others, *offered(group)}))
    raise UsageError(
        f"{subject}: unknown; choose one of {known}, or install a package that offers it (entry point group {group})"
        f"{hint}"
    )
