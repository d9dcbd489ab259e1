"""Where the agents of a user have their control sockets on this host: one private directory, one socket for each.

Nobody else may look into the directory, so nobody else can connect, or put a socket of their own in the way.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping

from elastic_launch.errors import UnavailableError

SUFFIX = ".sock"
"""What the names of sockets end with."""
_MAX_PATH = 107
"""Bytes that the path of a Unix socket may have."""
_MAX_ID = 40
"""Characters of a job's id in the name of its socket. The name need not tell it: the agent does."""


def directory(environ: Mapping[str, str]) -> str:
    """Return the path of the directory: below ``XDG_RUNTIME_DIR`` if that is this user's, else a temporary one.

    Args:
        environ: ``XDG_RUNTIME_DIR`` and ``TMPDIR`` are looked up here.
    """
    if run := environ.get("XDG_RUNTIME_DIR"):
        with contextlib.suppress(OSError):
            if os.stat(run).st_uid == os.geteuid():
                return os.path.join(run, "elastic-run")
    return os.path.join(_temporary(environ), f"elastic-run-{os.geteuid()}")


def everybodys(environ: Mapping[str, str]) -> list[tuple[str, int]]:
    """Return the directories whose sockets this user may reach, each with the uid of its owner: root's are all.

    Args:
        environ: as for ``directory``; of others, their usual directories are known.
    """
    own = [(path, os.geteuid()) for path in own_directories(environ)]
    if os.geteuid() != 0:
        return own
    found: list[tuple[str, int]] = []
    for folder, prefix, below in (("/run/user", "", "/elastic-run"), (_temporary(environ), "elastic-run-", "")):
        with contextlib.suppress(OSError):
            uids = [name.removeprefix(prefix) for name in sorted(os.listdir(folder)) if name.startswith(prefix)]
            found += ((f"{folder}/{prefix}{uid}{below}", int(uid)) for uid in uids if uid.isdecimal())
    return list(dict.fromkeys(own + found))


def own_directories(environ: Mapping[str, str]) -> list[str]:
    """Return the directories of this user; agents may have been started without ``XDG_RUNTIME_DIR``."""
    without = {name: value for name, value in environ.items() if name != "XDG_RUNTIME_DIR"}
    return list(dict.fromkeys((directory(environ), directory(without))))


def _temporary(environ: Mapping[str, str]) -> str:
    return environ.get("TMPDIR") or "/tmp"


def check(path: str, owner: int) -> None:
    """Check that a directory is private.

    Args:
        path: the directory.
        owner: uid of the user whose it must be.

    Raises:
        UnavailableError: it is another user's, open to others, or no directory.
        OSError: it does not exist, or cannot be looked at.
    """
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise UnavailableError(f"{path}: must be a directory; remove it")
    if found.st_uid != owner:
        raise UnavailableError(f"{path}: belongs to another user (uid {found.st_uid}); set XDG_RUNTIME_DIR or TMPDIR")
    if found.st_mode & 0o077:
        raise UnavailableError(f"{path}: is open to other users; run chmod 700 on it, or remove it")


def make(path: str) -> None:
    """Make the directory, unless it exists.

    Raises:
        UnavailableError: it cannot be made, or what is there is not private.
    """
    try:
        for _ in range(3):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            # It may be gone again: an agent that had the last socket there has just removed it.
            with contextlib.suppress(FileNotFoundError):
                check(path, os.geteuid())
                return
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}; set XDG_RUNTIME_DIR or TMPDIR to another place") from error
    raise UnavailableError(f"{path}: is removed again and again")


def socket_name(run_id: str) -> str:
    """Return a name for the socket of an agent of this process, as in ``my-job.4711.6f9d1a.sock``.

    A program may run several agents, and containers that share the directory may have equal pids.
    """
    readable = "".join(c if (c.isascii() and c.isalnum()) or c in "-_" else "_" for c in run_id[:_MAX_ID])
    return f"{readable}.{os.getpid()}.{os.urandom(3).hex()}{SUFFIX}"


@contextlib.contextmanager
def address(path: str) -> Iterator[str]:
    """Yield a path by which a socket can be bound or reached although ``path`` may be too long for that."""
    if len(os.fsencode(path)) <= _MAX_PATH:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)
