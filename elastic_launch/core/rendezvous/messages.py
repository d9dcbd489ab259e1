"""What goes into a step of a node's rendezvous and what comes out of it: settings, inputs, questions, and ``Ready``.

The questions that requests to the store carry are in ``questions``.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from elastic_launch.core.agent.messages import Log, RendezvousAction, RendezvousEvent
from elastic_launch.core.rendezvous.questions import Question
from elastic_launch.core.store_requests import Reply
from elastic_launch.core.store_requests import Request as StoreRequest
from elastic_launch.job import Policy

TICK = 1.0
"""Longest time, in seconds, between two polls by a leader, a monitor or a standby."""
LATENESS = 1.5
"""Seconds that a reply of the store may always take."""
PATIENCE = 3.0
"""Seconds that workers run on after a reply was due. A lost packet costs up to 1.4 s after a cut of one second; and the
election of another leader of etcd takes about 2 s."""


class Settings(NamedTuple):
    """What the nodes of a job agree on beforehand. Times are in seconds; names and defaults are torch's."""

    run_id: str
    min_nodes: int
    max_nodes: int
    join_timeout: float = 600.0
    """How long a node waits for a round to form."""
    last_call_timeout: float = 30.0
    """How long a round with enough nodes waits for more of them after the last arrival."""
    close_timeout: float = 30.0
    """How long the node that hosts the store waits at the end for the others to finish."""
    keep_alive_interval: float = 5.0
    """Time between two heartbeats of a node."""
    keep_alive_max_attempt: int = 3
    """Number of intervals without a heartbeat after which a node counts as dead."""
    policy: Policy = Policy()
    store_port: int = 0
    """Port on which the job's store also serves the workers; 0: it does not."""

    @property
    def options(self) -> str:
        """The options that all nodes must share, as on the command line."""
        policy = self.policy
        words = [f"--nnodes={self.min_nodes}:{self.max_nodes} --max-restarts={policy.max_restarts}"]
        words += [f"--restart-window={policy.window:g}"] if policy.window else []
        words += [f"--restart-backoff={policy.backoff:g}:{policy.backoff_limit:g}"] if policy.backoff else []
        codes = ",".join(map(str, sorted(policy.fatal_exit_codes)))
        words += [f"--fatal-exit-codes={codes}"] if codes else []
        words += [f"--node-failure-limit={policy.node_failure_limit}"] if policy.node_failure_limit else []
        words += [f"--crash-loop={policy.crash_loop}"] if policy.crash_loop != Policy().crash_loop else []
        words += [f"--hang-timeout={policy.hang_timeout:g}"] if policy.hang_timeout is not None else []
        words += [f"--start-timeout={policy.start_timeout:g}"] if policy.start_timeout else []
        words += [f"--hang-action={policy.hang_action}"] if policy.hang_action != Policy().hang_action else []
        return " ".join(words)

    @property
    def keep_alive_deadline(self) -> float:
        """Seconds without a heartbeat after which a node counts as dead."""
        return self.keep_alive_interval * self.keep_alive_max_attempt

    @property
    def margin(self) -> float:
        """Seconds before that deadline at which a node that may have lost its place has killed its workers."""
        return min(1.0, self.keep_alive_deadline / 8)

    @property
    def grace(self) -> float:
        """Seconds that these workers get to stop: half of the time left after the next reply was due.

        ``PATIENCE`` is left for that reply, so with a short deadline there is less time to stop, or none.
        """
        spare = self.keep_alive_deadline - self.margin - self.keep_alive_interval
        return max(0.0, min(spare / 2, spare - PATIENCE))

    @property
    def outage(self) -> float:
        """Seconds without a reply of the store that need not be forgiven: who lives is heard in time afterwards.

        Whoever seems to be silent is looked at once more, a tick later.
        """
        return max(self.tick, self.keep_alive_deadline - self.keep_alive_interval - LATENESS + self.tick)

    @property
    def tick(self) -> float:
        """Seconds between two polls of the leader, the monitor or a standby."""
        return min(TICK, self.keep_alive_interval / 2)


# --- inputs, beside the agent's own: the ``RendezvousAction`` values other than ``RequestJoin``

Q = TypeVar("Q")
V = TypeVar("V")


class Answer(NamedTuple, Generic[Q, V]):
    """The store's reply to a question."""

    question: Q
    round: int
    """The round in which it was asked."""
    value: V


class Join(NamedTuple):
    """The agent requests to join the next round."""

    port: int = 0
    """Reserved for the workers' store; 0: none."""
    has_check: bool = False
    """As in ``RequestJoin``."""


class HostFacts(NamedTuple):
    """What the node has learned of its own host. None leaves a fact as it is."""

    address: str | None = None
    outward: str | None = None
    serves: bool | None = None
    port: int | None = None
    stays: bool | None = None


class AgentId(NamedTuple):
    """Another agent on this host."""

    ticket: int
    """Its node's, in the round where it was found."""
    pid: int
    started: int


class AgentsGone(NamedTuple):
    """Those of the agents in ``Ready.looks_for`` that are gone, with all that they had started."""

    agents: tuple[AgentId, ...]


class KeyAppeared(NamedTuple):
    """The awaited key exists."""

    key: str


class Tick(NamedTuple):
    """``Ready.wake_at`` is reached."""


class Close(NamedTuple):
    """The agent is done, and no worker is left: shut down."""


class StoreReconnected(NamedTuple):
    """The store is reachable again; it may have forgotten everything."""


class StoreLost(NamedTuple):
    """The store is given up."""

    text: str
    status: int
    """The exit status that goes with it."""


Input = (
    Join
    | HostFacts
    | AgentsGone
    | Answer[Question, Reply]
    | KeyAppeared
    | Tick
    | Close
    | StoreReconnected
    | StoreLost
    | RendezvousAction
)

# --- outputs


class Request(NamedTuple):
    """A request to the store, and the question that its reply answers."""

    question: Question
    round: int
    request: StoreRequest


class Ready(NamedTuple):
    """Everything that the caller has to do after a step."""

    requests: list[Request]
    """To be sent in order."""
    events: list[RendezvousEvent]
    """For the agent."""
    log: list[Log]
    lease_until: float | None
    """No other node takes this one's place before that time, so its workers may live until then. None: as before."""
    wants_store: bool
    """Serve a fresh store for the workers of the next round, and answer with its port in ``HostFacts``."""
    awaited_key: str | None
    """The key whose appearance the node waits for; None: none."""
    looks_for: tuple[AgentId, ...]
    """Find out whether these agents are gone, and answer with ``AgentsGone``. Empty: nothing to find out."""
    wake_at: float | None
    """When a ``Tick`` is due; None: never."""
