"""Files with the token of a job, which its nodes share and strangers must not know."""

from __future__ import annotations

import os
import stat

from elastic_launch.errors import UsageError

LEAST, MOST = 32, 1024
"""Bytes of a token."""
HINT = "elastic-job token makes one"


def read(path: str, option: str = "--token-file") -> bytes:
    """Return the token that a file holds, without the space around it.

    A link is followed, as in the volumes of Kubernetes: what counts is whose the file is, and who may read it.

    Args:
        path: the file.
        option: the option that names it, for messages.

    Raises:
        UsageError: there is no such file, others could have written or read it, or it holds no token.
    """
    where = f"{option}={path}"
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            token = file.read(MOST + 1).strip() if stat.S_ISREG(status.st_mode) else b""
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise UsageError(f"{where}: {getattr(error, 'strerror', None) or error}; {HINT}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{where}: not a regular file")
    if status.st_uid not in (os.geteuid(), 0):
        raise UsageError(f"{where}: belongs to another user")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(status.st_mode)
        raise UsageError(f"{where}: other users may use it (mode {mode:04o}): chmod 600 {path}")
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
        with open(fd, "w") as file:
            file.write(os.urandom(32).hex() + "\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}; no token was written") from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # a pipe must not make this process wait
