"""Account for a job's time: in steps, at startup, lost to restarts and to stalls; and count steps, also repeated ones.

The account, a ``Goodput``, is part of the job's restart history. When a round is over, each node adds what its own
workers made to the account that the round began with. Steps are timed by CLOCK_MONOTONIC, the agent's clock. Only
durations go to other nodes, because the clocks of two hosts cannot be compared; each node adds its own seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from elastic_launch.core.text import counted, duration
from elastic_launch.job import Goodput, LostTime

MAX_STEPS = 1 << 53
"""More steps are not counted, because workers write the numbers. All nodes refuse greater ones."""


class RoundProgress(NamedTuple):
    """What the workers of one node made in one round: the rank that made most steps stands for all.

    Workers write these numbers, so nothing here is taken for granted: ``with_round`` keeps them within the round.
    """

    steps: int = 0
    first: float = 0.0
    """When the first step ended, in seconds of CLOCK_MONOTONIC."""
    last: float = 0.0
    """When the latest step ended, on the same clock."""
    first_number: int = -1
    """The number that the script gave to its first step of the round; -1: it numbers none."""
    last_number: int = -1
    """The number that it gave to its latest step; -1: it numbers none."""
    stalled: float = 0.0
    """Seconds between the first and the latest step in which the workers were found stalled."""


class Counts(Protocol):
    """What one worker counts, as ``round_progress`` needs it."""

    @property
    def iterations(self) -> int:
        """Number of steps."""

    @property
    def first(self) -> float:
        """When the first step ended, in seconds of CLOCK_MONOTONIC."""

    @property
    def last(self) -> float:
        """When the latest step ended, on the same clock."""

    @property
    def first_number(self) -> int | None:
        """The number that the script gave to its first step; None: it numbers none."""

    @property
    def number(self) -> int | None:
        """The number that it gave to its latest step; None: it numbers none."""


def round_progress(workers: Iterable[Counts], stalled: float = 0.0) -> RoundProgress:
    """Return what a node's workers made in a round.

    Args:
        workers: what each of them counted.
        stalled: seconds in which they were found stalled, and went on.
    """
    most = max(workers, key=lambda worker: (worker.iterations, worker.last), default=None)
    if most is None:
        return RoundProgress()
    first_number, last_number = (-1 if it is None else it for it in (most.first_number, most.number))
    return RoundProgress(most.iterations, most.first, most.last, first_number, last_number, stalled)


def with_round(past: Goodput, progress: RoundProgress, began: float, over: float, gone: float, now: float) -> Goodput:
    """Add a round to a job's account.

    The first step of a round has no beginning that anybody saw, so its duration counts as startup, or as lost to the
    restart. So does a whole round without a step. For a round that still runs, pass ``now`` four times.

    Args:
        past: the job's account when the round began.
        progress: what the round's workers made.
        began: when the node got its assignment; like all times here, in seconds of CLOCK_MONOTONIC.
        over: when the node began to stop its workers, or the last of them ended.
        gone: when no process of the round was left.
        now: the time up to which the account goes.
    """
    steps = max(0, progress.steps)
    gone = max(began, gone)
    first = _within(progress.first, began, gone) if steps else gone
    last = _within(progress.last, first, gone)
    over = _within(over, last, gone)
    stalled = _within(progress.stalled, 0.0, last - first)
    idle = past.since._replace(start=first - began)
    is_restart = past.steps > 0
    return past._replace(
        steps=min(MAX_STEPS, past.steps + steps),
        in_steps=_ms(past.in_steps + last - first - stalled),
        startup=past.startup if is_restart else _ms(past.startup + idle.total),
        restarts=past.restarts + is_restart,
        lost=LostTime(*(_ms(sum(both)) for both in zip(past.lost, idle, strict=True))) if is_restart else past.lost,
        stalled=_ms(past.stalled + stalled),
        repeated=min(MAX_STEPS, past.repeated + _repeated(past, progress)),
        number=min(MAX_STEPS, max(past.number, progress.last_number)),
        since=LostTime(_ms(over - last), _ms(gone - over), _ms(max(0.0, now - gone))),
    )


def aged(goodput: Goodput, seconds: float) -> Goodput:
    """Return the account some seconds later, in which no worker ran; an account that has not begun stays empty."""
    if goodput == Goodput():
        return goodput
    since = goodput.since
    return goodput._replace(since=since._replace(rendezvous=_ms(since.rendezvous + seconds)))


def furthest(one: Goodput, other: Goodput) -> Goodput:
    """Return the account with more steps: of two nodes, or of a decision and the node that reads it.

    If both have the same, the round that one of them lacks was without a step, or it is the older one.
    """
    return max(one, other, key=lambda it: (it.steps, it.restarts, it.elapsed))


def summary(goodput: Goodput) -> str:
    """Return the account in a few words; empty if no step was counted.

    For example ``12,480 steps, 97.3 % of 4 h 10 min in steps, 2 restarts cost 41 s and 120 repeated steps``.
    """
    elapsed = goodput.elapsed
    if not (goodput.steps > 0 and 0 < elapsed < float("inf")):
        return ""
    parts = [
        counted(goodput.steps, "step"),
        f"{100 * goodput.in_steps / elapsed:.1f} % of {duration(elapsed)} in steps",
    ]
    if goodput.restarts:
        repeated = f" and {counted(goodput.repeated, 'repeated step')}" if goodput.repeated else ""
        parts.append(f"{counted(goodput.restarts, 'restart')} cost {duration(goodput.lost.total)}{repeated}")
    if goodput.stalled:
        parts.append(f"stalls cost {duration(goodput.stalled)}")
    return ", ".join(parts)


def _repeated(past: Goodput, progress: RoundProgress) -> int:
    """Return how many steps of a round have a number that the job had reached before."""
    if past.number < 0 or progress.first_number < 0:
        return 0
    return max(0, min(past.number, progress.last_number) - progress.first_number + 1)


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _ms(seconds: float) -> float:
    """Round to milliseconds, to keep records short."""
    return round(seconds, 3)
