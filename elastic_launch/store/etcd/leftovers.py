"""Temporary folders of etcd members. Each is locked while its member lives, so that those of dead ones can be removed.

A member removes its folder at its end. If its process was killed, too, the next one of the same user does that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time

from elastic_launch.store.etcd.plan import TEMPORARY

_LOCK = "lock"
_NAME = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]{12}")
_UNLOCKED_FOR = 3600.0
"""Seconds after which a folder without a lock is left over, and not one that is just being made."""


def make(folder: str) -> int:
    """Make a folder, and lock it.

    Returns:
        A descriptor that programs inherit; the lock is held as long as any of them has it open.

    Raises:
        OSError: It exists, or cannot be made.
    """
    os.mkdir(folder, 0o700)
    path = os.path.join(folder, _LOCK)
    descriptor = os.open(f"{path}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(f"{path}.new", path)  # under its name it is always locked
    os.set_inheritable(descriptor, True)
    return descriptor


def remove(parent: str) -> None:
    """Remove this user's folders in a directory whose members are dead. Ignores what it cannot remove."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_left(entry.path, entry.stat(follow_symlinks=False))


def _remove_if_left(folder: str, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        return
    try:
        descriptor = os.open(os.path.join(folder, _LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if time.time() > status.st_mtime + _UNLOCKED_FOR:
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if somebody uses the folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
