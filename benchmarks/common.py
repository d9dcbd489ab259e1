"""Shared by the benchmarks: the two launchers, how they are run, and the table of results."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import IO, NoReturn

import psutil

OURS, PEER = "elastic-run", "torchrun"
# Both come from the directory of the Python that runs the benchmark, so that they share its packages.
COMMANDS = {name: [str(Path(sys.executable).with_name(name))] for name in (OURS, PEER)}
OPTIONS = ["--standalone", "--nproc-per-node", "2"]

Samples = dict[str, list[float]]


def parse_runs(description: str, default: int) -> int:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=default, metavar="N", help=f"launches of each (default: {default})")
    runs: int = parser.parse_args().runs
    return runs


def environment(folder: str) -> dict[str, str]:
    """Return the launchers' environment. Temporary files, such as torchrun's log directories, go into ``folder``."""
    # The caller's PET_ variables would override options. With PYTHONDONTWRITEBYTECODE, each launch would compile an
    # editable package again, whereas pip compiles what it installs. With OMP_NUM_THREADS, neither launcher chooses one.
    dropped = ("PET_", "TORCHELASTIC_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"OMP_NUM_THREADS": "1", "TMPDIR": folder}


def wall_time(command: Sequence[str], folder: str) -> float:
    """Return how long a command takes, in seconds. If it fails, end the benchmark with its output."""
    with tempfile.TemporaryFile() as output:
        begin = time.monotonic()
        # No timeout: with one, subprocess polls for the end, and notices it up to 50 ms late.
        status = subprocess.run(command, env=environment(folder), stdout=output, stderr=output).returncode
        seconds = time.monotonic() - begin
        if status != 0:
            fail(f"exit status {status}", command, output)
    return seconds


class Running:
    """A running launcher."""

    def __init__(self, command: Sequence[str], folder: str, output: IO[bytes]) -> None:
        self.command = command
        self.output = output
        self.process = subprocess.Popen(command, env=environment(folder), stdout=output, stderr=output)
        self.left: list[psutil.Process] = []
        """Processes that a killed launcher may have left behind."""

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until the condition holds. If the launcher ends first or the time is up, end the benchmark."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                fail(f"ended too early with exit status {self.process.returncode}", self.command, self.output)
            if time.monotonic() > deadline:
                fail(f"condition not met after {seconds:.0f} s", self.command, self.output)
            time.sleep(0.01)

    def kill(self) -> None:
        """Send SIGKILL to the launcher, but to nothing that it has started."""
        self.left = self.family()
        self.process.kill()

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else self.left

    def stop(self) -> None:
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            for left in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()


@contextlib.contextmanager
def running(command: Sequence[str], folder: str) -> Iterator[Running]:
    with tempfile.TemporaryFile() as output:
        launcher = Running(command, folder, output)
        try:
            yield launcher
        finally:
            launcher.stop()


def fail(what: str, command: Sequence[str], output: IO[bytes]) -> NoReturn:
    output.seek(0)
    raise SystemExit(f"{' '.join(command)}: {what}\n{output.read().decode(errors='replace')}")


def table(rows: Sequence[str]) -> str:
    return "\n".join([f"| median (min–max) | {OURS} | {PEER} | ratio | target |", "|---|---|---|---|---|", *rows])


def row(what: str, samples: Samples, digits: int, limit: float | None = None, ratio_limit: float | None = None) -> str:
    """Return a row of the table. The target is an upper limit of our median, or of its ratio to the peer's."""
    ours, peer = median(samples[OURS]), median(samples[PEER])
    ratio = ours / peer if peer else float("nan")
    target = ""
    for value, bound in ((ours, limit), (ratio, ratio_limit)):
        if bound is not None:
            target = f"≤ {bound:.3g}: {'met' if value <= bound else 'MISSED'}"
    return f"| {what} | {spread(samples[OURS], digits)} | {spread(samples[PEER], digits)} | {ratio:.3f} | {target} |"


def spread(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def machine(command: Sequence[str]) -> str:
    """Describe where and how the figures were measured. The load shows whether other programs were running."""
    arguments = " ".join([Path(command[0]).name, *command[1:]])
    return (
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {version('torch')}; `{arguments}`"
    )
