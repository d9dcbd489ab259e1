"""The health check as its user sees it: real commands before real workers on one node."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from elastic_launch import LaunchConfig, UsageError, elastic_launch
from elastic_launch.errors import UnavailableError
from tests.support.jobs import Job
from tests.support.waiting import is_alive, wait_until

SOON = ("--rdzv-conf", "join_timeout=0.5")
"""A node that fails its check gives up after half a second."""
AGAIN = ("--rdzv-conf", "join_timeout=4")
"""A node that fails its check has time for another one, also on a busy machine."""


def program(job: Job, body: str) -> str:
    """Write a check in Python, and return the command that runs it."""
    file = job.path / "check.py"
    file.write_text(f"import os, signal, subprocess, sys, time\n{body}\n")
    return f"{sys.executable} -S {file}"


def said(stderr: str) -> list[str]:
    return [line.removeprefix("elastic-run: ") for line in stderr.splitlines()]


def test_the_check_runs_before_each_round_and_its_output_is_not_shown(job: Job) -> None:
    names = "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE", "ELASTIC_LAUNCH_CHECK_ATTEMPT"
    check = program(job, f"print(*(os.environ.get(name) for name in {names}), file=open('seen', 'a')); print('loud')")
    script = job.script("mark(len(open('seen').readlines()))\nsys.exit(restart == 0)\n")
    args = ("--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-id", "j7", "--health-check", check)
    done = job.run(*args, script)
    assert done.returncode == 0
    assert (job.path / "seen").read_text().splitlines() == ["j7 0 2 1", "j7 1 2 1"]
    marks = set(job.marks())  # the first worker to fail may end the other one before it leaves its mark
    assert marks & {"0.0 1", "1.0 1"}
    assert {"0.1 2", "1.1 2"} <= marks
    assert "loud" not in done.stderr + done.stdout


def test_a_node_whose_check_fails_starts_no_worker_and_ends_with_status_69(job: Job) -> None:
    check = program(job, "print('looking'); print('GPU 3: fell off the bus', file=sys.stderr); sys.exit(4)")
    done = job.run(*AGAIN, "--health-check", check, job.script("mark()"))
    assert done.returncode == 69
    assert job.marks() == []
    lines = said(done.stderr)
    assert lines[0].startswith("health check failed: GPU 3: fell off the bus (exit code 4); checking again in ")
    assert [line.strip() for line in lines[1:3]] == ["looking", "GPU 3: fell off the bus"]
    reason = "health check failed: GPU 3: fell off the bus (exit code 4)"
    assert lines[-1] == f"{reason}; gave up after 4 s (join_timeout)"


def test_a_check_that_passes_later_lets_the_job_begin(job: Job) -> None:
    check = program(job, "sys.exit(os.environ['ELASTIC_LAUNCH_CHECK_ATTEMPT'] == '1')")
    done = job.run(*AGAIN, "--health-check", check, job.script("mark()"))
    assert done.returncode == 0
    assert "health check passed: joining" in said(done.stderr)
    assert len(job.marks()) == 1


ENDS = {
    "exit 3": ("sys.exit(3)", "60", "exit code 3"),
    "a signal": ("os.kill(os.getpid(), signal.SIGSEGV)", "60", "killed by SIGSEGV"),
    "no exit": ("time.sleep(1000)", "0.3", "no result within 0.3 s"),
    "closed output": ("os.close(1); os.close(2); time.sleep(1000)", "0.3", "no result within 0.3 s"),
    "endless output": ("while True: print('x' * 5000)", "0.3", "no result within 0.3 s"),
}


@pytest.mark.parametrize("end", ENDS)
def test_how_a_check_fails_is_said(end: str, job: Job) -> None:
    body, timeout, how = ENDS[end]
    args = ("--rdzv-conf", "join_timeout=0.1", "--health-check-timeout", timeout, "--health-check", program(job, body))
    done = job.run(*args, job.script("mark()"))
    assert done.returncode == 69
    assert how in done.stderr
    assert len(done.stderr) < 50_000, "only the last bytes of the output are kept"
    assert job.marks() == []


def test_of_a_long_output_the_last_lines_are_shown(job: Job) -> None:
    check = program(job, "print(*range(10000), sep='\\n'); sys.exit(1)")
    done = job.run(*AGAIN, "--health-check", check, job.script(""))
    assert [line.strip() for line in said(done.stderr)[1:11]] == [str(number) for number in range(9990, 10000)]


FAMILY = """
ignore = 'import signal; signal.signal(15, signal.SIG_IGN); signal.pause()'
child = subprocess.Popen([sys.executable, '-S', '-c', ignore])
daemon = subprocess.Popen(['setsid', 'sleep', '1000'])
print(os.getpid(), child.pid, daemon.pid, os.environ['ELASTIC_LAUNCH_CHECK_ATTEMPT'], file=open('tmp', 'w'))
os.rename('tmp', 'pids')
"""
"""A check that has a child which ignores SIGTERM, and one in a session of its own."""


def pids(job: Job) -> list[int]:
    file = job.path / "pids"
    wait_until(file.exists)
    return [int(word) for word in file.read_text().split()[:3]]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_check_and_all_that_it_has_started(signum: int, job: Job) -> None:
    process = job.start("--health-check", program(job, f"{FAMILY}signal.pause()"), job.script("mark()"))
    pids(job)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signum)
    done = job.finish(process)
    assert done.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    wait_until(lambda: not any(map(is_alive, family)))
    assert job.marks() == []


def test_what_a_check_leaves_behind_is_killed_before_the_workers_start(job: Job) -> None:
    script = job.script(
        "import psutil\npids = open('pids').read().split()[:3]\nmark(any(map(psutil.pid_exists, map(int, pids))))\n"
    )
    done = job.run("--health-check", program(job, FAMILY), script)
    assert done.returncode == 0
    assert job.marks() == ["0.0 False"]


def test_a_check_that_takes_too_long_is_killed_with_all_that_it_has_started(job: Job) -> None:
    check = program(job, f"{FAMILY}signal.pause()")
    args = ("--rdzv-conf", "join_timeout=0.1", "--health-check-timeout", "5", "--health-check", check)
    done = job.run(*args, job.script("mark()"))
    assert done.returncode == 69
    assert not any(map(is_alive, pids(job)))


def test_a_check_has_ordinary_signals_and_its_own_session_and_no_input(job: Job) -> None:
    facts = (
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "
        "os.getsid(0) == os.getpid(), sys.stdin.read(), sorted(map(int, os.listdir('/proc/self/fd')))[:3], "
        "os.environ.get('ELASTIC_LAUNCH_PART'), os.getcwd() == os.path.dirname(__file__))\nsys.exit(1)"
    )
    done = job.run(*SOON, "--health-check", program(job, facts), job.script(""))
    assert "health check failed: set() True True  [0, 1, 2] None True (exit code 1)" in done.stderr


def test_a_shell_is_used_only_where_it_is_asked_for(job: Job) -> None:
    done = job.run("--health-check", "sh -c 'test -d . && exit 0'", job.script("mark()"))
    assert done.returncode == 0
    done = job.run(*SOON, "--health-check", "test -d . && exit 0", job.script("mark()"))
    assert done.returncode == 69


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--health-check", "no-such-program --all"), "--health-check=no-such-program: no such program"),
        (("--health-check", "'open"), '--health-check="\'open": no closing quotation'),
        (("--health-check", "true", "--health-check-timeout", "0"), "--health-check-timeout='0'"),
    ],
)
def test_a_wrong_option_ends_the_launch(args: tuple[str, ...], text: str, job: Job) -> None:
    done = job.run(*args, job.script("mark()"))
    assert done.returncode == 2
    assert text in done.stderr
    assert job.marks() == []


def test_variables_and_a_file_set_the_check(job: Job) -> None:
    script = job.script("mark()")
    check = {"PET_HEALTH_CHECK": "false", "PET_HEALTH_CHECK_TIMEOUT": "5", "PET_RDZV_CONF": "join_timeout=0.1"}
    assert job.run(script, **check).returncode == 69
    (job.path / "job.toml").write_text('health-check = "false"\nrdzv-conf = "join_timeout=0.1"\n')
    assert job.run("--config", "job.toml", script).returncode == 69
    assert job.run("--config", "job.toml", "--health-check", "true", script).returncode == 0


def test_a_dry_run_names_the_check_and_does_not_run_it(job: Job) -> None:
    done = job.run("--dry-run", "--health-check", "touch ran", job.script("mark()"))
    assert done.returncode == 0
    assert "touch ran (not run)" in done.stdout
    assert not (job.path / "ran").exists()


def test_failed_checks_are_in_the_events_file(job: Job) -> None:
    check = program(job, "print('no'); sys.exit(1)")
    job.run(*AGAIN, "--events", "events.jsonl", "--health-check", check, job.script(""))
    events = [json.loads(line) for line in (job.path / "events.jsonl").read_text().splitlines()]
    assert [event["name"] for event in events] == ["check_failed", "check_failed", "ended"]
    assert [event["tries"] for event in events[:2]] == [1, 2]
    assert (events[0]["reason"], events[0]["output"], events[1]["pause"]) == ("no (exit code 1)", "no", 0.0)
    assert events[2]["status"] == 69


def test_a_program_can_ask_for_a_check(tmp_path: Path) -> None:
    config = LaunchConfig(1, 1, 1, rdzv_timeout=1, health_check="sh -c 'echo no; exit 1'", verbosity=0)
    with pytest.raises(UnavailableError, match=r"health check failed: no \(exit code 1\); gave up after 1 s"):
        elastic_launch(config, "true")()
    config = LaunchConfig(1, 1, 1, rdzv_timeout=1, health_check="no-such-program", verbosity=0)
    with pytest.raises(UnavailableError, match="cannot run no-such-program: No such file or directory"):
        elastic_launch(config, "true")()
    assert elastic_launch(LaunchConfig(1, 1, 1, health_check="true", verbosity=0), "true")() == {0: None}
    with pytest.raises(UsageError, match="health_check_timeout=0"):
        LaunchConfig(1, 1, 1, health_check_timeout=0)


def test_a_program_may_ignore_how_its_children_end(one_thread: None) -> None:
    """Some daemons do, and all that they start inherits it. The check then seemed to have been killed."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        config = LaunchConfig(1, 1, 1, rdzv_timeout=1, health_check="true", verbosity=0)
        assert elastic_launch(config, "true")() == {0: None}
    finally:
        signal.signal(signal.SIGCHLD, before)
