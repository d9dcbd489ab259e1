"""What a node knows of its job, and ``Step``, which collects what one input leads to.

``enter`` is the one place that sets the phase.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from elastic_launch.core.agent.messages import Log, RendezvousEvent, ReportRound
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.progress.goodput import furthest
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.leader import Leader
from elastic_launch.core.rendezvous.messages import AgentId, Ready, Request, Settings
from elastic_launch.core.rendezvous.monitor import Monitor, number
from elastic_launch.core.rendezvous.records import MAX_TICKETS, NOBODY, Closed, Members, NodeRecord, Status, encode
from elastic_launch.core.store_requests import Get, Set, Swap
from elastic_launch.core.store_requests import Request as StoreRequest
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Assignment, Decision, End, Level, LineKind, RestartHistory

BATCH = 256
"""Number of keys that are read or written with one request."""
WATCHERS = 3
"""Number of members, from group rank 1 on, that watch the others when the monitor seems to be silent."""
WATCHING_SPARES = 2
"""Number of spares that do so as well, because all members may be lost."""
HISTORY = 50
"""Number of steps that an unexpected input is reported with."""


class Phase(Enum):
    """Where the node stands in its round."""

    IDLE = "idle"
    """Before the first round."""
    UNFIT = "unfit"
    """Its health check fails: it has no ticket, and follows the rounds that the others form."""
    JOINING = "joining"
    """It has asked for the round's number and a ticket."""
    WAITING = "waiting"
    """It waits for the round to close; the leader closes it."""
    MEMBER = "member"
    OUTSIDE = "outside"
    """The round runs without it: it came late, or there were enough nodes."""
    ENDED = "ended"
    """The round is over; what follows may not be known yet."""
    LEAVING = "leaving"
    """It is done with the job."""

    __hash__ = object.__hash__  # Enum's own is slow, and each step looks phases up


class Timer(Enum):
    """What a node waits for besides the store, and the phases that own the timer."""

    JOIN_TIMEOUT = "join timeout", Phase.JOINING, Phase.WAITING, Phase.UNFIT
    PROGRESS = "progress", Phase.WAITING
    """Log who has joined."""
    LEADER_POLL = "leader poll", Phase.WAITING
    LAST_CALL = "last call", Phase.WAITING
    RETRY_ASSIGNMENT = "retry assignment", Phase.WAITING
    HEARTBEAT = "heartbeat", Phase.WAITING, Phase.MEMBER, Phase.OUTSIDE, Phase.ENDED
    MONITOR_POLL = "monitor poll", Phase.MEMBER, Phase.OUTSIDE, Phase.ENDED
    WATCH = "watch", Phase.MEMBER, Phase.OUTSIDE
    """Look at the members' heartbeats while the monitor seems to be silent."""
    FENCE = "fence", Phase.MEMBER
    EXIT_BARRIER = "exit barrier", Phase.MEMBER
    FORMER = "former", Phase.WAITING, Phase.OUTSIDE
    """Look for the agent that this one has replaced."""
    JOIN_RUNNING = "join running", Phase.OUTSIDE
    """End the running round, so that this node can join."""
    STALL_POLL = "stall poll", Phase.MEMBER
    """Ask whether the whole job stalls, or what the stacks of all nodes say."""
    COLLECT_STACKS = "collect stacks", Phase.MEMBER
    LOOK_POLL = "look poll", Phase.MEMBER
    """Ask what the stacks say that this node has asked for."""
    CAUSE_GRACE = "cause grace", Phase.ENDED
    READ_CALLS = "read calls", Phase.ENDED
    SHUTDOWN = "shutdown", Phase.LEAVING

    __hash__ = object.__hash__

    def __init__(self, label: str, *phases: Phase) -> None:
        self.label = label
        self.phases = phases


@dataclass
class Heartbeat:
    """This node's heartbeats, and what the replies to them have told."""

    sent_at: float = 0.0
    answered_at: float = 0.0
    """When the last heartbeat that was answered had been sent."""
    in_flight: bool = False
    repeats: int = 0
    """Heartbeats that were sent again, on another connection, and may count once more, even long after that."""
    count: int = 0
    """The node's counter at the last answer."""
    has_lapsed: bool = False
    """An answer came after the end of the lease. The others may be about to go on without this node, until a reset of
    its counter shows that they have heard it again."""
    monitored_at: float = 0.0
    """When the node last learned that somebody polls its heartbeats: its counter had been reset."""
    polled_at: float = 0.0
    """The earliest time from which the others may count this node's silence as monitor. They see that it has polled
    them when their counters were reset, or when they begin at 1 again."""
    is_fenced: bool = False
    """The node has stopped its workers, because the others may have gone on without it."""


@dataclass
class Stall:
    """What the node knows of stalls in the round."""

    number: int = 0
    """Number of the latest stall that this node knows of, from 1; 0: none."""
    polls: int = 0
    """Number of polls since this node claimed the stall, or reported its stacks."""
    awaits_verdict: bool = False
    look: int = 0
    """Number of the request for stacks whose verdict this node awaits; 0: none."""
    looked: int = 0
    """Number of the latest request that this node has answered."""
    # As the monitor:
    collected: int = 0
    """Number of the latest stall whose stacks this node has collected or collects."""
    shown: int = 0
    """Number of the latest request for stacks that it has passed on to the members."""
    collecting: int = 0
    """Number of the stall whose stacks it collects; negative: of the request."""
    missing: list[int] = field(default_factory=list)
    """Tickets of the members whose stacks have not come yet."""
    collect_until: float = 0.0

    @property
    def wanted(self) -> list[int]:
        """Tickets of the members that have yet to learn that somebody asks for their stacks."""
        return self.missing if self.collecting < 0 else []


@dataclass
class Report:
    """What the node reports of its own part of the round."""

    round: ReportRound | None = None
    has_succeeded: bool = False
    """Whether this node's workers have all ended well."""
    reported_at: float = 0.0
    """When the agent reported the round."""
    failure: ProcessFailure | None = None
    """The failure that the agent reported first."""
    told: set[int] = field(default_factory=set)
    """Ranks whose failures the others know of."""
    grace_ends: float | None = None
    """Until when this node, whose failure looks like a consequence, waits for the cause."""


@dataclass
class Shutdown:
    """How far the node has come in shutting down."""

    stops_job: bool = False
    """Whether the node is leaving and has told the others to stop."""
    has_acknowledged: bool = False
    """Whether it has counted itself among the nodes that know the job has ended."""
    has_counted: bool = False
    """Whether the store has answered that."""
    is_last: bool = False
    """Whether it stays until all nodes know that the job has ended, because the store ends with it."""
    is_empty: bool = False
    """Whether all nodes know."""


@dataclass
class Round:
    """One round of the job, as the node knows it."""

    number: int
    ticket: int = 0
    """The node's place in the order of arrival, from 1; 0: not drawn yet."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    # While nodes join.
    leader: Leader | None = None
    """What the node knows as leader, if it is."""
    leaders: int = 0
    """Number of the leader that the node follows, or is; it counts the takeovers."""
    status: Status = NOBODY
    closed: Closed | None = None
    has_told: bool = False
    """Whether the node has told the others that it is unfit."""
    # While the round runs.
    assignment: Assignment | None = None
    assigned_at: float = 0.0
    late_at: float | None = None
    """When the node first learned its assignment after the end of its lease; None: it has not."""
    stood_by: bool = False
    """Whether the node was outside the round while it ran."""
    members: Members | None = None
    tickets: int = 0
    """Number of tickets as the monitor counted it last. The nodes that are not members are polled as well."""
    counted_at: float = 0.0
    """When the monitor had asked for that number. Nodes with later tickets have come since."""
    monitor: Monitor | None = None
    """The members' heartbeats, if this node polls them."""
    watch: Monitor | None = None
    """The members' heartbeats, if the monitor seems to be silent: others may be lost with it."""
    monitors: int = 0
    """Number of failover monitors there have been."""
    stall: Stall = field(default_factory=Stall)
    lost: set[int] = field(default_factory=set)
    """Tickets of members that were lost after the round had ended."""
    replaced: dict[int, int] = field(default_factory=dict)
    """Pids of agents on this host that are gone, by their tickets: this node's agent was started after them."""
    finished: set[int] = field(default_factory=set)
    """Tickets of lost members that are not needed: all their workers had succeeded."""
    # When it ends.
    end: End | None = None
    calls: dict[int, int] = field(default_factory=dict)
    """How many calls of ``should_stop()`` the workers of the nodes have begun, by ticket, if this node decides."""
    stop_at: int | None = None
    """The call at which all workers stop, 0 if the nodes could not agree; None: that is not known."""
    decision: Decision | None = None
    report: Report = field(default_factory=Report)
    shutdown: Shutdown = field(default_factory=Shutdown)

    @property
    def awaits_stop(self) -> bool:
        """Whether the node's workers wait until the nodes agree at which step to stop."""
        is_running = self.assignment is not None and self.report.round is None and not self.heartbeat.is_fenced
        return is_running and self.end is not None and self.end.same_step and self.stop_at is None

    @property
    def is_late(self) -> bool:
        """Whether the node came when the round was over."""
        return self.closed is not None and self.ticket > self.closed.tickets and not self.stood_by


@dataclass
class NodeState:
    """One node of a job."""

    record: NodeRecord
    """How it describes itself to the others."""
    settings: Settings
    stays: bool = False
    """Whether the store ends with the nodes that host it, so that all stay until all know how the job has ended."""
    phase: Phase = Phase.IDLE
    round: Round = field(default_factory=lambda: Round(-1))
    timers: dict[Timer, float] = field(default_factory=dict)
    awaited_key: str | None = None
    born_at: float | None = None
    """When the node first joined a round; None: not yet."""
    began_at: float = 0.0
    """When the node began to join the round, or when the pause before the round ends."""
    carried_at: float = 0.0
    """When the node took its record of the job's restarts from a round to the next."""
    decided_at: float = 0.0
    """When the node learned what follows the round before."""
    progress_lines: int = 0
    """How often this node has logged who has joined."""
    has_check: bool = False
    """Whether the agent has to check the node before each round."""
    unfit: str = ""
    """Why its health check fails, or failed when it was last unfit."""
    has_left: bool = False
    may_disconnect: bool = False
    history: deque[tuple[Phase, type | Timer]] = field(default_factory=lambda: deque(maxlen=HISTORY))

    @property
    def is_over(self) -> bool:
        """Whether the job is over for this node, whatever becomes of the store."""
        decision = self.round.decision
        has_ended = decision is not None and not decision.restart and not self.round.awaits_stop
        return self.phase is Phase.LEAVING or has_ended

    def key(self, name: str, *, back: int = 0) -> str:
        """A key of the round, or of the one ``back`` rounds ago."""
        return f"{self._prefix}/{self.round.number - back}/{name}"

    @property
    def round_key(self) -> str:
        """The key of the current round's number."""
        return f"{self._prefix}/round"

    @property
    def _prefix(self) -> str:
        return f"elastic/{self.settings.run_id}"

    @property
    def heartbeat_period(self) -> float:
        """Seconds between two heartbeats; a standby sends more of them, to notice sooner that its monitor is lost.

        So do the watchers; and the monitor, whose lease would end if it did not poll either.
        """
        assignment = self.round.assignment
        is_standby = self.round.ticket == 2 if assignment is None else assignment.group_rank == 1
        if is_standby:
            return self.settings.tick
        is_monitor = assignment is not None and assignment.group_rank == 0
        return self.settings.keep_alive_interval / (2 if self.is_watcher or is_monitor else 1)

    @property
    def is_watcher(self) -> bool:
        """Whether this node watches the other members when the monitor seems to be silent."""
        assignment, closed = self.round.assignment, self.round.closed
        if assignment is None:
            return closed is not None and self.round.ticket in closed.spares[:WATCHING_SPARES]
        return 1 <= assignment.group_rank <= WATCHERS

    def count_tickets(self, value: bytes, *, back: int = 0) -> int:
        """Return how many tickets of the round, or of the one ``back`` rounds ago, have been drawn.

        Raises:
            RendezvousStateError: the counter breaks its rule.
        """
        return number(value, self.key("ticket", back=back), MAX_TICKETS)

    def restart_history(self, now: float) -> RestartHistory:
        """Return the job's restart history, if the end of the round adds nothing to it."""
        if assignment := self.round.assignment:
            return self.with_own_goodput(aged(assignment.restart_history, now - self.round.assigned_at), now)
        return self.round.closed.restart_history if self.round.closed else self.record.restart_history

    def with_own_goodput(self, history: RestartHistory, now: float) -> RestartHistory:
        """Return a history of now with what the agent has reported of this round, if its workers made more steps."""
        if (report := self.round.report).round is None:
            return history
        own = aged(report.round.decision.restart_history, now - report.reported_at).goodput
        return history._replace(goodput=furthest(history.goodput, own))


def enter(node: NodeState, phase: Phase) -> None:
    """Set the phase, and cancel the timers that it does not own."""
    node.phase = phase
    node.timers = {timer: at for timer, at in node.timers.items() if phase in timer.phases}


class Step:
    """One step of a node: the time, and what the caller has to do."""

    def __init__(self, node: NodeState, now: float) -> None:
        self.node = node
        self.now = now
        self._requests: list[Request] = []
        self._events: list[RendezvousEvent] = []
        self._log: list[Log] = []
        self.lease_until: float | None = None
        self.wants_store = False
        self.looks_for: tuple[AgentId, ...] = ()

    def ask(self, question: questions.Question, request: StoreRequest) -> None:
        """Send a request; ``Answer`` brings the question back, with the reply."""
        self._requests.append(Request(question, self.node.round.number, request))

    def get(self, question: questions.Question, *names: str) -> None:
        """Read keys of the round."""
        self.ask(question, Get(tuple(map(self.node.key, names))))

    def create(self, question: questions.Question, name: str, value: bytes) -> None:
        """Write a key of the round, unless it exists. The reply is what it holds."""
        self.ask(question, Swap(self.node.key(name), b"", value))

    def write(self, items: Iterable[tuple[str, bytes]]) -> None:
        """Write keys of the round."""
        everything = [(self.node.key(name), value) for name, value in items]
        for i in range(0, len(everything), BATCH):
            self.ask(questions.Write(), Set(tuple(everything[i : i + BATCH])))

    def await_key(self, name: str | None) -> None:
        """Wait for a key of the round, and for no other."""
        self.node.awaited_key = None if name is None else self.node.key(name)

    def set_timer(self, timer: Timer, seconds: float) -> None:
        """Set a timer to so many seconds from now."""
        self.node.timers[timer] = self.now + seconds

    def notify(self, event: RendezvousEvent) -> None:
        """Hand an event to the agent."""
        self._events.append(event)

    def log(self, text: str, level: Level = Level.WARNING, kind: LineKind = LineKind.NOTE) -> None:
        """Log a line."""
        self._log.append(Log(text, level, kind))

    def decide_next(self, decision: Decision) -> None:
        """Decide what follows the failure that ended the round, unless another node has."""
        self.create(questions.LearnDecision(), "decision", encode(decision._replace(node=self.node.record.node)))

    def read_members(self) -> None:
        """Find out who the members of the round are."""
        if closed := self.node.round.closed:
            self.get(questions.ReadMembers(), f"members/{closed.leader}", "closed", "end")

    def read_own_record(self) -> None:
        """Find out whether the store still knows this node in this round."""
        self.get(questions.ReadOwnRecord(), f"node/{self.node.round.ticket}", "ticket", "closed", "end")

    def ready(self) -> Ready:
        """Return what the step leads to."""
        node = self.node
        outputs = self._requests, self._events, self._log, self.lease_until, self.wants_store
        wake_at = min(node.timers.values(), default=None)
        return Ready(*outputs, node.awaited_key, self.looks_for, wake_at)
