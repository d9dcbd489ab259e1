"""Layer 2: the record of a job's events, under torch's names and with torch's fields: one line of JSON for each.

Where they go is Python's logging to decide; the agent does not import it unless the user asks for events. Besides the
handlers named here, a package may offer more under the entry point group ``elastic_launch.event_handlers``: callables
that return a ``logging.Handler``. Touches what the handlers touch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from elastic_launch.errors import ProcessFailure, UsageError
from elastic_launch.job import Assignment
from elastic_launch.worker_spec import WorkerSpec, WorkerState

if TYPE_CHECKING:
    import logging

ENTRY_POINTS = "elastic_launch.event_handlers"
RENDEZVOUS = "dynamic_rendezvous"
"""The destination of rendezvous events; they are dropped unless an entry point has this name."""
BUILT_IN = ("null", "console", RENDEZVOUS)

EventMetadataValue: TypeAlias = str | int | float | bool | None


class EventSource(StrEnum):
    """Who an event is about."""

    AGENT = "AGENT"
    WORKER = "WORKER"


@dataclass
class Event:
    """Something that happened in a job."""

    name: str
    """``torchelastic.worker.status.STATE`` for those that the agent records."""
    source: EventSource
    timestamp: int = 0
    """Milliseconds since 1970."""
    metadata: dict[str, EventMetadataValue] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.serialize()

    @staticmethod
    def deserialize(data: str | Event) -> Event:
        """The event that a line of JSON tells of; an event is returned as it is."""
        if isinstance(data, Event):
            return data
        import json  # late, as below: 5 ms

        fields = json.loads(data)
        return Event(**{**fields, "source": EventSource(fields["source"])})

    def serialize(self) -> str:
        """The event as one line of JSON."""
        import json

        return json.dumps(asdict(self))


class NodeState(StrEnum):
    """How a node stands in its rendezvous."""

    INIT = "INIT"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


@dataclass
class RdzvEvent:
    """Something that happened in a rendezvous."""

    name: str
    """What was being done."""
    run_id: str
    message: str
    hostname: str
    pid: int
    node_state: NodeState
    master_endpoint: str = ""
    rank: int | None = None
    """Rank of the node."""
    local_id: int | None = None
    error_trace: str = ""

    def __str__(self) -> str:
        return self.serialize()

    @staticmethod
    def deserialize(data: str | RdzvEvent) -> RdzvEvent:
        """The event that a line of JSON tells of; an event is returned as it is."""
        if isinstance(data, RdzvEvent):
            return data
        import json

        fields = json.loads(data)
        return RdzvEvent(**{**fields, "node_state": NodeState(fields["node_state"])})

    def serialize(self) -> str:
        """The event as one line of JSON."""
        import json

        return json.dumps(asdict(self))


def get_logging_handler(destination: str = "null") -> logging.Handler:
    """A new handler for a destination: ``null``, ``console`` (standard error), or the name of an entry point.

    Raises:
        UsageError: there is no such destination, or what its entry point names cannot be had.
    """
    import logging

    if destination == "null":
        return logging.NullHandler()
    if destination == "console":
        return logging.StreamHandler()
    from importlib.metadata import entry_points

    plug_ins = {entry_point.name: entry_point for entry_point in entry_points(group=ENTRY_POINTS)}
    if destination in plug_ins:
        try:
            handler = plug_ins[destination].load()()
        except Exception as error:
            raise UsageError(
                f"event handler {destination!r}: {plug_ins[destination].value} does not work: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(handler, logging.Handler):
            raise UsageError(
                f"event handler {destination!r}: {plug_ins[destination].value} must return a logging.Handler, "
                f"not {type(handler).__name__}"
            )
        return handler
    if destination == RENDEZVOUS:
        return logging.NullHandler()
    known = ", ".join(sorted({*BUILT_IN, *plug_ins}))
    raise UsageError(
        f"event handler {destination!r}: not known here; known are {known} (more through the entry point group "
        f"{ENTRY_POINTS})"
    )


def check_destination(destination: str) -> None:
    """Complain before a job begins rather than when it has ended; prepares the handler of a plug-in.

    Raises:
        UsageError: as ``get_logging_handler`` does; the message begins with the option's name.
    """
    if destination not in BUILT_IN:
        try:
            _logger(destination)
        except UsageError as error:
            raise UsageError(f"--event-log-handler: {error}") from error


def record(event: Event, destination: str = "null") -> None:
    """Hand an event to the handler of a destination.

    Raises:
        UsageError: there is no such destination.
    """
    if destination != "null":
        _logger(destination).info(event.serialize())


def record_rdzv_event(event: RdzvEvent) -> None:
    """Hand an event to the handler of rendezvous events."""
    _logger(RENDEZVOUS).info(event.serialize())


def construct_and_record_rdzv_event(
    run_id: str,
    message: str,
    node_state: NodeState,
    name: str = "",
    hostname: str = "",
    pid: int | None = None,
    master_endpoint: str = "",
    local_id: int | None = None,
    rank: int | None = None,
) -> None:
    """Record a rendezvous event, if anybody listens.

    Args:
        run_id: the job's id.
        message: what happened.
        node_state: how the node stands; with FAILED the exception that is being handled goes with the event.
        name: what was being done; empty: the file and the function that call this.
        hostname: empty: this host's full name.
        pid: None: this process's.
        master_endpoint: of the store, where it is known.
        local_id: of the node, where it has one.
        rank: of the node, where it is known.
    """
    import logging

    if all(isinstance(handler, logging.NullHandler) for handler in _logger(RENDEZVOUS).handlers):
        return
    if not name:
        caller = sys._getframe(1).f_code
        name = f"{os.path.basename(caller.co_filename)}:{caller.co_name}"
    if not hostname:
        import socket

        hostname = socket.getfqdn()
    error_trace = ""
    if node_state == NodeState.FAILED and sys.exception() is not None:
        import traceback

        error_trace = traceback.format_exc()
    pid = os.getpid() if pid is None else pid
    record_rdzv_event(
        RdzvEvent(name, run_id, message, hostname, pid, node_state, master_endpoint, rank, local_id, error_trace)
    )


_loggers: dict[str, logging.Logger] = {}
"""By destination. That a logger has handlers does not tell that it has ours: others add theirs to all there are."""


def _logger(destination: str) -> logging.Logger:
    if destination not in _loggers:
        import logging

        handler = get_logging_handler(destination)
        logger = logging.getLogger(f"elastic_launch.events.{destination}")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
        _loggers[destination] = logger
    return _loggers[destination]


@dataclass(frozen=True)
class Recorder:
    """The agent's record of one job. No handler can end the job."""

    spec: WorkerSpec
    run_id: str
    backend: str
    """Name of the rendezvous backend."""
    write: Callable[[str], None]
    """Takes the lines for the console: standard error must not hold up the agent, as a handler of logging's would."""
    log: Callable[[str], None]
    """Takes a line for people."""

    def round_started(self, assignment: Assignment, pids: Mapping[int, int], *, seconds: float, joining: float) -> None:
        """Record that the nodes have met, and that the workers of a round were started.

        Args:
            place: this node's.
            pids: of the workers, by local rank.
            seconds: since the job began.
            joining: seconds until the nodes had met.
        """
        events = [
            # torch gives the ranks out in a step of its own; here they come with the place.
            self._event("RENDEZVOUS", assignment, seconds, duration_ms=joining * 1000),
            self._event("ASSIGN_WORKER_RANKS", assignment, seconds, duration_ms=0.0),
        ]
        events += [
            self._worker_event("START", assignment, rank, pids, seconds) for rank in range(assignment.local_world_size)
        ]
        self._record(events)

    def run_ended(
        self,
        state: WorkerState,
        assignment: Assignment | None,
        pids: Mapping[int, int],
        failures: Iterable[ProcessFailure] = (),
        *,
        seconds: float,
        error: str = "",
    ) -> None:
        """Record how the workers of this node, and the agent, have ended.

        As with torch, the agent has SUCCEEDED also when the workers failed, if it could do its own work to the end.

        Args:
            state: SUCCEEDED or FAILED.
            place: this node's in the last round; None if there was none.
            pids: of that round's workers, by local rank.
            failures: of the whole job.
            seconds: since the job began.
            error: what the agent failed at, or that a signal ended the job: then the record tells of the agent only.
        """
        events: list[Event] = []
        by_rank = {failure.rank: failure for failure in failures}
        if assignment and not error:
            for local_rank in range(assignment.local_world_size):
                failure = by_rank.get(assignment.rank(local_rank))
                # Without a failure of its own a worker of a failed job was stopped, or had ended before.
                name = "FAILED" if failure else "SUCCEEDED" if state is WorkerState.SUCCEEDED else "TERMINATED"
                events.append(self._worker_event(name, assignment, local_rank, pids, seconds, failure))
        events.append(self._event("FAILED" if error else "SUCCEEDED", assignment, seconds, raw_error=error or None))
        self._record(events)

    def _record(self, events: Iterable[Event]) -> None:
        destination = self.spec.event_log_handler
        try:
            if destination == "console":
                self.write("".join(f"{event.serialize()}\n" for event in events))
                return
            for event in events:
                record(event, destination)
            for handler in _logger(destination).handlers:
                handler.flush()  # the program may end without the interpreter's own end
        except Exception as error:
            self.log(f"--event-log-handler={destination}: events are lost: {type(error).__name__}: {error}")

    def _worker_event(
        self,
        state: str,
        assignment: Assignment,
        local_rank: int,
        pids: Mapping[int, int],
        seconds: float,
        failure: ProcessFailure | None = None,
    ) -> Event:
        pid = pids.get(local_rank, -1)
        return self._event(
            state,
            assignment,
            seconds,
            source=EventSource.WORKER,
            global_rank=assignment.rank(local_rank),
            worker_id=str(pid) if pid > 0 else None,
            raw_error=_raw_error(failure) if failure else None,
            details={
                "local_rank": [local_rank],
                "role_rank": [assignment.base_role_rank + local_rank],
                "role_world_size": [assignment.role_world_size],
                "exit_code": [failure.exitcode if failure else None],
                "worker_pid": [failure.pid if failure else None],
            },
        )

    def _event(
        self,
        state: str,
        assignment: Assignment | None,
        seconds: float,
        *,
        source: EventSource = EventSource.AGENT,
        global_rank: int | None = None,
        worker_id: str | None = None,
        raw_error: str | None = None,
        details: Mapping[str, Any] | None = None,
        duration_ms: float | None = None,
    ) -> Event:
        """One event, with torch's fields in torch's order."""
        import json

        group_world_size = assignment.group_world_size if assignment else None
        entry_point = os.path.basename(self.spec.get_entrypoint_name())
        return Event(
            f"torchelastic.worker.status.{state}",
            source,
            int(time.time() * 1000),
            {
                "run_id": self.run_id,
                "global_rank": global_rank,
                "group_rank": assignment.group_rank if assignment else None,
                "worker_id": worker_id,
                "role": self.spec.role,
                "hostname": assignment.host if assignment else os.uname().nodename,
                "state": state,
                "total_run_time": int(seconds),
                "rdzv_backend": self.backend,
                "raw_error": raw_error,
                "metadata": json.dumps(
                    {"group_world_size": group_world_size, "entry_point": entry_point, **(details or {})}
                ),
                "agent_restarts": assignment.restart_history.used if assignment else 0,
                "duration_ms": duration_ms,
            },
        )


def _raw_error(failure: ProcessFailure) -> str:
    """What the worker's error file tells, in the file's own form."""
    import json

    if failure.error:
        stack = {"py_callstack": failure.message, "timestamp": str(int(failure.timestamp))}
        return json.dumps({"message": {"message": failure.error, "extraInfo": stack}})
    traits = {"category": "system_terminated_error", "retryability": "False"}
    return json.dumps({"message": "<NONE>", **({"errorTraits": traits} if failure.exitcode > 0 else {})})
