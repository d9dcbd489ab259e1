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

__all__ = [
    "config_from_args",
    "determine_local_world_size",
    "get_args_parser",
    "main",
    "parse_args",
    "parse_min_max_nnodes",
    "run",
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


if __name__ == "__main__":
    console()
