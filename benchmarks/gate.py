"""Measure what a gate costs each connection and each request: torch's store alone, behind a gate, and from an entry.

An agent of another node than the store's passes the gate. A worker there passes the entry of its node, and the gate.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from statistics import median

import psutil
from common import machine, parse_runs, spread

from elastic_launch.core.store_requests import Get
from elastic_launch.host.ports import listen
from elastic_launch.store.challenge import ClientChallenge, gate_key
from elastic_launch.store.client import StoreClient, connect
from elastic_launch.store.relay import LOOPBACK, Relay
from elastic_launch.store.tcpstore_server import TCPStoreServer

KEY = gate_key(b"t" * 32, "benchmark")
CONNECTIONS, REQUESTS = 200, 1000
PATIENCE = 60.0


def begun(port: int, *, is_gate: bool) -> StoreClient:
    client = connect((LOOPBACK, port), socket.AF_INET, "store", ClientChallenge(KEY) if is_gate else None)
    client.call(Get(("a",)), PATIENCE)
    return client


def connecting(port: int, *, is_gate: bool) -> float:
    """Return the median of the time to connect and make one request, in microseconds."""
    times = []
    for _ in range(CONNECTIONS):
        begin = time.perf_counter()
        client = begun(port, is_gate=is_gate)
        times.append(time.perf_counter() - begin)
        client.close()
    return 1e6 * median(times)


def asking(port: int, *, is_gate: bool) -> float:
    """Return the median of the time for a request, in microseconds."""
    times = []
    with contextlib.closing(begun(port, is_gate=is_gate)) as client:
        for _ in range(REQUESTS):
            begin = time.perf_counter()
            client.call(Get(("a",)), PATIENCE)
            times.append(time.perf_counter() - begin)
    return 1e6 * median(times)


def main() -> None:
    runs = parse_runs("What a gate before the store costs.", default=5)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(TCPStoreServer(listen(0, LOOPBACK), dict(os.environ))))
        while not store.take():
            select.select([store], [], [], PATIENCE)
        relays = [stack.enter_context(contextlib.closing(Relay(KEY, os.environ))) for _ in range(2)]
        gate, entry = listen(0, LOOPBACK), listen(0, LOOPBACK)
        gate_port, entry_port = gate.getsockname()[1], entry.getsockname()[1]
        relays[0].add_gate("job", gate, store.port)
        relays[1].add_entry("workers", entry, (LOOPBACK, gate_port))
        ways = {
            "the store alone": (store.port, False),
            "through a gate": (gate_port, True),
            "through entry and gate": (entry_port, False),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, (port, is_gate) in ways.items():
                found[name].append((connecting(port, is_gate=is_gate), asking(port, is_gate=is_gate)))
        print("| µs | connect, with a first request | a request |\n|---|---|---|")
        for name, pairs in found.items():
            print(f"| {name} | {' | '.join(spread(column, 0) for column in zip(*pairs, strict=True))} |")
        resident = psutil.Process(relays[0].pid).memory_info().rss / (1 << 20)
        print(f"\nThe process at the gate: {resident:.1f} MiB resident. {machine([sys.argv[0], *sys.argv[1:]])}")


if __name__ == "__main__":
    main()
