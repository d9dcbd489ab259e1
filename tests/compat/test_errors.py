"""Failures and errors as programs written for torch see them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_launch import (
    ChildFailedError,
    DefaultLogsSpecs,
    LaunchConfig,
    ProcessFailure,
    RendezvousParameters,
    elastic_launch,
    get_rendezvous_handler,
    start_processes,
)
from elastic_launch.rendezvous.registry import RendezvousHandlerRegistry
from elastic_launch.run import parse_min_max_nnodes

EXTRA = {"py_callstack": "Traceback ...", "timestamp": "1700000000"}
FILES: dict[str, Any] = {
    "of record": {"message": {"message": "ValueError: boom", "extraInfo": EXTRA}},
    "of a launcher": {"message": {"message": "ValueError: boom", "errorCode": 3, "extraInfo": EXTRA}},
    "a text": {"message": "boom"},
    "a text with a time": {"message": "boom", "timestamp": "1700000001"},
    "with more": {"message": {"message": "E: x", "extraInfo": {**EXTRA, "rack": 7}}, "more": [1]},
}
"""The formats of error files that torch reads."""
TORCH = """
import json, sys
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
files, missing = json.loads(sys.argv[1]), sys.argv[2]
def seen(path, code):
    failure = vars(ProcessFailure(0, 123, code, path))
    return {**failure, "timestamp": None} if path == missing else failure
print(json.dumps([seen(path, code) for path in [*files, missing] for code in (1, -9)]))
"""


def test_a_failure_made_by_hand_has_what_torch_s_has(tmp_path: Path) -> None:
    paths = []
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
        paths.append(str(tmp_path / name))
    missing = str(tmp_path / "missing")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TORCH, json.dumps(paths), missing],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    before = int(time.time())
    for theirs in json.loads(done.stdout.splitlines()[-1]):
        path = theirs["error_file"]
        ours = ProcessFailure(0, 123, theirs["exitcode"], missing if path == "<N/A>" else path)
        if theirs["timestamp"] is None:
            assert before <= ours.timestamp <= time.time()
        else:
            assert ours.timestamp == theirs["timestamp"]
        if theirs["exitcode"] > 0 and path == "<N/A>":
            assert ours.message == "The process (pid 123) ended: exit code 1."  # torch's text names a page of its own
        else:
            assert ours.message == theirs["message"]
        assert (ours.error_file, ours.error_file_data) == (path, theirs["error_file_data"])


@pytest.mark.parametrize(
    "content", ["", "not JSON", "[1]", "{}", '{"message": []}', '{"message": {"extraInfo": 5}}', "[" * 99_999]
)
def test_a_file_that_is_no_error_file_is_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "error.json"
    path.write_text(content)
    failure = ProcessFailure(0, 5, -9, str(path))
    assert failure.message == "Signal 9 (SIGKILL) received by PID 5"
    assert "killed by SIGKILL" in str(ChildFailedError("x", {0: failure}))


def test_failures_can_be_changed() -> None:
    failure = ProcessFailure(0, 5, 1)
    failure.exitcode, failure.message, failure.timestamp = 7, "mine", 3
    assert (failure.status(), failure.message, failure.timestamp_isoformat()[:4]) == (7, "mine", "1970")


def test_an_error_made_by_hand_prints_a_full_report(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    file.write_text(json.dumps(FILES["of record"]))
    killed = ProcessFailure(1, 998, -9, "<N/A>")
    error = ChildFailedError("train.py", {5: killed, 4: ProcessFailure(0, 997, 3, str(file))})
    lines = str(error).splitlines()
    assert lines[1:6] == [
        "train.py FAILED",
        "-" * 80,
        "Cause",
        "  rank    : 4 (local rank 0, pid 997)",
        "  exit    : exit code 3",
    ]
    assert lines[7:9] == ["  error   : ValueError: boom", "    Traceback ..."]
    assert lines[9] == "Then"
    assert lines[10].endswith(" rank 5 (pid 998): killed by SIGKILL")
    assert error.exit_code == 3
    alone = ChildFailedError("train.py", {5: replace(killed, host="host-b")})
    assert "rank    : 5 (local rank 1, pid 998) on host-b\n" in str(alone)


def test_the_agent_s_failures_have_torch_s_attributes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os, signal\n"
        "path = os.environ['TORCHELASTIC_ERROR_FILE']\n"
        "if os.environ['RANK'] == '1':\n"
        "    extra = {'py_callstack': 'the stack', 'timestamp': '1700000000', 'rack': 7}\n"
        "    json.dump({'message': {'message': 'E: x', 'extraInfo': extra}}, open(path, 'w'))\n"
        "    os._exit(3)\n"
        "signal.pause()\n"
    )
    config = LaunchConfig(1, 1, 2, max_restarts=0, verbosity=0)
    with pytest.raises(ChildFailedError) as caught:
        elastic_launch(config, sys.executable)(str(script))
    failure = caught.value.failures[1]
    assert failure.message["extraInfo"]["py_callstack"] == "the stack"
    assert failure.message["extraInfo"]["rack"] == 7
    assert failure.error_file_data["message"] == failure.message
    assert isinstance(failure.timestamp, int)
    assert failure.timestamp_isoformat()


def test_errors_are_of_the_types_that_torch_raises(tmp_path: Path) -> None:
    def start(entrypoint: str = "true", args: Any = None, envs: Any = None, log_dir: str | None = None) -> object:
        return start_processes("test", entrypoint, args or {0: ()}, envs or {0: {}}, DefaultLogsSpecs(log_dir))

    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RuntimeError, match="without gaps"):
        start(envs={0: {}, 1: {}})
    with pytest.raises(RuntimeError, match="without gaps"):
        start(args={0: (), 2: ()}, envs={0: {}, 2: {}})
    for path in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=f"--log-dir={path}"):
            start(log_dir=str(path))
        with pytest.raises(NotADirectoryError, match=f"--log-dir={path}"):
            elastic_launch(LaunchConfig(1, 1, 1, logs_specs=DefaultLogsSpecs(str(path))), "true")()
    for program in ("/nowhere/prog", "nowhere_prog"):
        with pytest.raises(FileNotFoundError, match=program):
            start(program)
    with pytest.raises(ValueError, match="'nope'"):
        get_rendezvous_handler(RendezvousParameters("nope", "h:1", "1", 1, 1))
    registry = RendezvousHandlerRegistry()
    registry.register("x", lambda params: get_rendezvous_handler(RendezvousParameters("c10d", "h:1", "1", 1, 1)))
    with pytest.raises(RuntimeError, match="handler of 'c10d'"):
        registry.create_handler(RendezvousParameters("x", "h:1", "1", 1, 1))
    with pytest.raises(RuntimeError, match="1:2:3"):
        parse_min_max_nnodes("1:2:3")
    with pytest.raises(ValueError, match="'a'"):
        parse_min_max_nnodes("a")
