"""Turn a parsed command line into the settings of a job and the command of its workers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from elastic_launch.agent.worker_group import LOCAL_RANK
from elastic_launch.cli.options import OPTIONS, read_options
from elastic_launch.config import LaunchConfig, LogsSpecs, Std
from elastic_launch.core.text import ranks_text
from elastic_launch.env import environment
from elastic_launch.errors import UsageError
from elastic_launch.host.console import YELLOW, log, paint
from elastic_launch.host.devices import has_accelerator, local_world_size
from elastic_launch.job import Level
from elastic_launch.launch import elastic_launch
from elastic_launch.logs.job_files import DefaultLogsSpecs
from elastic_launch.parsing import AUTO, parse_command, parse_min_max_nnodes, parse_ranks, parse_rdzv_conf
from elastic_launch.workers import BOOTSTRAP

LOGS_SPECS = "torchrun.logs_specs"
"""The entry point group of ``LogsSpecs`` plug-ins."""


def run(args: argparse.Namespace) -> None:
    """Run the job that a parsed command line describes. With ``--dry-run``, print what would run instead.

    Args:
        args: as from ``parse_args``.

    Raises:
        ChildFailedError: workers failed; its text is the report.
        SignalException: a signal ended the job.
        UsageError: an option or a variable is wrong.
        LaunchError: the launcher could not do its work.
    """
    if getattr(args, "adopt", False):
        from elastic_launch import compat  # late: few start programs that start torchrun

        compat.adopt(args)
    if getattr(args, "dry_run", False):
        from elastic_launch.cli import dry_run  # late: it runs no job

        dry_run.show(args)
        return
    config, command, command_args = config_from_args(args)
    elastic_launch(config, command)(*command_args)


def config_from_args(args: argparse.Namespace) -> tuple[LaunchConfig, Callable[..., Any] | str, list[str]]:
    """Return the settings, the workers' command and its arguments.

    Args:
        args: as from ``parse_args``.

    >>> from elastic_launch.run import parse_args
    >>> config, command, arguments = config_from_args(parse_args(["--max-restarts", "3", "--no-python", "echo", "hi"]))
    >>> config.max_restarts, command, arguments
    (3, 'echo', ['hi'])

    Raises:
        UsageError: options contradict each other, or the script cannot be run.
        LaunchError: the ``LogsSpecs`` plug-in that ``--logs-specs`` names does not work.
    """
    environ = environment()
    args = read_options(args)
    command = _command(args, environ)
    min_nodes, max_nodes = parse_min_max_nnodes(args.nnodes)
    if args.node_rank >= max_nodes:
        raise UsageError(f"--node-rank={args.node_rank}: must be below the number of nodes, {max_nodes}")
    if args.rdzv_backend == "static" and max_nodes > 1 and not (args.rdzv_endpoint or "master_addr" in args.given):
        raise UsageError(
            f"--nnodes={args.nnodes}: several nodes need a rendezvous endpoint: pass --rdzv-backend c10d "
            "--rdzv-endpoint HOST:PORT, where HOST is one of them; or --master-addr, the address of the node of rank 0"
        )
    if check := parse_command(args.health_check):
        _check_program("--health-check=", check[0])
    pinned = args.rdzv_backend == "static" or "node_rank" in args.given
    fields = LaunchConfig.__dataclass_fields__
    settings = {option.dest: getattr(args, option.dest) for option in OPTIONS if option.dest in fields}
    workers = local_world_size(args.nproc_per_node, environ)
    _warn_of_absent_ranks(args, workers)
    settings |= {
        "min_nodes": min_nodes,
        "max_nodes": max_nodes,
        "nproc_per_node": workers,
        # Forked workers have not been tried on enough accelerators.
        "preload": ([] if has_accelerator() else [AUTO]) if args.preload is None else args.preload,
        "logs_specs": _logs_specs(args),
        "run_id": "" if args.standalone or args.rdzv_id == "none" else args.rdzv_id,
        "rdzv_endpoint": "" if args.standalone else args.rdzv_endpoint or _static_endpoint(args),
        "rdzv_backend": "c10d" if args.standalone else args.rdzv_backend,
        "rdzv_configs": {**parse_rdzv_conf(args.rdzv_conf), **({"rank": args.node_rank} if pinned else {})},
        "log_line_prefix_template": environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
        "numa_options": args.numa_binding,
        "verbosity": Level.WARNING if args.quiet else Level.DEBUG if args.verbose else Level.INFO,
    }
    return LaunchConfig(**settings), *command


def _static_endpoint(args: argparse.Namespace) -> str:
    if args.rdzv_backend != "static":
        return ""
    host = f"[{args.master_addr}]" if ":" in args.master_addr and "[" not in args.master_addr else args.master_addr
    return f"{host}:{args.master_port or 0}"


def _logs_specs(args: argparse.Namespace) -> LogsSpecs:
    def create(specs: Callable[..., LogsSpecs]) -> LogsSpecs:
        # torch's classes check that a value is torch's Std, and so may classes that derive from them. They have
        # imported torch already.
        torchs: Any = sys.modules.get("torch.distributed.elastic.multiprocessing.api")
        std = torchs.Std if torchs and isinstance(specs, type) and issubclass(specs, torchs.LogsSpecs) else Std
        streams = {
            name: {rank: std(int(each)) for rank, each in value.items()} if isinstance(value, dict) else std(int(value))
            for name, value in (("redirects", Std.from_str(args.redirects)), ("tee", Std.from_str(args.tee)))
        }
        return specs(log_dir=args.log_dir, local_ranks_filter=parse_ranks(args.local_ranks_filter), **streams)

    if args.logs_specs in (None, "default"):  # torch's own entry point has this name
        return create(DefaultLogsSpecs)
    from elastic_launch.host import plug_ins  # late: few jobs need it

    return plug_ins.load(LOGS_SPECS, args.logs_specs, f"--logs-specs={args.logs_specs}", ("default",), create)


def _warn_of_absent_ranks(args: argparse.Namespace, workers: int) -> None:
    """Warn of options about local ranks that this node does not have. It is no error: other nodes may have them."""
    streams = {name: Std.from_str(getattr(args, name)) for name in ("redirects", "tee")}
    ranks = {name: set(value) for name, value in streams.items() if isinstance(value, dict)}
    ranks["local-ranks-filter"] = parse_ranks(args.local_ranks_filter) or set()
    for name, chosen in ranks.items():
        if absent := {rank for rank in chosen if rank >= workers}:
            which = f"rank{'' if len(absent) == 1 else 's'} {ranks_text(absent)}"
            log(paint(f"--{name}: this node has no local {which}, only 0 to {workers - 1}", YELLOW))


def _command(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the program that each worker executes, and its arguments."""
    script, script_args = args.training_script, args.training_script_args
    if not getattr(args, "use_env", True):  # the launcher before torchrun
        if args.no_python:
            raise UsageError("--no-python needs --use-env: only Python scripts get --local-rank")
        script_args = [f"--local-rank={LOCAL_RANK}", *script_args]
    if args.module and (args.no_python or args.run_path):
        raise UsageError("-m/--module cannot be combined with --no-python or --run-path")
    if args.preload not in (None, [], [AUTO]) and (args.no_python or script == "-" or "PYTHON_EXEC" in environ):
        other = "--no-python" if args.no_python else "PYTHON_EXEC" if "PYTHON_EXEC" in environ else "a script on stdin"
        raise UsageError(f"--preload cannot be combined with {other}: workers are forked from the preloaded Python")
    if args.no_python and not args.run_path:
        _check_program("--no-python ", script)
        return script, script_args
    python = sys.executable
    if "PYTHON_EXEC" in environ and not args.run_path:
        python = environ["PYTHON_EXEC"]
        _check_program("PYTHON_EXEC=", python)
    if script == "-" and not args.module:
        return python, ["-u", "-", *script_args]  # the bootstrap cannot find a program on standard input
    if not args.module:
        _check_script(script)
    return python, ["-u", BOOTSTRAP, "module" if args.module else "script", script, *script_args]


def _check_program(option: str, program: str) -> None:
    import shutil  # late: it takes 3 ms

    if shutil.which(program) is None:
        raise UsageError(f"{option}{program}: no such program, or not executable")


def _check_script(script: str) -> None:
    """Report a script that cannot be run, once here rather than once per worker and restart."""
    try:
        os.stat(script)
    except PermissionError as error:
        raise UsageError(f"script {script}: a directory of its path may not be searched by this user") from error
    except (OSError, ValueError):
        hint = "; for a module, pass -m" if not script.endswith(".py") and os.sep not in script else ""
        raise UsageError(f"script {script}: no such file{hint}") from None
    if os.path.isdir(script) and not os.path.exists(os.path.join(script, "__main__.py")):
        raise UsageError(f"script {script}: a directory without a __main__.py")
    if not os.access(script, os.R_OK):
        raise UsageError(f"script {script}: not readable by this user")
