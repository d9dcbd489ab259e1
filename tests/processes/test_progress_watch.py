"""The watch of a node's progress: whoever asks for stacks gets them, whatever else they are taken for."""

from __future__ import annotations

import itertools
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_launch.agent import stack_sampler
from elastic_launch.agent.progress import ProgressWatch
from elastic_launch.agent.progress_memory import ProgressMemory
from elastic_launch.agent.stack_sampler import Sampler
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import AgentEvent, Ended, Limits, RendezvousAction
from elastic_launch.core.progress.memory import WorkerProgress
from elastic_launch.core.progress.messages import ReportStacks, StacksWanted, WithdrawClaim
from elastic_launch.core.progress.stall import StallPhase
from elastic_launch.job import Assignment, End, EndKind, Policy
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


def test_what_the_rendezvous_says_when_a_stall_that_was_told_ends_with_the_round_reaches_the_agent() -> None:
    """The node withdraws its claim, and the store may just then tell that another node has ended the round."""

    class Counted(NoWorkers):
        def ranks(self) -> list[int]:
            return [0]

        def read(self, rank: int) -> WorkerProgress:
            return WorkerProgress(steps=9, first=1.0, last=2.0)

    ended = Ended(End(EndKind.DONE, "all workers succeeded"), 3.0)
    asked: list[RendezvousAction] = []

    def ask(action: RendezvousAction) -> list[AgentEvent]:
        asked.append(action)
        return [ended]

    watch = ProgressWatch(Policy(), cast(ProgressMemory, Counted()), lambda pids: None, "", ask, print)
    assignment = Assignment(0, 1, 0, 1, 1, 0, 1, "127.0.0.1", 29500, "host-a", port_picked=True)
    one = {"assignment": assignment, "running": frozenset({0}), "pids": {0: 4711}}
    running = AgentState(Limits(Policy(), 0.0), AgentPhase.RUNNING, **one)  # type: ignore[arg-type]
    assert watch.observe(running) == []
    watch._state = watch._state._replace(phase=StallPhase.TOLD)
    assert watch.observe(replace(running, phase=AgentPhase.STOPPING)) == [ended]
    assert asked == [WithdrawClaim()]


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
