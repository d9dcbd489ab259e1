"""Timers, health, events, metrics and CPU binding in real jobs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_launch import ChildFailedError, LaunchConfig, elastic_launch, metrics
from elastic_launch.core.placement import format_list
from elastic_launch.host.numa import AffinityMode, NumaOptions, bindings
from elastic_launch.host.ports import reserve_port
from tests.support.files import install_package
from tests.support.jobs import METHODS, TWO, Job, report_of
from tests.support.waiting import DEADLINE, is_alive, wait_until

pytestmark = pytest.mark.usefixtures("time_for_stacks")


@pytest.fixture(autouse=True)
def _quiet(_nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher shows warnings and errors only."""
    monkeypatch.setenv("PET_QUIET", "1")


def launch(fn: Callable[..., Any], *args: Any, **changes: Any) -> dict[int, Any]:
    settings = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0, "verbosity": 0}
    return elastic_launch(LaunchConfig(**{**settings, **changes}), fn)(*args)


# ---- Timers


ENABLED = {"TORCHELASTIC_ENABLE_FILE_TIMER": "1"}
CLIENT = (
    "from elastic_launch import timer\n"
    "timer.configure(timer.FileTimerClient(os.environ['TORCHELASTIC_TIMER_FILE']))\n"
    "def takes_too_long():\n"
    "    mark('is in')\n"
    "    with timer.expires(after=0.3, scope='a step'): time.sleep(1000)\n"
)
EXPIRED = (
    r"  note    : was still in timer scope 'a step' when its time ran out; "
    r"the stacks of its threads are in (\S+/attempt_{attempt}/{rank}/stacks\.log)\n"
)


def expired(job: Job, stderr: str, *, attempt: int, rank: int) -> str:
    """The stacks of a worker whose timer has expired. Checks that the report names the timer as the cause."""
    report = report_of(stderr)
    assert f"rank    : {rank} " in report
    assert "exit    : killed by SIGKILL\n" in report
    match = re.search(EXPIRED.replace("{attempt}", str(attempt)).replace("{rank}", str(rank)), report)
    assert match, stderr
    return Path(match[1]).read_text()


def test_a_scope_that_takes_too_long(job: Job) -> None:
    """The worker is killed, and leaves its stacks. Until then the other one is not disturbed."""
    other = (
        "    def stop(*_): mark('stopped'); sys.exit(0)\n"
        "    signal.signal(signal.SIGTERM, stop); mark('ready')\n"
        "    while True: print('out', flush=True); print('err', file=sys.stderr, flush=True); time.sleep(.05)\n"
    )
    script = job.script(f"{CLIENT}if rank == 0:\n{other}wait_for('0.0 ready')\ntakes_too_long()\n")
    done = job.run(*TWO, "-t", "3", "--log-dir", str(job.path / "logs"), script, **ENABLED)
    assert done.returncode == 137
    assert "in takes_too_long\n" in expired(job, done.stderr, attempt=0, rank=1)
    assert "Then" not in report_of(done.stderr)
    assert "0.0 stopped" in job.marks()
    assert len(list((job.path / "logs").rglob("stacks.log"))) == 1


def test_torchs_timer(job: Job) -> None:
    script = job.script(CLIENT.replace("from elastic_launch import", "from torch.distributed.elastic import"))
    Path(script).write_text(Path(script).read_text() + "takes_too_long()\n")
    done = job.run("--log-dir", str(job.path / "logs"), script, **ENABLED)
    assert done.returncode == 137
    assert "in takes_too_long\n" in expired(job, done.stderr, attempt=0, rank=0)


def test_a_restart_begins_without_timers(job: Job) -> None:
    """The old round's timers would expire while the new workers run. The new workers' own timers work."""
    script = job.script(
        f"{CLIENT}"
        "if restart == 1:\n"
        "    time.sleep(12.5)\n"
        "    with timer.expires(after=60): mark('goes on')\n"
        "    sys.exit()\n"
        "if rank == 0:\n"
        "    with timer.expires(after=12): mark('starts'); time.sleep(1000)\n"
        "wait_for('0.0 starts')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = job.run(*TWO, "--max-restarts", "1", "--log-dir", str(job.path / "logs"), script, **ENABLED)
    assert done.returncode == 0, done.stderr
    assert {"0.1 goes on", "1.1 goes on"} <= set(job.marks())
    assert "rank 1 failed (killed by SIGKILL): restart 1 of 1\n" in done.stderr
    assert not list((job.path / "logs").rglob("stacks.log")), "no timer has expired"


def test_each_round_has_timers(job: Job) -> None:
    script = job.script(f"{CLIENT}takes_too_long()\n")
    done = job.run("--max-restarts", "1", "--log-dir", str(job.path / "logs"), script, **ENABLED)
    assert done.returncode == 137
    assert "in takes_too_long\n" in expired(job, done.stderr, attempt=1, rank=0)
    assert len(list((job.path / "logs").rglob("stacks.log"))) == 2


def test_scopes_that_are_left_in_time_do_nothing(job: Job) -> None:
    script = job.script(
        f"{CLIENT}"
        "for number in range(50):\n"
        "    with timer.expires(after=5): pass\n"
        "with timer.expires(after=60):\n"
        "    with timer.expires(after=60): time.sleep(5.5)\n"
        "mark('done')\n"
        "timer.FileTimerClient(os.environ['TORCHELASTIC_TIMER_FILE']).acquire('never left', time.time() + 60)\n"
    )
    done = job.run(*TWO, script, **ENABLED)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(job.marks()) == ["0.0 done", "1.0 done"]


def test_a_timer_below_a_wrapper(job: Job) -> None:
    """The timer is set by a process that the worker waits for, not by the worker itself."""
    wrapper = job.path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n')
    wrapper.chmod(0o755)
    script = job.script(f"{CLIENT}takes_too_long()\n")
    done = job.run("--log-dir", str(job.path / "logs"), script, PYTHON_EXEC=str(wrapper), **ENABLED)
    assert done.returncode == 137
    assert "in takes_too_long\n" in expired(job, done.stderr, attempt=0, rank=0)


def test_a_timer_of_a_workers_child(job: Job) -> None:
    """A child that ends in a timer's scope is ignored. If it hangs there, the worker is killed."""
    ended = "if os.fork() == 0:\n    with timer.expires(after=5): os._exit(0)\ntime.sleep(5.5)\nmark('unharmed')\n"
    hangs = "if os.fork() == 0: takes_too_long()\nwhile True: os.wait()\n"
    done = job.run("--log-dir", str(job.path / "logs"), job.script(CLIENT + ended + hangs), **ENABLED)
    assert done.returncode == 137
    assert "in <module>\n" in expired(job, done.stderr, attempt=0, rank=0)
    assert "0.0 unharmed" in job.marks()


def test_the_pipe_that_the_user_names(job: Job) -> None:
    """A stale pipe is replaced, garbage in it is ignored, and the pipe is removed."""
    pipe = job.path / "timers"
    os.mkfifo(pipe)
    garbage = "for _ in range(3):\n    with open(os.environ['TORCHELASTIC_TIMER_FILE'], 'wb') as file:\n"
    garbage += "        file.write(b'\\0\\xff{\"pid\": -1}\\n' * 1000 + b'no end')\n"
    script = job.script(
        f"{garbage}mark(os.environ['TORCHELASTIC_TIMER_FILE'])\n{CLIENT}os.chdir('/')\ntakes_too_long()\n"
    )
    done = job.run("--log-dir", str(job.path / "logs"), script, TORCHELASTIC_TIMER_FILE="timers", **ENABLED)
    assert done.returncode == 137
    assert "in takes_too_long\n" in expired(job, done.stderr, attempt=0, rank=0)
    assert f"0.0 {pipe}" in job.marks()
    assert not pipe.exists()


def test_a_pipe_that_cannot_be_created_is_an_error_before_anything_runs(job: Job) -> None:
    (job.path / "timers").touch()
    env = {**ENABLED, "TORCHELASTIC_TIMER_FILE": str(job.path / "timers")}
    done = job.run(job.script("mark('runs')"), **env)
    assert done.returncode == 69
    assert re.fullmatch(r"elastic-run: cannot create the named pipe .* TORCHELASTIC_TIMER_FILE .*\n", done.stderr)
    assert job.marks() == []
    assert (job.path / "timers").exists()


def test_without_the_variable_there_are_no_timers(job: Job) -> None:
    script = job.script("mark(str(os.environ.get('TORCHELASTIC_TIMER_FILE')))")
    assert job.run(script, TORCHELASTIC_ENABLE_FILE_TIMER="0").returncode == 0
    assert job.marks() == ["0.0 None"]


def step_too_long() -> None:
    from elastic_launch import timer

    timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
    if os.environ["RANK"] == "1":
        with timer.expires(after=0.3, scope="a step"):
            threading.Event().wait()
    signal.pause()


@pytest.mark.parametrize("method", METHODS)
def test_a_function_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_ENABLE_FILE_TIMER", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ChildFailedError) as caught:
        launch(step_too_long, start_method=method)
    error = caught.value
    assert error.exit_code == 137
    rank, failure = error.get_first_failure()
    assert (rank, failure.exitcode) == (1, -signal.SIGKILL)
    match = re.fullmatch(r"was still in timer scope 'a step' .*; the stacks .* in (\S+)", failure.note)
    assert match
    assert "in step_too_long\n" in Path(match[1]).read_text()
    Path(match[1]).unlink()


# ---- Health


def health(port: int) -> int:
    """The status that a probe gets."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        client.request("GET", "/")
        answer = client.getresponse()
        answer.read()
        return answer.status
    finally:
        client.close()


@pytest.fixture
def port() -> Iterator[int]:
    """A free port that the kernel gives to nobody who asks for any port."""
    with reserve_port() as sock:
        yield int(sock.getsockname()[1])


def test_a_launcher_is_healthy_while_its_loop_turns(job: Job, port: int) -> None:
    process = job.start(*TWO, job.script("mark('up'); wait()"), TORCHELASTIC_HEALTH_CHECK_PORT=str(port))
    job.wait_for("0.0 up", "1.0 up")
    wait_until(lambda: health(port) == 200)
    process.send_signal(signal.SIGSTOP)
    assert health(port) == 503
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: health(port) == 200)
    (server,) = (child for child in psutil.Process(process.pid).children() if child.name() == "elastic-health")
    server.kill()
    wait_until(lambda: not is_alive(server.pid))
    wait_until(lambda: health(port) == 200)
    process.send_signal(signal.SIGTERM)
    assert job.finish(process).returncode == 143
    wait_until(lambda: is_refused(port))


def test_a_launcher_that_stops_its_workers_is_healthy(job: Job, port: int) -> None:
    script = job.script("signal.signal(signal.SIGTERM, lambda *_: mark('deaf')); mark('up'); wait()")
    process = job.start("--shutdown-timeout", "600", script, TORCHELASTIC_HEALTH_CHECK_PORT=str(port))
    job.wait_for("0.0 up")
    process.send_signal(signal.SIGTERM)
    job.wait_for("0.0 deaf")
    wait_until(lambda: health(port) == 200)
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    job.finish(process)
    wait_until(lambda: not is_healthy(port))
    wait_until(lambda: not [each for each in below if is_alive(each.pid)], "the end of what the launcher had started")


def test_a_health_port_in_use_is_reported_and_costs_only_the_server(job: Job, port: int) -> None:
    with socket_listening(port):
        done = job.run(job.script("mark('runs')"), TORCHELASTIC_HEALTH_CHECK_PORT=str(port))
    assert done.returncode == 0
    line = rf"elastic-run: TORCHELASTIC_HEALTH_CHECK_PORT={port}: .* is in use; .*; going on without a health server\n"
    assert len(re.findall(line, done.stderr)) == 1
    assert job.marks() == ["0.0 runs"]


def socket_listening(port: int) -> Any:
    import socket

    return socket.create_server(("", port))


@pytest.mark.parametrize("value", ["http", "-1", "65536", "1.5"])
def test_an_invalid_health_port_is_an_error_before_anything_runs(job: Job, value: str) -> None:
    done = job.run(job.script("mark('runs')"), TORCHELASTIC_HEALTH_CHECK_PORT=value)
    assert done.returncode == 2
    assert re.fullmatch(rf"elastic-run: TORCHELASTIC_HEALTH_CHECK_PORT='{value}': must be .*\n", done.stderr)
    assert job.marks() == []


# ---- Events


def events(stderr: str) -> list[tuple[str, str, dict[str, Any]]]:
    """State, source and fields of the events on the console. Each event is one line."""
    found = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    assert stderr.count('{"name"') == len(found)
    return [(event["name"].rpartition(".")[2], event["source"], event["metadata"]) for event in found]


EVENTS = ("--event-log-handler", "console")


def test_events_of_a_job_that_goes_well(job: Job) -> None:
    done = job.run(*TWO, *EVENTS, "--rdzv-id", "j", "--role", "trainer", job.script("mark(str(os.getpid()))"))
    assert done.returncode == 0
    assert [(state, source) for state, source, _ in events(done.stderr)] == [
        ("RENDEZVOUS", "AGENT"),
        ("ASSIGN_WORKER_RANKS", "AGENT"),
        *[("START", "WORKER")] * 2,
        *[("SUCCEEDED", "WORKER")] * 2,
        ("SUCCEEDED", "AGENT"),
    ]
    for state, _, fields in events(done.stderr):
        assert (fields["run_id"], fields["role"], fields["state"]) == ("j", "trainer", state)
        assert (fields["agent_restarts"], fields["raw_error"]) == (0, None)
    pids = {fields["worker_id"] for _, source, fields in events(done.stderr) if source == "WORKER"}
    assert pids == {mark.split()[1] for mark in job.marks()}


def test_events_of_a_job_that_fails_after_a_restart(job: Job) -> None:
    script = job.script("if rank == 1: raise ValueError('boom')\nwait()")
    done = job.run(*TWO, *EVENTS, "--max-restarts", "1", script)
    assert done.returncode == 1
    told = events(done.stderr)
    assert [(state, fields["global_rank"], fields["agent_restarts"]) for state, source, fields in told] == [
        ("RENDEZVOUS", None, 0),
        ("ASSIGN_WORKER_RANKS", None, 0),
        ("START", 0, 0),
        ("START", 1, 0),
        ("RENDEZVOUS", None, 1),
        ("ASSIGN_WORKER_RANKS", None, 1),
        ("START", 0, 1),
        ("START", 1, 1),
        ("TERMINATED", 0, 1),
        ("FAILED", 1, 1),
        ("SUCCEEDED", None, 1),
    ]
    error = json.loads(told[-2][2]["raw_error"])
    assert error["message"]["message"] == "ValueError: boom"
    assert json.loads(told[-2][2]["metadata"])["exit_code"] == [1]


def test_events_of_a_job_that_a_signal_ends(job: Job) -> None:
    process = job.start(*EVENTS, job.script("mark('up'); wait()"))
    job.wait_for("0.0 up")
    process.send_signal(signal.SIGTERM)
    done = job.finish(process)
    assert done.returncode == 143
    state, source, fields = events(done.stderr)[-1]
    assert (state, source, fields["raw_error"]) == ("FAILED", "AGENT", "stopped by SIGTERM")


def test_events_split_no_line_and_are_not_split(job: Job) -> None:
    """Neither if a worker leaves a line unfinished, nor if the console is slow."""
    script = job.script(
        "for number in range(8000): print(f'line {number} ' + 60 * 'x')\nsys.stderr.write('no end')\nmark('done')\n"
    )
    command = [sys.executable, "-m", "elastic_launch", *EVENTS, "-t", "3", "--log-dir", str(job.path / "logs"), script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        job.wait_for("0.0 done")
        keepers = psutil.Process(process.pid).children()
        wait_until(lambda: not [each for each in keepers if is_alive(each.pid)], "the round to end")
        text, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert [state for state, _, _ in events(text)][-2:] == ["SUCCEEDED", "SUCCEEDED"]
    lines = [line for line in text.splitlines() if not line.startswith("{")]
    assert lines.count("[default0]:no end") == 1
    assert [line for line in lines if line != "[default0]:no end"] == [
        f"[default0]:line {number} {60 * 'x'}" for number in range(8000)
    ]


def test_an_unknown_event_handler_is_an_error_before_anything_runs(job: Job) -> None:
    done = job.run("--event-log-handler", "moon", job.script("mark('runs')"))
    assert done.returncode == 2
    assert re.fullmatch(
        r"elastic-run: --event-log-handler: event handler 'moon': unknown; choose one of .*\n", done.stderr
    )
    assert job.marks() == []


@pytest.fixture
def plug_ins(tmp_path: Path) -> dict[str, str]:
    """An environment with a package of event handlers. The good handler writes ``events``."""
    site = install_package(
        tmp_path / "site",
        "[elastic_launch.event_handlers]\nfile = plug:to_file\nraising = plug:Raising\n",
        plug="import logging\n"
        f"def to_file(): return logging.FileHandler({str(tmp_path / 'events')!r})\n"
        "class Raising(logging.Handler):\n"
        "    def emit(self, record): raise OSError('no network')\n",
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))}


def test_events_go_to_a_plug_in(job: Job, plug_ins: dict[str, str]) -> None:
    done = job.run(*TWO, "--event-log-handler", "file", job.script(""), **plug_ins)
    assert (done.returncode, done.stderr) == (0, "")
    told = events((job.path / "events").read_text())
    assert [state for state, _, _ in told] == ["RENDEZVOUS", "ASSIGN_WORKER_RANKS", *["START"] * 2, *["SUCCEEDED"] * 3]


def test_a_plug_in_that_raises_loses_events_only(job: Job, plug_ins: dict[str, str]) -> None:
    done = job.run("--event-log-handler", "raising", job.script("mark('runs')"), **plug_ins)
    assert done.returncode == 0
    assert job.marks() == ["0.0 runs"]
    lines = done.stderr.splitlines()
    assert lines
    assert set(lines) == {"elastic-run: --event-log-handler=raising: events are lost: OSError: no network"}


# ---- Metrics


class Kept(metrics.MetricHandler):
    """Keeps all metrics."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def emit(self, metric_data: metrics.MetricData) -> None:
        self.values.setdefault(metric_data.name, []).append(metric_data.value)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr(metrics, "_handlers", {})
    kept = Kept()
    metrics.configure(kept, "torchelastic")
    return kept


def fails_first(path: Path) -> None:
    if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError("boom")


def test_metrics_of_a_job(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch(fails_first, tmp_path, role="trainer", max_restarts=3) == {0: None, 1: None}
    assert kept.values["workers.trainer.healthy"] == [1, 1]
    assert kept.values["workers.trainer.failed"] == [1]
    assert kept.values["workers.trainer.succeeded"] == [1]
    assert kept.values["workers.trainer.remaining_restarts"] == [3, 3, 2, 2]
    assert kept.values["workers.trainer.run_success_with_retries"] == [1]
    assert kept.values["workers.trainer.run_failed_with_retries"] == [0]
    assert kept.values["workers.trainer.flakiness"] == [25]
    with pytest.raises(ChildFailedError):
        launch(fails_first, tmp_path, role="trainer")
    assert kept.values["workers.trainer.run_failed_no_retries"] == [0, 1]


# ---- CPU binding


def cpus(job: Job, *args: str, **env: str) -> dict[int, frozenset[int]]:
    """The CPUs of a job's workers, by rank. Checks that their threads and children have the same."""
    script = job.script(
        "import threading\n"
        "own, others = os.sched_getaffinity(0), []\n"
        "thread = threading.Thread(target=lambda: others.append(os.sched_getaffinity(0)))\n"
        "thread.start()\nthread.join()\n"
        "assert others == [own]\nmark(repr(own))\n"
    )
    done = job.run(*args, script, **env)
    assert (done.returncode, done.stderr) == (0, "")
    found = {int(mark[0]): frozenset(eval(mark.split(" ", 1)[1])) for mark in job.marks()}
    (job.path / "marks").unlink()
    return found


ALL = frozenset(os.sched_getaffinity(0))


@pytest.mark.parametrize("mode", [mode.value for mode in AffinityMode])
def test_workers_are_bound(job: Job, mode: str) -> None:
    assert cpus(job, *TWO) == {0: ALL, 1: ALL}
    bound = cpus(job, *TWO, "--numa-binding", mode)
    assert bound == dict(enumerate(bindings(mode, 2, os.environ)))
    assert all(each and each <= ALL for each in bound.values())
    if mode == "exclusive" and len(ALL) > 1:
        assert not bound[0] & bound[1]
    if mode == "node":
        nodes = [
            frozenset(os.sched_getaffinity(0)) & parse(path.read_text())
            for path in Path("/sys/devices/system/node").glob("node*/cpulist")
        ]
        assert not nodes or set(bound.values()) <= set(nodes)


def parse(text: str) -> frozenset[int]:
    """The numbers of a list such as 0-2,8."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return frozenset(number for each in ranges for number in range(int(each[0]), int(each[-1]) + 1))


@pytest.mark.parametrize("mode", [mode.value for mode in AffinityMode])
def test_workers_are_bound_within_what_the_launcher_may_use(job: Job, mode: str) -> None:
    own = frozenset({max(ALL)})
    os.sched_setaffinity(0, own)
    try:
        assert cpus(job, "--numa-binding", mode) == {0: own}
        if mode != "exclusive":  # there is one core, so only one can have it for itself
            assert cpus(job, *TWO, "--numa-binding", mode) == {0: own, 1: own}
            return
        done = job.run(*TWO, "--numa-binding", mode, job.script("mark('runs')"))
        assert done.returncode == 69
        assert re.fullmatch(r"elastic-run: --numa-binding=exclusive: .*\n", done.stderr)
        assert job.marks() == []
    finally:
        os.sched_setaffinity(0, ALL)


def affinity() -> str:
    return format_list(frozenset(os.sched_getaffinity(0)))


@pytest.mark.parametrize("method", METHODS)
def test_functions_are_bound(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = {rank: format_list(each) for rank, each in enumerate(bindings("exclusive", 2, os.environ))}
    options = NumaOptions(AffinityMode.EXCLUSIVE)
    assert launch(affinity, start_method=method, numa_options=options) == expected
    assert os.sched_getaffinity(0) == ALL, "the launching program is not"


def test_workers_that_cannot_be_bound_run_if_the_user_allows_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    own = frozenset({max(ALL)})
    os.sched_setaffinity(0, own)
    try:
        found = launch(affinity, numa_options=NumaOptions(AffinityMode.EXCLUSIVE, True))
    finally:
        os.sched_setaffinity(0, ALL)
    assert found == dict.fromkeys(range(2), format_list(own))
    assert re.fullmatch(
        r"elastic-run: --numa-binding=exclusive: .*; starting workers without binding\n", capfd.readouterr().err
    )


DEVICES = (
    "mark(f\"{os.environ['LOCAL_RANK']} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ['LOCAL_WORLD_SIZE']}\")"
)


def devices(job: Job, *args: str, visible: str | None) -> list[str]:
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = job.run(*TWO, *args, job.script(DEVICES), **env)
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(job.marks())


def test_devices_are_passed_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices(job, visible="3,1") == ["0.0 0 3,1 2", "1.0 1 3,1 2"]


@pytest.mark.parametrize(
    ("visible", "shown"), [(None, ["0", "1"]), ("3,1", ["3", "1"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b"])]
)
def test_each_worker_sees_its_device_as_number_0(
    job: Job, monkeypatch: pytest.MonkeyPatch, visible: str | None, shown: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices(job, "--virtual-local-rank", visible=visible) == [
        f"{rank}.0 0 {device} 2" for rank, device in enumerate(shown)
    ]


def test_a_missing_device_is_an_error_before_anything_runs(job: Job) -> None:
    done = job.run(*TWO, "--virtual-local-rank", job.script("mark('runs')"), CUDA_VISIBLE_DEVICES="3")
    assert done.returncode == 2
    assert re.fullmatch(r"elastic-run: --virtual-local-rank: local rank 1 needs .* shows only 1; .*\n", done.stderr)
    assert job.marks() == []


# ---- Together


@pytest.mark.parametrize("path", [None, "timers"])
def test_a_launcher_below_a_launcher_is_watched_by_it(job: Job, port: int, path: str | None) -> None:
    """The port and the pipe in the environment belong to the outer launcher. The inner one creates its own pipe."""
    job.script(f"{CLIENT}mark(os.environ['TORCHELASTIC_TIMER_FILE'])\ntakes_too_long()\n", "inner.py")
    env = {**ENABLED, "TORCHELASTIC_HEALTH_CHECK_PORT": str(port)}
    if path:
        env["TORCHELASTIC_TIMER_FILE"] = str(job.path / path)
    inner = (
        f"echo 0.0 $TORCHELASTIC_TIMER_FILE >> marks; exec {sys.executable} -m elastic_launch --log-dir logs inner.py"
    )
    done = job.run("--no-python", "sh", "-c", inner, **env)
    assert done.returncode == 137
    assert "sh FAILED" in done.stderr
    assert "in takes_too_long\n" in expired(job, done.stderr, attempt=0, rank=0)
    outer_pipe, inner_pipe = (mark for mark in job.marks() if mark != "0.0 is in")
    assert outer_pipe != inner_pipe
    assert outer_pipe == f"0.0 {job.path / path}" if path else "watchdog_timer" in outer_pipe


# Everything at once, and then a part of it is killed


@pytest.mark.parametrize("victim", ["agent", "keeper", "health", "agent and health"])
def test_nothing_is_left_whoever_is_killed(job: Job, port: int, victim: str) -> None:
    pipe = job.path / "timers"
    script = job.script(
        f"{CLIENT}child = subprocess.Popen(['setsid', 'sleep', '1000'])\n"
        "mark('up'); wait_for(f'0.{restart} up', f'1.{restart} up')\n"
        "with timer.expires(after=0.3 if restart else 600, scope='a step'): wait()\n"
    )
    env = {**ENABLED, "TORCHELASTIC_TIMER_FILE": str(pipe), "TORCHELASTIC_HEALTH_CHECK_PORT": str(port)}
    process = job.start(
        *TWO, *EVENTS, "-t", "3", "--numa-binding", "node", "--max-restarts", "1", "--log-dir", str(job.path / "logs"),
        script, **env,
    )  # fmt: skip
    job.wait_for("0.0 up", "1.0 up")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    agent = psutil.Process(process.pid)
    below = agent.children(recursive=True)
    names = {"elastic-keeper": "keeper", "elastic-health": "health"}
    wait_until(lambda: {child.name() for child in agent.children()} == set(names), "processes that have their names")
    parts = {"agent": agent, **{names[child.name()]: child for child in agent.children()}}
    for name in victim.split(" and "):
        parts[name].kill()
    match victim:
        case "keeper":  # the job goes on, with timers
            job.wait_for("0.1 up", "1.1 up")
            assert is_alive(parts["health"].pid), "the loss of the keeper does not affect the others"
            done = job.finish(process)
            assert done.returncode == 137
            assert "was still in timer scope 'a step'" in report_of(done.stderr)
            assert "(pid {}) was killed".format(parts["keeper"].pid) in done.stderr
        case "health":
            wait_until(lambda: is_healthy(port), "another health server")
            process.send_signal(signal.SIGTERM)
            assert job.finish(process).returncode == 143
        case _:
            assert job.finish(process).returncode == -signal.SIGKILL
    wait_until(lambda: not [each for each in below if is_alive(each.pid)], "processes of the job")
    wait_until(lambda: is_refused(port))
    if victim in ("keeper", "health"):
        assert not pipe.exists()


def test_a_lost_keeper_does_not_end_the_store(job: Job, port: int) -> None:
    """The process of the job's store is a child of the agent, as are the orphans of the keeper."""
    script = job.script("mark('up'); wait()")
    rendezvous = (
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-conf",
        "last_call_timeout=0.1",
    )
    process = job.start("--nnodes", "1:2", *rendezvous, "--rdzv-id", "j", "--max-restarts", "1", script)
    job.wait_for("0.0 up")
    before = psutil.Process(process.pid).children()
    (keeper,) = (child for child in before if child.name() == "elastic-keeper")
    keeper.kill()
    job.wait_for("0.1 up")
    assert [child for child in before if is_alive(child.pid)] == [child for child in before if child != keeper]
    process.send_signal(signal.SIGTERM)
    assert job.finish(process).returncode == 143


def is_healthy(port: int) -> bool:
    try:
        return health(port) == 200
    except OSError:
        return False


def is_refused(port: int) -> bool:
    """Whether nobody listens. A process that has been killed still may, until it gets the CPU."""
    try:
        health(port)
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False


def test_nothing_is_left_of_a_worker_that_is_about_to_be_killed(job: Job) -> None:
    """The keeper dies between the messages to dump stacks and to kill. The report still has the cause."""
    script = job.script(f"import threading\n{CLIENT}takes_too_long()\n")
    # Without the memory for progress, stacks are on stderr, where they can be waited for.
    process = job.start("--log-dir", str(job.path / "logs"), script, **ENABLED, ELASTIC_LAUNCH_PROGRESS="0")
    (keeper,) = wait_for_children(process)
    job.wait_for("0.0 is in")
    assert process.stderr
    told = ""
    for line in process.stderr:
        told += line
        if "in takes_too_long" in line:
            with contextlib.suppress(psutil.NoSuchProcess):  # the worker was killed before, and all have ended
                keeper.kill()
    assert job.finish(process).returncode == 137
    assert "scope 'a step'" in told


def wait_for_children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    wait_until(psutil.Process(process.pid).children)
    return psutil.Process(process.pid).children()
