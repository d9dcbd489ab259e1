"""What a node asks the store, as values. ``Answer`` brings the question back with the reply.

So no string names an answer, and the handler of an answer gets everything that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_launch.core.store_requests import Reply


class Question:
    """A question to the store."""


class LearnRound(Question):
    """Which round is the current one, perhaps because this node has just advanced it?"""


class DrawTicket(Question):
    """Which ticket does this node get?"""


class WriteRecord(Question):
    """Write the node's record; whose is the one that is there?"""


class ReadPastRound(Question):
    """Is this the current round? How did the one before end, and how many tickets did it have?"""


@dataclass(frozen=True)
class ReadPastNodes(Question):
    """Which nodes were in the round before?"""

    keys: tuple[str, ...]
    """Keys of their records, by ticket from 1."""
    gone: tuple[str, ...]
    """Ids of the nodes that are known to be gone."""


class CountTickets(Question):
    """How many tickets have been drawn?"""


@dataclass(frozen=True)
class ReadRecords(Question):
    """What do the nodes with these tickets say of themselves?"""

    leader: int
    """Number of the leader that asks."""
    tickets: list[int]


@dataclass(frozen=True)
class PollJoining(Question):
    """Do the nodes that are joining, and those of the round before, still send heartbeats?"""

    joined: list[int]
    """Tickets of the nodes that have joined."""
    past: dict[str, int]
    """Tickets in the round before, by node id."""
    asked_at: float


@dataclass(frozen=True)
class CloseRound(Question):
    """Close the round; who closed it?"""

    asked_at: float


class ReadStatus(Question):
    """Who has joined, for the log?"""


class SendHeartbeat(Question):
    """Add to this node's counter; what is it now?"""


@dataclass(frozen=True)
class CheckClosed(Question):
    """Has the round closed without this node hearing of it?"""

    asked_at: float


class TakeOverLeading(Question):
    """Become the leader; who is it now?"""


class TakeOverMonitoring(Question):
    """Become the failover monitor; who is it now?"""


@dataclass(frozen=True)
class ConfirmReset(Question):
    """Have the counters of these nodes been reset? Any reply says so."""

    tickets: list[int]
    polled_at: float
    """If they have: the others see from their next heartbeats that they were polled after that time."""


@dataclass(frozen=True)
class ReadAssignment(Question):
    """Which place did this leader assign to the node?"""

    leader: int


class ReadMembers(Question):
    """Who are the members of the round?"""


@dataclass(frozen=True)
class PollMembers(Question):
    """Do the nodes of the round still send heartbeats?"""

    tickets: list[int]
    asked_at: float


@dataclass(frozen=True)
class WatchMembers(Question):
    """Do the members still send heartbeats, although the monitor seems to be silent?"""

    tickets: tuple[int, ...]
    asked_at: float


@dataclass(frozen=True)
class CheckFinished(Question):
    """Had the workers of these suspected members all succeeded?"""

    tickets: list[int]


class CountFinished(Question):
    """Add this node to those whose workers have succeeded; how many are they?"""


class ReadFinished(Question):
    """Have the workers of all members succeeded?"""


class LearnEnd(Question):
    """Why did the round end, perhaps because this node has just ended it?"""


class CountReported(Question):
    """Add this node to those that have reported the round; how many are they?"""


@dataclass(frozen=True)
class ReadConsequences(Question):
    """Which failures did the other nodes have, and which of these know that the round has ended?"""

    tickets: tuple[int, ...]


class LearnDecision(Question):
    """What follows the failure, perhaps because this node has just decided it?"""


@dataclass(frozen=True)
class ReadCalls(Question):
    """How far have the workers of these nodes come?"""

    tickets: list[int]


class LearnStopAt(Question):
    """At which step do the workers stop, perhaps because this node has just decided it?"""


class CountLeft(Question):
    """Add this node to those that know the job has ended; how many are they?"""


@dataclass(frozen=True)
class CompareLeft(Question):
    """Are all nodes that came among them?"""

    left: int


class ConfirmWritten(Question):
    """Has everything that this node sent been carried out? Any reply says so."""


class CountLooks(Question):
    """How often has somebody asked for the stacks of all nodes in the round?"""


@dataclass(frozen=True)
class CheckSucceeded(Question):
    """Of which members do workers still run, whose stacks somebody has asked for?"""

    look: int
    """Number of the request."""
    tickets: tuple[int, ...]


class LearnLook(Question):
    """Which request for stacks does the monitor point to?"""


@dataclass(frozen=True)
class AwaitLook(Question):
    """What do the stacks say that this node has asked for?"""

    look: int


class CountStalls(Question):
    """How many stalls has the round had?"""


@dataclass(frozen=True)
class CheckClaims(Question):
    """Do the workers of all these members stall, or have they succeeded?"""

    stall: int
    """The number that the stall would have."""
    tickets: tuple[int, ...]


class AwaitStall(Question):
    """Does the whole job stall?"""


@dataclass(frozen=True)
class CollectStacks(Question):
    """Have these members sent their stacks?"""

    stall: int
    tickets: tuple[int, ...]


class AwaitVerdict(Question):
    """What do the stacks of all nodes say?"""


class ReadOldRounds(Question):
    """Which keys are there of rounds that are over?"""


@dataclass(frozen=True)
class Deleted(Question):
    """Are keys of such a round deleted? Any reply says so."""

    rest: tuple[str, ...]
    """Keys to delete next."""


class ReadOwnRecord(Question):
    """Does the store still have this node's record and ticket? Is the round over?"""


@dataclass(frozen=True)
class ReadLeaving(Question):
    """Has a node left after a signal, so that there are too few?"""

    reason: str
    """Why the round cannot be formed, if no node has left."""
    status: int


@dataclass(frozen=True)
class FindFormer(Question):
    """Who was in the round? This node may have been in it before it was started again."""

    past: bool
    """Whether that is the round before, because the others have not met yet."""


@dataclass(frozen=True)
class FindFormerMembers(Question):
    """Which members are on this host?"""

    past: bool
    spares: tuple[int, ...]


@dataclass(frozen=True)
class ReadFormer(Question):
    """Do these nodes share this one's pids?"""

    past: bool
    tickets: list[int]


class FindRound(Question):
    """Which round is the current one? Asked by a node that takes no part in it."""


class FollowRound(Question):
    """Has the round closed, and how has it ended? Asked by a node that takes no part in it."""


class Write(Question):
    """No question: the reply says nothing."""


def held(value: Reply) -> bytes:
    """What a key holds, from the reply to a ``Get`` of it alone or to a ``Swap``."""
    first = value[0] if isinstance(value, list) else value
    assert isinstance(first, bytes), value
    return first
