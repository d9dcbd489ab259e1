"""The agent's side of its bridge to etcd (``bridge_main``): reads the settings, starts the process, makes connections.

No gRPC and no thread here: these are in the bridge's process.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Mapping
from typing import Any

from elastic_launch.core.text import visible
from elastic_launch.errors import RendezvousConnectionError, UsageError
from elastic_launch.host.child import Child
from elastic_launch.parsing import parse_seconds

CLOSE_PATIENCE = 2.0
"""Seconds that the bridge has to complete the last requests and to end; then it is killed."""

DEFAULT_PORT = 2379
READ_TIMEOUT = 60.0
"""Seconds for a call to etcd, including all attempts; the same default as torch's."""

_NAMES = {
    "protocol": ("protocol",),
    "cacert": ("cacert", "ca_cert"),
    "cert": ("cert", "ssl_cert"),
    "key": ("key", "ssl_cert_key"),
    "user": ("user", "username"),
    "password": ("password",),
    "read_timeout": ("read_timeout",),
    "start_timeout": ("start_timeout",),
    "cluster_id": ("cluster_id",),
}
"""The names of each setting in ``--rdzv-conf``; torch's backends etcd and etcd-v2 have names of their own."""


class EtcdBridge(Child):
    """A bridge process. ``fileno()`` is readable when ``take()`` has something to report: the bridge has ended."""

    def __init__(self, endpoints: str, prefix: str, conf: Mapping[str, str], environ: Mapping[str, str]) -> None:
        """Start the process. It connects to etcd by itself; ``take()`` reports if it cannot.

        Args:
            endpoints: ``HOST:PORT`` of etcd members, separated by commas; the default port is 2379.
            prefix: The beginning of all keys in etcd. Bridges with the same prefix share their keys and a lease.
            conf: Settings of ``--rdzv-conf``; others are ignored. protocol (http or https), cacert, cert, key (files),
                user, password, read_timeout (seconds for a call; 60), start_timeout (the same until etcd has answered
                once), cluster_id (only members of this cluster are used; any).
            environ: Environment variables of the process.

        Raises:
            UsageError: A setting is wrong, or its file cannot be read.
            UnavailableError: The system cannot start the process.
        """
        self.where = f"etcd at {endpoints}"
        """The name of the store in messages."""
        message = {"prefix": prefix, "path": list(map(str, sys.path)), **parse_settings(endpoints, conf)}
        module = "elastic_launch.store.etcd.bridge_main"
        super().__init__("the bridge to etcd", "elastic-etcd", module, environ, flags=["-I"], message=message)

    def connect(self) -> socket.socket:
        """Make a connection that speaks TCPStore's protocol, and never blocks. Its requests wait for the bridge.

        If the bridge has ended, the connection is closed at once, and ``take()`` reports the cause.

        Raises:
            RendezvousConnectionError: There are no more descriptors, or the bridge does not accept the connection.
        """
        try:
            ours, theirs = socket.socketpair()
            with theirs, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.control.settimeout(CLOSE_PATIENCE)  # the socket holds a few hundred while the bridge starts
                socket.send_fds(self.control, [b"+"], [theirs.fileno()])
        except OSError as error:
            raise RendezvousConnectionError(f"cannot connect to the bridge to etcd: {error}") from error
        finally:
            self.control.setblocking(False)
        ours.setblocking(False)
        return ours

    def take(self) -> None:
        """Check whether the bridge still serves.

        Raises:
            RendezvousConnectionError: The bridge has ended; the message says why. ``close()`` is still necessary.
        """
        try:
            text = self.control.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            text = b""
        if text:
            raise RendezvousConnectionError(visible(text.decode(errors="replace")))  # with etcd's own words
        how = self.how_it_ended()
        raise RendezvousConnectionError(f"{self.where}: the bridge process (pid {self.pid}) ended: {how}")

    def close(self) -> None:
        """Have the bridge complete all requests, and end. That is quickest if its connections are closed."""
        self.end(CLOSE_PATIENCE)


def given_settings(conf: Mapping[str, str]) -> dict[str, str]:
    """The settings of ``--rdzv-conf`` that are for the connection to etcd, under one name each."""
    return {name: conf[key] for name, keys in _NAMES.items() for key in keys if conf.get(key)}


def parse_settings(endpoints: str, conf: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ``cluster.EtcdSettings``.

    Raises:
        UsageError: A setting is wrong, or its file cannot be read.
    """
    given = given_settings(conf)
    files = {name: _read_file(name, given[name]) if name in given else None for name in ("cacert", "cert", "key")}
    if (files["cert"] is None) != (files["key"] is None):
        raise UsageError("--rdzv-conf has one of cert and key; a client certificate needs both")
    protocol = given.get("protocol", "https" if any(files.values()) else "http").strip().lower()
    if protocol not in ("http", "https"):
        raise UsageError(f"--rdzv-conf protocol={protocol}: must be http or https")
    if ("user" in given) != ("password" in given):
        raise UsageError("--rdzv-conf has one of user and password; etcd needs both")
    seconds = _seconds("read_timeout", given.get("read_timeout", str(READ_TIMEOUT)))
    members = [endpoint for entry in endpoints.split(",") if (endpoint := entry.strip())]
    if not members:
        raise UsageError("no endpoint of etcd: pass --rdzv-endpoint HOST:PORT, or several separated by commas")
    return {
        "endpoints": tuple(f"{m}:{DEFAULT_PORT}" if ":" not in m.rpartition("]")[2] else m for m in members),
        "secure": protocol == "https",
        **files,
        "user": given.get("user"),
        "password": given.get("password"),
        "read_timeout": seconds,
        "start_timeout": _seconds("start_timeout", given.get("start_timeout", str(seconds))),
        "cluster_id": int(given.get("cluster_id", "0")),
    }


def _seconds(name: str, text: str) -> float:
    return parse_seconds(text, f"--rdzv-conf {name}=", above_zero=True)


def _read_file(name: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"--rdzv-conf {name}={path}: {error.strerror}") from error
