"""The exporter's metrics: what they are called, what is promised of them, and how they follow from statuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from elastic_launch.core.agent.lifecycle import AgentPhase, AgentState
from elastic_launch.core.agent.messages import Limits
from elastic_launch.core.agent.root_cause import Exit
from elastic_launch.core.status import Facts, Meeting, Progress, Totals, agent_status
from elastic_launch.job import Assignment, Policy
from elastic_launch.operate import exporter
from elastic_launch.operate.exporter import JobCollector
from elastic_launch.operate.exporter_metrics import IDENTITY, METRICS, UNUSABLE, WORKER_STATES, Kind

ROOT = Path(__file__).parents[2]
SUFFIXES = {Kind.COUNTER: ["_total"], Kind.INFO: ["_info"], Kind.GAUGE: [""], Kind.SUMMARY: ["_count", "_sum"]}
ASSIGNMENT = Assignment(1, 2, 2, 4, 2, 2, 4, "127.0.0.1", 29500, "host-b", port_picked=True, restart_count=2)
JOB = {
    "steps": 10,
    "seconds_since_step": 0.5,
    "stalled": False,
    "goodput": 0.75,
    "in_steps": 6.0,
    "startup": 1.0,
    "stalled_seconds": 0.25,
    "repeated": 3,
    "lost_seconds": {"detection": 0.1, "stopping": 0.2, "rendezvous": 0.3, "start": 0.4},
}


def status(pid: int = 4711, job: str = "job", started_at: float = 1000.0, **changes: Any) -> dict[str, Any]:
    """The status of an agent with two workers, ranks 2 and 3."""
    limits = Limits(Policy(3), 30)
    state = AgentState(limits, AgentPhase.RUNNING, assignment=ASSIGNMENT, pids={0: 100, 1: 101}, **changes)
    made = agent_status(
        Facts(job, "host-b", pid, "0.1.0", "train.py", started_at, 3, 30.0, ""),
        state,
        Meeting("c10d", "host-a:29400", min_nodes=1, max_nodes=4),
        [(ASSIGNMENT, 1100.0, None, None)],
        {},
        5.0,
        Progress({0: {"steps": 4, "seconds_since_step": 0.5}}, JOB),
        Totals(2, 1.5, {"failed": 1}),
    )
    assert json.loads(json.dumps(made)) == made
    return made


class Agents:
    """What the agents of this host answer."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, Any] | None] = {}
        self.registry = CollectorRegistry()
        self.registry.register(JobCollector({}))

    def scrape(self) -> dict[str, dict[tuple[str, ...], float]]:
        """The samples: by name, and by the labels' values in the order of their names."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for sample in (sample for family in self.registry.collect() for sample in family.samples):
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample} twice"
            found[sample.name][labels] = sample.value
        return found


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    agents = Agents()
    monkeypatch.setattr(exporter, "everybodys_sockets", lambda environ: (sorted(agents.answers), []))
    monkeypatch.setattr(exporter, "ask_all", lambda paths: [(path, -1, agents.answers[path]) for path in paths])
    return agents


def test_every_figure_of_a_status_becomes_a_sample(agents: Agents) -> None:
    agents.answers["/run/job.4711.abc.sock"] = status(exits=(Exit(1, 3, 1.0),))
    found = agents.scrape()
    me = ("0", "host-b", "job")  # agent, host, job_id
    single = {name: samples[me] for name, samples in found.items() if me in samples}
    assert single == {
        "elastic_agent_up": 1,
        "elastic_agent_start_time_seconds": 1000,
        "elastic_agent_rendezvous_seconds_count": 2,
        "elastic_agent_rendezvous_seconds_sum": 1.5,
        "elastic_job_nodes": 2,
        "elastic_job_min_nodes": 1,
        "elastic_job_max_nodes": 4,
        "elastic_job_world_size": 4,
        "elastic_job_rounds_total": 3,
        "elastic_job_restarts_left": 3,
        "elastic_job_steps_total": 10,
        "elastic_job_repeated_steps_total": 3,
        "elastic_job_last_step_age_seconds": 0.5,
        "elastic_job_stalled": 0,
        "elastic_job_goodput_ratio": 0.75,
        "elastic_job_step_seconds_total": 6,
    }
    assert found["elastic_agent_info"] == {("0", "c10d", "host-b", "job", "", "0.1.0"): 1}
    assert [key for key, value in found["elastic_agent_state"].items() if value] == [(*me, "running")]
    assert len(found["elastic_agent_state"]) == len(AgentPhase)
    workers = {state: found["elastic_agent_workers"][(*me, state)] for state in WORKER_STATES}
    assert {state: count for state, count in workers.items() if count} == {"running": 1, "failed": 1}
    assert {key[1]: value for key, value in found["elastic_job_restarts_total"].items() if value} == {"failed": 1}
    assert {key[-1]: value for key, value in found["elastic_job_lost_seconds_total"].items()} == {
        "startup": 1.0,
        "stalled": 0.25,
        **JOB["lost_seconds"],  # type: ignore[dict-item]
    }
    assert found["elastic_worker_steps_total"] == {(*me, "2"): 4}
    assert found["elastic_worker_last_step_age_seconds"] == {(*me, "2"): 0.5}


def test_of_an_agent_that_does_not_answer_only_that_is_told(agents: Agents) -> None:
    path = "/run/my.job.4711.abc.sock"
    agents.answers[path] = None
    down = {"elastic_agent_up": {("0", os.uname().nodename, "my.job"): 0.0}, UNUSABLE: {(): 0.0}}
    assert agents.scrape() == down, "known from the name of its socket"
    agents.answers[path] = status(job="my:job")
    assert agents.scrape()["elastic_agent_up"] == {("0", "host-b", "my:job"): 1.0}
    agents.answers[path] = None
    assert agents.scrape() == {**down, "elastic_agent_up": {("0", "host-b", "my:job"): 0.0}}, "it has answered before"


def test_agents_with_the_same_job_and_host_keep_their_numbers(agents: Agents) -> None:
    agents.answers = {"/run/a": status(1, started_at=20.0), "/run/b": status(2, started_at=10.0)}
    started = {("0", "host-b", "job"): 10.0, ("1", "host-b", "job"): 20.0}
    assert agents.scrape()["elastic_agent_start_time_seconds"] == started
    del agents.answers["/run/b"]
    assert agents.scrape()["elastic_agent_start_time_seconds"] == {("1", "host-b", "job"): 20.0}
    agents.answers["/run/c"] = status(3, started_at=30.0)
    found = agents.scrape()["elastic_agent_start_time_seconds"]
    assert found == {("0", "host-b", "job"): 30.0, ("1", "host-b", "job"): 20.0}


def test_an_account_that_is_corrected_does_not_look_like_a_restart(agents: Agents) -> None:
    def seen(lost: float, worker: int) -> tuple[float, float]:
        job = {**JOB, "lost_seconds": {**JOB["lost_seconds"], "start": lost}}  # type: ignore[dict-item]
        it = agents.answers["/run/a"] = {**status(), "progress": job}
        it["workers"][0]["progress"]["steps"] = worker
        found = agents.scrape()
        me = ("0", "host-b", "job")
        return found["elastic_job_lost_seconds_total"][(*me, "start")], found["elastic_worker_steps_total"][(*me, "2")]

    assert seen(5.0, 100) == (5.0, 100)
    assert seen(4.5, 1) == (5.0, 1), "a worker's steps do begin anew"
    assert seen(6.0, 2) == (6.0, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": None},
        {"workers": [{"rank": 0}]},
        {"totals": {}},
        {"started_at": "now"},
        {"store": "none"},
        {"nodes": [1]},
        {"rounds": [{}]},
        {"job": None, "host": None, "pid": {}, "progress": 5},
    ],
    ids=str,
)
def test_a_status_of_another_kind_harms_nobody_else(agents: Agents, change: dict[str, Any]) -> None:
    agents.answers = {"/run/good.1.a.sock": status(), "/run/odd.2.a.sock": {**status(job="odd"), **change}}
    up = agents.scrape()["elastic_agent_up"]
    assert up.pop(("0", "host-b", "job")) == 1.0
    assert list(up.values()) == [0.0]


def test_a_job_id_that_is_no_text_is_a_label_all_the_same(agents: Agents) -> None:
    agents.answers["/run/a"] = status(job="\udcff\n\"x'")
    assert ("0", "host-b", "?\n\"x'") in agents.scrape()["elastic_agent_up"]


# ---- Names


def test_names_follow_the_conventions_of_prometheus() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"elastic_(agent|job|worker)(_[a-z]+)+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert metric.name.endswith("_info") == (metric.kind is Kind.INFO)
        assert metric.help.endswith(".")
        base = metric.name.removesuffix("_total")
        assert not re.search(r"_(s|sec|ms|milliseconds|minutes|kib|mib|kilobytes|percent)$", base)
        assert not {"job", "instance", "le", "quantile"} & set(metric.labels)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def documented() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric in docs/operating.md."""
    page = (ROOT / "docs" / "operating.md").read_text()
    _, _, below = page.partition("\n### The metrics\n")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", below.partition("\n## ")[0], re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_page_lists_all_metrics_and_no_other() -> None:
    expected = {metric.name: (metric.kind.value, set(metric.labels)) for metric in METRICS}
    expected["elastic_agent_info"] = ("info", {"user", "version", "backend"})
    assert documented() == {**expected, UNUSABLE: ("gauge", set())}


# ---- The dashboard


DASHBOARD = json.loads((ROOT / "examples" / "grafana-dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
TARGETS = [target for panel in PANELS for target in panel.get("targets", ())]
QUERIES = [target["expr"] for target in TARGETS]


def labels_of(sample: str) -> set[str]:
    """The labels of a sample of the exporter, by its name."""
    if sample == UNUSABLE:
        return set()
    [metric] = [m for m in METRICS if sample in (m.name, *(m.name + suffix for suffix in SUFFIXES[m.kind]))]
    return {*IDENTITY, *(documented()[metric.name][1])}


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are() -> None:
    asked = set()
    for target in TARGETS:
        names = re.findall(r"elastic_\w+", target["expr"])
        assert names, target
        asked |= set(names)
        known = set.intersection(*map(labels_of, names))
        used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        for matchers in re.findall(r"\{(.*?)\}", target["expr"]):
            used |= set(re.findall(r"(\w+)=", matchers))
        grouped = [set(re.split(r", *", labels)) for labels in re.findall(r"by \((.*?)\)", target["expr"])]
        for labels in grouped:
            used |= labels
        assert used <= known, (target, used - known)
        if grouped:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped[0], target
    samples = {
        metric.name + suffix for metric in METRICS if metric.kind is Kind.SUMMARY for suffix in ("_count", "_sum")
    }
    samples |= {metric.name for metric in METRICS if metric.kind is not Kind.SUMMARY}
    assert asked == {*samples, UNUSABLE}, "all are shown"


def test_the_dashboard_takes_rates_of_counters_only() -> None:
    counters = {metric.name for metric in METRICS if metric.kind is Kind.COUNTER}
    counters |= {
        metric.name + suffix for metric in METRICS if metric.kind is Kind.SUMMARY for suffix in ("_count", "_sum")
    }
    for query in QUERIES:
        for function, name in re.findall(r"(\w+)\((elastic_\w+)(?=\{.*?\}\[)", query):
            assert function in ("rate", "increase")
            assert name in counters
        assert query.count("[") == len(re.findall(r"(?:rate|increase)\(elastic_\w+\{", query))


def test_figures_of_a_whole_job_are_not_added_up_over_its_hosts() -> None:
    """Each host tells them."""
    for query in (query for query in QUERIES if "elastic_job_" in query):
        assert re.match(r"(sum( by \(\w+\))? \(|sum\(|avg\(|time\(\) - )?(max|min) by \(job_id", query), query


def test_the_dashboards_variables_are_those_that_it_uses() -> None:
    made = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__range", "__all"}
    assert used == made
    for variable in DASHBOARD["templating"]["list"]:
        for name, matchers, label in re.findall(r"label_values\((\w+)(.*?), (\w+)\)", json.dumps(variable["query"])):
            assert {label, *re.findall(r"(\w+)=", matchers)} <= labels_of(name)


def test_the_dashboards_panels_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
