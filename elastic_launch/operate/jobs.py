"""The jobs of this user on this host: find them, and choose the one that a command is about."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from elastic_launch.control.client import PATIENCE, ControlClient, ask_all, sockets
from elastic_launch.errors import LaunchError, UnavailableError, UsageError

UNRESPONSIVE = "unresponsive"
"""State of an agent that does not answer: it is stopped, or gets no CPU time."""
_ORDER = {
    state: number
    for number, state in enumerate(("running", "joining", "checking", "unfit", "stopping", "agreeing", "pausing"))
}
"""States of agents; the one whose state comes first speaks for a job."""


class NoJobError(LaunchError):
    """No such job runs."""

    exit_code = 3


class Job(NamedTuple):
    """A job, as far as its agents on this host know it."""

    id: str
    agents: list[dict[str, Any]]
    """Their statuses, each with the path of its socket as ``socket``; the first one speaks for the job."""

    @property
    def pids(self) -> list[int]:
        """Pids of its agents on this host."""
        return [agent["pid"] for agent in self.agents]

    def __str__(self) -> str:
        return f"{self.id} (pid {', '.join(map(str, self.pids))})"


def running_jobs(environ: Mapping[str, str]) -> list[Job]:
    """Return the jobs of this user on this host, the latest first. What dead agents left is removed.

    Raises:
        UnavailableError: the directory of the sockets is not private.
    """
    jobs: dict[Any, Job] = {}
    for path, pid, answer in ask_all(sockets(environ)):
        if (status := answer or _unresponsive(path, pid)) is None:
            continue
        status["socket"] = path
        # Agents of one job have its id and meet in one store.
        endpoint = status["store"]["endpoint"]
        key = (status["job"], endpoint) if endpoint else path
        jobs.setdefault(key, Job(status["job"], [])).agents.append(status)
    for job in jobs.values():
        job.agents.sort(key=lambda agent: (_ORDER.get(agent["state"], len(_ORDER)), agent["group_rank"] or 0))
    return sorted(jobs.values(), key=lambda job: -job.agents[0]["started_at"])


def choose(jobs: Sequence[Job], wanted: str | None) -> Job:
    """Return the job that is meant.

    Args:
        jobs: those that run here.
        wanted: an id, the beginning of one, or the pid of an agent; None: the only one.

    Raises:
        NoJobError: none runs, or none like that.
        UsageError: several are meant.
    """
    if not jobs:
        raise NoJobError("no job of yours runs on this host")
    if wanted is None:
        found = list(jobs)
    else:
        found = (
            [job for job in jobs if job.id == wanted]
            or [job for job in jobs if wanted in map(str, job.pids)]
            or [job for job in jobs if job.id.startswith(wanted)]
        )
    if not found:
        raise NoJobError(f"{wanted}: no such job on this host; there are: {', '.join(map(str, jobs))}")
    if len(found) > 1:
        raise UsageError(f"{wanted or 'no JOB given'}: which one? {', '.join(map(str, found))}")
    return found[0]


def order(agent: Mapping[str, Any], request: Mapping[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
    """Have an agent carry out a request, and return its reply.

    Args:
        agent: its status.
        request: the request.
        patience: seconds to wait for the reply.

    Raises:
        UnavailableError: it does not answer, or refuses.
    """
    client = ControlClient(agent["socket"])
    try:
        reply = client.ask(request, patience)
    finally:
        client.close()
    if not reply["ok"]:
        raise UnavailableError(f"{agent['job']} (pid {agent['pid']}): {reply['error']}")
    return reply


def parser(command: str, what: str) -> argparse.ArgumentParser:
    """Return the parser of a subcommand that is about one job."""
    made = argparse.ArgumentParser(prog=f"elastic-job {command}", description=f"{what[0].upper()}{what[1:]}.")
    made.add_argument("job", nargs="?", metavar="JOB", help="id, beginning of an id, or pid of an agent")
    return made


def _unresponsive(path: str, pid: int) -> dict[str, Any] | None:
    """Stand in for the status of an agent that does not answer; None: it has just ended.

    All that is known is the name of its socket.
    """
    try:
        began = os.stat(path).st_ctime
    except FileNotFoundError:
        return None
    id_, name_pid, *_ = os.path.basename(path).rsplit(".", 3)
    return {
        "job": id_,
        "pid": pid or int(name_pid),
        "host": os.uname().nodename,
        "state": UNRESPONSIVE,
        "started_at": began,
        "group_rank": None,
        "store": {"endpoint": None},
    }
