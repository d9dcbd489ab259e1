"""Whether a node's workers still make progress: limits, claims, and no false alarm, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from elastic_launch.core.progress import stall
from elastic_launch.core.progress.memory import WorkerProgress
from elastic_launch.core.progress.messages import (
    AllStalled,
    ClaimStall,
    Judged,
    ReportHang,
    ReportStacks,
    TakeStacks,
    WithdrawClaim,
)
from elastic_launch.core.progress.stack_groups import NodeStacks
from elastic_launch.core.progress.stall import (
    Begun,
    Counting,
    Looked,
    Over,
    StacksTaken,
    StallAction,
    StallPhase,
    StallState,
    Tell,
)
from elastic_launch.core.progress.verdict import Verdict
from elastic_launch.job import HangAction, Policy

HOUR = 3600.0
AUTO = Policy()


class Shape(NamedTuple):
    """A training loop: how long its steps take, and what interrupts them."""

    step: float
    eval_every: int = 0
    eval_seconds: float = 0.0
    save_every: int = 0
    save_seconds: float = 0.0

    def gaps(self) -> Iterator[float]:
        """The seconds between any two steps, without an end."""
        count = 0
        while True:
            count += 1
            gap = self.step
            gap += self.eval_seconds if self.eval_every and count % self.eval_every == 0 else 0
            gap += self.save_seconds if self.save_every and count % self.save_every == 0 else 0
            yield gap


class Loop:
    """A worker that makes steps, and hangs when it is told to."""

    def __init__(self, gaps: Iterator[float], start: float, hangs_at: float = float("inf"), resumes: float = 0) -> None:
        self._gaps = gaps
        self._next_at = start
        self._hangs_at = hangs_at
        self._resumes_at = resumes or float("inf")
        self.progress = WorkerProgress()

    def at(self, now: float) -> WorkerProgress:
        """Its progress at a time."""
        while self._next_at <= now and (self._next_at < self._hangs_at or self._next_at >= self._resumes_at):
            self._step(self._next_at)
        if self._next_at >= self._hangs_at and now >= self._resumes_at:
            self._hangs_at, self._next_at, self._resumes_at = float("inf"), self._resumes_at, float("inf")
            return self.at(now)
        return self.progress

    def _step(self, time: float) -> None:
        was = self.progress
        gap = time - was.last if was.last else 0.0
        longest, second = sorted((gap, was.longest, was.second), reverse=True)[:2]
        self.progress = was._replace(
            steps=was.steps + 1, first=was.first or time, last=time, longest=longest, second=second
        )
        self._next_at = time + next(self._gaps)


class Node:
    """A node whose workers are watched; alone in its job, so that every claim is a stall."""

    def __init__(
        self, policy: Policy, workers: dict[int, Loop], start: float = 0.0, verdict: Verdict | None = None
    ) -> None:
        self.now = start
        self.workers = workers
        self.verdict = verdict or Verdict((1,), "it loops", "", True, "busy-loop")
        self.log: list[tuple[float, StallAction]] = []
        self.state = StallState(policy)
        self.looks = 0
        self._handle(Begun(tuple(workers), 0))
        self._handle(Counting())

    def run(self, until: float) -> Node:
        while self.state.wake_at is not None and self.state.wake_at <= until:
            assert self.state.wake_at >= self.now, "it never looks in the past"
            self.now = self.state.wake_at
            self.looks += 1
            self._handle(Looked({rank: loop.at(self.now) for rank, loop in self.workers.items()}))
        self.now = until
        return self

    def _handle(self, event: stall.StallEvent) -> None:
        self.state, actions = stall.step(self.state, event, self.now)
        for action in actions:
            self.log.append((self.now, action))
            if isinstance(action, ClaimStall):
                self._handle(AllStalled(self.state.number + 1))
            elif isinstance(action, TakeStacks) and action.final:
                self._handle(StacksTaken(NodeStacks("host", 1.0, (), (), (), ())))
            elif isinstance(action, ReportStacks):
                self._handle(Judged(action.number, self.verdict, self.verdict.ranks[0], "text"))

    def times(self, kind: type) -> list[float]:
        return [at for at, action in self.log if isinstance(action, kind)]

    @property
    def lines(self) -> list[str]:
        return [action.text for _, action in self.log if isinstance(action, Tell)]


def lockstep(shape: Shape, count: int = 2, **hang: float) -> dict[int, Loop]:
    return {rank: Loop(shape.gaps(), 10.0, **hang) for rank in range(count)}


@pytest.mark.parametrize("limit", [0.5, 2.0, 30.0, 600.0])
def test_a_hang_is_noticed_when_the_limit_is_over(limit: float) -> None:
    workers = lockstep(Shape(0.02), hangs_at=100.0)
    node = Node(Policy(hang_timeout=limit), workers).run(HOUR)
    last = workers[0].progress.last
    (claimed,) = node.times(ClaimStall)
    assert last + limit <= claimed <= last + limit + 0.001
    first, second = node.times(TakeStacks)
    assert first < claimed == second, "the stacks are taken twice, the first time before the limit is over"


@pytest.mark.parametrize(
    "shape",
    [
        Shape(0.02, eval_every=1000, eval_seconds=30, save_every=5000, save_seconds=15),
        Shape(0.3, save_every=1000, save_seconds=20),
        Shape(5.0, eval_every=200, eval_seconds=50, save_every=1000, save_seconds=55),
        Shape(HOUR),
        Shape(20.0, save_every=100, save_seconds=180),
    ],
    ids=["fast", "no evaluation", "slow", "one step an hour", "large model"],
)
def test_no_false_alarm(shape: Shape) -> None:
    node = Node(AUTO, lockstep(shape)).run(min(30 * HOUR, 50_000 * shape.step))
    assert (node.times(ClaimStall), node.lines) == ([], [])


def test_a_job_that_is_watched_is_looked_at_about_once_in_its_limit() -> None:
    node = Node(AUTO, lockstep(Shape(0.02))).run(HOUR)
    assert node.looks <= HOUR / (stall.AUTO_LEAST - stall.SAMPLE_GAP) + 2


def test_a_job_that_never_steps_is_not_judged() -> None:
    node = Node(AUTO, {0: Loop(iter(()), float("inf"))}).run(30 * HOUR)
    assert node.log == []


def test_nobody_looks_before_a_worker_counts() -> None:
    state, actions = stall.step(StallState(AUTO), Begun((0, 1), 0), 5.0)
    assert (state.wake_at, actions) == (None, [])


def test_a_worker_that_counts_before_the_agent_knows_of_it_is_watched() -> None:
    state, _ = stall.step(StallState(AUTO), Counting(), 4.0)
    state, _ = stall.step(state, Begun((0, 1), 0), 5.0)
    assert state.wake_at is not None
    state, _ = stall.step(state, Over(), 6.0)
    state, _ = stall.step(state, Begun((0, 1), 0), 7.0)
    assert state.wake_at is None, "the workers of the next round may count nothing"


def test_nobody_looks_if_hangs_are_of_no_interest() -> None:
    node = Node(Policy(hang_timeout=0), lockstep(Shape(0.02), hangs_at=50)).run(30 * HOUR)
    assert node.looks == 0


def test_fewer_than_five_steps_are_no_measure() -> None:
    node = Node(AUTO, lockstep(Shape(1.0), hangs_at=13.5)).run(30 * HOUR)
    assert node.workers[0].progress.steps == 4
    assert node.log == []


def test_the_start_has_a_limit_of_its_own() -> None:
    node = Node(Policy(start_timeout=300), {0: Loop(iter(()), float("inf"))}).run(HOUR)
    assert node.times(ClaimStall) == [300]
    assert Node(Policy(start_timeout=300), lockstep(Shape(1.0))).run(HOUR).log == []


def test_auto_is_ten_times_the_longest_gap() -> None:
    assert stall.limit_of(AUTO, 0.02) == 60
    assert stall.limit_of(AUTO, 45.0) == 450
    assert stall.limit_of(Policy(hang_timeout=5), 45.0) == 5


def test_the_longest_gap_is_remembered_through_restarts() -> None:
    node = Node(AUTO, lockstep(Shape(0.1, eval_every=1000, eval_seconds=50))).run(2 * HOUR)
    state, _ = stall.step(node.state, Over(), node.now)
    state, _ = stall.step(state, Begun((0, 1), 0), node.now)
    assert state.has_learned
    assert stall.limit_of(AUTO, state.longest) == pytest.approx(501)


def test_a_first_evaluation_that_is_long_is_told_from_a_hang_by_its_stacks() -> None:
    shape = Shape(0.1, eval_every=3000, eval_seconds=400)
    node = Node(AUTO, lockstep(shape), verdict=Verdict((0,), "busy", "", False, stall.BUSY)).run(2 * HOUR)
    assert len(node.times(ClaimStall)) == 1, "once; then its length is known"
    assert len(node.times(WithdrawClaim)) == 1
    assert node.lines == []


def test_a_busy_worker_that_makes_no_step_is_told_in_the_end() -> None:
    node = Node(AUTO, lockstep(Shape(0.1), hangs_at=100), verdict=Verdict((0,), "busy", "", False, stall.BUSY))
    node.run(HOUR)
    assert [round(at) for at in node.times(ClaimStall)][:2] == [160, 700]


def test_a_phase_has_ten_times_the_limit() -> None:
    policy = Policy(hang_timeout=60)

    def during(seconds: float) -> Node:
        worker = Loop(Shape(0.1).gaps(), 10.0, hangs_at=100, resumes=100 + seconds)
        in_phase = worker.at

        def at(now: float) -> WorkerProgress:
            progress = in_phase(now)
            is_in = 100 <= now < 100 + seconds
            return progress._replace(phase="eval" if is_in else "", phase_since=100.0 if is_in else 0.0)

        worker.at = at  # type: ignore[method-assign]
        return Node(policy, {0: worker}).run(100 + seconds)

    assert during(500).log == []
    assert during(700).times(ClaimStall) == [700]


def test_a_rank_that_falls_behind_is_named_once_and_nothing_else_follows() -> None:
    workers = {0: Loop(Shape(1.0).gaps(), 10.0), 1: Loop(Shape(1.0).gaps(), 10.0, hangs_at=100)}
    node = Node(Policy(hang_timeout=30), workers).run(HOUR)
    (line,) = node.lines
    assert "rank 1 has made no step for 30 s, after 90 steps, while others go on (rank 0: " in line
    assert node.times(ClaimStall) == []


def test_ranks_that_a_collective_holds_up_are_no_laggards() -> None:
    workers = {0: Loop(Shape(1.0).gaps(), 10.0, hangs_at=101), 1: Loop(Shape(1.0).gaps(), 10.0, hangs_at=100)}
    node = Node(Policy(hang_timeout=30), workers).run(HOUR)
    assert node.lines == []
    assert len(node.times(ClaimStall)) == 1


def test_progress_after_a_stall_is_told_and_the_next_stall_is_noticed() -> None:
    node = Node(Policy(hang_timeout=30), {0: Loop(Shape(1.0).gaps(), 10.0, hangs_at=100, resumes=200)}).run(500)
    (line,) = node.lines
    assert line.startswith("the job makes progress again, after 10")
    assert node.times(WithdrawClaim) != []
    assert node.state.stalled_seconds == pytest.approx(101, abs=2)


@pytest.mark.parametrize("action", [HangAction.RESTART, HangAction.STOP])
def test_the_node_of_the_likeliest_rank_reports_a_failure(action: HangAction) -> None:
    policy = Policy(hang_timeout=30, hang_action=action)
    node = Node(policy, lockstep(Shape(1.0), hangs_at=100)).run(HOUR)
    (hang,) = (it for _, it in node.log if isinstance(it, ReportHang))
    assert (hang.local_rank, hang.text) == (1, "text")
    elsewhere = Node(policy, lockstep(Shape(1.0), hangs_at=100), verdict=Verdict((7,), "", "", True, "lock")).run(HOUR)
    assert elsewhere.times(ReportHang) == []


def test_a_debugger_is_no_hang() -> None:
    policy = Policy(hang_timeout=30, hang_action=HangAction.RESTART)
    verdict = Verdict((1,), "is in a debugger", "", True, "debugger")
    node = Node(policy, lockstep(Shape(1.0), hangs_at=100), verdict=verdict).run(HOUR)
    assert node.times(ReportHang) == []
    assert len(node.times(ClaimStall)) == 1


def test_a_node_that_was_stopped_itself_looks_again_before_it_judges() -> None:
    node = Node(Policy(hang_timeout=30), lockstep(Shape(1.0))).run(100)
    frozen = {rank: loop.at(100.0) for rank, loop in node.workers.items()}
    state, actions = stall.step(node.state, Looked(frozen), 500.0)
    assert actions == []
    assert state.wake_at is not None
    assert 500 < state.wake_at <= 502


def test_a_node_that_falls_behind_as_a_whole_tells_it_once() -> None:
    progress = {0: WorkerProgress(steps=50, first=10, last=60.0)}
    state = StallState(Policy(hang_timeout=30), StallPhase.CLAIMED, (0,), last_at=60.0, due_at=90.0)
    lines: list[str] = []
    for now in (91.0, 106.0, 120.0, 400.0):
        state, actions = stall.step(state, Looked(progress), now)
        lines += [action.text for action in actions if isinstance(action, Tell)]
    assert lines == [
        "no worker of this node has made a step for 46 s; workers of other nodes go on, or their node does not answer"
    ]


def test_every_phase_and_event_is_in_the_table() -> None:
    kinds = {kind for _, kind in stall.TABLE}
    assert all((phase, kind) in stall.TABLE for phase in StallPhase for kind in kinds)


def test_what_a_node_does_does_not_depend_on_how_often_it_is_woken() -> None:
    def claims(wake_up: Callable[[float], float]) -> list[float]:
        node = Node(Policy(hang_timeout=30), lockstep(Shape(1.0), hangs_at=100))
        while node.now < 300:
            node.run(wake_up(node.now))
        return node.times(ClaimStall)

    assert claims(lambda now: now + 0.7) == claims(lambda now: now + 50)
