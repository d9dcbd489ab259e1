"""Events: torch's names and fields, handlers, and what the agent records of a job."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from logging.handlers import MemoryHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_launch import events
from elastic_launch.agent.telemetry import Telemetry
from elastic_launch.config import LaunchConfig
from elastic_launch.errors import ProcessFailure, UsageError
from elastic_launch.events import (
    Event,
    EventSource,
    NodeState,
    RdzvEvent,
    Recorder,
    check_destination,
    construct_and_record_rdzv_event,
    get_logging_handler,
    record,
    record_rdzv_event,
)
from elastic_launch.job import Assignment, RestartHistory
from elastic_launch.rendezvous.factory import create_rendezvous
from elastic_launch.worker_spec import Rendezvous, WorkerSpec, WorkerState
from tests.support.files import install_package
from tests.support.waiting import DEADLINE

ASSIGNMENT = Assignment(
    group_rank=1,
    group_world_size=2,
    base_rank=4,
    world_size=6,
    local_world_size=2,
    base_role_rank=2,
    role_world_size=3,
    master_addr="127.0.0.1",
    master_port=1,
    host="node1",
    port_picked=True,
    restart_count=7,
    restart_history=RestartHistory(used=1),
)
PIDS = {0: 100, 1: 101}
NOW = 1000.0
"""What ``time.monotonic`` is while a recorder is looked at, which counts whole seconds."""
INFO = Event("name", EventSource.WORKER, 3, {"a": 1, "b": None, "c": "x", "d": 1.5, "e": True})
RDZV_EVENT = RdzvEvent("name", "run", "message", "host", 1, NodeState.RUNNING, rank=2)


@pytest.fixture(autouse=True)
def _no_handlers_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    loggers: dict[str, logging.Logger] = {}
    monkeypatch.setattr(events, "_loggers", loggers)
    yield
    for logger in loggers.values():
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            if isinstance(handler, MemoryHandler) and handler.target:
                handler.target.close()
            handler.close()


@pytest.fixture(autouse=True)
def _time_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "time", SimpleNamespace(time=time.time, monotonic=lambda: NOW))


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package with event handlers. Returns the file that the working one writes."""
    output = tmp_path / "events"
    site = install_package(
        tmp_path / "site",
        "[elastic_launch.event_handlers]\n"
        "file = event_plug:to_file\nraising = event_plug:Raising\nbroken = event_plug:broken\nodd = event_plug:odd\n"
        "absent = event_plug:absent\ndynamic_rendezvous = event_plug:to_file\n",
        event_plug="import logging, logging.handlers\n"
        "def to_file():\n"
        f"    return logging.handlers.MemoryHandler(100, target=logging.FileHandler({str(output)!r}))\n"
        "class Raising(logging.Handler):\n"
        "    def emit(self, record): raise OSError('no network')\n"
        "def broken(): raise OSError('no network')\n"
        "def odd(): return 3\n",
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "event_plug", raising=False)  # an earlier test's
    return output


def spec(handler: str = "console", entrypoint: str = "/usr/bin/python3") -> WorkerSpec:
    rendezvous = cast(Rendezvous, None)  # not used here
    return WorkerSpec("trainer", 2, rendezvous, entrypoint=entrypoint, event_log_handler=handler)


class Lines:
    """What a recorder writes and logs."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.logged: list[str] = []

    def recorder(self, spec: WorkerSpec, seconds: float = 0) -> Recorder:
        """Return a recorder of a run that started some seconds ago."""
        return Recorder(spec, "run", "c10d", self.text.append, self.logged.append, NOW - seconds)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in "".join(self.text).splitlines()]


def parsed(event: dict[str, Any]) -> dict[str, Any]:
    """An event whose nested JSON is parsed, too."""
    metadata = event["metadata"]
    raw_error = metadata["raw_error"] and json.loads(metadata["raw_error"])
    return {**event, "metadata": {**metadata, "metadata": json.loads(metadata["metadata"]), "raw_error": raw_error}}


def test_event_as_a_line_of_json() -> None:
    assert str(INFO) == INFO.serialize()
    assert INFO.serialize() == (
        '{"name": "name", "source": "WORKER", "timestamp": 3, '
        '"metadata": {"a": 1, "b": null, "c": "x", "d": 1.5, "e": true}}'
    )
    assert Event.deserialize(INFO.serialize()) == INFO
    assert Event.deserialize(INFO) is INFO
    assert isinstance(Event.deserialize(INFO.serialize()).source, EventSource)
    assert Event("n", EventSource.AGENT) == Event("n", EventSource.AGENT, 0, {})
    with pytest.raises(ValueError, match="BAD"):
        Event.deserialize('{"name": "x", "source": "BAD"}')


def test_rendezvous_event_as_a_line_of_json() -> None:
    assert str(RDZV_EVENT) == RDZV_EVENT.serialize()
    assert RDZV_EVENT.serialize() == (
        '{"name": "name", "run_id": "run", "message": "message", "hostname": "host", "pid": 1, '
        '"node_state": "RUNNING", "master_endpoint": "", "rank": 2, "local_id": null, "error_trace": ""}'
    )
    assert RdzvEvent.deserialize(RDZV_EVENT.serialize()) == RDZV_EVENT
    assert RdzvEvent.deserialize(RDZV_EVENT) is RDZV_EVENT


def test_handlers() -> None:
    assert isinstance(get_logging_handler(), logging.NullHandler)
    assert isinstance(get_logging_handler("dynamic_rendezvous"), logging.NullHandler)
    console = get_logging_handler("console")
    assert isinstance(console, logging.StreamHandler)
    assert console.stream is sys.stderr


def test_record_writes_to_the_destination(capsys: pytest.CaptureFixture[str]) -> None:
    record(INFO)
    record(INFO, "console")
    record(INFO, "console")
    assert capsys.readouterr() == ("", f"{INFO.serialize()}\n" * 2)


def test_unknown_destination_is_an_error_that_lists_those_available(plug_in: Path) -> None:
    names = "absent, broken, console, dynamic_rendezvous, file, null, odd, raising"
    message = f"'nosuch': unknown; choose one of {names}, or install"
    with pytest.raises(UsageError, match=f"event handler {message}"):
        record(INFO, "nosuch")
    with pytest.raises(UsageError, match=f"--event-log-handler: event handler {message}"):
        check_destination("nosuch")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "event_plug:broken of plugins failed: OSError: no network"),
        ("absent", "event_plug:absent of plugins failed: AttributeError: .* no attribute 'absent'"),
        ("odd", "event_plug:odd of plugins failed: TypeError: must return a logging.Handler, not int"),
    ],
)
def test_plug_in_that_does_not_work_is_an_error_that_names_it(plug_in: Path, name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"--event-log-handler: event handler '{name}': plug-in {reason}"):
        check_destination(name)


def test_plug_in_receives_events(plug_in: Path) -> None:
    check_destination("file")
    lines = Lines()
    lines.recorder(spec("file")).run_ended(WorkerState.SUCCEEDED, ASSIGNMENT, PIDS)
    # Nothing is left in a buffer: the program may end without the interpreter's shutdown.
    recorded = [json.loads(line) for line in plug_in.read_text().splitlines()]
    assert [event["metadata"]["global_rank"] for event in recorded] == [4, 5, None]
    assert lines.text == lines.logged == []


def test_handler_that_raises_costs_one_line(plug_in: Path) -> None:
    check_destination("raising")
    lines = Lines()
    lines.recorder(spec("raising")).run_ended(WorkerState.SUCCEEDED, ASSIGNMENT, PIDS)
    assert lines.logged == ["--event-log-handler=raising: events are lost: OSError: no network"]


def test_rendezvous_events_are_dropped_without_a_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    record_rdzv_event(RDZV_EVENT)
    construct_and_record_rdzv_event("run", "message", NodeState.INIT)
    assert capsys.readouterr() == ("", "")


def test_missing_facts_of_a_rendezvous_event_are_filled_in(plug_in: Path) -> None:
    construct_and_record_rdzv_event("run", "first", NodeState.FAILED, "name", "host", 5, "ep:1", local_id=3, rank=2)
    try:
        int("boom")
    except ValueError:
        construct_and_record_rdzv_event("run", "second", NodeState.FAILED)
        construct_and_record_rdzv_event("run", "third", NodeState.RUNNING)
    for handler in logging.getLogger("elastic_launch.events.dynamic_rendezvous").handlers:
        handler.flush()
    first, second, third = map(RdzvEvent.deserialize, plug_in.read_text().splitlines())
    assert first == RdzvEvent("name", "run", "first", "host", 5, NodeState.FAILED, "ep:1", 2, 3)
    assert second.name == "test_events.py:test_missing_facts_of_a_rendezvous_event_are_filled_in"
    assert second.pid == os.getpid()
    assert second.hostname
    assert second.error_trace.endswith("invalid literal for int() with base 10: 'boom'\n")
    assert third.error_trace == ""


def test_record_of_a_round() -> None:
    lines = Lines()
    before = int(time.time() * 1000)
    lines.recorder(spec(), 2.5).round_started(ASSIGNMENT, {0: 100, 1: -1}, joining=0.25)
    assert len(lines.text) == 1, "each write may wait for its reader"
    rendezvous, assign, first, second = lines.events()
    assert before <= rendezvous["timestamp"] <= time.time() * 1000
    assert [event["name"].rpartition(".")[2] for event in (rendezvous, assign, first, second)] == [
        "RENDEZVOUS",
        "ASSIGN_WORKER_RANKS",
        "START",
        "START",
    ]
    assert (rendezvous["metadata"]["duration_ms"], assign["metadata"]["duration_ms"]) == (250.0, 0.0)
    assert (first["metadata"]["worker_id"], second["metadata"]["worker_id"]) == ("100", None)
    assert first["metadata"]["total_run_time"] == 2
    assert first["metadata"]["agent_restarts"] == 1


def test_record_of_a_success() -> None:
    lines = Lines()
    lines.recorder(spec(), 3).run_ended(WorkerState.SUCCEEDED, ASSIGNMENT, PIDS)
    first, second, agent = map(parsed, lines.events())
    for event in (first, second, agent):
        assert event["name"] == "torchelastic.worker.status.SUCCEEDED"
    assert second["source"] == "WORKER"
    assert second["metadata"] == {
        "run_id": "run",
        "global_rank": 5,
        "group_rank": 1,
        "worker_id": "101",
        "role": "trainer",
        "hostname": "node1",
        "state": "SUCCEEDED",
        "total_run_time": 3,
        "rdzv_backend": "c10d",
        "raw_error": None,
        "metadata": {
            "group_world_size": 2,
            "entry_point": "python3",
            "local_rank": [1],
            "role_rank": [3],
            "role_world_size": [3],
            "exit_code": [None],
            "worker_pid": [None],
        },
        "agent_restarts": 1,
        "duration_ms": None,
    }
    assert agent["source"] == "AGENT"
    assert agent["metadata"]["global_rank"] is agent["metadata"]["worker_id"] is None
    assert agent["metadata"]["metadata"] == {"group_world_size": 2, "entry_point": "python3"}


def test_record_of_an_agent_that_failed() -> None:
    lines = Lines()
    lines.recorder(spec()).run_ended(WorkerState.FAILED, None, {}, error="no store")
    (event,) = lines.events()
    assert (event["name"], event["source"]) == ("torchelastic.worker.status.FAILED", "AGENT")
    assert event["metadata"]["raw_error"] == "no store"
    assert event["metadata"]["hostname"] == os.uname().nodename
    assert event["metadata"]["group_rank"] is None


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("backend", ["static", "c10d", "etcd"])
def test_events_name_the_rendezvous_backend(backend: str, nodes: int) -> None:
    config = LaunchConfig(1, nodes, 1, rdzv_backend=backend, rdzv_endpoint="127.0.0.1:29400", run_id="job")
    rendezvous = create_rendezvous(config, {}, print)
    lines = Lines()
    workers = WorkerSpec("trainer", 1, rendezvous, entrypoint="sh", event_log_handler="console")
    Telemetry(workers, "job", lines.text.append, lines.logged.append).fail("no store")
    assert [event["metadata"]["rdzv_backend"] for event in lines.events()] == [backend]


TRAIN = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def ready(): open(f"ready{rank}", "w").write(str(os.getpid()))
if rank == 0:
    ready()
    sys.exit(0)
if rank == 2:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    ready()
    while True: signal.pause()
def pid(file): return open(file).read() if os.path.exists(file) else ""
while not pid("ready2") or not pid("ready0") or os.path.exists("/proc/" + pid("ready0")): time.sleep(0.01)
error = {"message": "ValueError: boom", "extraInfo": {"py_callstack": "Traceback", "timestamp": "1700000000"}}
with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file: json.dump({"message": error}, file)
sys.exit(1)
"""


def test_events_are_those_of_torchrun(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--event-log-handler", "console", "--role", "trainer"]
    run = subprocess.run(
        [*torchrun, "--nproc-per-node", "3", "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    theirs = [json.loads(line) for line in run.stderr.splitlines() if line.startswith('{"name": "torchelastic.')]
    assert len(theirs) == 9, run.stderr

    end = theirs[-2]["metadata"]
    pids = {rank: int(theirs[5 + rank]["metadata"]["worker_id"]) for rank in range(3)}
    assignment = Assignment(0, 1, 0, 3, 3, 0, 3, "127.0.0.1", 1, host=end["hostname"], port_picked=True)
    failures = [
        ProcessFailure(1, pids[1], 1, rank=1, error="ValueError: boom", traceback="Traceback", failed_at=1700000000.9),
        ProcessFailure(2, pids[2], 3, rank=2),
    ]
    lines = Lines()
    recorder = Recorder(
        spec(entrypoint=json.loads(end["metadata"])["entry_point"]),
        end["run_id"],
        end["rdzv_backend"],
        lines.text.append,
        lines.logged.append,
        NOW,
    )
    recorder.round_started(assignment, pids, joining=0.0)
    later = replace(recorder, started_at=NOW - end["total_run_time"])
    later.run_ended(WorkerState.FAILED, assignment, pids, failures)

    ours = lines.events()
    for event in ours:
        assert event["timestamp"] > 0
        event["timestamp"] = 0  # torch's always is
    for event in ours[:2]:  # torch does not know these yet
        event["metadata"]["group_rank"] = None
        event["metadata"]["metadata"] = event["metadata"]["metadata"].replace('_size": 1', '_size": null')
    for event in theirs[:2]:
        assert isinstance(event["metadata"]["duration_ms"], float)
        event["metadata"]["duration_ms"] = 0.0
    assert [json.dumps(event) for event in ours] == [json.dumps(event) for event in theirs]


def test_error_of_a_worker_has_the_format_of_its_error_file() -> None:
    lines = Lines()
    failure = ProcessFailure(1, 101, 1, error="ValueError: boom", traceback="Traceback ...", failed_at=1.5, rank=5)
    killed = ProcessFailure(0, 100, -9, rank=4)
    elsewhere = ProcessFailure(0, 7, 1, rank=0)
    lines.recorder(spec()).run_ended(WorkerState.FAILED, ASSIGNMENT, PIDS, [failure, killed, elsewhere])
    first, second, agent = map(parsed, lines.events())
    assert first["metadata"]["raw_error"] == {"message": "<NONE>"}
    assert first["metadata"]["metadata"]["exit_code"] == [-9]
    assert second["metadata"]["raw_error"] == {
        "message": {
            "message": "ValueError: boom",
            "extraInfo": {"py_callstack": "Traceback ...", "timestamp": "1"},
        }
    }
    assert second["metadata"]["metadata"]["worker_pid"] == [101]
    assert agent["name"].endswith("SUCCEEDED")


def test_without_a_destination_nothing_is_imported() -> None:
    code = (
        "import sys\n"
        "from elastic_launch.core.agent.lifecycle import AgentState, Finish, Limits\n"
        "from elastic_launch.job import Policy\nfrom elastic_launch.worker_spec import WorkerSpec\n"
        "from elastic_launch.agent.telemetry import Telemetry\n"
        "telemetry = Telemetry(WorkerSpec('r', 1, None, entrypoint='x'), 'run', print, print)\n"
        "telemetry.end(AgentState(Limits(Policy(), 30)), Finish())\n"
        "print([name for name in ('logging', 'json', 'elastic_launch.events') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
