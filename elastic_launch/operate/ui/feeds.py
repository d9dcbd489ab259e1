"""What the page shows, live. One thread looks at each thing that anybody watches, however many watch it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from elastic_launch.control.client import sockets
from elastic_launch.errors import LaunchError, RendezvousError
from elastic_launch.operate.jobs import Job, NoJobError, running_jobs
from elastic_launch.operate.status import View, view_of_job
from elastic_launch.operate.watch import OVER, Agents

INTERVAL = 1.0
"""Seconds between two looks at a job, if it tells no change before."""
LIST_INTERVAL = 2.0
"""Seconds between two looks at the list of jobs."""
MAX_ENDED = 16
"""Jobs that have ended while somebody watched, and are still shown."""
_COARSE = 5
"""Heartbeats are told in steps of this many seconds; otherwise a thousand nodes would change with every look."""


class Snapshot(NamedTuple):
    """Something as it was at one moment."""

    kind: str
    """Name of the event: ``jobs``, ``job`` or ``error``."""
    data: Mapping[str, Any]
    nodes: Sequence[str] = ()
    """A job's nodes, each encoded as JSON."""
    agents: Sequence[Mapping[str, Any]] = ()
    """The statuses of a job's agents on this host."""
    is_last: bool = False
    """Whether nothing follows."""


class Feed:
    """Something to watch. ``looks`` yields how it is, again and again, and is closed when nobody watches any more."""

    def __init__(self, looks: Callable[[], Iterator[Snapshot]]) -> None:
        self.latest: Snapshot | None = None
        self._looks = looks
        self._changed = threading.Condition()
        self._number = 0
        self._watchers = 0
        self._has_thread = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[int]:
        """Watch it. Yield the number with which to begin to ``wait``."""
        with self._changed:
            self._watchers += 1
            begin = -1 if self._has_thread and self.latest else self._number
            if not self._has_thread:
                self._has_thread = True
                threading.Thread(target=self._run, daemon=True).start()
        try:
            yield begin
        finally:
            with self._changed:
                self._watchers -= 1

    def wait(self, seen: int, seconds: float) -> tuple[int, Snapshot | None]:
        """Wait for something newer than number ``seen``. Return its number and the snapshot, None if there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._number != seen, seconds)
            return self._number, self.latest if self._number != seen else None

    def _run(self) -> None:
        goes_on = True
        try:
            with contextlib.closing(self._looks()) as looks:  # type: ignore[type-var]
                while goes_on and (snapshot := next(looks, None)):
                    goes_on = self._publish(snapshot)
        except LaunchError as error:
            self._publish(Snapshot("error", {"error": str(error)}, is_last=True))
        except Exception as error:  # a defect; whoever watches is told, and the server goes on
            self._publish(Snapshot("error", {"error": f"{type(error).__name__}: {error}"}, is_last=True))

    def _publish(self, snapshot: Snapshot) -> bool:
        """Tell those who watch, unless it is what they know. Return whether to go on."""
        with self._changed:
            if snapshot != self.latest or snapshot.is_last:
                self.latest = snapshot
                self._number += 1
                self._changed.notify_all()
            self._has_thread = bool(self._watchers) and not snapshot.is_last
            return self._has_thread


class Feeds:
    """The feeds by the name of their job, and that of the list of jobs."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._lock = threading.Lock()
        self._jobs: dict[str, Feed] = {}
        self.list = Feed(self._look_at_list)

    def job(self, key: str) -> Feed:
        """Return the feed of a job; ``key`` is its id, or the pid of one of its agents."""
        with self._lock:
            feed = self._jobs.pop(key, None) or Feed(lambda: self._look_at(key))
            self._jobs[key] = feed  # the latest is the last
            ended = [name for name, it in self._jobs.items() if it is not feed and (not it.latest or it.latest.is_last)]
            for name in ended[:-MAX_ENDED]:
                del self._jobs[name]
            return feed

    def agents(self, key: str) -> Sequence[Mapping[str, Any]]:
        """Return the statuses of a job's agents on this host.

        Raises:
            NoJobError: no such job runs, or has ended while somebody watched.
        """
        if job := _find(running_jobs(self._environ), key):
            return job.agents
        with self._lock:
            feed = self._jobs.get(key)
        if feed and feed.latest and feed.latest.agents:
            return feed.latest.agents
        raise _no_job(key)

    def socket(self, key: str) -> str:
        """Return the path of the control socket of an agent that speaks for a job.

        Raises:
            NoJobError: no such job runs.
        """
        if job := _find(running_jobs(self._environ), key):
            return str(job.agents[0]["socket"])
        raise _no_job(key)

    def _look_at_list(self) -> Iterator[Snapshot]:
        while True:
            jobs = running_jobs(self._environ)
            ids = [job.id for job in jobs]
            rows = [_row(job, job.id if ids.count(job.id) == 1 else str(job.pids[0])) for job in jobs]
            with self._lock:
                ended = [(key, feed.latest) for key, feed in self._jobs.items() if feed.latest and feed.latest.is_last]
            over = [{"key": key, **it.data} for key, it in reversed(ended) if it.kind == "job" and key not in ids]
            yield Snapshot("jobs", {"jobs": rows, "ended": over})
            time.sleep(LIST_INTERVAL)

    def _look_at(self, key: str) -> Iterator[Snapshot]:
        with self._lock:
            feed = self._jobs.get(key)
        last = feed.latest if feed and feed.latest and feed.latest.kind == "job" else None
        while job := _find(running_jobs(self._environ), key):
            for last in self._look_at_agents(job):
                yield last
                if last.is_last:
                    return
        if last is None:
            raise _no_job(key)
        yield last._replace(data={**last.data, "is_over": True}, is_last=True)

    def _look_at_agents(self, job: Job) -> Iterator[Snapshot]:
        """Yield a job until it has ended, or has other agents on this host than before."""
        remark = ""
        try:
            view = view_of_job(job, self._environ)
        except RendezvousError as error:
            view, remark = View(job, None), f"Only what the agents on this host know: {error}"
        with contextlib.closing(view), contextlib.closing(Agents(view)) as agents:
            known = set(sockets(self._environ))
            while set(sockets(self._environ)) <= known:
                agents.ask()
                agents.wait(INTERVAL / 2)
                statuses = agents.statuses()
                is_over = not agents.are_left
                yield _snapshot(view.look(statuses), statuses, remark, agents.silent(), is_over=is_over)
                if is_over:
                    return
                agents.wait(INTERVAL)  # a change comes sooner


def _find(jobs: Sequence[Job], key: str) -> Job | None:
    """Return the job with this id, or with an agent that has this pid."""
    named = [job for job in jobs if job.id == key]
    return next(iter(named or [job for job in jobs if key in map(str, job.pids)]), None)


def _no_job(key: str) -> NoJobError:
    return NoJobError(f"{key}: no such job of yours runs on this host")


def _row(job: Job, key: str) -> dict[str, Any]:
    """Return what the list shows of a job."""
    it = job.agents[0]
    names = ("program", "state", "round", "nodes", "world_size", "started_at", "restarts", "max_restarts")
    found = {name: it.get(name) for name in (*names, "last_trouble", "waits_for", "progress")}
    return {"key": key, "job": job.id, "pids": job.pids, "node_count": found.pop("nodes"), **found}


def _snapshot(
    view: Mapping[str, Any],
    statuses: Sequence[Mapping[str, Any]],
    remark: str,
    silent: Sequence[int],
    *,
    is_over: bool,
) -> Snapshot:
    """Return a view of a job as the page gets it."""
    nodes = []
    for node in view["nodes"]:
        heartbeat = node["heartbeat"]
        coarse = None if heartbeat is None else int(heartbeat // _COARSE) * _COARSE
        nodes.append(json.dumps({**node, "heartbeat": coarse}))
    if silent:
        remark = f"The agent (pid {silent[0]}) does not answer: it is stopped, or gets no CPU time."
    data = {**view, "nodes": None, "store": None, "remark": remark, "is_over": is_over}
    data["is_lost"] = is_over and view["state"] not in OVER
    return Snapshot("job", data, nodes, statuses, is_over)
