"""A group of processes without rendezvous: ``start_processes``, ``PContext`` and ``RunProcsResult``."""

from __future__ import annotations

import ctypes
import functools
import json
import operator
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_launch import (
    DefaultLogsSpecs,
    LaunchError,
    LogsDest,
    LogsSpecs,
    PContext,
    RunProcsResult,
    SignalException,
    Std,
    UsageError,
)
from elastic_launch.agent import loop as agent_loop
from elastic_launch.core.agent.lifecycle import AgentPhase
from elastic_launch.host.signals import SignalTrap
from elastic_launch.multiprocessing import start_processes
from tests.support.functions import (
    boom,
    fail_beside_one_that_ignores_sigterm,
    greet,
    ignore_sigterm,
    speak,
    unreadable,
    wait_for,
)
from tests.support.jobs import METHODS
from tests.support.leaks import wait_for_children
from tests.support.waiting import DEADLINE, SOON, is_alive, wait_until

RANKS = (0, 1)


def envs(**variables: str) -> dict[int, dict[str, str]]:
    return {rank: {"RANK": str(rank), **variables} for rank in RANKS}


def start(entrypoint: Any, *args: Any, specs: LogsSpecs | None = None, **more: Any) -> PContext:
    """Two processes with the same arguments."""
    specs = specs or DefaultLogsSpecs()
    return start_processes("trainer", entrypoint, dict.fromkeys(RANKS, args), more.pop("envs", envs()), specs, **more)


def sh(text: str, **more: Any) -> PContext:
    return start("sh", "-c", text, **more)


def ended(context: PContext) -> RunProcsResult:
    result = context.wait()
    assert result is not None
    return result


def interrupt_loop(signum: int) -> threading.Thread:
    """Send this process a signal as soon as the main thread waits for processes."""

    def interrupt() -> None:
        wait_until(lambda: SignalTrap._in_loop)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[PContext]:
    """Processes that SIGTERM does not stop."""
    context = start(ignore_sigterm, str(tmp_path), start_method="fork")
    wait_until(lambda: all((tmp_path / f"ready.{rank}").exists() for rank in RANKS))
    yield context
    context.close(signal.SIGKILL)


# What the launcher does with them.


@pytest.mark.parametrize("method", METHODS)
def test_functions_return_by_local_rank(method: str) -> None:
    context = start(greet, "hello", start_method=method)
    pids = context.pids()
    assert list(pids) == [0, 1]
    assert len(set(pids.values())) == 2
    result = ended(context)
    assert result == RunProcsResult({0: "hello 0", 1: "hello 1"}, {}, {0: "", 1: ""}, {0: "", 1: ""})
    assert not result.is_failed()
    assert context.wait() is result, "waiting again returns the same result"
    assert context.pids() == pids
    context.close()
    context.close()
    assert context.wait(0) is result


def test_commands_return_none() -> None:
    assert ended(sh("exit 0")).return_values == {0: None, 1: None}


def test_wait_returns_at_once_after_the_timeout_or_at_the_end(tmp_path: Path) -> None:
    context = start(wait_for, str(tmp_path / "go"), start_method="fork")
    before = time.monotonic()
    assert context.wait(timeout=0) is None
    assert context.wait(0.2, period=DEADLINE) is None
    assert 0.2 <= time.monotonic() - before < SOON
    (tmp_path / "go").write_text("")
    assert not ended(context).is_failed()


@pytest.mark.parametrize("method", METHODS)
def test_failure_stops_the_others_and_carries_its_exception(method: str) -> None:
    context = start(boom, start_method=method)
    result = ended(context)
    assert result.is_failed()
    assert result.return_values == {}
    assert list(result.failures) == [1], "a process that was stopped has not failed"
    failure = result.failures[1]
    assert (failure.local_rank, failure.pid, failure.exitcode) == (1, context.pids()[1], 1)
    assert failure.error == "ValueError: boom"
    written = json.loads(Path(failure.error_file).read_text())
    assert written["message"]["message"] == "ValueError: boom"
    assert not any(is_alive(pid) for pid in context.pids().values())


def test_command_that_cannot_be_found_or_fails() -> None:
    with pytest.raises(FileNotFoundError, match="entrypoint=no-such-program"):
        start("no-such-program")
    result = ended(sh("[ $RANK = 1 ] && kill -SEGV $$; exec sleep 1000"))
    assert [(rank, failure.signal_name()) for rank, failure in result.failures.items()] == [(1, "SIGSEGV")]


def test_close_stops_and_then_kills(hung: PContext) -> None:
    before = time.monotonic()
    hung.close(timeout=1)
    assert 0.9 < time.monotonic() - before < SOON
    result = ended(hung)
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {0: -9, 1: -9}
    assert not any(is_alive(pid) for pid in hung.pids().values())
    hung.close()


def test_close_with_another_signal(hung: PContext) -> None:
    before = time.monotonic()
    hung.close(signal.SIGKILL, timeout=30)
    assert time.monotonic() - before < SOON


@pytest.mark.parametrize(("death_sig", "timeout"), [(signal.SIGKILL, 30), (None, 1)])
def test_close_hastens_a_stop_that_a_failure_began(
    death_sig: signal.Signals | None, timeout: int, tmp_path: Path
) -> None:
    context = start(fail_beside_one_that_ignores_sigterm, str(tmp_path), start_method="fork")
    loop = context._loop
    assert loop is not None
    wait_until(lambda: context.wait(0.01) is None and loop.state.phase is AgentPhase.STOPPING)
    before = time.monotonic()
    context.close(death_sig, timeout)
    assert time.monotonic() - before < SOON, "the 30 seconds of a stop do not apply"
    assert ended(context).failures[1].exitcode == 4
    assert not is_alive(context.pids()[0])


def test_wait_after_close_returns_what_close_stopped() -> None:
    context = sh("exec sleep 1000")
    context.close()
    result = ended(context)
    assert {rank: failure.signal_name() for rank, failure in result.failures.items()} == {0: "SIGTERM", 1: "SIGTERM"}
    assert result.return_values == {}


def test_close_before_the_start_and_start_twice() -> None:
    context = PContext("trainer", "true", {0: ()}, {0: {}}, DefaultLogsSpecs())
    assert context.pids() == {}
    assert context.wait(0) is None
    context.close()
    context.start()
    with pytest.raises(UsageError, match="trainer: the processes were already started"):
        context.start()
    assert ended(context).return_values == {0: None}


def test_interrupted_wait_can_be_resumed(tmp_path: Path) -> None:
    context = start(wait_for, str(tmp_path / "go"), start_method="fork")
    interrupt = interrupt_loop(signal.SIGINT)
    with pytest.raises(SignalException) as caught:
        context.wait()
    assert caught.value.sigval is signal.SIGINT
    interrupt.join()
    assert context.wait(0) is None
    (tmp_path / "go").write_text("")
    assert not ended(context).is_failed()


class LateSignal:
    """A poller for a process that gets a signal just before it waits: too late for the handler, and for EINTR."""

    def __init__(self) -> None:
        self._poller = select.poll()
        self.register = self._poller.register

    def poll(self, timeout: float | None) -> Any:
        late = functools.partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGINT)
        # Called from C, one right after the other: Python runs handlers between bytecodes.
        _, found = map(operator.call, (late, functools.partial(self._poller.poll, timeout)))
        return found


def test_a_signal_that_arrives_just_before_the_wait_interrupts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    wakeup = signal.set_wakeup_fd(writing)
    context = sh("exec sleep 1000")
    before = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(agent_loop, "select", SimpleNamespace(poll=LateSignal))
        with pytest.raises(SignalException):
            context.wait(2 * SOON)
    assert time.monotonic() - before < SOON
    context.close()
    assert signal.set_wakeup_fd(wakeup) == writing
    assert os.read(reading, 100) == bytes([signal.SIGINT]), "asyncio finds out in this way which handlers to call"
    os.close(reading)
    os.close(writing)


def test_signals_let_the_program_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGUSR1")
    contexts = [start(wait_for, str(tmp_path / "go"), start_method="fork"), sh("exec sleep 1000")]
    assert signal.getsignal(signal.SIGINT) is before[1]
    for signum in (signal.SIGTERM, signal.SIGUSR1):  # in the program's own code, which may poll
        with pytest.raises(SignalException, match=f"stopped by {signum.name}"):
            signal.raise_signal(signum)
    for context in contexts:
        killer = interrupt_loop(signal.SIGTERM)
        with pytest.raises(SignalException):
            context.wait()
        killer.join()
        assert context.wait(0) is None
    (tmp_path / "go").write_text("")
    assert not ended(contexts[0]).is_failed()  # the first to begin, and the first to end
    with pytest.raises(SignalException):
        signal.raise_signal(signal.SIGTERM)
    contexts[1].close()
    assert signal.getsignal(signal.SIGINT) is before[1]
    got: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGUSR1):  # what is left are handlers that step aside
        signal.signal(signum, lambda signum, frame: got.append(signum))
        signal.raise_signal(signum)
    assert got == [signal.SIGTERM, signal.SIGUSR1]
    for signum, handler in zip((signal.SIGTERM, signal.SIGUSR1), (before[0], before[2]), strict=True):
        signal.signal(signum, handler)


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalTrap([signal.SIGHUP, signal.SIGUSR1]):
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(SignalException):
                signal.raise_signal(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_loop_in_another_thread_leaves_that_of_the_main_thread_alone() -> None:
    """A signal was raised in the middle of the loop, which would have lost what that had received."""
    reached = []

    def another() -> None:
        with SignalTrap([signal.SIGUSR1]) as trap, trap.around_loop():
            reached.append("another thread")

    def loop() -> None:
        with trap.around_loop():
            thread = threading.Thread(target=another)
            thread.start()
            thread.join()
            signal.raise_signal(signal.SIGUSR1)
            reached.append("the end of the loop")

    with SignalTrap([signal.SIGUSR1]) as trap, pytest.raises(SignalException):
        loop()
    assert reached == ["another thread", "the end of the loop"]


def test_what_was_given_and_where_output_goes_are_attributes(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), tee={0: Std.OUT})
    context = start("sh", "-c", "exit 0", specs=specs, duplicate_stderr_filters=["x"])
    assert (context.name, context.entrypoint, context.nprocs) == ("trainer", "sh", 2)
    assert (context.args, context.envs) == ({0: ("-c", "exit 0"), 1: ("-c", "exit 0")}, envs())
    folder = tmp_path / "trainer/attempt_0"
    assert (context.stdouts, context.stderrs) == ({0: str(folder / "0/stdout.log"), 1: ""}, {0: "", 1: ""})
    assert context.error_files == {rank: str(folder / f"{rank}/error.json") for rank in RANKS}
    assert (context.filtered_stdout, context.filtered_stderr) == (None, str(folder / "filtered_stderr.log"))
    result = ended(context)
    assert (result.stdouts, result.stderrs) == (context.stdouts, context.stderrs)


def test_in_a_thread() -> None:
    results: list[RunProcsResult] = []
    thread = threading.Thread(target=lambda: results.append(ended(start(greet, "hi"))))
    thread.start()
    thread.join()
    assert results[0].return_values == {0: "hi 0", 1: "hi 1"}


def test_several_at_once_do_not_touch_each_others_files(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
    named = [
        start_processes(name, "sh", dict.fromkeys(RANKS, ("-c", "echo $0", name)), envs(), specs)
        for name in ("first", "second")
    ]
    failing = [start(boom, start_method="fork") for _ in range(2)]
    assert len({ended(context).failures[1].error_file for context in failing}) == 2
    for context in reversed(named):
        result = ended(context)
        assert not result.failures
        assert [Path(path).read_text() for path in result.stdouts.values()] == [f"{context.name}\n"] * 2


def test_without_a_directory_nothing_is_kept_of_a_success() -> None:
    ended(start(greet, "hello", start_method="fork"))
    temp = Path(os.environ["TMPDIR"])
    assert list(temp.iterdir()) == []


@pytest.mark.parametrize(
    ("forms", "stdouts", "stderrs", "shown"),
    [
        ({"redirects": "3"}, (True, True), (True, True), ""),
        ({"redirects": "0:1,1:2"}, (True, False), (False, True), "err 0|out 1"),
        ({"tee": "1"}, (True, True), (False, False), "[trainer0]:out 0|[trainer1]:out 1|err 0|err 1"),
        ({"tee": "0:3"}, (True, False), (True, False), "[trainer0]:err 0|[trainer0]:out 0|err 1|out 1"),
        ({"redirects": "3", "tee": "1:1"}, (True, True), (True, True), "[trainer1]:out 1"),
    ],
)
def test_logs(
    forms: dict[str, str],
    stdouts: tuple[bool, bool],
    stderrs: tuple[bool, bool],
    shown: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), **{name: Std.from_str(form) for name, form in forms.items()})  # type: ignore[arg-type]
    result = ended(start(speak, specs=specs, start_method="fork"))
    for files, expected, word in ((result.stdouts, stdouts, "out"), (result.stderrs, stderrs, "err")):
        for rank in RANKS:
            assert bool(files[rank]) == expected[rank]
            assert not files[rank] or Path(files[rank]).read_text() == f"{word} {rank}\n"
    captured = capfd.readouterr()
    assert sorted((captured.out + captured.err).splitlines()) == sorted(filter(None, shown.split("|")))


def test_filters_and_prefixes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), tee=Std.ALL, local_ranks_filter={1})
    context = start(
        speak,
        specs=specs,
        start_method="fork",
        log_line_prefixes={0: "zero ", 1: "one "},
        duplicate_stdout_filters=["out 0"],
    )
    ended(context)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("one out 1\n", "one err 1\n")
    (filtered,) = tmp_path.rglob("filtered_stdout.log")
    assert filtered.read_text().endswith("out 0\n")
    assert "out 1" not in filtered.read_text()


def test_variables_are_inherited_except_for_the_error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_THE_PROGRAM", "yes")
    mine = tmp_path / "mine.json"
    context = start(boom, start_method="spawn", envs=envs(TORCHELASTIC_ERROR_FILE=str(mine)))
    assert ended(context).failures[1].error == "ValueError: boom"
    assert not mine.exists(), "that file belongs to the worker that launches, not to the processes that it launches"
    assert ended(sh('[ "$FROM_THE_PROGRAM" = yes ]')).return_values == {0: None, 1: None}


def test_other_logs_specs(tmp_path: Path) -> None:
    class Mine(LogsSpecs):
        @property
        def root_log_dir(self) -> str:
            return str(tmp_path)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            return LogsDest(stdouts={rank: f"{tmp_path}/{envs[rank]['RANK']}.txt" for rank in envs})

    ended(start(speak, specs=Mine(), start_method="fork"))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in RANKS] == ["out 0\n", "out 1\n"]

    class Wrong(Mine):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            raise RuntimeError("no idea")

    with pytest.raises(LaunchError, match="no idea"):
        start(speak, specs=Wrong())


def test_usage_errors_start_nothing() -> None:
    with pytest.raises(UsageError, match=r"args for local ranks \[0, 1\], envs for \[0\]"):
        start(greet, "hello", envs={0: {}})
    with pytest.raises(UsageError, match=r"args for local ranks \[0, 2\]"):
        start_processes("trainer", "true", {0: (), 2: ()}, {0: {}, 2: {}}, DefaultLogsSpecs())
    with pytest.raises(UsageError, match="start_method='thread'"):
        start(greet, "hello", start_method="thread")
    with pytest.raises(UsageError, match="cannot be sent"):
        start(lambda: 1)


def test_error_of_an_unreadable_value_names_rank_and_type() -> None:
    context = start(unreadable, start_method="fork")
    with pytest.raises(LaunchError, match="local rank 0 returned a value of type Unreadable, which cannot be read"):
        context.wait()


def test_processes_end_with_the_program(tmp_path: Path) -> None:
    code = (
        "from elastic_launch import DefaultLogsSpecs, start_processes\n"
        "context = start_processes('x', 'sleep', {0: ('1000',), 1: ('1000',)}, {0: {}, 1: {}}, DefaultLogsSpecs())\n"
        "print(*context.pids().values(), flush=True)\n"
    )
    program = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE)
    assert len(program.stdout.split()) == 2
    # The keeper ends after its workers. This process adopts whatever is left.
    wait_for_children()


SAME = """
import json, os, signal, sys
from importlib import import_module
api, to_map = import_module(sys.argv[1]), import_module(sys.argv[2]).to_map

def double(number):
    return 2 * number

def boom():
    if os.environ["RANK"] == "1":
        raise ValueError("boom")
    signal.pause()

def shape(result):
    return {
        "values": result.return_values, "failed": result.is_failed(),
        "failures": {
            rank: (failure.local_rank, failure.exitcode, os.path.isfile(failure.error_file))
            for rank, failure in result.failures.items()
        },
        "stdouts": {rank: os.path.basename(path) for rank, path in result.stdouts.items()},
        "stderrs": {rank: os.path.basename(path) for rank, path in result.stderrs.items()},
    }

def start(entrypoint, *args, **specs):
    if "log_dir" in specs:
        os.makedirs(specs["log_dir"])
    envs = {rank: {"RANK": str(rank)} for rank in (0, 1)}
    return api.start_processes(
        "x", entrypoint, dict.fromkeys(envs, args), envs, api.DefaultLogsSpecs(**specs), start_method="fork"
    )

if __name__ == "__main__":
    shapes = []
    context = start(double, 21)
    shapes.append([sorted(context.pids()), shape(context.wait()), context.wait() is not None])
    context.close()
    shapes.append(shape(start("true").wait()))
    shapes.append(shape(start(boom, log_dir=sys.argv[3] + "/boom").wait()))
    tee, redirects = api.Std.from_str("0:1"), api.Std.from_str("1:2,0:3")
    shapes.append(shape(start("true", tee=tee, redirects=redirects, log_dir=sys.argv[3] + "/logs").wait()))
    shapes.append(shape(start("true", local_ranks_filter={1}, log_dir=sys.argv[3] + "/filter").wait()))
    context = start("sleep", "1000")
    context.close()
    shapes.append([context.wait(0) and shape(context.wait()), sorted(context.pids())])
    shapes.append([list(map(int, each.values())) for each in (to_map({1: api.Std.OUT}, 2), to_map(api.Std.ALL, 2))])
    print(json.dumps(shapes, sort_keys=True))
"""


def test_results_are_those_of_torch(tmp_path: Path) -> None:
    script = tmp_path / "same.py"
    script.write_text(SAME)
    shapes = []
    environ = {**os.environ, "TMPDIR": str(tmp_path)}  # torch's leaves files there
    torchs = "torch.distributed.elastic.multiprocessing"
    for api in ((torchs, f"{torchs}.api"), ("elastic_launch", "elastic_launch.multiprocessing")):
        argv = [sys.executable, "-W", "ignore", str(script), *api, str(tmp_path / api[0])]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stderr
        shapes.append(json.loads(done.stdout.splitlines()[-1]))
    for theirs, ours in zip(*shapes, strict=True):
        assert ours == theirs
