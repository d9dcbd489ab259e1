"""Anything at all as a record, or as an answer of a store."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastic_launch.core.progress.judgement import Judgement
from elastic_launch.core.progress.stack_groups import Group, NodeStacks, RankView, merge
from elastic_launch.core.progress.stack_report import render
from elastic_launch.core.progress.stacks import Frame
from elastic_launch.core.progress.verdict import Verdict, judge
from elastic_launch.core.rendezvous.records import (
    RULES,
    Closed,
    Members,
    NodeRecord,
    Unfit,
    decode,
    encode,
    field_names,
)
from elastic_launch.core.store_requests import Add, Append, Delete, Get, Request, Set, Swap, Wait
from elastic_launch.core.text import visible
from elastic_launch.errors import ProcessFailure, RendezvousConnectionError, RendezvousStateError
from elastic_launch.job import Assignment, Decision, End, EndKind
from elastic_launch.store import wire
from elastic_launch.store.client import StoreClient
from tests.support.nonsense import JSON, LEAVES, TEXT, one_line

# --- records

KINDS = st.sampled_from(sorted(RULES, key=lambda kind: kind.__name__))
FAILURE = ProcessFailure(0, 7, 1, rank=3, host="host-a")
GOOD: dict[type, Any] = {
    NodeRecord: NodeRecord("node-a", "host-a", 1, 2, "default"),
    Unfit: Unfit(NodeRecord("node-a", "host-a", 1, 2, "default"), "GPU 3: fell off the bus"),
    Closed: Closed(0, 2, 3, (3,)),
    Members: Members((1, 2), ("a", "b"), ("host-a", "host-b"), (-1, -1)),
    Assignment: Assignment(1, 2, 2, 4, 2, 2, 4, "10.0.0.1", 29400, "host-a", False),
    End: End(EndKind.FAILED, "rank 3 failed", "node-a", failures=(FAILURE,)),
    Decision: Decision(True, failures=(FAILURE,), pause=3.0),
    NodeStacks: NodeStacks("host-a", 2.0, (RankView(3, 7),), (Frame("a.py", 4, "f"),), (Group((3,)),), ((0,),)),
    Judgement: Judgement(Verdict((3,), "it loops", "a.py:4 in f", True, "lock"), 3, "the stacks"),
}


def read(kind: type, data: bytes) -> Any:
    """A record is refused in one line, or is the same after another journey, and can be shown."""
    complaint = ""
    try:
        record: Any = decode(kind, data, "job/0/key")
    except RendezvousStateError as error:
        complaint = str(error)
    if complaint:
        assert one_line(complaint)
        return None
    assert decode(kind, encode(record), "key") == record
    str(record).encode("utf-8")  # no lone surrogates are left
    return record


@given(KINDS, st.binary(max_size=200))
@example(End, b"[" * 100_000)
@example(End, b"1" * 10_000)
@example(End, b'{"kind":"done","reason":"\xed\xa0\x80"}')
def test_any_bytes_as_a_record(kind: type, data: bytes) -> None:
    read(kind, data)


@given(KINDS, JSON)
@example(End, {"kind": "error", "reason": "\x1b" * 10_000, "status": 70})
@example(Decision, {"restart": True, "pause": 10**399})
@example(Decision, {"restart": True, "restart_history": {"ages": [float("nan")]}})
@example(Decision, {"restart": False})
@example(Decision, {"restart": False, "failures": [{"local_rank": 0, "pid": 7, "exitcode": 256}]})
@example(Decision, {"restart": True, "pause": 1e308})
@example(End, {"kind": "stop", "reason": "x", "signum": 0})
@example(End, {"kind": "error", "reason": "x", "status": 0})
@example(End, {"kind": "error", "reason": "a1 " * 2_700_000, "status": 70})
@example(End, {"kind": "stop", "reason": "x", "signum": 4711})
@example(Members, {"tickets": [1, 2], "ids": ["a"], "hosts": ["a", "b"], "ranks": [-1]})
def test_any_json_as_a_record(kind: type, value: object) -> None:
    record = read(kind, json.dumps(value).encode())
    assert not (isinstance(record, Decision) and not record.restart), "what ends a job well is not told"


@given(st.sampled_from(list(GOOD)), st.data())
def test_a_good_record_with_one_odd_field(kind: type, data: st.DataObject) -> None:
    fields = json.loads(encode(GOOD[kind]))
    fields[data.draw(st.sampled_from(field_names(kind)))] = data.draw(JSON)
    read(kind, json.dumps(fields).encode())


@given(st.data())
def test_odd_stacks_can_be_judged_and_shown(data: st.DataObject) -> None:
    """Others may write to the store."""
    fields = json.loads(encode(GOOD[NodeStacks]))
    name = data.draw(st.sampled_from(["ranks", "frames", "groups"]))
    [good] = fields[name]
    odd = st.dictionaries(
        st.sampled_from([*good, "steps", "since", "io_bytes", "state", "is_stuck", "command"]), LEAVES
    )
    fields[name] = [{**good, **data.draw(odd)}]
    if stacks := read(NodeStacks, json.dumps(fields).encode()):
        merged = merge([stacks, GOOD[NodeStacks]])
        assert render(merged, judge(merged), 100)


@given(TEXT)
def test_any_text_can_be_shown(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert visible(shown) == shown
    assert all(line.replace("\t", "").isprintable() for line in visible(text, lines=True).split("\n"))


# --- answers of a store

REQUESTS: list[Request] = [
    *(Get(("a", "b")), Get(("a",), 3), Get(()), Swap("k", b"", b"v"), Swap("k", b"v", b"v")),
    *(Add("k", 1), Delete("k"), Wait(("k",)), Set((("k", b"v"),)), Append("k", b"v")),
]
LENGTHS = st.sampled_from([0, 1, 5, 1 << 20, (8 << 20) + 1, 1 << 31, 1 << 63, (1 << 64) - 1]).map(wire.U64.pack)
PIECES = st.binary(max_size=20) | LENGTHS | st.sampled_from([wire.pack_blob(b"value"), b"\0", b"\1"])
ANSWERS = st.lists(PIECES, max_size=8)


@given(st.lists(st.sampled_from(REQUESTS), max_size=4), ANSWERS, st.booleans())
@example([Get(("a",))], [wire.U64.pack(1 << 30)], True)
@example([Get(("a",))], [b"HTTP/1.1 400 Bad Request\r\n\r\n"], True)
@example([Wait(("k",))], [b"\1"], True)
@example([Add("k", 1)], [b"\0" * 9], True)
@example([], [b"unasked"], True)
def test_any_answer_of_a_store(requests: list[Request], answers: list[bytes], is_greeted: bool) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs, contextlib.closing(StoreClient(ours, "store at here:1")) as client:
        client.flush()
        greeting = theirs.recv(100)[-4:]
        for number, request in enumerate(requests, 1):
            if not isinstance(request, Wait) or number == len(requests):  # while it waits, it takes no other
                client.submit(request)
        client.flush()
        theirs.sendall(b"".join([greeting if is_greeted else b"", *answers]))
        theirs.shutdown(socket.SHUT_WR)
        taken: list[object] = []

        def take_all() -> None:
            while True:
                select.select([client], [], [], 1.0)
                taken.extend(client.take())

        with pytest.raises(RendezvousConnectionError, match=r"^store at here:1") as caught:
            take_all()
        assert one_line(str(caught.value))
        assert len(taken) <= len(requests)
