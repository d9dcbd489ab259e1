"""Layer 1: the vocabulary of ``core.rendezvous``: settings, events, outputs, phases. Pure."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from elastic_launch.core.agent.messages import Assigned, Decided, Ended, RendezvousAction
from elastic_launch.core.store_requests import Request
from elastic_launch.job import Level, Policy

TICK = 1.0
"""Seconds between two looks of a chief, a coordinator or a deputy, if the keep-alive interval is not shorter."""


LATENESS = 1.5
"""Seconds that an answer of the store may always take."""


class Settings(NamedTuple):
    """What a job's nodes agree on beforehand. Times in seconds; names and defaults are torch's."""

    run_id: str
    min_nodes: int
    max_nodes: int
    join_timeout: float = 600.0
    """How long a node waits for a round to form."""
    last_call_timeout: float = 30.0
    """How long a round with enough nodes waits, after the last arrival, for more of them."""
    close_timeout: float = 30.0
    """How long the node that hosts the store waits at the end until the others are through."""
    keep_alive_interval: float = 5.0
    keep_alive_max_attempt: int = 3
    """After so many intervals without a sign of life a node counts as dead."""
    policy: Policy = Policy()
    store_port: int = 0
    """The port on which the job's store serves the workers, too; 0: it does not."""

    @property
    def options(self) -> str:
        """What all nodes must have been told alike, as on the command line."""
        policy = self.policy
        words = [f"--nnodes={self.min_nodes}:{self.max_nodes} --max-restarts={policy.max_restarts}"]
        words += [f"--restart-window={policy.window:g}"] if policy.window else []
        words += [f"--restart-backoff={policy.backoff:g}:{policy.backoff_limit:g}"] if policy.backoff else []
        codes = ",".join(map(str, sorted(policy.fatal_exit_codes)))
        words += [f"--fatal-exit-codes={codes}"] if codes else []
        words += [f"--node-failure-limit={policy.node_failure_limit}"] if policy.node_failure_limit else []
        words += [f"--crash-loop={policy.crash_loop}"] if policy.crash_loop != Policy().crash_loop else []
        return " ".join(words)

    @property
    def keep_alive_deadline(self) -> float:
        """Seconds of silence after which a node counts as dead."""
        return self.keep_alive_interval * self.keep_alive_max_attempt

    @property
    def margin(self) -> float:
        """Seconds before that deadline when the workers of a node are dead that cannot be sure of its place."""
        return min(1.0, self.keep_alive_deadline / 8)

    @property
    def grace(self) -> float:
        """Seconds that they have to stop until then: half of the time after the next answer was due, but leaving
        ``LATENESS`` for that to come."""
        spare = self.keep_alive_deadline - self.margin - self.keep_alive_interval
        return max(0.0, min(spare / 2, spare - LATENESS))

    @property
    def tick(self) -> float:
        """Seconds between two looks of those who watch."""
        return min(TICK, self.keep_alive_interval / 2)


# Events, beside those wishes of the agent that are an ``RendezvousAction``.


class Opening(NamedTuple):
    """The agent wants a place in the next round; ``port`` is reserved for the workers' store."""

    port: int = 0


class Answered(NamedTuple):
    """The store's answer to an ``Ask``."""

    what: str
    round: int
    value: Any
    about: Any = None


class Appeared(NamedTuple):
    """The key that was awaited exists."""

    key: str


class Passing(NamedTuple):
    """Time has passed: ``deadline`` is over."""


class Closing(NamedTuple):
    """The agent is done, and no worker is left: say goodbye."""


class Found(NamedTuple):
    """The store is there again, after it could not be reached; it may have forgotten everything."""


class Lost(NamedTuple):
    """The store is gone for good."""

    text: str
    status: int
    """The exit status that goes with it."""


Event = Opening | Answered | Appeared | Passing | Closing | Found | Lost | RendezvousAction

# Outputs.


class Ask(NamedTuple):
    """Send a request; ``Answered`` brings the answer under the same name and round, where there is one."""

    what: str
    round: int
    request: Request
    about: Any = None
    """Comes back with the answer."""


class Notify(NamedTuple):
    """An event for the agent."""

    event: Assigned | Ended | Decided


class Log(NamedTuple):
    """Notify people, in one line."""

    text: str
    level: Level = Level.WARNING


class Lease(NamedTuple):
    """No other node takes this one's place before that time: its workers may live until then."""

    until: float


class Renew(NamedTuple):
    """Serve a fresh store for the workers of the next round, and set the record's port to its own, now."""


Output = Ask | Notify | Log | Lease | Renew


class Phase(Enum):
    """Where the node stands in its round."""

    IDLE = "idle"
    """Before the first round, or between two."""
    OPENING = "opening"
    """It has asked for the round's number and a ticket."""
    WAITING = "waiting"
    """It waits for the round to close; as chief it closes it."""
    MEMBER = "member"
    BESIDE = "beside"
    """The round goes on without it: it came late, or there were enough."""
    ENDED = "ended"
    """The round is over; what follows may not be known yet."""
    LEAVING = "leaving"
    """It is through with the job."""
