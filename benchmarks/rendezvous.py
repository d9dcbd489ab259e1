"""Measure how fast many nodes meet: from "go" until the last agent has its assignment, and again after a failure.

Each simulated agent is the real ``StoreRendezvous`` with its own connections. Two processes run half of the agents
each, in one loop. The store is real: torch's TCPStore in its own process, or an etcd. The agents of a process share one
bridge to etcd, whereas in a job each agent has its own. They also share the connections that wait for keys if the
store's process may not have two descriptors for each agent. Everything shares the cores of this machine, so the figures
are close to the CPU time of all agents together. A job, whose agents have their own cores, is faster. With very many
agents the keep-alive interval is a minute: two cores that others use, too, cannot send all heartbeats of the usual 5 s.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import queue
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from multiprocessing.connection import Connection, wait
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
from common import machine, spread

from elastic_launch.core.agent.messages import (
    AgentEvent,
    Assigned,
    Decided,
    Ended,
    RendezvousAction,
    ReportFailure,
    ReportRound,
    RequestJoin,
)
from elastic_launch.core.progress.messages import AllStalled, Judged, ProgressEvent, StacksArrived, StacksComplete
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.store_requests import Cancel, Get, Reply, Request, Wait
from elastic_launch.errors import ProcessFailure
from elastic_launch.host.ports import listen
from elastic_launch.job import Decision, Policy
from elastic_launch.rendezvous import backends
from elastic_launch.rendezvous.signing import Signer
from elastic_launch.rendezvous.store_rendezvous import StoreRendezvous
from elastic_launch.store import client as store_client
from elastic_launch.store.challenge import ClientChallenge, gate_key
from elastic_launch.store.client import StoreClient
from elastic_launch.store.etcd.bridge import EtcdBridge
from elastic_launch.store.etcd.server import EtcdServer
from elastic_launch.store.relay import Relay
from elastic_launch.store.tcpstore_server import TCPStoreServer

FAILURE = ProcessFailure(0, 4711, 1, error="ValueError: boom", traceback="Traceback\n" * 50, rank=8, host="host-0001")
"""The failure that ends a round."""
GATE_KEY = gate_key(b"t" * 32, "benchmark")
PROCESSES = 2
"""Number of processes that run agents; one more serves the store."""
SIZES = {"c10d": (64, 256, 1024, 4096), "etcd": (64, 256, 1024)}
PEER_SIZES = (64, 128)
GOALS = {("c10d", 1024): 1.0, ("c10d", 4096): 4.0}
"""Upper limits in seconds, by store and number of agents."""
MANY = {"c10d": 4096, "etcd": 1024}
"""With more agents than this, heartbeats are rare, and are not counted."""
RARE = 60.0
"""The keep-alive interval then, in seconds."""
PATIENCE = 300.0
"""Longest time, in seconds, for our agents to meet."""
PEER_PATIENCE = 30.0
"""Longest time, in seconds, for torch's agents to meet; includes the rest of the import of torch."""
INTERVALS = 2
"""Number of keep-alive intervals over which requests are counted."""
SPARE = 1000
"""Descriptors of the store's process that are not connections of agents."""

Context = multiprocessing.get_context("fork")  # the parent has no threads, and imports no torch


class Job(NamedTuple):
    """Settings of one run, the same for all agents."""

    store: str
    """``c10d`` or ``etcd``."""
    port: int
    agents: int
    run_id: str
    is_connected: bool
    """Whether connections are made before "go", the handshake included."""
    has_token: bool = False
    """Whether the agents sign what they write."""
    has_gate: bool = False
    """Whether they pass the challenge of a gate."""

    @property
    def shares_waits(self) -> bool:
        """Whether the store may not have two connections of each agent."""
        return self.store == "c10d" and 2 * self.agents + SPARE > resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    @property
    def settings(self) -> Settings:
        settings = Settings(
            self.run_id, self.agents, self.agents, policy=Policy(3), store_port=self.port if self.store == "c10d" else 0
        )
        return settings._replace(keep_alive_interval=RARE) if self.agents > MANY[self.store] else settings


# --- in the processes that run agents


class Counting(StoreClient):
    """A connection that counts its requests."""

    requests = 0

    def submit(self, request: Request, tag: Any = None) -> None:
        self.requests += 1
        super().submit(request, tag)


class Waits:
    """Waits for keys on behalf of all agents of a process, with one connection for each key."""

    def __init__(self, connect: Callable[[], StoreClient], epoll: select.epoll) -> None:
        self._connect, self._epoll = connect, epoll
        self._clients: dict[int, StoreClient] = {}
        self._idle: list[StoreClient] = []
        self.waiting: dict[str, dict[SharedWait, None]] = {}
        """Who waits for each key."""

    def begin(self, key: str, who: SharedWait) -> None:
        if key not in self.waiting:
            client = self._idle.pop() if self._idle else self._open()
            client.submit(Wait((key,)), key)
            client.flush()
            self.waiting[key] = {}
        self.waiting[key][who] = None

    def _open(self) -> StoreClient:
        client = self._connect()
        client.call(Get(("none",)), PATIENCE)  # it is connected
        self._clients[client.fileno()] = client
        self._epoll.register(client.fileno(), select.EPOLLIN)
        return client

    def take(self, fd: int) -> list[SharedWait]:
        """Return those whose key has appeared, if the descriptor is one of these connections."""
        found: list[SharedWait] = []
        if client := self._clients.get(fd):
            for key, _ in client.take():
                self._idle.append(client)
                found += self.waiting.pop(key)
        for who in found:
            who.has_appeared = True
        return found


class SharedWait(StoreClient):
    """One agent's part of ``Waits``, in place of its own second connection."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._request: tuple[Wait, Any] | None = None
        self.has_appeared = False
        self.agent: Agent | None = None

    def submit(self, request: Request, tag: Any = None) -> None:
        if self._request and isinstance(request, Cancel):
            self._waits.waiting.get(self._request[0].keys[0], {}).pop(self, None)
            self._request, self.has_appeared = None, False
        elif isinstance(request, Wait):
            self._request = request, tag
            self._waits.begin(request.keys[0], self)

    def take(self) -> list[tuple[Any, Reply]]:
        if self._request is None or not self.has_appeared:
            return []
        _, tag = self._request
        self._request, self.has_appeared = None, False
        return [(tag, True)]

    def fileno(self) -> int:
        return -1

    def wants_write(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class Backend(backends.Backend):
    """The store as an agent sees it: the store itself, or the bridge that all agents of a process share."""

    where = "store"

    def __init__(self, job: Job, address: str, bridge: EtcdBridge | None, waits: Waits | None) -> None:
        self._job, self._address, self._bridge = job, address, bridge
        self.prepared: list[StoreClient] = []
        self.clients: list[Counting] = []
        self.shared = SharedWait(waits) if waits else None

    def open(self) -> None:
        pass

    def prepare(self) -> list[StoreClient]:
        """Make the agent's connections in advance."""
        self.prepared = [self.make() for _ in range(1 if self.shared else 2)]
        return self.prepared

    def make(self) -> StoreClient:
        if self._bridge:
            client = Counting(self._bridge.connect(), self.where)
        else:
            challenge = ClientChallenge(GATE_KEY) if self._job.has_gate else None
            made = store_client.connect((self._address, self._job.port), socket.AF_INET, self.where, challenge)
            assert isinstance(made, Counting)
            client = made
        self.clients.append(client)
        return client

    def connect(self, again: bool = False) -> StoreClient:
        if self.prepared:
            return self.prepared.pop()
        return self.shared if self.shared and self.clients else self.make()

    def addresses(self, client: StoreClient) -> tuple[str, str]:
        return self._address, "" if self._bridge else self._address

    def traffic(self) -> tuple[int, int]:
        """Return the requests and bytes so far, in both directions. Bytes are known for TCP only, not for a bridge."""
        total = 0
        for client in [] if self._bridge else self.clients:
            with socket.socket(fileno=os.dup(client.fileno())) as sock:
                # tcp_info: tcpi_bytes_acked and tcpi_bytes_received
                total += sum(struct.unpack_from("QQ", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 120))
        return sum(client.requests for client in self.clients), total


@dataclass(eq=False)
class Agent:
    rendezvous: StoreRendezvous
    backend: Backend
    watched: list[tuple[int, int]] = field(default_factory=list)
    """Descriptors and masks as they are registered."""
    due: float = float("inf")
    """The agent's earliest time in the loop's heap."""
    rank: int = -1


class Fleet:
    """The agents of one process, in one loop. The cost of a wake-up does not depend on their number."""

    def __init__(self, job: Job, count: int, first: int, control: Connection, bridge: EtcdBridge | None) -> None:
        self.job, self.control, self.bridge = job, control, bridge
        self.epoll = select.epoll()
        self.epoll.register(control.fileno(), select.EPOLLIN)
        self.owners: dict[int, Agent] = {}
        self.heap: list[tuple[float, int, Agent]] = []
        self.placed = self.pushed = 0
        self.ended_at = float("nan")
        """When the most recent agent learned that its round is over."""
        self.agents = []
        address = f"127.0.0.{2 if first else 1}"  # each has ports for 28,000 connections
        self.waits = Waits(Backend(job, address, bridge, None).make, self.epoll) if job.shares_waits else None
        for number in range(first, first + count):
            record = NodeRecord(f"node-{number:08}-{number:08x}", f"host-{number:04}", os.getpid(), 8, "default")
            backend = Backend(job, address, bridge, self.waits)
            signer = Signer(b"benchmark" * 8, job.run_id, print) if job.has_token else None
            made = StoreRendezvous(job.settings, record, backend, lambda text: None, signer=signer)
            self.agents.append(Agent(made, backend))
            if backend.shared:
                backend.shared.agent = self.agents[-1]
        if job.is_connected:
            self.connect()

    def connect(self) -> None:
        waiting = {client.fileno(): client for agent in self.agents for client in agent.backend.prepare()}
        epoll = select.epoll()
        for fd in waiting:
            epoll.register(fd, select.EPOLLOUT)
        while waiting:
            for fd, mask in epoll.poll():
                client = waiting[fd]
                if mask & select.EPOLLOUT:
                    client.flush()
                client.take()
                if client.ready:
                    epoll.unregister(fd)
                    del waiting[fd]
                else:
                    epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if client.wants_write() else 0))
        epoll.close()

    def run(self) -> None:
        """Run the agents until the control connection is closed."""
        while True:
            timeout = max(0.0, self.heap[0][0] - time.monotonic()) if self.heap else -1
            ready = [fd for fd, _ in self.epoll.poll(timeout)]
            if self.control.fileno() in ready and not self.obey():
                return
            woken = {self.owners[fd]: None for fd in ready if fd in self.owners}
            for fd in ready:
                for shared in self.waits.take(fd) if self.waits else []:
                    if shared.agent:
                        woken[shared.agent] = None
            for agent in woken:
                self.follow(agent, agent.rendezvous.take())
            now = time.monotonic()
            while self.heap and self.heap[0][0] <= now:
                at, _, agent = heappop(self.heap)
                if at == agent.due:
                    agent.due = float("inf")
                    self.follow(agent, agent.rendezvous.take())

    def obey(self) -> bool:
        try:
            order = self.control.recv()
        except EOFError:
            return False
        match order:
            case "join":
                for agent in self.agents:
                    self.ask(agent, RequestJoin())
            case "fail":
                self.ask(self.agents[-1], ReportFailure(FAILURE))
            case "traffic":
                usage = used([os.getpid()]), used([self.bridge.pid] if self.bridge else [])
                self.control.send(([agent.backend.traffic() for agent in self.agents], *usage))
        return True

    def ask(self, agent: Agent, action: RendezvousAction) -> None:
        self.follow(agent, agent.rendezvous.ask(action))

    def follow(self, agent: Agent, events: list[AgentEvent]) -> None:
        """Do what the real agent does, without workers."""
        while events:
            event = events.pop(0)
            match event:
                case AllStalled() | StacksArrived() | StacksComplete() | Judged():
                    events += self.on_stall(agent, event)
                case Assigned(assignment):
                    agent.rank = assignment.group_rank
                    self.placed += 1
                    if self.placed == len(self.agents):
                        self.placed = 0
                        now = time.monotonic()
                        ranks = [agent.rank for agent in self.agents]
                        self.control.send((now, assignment.restart_count, ranks, self.ended_at))
                case Ended(end):
                    self.ended_at = time.monotonic()
                    decision = Decision(True)
                    if end.mine:
                        decision = Decision(True, failures=(FAILURE,))
                    events += agent.rendezvous.ask(ReportRound(decision))
                case Decided(decision) if decision.restart:
                    events += agent.rendezvous.ask(RequestJoin())
                case _:
                    raise SystemExit(f"unexpected: {event}")
        self.look_after(agent)

    def on_stall(self, agent: Agent, event: ProgressEvent) -> list[AgentEvent]:
        """Handle what the rendezvous has to say of a stall; nothing stalls in this benchmark."""
        raise SystemExit(f"unexpected: {event}")

    def look_after(self, agent: Agent) -> None:
        """Register the descriptors and the time that the agent waits for now."""
        watched = agent.rendezvous.descriptors()
        if watched != agent.watched:
            before = dict(agent.watched)
            for fd, mask in watched:
                if fd not in before:
                    self.epoll.register(fd, mask)
                    self.owners[fd] = agent
                elif before[fd] != mask:
                    self.epoll.modify(fd, mask)
            for fd in before.keys() - dict(watched).keys():
                raise SystemExit(f"a connection (descriptor {fd}) was lost")
            agent.watched = watched
        deadline = agent.rendezvous.deadline()
        if deadline is not None and deadline < agent.due:
            agent.due = deadline
            self.pushed += 1
            heappush(self.heap, (deadline, self.pushed, agent))


def run_agents(
    job: Job, count: int, first: int, control: Connection, inherited: list[Connection], kind: type[Fleet]
) -> None:
    for other in inherited:
        other.close()  # otherwise this process would not notice that the other end is closed
    environ = dict(os.environ)
    with contextlib.ExitStack() as stack, patch.object(store_client, "StoreClient", Counting):
        bridge = None
        if job.store == "etcd":
            bridge = EtcdBridge(f"127.0.0.1:{job.port}", f"benchmark/{job.run_id}/", {}, environ)
            stack.callback(bridge.close)
            client = StoreClient(bridge.connect(), "bridge")
            client.call(Get(("none",)), PATIENCE)  # it has started
            client.close()
        fleet = kind(job, count, first, control, bridge)
        gc.collect()
        gc.freeze()  # a real agent has one rendezvous to traverse, not thousands
        control.send("ready")
        fleet.run()


# --- in the process that measures


class Figures(NamedTuple):
    """Figures of one run. Times are in seconds."""

    join: float
    """From "go" until all agents have an assignment."""
    known: float
    """From a failure until all agents know of it."""
    reform: float
    """From a failure until all agents have their next assignment."""
    requests: list[int]
    """Requests of each agent until it had its first assignment."""
    octets: list[int]
    """Bytes of each agent until then."""
    again: list[int]
    """Requests of each agent from the failure until it had its next assignment."""
    idle: list[float]
    """Requests of each agent in a keep-alive interval afterwards; empty: not measured."""
    cpu: list[float]
    """CPU time of the agents' processes, of the bridges and of the store, for both meetings."""
    memory: list[float]
    """Their memory afterwards, in MiB."""


def measure(job: Job, store_pids: Sequence[int], intervals: int) -> Figures:
    shares = [job.agents * (i + 1) // PROCESSES - job.agents * i // PROCESSES for i in range(PROCESSES)]
    with fleets(job, shares) as controls:
        gather(controls)  # all are ready

        def traffic() -> tuple[list[tuple[int, int]], list[Usage]]:
            """Return each agent's requests and bytes so far, and what agents, bridges and store have used."""
            for control in controls:
                control.send("traffic")
            counts, agents, bridges = zip(*gather(controls), strict=True)
            return [one for part in counts for one in part], [total(agents), total(bridges), used(store_pids)]

        def meet(orders: dict[Connection, str], round_: int) -> tuple[float, float]:
            """Return the seconds until all have an assignment, and until all knew that the last round was over."""
            begin = time.monotonic()
            for control, order in orders.items():
                control.send(order)
            answers = gather(controls)
            ranks = sorted(rank for _, _, part, _ in answers for rank in part)
            if ranks != list(range(job.agents)) or {count for _, count, _, _ in answers} != {round_}:
                raise SystemExit(f"round {round_}: ranks are not 0 to {job.agents - 1}, each once: {answers}")
            placed, _, _, ended = zip(*answers, strict=True)
            return max(placed) - begin, max(ended) - begin

        begun, usage_begun = traffic()
        join, _ = meet(dict.fromkeys(controls, "join"), 0)
        joined, _ = traffic()
        reform, known = meet({controls[-1]: "fail"}, 1)
        reformed, usage = traffic()
        idle: list[float] = []
        if intervals:
            interval = job.settings.keep_alive_interval
            time.sleep(interval / 2)  # heartbeats are due at whole intervals
            before, _ = traffic()
            time.sleep(intervals * interval)
            idle = [(b - a) / intervals for (a, _), (b, _) in zip(before, traffic()[0], strict=True)]
        return Figures(
            join,
            known,
            reform,
            [b - a for (a, _), (b, _) in zip(begun, joined, strict=True)],
            [b - a for (_, a), (_, b) in zip(begun, joined, strict=True)],
            [b - a for (a, _), (b, _) in zip(joined, reformed, strict=True)],
            idle,
            [after.cpu - before.cpu for before, after in zip(usage_begun, usage, strict=True)],
            [after.memory for after in usage],
        )


@contextlib.contextmanager
def fleets(job: Job, shares: Sequence[int], kind: type[Fleet] = Fleet) -> Iterator[list[Connection]]:
    """Run the processes of agents. They end when their control connections are closed."""
    controls: list[Connection] = []
    processes = []
    try:
        for number, share in enumerate(shares):
            ours, theirs = Context.Pipe()
            controls.append(ours)
            arguments = (job, share, sum(shares[:number]), theirs, list(controls), kind)
            processes.append(Context.Process(target=run_agents, args=arguments))
            processes[-1].start()
            theirs.close()
        yield controls
    finally:
        for control in controls:
            control.close()
        for process in processes:
            process.join(30)
            process.kill()
            process.join()


def gather(controls: Sequence[Connection]) -> list[Any]:
    """Return a message from each process. If one ends or takes too long, end the benchmark."""
    found: dict[Connection, Any] = {}
    while len(found) < len(controls):
        ready = wait([control for control in controls if control not in found], PATIENCE)
        if not ready:
            raise SystemExit(f"no meeting within {PATIENCE:.0f} s")
        for control in controls:
            if control in ready:
                try:
                    found[control] = control.recv()
                except EOFError:
                    raise SystemExit("a process of agents failed") from None
    return [found[control] for control in controls]


class Usage(NamedTuple):
    """What some processes have used: CPU time in seconds, memory in MiB."""

    cpu: float
    memory: float


def used(pids: Sequence[int]) -> Usage:
    processes = [psutil.Process(pid) for pid in pids]
    return total(Usage(sum(it.cpu_times()[:2]), it.memory_info().rss / (1 << 20)) for it in processes)


def total(usages: Iterable[Usage]) -> Usage:
    return Usage(*map(sum, zip(Usage(0, 0), *usages, strict=True)))


@contextlib.contextmanager
def serving(store: str, has_gate: bool = False) -> Iterator[tuple[int, list[int]]]:
    """Serve a store. Yield its port and the pids of what serves it."""
    if store == "etcd":
        server = EtcdServer()
        server.start(stderr=subprocess.DEVNULL)
        try:
            yield server.get_port(), [server.pid]
        finally:
            server.stop()
        return
    host = TCPStoreServer(listen(0), dict(os.environ))
    try:
        while not host.take():
            select.select([host], [], [], 60)
        if not has_gate:
            yield host.port, [host.pid]
            return
        with contextlib.closing(Relay(GATE_KEY, os.environ)) as relay, listen(0) as outside:
            port = outside.getsockname()[1]
            relay.add_gate("job", outside, host.port)
            yield port, [host.pid, relay.pid]
    finally:
        host.close()


# --- torch's dynamic rendezvous


def run_peers(job: Job, gate: Any, times: Any) -> None:
    """Start torch's agents, one process each, as forks of this one, which has imported torch."""
    os.setsid()  # so that all can be killed together
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # torch prints a line for each connection from a host without a name
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    for _ in range(job.agents):
        if os.fork() == 0:
            endpoint = f"127.0.0.1:{job.port}"
            handler = get_rendezvous_handler(
                RendezvousParameters(
                    "c10d", endpoint, job.run_id, job.agents, job.agents, local_addr="127.0.0.1", is_host=False
                )
            )
            gate.wait()
            handler.next_rendezvous()
            times.put(time.monotonic())
            time.sleep(PATIENCE)  # the others may still need its heartbeats
    time.sleep(PATIENCE)


def measure_peer(job: Job) -> float:
    """Return the seconds from "go", already connected, until the last agent has a rank; infinite: it took too long."""
    gate, times = Context.Barrier(job.agents + 1), Context.Queue()
    process = Context.Process(target=run_peers, args=(job, gate, times))
    process.start()
    try:
        gate.wait(60)
        begin = time.monotonic()
        last = begin
        for _ in range(job.agents):
            last = max(last, times.get(timeout=max(0.0, begin + PEER_PATIENCE - time.monotonic())))
        return last - begin
    except queue.Empty:
        return float("inf")
    finally:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


# --- the tables


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast many agents meet, ours and torch's.")
    parser.add_argument("--agents", type=int, nargs="+", metavar="N", help="default: 64 256 1024, and 4096 with c10d")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="meetings of each size (default: 3)")
    parser.add_argument("--backend", choices=list(SIZES), help="default: both")
    parser.add_argument(
        "--peer", type=int, nargs="*", default=list(PEER_SIZES), metavar="N", help="agents of torch's; none: 64 128"
    )
    parser.add_argument("--token", action="store_true", help="sign the records, as with --token-file")
    parser.add_argument("--gate", action="store_true", help="with c10d: connect through a gate, as with --store-gate")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    medians: dict[int, float] = {}
    for store in [options.backend] if options.backend else SIZES:
        sizes = options.agents or SIZES[store]
        print(f"\n{store}: {options.runs} runs each, connections made before; seconds, median (min–max)\n")
        print(
            "| agents | go to all placed | goal | with connecting | failure to all placed | CPU, agents/bridges/store "
            "| MiB, the same |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        found: dict[int, list[Figures]] = {}
        has_gate = options.gate and store == "c10d"
        with serving(store, has_gate) as (port, pids):
            for agents in sizes:
                found[agents], cold = [], []
                for run in range(options.runs):
                    job = Job(store, port, agents, f"{agents:04}-{run}", True, options.token, has_gate)
                    found[agents].append(measure(job, pids, INTERVALS if run == 0 and agents <= MANY[store] else 0))
                    if agents > MANY[store]:
                        continue  # so many that connect at once overflow the store's queue
                    # Here all connect at once, so the last one waits for all the others.
                    cold.append(
                        measure(job._replace(run_id=f"{agents:04}-{run}-cold", is_connected=False), pids, 0).join
                    )
                print(times_row(store, agents, found[agents], cold), flush=True)
                if store == "c10d":
                    medians[agents] = median(figures.join for figures in found[agents])
        print("\nPer agent: median (max; one agent does the work for all)\n")
        print("| agents | requests, first meeting | bytes | requests, re-form | requests per keep-alive interval |")
        print("|---|---|---|---|---|")
        for agents, runs in found.items():
            print(traffic_row(agents, runs))
    if options.peer and options.backend != "etcd":
        print(f"\ntorch's dynamic rendezvous, c10d, {options.runs} runs each; seconds to all placed\n")
        print("| agents | torch | ours, with connections made before | ratio |\n|---|---|---|---|", flush=True)
        with serving("c10d") as (port, _):
            for agents in options.peer:
                theirs = [
                    measure_peer(Job("c10d", port, agents, f"peer-{agents}-{run}", False))
                    for run in range(options.runs)
                ]
                ours = medians.get(agents)
                if ours is None:
                    jobs = [Job("c10d", port, agents, f"ours-{agents}-{run}", True) for run in range(options.runs)]
                    ours = median(measure(job, [], 0).join for job in jobs)
                print(f"| {agents} | {spread(theirs, 2)} | {ours:.3f} | {ours / median(theirs):.4f} |", flush=True)
    print(f"\n{machine([sys.argv[0], *sys.argv[1:]])}; {PROCESSES} processes of agents")


def times_row(store: str, agents: int, runs: list[Figures], cold: list[float]) -> str:
    join = [figures.join for figures in runs]
    goal = GOALS.get((store, agents))
    target = "" if goal is None else f"≤ {goal:g}: {'met' if median(join) <= goal else 'MISSED'}"
    cpu = " / ".join(f"{median(values):.2f}" for values in zip(*[figures.cpu for figures in runs], strict=True))
    memory = " / ".join(f"{median(values):.0f}" for values in zip(*[figures.memory for figures in runs], strict=True))
    again = spread([figures.reform for figures in runs], 3)
    with_connecting = spread(cold, 3) if cold else ""
    return f"| {agents:,} | {spread(join, 3)} | {target} | {with_connecting} | {again} | {cpu} | {memory} |"


def traffic_row(agents: int, runs: list[Figures]) -> str:
    def each(values: Sequence[Sequence[float]], digits: int = 0) -> str:
        every = [value for part in values for value in part]
        return f"{median(every):,.{digits}f} ({max(every):,.{digits}f})" if any(every) else "–"

    cells = [
        each([figures.requests for figures in runs]),
        each([figures.octets for figures in runs]),
        each([figures.again for figures in runs]),
        each([figures.idle for figures in runs], 1),
    ]
    return f"| {agents:,} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
