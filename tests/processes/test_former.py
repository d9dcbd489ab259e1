"""Whether an agent that another one on its host may have replaced is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from elastic_launch.host import former


def test_an_ended_process_is_gone_and_a_hidden_one_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = former.start_time(process.pid)
        assert not former.is_gone(process.pid, started)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert former.is_gone(process.pid, started), "it has ended, although it has not been reaped"
    assert process.returncode == -signal.SIGKILL
    assert former.is_gone(process.pid, started)

    def refuse(pid: int, signum: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not former.is_gone(process.pid, started), "/proc may hide a process of another user"
