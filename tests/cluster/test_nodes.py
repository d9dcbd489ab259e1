"""Jobs of several nodes: real agents on this host, with real stores."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from elastic_launch.core.store_requests import Set, Wait
from elastic_launch.host import former
from elastic_launch.store.client import connect
from tests.support.etcd import Trio
from tests.support.jobs import Job
from tests.support.leaks import wait_for_children
from tests.support.nodes import ALL_REDUCE, QUICK, STEADY, WARM, Nodes, c10d, listens, start_three, up
from tests.support.ports import free_port
from tests.support.servers import shared_etcd
from tests.support.waiting import DEADLINE, is_alive, wait_until

MARK = "e = os.environ\nmark(' '.join(f'{k}={e[k]}' for k in sys.argv[1:]))\n"
RUN = "mark('up'); wait()"


Node = Callable[..., subprocess.Popen[str]]


@pytest.fixture(params=["c10d", "static", "etcd"])
def nodes(request: pytest.FixtureRequest, job: Job) -> Nodes:
    """A job of two nodes over each backend."""
    if request.param == "etcd":
        return Nodes(job, "etcd", shared_etcd(), "2")
    return Nodes(job, request.param, f"127.0.0.1:{free_port()}", "2")


def marks_of(job: Job) -> dict[str, dict[str, str]]:
    """Return the variables that workers have noted, by RANK.RESTART."""
    return {line.split()[0]: dict(pair.split("=") for pair in line.split()[1:]) for line in job.marks()}


def test_ranks_and_sizes(nodes: Nodes, job: Job) -> None:
    script = job.script(
        "e = os.environ\n"
        "mark(' '.join(f'{k}={e[k]}' for k in ('LOCAL_RANK', 'GROUP_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE',"
        " 'GROUP_WORLD_SIZE', 'ROLE_RANK', 'ROLE_WORLD_SIZE', 'TORCHELASTIC_USE_AGENT_STORE')))"
    )
    first = nodes(0, "--nproc-per-node", "2", "--role", "trainer", script=script)
    second = nodes(1, "--nproc-per-node", "1", "--role", "reader", script=script)
    for process in (first, second):
        assert job.finish(process).returncode == 0
    told = marks_of(job)
    assert sorted(told) == ["0.0", "1.0", "2.0"]
    by_group: dict[str, list[dict[str, str]]] = {}
    for line in told.values():
        by_group.setdefault(line["GROUP_RANK"], []).append(line)
        assert (line["WORLD_SIZE"], line["GROUP_WORLD_SIZE"]) == ("3", "2")
        assert line["ROLE_WORLD_SIZE"] == line["LOCAL_WORLD_SIZE"]
        assert line["ROLE_RANK"] == line["LOCAL_RANK"]
        assert line["TORCHELASTIC_USE_AGENT_STORE"] == str(nodes.backend != "etcd")
    assert sorted(len(lines) for lines in by_group.values()) == [1, 2]


@pytest.mark.quick
def test_a_failure_anywhere_restarts_all_and_counts_once(nodes: Nodes, job: Job) -> None:
    script = job.script(
        "mark('up')\nif rank == 1 and restart == 0: wait_for('0.0 up'); sys.exit(3)\nif restart == 0: wait()\n"
    )
    results = [job.finish(process) for process in [nodes(n, "--max-restarts", "1", script=script) for n in (0, 1)]]
    assert [result.returncode for result in results] == [0, 0]
    assert sorted(job.marks()) == ["0.0 up", "0.1 up", "1.0 up", "1.1 up"]
    assert any("rank 1 on" in r.stderr and "(exit code 3): restart 1 of 1" in r.stderr for r in results)


def test_a_final_failure_is_the_same_everywhere(nodes: Nodes, job: Job) -> None:
    script = job.script("mark('up')\nif rank == 1: raise ValueError('boom')\nwait()\n")
    results = [job.finish(process) for process in [nodes(n, script=script) for n in (0, 1)]]
    assert [result.returncode for result in results] == [1, 1]
    for result in results:
        assert "ValueError: boom" in result.stderr
        assert "rank    : 1 (local rank 0" in result.stderr
        assert "Then" not in result.stderr, "the stopped worker did not fail"


def test_all_reduce_works_across_nodes_and_after_a_restart(nodes: Nodes, job: Job) -> None:
    script = job.script(ALL_REDUCE)
    for process in [nodes(n, "--max-restarts", "1", *WARM, script=script) for n in (0, 1)]:
        result = job.finish(process)
        assert result.returncode == 0, result.stderr
    assert {"0.1 sum=2", "1.1 sum=2"} <= set(job.marks())


def test_the_workers_may_serve_their_store_themselves(job: Job) -> None:
    nodes = c10d(job, "2", hosted=True)
    script = job.script(ALL_REDUCE)
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for process in [nodes(n, "--max-restarts", "1", *WARM, script=script, **env) for n in (0, 1)]:
        result = job.finish(process)
        assert result.returncode == 0, result.stderr
    assert {"0.1 sum=2", "1.1 sum=2"} <= set(job.marks())


@pytest.mark.parametrize("endpoint", ["[::1]", "localhost"])
def test_workers_get_the_store_address_that_their_agent_used(endpoint: str, job: Job) -> None:
    """A loopback address: so the stores, that of a further round included, listen on no other."""
    nodes = Nodes(job, "c10d", f"{endpoint}:{free_port()}", "2")
    script = job.script(
        "mark(os.environ['MASTER_ADDR'] + ' ' + os.environ['MASTER_PORT'])\n"
        "wait_for('go') if restart else sys.exit(rank)"
    )
    processes = [nodes(n, "--max-restarts", "1", script=script) for n in (0, 1)]
    wait_until(lambda: up(job, 1, 2))
    seen = {tuple(mark.split()[1:]) for mark in job.marks()}
    pids = {
        child.pid for child in psutil.Process().children(recursive=True)
    }  # others may listen elsewhere on that port
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids]
    found = [tuple(c.laddr) for c in listening]
    job.mark("go")
    for process in processes:
        assert job.finish(process).returncode == 0
    [addr] = {addr for addr, _ in seen}
    assert addr in (["::1"] if endpoint == "[::1]" else ["127.0.0.1", "::1"])
    ports = {int(port) for _, port in seen}
    assert len(ports) == 2
    assert {place for place in found if place[1] in ports} == {(addr, port) for port in ports}


def test_local_addr_of_the_host_is_the_master_address(job: Job) -> None:
    nodes = c10d(job, "2", hosted=True)
    script = job.script("mark(os.environ['MASTER_ADDR'])")
    first = nodes(0, "--local-addr", "127.0.0.3", script=script)
    nodes.wait_for_first()
    second = nodes(1, "--local-addr", "127.0.0.3", script=script)
    for process in (first, second):
        assert job.finish(process).returncode == 0
    assert {mark.split()[1] for mark in job.marks()} == {"127.0.0.3"}


def test_a_node_that_joins_is_in_the_next_round(job: Job) -> None:
    nodes = c10d(job, "1:2", f"{STEADY},last_call_timeout=1")
    script = job.script("mark('of ' + os.environ['WORLD_SIZE'])\nif restart == 0: wait()\n")
    first = nodes(0, script=script)
    job.wait_for("0.0 of 1")
    second = nodes(1, script=script)
    results = [job.finish(process) for process in (first, second)]
    assert [result.returncode for result in results] == [0, 0]
    assert sorted(job.marks()) == ["0.0 of 1", "0.1 of 2", "1.1 of 2"]
    assert "joins: stopping 1 worker" in results[0].stderr
    assert "the job already runs on 1 node; joining" in results[1].stderr or "joins" in results[0].stderr


def test_a_node_that_leaves_is_not_in_the_next_round_which_is_uncharged(job: Job) -> None:
    script = job.script("mark('of ' + os.environ['WORLD_SIZE'])\nif restart == 0: wait()\n")
    first, second, third = start_three(job, script, "2:3", "--max-restarts", "0")
    wait_until(lambda: up(job, 0, 3))
    second.send_signal(signal.SIGTERM)
    assert job.finish(second).returncode == 128 + signal.SIGTERM
    results = [job.finish(process) for process in (first, third)]
    assert [result.returncode for result in results] == [0, 0]
    assert "is leaving (SIGTERM)" in results[0].stderr + results[1].stderr, "one speaks for all"
    assert {mark for mark in job.marks() if ".1 " in mark} == {"0.1 of 2", "1.1 of 2"}


def test_too_few_are_left_when_a_node_leaves(job: Job) -> None:
    first, second, third = start_three(job, job.script(RUN), "3")
    wait_until(lambda: up(job, 0, 3))
    third.send_signal(signal.SIGTERM)
    for process in (first, second, third):
        result = job.finish(process)
        assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert up(job, 0, 3)
    assert not up(job, 1, 1)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_node_is_not_in_the_next_round(signum: signal.Signals, job: Job) -> None:
    script = job.script("mark('of ' + os.environ['WORLD_SIZE'])\nif restart == 0: wait()\n")
    first, second, third = start_three(job, script, conf=f"{QUICK},store_timeout=1")
    wait_until(lambda: up(job, 0, 3))
    third.send_signal(signum)
    results = [job.finish(process) for process in (first, second)]
    assert [result.returncode for result in results] == [0, 0]
    assert "no heartbeat from" in results[0].stderr + results[1].stderr, "one speaks for all"
    assert {mark for mark in job.marks() if ".1 " in mark} == {"0.1 of 2", "1.1 of 2"}
    if signum == signal.SIGSTOP:
        third.send_signal(signal.SIGCONT)
        job.finish(third)  # whatever it finds, it runs no workers beside the others
        assert {mark for mark in job.marks() if ".1 " in mark} == {"0.1 of 2", "1.1 of 2"}
    else:
        job.finish(third)


def test_an_agent_that_is_started_again_takes_its_place_at_once(job: Job) -> None:
    """But not before the former one's workers are gone: here its keeper has been stopped."""
    script = job.script("mark('of ' + os.environ['WORLD_SIZE'])\nif restart == 0: wait()\n")
    nodes = c10d(job, "3", "keep_alive_interval=100")
    agents = [nodes(0, script=script)]
    nodes.wait_for_first()
    agents += [nodes(number, script=script) for number in (1, 2)]
    wait_until(lambda: up(job, 0, 3))
    victim, started = agents[2].pid, former.start_time(agents[2].pid)
    assert not former.is_gone(victim, started)
    [keeper] = [child for child in psutil.Process(victim).children() if child.name() == "elastic-keeper"]
    keeper.send_signal(signal.SIGSTOP)
    agents[2].send_signal(signal.SIGKILL)
    wait_until(lambda: former.start_time(victim) != started)
    assert not former.is_gone(victim, started), "its workers live"
    again = nodes(2, script=script)
    lines = again.stderr
    assert lines is not None
    wait_until(lambda: "waiting as a spare" in lines.readline())
    keeper.send_signal(signal.SIGCONT)
    results = [job.finish(process) for process in (agents[0], agents[1], again)]
    assert [result.returncode for result in results] == [0, 0, 0]
    assert f"the agent (pid {victim}) is gone; another was started" in results[0].stderr + results[1].stderr
    assert {mark for mark in job.marks() if ".1 " in mark} == {f"{rank}.1 of 3" for rank in range(3)}
    job.finish(agents[2])


def test_a_spare_takes_over(job: Job) -> None:
    script = job.script("mark('of ' + os.environ['WORLD_SIZE'])\nif restart == 0: wait()\n")
    nodes = c10d(job, "2", QUICK)
    first = nodes(0, script=script)
    nodes.wait_for_first()
    second = nodes(1, script=script)
    wait_until(lambda: up(job, 0, 2))
    spare = nodes(2, script=script)
    lines = spare.stderr
    assert lines is not None
    wait_until(lambda: "waiting as a spare" in lines.readline())
    second.send_signal(signal.SIGKILL)
    assert job.finish(second).returncode == -signal.SIGKILL
    for process in (first, spare):
        assert job.finish(process).returncode == 0
    assert {mark for mark in job.marks() if ".1 " in mark} == {"0.1 of 2", "1.1 of 2"}


def test_waiting_in_vain_ends_with_its_own_status_and_names_who_came(job: Job) -> None:
    nodes = c10d(job, "3", "join_timeout=6")
    result = job.finish(nodes(0, script=job.script(RUN)))
    assert result.returncode == 75
    assert re.search(r"1 of 3 nodes has joined after \d+ s: \S+; gave up \(join_timeout=6 s\)", result.stderr)
    assert job.marks() == []


def test_times_may_be_longer_than_the_system_can_wait(job: Job) -> None:
    node = Nodes(job, "c10d", f"127.0.0.1:{free_port()}", "1:2")
    conf = "keep_alive_interval=1e10,close_timeout=1e10,join_timeout=1e300,last_call_timeout=0.1"
    assert job.finish(node(0, "--rdzv-conf", conf, script=job.script("mark()"))).returncode == 0
    assert len(job.marks()) == 1


def test_nobody_answers_at_the_endpoint(job: Job) -> None:
    nodes = Nodes(job, "c10d", f"127.0.0.1:{free_port()}", "2", "join_timeout=1,is_host=false")
    result = job.finish(nodes(0, script=job.script(RUN)))
    assert result.returncode == 69
    assert "connection refused: nothing listens there" in result.stderr


def test_two_nodes_that_ask_for_one_rank_are_named(job: Job) -> None:
    nodes = Nodes(job, "static", f"127.0.0.1:{free_port()}", "3")
    script = job.script(RUN)
    processes = [nodes(n, script=script) for n in (0, 1, 1)]
    for process in processes:
        result = job.finish(process)
        assert result.returncode == 2
        assert "two nodes ask for --node-rank=1" in result.stderr
        assert len(re.findall(r"\(pid \d+\)", result.stderr)) >= 2


def test_node_rank_is_honoured_under_c10d(job: Job) -> None:
    nodes = c10d(job, "3")
    script = job.script("mark('node ' + os.environ['NODE'])")
    processes = [nodes(n, "--node-rank", str(2 - n), script=script, NODE=str(2 - n)) for n in range(3)]
    for process in processes:
        assert job.finish(process).returncode == 0
    assert sorted(job.marks()) == ["0.0 node 0", "1.0 node 1", "2.0 node 2"]


def test_the_five_variables_of_kubernetes_operators_launch_a_job(job: Job) -> None:
    script = job.script("mark(os.environ['WORLD_SIZE'])")
    port = str(free_port())
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    for process in [job.start(script, **common, PET_NODE_RANK=str(n)) for n in (0, 1)]:
        result = job.finish(process)
        assert result.returncode == 0, result.stderr
    assert sorted(job.marks()) == ["0.0 4", "1.0 4", "2.0 4", "3.0 4"]


def test_a_finished_job_stays_finished(job: Job) -> None:
    nodes = Nodes(job, "etcd", shared_etcd(), "2")
    script = job.script("mark()")
    for process in [nodes(n, script=script) for n in (0, 1)]:
        assert job.finish(process).returncode == 0
    late = job.finish(nodes(2, script=script))
    assert late.returncode == 0
    assert f"job {nodes.run_id} has already ended" in late.stderr
    assert sorted(job.marks()) == ["0.0", "1.0"]


def test_one_of_three_members_of_etcd_may_die(job: Job) -> None:
    trio = Trio()
    try:
        nodes = Nodes(job, "etcd", trio.endpoints, "2", "keep_alive_interval=5")  # longer than a failover of etcd
        script = job.script("mark('up')\nif restart == 0: wait()\n")
        processes = [nodes(n, "--max-restarts", "1", script=script) for n in (0, 1)]
        wait_until(lambda: up(job, 0, 2))
        trio.servers[0].kill()  # the one that both use, because it is the first endpoint
        wait_until(lambda: not listens(trio.servers[0].get_endpoint()))
        [pid] = [
            child.pid
            for process in processes
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.environ().get("RANK") == "1"
        ]
        os.kill(pid, signal.SIGKILL)
        for process in processes:
            result = job.finish(process)
            assert result.returncode == 0, result.stderr
    finally:
        for server in trio.servers:
            server.kill()
            server.stop()
    assert {mark for mark in job.marks() if ".1 " in mark} == {"0.1 up", "1.1 up"}


def test_an_endpoint_of_a_stranger_is_named(job: Job) -> None:
    class Silent(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        server.daemon_threads = False  # leaving the block waits for the threads of connections
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        nodes = Nodes(job, "c10d", f"127.0.0.1:{server.server_port}", "2", "read_timeout=1,join_timeout=20")
        result = job.finish(nodes(0, script=job.script(RUN)))
        server.shutdown()
        thread.join()
    assert result.returncode == 69
    assert f"127.0.0.1:{server.server_port}" in result.stderr
    assert "as a TCPStore" in result.stderr
    assert f"(pid {os.getpid()})" in result.stderr


def test_loss_of_the_store_host_stops_the_workers_and_is_named(job: Job) -> None:
    first, second, third = start_three(job, job.script(RUN), conf=f"{QUICK},store_timeout=1", hosted=True)
    wait_until(lambda: up(job, 0, 3))
    first.send_signal(signal.SIGKILL)
    job.finish(first)
    for process in (second, third):
        result = job.finish(process)
        assert result.returncode == 69, result.stderr
        assert "the store at 127.0.0.1:" in result.stderr


def test_a_job_continues_when_the_store_host_comes_back(job: Job) -> None:
    script = job.script("mark('of ' + os.environ['WORLD_SIZE'])\nif restart == 0: wait()\n")
    nodes = c10d(job, "2", QUICK, hosted=True)
    first = nodes(0, script=script)
    nodes.wait_for_first()
    second = nodes(1, script=script)
    wait_until(lambda: up(job, 0, 2))
    first.send_signal(signal.SIGKILL)
    job.finish(first)
    again = nodes(0, script=script)
    for process in (again, second):
        result = job.finish(process)
        assert result.returncode == 0, result.stderr
    assert {mark for mark in job.marks() if ".1 " in mark} == {"0.1 of 2", "1.1 of 2"}


def test_a_killed_agent_leaves_nothing_behind(job: Job) -> None:
    script = job.script("mark(str(os.getpid()))\nwait()")
    first, second, third = start_three(job, script, hosted=True)
    wait_until(lambda: up(job, 0, 3))
    pids = [int(mark.split()[1]) for mark in job.marks()]
    for process in (first, second, third):
        process.send_signal(signal.SIGKILL)
        job.finish(process)
    wait_until(lambda: not any(map(is_alive, pids)))
    wait_for_children()


def test_a_node_whose_workers_succeeded_stays_for_another_round(job: Job) -> None:
    nodes = c10d(job, "2", QUICK)
    script = job.script("mark('up')\nif rank == 1 and restart == 0: wait()\n")
    first = nodes(0, "--node-rank", "0", script=script)
    nodes.wait_for_first()
    second = nodes(1, "--node-rank", "1", script=script)
    wait_until(lambda: up(job, 0, 2))
    third = nodes(1, "--node-rank", "1", script=script)
    lines = third.stderr
    assert lines is not None
    wait_until(lambda: "waiting as a spare" in lines.readline())
    second.send_signal(signal.SIGKILL)
    job.finish(second)
    for process in (first, third):
        result = job.finish(process)
        assert result.returncode == 0, result.stderr
    assert {"0.1 up", "1.1 up"} <= set(job.marks())


def test_a_node_that_left_or_died_while_joining_is_not_a_member(job: Job) -> None:
    nodes = Nodes(job, "etcd", shared_etcd(), "2", QUICK)
    script = job.script("mark()")
    for signum in (signal.SIGTERM, signal.SIGKILL):
        gone = nodes(0, script=script)
        lines = gone.stderr
        assert lines is not None
        wait_until(lambda lines=lines: "1 of 2 nodes has joined" in lines.readline())  # type: ignore[misc]
        gone.send_signal(signum)
        assert job.finish(gone).returncode == (143 if signum == signal.SIGTERM else -9)
    for process in [nodes(n, script=script) for n in (1, 2)]:
        result = job.finish(process)
        assert result.returncode == 0, result.stderr
    assert sorted(job.marks()) == ["0.0", "1.0"]


def test_a_store_host_that_leaves_while_nodes_join_notifies_the_others(job: Job) -> None:
    nodes = c10d(job, "3", "last_call_timeout=1", hosted=True)
    script = job.script(RUN)
    host = nodes(0, script=script)
    nodes.wait_for_first()
    other = nodes(1, script=script)
    lines = other.stderr
    assert lines is not None
    wait_until(lambda: "2 of 3 nodes have joined" in lines.readline())
    host.send_signal(signal.SIGINT)
    assert job.finish(host).returncode == 128 + signal.SIGINT
    assert job.finish(other).returncode == 128 + signal.SIGINT


def test_workers_are_stopped_when_the_store_does_not_answer_for_too_long(job: Job) -> None:
    # The workers get 4.5 s to stop. With a shorter deadline they might be killed first.
    conf = "last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=6,store_timeout=60,read_timeout=60"
    nodes = c10d(job, "2", conf, hosted=True)
    script = job.script(
        "signal.signal(signal.SIGTERM, lambda *_: (mark('stopped'), os._exit(0)))\n"
        "mark('up')\n"
        "if restart == 0: wait()\n"
    )
    first = nodes(0, script=script)
    nodes.wait_for_first()
    second = nodes(1, script=script)
    wait_until(lambda: up(job, 0, 2))
    [store] = [p for p in psutil.Process(first.pid).children() if "tcpstore_server_main" in " ".join(p.cmdline())]
    store.suspend()
    job.wait_for("0.0 stopped", "1.0 stopped")
    store.resume()
    for process in (first, second):
        result = job.finish(process)
        assert result.returncode == 0, result.stderr
        assert "the store has not answered for" in result.stderr, "each tells its own trouble"
    assert {"0.1 up", "1.1 up"} <= set(job.marks())


def test_a_stubborn_worker_dies_in_time_when_the_store_is_gone(job: Job) -> None:
    nodes = c10d(job, "2", f"{QUICK},store_timeout=1", hosted=True)
    script = job.script("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nmark('up')\nwait()\n")
    first = nodes(0, "--shutdown-timeout", "1", script=script)
    nodes.wait_for_first()
    second = nodes(1, "--shutdown-timeout", "1", script=script)
    wait_until(lambda: up(job, 0, 2))
    [store] = [p for p in psutil.Process(first.pid).children() if "tcpstore_server_main" in " ".join(p.cmdline())]
    store.kill()
    for process in (first, second):
        assert job.finish(process).returncode == 69


def test_nodes_with_different_options_are_named(job: Job) -> None:
    nodes = c10d(job, "2")
    script = job.script(RUN)
    first = nodes(0, script=script)
    nodes.wait_for_first()
    second = Nodes(job, "c10d", nodes.endpoint, "3", run_id=nodes.run_id)(1, script=script)
    for process in (first, second):
        result = job.finish(process)
        assert result.returncode == 2
        assert "was started with --nnodes=" in result.stderr


def forge(nodes: Nodes, **values: bytes) -> None:
    """Write to the first round's keys, as everybody can who reaches the store; ``__`` stands for a slash."""
    host, port = nodes.endpoint.rsplit(":", 1)
    items = tuple((nodes.key(f"0/{name.replace('__', '/')}"), value) for name, value in values.items())
    with contextlib.closing(connect((host, int(port)), socket.AF_INET, "store")) as stranger:
        stranger.call(Set(items), DEADLINE)
        stranger.call(Wait(tuple(key for key, _ in items)), DEADLINE)  # they have arrived


def test_a_stranger_among_the_nodes_is_ignored(job: Job) -> None:
    nodes = c10d(job, "2")
    script = job.script("mark('up')")
    first = nodes(0, script=script)
    nodes.wait_for_first()
    forge(nodes, node__2=b'{"node": 1}', ticket=b"2")
    second = nodes(1, script=script)
    results = [job.finish(process) for process in (first, second)]
    assert [result.returncode for result in results] == [0, 0]
    assert f"ignored a node: unexpected data in the store: {nodes.key('0/node/2')} node: must be" in results[0].stderr


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (
            b'{"kind":"done","reason":"all workers succeeded"}',
            "says that all workers succeeded, but this node's have not",
        ),
        (b'{"kind":"stop","reason":"stop","signum":0}', "must have the failure, the signal, or the reason"),
        (b'{"kind":"error","reason":"\\u001b[2J","status":0}', "must have the failure, the signal, or the reason"),
        (b"\xff" * 100, "is no JSON"),
    ],
)
def test_a_forged_end_ends_the_job_with_one_line_and_never_well(job: Job, end: bytes, line: str) -> None:
    nodes = c10d(job, "2")
    script = job.script(RUN)
    processes = [nodes(number, script=script) for number in range(2)]
    wait_until(lambda: up(job, 0, 2))
    forge(nodes, end=end)
    for result in map(job.finish, processes):
        assert result.returncode == 69
        assert f"unexpected data in the store: {nodes.key('0/end')} {line}" in result.stderr
        assert "Traceback" not in result.stderr
        assert "\x1b" not in result.stderr


def test_tickets_of_nobody_end_the_job_with_one_line(job: Job) -> None:
    nodes = c10d(job, "2")
    first = nodes(0, script=job.script(RUN))
    nodes.wait_for_first()
    forge(nodes, ticket=b"1000000000")
    result = job.finish(first)
    assert result.returncode == 69
    assert f"{nodes.key('0/ticket')} must be a number from 0 to 65536" in result.stderr


def test_a_worker_of_a_frozen_host_does_nothing_more_when_it_is_the_first_to_wake(job: Job) -> None:
    """With the hosts' clocks running on, as they do while a virtual machine is paused."""
    script = job.script(
        "from elastic_launch import worker\n"
        "mark(f'pid {os.getpid()}')\n"
        "while restart == 0:\n"
        "    if os.path.exists(__file__ + f'.{rank}.freeze'): os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    worker.progress()\n"
        "    with open(__file__ + f'.{rank}', 'a') as steps: steps.write('.')\n"
        "    time.sleep(0.05)\n"
    )
    options = ("--shutdown-timeout", "1")
    first, second, third = start_three(job, script, "2:3", *options, conf=f"{QUICK},store_timeout=1")
    wait_until(lambda: up(job, 0, 3))
    pids = {int(mark.split(".")[0]): int(mark.split()[2]) for mark in job.marks()}
    keeper = psutil.Process(third.pid).children()[0]
    (rank,) = (rank for rank, pid in pids.items() if psutil.Process(pid).ppid() == keeper.pid)
    steps = Path(f"{script}.{rank}")
    wait_until(lambda: steps.exists() and steps.stat().st_size > 3)
    worker = psutil.Process(pids[rank])
    Path(f"{script}.{rank}.freeze").touch()  # not by a signal: that could stop it in the middle of a step
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)
    for process in (third, keeper):
        process.send_signal(signal.SIGSTOP)
    wait_until(lambda: up(job, 1, 2))
    done = steps.stat().st_size
    looks = worker.num_ctx_switches().voluntary + 5
    worker.send_signal(signal.SIGCONT)
    wait_until(lambda: worker.num_ctx_switches().voluntary >= looks)
    assert steps.stat().st_size == done
    for process in (keeper, third):
        process.send_signal(signal.SIGCONT)
    wait_until(lambda: not is_alive(worker.pid))
    for process in (first, second, third):
        job.finish(process)


def test_workers_of_a_frozen_agent_die_before_others_take_their_place(job: Job) -> None:
    script = job.script(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nmark(f'pid {os.getpid()}')\nif restart == 0: wait()\n"
    )
    first, second, third = start_three(job, script, "2:3", "--shutdown-timeout", "1", conf=f"{QUICK},store_timeout=1")
    wait_until(lambda: up(job, 0, 3))
    pids = {int(mark.split()[2]) for mark in job.marks()}
    third.send_signal(signal.SIGSTOP)
    wait_until(lambda: up(job, 1, 1))
    assert not any(map(is_alive, pids)), "also those of the agent that is still stopped"
    assert [job.finish(process).returncode for process in (first, second)] == [0, 0]
    third.send_signal(signal.SIGCONT)
    job.finish(third)
