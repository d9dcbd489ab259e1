"""The control socket: real agents, real clients, and clients that do what none should."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from elastic_launch import LaunchConfig, SignalException, __version__, elastic_launch
from elastic_launch.agent.loop import LoopSource
from elastic_launch.control import client as control_client
from elastic_launch.control.client import ControlClient, ask_all, everybodys_sockets, sockets
from elastic_launch.control.connection import MAX_LINE, MAX_OUTPUT
from elastic_launch.control.directory import check, directory, make, socket_name
from elastic_launch.control.server import MAX_CLIENTS, ControlServer
from elastic_launch.core.agent.messages import AgentEvent, Signalled
from elastic_launch.errors import UnavailableError, UsageError
from tests.support.control import asked, connected, lines, one_socket, status_when
from tests.support.jobs import METHODS, TWO, Job
from tests.support.leaks import children
from tests.support.waiting import DEADLINE, is_alive, wait_until

RUN = "mark('up'); wait()\n"


# ---- A server and its clients, without an agent


class Operator:
    """Answers for no agent."""

    def __init__(self) -> None:
        self.version = 0
        self.padding = ""

    def status(self) -> dict[str, Any]:
        if self.padding == "broken":
            raise RuntimeError("no status")
        return {"number": self.version, "padding": self.padding}

    def carry_out(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[AgentEvent]]:
        if request["request"] == "stop":
            return {"ok": True}, [Signalled(15, 1.0)]
        raise UsageError("unknown")


@pytest.fixture
def operator() -> Operator:
    return Operator()


@pytest.fixture
def server(operator: Operator) -> Iterator[ControlServer]:
    server = ControlServer("my job", os.environ, operator)
    yield server
    server.close()


def turn(source: LoopSource, seconds: float = 0.0) -> list[AgentEvent]:
    """Do what the agent's loop does, once; wait up to some seconds for a reason."""
    poller = select.poll()
    for fd, mask in source.descriptors():
        poller.register(fd, mask)
    return source.take([fd for fd, _ in poller.poll(seconds * 1000)])


def served(server: ControlServer, sock: socket.socket) -> list[dict[str, Any]]:
    """Return the replies of a server that runs until it closes the connection."""
    sock.setblocking(False)
    data = b""
    while True:
        turn(server, 0.01)
        with contextlib.suppress(BlockingIOError):
            try:
                block = sock.recv(1 << 16)
            except ConnectionResetError:
                block = b""
            if not block:
                sock.close()
                return [json.loads(line) for line in data.splitlines()]
            data += block


def reply(server: ControlServer, sock: socket.socket) -> dict[str, Any]:
    """Return the reply of a server to one request."""
    sock.setblocking(False)
    data = b""
    while not data.endswith(b"\n"):
        turn(server, 0.01)
        with contextlib.suppress(BlockingIOError):
            data += sock.recv(1 << 16)
    return dict(json.loads(data))


def test_requests_are_answered_in_order_on_one_connection(server: ControlServer) -> None:
    sock = connected(server.path)
    sock.sendall(b'{"request": "status"}\n{"request": "nonsense"}\n{"request": "stop"}\n')
    sock.shutdown(socket.SHUT_WR)
    events: list[AgentEvent] = []
    while len(events) < 1:
        events += turn(server, 0.01)
    assert events == [Signalled(15, 1.0)]
    status, nonsense, stop = served(server, sock)
    assert status == {"version": 1, "ok": True, "status": {"number": 0, "padding": ""}}
    assert nonsense == {"version": 1, "ok": False, "code": "invalid", "error": "unknown"}
    assert stop == {"version": 1, "ok": True}


def test_a_server_that_nobody_asks_has_no_deadline(server: ControlServer) -> None:
    assert server.deadline() is None
    server.changed()
    assert server.deadline() is None
    assert [mask for _, mask in server.descriptors()] == [select.POLLIN]
    assert "elastic_launch.control.connection" in sys.modules  # imported by this file; see test_layers for the agent


def test_a_subscriber_gets_the_status_now_and_when_it_has_changed(server: ControlServer, operator: Operator) -> None:
    with connected(server.path) as sock:
        sock.sendall(b'{"request": "subscribe"}\n')
        assert reply(server, sock)["status"]["number"] == 0
        assert server.deadline() is None
        operator.version = 1
        server.changed()
        assert reply(server, sock)["status"]["number"] == 1
        for operator.version in range(2, 100):
            server.changed()
        assert server.deadline() is not None
        assert reply(server, sock)["status"]["number"] == 99, "changes in a short time are one update"


def test_the_last_change_reaches_a_subscriber_when_the_agent_ends(operator: Operator) -> None:
    server = ControlServer("job", os.environ, operator)
    sock = connected(server.path)
    sock.sendall(b'{"request": "subscribe"}\n')
    assert reply(server, sock)["status"]["number"] == 0
    operator.version = 1
    server.changed()
    server.close()
    assert [line["status"]["number"] for line in lines(sock)] == [1]
    assert not os.path.exists(server.path)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b"{}\n",
        b'{"request": 1}\n',
        b"[" * 60_000 + b"\n",
        b"x" * (MAX_LINE + 1),
        b'{"request": "' + b"x" * MAX_LINE + b'"}\n',
    ],
    ids=range(8),
)
def test_garbage_gets_one_error_and_the_connection_is_closed(server: ControlServer, garbage: bytes) -> None:
    sock = connected(server.path)
    sock.setblocking(False)
    rest = memoryview(garbage)
    while rest:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            rest = rest[sock.send(rest) :]
        turn(server)
        if len(server.descriptors()) == 1:
            break
    [error] = served(server, sock)
    assert (error["ok"], error["code"]) == (False, "invalid")


def test_a_request_of_the_largest_size_is_read(server: ControlServer) -> None:
    line = b'{"request": "status", "x": "'
    line += b"x" * (MAX_LINE - len(line) - 2) + b'"}\n'
    sock = connected(server.path)
    sock.sendall(line)
    sock.shutdown(socket.SHUT_WR)
    [answer] = served(server, sock)
    assert answer["ok"]


def test_a_client_that_never_reads_is_dropped(server: ControlServer, operator: Operator) -> None:
    operator.padding = "x" * 50_000
    with connected(server.path) as sock:
        sock.setblocking(False)
        asked_for = 0
        while len(server.descriptors()) == (2 if asked_for else 1):
            with contextlib.suppress(BlockingIOError):
                asked_for += sock.send(b'{"request": "status"}\n' * 10) // 22
            turn(server)
        assert asked_for * 50_000 > MAX_OUTPUT
    assert reply_of_another(server)["ok"]


def reply_of_another(server: ControlServer) -> dict[str, Any]:
    with connected(server.path) as other:
        other.sendall(b'{"request": "status"}\n')
        return reply(server, other)


def test_a_subscriber_that_does_not_read_gets_the_newest_status_when_it_does(
    server: ControlServer, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_launch.control.server.UPDATE_INTERVAL", 0.0)
    operator.padding = "x" * 300_000
    with connected(server.path) as sock:
        sock.sendall(b'{"request": "subscribe"}\n')
        sock.setblocking(False)
        for operator.version in range(1, 200):
            turn(server)
            server.changed()
        data = b""
        while b'"number":199' not in data:
            turn(server)
            with contextlib.suppress(BlockingIOError):
                data += sock.recv(1 << 20)
        assert data.count(b'"number"') < 10, "what it has missed does not matter"


def test_many_requests_at_once_are_answered_a_few_in_each_turn(server: ControlServer) -> None:
    sock = connected(server.path)
    sock.sendall(b'{"request": "status"}\n' * 50)
    turn(server)
    turn(server)
    assert server.deadline() == 0.0, "the loop returns at once, but looks after the others first"
    sock.shutdown(socket.SHUT_WR)
    assert len(served(server, sock)) == 50


def test_a_client_that_is_killed_does_no_harm(server: ControlServer) -> None:
    sock = connected(server.path)
    sock.sendall(b'{"request": "subscribe"}\n{"request": "sta')
    reply(server, sock)
    sock.close()
    server.changed()
    while len(server.descriptors()) > 1:
        turn(server, 0.01)
    assert reply_of_another(server)["ok"]


def test_a_client_too_many_is_told_so(server: ControlServer) -> None:
    socks = [connected(server.path) for _ in range(MAX_CLIENTS)]
    while len(server.descriptors()) <= MAX_CLIENTS:
        turn(server)
    [error] = served(server, connected(server.path))
    assert error["code"] == "refused"
    for sock in socks:
        sock.close()


def test_without_descriptors_for_clients_the_loop_does_not_spin(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(server.path):
        real = server._listening

        class Full:
            def accept(self) -> None:
                raise OSError(24, "Too many open files")

            def fileno(self) -> int:
                return real.fileno()

        monkeypatch.setattr(server, "_listening", Full())
        turn(server)
        assert server.descriptors() == []
        assert server.deadline() is not None
        monkeypatch.setattr(server, "_listening", real)
        wait_until(lambda: turn(server) == [] and server.descriptors(), "the server accepts again")


def test_a_status_that_cannot_be_told_fails_nobody(server: ControlServer, operator: Operator) -> None:
    operator.padding = "broken"
    sock = connected(server.path)
    sock.sendall(b'{"request": "status"}\n')
    assert reply(server, sock) == {
        "version": 1,
        "ok": False,
        "code": "internal",
        "error": "RuntimeError: no status",
    }
    sock.close()


# ---- Where sockets are


def test_the_directory_is_private_and_the_sockets_name_tells_the_job(server: ControlServer) -> None:
    folder = os.path.dirname(server.path)
    assert folder == os.path.join(os.environ["TMPDIR"], f"elastic-run-{os.getuid()}")
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert os.path.basename(server.path).startswith(f"my_job.{os.getpid()}.")


@pytest.mark.parametrize("when", ["before it is checked", "before it is used"])
def test_the_last_agent_removes_the_directory_even_if_another_is_about_to_use_it(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    first, second = (ControlServer("job", os.environ, operator) for _ in range(2))
    folder = os.path.dirname(first.path)
    first.close()
    assert os.listdir(folder) == [os.path.basename(second.path)]

    def make_too_early(path: str) -> None:
        make(path)
        second.close()

    def check_too_late(path: str, owner: int) -> None:
        second.close()
        check(path, owner)

    if when == "before it is used":
        monkeypatch.setattr("elastic_launch.control.server.make", make_too_early)
    else:
        monkeypatch.setattr("elastic_launch.control.directory.check", check_too_late)
    third = ControlServer("job", os.environ, operator)
    assert sockets(os.environ) == [third.path]
    third.close()
    assert not os.path.exists(folder)


def test_the_runtime_directory_is_preferred_if_it_is_this_users(tmp_path: Path) -> None:
    own = {"XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": "/elsewhere"}
    assert directory(own) == f"{tmp_path}/elastic-run"
    assert directory({**own, "XDG_RUNTIME_DIR": f"{tmp_path}/missing"}) == f"/elsewhere/elastic-run-{os.getuid()}"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    os.chown(foreign, 12345, 12345)
    assert directory({**own, "XDG_RUNTIME_DIR": str(foreign)}) == f"/elsewhere/elastic-run-{os.getuid()}"


def test_agents_of_both_directories_are_found(tmp_path: Path, operator: Operator) -> None:
    both = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    servers = [ControlServer("a", both, operator), ControlServer("b", os.environ, operator)]
    assert sockets(both) == [server.path for server in servers]
    for server in servers:
        server.close()


@pytest.mark.parametrize("what", ["open", "foreign", "file", "symlink", "no parent", "read-only parent"])
def test_a_directory_that_is_not_private_is_refused(
    what: str, tmp_path: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = tmp_path / f"elastic-run-{os.getuid()}"
    match what:
        case "open":
            folder.mkdir()
            folder.chmod(0o750)
        case "foreign":
            folder.mkdir(mode=0o700)
            os.chown(folder, 12345, 12345)
        case "file":
            folder.write_text("")
        case "symlink":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to("elsewhere")
        case "no parent":
            monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
        case "read-only parent":
            monkeypatch.setenv("TMPDIR", "/proc")
    with pytest.raises(UnavailableError) as error:
        ControlServer("job", os.environ, operator)
    assert "\n" not in str(error.value)
    assert f"elastic-run-{os.getuid()}: " in str(error.value)


@pytest.mark.parametrize("run_id", ["x" * 500, "../../etc/passwd", "ä ö/\n", ".", ""])
def test_any_job_id_makes_a_name(run_id: str, operator: Operator) -> None:
    assert len(socket_name(run_id)) < 70
    server = ControlServer(run_id, os.environ, operator)
    assert os.listdir(os.path.dirname(server.path)) == [os.path.basename(server.path)]
    server.close()


def test_a_directory_with_a_long_path_does(tmp_path: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(deep))
    server = ControlServer("job", os.environ, operator)
    assert sockets(os.environ) == [server.path]
    client = ControlClient(server.path)
    client.send({"request": "status"})
    while not (replies := client.take()):
        turn(server)
    assert replies[0]["ok"]
    client.close()
    server.close()


AS_NOBODY = """
import os, socket, sys
os.setgid(12345); os.setuid(12345)
try:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(sys.argv[1])
        try: sock.sendall(b'{"request": "stop"}\\n')
        except BrokenPipeError: pass
        print(sock.recv(1000).decode())
except PermissionError:
    print("denied")
"""


def test_another_user_cannot_ask(server: ControlServer) -> None:
    """Neither through the private directory, nor by a socket that somebody has made accessible."""
    command = [sys.executable, "-c", AS_NOBODY, server.path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "denied\n"
    folder = Path(server.path).parent
    for path, mode in ((folder.parent, 0o755), (folder, 0o755), (Path(server.path), 0o777)):
        path.chmod(mode)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            assert turn(server, 0.01) == []
        assert process.stdout
        assert json.loads(process.stdout.read())["code"] == "refused"


# ---- Leftovers


def test_what_a_dead_agent_left_is_removed(operator: Operator) -> None:
    server = ControlServer("job", os.environ, operator)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{server.path.removesuffix('.sock')}x.sock")
    assert len(sockets(os.environ)) == 2
    assert [path for path, _, _ in ask_all(sockets(os.environ), 0.0)] == [server.path]
    assert sockets(os.environ) == [server.path]
    server.close()


def test_a_socket_is_found_only_once_its_agent_listens(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it would refuse connections, and be removed as what a dead agent left."""
    found: list[list[str]] = []
    listen = socket.socket.listen

    def listen_late(sock: socket.socket, backlog: int) -> None:
        found.append(sockets(os.environ))
        listen(sock, backlog)

    monkeypatch.setattr(socket.socket, "listen", listen_late)
    server = ControlServer("job", os.environ, operator)
    found.append(sockets(os.environ))
    assert found == [[], [server.path]]
    server.close()


FORKED = """
import os, signal
from elastic_launch.control.server import ControlServer
server = ControlServer("job", os.environ, None)
if (copy := os.fork()) == 0:
    signal.pause()
print(copy, flush=True)
signal.pause()
"""


def test_a_process_that_was_forked_from_a_dead_agent_does_not_pass_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        copy = int(process.stdout.readline())
        [path] = sockets(os.environ)
        assert [found for found, _, _ in ask_all([path], 0.05)] == [path]
        process.kill()
        process.wait()
    assert is_alive(copy)
    assert ask_all([path]) == []
    assert sockets(os.environ) == []
    os.kill(copy, signal.SIGKILL)
    wait_until(lambda: not is_alive(copy))


# ---- Sockets of other users, which root reaches


def test_root_finds_the_directories_of_all_users(operator: Operator) -> None:
    temp = Path(os.environ["TMPDIR"])
    for name, uid, mode in (
        ("12345", 12345, 0o700),
        ("12346", 12347, 0o700),
        ("12348", 12348, 0o755),
        ("me", 0, 0o700),
    ):
        folder = temp / f"elastic-run-{name}"
        folder.mkdir()
        folder.chmod(mode)
        os.chown(folder, uid, uid)
    (temp / "elastic-run-12345" / "a.1.b.sock").touch()
    server = ControlServer("job", os.environ, operator)
    found, troubles = everybodys_sockets(os.environ)
    assert found == [server.path, f"{temp}/elastic-run-12345/a.1.b.sock"]
    assert [line.partition(": ")[0] for line in troubles] == [f"{temp}/elastic-run-{uid}" for uid in (12346, 12348)]
    os.seteuid(12345)
    try:
        (folders, _) = everybodys_sockets({"TMPDIR": str(temp)})
    finally:
        os.seteuid(0)
    assert folders == [], "of others, even their directories are not looked for"
    os.unlink(found[1])
    server.close()


def test_root_follows_no_link_to_an_agent_of_somebody_else_and_removes_nothing(operator: Operator) -> None:
    server = ControlServer("job", os.environ, operator)
    folder = Path(os.environ["TMPDIR"], "elastic-run-12345")
    folder.mkdir(mode=0o700)
    link, leftover = folder / "a.1.b.sock", folder / "a.1.c.sock"
    link.symlink_to(server.path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(leftover))
    os.chown(folder, 12345, 12345)
    assert ask_all([str(link), str(leftover)]) == [(str(link), 0, None)]
    assert turn(server) == []
    assert leftover.exists()
    server.close()


@pytest.mark.parametrize(
    "nonsense", [b"hello\n", b"[]\n", b"[" * 60_000 + b"\n", b"1\n{}\n", b"\xff\n", b"flood"], ids=range(6)
)
def test_what_answers_with_nonsense_harms_nobody_else(
    nonsense: bytes, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_client, "_MAX_REPLY", 1 << 20)
    server = ControlServer("job", os.environ, operator)
    path = f"{os.path.dirname(server.path)}/a.1.b.sock"
    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind(path)
        odd.listen()

        def answer() -> None:
            sock, _ = odd.accept()
            with sock, contextlib.suppress(ConnectionError):
                sock.recv(100)
                sock.sendall(nonsense)
                while nonsense == b"flood":
                    sock.sendall(b"x" * 65536)

        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                turn(server, 0.01)

        threads = [threading.Thread(target=answer), threading.Thread(target=serve)]
        for thread in threads:
            thread.start()
        try:
            found = {found: status for found, _, status in ask_all([path, server.path], DEADLINE)}
        finally:
            ended.set()
            for thread in threads:
                thread.join()
    assert found == {path: None, server.path: {"number": 0, "padding": ""}}
    os.unlink(path)
    server.close()


def test_a_reply_without_an_end_is_not_read_for_ever(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "_MAX_REPLY", 1000)

    class Flood:
        blocks = 0

        def recv(self, size: int) -> bytes:
            self.blocks += 1
            assert self.blocks < 100
            return b"x" * 100

    server = ControlServer("job", os.environ, operator)
    with contextlib.closing(ControlClient(server.path)) as client, monkeypatch.context() as patched:
        patched.setattr(client, "_sock", Flood())
        with pytest.raises(UnavailableError):
            client.take()
    server.close()


def test_an_agent_that_answered_while_the_asker_stood_still_is_not_silent(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(0.0, 10.0)

    def stand_still() -> float:
        turn(server)
        return next(times)

    with monkeypatch.context() as patched:
        patched.setattr(control_client, "time", SimpleNamespace(monotonic=stand_still))
        assert ask_all([server.path]) == [(server.path, os.getpid(), {"number": 0, "padding": ""})]


# ---- Real agents


def test_a_real_agent_says_how_it_is(job: Job) -> None:
    script = job.script(RUN)
    process = job.start(*TWO, "--max-restarts", "3", "--rdzv-id", "my-job", script)
    job.wait_for("0.0 up", "1.0 up")
    path = one_socket()
    assert asked(path, request="hello") == {
        "version": 1,
        "ok": True,
        "job": "my-job",
        "host": os.uname().nodename,
        "pid": process.pid,
        "launcher": __version__,
    }
    status = status_when(path, lambda status: status["workers"][1]["pid"])
    assert {
        name: status[name] for name in ("job", "state", "program", "round", "nodes", "group_rank", "world_size")
    } == {
        "job": "my-job",
        "state": "running",
        "program": script,
        "round": 0,
        "nodes": 1,
        "group_rank": 0,
        "world_size": 2,
    }
    assert (status["restarts"], status["max_restarts"], status["last_failure"]) == (0, 3, None)
    assert [(worker["rank"], worker["state"]) for worker in status["workers"]] == [(0, "running"), (1, "running")]
    assert all(is_alive(worker["pid"]) for worker in status["workers"])
    process.send_signal(signal.SIGTERM)
    job.finish(process)
    assert not os.path.exists(path)


def test_workers_and_helpers_do_not_inherit_the_socket(job: Job) -> None:
    files = ("-t", "3", "--log-dir", str(job.path / "logs"))
    process = job.start(*TWO, *files, job.script("subprocess.Popen(['sleep', '100'])\n" + RUN))
    job.wait_for("0.0 up", "1.0 up")
    path = one_socket()
    with connected(path) as sock:
        sock.sendall(b'{"request": "subscribe"}\n')
        assert sock.recv(10)
        agent = psutil.Process(process.pid)
        family = agent.children(recursive=True)
        assert len(family) == 5
        for child in family:
            assert not open_files(child) & sockets_of(agent, path)
    process.send_signal(signal.SIGTERM)
    job.finish(process)


def open_files(process: psutil.Process) -> set[str]:
    """What a process has open."""
    found = set()
    for fd in os.listdir(f"/proc/{process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it has just closed it
            found.add(os.readlink(f"/proc/{process.pid}/fd/{fd}"))
    return found


def sockets_of(agent: psutil.Process, path: str) -> set[str]:
    """An agent's control socket and those of its clients."""
    inodes = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        *_, inode, name = (*line.split(), "")[6:8] if len(line.split()) > 7 else (line.split()[6], "")
        if name == f"{path}.new":  # it got its present name later
            inodes.add(f"socket:[{inode}]")
    assert len(inodes) == 2, "the one that listens, and a client's"
    return inodes & open_files(agent)


def test_a_restart_is_another_round_that_uses_up_nothing(job: Job) -> None:
    process = job.start(*TWO, job.script("mark('up')\nif restart < 2: wait()\n"))
    path = one_socket()
    for attempt in range(2):
        job.wait_for(f"0.{attempt} up", f"1.{attempt} up")
        assert asked(path, request="restart")["ok"]
    done = job.finish(process)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"restart requested on {os.uname().nodename}: stopping 2 workers\n") == 2
    assert "re-formed: 1 node, 2 workers" in done.stderr
    assert sorted(job.marks()) == [f"{rank}.{attempt} up" for rank in range(2) for attempt in range(3)]


def test_rounds_and_their_ends_are_told(job: Job) -> None:
    process = job.start(
        *TWO, "--max-restarts", "1", job.script("mark('up')\nif restart == 0: wait_for('go'); 1/0\nwait()")
    )
    path = one_socket()
    job.wait_for("0.0 up", "1.0 up")
    job.mark("go")
    job.wait_for("0.1 up", "1.1 up")
    status = asked(path, request="status")["status"]
    assert (status["restarts"], status["round"]) == (1, 1)
    assert (status["totals"]["rounds"], status["totals"]["restarts"]) == (2, {"failed": 1})
    waited = status["totals"]["rendezvous_seconds"]
    assert 0 <= waited <= status["rounds"][1]["started_at"] - status["started_at"]
    assert "ZeroDivisionError: division by zero" in status["last_failure"]
    first, second = status["rounds"]
    assert (first["end"], first["reason"]) == ("failed", status["last_failure"])
    assert first["started_at"] <= first["ended_at"] <= second["started_at"]
    assert second["end"] is None
    assert asked(path, request="restart")["ok"]
    job.wait_for("0.2 up", "1.2 up")
    status = asked(path, request="status")["status"]
    assert (status["restarts"], status["uncharged_restarts"]) == (1, 1)
    assert (status["totals"]["rounds"], status["totals"]["restarts"]) == (3, {"failed": 1, "restart_requested": 1})
    assert status["totals"]["rendezvous_seconds"] >= waited
    process.send_signal(signal.SIGTERM)
    job.finish(process)


def test_a_stop_is_a_stop_as_by_a_signal(job: Job) -> None:
    stops = "signal.signal(signal.SIGTERM, lambda *_: (mark('stopped'), sys.exit(0)))\n"
    process = job.start(*TWO, job.script(stops + RUN))
    job.wait_for("0.0 up", "1.0 up")
    path = one_socket()
    assert asked(path, request="stop", signum=15) == {"version": 1, "ok": True, "scope": "job", "signum": 15}
    done = job.finish(process)
    assert done.returncode == 128 + signal.SIGTERM
    assert {"0.0 stopped", "1.0 stopped"} <= set(job.marks())
    assert f"stop requested on {os.uname().nodename}: stopping 2 workers" in done.stderr


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"request": "stop", "signum": 9}, "invalid"),
        ({"request": "stop", "signum": "SIGTERM"}, "invalid"),
        ({"request": "stop", "signum": True}, "invalid"),
        ({"request": "stop", "scope": "world"}, "invalid"),
        ({"request": "stop", "checkpoint": True}, "not_available"),
        ({"request": "launch"}, "invalid"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(job: Job, request_: dict[str, Any], code: str) -> None:
    process = job.start(job.script(RUN))
    job.wait_for("0.0 up")
    path = one_socket()
    answer = asked(path, **request_)
    assert (answer["ok"], answer["code"]) == (False, code)
    assert asked(path, request="status")["status"]["state"] == "running"
    process.send_signal(signal.SIGTERM)
    assert job.finish(process).returncode == 143


def test_hostile_clients_do_not_disturb_a_job(job: Job) -> None:
    """One never reads, one sends half a request, one garbage. Meanwhile the job fails, restarts and succeeds."""
    script = job.script("mark('up')\nif restart == 0: wait_for('go'); sys.exit(3)\n")
    process = job.start(*TWO, "--max-restarts", "1", script)
    job.wait_for("0.0 up", "1.0 up")
    path = one_socket()
    with connected(path) as never_reads, connected(path) as half, connected(path) as garbage:
        never_reads.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                never_reads.send(b'{"request": "subscribe"}\n' * 100)
        half.sendall(b'{"request": ')
        with contextlib.suppress(ConnectionError):  # it may be refused before it has been sent
            garbage.sendall(b"\0" * 100_000)
        assert asked(path, request="status")["ok"]
        job.mark("go")
        done = job.finish(process)
    assert done.returncode == 0, done.stderr
    assert {"0.1 up", "1.1 up"} <= set(job.marks())


@pytest.mark.parametrize("switch", ["0", "directory"])
def test_a_job_runs_without_a_socket(job: Job, switch: str) -> None:
    """Turned off, or because there is no private directory."""
    folder = Path(os.environ["TMPDIR"], f"elastic-run-{os.getuid()}")
    env = {"ELASTIC_LAUNCH_CONTROL": "0"}
    if switch == "directory":
        env = {}
        folder.write_text("")
    done = job.run("-v", job.script("mark('up')"), **env)
    assert done.returncode == 0
    assert job.marks() == ["0.0 up"]
    assert ("no control socket, so elastic-job does not find this node: " in done.stderr) == (switch == "directory")
    assert not folder.is_dir()
    folder.unlink(missing_ok=True)


def test_an_agent_that_is_stopped_does_not_answer_and_is_still_listed(job: Job) -> None:
    process = job.start(job.script(RUN))
    job.wait_for("0.0 up")
    path = one_socket()
    process.send_signal(signal.SIGSTOP)
    assert ask_all([path], 0.1) == [(path, process.pid, None)]
    process.send_signal(signal.SIGCONT)
    assert asked(path, request="stop")["ok"]
    job.finish(process)


def wait_for_file(path: str) -> None:
    wait_until(lambda: os.path.exists(path))


@pytest.mark.parametrize("method", METHODS)
def test_library_calls_have_sockets_too_several_at_once_in_threads(method: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 1, "verbosity": 0}
    ends: list[BaseException | None] = []

    def run(number: int) -> None:
        try:
            settings = LaunchConfig(run_id=f"job-{number}", start_method=method, **config)
            elastic_launch(settings, wait_for_file)(str(tmp_path / str(number)))
            ends.append(None)
        except SignalException as error:
            ends.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(sockets(os.environ)) == 2)
    paths = sockets(os.environ)
    for number, path in enumerate(paths):
        status = status_when(path, lambda status: status["state"] == "running" and status["workers"][0]["pid"])
        assert (status["job"], status["pid"]) == (f"job-{number}", os.getpid())
    assert asked(paths[0], request="stop")["ok"]
    wait_until(lambda: len(ends) == 1)
    assert isinstance(ends[0], SignalException)
    (tmp_path / "1").touch()
    for thread in threads:
        thread.join(DEADLINE)
    assert ends[1] is None
    assert sockets(os.environ) == []
    assert [child for child in children() if is_alive(child.pid)] == []


def test_the_source_of_the_agents_loop_is_complete(server: ControlServer) -> None:
    source: LoopSource = server
    ready: Collection[int] = ()
    assert source.take(ready) == []
