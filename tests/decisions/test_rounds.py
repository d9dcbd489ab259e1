"""The parts of the rendezvous core: ranks, records, heartbeats."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from dataclasses import fields
from typing import NamedTuple

import pytest

from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.messages import Answer, Join, Settings, Tick
from elastic_launch.core.rendezvous.monitor import LEFT, Monitor
from elastic_launch.core.rendezvous.monitoring import may_have_been_reset
from elastic_launch.core.rendezvous.node import begin, step
from elastic_launch.core.rendezvous.progress import joined_of
from elastic_launch.core.rendezvous.ranks import assign, choose
from elastic_launch.core.rendezvous.records import Closed, Members, NodeRecord, decode, encode
from elastic_launch.core.rendezvous.state import Heartbeat
from elastic_launch.core.store_requests import Reply
from elastic_launch.errors import ProcessFailure, RendezvousStateError
from elastic_launch.job import Assignment, Decision, End, EndKind, Goodput, LostTime, RestartHistory


def node(**changes: object) -> NodeRecord:
    record = NodeRecord("id", "host", 1, 2, "default")
    return record._replace(**changes)  # type: ignore[arg-type]


def test_ranks_are_dense_whatever_nodes_ask_for() -> None:
    chance = random.Random(7)
    for _ in range(2000):
        wishes = chance.sample(range(12), 8)
        nodes = {
            ticket: node(
                rank=wishes[ticket] if chance.random() < 0.5 else -1,
                previous_rank=chance.choice([-1, *range(8)]),
            )
            for ticket in chance.sample(range(8), chance.randint(1, 8))
        }
        most = chance.randint(1, 8)
        members, spares = choose(nodes, most)
        assert sorted([*members, *spares]) == sorted(nodes)
        assert len(members) == min(most, len(nodes))
        for rank, ticket in enumerate(members):
            if 0 <= nodes[ticket].rank < len(members):
                assert rank == nodes[ticket].rank


def test_global_and_role_ranks_follow_group_ranks() -> None:
    nodes = [node(workers=2, role="a"), node(workers=1, role="b"), node(workers=3, role="a")]
    assignments = assign(nodes, "", 29400, restart_count=4)
    assert [assignment.base_rank for assignment in assignments] == [0, 2, 3]
    assert [(assignment.base_role_rank, assignment.role_world_size) for assignment in assignments] == [
        (0, 5),
        (0, 1),
        (2, 5),
    ]
    assert {
        (assignment.world_size, assignment.group_world_size, assignment.agent_store, assignment.port_picked)
        for assignment in assignments
    } == {(6, 3, True, False)}


def test_without_a_shared_store_rank_0_serves_the_workers() -> None:
    nodes = [node(address="127.0.0.1", outward="10.0.0.7", port=4000), node(address="127.0.0.1", port=5000)]
    [assignment, _] = assign(nodes, "", 0)
    assert (assignment.master_addr, assignment.master_port, assignment.agent_store) == ("127.0.0.1", 4000, False)
    nodes[1] = nodes[1]._replace(address="10.0.0.8")
    assert assign(nodes, "", 0)[0].master_addr == "10.0.0.7", "others are not on this host"


FAILURE = ProcessFailure(0, 7, -9, error="ValueError: \u00e4", traceback="trace", failed_at=1.5, rank=3, host="host-a")


@pytest.mark.parametrize(
    "record",
    [
        node(rank=3),
        Closed(0, 2, 5, (4, 5)),
        Members((1, 2), ("a", "b"), ("x", "y")),
        End(EndKind.MEMBERSHIP_CHANGED, "why", "id", ("a",)),
        Decision(True, RestartHistory(1, 2, (0.5,), "x", goodput=Goodput(9, 0.5, lost=LostTime(1, 2))), (FAILURE,)),
        Assignment(0, 1, 0, 2, 2, 0, 2, "", 29400, "host", False, True, 3, RestartHistory(1)),
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_survive_the_store_and_nothing_else_passes_for_them(record: NamedTuple) -> None:
    data = encode(record)
    assert decode(type(record), data, "key") == record
    chance = random.Random(3)
    for _ in range(300):
        broken = bytearray(data)
        broken[chance.randrange(len(broken))] = chance.randrange(256)
        with contextlib.suppress(RendezvousStateError):
            decode(type(record), bytes(broken), "key")
    for nonsense in (b"", b"{}", b"[]", b"null", b"1", b"\xff", b"[" * 100_000, b'{"kind": 1}'):
        with pytest.raises(RendezvousStateError):
            decode(type(record), nonsense, "key")
    assert {field.name for field in fields(ProcessFailure)} >= {"rank", "host"}


@pytest.mark.parametrize(
    ("interval", "attempts", "stops_after", "ends_after"),
    [(5, 3, 9.5, 14), (1, 6, 4, 5.25), (1, 4, 3.5, 3.5), (1, 3, 2.625, 2.625)],
)
def test_a_short_deadline_leaves_time_for_a_late_reply_rather_than_for_a_checkpoint(
    interval: float, attempts: int, stops_after: float, ends_after: float
) -> None:
    settings = Settings("job", 1, 1, keep_alive_interval=interval, keep_alive_max_attempt=attempts)
    end = settings.keep_alive_deadline - settings.margin
    assert (end - settings.grace, end) == (stops_after, ends_after)


def test_silence_is_timed_by_the_one_who_watches() -> None:
    watch = Monitor(deadline=15, outage=9.5, now=0)
    watch.register([1, 2], 0)
    for now in range(1, 15):
        assert watch.poll([(1, b"%d" % now), (2, b"")], now, now) == set()
    assert watch.poll([(1, b"15"), (2, b"")], 15, 15) == {2}
    assert watch.take_resets() == [1]
    assert watch.take_resets() == []
    assert watch.poll([(1, b"%d" % LEFT)], 16, 16) == {1}


def test_a_counter_that_stands_still_is_no_sign_of_life() -> None:
    watch = Monitor(deadline=15, outage=9.5, now=0)
    watch.poll([(1, b"7"), (2, b"7")], 1, 1)
    assert not watch.has_lived_since(1, 0)
    assert watch.take_resets() == [1, 2]
    watch.poll([(1, b"0"), (2, b"1")], 2, 2)
    assert [watch.has_lived_since(ticket, 0) for ticket in (1, 2)] == [False, True]


def test_one_who_slept_does_not_take_the_others_for_dead() -> None:
    watch = Monitor(deadline=15, outage=9.5, now=0)
    watch.register([1], 0)
    assert watch.poll([(1, b"")], 100, 100) == set()


def test_only_what_exceeds_an_outage_is_forgiven() -> None:
    watch = Monitor(deadline=4, outage=2, now=0)
    watch.register([1, 2], 0)
    assert watch.poll([(1, b""), (2, b"1")], 2.6, 2.6) == set()
    assert watch.poll([(1, b""), (2, b"2")], 4, 4) == set()
    assert watch.poll([(1, b""), (2, b"3")], 4.7, 4.7) == {1}


def test_more_nodes_than_there_is_room_for_are_spares() -> None:
    leader = begin(node(), Settings("job", 2, 3))
    assert joined_of(leader, 3) == "3 of 2 to 3 nodes"
    assert joined_of(leader, 4) == "3 of 2 to 3 nodes and 1 spare"


def test_a_leader_reads_many_records_once_each_and_soon_however_slow_the_store_is() -> None:
    nodes = 6_144
    state = begin(node(), Settings("job", nodes, nodes))
    read = Counter[int]()
    ready = step(state, Join(), 0.0)
    for now in range(1, 20):  # an answer takes a second
        requests, ready = ready.requests, step(state, Tick(), now)
        for asked in requests:
            match asked.question:
                case questions.LearnRound():
                    value: Reply = [b"0"]
                case questions.DrawTicket():
                    value = 1
                case questions.PollJoining():
                    value = [b"0", b"", b"", b"%d" % nodes, b""]
                case questions.ReadRecords(tickets=tickets):
                    read.update(tickets)
                    names = ["id" if ticket == 1 else f"id-{ticket}" for ticket in tickets]
                    value = [encode(state.record._replace(node=name)) for name in names]
                case questions.CloseRound():
                    assert read == Counter(range(1, nodes + 1))
                    assert now < 10
                    return
                case questions.WriteRecord():
                    value = encode(state.record)
                case _:
                    continue
            more = step(state, Answer(asked.question, asked.round, value), now)
            ready = more._replace(requests=ready.requests + more.requests)
    raise AssertionError(f"{len(read)} records read, {max(read.values(), default=0)} times")


@pytest.mark.parametrize(
    ("before", "count", "repeats", "was_reset", "left"),
    [
        (0, 1, 0, True, 0),  # there was nothing to reset
        (3, 1, 0, True, 0),
        (1, 2, 0, False, 0),
        (1, 2, 1, True, 1),  # perhaps what was sent again has come now, after a reset
        (2, 3, 1, False, 1),
        (3, 2, 1, True, 0),  # it has, because there was one
        (5, 6, 1, False, 1),
        (5, 7, 1, False, 0),  # it has come, and there was no reset
        (2, 3, 2, True, 2),
        (4, 1, 2, True, 2),
    ],
)
def test_heartbeats_that_count_twice_do_not_hide_a_reset(
    before: int, count: int, repeats: int, was_reset: bool, left: int
) -> None:
    """A connection that was given up may bring them long afterwards."""
    heartbeat = Heartbeat(count=before, repeats=repeats)
    assert (may_have_been_reset(heartbeat, count), heartbeat.repeats) == (was_reset, left)
