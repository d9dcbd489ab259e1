"""A job's nodes in one process, on a virtual clock: the real decisions, a store in memory, and all kinds of bad luck.

Every message takes its time, connections break after a request was carried out and before its answer came, agents are
killed, frozen, started late, signalled; workers fail. The same seed gives the same run.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from signal import SIGTERM

from elastic_launch.core.agent import lifecycle
from elastic_launch.core.agent.lifecycle import (
    AgentPhase,
    Assigned,
    DeadlineReached,
    Decided,
    Ended,
    Exited,
    Fence,
    Finish,
    GroupReaped,
    LeaseExpired,
    Leave,
    Limits,
    ReapLeftovers,
    ReportFailure,
    ReportRound,
    ReportSuccess,
    RequestJoin,
    Signalled,
    Start,
    Started,
)
from elastic_launch.core.agent.root_cause import NOTHING, ErrorRecord, Evidence, Exit
from elastic_launch.core.rendezvous import protocol
from elastic_launch.core.rendezvous.node import Node
from elastic_launch.core.rendezvous.protocol import Answered, Appeared, Ask, Closing, Opening, Passing, Phase, Settings
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.store_requests import Cancel, Wait
from elastic_launch.job import Assignment, Level
from tests.support.memory_store import MemoryStore


class World:
    """Time, the network, the store, and what must hold whatever happens."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.settings = settings
        self.max_restarts = settings.policy.max_restarts
        self.store = MemoryStore()
        self.now = 1000.0
        self.agents: list[Agent] = []
        self.assignments: dict[int, dict[int, Assignment]] = {}
        """By round and group rank: every place that was given."""
        self.exit_barrier_timeout = float("inf")
        self.stop_time = 2.0
        self.trouble = True
        """Whether the network loses and delays."""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, time: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._count), do))

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        self.at(self.now + seconds, do)

    def run(self, until: float | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, to a moment or until something holds."""
        while self._queue and not stop() and (until is None or self._queue[0][0] <= until):
            self.now, _, do = heapq.heappop(self._queue)
            do()
        if until is not None and not stop():
            self.now = max(self.now, until)

    def delay(self) -> float:
        """Seconds that a message takes."""
        if self.trouble and self.random.random() < 0.02:
            return self.random.uniform(0.1, 3.0)
        return self.random.uniform(0.0001, 0.02)

    def start(self) -> None:
        """As ``add``."""
        self.add()

    def add(self, **record: object) -> Agent:
        agent = Agent(self, len(self.agents), **record)
        self.agents.append(agent)
        return agent

    def live(self) -> list[Agent]:
        return [agent for agent in self.agents if not agent.dead and agent.finish is None]

    def assigned(self, agent: Agent, assignment: Assignment) -> None:
        """Check a place against all that were given in its round."""
        given = self.assignments.setdefault(assignment.restart_count, {})
        assert assignment.group_rank not in given, (
            f"{self}: two nodes with group rank {assignment.group_rank} in one round"
        )
        given[assignment.group_rank] = assignment
        first = next(iter(given.values()))
        for field in ("group_world_size", "world_size", "master_addr", "master_port", "restart_history"):
            assert getattr(assignment, field) == getattr(first, field), f"{self}: {field} differs within a round"
        before = self.assignments.get(assignment.restart_count - 1, {})
        used = {other.restart_history.used for other in before.values()} or {assignment.restart_history.used}
        assert assignment.restart_history.used - min(used) in (0, 1) or self.settings.policy.window, (
            f"{self}: counted twice"
        )
        assert self.settings.min_nodes <= assignment.group_world_size <= self.settings.max_nodes
        assert 0 <= assignment.group_rank < assignment.group_world_size
        assert 0 <= assignment.base_rank <= assignment.world_size - assignment.local_world_size
        assert assignment.restart_history.used <= self.max_restarts
        for other in given.values():
            apart = abs(other.group_rank - assignment.group_rank)
            assert apart == 0 or abs(other.base_rank - assignment.base_rank) >= apart, f"{self}: ranks overlap"

    def is_done(self, number: int, rank: int) -> bool:
        """Whether the workers of a member of a round have all ended well."""
        return any(
            agent.state.assignment is not None
            and (agent.state.assignment.restart_count, agent.state.assignment.group_rank) == (number, rank)
            and agent.state.phase in (AgentPhase.AGREEING, AgentPhase.DONE)
            and len([exit_ for exit_ in agent.state.exits if exit_.exitcode == 0])
            == agent.state.assignment.local_world_size
            for agent in self.agents
        )

    def __str__(self) -> str:
        return f"seed {self.seed} at {self.now - 1000:.3f} s"


class Agent:
    """One node: the agent's life and its part in the rendezvous, with workers that do as they are told."""

    def __init__(self, world: World, number: int, **record: object) -> None:
        self.world = world
        self.name = f"host-{number}"
        self.node = Node(NodeRecord(f"node-{number}", self.name, number + 1, 2, "default", **record), world.settings)  # type: ignore[arg-type]
        self.dead = False
        self.finish: Finish | None = None
        self.told: list[tuple[Level, str]] = []
        self.stop_time = world.stop_time
        """Seconds, at most, that a worker takes to stop."""
        self.seen_ends: set[int] = set()
        self.decided: set[int] = set()
        self.frozen_until = 0.0
        self.alive: set[int] = set()
        """Local ranks whose process lives, whatever the agent knows of it."""
        self.generation = -1
        """The round that they belong to."""
        self.lease = float("inf")
        self._stopping: tuple[int, ...] = ()
        """What its workers were told."""
        self._evidence: dict[int, Evidence] = {}
        self.asked = 0
        """Requests to the store."""
        self._epoch = 0
        """Of the connection: what an earlier one still brings is lost."""
        self._unanswered: deque[Ask] = deque()
        self._answers: deque[tuple[Ask, object, int]] = deque()
        self._ready_at = 0.0
        self._awaited: str | None = None
        self._timer: float | None = None
        self.state, actions = lifecycle.begin(Limits(world.settings.policy, 30, world.exit_barrier_timeout))
        self._carry_out(actions)

    @property
    def said(self) -> list[str]:
        """All that it can tell."""
        return self.heard(Level.DEBUG)

    def heard(self, level: Level) -> list[str]:
        """What people get to read."""
        return [text for its_level, text in self.told if its_level <= level]

    @property
    def running(self) -> int | None:
        """The round whose workers run."""
        return (
            self.state.assignment.restart_count
            if self.state.phase is AgentPhase.RUNNING and self.state.assignment
            else None
        )

    @property
    def part(self) -> int | None:
        """The round that it takes part in: its workers run, or have all ended well."""
        is_in = self.state.phase in (AgentPhase.RUNNING, AgentPhase.AGREEING) and self.node.end is None
        return self.state.assignment.restart_count if is_in and self.state.assignment else None

    # --- what can happen to it

    def kill(self) -> None:
        self.dead = True
        self.alive.clear()  # its keeper sees to that
        self._epoch += 1
        self.world.store.drop(self)

    def freeze(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self.world.now + seconds)

    def disconnect(self, seconds: float = 0.0) -> None:
        """The connection breaks; what was not answered is asked again on the next one, after some seconds at least."""
        self._epoch += 1
        self.world.store.drop(self)
        self._awaited = None
        again, self._unanswered = self._unanswered, deque()
        self._ready_at = self.world.now + seconds + self.world.delay()

        def reconnect(epoch: int = self._epoch) -> None:
            if epoch == self._epoch:
                self._await()

        for ask in again:
            self._send(ask)
        self.world.at(self._ready_at, reconnect)

    def fail_worker(self, code: int = 1, error: str = "", rank: int | None = None) -> None:
        if self.alive:
            rank = self.world.random.choice(sorted(self.alive)) if rank is None else rank
            if error:
                self._evidence[rank] = Evidence(ErrorRecord(error, error, self.world.now, "error.json"))
            self._die(Exit(rank, code, self.world.now, self._stopping))

    def succeed_worker(self) -> None:
        if self.state.phase is AgentPhase.RUNNING and self.state.running:
            self._die(Exit(min(self.alive, default=-1), 0, self.world.now))

    def succeed(self) -> None:
        """All its workers end well."""
        while self.state.phase is AgentPhase.RUNNING and self.alive:
            self.succeed_worker()

    def signal(self) -> None:
        self._live(Signalled(SIGTERM, self.world.now))

    # --- how it works

    def _soon(self, do: Callable[[], None], seconds: float) -> None:
        """Do something in a while, unless the agent is killed; a frozen one does it when it thaws."""

        def when_thawed() -> None:
            if self.dead:
                return
            if self.frozen_until > self.world.now:
                self.world.at(self.frozen_until, when_thawed)
            else:
                do()

        self.world.after(seconds, when_thawed)

    def _live(self, event: lifecycle.AgentEvent) -> None:
        if self.dead or self.finish is not None:
            return
        self.state, actions = lifecycle.step(self.state, event, self.world.now)
        self._carry_out(actions)
        if self.state.phase is AgentPhase.PAUSING and self.state.deadline is not None:
            paused, seconds = self.state, self.state.deadline - self.world.now
            self._soon(lambda: self._live(DeadlineReached()) if self.state is paused else None, seconds)

    def _carry_out(self, actions: list[lifecycle.Action]) -> None:
        for action in actions:
            match action:
                case RequestJoin():
                    self._step(Opening(29500))
                case ReportFailure() | ReportSuccess() | ReportRound() | Leave() | Fence():
                    self._step(action)
                case Start(assignment):
                    assert assignment.restart_count not in self.seen_ends, (
                        f"{self.world}: {self.name} runs an ended round"
                    )
                    self._begin(assignment)
                    pids = {rank: 100 + rank for rank in range(assignment.local_world_size)}
                    self._soon(lambda pids=pids: self._live(Started(pids)), 0.01)  # type: ignore[misc]
                case lifecycle.SendSignal(signum, ranks, True):
                    for rank in ranks:
                        seconds = self.world.random.uniform(0.005, 1) * self.stop_time
                        self._stop_soon(Exit(rank, -signum, self.world.now, (signum,)), seconds)
                case ReapLeftovers(kill):
                    self.alive = set() if kill else self.alive
                    self._soon(lambda: self._live(GroupReaped(self._evidence)), 0.01)
                case Finish():
                    self.finish = action
                    self._step(Closing())
                case lifecycle.Log(text, level):
                    self.told.append((level, text))

    def _stop_soon(self, exit_: Exit, seconds: float) -> None:
        self._stopping = exit_.stop_signals
        self.world.after(seconds, lambda: self._die(exit_))

    def _begin(self, assignment: Assignment) -> None:
        """Workers come to life: none of another generation may be."""
        self.generation = assignment.restart_count
        self._stopping = ()
        self._evidence = {}
        self.alive = set(range(assignment.local_world_size))
        for agent in self.world.agents:
            assert not agent.alive or agent.generation == self.generation, (
                f"{self.world}: {agent.name} still trains in round {agent.generation}, {self.name} in {self.generation}"
            )
        self._look_at_lease()

    def _die(self, exit_: Exit) -> None:
        """A worker's process ends; the agent learns of it when it can."""
        if exit_.local_rank in self.alive:
            self.alive.discard(exit_.local_rank)
            event = Exited(exit_, self._evidence.get(exit_.local_rank, NOTHING))
            if self.frozen_until > self.world.now:
                self._soon(lambda: self._exit(event), 0.0)
            else:
                self._exit(event)

    def _renew(self, until: float) -> None:
        self.lease = until
        self.world.at(max(until, self.world.now), self._look_at_lease)

    def _look_at_lease(self) -> None:
        """What the keeper does."""
        if self.alive and self.world.now >= self.lease:
            self._soon(
                lambda: (
                    self._live(LeaseExpired())
                    if self.state.phase in (AgentPhase.RUNNING, AgentPhase.STOPPING)
                    else None
                ),
                0.0,
            )
            for rank in sorted(self.alive):
                self._die(Exit(rank, -9, self.world.now, (9,)))

    def _exit(self, event: Exited) -> None:
        if (
            self.state.phase in (AgentPhase.RUNNING, AgentPhase.STOPPING)
            and event.exit.local_rank in self.state.running
        ):
            self._live(event)

    def _step(self, event: protocol.Event) -> None:
        for output in self.node.step(event, self.world.now):
            match output:
                case Ask():
                    self._send(output)
                case protocol.Notify(told):
                    match told:
                        case Assigned(assignment):
                            self.world.assigned(self, assignment)
                        case Ended():
                            self.seen_ends.add(self.node.round)
                        case Decided():
                            assert self.node.round not in self.decided, f"{self.world}: {self.name}: decided twice"
                            self.decided.add(self.node.round)
                    self._soon(lambda told=told: self._live(told), 0.0)  # type: ignore[misc]
                case protocol.Renew():
                    pass
                case protocol.Lease(until):
                    self._renew(until)
                case protocol.Log(text, level):
                    self.told.append((level, text))
        self._await()
        if (deadline := self.node.deadline) is not None and deadline != self._timer:
            self._timer = deadline
            self._soon(lambda: self._tick(deadline), max(0.0, deadline - self.world.now))

    def _tick(self, deadline: float) -> None:
        if deadline == self._timer:
            self._timer = None
            self._step(Passing())

    def _send(self, ask: Ask) -> None:
        self.asked += 1
        self._unanswered.append(ask)
        self._ready_at = max(self._ready_at, self.world.now + self.world.delay())

        def execute(epoch: int = self._epoch) -> None:
            if epoch == self._epoch:
                self.world.store.apply(ask.request, lambda value: self._answer(ask, value, epoch), (self, "calls"))

        self.world.at(self._ready_at, execute)  # in order, as on a connection

    def _answer(self, ask: Ask, value: object, epoch: int) -> None:
        if self.world.trouble and self.world.random.random() < 0.002:
            self.world.after(0.0, lambda: None if self.dead or epoch != self._epoch else self.disconnect())
            return
        self._answered_at = max(getattr(self, "_answered_at", 0.0), self.world.now + self.world.delay())

        self._answers.append((ask, value, epoch))

        def deliver() -> None:
            ask, value, epoch = self._answers.popleft()  # in order, also after several frosts
            if epoch == self._epoch:
                assert self._unanswered.popleft() is ask
                self._step(Answered(ask.what, ask.round, value, ask.about))

        self._soon(deliver, self._answered_at - self.world.now)

    def _await(self) -> None:
        """Have the second connection wait for the key that the node is curious about."""
        key = self.node.awaiting
        if key == self._awaited or self.dead:
            return
        self._awaited = key

        def wait(epoch: int = self._epoch) -> None:
            if epoch != self._epoch or self._awaited != key:
                return
            self.world.store.apply(Cancel(), lambda _: None, self)
            if key is not None:
                self.world.store.apply(Wait((key,)), lambda came: appeared(epoch) if came else None, self)

        def appeared(epoch: int) -> None:
            def tell() -> None:
                if epoch == self._epoch and self._awaited == key:
                    self._awaited = None
                    self._step(Appeared(key or ""))

            self._soon(tell, self.world.delay())

        self._soon(wait, self.world.delay())


__all__ = ["Agent", "DeadlineReached", "Phase", "World"]
