"""Jobs whose agents run etcd themselves: three agents on this host, each with its own address."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from elastic_launch.config import LaunchConfig
from elastic_launch.errors import RendezvousConnectionError, UsageError
from elastic_launch.host import token
from elastic_launch.host.addresses import Address
from elastic_launch.host.resolver import Resolver
from elastic_launch.rendezvous.backends import etcd
from elastic_launch.rendezvous.factory import create_built_in
from elastic_launch.store.etcd.certificates import JobCertificates
from elastic_launch.store.etcd.gateway import ask, tls_context
from elastic_launch.store.etcd.member import claim_endpoint
from elastic_launch.store.etcd.plan import MemberPlan
from tests.support.certificates import make_certificates
from tests.support.etcd import post
from tests.support.jobs import Job
from tests.support.leaks import wait_for_children
from tests.support.nodes import listens, up
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE as LONG
from tests.support.waiting import SOON, is_alive, wait_until

DEADLINE = 5.0
"""Keep-alive deadline: seconds without a heartbeat after which a node is lost."""
ELECTION = 2.0
"""Seconds in which etcd elects a new leader after the loss of one."""
CONF = "embedded=true,last_call_timeout=60,keep_alive_interval=0.5,keep_alive_max_attempt=10"
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
RUN = "mark('of ' + os.environ['WORLD_SIZE'])\nwait()\n"
ON_HOST = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
ONCE = "mark('of ' + os.environ['WORLD_SIZE'])\nif restart == 0: wait()\n"


class Agents:
    """Starts the agents of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.port = free_port(2)
        self.endpoints = [f"{host}:{self.port}" for host in HOSTS]

    def __call__(
        self, script: str, *args: str, nnodes: str = "2:3", conf: str = "", host: str = "", **env: str
    ) -> subprocess.Popen[str]:
        """Start one; ``host`` is another name for its host, which takes root."""
        words = ["--nnodes", nnodes, "--rdzv-backend", "etcd", "--rdzv-id", "job-1"]
        words += ["--rdzv-endpoint", ",".join(self.endpoints), "--rdzv-conf", CONF + conf]
        program = [sys.executable, "-m", "elastic_launch"]
        self.job.program = ["unshare", "--uts", sys.executable, "-ISc", ON_HOST, host, *program] if host else program
        return self.job.start(*words, *args, script, **env)

    def in_order(self, script: str, *args: str, count: int = 3, **more: Any) -> list[subprocess.Popen[str]]:
        """Start agents one after another: the first runs the member of the first endpoint, and so on."""
        found = []
        for _ in range(count):
            found.append(self(script, *args, **more))
            wait_until(lambda agent=found[-1]: supervisor_of(agent))  # type: ignore[misc]
        return found

    def ids(self, index: int) -> dict[str, str]:
        """Return the cluster's members as one of them knows them: ids by peer URL."""
        try:
            members = post(self.endpoints[index], "cluster/member/list").get("members", ())
        except OSError:
            return {}
        return {member["peerURLs"][0]: member["ID"] for member in members if member.get("clientURLs")}

    def three_ids(self, index: int) -> dict[str, str]:
        """Wait until one of the members knows three that have served. Return what ``ids`` does then."""
        found: dict[str, str] = {}

        def are_three() -> bool:
            nonlocal found
            found = self.ids(index)
            return len(found) == 3

        wait_until(are_three, "three members")
        return found

    def peer_url(self, index: int) -> str:
        return f"http://{HOSTS[index]}:{self.port + 1}"


def supervisor_of(agent: subprocess.Popen[str]) -> int:
    """Return the pid of the process that runs an agent's member; 0: the agent has not claimed an endpoint."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(agent.pid).children():
            if "member_main" in " ".join(child.cmdline()):
                return child.pid
    return 0


def etcd_of(agent: subprocess.Popen[str]) -> int:
    """Return the pid of an agent's etcd; 0: there is none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(agent.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "--initial-cluster" in child.cmdline() and "-c" not in child.cmdline():
                    return child.pid
    return 0


@pytest.fixture
def agents(job: Job) -> Iterator[Agents]:
    yield Agents(job)
    for process in job.processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    # Their children end by themselves a moment later.
    wait_for_children()


def finish(agents: Agents, processes: list[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    return [agents.job.finish(process) for process in processes]


def all_are_up(agents: Agents, restart: int, count: int) -> None:
    wait_until(lambda: up(agents.job, restart, count), f"{count} workers in round {restart}: {agents.job.marks()}")


# --- how a job ends


@pytest.mark.parametrize(
    ("script", "stop", "status"),
    [
        ("mark('up')\n", False, 0),
        (RUN, True, 143),
        # A failure, and slow workers: their nodes must not wait for nodes that were faster.
        ("mark('up')\nsignal.signal(15, lambda *_: (time.sleep(rank / 2), os._exit(0)))\n"
         "if rank == 0: wait_for('1.0 up', '2.0 up', '3.0 up'); sys.exit(7)\nwait()\n", False, 7),
    ],
    ids=["success", "signalled", "failure"],
)  # fmt: skip
def test_all_end_alike_and_soon(script: str, stop: bool, status: int, agents: Agents) -> None:
    """Run four agents, one of which has no member."""
    # With a deadline far above the time that the end may take on a busy machine.
    processes = [agents(agents.job.script(script), nnodes="4", conf=",keep_alive_interval=20") for _ in range(4)]
    all_are_up(agents, 0, 4)
    if stop:
        processes[0].send_signal(signal.SIGTERM)
    wait_until(lambda: any(process.poll() is not None for process in processes))
    first = time.monotonic()
    results = finish(agents, processes)
    assert [result.returncode for result in results] == [status] * 4, results
    assert time.monotonic() - first < SOON, "some waited for an answer that could not come"


def test_a_node_that_leaves_ends_its_member_and_the_others_go_on(agents: Agents) -> None:
    first, second, third = agents.in_order(agents.job.script(ONCE), conf=",keep_alive_interval=20")
    all_are_up(agents, 0, 3)
    first.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert agents.job.finish(first).returncode == 143
    assert time.monotonic() - began < SOON
    assert [result.returncode for result in finish(agents, [second, third])] == [0, 0]
    assert {"0.1 of 2", "1.1 of 2"} <= set(agents.job.marks())


# --- a host dies


def test_a_host_may_die(agents: Agents) -> None:
    processes = agents.in_order(agents.job.script(ONCE))
    all_are_up(agents, 0, 3)
    member = etcd_of(processes[0])
    began = time.monotonic()
    processes[0].kill()
    wait_until(lambda: not is_alive(member))
    all_are_up(agents, 1, 2)
    assert time.monotonic() - began < DEADLINE + ELECTION + SOON
    del processes[0]
    results = finish(agents, processes)
    assert [result.returncode for result in results] == [0, 0], results
    assert {mark for mark in agents.job.marks() if ".1 " in mark} == {"0.1 of 2", "1.1 of 2"}


@pytest.mark.parametrize("keeps_data", [False, True])
def test_a_replacement_joins_with_the_data_or_without(keeps_data: bool, agents: Agents, tmp_path: Path) -> None:
    script = agents.job.script(
        "mark('of ' + os.environ['WORLD_SIZE'])\nif os.environ['WORLD_SIZE'] != '3' or restart == 0: wait()\n"
        "wait_for('go')\n"
    )
    logs = ["--log-dir", str(tmp_path / "logs")] if keeps_data else []
    processes = agents.in_order(script, *logs)
    all_are_up(agents, 0, 3)
    before = agents.three_ids(1)
    processes[0].kill()
    agents.job.finish(processes[0])
    all_are_up(agents, 1, 2)
    replacement = agents(script, *logs)
    all_are_up(agents, 2, 3)
    after = agents.three_ids(0)  # from the new member: the others know it as what it replaces until then
    agents.job.mark("go")
    for result in finish(agents, [replacement, *processes[1:]]):
        assert result.returncode == 0, result.stderr
    is_same = {url: before[url] == after[url] for url in before}
    assert is_same == {agents.peer_url(index): keeps_data or index > 0 for index in range(3)}
    assert "0.2 of 3" in agents.job.marks()


def test_all_hosts_come_back_with_their_data(agents: Agents, tmp_path: Path) -> None:
    script = agents.job.script(ONCE)
    logs = ["--log-dir", str(tmp_path / "logs")]

    def start() -> list[subprocess.Popen[str]]:
        """Agents with hosts of their own: on one host, the first would tell that all are gone, and go on without."""
        return [agents(script, *logs, host=f"host-{number}") for number in range(3)]

    processes = start()
    all_are_up(agents, 0, 3)
    for process in processes:
        process.kill()
    for process in processes:  # only now: the others must not have time to go on without the first
        agents.job.finish(process)
    for result in finish(agents, start()):
        assert result.returncode == 0, result.stderr
    assert {mark for mark in agents.job.marks() if ".1 " in mark} >= {"0.1 of 3", "1.1 of 3", "2.1 of 3"}


def test_a_member_without_data_waits_for_a_majority_to_replace_it(agents: Agents, tmp_path: Path) -> None:
    script = agents.job.script("mark('of ' + os.environ['WORLD_SIZE'])\nif restart < 2: wait()\n")
    logs = tmp_path / "logs"
    args = ["--log-dir", str(logs)]
    processes = agents.in_order(script, *args)
    all_are_up(agents, 0, 3)
    agents.three_ids(2)
    members = [etcd_of(process) for process in processes[:2]]
    for process in processes[:2]:
        process.kill()
        agents.job.finish(process)
    wait_until(lambda: not any(map(is_alive, members)))
    shutil.rmtree(logs / "job-1" / "etcd" / f"127.0.0.1_{agents.port}")
    blank = agents(script, *args)
    lines = blank.stderr
    assert lines
    others = (
        f"127.0.0.2:{agents.port} does not answer (connection refused)",
        f"127.0.0.3:{agents.port} answers",  # within a second, or in a later line
    )
    line = next(line for line in lines if "has lost its data" in line and all(text in line for text in others))
    assert "must be replaced, which takes a majority of the others" in line
    back = agents(script, *args)
    # The two with data suffice for a new round. The third is in time for that one, or causes another.
    agents.three_ids(2)
    wait_until(lambda: all(listens(endpoint) for endpoint in agents.endpoints))
    for process in (blank, back, processes[2]):
        process.send_signal(signal.SIGTERM)
    assert {result.returncode for result in finish(agents, [blank, back, processes[2]])} == {143}


def test_members_and_clients_speak_tls(agents: Agents, tmp_path: Path) -> None:
    """A host dies, and an agent takes its place, as without TLS. Nobody else is let in."""
    make_certificates(tmp_path, *HOSTS)
    files = {"cacert": "ca.pem", "cert": "server.pem", "key": "server.key"}
    conf = "".join(f",{name}={tmp_path / file}" for name, file in files.items())
    processes = agents.in_order(
        agents.job.script("mark('of ' + os.environ['WORLD_SIZE'])\nif restart < 2: wait()\n"), conf=conf
    )
    all_are_up(agents, 0, 3)
    for port in (agents.port, agents.port + 1):
        assert ask(HOSTS[1], port, "/version").body is None, "without TLS"
        stranger = tls_context(str(tmp_path / "ca.pem"))
        assert ask(HOSTS[1], port, "/version", tls=stranger).body is None, "without a certificate"
        known = tls_context(*(str(tmp_path / file) for file in files.values()))
        wait_until(lambda port=port, tls=known: ask(HOSTS[1], port, "/version", tls=tls).body)  # type: ignore[misc]
    processes[0].kill()
    agents.job.finish(processes.pop(0))
    all_are_up(agents, 1, 2)
    processes.append(agents(agents.job.script(ONCE), conf=conf))
    all_are_up(agents, 2, 3)
    results = finish(agents, processes)
    assert [result.returncode for result in results] == [0, 0, 0], results


def test_with_a_token_members_and_clients_speak_tls_with_certificates_of_the_job(
    agents: Agents, tmp_path: Path
) -> None:
    file = str(tmp_path / "job.token")
    token.write(file)
    agents.endpoints = agents.endpoints[:2]  # both are needed for a majority
    script = agents.job.script("mark('of ' + os.environ['WORLD_SIZE'])\nwait_for('go')\n")
    processes = agents.in_order(script, "--token-file", file, nnodes="2", count=2)
    all_are_up(agents, 0, 2)
    with (
        contextlib.closing(JobCertificates(token.read(file), "job-1", HOSTS)) as own,
        contextlib.closing(JobCertificates(b"u" * 32, "job-1", HOSTS)) as others,
    ):
        known = tls_context(*own.conf.values())
        without = tls_context(own.conf["cacert"])
        stranger = tls_context(own.conf["cacert"], others.conf["cert"], others.conf["key"])
        for port in (agents.port, agents.port + 1):
            wait_until(lambda port=port: ask(HOSTS[1], port, "/version", tls=known).body)  # type: ignore[misc]
            for tls in (None, without, stranger):
                assert ask(HOSTS[1], port, "/version", tls=tls).body is None
    where = "--rdzv-backend", "etcd", "--rdzv-id", "job-1", "--rdzv-endpoint", ",".join(agents.endpoints)
    for words in ((*where, "--rdzv-conf", "embedded=true", "--token-file", file), ("job-1",)):
        status = (sys.executable, "-m", "elastic_launch.operate", "status", "--json", *words)
        seen = subprocess.run(status, capture_output=True, text=True, timeout=LONG, check=False)
        assert (seen.returncode, seen.stderr) == (0, "")
        assert json.loads(seen.stdout)["world_size"] == 2
    agents.job.mark("go")
    assert [agents.job.finish(process).returncode for process in processes] == [0, 0]


def test_etcd_that_is_killed_is_started_again(agents: Agents) -> None:
    processes = agents.in_order(agents.job.script("mark()\nwait_for('go')\n"), conf=",keep_alive_interval=3")
    all_are_up(agents, 0, 3)
    agents.three_ids(0)
    killed = etcd_of(processes[0])
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: etcd_of(processes[0]) not in (0, killed))
    agents.three_ids(0)
    agents.job.mark("go")
    results = finish(agents, processes)
    assert [result.returncode for result in results] == [0, 0, 0]
    assert f"the etcd member 127.0.0.1:{agents.port} of this host was killed by signal 9" in results[0].stderr
    assert "starting it again" in results[0].stderr
    assert not [mark for mark in agents.job.marks() if ".1" in mark]


def test_a_member_whose_supervisor_is_killed_ends_with_it(agents: Agents) -> None:
    processes = agents.in_order(agents.job.script("mark()\nwait_for('go')\n"))
    all_are_up(agents, 0, 3)
    agents.three_ids(0)
    etcd = etcd_of(processes[0])
    os.kill(supervisor_of(processes[0]), signal.SIGKILL)
    wait_until(lambda: not is_alive(etcd))
    agents.job.mark("go")
    results = finish(agents, processes)
    assert [result.returncode for result in results] == [0, 0, 0]
    assert "that ran this host's etcd member is gone" in results[0].stderr


# --- a member that cannot run


def test_a_port_in_use_by_a_stranger_costs_only_that_member(agents: Agents) -> None:
    with socket.create_server((HOSTS[2], agents.port + 1)):
        processes = [agents(agents.job.script("mark()\nwait_for('go')\n"), nnodes="3") for _ in range(3)]
        all_are_up(agents, 0, 3)
        with contextlib.ExitStack() as stack:
            texts = [stack.enter_context(Reader(process)) for process in processes]
            line = f"cannot listen on 127.0.0.3:{agents.port + 1}: Address already in use"
            wait_until(lambda: any(line in text.seen() for text in texts))
            agents.job.mark("go")
            assert [process.wait() for process in processes] == [0, 0, 0]


class Reader:
    """Reads the stderr of a process without waiting for more."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr
        self._stream = process.stderr
        self._text = ""

    def __enter__(self) -> Reader:
        os.set_blocking(self._stream.fileno(), False)
        return self

    def __exit__(self, *error: object) -> None:
        os.set_blocking(self._stream.fileno(), True)

    def seen(self) -> str:
        with contextlib.suppress(BlockingIOError):
            self._text += os.read(self._stream.fileno(), 1 << 16).decode()
        return self._text


def test_the_members_of_another_job_are_not_used(agents: Agents, tmp_path: Path) -> None:
    """Neither do clients use them, nor does a member that replaces a lost one."""
    script = agents.job.script(RUN)
    first = agents.in_order(script)
    all_are_up(agents, 0, 3)
    first.pop().kill()
    wait_until(lambda: not listens(agents.endpoints[2]))
    before = agents.three_ids(0)
    with contextlib.ExitStack() as stack:
        for endpoint in agents.endpoints[:2]:
            claimed = claim_endpoint(endpoint, "job-2")
            assert claimed
            stack.enter_context(claimed)
        second = agents(script, "--rdzv-id", "job-2", "--log-dir", str(tmp_path / "logs"), conf=",join_timeout=20")
        wait_until(lambda: etcd_of(second))
        result = agents.job.finish(second)
    assert result.returncode == 69
    for endpoint in agents.endpoints[:2]:
        assert f"{endpoint}: it is a member of another cluster; does another job" in result.stderr
    assert agents.three_ids(0) == before
    for process in first:
        process.send_signal(signal.SIGTERM)
    finish(agents, first)


def test_without_a_binary_the_agent_says_so(agents: Agents) -> None:
    result = agents.job.finish(agents(agents.job.script(RUN), TORCHELASTIC_ETCD_BINARY_PATH="/nowhere/etcd"))
    assert result.returncode == 69
    assert "TORCHELASTIC_ETCD_BINARY_PATH=/nowhere/etcd: this is not an executable program" in result.stderr


def test_the_last_error_of_etcd_is_shown(agents: Agents, tmp_path: Path) -> None:
    binary = tmp_path / "etcd"
    binary.write_text('#!/bin/sh\necho \'{"level":"fatal","msg":"no luck","error":"disk full"}\' >&2\nexit 3\n')
    binary.chmod(0o755)
    agents.endpoints = agents.endpoints[:1]
    process = agents(
        agents.job.script(RUN), "--log-dir", str(tmp_path / "logs"), conf=",join_timeout=10",
        TORCHELASTIC_ETCD_BINARY_PATH=str(binary),
    )  # fmt: skip
    result = agents.job.finish(process)
    assert result.returncode == 69
    assert (
        f"the etcd member 127.0.0.1:{agents.port} of this host ended with status 3: no luck: disk full" in result.stderr
    )
    assert "the job does not survive the loss of that host" in result.stderr


def test_data_that_etcd_cannot_read_are_replaced(agents: Agents, tmp_path: Path) -> None:
    script = agents.job.script(RUN)
    args = ["--log-dir", str(tmp_path / "logs")]
    processes = agents.in_order(script, *args)
    all_are_up(agents, 0, 3)
    agents.three_ids(1)
    member = etcd_of(processes[0])
    processes[0].kill()
    agents.job.finish(processes[0])
    wait_until(lambda: not is_alive(member))
    for file in (tmp_path / "logs").glob(f"job-1/etcd/127.0.0.1_{agents.port}/data/member/wal/*.wal"):
        file.write_bytes(b"garbage")
    all_are_up(agents, 1, 2)
    replacement = agents(script, *args)
    all_are_up(agents, 2, 3)
    agents.three_ids(0)
    processes[1].send_signal(signal.SIGTERM)
    agents.job.finish(processes[1])
    for process in (replacement, processes[2]):
        process.send_signal(signal.SIGTERM)
    told = finish(agents, [replacement, processes[2]])[0].stderr
    assert re.search(r"the etcd member \S+ of this host .*: starting it again", told), told


def test_a_name_that_cannot_be_resolved_at_first_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[MemberPlan] = []

    class Member:
        def __init__(self, plan: MemberPlan, environ: object) -> None:
            started.append(plan)

        def take(self) -> list[str]:
            return []

        def close(self) -> None:
            pass

    def resolve(self: object, host: str, port: int) -> list[Address]:
        if host == "late" and len(asked) < 2:
            asked.append(host)
            raise RendezvousConnectionError(f"cannot resolve {host!r} yet")
        return [(socket.AF_INET, ("127.0.0.1" if host == "late" else "192.0.2.1", port))]

    asked: list[str] = []
    monkeypatch.setattr(etcd, "EtcdMember", Member)
    monkeypatch.setattr(etcd, "LOOK_INTERVAL", 0.0)
    monkeypatch.setattr(Resolver, "resolve", resolve)
    members = [("late", free_port()), ("other-1", 1), ("other-2", 1)]
    backend = etcd.EmbeddedEtcdBackend(members, "job", {}, dict(os.environ), str(tmp_path), lambda line: None)
    backend.open()
    try:
        assert not started, "it is not known yet that this is its member"
        while not started:
            backend.take()
        backend.take()
    finally:
        backend.close()
    assert [plan.address for plan in started] == ["127.0.0.1"]


def test_a_name_that_cannot_be_resolved_at_all_is_asked_for_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(self: object, host: str, port: int) -> list[Address]:
        asked.append(now)
        raise RendezvousConnectionError(f"cannot resolve {host!r}")

    now, asked = 0.0, list[float]()
    monkeypatch.setattr(Resolver, "resolve", resolve)
    monkeypatch.setattr(etcd.EtcdBackend, "open", lambda self: None)
    monkeypatch.setattr(etcd, "time", SimpleNamespace(monotonic=lambda: now))
    backend = etcd.EmbeddedEtcdBackend([("wrong", 1)], "job", {}, {}, None, lambda line: None)
    with contextlib.closing(backend):
        backend.open()
        while now < 3600:
            now += 1
            backend.take()
    assert asked[:4] == [0, 1, 3, 7]
    assert 50 < len(asked) < 70, "within an hour"


# --- settings


def config(endpoint: str = "h:1,i:1,j:1", backend: str = "etcd", **conf: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=2, max_nodes=3, nproc_per_node=1, run_id="j", rdzv_backend=backend, rdzv_endpoint=endpoint,
        rdzv_configs={"embedded": "true", **conf},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (lambda: config(embedded="perhaps"), "embedded=perhaps: must be true or false"),
        (lambda: config("h:1", "c10d"), "embedded=true: needs --rdzv-backend etcd"),
        (lambda: config(cacert="/nowhere"), "cacert=/nowhere: No such file"),
        (lambda: config(user="x", password="y"), "user: embedded etcd (embedded=true) has no users"),
        (
            lambda: config(protocol="https"),
            "embedded etcd (embedded=true) with TLS needs cacert, cert and key; cacert is",
        ),
        (lambda: config("h:1,h:2,i:1"), "each member needs two ports of its own"),
        (lambda: config("h:65535"), "PORT must be below 65535"),
        (lambda: config("h:x"), "must be a port number"),
    ],
)
def test_wrong_settings_are_named(settings: Callable[[], LaunchConfig], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        create_built_in(settings(), {}, lambda line: None)


def test_the_bridge_says_what_is_missing_before_the_agent_gives_up_also_if_it_starts_late() -> None:
    backend = create_built_in(config(join_timeout="20"), {}, lambda line: None).backend  # type: ignore[attr-defined]
    assert backend.conf["start_timeout"] == "10.0"


@pytest.mark.parametrize(("endpoint", "text"), [("h:1", "with one member"), ("h:1,i:1", "with 2 members")])
def test_numbers_of_members_that_gain_nothing_are_warned_about(endpoint: str, text: str) -> None:
    told: list[str] = []
    create_built_in(config(endpoint), {}, told.append)
    assert any(text in line for line in told)


def test_an_endpoint_is_claimed_once() -> None:
    first = claim_endpoint("h:1", "j")
    assert first
    assert claim_endpoint("h:1", "j") is None
    other = claim_endpoint("h:1", "another job")
    assert other
    other.close()
    first.close()
    again = claim_endpoint("h:1", "j")
    assert again
    again.close()
