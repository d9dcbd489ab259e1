"""A job keeps its store small: what nodes wrote in past rounds is deleted, and nobody misses it."""

from __future__ import annotations

import random

import pytest

from elastic_launch.core.job_view import MAX_ROUNDS
from elastic_launch.core.rendezvous import forgetting
from elastic_launch.core.rendezvous.forgetting import KEPT_ROUNDS
from elastic_launch.rendezvous.store_link import Timeouts
from tests.support.simulation import Agent, World
from tests.support.worlds import SETTINGS, all_end, form, running, world

OUTCOME = {"closed", "end"}


def keys_of(made: World, number: int) -> set[str]:
    """Return what the store holds of a round."""
    prefix = f"elastic/job/{number}/"
    return {key.removeprefix(prefix) for key in made.store.values if key.startswith(prefix)}


def restart(made: World, count: int, times: int = 1) -> None:
    """Have some nodes begin further rounds."""
    for _ in range(times):
        before = max(number for number in running(made) if number is not None)
        next(agent for agent in made.agents if agent.running == before).request_restart()
        made.run(made.now + 100, stop=lambda after=before + 1: running(made).count(after) >= count)  # type: ignore[misc]
        assert running(made).count(before + 1) >= count, f"{made}: {running(made)}"
    made.run(made.now + 0.5)  # what is to be deleted is


def test_a_round_that_is_over_leaves_its_outcome() -> None:
    assert KEPT_ROUNDS >= MAX_ROUNDS, "all that is shown"
    made = world(3)
    form(made, 3)
    restart(made, 3)
    assert "node/1" in keys_of(made, 0), "nodes that join read of the round before"
    restart(made, 3, 2)
    assert [keys_of(made, number) for number in range(2)] == [OUTCOME] * 2
    assert {"node/3", "ticket"} <= keys_of(made, 2) & keys_of(made, 3)


def test_the_store_of_a_job_with_many_rounds_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some keys are deleted at a time, and the outcome of a round later than the rest."""
    monkeypatch.setattr(forgetting, "KEPT_ROUNDS", 4)
    monkeypatch.setattr(forgetting, "BATCH", 7)
    made = world(3)
    form(made, 3)
    restart(made, 3, 8)
    before = len(made.store.values)
    restart(made, 3, 4)
    assert abs(len(made.store.values) - before) <= 4, "heartbeats come and go"
    assert [keys_of(made, number) for number in (6, 7, 8, 10)] == [set(), OUTCOME, OUTCOME, OUTCOME]


def test_what_a_leader_could_not_complete_the_next_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(3)
    form(made, 3)
    restart(made, 3)
    delete = forgetting._delete
    monkeypatch.setattr(forgetting, "_delete", lambda node, step, keys: delete(node, step, keys[: len(keys) // 3]))
    restart(made, 3)
    assert keys_of(made, 0) > OUTCOME
    monkeypatch.undo()
    restart(made, 3)
    assert keys_of(made, 0) == keys_of(made, 1) == OUTCOME


def test_keys_that_a_stranger_writes_cost_little() -> None:
    made = world(3)
    form(made, 3)
    restart(made, 3)
    prefix = "elastic/job/0/"
    made.store.values |= {f"{prefix}stall": b"9" * 12, f"{prefix}look": b"nonsense", f"{prefix}closed": b"[]"}
    restart(made, 3)
    assert keys_of(made, 0) == OUTCOME


def test_a_node_that_was_away_for_some_rounds_finds_the_others() -> None:
    rounds: set[int] = set()
    for seed in range(8):
        try:
            rounds.add(stay_away(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: stay_away({seed}) shows it again") from error
    assert max(rounds) >= 3


def stay_away(seed: int) -> int:
    """A node is away: leader, monitor, standby, member or spare; frozen, cut off, or both; waiting or running.

    Returns:
        The number of the round that all are in at the end.
    """
    chance = random.Random(seed)
    made = World(seed, SETTINGS._replace(max_nodes=chance.choice([3, 4])), Timeouts(store=1000))
    made.trouble = seed % 2 > 0
    for _ in range(4):
        made.add()
    if chance.random() < 0.3:  # while the nodes join
        made.run(made.now + chance.uniform(0, 1))
    else:
        form(made, min(4, made.settings.max_nodes))
    victim: Agent = chance.choice(made.agents)
    away = chance.uniform(35, 60)
    strikes = [victim.freeze, victim.disconnect, victim.stall]
    for strike in chance.sample(strikes, chance.choice([1, 1, 2])):
        strike(away)
    back_at = made.now + away
    others = [agent for agent in made.agents if agent is not victim]

    def have_begun(number: int) -> bool:
        return sum(agent.running == number for agent in others) >= 2

    made.run(back_at, stop=lambda: any(map(have_begun, range(4))))
    while made.now < back_at:
        number = max((agent.running for agent in others if agent.running is not None), default=None)
        if number is None:  # the network has just ended a round
            made.run(min(back_at, made.now + 1))
            continue
        chance.choice([agent for agent in others if agent.running == number]).request_restart()
        made.run(back_at, stop=lambda after=number + 1: have_begun(after))  # type: ignore[misc]
        made.run(min(back_at, made.now + chance.uniform(0.5, 3)))
    made.trouble = False
    made.run(made.now + 100)
    assert len(made.live()) == 4, f"{made}: {[agent.finish for agent in made.agents]}"
    numbers = [number for number in running(made) if number is not None]
    assert len(numbers) == min(4, made.settings.max_nodes), f"{made}: {running(made)}"
    assert len(set(numbers)) == 1, f"{made}: {running(made)}"
    all_end(made)
    return max(numbers)
