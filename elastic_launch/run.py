"""Layer 5: what ``torch.distributed.run`` offers, by the same names: the command line as Python functions."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic_launch.cli.options import make_parser
from elastic_launch.config import LaunchConfig, LogsSpecs, Std, parse_nnodes, parse_ranks, parse_rdzv_conf
from elastic_launch.env import environment
from elastic_launch.errors import LaunchError, UsageError
from elastic_launch.host.devices import local_world_size
from elastic_launch.job import Level
from elastic_launch.launch import elastic_launch
from elastic_launch.logs.job_files import DefaultLogsSpecs
from elastic_launch.workers import BOOTSTRAP

LOGS_SPECS = "torchrun.logs_specs"
"""The entry point group of ``LogsSpecs`` plug-ins."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, ``sys.argv[1:]`` by default.

    Raises:
        ChildFailedError: workers failed; its text is the report.
        SignalException: a signal ended the job.
        UsageError: an option or variable is wrong.
        LaunchError: the launcher could not do its work.
        SystemExit: status 2 for a command line that cannot be read, 0 after ``--help``.
    """
    run(parse_args(args))


def get_args_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    return make_parser()


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; what it does not name comes from ``PET_`` variables and defaults."""
    return get_args_parser().parse_args(args)


def parse_min_max_nnodes(nnodes: str) -> tuple[int, int]:
    """Read ``N`` or ``MIN:MAX`` into (min, max); raises UsageError."""
    return parse_nnodes(nnodes)


def determine_local_world_size(nproc_per_node: str) -> int:
    """How many workers ``--nproc-per-node`` stands for on this host; raises UsageError."""
    return local_world_size(nproc_per_node, environment())


def config_from_args(args: argparse.Namespace) -> tuple[LaunchConfig, Callable[..., Any] | str, list[str]]:
    """What a parsed command line stands for: settings, command, and the command's arguments.

    Raises:
        UsageError: options contradict each other, or the script cannot be run.
    """
    environ = environment()
    command = _command(args, environ)
    min_nodes, max_nodes = parse_nnodes(args.nnodes)
    if args.node_rank >= max_nodes:
        raise UsageError(f"--node-rank={args.node_rank}: must be below the number of nodes, {max_nodes}")
    given = getattr(args, "given", {"master_addr"} | ({"node_rank"} if args.node_rank else set()))
    if args.rdzv_backend == "static" and max_nodes > 1 and not (args.rdzv_endpoint or "master_addr" in given):
        raise UsageError(
            f"--nnodes={args.nnodes}: several nodes need a place to meet: pass --rdzv-backend c10d --rdzv-endpoint "
            "HOST:PORT, where HOST is one of them; or --master-addr with the address of the node with --node-rank 0"
        )
    pinned = args.rdzv_backend == "static" or "node_rank" in given
    config = LaunchConfig(
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        nproc_per_node=determine_local_world_size(args.nproc_per_node),
        logs_specs=_logs_specs(args),
        run_id="" if args.standalone or args.rdzv_id == "none" else args.rdzv_id,
        role=args.role,
        rdzv_endpoint="" if args.standalone else args.rdzv_endpoint or _static_endpoint(args),
        rdzv_backend="c10d" if args.standalone else args.rdzv_backend,
        rdzv_configs={**parse_rdzv_conf(args.rdzv_conf), **({"rank": args.node_rank} if pinned else {})},
        max_restarts=args.max_restarts,
        monitor_interval=args.monitor_interval,
        start_method=args.start_method,
        log_line_prefix_template=environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
        local_addr=args.local_addr,
        event_log_handler=args.event_log_handler,
        numa_options=args.numa_binding,
        signals_to_handle=args.signals_to_handle,
        duplicate_stdout_filters=args.duplicate_stdout_filters,
        duplicate_stderr_filters=args.duplicate_stderr_filters,
        virtual_local_rank=args.virtual_local_rank,
        shutdown_timeout=args.shutdown_timeout,
        preload=args.preload,
        restart_window=args.restart_window,
        restart_backoff=args.restart_backoff,
        fatal_exit_codes=args.fatal_exit_codes,
        node_failure_limit=args.node_failure_limit,
        crash_loop=args.crash_loop,
        verbosity=Level.WARNING if args.quiet else Level.DEBUG if args.verbose else Level.INFO,
    )
    return config, *command


def run(args: argparse.Namespace) -> None:
    """Run a parsed command line; see ``main``."""
    config, command, command_args = config_from_args(args)
    elastic_launch(config, command)(*command_args)


def _logs_specs(args: argparse.Namespace) -> LogsSpecs:
    """What decides where output goes.

    Raises:
        LaunchError: an installed package's class cannot be had.
    """
    create = _logs_specs_class(args.logs_specs)
    # torch's classes, and what derives from them, ask whether a value is torch's Std. Then torch is there already.
    torchs: Any = sys.modules.get("torch.distributed.elastic.multiprocessing.api")
    std = torchs.Std if torchs and isinstance(create, type) and issubclass(create, torchs.LogsSpecs) else Std
    streams = {
        name: {rank: std(int(each)) for rank, each in value.items()} if isinstance(value, dict) else std(int(value))
        for name, value in (("redirects", Std.from_str(args.redirects)), ("tee", Std.from_str(args.tee)))
    }
    try:
        return create(log_dir=args.log_dir, local_ranks_filter=parse_ranks(args.local_ranks_filter), **streams)
    except Exception as error:
        name = getattr(create, "__qualname__", repr(create))
        raise LaunchError(f"--logs-specs={args.logs_specs}: {name}: {type(error).__name__}: {error}") from error


def _logs_specs_class(name: str | None) -> Callable[..., LogsSpecs]:
    """The launcher's own class, or an installed package's."""
    if name in (None, "default"):  # torch's own has that name, too
        return DefaultLogsSpecs
    from importlib.metadata import entry_points  # late: 20 ms, and only for plug-ins

    for entry_point in entry_points(group=LOGS_SPECS, name=name):
        try:
            return entry_point.load()  # type: ignore[no-any-return]
        except Exception as error:
            raise LaunchError(
                f"--logs-specs={name}: {entry_point.value} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    known = ", ".join(sorted({"default", *entry_points(group=LOGS_SPECS).names}))
    raise UsageError(f"--logs-specs={name}: no such entry point in the group {LOGS_SPECS}; there is {known}")


def _static_endpoint(args: argparse.Namespace) -> str:
    if args.rdzv_backend != "static":
        return ""
    host = f"[{args.master_addr}]" if ":" in args.master_addr and "[" not in args.master_addr else args.master_addr
    return f"{host}:{args.master_port or 0}"


def _command(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """What each worker executes."""
    script, script_args = args.training_script, args.training_script_args
    if args.module and (args.no_python or args.run_path):
        raise UsageError("-m/--module together with --no-python or --run-path: choose one of them")
    if args.preload and (args.no_python or args.training_script == "-" or "PYTHON_EXEC" in environ):
        with_ = "--no-python" if args.no_python else "PYTHON_EXEC" if "PYTHON_EXEC" in environ else "a script on stdin"
        raise UsageError(f"--preload together with {with_}: workers are forked from a Python that has the modules")
    if args.no_python and not args.run_path:
        _check_program("--no-python ", script)
        return script, script_args
    python = sys.executable
    if "PYTHON_EXEC" in environ and not args.run_path:
        python = environ["PYTHON_EXEC"]
        _check_program("PYTHON_EXEC=", python)
    if script == "-" and not args.module:
        return python, ["-u", "-", *script_args]  # a program on standard input: nothing for the bootstrap to find
    if not args.module:
        _check_script(script)
    return python, ["-u", BOOTSTRAP, "module" if args.module else "script", script, *script_args]


def _check_program(option: str, program: str) -> None:
    import shutil  # late: 3 ms

    if shutil.which(program) is None:
        raise UsageError(f"{option}{program}: no such program, or not executable")


def _check_script(script: str) -> None:
    """Complain once here rather than once per worker, and restart, there."""
    if not os.path.exists(script):
        hint = "; for a module, pass -m" if not script.endswith(".py") and os.sep not in script else ""
        raise UsageError(f"script {script}: no such file{hint}")
    if os.path.isdir(script) and not os.path.exists(os.path.join(script, "__main__.py")):
        raise UsageError(f"script {script}: a directory without a __main__.py")
    if not os.access(script, os.R_OK):
        raise UsageError(f"script {script}: not readable by this user")


if __name__ == "__main__":  # python -m elastic_launch.run, as people write python -m torch.distributed.run
    from elastic_launch.cli.main import console

    console()
