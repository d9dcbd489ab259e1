"""Jobs on several hosts that are cut off, lost, slow or frozen: each job goes on or ends as documented.

The hosts are network namespaces; see ``tests.support.hosts``. Agents and stores are real. All workers write heartbeats,
and each test checks by them that no worker of an old round was alive beside one of a newer round.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_launch.store.etcd.server import etcd_binary
from tests.support.hosts import Host, Hosts, Program
from tests.support.jobs import Job
from tests.support.waiting import wait_until

INTERVAL, ATTEMPTS = 0.5, 9
DEADLINE = INTERVAL * ATTEMPTS
"""Keep-alive deadline: seconds without a heartbeat after which a node is lost."""
SLACK = 15
"""Seconds by which a busy machine may be late."""
PATIENCE = DEADLINE + 2 + SLACK
"""Seconds within which the other nodes must have gone on or ended."""
CONF = f"keep_alive_interval={INTERVAL},keep_alive_max_attempt={ATTEMPTS},last_call_timeout=60"
ENDPOINT = "host-1:29400"

WORKER = """
import threading
def write_heartbeats():
    begin = time.monotonic()  # one clock for all hosts
    file = os.open(f"{HEARTBEATS}/{restart}.{rank}.{os.uname().nodename}.{os.getpid()}", os.O_CREAT | os.O_WRONLY)
    while True:
        os.pwrite(file, b"%018.6f %018.6f" % (begin, time.monotonic()), 0)
        time.sleep(0.005)
threading.Thread(target=write_heartbeats, daemon=True).start()
host, world = os.uname().nodename, int(os.environ["WORLD_SIZE"])
mark(f"{host} of {world}")
"""
"""How every worker begins: it writes heartbeats to its own file, and the mark ``RANK.RESTART HOST of WORLD_SIZE``."""
UNTIL_END = "wait_for('end')\n"


class Lifetime:
    """Times of a worker's first and last heartbeat, in seconds on the clock that all hosts share."""

    def __init__(self, file: Path) -> None:
        restart, _, self.host, _ = file.name.split(".")
        self.restart = int(restart)
        self.first, self.last = map(float, file.read_text().split())


class Network:
    """A job on several hosts."""

    def __init__(self, job: Job, hosts: Hosts) -> None:
        self.job, self.hosts = job, hosts
        self._heartbeats = job.path / "heartbeats"
        self._heartbeats.mkdir()

    def script(self, text: str = UNTIL_END) -> str:
        """Write a worker's script that writes heartbeats while it runs ``text``. Return its path."""
        return self.job.script(f"HEARTBEATS = {str(self._heartbeats)!r}\n{WORKER}{text}")

    def start(self, host: Host, script: str, *args: str, nnodes: str, conf: str = CONF, **env: str) -> Program:
        """Start an agent of the c10d job whose store is on host 1. ``args`` come last, so they override the options."""
        words = ["--nnodes", nnodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", ENDPOINT, "--rdzv-id", "job-1"]
        return host.start(*words, "--rdzv-conf", conf, *args, script, **env)

    def end(self) -> None:
        """Let the workers succeed."""
        self.job.mark("end")

    def lifetimes(self) -> list[Lifetime]:
        """Return the lifetimes of all workers so far."""
        return [Lifetime(file) for file in self._heartbeats.iterdir() if file.stat().st_size]

    def formed(self, world: int, restart: int) -> float:
        """Wait until the newest round runs on ``world`` hosts. It must be the round ``restart`` or a later one.

        Returns:
            The time when its first worker began, on ``time.monotonic``.
        """
        newest: list[Lifetime] = []

        def is_there() -> bool:
            lifetimes = self.lifetimes()
            last = max((life.restart for life in lifetimes), default=-1)
            newest[:] = [life for life in lifetimes if life.restart == last >= restart]
            return len(newest) == world == self._world(last)

        wait_until(is_there, f"a round of {world}")
        return min(life.first for life in newest)

    def _world(self, restart: int) -> int:
        """Return the size of a round when all its workers have noted it; 0: they have not."""
        pattern = rf"\d+\.{restart} .* of (\d+)"
        sizes = [found[1] for mark in self.job.marks() if (found := re.fullmatch(pattern, mark))]
        return len(sizes) if {*sizes} == {str(len(sizes))} else 0

    def check_generations(self) -> None:
        """Check that no worker of an older round was alive when one of a newer round began."""
        lifetimes = self.lifetimes()
        beside = [
            f"{old.host} in round {old.restart} until {old.last - new.first:.3f} s after {new.host} began {new.restart}"
            for new in lifetimes
            for old in lifetimes
            if old.restart < new.restart and old.last > new.first
        ]
        assert not beside


Make = Callable[[int], Network]


@pytest.fixture
def network(job: Job, tmp_path: Path) -> Iterator[Make]:
    """Make jobs on a given number of hosts. The hosts, and all that runs there, are removed at the end of the test."""
    with contextlib.ExitStack() as stack:
        networks: list[Network] = []

        def make(count: int) -> Network:
            hosts = stack.enter_context(contextlib.closing(Hosts(count, tmp_path)))
            networks.append(Network(job, hosts))
            return networks[-1]

        yield make
    for made in networks:
        made.check_generations()


def ends(*programs: Program) -> list[int]:
    """Wait for programs to end. Return their statuses; pytest shows their output if the test fails."""
    statuses = [program.wait() for program in programs]
    for program in programs:
        print(program.said())
    return statuses


def start_three(
    net: Network, script: str, *args: str, nnodes: str = "2:3", conf: str = CONF, monitor: int = 1
) -> list[Program]:
    """Start an agent on each of three hosts, and wait until all run. The monitor is the host with rank 0."""
    programs = [
        net.start(net.hosts[n], script, "--node-rank", str((n - monitor) % 3), *args, nnodes=nnodes, conf=conf)
        for n in (1, 2, 3)
    ]
    net.formed(3, restart=0)
    net.job.wait_for(f"0.0 host-{monitor} of 3")
    return programs


STUBBORN = "if host == 'host-3': signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
"""A worker that ignores SIGTERM on the host under test."""


SERVER = "import socket, time; server = socket.create_server(('', 29400)); time.sleep(600)"
CLIENT = """
import os, socket, sys, time
begin = time.monotonic()
try: socket.create_connection(("host-1", 29400), float(sys.argv[1])); how = "connected"
except Exception as error: how = type(error).__name__
print(os.uname().nodename, how, time.monotonic() - begin)
"""


def test_hosts_behave_as_the_other_tests_assume(network: Make) -> None:
    hosts = network(3).hosts

    def connect(host: Host, timeout: float = 60.0) -> tuple[str, str, float]:
        client = host.run(sys.executable, "-I", "-S", "-c", CLIENT, str(timeout))
        assert client.wait() == 0
        name, how, seconds = client.said().split()
        return name, how, float(seconds)

    def is_cut_off(host: Host) -> bool:
        return connect(host, 0.5)[1] == "TimeoutError"

    assert connect(hosts[1])[1] == "ConnectionRefusedError"
    server = hosts[1].run(sys.executable, "-I", "-S", "-c", SERVER)
    wait_until(lambda: connect(hosts[1])[1] == "connected")
    assert connect(hosts[2])[:2] == ("host-2", "connected")
    hosts.cut(hosts[3])
    assert connect(hosts[2])[1] == "connected"
    assert is_cut_off(hosts[3])
    hosts.heal()
    hosts.lose(hosts[1], hosts[2])
    assert is_cut_off(hosts[2])
    assert connect(hosts[3])[1] == "connected"
    hosts.delay(0.1)
    _, how, seconds = connect(hosts[2])
    assert (how, seconds >= 0.2) == ("connected", True)
    hosts[1].power_off()
    assert server.wait() == -signal.SIGKILL
    assert is_cut_off(hosts[2])
    hosts.heal()
    assert connect(hosts[2])[1] == "ConnectionRefusedError"


def test_a_host_that_is_cut_off_and_healed(network: Make) -> None:
    net = network(3)
    programs = start_three(net, net.script(STUBBORN + UNTIL_END))
    cut_at = time.monotonic()
    net.hosts.cut(net.hosts[3])
    assert net.formed(2, restart=1) - cut_at < PATIENCE
    net.hosts.heal()
    net.formed(3, restart=2)
    net.end()
    assert ends(*programs) == [0, 0, 0]


def test_the_monitor_is_cut_off(network: Make) -> None:
    net = network(3)
    programs = start_three(net, net.script(), monitor=3)
    cut_at = time.monotonic()
    net.hosts.cut(net.hosts[3])
    assert net.formed(2, restart=1) - cut_at < PATIENCE
    net.end()
    assert ends(*programs[:2]) == [0, 0]
    assert any("no heartbeat from host-3" in program.said() for program in programs[:2])


def test_the_monitor_is_cut_off_from_etcd(network: Make) -> None:
    net = network(4)
    start_etcd(net.hosts[4])
    script = net.script()
    etcd = ["--rdzv-backend", "etcd", "--rdzv-endpoint", "host-4:2379"]
    programs = [net.start(net.hosts[n], script, *etcd, nnodes="2:3") for n in (1, 2, 3)]
    net.formed(3, restart=0)
    wait_until(lambda: any(mark.startswith("0.0 ") for mark in net.job.marks()))
    [first] = [n for n in (1, 2, 3) if f"0.0 host-{n} of 3" in net.job.marks()]
    others = [program for n, program in enumerate(programs, 1) if n != first]
    cut_at = time.monotonic()
    net.hosts.cut(net.hosts[first], net.hosts[4])
    assert net.formed(2, restart=1) - cut_at < PATIENCE
    net.hosts.heal()
    net.formed(3, restart=2)
    net.end()
    assert ends(*programs) == [0, 0, 0]
    assert any(f"no heartbeat from host-{first}" in program.said() for program in others)


def start_etcd(host: Host) -> None:
    """Start an etcd cluster of one member."""
    client, peer = f"http://{host.address}:2379", f"http://{host.address}:2380"
    host.run(
        *(etcd_binary(), "--data-dir", "etcd", "--log-level", "error", "--initial-cluster", f"default={peer}"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
    )


@pytest.mark.parametrize(("source", "to"), [(3, 1), (1, 3)], ids=["to the store", "from the store"])
def test_packets_are_lost_one_way(network: Make, source: int, to: int) -> None:
    net = network(3)
    programs = start_three(net, net.script())
    lost_at = time.monotonic()
    net.hosts.lose(net.hosts[source], net.hosts[to])
    assert net.formed(2, restart=1) - lost_at < PATIENCE
    net.hosts.heal()
    net.formed(3, restart=2)
    net.end()
    assert ends(*programs) == [0, 0, 0]
    assert "this process was stopped" not in programs[2].said()


@pytest.mark.parametrize("monitor", [1, 3])
def test_the_host_of_the_store_is_cut_off_and_healed(network: Make, monitor: int) -> None:
    net = network(3)
    programs = start_three(net, net.script(), nnodes="1:3", monitor=monitor)
    cut_at = time.monotonic()
    net.hosts.cut(net.hosts[1])
    # If the monitor is lost together with others, its loss is detected first; its successor detects the others.
    assert net.formed(1, restart=1) - cut_at < PATIENCE + DEADLINE * (monitor == 3)
    net.hosts.heal()
    net.formed(3, restart=2)
    net.end()
    assert ends(*programs) == [0, 0, 0]


def test_half_a_second_of_delay_is_no_death(network: Make) -> None:
    net = network(3)
    net.hosts.delay(0.5)
    script = net.script(
        "if restart == 0 and rank == 1: wait_for('0.0 host-1 of 3', '2.0 host-3 of 3'); sys.exit(3)\n" + UNTIL_END
    )
    # The usual deadline. With a shorter one, answers might be missed that a busy machine holds up as well.
    conf = "keep_alive_interval=1.5,keep_alive_max_attempt=10,last_call_timeout=60"
    programs = start_three(net, script, "--max-restarts", "1", nnodes="3", conf=conf)
    net.formed(3, restart=1)
    net.end()
    assert ends(*programs) == [0, 0, 0]
    assert {life.restart for life in net.lifetimes()} == {0, 1}
    for program in programs:
        assert "no heartbeat" not in program.said()
        assert "the store has not answered for" not in program.said()


LOSS = f"{CONF},store_timeout=3,read_timeout=3"


def test_the_host_of_the_store_is_powered_off(network: Make) -> None:
    net = network(3)
    programs = start_three(net, net.script(), conf=LOSS)
    off_at = time.monotonic()
    net.hosts[1].power_off()
    assert ends(*programs[1:]) == [69, 69]
    assert max(life.last for life in net.lifetimes()) - off_at < PATIENCE
    for program in programs[1:]:
        assert f"the store at {ENDPOINT} is lost" in program.said()


def test_the_host_of_the_store_comes_back(network: Make) -> None:
    net = network(3)
    script = net.script(
        "if restart == 0 and rank == 1: wait_for('0.0 host-1 of 3', '2.0 host-3 of 3'); sys.exit(3)\n"
        "wait_for('end')\n"
        "sys.exit(4 if host == 'host-2' else 0)\n"
    )
    programs = start_three(net, script, "--max-restarts", "1", nnodes="3", conf=f"{CONF},store_timeout=20")
    net.formed(3, restart=1)
    net.hosts[1].power_off()
    net.hosts.heal()
    programs[0] = net.start(net.hosts[1], script, "--max-restarts", "1", "--node-rank", "0", nnodes="3")
    net.formed(3, restart=2)
    net.end()
    assert ends(*programs) == [4, 4, 4]
    for program in programs:
        assert "exit    : exit code 4" in program.said()
        assert "restarts  : 1 of 1 used" in program.said()


@pytest.mark.parametrize("number", [1, 3], ids=["on the host of the store", "on another host"])
def test_a_frozen_agent_is_replaced_and_comes_back_as_a_newcomer(network: Make, number: int) -> None:
    net = network(3)
    programs = start_three(net, net.script(STUBBORN.replace("host-3", f"host-{number}") + UNTIL_END))
    frozen_at = time.monotonic()
    programs[number - 1].freeze()
    assert net.formed(2, restart=1) - frozen_at < PATIENCE
    programs[number - 1].resume()
    net.formed(3, restart=2)
    net.end()
    assert ends(*programs) == [0, 0, 0]


def test_a_job_that_needs_the_lost_host_ends(network: Make) -> None:
    net = network(3)
    programs = start_three(net, net.script(), nnodes="3")
    off_at = time.monotonic()
    net.hosts[3].power_off()
    assert ends(*programs[:2]) == [69, 69]
    assert time.monotonic() - off_at < PATIENCE
    for program in programs[:2]:
        assert "lost host-3" in program.said().splitlines()[-1]


WAIT = """
import socket, sys
from elastic_launch.core.store_requests import Wait
from elastic_launch.store.client import connect
connect(("10.77.0.1", 29400), socket.AF_INET, "store").call(Wait((sys.argv[1],)), 180)
"""
"""Waits for a key of the job's store."""


def test_a_broken_connection_is_no_cause_where_a_peer_was_killed(network: Make) -> None:
    net = network(3)
    script = net.script(
        "if rank == 0:\n"
        "    wait_for('1.0 deaf')\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    if os.fork() == 0: wait_for('go'); os._exit(0)\n"  # until then its node does not decide
        "    raise ConnectionResetError(104, 'Connection reset by peer')\n"
        "if rank == 1:\n"
        "    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"  # it is noticed later
        "    mark('deaf'); wait()\n" + UNTIL_END
    )
    programs = [net.start(net.hosts[n], script, "--node-rank", str(n - 1), nnodes="3") for n in (1, 2, 3)]
    net.job.wait_for("1.0 deaf")
    told = net.hosts[2].run(sys.executable, "-c", WAIT, "elastic/job-1/0/consequences")
    assert told.wait() == 0, told.said()
    net.job.mark("go")
    assert len(set(ends(*programs))) == 1
    for program in programs:
        report = program.said()
        assert re.search(r"Cause\n +rank +: 1 .* on host-2\n +exit +: .*SIGKILL", report), report
        assert re.search(r"Then\n.* rank 0 on host-1 .*ConnectionResetError", report), report


ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
mark("training")
for step in range(10**9 if world == 3 else 20):
    sums = torch.ones(1)
    dist.all_reduce(sums)
    assert sums.item() == world
mark(f"done with {world}")
dist.barrier()
os._exit(0)
"""


def test_training_goes_on_without_the_host_that_was_powered_off(network: Make) -> None:
    net = network(3)
    programs = start_three(net, net.script(ALL_REDUCE), "--preload", "torch")
    net.job.wait_for("0.0 training", "1.0 training", "2.0 training")
    net.hosts[3].power_off()
    assert ends(*programs[:2]) == [0, 0]
    assert {"0.1 done with 2", "1.1 done with 2"} <= set(net.job.marks())


def test_a_host_with_a_member_of_embedded_etcd_is_powered_off(network: Make) -> None:
    net = network(4)
    script = net.script()
    conf = f"{CONF},last_call_timeout=0.5,embedded=true"
    etcd = ["--rdzv-backend", "etcd", "--rdzv-endpoint", "host-1,host-2,host-3"]
    ranks = [("--node-rank", str(n)) for n in range(3)]
    programs = [net.start(net.hosts[n + 1], script, *etcd, *ranks[n], nnodes="2:3", conf=conf) for n in range(3)]
    net.formed(3, restart=0)
    off_at = time.monotonic()
    net.hosts[1].power_off()  # with the monitor, and the first member
    assert net.formed(2, restart=1) - off_at < PATIENCE
    replacement = net.start(net.hosts[4], script, *etcd, *ranks[0], nnodes="2:3", conf=conf)
    net.formed(3, restart=2)
    net.end()
    assert ends(*programs[1:], replacement) == [0, 0, 0]


def test_a_job_is_seen_whole_and_operated_from_any_of_its_hosts(network: Make) -> None:
    net = network(3)

    def operate(host: int, *words: str) -> tuple[int, str]:
        program = net.hosts[host].run(sys.executable, "-m", "elastic_launch.operate", *words)
        return program.wait(), program.said()

    programs = start_three(net, net.script())
    for host in (1, 2, 3):
        status, said = operate(host, "status", "--json")
        seen = json.loads(said)
        assert (status, seen["source"], seen["state"]) == (0, "store", "running")
        assert [node["host"] for node in seen["nodes"]] == ["host-1", "host-2", "host-3"]
        assert [node["host"] for node in seen["nodes"] if node["workers"]] == [f"host-{host}"]
    assert operate(3, "restart", "job-1") == (0, "job-1: restarting\n")
    net.formed(3, restart=1)
    status, said = operate(1, "stop", "--node", "host-2")
    assert status == 3
    assert "--node=host-2: job-1 has no such node on this host (there is host-1); run this command there" in said
    assert operate(2, "stop", "--node", "host-2")[0] == 0
    assert programs[1].wait() == 143
    net.formed(2, restart=2)
    status, said = operate(3, "status", "--json")
    seen = json.loads(said)
    assert [node["host"] for node in seen["nodes"]] == ["host-1", "host-3"]
    assert (seen["restarts"], seen["uncharged_restarts"]) == (0, 2)
    assert [round_["reason"] for round_ in seen["rounds"][:1]] == ["restart requested on host-3"]
    assert operate(3, "stop") == (0, "job-1: stopping\n")
    assert ends(*programs) == [143, 143, 143]
    assert "stop requested on host-3: stopping 1 worker" in programs[0].said()
