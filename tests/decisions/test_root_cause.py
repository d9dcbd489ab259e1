"""Which workers failed, and which failure was the cause."""

from __future__ import annotations

import signal
from signal import SIGKILL, SIGSEGV, SIGTERM

import pytest

from elastic_launch.core.agent.messages import Finish
from elastic_launch.core.agent.report import format_report
from elastic_launch.core.agent.root_cause import ErrorRecord, Evidence, Exit, is_consequence, is_port_clash, judge
from elastic_launch.errors import ChildFailedError, ProcessFailure
from elastic_launch.job import Assignment

# The second of two nodes: global ranks 4 to 7.
ASSIGNMENT = Assignment(1, 2, 4, 8, 4, 4, 8, "10.0.0.1", 29500, "host-b", port_picked=True)
PIDS = {0: 200, 1: 201, 2: 202, 3: 203}
STOPPED_AT = 100.0
STOPPED = (SIGTERM,)


def error(text: str, time: float) -> Evidence:
    return Evidence(ErrorRecord(text, f"Traceback (most recent call last):\n  ...\n{text}", time, "error.json"))


def ranks(exits: list[Exit], errors: dict[int, Evidence] | None = None) -> list[int]:
    return [failure.rank for failure in judge(exits, errors or {}, PIDS, ASSIGNMENT, STOPPED_AT)]


@pytest.mark.parametrize(
    ("exit_", "errors", "failed"),
    [
        (Exit(0, 0, 99.0), {}, False),
        (Exit(0, 1, 99.0), {}, True),
        (Exit(0, -SIGSEGV, 99.0), {}, True),
        (Exit(0, -SIGTERM, 99.0), {}, True),  # a SIGTERM that the agent did not send
        (Exit(0, -SIGTERM, 101.0, STOPPED), {}, False),
        (Exit(0, -SIGKILL, 101.0, (*STOPPED, SIGKILL)), {}, False),
        (
            Exit(0, -SIGKILL, 101.0, STOPPED),
            {},
            True,
        ),  # a SIGKILL that the agent did not send, such as the OOM killer's
        (Exit(0, 0, 101.0, STOPPED), {}, False),
        (Exit(0, 1, 101.0, STOPPED), {}, False),
        (Exit(0, 1, 101.0, STOPPED), {0: error("KeyboardInterrupt", 100.5)}, False),  # raised because of the signal
        (Exit(0, 1, 101.0, STOPPED), {0: error("ValueError: boom", 99.5)}, True),  # failed already before the signal
        (Exit(0, -SIGTERM, 101.0, STOPPED), {0: error("ValueError: boom", 99.5)}, True),
    ],
)
def test_a_stopped_worker_did_not_fail(exit_: Exit, errors: dict[int, Evidence], failed: bool) -> None:
    assert bool(ranks([exit_], errors)) is failed


def test_the_earliest_failure_is_the_cause() -> None:
    assert ranks([Exit(2, 1, 99.3), Exit(0, 1, 99.1), Exit(1, 1, 99.2)]) == [4, 5, 6]


def test_an_exception_counts_from_the_moment_it_was_raised() -> None:
    exits = [Exit(0, 1, 99.0), Exit(1, 1, 99.9)]
    assert ranks(exits, {0: error("RuntimeError: late", 98.9), 1: error("ValueError: early", 98.0)}) == [5, 4]


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4871",
        "torch.distributed.DistBackendError: NCCL error: remote error, remote process exited",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "BrokenPipeError: [Errno 32] Broken pipe",
    ],
)
def test_plain_consequences_come_after_causes(text: str) -> None:
    exits = [Exit(0, 1, 98.0), Exit(1, -SIGKILL, 98.5)]
    assert ranks(exits, {0: error(text, 97.9)}) == [5, 4]


def test_a_failure_has_everything_that_is_known() -> None:
    [failure] = judge([Exit(3, 1, 99.0)], {3: error("ValueError: boom", 98.5)}, PIDS, ASSIGNMENT, STOPPED_AT)
    assert failure == ProcessFailure(
        local_rank=3,
        pid=203,
        exitcode=1,
        error_file="error.json",
        error="ValueError: boom",
        traceback="Traceback (most recent call last):\n  ...\nValueError: boom",
        failed_at=98.5,
        rank=7,
        host="host-b",
    )
    [failure] = judge([Exit(3, -SIGKILL, 99.0)], {}, PIDS, ASSIGNMENT, STOPPED_AT)
    assert failure.message == "Signal 9 (SIGKILL) received by PID 203"
    assert failure.signal_name() == "SIGKILL"


def test_the_last_lines_of_stderr_replace_a_missing_exception() -> None:
    known = Evidence(stderr="Segmentation fault", note="out of memory, perhaps")
    [failure] = judge([Exit(3, -SIGSEGV, 99.0)], {3: known}, PIDS, ASSIGNMENT, STOPPED_AT)
    assert (failure.stderr, failure.note) == ("Segmentation fault", "out of memory, perhaps")
    report = format_report("x", Finish((failure,)), 0, None)
    assert "  note    : out of memory, perhaps\n" in report
    assert "  stderr  : its last lines\n    Segmentation fault\n" in report
    raised = error("ValueError: boom", 98.0)._replace(stderr="Traceback, once more")
    [failure] = judge([Exit(3, 1, 99.0)], {3: raised}, PIDS, ASSIGNMENT, STOPPED_AT)
    assert failure.stderr == "", "the exception says more"


@pytest.mark.parametrize(
    ("text", "clash"),
    [
        ("DistNetworkError: failed to listen. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE", True),
        ("OSError: [Errno 98] Address already in use: 29500", True),
        ("OSError: [Errno 98] Address already in use: 8080", False),
        ("OSError: [Errno 98] Address already in use: 129500", False),
        ("ValueError: 29500", False),
    ],
)
def test_a_port_clash_is_recognized(text: str, clash: bool) -> None:
    assert is_port_clash(ProcessFailure(0, 1, 1, error=text), 29500) is clash


def test_the_exit_status_is_that_of_the_cause() -> None:
    assert ChildFailedError("x", {1: ProcessFailure(1, 9, 42), 0: ProcessFailure(0, 8, 1)}).exit_code == 42
    assert ChildFailedError("x", {1: ProcessFailure(1, 9, -9)}).exit_code == 137


def test_the_report_has_the_cause_first() -> None:
    failures = judge(
        [Exit(0, 1, 99.0), Exit(1, -SIGKILL, 98.0)],
        {0: error("RuntimeError: Connection closed by peer", 98.9)},
        PIDS,
        ASSIGNMENT,
        STOPPED_AT,
    )
    report = format_report("train.py", Finish(failures, restarts=1), 3, "/logs/job")
    lines = report.splitlines()
    assert lines[1] == "train.py FAILED"
    cause, then = report.index("Cause"), report.index("Then")
    assert cause < report.index("rank    : 5 (local rank 1, pid 201) on host-b") < then
    assert cause < report.index("exit    : killed by SIGKILL") < then
    assert then < report.index(" rank 4 on host-b (pid 200): exit code 1, RuntimeError: Connection closed by peer")
    assert "restarts  : 1 of 3 used" in lines
    assert "logs      : /logs/job" in lines


def test_the_report_shows_the_traceback_and_shortens_a_long_one() -> None:
    def report(message: str) -> str:
        failure = ProcessFailure(0, 1, 1, error="ValueError: boom", traceback=message, rank=0, host="h")
        return format_report("x", Finish((failure,)), 0, None)

    assert '    File "x.py", line 1\n    ValueError: boom\n' in report('File "x.py", line 1\nValueError: boom\n')
    long = report("\n".join(f"line {i}" for i in range(100_000)))
    assert "line 0\n" in long
    assert "line 99999\n" in long
    assert "99800 lines left out" in long
    assert "logs" not in long
    wide = report("x" * 5000)
    assert "x ... 3000 characters left out ... x" in wide
    assert max(map(len, wide.splitlines())) < 2100


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4242",
        "RuntimeError: Application timeout caused pair closure",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
        "DistBackendError: NCCL error: remote process exited , ncclRemoteError: A call failed",
        "DistBackendError: NCCL communicator was aborted on rank 1",
        "BrokenPipeError: [Errno 32] Broken pipe",
    ],
)
def test_the_loss_of_a_peer_is_a_consequence(text: str) -> None:
    assert is_consequence(ProcessFailure(0, 1, 1, error=text))
    assert is_consequence(ProcessFailure(0, 1, -signal.SIGABRT, stderr=f"terminate called\n  what(): {text}"))
    assert not is_consequence(ProcessFailure(0, 1, -signal.SIGSEGV, stderr=text)), (
        "it may have written that long before"
    )


@pytest.mark.parametrize(
    "text", ["", "ValueError: boom", "torch.OutOfMemoryError: CUDA out of memory", "KeyError: 'nccl'"]
)
def test_other_errors_are_causes(text: str) -> None:
    assert not is_consequence(ProcessFailure(0, 1, 1, error=text))
