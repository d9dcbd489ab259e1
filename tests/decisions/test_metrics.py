"""Metrics: torch's names, signatures and printed format."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import cast

import pytest

from elastic_launch import metrics
from elastic_launch.agent.telemetry import Telemetry
from elastic_launch.core.agent.lifecycle import AgentState
from elastic_launch.core.agent.messages import Finish, GroupReaped, Limits, Started
from elastic_launch.core.agent.root_cause import Exit
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Assignment, Policy, RestartHistory
from elastic_launch.metrics import (
    ConsoleMetricHandler,
    MetricData,
    MetricHandler,
    MetricsConfig,
    NullMetricHandler,
    configure,
    get_elapsed_time_ms,
    getStream,
    initialize_metrics,
    prof,
    profile,
    publish_metric,
    put_metric,
)
from elastic_launch.worker_spec import Rendezvous, WorkerSpec


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_handlers", {})


class Kept(MetricHandler):
    """Keeps what it receives."""

    def __init__(self) -> None:
        self.data: list[MetricData] = []

    def emit(self, metric_data: MetricData) -> None:
        self.data.append(metric_data)

    def values(self) -> dict[str, float]:
        return {data.name: data.value for data in self.data}


@pytest.fixture
def kept() -> Kept:
    handler = Kept()
    configure(handler)
    return handler


def silence(line: str) -> None:
    raise AssertionError(line)


def test_nothing_is_printed_unless_configured(capsys: pytest.CaptureFixture[str]) -> None:
    put_metric("name", 1)
    configure(NullMetricHandler())
    put_metric("name", 1)
    assert capsys.readouterr().out == ""


def test_console_prints_in_torchs_format(capsys: pytest.CaptureFixture[str]) -> None:
    configure(ConsoleMetricHandler())
    before = time.time()
    put_metric("name", 1)
    put_metric("other", 2.5, "group")
    first, second = capsys.readouterr().out.splitlines()
    match = re.fullmatch(r"\[(\d+\.\d+)\]\[torchelastic\]: name=1", first)
    assert match
    assert before <= float(match[1]) <= time.time()
    assert second.endswith("][group]: other=2.5")


def test_group_with_its_own_handler(kept: Kept) -> None:
    own = Kept()
    configure(own, "mine")
    put_metric("a", 1, "mine")
    put_metric("b", 2, "other")
    getStream("mine").add_value("c", 3)
    assert [(data.group_name, data.name, data.value) for data in own.data] == [("mine", "a", 1), ("mine", "c", 3)]
    assert [(data.group_name, data.name, data.value) for data in kept.data] == [("other", "b", 2)]


def test_group_can_be_silenced(kept: Kept) -> None:
    configure(NullMetricHandler(), "quiet")
    put_metric("a", 1, "quiet")
    assert kept.data == []


@prof
def free_function(a: int, b: int = 1) -> int:
    """Adds."""
    return a + b


class Thing:
    @prof(group="things")
    def method(self) -> None:
        raise KeyError("x")


def test_prof_measures_a_call(kept: Kept) -> None:
    assert free_function(1, b=2) == 3
    assert (free_function.__name__, free_function.__doc__) == ("free_function", "Adds.")
    name = f"{__name__}.free_function"
    assert [(data.group_name, data.name) for data in kept.data] == [
        ("torchelastic", f"{name}.success"),
        ("torchelastic", f"{name}.duration.ms"),
    ]
    assert kept.values()[f"{name}.success"] == 1


def test_prof_counts_a_failure_and_lets_the_exception_pass(kept: Kept) -> None:
    with pytest.raises(KeyError, match="x"):
        Thing().method()
    assert [(data.group_name, data.name) for data in kept.data] == [
        ("things", "Thing.method.failure"),
        ("things", "Thing.method.duration.ms"),
    ]


def test_function_that_configures_is_measured(kept: Kept) -> None:
    own = Kept()

    @prof
    def main() -> None:
        time.sleep(0.02)
        configure(own)

    main()
    assert kept.data == []
    assert own.data[1].value >= 20


def test_deprecated_names_work_and_warn(kept: Kept) -> None:
    with pytest.warns(FutureWarning, match="use @prof"):

        @profile("group")
        def work() -> int:
            return 1

    assert work() == 1
    with pytest.warns(FutureWarning, match="put_metric") as warned:
        publish_metric("group", "name", 3)
    assert warned[0].filename == __file__
    assert [(data.group_name, data.name) for data in kept.data] == [
        ("group", "work.success"),
        ("group", "work.duration.ms"),
        ("group", "name"),
    ]


def test_small_names() -> None:
    assert MetricsConfig().params == {}
    initialize_metrics(MetricsConfig({"a": "b"}))
    elapsed = get_elapsed_time_ms(time.time() - 1)
    assert isinstance(elapsed, int)
    assert 1000 <= elapsed < 60_000
    assert MetricData(1.0, "g", "n", 2)._fields == ("timestamp", "group_name", "name", "value")
    with pytest.raises(TypeError, match="abstract"):
        MetricHandler()  # type: ignore[abstract]


def telemetry(role: str, max_restarts: int, log: Callable[[str], None] = silence) -> Telemetry:
    rendezvous = cast(Rendezvous, None)  # not used here
    spec = WorkerSpec(role, 1, rendezvous, entrypoint="sh", max_restarts=max_restarts)
    return Telemetry(spec, "job", silence, log)


def after(restarts: int, *exits: Exit) -> AgentState:
    """Return the state of an agent in the round that follows so many restarts."""
    assignment = Assignment(0, 1, 0, 1, 1, 0, 1, "127.0.0.1", 1, "host", True)
    history = RestartHistory(used=restarts)
    return AgentState(Limits(Policy(), 30), assignment=assignment._replace(restart_history=history), exits=exits)


def test_the_agents_metrics_of_a_round(kept: Kept) -> None:
    telemetry("trainer", 3).observe(GroupReaped({}), after(1, Exit(0, 1, 0.0)))
    assert kept.values() == {"workers.trainer.remaining_restarts": 2, "workers.trainer.failed": 1}


@pytest.mark.parametrize(
    ("succeeded", "restarts", "max_restarts", "flakiness", "outcome"),
    [  # as torch's agent puts them
        (True, 0, 0, 0, "run_success_no_retries"),
        (True, 1, 1, 50, "run_success_with_retries"),
        (True, 1, 3, 25, "run_success_with_retries"),
        (False, 0, 0, 100, "run_failed_no_retries"),
        (False, 3, 3, 100, "run_failed_with_retries"),
    ],
)
def test_the_agents_metrics_of_a_run(
    kept: Kept, succeeded: bool, restarts: int, max_restarts: int, flakiness: int, outcome: str
) -> None:
    failures = () if succeeded else (ProcessFailure(0, 100, 1),)
    telemetry("default", max_restarts).end(after(restarts), Finish(failures))
    values = kept.values()
    assert values.pop("SimpleElasticAgent.run.success") == 1
    assert 0 <= values.pop("SimpleElasticAgent.run.duration.ms") < 60_000
    assert values.pop("workers.default.flakiness") == flakiness
    assert values.pop("workers.default.run_total") == 1
    assert sorted(values) == [
        f"workers.default.run_{end}_{retries}_retries" for end in ("failed", "success") for retries in ("no", "with")
    ]
    assert {name for name, value in values.items() if value} == {f"workers.default.{outcome}"}


def test_handler_that_raises_does_not_end_the_job() -> None:
    class Broken(MetricHandler):
        def emit(self, metric_data: MetricData) -> None:
            raise OSError("disk")

    configure(Broken())
    logged: list[str] = []
    broken = telemetry("default", 0, logged.append)
    broken.observe(Started({}), after(0))
    broken.end(after(0), Finish())
    assert logged == ["metrics are lost: OSError: disk"] * 2
