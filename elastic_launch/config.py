"""Layer 0: the settings of a job, and how their text forms are read.

Pure: text in, values out. What is wrong raises UsageError, with a line that begins with the value, so that the caller
can put its name before it, and says what is allowed.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

from elastic_launch.errors import UsageError
from elastic_launch.job import Level, Policy

DEFAULT_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
DEFAULT_SHUTDOWN_TIMEOUT = 30
"""Seconds between a worker's stop signal and SIGKILL."""


class Std(IntFlag):
    """Standard streams of a worker."""

    NONE = 0
    OUT = 1
    ERR = 2
    ALL = 3

    @classmethod
    def from_str(cls, text: str) -> Std | dict[int, Std]:
        """Read ``3`` (every rank) or ``0:1,1:2`` (by local rank).

        Raises:
            UsageError: the text has neither form.
        """
        if text in _STD_NUMBERS:
            return cls(int(text))
        by_rank: dict[int, Std] = {}
        for pair in text.split(","):
            rank, colon, std = pair.partition(":")
            if not colon or not is_number(rank) or std not in _STD_NUMBERS:
                raise UsageError(
                    f"{text!r}: must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or RANK:NUMBER,... as in 0:1,1:2"
                )
            by_rank[int(rank)] = cls(int(std))
        return by_rank


_STD_NUMBERS = ("0", "1", "2", "3")


def to_map(val_or_map: Std | dict[int, Std], local_world_size: int) -> dict[int, Std]:
    """One value for all, or a map that may have gaps, as a map by local rank without gaps."""
    if isinstance(val_or_map, dict):
        return {rank: val_or_map.get(rank, Std.NONE) for rank in range(local_world_size)}
    return dict.fromkeys(range(local_world_size), val_or_map)


INHERIT = ""
"""In place of a file: the launcher's own stream."""


@dataclass
class LogsDest:
    """Where the output of one round's workers goes. Fields are torch's; maps are by local rank."""

    stdouts: dict[int, str] = field(default_factory=dict)
    """A file, or ``""`` for the launcher's own stream."""
    stderrs: dict[int, str] = field(default_factory=dict)
    tee_stdouts: dict[int, str] = field(default_factory=dict)
    """The workers whose file is shown on the console, too."""
    tee_stderrs: dict[int, str] = field(default_factory=dict)
    error_files: dict[int, str] = field(default_factory=dict)
    filtered_stdout: str = ""
    """For the lines that match ``duplicate_stdout_filters``."""
    filtered_stderr: str = ""


class LogsSpecs(ABC):
    """Decides where output goes, once a round. Plug-ins (entry points of ``torchrun.logs_specs``) derive from this."""

    def __init__(
        self,
        log_dir: str | None = None,
        redirects: Std | dict[int, Std] = Std.NONE,
        tee: Std | dict[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        """Take what the command line says.

        Args:
            log_dir: where files go; None: a fresh temporary directory.
            redirects: which streams go to files only; for all workers, or by local rank.
            tee: which go to files and to the console.
            local_ranks_filter: whose output the console shows; None: everybody's.
        """
        self._root_log_dir = log_dir
        self._redirects = redirects
        self._tee = tee
        self._local_ranks_filter = local_ranks_filter

    @abstractmethod
    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Where each worker's output goes in the round that begins; ``envs``: their variables by local rank."""

    @property
    @abstractmethod
    def root_log_dir(self) -> str | None:
        """The directory of all files."""


@dataclass
class LaunchConfig:
    """The settings of one job. Fields, order and defaults are those of torch's ``LaunchConfig``.

    Raises:
        UsageError: a value is outside its range.
    """

    min_nodes: int
    max_nodes: int
    nproc_per_node: int
    logs_specs: LogsSpecs | None = None
    run_id: str = ""
    role: str = "default_role"
    rdzv_endpoint: str = ""
    rdzv_backend: str = "etcd"
    rdzv_configs: dict[str, Any] = field(default_factory=dict)
    rdzv_timeout: int = -1
    max_restarts: int = 3
    monitor_interval: float = 0.1
    """Accepted for torch's sake: nothing here polls."""
    start_method: str = "spawn"
    log_line_prefix_template: str | None = None
    metrics_cfg: dict[str, str] = field(default_factory=dict)
    local_addr: str | None = None
    event_log_handler: str = "null"
    numa_options: Any = None
    signals_to_handle: str = DEFAULT_SIGNALS
    duplicate_stdout_filters: list[str] | None = None
    duplicate_stderr_filters: list[str] | None = None
    virtual_local_rank: bool = False
    shutdown_timeout: int | None = None
    """Seconds between a worker's stop signal and SIGKILL; None: ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``, else 30."""
    preload: Sequence[str] = ()
    """Modules that are imported once on each node, in a process from which workers are forked."""
    restart_window: float = 0.0
    """Seconds after which a failure does not count against ``max_restarts`` any more; 0: all count."""
    restart_backoff: str = "0"
    """Seconds before the first restart, twice as long before each further one: ``FIRST`` or ``FIRST:MOST``."""
    fatal_exit_codes: str = ""
    """Exit statuses after which there is no restart: ``2,64-78``."""
    node_failure_limit: int = 0
    """A node that has caused so many failures in a row lets a spare take its place; 0: none does."""
    crash_loop: int = 3
    """Identical failures in a row, each within 10 s of the last, that end the job; at least 2, or 0 for never."""
    verbosity: int = Level.INFO
    """What people are told at most, a ``Level``: 0 trouble, 1 the job's events, 2 what each node does."""

    @property
    def policy(self) -> Policy:
        """When the job restarts."""
        first, most = parse_backoff(str(self.restart_backoff))  # a program may well write 5 for "5"
        codes = parse_exit_codes(str(self.fatal_exit_codes))
        return Policy(
            self.max_restarts, self.restart_window, first, most, codes, self.node_failure_limit, self.crash_loop
        )

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise UsageError(f"min_nodes={self.min_nodes}, max_nodes={self.max_nodes}: must be 1 <= min <= max")
        if self.nproc_per_node < 1:
            raise UsageError(f"nproc_per_node={self.nproc_per_node}: must be at least 1")
        if self.max_restarts < 0:
            raise UsageError(f"max_restarts={self.max_restarts}: must be at least 0")
        if self.shutdown_timeout is not None and self.shutdown_timeout < 0:
            raise UsageError(f"shutdown_timeout={self.shutdown_timeout}: must be at least 0 seconds")
        if not 0 <= self.restart_window < float("inf"):
            raise UsageError(f"restart_window={self.restart_window}: must be a number of seconds, at least 0")
        if self.node_failure_limit < 0:
            raise UsageError(f"node_failure_limit={self.node_failure_limit}: must be at least 0")
        if self.crash_loop < 0 or self.crash_loop == 1:
            raise UsageError(f"crash_loop={self.crash_loop}: must be at least 2, or 0 to turn this off")
        parse_signals(self.signals_to_handle)
        _ = self.policy


def is_number(text: str) -> bool:
    """Whether the text is a plain non-negative number of sane length; ``int()`` would also take `` 1`` and ``1_0``."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def read_flag(value: object) -> bool | None:
    """Read torch's spellings of yes and no, in any case: 1, true, t, yes, y, 0, false, f, no, n. None: none of them."""
    return _YES_AND_NO.get(str(value).lower())


_YES_AND_NO = {
    **dict.fromkeys(("1", "true", "t", "yes", "y"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n"), False),
}


def parse_nnodes(text: str) -> tuple[int, int]:
    """Read ``N`` or ``MIN:MAX`` into (min, max).

    Raises:
        UsageError: the text has neither form, or not 1 <= MIN <= MAX.
    """
    low, colon, high = text.partition(":")
    if not colon:
        high = low
    if not (is_number(low) and is_number(high) and 1 <= int(low) <= int(high)):
        raise UsageError(f"{text!r}: must be a number of nodes, at least 1, or a range MIN:MAX with 1 <= MIN <= MAX")
    return int(low), int(high)


def parse_rdzv_conf(text: str) -> dict[str, str]:
    """Read ``key=value,key=value``; quotes around the whole are dropped, since users write them.

    Raises:
        UsageError: an entry has no key or no value.
    """
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    settings: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (part.strip() for part in entry.partition("="))
        if not key or not value:
            raise UsageError(f"{entry!r}: must be KEY=VALUE, several of them separated by commas")
        settings[key] = value
    return settings


def parse_ranks(text: str) -> set[int] | None:
    """Read ``0,1,2`` into a set of local ranks; empty text: None, which is all.

    Raises:
        UsageError: an entry is not a number.
    """
    if not text:
        return None
    ranks = [part.strip() for part in text.split(",")]
    if not all(is_number(rank) for rank in ranks):
        raise UsageError(f"{text!r}: must be local ranks separated by commas, as in 0,1,2")
    return {int(rank) for rank in ranks}


def parse_signals(text: str) -> frozenset[signal.Signals]:
    """Read ``SIGTERM,SIGINT``.

    Raises:
        UsageError: a name is unknown, or of a signal that no process can handle.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise UsageError(
                f"{name!r}: must be names of signals that a process can handle, separated by commas, "
                f"as in {DEFAULT_SIGNALS}"
            )
    return frozenset(signal.Signals[name] for name in names)


DEFAULT_BACKOFF_LIMIT = 300.0
"""Seconds."""


def parse_backoff(text: str) -> tuple[float, float]:
    """Read ``FIRST`` or ``FIRST:MOST``, seconds; MOST is 300 where it is not given, or FIRST if that is more.

    Raises:
        UsageError: the text has neither form, or MOST is less than FIRST.
    """
    first, colon, most = text.partition(":")
    try:
        seconds = float(first)
        limit = float(most) if colon else max(seconds, DEFAULT_BACKOFF_LIMIT)
    except ValueError:
        seconds = limit = -1.0
    if not 0 <= seconds <= limit < float("inf"):
        raise UsageError(f"{text!r}: must be seconds, FIRST or FIRST:MOST, as in 1:60")
    return seconds, limit


def parse_exit_codes(text: str) -> frozenset[int]:
    """Read ``2,64-78``: exit statuses as a shell shows them, so 137 for SIGKILL.

    Raises:
        UsageError: an entry is no number from 1 to 255, nor a range of such.
    """
    codes: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (is_number(first) and is_number(last) and 1 <= int(first) <= int(last) <= 255):
            raise UsageError(f"{part!r}: must be exit statuses from 1 to 255, or ranges of them, as in 2,64-78")
        codes.update(range(int(first), int(last) + 1))
    return frozenset(codes)


def parse_modules(text: str) -> list[str]:
    """Read ``torch,mylib.data``.

    Raises:
        UsageError: an entry is no module's name.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"{name!r}: must be names of modules, separated by commas, as in torch,mylib.data")
    return names


def parse_filters(text: str) -> list[str]:
    """Read ``apple,orange`` into a list of texts; a doubled comma stands for a comma."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",") if part]


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Read ``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``; port 0 where there is none.

    Raises:
        UsageError: the port is none.
    """
    host, colon, port = endpoint.strip().rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        host, port = endpoint.strip(), "0"  # no port, perhaps a bare IPv6 address
    if not is_number(port) or int(port) > 65535:
        raise UsageError(f"{endpoint!r}: the port must be a number from 0 to 65535")
    return host.strip("[]"), int(port)
