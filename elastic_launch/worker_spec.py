"""Define what the workers of a node run, and how they ended, with torch's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Policy


class WorkerState(StrEnum):
    """State of a node's workers; the names are torch's."""

    UNKNOWN = "UNKNOWN"
    """Never set by this package."""
    INIT = "INIT"
    """The workers have not been started."""
    HEALTHY = "HEALTHY"
    """The workers run, or are being stopped without a failure on this node."""
    UNHEALTHY = "UNHEALTHY"
    """A worker has failed, and the others are being stopped."""
    STOPPED = "STOPPED"
    """Never set by this package."""
    SUCCEEDED = "SUCCEEDED"
    """The workers are gone, and none has failed."""
    FAILED = "FAILED"
    """The workers are gone, and at least one has failed."""

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
    """One worker; the names are torch's. Numbers are -1 until the rendezvous has assigned them."""

    local_rank: int
    """Rank of the worker on its node."""
    global_rank: int = -1
    """Rank among all workers."""
    role_rank: int = -1
    """Rank among the workers with the same role."""
    world_size: int = -1
    """Number of all workers."""
    role_world_size: int = -1
    """Number of workers with the same role."""
    id: Any = field(default=None, init=False)
    """Process id; None until the worker has started."""


@dataclass(eq=False)
class WorkerGroup:
    """The workers of one node in the current round; the names are torch's. What is not known yet is None."""

    spec: WorkerSpec
    """What the workers run."""
    workers: list[Worker] = field(init=False)
    """The workers, by local rank."""
    store: Any = field(default=None, init=False)
    """Always None: this package has no such store."""
    group_rank: int | None = field(default=None, init=False)
    """Rank of the node."""
    group_world_size: int | None = field(default=None, init=False)
    """Number of nodes."""
    master_addr: str | None = field(default=None, init=False)
    """Address of the workers' store."""
    master_port: int | None = field(default=None, init=False)
    """Port of the workers' store."""
    state: WorkerState = field(default=WorkerState.INIT, init=False)
    """State of the workers."""

    def __post_init__(self) -> None:
        self.workers = [Worker(local_rank) for local_rank in range(self.spec.local_world_size)]


@dataclass
class RunResult:
    """The result of an agent's run."""

    state: WorkerState
    """SUCCEEDED or FAILED."""
    return_values: dict[int, Any] = field(default_factory=dict)
    """What the workers' functions returned, by global rank; None for each worker of a command."""
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    """Failures by global rank, the cause first."""
    report: str = ""
    """The failure report as text; empty on success."""

    def is_failed(self) -> bool:
        """Return whether workers failed."""
        return self.state is WorkerState.FAILED
