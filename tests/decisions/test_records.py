"""What is no record of this job is refused, with the key and the rule that it breaks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from elastic_launch.config import LaunchConfig
from elastic_launch.core.progress.goodput import MAX_STEPS, RoundProgress, with_round
from elastic_launch.core.progress.judgement import Judgement
from elastic_launch.core.progress.stack_groups import Group, NodeStacks, RankView
from elastic_launch.core.progress.stacks import Frame
from elastic_launch.core.progress.verdict import Verdict
from elastic_launch.core.rendezvous.monitor import number
from elastic_launch.core.rendezvous.records import (
    MAX_TICKETS,
    RULES,
    Closed,
    Consequence,
    Members,
    NodeRecord,
    Status,
    Unfit,
    decode,
    encode,
    field_names,
)
from elastic_launch.errors import ProcessFailure, RendezvousStateError, UsageError
from elastic_launch.job import Assignment, Change, Decision, End, EndKind, Goodput, LostTime, RestartHistory, Silence
from elastic_launch.rendezvous import third_party_round
from elastic_launch.rendezvous.factory import create_built_in

FAILURE = ProcessFailure(0, 7, 1, error="ValueError: boom", rank=3, host="host-a", failed_at=1.5)
ASSIGNMENT = Assignment(1, 2, 2, 4, 2, 2, 4, "10.0.0.1", 29400, "host-a", False)
FRAME = Frame("train.py", 41, "step")
STACKS = NodeStacks("host-a", 2.0, (RankView(3, 7),), (FRAME,), (Group((3,)), Group((4,))), ((0,), ()))
VERDICT = Verdict((3,), "it loops", "train.py:41 in step", True, "lock")
GOOD: dict[type, NamedTuple] = {
    NodeRecord: NodeRecord("node-a", "host-a", 1, 2, "default"),
    Closed: Closed(0, 2, 3, (3,)),
    Members: Members((1, 2), ("a", "b"), ("host-a", "host-b"), (-1, -1)),
    Assignment: ASSIGNMENT,
    Status: Status(1, "host-a", ""),
    Unfit: Unfit(NodeRecord("node-a", "host-a", 1, 2, "default"), "GPU 3: fell off the bus (exit code 1)"),
    Consequence: Consequence(FAILURE, "node-a"),
    End: End(EndKind.FAILED, "rank 3 failed", "node-a", failures=(FAILURE,), silent=(Silence(3, 4.5, 7),)),
    Decision: Decision(True, RestartHistory(1, ages=(0.5,)), (FAILURE,), pause=3.0),
    Goodput: Goodput(12, 3.5, 1.0, 1, LostTime(1.0), number=7),
    Frame: FRAME,
    RankView: RankView(3, 7, 12, -1.0),
    Group: Group((3,), state="D", wchan="nfs_wait"),
    NodeStacks: STACKS,
    Verdict: VERDICT,
    Judgement: Judgement(VERDICT, 3, "the stacks"),
}


def test_every_record_has_a_rule_for_every_field() -> None:
    """Other types cannot be decoded, because ``RULES`` has no row for them; these are all that are."""
    own = {third_party_round.Outcome, third_party_round._Registration, third_party_round._Reply}
    assert set(RULES) == {*GOOD, *own, RestartHistory, LostTime, ProcessFailure, Silence}
    for kind, rules in RULES.items():
        assert set(rules.fields) == set(field_names(kind)), kind


class Unjudged(NamedTuple):
    x: int = 0


def test_a_type_or_a_field_without_a_rule_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="Unjudged"):
        decode(Unjudged, b"{}", "key")
    monkeypatch.setitem(RULES, Unjudged, RULES[Status])
    with pytest.raises(TypeError, match=r"Unjudged: no rule, or no field: .*x"):
        decode(Unjudged, b"{}", "key")


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_no_field_takes_a_value_of_another_type(kind: type) -> None:
    good = json.loads(encode(GOOD[kind]))
    assert decode(kind, encode(GOOD[kind]), "key") == GOOD[kind]
    for name in field_names(kind):
        nonsense: Any
        for nonsense in (None, [[]], [None], 10**400, -(10**400), 1e308, float("nan"), "\x00" * 100_000):
            with pytest.raises(RendezvousStateError, match=f"key ({name}: |has |must have a stack)"):
                decode(kind, json.dumps({**good, name: nonsense}).encode(), "key")


def test_what_a_failure_has_computed_is_no_part_of_a_record() -> None:
    failure = replace(FAILURE)
    before = encode(Consequence(failure, "node-a"))
    assert failure.message
    assert failure.timestamp == 1
    assert encode(Consequence(failure, "node-a")) == before


def changed(record: NamedTuple, /, **changes: Any) -> bytes:
    """A record as JSON, with fields that may be of any type."""
    return json.dumps({**json.loads(encode(record)), **changes}).encode()


def failed(**changes: Any) -> dict[str, Any]:
    return {**vars(FAILURE), **changes}


STOP, ERROR = End(EndKind.STOP, "stop", signum=15), End(EndKind.ERROR, "broken", status=69)
END, NEXT, MEMBERS = GOOD[End], GOOD[Decision], GOOD[Members]
BAD: dict[str, tuple[type, bytes, str]] = {
    "a stop by no signal": (End, changed(STOP, signum=0), "must have the failure, the signal, or the reason"),
    "a stop by a signal without a name": (End, changed(STOP, signum=40), "signum: must be a signal, not 40"),
    "a stop by a signal out of range": (End, changed(STOP, signum=10**30), "signum: must be a signal"),
    "an error with status 0": (End, changed(ERROR, status=0), "must have the failure, the signal, or the reason"),
    "an error with status 256": (End, changed(ERROR, status=256), "status: must be a whole number from 0 to 255"),
    "an error without a reason": (End, changed(ERROR, reason=""), "must have the failure, the signal, or the reason"),
    "a failure without a failure": (End, changed(END, failures=[]), "must have the failure"),
    "a failure with exit code 256": (
        End,
        changed(END, failures=[failed(exitcode=256)]),
        "failures: exitcode: must be a whole number from -64 to 255, but not 0, not 256",
    ),
    "a failure with exit code 0": (End, changed(END, failures=[failed(exitcode=0)]), "failures: exitcode: "),
    "a failure at no time": (End, changed(END, failures=[failed(failed_at=float("nan"))]), "failed_at: must be"),
    "a failure after the end of time": (End, changed(END, failures=[failed(failed_at=1e308)]), "failed_at: must be"),
    "a failure of 400 digits": (End, changed(END, failures=[failed(failed_at=10**399)]), "failed_at: must be"),
    "a failure of which a file would tell more": (
        End,
        changed(END, failures=[{name: value for name, value in vars(FAILURE).items() if name != "failed_at"}]),
        "failures: lacks a field",
    ),
    "a long error": (End, changed(END, failures=[failed(error="NCCL " * 200)]), "error: must be a text of 0 to 600"),
    "a long reason": (End, changed(END, reason="x" * 20_000), "reason: must be a text of at most 10000"),
    "another node's own": (End, changed(END, mine=True), "mine: must not be in a record"),
    "too long to be read": (End, changed(END, reason="x" * (8 << 20)), "has 8388... bytes; 4194304 are allowed"),
    "an end without a failure": (Decision, changed(NEXT, restart=False, failures=[]), "must have a failure, a signal"),
    "an end by an error without a status": (
        Decision,
        changed(NEXT, restart=False, failures=[], error="broken"),
        "must have a failure, a signal, or an error with a status",
    ),
    "an endless pause": (Decision, changed(NEXT, pause=1e308), "pause: must be a number of seconds from 0 to 1e"),
    "a pause of 400 digits": (Decision, changed(NEXT, pause=10**399), "pause: must be"),
    "a pause that is no number": (Decision, changed(NEXT, pause=float("nan")), "pause: must be"),
    "a negative history": (Decision, changed(NEXT, restart_history={"used": -1}), "restart_history: used: must be"),
    "ages that are no numbers": (Decision, changed(NEXT, restart_history={"ages": [float("inf")]}), "ages: must be"),
    "a rank that does not exist": (Assignment, changed(ASSIGNMENT, group_rank=2), "must have ranks below"),
    "more workers than there are": (Assignment, changed(ASSIGNMENT, local_world_size=5), "must have ranks below"),
    "too many workers": (Assignment, changed(ASSIGNMENT, local_world_size=10**9), "local_world_size: must be"),
    "a port that does not exist": (Assignment, changed(ASSIGNMENT, master_port=65536), "master_port: must be"),
    "an address of two lines": (Assignment, changed(ASSIGNMENT, master_addr="a\nb"), "master_addr: .* printable"),
    "an address with a surrogate": (Assignment, changed(ASSIGNMENT, master_addr="\udcff"), "master_addr: .* printable"),
    "lists of two lengths": (Members, changed(MEMBERS, hosts=["host-a"]), "must have lists of one length"),
    "ranks of another length": (Members, changed(MEMBERS, ranks=[-1]), "must have a rank for each node, or none"),
    "a ticket twice": (Members, changed(MEMBERS, tickets=[2, 2]), "must not have a ticket twice"),
    "nobody": (Members, b'{"tickets":[],"nodes":[],"hosts":[]}', "must have lists of one length"),
    "too many tickets": (
        Closed,
        changed(GOOD[Closed], tickets=10**9),
        "tickets: must be a whole number from 0 to 65536",
    ),
    "more nodes than tickets": (Closed, changed(GOOD[Closed], nodes=3), "must have a ticket for each node"),
    "no leader, but nodes": (Closed, changed(GOOD[Closed], leader=-1), "must have no nodes without a leader"),
    "a field less": (Closed, b'{"leader":0}', "lacks a field"),
    "an id with a surrogate": (NodeRecord, changed(GOOD[NodeRecord], node="\ud800"), "node: .* printable characters"),
    "no id": (NodeRecord, changed(GOOD[NodeRecord], node=""), "node: must be a text of 1 to 400"),
    "no workers": (NodeRecord, changed(GOOD[NodeRecord], workers=0), "workers: must be a whole number from 1"),
    "unfit for no reason": (Unfit, changed(GOOD[Unfit], reason=""), "reason: must be a text of 1 to 1000"),
    "unfit for a long reason": (Unfit, changed(GOOD[Unfit], reason="x" * 1001), "reason: must be a text of 1 to 1000"),
    "nobody is unfit": (Unfit, b'{"reason":"x"}', "lacks a field"),
    "unfit with a record that breaks a rule": (
        Unfit,
        changed(GOOD[Unfit], record={**GOOD[NodeRecord]._asdict(), "restart_history": {}, "port": 65536}),
        "record: port: must be a whole number from 0 to 65535",
    ),
    "a failure at the same step": (End, changed(END, same_step=True), "must be the leaving of a node"),
    "a change that nobody knows": (End, changed(END, change="x"), "change: must be one of "),
    "more steps than can be": (
        Decision,
        changed(NEXT, restart_history={"goodput": {"steps": 10**30}}),
        "restart_history: goodput: steps: must be a whole number from 0 to 9007199254740992",
    ),
    "time lost without end": (
        Decision,
        changed(NEXT, restart_history={"goodput": {"lost": {"start": 1e308}}}),
        "restart_history: goodput: lost: start: must be a number of seconds",
    ),
    "stacks that are missing": (NodeStacks, changed(STACKS, stacks=[[0]]), "must have a stack for each group"),
    "frames that are missing": (NodeStacks, changed(STACKS, stacks=[[], [1]]), "must have the frames of all stacks"),
    "a frame before the first": (NodeStacks, changed(STACKS, stacks=[[], [-1]]), "stacks: must be a whole number"),
    "a group with frames": (
        NodeStacks,
        changed(STACKS, groups=[{"ranks": [3], "frames": [{"file": "x", "line": 1, "function": "f"}]}], stacks=[[]]),
        "groups: frames: must be a list of at most 0 values",
    ),
    "a group of nobody": (NodeStacks, changed(STACKS, groups=[{"ranks": []}], stacks=[[]]), "must have a rank"),
    "more than the stacks of a node": (NodeStacks, b" " * 65_537, "has 65537 bytes; 65536 are allowed"),
    "blame for a negative rank": (
        Judgement,
        changed(GOOD[Judgement], verdict={**VERDICT._asdict(), "ranks": [-1]}),
        "verdict: ranks: must be a whole number",
    ),
    "a verdict without an end": (Judgement, changed(GOOD[Judgement], text="x" * 70_000), "text: must be a text"),
    "no JSON": (NodeRecord, b'{"node":', "is no JSON: "),
    "brackets": (NodeRecord, b"[" * 100_000, "is no JSON: "),
    "digits": (NodeRecord, b"1" * 100_000, "is no JSON: "),
}


@pytest.mark.parametrize(("kind", "data", "rule"), BAD.values(), ids=BAD)
def test_what_breaks_a_rule_is_named(kind: type, data: bytes, rule: str) -> None:
    with pytest.raises(
        RendezvousStateError, match=f"^unexpected data in the store: job/0/end ([a-z_]+: )*{rule}"
    ) as caught:
        decode(kind, data, "job/0/end")
    assert caught.value.exit_code == 69
    assert len(str(caught.value)) < 400
    assert "--rdzv-id" in str(caught.value)


def test_what_is_for_people_is_made_visible() -> None:
    failure = replace(FAILURE, traceback="a\n\tb\x1b[2J\r", note="x\ny")
    end = End(EndKind.FAILED, "\x1b]0;title\x07\nz", failures=(failure,))
    read = decode(End, encode(end), "key")
    assert read.reason == "\\x1b]0;title\\x07\nz"
    assert read.failures[0].traceback == "a\n\tb\\x1b[2J\\r"
    assert read.failures[0].note == r"x\ny"


def test_what_workers_write_of_their_steps_keeps_to_the_rules() -> None:
    """Workers write these numbers to memory, where anything may stand, and the other nodes get them in records."""
    made, most = Goodput(), 2**64 - 1
    for _ in range(3):
        made = with_round(made, RoundProgress(most, 1e10, 2e10, 0, most, 1e10), 1.0, 2.0, 3.0, 4.0)
    assert (made.steps, made.repeated, made.number) == (MAX_STEPS,) * 3
    assert decode(Goodput, encode(made), "key") == made


def test_how_a_node_leaves_is_told() -> None:
    end = End(EndKind.MEMBERSHIP_CHANGED, "host-a is leaving", "node-a", same_step=True, change=Change.NODE_LEFT)
    assert decode(End, encode(end), "key") == end


def test_options_that_the_others_would_refuse_are_refused_at_the_start() -> None:
    config = LaunchConfig(1, 2, 1, role="x" * 2000, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:29400")
    with pytest.raises(UsageError, match="role: must be a text of 0 to 1000 characters, not 'xxx"):
        create_built_in(config, {}, print)


@pytest.mark.parametrize("nonsense", [b"-1", b"x", b"1.5", b"1" * 30, b"65537", b"200000", b"1000000000", b"\xd9\xa1"])
def test_a_counter_has_a_bound(nonsense: bytes) -> None:
    with pytest.raises(RendezvousStateError, match="job/0/ticket must be a number from 0 to 65536, not b'"):
        number(nonsense, "job/0/ticket", MAX_TICKETS)
    assert [number(data, "key", MAX_TICKETS) for data in (b"", b"0", b"65536")] == [0, 0, 65536]
