"""The events that real jobs write, and what becomes of them where they cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from elastic_launch import LaunchConfig, elastic_launch
from elastic_launch.logs.event_log import EventLog, path_in
from tests.support.event_lines import events_in, names
from tests.support.jobs import TWO, Job, report_of
from tests.support.waiting import wait_until

CRASH = "if rank == 1 and restart == 0: wait_for('0.0 up'); sys.exit(3)\nmark('up')\nif restart == 0: wait()"
RESTART = [
    *("joined", "formed", "started", "failed", "stopping", "stopped", "restarting"),
    *("joined", "re_formed", "started", "succeeded", "stopped", "ended"),
]


def lines_of(stderr: str) -> list[str]:
    """What the launcher has logged."""
    return [line.removeprefix("elastic-run: ") for line in stderr.splitlines() if line.startswith("elastic-run: ")]


@pytest.mark.quick
def test_a_job_that_restarts_writes_its_life_and_all_that_was_logged(job: Job) -> None:
    words = ["--standalone", *TWO, "--max-restarts", "1", "--rdzv-id", "job/1"]
    done = job.run(*words[1:], "--events", "e.jsonl", "--log-dir", "logs", job.script(CRASH))
    assert done.returncode == 0
    events = events_in(job.path / "e.jsonl")
    assert names(events) == RESTART
    assert [event["text"] for event in events if event["text"]] == lines_of(done.stderr)
    assert {event["job"] for event in events} == {"job/1"}
    assert [event["elapsed"] for event in events] == sorted(event["elapsed"] for event in events)
    assert events == events_in(job.path / "logs" / "job%2F1" / "events.jsonl")
    failed = next(event for event in events if event["name"] == "failed")
    assert (failed["rank"], failed["exitcode"], failed["how"]) == (1, 3, "exit code 3")


def test_a_job_that_fails_writes_what_the_report_says(job: Job) -> None:
    text = "if rank == 1: wait_for('0.0 up'); raise ValueError('boom')\nmark('up'); wait()"
    done = job.run(*TWO, "--events", "e.jsonl", job.script(text), SLURM_RESTART_COUNT="2")
    events = events_in(job.path / "e.jsonl")
    assert done.returncode == events[-1]["status"] == 1
    assert (events[-1]["name"], events[-1]["outcome"], events[-1]["attempt"]) == ("ended", "failed", 2)
    cause = events[-1]["failures"][0]
    assert cause["error"] == "ValueError: boom"
    assert all(f"    {line}" in report_of(done.stderr) for line in cause["traceback"].splitlines() if line)


def test_a_job_that_is_stopped_writes_by_what(job: Job) -> None:
    process = job.start(*TWO, "-q", "--events", "e.jsonl", job.script("mark('up'); wait()"))
    job.wait_for("0.0 up", "1.0 up")
    wait_until(lambda: '"name": "started"' in (job.path / "e.jsonl").read_text())  # the agent hears of it later
    process.send_signal(signal.SIGTERM)
    assert job.finish(process).returncode == 143
    events = events_in(job.path / "e.jsonl")
    assert names(events)[-4:] == ["signalled", "stopping", "stopped", "ended"]
    assert (events[-1]["outcome"], events[-1]["status"]) == ("stopped", 143)


def test_an_error_of_the_launcher_is_an_event(job: Job) -> None:
    words = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:1"]
    conf = ["--rdzv-conf", "join_timeout=1,is_host=false", "--events", str(job.path)]
    done = job.run(*words, *conf, job.script(""))
    host = os.uname().nodename
    events = events_in(Path(path_in(str(job.path), host)))
    assert (events[-1]["name"], events[-1]["outcome"]) == ("ended", "error")
    assert events[-1]["status"] == done.returncode != 0
    assert events[-1]["error"] in done.stderr


def test_a_requeued_job_adds_to_its_file_and_ends_a_line_that_was_cut_off(job: Job) -> None:
    file = job.path / "e.jsonl"
    file.write_text('{"time": 1.0, "na')
    assert job.run("--events", "e.jsonl", job.script("")).returncode == 0
    assert job.run("--events", "e.jsonl", job.script("")).returncode == 0
    first, *lines = file.read_text().splitlines()
    assert first == '{"time": 1.0, "na'
    assert [json.loads(line)["name"] for line in lines] == RESTART_FREE * 2


RESTART_FREE = ["joined", "formed", "started", "succeeded", "stopped", "ended"]


def test_from_python(job: Job, one_thread: None) -> None:
    config = LaunchConfig(1, 1, 1, verbosity=0, events=str(job.path / "e.jsonl"))
    elastic_launch(config, "true")()
    assert names(events_in(job.path / "e.jsonl")) == RESTART_FREE


def test_without_events_nothing_is_imported_for_them(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("")
    code = (
        "import sys; from elastic_launch.run import main; main(['x.py']);"
        "print([name for name in sys.modules if 'journal' in name or 'event_log' in name])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


# --- where they cannot be written


def warned(stderr: str) -> list[str]:
    return [line for line in lines_of(stderr) if "events are lost" in line]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/dev/full", "No space left on device"),
        ("/proc/e.jsonl", "No such file or directory"),
        ("/sys/e.jsonl", "Permission denied"),
        ("missing/e.jsonl", "No such file or directory"),
        ("pipe", "nobody reads it"),
    ],
)
def test_what_cannot_be_written_is_told_once_and_costs_nothing(job: Job, path: str, why: str) -> None:
    os.mkfifo(job.path / "pipe")
    done = job.run(*TWO, "--max-restarts", "1", "--events", path, job.script(CRASH))
    assert done.returncode == 0
    assert warned(done.stderr) == [f"--events={path}: {why}; the job continues, and events are lost"]
    assert "done: 2 workers succeeded" in lines_of(done.stderr)


def test_a_pipe_gets_the_events(job: Job) -> None:
    os.mkfifo(job.path / "pipe")
    # Open before the launcher looks whether somebody reads. The pipe holds them all.
    reading = os.open(job.path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    done = job.run("--events", "pipe", job.script(""))
    read = os.read(reading, 1 << 16)
    os.close(reading)
    assert done.returncode == 0
    assert [json.loads(line)["name"] for line in read.splitlines()][-1] == "ended"


def test_a_directory_that_is_removed_is_told_once(job: Job) -> None:
    (job.path / "there").mkdir()
    text = "mark('up'); wait_for('go')\nif restart == 0: sys.exit(1)"
    process = job.start("--max-restarts", "1", "--events", "there/e.jsonl", job.script(text))
    job.wait_for("0.0 up")
    shutil.rmtree(job.path / "there")
    job.mark("go")
    done = job.finish(process)
    assert done.returncode == 0
    assert len(warned(done.stderr)) == 1


def test_a_file_that_is_rotated_away_is_made_anew(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "e"), "--events", pytest.fail)
    log.append(b"one\n")
    (tmp_path / "e").unlink()
    log.append(b"two\n")
    log.close()
    assert (tmp_path / "e").read_bytes() == b"two\n"


def test_a_line_that_is_cut_off_by_a_full_disk_is_finished_once_there_is_room(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 20_000)
    warnings: list[str] = []
    log = EventLog(str(small_disk / "e"), "--events", warnings.append)
    for letter in (b"a", b"b", b"c", b"d", b"e", b"f"):  # more than there is room for
        log.append(letter * 9_999 + b"\n")
    assert len(warnings) == 1
    assert not (small_disk / "e").read_bytes().endswith(b"\n"), "no line was cut off"
    filler.unlink()
    log.append(b"last\n")
    log.close()
    *lines, last = (small_disk / "e").read_bytes().splitlines()
    assert last == b"last"
    assert lines == [letter * 9_999 for letter in (b"a", b"b", b"c", b"d", b"e")][: len(lines)]
    assert len(lines) >= 3


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO])
def test_a_file_system_may_report_a_lost_line_when_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As NFS does. The descriptor is closed all the same, and its number may be another file's soon."""
    closing, closed = os.close, list[int]()

    def close(fd: int) -> None:
        closing(fd)
        closed.append(fd)
        raise OSError(number, os.strerror(number))

    warnings: list[str] = []
    log = EventLog(str(tmp_path / "e"), "--events", warnings.append)
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        log.append(b"one\n")
    assert len(closed) == 1
    with open(tmp_path / "another", "wb"):
        log.append(b"two\n")
    log.close()
    assert (tmp_path / "e").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "another").read_bytes() == b""
    assert warnings == [f"--events: {os.strerror(number)}; the job continues, and events are lost"]


def test_a_pipe_that_is_full_loses_whole_lines(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    warnings: list[str] = []
    log = EventLog(str(tmp_path / "pipe"), "--events", warnings.append)
    line = b"x" * 9_999 + b"\n"
    for _ in range(20):
        log.append(line)
    data = b""
    while len(data) < 60_000:
        data += os.read(reading, 1 << 20)
    log.append(b"last\n")
    log.close()
    while block := os.read(reading, 1 << 20):
        data += block
    os.close(reading)
    assert warnings == ["--events: nobody reads it; the job continues, and events are lost"]
    *lines, last = data.splitlines(keepends=True)
    assert last == b"last\n"
    assert len(lines) >= 6
    assert set(lines) == {line}


def test_agents_of_one_host_share_a_file(tmp_path: Path) -> None:
    def write(letter: bytes) -> None:
        log: Any = EventLog(str(tmp_path / "e"), "--events", pytest.fail)
        for _ in range(200):
            log.append(letter * 2999 + b"\n")
        log.close()

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (tmp_path / "e").read_bytes().splitlines()
    assert sorted(set(lines)) == [b"a" * 2999, b"b" * 2999]
    assert len(lines) == 400


def test_workers_do_not_inherit_the_file(job: Job) -> None:
    text = """
for fd in range(3, 256):
    if os.path.exists(f"/proc/self/fd/{fd}"): mark(os.readlink(f"/proc/self/fd/{fd}"))
mark("up")
"""
    assert job.run("--events", "e.jsonl", job.script(text)).returncode == 0
    assert "0.0 up" in job.marks()
    assert not [mark for mark in job.marks() if "e.jsonl" in mark]


HANG = """
from elastic_launch.worker import progress
for step in range(30):
    progress(step)
    time.sleep(0.01)
if restart == 0: wait()
"""


def test_steps_a_hang_and_the_account_of_the_time_are_in_the_events(job: Job) -> None:
    words = ["--max-restarts", "1", "--hang-timeout", "3", "--hang-action", "restart", "--events", "e.jsonl"]
    done = job.run(*TWO, *words, job.script(HANG))
    assert done.returncode == 0
    events = events_in(job.path / "e.jsonl")
    in_order = sorted(events, key=lambda event: event["elapsed"])
    # A worker may make its first step before the agent hears that all have been started.
    first_steps = [event for event in in_order if event["name"] == "first_step"]
    assert [event["round"] for event in first_steps] == [0, 1]
    hang = ["joined", "formed", "started", "stalled", "failed", "stopping", "stopped", "restarting"]
    assert names([event for event in in_order if event not in first_steps]) == [
        *hang,
        *("joined", "re_formed", "started", "succeeded", "stopped", "ended"),
    ]
    for event, later in zip(first_steps, ("stalled", "succeeded"), strict=True):
        assert event["elapsed"] < next(other["elapsed"] for other in in_order if other["name"] == later)
    by_name = {event["name"]: event for event in events}
    assert (by_name["stalled"]["action"], by_name["stalled"]["scope"]) == ("restart", "job")
    assert by_name["stalled"]["seconds"] >= 3
    assert by_name["restarting"]["cause"] == by_name["stopping"]["cause"] == "hang"
    made = by_name["ended"]["goodput"]
    assert (made["steps"], made["repeated"]) == (60, 30)
    assert made["lost"] >= by_name["stalled"]["seconds"] - 0.1
    assert abs(by_name["first_step"]["time"] - by_name["started"]["time"]) < 60
