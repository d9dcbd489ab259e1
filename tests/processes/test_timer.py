"""Timers: the requests of workers, the agent's watchdog, the servers, and that all of them work with torch's."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_launch import timer
from elastic_launch.core.agent.messages import TimerExpired
from elastic_launch.core.timer_requests import LONGEST, ScopeRequest, parse, take_requests
from elastic_launch.errors import UnavailableError
from elastic_launch.workers.watchdog import Watchdog
from tests.support.waiting import DEADLINE, wait_until

WALL = 1_000_000.0
"""Time of a test's wall clock, in seconds since 1970."""


def line(pid: int = 7, scope: str = "s", expires_at: object = WALL, signum: int = 9) -> bytes:
    """Return a request as torch's client writes it."""
    fields = {"version": 1, "pid": pid, "scope_id": scope, "expiration_time": expires_at, "signal": signum}
    return json.dumps(fields).encode() + b"\n"


def write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        assert os.write(fd, data) == len(data)
    finally:
        os.close(fd)


def is_readable(watchdog: Watchdog, seconds: float = 0) -> bool:
    poller = select.poll()
    for fd, mask in watchdog.descriptors():
        poller.register(fd, mask)
    return bool(poller.poll(seconds * 1000))


def next_expired(watchdog: Watchdog) -> list[ScopeRequest]:
    """Wait as the agent does, for the pipe and the deadline."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        deadline = watchdog.deadline()
        is_readable(watchdog, max(0.0, (end if deadline is None else deadline) - time.monotonic()))
        if expired := watchdog.expired(time.monotonic()):
            return expired
    raise AssertionError("nothing expired")


class Wall:
    """A wall clock that a test sets."""

    now = WALL

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    return tmp_path / "timers"


@pytest.fixture
def watchdog(pipe: Path, wall: Wall) -> Iterator[Watchdog]:
    watchdog = Watchdog(str(pipe), wall)
    yield watchdog
    watchdog.close()


@pytest.fixture(autouse=True)
def _no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer.client, "_client", None)


# Requests


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no json",
        b"\xff\xfe\x00",
        b'["pid"]',
        b'"pid"',
        b'{"pid": 7}',
        b'{"pid": 7, "scope_id": "s", "expiration_time": 1',
        b'{"pid": "7", "scope_id": "s", "expiration_time": 1}',
        b'{"pid": true, "scope_id": "s", "expiration_time": 1}',
        b'{"pid": 7.0, "scope_id": "s", "expiration_time": 1}',
        b'{"pid": 0, "scope_id": "s", "expiration_time": 1}',
        b'{"pid": -1, "scope_id": "s", "expiration_time": 1}',
        b'{"pid": 99999999999, "scope_id": "s", "expiration_time": 1}',
        b'{"pid": 7, "scope_id": ["s"], "expiration_time": 1}',
        b'{"pid": 7, "scope_id": "s", "expiration_time": "1"}',
        b'{"pid": 7, "scope_id": "s", "expiration_time": true}',
        b'{"pid": 7, "scope_id": "s", "expiration_time": null}',
        b'{"pid": 7, "scope_id": "s", "expiration_time": NaN}',
        b'{"pid": 7, "scope_id": "s", "expiration_time": 1' + b"0" * 400 + b"}",
        b'{"pid": 7, "scope_id": "s", "expiration_time": 1, "signal": "KILL"}',
        b'{"pid": 7, "scope_id": "s", "expiration_time": 1, "signal": 65}',
        b'{"pid": 7, "scope_id": "' + b"s" * LONGEST + b'", "expiration_time": 1}',
        b'{"pid":' * 500,
    ],
)
def test_garbage_is_not_a_request_and_hides_none(text: bytes) -> None:
    assert parse(text) is None
    buffer = bytearray(text + b"\n" + line(1) + text + line(2))
    assert [request.pid for request in take_requests(buffer)] == [1, 2]
    assert not buffer


def test_requests_are_assembled_from_pieces() -> None:
    buffer = bytearray()
    found = []
    for byte in line(1, scope='a "{\\"version\\"') + line(2, "ü\n", expires_at=-1, signum=0):
        buffer.append(byte)
        found += take_requests(buffer)
    assert found == [ScopeRequest(1, 'a "{\\"version\\"', WALL, 9), ScopeRequest(2, "ü\n", -1.0, 0)]


def test_a_line_without_end_takes_bounded_memory() -> None:
    buffer = bytearray()
    for _ in range(100):
        buffer += b'{"version", "pid" ' * 1000
        assert take_requests(buffer) == []
        assert len(buffer) <= LONGEST
    buffer += line(3)
    assert [request.pid for request in take_requests(buffer)] == [3]


# The agent's side


def test_scope_that_is_not_left_expires_once(watchdog: Watchdog, pipe: Path) -> None:
    write(pipe, line(7, "late", WALL + 3, signal.SIGTERM) + line(7, "early", WALL + 2) + line(8, "left", WALL + 1))
    write(pipe, line(8, "left", -1, 0))
    assert watchdog.deadline() is None
    assert watchdog.expired(100.0) == []
    assert watchdog.deadline() == pytest.approx(102)
    assert watchdog.expired(101.9) == []
    assert [t._replace(expires_at=0) for t in watchdog.expired(102.5)] == [ScopeRequest(7, "early", 0, signal.SIGKILL)]
    assert watchdog.expired(102.5) == []
    assert watchdog.deadline() == pytest.approx(103)
    assert [(e.scope, e.signum) for e in watchdog.expired(103.5)] == [("late", signal.SIGTERM)]
    assert watchdog.deadline() is None


def test_event_names_the_process_to_kill_and_the_reason(watchdog: Watchdog, pipe: Path) -> None:
    nobody = 1 << 30  # an existing process would be inspected
    write(
        pipe, line(nobody, "slow", WALL - 1) + line(8, "not to be killed", WALL - 1, 0) + line(9, "in time", WALL + 60)
    )
    [event] = watchdog.take()
    assert event == TimerExpired(nobody, "was still in timer scope 'slow' when its time ran out")
    assert watchdog.take() == []


def test_entering_a_scope_again_restarts_its_timer(watchdog: Watchdog, pipe: Path) -> None:
    write(pipe, line(expires_at=WALL + 1) + line(expires_at=WALL + 9))
    assert watchdog.expired(0.0) == []
    assert watchdog.deadline() == pytest.approx(9)
    write(pipe, line(expires_at=float("inf")))
    assert watchdog.expired(0.0) == []
    assert watchdog.deadline() is None


def test_later_jumps_of_the_wall_clock_change_nothing(watchdog: Watchdog, pipe: Path, wall: Wall) -> None:
    write(pipe, line(1, expires_at=WALL + 10))
    watchdog.expired(0.0)
    wall.now += 3600
    write(pipe, line(2, expires_at=wall.now + 20))
    assert watchdog.expired(5.0) == []
    wall.now -= 7200
    write(pipe, line(3, expires_at=wall.now + 30))
    assert watchdog.expired(6.0) == []
    assert [e.pid for e in watchdog.expired(10.0)] == [1]
    assert [e.pid for e in watchdog.expired(25.0)] == [2]
    assert [e.pid for e in watchdog.expired(36.0)] == [3]


def test_delayed_agent_does_not_blame_a_process_that_has_left(watchdog: Watchdog, pipe: Path) -> None:
    write(pipe, line(1, expires_at=WALL - 5) + line(1, expires_at=-1) + line(2, expires_at=WALL - 5))
    assert watchdog.expired(0.0) == [ScopeRequest(2, "s", -5, signal.SIGKILL)]


def test_end_of_a_process_or_round_cancels_its_requests(watchdog: Watchdog, pipe: Path) -> None:
    write(pipe, line(1, "read") + line(2, "read"))
    assert watchdog.expired(0.0) != []
    write(pipe, line(1, "read", WALL + 1) + line(2, "read", WALL + 1))
    watchdog.expired(0.0)
    write(pipe, line(1, "unread") + line(2, "unread"))
    watchdog.forget(1)
    assert {e.pid for e in watchdog.expired(time.monotonic() + 9)} == {2}
    write(pipe, line(2, "unread", WALL + 1))
    watchdog.clear()
    assert watchdog.deadline() is None
    assert watchdog.expired(time.monotonic() + 9) == []


def test_pipe_is_quiet_when_writers_leave(watchdog: Watchdog, pipe: Path) -> None:
    assert pipe.stat().st_mode & 0o777 == 0o600
    write(pipe, line(expires_at=-1))
    assert is_readable(watchdog)
    watchdog.expired(0.0)
    assert not is_readable(watchdog, 0.05)


def test_flood_does_not_block_the_agent(watchdog: Watchdog, pipe: Path) -> None:
    stop = threading.Event()

    def flood() -> None:
        fd = os.open(pipe, os.O_WRONLY)
        try:
            while not stop.is_set():
                os.write(fd, b"x\n" * 2000)
        finally:
            os.close(fd)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(20):
            watchdog.expired(0.0)  # returns
    finally:
        stop.set()
        while thread.is_alive():
            watchdog.expired(0.0)
        thread.join()


def test_stale_pipe_is_replaced_and_closing_removes_it(pipe: Path) -> None:
    os.mkfifo(pipe)
    watchdog = Watchdog(str(pipe))
    write(pipe, line())
    assert is_readable(watchdog)
    watchdog.close()
    watchdog.close()
    assert not pipe.exists()


def test_files_and_pipes_of_others_are_left_alone(tmp_path: Path, watchdog: Watchdog, pipe: Path) -> None:
    with pytest.raises(UnavailableError, match="another agent reads"):
        Watchdog(str(pipe))
    write(pipe, line())
    assert is_readable(watchdog)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UnavailableError, match="TORCHELASTIC_TIMER_FILE"):
        Watchdog(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(UnavailableError, match="No such file or directory"):
        Watchdog(str(tmp_path / "missing" / "pipe"))


# Workers


WORKER = """
import sys, time
import {module} as timer
timer.configure(timer.FileTimerClient(sys.argv[1]))
with timer.expires(after=60):
    pass
with timer.expires(after=60, scope="outer"):
    with timer.expires(after=0.1, scope="slow"):
        time.sleep(600)
"""


@pytest.mark.parametrize("module", ["elastic_launch.timer", "torch.distributed.elastic.timer"])
def test_slow_worker_is_reported(module: str, pipe: Path) -> None:
    with contextlib.closing(Watchdog(str(pipe))) as watchdog:
        worker = subprocess.Popen([sys.executable, "-c", WORKER.format(module=module), str(pipe)])
        try:
            [expired] = next_expired(watchdog)
            assert (expired.pid, expired.scope, expired.signum) == (worker.pid, "slow", signal.SIGKILL)
            assert watchdog.deadline() == pytest.approx(time.monotonic() + 60, abs=40)
            watchdog.forget(worker.pid)
            assert watchdog.deadline() is None
        finally:
            worker.kill()
            worker.wait()


def test_our_client_works_with_torchs_server_and_the_signatures_are_equal(tmp_path: Path) -> None:
    signatures = """
import inspect
def signatures(module):
    names = ["configure", "expires", "TimerClient", "TimerRequest", "TimerServer", "FileTimerClient",
        "FileTimerRequest", "FileTimerServer", "LocalTimerClient", "LocalTimerServer"]
    found = {}
    for name in names:
        thing = getattr(module, name)
        functions = {name: thing} if inspect.isfunction(thing) else {
            f"{name}.{key}": getattr(thing, key) for key in dir(thing)
            if callable(getattr(thing, key)) and (key == "__init__" or not key.startswith("_"))}
        for key, function in functions.items():
            found[key] = [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
    return found
"""
    # torch's server also signals itself, so the signal must be one that it survives.
    program = f"""{signatures}
import os, signal, subprocess, sys
import torch.distributed.elastic.timer as torchs
import elastic_launch.timer as ours
theirs, mine = signatures(torchs), signatures(ours)
differ = {{key: (value, mine.get(key)) for key, value in theirs.items() if mine.get(key) != value}}
signal.signal(signal.SIGUSR1, lambda *args: None)
server = torchs.FileTimerServer(sys.argv[1], "job", max_interval=0.1)
server.start()
worker = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
print(worker.wait(), differ, flush=True)
os._exit(0)
"""
    worker = WORKER.format(module="elastic_launch.timer").replace("argv[1]", "argv[1], 10")
    worker = worker.replace("timer.configure", f"timer.client.PATIENCE = {DEADLINE}\ntimer.configure")
    args = [sys.executable, "-c", program, str(tmp_path / "pipe"), worker]
    run = subprocess.run(args, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert run.stdout == f"{-signal.SIGUSR1} {{}}\n", run.stderr


def test_scopes_without_a_name_are_distinct(watchdog: Watchdog, pipe: Path) -> None:
    assert inspect.signature(timer.expires).parameters.keys() == {"after", "scope", "client"}
    client = timer.FileTimerClient(str(pipe))

    @timer.expires(30, client=client)
    def decorated() -> None:
        with timer.expires(10, client=client), timer.expires(20, "named", client):
            pass
        watchdog.expired(0.0)

    with contextlib.suppress(ZeroDivisionError), timer.expires(40, client=client):
        decorated()
        watchdog.expired(0.0)
        assert watchdog.deadline() is not None  # one of the four scopes has not been left
        raise ZeroDivisionError
    watchdog.expired(0.0)
    assert watchdog.deadline() is None


def test_default_scope_is_the_callers_line(watchdog: Watchdog, pipe: Path, wall: Wall) -> None:
    timer.configure(timer.FileTimerClient(str(pipe), signal.SIGTERM))
    wall.now = time.time() - 60
    with timer.expires(after=10):
        assert watchdog.expired(0.0) == []
        assert watchdog.deadline() == pytest.approx(70, abs=9)
        [(pid, scope, _, signum)] = watchdog.expired(80.0)
    assert (pid, signum) == (os.getpid(), signal.SIGTERM)
    assert scope.startswith(f"{__file__}#")


def test_no_client_is_an_error_on_entry() -> None:
    scope = timer.expires(1)
    with pytest.raises(RuntimeError, match=r"timer\.configure"), scope:
        raise AssertionError("entered")


def test_client_reports_that_no_server_reads(tmp_path: Path, pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer.client, "PATIENCE", 0.1)
    client = timer.FileTimerClient(str(pipe))
    with pytest.raises(BrokenPipeError, match="TORCHELASTIC_ENABLE_FILE_TIMER"):
        client.acquire("s", 1.0)
    os.mkfifo(pipe)
    with pytest.raises(BrokenPipeError):
        client.release("s")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BrokenPipeError, match="not a named pipe"):
        timer.FileTimerClient(str(tmp_path / "file")).release("s")
    assert (tmp_path / "file").read_text() == "precious"


def test_client_waits_for_a_server_and_for_room_in_the_pipe(pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = timer.FileTimerClient(str(pipe))
    monkeypatch.setattr(timer.client, "PATIENCE", DEADLINE)
    sent = threading.Event()

    def fill() -> None:
        for _ in range(1000):
            client.acquire("s" * 3000, time.time() + 60)

    def send() -> None:
        client.acquire("s" * 3000, time.time() + 60)
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    with contextlib.closing(Watchdog(str(pipe))) as watchdog:
        thread.join()
        monkeypatch.setattr(timer.client, "PATIENCE", 0.05)
        with pytest.raises(BlockingIOError, match="full"):
            fill()
        monkeypatch.setattr(timer.client, "PATIENCE", DEADLINE)
        sent.clear()
        thread = threading.Thread(target=send)
        thread.start()
        assert not sent.wait(0.05)
        watchdog.expired(time.monotonic())
        thread.join()
        assert sent.is_set()


def test_scope_too_long_for_an_atomic_write_is_rejected(watchdog: Watchdog, pipe: Path) -> None:
    client = timer.FileTimerClient(str(pipe))
    with pytest.raises(RuntimeError, match="4096"):
        client.acquire("ü" * 1000, 1.0)
    assert not is_readable(watchdog)


# Servers


def test_file_server_kills_a_slow_process(pipe: Path) -> None:
    events: list[tuple[str, int | None]] = []

    def note(name: str, request: timer.FileTimerRequest | None) -> None:
        events.append((name, request.worker_pid if request else None))

    server = timer.FileTimerServer(str(pipe), "job", log_event=note)
    server.start()
    try:
        write(pipe, b"garbage\n" * 10 + line(os.getpid(), "fine", time.time() + 600))
        worker = subprocess.Popen([sys.executable, "-c", WORKER.format(module="elastic_launch.timer"), str(pipe)])
        assert worker.wait(DEADLINE) == -signal.SIGKILL
        wait_until(lambda: ("kill worker process", worker.pid) in events)
    finally:
        server.stop()
    server.stop()
    assert not pipe.exists()
    assert events == [
        ("watchdog started", None),
        ("timer expired", worker.pid),
        ("kill worker process", worker.pid),
        ("watchdog stopped", None),
    ]


def test_file_server_without_a_thread(pipe: Path) -> None:
    os.mkfifo(pipe)
    server = timer.FileTimerServer(str(pipe), "job")
    worker = subprocess.Popen(["sleep", "600"])
    try:
        write(pipe, line(worker.pid, "a", 5.0, 0) + line(worker.pid, "b", time.time() + 600) + line(1, "b", -1))
        server.run_once()  # signal 0: nothing is killed, and all timers of the process are cancelled
        assert server.get_expired_timers(time.time() + 900) == {}
        requests = [timer.FileTimerRequest(worker.pid, scope, 5.0, signal.SIGTERM) for scope in "ab"]
        server.register_timers(requests)
        assert server.get_expired_timers(5.0) == {worker.pid: requests}
        assert server.get_expired_timers(4.9) == {}
        server.clear_timers({worker.pid})
        assert server.get_expired_timers(5.0) == {}
        server.register_timers(requests)
        server.run_once()
        assert worker.wait(DEADLINE) == -signal.SIGTERM
        assert not server.is_process_running(worker.pid)
        assert server.is_process_running(os.getpid())
        assert abs(server.get_last_progress_time() - time.time()) < DEADLINE
    finally:
        worker.kill()
        worker.wait()
        server.stop()


def test_local_server_kills_a_slow_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import multiprocessing, time
import elastic_launch.timer as timer

def work(queue, seconds):
    timer.configure(timer.LocalTimerClient(queue))
    with timer.expires(after=60, scope="fine"):
        pass
    with timer.expires(after=0.1 if seconds else 60):
        time.sleep(seconds)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    server = timer.LocalTimerServer(queue, max_interval=0.05)
    workers = [context.Process(target=work, args=(queue, seconds)) for seconds in (0, 600)]
    for worker in workers:
        worker.start()
    server.start()
    for worker in workers:
        worker.join()
    server.stop()
    print([worker.exitcode for worker in workers])
"""
    )
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (run.stdout, run.stderr) == ("[0, -9]\n", "")


class _Lists(timer.RequestQueue):
    """A queue that delivers one batch."""

    def __init__(self, requests: list[timer.TimerRequest]) -> None:
        self._requests = requests

    def size(self) -> int:
        return len(self._requests)

    def get(self, size: int, timeout: float) -> list[timer.TimerRequest]:
        batch, self._requests = self._requests[:size], self._requests[size:]
        if not batch:
            time.sleep(timeout)
        return batch


class _Server(timer.LocalTimerServer):
    """A server that fails to kill worker 2 twice, and raises for worker 3."""

    def __init__(self, queue: timer.RequestQueue) -> None:
        super().__init__(None, max_interval=0.01)  # type: ignore[arg-type]
        self._request_queue = queue
        self.reaped: list[int] = []

    def _reap_worker(self, worker_id: int) -> bool:
        self.reaped.append(worker_id)
        if worker_id == 3:
            raise ValueError
        return worker_id == 1 or self.reaped.count(2) == 3


def test_server_retries_a_worker_that_it_could_not_kill() -> None:
    server = _Server(_Lists([timer.TimerRequest(worker, "s", 5.0) for worker in (1, 2, 3)]))
    server.start()
    thread = server._thread
    assert thread
    try:
        wait_until(lambda: server.reaped.count(2) == 3)
        wait_until(lambda: not server.get_expired_timers(9.0))
    finally:
        server.stop()
        thread.join()  # the server itself waits for max_interval at most
    assert server.reaped == [1, 2, 3, 2, 2]


def test_requests_are_values() -> None:
    request = timer.FileTimerRequest(7, "s", 1.5, signal.SIGTERM)
    assert request == timer.FileTimerRequest(7, "s", 1.5, signal.SIGTERM)
    assert request != timer.FileTimerRequest(7, "s", 1.5, signal.SIGKILL)
    assert timer.FileTimerRequest(7, "s", 1.5) != timer.TimerRequest(7, "s", 1.5)
    assert request.to_json().encode() + b"\n" == line(7, "s", 1.5, signal.SIGTERM)
    assert "worker_id=7, scope_id='s', expiration_time=1.5" in repr(request)
