"""Layer 2: metrics, under torch's names and in torch's format: numbers with a name and a group, for a handler to take.

Without ``configure`` nothing happens to them. Touches what the handlers touch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

P = ParamSpec("P")
R = TypeVar("R")


class MetricsConfig:
    """Settings of ``initialize_metrics``."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = {} if params is None else params


class MetricData(NamedTuple):
    """One number."""

    timestamp: float
    """Seconds since 1970."""
    group_name: str | None
    name: str
    value: float


class MetricHandler(ABC):
    """Takes numbers."""

    @abstractmethod
    def emit(self, metric_data: MetricData) -> None:
        """Take one."""


class ConsoleMetricHandler(MetricHandler):
    """Prints ``[timestamp][group]: name=value``."""

    def emit(self, metric_data: MetricData) -> None:
        """Print one."""
        print(f"[{metric_data.timestamp}][{metric_data.group_name}]: {metric_data.name}={metric_data.value}")


class NullMetricHandler(MetricHandler):
    """Drops them."""

    def emit(self, metric_data: MetricData) -> None:
        """Drop one."""


class MetricStream:
    """A group, and its handler at the time."""

    def __init__(self, group_name: str | None, handler: MetricHandler) -> None:
        self.group_name = group_name
        self.handler = handler

    def add_value(self, metric_name: str, metric_value: float) -> None:
        """Hand a number of this group to the handler."""
        self.handler.emit(MetricData(time.time(), self.group_name, metric_name, metric_value))


_handlers: dict[str | None, MetricHandler] = {}
"""By group; None: for all groups without a handler of their own."""
_NULL = NullMetricHandler()


def initialize_metrics(cfg: MetricsConfig | None = None) -> None:
    """Does nothing, as torch's does not: ``configure`` does."""


def configure(handler: MetricHandler, group: str | None = None) -> None:
    """Have a handler take the numbers of a group; None: of all groups that have no handler of their own."""
    _handlers[group] = handler


def getStream(group: str | None) -> MetricStream:  # noqa: N802 - torch's name
    """A group and its handler."""
    return MetricStream(group, _handlers.get(group) or _handlers.get(None, _NULL))


def put_metric(metric_name: str, metric_value: float, metric_group: str = "torchelastic") -> None:
    """Hand a number to the handler of its group."""
    if _handlers:
        getStream(metric_group).add_value(metric_name, metric_value)


def publish_metric(metric_group: str, metric_name: str, metric_value: float) -> None:
    """Do the same with another order of arguments. Deprecated, as with torch: use ``put_metric``."""
    _warn("put_metric(metric_name, metric_value, metric_group)")
    put_metric(metric_name, metric_value, metric_group)


def get_elapsed_time_ms(start_time_in_seconds: float) -> int:
    """Milliseconds from a ``time.time()`` until now."""
    return int((time.time() - start_time_in_seconds) * 1000)


@overload
def prof(fn: Callable[P, R], group: str = "torchelastic") -> Callable[P, R]: ...
@overload
def prof(fn: None = None, group: str = "torchelastic") -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def prof(fn: Callable[P, R] | None = None, group: str = "torchelastic") -> Any:
    """Decorator: each call puts ``NAME.success`` or ``NAME.failure``, and ``NAME.duration.ms``.

    NAME is ``module.function`` or ``Class.method``. Used as ``@prof`` or ``@prof(group="...")``.
    """
    if fn is None:
        return partial(prof, group=group)
    name = fn.__qualname__ if "." in fn.__qualname__ else f"{fn.__module__}.{fn.__name__}"
    return _measured(fn, name, group)


def profile(group: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: as ``prof``, but NAME is the function's alone. Deprecated, as with torch: use ``prof``."""
    _warn("@prof")
    return lambda fn: _measured(fn, fn.__name__, group)


def _measured(fn: Callable[P, R], name: str, group: str | None) -> Callable[P, R]:
    @wraps(fn)
    def measured(*args: P.args, **kwargs: P.kwargs) -> R:
        start = time.monotonic()
        outcome = "failure"
        try:
            result = fn(*args, **kwargs)
            outcome = "success"
            return result
        finally:
            stream = getStream(group)  # not before: the function itself may configure it
            stream.add_value(f"{name}.{outcome}", 1)
            stream.add_value(f"{name}.duration.ms", int((time.monotonic() - start) * 1000))

    return measured


def _warn(instead: str) -> None:
    import warnings

    warnings.warn(f"Deprecated: use {instead}", FutureWarning, stacklevel=3)


def put_round_metrics(role: str, state: str, restarts: int, max_restarts: int, log: Callable[[str], None]) -> None:
    """What torch's agent tells of its workers, which it does ten times a second; here at both ends of a round.

    Args:
        role: of the workers.
        state: ``HEALTHY`` when they were started, ``FAILED``, ``UNHEALTHY`` or ``SUCCEEDED`` when the round ends.
        restarts: used up so far.
        max_restarts: that there were.
        say: takes a line for people, about a handler that raises: it ends no job.
    """
    _put_all({f"workers.{role}.remaining_restarts": max_restarts - restarts, f"workers.{role}.{state.lower()}": 1}, log)


def put_run_metrics(
    role: str, succeeded: bool, restarts: int, max_restarts: int, seconds: float, log: Callable[[str], None]
) -> None:
    """What torch's agent tells when the workers have ended for good, succeeded or failed.

    Args:
        role: of the workers.
        succeeded: whether the job did.
        restarts: used up.
        max_restarts: that there were.
        seconds: that the run took.
        say: as above.
    """
    outcome = f"run_{'success' if succeeded else 'failed'}_{'with' if restarts else 'no'}_retries"
    outcomes = (
        "run_success_with_retries",
        "run_success_no_retries",
        "run_failed_with_retries",
        "run_failed_no_retries",
    )
    _put_all(
        {
            f"workers.{role}.flakiness": 100 * restarts // (max_restarts + 1) if succeeded else 100,
            f"workers.{role}.run_total": 1,
            **{f"workers.{role}.{name}": int(name == outcome) for name in outcomes},
            "SimpleElasticAgent.run.success": 1,
            "SimpleElasticAgent.run.duration.ms": int(seconds * 1000),
        },
        log,
    )


def _put_all(metrics: dict[str, float], log: Callable[[str], None]) -> None:
    try:
        for name, value in metrics.items():
            put_metric(name, value)
    except Exception as error:
        log(f"metrics are lost: {type(error).__name__}: {error}")
