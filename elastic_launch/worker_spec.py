"""Define what the workers of a node run, and how they ended, with torch's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Policy


class WorkerState(StrEnum):
    """The state of a group of workers; the names are torch's."""

    UNKNOWN = "UNKNOWN"
    INIT = "INIT"
    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    def is_running(self) -> bool:
        """Return whether the workers run, healthy or not."""
        return self in (WorkerState.HEALTHY, WorkerState.UNHEALTHY)


class Rendezvous(Protocol):
    """What ``WorkerSpec`` accepts as its rendezvous: one of the launcher's, or a handler with torch's interface."""

    def get_backend(self) -> str:
        """Return the name of the backend."""

    def get_run_id(self) -> str:
        """Return the job's id."""


@dataclass
class WorkerSpec:
    """What the workers of one node run. Fields, their order and their defaults are those of torch's ``WorkerSpec``."""

    role: str
    """Name of the workers' role."""
    local_world_size: int
    """Number of workers on this node."""
    rdzv_handler: Rendezvous
    """The rendezvous through which the node meets the others."""
    fn: Callable[..., Any] | None = None
    """torch's older name for ``entrypoint``, which comes first if both are given."""
    entrypoint: Callable[..., Any] | str | None = None
    """The command or function that each worker runs."""
    args: tuple[Any, ...] = ()
    """Arguments of ``entrypoint``."""
    max_restarts: int = 3
    """How often failed workers are restarted."""
    monitor_interval: float = 0.1
    """Accepted for compatibility and unused: the agent does not poll."""
    master_port: int | None = None
    """Port on which the worker with rank 0 serves the workers' store; None: the rendezvous chooses store and port."""
    master_addr: str | None = None
    """Address of the workers' store; None: the rendezvous chooses it."""
    local_addr: str | None = None
    """Address of this node for the others; None to find it out."""
    event_log_handler: str = "null"
    """Destination of events, as for ``events.get_logging_handler``."""
    numa_options: Any = None
    """How workers are bound to CPUs, as for ``--numa-binding``; None for no binding."""
    duplicate_stdout_filters: list[str] | None = None
    """Stdout lines that contain one of these texts are copied to a file."""
    duplicate_stderr_filters: list[str] | None = None
    """Stderr lines that contain one of these texts are copied to a file."""
    virtual_local_rank: bool = False
    """Whether each worker sees ``LOCAL_RANK=0`` and only its own device, as number 0."""
    policy: Policy | None = None
    """When the job restarts; None for up to ``max_restarts`` times. torch's class has no such field."""

    def get_policy(self) -> Policy:
        """Return ``policy``, or the one that ``max_restarts`` stands for."""
        return self.policy or Policy(self.max_restarts)

    def get_entrypoint_name(self) -> str:
        """Return the function's name, or the command."""
        entrypoint = self.entrypoint or self.fn
        return callable_name(entrypoint) if callable(entrypoint) else str(entrypoint)


def callable_name(fn: Callable[..., Any]) -> str:
    """Return the name of a function, of a partial's function, or of an object's class.

    A ``repr`` would show all arguments of a partial, and may be any text for an object.
    """
    name = getattr(fn, "__qualname__", None) or getattr(getattr(fn, "func", None), "__qualname__", None)
    return str(name or type(fn).__qualname__)


@dataclass(eq=False)
class Worker:
    """One worker of a group; the names are torch's, and -1 stands for a rank that is not known yet."""

    local_rank: int
    global_rank: int = -1
    role_rank: int = -1
    world_size: int = -1
    role_world_size: int = -1
    id: Any = field(default=None, init=False)
    """The process id; None until the worker has started."""


@dataclass(eq=False)
class WorkerGroup:
    """The workers of one node in the current round; the names are torch's, and None means not known yet."""

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
    """The result of an agent's run."""

    state: WorkerState
    return_values: dict[int, Any] = field(default_factory=dict)
    """What the workers' functions returned, by global rank; None for each worker of a command."""
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    """Failures by global rank, the cause first."""
    report: str = ""
    """The failure report as text; empty on success."""

    def is_failed(self) -> bool:
        """Return whether workers failed."""
        return self.state is WorkerState.FAILED
