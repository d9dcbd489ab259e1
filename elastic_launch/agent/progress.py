"""Watch the progress of a node's workers: read their counters, have their stacks taken, and judge those of all nodes.

``core.progress.stall`` decides. This is one more source of the agent's loop. It sleeps until a worker begins to count
its steps, and then wakes about once in the time after which a job counts as hung.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from elastic_launch.agent.operator import refusal
from elastic_launch.agent.progress_memory import ProgressMemory
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import AgentEvent, Hung, Limits, RendezvousAction
from elastic_launch.core.progress import stall
from elastic_launch.core.progress.messages import (
    AllStalled,
    Judged,
    ProgressEvent,
    ReportHang,
    ReportStacks,
    ReportVerdict,
    RequestStacks,
    StacksArrived,
    StacksComplete,
    StacksWanted,
    TakeStacks,
)
from elastic_launch.core.progress.stall import (
    Begun,
    Counting,
    Looked,
    Over,
    StacksTaken,
    StallEvent,
    StallPhase,
    StallState,
    Tell,
)
from elastic_launch.job import Level, Policy

if TYPE_CHECKING:
    from elastic_launch.core.progress.stack_groups import Merger, NodeStacks
    from elastic_launch.core.progress.stacks import Observation
    from elastic_launch.core.status import Progress

RETAKE_GAP = 0.5
"""Seconds between the two samples of the stacks if the first one was not taken in advance."""
LOOK_PATIENCE = 30.0
"""Seconds after which a request for the stacks of all nodes is given up."""
REPORT_WIDTH = 120
"""Columns of the report on the console."""


class Look:
    """Somebody's request to see the stacks of all nodes."""

    def __init__(self, until: float) -> None:
        self.until = until
        """When it is given up, on ``time.monotonic``."""
        self.reply: dict[str, Any] | None = None
        """The reply, as described in ``docs/operating.md``; None: it is not known yet."""


class ProgressWatch:
    """Watches the workers of one node, round after round; an event source of the agent's loop."""

    def __init__(
        self,
        policy: Policy,
        memory: ProgressMemory,
        signal_stacks: Callable[[Collection[int]], None],
        native: str,
        ask: Callable[[RendezvousAction], list[AgentEvent]],
        log: Callable[[str, Level], None],
        record_first_step: Callable[[int, float], None] = lambda rank, at: None,
        record_stall: Callable[[str, float, int | None, str], None] = lambda reason, seconds, rank, action: None,
    ) -> None:
        """Prepare without reading anything.

        Args:
            policy: the job's; what counts as a hang, and what follows.
            memory: the workers' memory.
            signal_stacks: asks the processes with these pids for the stacks of their threads.
            native: the path of py-spy, if native frames are to be shown, too; empty: they are not.
            ask: carries out an action of the rendezvous, and returns the events that answer it at once.
            log: writes a line for the user.
            record_first_step: called when a first step is seen, with its rank and when it was on ``time.monotonic``.
            record_stall: called on the node that judges a stall, with what was found, the seconds since the latest
                step, the rank that is the likely culprit (None if there is none), and what follows.
        """
        self._state = StallState(policy)
        self._record_first_step = record_first_step
        self._record_stall = record_stall
        self._agent = AgentState(Limits(policy, 0.0))
        self._memory = memory
        self._signal_stacks = signal_stacks
        self._native = native
        self._ask = ask
        self._log = log
        self._pids: Mapping[int, int] = {}
        """Process ids of the workers that run, by local rank."""
        self._ended: Mapping[int, int] = {}
        """Process ids of those that have exited."""
        self._host = ""
        self._base_rank = 0
        self._sampling: Iterator[float | None] | None = None
        self._sample_at: float | None = None
        """When the sample that is being taken continues."""
        self._is_final = False
        """Whether that sample is the second one."""
        self._stacks: NodeStacks | None = None
        self._merger: Merger | None = None
        """The stacks of all nodes, on the node that judges them."""
        self._wanted: list[int] = []
        """Numbers of the requests for which this node is to report its stacks."""
        self._looks: list[Look] = []
        """Those of people and programs who asked this agent, and have no answer yet."""
        self.on_answer: Callable[[], None] = lambda: None
        """Called when one of them has an answer."""

    # --- the loop's side

    def descriptors(self) -> list[tuple[int, int]]:
        """See ``LoopSource``: readable when a worker begins to count."""
        return [(self._memory.fileno(), select.POLLIN)]

    def deadline(self) -> float | None:
        """See ``LoopSource``."""
        times = (self._state.wake_at, self._sample_at, *(look.until for look in self._looks))
        return min((at for at in times if at is not None), default=None)

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """See ``LoopSource``: read the workers' progress, or continue to take their stacks."""
        events: list[AgentEvent] = []
        if self._memory.fileno() in ready:
            self._memory.clear()
            events += self._step(Counting())
        now = time.monotonic()
        if self._sample_at is not None and now >= self._sample_at:
            events += self._continue_sampling()
        if self._state.wake_at is not None and now >= self._state.wake_at:
            progress = {rank: self._memory.read(rank) for rank in self._pids}
            if first := min(((it.first, rank) for rank, it in progress.items() if it.first), default=None):
                self._record_first_step(self._base_rank + first[1], first[0])
            events += self._step(Looked(progress))
        if self._looks and now >= min(look.until for look in self._looks):
            self._answer(refusal("no_answer", f"the stacks did not come within {LOOK_PATIENCE:g} s"))
        return events

    def observe(self, state: AgentState) -> list[AgentEvent]:
        """Follow the agent's life cycle. Returns events for the agent, which the rendezvous may have if asked."""
        self._agent = state
        events: list[AgentEvent] = []
        assignment = state.assignment
        is_running = state.phase is AgentPhase.RUNNING and assignment is not None
        was_running, self._pids = bool(self._pids), {}
        if is_running and assignment is not None:
            self._host, self._base_rank = assignment.host, assignment.base_rank
            pids = {rank: state.pids[rank] for rank in self._memory.ranks() if rank in state.pids}
            self._pids = {rank: pid for rank, pid in pids.items() if rank in state.running}
            self._ended = {rank: pid for rank, pid in pids.items() if rank not in state.running}
            if self._pids and not was_running:
                self._merger = None  # of a round that ended while the stacks were collected
                events += self._step(Begun(tuple(self._pids), assignment.base_rank))
        if was_running and not self._pids:
            self._sampling = self._sample_at = None
            self._wanted.clear()
            self._answer(refusal("too_late", "the round has ended"))
            if self._state.phase is StallPhase.TOLD:  # it may have gone on, and ended, since the last look
                events += self._step(Looked({rank: self._memory.read(rank) for rank in self._memory.ranks()}))
            events += self._step(Over())
        return events

    def stalled(self) -> float:
        """Return for how many seconds the workers have been found stalled in this round, before they went on."""
        return self._state.stalled_seconds

    def figures(self) -> Progress:
        """Return what the workers get done, for those who look at the job."""
        from elastic_launch.core.progress.figures import figures  # late: nobody asks most agents

        workers = {rank: self._memory.read(rank) for rank in self._memory.ranks()}
        is_stalled = self._state.phase is StallPhase.TOLD
        return figures(self._agent, workers, self._state.stalled_seconds, is_stalled, time.monotonic())

    def look(self) -> tuple[Look, list[AgentEvent]]:
        """Ask for the stacks of all nodes, for somebody who wants to see them. Returns events for the agent."""
        look = Look(time.monotonic() + LOOK_PATIENCE)
        if not self._pids:
            look.reply = refusal("not_available", "no workers of this node run")
            return look, []
        self._looks.append(look)
        return look, self._ask(RequestStacks()) if len(self._looks) == 1 else []

    def _answer(self, reply: dict[str, Any]) -> None:
        for look in self._looks:
            look.reply = reply
        if self._looks:
            self._looks.clear()
            self.on_answer()

    def handle(self, event: ProgressEvent) -> list[AgentEvent]:
        """Handle what the rendezvous has to say of a stall. Returns events for the agent."""
        match event:
            case StacksWanted(number):
                self._wanted.append(number)
                self._start_sampling(True)
                return []
            case Judged(number, verdict, _, text) if number < 0:
                self._answer({"ok": True, "text": text, "ranks": list(verdict.ranks), "kind": verdict.kind})
                return []
            case AllStalled() | Judged():
                return self._step(event)
            case StacksArrived(_, stacks):
                self._merge().add(stacks)
                return []
            case StacksComplete(number, missing):
                return self._judge(number, missing)

    # --- decisions and what they ask for

    def _step(self, event: StallEvent) -> list[AgentEvent]:
        self._state, actions = stall.step(self._state, event, time.monotonic())
        events: list[AgentEvent] = []
        for action in actions:
            match action:
                case TakeStacks(is_final):
                    self._start_sampling(is_final)
                case Tell(text, level):
                    self._log(text, level)
                case ReportHang(local_rank, verdict, text):
                    events.append(Hung(local_rank, verdict.words, text, time.time()))
                case asking:
                    events += self._ask(asking)
        return events

    # --- stacks

    def _start_sampling(self, is_final: bool) -> None:
        is_final |= bool(self._wanted)  # whoever else asks, those who want the stacks do not wait for a stall
        if not is_final or self._sampling is None:
            self._sampling = self._take_samples()
        self._is_final = is_final
        self._sample_at = time.monotonic()

    def _take_samples(self) -> Iterator[float | None]:
        """Take the stacks twice, and report them. Yields the seconds until it is to be continued; None: when asked."""
        from elastic_launch.agent.stack_sampler import POLL, Sampler  # late, as the next one: few jobs hang
        from elastic_launch.core.progress.stack_groups import summarize

        sampler = Sampler(self._memory, self._signal_stacks, self._native)
        samples: list[list[Observation]] = []
        for _ in range(2):
            taken: list[Observation] = []
            for seen in sampler.sample(self._pids, self._ended, self._base_rank):
                taken = seen
                yield POLL
            samples.append(taken)
            if len(samples) == 1:
                taken_at = time.monotonic()
                while not self._is_final:
                    yield None
                if (early := taken_at + RETAKE_GAP - time.monotonic()) > 0:
                    yield early
        now = time.monotonic()
        progress = {self._base_rank + rank: self._memory.read(rank) for rank in self._pids}
        steps = {rank: (each.iterations, now - each.last if each.last else -1.0) for rank, each in progress.items()}
        self._stacks = summarize(self._host, samples[0], samples[1], steps)

    def _continue_sampling(self) -> list[AgentEvent]:
        assert self._sampling is not None
        try:
            seconds = next(self._sampling)
        except StopIteration:
            self._sampling = self._sample_at = None
            assert self._stacks is not None
            wanted, self._wanted = self._wanted, []
            events = [event for number in wanted for event in self._ask(ReportStacks(number, self._stacks))]
            return events + self._step(StacksTaken(self._stacks))
        self._sample_at = None if seconds is None else time.monotonic() + seconds
        return []

    # --- the verdict

    def _judge(self, number: int, missing: tuple[str, ...]) -> list[AgentEvent]:
        """Judge the stacks of all nodes, tell it, and have all nodes hear of it."""
        from elastic_launch.core.progress.stack_report import render
        from elastic_launch.core.progress.verdict import is_busy, judge

        merged = self._merge().result([(host, ()) for host in missing])
        self._merger = None
        verdict = judge(merged)
        if number < 0:  # somebody wants to see them
            return self._ask(ReportVerdict(number, verdict, -1, render(merged, verdict, REPORT_WIDTH)))
        if verdict.kind not in stall.NO_STALL and stall.may_be_unlearned(self._state) and is_busy(merged):
            verdict = verdict._replace(kind=stall.BUSY)
        text = render(merged, verdict, REPORT_WIDTH)
        since = min((view.since for view in merged.workers.values() if view.since >= 0), default=None)
        what = "no rank has made its first step" if since is None else f"no rank has made a step for {since:.0f} s"
        if verdict.kind in (stall.BUSY, *stall.NO_STALL):
            self._log(f"{what}, but {text}", Level.DEBUG)
        else:
            self._log(f"the job makes no progress: {what}\n{text}", Level.WARNING)
            rank = next(iter(verdict.ranks), None)
            self._record_stall(text.split("\n", 1)[0], since or 0.0, rank, self._state.policy.hang_action.value)
        ended = {rank for group in merged.worker_groups() if group.state == "Z" for rank in group.ranks}
        running = merged.workers.keys() - ended
        blamed = next((rank for rank in verdict.ranks if rank in running), min(running, default=-1))
        return self._ask(ReportVerdict(number, verdict, blamed, text))

    def _merge(self) -> Merger:
        """Return what collects the stacks of all nodes."""
        from elastic_launch.core.progress.stack_groups import Merger

        if self._merger is None:
            self._merger = Merger()
        return self._merger
