"""Metrics under torch's names. A metric has a name and a group, and its values go to the handler of the group.

Values are dropped until ``configure`` sets a handler. The agent's own metrics are in the group ``torchelastic``.

>>> configure(ConsoleMetricHandler(), "loader")
>>> put_metric("samples", 512, "loader")  # doctest: +ELLIPSIS
[...][loader]: samples=512
>>> configure(NullMetricHandler(), "loader")
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
    """Settings of ``initialize_metrics``, which ignores them."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = {} if params is None else params


class MetricData(NamedTuple):
    """One value of a metric."""

    timestamp: float
    """Seconds since 1970."""
    group_name: str | None
    """Name of the metric's group."""
    name: str
    """Name of the metric."""
    value: float
    """The value."""


class MetricHandler(ABC):
    """Receives values of metrics. Derive from it, and pass an instance to ``configure``."""

    @abstractmethod
    def emit(self, metric_data: MetricData) -> None:
        """Receive one value, in the thread that puts it."""


class ConsoleMetricHandler(MetricHandler):
    """Prints ``[TIMESTAMP][GROUP]: NAME=VALUE`` to standard output."""

    def emit(self, metric_data: MetricData) -> None:
        """Print one value."""
        print(f"[{metric_data.timestamp}][{metric_data.group_name}]: {metric_data.name}={metric_data.value}")


class NullMetricHandler(MetricHandler):
    """Drops all values."""

    def emit(self, metric_data: MetricData) -> None:
        """Drop one value."""


class MetricStream:
    """A group of metrics, and the handler that it had when the stream was created."""

    def __init__(self, group_name: str | None, handler: MetricHandler) -> None:
        self.group_name = group_name
        self.handler = handler

    def add_value(self, metric_name: str, metric_value: float) -> None:
        """Pass a value to the handler, with the current time."""
        self.handler.emit(MetricData(time.time(), self.group_name, metric_name, metric_value))


_handlers: dict[str | None, MetricHandler] = {}
"""Handlers by group. The key None stands for all groups that have no handler."""
_NULL = NullMetricHandler()


def initialize_metrics(cfg: MetricsConfig | None = None) -> None:
    """Do nothing, as in torch. Call ``configure`` instead."""


def configure(handler: MetricHandler, group: str | None = None) -> None:
    """Set the handler of a group.

    Args:
        handler: receives the group's values from now on.
        group: the group's name; None for all groups without a handler.
    """
    _handlers[group] = handler


def getStream(group: str | None) -> MetricStream:  # noqa: N802 - torch's name
    """Return a stream to the current handler of a group."""
    return MetricStream(group, _handlers.get(group) or _handlers.get(None, _NULL))


def put_metric(metric_name: str, metric_value: float, metric_group: str = "torchelastic") -> None:
    """Pass a value to the handler of the metric's group."""
    if _handlers:
        getStream(metric_group).add_value(metric_name, metric_value)


def publish_metric(metric_group: str, metric_name: str, metric_value: float) -> None:
    """Pass a value to the handler of the metric's group. Deprecated, as in torch: use ``put_metric``."""
    _warn("put_metric(metric_name, metric_value, metric_group)")
    put_metric(metric_name, metric_value, metric_group)


def get_elapsed_time_ms(start_time_in_seconds: float) -> int:
    """Return the milliseconds since a time that ``time.time()`` returned."""
    return int((time.time() - start_time_in_seconds) * 1000)


@overload
def prof(fn: Callable[P, R], group: str = "torchelastic") -> Callable[P, R]: ...
@overload
def prof(fn: None = None, group: str = "torchelastic") -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def prof(fn: Callable[P, R] | None = None, group: str = "torchelastic") -> Any:
    """Decorate a function to put ``NAME.success`` or ``NAME.failure``, and ``NAME.duration.ms``, after each call.

    NAME is ``module.function`` or ``Class.method``. Use it as ``@prof`` or as ``@prof(group="loader")``.

    Args:
        fn: the function.
        group: the group of these metrics.
    """
    if fn is None:
        return partial(prof, group=group)
    name = fn.__qualname__ if "." in fn.__qualname__ else f"{fn.__module__}.{fn.__name__}"
    return _measured(fn, name, group)


def profile(group: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function as ``prof`` does, but with NAME as the function's name. Deprecated, as in torch."""
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
            stream = getStream(group)  # not earlier: the function may configure the group
            stream.add_value(f"{name}.{outcome}", 1)
            stream.add_value(f"{name}.duration.ms", int((time.monotonic() - start) * 1000))

    return measured


def _warn(instead: str) -> None:
    import warnings

    warnings.warn(f"Deprecated: use {instead}", FutureWarning, stacklevel=3)
