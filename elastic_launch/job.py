"""Define what the nodes of a job exchange: assignments, how a round ends, what follows, and the restart history."""

from __future__ import annotations

from enum import Enum, IntEnum, StrEnum
from typing import NamedTuple

from elastic_launch.errors import ProcessFailure


class HangAction(StrEnum):
    """What follows when no worker of the job makes progress any more."""

    REPORT = "report"
    """Tell it, with the stacks of all ranks, and go on watching."""
    RESTART = "restart"
    """Treat it as a failure of the rank that stands out."""
    STOP = "stop"
    """End the job."""


class Policy(NamedTuple):
    """When the job restarts its workers. All nodes of a job must have the same policy."""

    max_restarts: int = 0
    window: float = 0.0
    """Seconds after which a failure no longer counts against ``max_restarts``; 0: all failures count."""
    backoff: float = 0.0
    """Seconds before the first restart. The pause doubles with each further restart."""
    backoff_limit: float = 0.0
    """Maximum seconds before a restart."""
    fatal_exit_codes: frozenset[int] = frozenset()
    """Exit statuses, as a shell shows them, after which the job does not restart."""
    node_failure_limit: int = 0
    """Number of failures in a row after which a spare replaces the node that caused them; 0: never."""
    crash_loop: int = 3
    """Number of identical failures in a row, each shortly after the previous one, that end the job; 0: no limit."""
    hang_timeout: float | None = None
    """Seconds without a step of any rank after which the job counts as hung; None: chosen by its steps; 0: never."""
    start_timeout: float = 0.0
    """Seconds without a step of any rank, before the first ones, after which it does; 0: never."""
    hang_action: HangAction = HangAction.REPORT
    """What follows then."""


class LostTime(NamedTuple):
    """The seconds from the latest step before a restart to the first one after it, by what they were spent on."""

    detection: float = 0.0
    """Until the agent began to stop the workers."""
    stopping: float = 0.0
    """Until no process of the round was left."""
    rendezvous: float = 0.0
    """Until the nodes had agreed on what follows and had met again, with any pause before that."""
    start: float = 0.0
    """Until the first step had ended."""

    @property
    def total(self) -> float:
        """All of them, in seconds."""
        return sum(self)


class Goodput(NamedTuple):
    """How many steps the job has made, and what its time was spent on, in seconds, from its first assignment on."""

    steps: int = 0
    """Steps of the rank that made most, added up over the rounds."""
    in_steps: float = 0.0
    """From the first to the latest step of each round, without ``stalled``."""
    startup: float = 0.0
    """Until the job's first step had ended."""
    restarts: int = 0
    """Rounds that began after the job's first step, whatever ended the round before."""
    lost: LostTime = LostTime()
    """What these restarts cost."""
    stalled: float = 0.0
    """Stalls after which the workers went on."""
    repeated: int = 0
    """Steps whose number the job had reached before; only known of scripts that number their steps."""
    number: int = -1
    """The highest number of a step; -1: the script numbers none."""
    since: LostTime = LostTime()
    """Since the latest step. It is lost to a restart only if one follows."""

    @property
    def elapsed(self) -> float:
        """Age of the job: the sum of all of its time, in seconds."""
        return self.in_steps + self.startup + self.lost.total + self.stalled + self.since.total


class RestartHistory(NamedTuple):
    """What the job remembers about its failures and its progress."""

    used: int = 0
    """Restarts that count against ``max_restarts``."""
    uncharged: int = 0
    """Restarts that do not count, because another process had taken a port."""
    ages: tuple[float, ...] = ()
    """Seconds since each failure within the window. Without a window, only the latest failure is listed."""
    failure: str = ""
    """Signature of the latest failure; empty if it was not the program's own."""
    repeats: int = 0
    """How often in a row ``failure`` has occurred, each time shortly after the previous one."""
    node: str = ""
    """Id of the node that caused the latest failure."""
    in_a_row: int = 0
    """Number of failures in a row that ``node`` has caused."""
    goodput: Goodput = Goodput()
    """What the job has got done; empty if nobody counts steps."""


class Level(IntEnum):
    """Importance of a log line. Lines up to the chosen level are shown."""

    WARNING = 0
    """Warnings and errors of each node."""
    INFO = 1
    """Events of the job, each logged by one node. This is the default."""
    DEBUG = 2
    """What each node does."""


class LineKind(Enum):
    """What a terminal makes of a log line."""

    NOTE = "note"
    """A line; a warning is yellow."""
    FAILURE = "failure"
    """A red line."""
    PROGRESS = "progress"
    """Who has joined: not a line, if one that is redrawn in place tells it."""


class Assignment(NamedTuple):
    """One node's ranks in one round of the job."""

    group_rank: int
    """Rank of the node."""
    group_world_size: int
    """Number of nodes."""
    base_rank: int
    """Global rank of the node's worker with local rank 0. The ranks of its other workers follow."""
    world_size: int
    """Number of workers of all nodes."""
    local_world_size: int
    """Number of workers of this node."""
    base_role_rank: int
    """Rank of the node's first worker among the workers with the same role."""
    role_world_size: int
    """Number of workers with the node's role, on all nodes."""
    master_addr: str
    """Address of the workers' store."""
    master_port: int
    """Port of the workers' store."""
    host: str
    """The node's name in log lines and reports."""
    port_picked: bool
    """Whether the launcher chose ``master_port``, and may choose another one if it is taken."""
    agent_store: bool = False
    """Whether the launcher serves the workers' store; if not, the worker with rank 0 does."""
    restart_count: int = 0
    """Number of earlier rounds, whatever ended them. It keeps the rounds' keys in the store apart."""
    restart_history: RestartHistory = RestartHistory()
    """The job's history at the start of the round."""

    @property
    def picked_port(self) -> int:
        """``master_port`` if the launcher may choose another one; otherwise 0."""
        return self.master_port if self.port_picked else 0

    def rank(self, local_rank: int) -> int:
        """Return the global rank of one of this node's workers."""
        return self.base_rank + local_rank


class EndKind(StrEnum):
    """Why a round ends, which determines what follows."""

    FAILED = "failed"
    """A worker failed. Its node decides whether another round follows."""
    MEMBERSHIP_CHANGED = "membership_changed"
    """Nodes join or leave, or the user asks for another round, which follows without using up a restart."""
    STOP = "stop"
    """A signal stops the whole job."""
    DONE = "done"
    """All workers of all nodes succeeded."""
    ERROR = "error"
    """The nodes cannot work together, or did not meet in time."""


class Change(StrEnum):
    """What changed the membership, if that ended a round. The values are names of events."""

    NONE = ""
    NODE_LOST = "node_lost"
    """Nodes sent no heartbeat any more."""
    NODE_LEFT = "node_left"
    """A node left in good order."""
    NODE_JOINING = "node_joining"
    """Nodes that had no place in the round can join another one."""
    NODE_LATE = "node_late"
    """A node slept while it got its place in the round."""
    CUT_OFF = "cut_off"
    """This node got no answer from the store. The others will find another change."""
    STORE_RESTARTED = "store_restarted"
    """The store has forgotten everything."""
    RESTART_REQUESTED = "restart_requested"
    """A person or a program asked for another round."""


class Silence(NamedTuple):
    """How long a member had been silent when another node ended the round, or decided what follows."""

    ticket: int
    """The member's, in that round."""
    seconds: float
    """Seconds for which its counter of heartbeats had not changed."""
    counter: int = -1
    """The counter's value; -1: there was none."""


class End(NamedTuple):
    """The first reason to end a round. All nodes act on the same one."""

    kind: EndKind
    reason: str
    """One line for the user."""
    node: str = ""
    """Id of the node that ended the round."""
    gone: tuple[str, ...] = ()
    """Ids of the nodes that will not be in the next round."""
    signum: int = 0
    """The signal that stops the job, for ``STOP``; or that has a node leave. The workers of all nodes get it."""
    status: int = 0
    """The exit status, for ``ERROR``."""
    failures: tuple[ProcessFailure, ...] = ()
    """The failures that are known so far, for ``FAILED``."""
    rank: int = -1
    """Group rank of the node that leaves; -1 if none does."""
    same_step: bool = False
    """Whether the workers, some of which call ``should_stop()``, are to stop at a step that the nodes agree on."""
    change: Change = Change.NONE
    """What changed, for ``MEMBERSHIP_CHANGED``."""
    silent: tuple[Silence, ...] = ()
    """Other members that may be lost, too. The leader of the next round goes on counting their silence."""
    mine: bool = False
    """Whether this node ended the round."""


class Decision(NamedTuple):
    """What follows a round. It is the same for all nodes."""

    restart: bool
    restart_history: RestartHistory = RestartHistory()
    """The job's history at the end of the round."""
    failures: tuple[ProcessFailure, ...] = ()
    """Failed workers, the cause first."""
    signum: int = 0
    """The signal that stopped the job; 0: none did."""
    error: str = ""
    """The error that ends the job, if it is not a failure of workers."""
    status: int = 0
    """Exit status for ``error``."""
    why: str = ""
    """Why the job does not restart although restarts are left."""
    pause: float = 0.0
    """Seconds before the next round."""
    gone: tuple[str, ...] = ()
    """Ids of the nodes that will not be in the next round."""
    node: str = ""
    """Id of the node that decided."""
    silent: tuple[Silence, ...] = ()
    """As in ``End``."""
