"""The Python API, inside programs with their own threads, signal handlers and children."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest

import elastic_launch as package
from elastic_launch import (
    ChildFailedError,
    DefaultLogsSpecs,
    LaunchConfig,
    LaunchError,
    LocalElasticAgent,
    ProcessFailure,
    SignalException,
    Std,
    UsageError,
    WorkerSpec,
    WorkerState,
    elastic_launch,
    launch_agent,
)
from elastic_launch.agent.loop import AgentLoop
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous
from elastic_launch.run import main
from elastic_launch.workers import orphans
from elastic_launch.workers.keeper_main import get_subreaper, set_subreaper
from tests.support.jobs import Job
from tests.support.leaks import children
from tests.support.waiting import DEADLINE, is_alive, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> LaunchConfig:
    return LaunchConfig(**{"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0, **changes})


def sh(text: str, **changes: Any) -> dict[int, Any]:
    return elastic_launch(config(**changes), "sh")("-c", text)


def test_success_returns_a_map_by_global_rank() -> None:
    assert sh("exit 0") == {0: None, 1: None}
    assert launch_agent(config(), "true", []) == {0: None, 1: None}


def test_failure_raises_an_exception_with_the_report() -> None:
    with pytest.raises(ChildFailedError) as caught:
        sh("if [ $RANK = 1 ]; then exit 42; fi; exec sleep 1000")
    error = caught.value
    rank, cause = error.get_first_failure()
    assert (rank, cause.local_rank, cause.exitcode, cause.error_file) == (1, 1, 42, "<N/A>")
    assert list(error.failures) == [1]
    assert error.exit_code == 42
    assert error.format_msg() == str(error)
    assert "sh FAILED" in str(error)
    assert cause.signal_name() == "<N/A>"


def test_main_raises_the_error_that_the_program_prints(job: Job) -> None:
    script = job.script("raise ValueError('boom')")
    with pytest.raises(ChildFailedError, match="ValueError: boom") as caught:
        main(["--nproc-per-node", "1", "--log-dir", str(job.path / "logs"), script])
    cause = caught.value.failures[0]
    assert cause.error == "ValueError: boom"
    assert "Traceback (most recent call last):" in cause.traceback
    assert Path(cause.error_file).is_file()
    assert main(["--nproc-per-node", "1", job.script("")]) is None  # type: ignore[func-returns-value]
    with pytest.raises(UsageError, match="no such file"):
        main(["nowhere.py"])


def test_agent_without_launch() -> None:
    spec = WorkerSpec(
        "trainer", 2, SingleNodeRendezvous("job-7", 2), entrypoint="sh", args=("-c", "exit $RANK"), max_restarts=0
    )
    result = LocalElasticAgent(spec, DefaultLogsSpecs()).run()
    assert result.state is WorkerState.FAILED
    assert result.is_failed()
    assert isinstance(result.failures[1], ProcessFailure)
    assert result.failures[1].exitcode == 1


def test_usage_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="start_method='thread': must be one of spawn, fork, forkserver"):
        elastic_launch(config(start_method="thread"), os.getpid)()
    with pytest.raises(ValueError, match="entrypoint=None: there is nothing to run"):
        elastic_launch(config(), None)()
    with pytest.raises(LaunchError, match="must be a port number"):
        sh("true", rdzv_backend="static", rdzv_endpoint="host:many")


def test_works_in_a_thread_and_changes_no_signal_handler() -> None:
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(sh("exit 0")))
    thread.start()
    wait_until(lambda: results)
    thread.join()
    assert results == [{0: None, 1: None}]
    assert {signum: signal.getsignal(signum) for signum in signal.valid_signals()} == handlers


def test_works_while_an_event_loop_runs() -> None:
    async def cell() -> dict[int, Any]:
        return sh("exit 0")

    assert asyncio.run(cell()) == {0: None, 1: None}


def test_handlers_and_wakeup_descriptor_are_restored(job: Job) -> None:
    got: list[int] = []
    mine = {signal.SIGTERM: lambda *_: got.append(15), signal.SIGUSR1: lambda *_: got.append(10)}
    before = {signum: signal.signal(signum, handler) for signum, handler in mine.items()}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing)
    try:
        # The worker signals the agent, which is this process.
        with pytest.raises(SignalException) as caught:
            sh(f"[ $RANK = 0 ] && kill -TERM {os.getpid()}; exec sleep 1000")
        assert (caught.value.sigval, caught.value.exit_code) == (signal.SIGTERM, 143)
        assert got == [], "the agent handles the signal"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert got == [10]
        assert signal.set_wakeup_fd(writing) == writing
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(reading)
        os.close(writing)


def test_text_goes_where_the_program_has_redirected_it(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    tee = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT)
    with redirect_stdout(out), redirect_stderr(err):
        sh("echo \u00e4 $RANK; echo problem $RANK >&2", logs_specs=tee)
    assert sorted(out.getvalue().splitlines()) == ["[default_role0]:\u00e4 0", "[default_role1]:\u00e4 1"]
    lines = err.getvalue().splitlines()
    assert {"elastic-run: formed: 1 node, 2 workers", "problem 0", "problem 1"} <= {*lines}
    assert capfd.readouterr() == ("", "")
    with redirect_stdout(out), redirect_stderr(out):  # one place for both
        assert sh("echo whole; echo line >&2", nproc_per_node=1, logs_specs=tee) == {0: None}
    assert {"[default_role0]:whole", "line"} <= {*out.getvalue().splitlines()}
    assert capfd.readouterr() == ("", "")


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise ZeroDivisionError("a widget that is gone")

    def fileno(self) -> int:
        raise NotImplementedError


def test_a_stream_of_the_program_that_fails_costs_text_and_not_the_job(tmp_path: Path) -> None:
    with redirect_stdout(Broken()), redirect_stderr(Broken()):
        assert sh("echo text; echo more >&2", logs_specs=DefaultLogsSpecs(str(tmp_path), tee=Std.ALL)) == {
            0: None,
            1: None,
        }


def test_another_way_to_write_to_standard_error_is_not_a_replacement(capfd: pytest.CaptureFixture[str]) -> None:
    with open(2, "w", closefd=False) as same, redirect_stderr(same):
        sh("exit 0")
    assert "formed: 1 node" in capfd.readouterr().err


def test_subreaper_flag_is_restored() -> None:
    set_subreaper(False)
    try:
        sh("exit 0")
        assert not get_subreaper()
        agents = [threading.Thread(target=sh, args=(f"sleep 0.{tenths}",)) for tenths in (1, 3, 2)]
        for agent in agents:
            agent.start()
        for agent in agents:
            agent.join()
        assert not get_subreaper()
    finally:
        set_subreaper(True)
    sh("exit 0")
    assert get_subreaper()


@pytest.mark.parametrize("threads", [0, 1])
def test_lost_keeper_spares_the_children_of_the_program(
    threads: int, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job.path)
    monkeypatch.setattr(orphans, "KILL_PATIENCE", DEADLINE)
    # A child, and a grandchild that becomes a child when its parent ends: the agent makes its process a subreaper.
    mine = [
        subprocess.Popen(["sleep", "1000"], start_new_session=True),
        subprocess.Popen(["sh", "-c", "sleep 1000 & echo $! > grandchild; read line"], stdin=subprocess.PIPE),
    ]
    wait_until(lambda: (job.path / "grandchild").exists() and (job.path / "grandchild").read_text())
    grandchild = psutil.Process(int((job.path / "grandchild").read_text()))
    release = threading.Event()

    def start_another() -> None:
        mine.append(subprocess.Popen(["sleep", "1000"], start_new_session=True))
        release.wait()

    helpers = [threading.Thread(target=start_another) for _ in range(threads)]
    try:
        for helper in helpers:
            helper.start()
        # A worker's parent is the keeper.
        text = (
            "setsid sleep 1000 & echo $! > stray.$RANK;"
            f"[ $RANK = 0 ] && kill -KILL {mine[1].pid};"
            "[ $RANK = 1 ] && while [ ! -s stray.0 ]; do :; done && kill -KILL $PPID;"
            "exec sleep 1000"
        )
        with pytest.raises(ChildFailedError, match="was killed, and its workers with it") as caught:
            sh(text)
        assert caught.value.exit_code == 137
        assert all(process.poll() is None for process in mine if process is not mine[1])
        assert is_alive(grandchild.pid)
        strays_left = [int((job.path / f"stray.{rank}").read_text()) for rank in (0, 1)]
        assert not [pid for pid in strays_left if is_alive(pid)]
    finally:
        release.set()
        for helper in helpers:
            helper.join()
        grandchild.kill()
        for process in mine:
            process.kill()
            process.communicate()


def test_program_with_closed_standard_streams() -> None:
    """Descriptors 0 and 2 are free; the agent's pipes must not get them."""
    code = (
        "import os; os.close(0); os.close(2)\n"
        "from elastic_launch import ChildFailedError, LaunchConfig, elastic_launch\n"
        "config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1, max_restarts=2)\n"
        "try: elastic_launch(config, 'sh')('-c', 'exit 7')\n"
        "except ChildFailedError as error: print(error.exit_code)\n"
        "print(sorted(fd for fd in os.listdir('/proc/self/fd')))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=DEADLINE)
    assert done.stdout == "7\n['0', '1']\n"


def test_program_that_waits_for_all_its_children() -> None:
    """The program may reap the keeper, its child, before the agent does."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert sh("exit 0") == {0: None, 1: None}
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_blocked_signals_are_not_inherited() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        with pytest.raises(ChildFailedError) as caught:
            sh("kill -TERM $$; exec sleep 1000", nproc_per_node=1)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    assert caught.value.exit_code == 143


def test_exception_in_the_loop_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect of the launcher")

    monkeypatch.setattr(AgentLoop, "_wait", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        sh("exec sleep 1000")
    assert not [child for child in children() if is_alive(child.pid)]


def test_every_public_name_exists_and_imports_are_lazy() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018
    code = "import sys, elastic_launch; print([m for m in sys.modules if m.startswith('elastic_launch.')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
