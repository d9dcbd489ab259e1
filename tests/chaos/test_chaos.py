"""A sample of ``make chaos``: one job, and two faults."""

from __future__ import annotations

import subprocess
import sys

from tests.support.waiting import DEADLINE


def test_a_job_outlives_what_strikes_it() -> None:
    words = ["--backend", "etcd", "--faults", "2", "--kind", "worker killed", "--kind", "agent killed", "--seed", "5"]
    command = [sys.executable, "-m", "tests.chaos", *words, "--slack", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * DEADLINE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 faults, all as documented" in done.stdout
