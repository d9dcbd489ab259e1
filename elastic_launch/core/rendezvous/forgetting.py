"""The leader of a round deletes what the nodes wrote in a round that is over, so that a job keeps its store small.

It does so when its round has closed. Nodes read keys of the round before theirs, so the one before that is deleted. A
node may still be there, because it was frozen or cut off. What it needs to find its way is kept longer: whether its
round had closed, how it ended, and what was decided. That is also what is shown of past rounds.

The number of tickets is deleted last. If it is still there in the round before, the leader there has not completed its
work, and that is done, too.
"""

from __future__ import annotations

from collections.abc import Iterator

from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.messages import Answer
from elastic_launch.core.rendezvous.records import MAX_TICKETS, Closed, decode
from elastic_launch.core.rendezvous.state import BATCH, NodeState, Step
from elastic_launch.core.store_requests import Delete, Get
from elastic_launch.errors import RendezvousStateError

KEPT_ROUNDS = 64
"""Rounds whose outcome is kept."""
_OUTCOME = ("closed", "end", "decision")
_READ = ("ticket", "closed", "stall", "look")
_ONCE = (
    *("status", "unfit", "succeeded", "stalled", "stop_at", "consequences", "lost", "reported", "all_reported"),
    *("left", "all_left", "leaving"),
)
"""Keys that a round has once, but for ``_OUTCOME`` and ``_READ``."""
_BY_TICKET = ("node", "heartbeat", "succeeded", "stalled", "calls", "seen")
_TAKEOVERS = 4
"""Number of takeovers, beyond the leader that closed the round, whose keys are deleted."""
_STALLS = 16
"""Number of the latest stalls, and requests for stacks, whose keys are deleted."""


def begin(node: NodeState, step: Step) -> None:
    """Find out what there is to delete, as the leader that has closed the round."""
    current = node.round.number
    if current - 2 - KEPT_ROUNDS >= 0:
        _delete(node, step, tuple(node.key(name, back=2 + KEPT_ROUNDS) for name in _OUTCOME))
    if current >= 2:
        rounds = [back for back in (2, 3) if current >= back]
        keys = tuple(node.key(name, back=back) for back in rounds for name in _READ)
        step.ask(questions.ReadOldRounds(), Get(keys))


def on_old_rounds(node: NodeState, step: Step, answer: Answer[questions.ReadOldRounds, list[bytes]]) -> None:
    """Delete the rounds that are still there."""
    values = answer.value
    keys: list[str] = []
    for at in range(0, len(values), len(_READ)):
        ticket, closed, stall, look = values[at : at + len(_READ)]
        back = 2 + at // len(_READ)
        if ticket:
            names = _names(_count(ticket, MAX_TICKETS), _leader(closed), _count(stall), _count(look))
            keys += [node.key(name, back=back) for name in names]
    _delete(node, step, tuple(keys))


def _names(tickets: int, leader: int, stalls: int, looks: int) -> Iterator[str]:
    """The keys of a round without its number, in the order in which they are deleted."""
    numbers = range(1, tickets + 1)
    shown = [n for count, sign in ((stalls, 1), (looks, -1)) for n in range(sign, sign * (count + 1), sign)][-_STALLS:]
    yield from _ONCE
    for takeover in range(leader + _TAKEOVERS + 1):
        yield from (f"leader/{takeover}", f"monitor/{takeover}", f"members/{takeover}")
    for number in shown:
        yield f"verdict/{number}"
        yield from (f"stacks/{number}/{ticket}" for ticket in numbers)
    for name in _BY_TICKET:
        yield from (f"{name}/{ticket}" for ticket in numbers)
    for taken in range(leader + 1):
        yield from (f"assignment/{taken}/{ticket}" for ticket in numbers)
    yield from ("stall", "look", "ticket")


def _delete(node: NodeState, step: Step, keys: tuple[str, ...]) -> None:
    """Delete some keys, and the others when that is done."""
    some, rest = keys[:BATCH], keys[BATCH:]
    for key in some[:-1]:
        step.ask(questions.Write(), Delete(key))
    if some:
        step.ask(questions.Deleted(rest), Delete(some[-1]))


def on_deleted(node: NodeState, step: Step, answer: Answer[questions.Deleted, bool]) -> None:
    """Go on."""
    _delete(node, step, answer.question.rest)


def _count(value: bytes, most: int = _STALLS) -> int:
    """Read a number; what is none, or more than ``most``, does not keep the job from going on."""
    return min(int(value), most) if value.isdigit() and len(value) <= 18 else 0


def _leader(closed: bytes) -> int:
    try:
        return min(max(0, decode(Closed, closed, "closed").leader), _STALLS) if closed else 0
    except RendezvousStateError:
        return 0
