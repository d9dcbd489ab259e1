"""Open files in directories in which another user may have planted something, and find such directories.

Also says what the host lacks for that: /proc, or descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from elastic_launch.errors import UnavailableError

NOBODY = 65534
"""The owner that root's files have on a file system that does not trust the roots of its clients."""


@contextlib.contextmanager
def usable_host() -> Iterator[None]:
    """A block, or a function, that needs /proc and as many descriptors as it opens.

    Raises:
        UnavailableError: the system does not grant them.
    """
    if not os.path.exists("/proc/self"):
        raise UnavailableError("/proc is not mounted: the launcher looks at its processes there; mount it")
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        import resource  # late, like all that only errors need

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UnavailableError(
            f"{error.strerror or error}: this process may have {limit} (`ulimit -n`); allow more, about 32 plus 6 for "
            "each worker"
        ) from error


def open_regular(path: str, flags: int) -> int:
    """Open a regular file; an ``opener`` for ``open``.

    A pipe could make this process wait, and a link could lead it elsewhere. A file that is to be truncated is, but not
    before it is known to be one.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    safe = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, (flags & ~os.O_TRUNC) | safe, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    if flags & os.O_TRUNC:
        os.ftruncate(fd, 0)
    return fd


def without_waiting(path: str, flags: int) -> int:
    """Open what the user has named, even if it is a pipe that nobody writes to; an ``opener`` for ``open``."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def read_private(path: str, limit: int) -> bytes:
    """Return what a file holds that only this user may read or write, such as a password.

    A link is followed, as in the volumes of Kubernetes: what counts is whose the file is.

    Args:
        path: the file.
        limit: most bytes that it may have.

    Raises:
        OSError: it cannot be read, belongs to another user, may be used by others, is too long, or not a regular file.
            ``strerror`` says which of these.
    """
    with open(path, "rb", opener=without_waiting) as file:
        status = os.fstat(file.fileno())
        why = ""
        if not stat.S_ISREG(status.st_mode):
            why = "not a regular file"
        elif status.st_uid not in (os.geteuid(), 0):
            why = "belongs to another user"
        elif status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            why = f"other users may use it (mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 {path}"
        elif len(data := file.read(limit + 1)) > limit:
            why = f"longer than {limit} bytes"
        else:
            return data
    raise OSError(errno.EPERM, why, path)


def belongs_to_another(path: str) -> str:
    """Return the part of an absolute path that another user has put where everybody may write; empty: there is none.

    Its owner decides what is below it. Parts that do not exist yet do not count.
    """
    for part in _parts(path):
        if _is_open_to_all(os.path.dirname(part)) and _owner(part) not in (os.geteuid(), 0, NOBODY, None):
            return part
    return ""


def replaceable_part(path: str) -> str:
    """Return the directory above an absolute path whose entries every user may rename and remove; empty: none is."""
    return next((part for part in map(os.path.dirname, _parts(path)) if _is_open_to_all(part, sticky=False)), "")


def _parts(path: str) -> list[str]:
    """Return a path and what is above it, without the root."""
    parts = [path]
    while (above := os.path.dirname(parts[-1])) != parts[-1]:
        parts.append(above)
    return parts[:-1]


def _owner(path: str) -> int | None:
    try:
        return os.lstat(path).st_uid
    except OSError:
        return None


def _is_open_to_all(path: str, *, sticky: bool = True) -> bool:
    """Whether all users may write to a directory, including or excluding those where each may change only his own."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return bool(mode & stat.S_IWOTH) and (sticky or not mode & stat.S_ISVTX)
