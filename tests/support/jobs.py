"""A job that a test launches on this host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import DEADLINE, wait_until

TWO = ("--nproc-per-node", "2")
METHODS = ("spawn", "fork", "forkserver")
"""How functions can be started."""


def report_of(stderr: str | bytes) -> str:
    """The report at the end, which begins on a line of its own."""
    text = stderr if isinstance(stderr, str) else stderr.decode(errors="replace")
    begin = re.search(r"^={80}$", text, re.MULTILINE)
    assert begin, text
    return text[begin.start() :]


class Job:
    """A launcher's process, and the directory in which its workers leave their marks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.program = [sys.executable, "-m", "elastic_launch"]
        """What ``start`` starts."""
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

    def mark(self, text: str) -> None:
        """Write a mark as a worker would: one that workers wait for."""
        with (self.path / "marks").open("a") as file:
            file.write(f"{text}\n")

    def wait_for(self, *marks: str) -> None:
        """Wait until the workers have written these lines."""
        wait_until(lambda: set(marks) <= set(self.marks()), f"marks {marks}")

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        """Start ``elastic-run`` with these arguments and these changes to the environment."""
        process = subprocess.Popen(
            [*self.program, *args],
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
