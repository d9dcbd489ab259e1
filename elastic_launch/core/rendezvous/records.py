"""What nodes write to the job's store for each other: the records of a round, and their JSON.

Records are checked against their types when they are read: everybody who can reach the store can write to it.
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
"""Types that JSON has, too; most parts of a record are of these."""


class NodeRecord(NamedTuple):
    """A node that joins a round, as it describes itself."""

    node: str
    """The node's id, the same in every round."""
    host: str
    pid: int
    """The agent's."""
    workers: int
    """Number of workers on the node."""
    role: str
    rank: int = -1
    """The group rank that the node asks for; -1: any."""
    previous_rank: int = -1
    """Its group rank in the round before; -1: it had none."""
    address: str = ""
    """The address by which the other nodes reach it: the one by which it reaches the store, or its --local-addr."""
    named: bool = False
    """Whether the user has named that address (--local-addr)."""
    outward: str = ""
    """The address to use instead of a loopback address, if not all nodes are on this host; empty: there is none."""
    port: int = 0
    """Port reserved for the workers' store, in case the node gets rank 0; 0: none."""
    serves: bool = False
    """Whether the node hosts the job's store."""
    restart_history: RestartHistory = RestartHistory()
    """What it knows of the job's restarts, up to the end of round ``known_round``."""
    known_round: int = -1
    """The latest round whose end it knows; -1: none."""
    deprioritized: bool = False
    """Whether other nodes are preferred to this one, because it has caused too many failures."""
    options: str = ""
    """The options that all nodes must share (``Settings.options``)."""


class Closed(NamedTuple):
    """The membership of a round is final."""

    leader: int
    """Number of the leader that closed the round: 0 for the first, more after a takeover; -1: there is no round."""
    nodes: int
    """Number of members."""
    tickets: int
    """Number of tickets that the leader knew of."""
    spares: tuple[int, ...] = ()
    """Tickets of the nodes that joined and are no members."""
    options: str = ""
    """The leader's ``NodeRecord.options``."""
    restart_history: RestartHistory = RestartHistory()
    """The restart history as the round begins."""


class Members(NamedTuple):
    """The members of a round. All fields are by group rank."""

    tickets: tuple[int, ...]
    nodes: tuple[str, ...]
    """Node ids."""
    hosts: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    """The group rank that each node asked for; -1: any."""


class Status(NamedTuple):
    """Who has joined so far, for the log."""

    joined: int
    """Number of nodes."""
    hosts: str
    missing: str


class Unfit(NamedTuple):
    """A node takes no part in a round, because its health check fails."""

    record: NodeRecord
    reason: str
    """Why the check fails, in one line."""
    is_gone: bool = False
    """Whether the node has left the job."""


NOBODY = Status(0, "", "")
"""The status before the first node has joined."""


def newest(node: NodeRecord) -> tuple[int, int]:
    """Return what to compare nodes by, to find out whose restart history is the job's."""
    return node.known_round, node.restart_history.goodput.steps


def encode(record: NamedTuple) -> bytes:
    """Encode a record as JSON. Fields that have their default value are left out."""
    return _json.encode(_plain(record)).encode()


def decode_lines(kind: type[T], data: bytes, key: str) -> list[T]:
    """Decode records that were appended to ``key``, one on each line. Raises as ``decode`` does."""
    return [decode(kind, line, key) for line in data.splitlines()]


def decode(kind: type[T], data: bytes, key: str) -> T:
    """Decode a record of the type ``kind``, found at ``key``.

    Raises:
        RendezvousStateError: ``data`` is not such a record.
    """
    try:
        return cast(T, _reader(kind)(json.loads(data)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RendezvousStateError(
            f"unexpected data in the store at {key!r}: {data[:60]!r}; is another job, or another version of "
            "elastic-launch, using the same --rdzv-id?"
        ) from error


def _plain(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, tuple):
        names: tuple[str, ...] = getattr(value, "_fields", ())
        if not names:
            return [part if type(part) in _SCALARS else _plain(part) for part in value]
        defaults: dict[str, Any] = getattr(value, "_field_defaults", {})
        return {
            name: part if type(part) in _SCALARS else _plain(part)
            for name, part in zip(names, value, strict=True)
            if name not in defaults or part != defaults[name]
        }
    if is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items()}
    return value


def _reader(hint: Any) -> Callable[[Any], Any]:
    """Return the function that turns decoded JSON into a value of the type ``hint``."""
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
            return hint(**{name: read(value[name]) for name, read in fields.items() if name in value})

        return read_record

    def read_plain(value: Any) -> Any:
        if type(value) is hint:
            return value
        if hint is float and type(value) is int:
            return float(value)
        if issubclass(hint, str) and type(value) is str:
            return hint(value)  # a member of an enumeration
        raise TypeError(hint)

    return read_plain
