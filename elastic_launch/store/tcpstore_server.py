"""Layer 2: the agent's side of the process that hosts the job's store, ``tcpstore_server_main``.

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
from collections.abc import Mapping

from elastic_launch.env import as_part
from elastic_launch.errors import RendezvousConnectionError, UnavailableError, how_it_ended

BACKLOG = 4096
"""Clients that may connect before the store serves; Linux's own limit (net.core.somaxconn) is the same by default."""
CLOSE_PATIENCE = 2.0
"""Seconds to wait for the end of a process that was killed."""

_FOLDER = os.path.dirname(__file__)
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); import tcpstore_server_main as main; main.main(*map(int, sys.argv[2:]))"
)


def bind_endpoint(port: int) -> socket.socket:
    """Listen on a port, on every address of this host, IPv6 and IPv4. From then on clients that connect are queued.

    Raises:
        OSError: EADDRINUSE where another process listens there, also one that did in the same moment; or what else.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port), backlog=BACKLOG)  # no IPv6 on this host


class StoreHost:
    """A process that serves the store. ``fileno()`` is readable when ``take()`` has something to say."""

    def __init__(self, listening: socket.socket, environ: Mapping[str, str]) -> None:
        """Start the process; it takes about two seconds until it serves.

        Args:
            listening: from ``bind_endpoint``. It is the process's from now on, and closed here: when the process ends,
                clients are refused, and not queued for nobody.
            environ: the process's environment; torch must be importable in it.

        Raises:
            UnavailableError: the system cannot (no pidfd before Linux 5.3, no more processes).
        """
        self.ready = False
        """Whether the store serves."""
        self.port: int = listening.getsockname()[1]
        self._status: int | None = None
        with contextlib.ExitStack() as on_error, listening:
            try:
                self._output = on_error.enter_context(open(os.memfd_create("store-host"), "rb"))
                self._sock, theirs = socket.socketpair()
                on_error.callback(self._sock.close)
                with theirs, open(os.pidfd_open(os.getpid()), "rb") as agent:
                    self._sock.setblocking(False)
                    inherited = (listening.fileno(), theirs.fileno(), agent.fileno())
                    arguments = (inherited[0], self.port, *inherited[1:])
                    self.pid = os.posix_spawn(
                        sys.executable,
                        # -P: the user's directory may hold a torch.py.
                        [sys.executable, "-P", "-c", _PROGRAM, _FOLDER, *map(str, arguments)],
                        as_part(_environment(environ)),
                        file_actions=[
                            # Duplicated onto themselves, descriptors lose close-on-exec in the child only.
                            *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited),
                            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                            (os.POSIX_SPAWN_DUP2, self._output.fileno(), 1),
                            (os.POSIX_SPAWN_DUP2, self._output.fileno(), 2),
                        ],
                        setsid=True,
                        setsigmask=signal.valid_signals(),
                    )
                self._process = open(os.pidfd_open(self.pid), "rb")  # noqa: SIM115 - close() closes it
            except OSError as error:
                raise UnavailableError(f"cannot start the process that hosts the store: {error}") from error
            on_error.pop_all()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._sock.fileno()

    def take(self) -> bool:
        """Hear what the process has to say.

        Returns:
            Whether the store serves.

        Raises:
            RendezvousConnectionError: the process could not start the store, or has ended.
        """
        try:
            data = self._sock.recv(16)
        except BlockingIOError:
            return self.ready
        except ConnectionError:
            data = b""
        if not data:
            raise RendezvousConnectionError(self._why())
        self.ready = True
        return True

    def serve(self, listening: socket.socket) -> None:
        """Have the process serve a further, empty store, in place of the further one before.

        Args:
            listening: from ``bind_endpoint``; closed here.
        """
        with listening, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # take() tells of that
            socket.send_fds(self._sock, [b"+"], [listening.fileno()])

    def close(self) -> None:
        """End the process, and the store with it: it holds nothing that is worth a farewell."""
        if not self._process.closed:
            with self._process, self._output, self._sock:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._process.fileno(), signal.SIGKILL)
                self._reap()

    def _why(self) -> str:
        """What ended the process, in a sentence."""
        self._reap()
        how = how_it_ended(os.waitstatus_to_exitcode(self._status)) if self._status is not None else "it has ended"
        if self.ready:
            return (
                f"the process that hosted the store on port {self.port} is gone ({how}), and the store with it; if "
                "nobody killed it, see whether this node has run out of memory"
            )
        self._output.seek(0)  # the offset is shared with the process
        last = self._output.read().decode(errors="replace").strip().rpartition("\n")[2]
        if last.startswith(("ImportError", "ModuleNotFoundError")):
            return (
                f"the c10d store needs torch, 2.5 or later, which {sys.executable} cannot import ({last}); "
                "install torch, or use --rdzv-backend etcd"
            )
        return f"the process that hosts the store on port {self.port} could not start it ({how}): {last}".rstrip(": ")

    def _reap(self) -> None:
        """Wait for the end of the process, and collect it, unless that is done."""
        poller = select.poll()
        poller.register(self._process, select.POLLIN)
        if self._status is None and poller.poll(CLOSE_PATIENCE * 1000):
            # Somebody else in this program may wait for all children.
            with contextlib.suppress(ChildProcessError):
                self._status = os.waitpid(self.pid, os.WNOHANG)[1]


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which torch's server works.

    For every client that connects it asks for the name of its address, on the thread that serves all others: where a
    name server loses answers, that is 5 s for each that is lost (torch 2.13 stops asking after the first failure, not
    after the first delay). With ``attempts:0`` glibc asks no name server, and answers from the hosts file alone. What
    else the system's nsswitch.conf may name (systemd-resolved, sssd) knows nothing of this option.
    """
    return {
        **environ,
        "RES_OPTIONS": f"{environ.get('RES_OPTIONS', '')} attempts:0".strip(),
        "OMP_NUM_THREADS": "1",  # no pool of threads that compute
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # nor anything that looks for devices
    }
