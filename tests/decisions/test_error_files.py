"""Reading error files: good ones, and those that a full disk, a huge text or an accident has left."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_launch.workers.error_files import read_error_file

PID = 77
STACK = 'Traceback (most recent call last):\n  File "train.py", line 7, in <module>\nValueError: boom\n'


def content(
    line: str = "ValueError: boom", stack: str = STACK, extra: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """An error file as ``record`` and the bootstrap write it."""
    told = {"py_callstack": stack, "timestamp": str(int(time.time())), "time": time.time(), "session": PID}
    return {"message": {"message": line, "extraInfo": {**told, **(extra or {})}, **more}}


def written(path: Path, data: str | bytes | dict[str, Any]) -> str:
    path.write_bytes(
        data if isinstance(data, bytes) else (data if isinstance(data, str) else json.dumps(data)).encode()
    )
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "error.json"


def test_what_was_written_is_read(file: Path) -> None:
    told = content()
    record = read_error_file(written(file, told), PID)
    assert record == ("ValueError: boom", STACK, told["message"]["extraInfo"]["time"], str(file))


def test_what_torch_s_record_writes_is_read(file: Path) -> None:
    extra = {"py_callstack": STACK, "timestamp": "1000"}
    path = written(file, {"message": {"message": "ValueError: boom", "extraInfo": extra}})
    os.utime(path, (5000.5, 5000.5))  # more precise than the timestamp
    assert read_error_file(path, PID) == ("ValueError: boom", STACK, 5000.5, path)


def test_a_message_without_fields_is_error_and_stack(file: Path) -> None:
    path = written(file, {"message": "it broke\nbadly"})
    os.utime(path, (5000.5, 5000.5))
    assert read_error_file(path, PID) == ("it broke\nbadly", "it broke\nbadly", 5000.5, path)


def test_an_error_file_of_another_worker_is_not_read(file: Path) -> None:
    assert read_error_file(written(file, content(extra={"session": PID + 1})), PID) is None
    assert read_error_file(written(file, content(extra={"session": 0})), PID)  # of another PID namespace
    # A launcher below the worker has copied the record of its own worker.
    assert read_error_file(written(file, content(extra={"session": PID + 1}, errorCode=3)), PID)


@pytest.mark.parametrize("given", [float("nan"), float("inf"), -1e300, 1e300, "soon", None, [], 5.0, 10**400])
def test_an_impossible_time_is_ignored(file: Path, given: Any) -> None:
    path = written(file, content(extra={"time": given}))
    os.utime(path, (1e9, 1e9))
    record = read_error_file(path, PID)
    assert record
    assert (record.error, record.time) == ("ValueError: boom", 1e9)


def test_wherever_a_file_is_cut_off_the_rest_is_read(file: Path) -> None:
    stack = 'Traceback\n\t"quoted" \\ \N{SNOWMAN} \U0001f600 \\u12\n' + STACK
    for ensure_ascii in (True, False):
        whole = json.dumps(content(stack=stack), ensure_ascii=ensure_ascii).encode()
        error_at = whole.index(b"ValueError")
        stack_at = whole.index(b"Traceback")
        for size in range(len(whole)):
            record = read_error_file(written(file, whole[:size]), PID)
            if size <= error_at:
                assert record is None, whole[:size]
                continue
            assert record, whole[:size]
            assert record.error == "ValueError: boom"[: size - error_at].removesuffix(": ")
            if size > stack_at:
                # The last character may be incomplete.
                assert stack.startswith(record.traceback[:-2]), whole[:size]
                assert len(record.traceback) >= len(whole[stack_at:size].decode(errors="ignore")) // 6
        assert record
        assert record.traceback == stack


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{}",
        b'{"message": {}}',
        b'{"message": null}',
        b'{"message": [1]}',
        b'{"message": {"message": "E", "extraInfo": []}}',
        b'{"message": {"message": "E", "extraInfo": {"session": {}}}}',
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"message":' * 300_000,
        b'{"message": "',
        b"Traceback (most recent call last)",
        b" " * (5 << 20),
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_not_an_error_file_is_ignored(file: Path, data: bytes) -> None:
    assert read_error_file(written(file, data), PID) is None


def test_an_error_is_found_before_and_after_nonsense(file: Path) -> None:
    told = json.dumps(content())
    for data in (
        "\ufeff" + told,
        told + told,
        told[:-1] + ', "deep": ' + "[" * 100_000,
        '{"deep": ' + "[" * 100_000 + told,
        '{"number": ' + "9" * 10_000 + "," + told[1:],
        told.replace("ValueError: boom", "ValueError: boom\t\\ud800").replace("Traceback", "Traceback \\q"),
    ):
        record = read_error_file(written(file, data), PID)
        assert record
        assert record.error.startswith("ValueError: boom")
        assert "line 7" in record.traceback


def test_what_is_not_a_file_does_not_make_the_reader_wait(file: Path, tmp_path: Path) -> None:
    assert read_error_file(str(file), PID) is None
    assert read_error_file(str(tmp_path), PID) is None
    assert read_error_file("", PID) is None
    assert read_error_file("a\0b", PID) is None
    assert read_error_file(f"{written(tmp_path / 'other.json', content())}/error.json", PID) is None
    os.mkfifo(file)
    assert read_error_file(str(file), PID) is None
    file.unlink()
    file.symlink_to(tmp_path / "other.json")
    assert read_error_file(str(file), PID) is None


def test_a_file_that_must_not_be_read_is_ignored(file: Path, tmp_path: Path) -> None:
    path = written(file, content())
    file.chmod(0)
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:];"
        "from elastic_launch.workers.error_files import read_error_file as read;"
        "os.getuid() or os.setuid(65534);"  # root may read anything
        f"print(read(sys.argv[1], {PID}))"
    )
    run = subprocess.run([sys.executable, "-c", code, path, *sys.path], capture_output=True, text=True, check=True)
    assert run.stdout == "None\n"


TEXTS = {
    "lines": '  File "train.py", line 7, in f\n',
    "escapes": "\n",
    "backslashes": "\\",
    "wide": "\U0001f600\\\n",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_of_a_huge_file_both_ends_are_read_quickly(file: Path, kind: str) -> None:
    start, end = "Traceback (most recent call last):\n", "ValueError: the end"
    unit = json.dumps(TEXTS[kind], ensure_ascii=False).encode()[1:-1]
    head, tail = json.dumps(content(stack=f"{start}<HERE>{end}")).encode().split(b"<HERE>")
    with file.open("wb") as stream:
        stream.write(head)
        for _ in range(50):
            stream.write(unit * (1_000_000 // len(unit)))
        stream.write(tail)
    size = file.stat().st_size
    for cut in (
        0,
        1,
        2,
        3,
        40,
    ):  # bytes, so that reading also begins within an escape; the last cut removes some of the numbers
        os.truncate(file, size - cut)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        record = read_error_file(str(file), PID)
        assert time.process_time() - began < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KiB
        assert record
        assert record.error == "ValueError: boom"
        assert record.traceback.startswith(start + TEXTS[kind])
        assert record.traceback.endswith(TEXTS[kind] + end)
        assert 500_000 < len(record.traceback) <= 1_000_000
        assert "MB left out" in record.traceback
        assert (read_error_file(str(file), PID + 1) is None) == (cut < 3)


def test_a_huge_message_does_not_hide_its_stack(file: Path) -> None:
    text = "b" * 6_000_000
    record = read_error_file(written(file, content(f"ValueError: {text}", f"{STACK}{text} the end")), PID)
    assert record
    assert record.error == ("ValueError: " + text)[:10_000]
    assert record.traceback.startswith(STACK + "bbb")
    assert record.traceback.endswith("bbb the end")
    record = read_error_file(written(file, {"message": f"it broke {text} the end"}), PID)
    assert record
    assert record.error.startswith("it broke bbb")
    assert record.traceback.endswith("bbb the end")


def test_a_key_within_a_text_is_not_a_key(file: Path) -> None:
    line = 'ValueError: {"message": "not this", "py_callstack": "nor this", "session": 5}'
    told = json.dumps(content(line, stack=f"{line}\n{STACK}"))
    for data in (told, told[:-2], json.dumps(content(line, stack=f"{line}\n{STACK}", padding=" " * (5 << 20)))):
        record = read_error_file(written(file, data), PID)
        assert record
        assert (record.error, record.traceback) == (line, f"{line}\n{STACK}")
