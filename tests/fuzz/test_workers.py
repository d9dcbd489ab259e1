"""Anything at all in what workers write for the agent: error files, and the timer pipe."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from elastic_launch.core.timer_requests import LONGEST, parse, take_requests
from elastic_launch.workers.bootstrap import read_record
from elastic_launch.workers.error_files import read_error_file
from elastic_launch.workers.watchdog import MAX_TIMERS, Watchdog
from tests.support.nonsense import JSON, run_machine

PID = 77

# --- error files

STACK = 'Traceback (most recent call last):\n  File "train.py", line 7\nValueError: boom'
RECORDS: list[dict[str, Any]] = [
    {"message": {"message": "ValueError: boom", "extraInfo": {"py_callstack": STACK, "timestamp": "7", "time": 7.0}}},
    {"message": {"message": "ValueError: boom", "errorCode": 3, "extraInfo": {"py_callstack": STACK, "session": PID}}},
    {"message": "it broke\nbadly"},
]
"""Ours and torch's, a copy that a launcher has made of its worker's, and one without fields."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("error") / "error.json"


def read(file: Path, data: bytes) -> str:
    """The error that a file holds, empty if it holds none; both readers raise nothing but what they say."""
    file.write_bytes(data)
    try:
        read_record(str(file))
    except (OSError, ValueError):
        pass
    except RecursionError:
        assert data.count(b"[") + data.count(b"{") > 500
    record = read_error_file(str(file), PID)
    if record is None:
        return ""
    assert len(record.error) <= 10_100
    assert len(record.traceback) <= 1_000_100
    assert 0 <= record.time < float("inf")
    return record.error or "an exception without a name"


@given(st.binary(max_size=300))
@example(b"[" * 100_000)
@example(b'{"message":' * 30_000)
@example(b'{"message": "\\ud800')
@example(b'{"message": "\\u12')
@example(b'{"message": {"message": "E", "extraInfo": {"session": 1' + b"0" * 5000 + b"}}}")
@example(b" " * (5 << 20))
def test_any_bytes_as_an_error_file(file: Path, data: bytes) -> None:
    read(file, data)


@given(st.sampled_from(RECORDS), st.data())
@example(RECORDS[0], None)
def test_an_error_file_with_odd_fields(file: Path, record: dict[str, Any], data: st.DataObject | None) -> None:
    if data is None:
        return
    message = record["message"]
    if isinstance(message, dict) and data.draw(st.booleans()):
        fields = ["py_callstack", "timestamp", "time", "session"]
        odd = data.draw(JSON | st.dictionaries(st.sampled_from(fields), JSON, max_size=4))
        message = {**message, "extraInfo": {**message["extraInfo"], **odd} if isinstance(odd, dict) else odd}
    else:
        message = data.draw(JSON | st.fixed_dictionaries({"message": JSON}, optional={"errorCode": JSON}))
    read(file, json.dumps({**record, "message": message}).encode())


@given(st.sampled_from(RECORDS), st.data())
def test_an_error_file_that_is_cut_off_or_follows_nonsense_says_what_it_can(
    file: Path, record: dict[str, Any], data: st.DataObject
) -> None:
    whole = json.dumps(record).encode()
    text = b"ValueError: boom" if b"boom" in whole else b"it broke\\nbadly"
    cut = data.draw(st.integers(whole.index(text) + len(text), len(whole)))
    before = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\0" * 10, b'{"a": ' + b"[" * 2000]))
    assert read(file, before + whole[:cut]).startswith(("ValueError: boom", "it broke\nbadly"))


# --- timer pipe


def request(pid: Any, scope: Any, expires_at: Any = 1e12, signum: Any = 9) -> bytes:
    fields = {"version": 1, "pid": pid, "scope_id": scope, "expiration_time": expires_at, "signal": signum}
    return json.dumps(fields).encode() + b"\n"


@given(JSON, JSON, JSON, JSON)
@example(True, "s", 1.0, 9)
@example(0, "s", 1.0, 9)
@example(-1, "s", 1.0, 9)
@example(1, "s", float("nan"), 9)
@example(1, "s", 10**400, 9)
@example(1, "s", "1", 9)
@example(1, "s", 1.0, 65)
def test_what_breaks_a_rule_is_no_request(pid: Any, scope: Any, expires_at: Any, signum: Any) -> None:
    found = parse(request(pid, scope, expires_at, signum))
    assert not found or (
        found.pid > 0 and found.expires_at == found.expires_at and 0 <= found.signum <= 64 and found.scope == scope
    )


@given(st.lists(st.binary(max_size=50) | st.sampled_from([b"\n", b'{"version"', b'"pid"', b"x" * 5000]), max_size=6))
@example([b'{"version":' * 400 + b'"pid"\n'])
@example([b'{"version":1,"pid":' + b"[" * 4000 + b"\n"])
def test_after_any_bytes_a_request_is_found(pieces: list[bytes]) -> None:
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        take_requests(buffer)
        assert len(buffer) <= LONGEST
    buffer += request(7, "s")
    assert take_requests(buffer)[-1:] == [(7, "s", 1e12, 9)]


class TimerPipe(RuleBasedStateMachine):
    """Workers that set and cancel timers, and one that writes nonsense between."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.watchdog = Watchdog(f"{self.folder.name}/pipe")
        self.pipe = os.open(self.watchdog.path, os.O_WRONLY | os.O_NONBLOCK)
        self.timers: set[tuple[int, str]] = set()
        self.is_expired = False

    def teardown(self) -> None:
        os.close(self.pipe)
        self.watchdog.close()
        self.folder.cleanup()

    @rule(pid=st.integers(1, 3), scope=st.sampled_from("ab"), is_set=st.booleans())
    def time(self, pid: int, scope: str, is_set: bool) -> None:
        os.write(self.pipe, request(pid, scope, time.time() + 1000 if is_set else -1))
        (self.timers.add if is_set else self.timers.discard)((pid, scope))

    @rule(
        data=st.binary(max_size=100)
        | st.sampled_from([b"\n", b"{", b'"pid"\n', b"x" * 4090, b'{"version": 1, "pid": 7'])
    )
    def babble(self, data: bytes) -> None:
        os.write(self.pipe, data)

    @rule(pid=st.integers(1, 3))
    def end(self, pid: int) -> None:
        self.watchdog.forget(pid)
        self.timers = {key for key in self.timers if key[0] != pid}

    @rule()
    def end_round(self) -> None:
        self.watchdog.clear()
        self.timers.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        assert not self.watchdog.expired(time.monotonic())
        assert (self.watchdog.deadline() is None) == (not self.timers)

    @rule()
    def expire(self) -> None:
        found = self.watchdog.expired(time.monotonic() + 2000)
        assert {(timer.pid, timer.scope) for timer in found} == self.timers
        self.timers.clear()


def test_timers_between_nonsense() -> None:
    run_machine(TimerPipe)


def test_timers_without_end_take_bounded_memory(tmp_path: Path) -> None:
    watchdog = Watchdog(str(tmp_path / "pipe"))
    pipe = os.open(watchdog.path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        for start in range(0, MAX_TIMERS + 500, 500):
            os.write(pipe, b"".join(request(1, f"{number}") for number in range(start, start + 500)))
            assert not watchdog.expired(0.0)
        os.write(pipe, request(1, "0", -1) + request(2, "mine"))  # leaving makes room
        found = watchdog.expired(float("inf"))
    finally:
        os.close(pipe)
        watchdog.close()
    assert len(found) == MAX_TIMERS
    assert (2, "mine") in {(timer.pid, timer.scope) for timer in found}
