"""Files with the token of a job, which its nodes share and strangers must not know."""

from __future__ import annotations

import os

from elastic_launch.errors import UsageError
from elastic_launch.host.files import read_private

LEAST, MOST = 32, 1024
"""Bytes of a token."""
HINT = "elastic-job token makes one"


def read(path: str, option: str = "--token-file") -> bytes:
    """Return the token that a file holds, without the space around it. Only this user may read the file.

    Args:
        path: the file.
        option: the option that names it, for messages.

    Raises:
        UsageError: there is no such file, others could have written or read it, or it holds no token.
    """
    where = f"{option}={path}"
    try:
        token = read_private(path, 2 * MOST).strip()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        hint = f"; {HINT}" if isinstance(error, FileNotFoundError) else ""
        raise UsageError(f"{where}: {getattr(error, 'strerror', None) or error}{hint}") from error
    if not LEAST <= len(token) <= MOST:
        raise UsageError(f"{where}: must hold {LEAST} to {MOST} bytes; {HINT}")
    return token


def write(path: str) -> None:
    """Make a file with a new token, which only this user can read.

    Raises:
        UsageError: the file exists, or cannot be made.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w") as file:
                file.write(os.urandom(32).hex() + "\n")
        except OSError:
            os.unlink(path)  # an empty file would be in the way of the next try
            raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}; no token was written") from error
