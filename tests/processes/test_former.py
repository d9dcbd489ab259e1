"""Whether an agent that another one on its host may have replaced is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_launch.host import former
from tests.support.waiting import wait_until

NO_PID = 2**22 + 1
"""More than Linux gives to any process."""


def test_an_ended_process_is_gone_and_a_hidden_one_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = former.start_time(process.pid)
        assert not former.is_gone(process.pid, started)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        # A keeper of another test that is just ending may be its keeper.
        wait_until(lambda: former.is_gone(process.pid, started))  # it has ended, although it has not been reaped
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: former.is_gone(process.pid, started))

    def refuse(pid: int, signum: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not former.is_gone(process.pid, started), "/proc may hide a process of another user"


KEEPER = b"python3\0keeper\x007\0"
ITS = b"Pid:\t%d\n" % NO_PID


@pytest.mark.parametrize(
    ("command", "pidfd", "may_be_its"),
    [
        (KEEPER, ITS, True),
        (KEEPER, b"Pid:\t-1\n", True),
        (KEEPER, b"Pid:\t1174\n", False),
        (KEEPER.replace(b"7", b"8"), ITS, False),
        (b"python3\0keeper\0", ITS, False),
        (b"", ITS, True),
    ],
    ids=["its agent's", "its agent has been reaped", "another agent's", "closed", "no keeper", "it is ending"],
)
def test_an_agent_is_gone_when_no_keeper_may_be_its(
    command: bytes, pidfd: bytes, may_be_its: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is ending has lost its arguments before the kernel kills its children."""
    stat = b" ".join([b"12 (elastic-keeper) S", *[b"0"] * 18, b"99", b"0"])
    files = {"comm": b"elastic-keeper\n", "stat": stat, "cmdline": command, "fdinfo/7": pidfd, "../self/stat": b""}
    for name, content in files.items():
        path = tmp_path / "12" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(former, "PROC", str(tmp_path))
    assert former.start_time(12) == 99
    assert former.is_gone(NO_PID, started=5) is not may_be_its
