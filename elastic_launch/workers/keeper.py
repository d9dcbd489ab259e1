"""Layer 2: the agent's hand on its keeper process (``keeper_main``): start it, send orders, read what it tells.

May start one process; decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from elastic_launch.env import PART
from elastic_launch.errors import UnavailableError
from elastic_launch.workers import keeper_main

CLOSE_PATIENCE = 2.0
"""Seconds to wait for a process that was killed, or for the keeper to kill what is left."""

Begin = Callable[[Mapping[str, str], tuple[int, ...]], int]
"""Starts a keeper's process with an environment and inherited descriptors (socket, agent's pidfd); returns its pid."""

_PADDING = 4096
"""Characters."""


_keepers: set[int] = set()
"""The keepers of this process that live."""


class KeeperLostError(Exception):
    """The keeper ended before it was told to."""


def execute(
    argv: Sequence[str], environ: Mapping[str, str], inherited: Sequence[int], unnamed: Sequence[int] = ()
) -> int:
    """Start a program for a keeper: argv and the numbers of what it inherits. Returns its pid; raises OSError."""
    return os.posix_spawn(
        argv[0],
        [*argv, *map(str, inherited)],
        environ,
        # Duplicated onto themselves, descriptors lose close-on-exec in the child only.
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (*inherited, *unnamed)],
        setsid=True,
        setsigmask=signal.valid_signals() - {signal.SIGCHLD},
    )


def execute_keeper(environ: Mapping[str, str], inherited: tuple[int, ...]) -> int:
    """Start the small keeper, which executes commands."""
    return execute(keeper_main.COMMAND, environ, inherited)


def preload_keeper(
    python: Sequence[str], modules: Sequence[str], kind: str, target: str, descriptors: Sequence[int] = ()
) -> Begin:
    """What starts a warm keeper, which imports modules and forks its workers.

    Args:
        python: the interpreter and its flags, ``-u`` among them.
        modules: what to import.
        kind: what the workers run: ``script``, ``module``, ``function``, or ``main``: a function, and its main module
            is imported, too.
        target: the script or module; for a function the number of the descriptor that tells how to prepare for it.
        descriptors: what the process inherits besides.
    """

    def begin(environ: Mapping[str, str], inherited: tuple[int, ...]) -> int:
        program = os.path.join(os.path.dirname(__file__), "preload_main.py")
        # The padding is room for the command lines that the workers show.
        argv = [*python, program, ",".join(modules), kind, target, " " * _PADDING]
        return execute(argv, environ, inherited, descriptors)

    return begin


class Keeper:
    """A keeper process. ``fileno()`` is readable when ``receive()`` has something to say."""

    def __init__(self, environ: Mapping[str, str], begin: Begin = execute_keeper) -> None:
        """Start the process. What it inherits, and ``environ``, its workers inherit.

        Raises:
            UnavailableError: the system cannot (no pidfd before Linux 5.3, no more processes).
        """
        self._buffer = bytearray()
        self._sock, theirs = socket.socketpair()
        try:
            with theirs, open(os.pidfd_open(os.getpid()), "rb") as agent:
                self.pid = begin(environ, (theirs.fileno(), agent.fileno()))
            _keepers.add(self.pid)
            self._process = open(os.pidfd_open(self.pid), "rb")  # noqa: SIM115 - close() closes it
        except OSError as error:
            self._sock.close()
            raise UnavailableError(f"cannot start the process that keeps the workers: {error}") from error

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._sock.fileno()

    def send(self, *message: Any, descriptors: Sequence[int] = ()) -> None:
        """Send an order, and descriptors with it; a keeper that is gone shows at the next ``receive``."""
        data = keeper_main.pack(message)
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(descriptors), keeper_main.MOST_DESCRIPTORS):
                # With each batch a byte of the message, which is longer than there are batches.
                socket.send_fds(self._sock, [data[:1]], descriptors[start : start + keeper_main.MOST_DESCRIPTORS])
                data = data[1:]
            self._sock.sendall(data)

    def receive(self) -> Iterable[tuple[Any, ...]]:
        """Read what has come.

        Raises:
            KeeperLostError: the keeper is gone.
        """
        try:
            data = self._sock.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            raise KeeperLostError
        self._buffer += data
        return list(keeper_main.unpack(self._buffer))

    def close(self) -> bool:
        """Have the keeper kill whatever is left, and wait for its end; kill it after ``CLOSE_PATIENCE``.

        Returns:
            Whether it did its work. If not, what was below it is this process's now.
        """
        if self._process.closed:
            return True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # forks of this process may have copies
        self._sock.close()
        with self._process as process:
            ended = _wait(process.fileno(), CLOSE_PATIENCE)
            if not ended:
                signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
                _wait(process.fileno(), CLOSE_PATIENCE)
        _keepers.discard(self.pid)
        return _reap(self.pid) and ended

    def kill(self) -> None:
        """Kill it; the next ``receive`` tells that it is lost."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process.fileno(), signal.SIGKILL)


@contextlib.contextmanager
def subreaper() -> Iterator[bool]:
    """Make this process the one that adopts what a keeper leaves when it is killed; afterwards as before.

    Yields whether the system lets it.
    """
    global _subreaper_users, _subreaper_before  # agents may run in several threads of a program
    with _subreaper_lock:
        if _subreaper_users == 0:
            _subreaper_before = keeper_main.get_subreaper()
        _subreaper_users += 1
        done = keeper_main.set_subreaper(True)
    try:
        yield done
    finally:
        with _subreaper_lock:
            _subreaper_users -= 1
            if _subreaper_users == 0:
                keeper_main.set_subreaper(_subreaper_before)


_subreaper_lock = threading.Lock()
_subreaper_users, _subreaper_before = 0, False


def has_children() -> bool:
    """Whether this process has a child, living or dead."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def bury_orphans(alone: bool, workers: Collection[int], run_id: str) -> None:
    """Kill what a lost keeper left to this process, its subreaper, and wait until it is gone.

    Args:
        alone: the process had no other child, and no thread that could have started one: all that it has is ours, but
            for other keepers and other parts of the launcher. Else ours are the workers, what is in their sessions,
            and what carries the job's variable.
        workers: the pids of the round's workers.
        run_id: the job's ``TORCHELASTIC_RUN_ID``.
    """
    mark = os.fsencode(f"TORCHELASTIC_RUN_ID={run_id}") + b"\0"
    ours = f"{PART}={os.getpid()}".encode() + b"\0"

    def is_orphan(pid: int) -> bool:
        environment = _environment_of(pid)
        if pid in _keepers or ours in environment:
            return False
        return alone or pid in workers or mark in environment or keeper_main.session_of(pid) in workers

    while has_children() and (
        orphans := [pid for pid in keeper_main.children_by_parent().get(os.getpid(), ()) if is_orphan(pid)]
    ):
        for orphan in orphans:
            for pid in (orphan, *keeper_main.descendants(orphan)):
                keeper_main.kill(pid, signal.SIGKILL)
        for orphan in orphans:
            with contextlib.suppress(OSError), open(os.pidfd_open(orphan), "rb") as process:
                if not _wait(process.fileno(), CLOSE_PATIENCE):
                    return  # state D: nothing helps
            _reap(orphan)


def _environment_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read() + b"\0"
    except OSError:
        return b""


def _wait(process: int, seconds: float) -> bool:
    """Wait for the end of a process, by its pidfd. Returns whether it has ended."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _reap(pid: int) -> bool:
    """Collect a child. Returns whether it ended with status 0, as far as is known: others may wait for all children."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (pid, 0)
    except ChildProcessError:
        return True
