"""Workers whose progress a test looks at: those of one node, without a job around them."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic_launch.agent.worker_group import LocalWorkers, WorkerOptions
from elastic_launch.config import LogsDest
from elastic_launch.core.agent.messages import Exited, Started
from elastic_launch.core.progress.memory import WorkerProgress
from elastic_launch.workers import BOOTSTRAP
from tests.support.waiting import DEADLINE


class Group:
    """Running workers, which the test drives by waiting for something."""

    def __init__(self, workers: LocalWorkers, count: int) -> None:
        assert workers.memory
        self.workers = workers
        self.memory = workers.memory
        self.count = count
        self.pids: dict[int, int] = {}
        self.statuses: dict[int, int] = {}
        """Exit codes of workers that have ended."""

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Do what an agent does until the condition holds."""
        poller = select.poll()
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < DEADLINE, f"waited in vain; ended: {self.statuses}"
            waits = self.workers.descriptors()
            for fd, events in waits:
                poller.register(fd, events)
            ready = [fd for fd, _ in poller.poll(10)]
            for fd, _ in waits:
                poller.unregister(fd)
            for event in self.workers.take(ready):
                match event:
                    case Started(pids):
                        self.pids.update(pids)
                    case Exited(exit_):
                        self.statuses[exit_.local_rank] = exit_.exitcode

    def finish(self) -> list[WorkerProgress]:
        """Wait for the workers' end, which must be a good one. Returns what they have told."""
        self.wait_until(lambda: len(self.statuses) == self.count)
        assert set(self.statuses.values()) == {0}
        return self.read()

    def read(self) -> list[WorkerProgress]:
        """What the workers have told so far."""
        return [self.memory.read(rank) for rank in range(self.count)]


@contextmanager
def started(
    entrypoint: Callable[..., Any] | str,
    *args: Any,
    count: int = 1,
    environ: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Group]:
    """Workers that run a function or a program; killed at the end."""
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
    ranks = range(count)
    workers = LocalWorkers(
        WorkerOptions("test", entrypoint, dict.fromkeys(ranks, args), "test", inherited, **options), print
    )
    try:
        envs = {rank: {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0"} for rank in ranks}
        workers.start(envs, LogsDest(), {})
        yield Group(workers, count)
    finally:
        workers.close()


def python(*args: str) -> tuple[str, ...]:
    """What runs a script or a module as elastic-run does: ``started(*python("script", "train.py"))``."""
    return sys.executable, "-u", BOOTSTRAP, *args


def script(path: Path, text: str) -> tuple[str, ...]:
    """Write a script, and return what runs it."""
    path.mkdir(exist_ok=True)
    file = path / "train.py"
    file.write_text(text)
    return python("script", str(file))
