"""Layer 0: what the workers of a node run, and how they ended, by torch's names.

Values only: no I/O, no clock, no environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Policy


class WorkerState(StrEnum):
    """The state of a group of workers, by torch's names."""

    UNKNOWN = "UNKNOWN"
    INIT = "INIT"
    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    def is_running(self) -> bool:
        """Whether there are worker processes, in good order or not."""
        return self in (WorkerState.HEALTHY, WorkerState.UNHEALTHY)


class Rendezvous(Protocol):
    """What a ``WorkerSpec`` needs of its rendezvous; the agent asks more of it (``agent.AgentRendezvous``).

    A ``RendezvousHandler`` of torch's interface does as well.
    """

    def get_run_id(self) -> str:
        """The job's id."""


@dataclass
class WorkerSpec:
    """What the workers of one node run. Fields, order and defaults are those of torch's ``WorkerSpec``."""

    role: str
    local_world_size: int
    rdzv_handler: Rendezvous
    fn: Callable[..., Any] | None = None
    entrypoint: Callable[..., Any] | str | None = None
    """The command to execute; ``args`` are its arguments."""
    args: tuple[Any, ...] = ()
    max_restarts: int = 3
    monitor_interval: float = 0.1
    """Accepted for torch's sake: nothing here polls."""
    master_port: int | None = None
    master_addr: str | None = None
    local_addr: str | None = None
    event_log_handler: str = "null"
    numa_options: Any = None
    duplicate_stdout_filters: list[str] | None = None
    duplicate_stderr_filters: list[str] | None = None
    virtual_local_rank: bool = False
    policy: Policy | None = None
    """All that restarts depend on, ``max_restarts`` included; None: only that. Not torch's."""

    def get_policy(self) -> Policy:
        """When the job restarts."""
        return self.policy or Policy(self.max_restarts)

    def get_entrypoint_name(self) -> str:
        """The function's name, or the command."""
        entrypoint = self.entrypoint or self.fn
        return callable_name(entrypoint) if callable(entrypoint) else str(entrypoint)


def callable_name(fn: Callable[..., Any]) -> str:
    """The name of something that can be called: the function's, that of a partial's function, or the class's.

    Not its ``repr``: that of a partial shows all its arguments, and an object's may be any text.
    """
    name = getattr(fn, "__qualname__", None) or getattr(getattr(fn, "func", None), "__qualname__", None)
    return str(name or type(fn).__qualname__)


@dataclass(eq=False)
class Worker:
    """One worker of a group, by torch's names; -1: not known yet."""

    local_rank: int
    global_rank: int = -1
    role_rank: int = -1
    world_size: int = -1
    role_world_size: int = -1
    id: Any = field(default=None, init=False)
    """Its pid."""


@dataclass(eq=False)
class WorkerGroup:
    """The workers of one node in one round, by torch's names."""

    spec: WorkerSpec
    workers: list[Worker] = field(init=False)
    store: Any = field(default=None, init=False)
    group_rank: int | None = field(default=None, init=False)
    group_world_size: int | None = field(default=None, init=False)
    master_addr: str | None = field(default=None, init=False)
    master_port: int | None = field(default=None, init=False)
    state: WorkerState = field(default=WorkerState.INIT, init=False)

    def __post_init__(self) -> None:
        self.workers = [Worker(local_rank) for local_rank in range(self.spec.local_world_size)]


@dataclass(frozen=True)
class RunResult:
    """How the run of an agent ended."""

    state: WorkerState
    return_values: dict[int, Any] = field(default_factory=dict)
    """Return value by global rank; None for commands."""
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    """Failure by global rank, the cause first."""
    report: str = ""
    """The failure report, for people."""

    def is_failed(self) -> bool:
        """Whether workers failed."""
        return self.state is WorkerState.FAILED
