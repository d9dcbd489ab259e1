"""``record`` and its error file: real workers, compared with torch's, on good disks and on bad ones."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_launch.errors import ChildFailedError, ProcessFailure
from elastic_launch.workers import BOOTSTRAP
from elastic_launch.workers.error_files import read_error_file
from elastic_launch.workers.error_handler import ErrorHandler, get_error_handler, record, write_error
from tests.support.jobs import Job
from tests.support.waiting import DEADLINE

AS_WORKER = (BOOTSTRAP, "script")
"""What a script is started by as a worker."""

RECORD = "from elastic_launch.workers.error_handler import record\n"
RAISE = "@record\ndef main():\n    raise ValueError('boom')\n\nmain()\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The error file of this process."""
    (tmp_path / "errors").mkdir()
    path = tmp_path / "errors" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def run(path: Path, source: str, *start: str) -> subprocess.CompletedProcess[str]:
    """Run a script under Python, or under the program in ``start``, with this process's environment."""
    script = path / "script.py"
    script.write_text(source)
    command = [sys.executable, *start, str(script)]
    return subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=DEADLINE, check=False)


def message(file: Path) -> dict[str, Any]:
    """The message in an error file. Checks that there is no other file beside it."""
    assert list(file.parent.iterdir()) == [file]
    told = json.loads(file.read_text())["message"]
    assert isinstance(told, dict)
    return told


def fail(text: str = "boom") -> None:
    raise ValueError(text)


# Functions under both launchers' ``record``. Prints how each ended and what was written.
COMPARISON = """
import faulthandler, inspect, json, os, pathlib, re, sys, time
import torch.distributed.elastic.multiprocessing.errors as torchs
import elastic_launch.workers.error_handler as ours
from elastic_launch.errors import ChildFailedError, ProcessFailure

file = pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"])
child = pathlib.Path("child.json")
child.write_text(json.dumps({"message": {"message": "E: x", "extraInfo": {"py_callstack": "s", "timestamp": "9"}}}))
plain = pathlib.Path("plain.json")
plain.write_text('{"message": "plain"}')

class Interrupt(BaseException):
    pass

def raising(make):
    def f(*args, **kwargs):
        raise make()
    return f

def exits(*args):
    return lambda: sys.exit(*args)

def returns(*args, **kwargs):
    "A docstring."
    return args, kwargs

def nested(errors):
    return errors.record(raising(lambda: ValueError("inner")))

def of_child(kind, code, path):
    return lambda errors: raising(lambda: kind("train", {3: errors.ProcessFailure(0, 5, code, path)}))

torch_failed = torchs.ChildFailedError
cases = {
    "returns": lambda errors: returns,
    "raises": lambda errors: raising(lambda: ValueError("boom")),
    "raises without text": lambda errors: raising(StopIteration),
    "several lines": lambda errors: raising(lambda: ValueError("a\\nb \\u2603 \\udcff")),
    "base": lambda errors: raising(Interrupt),
    "interrupt": lambda errors: raising(KeyboardInterrupt),
    "nested": nested,
    "0": lambda errors: exits(0), "None": lambda errors: exits(), "3": lambda errors: exits(3),
    "text": lambda errors: exits("text"), "True": lambda errors: exits(True), "False": lambda errors: exits(False),
    "child": lambda errors: raising(
        lambda: torch_failed("train", {3: torchs.ProcessFailure(0, 5, 42, str(child))})),
    "child by signal": lambda errors: raising(
        lambda: torch_failed("train", {3: torchs.ProcessFailure(0, 5, -9, str(child))})),
    "child, plain": lambda errors: raising(
        lambda: torch_failed("train", {3: torchs.ProcessFailure(0, 5, 42, str(plain))})),
}
def outcome(errors, make, *args, **kwargs):
    file.unlink(missing_ok=True)
    try:
        how = ["returned", errors.record(make(errors))(*args, **kwargs)]
    except BaseException as error:
        how = [type(error).__name__, str(error), repr(error.__cause__), repr(error.__context__)]
    told = json.loads(file.read_text())["message"] if file.exists() else None
    if isinstance(told, dict):
        told["extraInfo"] = {name: told["extraInfo"][name] for name in ("py_callstack", "timestamp")}
        for hidden in (r'  File ".*errors/__init__.py".*\\n( .*\\n)*?(?=  File)', "(?m)^ *[~^]+\\n", r"line \\d+"):
            told["extraInfo"]["py_callstack"] = re.sub(hidden, "", told["extraInfo"]["py_callstack"])
    return how, told

time.time = lambda: 1_700_000_000.5  # the same for both
ours.ErrorHandler().initialize()
assert faulthandler.is_enabled()
for name in ("record", "get_error_handler"):
    assert list(inspect.signature(getattr(ours, name)).parameters) == list(
        inspect.signature(getattr(torchs, name)).parameters), name
for name in ("initialize", "record_exception", "override_error_code_in_rootcause_data", "dump_error_file"):
    assert list(inspect.signature(getattr(ours.ErrorHandler, name)).parameters) == list(
        inspect.signature(getattr(torchs.ErrorHandler, name)).parameters), name
ours.ProcessFailure = ProcessFailure
for name, make in cases.items():
    for args, kwargs in (((), {}),) if name != "returns" else (((1, 2), {"b": 3}),):
        mine, theirs = outcome(ours, make, *args, **kwargs), outcome(torchs, make, *args, **kwargs)
        print(json.dumps([name, mine, theirs]))

# torch's agent reads our file, and each handler works under the other's decorator.
outcome(ours, cases["raises"])
failure = torchs.ProcessFailure(0, 5, 1, str(file))
assert failure.message["message"] == "ValueError: boom", failure
assert failure.message["extraInfo"]["py_callstack"].endswith("ValueError: boom\\n")
for errors, handler in ((ours, torchs.ErrorHandler()), (torchs, ours.ErrorHandler())):
    file.unlink()
    try:
        errors.record(raising(lambda: ValueError("crossed")), handler)()
    except ValueError:
        assert torchs.ProcessFailure(0, 5, 1, str(file)).message["message"] == "ValueError: crossed"
"""


def test_record_does_what_torch_s_does(file: Path, tmp_path: Path) -> None:
    done = run(tmp_path, COMPARISON)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 16
    for name, mine, theirs in lines:
        assert mine == theirs, name


def test_torchrun_reports_what_our_record_wrote(tmp_path: Path) -> None:
    done = run(tmp_path, RECORD + RAISE, "-m", "torch.distributed.run", "--standalone", "--log-dir", "logs")
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert "ValueError: boom" in report
    assert len(list(tmp_path.glob("logs/**/error.json"))) == 1


STARTS = {
    "record": (RECORD + RAISE, ()),
    "bootstrap": (RAISE.removeprefix("@record\n"), AS_WORKER),
    "record below bootstrap": (RECORD + RAISE, AS_WORKER),
}


@pytest.mark.parametrize("start", STARTS)
def test_an_exception_is_written_once_and_shown_as_usual(file: Path, tmp_path: Path, start: str) -> None:
    before = time.time()
    source, with_bootstrap = STARTS[start]
    done = run(tmp_path, source, *with_bootstrap)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "ValueError: boom"
    told = message(file)
    extra = told["extraInfo"]
    assert told["message"] == "ValueError: boom"
    assert extra.keys() == {"py_callstack", "timestamp", "time", "session"}
    assert before <= extra["time"] <= time.time()
    assert extra["timestamp"] == str(int(extra["time"]))
    assert extra["session"] == os.getsid(0)
    stack = extra["py_callstack"]
    assert stack.startswith("Traceback (most recent call last):\n")
    assert stack.endswith("ValueError: boom\n")
    assert "elastic_launch" not in stack
    # Only the bootstrap sees the frame that calls main.
    assert ("in <module>" in stack) == (start == "bootstrap")


# Mounts a file system of one page where the error file belongs, for this process only. At the end it lists the content.
MOUNT = """
mount -t tmpfs -o size=4k,mode=700 none "$1" || exit 99
head -c "$3" /dev/zero > "$1/filler" && mount -o "remount,$2" "$1" || exit 99
directory=$1; shift 3
"$@"; status=$?
ls -A "$directory"
exit $status
"""


@pytest.mark.parametrize(("mount", "filler"), [("rw,size=4k", 4096), ("rw,size=4k", 0), ("ro,size=4k", 0)])
@pytest.mark.parametrize("start", STARTS)
def test_a_disk_that_is_full_or_read_only_hides_nothing(
    file: Path, tmp_path: Path, start: str, mount: str, filler: int
) -> None:
    source, with_bootstrap = STARTS[start]
    if mount.startswith("rw") and not filler:
        source = source.replace("'boom'", "'boom' * 2000")  # there is room for part of it
    alone = ("--mount",) if os.geteuid() == 0 else ("--user", "--map-root-user", "--mount")
    script = tmp_path / "script.py"
    script.write_text(source)
    command = ["unshare", *alone, "sh", "-c", MOUNT, "sh", file.parent, mount, str(filler)]
    done = subprocess.run(
        [*command, sys.executable, *with_bootstrap, script],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == "filler\n"
    assert done.stderr.splitlines()[-1].startswith("ValueError: boom")
    assert "OSError" not in done.stderr
    assert "During handling" not in done.stderr


@pytest.mark.parametrize("path", ["missing/error.json", "errors", "script.py/error.json", "x" * 300, ""])
def test_an_impossible_error_file_hides_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path and str(tmp_path / path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^boom$") as caught:
        record(fail)()
    assert caught.value.__context__ is None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("start", STARTS)
def test_of_a_huge_exception_both_ends_are_written(file: Path, tmp_path: Path, start: str) -> None:
    source, with_bootstrap = STARTS[start]
    done = run(tmp_path, source.replace("'boom'", "'boom ' + 'x' * 3_000_000 + ' bang'"), *with_bootstrap)
    assert done.returncode == 1
    assert file.stat().st_size < 2_100_000
    told = message(file)
    for text, begin, end in (
        (told["message"], "ValueError: boom x", "x bang"),
        (told["extraInfo"]["py_callstack"], "Traceback (most recent call last):\n", "x bang\n"),
    ):
        assert text.startswith(begin)
        assert text.endswith(end)
        assert len(text) < 1_000_100
        assert "characters left out" in text
    assert read_error_file(str(file), os.getsid(0))


def test_the_latest_exception_is_the_one_that_counts(file: Path) -> None:
    flaky = record(fail)
    for text in ("first", "second"):
        with pytest.raises(ValueError, match=text):
            flaky(text)
    assert message(file)["message"] == "ValueError: second"


def test_the_innermost_record_writes(file: Path) -> None:
    outer = record(lambda: record(fail)())
    with pytest.raises(ValueError, match="boom") as caught:
        outer()
    stack = message(file)["extraInfo"]["py_callstack"]
    assert "in fail" in stack
    assert "lambda" not in stack
    write_error(caught.value, str(file))  # as the process of a function does
    assert message(file)["extraInfo"]["py_callstack"] == stack


def test_the_signature_is_kept() -> None:
    def train(rate: float, *, steps: int = 3) -> float:
        """Train."""
        return rate * steps

    decorated = record(train)
    assert (decorated.__name__, decorated.__doc__, decorated(2.0, steps=4)) == ("train", "Train.", 8.0)
    assert getattr(decorated, "__wrapped__") is train  # noqa: B009


class BrokenError(ValueError):
    """An exception without a usable text, and with attributes that cannot be set."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError("frozen")


def test_odd_exceptions_are_written(file: Path) -> None:
    def raise_(error: BaseException) -> None:
        raise error

    loop, other = ValueError("loop"), KeyError("other")
    loop.__cause__, other.__cause__ = other, loop
    for error, line in (
        (BrokenError(1), "BrokenError: <exception str() failed>"),
        (loop, "ValueError: loop"),
        (ValueError("\udcff\0\u2603"), "ValueError: \udcff\0\u2603"),
        (ExceptionGroup("two", [ValueError(1), KeyError(2)]), "ExceptionGroup: two (2 sub-exceptions)"),
    ):
        with pytest.raises(type(error)) as caught:
            record(raise_)(error)
        assert caught.value is error
        assert message(file)["message"] == line
    write_error(SystemExit("no data"), str(file))
    assert message(file)["message"] == message(file)["extraInfo"]["py_callstack"] == "SystemExit: no data"


def test_a_forked_child_s_end_is_not_its_parent_s(file: Path) -> None:
    def forks() -> None:
        if (pid := os.fork()) == 0:
            raise ValueError("child")
        os.waitpid(pid, 0)

    parent = os.getpid()
    try:
        record(forks)()
    finally:
        if os.getpid() != parent:
            os._exit(0)
    assert not file.exists()


class Noisy(ErrorHandler):
    """A user's handler that fails."""

    def record_exception(self, e: BaseException) -> None:
        raise KeyError("handler")


def test_a_handler_that_fails_hides_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="boom") as caught:
        record(fail, Noisy())()
    assert caught.value.__context__ is None
    assert "Noisy" in (said := capsys.readouterr().err)
    assert "KeyError('handler')" in said


def test_record_costs_a_worker_next_to_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from elastic_launch.workers.error_handler import record; record(print)('ran');"
        "print({'json', 'traceback', 'dataclasses', 'inspect', 'logging', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "ran\nset()\n"


def test_a_worker_without_stderr_runs(tmp_path: Path) -> None:
    code = RECORD + "import sys\nrecord(print)('ran')\nrecord(sys.exit)(0)\nrecord(sys.exit)(3)\n"
    command = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "ran\n")


def failed(path: str, **known: Any) -> ChildFailedError:
    """The error of a launcher: rank 3 was killed, and rank 0 failed later."""
    cause = ProcessFailure(1, 5, -9, path, failed_at=1000.0, **known)
    return ChildFailedError("train.py", {0: ProcessFailure(0, 4, 1, failed_at=2000.0), 3: cause})


CHILD = {
    "message": {
        "message": "ValueError: inner",
        "extraInfo": {"py_callstack": "inner stack\n", "timestamp": "999", "time": 999.5, "session": 12345},
    }
}


@pytest.fixture
def child(tmp_path: Path) -> str:
    """The error file of a worker of another launcher."""
    path = tmp_path / "child.json"
    path.write_text(json.dumps(CHILD))
    return str(path)


NESTED = """
from elastic_launch.errors import ChildFailedError, ProcessFailure
@record
def main():
    raise ChildFailedError("train.py", {3: ProcessFailure(1, 5, -9, "child.json", "ValueError: inner")}, "the report")
main()
"""


@pytest.mark.parametrize("start", STARTS)
def test_the_error_of_a_launcher_passes_on_its_cause(file: Path, tmp_path: Path, child: str, start: str) -> None:
    source = NESTED if start == "bootstrap" else RECORD + NESTED
    done = run(tmp_path, source.replace("@record", "" if start == "bootstrap" else "@record"), *STARTS[start][1])
    assert done.returncode == 1
    assert done.stderr.endswith("ChildFailedError: the report\n")
    told = message(file)
    extra = {**CHILD["message"]["extraInfo"], "session": os.getsid(0)}  # type: ignore[dict-item]
    assert told == {"message": "ValueError: inner", "extraInfo": extra, "errorCode": -9}
    read = read_error_file(str(file), os.getsid(0))
    assert read
    assert (read.error, read.traceback) == ("ValueError: inner", "inner stack\n")


def test_a_cause_without_a_readable_file_is_still_reported(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"message": ')
    for path in ("<N/A>", str(other), str(tmp_path)):
        error = failed(path, error="ValueError: afar", traceback="the stack")
        with pytest.raises(ChildFailedError) as caught:
            record(raising(error))()
        assert caught.value is error
        told = message(file)
        assert (told["message"], told["extraInfo"]["py_callstack"]) == ("ValueError: afar", "the stack")
        assert (told["errorCode"], told["extraInfo"]["timestamp"]) == (-9, "1000")
        with pytest.raises(ChildFailedError):
            record(raising(failed(path)))()  # only how it ended is known, which torch's does not write either
        assert message(file) == told


def raising(error: Exception) -> Callable[[], None]:
    def raise_() -> None:
        raise error

    return raise_


def test_a_function_s_process_passes_the_cause_on(file: Path, child: str) -> None:
    error = failed(child)
    write_error(error, str(file))
    assert (message(file)["message"], message(file)["errorCode"]) == ("ValueError: inner", -9)
    write_error(error, str(file))
    assert message(file)["message"] == "ValueError: inner"


def test_error_files_are_copied_by_hand(file: Path, tmp_path: Path, child: str) -> None:
    handler = get_error_handler()
    handler.dump_error_file(child)
    assert "errorCode" not in message(file)
    handler.dump_error_file(child, 7)
    assert message(file)["errorCode"] == 7
    with pytest.raises(FileNotFoundError):
        handler.dump_error_file(str(tmp_path / "missing.json"), 7)
    for content in ("not JSON", "[]", "{}"):
        (tmp_path / "child.json").write_text(content)
        with pytest.raises(ValueError, match=r"not an error file|Expecting"):
            handler.dump_error_file(child, 7)
    assert message(file)["errorCode"] == 7
    data: dict[str, Any] = {}
    handler.override_error_code_in_rootcause_data(child, data, 7)
    assert data == {}


def test_a_failure_of_another_host_says_what_its_file_does() -> None:
    known = ProcessFailure(0, 5, 1, "x.json", "ValueError: boom", "the stack", failed_at=1_000_000_000.25)
    assert known.error_file_data == {
        "message": {
            "message": "ValueError: boom",
            "extraInfo": {"py_callstack": "the stack", "timestamp": "1000000000"},
        }
    }
    assert re.fullmatch(r"2001-09-0[89]_\d\d:\d\d:40", known.timestamp_isoformat())


def test_the_first_failure_is_the_earliest_unless_a_launcher_says_so() -> None:
    late, early, unknown = (ProcessFailure(rank, 5, 1, failed_at=at) for rank, at in enumerate((9.0, 3.0, 0.0)))
    failures = {2: unknown, 0: late, 1: early}
    assert ChildFailedError("x", failures).get_first_failure() == (1, early)
    assert ChildFailedError("x", failures, "a report").get_first_failure() == (2, unknown)
    assert ChildFailedError("x", {2: unknown}).get_first_failure() == (2, unknown)
    with pytest.raises(ValueError, match="at least one"):
        ChildFailedError("x", {})


def test_a_launcher_s_error_crosses_processes() -> None:
    for report in ("", "=====\nx FAILED\n-----\n  --x=-=\n====="):
        error = ChildFailedError("x", {1: ProcessFailure(0, 5, 3, failed_at=5.0), 0: ProcessFailure(1, 6, 1)}, report)
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.name, copy.failures, copy.exit_code) == (str(error), "x", error.failures, 3)
        assert copy.get_first_failure() == error.get_first_failure()
    assert error.format_msg() == report
    assert error.format_msg("#", "+") == "#####\nx FAILED\n+++++\n  --x=-=\n#####"


def test_a_job_within_a_job_reports_its_cause(job: Job) -> None:
    job.script("raise ValueError('the inner cause')", "inner.py")
    script = job.script("from elastic_launch.run import main\nmain(['--nproc-per-node', '1', 'inner.py'])")
    done = job.run("--nproc-per-node", "1", script)
    assert done.returncode == 1
    _, _, report = done.stderr.partition("train.py FAILED")
    assert "error   : ValueError: the inner cause" in report
