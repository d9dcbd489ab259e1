"""Layer 2: a process of the launcher's own beside the agent, and a socket to it: the bridge to etcd, its member."""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_launch.env import as_part
from elastic_launch.errors import RendezvousConnectionError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROGRAM = (
    # This copy of the package, and nothing else of its folder before what Python itself finds.
    "import sys; sys.path.insert(0, sys.argv[1]); import elastic_launch; sys.path.append(sys.path.pop(0));"
    "from elastic_launch.store.etcd import {0}; {0}.main(*map(int, sys.argv[2:]))"
)


class Child:
    """The process. It ends with this one, since it has a pidfd of it and the other end of the socket."""

    def __init__(self, module: str, flags: Sequence[str], environ: Mapping[str, str], told: Any, what: str) -> None:
        """Start it.

        Args:
            module: of this package, whose ``main`` it runs with the numbers of the socket and of the pidfd.
            flags: of its Python.
            environ: its variables.
            told: the first message, marshalled.
            what: it is, for an error.

        Raises:
            RendezvousConnectionError: the system cannot start a process.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, open(os.pidfd_open(os.getpid()), "rb") as agent:
                self._control.setblocking(False)
                inherited = (theirs.fileno(), agent.fileno())
                self.pid = os.posix_spawn(
                    sys.executable,
                    [sys.executable, *flags, "-c", _PROGRAM.format(module), _PACKAGE, *map(str, inherited)],
                    as_part(environ),
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                        # Duplicated onto themselves, descriptors lose close-on-exec in the child only.
                        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited),
                    ],
                    setsid=True,
                    setsigmask=signal.valid_signals(),
                )
            self._process = open(os.pidfd_open(self.pid), "rb")  # noqa: SIM115 - end() closes it
            with contextlib.suppress(BrokenPipeError):
                self._control.send(marshal.dumps(told))  # the first message: there is room
        except OSError as error:
            self._control.close()
            raise RendezvousConnectionError(f"cannot start {what}: {error}") from error

    def fileno(self) -> int:
        """The descriptor to wait on; -1 when closed."""
        return self._control.fileno()

    def has_ended(self, patience: float) -> bool:
        """Whether the process ends within so many seconds."""
        poller = select.poll()
        poller.register(self._process.fileno(), select.POLLIN)
        return bool(poller.poll(patience * 1000))

    def end(self, patience: float) -> None:
        """Close the socket, which tells the process to end; kill it after so many seconds; collect it."""
        if self._process.closed:
            return
        self._control.close()
        if not self.has_ended(patience):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process.fileno(), signal.SIGKILL)
            self.has_ended(patience)
        self._process.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
