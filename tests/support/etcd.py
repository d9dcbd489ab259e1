"""etcd as tests see it: a cluster of three, and its JSON gateway."""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
from typing import Any

import psutil

from elastic_launch.store.etcd.bridge import EtcdBridge
from elastic_launch.store.etcd.server import EtcdServer
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE


class Trio:
    """A cluster of three."""

    def __init__(self) -> None:
        port = free_port(6)
        self.ports = range(port, port + 6)
        self.servers = [EtcdServer() for _ in range(3)]
        for index in range(3):
            self.launch(index)
        for server in self.servers:
            server.wait_ready(DEADLINE)
        self.endpoints = ",".join(server.get_endpoint() for server in self.servers)

    def launch(self, index: int) -> None:
        peers = ",".join(f"m{i}=http://127.0.0.1:{self.ports[i + 3]}" for i in range(3))
        options = ["--name", f"m{index}", "--initial-cluster", peers]
        options += ["--heartbeat-interval", "50", "--election-timeout", "500"]
        self.servers[index].launch(self.ports[index], self.ports[index + 3], options, subprocess.DEVNULL)

    def connected(self, bridge: EtcdBridge) -> int:
        """The index of a member to which a bridge has a connection. If an answer has taken long, it has several."""
        return min(self.used(bridge))

    def used(self, bridge: EtcdBridge) -> set[int]:
        """The indices of all members to which it has one."""
        ports = {c.raddr.port for c in psutil.Process(bridge.pid).net_connections("tcp") if c.raddr}
        return {index for index in range(3) if self.ports[index] in ports}


def post(endpoint: str, path: str, token: str = "", **body: Any) -> dict[str, Any]:
    """Ask etcd by another way: its JSON gateway. Bytes become base64."""
    data = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in body.items()}
    connection = http.client.HTTPConnection(endpoint, timeout=DEADLINE)
    try:
        connection.request("POST", f"/v3/{path}", json.dumps(data), {"Authorization": token} if token else {})
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return answer
