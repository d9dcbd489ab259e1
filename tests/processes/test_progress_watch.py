"""The watch of a node's progress: whoever asks for stacks gets them, whatever else they are taken for."""

from __future__ import annotations

import itertools
import subprocess
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_launch.agent import stack_sampler
from elastic_launch.agent.progress import ProgressWatch
from elastic_launch.agent.progress_memory import ProgressMemory
from elastic_launch.agent.stack_sampler import Sampler
from elastic_launch.core.agent.messages import RendezvousAction
from elastic_launch.core.progress.messages import ReportStacks, StacksWanted
from elastic_launch.job import Policy
from tests.support.waiting import wait_until


class NoWorkers:
    """Plays the memory of a node without workers."""

    reads_stacks = True

    def fileno(self) -> int:
        return -1


@pytest.mark.quick
@pytest.mark.parametrize("is_first_taken", [False, True])
def test_stacks_that_are_wanted_do_not_wait_for_a_stall_that_is_suspected(is_first_taken: bool) -> None:
    asked: list[RendezvousAction] = []
    memory = cast(ProgressMemory, NoWorkers())
    watch = ProgressWatch(Policy(), memory, lambda pids: None, "", lambda action: asked.append(action) or [], print)  # type: ignore[func-returns-value]
    watch._start_sampling(False)
    if is_first_taken:
        wait_until(lambda: watch.take() == [] and watch._sample_at is None, "it waits until it is asked")
    watch.handle(StacksWanted(-1))
    watch._start_sampling(False)  # the next suspicion does not discard them

    def reported() -> list[Any]:
        watch.take()
        return [action for action in asked if isinstance(action, ReportStacks)]

    wait_until(reported)
    assert [action.number for action in reported()] == [-1]


def test_stacks_are_read_although_this_process_has_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    class Written(NoWorkers):
        def rewind(self, rank: int) -> None:
            pass

        def stacks(self, rank: int) -> bytes:
            return b'Thread 0x1 (most recent call first):\n  File "train.py", line 7 in step\n'

    clock = itertools.count(0, 10)
    monkeypatch.setattr(stack_sampler, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(Sampler, "_can_write", lambda self, pid, rank: True)
    *_, read = Sampler(cast(ProgressMemory, Written()), lambda pids: None)._written({0: 4711})
    assert [frame.function for thread in read[0] for frame in thread.frames] == ["step"]


def test_a_py_spy_that_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that reads a library from a dead disk, which may be why the workers hang."""
    signals: list[str] = []

    class Stuck:
        def __init__(self, command: list[str], **options: object) -> None:
            assert command[-1] == "4711"

        def poll(self) -> None:
            return None

        def kill(self) -> None:
            signals.append("kill")

        def wait(self) -> None:
            pytest.fail("the agent's loop would stand still")

    monkeypatch.setattr(subprocess, "Popen", Stuck)
    monkeypatch.setattr(stack_sampler, "NATIVE_PATIENCE", 0.0)
    monkeypatch.setattr(stack_sampler, "KILL_PATIENCE", 0.0)
    *_, read = stack_sampler._native({0: 4711}, "py-spy")
    assert read == {0: ()}
    assert signals[:1] == ["kill"]
