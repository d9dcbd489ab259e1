"""The agent's side of the process that serves torch's TCPStore (``tcpstore_server_main``): starts, watches, ends it."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Mapping

from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host.child import Child


class TCPStoreServer(Child):
    """The process. ``fileno()`` is readable when ``take()`` has something to report."""

    def __init__(self, listening: socket.socket, environ: Mapping[str, str]) -> None:
        """Start the process. It takes about half a second until it serves.

        Args:
            listening: The socket to serve, from ``ports.listen``. It is closed here and belongs to the process, so that
                clients are refused when the process ends, instead of being queued in vain.
            environ: Environment variables of the process; its Python must find torch with them.

        Raises:
            UnavailableError: The system cannot start the process.
        """
        self.ready = False
        """Whether the store serves."""
        self.port: int = listening.getsockname()[1]
        with listening:
            super().__init__(
                "the process that serves the store",
                "elastic-store",
                "elastic_launch.store.tcpstore_server_main",
                _environment(environ),
                flags=["-P"],  # the working directory may hold a torch.py
                inherited=[listening.fileno()],
                keeps_output=True,
            )

    def take(self) -> bool:
        """Read what the process reports.

        Returns:
            Whether the store serves.

        Raises:
            RendezvousConnectionError: The process could not start the store, or has ended. The message says why.
        """
        try:
            data = self.control.recv(16)
        except BlockingIOError:
            return self.ready
        except ConnectionError:
            data = b""
        if not data:
            raise RendezvousConnectionError(self._why())
        self.ready = True
        return True

    def serve(self, listening: socket.socket) -> None:
        """Serve an additional, empty store, which replaces the additional one before.

        Args:
            listening: The socket to serve, from ``ports.listen``; it is closed here.
        """
        with listening, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # take() reports that
            socket.send_fds(self.control, [b"+"], [listening.fileno()])

    def close(self) -> None:
        """End the process, and the store with it. There is nothing to save."""
        self.end()

    def _why(self) -> str:
        """Why the process has ended, in a sentence."""
        how = self.how_it_ended()
        if self.ready:
            return (
                f"the process that served the store on port {self.port} is gone ({how}), and the store with it; unless "
                "somebody killed it, check whether this node has run out of memory"
            )
        last = self.last_line()
        if last.startswith(("ImportError", "ModuleNotFoundError")):
            return (
                f"the c10d store needs torch 2.5 or later, which {sys.executable} cannot import ({last}); "
                "install torch, or use --rdzv-backend etcd"
            )
        return f"the process that serves the store on port {self.port} could not start it ({how}): {last}".rstrip(": ")


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that torch's server needs.

    It looks up the name of every client's address, on the thread that serves all clients. If a name server loses
    replies, each lookup takes 5 s. (torch 2.13 stops after the first failed lookup, but not after a slow one.) With
    ``attempts:0`` glibc asks no name server, and reads only the hosts file. Other services in nsswitch.conf, such as
    systemd-resolved and sssd, ignore this option.
    """
    return {
        **environ,
        "RES_OPTIONS": f"{environ.get('RES_OPTIONS', '')} attempts:0".strip(),
        "OMP_NUM_THREADS": "1",  # no thread pool
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # no search for devices
    }
