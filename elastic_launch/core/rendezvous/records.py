"""What nodes write to the job's store for each other: the records of a round, their JSON, and the rules for it.

Everybody who can reach the store can write to it. So ``decode`` judges each record by ``RULES``, which has a row for
every type and a rule for every field. What depends on the job or the round besides is checked where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeVar, cast

from elastic_launch.core.progress.goodput import MAX_STEPS
from elastic_launch.core.rendezvous.rules import (
    Reader,
    RuleError,
    Rules,
    each,
    flag,
    line,
    lines,
    name,
    named_signal,
    not_sent,
    one_of,
    seconds,
    whole,
)
from elastic_launch.core.text import MAX_LISTED
from elastic_launch.errors import ProcessFailure, RendezvousStateError
from elastic_launch.job import Assignment, Change, Decision, End, EndKind, Goodput, LostTime, RestartHistory, Silence

T = TypeVar("T")

_json = json.JSONEncoder(separators=(",", ":"))
_SCALARS = frozenset({str, int, float, bool, type(None)})
"""Types that JSON has, too; most parts of a record are of these."""

MAX_TICKETS = 65_536
"""Most tickets of a round. 16,384 nodes may each draw some, because a request may be carried out twice. The bound keeps
the work of the nodes that count tickets bounded, whoever has drawn them."""
MAX_LINES = 65_536
"""Most records that are read of those appended to one key."""
SIGNED = b"#"
"""What a signed value begins with; neither JSON nor a number does."""
MAX_FAILURES = 64
"""Most failures in a record."""
MAX_SILENT = 1024
"""Most silent members in a record."""


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
    space: str = ""
    """The same for all agents that see each other's pids, and for no others; empty: unknown."""
    started: int = 0
    """When the agent was started, in clock ticks since its host booted; 0: unknown."""


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
    """A node takes no part in a round, because its health check fails, or because its agent has failed."""

    record: NodeRecord
    reason: str
    """Why the check or the agent has failed, in one line."""
    is_gone: bool = False
    """Whether the node has left the job."""
    has_failed: bool = False
    """Whether it is its agent that has failed, before the round was formed."""


NOBODY = Status(0, "", "")
"""The status before the first node has joined."""


class Consequence(NamedTuple):
    """A failure on a node that does not decide what follows."""

    failure: ProcessFailure
    node: str
    """The id of its node."""


def newest(node: NodeRecord) -> tuple[int, int]:
    """Return what to compare nodes by, to find out whose restart history is the job's."""
    return node.known_round, node.restart_history.goodput.steps


def encode(record: NamedTuple) -> bytes:
    """Encode a record as JSON. Fields that have their default value are left out."""
    return _json.encode(_plain(record)).encode()


def as_lines(records: Iterable[bytes]) -> bytes:
    """Return encoded records as what is appended to a key.

    It begins with a line end, too, because what a stranger has appended before may lack one and would spoil the first
    record.
    """
    return b"\n" + b"".join(record + b"\n" for record in records)


def decode_lines(kind: type[T], data: bytes, key: str, log: Callable[[str], None]) -> list[T]:
    """Decode records that were appended to ``key``, one on each line. What breaks a rule is ignored, with one line.

    The caller decides whether the rest can come from nodes of this job.

    Args:
        kind: the records' type.
        data: what the key holds. Lines after the first ``MAX_LINES`` are not read, nor those after some bad ones.
        key: the key.
        log: takes a line for the log.
    """
    found: list[T] = []
    ignored = 0
    for record in data.split(b"\n", MAX_LINES)[:MAX_LINES] if data else ():
        try:
            if record:
                found.append(decode(kind, record, key))
        except RendezvousStateError as error:
            ignored += 1
            if ignored == 1:
                log(f"ignored: {error}")
            if ignored == MAX_LISTED:
                break
    return found


def decode(kind: type[T], data: bytes, key: str) -> T:
    """Decode a record of the type ``kind``, found at ``key``.

    Raises:
        RendezvousStateError: ``data`` is not such a record, or breaks one of its rules. The message names the key and
            the rule.
    """
    size = RULES[kind].size
    if len(data) > size:
        raise refused(key, f"has {len(data)} bytes; {size} are allowed")
    try:
        return cast(T, record_of(kind)(json.loads(data)))
    except RuleError as error:
        raise refused(key, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise (signed(key) if data.startswith(SIGNED) else refused(key, f"is no JSON: {data[:60]!r}")) from error


def refused(key: str, why: str) -> RendezvousStateError:
    """Return the error to raise if no node of this job can have written what a key holds.

    Args:
        key: the key.
        why: the rule that is broken, to be read after the key.
    """
    return RendezvousStateError(
        f"unexpected data in the store: {key} {why}; is another job, or another version of elastic-launch, using the "
        "same --rdzv-id?"
    )


def signed(key: str) -> RendezvousStateError:
    """Return the error to raise if what a key holds is signed, and this node has no token."""
    return RendezvousStateError(f"{key} is signed with a token, and this node has none: {_SAME_TOKEN}")


def unsigned(key: str) -> RendezvousStateError:
    """Return the error to raise if what a key holds is not signed with this node's token."""
    return RendezvousStateError(f"{key} is not signed with this node's token: {_SAME_TOKEN}")


_SAME_TOKEN = "give all nodes of a job the same --token-file, and another job another --rdzv-id"


def field_names(kind: type) -> tuple[str, ...]:
    """Return the names of the fields of a record's type."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else kind._fields  # type: ignore[attr-defined]


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
        return {name: _plain(getattr(value, name)) for name in field_names(type(value))}
    return value


def record_of(kind: Any) -> Reader:
    """Return the reader of records of the type ``kind``, which must have a row in ``RULES``."""

    def read(value: Any) -> Any:
        if kind not in _readers:
            _readers[kind] = _make_reader(kind)
        return _readers[kind](value)

    return _readers.get(kind, read)


_readers: dict[Any, Reader] = {}


def _make_reader(kind: Any) -> Reader:
    rules = RULES[kind]
    if missing := set(field_names(kind)) ^ rules.fields.keys():
        raise TypeError(f"RULES: {kind.__name__}: no rule, or no field: {', '.join(sorted(missing))}")
    readers, relations = list(rules.fields.items()), rules.relations
    # A dataclass is written with all its fields. A ``ProcessFailure`` would read what it lacks from a local file.
    required = frozenset(rules.fields if is_dataclass(kind) else ())

    def read_record(value: Any) -> Any:
        if type(value) is not dict:
            raise RuleError(f"must be a record, not a {type(value).__name__}")
        if not required <= value.keys():
            raise RuleError("lacks a field")
        found: dict[str, Any] = {}
        for field, read in readers:
            if field in value:
                try:
                    found[field] = read(value[field])
                except RuleError as error:
                    raise RuleError(f"{field}: {error}") from None
        try:
            record = kind(**found)
        except TypeError:
            raise RuleError("lacks a field") from None
        for rule, holds in relations:
            if not holds(record):
                raise RuleError(rule)
        return record

    return read_record


# --- the rules

_COUNT = whole(0, 2**31)
_PORT = whole(0, 65_535)
_RANK = whole(-1, MAX_TICKETS)
"""A group rank; -1: none."""
_TICKET = whole(1, MAX_TICKETS)
_WORKERS = whole(1, 65_536)
"""Workers of a node."""
_WORLD = whole(1, 2**31)
"""Workers of all nodes."""
_HOST = line(300)
_ADDRESS = name(300)
_ID = name(400)
"""A node's id, which begins with its host; empty: none."""
MAX_ERROR = 9000
"""Most characters of an error of the launcher's that other nodes get to see."""
MAX_UNFIT = 1000
"""Most characters of the reason why a node's health check fails that other nodes get to see."""
_REASON = lines(10_000)
"""Why a round ends, or a job: an error, or twice the options, in the longest cases."""
_YEARS = seconds(1e9)
_EPOCH = seconds(1e11)
"""A time since 1970; 0: unknown."""
_STATUS = whole(0, 255)


def _is_final(decision: Decision) -> bool:
    return bool(decision.failures or decision.signum or (decision.error and decision.status))


def _is_complete(end: End) -> bool:
    match end.kind:
        case EndKind.FAILED:
            return bool(end.failures)
        case EndKind.STOP:
            return end.signum > 0
        case EndKind.ERROR:
            return bool(end.reason) and end.status > 0
    return True


def _fits(assignment: Assignment) -> bool:
    place = assignment
    return (
        place.group_rank < place.group_world_size
        and place.group_world_size <= place.world_size
        and place.base_rank + place.local_world_size <= place.world_size
        and place.base_role_rank + place.local_world_size <= place.role_world_size <= place.world_size
    )


RULES: dict[Any, Rules] = {
    LostTime: Rules(1000, {"detection": _YEARS, "stopping": _YEARS, "rendezvous": _YEARS, "start": _YEARS}),
    Goodput: Rules(
        4000,
        {
            "steps": whole(0, MAX_STEPS),
            "in_steps": _YEARS,
            "startup": _YEARS,
            "restarts": _COUNT,
            "lost": record_of(LostTime),
            "stalled": _YEARS,
            "repeated": whole(0, MAX_STEPS),
            "number": whole(-1, MAX_STEPS),
            "since": record_of(LostTime),
        },
    ),
    RestartHistory: Rules(
        1 << 20,
        {
            "used": _COUNT,
            "uncharged": _COUNT,
            "ages": each(_YEARS, 65_536),
            "failure": lines(400),
            "repeats": _COUNT,
            "node": _ID,
            "in_a_row": _COUNT,
            "goodput": record_of(Goodput),
        },
    ),
    ProcessFailure: Rules(
        1 << 20,
        {
            "local_rank": whole(0, 65_535),
            "pid": whole(-1, 2**31),
            "exitcode": whole(-64, 255, besides=0),
            "error_file": line(5000),
            "error": line(600),
            "traceback": lines(70_000),
            "stderr": lines(10_000),
            "note": line(1100),
            "failed_at": _EPOCH,
            "rank": whole(-1, 2**31),
            "host": _HOST,
            "is_hang": flag,
        },
    ),
    NodeRecord: Rules(
        1 << 20,
        {
            "node": name(400, least=1),
            "host": _HOST,
            "pid": _COUNT,
            "workers": _WORKERS,
            "role": line(1000),
            "rank": _RANK,
            "previous_rank": _RANK,
            "address": _ADDRESS,
            "named": flag,
            "outward": _ADDRESS,
            "port": _PORT,
            "serves": flag,
            "restart_history": record_of(RestartHistory),
            "known_round": whole(-1, 2**31),
            "deprioritized": flag,
            "options": line(4000),
            "space": name(100),
            "started": whole(0, 10**18),
        },
    ),
    Closed: Rules(
        2 << 20,
        {
            "leader": whole(-1, MAX_TICKETS),
            "nodes": whole(0, MAX_TICKETS),
            "tickets": whole(0, MAX_TICKETS),
            "spares": each(_TICKET, MAX_TICKETS),
            "options": line(4000),
            "restart_history": record_of(RestartHistory),
        },
        (
            ("must have no nodes without a leader", lambda it: (it.leader >= 0) == (it.nodes > 0)),
            ("must have a ticket for each node", lambda it: it.nodes + len(it.spares) <= it.tickets),
        ),
    ),
    Members: Rules(
        8 << 20,
        {
            "tickets": each(_TICKET, MAX_TICKETS),
            "nodes": each(name(400, least=1), MAX_TICKETS),
            "hosts": each(_HOST, MAX_TICKETS),
            "ranks": each(_RANK, MAX_TICKETS),
        },
        (
            ("must have lists of one length", lambda it: len(it.tickets) == len(it.nodes) == len(it.hosts) > 0),
            ("must have a rank for each node, or none", lambda it: len(it.ranks) in (0, len(it.nodes))),
            ("must not have a ticket twice", lambda it: len(set(it.tickets)) == len(it.tickets)),
        ),
    ),
    Assignment: Rules(
        1 << 20,
        {
            "group_rank": whole(0, MAX_TICKETS),
            "group_world_size": whole(1, MAX_TICKETS),
            "base_rank": _COUNT,
            "world_size": _WORLD,
            "local_world_size": _WORKERS,
            "base_role_rank": _COUNT,
            "role_world_size": _WORLD,
            "master_addr": _ADDRESS,
            "master_port": _PORT,
            "host": _HOST,
            "port_picked": flag,
            "agent_store": flag,
            "restart_count": _COUNT,
            "restart_history": record_of(RestartHistory),
        },
        (("must have ranks below the number of nodes or workers", _fits),),
    ),
    Unfit: Rules(
        1 << 20,
        {"record": record_of(NodeRecord), "reason": line(MAX_UNFIT, least=1), "is_gone": flag, "has_failed": flag},
    ),
    Status: Rules(1 << 16, {"joined": whole(0, MAX_TICKETS), "hosts": line(5000), "missing": line(5000)}),
    Consequence: Rules(1 << 16, {"failure": record_of(ProcessFailure), "node": name(400, least=1)}),
    Silence: Rules(1000, {"ticket": _TICKET, "seconds": _YEARS, "counter": whole(-1, 10**18)}),
    End: Rules(
        4 << 20,
        {
            "kind": one_of(EndKind),
            "reason": _REASON,
            "node": _ID,
            "gone": each(_ID, MAX_TICKETS),
            "signum": named_signal,
            "status": _STATUS,
            "failures": each(record_of(ProcessFailure), MAX_FAILURES),
            "rank": _RANK,
            "same_step": flag,
            "change": one_of(Change),
            "silent": each(record_of(Silence), MAX_SILENT),
            "mine": not_sent,
        },
        (
            ("must have the failure, the signal, or the reason and the status that its kind needs", _is_complete),
            (
                "must be the leaving of a node, because all workers are to stop at the same step",
                lambda it: not it.same_step or it.kind in (EndKind.STOP, EndKind.MEMBERSHIP_CHANGED),
            ),
        ),
    ),
    Decision: Rules(
        4 << 20,
        {
            "restart": flag,
            "restart_history": record_of(RestartHistory),
            "failures": each(record_of(ProcessFailure), MAX_FAILURES),
            "signum": named_signal,
            "error": _REASON,
            "status": _STATUS,
            "why": line(1000),
            "pause": _YEARS,
            "gone": each(_ID, MAX_TICKETS),
            "node": _ID,
            "silent": each(record_of(Silence), MAX_SILENT),
        },
        (
            (
                "must have a failure, a signal, or an error with a status, because the job ends",
                lambda it: it.restart or _is_final(it),
            ),
        ),
    ),
}
"""How each type of record is judged. Texts that a node writes are cut to their limits where they are made.

Modules that are only imported when they are needed add the rows of their own types.
"""
