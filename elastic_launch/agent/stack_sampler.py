"""Take the stacks of a node's workers and of their children, without ever blocking the agent.

A worker writes its stacks into its memory when it gets the keeper's dump signal (``faulthandler``), in milliseconds and
whatever it is doing, unless it is stopped, or waits for a device or file system. Its own Python processes have
inherited handler and memory. Since they all write to the same place, they are asked one after another; different
workers are asked at the same time.

py-spy shows native frames as well. It stops a process while it reads its stack, and needs the right to trace it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from elastic_launch.agent.progress_memory import ProgressMemory
from elastic_launch.core.progress.stacks import KernelView, Observation, Thread, parse, parse_py_spy
from elastic_launch.host.process_view import kernel_view, python_children
from elastic_launch.workers.keeper_main import DUMP_SIGNAL, has_handler

POLL = 0.02
"""Seconds between two checks whether a process has written its stacks."""
WRITE_CHECKS = 50
"""How often that is checked. The checks are counted, because this process may stand still itself on a busy machine."""
MAX_CHILDREN = 4
"""Number of a worker's own Python processes, such as those of a DataLoader, whose stacks are taken."""
NATIVE_PATIENCE = 10.0
"""Longest time, in seconds, that py-spy gets for all workers of the node; it may have to read large libraries."""
KILL_PATIENCE = 1.0
"""Longest time, in seconds, that it gets to end once it is killed: it cannot while it waits for a dead disk."""
OPTIONS = ("dump", "--native", "--full-filenames", "--pid")
"""Arguments of py-spy before the pid."""

Threads = dict[int, tuple[Thread, ...]]
"""The threads of processes, by the local rank of their worker."""


class Sampler(NamedTuple):
    """How the stacks of a node's workers are taken."""

    memory: ProgressMemory
    """The workers' memory, into which they write their stacks."""
    signal_stacks: Callable[[Collection[int]], None]
    """Asks the processes with these pids for the stacks of their threads."""
    native: str = ""
    """The path of py-spy, if it is to read the workers' native frames."""

    def sample(self, pids: Mapping[int, int], ended: Mapping[int, int], base_rank: int) -> Iterator[list[Observation]]:
        """Look at all processes of a node's workers once.

        Args:
            pids: the process ids of the workers that run, by local rank.
            ended: those of the workers that have exited.
            base_rank: global rank of the worker with local rank 0.

        Yields:
            What has been seen so far. To be continued after ``POLL`` seconds, until it ends.
        """
        now = time.monotonic()
        seen = [Observation(base_rank + rank, pid, "", (), KernelView("Z"), now) for rank, pid in ended.items()]
        queues = {rank: [pid, *python_children(pid, MAX_CHILDREN)] for rank, pid in pids.items()}
        for position in range(1 + MAX_CHILDREN):
            turn = {rank: queue[position] for rank, queue in queues.items() if position < len(queue)}
            views = {rank: view for rank, pid in turn.items() if (view := kernel_view(pid))}
            able = {rank: turn[rank] for rank, view in views.items() if view.state not in "TtZXD"}
            threads: Threads = {}
            if self.native and position == 0:
                for read in _native(able, self.native):
                    threads = read
                    yield seen
            for written in self._written({rank: pid for rank, pid in able.items() if not threads.get(rank)}):
                threads |= written
                yield seen
            for rank, view in views.items():
                if position and not threads.get(rank):
                    continue  # a child that is no worker of torch's, such as multiprocessing's resource tracker
                child = view.name if position else ""
                stacks = threads.get(rank, ())
                seen.append(Observation(base_rank + rank, turn[rank], child, stacks, view, time.monotonic()))
        yield seen

    def _written(self, pids: Mapping[int, int]) -> Iterator[Threads]:
        """Have processes write their stacks, one of each worker. Yields what has been read, until all have."""
        waits_for = {rank: b"" for rank, pid in pids.items() if self._can_write(pid, rank)}
        for rank in waits_for:
            self.memory.rewind(rank)
        self.signal_stacks([pids[rank] for rank in waits_for])
        found: Threads = {}
        checks = 0
        while waits_for and checks < WRITE_CHECKS:
            yield found
            checks += 1
            for rank, before in tuple(waits_for.items()):
                waits_for[rank] = text = self.memory.stacks(rank)
                if text and text == before:
                    del waits_for[rank]
                    found[rank] = parse(text.decode(errors="replace"))
        yield found

    def _can_write(self, pid: int, rank: int) -> bool:
        """Return whether a process has a handler for the signal, and still has the memory open to write to."""
        return self.memory.reads_stacks and has_handler(pid, DUMP_SIGNAL) and self.memory.is_open_in(pid, rank)


def find_py_spy(search_path: str) -> str:
    """Return the path of py-spy, beside this Python or on a PATH; empty: it is not installed."""
    import shutil  # late: few jobs ask for it

    return shutil.which("py-spy", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{search_path}") or ""


def _native(pids: Mapping[int, int], py_spy: str) -> Iterator[Threads]:
    """Have py-spy read the stacks of processes. Yields what has been read; empty if that is not possible."""
    import subprocess  # late, as the next one: few jobs hang
    import tempfile

    found: Threads = {}
    running = []
    try:
        for rank, pid in pids.items():
            output = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
            command = [py_spy, *OPTIONS, str(pid)]
            running.append((rank, output, subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)))
    except OSError:
        pass  # it has been removed, or the system grants no more processes
    for patience in (NATIVE_PATIENCE, KILL_PATIENCE):
        until = time.monotonic() + patience
        while any(process.poll() is None for _, _, process in running) and time.monotonic() < until:
            yield found
        for _, _, process in running:
            process.kill()
    for rank, output, _ in running:
        with output:
            output.seek(0, os.SEEK_SET)
            found[rank] = parse_py_spy(output.read().decode(errors="replace"))
    yield found
