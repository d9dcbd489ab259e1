"""The control sockets of real agents, as a client sees them; and ``elastic-job``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from elastic_launch.control.client import ControlClient, sockets
from tests.support.jobs import Job
from tests.support.waiting import DEADLINE, wait_until


def one_socket() -> str:
    """Wait until one agent has a control socket; return its path."""
    wait_until(lambda: sockets(os.environ), "a control socket")
    [path] = sockets(os.environ)
    return path


def connected(path: str) -> socket.socket:
    """Return a plain connection to a control socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(path)
    return sock


def lines(sock: socket.socket) -> list[dict[str, Any]]:
    """Return everything that comes until the connection is closed."""
    data = b""
    try:
        while block := sock.recv(1 << 16):
            data += block
    except ConnectionResetError:  # it has not read everything that we sent
        pass
    sock.close()
    return [json.loads(line) for line in data.splitlines()]


def asked(path: str, **request: Any) -> dict[str, Any]:
    """Return an agent's reply."""
    client = ControlClient(path)
    try:
        return client.ask(request, DEADLINE)
    finally:
        client.close()


def status_when(path: str, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Wait until an agent's status is as it should be, and return it."""
    found: list[dict[str, Any]] = []

    def holds() -> bool:
        found.append(asked(path, request="status")["status"])
        return bool(condition(found[-1]))

    wait_until(holds, "a status")
    return found[-1]


def elastic_job(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``elastic-job`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "elastic_launch.operate", *words],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def start_elastic_job(job: Job, *words: str, stdout: Any = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
    """Start ``elastic-job``; it ends with the test, like the launchers of ``job``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "elastic_launch.operate", *words],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    job.processes.append(process)
    return process
