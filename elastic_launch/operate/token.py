"""``elastic-job token``: make a file with a token for a job."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from elastic_launch.env import TOKEN_FILE
from elastic_launch.host import token

DEFAULT = "job.token"


def main(argv: Sequence[str]) -> int:
    """Make the file, and say how to use it. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="elastic-job token", description="Make a file with a new token, which only you can read."
    )
    parser.add_argument("file", nargs="?", metavar="FILE", default=DEFAULT, help=f"default: {DEFAULT}")
    path = parser.parse_args(argv).file
    token.write(path)
    print(f"{path}: a new token. Copy it to all nodes of one job, and give it to each of them:")
    print(f"  elastic-run --token-file {path} ...    (or {TOKEN_FILE}={path})")
    return 0
