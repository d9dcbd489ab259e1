"""Play random schedules on all cores: ``python -m tests.simulation [COUNT [SEED]]``. The first failure ends it.

A schedule that fails is played again with fewer and fewer faults, as long as it fails. What is left is shown with the
log of every node, and with the command that plays it again: ``python -m tests.simulation again KIND SEED FAULT ...``,
where the faults are those that are left out, and ``calm`` stands for those of the network.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.decisions import test_lifecycle
from tests.simulation import test_forgetting, test_rendezvous, test_same_step, test_table
from tests.support.simulation import World

CHUNK = 100
"""Number of seeds that a process plays before it reports."""


class Kind(NamedTuple):
    """One kind of schedule."""

    play: Callable[[int], object]
    share: int
    """How many of a hundred schedules are of this kind: fewer of those that take long."""


KINDS = {
    "events": Kind(test_lifecycle.play, 50),  # of one agent, in any order
    "stores": Kind(test_table.rough, 20),  # that end, restart and forget
    "same-step": Kind(test_same_step.play, 15),
    "rounds": Kind(test_rendezvous.play, 12),
    "restarts": Kind(test_rendezvous.restart_often, 2),  # that the user asks for
    "away": Kind(test_forgetting.stay_away, 1),  # a node, for some rounds
}


class Failure(NamedTuple):
    """A schedule that failed."""

    kind: str
    seed: int
    left_out: frozenset[int] = frozenset()
    calm: bool = False
    text: str = ""
    """The traceback."""

    def command(self) -> str:
        """Return how to play it again."""
        without = ["calm"] * self.calm + list(map(str, sorted(self.left_out)))
        return " ".join(["python -m tests.simulation again", self.kind, str(self.seed), *without])


def attempt(case: Failure) -> Failure | None:
    """Play a schedule. Return it with the traceback if it fails."""
    World.left_out, World.is_calm, World.latest = case.left_out, case.calm, None
    try:
        KINDS[case.kind].play(case.seed)
    except Exception:
        return case._replace(text=traceback.format_exc())
    finally:
        World.left_out, World.is_calm = frozenset(), False
    return None


def shrink(failure: Failure) -> Failure:
    """Leave out faults one by one, as long as the schedule fails. Leaves the smallest one in ``World.latest``."""
    smallest = attempt(failure) or failure
    count = World.latest.faults if World.latest else 0
    if World.latest:
        smallest = attempt(smallest._replace(calm=True)) or smallest
    for number in range(count):
        smallest = attempt(smallest._replace(left_out=smallest.left_out | {number})) or smallest
    attempt(smallest)
    return smallest


def kind_of(seed: int) -> str:
    """Return of which kind the schedule with a seed is."""
    kinds = [name for name, kind in KINDS.items() for _ in range(kind.share)]
    return kinds[seed % len(kinds)]


def play_chunk(seeds: range) -> tuple[Counter[str], Failure | None]:
    """Play some schedules. Return how many of each kind, and the first that failed."""
    played: Counter[str] = Counter()
    for seed in seeds:
        kind = kind_of(seed)
        played[kind] += 1
        if failure := attempt(Failure(kind, seed)):
            return played, failure
    gc.collect()
    return played, None


def chunks(first: int, count: int) -> Iterator[range]:
    """Yield the seeds in chunks."""
    for start in range(first, first + count, CHUNK):
        yield range(start, min(start + CHUNK, first + count))


def show(failure: Failure) -> None:
    """Print a schedule that failed: the smallest one, with the nodes' logs."""
    print(f"\n{failure.text}")
    for agent in World.latest.agents if World.latest else ():
        print(f"{agent.name}:", *(f"    {text}" for _, text in agent.logged), sep="\n")
    print(f"\nto play it again: {failure.command()}", flush=True)


def main(count: int, first: int, processes: int) -> int:
    """Return the exit status: 1 after a failure."""
    print(f"seeds {first} to {first + count - 1}, {processes} processes", flush=True)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection after each chunk is enough, and saves a tenth of the time
    began = shown = time.monotonic()
    played: Counter[str] = Counter()
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for some, failure in pool.imap_unordered(play_chunk, chunks(first, count)):
                played += some
                if failure:
                    pool.terminate()
                    print(f"{failure.kind}, seed {failure.seed}: failed; looking for fewer faults", flush=True)
                    show(shrink(failure))
                    return 1
                if time.monotonic() > shown + 10:
                    shown = time.monotonic()
                    print(f"{played.total()} schedules, {played.total() / (shown - began):.0f} a second", flush=True)
    finally:
        gc.enable()
        gc.unfreeze()
    seconds = time.monotonic() - began
    kinds = ", ".join(f"{number} {kind}" for kind, number in played.most_common())
    print(f"{played.total()} schedules passed in {seconds:.0f} s, {count / seconds:.0f} a second: {kinds}")
    return 0


def again(kind: str, seed: int, without: list[str]) -> int:
    """Play one schedule without some of its faults. Return the exit status."""
    left_out = frozenset(int(number) for number in without if number != "calm")
    failure = attempt(Failure(kind, seed, left_out, "calm" in without))
    if failure:
        show(failure)
    return int(failure is not None)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["again"]:
        sys.exit(again(words[1], int(words[2]), words[3:]))
    number, begin = [*map(int, words), *(1_000_000, 0)[len(words) :]]
    sys.exit(main(number, begin, os.cpu_count() or 1))
