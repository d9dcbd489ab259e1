"""Describe an agent and its part of a job, for people and programs that ask. Pure.

The result is a plain dict that JSON can carry. Its fields are promised in ``docs/operating.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.root_cause import Exit
from elastic_launch.core.text import listed
from elastic_launch.job import Assignment, End, EndKind

RoundRecord = tuple[Assignment, float, End | None, float | None]
"""A round: this node's assignment; when it began; how it ended and when, None if it has not. Seconds since 1970."""
_MAX_REASON = 500
"""Characters of a reason; a worker's error may be long."""


class Facts(NamedTuple):
    """What does not change while an agent runs."""

    job: str
    """The job's id."""
    host: str
    pid: int
    """The agent's."""
    launcher: str
    """Version of this package."""
    program: str
    """What the workers run."""
    started_at: float
    """When the agent started, in seconds since 1970."""
    max_restarts: int
    shutdown_timeout: float
    """Seconds between a worker's stop signal and SIGKILL."""
    log_dir: str
    """Directory of the job's files, which exists only if there are any; empty: they are elsewhere."""


class Meeting(NamedTuple):
    """How the nodes of a job meet, as one node sees it."""

    backend: str
    """Name of the rendezvous backend."""
    endpoint: str = ""
    """Where the job's store is; empty: it has none."""
    settings: Mapping[str, str] = {}
    """Settings of ``--rdzv-conf`` that a connection to the store needs; no passwords."""
    min_nodes: int = 1
    max_nodes: int = 1
    role: str = ""
    """``leader`` while nodes join, ``monitor`` of a running round, ``spare``; empty: none of these."""
    waits_for: str = ""
    """What the node waits for; empty: nothing."""
    silences: Sequence[float | None] = ()
    """Seconds since each member's last heartbeat, by group rank, if this node is the monitor; None: it has left."""


class Totals(NamedTuple):
    """What has happened since the agent started, counted."""

    rounds: int = 0
    """Rounds in which this node got a place."""
    rendezvous_seconds: float = 0.0
    """Time until it got them, each from when it joined."""
    restarts: Mapping[str, int] = {}
    """Rounds that followed another one, by ``restart_policy.CAUSES``."""


class Progress(NamedTuple):
    """What the workers get done; all values are such as JSON can carry."""

    workers: Mapping[int, Mapping[str, Any]] = {}
    """By local rank: ``steps``, ``steps_per_second``, ``phase``, and more."""
    job: Mapping[str, Any] = {}
    """``steps``, ``steps_per_second``, ``goodput``, and more."""


def agent_status(
    facts: Facts,
    state: AgentState,
    meeting: Meeting,
    rounds: Sequence[RoundRecord],
    files: Mapping[int, Mapping[str, str]],
    now: float,
    progress: Progress | None = None,
    totals: Totals = Totals(),  # noqa: B008 - a value
) -> dict[str, Any]:
    """Return the status of an agent.

    Args:
        facts: what does not change.
        state: the agent's.
        meeting: how the nodes meet.
        rounds: the latest rounds that this node took part in.
        files: paths of the workers' output files, by local rank and ``stdout`` or ``stderr``.
        now: the time on the agent's monotonic clock.
        progress: what the workers get done; None: that is not known.
        totals: what has happened since the agent started.
    """
    assignment, progress = state.assignment, progress or Progress()
    ends = [end for _, _, end, _ in rounds if end is not None and end.kind is not EndKind.DONE]
    failures = [end for end in ends if end.kind is EndKind.FAILED]
    latest = assignment or (rounds[-1][0] if rounds else None)
    used = latest.restart_history.used if latest else 0
    return {
        "job": facts.job,
        "host": facts.host,
        "pid": facts.pid,
        "launcher": facts.launcher,
        "program": facts.program,
        "state": state.phase.value,
        "role": meeting.role or None,
        "started_at": facts.started_at,
        "round": assignment.restart_count if assignment else None,
        "round_started_at": rounds[-1][1] if assignment and rounds else None,
        "nodes": assignment.group_world_size if assignment else None,
        "min_nodes": meeting.min_nodes,
        "max_nodes": meeting.max_nodes,
        "group_rank": assignment.group_rank if assignment else None,
        "world_size": assignment.world_size if assignment else None,
        "workers": _workers(state, files, progress),
        "restarts": used,
        "max_restarts": facts.max_restarts,
        "uncharged_restarts": max(0, latest.restart_count - used) if latest else 0,
        "last_failure": first_line(failures[-1].reason) if failures else None,
        "last_trouble": first_line(ends[-1].reason) if ends else None,
        "waits_for": waits_for(state, meeting, now) or None,
        "rounds": list(map(_round, rounds)),
        "heartbeats": list(meeting.silences) or None,
        "log_dir": facts.log_dir or None,
        "store": {"backend": meeting.backend, "endpoint": meeting.endpoint or None, "settings": dict(meeting.settings)},
        "progress": dict(progress.job) or None,
        "totals": {**totals._asdict(), "restarts": dict(totals.restarts)},
    }


def _round(record: RoundRecord) -> dict[str, Any]:
    assignment, started_at, end, ended_at = record
    return {
        "round": assignment.restart_count,
        "nodes": assignment.group_world_size,
        "world_size": assignment.world_size,
        "ranks": [assignment.base_rank, assignment.base_rank + assignment.local_world_size - 1],
        "started_at": started_at,
        "ended_at": ended_at,
        "end": end.kind.value if end else None,
        "reason": first_line(end.reason) if end else None,
    }


def _workers(state: AgentState, files: Mapping[int, Mapping[str, str]], progress: Progress) -> list[dict[str, Any]]:
    if (assignment := state.assignment) is None:
        return []
    exits = {exit_.local_rank: exit_ for exit_ in state.exits}
    return [
        {
            "rank": assignment.rank(local_rank),
            "local_rank": local_rank,
            "pid": state.pids.get(local_rank),
            "state": _worker_state(state, local_rank, exits.get(local_rank)),
            "exit_code": exits[local_rank].exitcode if local_rank in exits else None,
            "files": dict(files.get(local_rank, {})),
            "progress": dict(progress.workers.get(local_rank, {})) or None,
        }
        for local_rank in range(assignment.local_world_size)
    ]


def _worker_state(state: AgentState, local_rank: int, exit_: Exit | None) -> str:
    if exit_ is None:
        return (
            "starting"
            if local_rank not in state.pids
            else "running"
            if state.phase is AgentPhase.RUNNING
            else "stopping"
        )
    return "succeeded" if exit_.exitcode == 0 else "stopped" if exit_.stop_signals else "failed"


def waits_for(state: AgentState, meeting: Meeting, now: float) -> str:
    """Return what an agent waits for, in a few words; empty: for its workers only."""
    left = f"{max(0.0, state.deadline - now):.0f} s" if state.deadline is not None else ""
    match state.phase:
        case AgentPhase.CHECKING:
            return f"the health check of this node; it is killed in {left}"
        case AgentPhase.UNFIT:
            return f"the health check of this node, which failed: {state.check_failure}; it runs again in {left}"
        case AgentPhase.HOLDING:
            return "the nodes to agree on the step at which all ranks stop"
        case AgentPhase.DRAINING if state.assignment:
            ranks = listed(str(state.assignment.rank(local)) for local in sorted(state.running))
            return f"rank {ranks} to stop at the agreed step; SIGTERM in {left}"
        case AgentPhase.STOPPING if state.running and state.assignment:
            ranks = listed(str(state.assignment.rank(local)) for local in sorted(state.running))
            return f"rank {ranks} to stop; SIGKILL in {left}" if not state.killed else f"rank {ranks}, killed, to end"
        case AgentPhase.STOPPING:
            return "processes that the workers left behind"
        case AgentPhase.AGREEING:
            return meeting.waits_for or "the other nodes"
        case AgentPhase.PAUSING:
            return f"the pause before the restart, {left} more"
        case AgentPhase.JOINING:
            return meeting.waits_for or "the next round"
    return meeting.waits_for


def joined_text(joined: int, low: int, high: int, hosts: str, missing: str) -> str:
    """Say which nodes have joined, out of ``low`` to ``high``, and which are missing."""
    limits = f"{high}" if low == high else f"{low} to {high}"
    return (
        f"nodes: {joined} of {limits} joined"
        + (f": {hosts}" if hosts else "")
        + (f"; missing: {missing}" if missing else "")
    )


def first_line(reason: str) -> str:
    """Return the first line of a reason, cut if it is long."""
    line = reason.partition("\n")[0]
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]} ..."
