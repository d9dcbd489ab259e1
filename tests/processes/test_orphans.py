"""Which children of a program count as orphans of a job that has lost its keeper."""

from __future__ import annotations

import os
import subprocess
import time
from types import SimpleNamespace

import pytest

from elastic_launch.workers import orphans
from tests.support.waiting import DEADLINE, is_alive


@pytest.mark.parametrize("stands_still", [False, True])
def test_an_orphan_that_is_just_executing_a_program_is_killed_as_soon_as_it_can_be_told(
    stands_still: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the kernel has built the new program's stack, /proc shows neither its environment nor its arguments."""
    read, now = orphans._read, 0.0

    def read_too_early(pid: int, name: str) -> bytes:
        nonlocal now
        if not early.get(pid):
            return read(pid, name)
        early[pid] -= 1
        now += 2 * DEADLINE * stands_still
        return b""

    monkeypatch.setattr(orphans, "_read", read_too_early)
    monkeypatch.setattr(orphans, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    monkeypatch.setattr(orphans, "KILL_PATIENCE", DEADLINE)
    with (
        subprocess.Popen(["sleep", "1000"], env={**os.environ, "TORCHELASTIC_RUN_ID": "j"}) as stray,
        subprocess.Popen(["sleep", "1000"]) as mine,
        subprocess.Popen(["true"], stdin=subprocess.PIPE) as ended,
    ):
        early = dict.fromkeys((stray.pid, mine.pid), 2 if stands_still else 6)  # there are two for a look
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        orphans.kill_orphans(is_alone=False, workers=[], run_id="j")
        alive = [is_alive(process.pid) for process in (stray, mine)]
        for process in (stray, mine):
            process.kill()
    assert alive == [False, True]
