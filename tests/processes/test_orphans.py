"""Which children of a program count as orphans of a job that has lost its keeper."""

from __future__ import annotations

import os
import subprocess

import pytest

from elastic_launch.workers import orphans
from tests.support.waiting import is_alive


def test_an_orphan_that_is_just_executing_a_program_is_killed_as_soon_as_it_can_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until the kernel has built the new program's stack, /proc shows neither its environment nor its arguments."""
    looks = iter(range(7))
    read = orphans._read
    monkeypatch.setattr(orphans, "_read", lambda pid, name: b"" if next(looks, None) is not None else read(pid, name))
    with (
        subprocess.Popen(["sleep", "1000"], env={**os.environ, "TORCHELASTIC_RUN_ID": "j"}) as stray,
        subprocess.Popen(["sleep", "1000"]) as mine,
        subprocess.Popen(["true"], stdin=subprocess.PIPE) as ended,
    ):
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        orphans.kill_orphans(is_alone=False, workers=[], run_id="j")
        assert [is_alive(process.pid) for process in (stray, mine)] == [False, True]
        mine.kill()
