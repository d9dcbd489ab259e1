"""Functions as workers: what they are given, what they return, and how they fail, by every start method."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_launch import (
    ChildFailedError,
    DefaultLogsSpecs,
    LaunchConfig,
    LocalElasticAgent,
    SignalException,
    UsageError,
    WorkerSpec,
    elastic_launch,
)
from elastic_launch.rendezvous.local import LocalRendezvous
from tests.conftest import Job, is_alive, wait_until

METHODS = ("spawn", "fork", "forkserver")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(fn: Callable[..., Any], *args: Any, method: str = "spawn", **changes: Any) -> dict[int, Any]:
    settings = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0, "start_method": method}
    return elastic_launch(LaunchConfig(**{**settings, **changes}), fn)(*args)


def failure(fn: Callable[..., Any], *args: Any, **changes: Any) -> ChildFailedError:
    with pytest.raises(ChildFailedError) as caught:
        run(fn, *args, **changes)
    return caught.value


def rank() -> int:
    return int(os.environ["RANK"])


# What the workers run.


def who(greeting: str) -> tuple[str, int, str, bool]:
    name = multiprocessing.current_process().name
    return f"{greeting} {rank()}", os.getppid(), name, threading.current_thread() is threading.main_thread()


def environment() -> dict[str, str]:
    return dict(os.environ)


def large() -> bytes:
    return bytes([rank()]) * 200_000_000


def unpicklable() -> Any:
    return (number for number in range(3)) if rank() == 1 else None


def boom() -> None:
    if rank() == 1:
        raise ValueError("boom")
    signal.pause()


def end(how: str, status: int) -> Any:
    if rank() == 1:
        signal.pause()
    if how == "os._exit":
        os._exit(status)
    if how == "sys.exit":
        sys.exit(status)
    if how == "kill":
        os.kill(os.getpid(), status)
    os.closerange(3, 1000)
    return "lost"


def leave(how: str) -> None:
    if how == "os._exit":
        os._exit(0)
    sys.exit(0)


def put(queue: Any, lock: Any) -> None:
    with lock:
        queue.put(rank())


def send(connection: Any, lock: Any) -> None:
    with lock:
        connection.send(rank())


def fail_once(marks: str) -> int:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sys.exit(3)
    Path(marks, str(rank())).write_text("")
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def signals() -> tuple[bool, bool, set[int]]:
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)}
    return (
        all(handler is signal.SIG_DFL for handler in handlers.values()),
        signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        {int(signum) for signum in signal.pthread_sigmask(signal.SIG_BLOCK, ())},
    )


def hang(path: str) -> None:
    Path(path, str(rank())).write_text(str(os.getpid()))
    signal.pause()


def child_that_lives_on(path: str) -> None:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(path, str(rank())).write_text(str(child.pid))


def descriptors() -> list[str]:
    numbers = os.listdir("/proc/self/fd")  # and that of the listing itself, which is closed again
    return [
        os.readlink(f"/proc/self/fd/{fd}") for fd in numbers if int(fd) > 2 and os.path.exists(f"/proc/self/fd/{fd}")
    ]


# What the launcher makes of it.


@pytest.mark.parametrize("method", METHODS)
def test_each_worker_calls_the_function_and_its_value_comes_back(method: str) -> None:
    values = run(who, "hello", method=method)
    assert [value[0] for value in values.values()] == ["hello 0", "hello 1"]
    assert len({value[1] for value in values.values()}) == 1, "the keeper is the parent of all"
    assert values[0][1] != os.getpid()
    assert [value[2:] for value in values.values()] == [("who-0", True), ("who-1", True)]


@pytest.mark.parametrize("method", METHODS)
def test_workers_have_their_own_environment(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_THE_PROGRAM", "\udcff")
    for local_rank, environ in run(environment, method=method, role="trainer").items():
        assert environ["RANK"] == environ["LOCAL_RANK"] == str(local_rank)
        assert (environ["ROLE_NAME"], environ["FROM_THE_PROGRAM"]) == ("trainer", "\udcff")


@pytest.mark.parametrize("method", METHODS)
def test_large_values(method: str) -> None:
    values = run(large, method=method)
    assert [(len(value), value[-1]) for value in values.values()] == [(200_000_000, 0), (200_000_000, 1)]


def test_local_rank_in_arguments() -> None:
    assert [value[0] for value in run(who, "I am ${local_rank}:").values()] == ["I am 0: 0", "I am 1: 1"]


@pytest.mark.parametrize("method", METHODS)
def test_unpicklable_value_names_rank_and_type(method: str) -> None:
    error = failure(unpicklable, method=method)
    assert list(error.failures) == [1]
    assert "rank 1 returned a value of type generator, which cannot be handed over" in error.failures[1].error


@pytest.mark.parametrize("method", METHODS)
def test_exception_arrives_with_its_traceback(method: str) -> None:
    error = failure(boom, method=method)
    assert list(error.failures) == [1], "the rank that was stopped is no failure"
    cause = error.failures[1]
    assert (cause.error, cause.exitcode) == ("ValueError: boom", 1)
    assert 'raise ValueError("boom")' in cause.message
    assert "boom FAILED" in str(error)


@pytest.mark.parametrize("method", METHODS)
def test_other_ends_are_what_they_are(method: str) -> None:
    assert failure(end, "os._exit", 7, method=method).failures[0].exitcode == 7
    assert failure(end, "sys.exit", 8, method=method).failures[0].exitcode == 8
    error = failure(end, "kill", signal.SIGSEGV, method=method)
    assert (error.failures[0].signal_name(), error.exit_code) == ("SIGSEGV", 139)
    error = failure(end, "close", 0, method=method)
    assert "the function has closed the descriptor" in error.failures[0].error


@pytest.mark.parametrize("method", METHODS)
def test_exit_with_0_is_success_without_a_value(method: str) -> None:
    assert run(leave, "os._exit", method=method) == {0: None, 1: None}
    assert run(leave, "sys.exit", method=method) == {0: None, 1: None}


@pytest.fixture
def _tracker() -> Iterator[None]:
    """multiprocessing's tracker of named semaphores lives as long as the program: have it before the test's begin."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("_tracker")
def test_queues_and_locks_are_arguments_as_for_multiprocessing(method: str) -> None:
    context = multiprocessing.get_context(method)
    queue, lock, (ours, theirs) = context.Queue(), context.Lock(), context.Pipe()
    run(put, queue, lock, method=method)
    assert sorted(queue.get(timeout=30) for _ in range(2)) == [0, 1]
    queue.close()
    queue.join_thread()
    run(send, theirs, lock, method=method)
    assert sorted(ours.recv() for _ in range(2)) == [0, 1]
    del queue, lock, ours, theirs
    gc.collect()  # their descriptors are open until then


@pytest.mark.parametrize("method", METHODS)
def test_restart_calls_again(method: str, tmp_path: Path) -> None:
    assert run(fail_once, str(tmp_path), method=method, max_restarts=1) == {0: 1, 1: 1}


@pytest.mark.parametrize("method", METHODS)
def test_workers_start_with_default_signals(method: str) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert run(signals, method=method) == {0: (True, True, set()), 1: (True, True, set())}
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_spawned_worker_inherits_no_descriptor_of_the_program(tmp_path: Path) -> None:
    with open(tmp_path / "mine", "w") as file:
        os.set_inheritable(file.fileno(), True)
        for held in run(descriptors).values():
            assert not [name for name in held if not name.startswith(("/memfd:", "anon_inode:[pidfd]", os.devnull))]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_function_leaves_behind_ends_with_it(method: str, tmp_path: Path) -> None:
    run(child_that_lives_on, str(tmp_path), method=method)
    assert not [file for file in tmp_path.iterdir() if file.is_file() and is_alive(int(file.read_text()))]


def test_function_that_cannot_be_sent_is_told_before_anything_starts() -> None:
    with pytest.raises(UsageError, match=r"entrypoint .*<lambda>: cannot be sent .*'spawn'.*start_method='fork'"):
        run(lambda: 1)
    with pytest.raises(UsageError, match="cannot pickle 'generator' object"):
        run(who, (number for number in range(3)))
    assert run(lambda: 40 + rank(), method="fork") == {0: 40, 1: 41}


def test_works_twice_in_a_thread_and_under_a_running_event_loop() -> None:
    async def cell() -> list[dict[int, Any]]:
        return [run(lambda: rank(), method="fork"), run(os.getpid)]

    first, second = asyncio.run(cell())
    assert first == {0: 0, 1: 1}
    assert len(set(second.values())) == 2
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(run(who, "hello")))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_agent_by_itself_takes_a_function() -> None:
    spec = WorkerSpec("trainer", 2, LocalRendezvous("job-7", 2), entrypoint=who, args=("hi",), max_restarts=0)
    result = LocalElasticAgent(spec, DefaultLogsSpecs(), "fork").run()
    assert not result.is_failed()
    assert [value[0] for value in result.return_values.values()] == ["hi 0", "hi 1"]


@pytest.mark.parametrize("method", METHODS)
def test_signal_stops_functions(method: str, tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_until(lambda: len([file for file in tmp_path.iterdir() if file.is_file() and file.read_text()]) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SignalException, match="SIGTERM"):
        run(hang, str(tmp_path), method=method)
    thread.join()


@pytest.mark.parametrize("method", METHODS)
def test_program_killed_leaves_no_worker(method: str, job: Job) -> None:
    script = job.path / "program.py"
    script.write_text(
        "import os, signal\n"
        "from elastic_launch import LaunchConfig, elastic_launch\n"
        "def hang():\n"
        f"    open({str(job.path)!r} + '/' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "    signal.pause()\n"
        "if __name__ == '__main__':\n"
        f"    elastic_launch(LaunchConfig(1, 1, 2, start_method={method!r}), hang)()\n"
    )
    program = subprocess.Popen([sys.executable, str(script)], cwd=job.path)
    files = [job.path / "0", job.path / "1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    below = psutil.Process(program.pid).children(recursive=True)
    assert len(below) == 3, "a keeper and two workers"
    program.kill()
    program.wait()
    end = time.monotonic() + 2
    wait_until(lambda: not any(is_alive(process.pid) for process in below))
    assert time.monotonic() < end


def test_launch_without_the_main_guard_is_explained(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "from elastic_launch import LaunchConfig, elastic_launch\n"
        "def train(): pass\n"
        "elastic_launch(LaunchConfig(1, 1, 1, max_restarts=0), train)()\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "put the launch under if __name__ == '__main__':" in ended.stderr
