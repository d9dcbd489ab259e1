"""Simulated jobs: how most of them begin, and how they end."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings

from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.job import Policy
from tests.support.simulation import World

RESET = "RuntimeError: Connection reset by peer"
SETTINGS = Settings("job", 2, 3, join_timeout=600, last_call_timeout=10, policy=Policy(3))


def world(count: int, settings: Settings = SETTINGS, *, seed: int = 1, calm: bool = True, token: bytes = b"") -> World:
    """Return a job whose nodes have just been started."""
    made = World(seed, settings)
    made.token = token
    made.trouble = not calm
    for _ in range(count):
        made.add()
    return made


def seeds(block: int, count: int) -> range:
    """Return the seeds of a block of random schedules: ``count``, or 20 times as many in the profile "long"."""
    if settings.get_current_profile_name() == "long":
        count *= 20
    return range(block * count, (block + 1) * count)


def come_right(made: World, is_right: Callable[[], bool], at_least: float = 60) -> None:
    """Let some seconds pass without trouble, and more, up to 300, while the job is not as it should be."""
    made.trouble = False
    end = made.now + 300
    made.run(made.now + at_least)
    while made.now < end and not is_right():
        made.run(made.now + 20)


def running(made: World) -> list[int | None]:
    """Return the round that each node runs; None: it runs none."""
    return [agent.running for agent in made.agents]


def form(made: World, count: int) -> None:
    """Let time pass until so many nodes run, in one round."""
    made.run(made.now + 200, stop=lambda: sum(agent.running is not None for agent in made.agents) == count)
    rounds = {agent.running for agent in made.agents} - {None}
    assert len(rounds) == 1, f"{made}: {running(made)}"


def all_end(made: World) -> None:
    """Let the workers succeed, until every agent has ended."""

    def step() -> bool:
        for agent in made.agents:
            agent.succeed_worker()
        return not made.live()

    made.run(made.now + 1000, stop=step)
    assert not made.live(), f"{made}: {[agent.node.phase for agent in made.live()]}"
