"""Describe a whole job, from what its agents on one host say, or from what its nodes have written to their store. Pure.

Both ways lead to a dict of the same form, which JSON can carry. Its fields are promised in ``docs/operating.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from elastic_launch.core.rendezvous.monitor import has_left, number
from elastic_launch.core.rendezvous.records import MAX_TICKETS, Closed, Members, NodeRecord, Status, decode
from elastic_launch.core.status import first_line, joined_text
from elastic_launch.job import Assignment, Decision, End, EndKind

MAX_ROUNDS = 64
"""Latest rounds that a view lists."""
_FOLLOWS = {
    EndKind.FAILED: "agreeing",
    EndKind.MEMBERSHIP_CHANGED: "restarting",
    EndKind.STOP: "stopped",
    EndKind.DONE: "succeeded",
    EndKind.ERROR: "failed",
}
"""The job's state after the end of a round, until more is known."""


_OUTCOMES = {EndKind.DONE: "succeeded", EndKind.FAILED: "failed", EndKind.STOP: "stopped", EndKind.ERROR: "failed"}
"""The job's state when an agent is done, by the end of its last round."""


class Records(NamedTuple):
    """What the store holds of a job: the values of its keys, ``b""`` for each that does not exist.

    The keys are listed in ``core/rendezvous/node.py``.
    """

    round: int
    """The current round."""
    keys: Mapping[str, bytes]
    """Of the current round, by the name after its number: ``closed``, ``node/1``."""
    past: Sequence[tuple[int, Mapping[str, bytes]]] = ()
    """``closed``, ``end`` and ``decision`` of the latest rounds before it, by number."""


def of_agents(job: str, statuses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the view that a job's agents on one host have; ``statuses`` are theirs, and the first speaks for all."""
    it = statuses[0]
    heartbeats = next((status["heartbeats"] for status in statuses if status.get("heartbeats")), None)
    rounds = it.get("rounds", [])
    state = _OUTCOMES.get(rounds[-1]["end"], "done") if it["state"] == "done" and rounds else it["state"]
    return {
        "job": job,
        "source": "agents",
        **{name: it.get(name) for name in _OF_JOB},
        "state": state,
        "node_count": it.get("nodes"),
        "nodes": [_node_of(status, heartbeats) for status in statuses],
        "rounds": rounds,
    }


_OF_JOB = (
    *("program", "state", "waits_for", "started_at", "round", "round_started_at", "world_size"),
    *("min_nodes", "max_nodes", "restarts", "max_restarts", "uncharged_restarts"),
    *("last_failure", "last_trouble", "log_dir", "store", "progress"),
)
"""The fields of an agent's status that describe the job."""


def _node_of(status: Mapping[str, Any], heartbeats: Sequence[float | None] | None) -> dict[str, Any]:
    rank, workers = status.get("group_rank"), status.get("workers") or []
    known = heartbeats is not None and rank is not None and rank < len(heartbeats)
    return {
        "group_rank": rank,
        "host": status["host"],
        "pid": status["pid"],
        "state": status["state"],
        "role": status.get("role"),
        "ranks": [workers[0]["rank"], workers[-1]["rank"]] if workers else None,
        "heartbeat": heartbeats[rank] if known and heartbeats is not None and rank is not None else None,
        "workers": workers or None,
    }


def of_store(job: str, records: Records, statuses: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return the view that a job's store gives.

    Args:
        job: the job's id.
        records: what the store holds.
        statuses: of agents of this job on this host, which know more of their nodes.

    Raises:
        RendezvousStateError: the store holds something else.
    """
    keys = records.keys
    closed = decode(Closed, keys["closed"], "closed") if keys.get("closed") else None
    end = decode(End, keys["end"], "end") if keys.get("end") else None
    decision = decode(Decision, keys["decision"], "decision") if keys.get("decision") else None
    rounds = [_round(records.round, closed, end, decision)] if closed or end else []
    for past, found in reversed(records.past):
        rounds.insert(0, _round(past, *_decoded(found)))
    local = {(status["host"], status["pid"]): status for status in statuses}
    heartbeats = next((status["heartbeats"] for status in statuses if status.get("heartbeats")), None)
    nodes = _nodes(records, closed, local, heartbeats)
    options = _options(closed.options if closed else "", nodes)
    history = decision.restart_history if decision else closed.restart_history if closed else None
    ends = [round_ for round_ in rounds if round_["end"] not in (None, EndKind.DONE)]
    failures = [round_ for round_ in ends if round_["end"] == EndKind.FAILED]
    described: dict[str, Any] = {
        "job": job,
        "source": "store",
        "program": None,
        "state": _state(closed, end, decision),
        "waits_for": None if closed else _waits_for(keys, options),
        "started_at": None,
        "round": records.round,
        "round_started_at": None,
        "node_count": closed.nodes if closed and closed.leader >= 0 else None,
        "world_size": sum(_count(node["ranks"]) for node in nodes) or None,
        "min_nodes": options.get("min_nodes"),
        "max_nodes": options.get("max_nodes"),
        "restarts": history.used if history else 0,
        "max_restarts": options.get("max_restarts"),
        "uncharged_restarts": max(0, records.round - (history.used if history else 0)),
        "last_failure": failures[-1]["reason"] if failures else None,
        "last_trouble": ends[-1]["reason"] if ends else None,
        "log_dir": None,
        "store": None,
        "progress": None,
        "nodes": nodes,
        "rounds": rounds[-MAX_ROUNDS:],
    }
    for round_ in rounds:
        _add_times(round_, statuses)
    if statuses and statuses[0].get("workers") is not None:  # what no record tells
        known = ("program", "started_at", "round_started_at", "log_dir", "store", "progress", "min_nodes", "max_nodes")
        described |= {name: statuses[0][name] for name in (*known, "max_restarts")}
        described["waits_for"] = described["waits_for"] or statuses[0]["waits_for"]
    for node in nodes:
        del node["options"]
    return described


def _decoded(found: Mapping[str, bytes]) -> tuple[Closed | None, End | None, Decision | None]:
    closed, end, decision = found["closed"], found["end"], found["decision"]
    return (
        decode(Closed, closed, "closed") if closed else None,
        decode(End, end, "end") if end else None,
        decode(Decision, decision, "decision") if decision else None,
    )


def _round(round_: int, closed: Closed | None, end: End | None, decision: Decision | None) -> dict[str, Any]:
    reason = decision.failures[0].headline() if decision and decision.failures else end.reason if end else None
    return {
        "round": round_,
        "nodes": closed.nodes if closed and closed.leader >= 0 else None,
        "world_size": None,
        "ranks": None,
        "started_at": None,
        "ended_at": decision.failures[0].failed_at if decision and decision.failures else None,
        "end": end.kind.value if end else None,
        "reason": first_line(reason) if reason else None,
    }


def _add_times(round_: dict[str, Any], statuses: Sequence[Mapping[str, Any]]) -> None:
    """Add what an agent has noted of a round and no record tells: above all when it began."""
    for noted in (noted for status in statuses for noted in status.get("rounds", [])):
        if noted["round"] == round_["round"]:
            round_ |= {name: value for name, value in noted.items() if name != "ranks" and round_[name] is None}


def _state(closed: Closed | None, end: End | None, decision: Decision | None) -> str:
    if end is None:
        return "running" if closed else "joining"
    if end.kind is EndKind.FAILED and decision is not None:
        return "restarting" if decision.restart else "failed"
    return _FOLLOWS[end.kind]


def _waits_for(keys: Mapping[str, bytes], options: Mapping[str, int]) -> str:
    if not keys.get("status"):
        return "nodes"
    joined, hosts, missing = decode(Status, keys["status"], "status")
    return joined_text(joined, options.get("min_nodes", 1), options.get("max_nodes", joined), hosts, missing)


def _nodes(
    records: Records,
    closed: Closed | None,
    local: Mapping[tuple[str, int], Mapping[str, Any]],
    heartbeats: Sequence[float | None] | None,
) -> list[dict[str, Any]]:
    """Describe the nodes: members by group rank, then the others by ticket."""
    keys = records.keys
    leader = closed.leader if closed and closed.leader >= 0 else 0
    members = decode(Members, keys[name], name) if keys.get(name := f"members/{leader}") else None
    order = list(members.tickets) if members else []
    drawn = range(1, number(keys.get("ticket", b""), "ticket", MAX_TICKETS) + 1)
    order = list(dict.fromkeys([*order, *drawn]))
    leads = number(keys.get(f"leader/{leader}", b""), f"leader/{leader}") or 1 if leader else 1
    found = []
    for place, ticket in enumerate(order):
        if not (data := keys.get(f"node/{ticket}")):
            continue
        record = decode(NodeRecord, data, f"node/{ticket}")
        is_member = members is not None and place < len(members.tickets)
        assigned = keys.get(f"assignment/{leader}/{ticket}") if is_member else b""
        assignment = decode(Assignment, assigned, "assignment") if assigned else None
        role = ("monitor" if place == 0 else None) if is_member else "spare" if closed else None
        node = {
            "group_rank": place if is_member else None,
            "host": record.host,
            "pid": record.pid,
            "state": _node_state(keys, ticket, is_member, bool(closed)),
            "role": role if closed else "leader" if ticket == leads else None,
            "ranks": _ranks(assignment),
            "heartbeat": heartbeats[place] if is_member and heartbeats and place < len(heartbeats) else None,
            "workers": None,
            "options": record.options,
        }
        if (status := local.get((record.host, record.pid))) is not None:
            node["workers"] = status.get("workers") or None
            node["state"] = status["state"] if node["state"] == "running" else node["state"]
        found.append(node)
    return found


def _node_state(keys: Mapping[str, bytes], ticket: int, is_member: bool, is_closed: bool) -> str:
    if has_left(keys.get(f"heartbeat/{ticket}", b"")):
        return "left"
    if not is_member:
        return "waiting" if is_closed else "joined"
    return "succeeded" if keys.get(f"succeeded/{ticket}") else "running"


def _ranks(assignment: Assignment | None) -> list[int] | None:
    if assignment is None:
        return None
    return [assignment.base_rank, assignment.base_rank + assignment.local_world_size - 1]


def _count(ranks: Sequence[int] | None) -> int:
    return ranks[1] - ranks[0] + 1 if ranks else 0


def _options(text: str, nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Read back what ``Settings.options`` has written."""
    words = (text or next((node["options"] for node in nodes if node["options"]), "")).split()
    given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    found: dict[str, int] = {}
    low, _, high = given.get("nnodes", "").partition(":")
    for name, value in (("min_nodes", low), ("max_nodes", high), ("max_restarts", given.get("max-restarts", ""))):
        if value.isdecimal():
            found[name] = int(value)
    return found
