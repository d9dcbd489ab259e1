"""Turn each step of an agent's life cycle into entries for the events file; ``docs/events.md`` lists them.

A step is the one source of both: its log lines go to the console, and into the entries that the step leads to. So
whatever the user has read is in the file, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from elastic_launch.core.agent import root_cause
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState, Transition
from elastic_launch.core.agent.messages import (
    Assigned,
    CheckFailed,
    DeadlineReached,
    Decided,
    Ended,
    Exited,
    Finish,
    GroupReaped,
    Hung,
    LeaseExpired,
    Log,
    ReapLeftovers,
    RequestJoin,
    RunCheck,
    Signalled,
    Started,
    StopAgreed,
)
from elastic_launch.core.agent.restart_policy import UNKNOWN_CHANGE, restart_cause
from elastic_launch.core.text import shortened
from elastic_launch.errors import ProcessFailure, signal_name
from elastic_launch.job import Assignment, Change, Decision, EndKind, Goodput, Level

MAX_FAILURES = 64
"""Failures of one entry. A job with more of them has lost its network or its file system."""
FAILED = ("rank", "local_rank", "worker_pid", "exitcode", "how", "failed_at", "error")
"""What is told of a failure at once; the rest is known when the round is over."""
MAX_CAUSE, MAX_CONSEQUENCE = 60_000, 4_000
"""Maximum characters of a traceback or of stderr: of the cause, and of each other failure."""


class Entry(NamedTuple):
    """One event, without what all events of an agent have in common."""

    name: str
    facts: Mapping[str, Any] = MappingProxyType({})
    """The fields that belong to this kind of event."""
    of_job: bool = False
    """Whether it is an event of the job, not only of this node. One node writes such an entry."""
    elapsed: float = 0.0
    """Seconds since the agent began."""
    group_rank: int | None = None
    """The node's rank in the round; None while it has none."""
    round: int | None = None
    """Number of the round; None while the node is in none."""
    level: Level | None = None
    """Importance of ``text``; None if there is no line."""
    text: str = ""
    """The log line that goes with the event."""


class Found(NamedTuple):
    """An event, as it is found in a step."""

    name: str
    facts: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it
    of_job: bool = False
    at: float | None = None
    """When it happened, on the monotonic clock; None: in this step."""


class Journal:
    """Writes down one agent's life. It only remembers when things happened, to tell how long they took."""

    def __init__(self, program: str, workers: int, max_restarts: int, now: float) -> None:
        """Begin.

        Args:
            program: what the workers run.
            workers: number of workers on this node.
            max_restarts: how many restarts the job may use.
            now: seconds on the monotonic clock of the steps.
        """
        self.assignment: Assignment | None = None
        """This node's ranks, until it asks for those in the next round."""
        self.max_restarts = max_restarts
        self.about = {"program": program, "workers": workers, "max_restarts": max_restarts}
        """What is known before the first round."""
        self._began = now
        self._latest: dict[str, float] = {}
        """When the latest event of each name happened."""
        self._first_step_in = -1
        """The latest round whose first step is written."""

    def observe(self, step: Transition) -> list[Entry]:
        """Return the entries that a step leads to, the one with the step's first log line first."""
        entries = [self._entry(found, step.now) for found in _events(self, step)]
        logs = [action for action in step.actions if isinstance(action, Log)]
        if entries and logs:
            first = logs.pop(0)
            entries[0] = entries[0]._replace(text=first.text, level=first.level)
        return [*entries, *(self.message(log.text, log.level, step.now) for log in logs)]

    def message(self, text: str, level: Level | None, now: float) -> Entry:
        """Return the entry of a log line that belongs to no other event; ``level`` is None if it is not known."""
        return self._entry(Found("message"), now)._replace(text=text, level=level)

    def first_step(self, rank: int | None, at: float) -> list[Entry]:
        """Return the entry of a round's first step on this node, unless it is written already.

        Args:
            rank: global rank of the worker that made it first; None if that is not known.
            at: when it was made.
        """
        return [self._entry(found, at) for found in self.found_first_step(rank, at)]

    def found_first_step(self, rank: int | None, at: float) -> list[Found]:
        """Return the event that ``first_step`` returns the entry of."""
        if self.assignment is None or self._first_step_in == self.assignment.restart_count:
            return []
        self._first_step_in = self.assignment.restart_count
        seconds = None if (began := self._latest.get("started")) is None else max(0.0, round(at - began, 6))
        return [Found("first_step", {"rank": rank, "seconds": seconds}, at=at)]

    def stall(self, reason: str, seconds: float, rank: int | None, action: str, now: float) -> Entry:
        """Return the entry of a stall of the job, which one node has judged.

        Args:
            reason: what was found, in one line.
            seconds: seconds since the latest step of any worker.
            rank: global rank of the worker that is the likely culprit; None if there is none.
            action: what follows: report, restart or stop.
            now: when it was found.
        """
        facts = {"reason": reason, "seconds": round(seconds, 6), "rank": rank, "action": action}
        return self._entry(Found("stalled", facts, of_job=True), now)

    def error(self, text: str, status: int, now: float) -> Entry:
        """Return the entry of an agent that ends because the launcher itself failed, with that exit status."""
        return self._entry(Found("ended", _end_facts(self, Finish(error=text, status=status), "error")), now)

    def since(self, name: str, now: float) -> float | None:
        """Return the seconds since the latest event of a name; None if there was none."""
        return round(now - self._latest[name], 6) if name in self._latest else None

    def _entry(self, found: Found, now: float) -> Entry:
        now = now if found.at is None else found.at
        self._latest[found.name] = now
        rank, number = (None, None)
        if self.assignment:
            rank, number = self.assignment.group_rank, self.assignment.restart_count
        elapsed = round(now - self._began, 6)
        return Entry(found.name, found.facts, found.of_job, elapsed, rank, number)


def _events(journal: Journal, step: Transition) -> Iterator[Found]:
    """Yield the events of a step. Each is handled before the next one is looked for, so they may build on another."""
    if handler := _BY_EVENT.get(type(step.event)):
        yield from handler(journal, step, step.event)
    yield from _phase_changed(journal, step)
    for action in step.actions:
        match action:
            case ReapLeftovers(kill=True):
                yield Found("killed", {"workers": len(step.after.running)})
            case RunCheck():
                journal.assignment = None
            case RequestJoin():
                journal.assignment = None
                yield Found("joined", journal.about)
            case Finish():
                outcome = _outcome(step.before, action)
                of_job = outcome != "left" and _speaks(step.before, journal.assignment)
                yield Found("ended", _end_facts(journal, action, outcome), of_job)


def _assigned(journal: Journal, step: Transition, event: Assigned) -> Iterable[Found]:
    journal.assignment = assignment = event.assignment
    facts = {
        "nodes": assignment.group_world_size,
        "world_size": assignment.world_size,
        "workers": assignment.local_world_size,
        "first_rank": assignment.base_rank,
        "restarts": assignment.restart_history.used,
        "seconds": journal.since("joined", step.now),
    }
    if assignment.restart_count:
        facts["downtime"] = journal.since("stopping", step.now)
    return [Found("re_formed" if assignment.restart_count else "formed", facts, assignment.group_rank == 0)]


def _started(journal: Journal, step: Transition, event: Started) -> Iterable[Found]:
    if (assignment := journal.assignment) is None:
        return []
    pids = [event.pids.get(rank, -1) for rank in range(assignment.local_world_size)]
    seconds = journal.since("re_formed" if assignment.restart_count else "formed", step.now)
    return [Found("started", {"worker_pids": pids, "seconds": seconds})]


def _exited(journal: Journal, step: Transition, event: Exited) -> Iterable[Found]:
    exit_, before, assignment = event.exit, step.before, journal.assignment
    if before is None or assignment is None or before.lease_expired or before.killed:
        return []
    if exit_.exitcode == 0 or exit_.stop_signals:
        return []
    failure = root_cause.failure_of(exit_, {exit_.local_rank: event.evidence}, before.pids, assignment)
    facts = {name: value for name, value in failure_facts(failure, 0).items() if name in FAILED}
    return [Found("failed", {**facts, "seconds": _ago(failure.failed_at, step)})]


def _hung(journal: Journal, step: Transition, event: Hung) -> Iterable[Found]:
    if (hang := step.after.hang) is None:
        return []
    facts = {name: value for name, value in failure_facts(hang, 0).items() if name in FAILED}
    return [Found("failed", {**facts, "seconds": _ago(hang.failed_at, step)})]


def _stop_agreed(journal: Journal, step: Transition, event: StopAgreed) -> Iterable[Found]:
    return [Found("stop_agreed", {"stop_at": event.stop_at})]


def _signalled(journal: Journal, step: Transition, event: Signalled) -> Iterable[Found]:
    return [Found("signalled", {"signal": signal_name(event.signum)})]


def _lease_expired(journal: Journal, step: Transition, event: LeaseExpired) -> Iterable[Found]:
    return [Found("lease_expired")]


def _ended(journal: Journal, step: Transition, event: Ended) -> Iterable[Found]:
    if event.end.kind is not EndKind.MEMBERSHIP_CHANGED:
        return []
    facts = {"reason": event.end.reason, "lost": list(event.end.gone)}
    return [Found(event.end.change or UNKNOWN_CHANGE, facts, _speaks(step.after, journal.assignment))]


def _decided(journal: Journal, step: Transition, event: Decided) -> Iterable[Found]:
    decision, before = event.decision, step.before
    if before is None or step.after.phase is AgentPhase.DONE:
        return []
    facts = {
        "cause": _restart_cause(before, decision),
        "restarts": decision.restart_history.used,
        "max_restarts": journal.max_restarts,
        "pause": decision.pause,
        "lost": list(decision.gone),
        "failures": _failures(decision.failures),
        "goodput": _goodput(decision.restart_history.goodput),
    }
    return [Found("restarting", facts, _speaks(before, journal.assignment))]


def _phase_changed(journal: Journal, step: Transition) -> Iterable[Found]:
    """Tell when the workers begin to stop, and when all processes of the round are gone."""
    before, after = step.before, step.after
    if before is None or before.phase is after.phase:
        return []
    if after.phase in (AgentPhase.HOLDING, AgentPhase.STOPPING) and before.phase is AgentPhase.RUNNING:
        if isinstance(step.event, Exited) and not after.running and not after.has_failed:
            return [Found("succeeded", {"seconds": journal.since("started", step.now)})]
        cause, seconds = _stop_cause(step)
        return [Found("stopping", {"cause": cause, "workers": len(after.running), "seconds": seconds})]
    if before.phase is AgentPhase.CHECKING and isinstance(step.event, CheckFailed | DeadlineReached):
        output = step.event.output if isinstance(step.event, CheckFailed) else ""
        pause = round(after.deadline - step.now, 6) if after.deadline is not None else 0.0
        facts = {"reason": after.check_failure, "output": output, "tries": before.attempts, "pause": pause}
        return [Found("check_failed", facts)]
    if before.phase is AgentPhase.STOPPING:
        leftovers = list(step.event.leftovers) if isinstance(step.event, GroupReaped) else []
        first = after.progress.first if after.progress and after.progress.steps else 0.0
        late = journal.found_first_step(None, first) if first else []
        times = [since for name in ("stopping", "succeeded") if (since := journal.since(name, step.now)) is not None]
        return [*late, Found("stopped", {"seconds": min(times, default=None), "leftovers": leftovers})]
    return []


_BY_EVENT: dict[type, Callable[[Journal, Transition, Any], Iterable[Found]]] = {
    Assigned: _assigned,
    Started: _started,
    Exited: _exited,
    Signalled: _signalled,
    Hung: _hung,
    StopAgreed: _stop_agreed,
    LeaseExpired: _lease_expired,
    Ended: _ended,
    Decided: _decided,
}


def _restart_cause(before: AgentState, decision: Decision) -> str:
    history = before.assignment.restart_history if before.assignment else decision.restart_history
    return restart_cause(history, decision, before.end.change if before.end else "")


def _stop_cause(step: Transition) -> tuple[str, float | None]:
    """Return why a node stops its workers, and the seconds since the failure if that was its own."""
    match step.event:
        case Exited(exit_, evidence):
            failed_at = min(exit_.time, evidence.error.time) if evidence.error else exit_.time
            return "failed", _ago(failed_at, step)
        case Signalled():
            return "signalled", None
        case Hung():
            return "hang", None
        case LeaseExpired():
            return "lease_expired", None
        case Ended(end) if end.kind is EndKind.MEMBERSHIP_CHANGED:
            return end.change or UNKNOWN_CHANGE, None
        case Ended(end):
            return end.kind.value, None
    return "signalled" if step.after.signum is not None else "failed", None


def _outcome(before: AgentState | None, finish: Finish) -> str:
    if finish.failures:
        return "failed"
    if finish.error:
        return "error"
    if finish.signum is None:
        return "succeeded"
    end, assignment = (before.end, before.assignment) if before else (None, None)
    goes_on = (
        assignment is not None and assignment.group_world_size > 1 and (end is None or end.kind is not EndKind.STOP)
    )
    return "left" if goes_on else "stopped"


def _speaks(state: AgentState | None, assignment: Assignment | None) -> bool:
    """Return whether this node is the one that writes how the round ended for the whole job.

    It is the node that ended the round, because that one is alive and knows most. But a node that leaves may be gone
    before the others know of it, so there, and where all ended well, it is the one with the lowest rank that stays.
    """
    if assignment is None:
        return False
    if assignment.group_world_size == 1:
        return True
    end = state.end if state else None
    if end is None:
        return False
    if end.change is Change.CUT_OFF:
        return False  # the others know better
    if end.kind is EndKind.FAILED or end.change is Change.NODE_LOST:
        return end.mine
    return assignment.group_rank == (1 if end.rank == 0 else 0)


def _end_facts(journal: Journal, finish: Finish, outcome: str) -> dict[str, Any]:
    used = journal.assignment.restart_history.used if journal.assignment else 0
    status = finish.failures[0].status() if finish.failures else 128 + finish.signum if finish.signum else finish.status
    return {
        "outcome": outcome,
        "status": int(status),
        "error": finish.error,
        "why": finish.why,
        "restarts": max(used, finish.restarts),
        "failures": _failures(finish.failures),
        "goodput": _goodput(finish.goodput),
    }


def _goodput(goodput: Goodput) -> dict[str, Any] | None:
    """Return the account of the job's time; None if no step was counted."""
    if not goodput.steps:
        return None
    lost, parts = sum(goodput.lost), ("in_steps", "startup", "stalled")
    return {
        "steps": goodput.steps,
        "repeated": goodput.repeated,
        **{name: round(getattr(goodput, name), 3) for name in parts},
        "lost": round(lost, 3),
        "elapsed": round(goodput.elapsed, 3),
    }


def _ago(time: float, step: Transition) -> float:
    """Return the seconds from a time on this host's clock to the step."""
    return max(0.0, round(step.time - time, 6))


def _failures(failures: Sequence[ProcessFailure]) -> list[dict[str, Any]]:
    return [
        failure_facts(failure, MAX_CONSEQUENCE if index else MAX_CAUSE)
        for index, failure in enumerate(failures[:MAX_FAILURES])
    ]


def failure_facts(failure: ProcessFailure, limit: int) -> dict[str, Any]:
    """Return a failure as JSON has it, with at most ``limit`` characters of traceback and of stderr."""
    return {
        "rank": failure.rank,
        "local_rank": failure.local_rank,
        "host": failure.host,
        "worker_pid": failure.pid,
        "exitcode": failure.exitcode,
        "how": failure.how(),
        "failed_at": failure.failed_at,
        "error": failure.error_line(),
        "traceback": shortened(failure.traceback, limit) if failure.error else "",
        "stderr": shortened(failure.stderr, limit),
        "note": failure.note,
    }
