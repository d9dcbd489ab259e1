"""Write the events of an agent's life to files, as lines of JSON. Imported only if the user asks for events."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic_launch.core.agent.journal import Entry, Journal
from elastic_launch.core.agent.lifecycle import Transition
from elastic_launch.job import Level
from elastic_launch.logs.event_log import EventLog
from elastic_launch.parsing import is_number

ATTEMPT = "SLURM_RESTART_COUNT"
"""Variable in which Slurm counts how often it has requeued the job."""


class JournalWriter:
    """Adds to each entry of a ``Journal`` what all have in common, and appends it to the files."""

    def __init__(
        self, files: Sequence[EventLog], run_id: str, program: str, workers: int, max_restarts: int, attempt: str
    ) -> None:
        """Begin.

        Args:
            files: where the events go.
            run_id: the job's id.
            program: what the workers run.
            workers: number of workers on this node.
            max_restarts: how many restarts the job may use.
            attempt: how often the scheduler has started the job before; an empty text counts as 0.
        """
        self._files = files
        self._began = time.monotonic()
        self._journal = Journal(program, workers, max_restarts, self._began)
        self._job = {"job": run_id, "attempt": int(attempt) if is_number(attempt) else 0}
        self._agent = {"host": os.uname().nodename, "pid": os.getpid()}

    def record(self, step: Transition) -> None:
        """Write what a step of the life cycle led to."""
        for entry in self._journal.observe(step):
            self._append(entry, step.now, step.time)

    def record_line(self, text: str) -> None:
        """Write a log line that is not from the life cycle, such as one of the rendezvous."""
        self._append(self._journal.message(text, None, time.monotonic()))

    def record_first_step(self, rank: int, at: float) -> None:
        """Write that the round's first step on this node was made. Later calls in the same round do nothing.

        Args:
            rank: global rank of the worker that made it.
            at: when, on ``time.monotonic``.
        """
        for entry in self._journal.first_step(rank, at):
            self._append(entry, time.monotonic(), time.time())

    def record_stall(self, reason: str, seconds: float, rank: int | None, action: str) -> None:
        """Write, for the whole job, that no rank makes steps any more; the arguments are those of ``Journal.stall``."""
        self._append(self._journal.stall(reason, seconds, rank, action, time.monotonic()))

    def record_error(self, text: str, status: int) -> None:
        """Write that the launcher itself failed, with this exit status."""
        self._append(self._journal.error(text, status, time.monotonic()))

    def writing_lines(self, log: Callable[[str], None]) -> Callable[[str], None]:
        """Return a function that logs a line and records it."""

        def log_and_record(text: str) -> None:
            log(text)
            self.record_line(text)

        return log_and_record

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _append(self, entry: Entry, now: float | None = None, wall: float = 0.0) -> None:
        """Append an entry.

        Args:
            entry: the entry.
            now: a moment on the monotonic clock, by which to find out when ``entry.elapsed`` was; None: now.
            wall: the same moment, in seconds since 1970.
        """
        now, wall = (time.monotonic(), time.time()) if now is None else (now, wall)
        at = wall - (now - self._began - entry.elapsed)
        line = json.dumps(as_json(entry, at, self._job, self._agent))
        for file in self._files:
            file.append(line.encode() + b"\n")


def as_json(entry: Entry, at: float, job: Mapping[str, Any], agent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an event in the order of ``docs/events.md``.

    Args:
        entry: the event.
        at: when it happened, in seconds since 1970.
        job: the fields that all events of the job have.
        agent: the fields that all events of this agent have.
    """
    return {
        "time": round(at, 6),
        "name": entry.name,
        "scope": "job" if entry.of_job else "node",
        **job,
        **agent,
        "group_rank": entry.group_rank,
        "round": entry.round,
        "elapsed": entry.elapsed,
        **entry.facts,
        "level": None if entry.level is None else Level(entry.level).name.lower(),
        "text": entry.text,
    }
