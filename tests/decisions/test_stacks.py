"""The stacks of all ranks: read, grouped, merged, judged and shown. Most were recorded from real gloo jobs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping

import pytest

from elastic_launch.core.progress.stack_groups import (
    MAX_BYTES,
    Merged,
    Merger,
    NodeStacks,
    merge,
    summarize,
)
from elastic_launch.core.progress.stack_report import MAX_LINES, render
from elastic_launch.core.progress.stacks import (
    GARBAGE_COLLECTION,
    Frame,
    KernelView,
    Observation,
    Thread,
    is_users,
    parse,
    parse_py_spy,
    place_of,
    short_path,
)
from elastic_launch.core.progress.verdict import Verdict, judge
from elastic_launch.core.progress.waits import collective_of, is_idle, wait_of
from elastic_launch.core.rendezvous.records import decode, encode
from elastic_launch.core.text import ranks_text
from elastic_launch.errors import RendezvousStateError
from tests.support.recorded_stacks import recorded

Steps = Mapping[int, tuple[int, float]]
SITE = "/opt/venv/lib/python3.11/site-packages"
LIB = "/usr/local/lib/python3.11"
ALL_REDUCE = (
    Frame(f"{SITE}/torch/distributed/distributed_c10d.py", 3252, "all_reduce"),
    Frame(f"{SITE}/torch/distributed/c10d_logger.py", 83, "wrapper"),
    Frame("/home/ada/job.py", 11, "reduce_gradients"),
    Frame("/home/ada/job.py", 123, "main"),
)
ELSEWHERE = (Frame("/home/ada/job.py", 55, "load"), Frame("/home/ada/job.py", 120, "main"))


def main_thread(*frames: Frame) -> tuple[Thread, ...]:
    return (Thread(True, "", frames),)


def stalled(ranks: Iterable[int], since: float = 60.0, steps: int = 412) -> Steps:
    return dict.fromkeys(ranks, (steps, since))


def node(
    first: list[Observation], second: list[Observation], steps: Steps | None = None, host: str = "host-a"
) -> NodeStacks:
    """A node's part, after its way through the store."""
    part = summarize(host, first, second, stalled(range(8)) if steps is None else steps)
    return decode(NodeStacks, encode(part), "stacks")


def still(rank: int, frames: tuple[Frame, ...], kernel: KernelView | None = None) -> list[list[Observation]]:
    """A worker in the same place at both looks, two seconds apart."""
    kernel = kernel or KernelView("S", "futex_do_wait", "futex")
    threads = main_thread(*frames) if frames else ()
    return [[Observation(rank, 1000 + rank, "", threads, kernel, at)] for at in (100.0, 102.0)]


def job(*workers: list[list[Observation]], steps: Steps | None = None) -> Merged:
    first, second = ([seen for worker in workers for seen in worker[look]] for look in (0, 1))
    return merge([node(first, second, stalled(range(len(workers))) if steps is None else steps)])


# ---- reading


DUMP = """\
Thread 0x00007fbda361c6c0 (most recent call first):
  File "/home/ada/loader.py", line 3 in read_ahead
  File "/usr/local/lib/python3.12/threading.py", line 1010 in run

Current thread 0x00007fbda4996b80 (most recent call first):
  File "/home/ada/train.py", line 13 in step
  File "/home/ada/train.py", line 20 in <module>
"""


def test_main_thread_is_the_last_one() -> None:
    loader, main = parse(DUMP)
    assert not loader.is_main
    assert loader.frames[0] == Frame("/home/ada/loader.py", 3, "read_ahead")
    assert main.is_main
    assert main.frames == (Frame("/home/ada/train.py", 13, "step"), Frame("/home/ada/train.py", 20, "<module>"))


def test_current_thread_is_not_the_main_thread_if_that_blocks_the_signal() -> None:
    dump = DUMP.replace("Current thread", "Thread").replace("Thread", "Current thread", 1)
    assert [thread.is_main for thread in parse(dump)] == [False, True]


def test_main_thread_is_missing_after_a_hundred_others() -> None:
    """As Python 3.11 wrote for 111 threads."""
    dump = "".join(
        f'Thread 0x{number:016x} (most recent call first):\n  File "a.py", line 1 in run\n\n' for number in range(100)
    )
    threads = parse(dump + "...\n")
    assert len(threads) == 100
    assert not any(thread.is_main for thread in threads)


def test_names_of_threads_are_read_where_python_writes_them() -> None:
    dump = DUMP.replace("6c0 (most", "6c0 [read ahead (1)] (most").replace("b80 (most", "b80 [python] (most")
    assert [thread.name for thread in parse(dump)] == ["read ahead (1)", "python"]


def test_lines_of_other_kinds_are_skipped() -> None:
    dump = (
        "Fatal Python error: Aborted\n\n"
        '  File "before/any.py", line 1 in thread\n'
        + DUMP.replace(
            '  File "/home/ada/train.py", line 20', '  <invalid frame>\n  File "/home/ada/train.py", line 20'
        )
        + "  ...\n\nCurrent thread's C stack trace (most recent call first):\n"
        '  Binary file "/lib/libc.so.6", at +0x3c [0x7f]\n'
        "  <truncated rest of calls>\n\nExtension modules: numpy.core._multiarray_umath, torch._C (total: 2)\n"
    )
    assert parse(dump) == parse(DUMP)


def test_a_line_that_is_being_written_is_skipped() -> None:
    """Of each beginning of a dump, every frame is one of the whole dump's."""
    whole = {frame for thread in parse(DUMP) for frame in thread.frames}
    for end in range(len(DUMP)):
        assert {frame for thread in parse(DUMP[:end]) for frame in thread.frames} <= whole


def test_a_thread_without_python_has_no_frames() -> None:
    dump = "Current thread 0x00007fbda4996b80 (most recent call first):\n  <no Python frame>\n"
    assert parse(dump) == (Thread(True, "", ()),)


def test_garbage_collection_is_a_frame() -> None:
    dump = 'Current thread 0x7f (most recent call first):\n  Garbage-collecting\n  File "t.py", line 25 in <module>\n'
    assert parse(dump) == main_thread(GARBAGE_COLLECTION, Frame("t.py", 25, "<module>"))
    assert place_of(parse(dump)[0].frames) == Frame("t.py", 25, "<module>")


def test_of_two_dumps_the_last_counts() -> None:
    later = DUMP.replace("line 13", "line 14")
    assert parse(DUMP + later) == parse(later)


def test_garbage_is_no_stack() -> None:
    generator = random.Random(7)
    for _ in range(300):
        parse("".join(generator.choice(DUMP + "\x00é") for _ in range(generator.randrange(200))))
    assert parse("") == ()
    for line in ("9" * 5000, "²"):  # more digits than int() takes, and a digit that it does not know
        assert parse(DUMP.replace("line 13", f"line {line}"))
        assert parse_py_spy(PY_SPY.replace(":99)", f":{line})"))


PY_SPY = """\
Process 13559: /opt/venv/bin/python job.py recv file:///tmp/store
Python v3.11.7 (/usr/local/bin/python3.11)

Thread 13559 (idle): "MainThread"
    0x7f5d85ea3f16 (/usr/lib/x86_64-linux-gnu/libc.so.6)
    pthread_cond_timedwait (/usr/lib/x86_64-linux-gnu/libc.so.6)
    gloo::transport::tcp::UnboundBuffer::waitRecv (/opt/venv/lib/python3.11/site-packages/torch/lib/libtorch_cpu.so)
    cpp_function::initialize<bool, c10d::Work, (long)1000>::{lambda(void*)#3}::_FUN (/opt/libtorch_python.so)
    recv (/opt/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py:2799)
    _exception_logger.<locals>.wrapper (/opt/venv/lib/python3.11/site-packages/torch/distributed/c10d_logger.py:83)
    Trainer.step (/home/ada/job.py:99)
    <module> (/home/ada/job.py:127)
    0x7f5d85e4524a (/usr/lib/x86_64-linux-gnu/libc.so.6)
Thread 13570 (active+gil): "Thread-1 (read ahead)"
    read_ahead (/home/ada/loader.py:3)
"""


def test_py_spy_gives_the_same_threads_with_native_frames() -> None:
    main, other = parse_py_spy(PY_SPY)
    assert (main.is_main, other.is_main) == (True, False)
    assert other == Thread(False, "Thread-1 (read ahead)", (Frame("/home/ada/loader.py", 3, "read_ahead"),))
    assert [frame.function for frame in main.frames] == [
        "pthread_cond_timedwait",
        "gloo::transport::tcp::UnboundBuffer::waitRecv",
        "cpp_function::initialize",
        "recv",
        "wrapper",
        "step",
        "<module>",
    ]
    assert place_of(main.frames) == Frame("/home/ada/job.py", 99, "step")
    assert collective_of(main.frames) == "recv"


# ---- whose code, and what it waits for


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/home/ada/train.py", True),
        ("train.py", True),
        ("/opt/lib/train.py", True),
        ("/home/ada/torch/train.py", True),
        ("<string>", True),
        ("/opt/venv/lib/python3.11/site-packages/torch/_tensor.py", False),
        ("/usr/lib/python3/dist-packages/numpy/core.py", False),
        ("/usr/local/lib/python3.13t/threading.py", False),
        ("site-packages/torch/_tensor.py", False),
        ("python3.11/threading.py", False),
        ("/src/pytorch/torch/nn/modules/module.py", False),
        ("<frozen importlib._bootstrap>", False),
        ("/src/elastic_launch/workers/bootstrap.py", False),
        ("/usr/lib/libc.so.6", False),
        ("/build/aten/src/Blas.cpp", False),
        ("???", False),
    ],
)
def test_whose_code_it_is_is_told_by_its_path(file: str, expected: bool) -> None:
    assert is_users(Frame(file, 1, "f")) is expected


def test_whose_code_it_is_does_not_change_with_the_short_path() -> None:
    for file in (f"{SITE}/torch/_tensor.py", f"{LIB}/threading.py", "/home/ada/lib/train.py"):
        assert is_users(Frame(short_path(file), 1, "f")) is is_users(Frame(file, 1, "f"))
    assert short_path(f"{LIB}/threading.py") == "python3.11/threading.py"


def test_a_model_that_computes_inside_ddp_or_fsdp_is_in_no_collective() -> None:
    linear = Frame(f"{SITE}/torch/nn/modules/linear.py", 125, "forward")
    ddp = Frame(f"{SITE}/torch/nn/parallel/distributed.py", 1700, "forward")
    fsdp = Frame(f"{SITE}/torch/distributed/fsdp/fully_sharded_data_parallel.py", 900, "forward")
    for wrapper in (ddp, fsdp):
        assert collective_of((linear, wrapper, *ELSEWHERE)) == ""
    assert collective_of((ddp._replace(function="_sync_buffers"), ddp, *ELSEWHERE)) == "_sync_buffers"


def test_writing_a_distributed_checkpoint_is_no_collective() -> None:
    assert collective_of((Frame(f"{SITE}/torch/distributed/checkpoint/filesystem.py", 3, "_write"), *ELSEWHERE)) == ""


def test_a_collective_has_the_name_that_the_user_called() -> None:
    c10d = f"{SITE}/torch/distributed/distributed_c10d.py"
    inner = Frame(c10d, 10, "all_gather"), Frame(c10d, 20, "all_gather_object")
    assert collective_of((*inner, *ELSEWHERE)) == "all_gather_object"


def test_a_device_synchronization_may_be_a_collective() -> None:
    assert collective_of((Frame(f"{SITE}/torch/cuda/__init__.py", 954, "synchronize"), *ELSEWHERE)) == "synchronize"
    native = Frame("/usr/lib/libcuda.so.1", 0, "cuStreamSynchronize")
    assert collective_of((Frame("/usr/lib/libc.so.6", 0, "poll"), native, *ELSEWHERE)) == "collective"


def test_threads_that_wait_for_work_are_idle() -> None:
    worker = Frame(f"{LIB}/concurrent/futures/thread.py", 81, "_worker")
    wait = Frame(f"{LIB}/threading.py", 327, "wait")
    assert is_idle((worker,))
    assert is_idle((wait, Frame(f"{LIB}/queue.py", 171, "get"), *ELSEWHERE))
    assert not is_idle((*ELSEWHERE, worker))
    assert not is_idle(ALL_REDUCE)
    assert not is_idle(ALL_REDUCE[:2])
    assert wait_of((wait, *ELSEWHERE), "futex") == "lock"


# ---- real jobs

# By name: the kind, what the reason says, the place, and whether it is certain. The odd rank is always 1 of 0 to 2.
JOBS: dict[str, tuple[str, str, str, bool]] = {
    "skip": ("collective", "is not in the all_reduce that ranks 0,2 wait in", "job.py:23 in compute_alone", True),
    "spin": ("collective", "but uses a CPU, and moves", "job.py:29 in spin_forever", True),
    "stop": ("stopped", "is stopped by a signal", "", True),
    "lock": ("collective", "but waits for a lock (futex)", "job.py:39 in take_lock_twice", True),
    "sleep": ("collective", "but sleeps", "job.py:97 in main", True),
    "recv": ("mismatch", "waits in recv, but ranks 0,2 wait in all_reduce", "job.py:99 in main", False),
    "barrier": ("mismatch", "waits in barrier, but ranks 0,2 wait in all_reduce", "job.py:105 in main", False),
    "loader": (
        "collective",
        "but waits for its DataLoader, whose process pt_data_worker stands at job.py:53 in fetch_from_disk",
        "job.py:53 in fetch_from_disk",
        True,
    ),
    "ddp": ("collective", "is not in the backward pass that ranks 0,2 wait in, but sleeps", "job.py:72 in ddp", True),
    "pdb": ("debugger", "is in a debugger", "job.py:63 in ask_debugger", True),
    "input": ("collective", "but waits for input on stdin", "job.py:103 in main", True),
    "join": ("collective", "but waits for a lock, a queue or a thread", "job.py:107 in main", True),
    "cond": ("collective", "but waits for a lock, a queue or a thread", "job.py:118 in main", True),
    "socket": ("collective", "but waits for a reply on a connection", "job.py:110 in main", True),
    "process": ("collective", "but waits for a process that it has started", "job.py:113 in main", True),
    "fifo": ("collective", "but waits for a file or a pipe", "job.py:115 in main", True),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_odd_rank_of_a_real_job(name: str) -> None:
    kind, why, place, certain = JOBS[name]
    verdict = judge(merge([node(*recorded(name))]))
    assert (verdict.ranks, verdict.kind, verdict.place, verdict.certain) == ((1,), kind, place, certain)
    assert why in verdict.why


@pytest.mark.parametrize("name", JOBS)
def test_the_odd_rank_is_found_without_system_calls_and_wchan(name: str) -> None:
    """A user may not be allowed to see them. Then less is said about it."""
    first, second = (
        [seen._replace(kernel=seen.kernel._replace(syscall="", wchan="", reads_stdin=False)) for seen in look]
        for look in recorded(name)
    )
    verdict = judge(merge([node(first, second)]))
    assert (verdict.ranks, verdict.kind) == ((1,), JOBS[name][0])


@pytest.mark.parametrize("name", JOBS)
def test_the_odd_rank_is_found_across_nodes(name: str) -> None:
    """Each rank on a node of its own, whose part arrives in any order."""
    first, second = recorded(name)
    parts = [
        node([seen for seen in first if seen.rank == rank], [seen for seen in second if seen.rank == rank], host=host)
        for rank, host in ((2, "host-c"), (0, "host-a"), (1, "host-b"))
    ]
    merged = merge(parts)
    assert merged.hosts == {0: "host-a", 1: "host-b", 2: "host-c"}
    assert judge(merged) == judge(merge([node(first, second)]))


def test_ranks_that_all_wait_in_the_same_collective_have_no_odd_one() -> None:
    first, second = ([seen for seen in look if seen.rank != 1] for look in recorded("skip"))
    verdict = judge(merge([node(first, second)]))
    assert verdict.ranks == ()
    assert not verdict.certain
    assert verdict.why == (
        "all 2 ranks wait in the same all_reduce, at job.py:11 in reduce_gradients: the network or a device may be at "
        "fault"
    )


def test_a_stopped_data_loader_process_is_told_of() -> None:
    first, second = recorded("loader")
    stopped = [
        seen._replace(threads=(), kernel=KernelView("T", name="pt_data_worker"))
        if (seen.rank, seen.child) == (1, "pt_data_worker")
        else seen
        for seen in second
    ]
    verdict = judge(merge([node(first, stopped)]))
    assert verdict.ranks == (1,)
    assert "whose process pt_data_worker is stopped by a signal" in verdict.why


# ---- reasons, one by one


def test_a_host_that_does_not_answer_comes_first() -> None:
    first, second = recorded("stop")
    verdict = judge(merge([node(first, second)], missing=[("host-b", (3, 4))]))
    assert (verdict.ranks, verdict.kind, verdict.certain) == ((3, 4), "host", True)
    assert verdict.why == "is on host-b, which does not answer"
    without_ranks = judge(merge([node(first, second)], missing=[("host-b", ())]))
    assert (without_ranks.ranks, without_ranks.why) == ((), "no answer from host-b")


def test_a_rank_that_waits_for_a_device_is_named_with_the_function_in_the_kernel() -> None:
    waiting = KernelView("D", "nfs_wait_bit_killable", "read")
    verdict = judge(job(still(0, ALL_REDUCE), still(1, ELSEWHERE, waiting), still(2, ALL_REDUCE)))
    assert verdict.ranks == (1,)
    assert verdict.why == "waits for a device or a file system (state D, in nfs_wait_bit_killable)"


def test_a_rank_that_is_in_state_d_once_is_not_stuck_there() -> None:
    worker = still(1, ELSEWHERE, KernelView("S", "", "read"))
    worker[1] = [seen._replace(kernel=KernelView("D", "io_schedule", "read")) for seen in worker[1]]
    assert judge(job(still(0, ALL_REDUCE), worker, still(2, ALL_REDUCE))).kind == "collective"


@pytest.mark.parametrize("kernel", [KernelView("t", tracer_pid=7), KernelView("S", tracer_pid=7)])
def test_a_rank_with_a_debugger_attached_is_no_stall(kernel: KernelView) -> None:
    verdict = judge(job(still(0, ELSEWHERE, kernel), still(1, ALL_REDUCE), still(2, ALL_REDUCE)))
    assert (verdict.ranks, verdict.kind) == ((0,), "debugger")


def test_a_rank_that_has_ended_while_others_wait_for_it_is_the_odd_one() -> None:
    workers = [still(0, ALL_REDUCE), still(1, (), KernelView("Z")), still(2, ELSEWHERE), still(3, ALL_REDUCE)]
    verdict = judge(job(*workers))
    assert (verdict.ranks, verdict.kind, verdict.certain) == ((1,), "ended", True)
    assert verdict.why == "has ended, but ranks 0,3 wait in all_reduce"


def test_a_rank_that_made_fewer_steps_is_behind() -> None:
    workers = [still(rank, ELSEWHERE, KernelView("S")) for rank in range(4)]
    verdict = judge(job(*workers, steps={**stalled(range(4), steps=980), 2: (412, 300.0)}))
    assert (verdict.ranks, verdict.kind) == ((2,), "steps")
    assert verdict.why == "has made 412 steps, most others 980"


def test_a_rank_in_another_place_is_probably_the_odd_one() -> None:
    """A collective on a device does not show: ``loss.item()`` has no frame of its own."""
    item = (Frame("/home/ada/job.py", 60, "step"),)
    busy = KernelView("R")
    workers = [still(rank, ELSEWHERE if rank == 2 else item, busy) for rank in range(4)]
    verdict = judge(job(*workers))
    assert (verdict.ranks, verdict.kind, verdict.certain) == ((2,), "minority", False)
    assert verdict.place == "job.py:55 in load"


def test_what_most_ranks_do_makes_none_of_them_the_odd_one() -> None:
    sleeping, busy = KernelView("S", "", "clock_nanosleep"), KernelView("R")
    workers = [still(rank, ELSEWHERE, busy if rank == 3 else sleeping) for rank in range(4)]
    verdict = judge(job(*workers))
    assert (verdict.ranks, verdict.kind) == ((3,), "busy")


def test_few_ranks_in_the_collective_make_the_verdict_uncertain() -> None:
    workers = [still(0, ALL_REDUCE), *(still(rank, ELSEWHERE) for rank in (1, 2, 3))]
    verdict = judge(job(*workers))
    assert (verdict.ranks, verdict.kind, verdict.certain) == ((1, 2, 3), "collective", False)


def test_the_strongest_reason_decides() -> None:
    workers = [
        still(0, ALL_REDUCE),
        still(1, ELSEWHERE, KernelView("S", "", "clock_nanosleep")),
        still(2, (), KernelView("T")),
        still(3, ALL_REDUCE),
    ]
    assert judge(job(*workers)).ranks == (2,)


def test_a_rank_on_its_own_is_judged_by_what_it_does() -> None:
    merged = job(still(0, ELSEWHERE, KernelView("S", "", "clock_nanosleep")))
    verdict = judge(merged)
    assert (verdict.ranks, verdict.kind) == ((0,), "sleep")
    assert render(merged, verdict, 100).startswith("rank 0 (host-a, pid 1000) sleeps, at job.py:55 in load\n")


def test_a_program_that_is_not_python_is_judged_by_the_kernel_view() -> None:
    idle = KernelView("S", "do_wait", "wait4", command="./solver --size 3")
    merged = job(still(0, ALL_REDUCE), still(1, (), idle), still(2, ALL_REDUCE))
    verdict = judge(merged)
    assert verdict.ranks == (1,)
    assert "but waits for a process that it has started" in verdict.why
    assert "./solver --size 3" in render(merged, verdict, 100)


def test_a_job_that_advances_has_no_odd_rank() -> None:
    """Even if some ranks are in a collective at both looks and others are not."""
    workers = [still(0, ALL_REDUCE), still(1, ALL_REDUCE), still(2, ELSEWHERE)]
    merged = job(*workers, steps={0: (50, 0.3), 1: (50, 0.4), 2: (49, 1.9)})
    verdict = judge(merged)
    assert (verdict.ranks, verdict.kind) == ((), "advancing")
    assert not any(group.is_stuck for group in merged.groups)


@pytest.mark.parametrize("lines", [(70, 71, 72, 73), (70, 70, 70, 73)])
def test_ranks_that_all_move_have_no_odd_one(lines: tuple[int, ...]) -> None:
    workers = [still(rank, ELSEWHERE, KernelView("S")) for rank in range(4)]
    for worker, line in zip(workers, lines, strict=True):
        moved = main_thread(Frame("/home/ada/job.py", line, "main"))
        worker[1] = [seen._replace(threads=moved) for seen in worker[1]]
    assert judge(job(*workers)).kind == "moving"


def test_a_backward_pass_that_computes_waits_for_nobody() -> None:
    backward = (Frame(f"{SITE}/torch/autograd/graph.py", 979, "_engine_run_backward"), *ELSEWHERE)
    workers = [still(rank, backward, KernelView("R")) for rank in range(3)]
    verdict = judge(job(*workers, still(3, ELSEWHERE, KernelView("S", "", "clock_nanosleep"))))
    assert (verdict.ranks, verdict.kind) == ((3,), "sleep")


def test_nothing_known_is_no_verdict() -> None:
    assert judge(merge([])) == Verdict((), "no stacks are known", "", False, "unknown")


# ---- grouping and merging


def test_a_moving_stack_is_what_both_looks_have_in_common() -> None:
    outer = Frame("/home/ada/job.py", 91, "main")
    spin = Frame("/home/ada/job.py", 29, "spin")
    before = (Frame("/home/ada/job.py", 7, "helper"), spin._replace(line=31), outer)
    after = (Frame("/home/ada/job.py", 9, "helper"), spin, outer)
    seen = [
        Observation(0, 1, "", main_thread(*frames), KernelView("R"), at) for frames, at in ((before, 1), (after, 3))
    ]
    [group] = merge([node(seen[:1], seen[1:])]).groups
    assert not group.is_stuck
    assert group.frames == (spin, outer)


def test_ranks_in_one_collective_are_one_group_whatever_system_call_it_makes() -> None:
    workers = [still(rank, ALL_REDUCE, KernelView("S", "", call)) for rank, call in enumerate(("futex", "poll", ""))]
    assert [group.ranks for group in job(*workers).groups] == [(0, 1, 2)]


def test_a_system_call_counts_only_if_it_lasts() -> None:
    worker = still(0, ELSEWHERE, KernelView("S", "", "read"))
    worker[1] = [seen._replace(kernel=KernelView("S", "", "write")) for seen in worker[1]]
    assert [group.syscall for group in job(worker).groups] == [""]


def test_idle_helpers_below_a_worker_are_no_group() -> None:
    first, second = recorded("skip")
    tracker = Observation(0, 77, "python", (), KernelView("S", command="python -c resource_tracker"), 100.0)
    merged = merge([node([*first, tracker], [*second, tracker._replace(time=102.0)])])
    assert not [group for group in merged.groups if group.child]


def test_other_threads_of_interest_are_groups_of_their_own() -> None:
    background = Thread(False, "uploader", (Frame("/home/ada/upload.py", 8, "send"),))
    idle = Thread(False, "pool", (Frame(f"{LIB}/concurrent/futures/thread.py", 81, "_worker"),))
    worker = [[look[0]._replace(threads=(background, idle, *look[0].threads))] for look in still(0, ELSEWHERE)]
    groups = job(worker).groups
    assert [(group.thread, group.is_stuck) for group in groups] == [("", True), ("uploader", True)]


def test_a_process_that_ended_between_the_looks_is_left_out() -> None:
    first, second = recorded("skip")
    merged = merge([node(first, [seen for seen in second if seen.rank != 1])])
    assert {rank for group in merged.groups for rank in group.ranks} == {0, 2}


def test_the_frames_of_the_launcher_are_left_out() -> None:
    bootstrap = Frame("/src/elastic_launch/workers/bootstrap.py", 260, "<module>")
    [group] = job(still(0, (*ELSEWHERE, bootstrap))).groups
    assert group.frames == ELSEWHERE


def test_a_long_stack_keeps_its_innermost_calls_and_the_users() -> None:
    library = [Frame(f"{SITE}/torch/_dynamo/x.py", line, "compile") for line in range(1, 99)]
    [group] = job(still(0, (*library, *ELSEWHERE))).groups
    assert group.frames[0].line == 1
    assert group.frames[-2:] == ELSEWHERE
    assert len(group.frames) < 40


def test_a_node_with_more_than_has_room_leaves_the_commonest_groups_out() -> None:
    def worker(rank: int) -> list[list[Observation]]:
        depth = range(20)
        frames = tuple(Frame(f"/home/ada/{'x' * 200}_{rank}.py", line, f"function_{line}") for line in depth)
        return still(rank, frames)

    crowd = [still(rank, ALL_REDUCE) for rank in range(100, 110)]
    workers = [*crowd, *(worker(rank) for rank in range(100))]
    first, second = ([seen for looks in workers for seen in looks[number]] for number in (0, 1))
    part = summarize("host-a", first, second, {})
    assert len(encode(part)) <= MAX_BYTES
    assert part.left_out > 0
    assert part.left_out + len(part.groups) == 101
    assert part.groups[0].ranks == (0,)
    merged = merge([part])
    assert f"{part.left_out:,} more groups" in render(merged, judge(merged), 100).replace(" groups,", " groups")


def test_random_nodes_fit_and_come_back_unchanged() -> None:
    generator = random.Random(3)
    for _ in range(60):
        ranks = generator.randrange(1, 40)
        first: list[Observation] = []
        second: list[Observation] = []
        for rank in range(ranks):
            for child in generator.choice([("",), ("", "pt_data_worker")]):
                for look, at in ((first, 0.0), (second, 2.0)):
                    frames = tuple(
                        Frame(
                            f"/p/{'é' * generator.randrange(60)}{generator.randrange(9)}.py",
                            generator.randrange(9999),
                            "f",
                        )
                        for _ in range(generator.randrange(40))
                    )
                    kernel = KernelView(generator.choice("RSDTtZ"), "w", "futex", 1.0, 0, 0, False, "c" * 500)
                    look.append(Observation(rank, rank + 1, child, main_thread(*frames), kernel, at))
        part = summarize("host-a", first, second, stalled(range(ranks)))
        data = encode(part)
        assert len(data) <= MAX_BYTES
        assert decode(NodeStacks, data, "stacks") == part
        merged = merge([part])
        assert set(merged.workers) == set(range(ranks))
        verdict = judge(merged)
        assert len(render(merged, verdict, 100).splitlines()) <= MAX_LINES


def test_what_a_node_says_of_real_stacks_keeps_to_the_rules() -> None:
    """Other nodes refuse a part that contradicts itself, because strangers may write to the store."""
    part = node(*recorded("skip"))
    assert decode(NodeStacks, encode(part), "key") == part
    with pytest.raises(RendezvousStateError, match="key must have the frames of all stacks"):
        decode(NodeStacks, encode(part._replace(stacks=((65_536,), *part.stacks[1:]))), "key")


def test_a_merger_keeps_a_bounded_number_of_groups() -> None:
    merger = Merger()
    for rank in range(5000):
        frames = (Frame("/home/ada/job.py", rank + 1, "step"),)
        first, second = still(rank, frames)
        merger.add(summarize("host-a", first, second, {}))
    merged = merger.result()
    assert len(merged.groups) + merged.left_out == 5000
    assert len(merged.groups) == 2048
    assert len(render(merged, judge(merged), 100).splitlines()) <= MAX_LINES


# ---- on the screen


def big_job(ranks: int, odd: Callable[[int], str]) -> Merged:
    """A job of nodes with 8 ranks; ``odd`` tells whose rank 1 a rank stands like, or "" for the waiting rank 0."""
    merger = Merger()
    for start in range(0, ranks, 8):
        looks: tuple[list[Observation], list[Observation]] = ([], [])
        for rank in range(start, start + 8):
            for seen, look in zip(recorded(odd(rank) or "skip"), looks, strict=True):
                mine = (each for each in seen if each.rank == (1 if odd(rank) else 0))
                look += [each._replace(rank=rank, pid=10 * rank + bool(each.child)) for each in mine]
        merger.add(node(*looks, stalled(range(start, start + 8)), host=f"host-{start // 8}"))
    return merger.result()


def test_report_of_a_small_job() -> None:
    merged = merge([node(*recorded("ddp"), steps={0: (3, 60.2), 1: (3, 61.0), 2: (3, 60.4)})])
    assert render(merged, judge(merged), 100).splitlines() == [
        f"rank 1 (host-a, pid {merged.workers[1].pid}) is the odd one out: "
        "it is not in the backward pass that ranks 0,2 wait in,",
        "  but sleeps, at job.py:72 in ddp",
        "  stuck, in clock_nanosleep, 3 steps, the last 61 s ago, 0.0 s of CPU in 2.0 s",
        "      /home/ada/job.py:72 in ddp",
        "      /home/ada/job.py:87 in main",
        "      /home/ada/job.py:127 in <module>",
        "",
        "2 ranks (0,2): stuck in backward pass, 0 % CPU, 3 steps, the last 60 s ago",
        "      site-packages/torch/autograd/graph.py:979 in _engine_run_backward",
        "      … /home/ada/job.py:73 in ddp",
        "      /home/ada/job.py:87 in main",
        "      /home/ada/job.py:127 in <module>",
    ]


def test_report_of_8192_ranks_is_one_screen() -> None:
    kinds = ("skip", "spin", "stop", "lock", "sleep", "recv", "loader", "input", "socket", "process", "fifo", "cond")
    merged = big_job(8192, lambda rank: kinds[rank // 500 % len(kinds)] if rank % 500 == 7 else "")
    verdict = judge(merged)
    lines = render(merged, verdict, 100).splitlines()
    assert verdict.ranks == (1007, 7007)
    assert verdict.kind == "stopped"
    assert lines[0].startswith("rank 1007 (host-125, pid 10070) is the odd one out: it is stopped by a signal")
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= 100
    assert "      /home/ada/job.py:57 in train_with_loader" in lines
    assert any(line.startswith("8,175 ranks (0-6,8-506,") and "stuck in all_reduce" in line for line in lines)


def test_report_shows_the_minority_first_and_counts_what_has_no_room() -> None:
    def place(rank: int) -> tuple[Frame, ...]:
        return ALL_REDUCE if rank >= 60 else (Frame("/home/ada/job.py", 200 + rank, "load"),)

    merged = job(*(still(rank, place(rank)) for rank in range(200)))
    lines = render(merged, judge(merged), 80).splitlines()
    groups = [line for line in lines if line.startswith(("rank ", "140 ranks", "and "))][1:]
    assert groups[0].startswith("rank 1:")
    assert groups[-1].startswith("140 ranks (60-199): stuck in all_reduce")
    shown = len(groups) - 2
    assert groups[-2] == f"and {59 - shown} more groups, of {59 - shown} ranks"
    assert len(lines) <= MAX_LINES


@pytest.mark.parametrize(
    ("ranks", "text"),
    [((), ""), ((5,), "5"), ((0, 1, 2, 5), "0-2,5"), ((3, 2, 2, 9, 8), "2-3,8-9"), (range(8192), "0-8191")],
)
def test_ranks_are_written_as_ranges(ranks: Iterable[int], text: str) -> None:
    assert ranks_text(ranks) == text
