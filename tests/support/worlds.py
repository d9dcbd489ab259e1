"""Simulated jobs: how most of them begin, and how they end."""

from __future__ import annotations

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
