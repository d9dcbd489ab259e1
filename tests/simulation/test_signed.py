"""Jobs with a token: who does not know it can at most end them with one clear line, and never joins or steers them."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from elastic_launch.core.agent.messages import Finish
from elastic_launch.core.rendezvous.records import Closed, Consequence, Members, Unfit, as_lines, encode
from elastic_launch.core.store_requests import Add, Append, Delete, Get, Request, Set, Swap
from elastic_launch.errors import RendezvousStateError
from elastic_launch.job import Assignment, Decision, Policy
from elastic_launch.rendezvous.signing import Signer
from tests.support.forging import (
    DEADLINE,
    DONE,
    ERROR,
    FAILED,
    FAILURE,
    FINAL,
    NONSENSE,
    SICK,
    STOP,
    STRANGER,
    forge,
    formed,
    job,
    refused,
)
from tests.support.simulation import World
from tests.support.stalls import Watch
from tests.support.worlds import RESET, all_end, form, running, seeds, world

TOKEN = b"0123456789abcdef0123456789abcdef"
OTHER = b"another token, of another job..."
NOT_SIGNED = "is not signed with this node's token: give all nodes of a job the same --token-file"
PREFIX = "elastic/job/"


def lines(made: World, text: str) -> list[str]:
    return [line for agent in made.agents for line in agent.shown() if text in line]


def signer(token: bytes = TOKEN, run_id: str = "job") -> Signer:
    return Signer(token, run_id, lambda line: None)


def restart(made: World, number: int) -> None:
    """Let a worker of a node fail, and wait for the next round of all nodes."""
    before = max(made.assignments)
    made.agents[number].fail_worker(3)
    live = made.live()
    made.run(made.now + 4 * DEADLINE, stop=lambda: all((agent.running or 0) > before for agent in live))
    assert {agent.running for agent in live} == {before + 1}


# --- what a signature covers


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        (Set(((f"{PREFIX}0/members/0", b"{}"),)), f"{PREFIX}0/members/0"),
        (Swap(f"{PREFIX}0/end", b"", b"{}"), f"{PREFIX}0/end"),
        (Swap(f"{PREFIX}round", b"3", b"{}"), f"{PREFIX}round"),
    ],
)
def test_what_is_sealed_can_be_opened_under_its_own_key_only(request_: Request, key: str) -> None:
    match signer().seal(request_):
        case Set(((_, value),)) | Swap(_, _, value):
            pass
    assert value != b"{}"
    assert signer().open(Get((key,)), [value]) == [b"{}"]
    lost = f"{PREFIX}0/lost", f"{PREFIX}1/lost"
    for other, name in ((signer(OTHER), key), (signer(run_id="JOB"), key), *((signer(), name) for name in lost)):
        with pytest.raises(RendezvousStateError, match="is not signed with this node's token"):
            other.open(Swap(name, b"", b"x"), value)


def test_what_was_cut_or_changed_is_no_good() -> None:
    [(key, value)] = signer().seal(Set(((f"{PREFIX}0/status", b"0123456789"),))).items  # type: ignore[union-attr]
    bad = [value[:at] for at in range(1, len(value))] + [value + b"x", b"#" * 44, value[1:], b"\xff" * 90]
    bad += [value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :] for at in range(len(value))]
    assert signer().open(Get((key,) * len(bad)), bad) == [b""] * len(bad)


def test_lines_are_signed_one_by_one_and_others_are_left_out() -> None:
    key = f"{PREFIX}0/unfit"
    sealed = signer().seal(Append(key, b"one\ntwo\n"))
    assert isinstance(sealed, Append)
    assert signer().open(Get((key,)), [b"junk\n" + sealed.value + b"#more\n\n"]) == [b"one\ntwo\n"]
    assert signer().open(Get((key,)), [b""]) == [b""]


def test_a_line_without_its_end_does_not_spoil_those_of_members() -> None:
    key = f"{PREFIX}0/unfit"
    sealed = signer().seal(Append(key, as_lines([b"one", b"two"])))
    assert isinstance(sealed, Append)
    assert signer().open(Get((key,)), [b"junk" + sealed.value + b"junk"]) == [b"one\ntwo\n"]


@pytest.mark.parametrize("name", ["ticket", "heartbeat/3", "succeeded", "reported", "left"])
def test_counters_stay_numbers(name: str) -> None:
    key = f"{PREFIX}0/{name}"
    assert signer().seal(Add(key, 1)) == Add(key, 1)
    assert signer().seal(Set(((key, b"0"),))) == Set(((key, b"0"),))
    assert signer().open(Get((key,)), [b"7"]) == [b"7"]


def test_a_counter_that_is_not_listed_is_noticed() -> None:
    with pytest.raises(AssertionError):
        signer().seal(Add(f"{PREFIX}0/decision", 1))


def test_an_id_that_is_no_text_is_left_to_the_store_to_refuse() -> None:
    key = "elastic/\udcff/0/end"
    sealed = signer(run_id="\udcff").seal(Swap(key, b"", b"{}"))
    assert signer(run_id="\udcff").open(sealed, sealed.desired) == b"{}"  # type: ignore[union-attr]


def test_of_what_is_ignored_few_keys_are_named() -> None:
    said: list[str] = []
    keys = tuple(f"{PREFIX}0/node/{number}" for number in range(1000))
    for _ in range(3):
        assert Signer(TOKEN, "job", said.append).open(Get(keys), [b"{}"] * 1000) == [b""] * 1000
        assert 1 <= len(said) <= 30
        assert said[0] == f"ignored: {PREFIX}0/node/0 {NOT_SIGNED}, and another job another --rdzv-id"


# --- a job among themselves


@pytest.mark.parametrize("seed", range(3))
def test_nodes_with_a_token_do_what_others_do(seed: int) -> None:
    """They meet, restart after a failure with its consequence, lose a node, replace it, and end well."""
    made = world(3, job(2, 3), seed=seed, calm=False, token=TOKEN)
    form(made, 3)
    made.agents[1].fail_worker(1, RESET)
    restart(made, 2)
    made.agents[0].kill()
    made.run(made.now + 5 * DEADLINE, stop=lambda: running(made)[1:] == [2, 2])
    made.add()
    made.run(made.now + 5 * DEADLINE, stop=lambda: running(made)[1:] == [3, 3, 3])
    assert running(made)[1:] == [3, 3, 3], running(made)
    all_end(made)
    assert [agent.finish for agent in made.agents[1:]] == [Finish()] * 3
    assert not lines(made, "is not signed")
    values = made.store.values
    bare = {key.split("/", 3)[-1] for key, value in values.items() if not value.startswith(b"#")}
    assert {name.partition("/")[0] for name in bare} <= {"ticket", "heartbeat", "succeeded", "reported", "left"}
    assert not {"succeeded/1", "succeeded/2"} & bare
    assert not [key for key, value in values.items() if TOKEN in value]


def test_nodes_with_a_token_agree_on_stalls_and_health() -> None:
    made = World(1, job(2, 3))
    made.token = TOKEN
    made.trouble = False
    made.check = lambda agent: (0.5, agent.number != 2)
    watches = [Watch(made.add()) for _ in range(2)]
    made.add()
    form(made, 2)
    assert lines(made, "health check failed: GPU 3: fell off the bus (exit code 1)")
    for watch in watches:
        watch.claim()
    made.run(made.now + DEADLINE)
    assert all(watch.events for watch in watches)
    assert not lines(made, "is not signed")


@pytest.mark.parametrize("first", [TOKEN, b""])
@pytest.mark.parametrize("second", [TOKEN, OTHER, b""])
def test_a_node_without_the_jobs_token_says_so_within_seconds_and_harms_nobody(first: bytes, second: bytes) -> None:
    made = world(1, job(2, 2), token=first)
    made.run(made.now + 2)
    made.token = second
    stranger = made.add()
    made.run(made.now + 3)
    if first == second:
        assert running(made) == [0, 0]
        return
    assert stranger.finish is not None
    assert stranger.finish.status == 69
    what = NOT_SIGNED if second else "is signed with a token, and this node has none: give all nodes of a job the same"
    assert f"elastic/job/round {what}" in stranger.finish.error
    assert made.agents[0].finish is None
    made.token = first
    made.add()
    made.run(made.now + DEADLINE)
    assert (made.agents[0].running, made.agents[2].running) == (0, 0)


# --- strangers


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("end", DONE),
        ("end", STOP),
        ("end", ERROR),
        ("end", FAILED),
        ("end", NONSENSE),
    ],
)
def test_a_key_that_is_taken_ends_the_job_with_a_line(name: str, record: NamedTuple | bytes) -> None:
    made = formed(3, job(3, 3), TOKEN)
    forge(made, f"0/{name}", record)
    refused(made, f"0/{name}", NOT_SIGNED)


@pytest.mark.parametrize("decision", [FINAL, Decision(True)])
def test_a_decision_of_strangers_charges_nobody(decision: Decision) -> None:
    made = formed(3, job(3, 3), TOKEN)
    forge(made, "0/decision", decision)
    made.agents[1].fail_worker(1)
    refused(made, "0/decision", NOT_SIGNED)


def test_a_round_that_strangers_close_ends_with_a_line() -> None:
    made = world(2, job(3, 3), token=TOKEN)
    made.run(made.now + 2)
    forge(made, "0/closed", Closed(0, 2, 2))
    refused(made, "0/closed", NOT_SIGNED)


def test_a_round_number_of_strangers_ends_with_a_line() -> None:
    made = world(0, job(2, 2), token=TOKEN)
    forge(made, "round", b"7")
    made.add()
    made.add()
    refused(made, "round", NOT_SIGNED)


def test_a_stranger_does_not_join_and_costs_little() -> None:
    made = world(1, job(2, 3), token=TOKEN)
    made.run(made.now + 2)
    before = made.agents[0].asked
    for ticket in (2, 3, 4):
        forge(made, f"0/node/{ticket}", STRANGER, options=made.settings.options, node=f"nobody-{ticket}")
    forge(made, "0/ticket", b"3")
    made.run(made.now + DEADLINE)
    assert running(made) == [None]
    assert made.agents[0].asked - before < 12 * DEADLINE, "one request after another"
    assert len(lines(made, f"ignored: elastic/job/0/node/2 {NOT_SIGNED}")) == 1
    for _ in range(2):  # the first of them gets a ticket whose record is taken
        made.add()
    made.run(made.now + 2 * DEADLINE)
    assert made.agents[1].finish is not None
    assert f"elastic/job/0/node/4 {NOT_SIGNED}" in made.agents[1].finish.error
    assert (made.agents[0].running, made.agents[2].running) == (0, 0)


@pytest.mark.parametrize("token", [TOKEN, b""])
def test_two_nodes_with_one_ticket_do_not_get_one_place(token: bytes) -> None:
    """The world sees to it that no rank of a round is given twice."""
    made = world(1, job(2, 3), token=token)
    made.run(made.now + 2)
    forge(made, "0/ticket", b"0")
    made.add()
    made.run(made.now + 3)
    made.add()
    form(made, 3)
    assert len(made.assignments) <= 2
    all_end(made)


def test_reports_notes_and_losses_of_strangers_are_left_out() -> None:
    made = formed(3, job(2, 3), TOKEN)
    report = encode(Consequence(FAILURE, "node-2"))
    forge(made, "0/consequences", report + b"\n")
    forge(made, "1/unfit", encode(Unfit(made.agents[2].node.record, "forged", True)) + b"\n")
    restart(made, 1)
    assert not lines(made, "forged")
    history = made.assignments[1][0].restart_history
    assert history.used == 1
    assert "ValueError: boom" not in history.failure
    all_end(made)


def test_what_was_said_in_another_round_or_job_is_not_believed_again() -> None:
    made = formed(3, job(3, 3), TOKEN)
    made.agents[0].request_restart()
    made.run(made.now + DEADLINE, stop=lambda: running(made) == [1, 1, 1])
    forge(made, "1/end", made.store.values["elastic/job/0/end"])
    refused(made, "1/end", NOT_SIGNED)


def test_a_dead_node_that_strangers_keep_alive_delays_the_job_until_join_timeout_at_most() -> None:
    made = formed(3, job(3, 3, join_timeout=60), TOKEN)
    rank = {agent.state.assignment.group_rank: agent for agent in made.agents if agent.state.assignment}
    rank[2].kill()
    ticket = rank[2].node.round.ticket
    end = made.now + 3 * DEADLINE

    def beat() -> bool:
        made.store.apply(Add(f"elastic/job/0/heartbeat/{ticket}", 1), lambda reply: None)
        return made.now > end and not made.live()

    made.run(end, stop=beat)
    assert [rank[0].running, rank[1].running] == [0, 0]
    rank[0].fail_worker(1)
    made.run(made.now + 90, stop=beat)
    assert [agent.finish.status for agent in (rank[0], rank[1]) if agent.finish] == [75, 75]


@pytest.mark.parametrize("with_heartbeats", [False, True])
def test_strangers_cannot_have_the_death_of_a_node_charged(*, with_heartbeats: bool) -> None:
    """Neither by the number of nodes that have reported, nor by heartbeats in the dead one's name."""
    made = formed(3, job(2, 3, Policy(0)), TOKEN)
    ticket = made.agents[1].node.round.ticket
    made.agents[1].kill()
    others = made.agents[0], made.agents[2]
    for agent in others:
        agent.fail_worker(1, RESET)
    forge(made, "0/reported", b"3")

    def look() -> bool:
        if with_heartbeats:
            made.store.apply(Add(f"elastic/job/0/heartbeat/{ticket}", 1), lambda reply: None)
        return all(agent.running == 1 for agent in others)

    made.run(made.now + 100, stop=look)
    assert [agent.running for agent in others] == [1, 1]
    assert {place.restart_history.used for place in made.assignments[1].values()} == {0}
    assert (
        any("did not notice this failure for" in line for agent in others for line in agent.shown()) == with_heartbeats
    )


def test_strangers_end_a_job_at_worst() -> None:
    """Any record or number under any key, lines of other rounds included, keys removed; at any time of a job."""
    names = ["end", "decision", "closed", "members/0", "assignment/0/1", "assignment/0/2", "node/1", "node/3", "lost"]
    names += ["consequences", "reported", "all_reported", "left", "all_left", "succeeded", "succeeded/1", "status"]
    names += ["leader/1", "monitor/1", "ticket", "stall", "stalled", "look", "stop_at", "calls/1", "verdict/1", "unfit"]
    names += ["heartbeat/1", "heartbeat/2", "stacks/1/1"]
    place = Assignment(0, 2, 0, 4, 2, 0, 4, "10.0.0.1", 29500, "elsewhere", False)
    values: list[NamedTuple | bytes] = [DONE, STOP, ERROR, FAILED, FINAL, Closed(0, 2, 2), STRANGER, place, SICK]
    values += [Members((1, 2), ("node-0", "node-1"), ("a", "b")), b"1", b"7", b"99999999999999999999", b"\xff{"]
    for seed in seeds(0, 20):
        chance = random.Random(seed)
        made = world(2, job(2, 2, Policy(1), join_timeout=40), seed=seed, token=TOKEN)
        made.run(made.now + chance.choice([0.01, 0.05, 1.0, 5.0]))
        for _ in range(chance.randrange(1, 6)):
            name = chance.choice(["round", *(f"{chance.randrange(2)}/{name}" for name in names)])
            is_counter = name[2:].startswith(("heartbeat/", "ticket", "reported", "left")) or name[2:] == "succeeded"
            old = [] if is_counter else list(made.store.values.values())
            match chance.randrange(4):
                case 0:
                    made.store.apply(Delete(f"elastic/job/{name}"), lambda reply: None)
                case 1 if old:
                    forge(made, name, chance.choice(old))
                case _:  # a store closes the connection of a node that adds to what is no number
                    forge(
                        made,
                        name,
                        b"%d" % chance.choice([0, 1, 7, 10**6, 10**18]) if is_counter else chance.choice(values),
                    )
            made.run(made.now + chance.choice([0.0, 0.1, 3.0]))
        if has_failed := chance.random() < 0.3 and bool(made.agents[1].alive):
            made.agents[1].fail_worker(3)
        made.run(made.now + 120, stop=lambda made=made: not made.live())  # type: ignore[misc]
        ends = [agent.finish for agent in made.agents if agent.finish]
        assert Finish() not in ends, seed
        assert {end.status for end in ends} <= {69, 75}, (seed, ends)
        assert not [end for end in ends if end.failures], (seed, ends)
        assert all(end.error for end in ends), (seed, ends)
        hosts = {place.host for places in made.assignments.values() for place in places.values()}
        assert hosts <= {"host-0", "host-1"}, seed
        used = [place.restart_history.used for places in made.assignments.values() for place in places.values()]
        assert max(used, default=0) <= has_failed, seed
