"""The report of a job: from events of several nodes, attempts and clocks to what a person reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from elastic_launch.operate import report_html, report_md, report_picture, report_text
from elastic_launch.operate.report_data import Event, Job, jobs, parse

BEGIN = 1_800_000_000.0


class Node:
    """A node that writes events. Its clock is ``clock`` seconds ahead of the test's, and it begins at ``began``."""

    def __init__(self, host: str, rank: int = 0, *, began: float = 0.0, clock: float = 0.0, attempt: int = 0) -> None:
        self.host, self.rank, self.began, self.clock, self.attempt = host, rank, began, clock, attempt
        self.pid = 100 + rank
        self.events: list[Event] = []
        self.round: int | None = None

    def __call__(self, at: float, name: str, *, job: bool = False, **facts: Any) -> Node:
        """Write an event at a time of the test's."""
        if name == "joined":
            self.round = None
        common: Event = {
            "time": BEGIN + at + self.clock,
            "name": name,
            "scope": "job" if job else "node",
            "job": "job-1",
            "attempt": self.attempt,
            "host": self.host,
            "pid": self.pid,
            "group_rank": None if self.round is None else self.rank,
            "round": self.round,
            "elapsed": at - self.began,
            "level": None,
            "text": "",
        }
        self.events.append(common | facts)
        return self

    def join(self, at: float, formed: float, round_: int, nodes: int = 1) -> Node:
        """Join a round, and start a second after it has formed."""
        self(at, "joined")
        self.round = round_
        size = {"nodes": nodes, "world_size": 2 * nodes, "workers": 2}
        name = "re_formed" if round_ else "formed"
        return self(formed, name, job=self.rank == 0, seconds=formed - at, **size)(formed + 1, "started", seconds=1.0)

    def restart(self, at: float, gone: float, cause: str = "failed", **facts: Any) -> Node:
        """Begin to stop at a time, until all processes are gone."""
        self(at, "stopping", cause=cause, seconds=None)(gone, "stopped", seconds=gone - at)
        return self(gone, "restarting", job=self.rank == 0, cause=cause, **facts)

    def succeed(self, at: float) -> Node:
        """End well."""
        self(at, "succeeded")(at, "stopped")
        return self(at, "ended", job=self.rank == 0, outcome="succeeded", status=0, failures=[])


FAILURE = {
    "rank": 1,
    "local_rank": 1,
    "host": "a",
    "worker_pid": 7,
    "exitcode": 1,
    "how": "exit code 1",
    "failed_at": BEGIN + 50,
    "error": "ValueError: boom",
    "traceback": "Traceback\n  boom",
    "stderr": "",
    "note": "",
}


def of(*nodes: Node) -> Job:
    [job] = jobs(event for node in nodes for event in node.events)
    return job


def crashed() -> Node:
    """A job on one node that fails after 50 s, is noticed after 2 s, gone after 5 s, and together again after 10 s."""
    node = Node("a").join(0, 10, 0)
    node(52, "failed", seconds=2.0, rank=1, how="exit code 1", error="ValueError: boom")
    node.restart(52, 55, failures=[FAILURE]).join(55, 60, 1)
    return node(64, "first_step", rank=0, seconds=3.0).succeed(100)


def three() -> list[Node]:
    """A job of three nodes of which the last to come is lost."""
    nodes = [Node(host, rank, began=began) for rank, (host, began) in enumerate([("a", 0), ("b", 4), ("c", 9)])]
    for node in nodes:
        node.join(node.began, 10, 0, 3)
    lost = {"reason": "no heartbeat from c for 15 s", "lost": ["c-102-beef"]}
    for node in nodes[:2]:
        node(50, "node_lost", job=node.rank == 0, **lost)
        node.restart(50, 51, "node_lost", lost=lost["lost"], failures=[]).join(51, 52, 1, 2).succeed(100)
    return nodes


# --- what is found


def test_recovery_is_split_into_its_parts() -> None:
    job = of(crashed())
    startup, failure = job.recoveries
    assert (startup.cause, startup.seconds) == ("startup", 11)
    assert (failure.cause, failure.seconds) == ("failed", 14)
    assert failure.parts == (2, 3, 5, 1, 3)  # detection, stop, rendezvous, start, first step
    assert failure.what == "rank 1 on a failed (exit code 1, ValueError: boom)"
    assert job.working == (50 - 11) + (100 - 64)
    assert job.seconds == 100


def test_without_steps_a_restart_is_over_when_all_workers_run() -> None:
    node = Node("a").join(0, 10, 0).restart(52, 55, failures=[FAILURE]).join(55, 60, 1).succeed(100)
    assert of(node).recoveries[1].parts == (0, 3, 5, 1, None)


def test_nobody_knows_when_a_lost_node_failed() -> None:
    job = of(*three())
    recovery = job.recoveries[1]
    assert recovery.parts == (None, 1, 1, 1, None)
    assert (recovery.cause, recovery.what) == ("node_lost", "no heartbeat from c for 15 s")
    lost = job.attempts[0].agents[2]
    assert (lost.host, lost.lost_at) == ("c", BEGIN + 50)
    assert job.problems == []


def test_downtime_by_cause_has_the_costliest_first() -> None:
    table = report_text.downtime(of(crashed()))
    assert table.rows == [("a worker failed", "1", "14 s", "14.0 %"), ("the job started", "1", "11 s", "11.0 %")]


def test_nodes_that_come_late_are_named() -> None:
    late = of(*three()).latest_to_join
    assert [(it.agent.host, it.round, it.seconds) for _, it in late] == [("c", 0, 9.0), ("b", 0, 4.0)]


@pytest.mark.parametrize("clock", [3600.0, -7.0])
def test_clocks_that_differ_are_corrected_by_the_rounds(clock: float) -> None:
    right = of(*three())
    nodes = three()
    for node in nodes[1:]:
        node.clock = clock * node.rank
        for event in node.events:
            event["time"] += node.clock
    job = of(*nodes)
    assert job.attempts[0].clocks == {"a": 0.0, "b": -clock, "c": -2 * clock}
    assert [it.parts for it in job.recoveries] == [it.parts for it in right.recoveries]
    assert job.seconds == right.seconds
    how = "behind" if clock < 0 else "ahead"
    assert f"the clock of b was {report_picture.span(abs(clock))} {how}; corrected" in report_text.remarks(job)


def test_a_clock_that_is_set_while_the_job_runs_changes_nothing() -> None:
    node = crashed()
    for event in node.events[6:]:
        event["time"] += 1000
    assert of(node).recoveries == of(crashed()).recoveries


def requeued(first: int, second: int) -> Job:
    past = Node("a", attempt=first).join(0, 10, 0)
    past(50, "signalled", signal="SIGTERM").restart(50, 51)(51, "ended", job=True, outcome="stopped", status=143)
    past.events = [event for event in past.events if event["name"] != "restarting"]
    return of(past, Node("b", began=200, attempt=second).join(200, 205, 0).succeed(300))


@pytest.mark.parametrize("counted", [True, False])
def test_attempts_of_a_requeued_job_are_told_apart(counted: bool) -> None:
    job = requeued(0, 1 if counted else 0)
    assert [attempt.outcome for attempt in job.attempts] == ["stopped", "succeeded"]
    assert [(it.cause, it.seconds) for it in job.recoveries] == [("startup", 11), ("requeued", 206 - 51)]
    assert job.restarts == 0
    assert ("Attempts", "2") in report_text.summary(job)


def test_an_agent_whose_process_id_was_used_before_is_another_one() -> None:
    nodes = [Node("a", began=began).join(began, began + 1, 0).succeed(began + 10) for began in (0, 100)]
    assert len(of(*nodes).attempts) == 2


def test_the_same_events_from_two_files_count_once() -> None:
    node = crashed()
    [job] = jobs([*node.events, *node.events])
    assert job.recoveries == of(crashed()).recoveries


def test_jobs_are_reported_one_by_one() -> None:
    other = [{**event, "job": "job-0"} for event in crashed().events]
    assert [job.id for job in jobs([*crashed().events, *other])] == ["job-0", "job-1"]


def test_goodput_of_all_attempts() -> None:
    job = requeued(0, 1)
    assert job.goodput == {}
    for attempt, steps in zip(job.attempts, (100, 50), strict=True):
        assert attempt.ended
        attempt.ended["goodput"] = {"steps": steps, "in_steps": 30.0, "startup": 4.0, "elapsed": 40.0}
    assert ("Goodput", "150 steps, 75.0 % of 1 min 20 s in steps") in report_text.summary(job)
    assert report_text.goodput(job).rows == [
        ("steps", "1 min", "75.0 %"),
        ("until the first step", "8.0 s", "10.0 %"),
        ("restarts", "0.0 s", "0.0 %"),
        ("stalls after which the workers went on", "0.0 s", "0.0 %"),
        ("after the latest step", "12 s", "15.0 %"),
    ]


def test_a_hang_is_detected_from_the_latest_step_on() -> None:
    node = Node("a").join(0, 10, 0)
    node(50, "stalled", job=True, reason="rank 1 is stopped", seconds=30.0, rank=1, action="restart")
    node.restart(51, 55, "hang", failures=[FAILURE]).join(55, 60, 1).succeed(100)
    assert of(node).recoveries[1].parts == (31, 4, 5, 1, None)
    node.events[3]["action"] = "report"
    assert of(node).recoveries[1].parts == (0, 4, 5, 1, None)


def test_what_is_missing_is_said() -> None:
    nodes = three()
    del nodes[1]
    nodes[0].events.pop()
    assert of(*nodes).problems == [
        "round 0 had 3 nodes; there are events of 2",
        "round 1 had 2 nodes; there are events of 1",
        "the events break off: a",
    ]


# --- files that are not as they should be


def as_lines(node: Node) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in node.events)


def test_lines_that_are_no_events_are_left_out_and_counted() -> None:
    good = as_lines(crashed())
    bad = [b"\xff\xfe", b"[]", b"3", b'{"name": "joined"}', b'{"time": NaN}', b"{" * 100_000, b""]
    infinite = json.dumps({**crashed().events[0], "time": float("inf")}).encode()
    events, problems = parse("e.jsonl", b"\n".join([*bad, infinite]) + b"\n" + good)
    assert events == crashed().events
    assert problems == ["e.jsonl: left out what is no event, in line 1, 2, 3, 4, 5, 6, 8"]


def test_every_beginning_of_a_file_gives_a_report() -> None:
    data = as_lines(crashed())
    for size in range(0, len(data), 97):
        events, problems = parse("e.jsonl", data[:size])
        is_whole = data[:size].endswith(b"\n") or size == 0
        assert problems == ([] if is_whole else ["e.jsonl: the last line is cut off"])
        for job in jobs(events, problems):
            check_page(report_html.page([job]))
            assert report_md.page([job])


def test_wrong_values_in_any_field_give_a_report() -> None:
    events = [*crashed().events, *(event for node in three() for event in node.events)]
    names = {name for event in events for name in event} - {"time", "name", "job", "host", "pid", "elapsed"}
    for name in sorted(names):
        for value in (None, "x", -1, 1e11, [], [3], {}, {"x": 1}, True):
            changed = "".join(f"{json.dumps({**event, name: value})}\n" for event in events)
            found, problems = parse("e.jsonl", changed.encode())
            assert (len(found), problems) == (len(events), [])
            check_page(report_html.page(jobs(found)))
            report_md.page(jobs(found))


# --- what is shown


class _Checker(HTMLParser):
    """Finds tags that are not closed, ids that occur twice, and what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.referred: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.referred += (values.get("aria-labelledby") or "").split()
        assert not {"src", "href", "onclick", "onload", "onerror", "style"} & values.keys()
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "rect"), f"<{tag}/> is not closed in HTML"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def check_page(page: str) -> _Checker:
    """A page is well formed, and needs nothing from elsewhere."""
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    assert len(checker.ids) == len(set(checker.ids))
    assert set(checker.referred) <= set(checker.ids)
    assert not checker.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "://" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert "url(" not in page
    assert "@import" not in page
    return checker


def texts(page: str) -> Iterator[str]:
    yield from re.findall(r">([^<>]+)<", page)


EVIL = "</title></style><script>alert(1)</script>&amp;\"' onload=\x1b[31m\x00\udcff ```\n# | <b>"


def test_whatever_a_job_says_is_shown_and_does_nothing() -> None:
    nodes = [crashed(), *three()]
    for node in nodes:
        for event in node.events:
            event |= {name: EVIL for name in ("text", "reason", "error", "outcome", "cause", "signal") if name in event}
            event |= {"job": f"job {EVIL}", "host": f"{event['host']} {EVIL}", "level": "warning", "text": EVIL}
            if "failures" in event:
                event["failures"] = [dict.fromkeys(FAILURE, EVIL)] * 2
    made = jobs(event for node in nodes for event in node.events)
    page = report_html.page(made)
    check_page(page)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\x00" not in page
    page.encode()
    text = report_md.page(made)
    text.encode()
    outside = re.sub(r"^````text\n.*?^````$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)[<`]", outside)


def test_page_of_a_lost_node() -> None:
    page = report_html.page([of(*three())])
    checker = check_page(page)
    assert {"svg", "title", "desc", "table"} <= checker.tags
    [description] = re.findall(r"<desc[^>]*>(.*?)</desc>", page)
    assert description == (
        "3 nodes, 2 rounds. Round 0 formed after 10 s with 3 nodes. It ended because a node was lost. "
        "Round 1 formed after 52 s with 2 nodes. The outcome: succeeded."
    )
    assert "no heartbeat from c for 15 s" in set(texts(page))
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_states_of_a_node_follow_each_other() -> None:
    job = of(crashed())
    [agent] = job.attempts[0].agents
    spans = report_picture.spans(agent, BEGIN + 100)
    assert [(span.state, span.begin - BEGIN, span.end - BEGIN) for span in spans] == [
        ("waiting", 0, 10),
        ("starting", 10, 11),
        ("working", 11, 52),
        ("stopping", 52, 55),
        ("waiting", 55, 60),
        ("starting", 60, 64),  # its steps are counted, so the work begins with the first one
        ("working", 64, 100),
        ("waiting", 100, 100),
    ]
    assert [(mark.sign, mark.at - BEGIN) for mark in report_picture.marks(agent)] == [("×", 52)]


def test_a_lost_node_is_drawn_until_the_others_noticed() -> None:
    lost = of(*three()).attempts[0].agents[2]
    last = report_picture.spans(lost, BEGIN + 100)[-1]
    assert (last.state, last.begin - BEGIN, last.end - BEGIN) == ("unknown", 11, 50)
    assert [(mark.sign, mark.at - BEGIN) for mark in report_picture.marks(lost)] == [("?", 50)]


def test_of_many_nodes_those_with_trouble_are_drawn() -> None:
    nodes = [Node(f"host-{rank}", rank).join(0, 10, 0, 1000) for rank in range(1000)]
    for node in nodes:
        if node.rank == 777:
            node(50, "failed", seconds=0.1, rank=1, how="exit code 1", error="")
        node.succeed(100)
    job = of(*nodes)
    drawn = report_picture.shown(job.attempts[0])
    assert len(drawn) == report_picture.MAX_ROWS
    assert "host-777" in [agent.name for agent in drawn]
    page = report_html.page([job])
    check_page(page)
    assert "920 nodes without trouble not drawn." in set(texts(page))
    assert len(page) < 300_000


def test_markdown() -> None:
    text = report_md.page([of(crashed())])
    assert text.startswith("# Job job-1\n")
    assert "| a worker failed | 1 | 14 s | 14.0 % |" in text
    assert (
        "| +50 s | rank 1 on a failed (exit code 1, ValueError: boom) | 2.0 s | 3.0 s | 5.0 s | 1.0 s | 3.0 s | 14 s |"
        in text
    )
    assert "```text\nTraceback\n  boom\n```" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
