"""What ``--dry-run`` checks before a launch: one table of functions, each of which looks at one thing.

A check starts nothing and leaves nothing. It raises the error that the launch would end with.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import NamedTuple

from elastic_launch.cli import store_checks
from elastic_launch.cli.store_checks import Doubt
from elastic_launch.config import LaunchConfig
from elastic_launch.core.placement import format_list, virtual_device
from elastic_launch.errors import LaunchError
from elastic_launch.host.ports import reserve_port
from elastic_launch.logs.channel import RESERVE, needed_files
from elastic_launch.logs.job_files import DefaultLogsSpecs, as_file_name, cannot_create
from elastic_launch.logs.pump import no_pipes
from elastic_launch.rendezvous import BUILT_IN
from elastic_launch.rendezvous.factory import create_rendezvous
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous
from elastic_launch.rendezvous.store_rendezvous import StoreRendezvous
from elastic_launch.worker_spec import Rendezvous

SHM = "/dev/shm"
SMALL_SHM = 512 << 20
"""Bytes of /dev/shm below which a job is likely to miss it: Docker gives a container 64 MiB."""
SMALL_DISK = 64 << 20
"""Free bytes of a disk for logs that are worth a warning."""


class Mark(Enum):
    """What a check has found."""

    OK = "ok"
    WARNING = "warning"
    """The launch goes on, but something is missing or not known yet."""
    ERROR = "error"
    """The launch would end with this error."""


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    mark: Mark
    text: str
    error: LaunchError | None = None
    """What the launch would end with."""


class Subject(NamedTuple):
    """What is checked."""

    args: argparse.Namespace
    """The parsed command line."""
    config: LaunchConfig
    environ: Mapping[str, str]
    rendezvous: Rendezvous | None = None
    """The job's, which has not been opened; None if a plug-in is to create it, or if that failed."""


Check = Callable[[Subject], str | Doubt | None]
"""Returns what it has found, or None if there is nothing to check. Raises LaunchError."""


def check_rendezvous(config: LaunchConfig, environ: Mapping[str, str]) -> tuple[Rendezvous | None, Finding]:
    """Create the rendezvous of a built-in backend, without opening it. Only look for a plug-in."""
    name = "rendezvous"
    try:
        if config.rdzv_backend and config.rdzv_backend not in BUILT_IN:
            from elastic_launch.rendezvous.registry import rendezvous_handler_registry

            if config.rdzv_backend in rendezvous_handler_registry.known_backends():
                return None, Finding(name, Mark.OK, f"the plug-in {config.rdzv_backend}, which is not asked")
        warnings: list[str] = []
        rendezvous = create_rendezvous(config, environ, warnings.append)
    except LaunchError as error:
        return None, Finding(name, Mark.ERROR, str(error), error)
    if warnings:
        return rendezvous, Finding(name, Mark.WARNING, "; ".join(warnings))
    if isinstance(rendezvous, StoreRendezvous):
        return rendezvous, Finding(name, Mark.OK, f"up to {config.max_nodes} nodes meet at {rendezvous.backend.where}")
    return rendezvous, Finding(name, Mark.OK, "one node, which needs no store")


def run(subject: Subject) -> Iterator[Finding]:
    """Run all checks, in the order in which a launch meets what they look at."""
    for name, check in CHECKS:
        try:
            found = check(subject)
        except LaunchError as error:
            yield Finding(name, Mark.ERROR, str(error), error)
        else:
            if isinstance(found, Doubt):
                yield Finding(name, Mark.WARNING, found.text)
            elif found:
                yield Finding(name, Mark.OK, found)


def _script(subject: Subject) -> str | Doubt:
    """Say what runs; ``config_from_args`` has checked that a script or a program is there."""
    args, script = subject.args, subject.args.training_script
    if not args.module:
        return f"{'program ' if args.no_python else ''}{script}"
    package = script.partition(".")[0]
    if "PYTHON_EXEC" in subject.environ or os.path.exists(package) or os.path.exists(f"{package}.py"):
        return f"module {script}"
    if importlib.util.find_spec(package) is None:
        return Doubt(f"module {script}: this Python finds no {package} here")
    return f"module {script}"


def _event_handler(subject: Subject) -> str | None:
    from elastic_launch import events  # late: it imports logging
    from elastic_launch.host import plug_ins

    name = subject.config.event_log_handler
    if name in events.BUILT_IN:
        return None
    if name not in plug_ins.offered(events.ENTRY_POINTS):
        events.check_destination(name)
    return f"the plug-in {name}"


def _log_directory(subject: Subject) -> str | Doubt:
    config = subject.config
    specs = config.logs_specs
    if not isinstance(specs, DefaultLogsSpecs):
        return f"chosen by the plug-in {type(specs).__qualname__}"
    root = specs.root_log_dir or subject.environ.get("TMPDIR") or "/tmp"
    run_id = config.run_id or ("none" if config.max_nodes > 1 else "")  # on one node it is random
    path = os.path.abspath(os.path.join(root, as_file_name(run_id)) if specs.root_log_dir and run_id else root)
    above = path
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    code = 0
    if not os.path.isdir(above):
        code = errno.ENOTDIR
    elif not os.access(above, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
    if code and specs.asks_for_files(bool(config.duplicate_stdout_filters or config.duplicate_stderr_filters)):
        raise cannot_create(specs, path, OSError(code, os.strerror(code)))
    if code:
        return Doubt(f"{root}: {os.strerror(code)}; the job runs without files for exceptions")
    disk = os.statvfs(above)
    free = disk.f_bavail * disk.f_frsize
    text = f"{path}: {_size(free)} free"
    return Doubt(f"{text}; logs may be cut off") if free < SMALL_DISK else text


def _binding(subject: Subject) -> str | None:
    config = subject.config
    if config.numa_options is None:
        return None
    from elastic_launch.host.numa import bindings, mode_of

    cpus = bindings(mode_of(config.numa_options)[0], config.nproc_per_node, subject.environ)
    return "; ".join(f"local rank {rank}: {format_list(each)}" for rank, each in enumerate(cpus))


def _devices(subject: Subject) -> str | None:
    config = subject.config
    if not config.virtual_local_rank:
        return None
    devices = [virtual_device(rank, subject.environ) for rank in range(config.nproc_per_node)]
    shown = (f"local rank {rank}: {each['CUDA_VISIBLE_DEVICES']}" for rank, each in enumerate(devices))
    return "; ".join(shown)


def _open_files(subject: Subject) -> str | Doubt:
    config = subject.config
    keeps_output = isinstance(config.logs_specs, DefaultLogsSpecs) and config.logs_specs.keeps_output
    streams = config.nproc_per_node * (2 if keeps_output else 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = needed_files(streams)
    if hard != resource.RLIM_INFINITY and hard < needed - RESERVE:
        raise no_pipes(streams, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    more = f", which can be raised to {_limit(hard)}" if hard != soft else ""
    text = f"the launcher needs {needed}; the limit is {_limit(soft)}{more}"
    return Doubt(text) if hard != resource.RLIM_INFINITY and hard < needed else text


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def _shared_memory(subject: Subject) -> str | Doubt:
    try:
        disk = os.statvfs(SHM)
    except OSError as error:
        return Doubt(f"{error.strerror}; data loaders with processes and NCCL need it")
    size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    text = f"{_size(size)}, of which {_size(free)} are free"
    if free < SMALL_SHM:
        return Doubt(f"{text}; data loaders with processes and NCCL may need more (in a container: --shm-size)")
    return text


def _master_port(subject: Subject) -> str | None:
    """Look whether the port that the user chose for the worker of rank 0 is free."""
    rendezvous = subject.rendezvous
    if not isinstance(rendezvous, SingleNodeRendezvous) or not rendezvous.port:
        return None
    reserve_port(rendezvous.port).close()
    return f"{rendezvous.port} is free"


def _host_name(subject: Subject) -> str | Doubt | None:
    rendezvous = subject.rendezvous
    return store_checks.names(rendezvous.backend) if isinstance(rendezvous, StoreRendezvous) else None


def _store(subject: Subject) -> str | Doubt | None:
    rendezvous = subject.rendezvous
    if not isinstance(rendezvous, StoreRendezvous):
        return None
    return store_checks.store(rendezvous.backend, rendezvous.settings.join_timeout)


def _client(subject: Subject) -> str | None:
    rendezvous = subject.rendezvous
    return store_checks.packages(rendezvous.backend) if isinstance(rendezvous, StoreRendezvous) else None


def _size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _health_check(subject: Subject) -> str | None:
    """Say what checks the node; ``config_from_args`` has found the program. It may take long, so it is not run."""
    return f"{subject.config.health_check} (not run)" if subject.config.health_check else None


CHECKS: tuple[tuple[str, Check], ...] = (
    ("script", _script),
    ("health check", _health_check),
    ("log directory", _log_directory),
    ("event handler", _event_handler),
    ("CPUs", _binding),
    ("open files", _open_files),
    (SHM, _shared_memory),
    ("devices", _devices),
    ("master port", _master_port),
    ("packages", _client),
    ("endpoint", _host_name),
    ("store", _store),
)
"""The checks and their names."""
