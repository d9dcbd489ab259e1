"""What every test gets: a job to launch in a directory of its own, and the proof that it left nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from elastic_launch.workers.keeper_main import set_subreaper

DEADLINE = 60.0
"""Seconds until a condition that a test waits for counts as failed: far above what it takes."""


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Return when the condition holds; fail when it does not within DEADLINE."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE:g} s in vain: {what or condition}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True, scope="session")
def _adopt_orphans() -> None:
    """Whatever a test orphans becomes pytest's own child, where ``_nothing_left`` finds it."""
    set_subreaper(True)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell has its background jobs ignore SIGINT, nohup has them ignore SIGHUP: programs under test would, too."""
    for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, usual)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test that leaves a process, a thread, a descriptor or a temporary file."""
    temp = tmp_path / "system-temp"
    temp.mkdir()
    monkeypatch.setenv("TMPDIR", str(temp))
    for name in os.environ:
        if name.startswith(("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = psutil.Process().num_fds(), threading.active_count()
    yield
    left = [child for child in psutil.Process().children(recursive=True) if is_alive(child.pid)]
    names = [str(child) for child in left]
    for child in left:
        child.kill()
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                break
        except ChildProcessError:
            break
    assert not names, "processes left behind"
    assert (psutil.Process().num_fds(), threading.active_count()) == before, "descriptors or threads left behind"
    files = [path for path in temp.rglob("*") if path.is_file() and path.name not in ("error.json", "stacks.log")]
    assert not files, "temporary files left behind"


class Job:
    """A launcher's process, and the directory in which its workers leave their marks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.processes: list[subprocess.Popen[str]] = []

    def script(self, text: str, name: str = "train.py") -> str:
        """Write a worker's script; it finds ``rank``, ``restart``, ``mark(text)`` and ``wait_for(marks)`` ready."""
        prelude = (
            "import os, signal, subprocess, sys, time\n"
            "rank, restart = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
            f"open('{self.path}/marks', 'a').close()\n"
            "def mark(text=''):\n"
            f"    with open(f'{self.path}/marks', 'a') as f: f.write(f'{{rank}}.{{restart}} {{text}}\\n')\n"
            "def wait_for(*marks):\n"
            f"    while not set(marks) <= {{line.strip() for line in open('{self.path}/marks')}}: time.sleep(0.01)\n"
            "def wait(): \n"
            "    while True: signal.pause()\n"
        )
        file = self.path / name
        file.write_text(prelude + text)
        return str(file)

    def marks(self) -> list[str]:
        """The lines that workers have written so far: ``RANK.RESTART TEXT``."""
        try:
            return [line.strip() for line in (self.path / "marks").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def wait_for(self, *marks: str) -> None:
        """Wait until the workers have written these lines."""
        wait_until(lambda: set(marks) <= set(self.marks()), f"marks {marks}")

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        """Start ``elastic-run`` with these arguments and these changes to the environment."""
        process = subprocess.Popen(
            [sys.executable, "-m", "elastic_launch", *args],
            cwd=self.path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run ``elastic-run`` to its end."""
        return self.finish(self.start(*args, **env))

    def finish(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        """Wait for a launcher's end, and for that of everything that holds its output."""
        out, err = process.communicate(timeout=DEADLINE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A job to be launched; what still runs of it at the end of the test is killed."""
    job = Job(tmp_path)
    yield job
    for process in job.processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
