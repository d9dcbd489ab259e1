"""How workers end: stacks of those that hang, the OOM killer's work, and exceptions on good disks and bad ones."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from elastic_launch import ChildFailedError, DefaultLogsSpecs, LaunchConfig, elastic_launch
from elastic_launch.agent.worker_group import LocalWorkers
from elastic_launch.core.agent.lifecycle import SAME_SIGNAL
from elastic_launch.core.progress.goodput import RoundProgress
from tests.support.jobs import TWO, Job
from tests.support.waiting import DEADLINE, SOON, is_alive, wait_until

pytestmark = pytest.mark.usefixtures("time_for_stacks")

POINTER = re.compile(r"the stacks of its threads are in (\S+/stacks\.log)")

# Rank 0 fails when the other hangs.
FIRST_FAILS = "mark('starts')\nif rank == 0:\n    wait_for('1.0 hangs')\n    sys.exit(3)\n"
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
PATIENT = "3"
"""A shutdown timeout that is longer than ``time_for_stacks``."""
HANG = "def deep_down():\n    mark('hangs')\n    time.sleep(1000)\ndeep_down()\n"


def stacks(text: str) -> str:
    """The stacks that a report, or a line, points to."""
    (path,) = set(POINTER.findall(text))
    return Path(path).read_text()


# ---- Workers that hang


HANGS = {
    "in a call of C": HANG,
    "in a lock": "import threading\ndef deep_down():\n    lock = threading.Lock()\n    lock.acquire()\n"
    "    mark('hangs')\n    lock.acquire()\ndeep_down()\n",
    "in Python": "def deep_down():\n    mark('hangs')\n    while True: pass\ndeep_down()\n",
    "in a thread": "import threading\ndef deep_down():\n    mark('hangs')\n    threading.Event().wait()\n"
    "thread = threading.Thread(target=deep_down)\nthread.start()\nthread.join()\n",
    "as a program that lost its main thread": "import threading\ndef deep_down():\n    mark('hangs')\n"
    "    threading.Event().wait()\nthreading.Thread(target=deep_down).start()\n",
    "stopped": HANG.replace("time.sleep(1000)", "os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(1000)"),
}


@pytest.mark.parametrize("kind", HANGS)
def test_a_worker_that_hangs_leaves_its_stacks(job: Job, kind: str) -> None:
    script = job.script(FIRST_FAILS + IGNORE + HANGS[kind])
    done = job.run(*TWO, "--shutdown-timeout", PATIENT, "--log-dir", str(job.path / "logs"), "--rdzv-id", "j", script)
    assert done.returncode == 3
    assert "in deep_down\n" in stacks(done.stderr)
    cause, _, rest = done.stderr.partition("\nThen\n")
    assert "rank    : 0 " in cause
    path = job.path / "logs/j/attempt_0/1/stacks.log"
    assert re.search(rf"rank 1 on \S+ \(pid \d+\): killed by SIGKILL; the stacks .* {path}\n", rest)
    assert "note" not in cause.partition("\nCause\n")[2]
    assert list((job.path / "logs").rglob("stacks.log")) == [path]
    assert 1.0 <= killed_after(done.stderr) < SOON


def killed_after(report: str) -> float:
    """Seconds between the times of the cause and of the first consequence."""
    times = re.findall(r"20\d\d-\d\d-\d\d \d\d:(\d\d):(\d\d\.\d{3})", report)
    cause, consequence = (60 * int(minute) + float(second) for minute, second in times[:2])
    return (consequence - cause) % 3600


@pytest.mark.parametrize("how", ["script", "module", "wrapper", "-t", "-r", "nested"])
def test_a_worker_that_hangs_however_it_was_started(job: Job, how: str) -> None:
    script = job.script(FIRST_FAILS + IGNORE + HANG)
    args, env = [script], {}
    match how:
        case "module":
            args = ["-m", "train"]
        case "wrapper":
            wrapper = job.path / "wrapper"
            wrapper.write_text(f'#!/bin/sh\ntrap "" TERM\n"{sys.executable}" "$@"\nexit $?\n')
            wrapper.chmod(0o755)
            env["PYTHON_EXEC"] = str(wrapper)
        case "-t" | "-r":
            args = [how, "3", script]
        case "nested":  # below a launcher that waits for it longer than the outer one does
            job.script(IGNORE + HANG.replace("mark(", "open('hangs', 'w'); mark("), "inner.py")
            wait = "if [ $RANK = 0 ]; then until [ -e hangs ]; do sleep 0.01; done; exit 3; fi; "
            inner = f"exec {sys.executable} -m elastic_launch --shutdown-timeout 60 inner.py"
            args = ["--no-python", "sh", "-c", wait + inner]
    done = job.run(*TWO, "--shutdown-timeout", PATIENT, "--log-dir", str(job.path / "logs"), *args, **env)
    assert done.returncode == 3
    assert "in deep_down\n" in stacks(done.stderr)
    if how in ("-t", "-r"):
        assert "deep_down" not in next((job.path / "logs").rglob("1/stderr.log")).read_text()
    shown = [line for line in done.stderr.splitlines() if line.endswith(" in deep_down")]
    assert len(shown) == (how == "nested"), "a launcher below another one leaves stacks on stderr for it"


def test_stacks_are_on_stderr_without_memory_for_them(job: Job) -> None:
    script = job.script(FIRST_FAILS + IGNORE + HANG)
    logs = job.path / "logs"
    done = job.run(*TWO, "--shutdown-timeout", PATIENT, "--log-dir", str(logs), script, ELASTIC_LAUNCH_PROGRESS="0")
    assert done.returncode == 3
    assert "in deep_down\n" in stacks(done.stderr)
    assert len([line for line in done.stderr.splitlines() if line.endswith(" in deep_down")]) == 1


def hang_as_rank_1(path: Path) -> None:
    def deep_down() -> None:
        path.touch()
        threading.Event().wait()

    if os.environ["RANK"] == "0":
        while not path.exists():
            time.sleep(0.01)
        sys.exit(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    thread = threading.Thread(target=deep_down)
    thread.start()
    thread.join()


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_function_that_hangs_leaves_its_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=0,
        start_method=method,
        shutdown_timeout=int(PATIENT),
        logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path / "logs")),
    )
    with pytest.raises(ChildFailedError) as caught:
        elastic_launch(config, hang_as_rank_1)(tmp_path / "hangs")
    found = stacks(str(caught.value))
    assert "in deep_down\n" in found
    assert "in hang_as_rank_1\n" in found
    assert caught.value.exit_code == 3
    assert POINTER.search(caught.value.failures[1].note)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_worker_does_not_answer(job: Job, signum: signal.Signals) -> None:
    """There is no report then, but a line; and what it points to is kept without --log-dir, too."""
    process = job.start(
        "--shutdown-timeout", PATIENT, job.script(f"{IGNORE}signal.signal(signal.SIGINT, signal.SIG_IGN)\n{HANG}")
    )
    job.wait_for("0.0 hangs")
    start = time.monotonic()
    process.send_signal(signum)
    done = job.finish(process)
    assert 1.0 <= time.monotonic() - start < SOON
    assert done.returncode == 128 + signum
    (line,) = (line for line in done.stderr.splitlines() if "did not stop in time" in line)
    assert re.match(r"elastic-run: rank 0 \(pid \d+\) did not stop in time; ", line)
    assert "in deep_down\n" in stacks(line)
    assert "FAILED" not in done.stderr
    Path(POINTER.search(line)[1]).unlink()  # type: ignore[index]  # found above


@pytest.mark.quick
def test_stacks_outlive_a_job_that_goes_well_in_the_end(job: Job) -> None:
    script = job.script(f"if restart == 1:\n    sys.exit()\n{FIRST_FAILS}{IGNORE}{HANG}")
    done = job.run(*TWO, "--max-restarts", "1", "--shutdown-timeout", PATIENT, script)
    assert done.returncode == 0, done.stderr
    assert "rank 1 (pid " in done.stderr
    assert "in deep_down\n" in stacks(done.stderr)
    path = Path(POINTER.search(done.stderr)[1])  # type: ignore[index]
    assert [file.name for file in path.parents[3].rglob("*") if file.is_file()] == ["stacks.log"]
    path.unlink()


def test_a_program_that_is_not_python_hangs(job: Job) -> None:
    """It gets no signal that it does not know; what it goes on saying are no stacks."""
    script = job.path / "train.sh"
    script.write_text(
        "if [ $RANK = 0 ]; then while [ ! -e hangs ]; do sleep 0.01; done; exit 3; fi\n"
        "trap '' TERM\necho > hangs\nwhile :; do echo still here >&2; sleep 0.02; done\n"
    )
    done = job.run(
        *TWO, "--shutdown-timeout", "1", "--log-dir", str(job.path / "logs"), "--no-python", "sh", str(script)
    )
    assert done.returncode == 3
    (line,) = (line for line in done.stderr.splitlines() if re.search(r" rank 1 on ", line))
    assert line.endswith(": killed by SIGKILL")
    assert not POINTER.search(done.stderr)
    assert not list((job.path / "logs").rglob("stacks.log"))
    assert 1.0 <= killed_after(done.stderr) < SOON


OWN = "os.dup2(os.open('own.log', os.O_WRONLY | os.O_CREAT), 2)\n"


@pytest.mark.parametrize("other", ["os.close(2)\n", OWN], ids=["closed", "own"])
def test_a_worker_that_hangs_with_another_stderr(job: Job, other: str) -> None:
    script = job.script(f"{FIRST_FAILS}{IGNORE}{other}{HANG}")
    done = job.run(*TWO, "--shutdown-timeout", PATIENT, "--log-dir", str(job.path / "logs"), script)
    assert done.returncode == 3
    assert "in deep_down\n" in stacks(done.stderr)
    if other == OWN:
        assert not (job.path / "own.log").read_bytes()


def test_a_worker_that_hangs_and_has_closed_all_files(job: Job) -> None:
    script = job.script(f"{FIRST_FAILS}{IGNORE}os.closerange(3, 1000)\n{HANG}")
    done = job.run(*TWO, "--shutdown-timeout", "1", "--log-dir", str(job.path / "logs"), script)
    assert done.returncode == 3
    assert 1.0 <= killed_after(done.stderr) < SOON
    assert not POINTER.search(done.stderr), "there are none that this launcher knows of"
    assert not list((job.path / "logs").rglob("stacks.log"))


def test_a_second_sigterm_kills_at_once_what_hangs(job: Job) -> None:
    process = job.start(*TWO, "--shutdown-timeout", "600", job.script(IGNORE + HANG))
    job.wait_for("0.0 hangs", "1.0 hangs")
    process.send_signal(signal.SIGTERM)
    assert process.stderr
    while "SIGTERM received: stopping 2 workers" not in process.stderr.readline():
        pass
    time.sleep(2 * SAME_SIGNAL)  # closer together they count as one
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    done = job.finish(process)
    assert time.monotonic() - start < SOON
    assert done.returncode == 128 + signal.SIGTERM
    assert "SIGTERM received again: sending SIGKILL to workers 0 (pid " in done.stderr


@pytest.mark.parametrize("victim", ["keeper", "agent"])
def test_nothing_is_left_of_workers_that_hang(job: Job, victim: str) -> None:
    script = f"child = subprocess.Popen(['setsid', 'sh', '-c', 'trap \"\" TERM; sleep 1000'])\n{IGNORE}{HANG}"
    process = job.start(*TWO, "--shutdown-timeout", "600", job.script(script))
    job.wait_for("0.0 hangs", "1.0 hangs")
    process.send_signal(signal.SIGTERM)
    assert process.stderr
    while "SIGTERM received" not in process.stderr.readline():
        pass
    agent = psutil.Process(process.pid)
    (keeper,) = agent.children()
    below = agent.children(recursive=True)
    (keeper if victim == "keeper" else agent).kill()
    done = job.finish(process)
    wait_until(lambda: not [each for each in below if is_alive(each.pid)], "processes of the job")
    assert done.returncode == (128 + signal.SIGTERM if victim == "keeper" else -signal.SIGKILL)


def test_workers_that_run_on_keep_their_output_while_another_hangs(job: Job) -> None:
    """One still stops while the other writes its stacks; what it says is not lost, nor is it ended by saying it."""
    slow = (
        "if rank == 2:\n"
        "    def stop(*_):\n"
        "        for number in range(26):\n"
        "            time.sleep(0.1); print('saving', number, flush=True); print(number, file=sys.stderr, flush=True)\n"
        "        mark('saved'); sys.exit(0)\n"
        "    signal.signal(signal.SIGTERM, stop); mark('ready'); wait()\n"
    )
    script = job.script(FIRST_FAILS.replace("'1.0 hangs'", "'1.0 hangs', '2.0 ready'") + slow + IGNORE + HANG)
    done = job.run("--nproc-per-node", "3", "-t", "3", "--shutdown-timeout", "5", script, TMPDIR=str(job.path))
    assert done.returncode == 3
    assert "2.0 saved" in job.marks()
    assert [line for line in done.stdout.splitlines() if "saving" in line] == [
        f"[default2]:saving {number}" for number in range(26)
    ]


# ---- The OOM killer


EAT = (
    "with open('/proc/self/oom_score_adj', 'w') as file: file.write('1000')\n"
    "print('loading', file=sys.stderr)\n"
    "data = bytearray(b'x') * (1 << 30)\n"
)


@pytest.mark.xdist_group("oom-killer")
def test_the_oom_killer_is_named(job: Job, memory_cgroup: Path) -> None:
    """But not for a worker of a later round that was killed by somebody else."""
    (limit,) = (
        memory_cgroup / name for name in ("memory.max", "memory.limit_in_bytes") if (memory_cgroup / name).exists()
    )
    limit.write_text(str(160 << 20))
    script = job.script(f"if restart == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n{EAT}")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        inside = f'echo $$ > "{memory_cgroup}/cgroup.procs"; exec "$@"'
        command = ["sh", "-c", inside, "sh", sys.executable, "-m", "elastic_launch", *args, script]
        return subprocess.run(command, capture_output=True, text=True, cwd=job.path, timeout=DEADLINE, check=False)

    done = run()
    assert done.returncode == 137
    note = "the kernel's OOM killer ended a process of this cgroup (memory limit 160 MiB): out of memory is the likely"
    assert f"  note    : {note} cause\n" in done.stderr
    assert re.search(r"stderr  : its last lines\n    loading\n", done.stderr)
    done = run("--max-restarts", "1")
    assert done.returncode == 137
    assert "exit    : killed by SIGKILL" in done.stderr
    assert "  note    :" not in done.stderr


@pytest.mark.xdist_group("oom-killer")
def test_sigkill_alone_is_no_sign_of_the_oom_killer(job: Job) -> None:
    done = job.run(job.script("os.kill(os.getpid(), signal.SIGKILL)"))
    assert done.returncode == 137
    assert "OOM" not in done.stderr
    assert "  note    :" not in done.stderr


# ---- Exceptions


def test_our_record_in_a_program_that_is_not_ours(job: Job) -> None:
    """--no-python: there is no bootstrap, so what tells of the exception is ``record`` alone."""
    script = job.script(
        "from elastic_launch import record\n@record\ndef main():\n    raise ValueError('told by record')\nmain()\n"
    )
    done = job.run("--no-python", sys.executable, script)
    assert done.returncode == 1
    assert "error   : ValueError: told by record\n" in done.stderr


def test_torchs_record_with_a_message_of_50_mb(job: Job) -> None:
    script = job.script(
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main():\n    raise ValueError('told by torch ' + 'x' * 50_000_000 + ' the end')\n"
        "sys.stderr = open(os.devnull, 'w')\nmain()\n"
    )
    done = job.run(script)
    assert done.returncode == 1
    assert "told by torch xxx" in done.stderr
    assert len(done.stderr) < 100_000


def test_an_exception_of_50_mb(job: Job) -> None:
    logs = str(job.path / "logs")
    done = job.run("-r", "3", "--log-dir", logs, job.script("raise ValueError('first ' + 'x' * 50_000_000 + ' last')"))
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("=" * 80) :]
    assert "error   : ValueError: first xxx" in report
    assert len(report) < 100_000


@pytest.mark.parametrize("inner", ["--no-python", "a program that passes its status on", "a program that raises"])
def test_a_launcher_below_a_launcher_tells_its_cause(job: Job, inner: str) -> None:
    job.script("if rank == 1:\n    raise ValueError('the innermost cause')\nwait()", "inner.py")
    command = [sys.executable, "-m", "elastic_launch", "--nproc-per-node", "2", "inner.py"]
    match inner:
        case "--no-python":
            args = ["--no-python", *command]
        case "a program that passes its status on":
            args = [job.script(f"sys.exit(subprocess.run({command!r}).returncode)")]
        case _:
            args = [job.script(f"subprocess.run({command!r}, check=True)")]
    done = job.run(*args)
    assert done.returncode == 1
    inner_report, outer_report = done.stderr.split("inner.py FAILED")[-1], done.stderr.rsplit("FAILED\n", 1)[1]
    assert "error   : ValueError: the innermost cause\n" in inner_report
    assert "error   : ValueError: the innermost cause\n" in outer_report
    assert "raise ValueError('the innermost cause')" in outer_report


WRITTEN = {
    "half written": '{"message": {"message": "ValueError: half", "extraInfo": {"py_callstack": "Trace',
    "no JSON": "Killed\n",
    "empty": "",
    "of another kind": "[1, 2]",
    "binary": "\udcff\udcfe\0",
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_an_error_file_that_is_no_use_hides_nothing(job: Job, kind: str) -> None:
    write = f"open(os.environ['TORCHELASTIC_ERROR_FILE'], 'wb').write(os.fsencode({WRITTEN[kind]!r}))\n"
    done = job.run(job.script(f"{write}print('its last words', file=sys.stderr)\nos._exit(7)\n"))
    assert done.returncode == 7
    assert "exit    : exit code 7\n" in done.stderr
    told = "error   : ValueError: half" if kind == "half written" else "stderr  : its last lines\n    its last words\n"
    assert told in done.stderr


RAISE = "mark('runs')\nwait_for('go')\nraise ValueError('on a bad disk')\n"


@pytest.mark.parametrize("tee", [(), ("-t", "3")])
def test_a_full_disk_hides_nothing(job: Job, small_disk: Path, tee: tuple[str, ...]) -> None:
    process = job.start(*TWO, *tee, "--log-dir", str(small_disk), job.script(RAISE))
    job.wait_for("0.0 runs", "1.0 runs")
    fill(small_disk)
    job.mark("go")
    check_traceback_is_told(job, process)


def test_a_full_disk_hides_no_stacks(job: Job, small_disk: Path) -> None:
    """They cannot be kept beside the error file then, so they are shown."""
    script = job.script("mark('runs')\nwait_for('go')\n" + FIRST_FAILS + IGNORE + HANG)
    process = job.start(*TWO, "--shutdown-timeout", PATIENT, "--log-dir", str(small_disk), script)
    job.wait_for("0.0 runs", "1.0 runs")
    fill(small_disk)
    job.mark("go")
    done = job.finish(process)
    assert done.returncode == 3
    assert re.search(r"rank 1 .*: killed by SIGKILL; the stacks of its threads are shown above\n", done.stderr)
    assert "in deep_down\n" in done.stderr


def test_a_disk_that_has_become_read_only_hides_nothing(job: Job, small_disk: Path) -> None:
    """Also where a restart finds no place for its files."""
    process = job.start(*TWO, "--max-restarts", "1", "--log-dir", str(small_disk), job.script(RAISE))
    job.wait_for("0.0 runs", "1.0 runs")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    job.mark("go")
    check_traceback_is_told(job, process)


def test_no_place_for_temporary_files_hides_nothing(job: Job, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    process = job.start(*TWO, job.script(RAISE), TMPDIR=str(small_disk))
    job.wait_for("0.0 runs", "1.0 runs")
    job.mark("go")
    check_traceback_is_told(job, process)


def test_a_log_directory_that_cannot_be_made_is_an_error_before_anything_runs(job: Job, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = job.run("--log-dir", str(small_disk), job.script("mark('runs')"))
    assert done.returncode == 69
    assert re.fullmatch(
        rf"elastic-run: --log-dir={small_disk}: cannot create .*: Read-only file system; choose another .*\n",
        done.stderr,
    )
    assert job.marks() == []


# ---- What the job got done


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round's workers have made 617 steps when they end."""

    def progress(self: LocalWorkers) -> RoundProgress:
        return RoundProgress(617, now := time.monotonic(), now)

    monkeypatch.setattr(LocalWorkers, "progress", progress)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("counting")
def test_the_last_line_and_the_report_say_what_the_job_got_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = elastic_launch(LaunchConfig(1, 1, 1, max_restarts=1), "sh")
    made = r"; 1,234 steps, 0\.0 % of \d+\.\d s in steps, 1 restart cost \d+\.\d s\n"
    job("-c", f"test -e {tmp_path}/failed || {{ touch {tmp_path}/failed; exit 3; }}")
    assert re.search(f"done: 1 worker succeeded{made}", capfd.readouterr().err)
    with pytest.raises(ChildFailedError) as caught:
        job("-c", "exit 3")
    assert re.search(f"\nprogress  : {made.removeprefix('; ')}", str(caught.value))


def fill(folder: Path) -> None:
    with pytest.raises(OSError, match="No space left"), open(folder / "filler", "wb", buffering=0) as file:
        file.writelines(itertools.repeat(bytes(4096)))


def check_traceback_is_told(job: Job, process: subprocess.Popen[str]) -> None:
    """The report tells what the workers raised, from their last words."""
    done = job.finish(process)
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("=" * 80) :]
    assert "exit    : exit code 1\n" in report
    assert "stderr  : its last lines\n" in report
    assert "    ValueError: on a bad disk\n" in report
    assert 'train.py", line' in report
