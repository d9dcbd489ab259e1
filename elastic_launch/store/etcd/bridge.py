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
from elastic_launch.host.files import read_private, without_waiting
from elastic_launch.parsing import parse_seconds

CLOSE_PATIENCE = 2.0
"""Seconds that the bridge has to complete the last requests and to end; then it is killed."""

DEFAULT_PORT = 2379
READ_TIMEOUT = 60.0
"""Seconds for a call to etcd, including all attempts; the same default as torch's."""

TLS_FILES = ("cacert", "cert", "key")
"""Settings that name files, and mean that TLS is used."""
MAX_PEM = 8 << 20
"""Most bytes of such a file; a bundle of all public authorities has 0.2 MiB."""
MAX_PASSWORD = 4096

_NAMES = {
    "protocol": ("protocol",),
    "cacert": ("cacert", "ca_cert"),
    "cert": ("cert", "ssl_cert"),
    "key": ("key", "ssl_cert_key"),
    "user": ("user", "username"),
    "password": ("password",),
    "password_file": ("password_file",),
    "read_timeout": ("read_timeout",),
    "timeout_setting": ("timeout_setting",),
    "start_timeout": ("start_timeout",),
    "cluster_id": ("cluster_id",),
    "preferred": ("preferred",),
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
                user, password or password_file, read_timeout (seconds for a call; 60), timeout_setting (the setting
                that read_timeout comes from, for messages; read_timeout), start_timeout (as read_timeout, until etcd
                has answered once), cluster_id (only members of this cluster are used; any), preferred (the endpoint to
                use first).
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
    return {name: conf[key] for name, keys in _NAMES.items() for key in keys if key in conf}


def parse_settings(endpoints: str, conf: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ``cluster.EtcdSettings``. Whether TLS is used depends on what was named, not on what files hold.

    Raises:
        UsageError: A setting is wrong, or its file cannot be read or is not what it should be.
    """
    given = given_settings(conf)
    files = {name: _read_pem(name, given[name]) if name in given else None for name in TLS_FILES}
    if (files["cert"] is None) != (files["key"] is None):
        raise UsageError("--rdzv-conf has one of cert and key; a client certificate needs both")
    password = _password(given)
    if ("user" in given) != (password is not None):
        raise UsageError("--rdzv-conf has one of user and password (or password_file); etcd needs both")
    seconds = _seconds("read_timeout", given.get("read_timeout", str(READ_TIMEOUT)))
    members = [endpoint for entry in endpoints.split(",") if (endpoint := entry.strip())]
    if not members:
        raise UsageError("no endpoint of etcd: pass --rdzv-endpoint HOST:PORT, or several separated by commas")
    return {
        "endpoints": tuple(f"{m}:{DEFAULT_PORT}" if ":" not in m.rpartition("]")[2] else m for m in members),
        "secure": is_secure(conf),
        **files,
        "user": given.get("user"),
        "password": password,
        "read_timeout": seconds,
        "timeout_setting": given.get("timeout_setting", "read_timeout"),
        "start_timeout": _seconds("start_timeout", given.get("start_timeout", str(seconds))),
        "cluster_id": int(given.get("cluster_id", "0")),
        "preferred": given.get("preferred", ""),
    }


def is_secure(conf: Mapping[str, str]) -> bool:
    """Whether settings of ``--rdzv-conf`` ask for TLS: by ``protocol=https``, or by a file that only TLS needs.

    Raises:
        UsageError: They contradict each other, or would send a password in the clear and do not say ``protocol=http``.
    """
    given = given_settings(conf)
    files = [name for name in TLS_FILES if name in given]
    protocol = given.get("protocol", "https" if files else "http").strip().lower()
    if protocol not in ("http", "https"):
        raise UsageError(f"--rdzv-conf protocol={protocol}: must be http or https")
    if protocol == "http" and files:
        raise UsageError(f"--rdzv-conf has protocol=http and {files[0]}, which needs https")
    if protocol == "http" and "protocol" not in given and has_password(conf):
        raise UsageError(
            "--rdzv-conf: without TLS the password could be read by everybody on the way to etcd: "
            "pass protocol=https, or protocol=http if that does not matter"
        )
    return protocol == "https"


def has_password(conf: Mapping[str, str]) -> bool:
    """Whether settings of ``--rdzv-conf`` name a password."""
    return "password" in conf or "password_file" in conf


def _password(given: Mapping[str, str]) -> str | None:
    """The password; None if there is none."""
    path = given.get("password_file")
    if path is None:
        return given.get("password")
    if "password" in given:
        raise UsageError("--rdzv-conf has both password and password_file")
    try:
        text = read_private(path, MAX_PASSWORD).decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UsageError(f"--rdzv-conf password_file={path}: not a text in UTF-8") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--rdzv-conf password_file={path}: {_reason(error)}") from error
    if not text:
        raise UsageError(f"--rdzv-conf password_file={path}: the file is empty")
    return text


def _seconds(name: str, text: str) -> float:
    return parse_seconds(text, f"--rdzv-conf {name}=", above_zero=True)


def _read_pem(name: str, path: str) -> bytes:
    """Read a file of certificates, or one of a private key."""
    where = f"--rdzv-conf {name}={path}"
    if not path:
        raise UsageError(f"{where}: must name a file")
    try:
        with open(path, "rb", opener=without_waiting) as file:
            data = file.read(MAX_PEM + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {_reason(error)}") from error
    if len(data) > MAX_PEM:
        raise UsageError(f"{where}: longer than {MAX_PEM >> 20} MiB")
    if not data.strip():
        raise UsageError(f"{where}: the file is empty")
    what = b"PRIVATE KEY-----" if name == "key" else b"CERTIFICATE-----"
    if b"-----BEGIN " not in data or what not in data:
        raise UsageError(f"{where}: holds no {'private key' if name == 'key' else 'certificate'} in PEM")
    return data


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
