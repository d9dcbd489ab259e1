"""Where CI runs jobs: in containers that lack much, as anybody, with few descriptors, below pytest-xdist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.jobs import METHODS, Job
from tests.support.waiting import DEADLINE

LAUNCH = [sys.executable, "-m", "elastic_launch"]

BARE = """\
set -e
mount -t tmpfs -o ro,size=4k,mode=555 none /dev/shm
exec unshare --user --map-user=65534 --map-group=65534 "$@" <&-
"""
"""Runs a program as process 1, as a user who is not root, with closed input, and without /dev/shm."""

PROGRAM = """\
import os, sys
from elastic_launch import LaunchConfig, elastic_launch

def rank():
    return os.getuid(), os.getpid() != 1, int(os.environ["RANK"])

if __name__ == "__main__":
    assert os.getpid() == 1
    for method in sys.argv[1:]:
        config = LaunchConfig(1, 1, 2, start_method=method, verbosity=0)
        assert elastic_launch(config, rank)() == {0: (65534, True, 0), 1: (65534, True, 1)}, method
    print("functions run")
"""

WORKER = """\
import os, subprocess, sys, time
rank = os.environ["RANK"]
assert b"elastic_launch" in open("/proc/1/cmdline", "rb").read(), "the agent is process 1"
for folder in ("/dev/shm", os.path.expanduser("~")):
    assert not os.access(folder, os.W_OK), folder
subprocess.Popen(["sleep", "1000"], start_new_session=True)
line = f"rank {rank} of user {os.getuid()} reads {sys.stdin.read() if sys.stdin else ''!r}\\n"
os.write(1, line.encode())  # in one piece: others write at the same time
open(f"printed-{rank}", "w").close()
while not os.path.exists("printed-0"):
    time.sleep(0.01)  # before this one fails, and the other is stopped
sys.exit(int(rank) * 3)
"""


def run_bare(job: Job, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in such a container, with a home that cannot be written."""
    home = job.path / "home"
    home.mkdir(mode=0o555)
    return subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", BARE, "sh", *command],
        env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        cwd=job.path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def test_process_1_of_a_bare_container(job: Job) -> None:
    """Also what a worker leaves behind ends, and the status is the failure's."""
    (job.path / "worker.py").write_text(WORKER)
    done = run_bare(job, *LAUNCH, "--nproc-per-node", "2", "worker.py")
    assert done.returncode == 3, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of user 65534 reads ''" for rank in (0, 1)]
    assert "exit code 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_functions_in_a_bare_container(job: Job) -> None:
    (job.path / "program.py").write_text(PROGRAM)
    done = run_bare(job, sys.executable, "program.py", *METHODS)
    assert (done.returncode, done.stdout) == (0, "functions run\n"), done.stderr


def test_few_descriptors_are_enough_or_named(job: Job) -> None:
    (job.path / "worker.py").write_text("import os\nos.write(1, b'hello\\n')")

    def run(limit: int, workers: int) -> subprocess.CompletedProcess[str]:
        shell = f'ulimit -n {limit}; exec "$@"'
        command = ["sh", "-c", shell, "sh", *LAUNCH, "--nproc-per-node", str(workers), "worker.py"]
        return subprocess.run(command, cwd=job.path, capture_output=True, text=True, timeout=DEADLINE)

    enough = run(64, 5)
    assert (enough.returncode, enough.stdout) == (0, 5 * "hello\n"), enough.stderr
    for limit in (16, 12, 10, 8, 7):
        done = run(limit, 2)
        assert (done.returncode, done.stdout) == (69, ""), (limit, done.stderr)
        assert "`ulimit -n`" in done.stderr.splitlines()[-1], (limit, done.stderr)
        assert "Traceback" not in done.stderr, (limit, done.stderr)


def test_without_proc_one_line_says_so(job: Job) -> None:
    (job.path / "worker.py").write_text("")
    shell = 'mount -t tmpfs none /proc; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", shell, "sh", *LAUNCH, "worker.py"]
    done = subprocess.run(command, cwd=job.path, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 69
    assert done.stderr.startswith("elastic-run: /proc is not mounted")
    assert done.stderr.count("\n") == 1


INNER = """\
import os, subprocess, sys
import pytest
from elastic_launch import ChildFailedError, LaunchConfig, elastic_launch

def rank(fails):
    print("a line of a worker")
    if fails and os.environ["RANK"] == "1":
        raise ValueError("boom")
    return int(os.environ["RANK"])

def test_function():
    assert os.environ["PYTEST_XDIST_WORKER"]
    config = LaunchConfig(1, 1, 2, start_method="spawn", max_restarts=0)
    assert elastic_launch(config, rank)(False) == {0: 0, 1: 1}

def test_function_that_fails():
    config = LaunchConfig(1, 1, 2, start_method="fork", max_restarts=0)
    with pytest.raises(ChildFailedError, match="ValueError: boom"):
        elastic_launch(config, rank)(True)

def test_command():
    words = [sys.executable, "-m", "elastic_launch", "--nproc-per-node", "2", "--no-python", "sh", "-c", "echo $RANK"]
    assert sorted(subprocess.check_output(words, text=True).split()) == ["0", "1"]
"""


def test_in_the_workers_of_pytest_xdist(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(INNER)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the other plugins take a second each time
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", "-q", "-n", "1"]
    command += ["-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
