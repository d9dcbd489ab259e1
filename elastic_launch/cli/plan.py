"""Work out what a launch would run on this node: its options, its workers and their environment. Starts nothing."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from elastic_launch.agent.progress_memory import SWITCH, VARIABLE
from elastic_launch.cli.options import OPTIONS
from elastic_launch.config import SIGNALS_VARIABLE, LaunchConfig
from elastic_launch.core.agent.worker_env import worker_environment
from elastic_launch.core.placement import format_list, virtual_device
from elastic_launch.env import TOKEN_FILE
from elastic_launch.errors import LaunchError
from elastic_launch.host.devices import cpu_count
from elastic_launch.job import Assignment
from elastic_launch.launch import threads_per_worker
from elastic_launch.logs.job_files import DefaultLogsSpecs, as_file_name
from elastic_launch.parsing import parse_rdzv_conf
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous
from elastic_launch.rendezvous.store_rendezvous import StoreRendezvous
from elastic_launch.worker_spec import Rendezvous, WorkerSpec

NONE = "(none)"
LATER = "(when the nodes have met)"
"""Stands for what the nodes find out together."""
FREE_PORT = "(a free port)"
RANDOM = "(random)"
TEMPORARY = "(in a temporary directory)"
DESCRIPTORS = "(two descriptors)"
STANDALONE = ("rdzv_backend", "rdzv_endpoint", "rdzv_id")
"""Options that ``--standalone`` decides."""


class Setting(NamedTuple):
    """One option, as a job would have it."""

    name: str
    value: str
    source: str
    """``--nnodes``, ``PET_NNODES``, the path of the file, or ``default``."""


class Worker(NamedTuple):
    """One worker of this node."""

    variables: dict[str, str]
    """What the launcher adds to the environment."""
    cpus: str
    """The CPUs that it is bound to, as in ``0-3``; empty: it is not bound."""


def settings(args: argparse.Namespace, config: LaunchConfig | None, environ: Mapping[str, str]) -> list[Setting]:
    """Return all options and the script, with the source of each value.

    Args:
        args: as from ``parse_args``.
        config: what they mean; None if they contradict each other.
        environ: the launcher's variables.
    """
    given: Mapping[str, str] = getattr(args, "given", {})
    meant = _meant(args, config, environ) if config else {}
    found = []
    for option in OPTIONS:
        if option.dest == "dry_run":
            continue
        value, source = _text(getattr(args, option.dest)), given.get(option.dest, "default")
        if option.dest == "shutdown_timeout" and source == "default" and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in environ:
            source = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
        if option.dest == "token_file" and source == "default" and environ.get(TOKEN_FILE):
            value, source = environ[TOKEN_FILE], TOKEN_FILE
        if option.dest in STANDALONE and args.standalone:
            source = given.get("standalone", "--standalone")
        if option.dest == "rdzv_conf":
            value = _without_secrets(parse_rdzv_conf(value))
        found.append(Setting(option.name, meant.get(option.dest, value) or NONE, source))
    words = [args.training_script, *args.training_script_args]
    return [*found, Setting("script", joined(words), given.get("training_script", "command line"))]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(value) if isinstance(value, list) else "" if value is None else str(value)


def _meant(args: argparse.Namespace, config: LaunchConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what options stand for, where their text does not say it."""
    workers = str(config.nproc_per_node)
    is_alone = config.max_nodes == 1
    return {
        "nproc_per_node": workers if args.nproc_per_node == workers else f"{workers} ({args.nproc_per_node})",
        "rdzv_backend": config.rdzv_backend,
        "rdzv_endpoint": config.rdzv_endpoint,
        "rdzv_id": config.run_id or (RANDOM if is_alone else "none"),
        "rdzv_conf": _without_secrets({k: v for k, v in parse_rdzv_conf(args.rdzv_conf).items() if k != "rank"}),
        "preload": _text(config.preload),
        "shutdown_timeout": f"{config.shutdown_timeout:g}",
        "log_dir": (config.logs_specs and config.logs_specs.root_log_dir) or TEMPORARY,
    }


def _without_secrets(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={'***' if name == 'password' else value}" for name, value in settings.items())


def joined(words: Sequence[str]) -> str:
    """Return a command as a shell would accept it."""
    import shlex

    return shlex.join(words)


def workers(config: LaunchConfig, rendezvous: Rendezvous | None, environ: Mapping[str, str]) -> list[Worker]:
    """Return the workers of this node, by local rank.

    Args:
        config: the job's settings.
        rendezvous: the job's; None if a plug-in is to create it. On one node it knows everything; what several nodes
            decide later is ``LATER``.
        environ: the environment that the workers inherit.
    """
    count = config.nproc_per_node
    spec = WorkerSpec(config.role, count, cast(Rendezvous, rendezvous), max_restarts=config.max_restarts)
    assignment, unknown = _assignment(config, rendezvous)
    chosen = {} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": str(threads_per_worker(cpu_count(), count))}
    chosen |= {SIGNALS_VARIABLE: config.signals_to_handle}
    progress = {} if environ.get(SWITCH) == "0" else {VARIABLE: DESCRIPTORS}
    run_id = config.run_id or (RANDOM if isinstance(rendezvous, SingleNodeRendezvous) else "none")
    cpus = _cpus(config, environ)
    found = []
    for rank in range(count):
        variables = (
            worker_environment(spec, assignment, rank, run_id=run_id, inherited=environ) | chosen | progress | unknown
        )
        if config.virtual_local_rank:
            with contextlib.suppress(LaunchError):  # a check reports it
                variables |= virtual_device(rank, environ)
        variables["TORCHELASTIC_ERROR_FILE"] = _error_file(config, run_id, variables["RANK"])
        found.append(Worker(variables, format_list(cpus[rank]) if rank in cpus else ""))
    return found


def _error_file(config: LaunchConfig, run_id: str, rank: str) -> str:
    root = config.logs_specs.root_log_dir if config.logs_specs else None
    if not isinstance(config.logs_specs, DefaultLogsSpecs):
        return "(chosen by --logs-specs)"
    if not root:
        return TEMPORARY
    folder = run_id if run_id == RANDOM else as_file_name(run_id)
    return os.path.join(os.path.abspath(root), folder, "attempt_0", "RANK" if rank == LATER else rank, "error.json")


def _assignment(config: LaunchConfig, rendezvous: Rendezvous | None) -> tuple[Assignment, dict[str, str]]:
    """Return the node's assignment in the first round, and the variables that are not known yet."""
    if isinstance(rendezvous, SingleNodeRendezvous):
        unknown = {} if rendezvous.port else {"MASTER_PORT": FREE_PORT}
        return rendezvous.assignment(rendezvous.port), unknown
    names = ["RANK", "ROLE_RANK", "WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR"]
    rank = int(config.rdzv_configs.get("rank", -1))
    port = rendezvous.settings.store_port if isinstance(rendezvous, StoreRendezvous) else 0
    names += ["MASTER_PORT"] if not port else []
    names += ["GROUP_RANK"] if rank < 0 else []
    names += ["GROUP_WORLD_SIZE"] if config.min_nodes < config.max_nodes else []
    workers = config.nproc_per_node
    assignment = Assignment(rank, config.max_nodes, 0, 0, workers, 0, 0, "", port, "", False, bool(port))
    return assignment, dict.fromkeys(names, LATER)


def _cpus(config: LaunchConfig, environ: Mapping[str, str]) -> dict[int, frozenset[int]]:
    if config.numa_options is None:
        return {}
    from elastic_launch.host.numa import bind  # late: few jobs need it

    with contextlib.suppress(LaunchError):  # a check reports it
        return bind(config.numa_options, config.nproc_per_node, environ, lambda text: None)
    return {}
