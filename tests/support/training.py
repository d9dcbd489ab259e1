"""What the workers of a simulated job do: steps, with a call of ``should_stop()`` before each.

A worker counts its call, looks a moment later whether to wait, to stop or to go on, and works. With ``together`` all
ranks meet after each step, as in a collective: a rank that waits in ``should_stop()`` holds up the others there, and
one that returned true tells those that never ask. ``Training`` checks what ``should_stop()`` promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from elastic_launch.job import Assignment

if TYPE_CHECKING:
    from tests.support.simulation import Agent, World

RESET = "RuntimeError: Connection reset by peer"
VISIBLE_AFTER = 0.02
"""Longest time, in seconds, after which agent and worker see what the other one has written into their memory."""


class Training:
    """The workers of all nodes, round after round."""

    def __init__(
        self,
        world: World,
        asks: Callable[[int], bool] = lambda rank: True,
        *,
        together: bool = True,
        steps: int = 1_000_000,
        pace: Callable[[], float] = lambda: 0.2,
        breaks: bool = False,
        checkpoint: Callable[[Rank], float] | None = None,
    ) -> None:
        """Have the workers of all later rounds do steps.

        Args:
            world: the job's.
            asks: whether the worker with a global rank calls ``should_stop()``.
            together: whether all ranks meet after each step.
            steps: number of steps after which a worker ends.
            pace: returns the seconds that a rank takes for a step, on average; called once for each rank.
            breaks: whether a rank that waits for a dead one fails; otherwise it waits for ever.
            checkpoint: returns the seconds that a rank takes for its checkpoint; None: up to 2.
        """
        self.world = world
        self.asks = asks
        self.together = together
        self.steps = steps
        self.pace = pace
        self.breaks = breaks
        self.checkpoint = checkpoint or (lambda rank: world.random.uniform(0.05, 2))
        self.held: set[int] = set()
        """Rounds in which workers were held."""
        self.stopped: dict[int, dict[int, int]] = {}
        """By round and global rank: the first call that returned true."""
        self.passed: dict[int, int] = {}
        """By round: the last call that returned false on any rank."""
        self._ranks: dict[int, list[Rank]] = {}
        """The workers of each node's latest round, by the node's number."""
        self._met: dict[tuple[int, int], list[Rank]] = {}
        """Who has finished a step, by round and step."""

    def start(self, agent: Agent, assignment: Assignment) -> None:
        """Start a node's workers."""
        ranks = range(assignment.local_world_size)
        self._ranks[agent.number] = [Rank(self, agent, assignment, local_rank) for local_rank in ranks]

    def calls(self, agent: Agent) -> int:
        """Return the greatest number of calls that a worker of a node has begun, as its agent sees it."""
        return max((rank.visible_calls for rank in self._ranks.get(agent.number, ())), default=0)

    def signal(self, agent: Agent, local_rank: int) -> None:
        """Note that a worker got a stop signal: from now on nothing is promised to it."""
        self._ranks[agent.number][local_rank].is_signalled = True

    def returned(self, rank: Rank, *, should_stop: bool) -> None:
        """Check what a call returned.

        Raises:
            AssertionError: a rank stopped before the others, or went past them.
        """
        if rank.is_signalled:
            return
        stopped, call = self.stopped.setdefault(rank.round, {}), rank.calls
        if should_stop:
            stopped.setdefault(rank.number, call)
        else:
            self.passed[rank.round] = max(self.passed.get(rank.round, 0), call)
        stop_at = {*stopped.values()}
        assert len(stop_at) <= 1, f"{self.world}: ranks stop at different calls: {stopped}"
        assert not stop_at or self.passed.get(rank.round, 0) < min(stop_at), (
            f"{self.world}: a rank went past the call {stop_at}"
        )

    def meet(self, rank: Rank) -> None:
        """Let a rank wait until all have finished the step."""
        waiting = self._met.setdefault((rank.round, rank.step), [])
        waiting.append(rank)
        if len(waiting) == rank.world_size:
            del self._met[rank.round, rank.step]
            is_last = any(other.is_stopping for other in waiting)
            for other in waiting:
                other.soon(other.stop if is_last else other.begin)
        elif self.breaks:
            rank.after(self.world.random.uniform(0.1, 3), lambda: self._notice_death(rank, waiting))

    def _notice_death(self, rank: Rank, waiting: list[Rank]) -> None:
        there = [other for ranks in self._ranks.values() for other in ranks if other.round == rank.round]
        if rank in waiting and len(waiting) < rank.world_size and not all(other.is_alive for other in there):
            rank.agent.fail_worker(1, RESET, rank.local_rank)


class Rank:
    """One worker in one round."""

    def __init__(self, training: Training, agent: Agent, assignment: Assignment, local_rank: int) -> None:
        self.agent = agent
        self.local_rank = local_rank
        self.number = assignment.rank(local_rank)
        self.round = assignment.restart_count
        self.world_size = assignment.world_size
        self.calls = 0
        self.visible_calls = 0
        self.step = 0
        self.is_stopping = False
        self.is_signalled = False
        self._training = training
        self._random = training.world.random
        self._pace = training.pace()
        self.soon(self.begin)

    @property
    def is_alive(self) -> bool:
        agent = self.agent
        return not agent.dead and agent.generation == self.round and self.local_rank in agent.alive

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something if the process still lives then."""
        self._training.world.after(seconds, lambda: do() if self.is_alive else None)

    def soon(self, do: Callable[[], None]) -> None:
        """Do something next; the system may run something else before."""
        self.after(self._random.choice([0.0, 0.001, 0.02]), do)

    def begin(self) -> None:
        """Begin the next step."""
        self.step += 1
        if self.step > self._training.steps:
            self.stop()
        elif self._training.asks(self.number):
            self.calls += 1
            self._show_calls(self.calls)
            self.soon(self.look)
        else:
            self.work()

    def _show_calls(self, calls: int) -> None:
        def show() -> None:
            self.visible_calls = max(self.visible_calls, calls)

        if self._random.getrandbits(1):
            show()
        else:
            self._training.world.after(VISIBLE_AFTER, show)  # also if the process has ended

    def look(self) -> None:
        """The rest of ``should_stop()``."""
        stop_at = self.agent.stop_at
        if stop_at and self.calls >= stop_at:
            self._training.returned(self, should_stop=True)
            self.is_stopping = True
            self.soon(self.finish_step if self._training.together else self.stop)
        elif self.agent.hold and not stop_at:
            self.after(0.02, self.look)
        else:
            self._training.returned(self, should_stop=False)
            self.soon(self.work)

    def work(self) -> None:
        """Do the work of the step."""
        self.after(self._pace * self._random.uniform(0.5, 1.5), self.finish_step)

    def finish_step(self) -> None:
        """Go on, together with the others if need be."""
        if self._training.together:
            self._training.meet(self)
        else:
            self.begin()

    def stop(self) -> None:
        """Write a checkpoint and exit with 0."""
        self.after(self._training.checkpoint(self), lambda: self.agent.end_worker(self.local_rank))
