"""A job's nodes in one process, on a virtual clock: the real decisions and drivers, a simulated network, and bad luck.

Every agent is the real life cycle and the real ``StoreRendezvous``, over connections that play ``StoreClient``.
Messages take their time; connections break after a request was carried out and before its answer came, or stand still;
agents are killed, frozen, started late, signalled; workers fail. The same seed gives the same run.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import socket
from collections import deque
from collections.abc import Callable
from signal import SIGINT, SIGTERM
from typing import Any, ClassVar

from elastic_launch.core.agent import lifecycle
from elastic_launch.core.agent.journal import Journal
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState, Transition
from elastic_launch.core.agent.messages import (
    Action,
    AgentEvent,
    Assigned,
    CheckFailed,
    CheckLimits,
    CheckPassed,
    DeadlineReached,
    Decided,
    Ended,
    Exited,
    Fence,
    Finish,
    GiveUpStop,
    GroupReaped,
    LeaseExpired,
    Leave,
    Limits,
    Log,
    ReapLeftovers,
    RendezvousAction,
    ReportCalls,
    ReportFailure,
    ReportRound,
    ReportSuccess,
    RequestJoin,
    RequestRestart,
    RequestStop,
    RestartRequested,
    RunCheck,
    SendSignal,
    SetStop,
    Signalled,
    Start,
    Started,
    StopCheck,
    Withdraw,
)
from elastic_launch.core.agent.root_cause import NOTHING, ErrorRecord, Evidence, Exit
from elastic_launch.core.progress.goodput import RoundProgress
from elastic_launch.core.progress.messages import ProgressEvent
from elastic_launch.core.rendezvous.messages import Ready, Settings
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.rendezvous.state import NodeState
from elastic_launch.core.store_requests import Append, Cancel, Request, Set, Swap, Wait
from elastic_launch.errors import RendezvousConnectionError, RendezvousStateError
from elastic_launch.job import Assignment, Level
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.rendezvous.signing import Signer
from elastic_launch.rendezvous.store_link import LinkState, Timeouts
from elastic_launch.rendezvous.store_rendezvous import CLOSE_TIMEOUT, StoreRendezvous
from tests.support.checks import BEGINNING, Checks
from tests.support.memory_store import MemoryStore
from tests.support.training import VISIBLE_AFTER, Training

WITH_WORKERS = (AgentPhase.RUNNING, AgentPhase.HOLDING, AgentPhase.DRAINING, AgentPhase.STOPPING)
"""The phases in which workers may run."""

WITH_DEADLINE = (
    AgentPhase.CHECKING,
    AgentPhase.UNFIT,
    AgentPhase.PAUSING,
    AgentPhase.HOLDING,
    AgentPhase.DRAINING,
)
"""The phases whose deadline is reached; workers of the simulation stop in time."""

CHECKPOINT = 10
"""Number of steps after which workers can resume."""


class World:
    """Time, the network, and the store."""

    latest: ClassVar[World | None] = None
    """The one that was made last: after a failure, the one that it is about."""
    left_out: ClassVar[frozenset[int]] = frozenset()
    """Numbers of the faults that do not happen: who looks for the smallest schedule that fails sets it."""
    is_calm: ClassVar[bool] = False
    """Whether no network ever loses or delays, for the same purpose."""

    def __init__(
        self,
        seed: int,
        settings: Settings,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - a value
    ) -> None:
        World.latest = self
        self.seed = seed
        self.faults = 0
        """Number of faults that were planned."""
        self.token = b""
        """The token of the nodes that are added; empty: they have none."""
        self.random = random.Random(seed)
        self.settings = settings
        self.timeouts = timeouts
        self.store = MemoryStore()
        self.is_store_up = self.store_was_up = True
        self.now = BEGINNING
        self.agents: list[Agent] = []
        self.checks = Checks(self)
        self.exit_barrier_timeout = float("inf")
        self.stop_time = 2.0
        self.step_time = 0.0
        """Seconds that a step of the workers takes; 0: they count none."""
        self.training: Training | None = None
        """What the workers do; None: nothing."""
        self.check: Callable[[Agent], tuple[float, bool]] | None = None
        """Returns how many seconds a node's health check takes, and whether it passes; None: there are no checks."""
        self.check_output = "GPU 3: fell off the bus"
        """What a check that fails writes."""
        self.trouble = True
        """Whether the network loses and delays."""
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()

    @property
    def assignments(self) -> dict[int, dict[int, Assignment]]:
        """Every assignment, by round and group rank."""
        return self.checks.assignments

    def at(self, time: float, do: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (time, next(self._count), do))

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        self.at(self.now + seconds, do)

    def fault(self, seconds: float, do: Callable[[], object]) -> None:
        """Have something go wrong after some seconds, unless this fault is to be left out."""
        if self.faults not in World.left_out:
            self.after(seconds, do)
        self.faults += 1

    def run(self, until: float | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, to a moment or until something holds."""
        while self._queue and not stop() and (until is None or self._queue[0][0] <= until):
            self.now, _, do = heapq.heappop(self._queue)
            do()
        if until is not None and not stop():
            self.now = max(self.now, until)

    def delay(self) -> float:
        """Seconds that a message takes."""
        if self.trouble and self.random.random() < 0.02 and not World.is_calm:
            return self.random.uniform(0.1, 3.0)
        return self.random.uniform(0.0001, 0.02)

    def start(self) -> None:
        """As ``add``."""
        self.add()

    def add(self, *, name: str = "", **record: Any) -> Agent:
        """Start an agent; on the host ``name``, or on one of its own."""
        agent = Agent(self, len(self.agents), name, **record)
        self.agents.append(agent)
        agent.begin()
        return agent

    def is_gone(self, pid: int, started: int) -> bool:
        """What an agent on the same host sees of another."""
        agent = self.agents[pid - 1]
        return (agent.dead or agent.finish is not None) and not agent.alive

    def live(self) -> list[Agent]:
        return [agent for agent in self.agents if not agent.dead and agent.finish is None]

    def stop_store(self, *, forget: bool = False) -> None:
        """The store's host goes down: connections break, and none can be made until it is up again."""
        self.is_store_up = self.store_was_up = False
        if forget:
            self.store = MemoryStore()
        for agent in self.agents:
            agent.backend.break_connections()

    def start_store(self) -> None:
        """It is up again."""
        self.is_store_up = True

    def __str__(self) -> str:
        return f"seed {self.seed} at {self.now - BEGINNING:.3f} s"


class Pending:
    """A request that a connection has to answer."""

    def __init__(self, request: Request, tag: Any) -> None:
        self.request = request
        self.tag = tag
        self.value: Any = None
        self.is_answered = False


class SimulatedClient:
    """A connection to the world's store; it plays ``StoreClient``."""

    def __init__(self, agent: Agent) -> None:
        self._agent, self._world = agent, agent.world
        self.ready = False
        self.is_closed = False
        self._out: list[Pending] = []
        self._expected: deque[Pending] = deque()
        self._failure: RendezvousConnectionError | None = None
        self.is_connected = True
        if (away := agent.backend.store_away_until - self._world.now) > 0:
            self.is_connected = False  # the kernel asks again after 1, 3, 7, 15 and 31 s
            again = next(2**n - 1 for n in range(1, 9) if 2**n - 1 >= away)
            self._arrives_at = self._answered_at = self._world.now + again
            self._world.at(self._answered_at, self._greet)
            return
        self._arrives_at = self._answered_at = self._travel(0.0)
        """When the last message in either direction arrives: they keep their order."""
        self._world.at(self._answered_at, self._greet if self._world.is_store_up else self.fail)

    def fileno(self) -> int:
        return -1

    def wants_write(self) -> bool:
        return bool(self._out)

    def submit(self, request: Request, tag: Any = None) -> None:
        self._out.append(Pending(request, tag))
        self._agent.asked += not isinstance(request, Wait | Cancel)

    def flush(self) -> None:
        if not self._out:
            return
        for pending in self._out:
            if not isinstance(pending.request, Cancel):
                self._expected.append(pending)
            self._arrives_at = self._travel(self._arrives_at) + self._agent.backend.service_time
            self._world.at(self._arrives_at, lambda pending=pending: self._execute(pending))  # type: ignore[misc]
        self._out.clear()

    def take(self) -> list[tuple[Any, Any]]:
        answers = []
        while self._expected and (self._expected[0].is_answered or isinstance(self._expected[0].request, Set | Append)):
            pending = self._expected.popleft()
            answers.append((pending.tag, pending.value))
        if not answers and self._failure:
            raise self._failure
        return answers

    def close(self) -> None:
        self.is_closed = True
        self._world.store.drop(self)

    def fail(self) -> None:
        """The connection is reset."""
        if not self.is_closed and self._failure is None:
            self._failure = RendezvousConnectionError("the store: connection lost")
            self._agent.wake()

    def timeout_error(self, seconds: float) -> RendezvousConnectionError:
        return RendezvousConnectionError(f"the store: no answer for {seconds:.0f} s")

    def _travel(self, not_before: float) -> float:
        """When a message that is sent now arrives."""
        return max(not_before, max(self._world.now, self._agent.backend.stalled_until) + self._world.delay())

    def _greet(self) -> None:
        self.is_connected = True
        if not self._is_lost():
            self.ready = True
            self._agent.wake()

    def _execute(self, pending: Pending) -> None:
        """A request arrives at the store. That may be after the agent has closed the connection, or has died."""
        if self._failure is None and self._world.is_store_up:
            if self.is_closed and isinstance(pending.request, Wait | Cancel):
                return
            request, values = pending.request, self._world.store.values
            is_new = isinstance(request, Swap) and request.key not in values
            self._world.store.apply(request, lambda value: self._answer(pending, value), self)
            if isinstance(request, Swap) and is_new:
                self._world.checks.written(request.key)

    def _answer(self, pending: Pending, value: Any) -> None:
        if self._is_lost() or isinstance(pending.request, Cancel):
            return
        if self._world.trouble and self._world.random.random() < 0.002 and not World.is_calm:
            self._world.after(0.0, self.fail)
            return
        self._answered_at = self._travel(self._answered_at)

        def receive() -> None:
            if not self._is_lost():
                pending.value, pending.is_answered = value, True
                self._agent.wake()

        self._world.at(self._answered_at, receive)

    def _is_lost(self) -> bool:
        return self.is_closed or self._failure is not None


class SimulatedBackend(Backend):
    """Makes connections to the world's store."""

    where = "the store"

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.stalled_until = 0.0
        """No message arrives before."""
        self.service_time = 0.0
        """Seconds that the store takes for each request of this node, one after the other."""
        self.store_away_until = 0.0
        """The store's host is off until then: packets to it are lost, without an answer."""
        self.clients: list[SimulatedClient] = []
        self._failure = ""

    def fail(self, why: str) -> None:
        """What this node runs for the store ends, and does not come back."""
        self._failure = why

    def open(self) -> None:
        pass

    def fresh_store(self) -> int:
        return 29999

    def connect(self, again: bool = False) -> Any:
        self.clients = [client for client in self.clients if not client.is_closed]
        self.clients.append(SimulatedClient(self._agent))
        return self.clients[-1]

    def addresses(self, client: object) -> tuple[str, str]:
        return f"10.0.0.{self._agent.number}", "10.0.0.1"

    def take(self) -> None:
        if self._failure:
            raise RendezvousConnectionError(self._failure)

    @property
    def is_reached(self) -> bool:
        """Whether a connection has been answered."""
        return any(client.ready and not client.is_closed for client in self.clients)

    def break_connections(self) -> None:
        for client in self.clients:
            client.fail()


class ReservedPort(socket.socket):
    """Plays a socket that is bound to a port."""

    def __init__(self) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return "::", 29500

    def __exit__(self, *error: object) -> None:
        pass


class Agent:
    """One node: the agent's life cycle and its rendezvous, with workers that do as they are told."""

    def __init__(self, world: World, number: int, name: str = "", **record: Any) -> None:
        self.world = world
        self.number = number
        self.name = name or f"host-{number}"
        self.backend = SimulatedBackend(self)
        self.rendezvous = StoreRendezvous(
            world.settings,
            NodeRecord(
                f"node-{number}", self.name, number + 1, 2, "default", **record, space=self.name, started=number + 1
            ),
            self.backend,
            lambda text: self.logged.append((Level.WARNING, text)),
            world.timeouts,
            verbosity=-1,  # the node's lines are taken from its steps, with their levels
            clock=lambda: world.now,
            wall_clock=lambda: world.now,
            reserve=ReservedPort,
            is_gone=world.is_gone,
            on_step=self._after_step,
            signer=self.signer(world.token) if world.token else None,
        )
        self.node: NodeState = self.rendezvous._node
        self.rendezvous.lease = self._renew
        self.dead = False
        self.gone = False
        """Its connections are closed for good."""
        self.finish: Finish | None = None
        self.logged: list[tuple[Level, str]] = []
        self.stop_time = world.stop_time
        """Longest time, in seconds, that a worker takes to stop."""
        self.frozen_until = 0.0
        self.alive: set[int] = set()
        """Local ranks whose process lives, whatever the agent knows of it."""
        self.generation = -1
        """The round that they belong to."""
        self.lease = float("inf")
        self.hold, self.stop_at = False, 0
        """What its workers see of what it has written into their memory."""
        self._stop_signals: tuple[int, ...] = ()
        self._evidence: dict[int, Evidence] = {}
        self.watch: Callable[[ProgressEvent], None] = lambda event: None
        """Gets what the rendezvous has to say of the workers' progress."""
        self._started_at = self._last_alive_at = 0.0
        """When its workers came to life, and when the last of them that has ended did."""
        self._resumed_at = 0
        """The number of their first step."""
        self.asked = 0
        """Number of requests to the store."""
        self._is_woken = False
        self._timer: float | None = None
        self._checks = 0
        """How many health checks it has started or stopped."""
        limits = Limits(world.settings.policy, 30, world.exit_barrier_timeout, CheckLimits() if world.check else None)
        self.state, self._first_actions = lifecycle.begin(limits, world.now)
        self.journal = Journal("train.py", 1, world.settings.policy.max_restarts, world.now)

    def signer(self, token: bytes) -> Signer:
        return Signer(token, self.world.settings.run_id, lambda text: self.logged.append((Level.WARNING, text)))

    def begin(self) -> None:
        self._record(None, None, self._first_actions)
        self._carry_out(self._first_actions)

    @property
    def running(self) -> int | None:
        """The round whose workers run."""
        is_running = self.state.phase is AgentPhase.RUNNING and self.state.assignment
        return self.state.assignment.restart_count if is_running and self.state.assignment else None

    @property
    def part(self) -> int | None:
        """The round that it takes part in: its workers run, or have all succeeded."""
        is_in = self.state.phase in (AgentPhase.RUNNING, AgentPhase.AGREEING) and self.node.round.end is None
        return self.state.assignment.restart_count if is_in and self.state.assignment else None

    def shown(self, level: Level = Level.DEBUG) -> list[str]:
        """What the log shows at a level."""
        return [text for its_level, text in self.logged if its_level <= level]

    # --- what can happen to it

    def kill(self) -> None:
        self.dead = True
        self.alive.clear()  # its keeper sees to that
        self._hang_up()

    def freeze(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self.world.now + seconds)

    def disconnect(self, seconds: float = 0.0) -> None:
        """The connections are reset; new ones get no answer for some seconds."""
        self.backend.stalled_until = max(self.backend.stalled_until, self.world.now + seconds)
        self.backend.break_connections()

    def stall(self, seconds: float) -> None:
        """No message arrives for some seconds, and nobody is told."""
        self.backend.stalled_until = max(self.backend.stalled_until, self.world.now + seconds)

    def fail_worker(self, code: int = 1, error: str = "", rank: int | None = None) -> None:
        if self.alive:
            rank = self.world.random.choice(sorted(self.alive)) if rank is None else rank
            if error:
                self._evidence[rank] = Evidence(ErrorRecord(error, error, self.world.now, "error.json"))
            self._die(Exit(rank, code, self.world.now, self._stop_signals))

    def succeed_worker(self) -> None:
        if self.state.phase is AgentPhase.RUNNING and self.state.running:
            self._die(Exit(min(self.alive, default=-1), 0, self.world.now))

    def succeed(self) -> None:
        """All its workers end well."""
        while self.state.phase is AgentPhase.RUNNING and self.alive:
            self.succeed_worker()

    def end_worker(self, rank: int) -> None:
        """A worker ends well by itself, or after its stop signal."""
        self._die(Exit(rank, 0, self.world.now, self._stop_signals))

    def signal(self, reason: str = "") -> None:
        """SIGTERM; with a reason the user stops the whole job."""
        self._tell(Signalled(SIGTERM, self.world.now, reason=reason))

    def interrupt(self) -> None:
        self._tell(Signalled(SIGINT, self.world.now))

    def request_restart(self) -> None:
        """The user asks for another round."""
        self._tell(RestartRequested(f"restart requested on {self.name}"))

    def _tell(self, event: AgentEvent) -> None:
        """Something comes from outside; a frozen agent learns of it when it resumes."""
        if self.frozen_until > self.world.now:
            self._soon(lambda: self._live(event), 0.0)
        else:
            self._live(event)

    def ask(self, action: RendezvousAction) -> None:
        """Hand an action to the rendezvous, as the agent does."""
        self._call(lambda: self.rendezvous.ask(action))

    def close(self) -> None:
        """Take leave, as the agent does at its end."""
        self.rendezvous.begin_close()
        self._handle([])
        end = min(self.node.timers.values(), default=self.world.now + CLOSE_TIMEOUT)
        self._soon(self._hang_up, end - self.world.now)

    def wake(self) -> None:
        """Something has come for it on a connection."""
        if not (self._is_woken or self.dead):
            self._is_woken = True
            self._soon(self._take, 0.0)

    def fail(self, text: str) -> None:
        """The agent ends with an error of its own."""
        self._end(RendezvousStateError(text))

    # --- how it works

    def _take(self) -> None:
        self._is_woken = False
        if not self.gone:
            self._call(self.rendezvous.take)

    def _call(self, do: Callable[[], list[AgentEvent]]) -> None:
        """Do something on the rendezvous. If it cannot go on, the agent leaves, and its workers are killed."""
        try:
            self._handle(do())
        except RendezvousStateError as error:
            self._end(error)

    def _end(self, error: RendezvousStateError) -> None:
        if self.finish is None:
            self.finish = Finish(error=str(error), status=error.exit_code)
            self.alive.clear()
            with contextlib.suppress(RendezvousStateError):
                self.rendezvous.ask(Leave(error=str(error), status=error.exit_code))
        with contextlib.suppress(RendezvousStateError):
            self.close()

    def _hang_up(self) -> None:
        self.gone = True
        for client in self.backend.clients:
            client.close()

    def _handle(self, events: list[AgentEvent]) -> None:
        for event in events:
            if isinstance(event, Assigned):
                self.world.checks.assigned(event.assignment)
            self._soon(lambda event=event: self._live(event), 0.0)  # type: ignore[misc]
        if self.finish and self.rendezvous.is_closed:
            self._hang_up()
        deadline = self.rendezvous.deadline()
        if deadline is not None and deadline != self._timer:
            self._timer = deadline
            self._soon(lambda: self._tick(deadline), max(0.0, deadline - self.world.now))

    def _tick(self, deadline: float) -> None:
        if deadline == self._timer:
            self._timer = None
            self._take()

    def _after_step(self, node: NodeState, ready: Ready) -> None:
        self.node = node
        self.logged += [(level, text) for text, level, _ in ready.log]
        self.world.checks.stepped(node, ready)

    def _soon(self, do: Callable[[], None], seconds: float) -> None:
        """Do something in a while, unless the agent is killed; a frozen one does it when it resumes."""

        def when_resumed() -> None:
            if self.dead:
                return
            if self.frozen_until > self.world.now:
                self.world.at(self.frozen_until, when_resumed)
            else:
                do()

        self.world.after(seconds, when_resumed)

    def _live(self, event: AgentEvent) -> None:
        if self.dead or self.finish is not None:
            return
        if isinstance(event, ProgressEvent):
            self.watch(event)
            return
        if isinstance(event, Ended | Decided):
            self.world.checks.told(self, event)
        if isinstance(event, Signalled | Ended | DeadlineReached) and self.world.training:
            event = event._replace(calls=self.world.training.calls(self))
        before = self.state
        self.state, actions = lifecycle.step(before, event, self.world.now)
        self._record(before, event, actions)
        self._carry_out(actions)
        if self.state.phase in WITH_DEADLINE and (deadline := self.state.deadline) is not None:
            phase = self.state.phase

            def reach_deadline() -> None:
                if (self.state.phase, self.state.deadline) == (phase, deadline):
                    self._live(DeadlineReached())

            self._soon(reach_deadline, max(0.0, deadline - self.world.now))

    def _record(self, before: AgentState | None, event: AgentEvent | None, actions: list[Action]) -> None:
        step = Transition(before, event, self.state, actions, self.world.now, self.world.now)
        if self.rendezvous._link.state is LinkState.GIVEN_UP:
            self.world.store_was_up = False  # for this node
        self.world.checks.recorded(self.journal.observe(step))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case RunCheck():
                    self._run_check()
                case StopCheck():
                    self._end_check(0.1, passes=False)
                case RequestJoin() | Withdraw() | RequestRestart() | ReportFailure() | ReportSuccess() | ReportRound():
                    self.ask(action)
                case Leave() | Fence():
                    self.ask(action)
                case RequestStop() | ReportCalls() | GiveUpStop():
                    self.ask(action)
                case SetStop(hold, stop_at):
                    self._set_stop(hold, stop_at)
                case Start(assignment):
                    self._start(assignment)
                case SendSignal(signum, ranks, True):
                    for rank in ranks:
                        seconds = self.world.random.uniform(0.005, 1) * self.stop_time
                        self._stop_soon(Exit(rank, -signum, self.world.now, (signum,)), seconds)
                case ReapLeftovers(kill):
                    self.alive = set() if kill else self.alive
                    self._soon(lambda: self._live(GroupReaped(self._evidence, progress=self._progress())), 0.01)
                case Finish():
                    self.finish = action
                    self.close()
                case Log(text, level):
                    self.logged.append((level, text))

    def _run_check(self) -> None:
        assert self.world.check
        seconds, passes = self.world.check(self)
        self._end_check(seconds, passes=passes)

    def _end_check(self, seconds: float, *, passes: bool) -> None:
        """A check ends after some seconds, unless it is stopped before."""
        self._checks += 1
        number = self._checks
        event = CheckPassed() if passes else CheckFailed("exit code 1", self.world.check_output)
        self._soon(lambda: self._live(event) if self._checks == number else None, seconds)

    def _start(self, assignment: Assignment) -> None:
        """Workers come to life: none of another generation may be."""
        self.generation = assignment.restart_count
        self._stop_signals = ()
        self._evidence = {}
        self._started_at = self._last_alive_at = self.world.now
        self._resumed_at = max(0, assignment.restart_history.goodput.number + 1) // CHECKPOINT * CHECKPOINT
        self.alive = set(range(assignment.local_world_size))
        self.world.checks.started(self)
        self._look_at_lease()
        self.hold, self.stop_at = False, 0
        if self.world.training:
            self.world.training.start(self, assignment)
        pids = {rank: 100 + rank for rank in range(assignment.local_world_size)}
        self._soon(lambda: self._live(Started(pids)), 0.01)

    def _progress(self) -> RoundProgress | None:
        """The steps that its workers made while they lived, from the latest checkpoint on."""
        if not (step := self.world.step_time):
            return None
        steps = int((self._last_alive_at - self._started_at) / step)
        first, last = self._started_at + step, self._started_at + steps * step
        number = self._resumed_at
        return RoundProgress(steps, first, last, number, number + steps - 1) if steps else RoundProgress()

    def _set_stop(self, hold: bool, stop_at: int) -> None:
        """Write into the workers' memory, which they see a moment later."""
        generation = self.generation

        def show() -> None:
            if self.generation == generation:
                self.hold, self.stop_at = hold, stop_at

        if self.world.training:
            self.world.training.held |= {generation} if hold else set()
            self.world.after(self.world.random.choice([0.0, VISIBLE_AFTER]), show)

    def _stop_soon(self, exit_: Exit, seconds: float) -> None:
        self._stop_signals = exit_.stop_signals
        if self.world.training:
            self.world.training.signal(self, exit_.local_rank)
        generation = self.generation
        self.world.after(seconds, lambda: self._die(exit_) if self.generation == generation else None)

    def _die(self, exit_: Exit) -> None:
        """A worker's process ends; the agent learns of it when it can."""
        if exit_.local_rank in self.alive:
            self.alive.discard(exit_.local_rank)
            self._last_alive_at = self.world.now
            event = Exited(exit_, self._evidence.get(exit_.local_rank, NOTHING))
            if self.frozen_until > self.world.now:
                self._soon(lambda: self._exit(event), 0.0)
            else:
                self._exit(event)

    def _exit(self, event: Exited) -> None:
        is_watched = self.state.phase in WITH_WORKERS
        if is_watched and event.exit.local_rank in self.state.running:
            self._live(event)

    def _renew(self, until: float) -> None:
        self.lease = until
        if until < float("inf"):
            self.world.checks.renewed(self)
            self.world.at(max(until, self.world.now), self._look_at_lease)

    def _look_at_lease(self) -> None:
        """What the keeper does."""
        if self.alive and self.world.now >= self.lease:
            self._soon(lambda: self._live(LeaseExpired()) if self.state.phase in WITH_WORKERS else None, 0.0)
            for rank in sorted(self.alive):
                self._die(Exit(rank, -9, self.world.now, (9,)))
