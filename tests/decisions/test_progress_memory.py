"""The memory in which workers tell their progress: its format, and the agent's side of it."""

from __future__ import annotations

import errno
import os
import random
import select
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from elastic_launch import worker
from elastic_launch.agent.progress_memory import ProgressMemory, progress_memory
from elastic_launch.core.progress import memory as layout
from elastic_launch.core.progress.memory import MAGIC, PAGE, WorkerProgress, decode, header
from elastic_launch.errors import UnavailableError
from elastic_launch.workers import bootstrap, keeper_main, step_hook
from tests.support.waiting import SOON


@pytest.fixture
def memory() -> Iterator[ProgressMemory]:
    with closing(ProgressMemory()) as memory:
        memory.prepare(range(2))
        yield memory


def page(*words: int, phase: bytes = b"") -> bytes:
    """A page as a worker writes it, with these words from word 8 on."""
    head = header(stacks=True).ljust(64, b"\0") + struct.pack(f"={len(words)}Q", *words)
    return (head.ljust(160, b"\0") + phase.ljust(32, b"\0")).ljust(PAGE, b"\0")


def as_worker(memory: ProgressMemory, local_rank: int) -> int:
    """The descriptor of a worker's memory."""
    return int(memory.environ(local_rank)["ELASTIC_LAUNCH_PROGRESS_FD"].split(",")[0])


# ---- The format


def test_a_page_is_read_with_its_times_in_seconds() -> None:
    assert decode(page(7, 3, 10**9, 2 * 10**9, 500, 400, 101, 100, 15 * 10**8, 9, phase=b"eval")) == WorkerProgress(
        steps=7,
        marks=3,
        first=1.0,
        last=2.0,
        longest=5e-7,
        second=4e-7,
        number=100,
        first_number=99,
        phase="eval",
        phase_since=1.5,
        calls=9,
    )


def test_a_fresh_page_tells_nothing() -> None:
    assert decode(page()) == WorkerProgress()


def test_marks_count_rather_than_steps() -> None:
    assert WorkerProgress(steps=5).iterations == 5
    assert WorkerProgress(steps=5, marks=2).iterations == 2


def test_step_0_is_a_number() -> None:
    assert (decode(page(*[0] * 6, 1, 1)).number, decode(page(*[0] * 6, 1, 1)).first_number) == (0, 0)


def test_a_phase_that_has_ended_has_no_name() -> None:
    assert decode(page(phase=b"eval")).phase == ""


@pytest.mark.parametrize(
    "content", [b"", MAGIC, MAGIC.ljust(100, b"\1"), b"ELPROG2\0".ljust(PAGE, b"\1"), b"\0" * PAGE]
)
def test_anything_else_tells_nothing(content: bytes) -> None:
    assert decode(content) == WorkerProgress()


def test_garbage_is_clamped_and_never_raises() -> None:
    draw = random.Random(13)
    for _ in range(500):
        read = decode(MAGIC + draw.randbytes(PAGE - 8))
        assert all(0 <= value < 2**63 for value in (read.steps, read.marks, read.calls, read.number or 0))
        assert all(0.0 <= value < 1e10 for value in (read.first, read.last, read.longest, read.second))
        read.phase.encode()


def test_a_phase_with_the_longest_name_ends_where_it_should() -> None:
    assert decode(page(*[0] * 8, 1, phase=b"x" * 32) + b"y").phase == "x" * 32
    assert decode(page(*[0] * 8, 1, phase=b"\xffx")).phase == "\N{REPLACEMENT CHARACTER}x"


def test_who_must_do_without_the_package_knows_the_same_format() -> None:
    for name in (
        "MAGIC",
        "PAGE",
        "HOLD",
        "STOP_AT",
        "LEASE",
        "STEPS",
        "MARKS",
        "FIRST",
        "LAST",
        "LONGEST",
        "SECOND",
        "NUMBER",
    ):
        assert getattr(step_hook, name) == getattr(layout, name)
    for name in ("FIRST_NUMBER", "PHASE_SINCE", "CALLS", "PHASE", "PHASE_SIZE"):
        assert getattr(step_hook, name) == getattr(layout, name)
    assert (bootstrap.MAGIC, bootstrap.STACKS) == (MAGIC, layout.STACKS)
    assert keeper_main.PROGRESS.decode() == bootstrap.PROGRESS == step_hook.VARIABLE


# ---- What a worker writes


def test_the_two_longest_gaps_between_marks_are_kept_and_phases_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    words = memoryview(bytearray(header(stacks=True).ljust(PAGE, b"\0"))).cast("Q")
    monkeypatch.setattr(step_hook, "words", words)
    now = 1000

    def at(seconds: int) -> None:
        nonlocal now
        now = seconds * 10**9

    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    for seconds in (10, 13, 20, 21, 26):
        at(seconds)
        worker.progress()
    told = decode(words.tobytes())
    assert (told.first, told.last, told.longest, told.second) == (10, 26, 7, 5)
    at(100)
    with worker.phase("eval"):
        for seconds in (120, 150):
            at(seconds)
            worker.progress()
        with worker.phase("inner"):
            at(200)
        assert decode(words.tobytes()).phase_since == 100
        at(300)
    at(306)
    worker.progress(phase="loading")
    assert decode(words.tobytes()).phase_since == 306
    at(400)
    worker.progress(phase="")
    told = decode(words.tobytes())
    assert (told.last, told.longest, told.second, told.marks) == (400, 7, 6, 9)


# ---- The agent's side


def test_each_worker_has_a_page_of_its_own(memory: ProgressMemory) -> None:
    os.pwrite(as_worker(memory, 1), struct.pack("=Q", 5), 64)
    assert [memory.read(rank).steps for rank in range(2)] == [0, 5]


def test_a_new_round_begins_with_new_files(memory: ProgressMemory) -> None:
    old = os.dup(as_worker(memory, 0))
    memory.prepare([0])
    os.pwrite(old, struct.pack("=Q", 5), 64)
    assert memory.read(0).steps == 0
    os.close(old)


def test_the_variable_names_the_descriptors_that_are_sent(memory: ProgressMemory) -> None:
    sent = memory.descriptors(1)
    assert memory.environ(1) == {"ELASTIC_LAUNCH_PROGRESS_FD": ",".join(str(fd) for fd, _ in sent)}
    assert [number for _, number in sent] == [-fd for fd, _ in sent]
    assert all(fd >= 200 and not os.get_inheritable(fd) for fd, _ in sent)


def test_all_workers_learn_when_to_stop(memory: ProgressMemory) -> None:
    memory.set_stop(1, 0)
    memory.set_stop(0, 42)
    for rank in range(2):
        assert struct.unpack("=8s3Q", os.pread(as_worker(memory, rank), 32, 0)) == (MAGIC, 0, 42, 1)


def test_without_a_file_for_one_worker_there_is_none_for_any(
    memory: ProgressMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers are started without. Those that seemed to have a file would have seemed to make no step."""
    truncate, may_fail = os.truncate, iter([False])

    def grow(fd: int, size: int) -> None:
        if next(may_fail, True):
            raise OSError(errno.EFBIG, "file too large")
        truncate(fd, size)

    monkeypatch.setattr(os, "truncate", grow)
    with pytest.raises(UnavailableError):
        memory.prepare(range(2))
    assert memory.ranks() == []


def lease(memory: ProgressMemory, local_rank: int) -> int:
    return int.from_bytes(os.pread(as_worker(memory, local_rank), 8, 8 * layout.LEASE), sys.byteorder)


def test_all_workers_learn_until_when_they_may_make_steps(memory: ProgressMemory) -> None:
    assert lease(memory, 1) == 0
    earliest = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    memory.set_lease(time.monotonic() + 100)
    latest = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert lease(memory, 1) - 100 * 10**9 <= latest + 1000  # the sum was rounded
    # It is over earlier by as long as this process stood still between its looks at the two clocks.
    assert lease(memory, 1) - 100 * 10**9 >= earliest - SOON * 10**9
    until = lease(memory, 1)
    memory.prepare([0])
    assert lease(memory, 0) == until, "a new round begins with it"
    memory.set_lease(-1e9)
    assert lease(memory, 0) == 1, "it is over, which is not 0"
    for forever in (float("inf"), 1e300, 2e10):  # the last is the least that does not fit
        memory.set_lease(100.0)
        assert lease(memory, 0) > 0
        memory.set_lease(forever)
        assert lease(memory, 0) == 0


def test_a_lease_counts_through_a_suspension(memory: ProgressMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 50 * 10**9)
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: {time.CLOCK_BOOTTIME: 80 * 10**9}[clock])
    memory.set_lease(60.0)
    assert lease(memory, 0) == 90 * 10**9


def test_stacks_follow_the_page(memory: ProgressMemory) -> None:
    worker = os.dup(as_worker(memory, 0))  # shares its position, as a worker's does
    for text in (b"first and long", b"second"):
        memory.rewind(0)
        os.write(worker, text)
        assert memory.stacks(0) == text
    assert memory.read(0) == WorkerProgress()
    assert memory.stacks(1) == b""
    os.close(worker)


def test_whether_a_process_has_the_file_open(memory: ProgressMemory) -> None:
    assert memory.is_open_in(os.getpid(), 0)
    assert not memory.is_open_in(os.getppid(), 0)
    assert not memory.is_open_in(2**22 + 1, 0)


def test_a_report_wakes_the_agent_until_it_is_cleared(memory: ProgressMemory) -> None:
    def is_ready() -> bool:
        return bool(select.select([memory], [], [], 0)[0])

    memory.clear()
    assert not is_ready()
    for _ in range(2):
        os.write(memory.fileno(), struct.pack("=Q", 1))
    assert is_ready()
    memory.clear()
    assert not is_ready()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 1),
        ({"ELASTIC_LAUNCH_PROGRESS": "1"}, 1),
        ({"ELASTIC_LAUNCH_PROGRESS": "0"}, None),
        ({"TORCHELASTIC_RUN_ID": "outer"}, 0),
    ],
)
def test_what_the_environment_decides(environ: dict[str, str], expected: int | None) -> None:
    """Whether there is a memory, and whether stacks are written to it: not below a launcher."""
    memory = progress_memory(environ)
    if memory is None:
        assert expected is None
        return
    with closing(memory):
        memory.prepare([0])
        assert os.pread(as_worker(memory, 0), 32, 0)[24] == expected
