"""The command line of ``torch.distributed.launch``, which was before torchrun: ``python -m elastic_launch.legacy``.

It is that of ``elastic-run``, but scripts get their local rank as an argument, ``--local-rank=0``, unless ``--use-env``
is given. (``elastic_launch.launch`` is part of the Python interface.)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from elastic_launch.cli.command import run
from elastic_launch.cli.main import console
from elastic_launch.cli.options import get_args_parser


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line.

    Args:
        args: the words after the program's name; None for ``sys.argv[1:]``.

    >>> parse_args(["--use-env", "train.py"]).use_env
    True

    Raises:
        SystemExit: with status 2 for a command line that cannot be parsed, and 0 after ``--help`` or ``--version``.
    """
    parser = get_args_parser()
    text = "do not pass --local-rank to the scripts, which find LOCAL_RANK in the environment"
    parser.add_argument("--use-env", "--use_env", action="store_true", help=text)
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line to the end of its job; see ``elastic_launch.run.main``."""
    run(parse_args(args))


if __name__ == "__main__":
    console(parse_args)
