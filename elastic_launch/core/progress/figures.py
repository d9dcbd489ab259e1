"""Put what the workers get done into numbers for those who look at a running job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_launch.core.agent.lifecycle import AgentState
from elastic_launch.core.progress import goodput
from elastic_launch.core.progress.memory import WorkerProgress
from elastic_launch.core.status import Progress


def figures(
    state: AgentState, workers: Mapping[int, WorkerProgress], stalled: float, is_stalled: bool, now: float
) -> Progress:
    """Return the figures of this node's workers, and of the job, for which they stand.

    Args:
        state: the agent's.
        workers: what the workers of the round have told, by local rank.
        stalled: seconds for which they have been found stalled in this round.
        is_stalled: whether they are stalled now.
        now: seconds of CLOCK_MONOTONIC.
    """
    if state.assignment is None:
        return Progress()
    past = state.assignment.restart_history.goodput
    made = goodput.round_progress(workers.values(), stalled)
    total = goodput.with_round(past, made, state.started_at, now, now, now)
    speeds = [speed for each in workers.values() if (speed := _speed(each)) is not None]
    sinces = [since for each in workers.values() if (since := _since(each, now)) is not None]
    elapsed = total.elapsed
    job = {
        "steps": total.steps,
        "steps_per_second": round(max(speeds), 4) if speeds else None,
        "seconds_since_step": min(sinces, default=None),
        "stalled": is_stalled,
        "goodput": round(total.in_steps / elapsed, 4) if total.steps and elapsed else None,
        "in_steps": total.in_steps,
        "elapsed": round(elapsed, 3),
        "startup": total.startup,
        "stalled_seconds": total.stalled,
        "repeated": total.repeated,
        "lost_seconds": total.lost._asdict(),
        "summary": goodput.summary(total),
    }
    return Progress({rank: _worker(each, now) for rank, each in workers.items()}, job if total.steps else {})


def _worker(each: WorkerProgress, now: float) -> dict[str, Any]:
    speed = _speed(each)
    return {
        "steps": each.iterations,
        "step": each.number,
        "seconds_since_step": _since(each, now),
        "steps_per_second": None if speed is None else round(speed, 4),
        "phase": each.phase or None,
    }


def _speed(each: WorkerProgress) -> float | None:
    """Return a worker's steps per second in this round; None before its second step."""
    seconds = each.last - each.first
    return (each.iterations - 1) / seconds if each.iterations > 1 and seconds > 0 else None


def _since(each: WorkerProgress, now: float) -> float | None:
    """Return the seconds since a worker's latest step; None before its first."""
    return round(max(0.0, now - each.last), 3) if each.iterations else None
