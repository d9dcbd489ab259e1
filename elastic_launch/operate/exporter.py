"""``elastic-job exporter``: the jobs of this host, for Prometheus.

Nothing is asked and nothing is kept between two scrapes, except what makes the numbers of one fit those of the next.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import pwd
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import psutil

from elastic_launch.control.client import ask_all, everybodys_sockets
from elastic_launch.env import environment
from elastic_launch.errors import LaunchError, UnavailableError
from elastic_launch.host.ports import port_owner
from elastic_launch.operate.exporter_metrics import IDENTITY, METRICS, UNUSABLE, UP, Kind, Metric, Seen, Usage

try:
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        InfoMetricFamily,
        SummaryMetricFamily,
    )
    from prometheus_client.metrics_core import Metric as Family
except ImportError as error:
    raise UnavailableError(f"elastic-job exporter needs: pip install 'elastic-launch[metrics]' ({error})") from error

PORT = 9469
_FAMILIES: Mapping[Kind, Any] = {
    Kind.GAUGE: GaugeMetricFamily,
    Kind.COUNTER: CounterMetricFamily,
    Kind.INFO: InfoMetricFamily,
    Kind.SUMMARY: SummaryMetricFamily,
}
_BAD_STATUS = (LookupError, TypeError, ValueError, AttributeError, OverflowError)
"""What comes of a status that is not as it should be."""

Samples = dict[tuple[str, tuple[str, ...]], tuple[Any, ...]]
"""Values by name of the metric and values of all its labels. A summary has two, all others have one."""


def main(argv: Iterable[str]) -> int:
    """Serve the metrics until a signal comes, or print them. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="elastic-job exporter",
        description="Serve metrics of your jobs on this host to Prometheus; as root, of the jobs of all users.",
    )
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"listen here (default: {PORT}; 0: any)")
    parser.add_argument(
        "--bind",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="listen on this address of the host (default: 127.0.0.1); 0.0.0.0 or :: if Prometheus is elsewhere",
    )
    parser.add_argument("--once", action="store_true", help="print the metrics, as for the textfile collector, and end")
    args = parser.parse_args(list(argv))
    registry = CollectorRegistry()
    registry.register(JobCollector(environment()))
    if args.once:
        sys.stdout.buffer.write(generate_latest(registry))
        return 0
    try:
        server, thread = start_http_server(args.port, args.bind, registry)
    except (OSError, OverflowError) as error:
        raise _cannot_listen(args.bind, args.port, error) from error
    host = f"[{args.bind}]" if ":" in args.bind else args.bind
    print(f"elastic-job: metrics are at http://{host}:{server.server_port}/metrics", file=sys.stderr, flush=True)
    thread.join()
    return 0


def _cannot_listen(address: str, port: int, error: Exception) -> LaunchError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        by = f" by {owner}" if (owner := port_owner(port)) else ""
        return UnavailableError(f"port {port} is in use{by}: choose another one with --port")
    what = error.strerror if isinstance(error, OSError) else error
    return UnavailableError(f"--bind={address} --port={port}: {what}")


class _Known(NamedTuple):
    """What is kept of an agent from scrape to scrape."""

    identity: tuple[str, str, str]
    """Its values of the labels ``IDENTITY``."""
    is_guess: bool
    """Whether it has never answered, so that its job's id is only known from the name of its socket."""
    highest: dict[tuple[str, tuple[str, ...]], float]
    """The highest value of each counter that never falls."""


class JobCollector:
    """Asks the agents of this host at each scrape, all at once. Scrapes may come from several threads."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Begin; ``environ`` says where the agents' sockets are."""
        self._environ = environ
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        """By the path of the agent's socket."""
        self._troubles: list[str] = []

    def collect(self) -> Iterator[Family]:
        """Return the metrics as they are now."""
        paths, troubles = everybodys_sockets(self._environ)
        # Nothing of this waits for the lock: an agent that does not answer delays no other scrape.
        answers = {path: _look(path, pid, status) for path, pid, status in ask_all(paths)}
        families = {
            metric.name: _FAMILIES[metric.kind](
                metric.name.removesuffix("_info") if metric.kind is Kind.INFO else metric.name,
                metric.help,
                labels=[*IDENTITY, *metric.labels],
            )
            for metric in METRICS
        }
        with self._lock:
            self._tell(troubles)
            self._recognize(answers)
            for path, seen in answers.items():
                for (name, labels), value in _samples_or_down(self._known[path], seen).items():
                    families[name].add_metric(labels, *value)
        yield GaugeMetricFamily(UNUSABLE, "Directories with sockets of agents that cannot be used.", len(troubles))
        yield from families.values()

    def _tell(self, troubles: list[str]) -> None:
        """Say once why a directory cannot be used."""
        for line in troubles:
            if line not in self._troubles:
                print(f"elastic-job: {line}", file=sys.stderr, flush=True)
        self._troubles = troubles

    def _recognize(self, answers: Mapping[str, Seen | None]) -> None:
        """Give each new agent its labels, and forget those that have ended."""
        for path, known in list(self._known.items()):
            if path not in answers or (known.is_guess and answers[path]):
                del self._known[path]
        new = [path for path in answers if path not in self._known]
        for path in sorted(new, key=lambda path: seen.status["started_at"] if (seen := answers[path]) else 0.0):
            seen = answers[path]
            job, host = (seen.status["job"], seen.status["host"]) if seen else _guess(path)
            taken = {known.identity for known in self._known.values()}
            candidates = ((_text(job), _text(host), str(number)) for number in itertools.count())
            identity = next(candidate for candidate in candidates if candidate not in taken)
            self._known[path] = _Known(identity, seen is None, {})


def _look(path: str, pid: int, status: Mapping[str, Any] | None) -> Seen | None:
    """Return what is known of an agent; None if it does not answer, or what answers is no agent of our kind."""
    if status is None:
        return None
    try:
        float(status["started_at"]), status["job"], status["host"]
        # Pids are those that are meant only if the agent has its own here: it may be in another PID namespace.
        return Seen(status, _user(path), _usage(status) if pid == status["pid"] else {})
    except _BAD_STATUS:
        return None


def _samples_or_down(known: _Known, seen: Seen | None) -> Samples:
    """Return all samples of an agent, or that it is down: it does not answer, or not as it should."""
    if seen is not None:
        with contextlib.suppress(*_BAD_STATUS):
            return _samples(known, seen)
    return {(UP.name, known.identity): (0,)}


def _samples(known: _Known, seen: Seen) -> Samples:
    found: Samples = {}
    for metric in METRICS:
        for more, value in metric.values(seen):
            if value is not None:
                labels = (*known.identity, *map(_text, more))
                found[metric.name, labels] = _value(metric, labels, value, known)
    return found


def _value(metric: Metric, labels: tuple[str, ...], value: Any, known: _Known) -> tuple[Any, ...]:
    if metric.kind is Kind.INFO:
        return ({name: _text(text) for name, text in value.items()},)
    if metric.kind is Kind.SUMMARY:
        return tuple(map(float, value))
    number = float(value)
    if metric.never_falls:
        key = (metric.name, labels)
        number = known.highest[key] = max(number, known.highest.get(key, number))
    return (number,)


def _usage(status: Mapping[str, Any]) -> dict[int, Usage]:
    found: dict[int, Usage] = {}
    for worker in status["workers"]:
        if worker["pid"] is None or worker["exit_code"] is not None:
            continue
        try:
            process = psutil.Process(worker["pid"])
            with process.oneshot():
                cpu, memory = process.cpu_times(), process.memory_info()
        except psutil.Error:  # it has just ended
            continue
        found[worker["rank"]] = Usage(cpu.user + cpu.system, memory.rss)
    return found


def _user(path: str) -> str:
    """Return the name of the user whose socket it is."""
    try:
        uid = os.stat(path).st_uid
    except OSError:  # the agent has just ended
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _guess(path: str) -> tuple[str, str]:
    """Return job and host of an agent that has never answered. The name of its socket begins with its job's id."""
    return os.path.basename(path).rsplit(".", 3)[0], os.uname().nodename


def _text(value: object) -> str:
    """Return a label's value. An id may have bytes that are no text."""
    return str(value).encode(errors="replace").decode()
