"""Events of a job, with torch's names and fields. Each event is one line of JSON.

Events go to a destination, which has a handler of Python's ``logging``. Besides ``null`` and ``console``, packages can
offer destinations through the entry point group ``elastic_launch.event_handlers``: callables that return a
``logging.Handler``. The agent imports this module only if the user asks for events.

>>> event = Event("data.loaded", EventSource.WORKER, metadata={"samples": 512})
>>> event.serialize()
'{"name": "data.loaded", "source": "WORKER", "timestamp": 0, "metadata": {"samples": 512}}'
>>> Event.deserialize(event.serialize()) == event
True
>>> record(event)  # to the destination "null", which drops it
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Self, TypeAlias

from elastic_launch.errors import LaunchError, ProcessFailure, UsageError
from elastic_launch.host import plug_ins
from elastic_launch.job import Assignment
from elastic_launch.worker_spec import WorkerSpec, WorkerState

ENTRY_POINTS = "elastic_launch.event_handlers"
RENDEZVOUS = "dynamic_rendezvous"
"""Destination of rendezvous events. They are dropped unless an entry point has this name."""
BUILT_IN = ("null", "console", RENDEZVOUS)

EventMetadataValue: TypeAlias = str | int | float | bool | None


class EventSource(StrEnum):
    """Whether an event is about the agent or a worker."""

    AGENT = "AGENT"
    WORKER = "WORKER"


class NodeState(StrEnum):
    """State of a node in its rendezvous."""

    INIT = "INIT"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


class _JsonLine:
    """A dataclass that is one line of JSON."""

    _enumerations: ClassVar[Mapping[str, type[StrEnum]]]
    """Types of the fields that are enumerations."""

    def __str__(self) -> str:
        return self.serialize()

    @classmethod
    def deserialize(cls, data: str | Self) -> Self:
        """Return the event that ``serialize`` turned into text. An event is returned unchanged.

        Raises:
            ValueError: the text is not JSON, or a field has an unknown value.
            TypeError: the JSON has other fields.
        """
        if not isinstance(data, str):
            return data
        fields = json.loads(data)
        return cls(**fields | {name: kind(fields[name]) for name, kind in cls._enumerations.items()})

    def serialize(self) -> str:
        """Return the event as one line of JSON, without a line end."""
        return json.dumps(vars(self))


@dataclass
class Event(_JsonLine):
    """Something that happened in a job."""

    _enumerations: ClassVar = {"source": EventSource}

    name: str
    """What happened; the agent's own events are called ``torchelastic.worker.status.STATE``."""
    source: EventSource
    """What the event is about."""
    timestamp: int = 0
    """Milliseconds since 1970."""
    metadata: dict[str, EventMetadataValue] = field(default_factory=dict)
    """Further facts."""


@dataclass
class RdzvEvent(_JsonLine):
    """Something that happened in a rendezvous."""

    _enumerations: ClassVar = {"node_state": NodeState}

    name: str
    """The operation."""
    run_id: str
    """The job's id."""
    message: str
    """What happened."""
    hostname: str
    """The node's host."""
    pid: int
    """Process id of the node's agent."""
    node_state: NodeState
    """State of the node."""
    master_endpoint: str = ""
    """Endpoint of the workers' store, if known."""
    rank: int | None = None
    """Rank of the node, if known."""
    local_id: int | None = None
    """Id of the node on its host, if it has one."""
    error_trace: str = ""
    """The traceback if the node failed."""


def get_logging_handler(destination: str = "null") -> logging.Handler:
    """Return a new handler.

    Args:
        destination: ``null``, ``console`` (standard error), or the name of an entry point.

    Raises:
        UsageError: the destination is unknown.
        LaunchError: its entry point does not work.
    """
    if destination == "null":
        return logging.NullHandler()
    if destination == "console":
        return logging.StreamHandler()
    if destination == RENDEZVOUS and destination not in plug_ins.offered(ENTRY_POINTS):
        return logging.NullHandler()

    def create(factory: Callable[[], object]) -> logging.Handler:
        handler = factory()
        if not isinstance(handler, logging.Handler):
            raise TypeError(f"must return a logging.Handler, not {type(handler).__name__}")
        return handler

    return plug_ins.load(ENTRY_POINTS, destination, f"event handler {destination!r}", BUILT_IN, create)


def check_destination(destination: str) -> None:
    """Report a bad ``--event-log-handler`` before the job begins, and create the handler of a plug-in.

    Raises:
        UsageError: the destination is unknown, or its entry point does not work. The message begins with the option.
    """
    if destination not in BUILT_IN:
        try:
            _logger(destination)
        except LaunchError as error:
            raise UsageError(f"--event-log-handler: {error}") from error


def record(event: Event, destination: str = "null") -> None:
    """Pass an event to the handler of a destination, as for ``get_logging_handler``.

    Raises:
        UsageError: the destination is unknown.
        LaunchError: its entry point does not work.
    """
    if destination != "null":
        _logger(destination).info(event.serialize())


def record_rdzv_event(event: RdzvEvent) -> None:
    """Pass an event to the handler of rendezvous events."""
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
    """Record a rendezvous event, unless its destination drops it.

    Args:
        run_id: the job's id.
        message: what happened.
        node_state: state of the node. FAILED adds the traceback of the exception that is being handled.
        name: the operation; empty for the file and function of the caller.
        hostname: the node's host; empty for the full name of this host.
        pid: process id of the node's agent; None for this process.
        master_endpoint: endpoint of the workers' store, if known.
        local_id: id of the node on its host, if it has one.
        rank: rank of the node, if known.
    """
    if all(isinstance(handler, logging.NullHandler) for handler in _logger(RENDEZVOUS).handlers):
        return
    if not name:
        caller = sys._getframe(1).f_code
        name = f"{os.path.basename(caller.co_filename)}:{caller.co_name}"
    if not hostname:
        hostname = socket.getfqdn()
    error_trace = ""
    if node_state == NodeState.FAILED and sys.exception() is not None:
        error_trace = traceback.format_exc()
    pid = os.getpid() if pid is None else pid
    record_rdzv_event(
        RdzvEvent(name, run_id, message, hostname, pid, node_state, master_endpoint, rank, local_id, error_trace)
    )


_loggers: dict[str, logging.Logger] = {}
"""Loggers that have the handler of their destination. Other code may have added handlers to the same loggers."""


def _logger(destination: str) -> logging.Logger:
    if destination not in _loggers:
        handler = get_logging_handler(destination)
        logger = logging.getLogger(f"elastic_launch.events.{destination}")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
        _loggers[destination] = logger
    return _loggers[destination]


@dataclass(frozen=True)
class Recorder:
    """Records the events of one job on this node. A handler that raises does not end the job."""

    spec: WorkerSpec
    """What the workers run; its ``event_log_handler`` is the destination."""
    run_id: str
    """The job's id."""
    backend: str
    """Name of the rendezvous backend."""
    write: Callable[[str], None]
    """Writes whole lines to standard error. Unlike a handler of ``logging``, it does not block the agent."""
    log: Callable[[str], None]
    """Logs a warning."""
    started_at: float = field(default_factory=time.monotonic)
    """When the run began, on ``time.monotonic``."""

    def round_started(self, assignment: Assignment, pids: Mapping[int, int], joining: float) -> None:
        """Record that the nodes have met and that a round's workers were started.

        Args:
            assignment: this node's ranks in the round.
            pids: process ids of its workers, by local rank.
            joining: seconds that the rendezvous took.
        """
        self._record(
            # torch assigns ranks in a step after the rendezvous; here they are part of it.
            self._event("RENDEZVOUS", assignment, duration_ms=joining * 1000),
            self._event("ASSIGN_WORKER_RANKS", assignment, duration_ms=0.0),
            *(self._worker_event("START", assignment, rank, pids) for rank in range(assignment.local_world_size)),
        )

    def run_ended(
        self,
        state: WorkerState,
        assignment: Assignment | None,
        pids: Mapping[int, int],
        failures: Iterable[ProcessFailure] = (),
        error: str = "",
    ) -> None:
        """Record how this node's workers and its agent ended.

        As in torch, the agent has SUCCEEDED even if workers failed, unless it could not do its own work.

        Args:
            state: SUCCEEDED or FAILED.
            assignment: this node's ranks in the last round; None if there was no round.
            pids: process ids of that round's workers, by local rank.
            failures: the failures of all nodes.
            error: why the agent failed, or which signal ended the job. If given, only the agent's event is recorded.
        """
        events: list[Event] = []
        by_rank = {failure.rank: failure for failure in failures}
        if assignment and not error:
            for local_rank in range(assignment.local_world_size):
                failure = by_rank.get(assignment.rank(local_rank))
                # A worker of a failed job without a failure was stopped, or ended earlier.
                name = "FAILED" if failure else "SUCCEEDED" if state is WorkerState.SUCCEEDED else "TERMINATED"
                events.append(self._worker_event(name, assignment, local_rank, pids, failure))
        self._record(*events, self._event("FAILED" if error else "SUCCEEDED", assignment, raw_error=error or None))

    def _record(self, *events: Event) -> None:
        destination = self.spec.event_log_handler
        try:
            if destination == "console":
                self.write("".join(f"{event.serialize()}\n" for event in events))
                return
            for event in events:
                record(event, destination)
            for handler in _logger(destination).handlers:
                handler.flush()  # the program may end without the interpreter's shutdown
        except Exception as error:
            self.log(f"--event-log-handler={destination}: events are lost: {type(error).__name__}: {error}")

    def _worker_event(
        self,
        state: str,
        assignment: Assignment,
        local_rank: int,
        pids: Mapping[int, int],
        failure: ProcessFailure | None = None,
    ) -> Event:
        pid = pids.get(local_rank, -1)
        details = {
            "local_rank": [local_rank],
            "role_rank": [assignment.base_role_rank + local_rank],
            "role_world_size": [assignment.role_world_size],
            "exit_code": [failure.exitcode if failure else None],
            "worker_pid": [failure.pid if failure else None],
        }
        return self._event(
            state,
            assignment,
            details,
            global_rank=assignment.rank(local_rank),
            worker_id=str(pid) if pid > 0 else None,
            raw_error=_raw_error(failure) if failure else None,
        )

    def _event(
        self, state: str, assignment: Assignment | None, worker: Mapping[str, Any] = {}, **facts: EventMetadataValue
    ) -> Event:
        """Return an event with torch's fields in torch's order.

        Args:
            state: what happened.
            assignment: this node's ranks; None if it has none.
            worker: details of the worker that the event is about; empty for an event of the agent.
            facts: values of fields that are None here.
        """
        metadata = {
            "group_world_size": assignment.group_world_size if assignment else None,
            "entry_point": os.path.basename(self.spec.get_entrypoint_name()),
            **worker,
        }
        fields: dict[str, EventMetadataValue] = {
            "run_id": self.run_id,
            "global_rank": None,
            "group_rank": assignment.group_rank if assignment else None,
            "worker_id": None,
            "role": self.spec.role,
            "hostname": assignment.host if assignment else os.uname().nodename,
            "state": state,
            "total_run_time": int(time.monotonic() - self.started_at),
            "rdzv_backend": self.backend,
            "raw_error": None,
            "metadata": json.dumps(metadata),
            "agent_restarts": assignment.restart_history.used if assignment else 0,
            "duration_ms": None,
        }
        source = EventSource.WORKER if worker else EventSource.AGENT
        return Event(f"torchelastic.worker.status.{state}", source, int(time.time() * 1000), fields | facts)


def _raw_error(failure: ProcessFailure) -> str:
    """Return the content of the worker's error file; without a file, what torch records instead."""
    if failure.error:
        return json.dumps(failure.error_file_data)
    traits = {"category": "system_terminated_error", "retryability": "False"}
    return json.dumps({"message": "<NONE>", **({"errorTraits": traits} if failure.exitcode > 0 else {})})
