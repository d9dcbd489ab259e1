"""The command line as Python functions, under the names of ``torch.distributed.run``.

``python -m elastic_launch.run`` is the same as ``elastic-run``.

>>> args = parse_args(["--nnodes", "1:4", "--max-restarts", "3", "train.py", "--epochs", "10"])
>>> args.nnodes, args.max_restarts, args.training_script, args.training_script_args
('1:4', 3, 'train.py', ['--epochs', '10'])
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from elastic_launch.cli.command import config_from_args, run
from elastic_launch.cli.main import console
from elastic_launch.cli.options import get_args_parser
from elastic_launch.env import environment
from elastic_launch.host.devices import local_world_size
from elastic_launch.parsing import parse_min_max_nnodes
from elastic_launch.utils import macros
from elastic_launch.workers.error_handler import record

__all__ = [
    "config_from_args",
    "determine_local_world_size",
    "get_args_parser",
    "get_rdzv_endpoint",
    "get_use_env",
    "macros",
    "main",
    "parse_args",
    "parse_min_max_nnodes",
    "record",
    "run",
    "run_script_path",
]


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line to the end of its job.

    Args:
        args: the words after the program's name; None for ``sys.argv[1:]``.

    Raises:
        ChildFailedError: workers failed; its text is the report.
        SignalException: a signal ended the job.
        UsageError: an option or a variable is wrong.
        LaunchError: the launcher could not do its work.
        SystemExit: with status 2 for a command line that cannot be parsed, and 0 after ``--help`` or ``--version``.
    """
    run(parse_args(args))


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line. Options that it lacks come from ``PET_`` variables and defaults.

    Args:
        args: the words after the program's name; None for ``sys.argv[1:]``.

    Raises:
        SystemExit: as for ``main``.
    """
    return get_args_parser().parse_args(args)


def determine_local_world_size(nproc_per_node: str) -> int:
    """Return the number of workers that ``--nproc-per-node`` stands for on this host.

    Args:
        nproc_per_node: a number, ``auto``, ``cpu``, ``gpu``, ``xpu`` or the name of another accelerator of torch.

    >>> determine_local_world_size("8")
    8

    Raises:
        UsageError: the text is none of these, or the host has no such device.
    """
    return local_world_size(nproc_per_node, environment())


def get_rdzv_endpoint(args: argparse.Namespace) -> str:
    """Return where nodes meet: ``--rdzv-endpoint``, or with the backend static the master's address and port.

    >>> get_rdzv_endpoint(parse_args(["--master-addr", "host-a", "--master-port", "29500", "train.py"]))
    'host-a:29500'
    """
    if args.rdzv_backend == "static" and not args.rdzv_endpoint:
        return f"{args.master_addr}:{args.master_port}"
    return str(args.rdzv_endpoint)


def get_use_env(args: argparse.Namespace) -> bool:
    """Return whether scripts learn their local rank from ``LOCAL_RANK`` only, and not from ``--local-rank`` as well."""
    return bool(getattr(args, "use_env", True))


def run_script_path(training_script: str, *training_script_args: str) -> None:
    """Run a script as ``__main__`` in this interpreter.

    Args:
        training_script: the path of the script.
        training_script_args: its arguments, which become ``sys.argv[1:]``.
    """
    import runpy
    import sys

    sys.argv = [training_script, *training_script_args]
    runpy.run_path(training_script, run_name="__main__")


if __name__ == "__main__":
    console()
