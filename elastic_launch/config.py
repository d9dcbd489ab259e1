"""The settings of a job and of its output, as the Python API accepts them.

Values only. ``parsing`` reads their text forms.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

from elastic_launch.env import environment
from elastic_launch.errors import UsageError
from elastic_launch.job import HangAction, Level, Policy
from elastic_launch.parsing import (
    is_number,
    parse_backoff,
    parse_command,
    parse_exit_codes,
    parse_hang_timeout,
    parse_seconds,
    parse_signals,
)

DEFAULT_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
"""Signals that stop the job, unless ``--signals-to-handle`` names others."""
SIGNALS_VARIABLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""Variable with such names, for agents and groups of processes that a program starts without naming any."""
DEFAULT_SHUTDOWN_TIMEOUT = 30
"""Seconds between a worker's stop signal and SIGKILL."""
BUILT_IN = ("static", "c10d", "etcd", "etcd-v2")
"""Names of the built-in backends of the rendezvous. Both ``etcd`` and ``etcd-v2`` mean etcd v3."""
DEFAULT_JOIN_TIMEOUT = 600
"""Seconds that nodes have to meet; a single node that long to be fit."""
_THIRD_PARTY_TIMEOUT = 900
"""Setting ``timeout`` of other backends, whatever it means there; torch's default."""
DEFAULT_CHECK_TIMEOUT = 60
"""Seconds that a node's health check may take."""


class Std(IntFlag):
    """A selection of a worker's standard streams."""

    NONE = 0
    """Neither stream."""
    OUT = 1
    """Standard output."""
    ERR = 2
    """Standard error."""
    ALL = 3
    """Both streams."""

    @classmethod
    def from_str(cls, vm: str) -> Std | dict[int, Std]:
        """Read the value of ``--redirects`` or ``--tee``: one selection for all workers, or one for each local rank.

        Args:
            vm: ``0``, ``1``, ``2`` or ``3``, or a list of such values by local rank, as in ``0:1,1:2``.

        >>> Std.from_str("3") == Std.ALL, Std.from_str("0:1,1:2") == {0: Std.OUT, 1: Std.ERR}
        (True, True)

        Raises:
            UsageError: the text has neither form, or a rank twice.
        """
        if vm in _STD_NUMBERS:
            return cls(int(vm))
        by_rank: dict[int, Std] = {}
        for pair in vm.split(","):
            rank, colon, std = pair.partition(":")
            if not colon or not is_number(rank) or std not in _STD_NUMBERS:
                raise UsageError(
                    f"{vm!r}: must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or RANK:NUMBER,... as in 0:1,1:2"
                )
            if int(rank) in by_rank:
                raise UsageError(f"{vm!r}: has rank {rank} twice")
            by_rank[int(rank)] = cls(int(std))
        return by_rank


_STD_NUMBERS = ("0", "1", "2", "3")


def to_map(val_or_map: Std | dict[int, Std], local_world_size: int) -> dict[int, Std]:
    """Return the streams of each local rank below ``local_world_size``.

    Args:
        val_or_map: one value for all ranks, or a map from local rank; ranks that it lacks get ``Std.NONE``.
        local_world_size: number of workers on this node.

    >>> to_map({1: Std.OUT}, 2) == {0: Std.NONE, 1: Std.OUT}
    True
    """
    if isinstance(val_or_map, dict):
        return {rank: val_or_map.get(rank, Std.NONE) for rank in range(local_world_size)}
    return dict.fromkeys(range(local_world_size), val_or_map)


INHERIT = ""
"""Stands for the launcher's own stream where a path is expected."""


@dataclass
class LogsDest:
    """Where the output of one round's workers goes. All maps are by local rank; the fields are those of torch."""

    stdouts: dict[int, str] = field(default_factory=dict)
    """Path of each worker's stdout; ``""`` for the launcher's own stdout."""
    stderrs: dict[int, str] = field(default_factory=dict)
    """Path of each worker's stderr; ``""`` for the launcher's own stderr."""
    tee_stdouts: dict[int, str] = field(default_factory=dict)
    """The entries of ``stdouts`` that are also shown on the console."""
    tee_stderrs: dict[int, str] = field(default_factory=dict)
    """The entries of ``stderrs`` that are also shown on the console."""
    error_files: dict[int, str] = field(default_factory=dict)
    """Path of the JSON file that each worker writes its uncaught exception to."""
    filtered_stdout: str = ""
    """Path of the copy of the stdout lines that match ``duplicate_stdout_filters``; ``""`` for none."""
    filtered_stderr: str = ""
    """Path of the copy of the stderr lines that match ``duplicate_stderr_filters``; ``""`` for none."""


class LogsSpecs(ABC):
    """Decides where the workers' output goes.

    Derive from this class for a plug-in, and name it in the entry point group ``torchrun.logs_specs``. If
    ``--logs-specs`` names it, the command line creates an instance with the arguments below.
    """

    def __init__(
        self,
        log_dir: str | None = None,
        redirects: Std | dict[int, Std] = Std.NONE,
        tee: Std | dict[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        """Keep the settings for ``reify``.

        Args:
            log_dir: directory for the files; None for a fresh temporary directory.
            redirects: streams that go to files only, for all workers or by local rank.
            tee: streams that go both to files and to the console, for all workers or by local rank.
            local_ranks_filter: local ranks whose output the console shows; None for all.
        """
        self._root_log_dir = log_dir
        self._redirects = redirects
        self._tee = tee
        self._local_ranks_filter = local_ranks_filter

    @abstractmethod
    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Choose the files of the round that begins.

        Args:
            envs: the environment variables of each worker, by local rank.
        """

    @property
    @abstractmethod
    def root_log_dir(self) -> str | None:
        """The directory of all files; None if there is none yet."""


@dataclass
class LaunchConfig:
    """The settings of one job. Fields, order and defaults up to ``shutdown_timeout`` are those of torch.

    >>> config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=8, max_restarts=2, run_id="my-job")
    >>> LaunchConfig(min_nodes=2, max_nodes=1, nproc_per_node=8)
    Traceback (most recent call last):
        ...
    elastic_launch.errors.UsageError: min_nodes=2, max_nodes=1: must be 1 <= min <= max

    Raises:
        UsageError: a value is outside its range.
    """

    min_nodes: int
    """Smallest number of nodes that the job runs on, at least 1."""
    max_nodes: int
    """Largest number of nodes that the job runs on, at least ``min_nodes``. Further nodes wait as spares."""
    nproc_per_node: int
    """Number of workers on this node, at least 1."""
    logs_specs: LogsSpecs | None = None
    """Where the workers' output goes; None becomes ``DefaultLogsSpecs()``."""
    run_id: str = ""
    """The job's id, the same on all its nodes; ``""`` for a random one on one node and ``none`` on several."""
    role: str = "default_role"
    """Name of the workers' role."""
    rdzv_endpoint: str = ""
    """Where nodes meet, as ``HOST:PORT``. Optional on one node, where ``static`` puts the workers' store there."""
    rdzv_backend: str = "etcd"
    """How nodes meet: static, c10d, etcd, or the name of a plug-in. On one node, only a plug-in makes a difference."""
    rdzv_configs: dict[str, Any] = field(default_factory=dict)
    """Settings of the backend, as for ``--rdzv-conf``. ``timeout`` is added if it is missing: 600, or 900 for other
    backends than the built-in ones."""
    rdzv_timeout: int = -1
    """Seconds that nodes have to meet, which become ``timeout`` of ``rdzv_configs``; -1 for what that says."""
    max_restarts: int = 3
    """How often failed workers are restarted, at least 0."""
    monitor_interval: float = 0.1
    """Accepted for compatibility and unused: the agent does not poll."""
    start_method: str = "spawn"
    """How worker processes that run a function start: spawn, fork or forkserver."""
    log_line_prefix_template: str | None = None
    """Prefix of workers' lines on the console; ``${role_name}``, ``${rank}``, ``${local_rank}`` and ``${host}`` are
    filled in. None for role and local rank, or host and rank on several nodes."""
    metrics_cfg: dict[str, str] = field(default_factory=dict)
    """Accepted for compatibility and unused; see ``metrics.configure``."""
    local_addr: str | None = None
    """Address of this node for the others; None to find it out."""
    event_log_handler: str = "null"
    """Destination of events, as for ``events.get_logging_handler``."""
    numa_options: Any = None
    """How workers are bound to CPUs, as for ``--numa-binding``; None for no binding."""
    signals_to_handle: str = DEFAULT_SIGNALS
    """Names of the signals that stop the job, separated by commas."""
    duplicate_stdout_filters: list[str] | None = None
    """Stdout lines that contain one of these texts are copied to a file."""
    duplicate_stderr_filters: list[str] | None = None
    """Stderr lines that contain one of these texts are copied to a file."""
    virtual_local_rank: bool = False
    """Whether each worker sees ``LOCAL_RANK=0`` and only its own device, as number 0."""
    shutdown_timeout: float | None = None
    """Seconds between a worker's stop signal and SIGKILL; None becomes ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``, else 30."""
    preload: str | Sequence[str] = ()
    """Modules that one process of each node imports once; workers are forked from it. Or text as for ``--preload``:
    with ``"auto"`` the launcher chooses by what the program imports."""
    standby: bool = True
    """Whether, with ``preload``, that process forks the workers of the next round ahead of time."""
    restart_window: float = 0.0
    """Seconds after which a failure no longer counts against ``max_restarts``; 0 to count all failures."""
    restart_backoff: str = "0"
    """Seconds before the first restart, doubled before each further one: ``FIRST`` or ``FIRST:MAX``."""
    fatal_exit_codes: str = ""
    """Exit statuses that end the job without a restart, as in ``2,64-78``."""
    node_failure_limit: int = 0
    """Number of failures in a row after which a spare replaces a node; 0 for no limit."""
    crash_loop: int = 3
    """Number of identical failures in a row, each within 10 s of the last, that end the job; 0 for no limit."""
    hang_timeout: str = "auto"
    """Seconds without a step of any rank after which the job counts as hung; ``auto``: by its steps; 0: never."""
    start_timeout: float = 0.0
    """Seconds without a step of any rank, before the first ones, after which it does; 0: never."""
    hang_action: str = HangAction.REPORT
    """What follows when the job hangs: ``report`` it, ``restart`` the workers, or ``stop`` the job."""
    hang_native: bool = False
    """Whether the report of a hang shows native frames as well, if py-spy is installed."""
    verbosity: int = Level.INFO
    """The least important messages that are shown: 0 warnings, 1 events of the job, 2 events of each node."""
    events: str | None = None
    """File to which the events of the job are appended, or a directory for it; None for none but that in the log
    directory."""

    health_check: str = ""
    """Command that must exit with 0 before this node joins a round, as for ``--health-check``; ``""`` for none."""
    health_check_timeout: float = DEFAULT_CHECK_TIMEOUT
    """Seconds that it may take."""
    exit_barrier_timeout: float = 300
    """Seconds to wait, once this node's workers have succeeded, for those of other nodes; the node that hosts the
    job's store waits as long as they run."""
    token_file: str = ""
    """File with the token that the nodes of the job share, as for ``--token-file``; ``""`` for the one that
    ``ELASTIC_LAUNCH_TOKEN_FILE`` names, if any."""
    store_gate: bool = False
    """Whether only nodes that know the token can connect to the job's store, as for ``--store-gate``."""

    @property
    def policy(self) -> Policy:
        """When the job restarts."""
        first, limit = parse_backoff(str(self.restart_backoff))  # a program may pass 5 instead of "5"
        codes = parse_exit_codes(str(self.fatal_exit_codes))
        return Policy(
            max_restarts=self.max_restarts,
            window=self.restart_window,
            backoff=first,
            backoff_limit=limit,
            fatal_exit_codes=codes,
            node_failure_limit=self.node_failure_limit,
            crash_loop=self.crash_loop,
            hang_timeout=parse_hang_timeout(str(self.hang_timeout)),
            start_timeout=self.start_timeout,
            hang_action=HangAction(self.hang_action),
        )

    def __post_init__(self) -> None:
        if self.shutdown_timeout is None:
            text = environment().get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(DEFAULT_SHUTDOWN_TIMEOUT))
            seconds = parse_seconds(text, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")
            self.shutdown_timeout = int(seconds) if seconds.is_integer() else seconds
        self.rdzv_configs = {**self.rdzv_configs}
        if self.rdzv_timeout != -1:
            self.rdzv_configs["timeout"] = self.rdzv_timeout
        is_built_in = not self.rdzv_backend or self.rdzv_backend in BUILT_IN
        default = self.rdzv_configs.get("join_timeout", DEFAULT_JOIN_TIMEOUT) if is_built_in else _THIRD_PARTY_TIMEOUT
        self.rdzv_configs.setdefault("timeout", default)
        if self.logs_specs is None:
            # Not imported: the package names the layers above.
            self.logs_specs = sys.modules["elastic_launch"].DefaultLogsSpecs()
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise UsageError(f"min_nodes={self.min_nodes}, max_nodes={self.max_nodes}: must be 1 <= min <= max")
        for name, least in (("nproc_per_node", 1), ("max_restarts", 0), ("node_failure_limit", 0), ("crash_loop", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.crash_loop == 1:
            raise UsageError("crash_loop=1: must be at least 2, or 0 to turn this off")
        if self.shutdown_timeout < 0:
            raise UsageError(f"shutdown_timeout={self.shutdown_timeout}: must be at least 0 seconds")
        for name in ("restart_window", "start_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name}={getattr(self, name)}: must be a number of seconds, at least 0")
        if self.hang_action not in tuple(HangAction):
            raise UsageError(f"hang_action={self.hang_action!r}: must be one of {', '.join(HangAction)}")
        if not 0 < self.health_check_timeout < float("inf"):
            raise UsageError(f"health_check_timeout={self.health_check_timeout}: must be a number of seconds above 0")
        parse_command(self.health_check)
        parse_signals(self.signals_to_handle)
        _ = self.policy
