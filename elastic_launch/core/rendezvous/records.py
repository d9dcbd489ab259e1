"""Layer 1: what nodes write to the job's store for each other: the records of a round, and their JSON. Pure.

Records are checked against their types when they are read: the store is open to everybody who can reach it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

from elastic_launch.errors import RendezvousStateError
from elastic_launch.job import RestartHistory

T = TypeVar("T")

_json = json.JSONEncoder(separators=(",", ":"))
_SCALARS = frozenset({str, int, float, bool, type(None)})
"""What JSON holds as it is; most parts of a record are that."""


class NodeRecord(NamedTuple):
    """A node that takes part in a round."""

    node: str
    """An id of its own, the same in every round."""
    host: str
    pid: int
    workers: int
    role: str
    rank: int = -1
    """The group rank that it asks for; -1: any."""
    previous: int = -1
    """Its group rank in the round before; -1: none."""
    address: str = ""
    """By which it reaches the store, and so the others reach it; or the one that its user named."""
    named: bool = False
    """The user named it (--local-addr)."""
    outward: str = ""
    """The same, for when that is a loopback address, and not everybody is on this host."""
    port: int = 0
    """Reserved for the workers' store, in case the node gets rank 0."""
    serves: bool = False
    """It hosts the job's store."""
    restart_history: RestartHistory = RestartHistory()
    """What it knows of the job's past, up to and with the round"""
    past: int = -1
    """of this number."""
    aside: bool = False
    """Others should come before it."""
    options: str = ""
    """The settings that it was given, as far as all nodes must have the same."""


class Closed(NamedTuple):
    """The membership of a round is final."""

    chief: int
    """Which chief closed it: the first, 0, or one that took over."""
    nodes: int
    """Members."""
    tickets: int
    """Arrivals that the chief knew of."""
    spares: tuple[int, ...] = ()
    """Tickets of those that it had no use for."""
    options: str = ""
    """The chief's, as in ``NodeRecord``."""
    restart_history: RestartHistory = RestartHistory()
    """As in ``Assignment``."""


class Members(NamedTuple):
    """The members of a round, by group rank."""

    tickets: tuple[int, ...]
    nodes: tuple[str, ...]
    hosts: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    """What each asked for, as in ``NodeRecord``."""


class Status(NamedTuple):
    """Who has come so far, for people."""

    joined: int
    hosts: str
    missing: str


NOBODY = Status(0, "", "")
"""Before the first node has come."""


def encode(record: NamedTuple) -> bytes:
    """The record as JSON."""
    return _json.encode(_plain(record)).encode()


def decode(kind: type[T], data: bytes, key: str) -> T:
    """Read a record.

    Raises:
        RendezvousStateError: ``data``, found at ``key``, is not one.
    """
    try:
        return cast(T, _reader(kind)(json.loads(data)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RendezvousStateError(
            f"the store holds at {key!r} what no node of this job can have written ({data[:60]!r}): does another job, "
            "or another version of elastic-launch, use the same --rdzv-id?"
        ) from error


def _plain(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, tuple):
        parts = [part if type(part) in _SCALARS else _plain(part) for part in value]
        return dict(zip(value._fields, parts, strict=True)) if hasattr(value, "_fields") else parts
    if is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items()}
    return value


def _reader(hint: Any) -> Callable[[Any], Any]:
    """What turns the JSON of a value of this type back into it."""
    if hint not in _readers:
        _readers[hint] = _make_reader(hint)
    return _readers[hint]


_readers: dict[Any, Callable[[Any], Any]] = {}


def _make_reader(hint: Any) -> Callable[[Any], Any]:
    if get_origin(hint) is tuple:
        part = _reader(get_args(hint)[0])

        def read_tuple(value: Any) -> Any:
            if not isinstance(value, list):
                raise TypeError(hint)
            return tuple(map(part, value))

        return read_tuple
    if is_dataclass(hint) or hasattr(hint, "_fields"):
        fields = {name: _reader(field) for name, field in get_type_hints(hint).items()}

        def read_record(value: Any) -> Any:
            return hint(**{name: read(value[name]) for name, read in fields.items()})

        return read_record

    def read_plain(value: Any) -> Any:
        if type(value) is hint:
            return value
        if hint is float and type(value) is int:
            return float(value)
        if issubclass(hint, str) and type(value) is str:
            return hint(value)  # an enumeration's
        raise TypeError(hint)

    return read_plain
