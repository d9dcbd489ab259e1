"""The metrics of ``elastic-job exporter``: what they are called, and how they follow from an agent's status. Pure.

``docs/operating.md`` has the same list, and a test compares them. To add a metric, add it to ``METRICS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from elastic_launch.core.agent.lifecycle import AgentPhase
from elastic_launch.core.agent.restart_policy import CAUSES

IDENTITY = ("job_id", "host", "agent")
"""Labels of every metric of an agent. Not ``job``: that is what Prometheus calls the target itself."""
WORKER_STATES = ("starting", "running", "stopping", "succeeded", "failed", "stopped")
LOST = ("detection", "stopping", "rendezvous", "start")
"""What a restart costs time for, as in the field ``lost_seconds`` of a status."""


class Kind(Enum):
    """Types of metrics."""

    GAUGE = "gauge"
    COUNTER = "counter"
    INFO = "info"
    SUMMARY = "summary"


class Usage(NamedTuple):
    """What a worker's process uses."""

    cpu: float
    """Seconds of CPU time since it started."""
    memory: int
    """Bytes in memory (resident)."""


class Seen(NamedTuple):
    """What is known of one agent."""

    status: Mapping[str, Any]
    """As described in ``docs/operating.md``."""
    user: str = ""
    """Whose agent it is."""
    usage: Mapping[int, Usage] = {}
    """By rank, of the workers on this host."""


Values = Iterable[tuple[tuple[str, ...], Any]]
"""Values of the further labels, with the metric's value; None if that is not known."""


class Metric(NamedTuple):
    """One metric, for all agents."""

    name: str
    kind: Kind
    help: str
    """One sentence, shown by Prometheus and Grafana."""
    values: Callable[[Seen], Values]
    """Returns an agent's values. Those of a summary are count and sum, those of an info are a dict of labels."""
    labels: tuple[str, ...] = ()
    """The labels besides ``IDENTITY``."""
    never_falls: bool = False
    """Whether a smaller value would be no restart but a correction, as when the fastest worker becomes another one."""


def _one(find: Callable[[Mapping[str, Any]], Any]) -> Callable[[Seen], Values]:
    """Return what finds the only value of a metric in a status."""
    return lambda seen: [((), find(seen.status))]


def _field(name: str) -> Callable[[Seen], Values]:
    return _one(lambda status: status[name])


def _progress(name: str) -> Callable[[Seen], Values]:
    return _one(lambda status: (status["progress"] or {}).get(name))


def _info(seen: Seen) -> Values:
    about = {"user": seen.user, "version": seen.status["launcher"], "backend": seen.status["store"]["backend"]}
    return [((), about)]


def _state(seen: Seen) -> Values:
    return [((phase.value,), float(seen.status["state"] == phase.value)) for phase in AgentPhase]


def _rounds(status: Mapping[str, Any]) -> int:
    return status["rounds"][-1]["round"] + 1 if status["rounds"] else 0


def _restarts(seen: Seen) -> Values:
    found = seen.status["totals"]["restarts"]
    return [((cause,), found.get(cause, 0)) for cause in dict.fromkeys((*CAUSES, *found))]


def _rendezvous(seen: Seen) -> Values:
    totals = seen.status["totals"]
    return [((), (totals["rounds"], totals["rendezvous_seconds"]))]


def _lost(seen: Seen) -> Values:
    if not (progress := seen.status["progress"]):
        return []
    found = {"startup": progress["startup"], "stalled": progress["stalled_seconds"]}
    found |= {kind: progress["lost_seconds"][kind] for kind in LOST}
    return [((kind,), seconds) for kind, seconds in found.items()]


def _worker_states(seen: Seen) -> Values:
    counts = Counter(worker["state"] for worker in seen.status["workers"])
    return [((state,), counts[state]) for state in dict.fromkeys((*WORKER_STATES, *counts))]


def _of_workers(name: str) -> Callable[[Seen], Values]:
    return lambda seen: [
        ((str(worker["rank"]),), (worker["progress"] or {}).get(name)) for worker in seen.status["workers"]
    ]


def _usage(find: Callable[[Usage], float]) -> Callable[[Seen], Values]:
    return lambda seen: [((str(rank),), find(usage)) for rank, usage in seen.usage.items()]


UP = Metric("elastic_agent_up", Kind.GAUGE, "Whether the agent answers: 1 or 0.", lambda seen: [((), 1)])
"""The only metric of an agent that does not answer."""
METRICS = (
    UP,
    Metric("elastic_agent_info", Kind.INFO, "The agent's user, version and rendezvous backend.", _info),
    Metric(
        "elastic_agent_start_time_seconds",
        Kind.GAUGE,
        "When the agent started, in seconds since 1970.",
        _field("started_at"),
    ),
    Metric("elastic_agent_state", Kind.GAUGE, "1 for the agent's state, 0 for all others.", _state, ("state",)),
    Metric("elastic_agent_workers", Kind.GAUGE, "Workers of this node, by state.", _worker_states, ("state",)),
    Metric(
        "elastic_agent_rendezvous_seconds",
        Kind.SUMMARY,
        "Rounds in which this node got a place since its agent started, and the time that it waited for them.",
        _rendezvous,
    ),
    Metric("elastic_job_nodes", Kind.GAUGE, "Nodes in the round.", _field("nodes")),
    Metric("elastic_job_min_nodes", Kind.GAUGE, "Nodes that the job needs.", _field("min_nodes")),
    Metric("elastic_job_max_nodes", Kind.GAUGE, "Nodes that the job can use.", _field("max_nodes")),
    Metric("elastic_job_world_size", Kind.GAUGE, "Workers in the round, on all nodes.", _field("world_size")),
    Metric("elastic_job_rounds_total", Kind.COUNTER, "Rounds that the job has begun.", _one(_rounds), never_falls=True),
    Metric(
        "elastic_job_restarts_total",
        Kind.COUNTER,
        "Restarts of the job that this node has seen since its agent started, by cause.",
        _restarts,
        ("cause",),
    ),
    Metric(
        "elastic_job_restarts_left",
        Kind.GAUGE,
        "Restarts after failures that the job has left.",
        _one(lambda status: status["max_restarts"] - status["restarts"]),
    ),
    Metric(
        "elastic_job_steps_total",
        Kind.COUNTER,
        "Steps of the job, in all its rounds.",
        _progress("steps"),
        never_falls=True,
    ),
    Metric(
        "elastic_job_repeated_steps_total",
        Kind.COUNTER,
        "Steps that the job had made before, as far as the script numbers them.",
        _progress("repeated"),
        never_falls=True,
    ),
    Metric(
        "elastic_job_last_step_age_seconds",
        Kind.GAUGE,
        "Time since the latest step of any worker of this node.",
        _progress("seconds_since_step"),
    ),
    Metric("elastic_job_stalled", Kind.GAUGE, "Whether no rank makes progress: 1 or 0.", _progress("stalled")),
    Metric(
        "elastic_job_goodput_ratio",
        Kind.GAUGE,
        "Share of the job's time that was spent in steps, from 0 to 1.",
        _progress("goodput"),
    ),
    Metric(
        "elastic_job_step_seconds_total",
        Kind.COUNTER,
        "Time that the job has spent in steps.",
        _progress("in_steps"),
        never_falls=True,
    ),
    Metric(
        "elastic_job_lost_seconds_total",
        Kind.COUNTER,
        "Time that the job has lost: at startup, in stalls, and by restarts.",
        _lost,
        ("kind",),
        never_falls=True,
    ),
    Metric(
        "elastic_worker_steps_total",
        Kind.COUNTER,
        "Steps of the worker in this round.",
        _of_workers("steps"),
        ("rank",),
    ),
    Metric(
        "elastic_worker_last_step_age_seconds",
        Kind.GAUGE,
        "Time since the worker's latest step.",
        _of_workers("seconds_since_step"),
        ("rank",),
    ),
    Metric(
        "elastic_worker_cpu_seconds_total",
        Kind.COUNTER,
        "CPU time of the worker's process.",
        _usage(lambda usage: usage.cpu),
        ("rank",),
    ),
    Metric(
        "elastic_worker_resident_memory_bytes",
        Kind.GAUGE,
        "Resident memory of the worker's process.",
        _usage(lambda usage: usage.memory),
        ("rank",),
    ),
)
UNUSABLE = "elastic_exporter_unusable_directories"
"""The only metric that is of no agent."""
