"""How nodes agree that a whole job stalls, and collect the stacks of all workers: with delays, losses, and bad luck."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic_launch.core.progress.messages import (
    AllStalled,
    Judged,
    RequestStacks,
    StacksArrived,
    StacksComplete,
    StacksWanted,
    WithdrawClaim,
)
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.job import Policy
from tests.support.simulation import World
from tests.support.stalls import VERDICT, Watch
from tests.support.worlds import seeds


def running(seed: int = 1, count: int = 3, *, trouble: bool = False) -> tuple[World, list[Watch]]:
    """A job whose nodes all run."""
    world = World(seed, Settings("job", count, count, policy=Policy(max_restarts=3)))
    world.trouble = trouble
    watches = [Watch(world.add(rank=number)) for number in range(count)]
    world.run(1200.0, lambda: all(agent.running is not None for agent in world.agents))
    return world, watches


def monitor(watches: list[Watch]) -> Watch:
    """That of the node with group rank 0."""
    return next(watch for watch in watches if watch.agent.state.assignment.group_rank == 0)  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [2, 3, 9, 80])
def test_when_all_claim_the_stacks_of_all_reach_one_node_and_its_verdict_all(count: int) -> None:
    world, watches = running(count=count)
    for watch in watches:
        watch.claim()
    world.run(world.now + 2.0, lambda: all(watch.of(AllStalled) for watch in watches))
    assert all(watch.of(AllStalled) == [AllStalled(1)] for watch in watches)
    world.run(world.now + 3.0)
    judge = monitor(watches)
    assert {event.stacks.host for event in judge.of(StacksArrived)} == {watch.agent.name for watch in watches}  # type: ignore[union-attr]
    assert judge.of(StacksComplete) == [StacksComplete(1)]
    assert all(watch.of(Judged) == [Judged(1, VERDICT, 3, "the stacks")] for watch in watches)
    assert not any(watch.of(StacksArrived) for watch in watches if watch is not judge)


def test_one_node_that_goes_on_keeps_the_job_from_stalling() -> None:
    world, watches = running()
    for watch in watches[1:]:
        watch.claim()
    world.run(world.now + 60)
    assert not any(watch.events for watch in watches)


def test_a_claim_that_was_withdrawn_does_not_count() -> None:
    world, watches = running()
    watches[1].claim()
    world.run(world.now + 3)
    watches[1].ask(WithdrawClaim())
    world.run(world.now + 1)
    for watch in (watches[0], watches[2]):
        watch.claim()
    world.run(world.now + 60)
    assert not any(watch.events for watch in watches)


@pytest.mark.parametrize("done", [0, 1])
def test_nodes_whose_workers_have_succeeded_need_not_claim(done: int) -> None:
    world, watches = running()
    watches[done].agent.succeed()
    world.run(world.now + 1)
    stalled = [watch for watch in watches if watch is not watches[done]]
    for watch in stalled:
        watch.claim()
    world.run(world.now + 5)
    assert all(watch.of(Judged) for watch in stalled)


def test_a_node_that_sends_no_stacks_is_named() -> None:
    world, watches = running()
    watches[2].is_mute = True
    for watch in watches:
        watch.claim()
    world.run(world.now + 10)
    assert monitor(watches).of(StacksComplete) == [StacksComplete(1, ("host-2",))]
    assert all(watch.of(Judged) for watch in watches[:2])


def test_a_job_may_stall_again() -> None:
    world, watches = running()
    for number in (1, 2, 3):
        for watch in watches:
            watch.claim()
        world.run(world.now + 5)
        assert all(watch.of(AllStalled)[-1] == AllStalled(number) for watch in watches)
        assert all(watch.of(Judged)[-1] == Judged(number, VERDICT, 3, "the stacks") for watch in watches)
        for watch in watches:
            watch.ask(WithdrawClaim())
        world.run(world.now + 5)


def test_nobody_asks_for_more_while_the_job_makes_progress_or_once_the_verdict_is_known() -> None:
    def asked(world: World, seconds: float = 100.0) -> int:
        before = sum(agent.asked for agent in world.agents)
        world.run(world.now + seconds)
        return sum(agent.asked for agent in world.agents) - before

    world, watches = running()
    steady = asked(world)
    for watch in watches:
        watch.claim()
    world.run(world.now + 10)
    assert abs(asked(world) - steady) <= 3


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize("asking", [0, 1])
def test_the_stacks_of_nodes_that_are_well_can_be_asked_for(count: int, asking: int) -> None:
    world, watches = running(count=count)
    for number in (1, 2):
        watches[asking].ask(RequestStacks())
        world.run(world.now + 15)
        assert all(watch.of(StacksWanted)[-1] == StacksWanted(-number) for watch in watches)
        assert watches[asking].of(Judged)[-1] == Judged(-number, VERDICT, 3, "the stacks")
        arrived = [event.stacks.host for event in monitor(watches).of(StacksArrived)]  # type: ignore[union-attr]
        assert sorted(arrived[-count:]) == sorted(watch.agent.name for watch in watches)
    assert sum(len(watch.of(Judged)) for watch in watches) == 2, "only who has asked hears of it"
    world.run(world.now + 100)
    assert all(watch.agent.running == 0 for watch in watches), "nobody was taken for dead"
    for watch in watches:
        watch.claim()
    world.run(world.now + 10)
    assert all(watch.of(AllStalled) for watch in watches), "a stall is still noticed"


def test_a_node_that_dies_is_noticed_as_soon_although_stacks_are_asked_for() -> None:
    for seed in seeds(0, 25):
        world, watches = running(seed, 3, trouble=True)
        asking, dying = world.random.choice(watches), world.random.choice(watches)
        for _ in range(5):
            world.after(world.random.uniform(0, 40), lambda asking=asking: asking.ask(RequestStacks()))  # type: ignore[misc]
        world.run(world.now + world.random.uniform(10, 20))
        if all(watch.agent.part == 0 for watch in watches):  # no connection was bad for so long
            killed_at = world.now
            dying.agent.kill()
            others = [watch.agent for watch in watches if watch is not dying]
            world.run(killed_at + 60, lambda others=others: not any(agent.part == 0 for agent in others))  # type: ignore[misc]
            assert world.now <= killed_at + world.settings.keep_alive_deadline + 10, f"{world}: noticed too late"


def lose(world: World, watches: list[Watch]) -> None:
    world.random.choice(watches).agent.kill()


def disconnect(world: World, watches: list[Watch]) -> None:
    world.random.choice(watches).agent.disconnect(world.random.uniform(0, 3))


def freeze(world: World, watches: list[Watch]) -> None:
    world.random.choice(watches).agent.freeze(world.random.uniform(0, 30))


def fail(world: World, watches: list[Watch]) -> None:
    world.random.choice(watches).agent.fail_worker()


def nothing(world: World, watches: list[Watch]) -> None:
    """All goes well."""


@pytest.mark.parametrize("bad_luck", [nothing, lose, disconnect, freeze, fail])
@pytest.mark.parametrize("some_go_on", [True, False])
def test_in_any_order_of_events_no_job_stalls_that_makes_progress(
    bad_luck: Callable[[World, list[Watch]], None], some_go_on: bool
) -> None:
    for seed in seeds(0, 25):
        world, watches = running(seed, world_size := 2 + seed % 4, trouble=True)
        going_on = set(world.random.sample(range(world_size), 1)) if some_go_on else set()
        for number, watch in enumerate(watches):
            if number not in going_on:
                world.after(world.random.uniform(0, 2), lambda watch=watch: watch.claim())  # type: ignore[misc]
        world.after(world.random.uniform(0, 3), lambda: bad_luck(world, watches))  # noqa: B023 - run below
        world.run(world.now + 100)
        stalled = [watch for watch in watches if watch.of(AllStalled)]
        if some_go_on:
            assert not stalled, f"{world}: a node goes on"
        judged = [watch.of(Judged) for watch in watches]
        assert all(len(events) <= 1 for events in judged), f"{world}: judged twice"
        if not some_go_on and world.live() and all(watch.agent.node.round.number == 0 for watch in watches):
            assert all(judged), f"{world}: not judged"
        assert world.live() or bad_luck in (lose, freeze), f"{world}: the job goes on or re-forms"
