"""Layer 0: what the nodes of a job tell each other: places in a round, how it ends, what follows, what is remembered.

Values only: no I/O, no clock, no environment.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import NamedTuple

from elastic_launch.errors import ProcessFailure


class Policy(NamedTuple):
    """When the job restarts its workers; the same on all of its nodes. Times in seconds."""

    max_restarts: int = 0
    window: float = 0.0
    """A failure that is older does not count any more; 0: all of them count."""
    backoff: float = 0.0
    """Before the first restart; twice as long before each further one,"""
    backoff_limit: float = 0.0
    """but not longer than this."""
    fatal_exit_codes: frozenset[int] = frozenset()
    """Exit statuses, as a shell shows them, after which there is no restart."""
    node_failure_limit: int = 0
    """A node that has caused so many failures in a row leaves its place to a spare; 0: never."""


class RestartHistory(NamedTuple):
    """What the job remembers of its failures."""

    used: int = 0
    """Restarts that count against ``max_restarts``."""
    uncharged: int = 0
    """Restarts for a port that was taken, which do not."""
    ages: tuple[float, ...] = ()
    """Seconds since the failures that still count; without a window only since the last one."""
    failure: str = ""
    """By which the last one is known again."""
    repeats: int = 0
    """So many times in a row it came, with no time in between."""
    node: str = ""
    """The id of the node whose worker caused it,"""
    in_a_row: int = 0
    """and of so many in a row."""


class Level(IntEnum):
    """How much a line matters. What is shown are the levels up to the chosen one."""

    WARNING = 0
    """Each node speaks for itself."""
    INFO = 1
    """One for each event of the job's life: one node speaks for all. The default."""
    DEBUG = 2


class Assignment(NamedTuple):
    """One node's place in one round of the job, as the rendezvous gave it."""

    group_rank: int
    """Rank of the node."""
    group_world_size: int
    """Number of nodes."""
    base_rank: int
    """Global rank of the node's worker with local rank 0; the others follow."""
    world_size: int
    local_world_size: int
    base_role_rank: int
    role_world_size: int
    master_addr: str
    master_port: int
    host: str
    """The node's name, for people."""
    port_picked: bool
    """The launcher chose ``master_port``, so that it may choose another when a stranger takes it."""
    agent_store: bool = False
    """The workers' store is served already, by the launcher; else the worker of rank 0 serves it."""
    restart_count: int = 0
    """Rounds before this one; it grows whatever ended them, so that no two rounds share a key space in the store."""
    restart_history: RestartHistory = RestartHistory()
    """As the round began."""

    @property
    def picked_port(self) -> int:
        """``master_port`` if another could be picked in its place; else 0."""
        return self.master_port if self.port_picked else 0

    def rank(self, local_rank: int) -> int:
        """The global rank of a worker of this node."""
        return self.base_rank + local_rank


class EndKind(StrEnum):
    """Why a round ends, and so what follows."""

    FAILED = "failed"
    """A worker failed: its node decides, in a ``Decision``, whether there is another round."""
    MEMBERSHIP_CHANGED = "reform"
    """Nodes come or go: another round, without charge."""
    STOP = "stop"
    """A signal stops the whole job."""
    DONE = "done"
    """All workers of all nodes have ended well."""
    ERROR = "error"
    """The nodes cannot work together, or did not meet in time."""


class End(NamedTuple):
    """The first reason to end a round: every node acts on the same one."""

    kind: EndKind
    reason: str
    """For people, in one line."""
    node: str = ""
    """The id of the node that said so."""
    gone: tuple[str, ...] = ()
    """Ids of the nodes that will not be in the next round."""
    signum: int = 0
    """The signal, for ``STOP``."""
    status: int = 0
    """The exit status, for ``ERROR``."""
    failures: tuple[ProcessFailure, ...] = ()
    """For ``FAILED``: what is known of it so far."""
    rank: int = -1
    """The group rank of the node that leaves."""
    mine: bool = False
    """It was this node that said so."""


class Decision(NamedTuple):
    """What follows a round, for every node alike."""

    restart: bool
    restart_history: RestartHistory = RestartHistory()
    """As in ``Assignment``, for the next round."""
    failures: tuple[ProcessFailure, ...] = ()
    """The cause first."""
    signum: int = 0
    """The signal that stopped the job, if one did."""
    error: str = ""
    """What the nodes cannot agree on, if that ends the job, and with which exit status."""
    status: int = 0
    why: str = ""
    """Why there is no restart though some were left."""
    pause: float = 0.0
    """Seconds until the next round."""
    gone: tuple[str, ...] = ()
    """Ids of the nodes that will not be in it."""
    node: str = ""
    """The id of the node that said so."""
