"""Layer 2: the agent's hand on its health server (``server_main``): bind its port, start it, answer it, end it.

May start one process; decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Collection, Mapping

from elastic_launch.core.agent.messages import AgentEvent
from elastic_launch.env import as_part
from elastic_launch.errors import UnavailableError

VARIABLE = "TORCHELASTIC_HEALTH_CHECK_PORT"
CLOSE_PATIENCE = 2.0
"""Seconds to wait for the end of a process that was killed."""
SHORT_LIFE = 10.0
"""Seconds; a process that ended sooner will probably do so again."""
MOST_SHORT_LIVES = 5
"""In a row, then nobody serves the port any more."""
BACKLOG = 1024
"""Clients that may wait for the process to start."""

_FOLDER = os.path.dirname(__file__)
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); import server_main; server_main.main(*map(int, sys.argv[2:]))"


class HealthServer:
    """A health server, as a source of the agent's loop; it has no events. ``port`` is what it serves."""

    def __init__(self, port: int, environ: Mapping[str, str]) -> None:
        """Bind the port on all addresses, and start the process; clients that come before it serves are queued.

        Args:
            port: the port; 0 picks a free one.
            environ: the process's environment.

        Raises:
            UnavailableError: the port is in use, or the system cannot start the process.
        """
        try:
            self._listening = _listen(port)
        except OSError as error:
            what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
            raise UnavailableError(
                f"{VARIABLE}={port}: port {port} {what}; choose another (each launcher on this host needs its own), "
                "or unset the variable"
            ) from error
        self.port: int = self._listening.getsockname()[1]
        self._environ = environ
        self._short_lives = 0
        self._resources = contextlib.ExitStack()
        try:
            self._start()
        except OSError as error:
            self._listening.close()
            raise UnavailableError(f"cannot start the process that serves {VARIABLE}={port}: {error}") from error

    def fileno(self) -> int:
        """Readable when ``answer()`` has something to do; another descriptor after the process was lost."""
        return self._sock.fileno()

    def descriptors(self) -> list[tuple[int, int]]:
        """What to wait for: a descriptor and its poll mask."""
        return [(self.fileno(), select.POLLIN)]

    def deadline(self) -> None:
        """Nothing is ever due: while nobody asks, nobody wakes up."""

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Answer, if there is anything to answer."""
        if self.fileno() in ready:
            self.answer()
        return []

    def answer(self) -> None:
        """Tell the process that the agent's loop turns; start another where it is gone. Never blocks."""
        with contextlib.suppress(BlockingIOError):
            try:
                if self._sock.recv(64):
                    self._sock.send(b"!")
                    return
            except ConnectionError:
                pass
            self._start_another()

    def close(self) -> None:
        """End the process, and let go of the port."""
        self._resources.close()
        self._listening.close()

    def _start(self) -> None:
        """Start the process.

        Raises:
            OSError: the system cannot.
        """
        with contextlib.ExitStack() as stack:
            self._sock, theirs = socket.socketpair()
            stack.callback(self._sock.close)
            self._sock.setblocking(False)
            with theirs, open(os.pidfd_open(os.getpid()), "rb") as agent:
                inherited = (self._listening.fileno(), theirs.fileno(), agent.fileno())
                pid = os.posix_spawn(
                    sys.executable,
                    [sys.executable, "-I", "-S", "-c", _PROGRAM, _FOLDER, *map(str, inherited)],
                    as_part(self._environ),
                    file_actions=[
                        # Duplicated onto themselves, descriptors lose close-on-exec in the child only.
                        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited),
                        *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)),
                    ],
                    setsid=True,
                    setsigmask=signal.valid_signals(),
                )
            process = stack.enter_context(open(os.pidfd_open(pid), "rb"))
            stack.callback(_end, pid, process.fileno())
            self._started = time.monotonic()
            self._resources = stack.pop_all()

    def _start_another(self) -> None:
        """The process is gone: start another, unless that has not helped before."""
        self._resources.close()
        self._short_lives = self._short_lives + 1 if time.monotonic() - self._started < SHORT_LIFE else 0
        if self._short_lives < MOST_SHORT_LIVES:
            with contextlib.suppress(OSError):
                self._start()
                return
        # Refuse clients, and be a descriptor that stays silent.
        self._listening.close()
        self._sock, other = socket.socketpair()
        self._resources.callback(self._sock.close)
        self._resources.callback(other.close)


def _listen(port: int) -> socket.socket:
    """Listen on a port, on every address of this host, IPv6 and IPv4. Raises OSError.

    Without blocking: a client may have gone before the process gets to it.
    """
    if socket.has_dualstack_ipv6():
        try:
            sock = socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            sock = socket.create_server(("", port), backlog=BACKLOG)  # no IPv6 on this host
    else:
        sock = socket.create_server(("", port), backlog=BACKLOG)
    sock.setblocking(False)
    return sock


def _end(pid: int, process: int) -> None:
    """Kill the process, by its pidfd, and collect it: it holds nothing that is worth a farewell."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
    poller = select.poll()
    poller.register(process, select.POLLIN)
    if poller.poll(CLOSE_PATIENCE * 1000):
        with contextlib.suppress(ChildProcessError):  # somebody else in this program may wait for all children
            os.waitpid(pid, os.WNOHANG)
