"""What a status says: of an agent, of a whole job from its store's records, and as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from elastic_launch.core import job_view
from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import Limits
from elastic_launch.core.agent.root_cause import Exit
from elastic_launch.core.job_view import Records
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.monitor import LEFT
from elastic_launch.core.rendezvous.ranks import assign
from elastic_launch.core.rendezvous.records import Closed, Members, NodeRecord, Status, encode
from elastic_launch.core.status import Facts, Meeting, Progress, agent_status, waits_for
from elastic_launch.errors import ProcessFailure, RendezvousStateError
from elastic_launch.job import Assignment, Decision, End, EndKind, Policy, RestartHistory
from elastic_launch.operate.show import MAX_NODES, one_line, screen
from elastic_launch.operate.text import clock, cut, span, spans, table

ASSIGNMENT = Assignment(1, 2, 4, 8, 4, 4, 8, "127.0.0.1", 29500, "host-b", port_picked=True, restart_count=2)
FACTS = Facts("job", "host-b", 4711, "0.1.0", "train.py", 1000.0, 3, 30.0, "/logs/job")
SETTINGS = Settings("job", 2, 4, policy=Policy(3))


def state(phase: AgentPhase = AgentPhase.RUNNING, **changes: Any) -> AgentState:
    changes = {"assignment": ASSIGNMENT, "pids": {rank: 100 + rank for rank in range(4)}, **changes}
    return AgentState(Limits(Policy(3), 30), phase, **changes)


def status(of: AgentState, meeting: Meeting = Meeting("static"), **more: Any) -> dict[str, Any]:  # noqa: B008 - a value
    given = {"rounds": [(ASSIGNMENT, 1100.0, None, None)], "files": {}, "now": 5.0, **more}
    return agent_status(FACTS, of, meeting, **given)


# ---- One agent


def test_a_status_can_be_sent_as_json() -> None:
    found = status(state(), Meeting("etcd", "a:2379", {"cacert": "/ca"}, 1, 4, "monitor", "", [0.5, None]))
    assert json.loads(json.dumps(found)) == found
    assert found["store"] == {"backend": "etcd", "endpoint": "a:2379", "settings": {"cacert": "/ca"}}
    assert (found["role"], found["heartbeats"], found["min_nodes"], found["max_nodes"]) == (
        "monitor",
        [0.5, None],
        1,
        4,
    )


def test_each_worker_has_its_state() -> None:
    exits = (Exit(1, 0, 1.0), Exit(2, 3, 1.0), Exit(3, -15, 1.0, (15,)))
    running = status(state(pids={0: 100, 1: 101, 2: 102, 3: 103}, exits=exits))
    assert [(w["rank"], w["pid"], w["state"], w["exit_code"]) for w in running["workers"]] == [
        (4, 100, "running", None),
        (5, 101, "succeeded", 0),
        (6, 102, "failed", 3),
        (7, 103, "stopped", -15),
    ]
    assert status(state(pids={}))["workers"][0]["state"] == "starting"
    assert status(state(AgentPhase.STOPPING))["workers"][0]["state"] == "stopping"


def test_before_the_first_round_little_is_known() -> None:
    found = status(state(AgentPhase.JOINING, assignment=None), Meeting("c10d", waits_for="nodes"), rounds=[])
    assert (found["state"], found["round"], found["workers"], found["waits_for"]) == ("joining", None, [], "nodes")
    assert (found["restarts"], found["uncharged_restarts"], found["last_trouble"]) == (0, 0, None)


def test_rounds_with_their_ends_tell_restarts_and_trouble() -> None:
    history = RestartHistory(used=1)
    rounds = [
        (ASSIGNMENT._replace(restart_count=0), 1000.0, End(EndKind.FAILED, "rank 1 failed (exit code 1)"), 1010.0),
        (ASSIGNMENT._replace(restart_count=1), 1011.0, End(EndKind.MEMBERSHIP_CHANGED, "host-c joins"), 1020.0),
        (ASSIGNMENT._replace(restart_history=history), 1021.0, None, None),
    ]
    found = status(state(assignment=rounds[-1][0]), rounds=rounds)
    assert (found["restarts"], found["uncharged_restarts"]) == (1, 1)
    assert (found["last_failure"], found["last_trouble"]) == ("rank 1 failed (exit code 1)", "host-c joins")
    assert found["rounds"][0] == {
        "round": 0,
        "nodes": 2,
        "world_size": 8,
        "ranks": [4, 7],
        "started_at": 1000.0,
        "ended_at": 1010.0,
        "end": "failed",
        "reason": "rank 1 failed (exit code 1)",
    }


def test_a_reason_is_one_line_of_moderate_length() -> None:
    end = End(EndKind.ERROR, "x" * 10_000 + "\ntraceback")
    reason = status(state(), rounds=[(ASSIGNMENT, 1.0, end, 2.0)])["rounds"][0]["reason"]
    assert len(reason) < 600
    assert "\n" not in reason


def test_progress_is_added_where_it_is_known() -> None:
    progress = Progress({0: {"steps": 12, "phase": "eval"}}, {"steps": 12, "steps_per_second": 3.5})
    found = status(state(), progress=progress)
    assert [worker["progress"] for worker in found["workers"]] == [{"steps": 12, "phase": "eval"}, None, None, None]
    assert found["progress"] == {"steps": 12, "steps_per_second": 3.5}
    assert status(state())["progress"] is None


@pytest.mark.parametrize(
    ("of", "meeting", "text"),
    [
        (state(), Meeting("static"), ""),
        (state(AgentPhase.JOINING), Meeting("c10d", waits_for="nodes: 1 of 2 joined"), "nodes: 1 of 2 joined"),
        (state(AgentPhase.JOINING), Meeting("static"), "the next round"),
        (
            state(AgentPhase.STOPPING, running=frozenset({0, 2}), deadline=15.0),
            Meeting("static"),
            "rank 4, 6 to stop; SIGKILL in 10 s",
        ),
        (
            state(AgentPhase.STOPPING, running=frozenset({0}), deadline=15.0, killed=True),
            Meeting("static"),
            "rank 4, killed, to end",
        ),
        (state(AgentPhase.STOPPING, deadline=6.0), Meeting("static"), "processes that the workers left behind"),
        (
            state(AgentPhase.HOLDING, deadline=15.0),
            Meeting("c10d"),
            "the nodes to agree on the step at which all ranks stop",
        ),
        (
            state(AgentPhase.DRAINING, running=frozenset({1}), deadline=15.0),
            Meeting("c10d"),
            "rank 5 to stop at the agreed step; SIGTERM in 10 s",
        ),
        (state(AgentPhase.AGREEING), Meeting("c10d"), "the other nodes"),
        (state(AgentPhase.PAUSING, deadline=65.0), Meeting("static"), "the pause before the restart, 60 s more"),
    ],
)
def test_what_an_agent_waits_for(of: AgentState, meeting: Meeting, text: str) -> None:
    assert waits_for(of, meeting, 5.0) == text


# ---- A job, from its store


class Nodes(NamedTuple):
    """What the nodes of a job have written."""

    records: list[NodeRecord]
    keys: dict[str, bytes]


def nodes(count: int, members: int | None = None) -> Nodes:
    """The records of a running round."""
    records = [
        NodeRecord(f"id-{n}", f"host-{n}", 1000 + n, 2, "default", options=SETTINGS.options) for n in range(count)
    ]
    members = count if members is None else members
    tickets = tuple(range(1, members + 1))
    keys = {"ticket": b"%d" % count, "status": b"", "end": b"", "decision": b""}
    keys |= {f"node/{ticket}": encode(record) for ticket, record in enumerate(records, 1)}
    keys |= {f"heartbeat/{ticket}": b"1" for ticket in range(1, count + 1)}
    assignments = assign(records[:members], "a", 1, restart_count=1, restart_history=RestartHistory(1))
    keys |= {f"assignment/0/{t}": encode(it) for t, it in zip(tickets, assignments, strict=True)}
    hosts = tuple(record.host for record in records[:members])
    keys["members/0"] = encode(Members(tickets, tuple(record.node for record in records[:members]), hosts))
    spares = tuple(range(members + 1, count + 1))
    keys["closed"] = encode(Closed(0, members, count, spares, SETTINGS.options, RestartHistory(1)))
    return Nodes(records, keys)


FAILED = ProcessFailure(local_rank=1, pid=9, exitcode=1, rank=3, host="host-1", failed_at=1500.0)
PAST = [
    (
        0,
        {
            "closed": encode(Closed(0, 3, 3)),
            "end": encode(End(EndKind.FAILED, "first", failures=(FAILED,))),
            "decision": b"",
        },
    )
]


def test_a_running_round_with_a_spare() -> None:
    view = job_view.of_store("job", Records(1, nodes(4, 3).keys, PAST))
    assert json.loads(json.dumps(view)) == view
    assert {
        name: view[name] for name in ("state", "round", "world_size", "min_nodes", "max_nodes", "max_restarts")
    } == {
        "state": "running",
        "round": 1,
        "world_size": 6,
        "min_nodes": 2,
        "max_nodes": 4,
        "max_restarts": 3,
    }
    assert [(n["group_rank"], n["host"], n["pid"], n["state"], n["role"], n["ranks"]) for n in view["nodes"]] == [
        (0, "host-0", 1000, "running", "monitor", [0, 1]),
        (1, "host-1", 1001, "running", None, [2, 3]),
        (2, "host-2", 1002, "running", None, [4, 5]),
        (None, "host-3", 1003, "waiting", "spare", None),
    ]
    assert [(r["round"], r["nodes"], r["end"], r["reason"]) for r in view["rounds"]] == [
        (0, 3, "failed", "first"),
        (1, 3, None, None),
    ]
    assert (view["restarts"], view["uncharged_restarts"], view["last_failure"]) == (1, 0, "first")


def test_nodes_that_join_and_those_that_are_missing() -> None:
    keys = nodes(2).keys | {"closed": b"", "members/0": b"", "status": encode(Status(2, "host-0, host-1", "host-2"))}
    view = job_view.of_store("job", Records(0, keys))
    assert view["state"] == "joining"
    assert view["waits_for"] == "nodes: 2 of 2 to 4 joined: host-0, host-1; missing: host-2"
    assert [(n["group_rank"], n["state"], n["role"]) for n in view["nodes"]] == [
        (None, "joined", "leader"),
        (None, "joined", None),
    ]


def test_nodes_that_have_left_or_succeeded() -> None:
    keys = nodes(3).keys | {"heartbeat/2": b"%d" % (LEFT + 3), "succeeded/3": b"1"}
    assert [node["state"] for node in job_view.of_store("job", Records(1, keys))["nodes"]] == [
        "running",
        "left",
        "succeeded",
    ]


@pytest.mark.parametrize(
    ("end", "decision", "expected"),
    [
        (End(EndKind.FAILED, "rank 3 failed", failures=(FAILED,)), None, "agreeing"),
        (
            End(EndKind.FAILED, "rank 3 failed", failures=(FAILED,)),
            Decision(True, RestartHistory(2), (FAILED,)),
            "restarting",
        ),
        (
            End(EndKind.FAILED, "rank 3 failed", failures=(FAILED,)),
            Decision(False, RestartHistory(2), (FAILED,)),
            "failed",
        ),
        (End(EndKind.MEMBERSHIP_CHANGED, "host-9 joins"), None, "restarting"),
        (End(EndKind.STOP, "stop requested on host-0", signum=15), None, "stopped"),
        (End(EndKind.DONE, "all workers succeeded"), None, "succeeded"),
        (End(EndKind.ERROR, "host-1: no disk", status=69), None, "failed"),
    ],
)
def test_what_the_end_of_a_round_means(end: End, decision: Decision | None, expected: str) -> None:
    keys = nodes(2).keys | {"end": encode(end), "decision": encode(decision) if decision else b""}
    view = job_view.of_store("job", Records(1, keys))
    assert view["state"] == expected
    assert view["rounds"][-1]["reason"] == (FAILED.headline() if decision else end.reason)


def test_agents_of_this_host_add_what_no_record_tells() -> None:
    local = status(state(), Meeting("c10d", "a:1", {}, 2, 4, "monitor", "", [0.1, 0.7]))
    local |= {"host": "host-1", "pid": 1001, "group_rank": 1}
    local["rounds"][0] |= {"round": 1, "started_at": 1234.0}
    view = job_view.of_store("job", Records(1, nodes(2).keys), [local])
    assert (view["program"], view["log_dir"], view["started_at"]) == ("train.py", "/logs/job", 1000.0)
    assert [node["heartbeat"] for node in view["nodes"]] == [0.1, 0.7]
    assert view["nodes"][0]["workers"] is None
    assert [worker["rank"] for worker in view["nodes"][1]["workers"]] == [4, 5, 6, 7]
    assert view["rounds"][-1]["started_at"] == 1234.0


def test_other_data_in_the_store_is_an_error_that_says_so() -> None:
    for name in ("closed", "node/1", "ticket", "members/0", "end"):
        with pytest.raises(RendezvousStateError):
            job_view.of_store("job", Records(1, {**nodes(2).keys, name: b"garbage"}))


def test_odd_options_of_a_node_are_none() -> None:
    odd = nodes(1).records[0]._replace(options="--nnodes=²:4 --max-restarts=")
    view = job_view.of_store("job", Records(1, {"ticket": b"1", "node/1": encode(odd)}))
    assert (view["min_nodes"], view["max_nodes"], view["max_restarts"]) == (None, 4, None)


def test_a_view_by_agents_has_the_same_form() -> None:
    by_store = job_view.of_store("job", Records(1, nodes(2).keys))
    by_agents = job_view.of_agents("job", [status(state())])
    assert by_agents.keys() == by_store.keys()
    assert by_agents["nodes"][0].keys() == by_store["nodes"][0].keys()
    assert by_agents["rounds"][0].keys() == by_store["rounds"][0].keys()


@pytest.mark.parametrize(("kind", "expected"), [(EndKind.DONE, "succeeded"), (EndKind.STOP, "stopped")])
def test_an_agent_that_is_done_tells_how_the_job_ended(kind: EndKind, expected: str) -> None:
    done = status(state(AgentPhase.DONE), rounds=[(ASSIGNMENT, 1.0, End(kind, "why"), 2.0)])
    assert job_view.of_agents("job", [done])["state"] == expected


# ---- As text


def test_a_screen_shows_summaries_before_nodes_and_rounds() -> None:
    local = status(state(), Meeting("c10d", "a:1", {}, 2, 4))
    view = job_view.of_store("job", Records(1, nodes(3).keys, PAST), [local | {"pid": 1001, "host": "host-1"}])
    lines = screen(view, 4000.0)
    assert lines[:2] == ["job       job: train.py", "state     running, round 1 for 48 min 20 s"]
    assert lines[2] == "size      3 nodes (of 2 to 4), 6 workers"
    assert "restarts  1 of 3 used" in lines
    at = lines.index("NODE  HOST    PID   STATE    RANKS  ROLE     HEARTBEAT")
    assert lines[at + 1] == "0     host-0  1000  running  0-1    monitor  –"
    assert lines[-2:] == ["0      –      3      –        –       first", "1      –      3      –        –       –"]


def test_a_thousand_nodes_fit_on_a_screen_and_those_that_stand_out_are_shown() -> None:
    keys = nodes(1000).keys | {"heartbeat/501": b"%d" % LEFT, "succeeded/777": b"1"}
    lines = screen(job_view.of_store("job", Records(1, keys)), 0.0, 80)
    assert len(lines) < MAX_NODES
    assert max(map(len, lines)) <= 80
    assert "998 running, 1 left, 1 succeeded" in lines
    assert [line.split()[1] for line in lines if line.startswith(("0 ", "500 ", "776 "))] == [
        "host-0",
        "host-500",
        "host-776",
    ]
    assert "and 997 nodes more; --json lists all" in lines


def test_one_line_leaves_out_what_changes_all_the_time() -> None:
    stopping = state(AgentPhase.STOPPING, running=frozenset({0}), deadline=15.0)
    rounds = [(ASSIGNMENT, 1.0, End(EndKind.FAILED, "rank 5 failed"), 2.0)]
    texts = {one_line(job_view.of_agents("job", [status(stopping, rounds=rounds, now=now)])) for now in (1.0, 9.0)}
    [text] = texts
    assert text == (
        "job stopping: round 2, 2 nodes, 8 workers, restarts: 0 of 3 used, 2 uncharged, waits for rank 4 to stop, "
        "last: rank 5 failed"
    )


def test_tables_are_aligned_and_unknown_values_have_a_dash() -> None:
    rows = [("A", "LONG", "Z"), ("long", None, ""), (1, 2, "x  ")]
    assert table(rows) == ["A     LONG  Z", "long  –     –", "1     2     x"]


def test_ranks_and_times_are_short() -> None:
    assert [spans([]), spans([3]), spans([5, 0, 1, 2]), span(1, 1), span(1, 2)] == ["", "3", "0-2,5", "1", "1-2"]
    assert (cut("abcdef", 4), cut("abc", 3), cut("abcdef", 0)) == ("abc…", "abc", "abcdef")
    assert clock(1000.0, 1000.0).count(":") == 2
    assert clock(1000.0, 1000.0 + 3 * 86400).startswith("1970-01-01 ")


# ---- What is promised


def promised(heading: str) -> set[str]:
    """The names in the first column of the table below a heading of docs/operating.md."""
    page = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    _, _, below = page.partition(f"\n### {heading}\n")
    rows = re.findall(r"^\| (`.*?) \|", below.partition("\n#")[0], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_documentation_lists_all_fields_and_no_other() -> None:
    assert promised("The status of an agent") == status(state()).keys()
    view = job_view.of_agents("job", [status(state())])
    assert promised("The view of a job") == {"version", *view}
