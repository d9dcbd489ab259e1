"""The port of the workers' store: reserved for the worker of rank 0, and replaced if another program takes it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from elastic_launch.core.agent.messages import Assigned, RequestJoin
from elastic_launch.errors import UnavailableError
from elastic_launch.host.ports import listen, port_owner, reserve_ipv4_port, reserve_port
from elastic_launch.job import Assignment
from elastic_launch.rendezvous.backends import c10d
from elastic_launch.rendezvous.backends.c10d import C10dBackend
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous
from elastic_launch.store.etcd.member import claim_endpoint
from tests.support.jobs import Job
from tests.support.ports import free_port
from tests.support.waiting import wait_until

ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group('gloo')
total = torch.ones(1)
dist.all_reduce(total)
mark(f'sum {total.item():g}')
dist.destroy_process_group()
os._exit(0)  # torch 2.13 now and then aborts in gloo's thread when the interpreter ends soon after a collective
"""


FAMILIES = """
import contextlib, socket
for fd in map(int, os.listdir('/proc/self/fd') if rank == 0 else ()):
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as each:
        if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            if each.getsockname()[1] == int(os.environ['MASTER_PORT']): mark(each.family.name)
"""
"""Marks the family of the socket of torch's store. On one for IPv6 as well, it would ask DNS for each client's name."""


def next_place(rendezvous: SingleNodeRendezvous) -> Assignment:
    [event] = rendezvous.ask(RequestJoin())
    assert isinstance(event, Assigned)
    return event.assignment


def test_reserved_port_is_not_picked_for_other_sockets() -> None:
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        others = [socket.socket() for _ in range(200)]
        try:
            for other in others:
                other.bind(("", 0))
            assert port not in {other.getsockname()[1] for other in others}
        finally:
            for other in others:
                other.close()


def test_reserved_port_can_be_bound_by_number() -> None:
    with reserve_port() as reserved, socket.socket() as server, socket.socket() as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("0.0.0.0", reserved.getsockname()[1]))
        server.listen()
        client.connect(("127.0.0.1", reserved.getsockname()[1]))


def test_port_that_is_reserved_for_ipv4_can_be_bound_there_alone() -> None:
    with reserve_ipv4_port() as port, socket.socket() as server, socket.socket(socket.AF_INET6) as other:
        for each in (server, other):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        with pytest.raises(OSError, match="Address already in use"):
            other.bind(("::", port))
        server.bind(("0.0.0.0", port))
        server.listen()
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::1", port))


def test_port_in_use_names_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        assert port_owner(port) is not None
        with pytest.raises(UnavailableError, match=rf"port {port} is in use by .*\(pid {os.getpid()}\)"):
            reserve_port(port)
    assert port_owner(port) is None


STRANGER = """
import os, socket, sys, time
os.setgid(12345); os.setuid(12345)
name = sys.argv[1].replace("@", "\\0")
sock = socket.socket(socket.AF_UNIX) if name.startswith("\\0") else socket.socket()
sock.bind(name if name.startswith("\\0") else ("127.0.0.1", int(name)))
if sys.argv[2] == "listens": sock.listen()
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def stranger(name: str, what: str = "listens") -> Iterator[int]:
    """Another user, who holds a port (which is yielded) or an abstract name."""
    command = [sys.executable, "-c", STRANGER, name, what]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line, "it has neither"
        yield int(line) if name.isdigit() else 0
        process.communicate()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@needs_root
def test_a_store_of_another_user_is_not_taken_for_an_agents() -> None:
    with stranger("0") as port:
        backend = C10dBackend("127.0.0.1", port, None, {})
        with pytest.raises(UnavailableError, match=rf"another user of this host \(uid 12345\) listens on port {port}"):
            backend.open()
    with socket.create_server(("127.0.0.1", 0)) as own:
        backend = C10dBackend("127.0.0.1", own.getsockname()[1], None, {})
        backend.open()
        assert not backend.serves


@pytest.mark.parametrize("has_answered", [False, True])
def test_a_port_that_a_former_store_still_has_is_taken_when_that_has_ended(
    has_answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise nobody would host the store of an agent that is started again. But a store that was lost stays lost."""
    monkeypatch.setattr(c10d, "TCPStoreServer", lambda listening, environ: listening)
    with listen(port := free_port()):
        backend = C10dBackend("127.0.0.1", port, None, {})
        backend.open()
        with contextlib.closing(backend.connect()) as client:
            wait_until(lambda: client.is_connected)
            if has_answered:
                backend.addresses(client)
        assert not backend.serves
    with contextlib.closing(backend.connect()), contextlib.closing(backend):
        assert backend.serves is not has_answered


@needs_root
def test_the_user_who_has_a_port_is_named_if_his_process_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [])  # as for anybody but root
    with stranger("0") as port:
        assert port_owner(port) == "a process of the user with uid 12345"


@needs_root
@pytest.mark.parametrize("what", ["listens", "keeps quiet"])
def test_a_member_of_etcd_is_not_kept_away_by_another_users_name(what: str) -> None:
    job = f"job-{os.getpid()}-{what}"  # other tests have names of their own
    name = hashlib.sha256(f"h:1/{job}".encode()).hexdigest()
    with stranger(f"@elastic-launch/{name}", what):
        claimed = claim_endpoint("h:1", job)
        assert claimed
        claimed.close()


def test_each_round_has_a_fresh_port_unless_one_is_named() -> None:
    rendezvous = SingleNodeRendezvous("job", 2)
    assignments = [next_place(rendezvous) for _ in range(5)]
    assert all(assignment.port_picked for assignment in assignments)
    assert all(first.master_port != second.master_port for first, second in itertools.pairwise(assignments))
    rendezvous.close()
    port = free_port()
    rendezvous = SingleNodeRendezvous("job", 2, "host", port)
    assignment = next_place(rendezvous)
    assert (assignment.master_addr, assignment.master_port, assignment.port_picked) == ("host", port, False)
    rendezvous.close()


def test_named_port_in_use_is_an_error_before_anything_starts(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        done = job.run("--nproc-per-node", "2", "--master-port", str(port), job.script("mark()"))
    assert done.returncode == 69
    assert f"port {port} is in use by" in done.stderr
    assert done.stderr.count("\n") == 1
    assert job.marks() == []


@pytest.mark.parametrize("args", [(), ("--master-port", "{free}")], ids=["plain", "port"])
def test_torch_meets_on_the_reserved_port(job: Job, args: tuple[str, ...]) -> None:
    args = tuple(arg.format(free=free_port()) for arg in args)
    done = job.run("--nproc-per-node", "2", *args, job.script(ALL_REDUCE))
    assert done.returncode == 0, done.stderr
    assert sorted(job.marks()) == ["0.0 sum 2", "1.0 sum 2"]


def test_torch_meets_again_after_a_restart(job: Job) -> None:
    text = (
        "if restart == 0:\n    dist.init_process_group('gloo')\n    if rank == 1: os.kill(os.getpid(), 9)\n    wait()\n"
    )
    script = job.script(
        "import torch, torch.distributed as dist\n" + text + ALL_REDUCE.replace("mark", FAMILIES + "mark")
    )
    done = job.run("--nproc-per-node", "2", "--max-restarts", "1", "--preload", "torch", script)
    assert done.returncode == 0, done.stderr
    assert sorted(job.marks()) == ["0.1 AF_INET", "0.1 sum 2", "1.1 sum 2"]


def test_stolen_port_is_replaced_without_using_up_a_restart(job: Job) -> None:
    steal = (
        "import socket\n"
        "if rank == 0 and restart < 2:\n"
        "    thief = socket.socket(); thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "    thief.bind(('', int(os.environ['MASTER_PORT']))); thief.listen()\n"
    )
    done = job.run("--nproc-per-node", "2", "--max-restarts", "0", "--preload", "torch", job.script(steal + ALL_REDUCE))
    assert done.returncode == 0, done.stderr
    assert sorted(job.marks()) == ["0.2 sum 2", "1.2 sum 2"]
    assert done.stderr.count("restarting on another port, without using up a restart") == 2
