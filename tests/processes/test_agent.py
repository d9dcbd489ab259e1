"""The launcher as its users meet it: real processes, real signals, and what is left of them."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2

import psutil
import pytest

from elastic_launch.core.agent.lifecycle import SAME_SIGNAL
from tests.support.jobs import Job
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE, SOON, is_alive, wait_until

TWO = ("--standalone", "--nproc-per-node", "2")


def test_good_job_is_silent_if_that_is_wanted(job: Job) -> None:
    # In one piece each: two workers' prints may mingle, which write piece by piece.
    done = job.run("-q", *TWO, job.script("os.write(1, b'out %d\\n' % rank); os.write(2, b'err %d\\n' % rank)"))
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["out 0", "out 1"]
    assert sorted(done.stderr.splitlines()) == ["err 0", "err 1"]


def test_the_events_of_a_job_s_life_are_told(job: Job) -> None:
    text = "if rank == 1 and restart == 0: wait_for('0.0 up'); sys.exit(3)\nmark('up')\nif restart == 0: wait()"
    done = job.run(*TWO, "--max-restarts", "2", job.script(text))
    assert done.returncode == 0
    assert [line.removeprefix("elastic-run: ") for line in done.stderr.splitlines()] == [
        "formed: 1 node, 2 workers",
        "rank 1 failed (exit code 3): stopping 1 worker",
        "rank 1 failed (exit code 3): restart 1 of 2",
        "re-formed: 1 node, 2 workers",
        "done: 2 workers succeeded",
    ]


def test_python_dash_m_and_the_console_script_are_the_same(job: Job) -> None:
    script = Path(sys.executable).parent / "elastic-run"
    versions = [
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in (
            [str(script)],
            [sys.executable, "-m", "elastic_launch"],
            [sys.executable, "-m", "elastic_launch.run"],
        )
    ]
    assert versions[0] == versions[1] == versions[2]
    assert "elastic-run [OPTION ...] SCRIPT" in versions[0]


@pytest.mark.quick
def test_environment_of_the_workers(job: Job) -> None:
    text = "mark(repr({k: v for k, v in os.environ.items()}))"
    done = job.run(
        "--nproc-per-node", "2", "--max-restarts", "3", "--role", "trainer", "--rdzv-id", "j1", job.script(text)
    )
    assert done.returncode == 0
    by_rank = {env["RANK"]: env for env in (eval(mark.split(" ", 1)[1]) for mark in job.marks())}
    assert sorted(by_rank) == ["0", "1"]
    env = by_rank["1"]
    expected = {
        "LOCAL_RANK": "1",
        "GROUP_RANK": "0",
        "ROLE_RANK": "1",
        "ROLE_NAME": "trainer",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "j1",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": "1",
    }
    assert {name: env.get(name) for name in expected} == expected
    assert env["MASTER_PORT"] == by_rank["0"]["MASTER_PORT"]
    assert 0 < int(env["MASTER_PORT"]) < 65536
    assert re.search(r"/j1/attempt_0/1/error\.json$", env["TORCHELASTIC_ERROR_FILE"])


def test_torchruns_workers_get_no_variable_that_ours_do_not(job: Job) -> None:
    script = job.script("mark(repr(sorted(os.environ)))")
    assert job.run("--nproc-per-node", "1", script).returncode == 0
    torchrun = Path(sys.executable).parent / "torchrun"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([torchrun, "--nproc-per-node", "1", script], env=env, check=True, capture_output=True)
    ours, theirs = (set(eval(mark.split(" ", 1)[1])) for mark in job.marks())
    # Theirs is read by torchrun's own agent only.
    assert theirs - ours <= {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
    assert ours - theirs == {"ELASTIC_LAUNCH_PROGRESS_FD"}


def test_five_variables_of_kubernetes_operators_launch_a_job(job: Job) -> None:
    five = {
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": "2",
        "PET_NODE_RANK": "0",
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": str(free_port()),
    }
    done = job.run(job.script("mark(os.environ['MASTER_ADDR'] + ':' + os.environ['MASTER_PORT'])"), **five)
    assert done.returncode == 0, done.stderr
    address = f"localhost:{five['PET_MASTER_PORT']}"
    assert sorted(job.marks()) == [f"0.0 {address}", f"1.0 {address}"]


@pytest.mark.parametrize(
    ("cpus", "workers", "threads"), [(1, 2, "1"), (len(os.sched_getaffinity(0)), 1, None), (1, 1, "1")]
)
def test_omp_num_threads_are_the_cpus_shared_out(job: Job, cpus: int, workers: int, threads: str | None) -> None:
    from elastic_launch.host.devices import cpu_count

    script = job.script("mark(os.environ['OMP_NUM_THREADS'])")
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(affinity)[:cpus]))
    try:
        expected = threads or str(cpu_count())
        done = subprocess.run(
            [sys.executable, "-m", "elastic_launch", "--nproc-per-node", str(workers), script],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        os.sched_setaffinity(0, affinity)
    assert {mark.split()[1] for mark in job.marks()} == {expected}
    told = f"OMP_NUM_THREADS={expected} for each worker" in done.stderr
    assert told == (workers > 1)


# Failures and restarts


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("if rank == 1: sys.exit(42)\nwait()", 42, "exit code 42"),
        ("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nwait()", 137, "killed by SIGKILL"),
        ("if rank == 1: os.kill(os.getpid(), signal.SIGSEGV)\nwait()", 139, "killed by SIGSEGV"),
        ("if rank == 1: sys.exit('no data')\nwait()", 1, "SystemExit: no data"),
        ("if rank == 1: raise ValueError('boom')\nwait()", 1, "ValueError: boom"),
        ("if rank == 1: raise KeyboardInterrupt\nwait()", 130, "KeyboardInterrupt"),
        ("if rank == 1: os._exit(7)\nwait()", 7, "exit code 7"),
        ("if rank == 1: import nonsense\nwait()", 1, "ModuleNotFoundError: No module named 'nonsense'"),
    ],
)
def test_status_and_report_are_the_causes(job: Job, text: str, status: int, words: str) -> None:
    done = job.run(*TWO, job.script(text))
    assert done.returncode == status
    report = done.stderr[done.stderr.index("=====") :]
    assert "train.py FAILED" in report
    assert "rank    : 1 (local rank 1, pid " in report
    assert words in report
    assert "Then" not in report, "the worker that the agent stopped did not fail"


@pytest.mark.quick
def test_report_shows_the_traceback_of_an_unmodified_script(job: Job) -> None:
    script = job.script("def train():\n    raise ValueError('boom')\ntrain()\n")
    done = job.run("--nproc-per-node", "1", script)
    report = done.stderr[done.stderr.index("=====") :]
    assert f'      File "{script}", line ' in report
    assert "in train\n" in report
    assert "    ValueError: boom\n" in report
    assert "bootstrap.py" not in done.stderr


def test_restarts_are_counted_and_end(job: Job) -> None:
    script = job.script("mark(os.environ['MASTER_PORT'])\nif rank == 0: sys.exit(3)\nwait()")
    done = job.run(*TWO, "--max-restarts", "2", script)
    assert done.returncode == 3
    assert {mark.split()[0] for mark in job.marks()} >= {"0.0", "0.1", "0.2"}
    assert not [mark for mark in job.marks() if mark.startswith(("0.3", "1.3"))]
    assert "rank 0 failed (exit code 3): restart 2 of 2" in done.stderr
    assert "restarts  : 2 of 2 used" in done.stderr


@pytest.mark.quick
def test_job_recovers(job: Job) -> None:
    script = job.script("mark()\nif restart == 0 and rank == 1: os.kill(os.getpid(), 9)\nif restart == 0: wait()")
    done = job.run(*TWO, "--max-restarts", "1", script)
    assert done.returncode == 0
    assert sorted(job.marks())[-2:] == ["1.0", "1.1"]
    assert "rank 1 failed (killed by SIGKILL): restart 1 of 1" in done.stderr


def test_worker_that_ends_early_is_no_failure(job: Job) -> None:
    script = job.script(
        "if rank == 1: mark('early'); sys.exit(0)\nwhile not os.path.exists('go'): time.sleep(0.01)\nmark()"
    )
    process = job.start(*TWO, script)
    job.wait_for("1.0 early")
    (job.path / "go").touch()
    assert job.finish(process).returncode == 0
    assert "0.0" in job.marks()


def test_missing_and_unexecutable_commands(job: Job) -> None:
    file = job.path / "program"
    file.write_text("\x00not a program")
    file.chmod(0o755)
    done = job.run("--no-python", str(file))
    assert done.returncode == 126
    assert f"cannot start {file}: Exec format error" in done.stderr
    assert "(local rank 0, not started)" in done.stderr


# Kinds of workers


def test_script_sees_its_arguments_and_itself(job: Job) -> None:
    script = job.script("mark(repr((sys.argv, __name__, __file__, sys.path[0])))")
    assert job.run("--nproc-per-node", "1", "train.py", "--mo", "1", "--nnodes", "x").returncode == 0
    argv, name, file, path = eval(job.marks()[0].split(" ", 1)[1])
    assert (argv, name) == (["train.py", "--mo", "1", "--nnodes", "x"], "__main__")
    assert (file, path) == (script, str(job.path))


def test_module(job: Job) -> None:
    (job.path / "pkg").mkdir()
    job.script("mark(repr((sys.argv[1:], __package__)))", "pkg/__main__.py")
    assert job.run("--nproc-per-node", "1", "-m", "pkg", "a").returncode == 0
    assert job.marks() == ["0.0 (['a'], 'pkg')"]


def test_missing_module(job: Job) -> None:
    done = job.run("--nproc-per-node", "1", "-m", "no_such_module")
    assert done.returncode == 1
    assert "no_such_module FAILED" in done.stderr
    report = done.stderr[done.stderr.index("Cause") :]
    assert "No module named no_such_module" in report
    assert "Traceback" not in report


def test_no_python(job: Job) -> None:
    in_turn = "[ $RANK = 0 ] && touch said; until [ -e said ]; do sleep 0.01; done"  # else 0 may be stopped before
    done = job.run(*TWO, "--no-python", "sh", "-c", f"echo $RANK $0 $1; {in_turn}; exit $((RANK * 5))", "a", "b")
    assert sorted(done.stdout.split("\n")) == ["", "0 a b", "1 a b"]
    assert done.returncode == 5
    assert "sh FAILED" in done.stderr


def test_run_path_and_python_exec(job: Job) -> None:
    fake = job.path / "fake-python"
    fake.write_text(f'#!/bin/sh\nVIA=fake exec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    script = job.script("mark(os.environ.get('VIA'))")
    assert job.run("--nproc-per-node", "1", script, PYTHON_EXEC=str(fake)).returncode == 0
    assert job.run("--nproc-per-node", "1", "--run-path", script, PYTHON_EXEC=str(fake)).returncode == 0
    assert job.marks() == ["0.0 fake", "0.0 None"]


def test_exception_below_a_wrapper_is_told(job: Job) -> None:
    wrapper = job.path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\n{sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    done = job.run("--nproc-per-node", "1", job.script("raise ValueError('boom')"), PYTHON_EXEC=str(wrapper))
    assert done.returncode == 1
    assert "error   : ValueError: boom" in done.stderr


def test_standard_input_is_left_to_the_workers(job: Job) -> None:
    script = job.script("mark(sys.stdin.readline().strip())")
    subprocess.run(
        [sys.executable, "-m", "elastic_launch", "--nproc-per-node", "1", script], input=b"hello\n", check=True
    )
    assert job.marks() == ["0.0 hello"]


def test_descriptors_of_the_caller_do_not_reach_the_workers(job: Job) -> None:
    script = job.script("mark(str(len([fd for fd in os.listdir('/proc/self/fd') if int(fd) > 2])))")
    progress = 2  # descriptors that every worker gets
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "elastic_launch", "--nproc-per-node", "1", script]
    subprocess.run(command, pass_fds=[reading, writing], check=True)
    os.close(reading)
    os.close(writing)
    assert job.marks() == [f"0.0 {progress + 1}"], "also the descriptor of the listing itself, and no other"


def test_closed_standard_streams(job: Job) -> None:
    script = job.script("mark(str(sorted(os.listdir('/proc/self/fd'))[:3]))")
    command = f"exec {sys.executable} -m elastic_launch --nproc-per-node 2 {script} <&- >&- 2>&-"
    subprocess.run(["sh", "-c", command], check=True)
    assert sorted(job.marks()) == [f"{rank}.0 ['0', '1', '2']" for rank in (0, 1)]


# Signals


@pytest.mark.quick
@pytest.mark.parametrize("signum", [SIGTERM, SIGINT, SIGHUP, SIGQUIT])
def test_signals_stop_the_job_and_reach_the_workers(job: Job, signum: signal.Signals) -> None:
    script = job.script(
        "def handler(signum, frame): mark(f'got {signum}'); sys.exit(0)\n"
        f"signal.signal({signum}, handler); mark('up'); wait()"
    )
    process = job.start(*TWO, "--max-restarts", "3", script)
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(signum)
    done = job.finish(process)
    assert done.returncode == 128 + signum
    assert {f"0.0 got {signum}", f"1.0 got {signum}"} <= set(job.marks())
    assert "Traceback" not in done.stderr
    assert f"{signum.name} received: stopping 2 workers" in done.stderr


@pytest.mark.parametrize("second", [SIGTERM, SIGINT])
def test_second_signal_kills_at_once(job: Job, second: signal.Signals) -> None:
    script = job.script("signal.signal(15, lambda *_: mark('deaf')); mark('up'); wait()")
    process = job.start(*TWO, "--shutdown-timeout", "600", script)
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(SIGTERM)
    job.wait_for("0.0 deaf", "1.0 deaf")
    select.select([], [], [], 2 * SAME_SIGNAL)  # sooner, it would count as the first one
    process.send_signal(second)
    assert job.finish(process).returncode == 143


def test_shutdown_timeout_holds_for_a_signal(job: Job) -> None:
    script = job.script("signal.signal(15, lambda *_: mark('deaf')); mark('up'); wait()")
    process = job.start(*TWO, "--shutdown-timeout", "1", script)
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(SIGTERM)
    done = job.finish(process)
    assert done.returncode == 143
    assert "sending SIGKILL to workers 0 (pid " in done.stderr


def test_shutdown_timeout_holds_for_a_failure(job: Job) -> None:
    script = job.script(
        "signal.signal(15, lambda *_: mark('deaf')); mark('up')\n"
        "while len(open('marks').readlines()) < 2: time.sleep(0.01)\n"
        "if rank == 1: sys.exit(9)\nwait()"
    )
    done = job.run(*TWO, "--shutdown-timeout", "5", script)
    assert done.returncode == 9
    assert "0.0 deaf" in job.marks()
    assert "sending SIGKILL to worker rank 0 (pid " in done.stderr


def test_shutdown_timeout_from_torchs_variable(job: Job) -> None:
    script = job.script("signal.signal(15, lambda *_: mark('deaf')); mark('up'); wait()")
    process = job.start(*TWO, script, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(SIGTERM)
    assert "SIGKILL in 1 s" in job.finish(process).stderr


@pytest.mark.parametrize("signum", [SIGUSR1, SIGUSR2])
def test_user_signals_are_the_workers_business(job: Job, signum: signal.Signals) -> None:
    script = job.script(
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "def handler(signum, frame): mark(f'got {signum}, child {child.poll()}')\n"
        f"signal.signal({signum}, handler); mark('up')\n"
        "while not os.path.exists('go'): time.sleep(0.01)\nchild.kill()"
    )
    process = job.start(*TWO, script)
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(signum)
    job.wait_for(f"0.0 got {signum}, child None", f"1.0 got {signum}, child None")
    (job.path / "go").touch()
    assert job.finish(process).returncode == 0


@pytest.mark.parametrize("options", [("-t", "3", "--log-dir", "logs"), ("--preload", "json")])
def test_a_user_signal_that_would_kill_a_worker_is_not_passed_on(job: Job, options: tuple[str, ...]) -> None:
    """One that the program waits for without a handler is, and so is one for the program below a wrapper."""
    text = (
        "if rank == 1: signal.pthread_sigmask(signal.SIG_BLOCK, [10])\n"
        "elif rank == 2: child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.signal(10, lambda *_:"
        " exit(7)); print(flush=True); signal.pause()'], stdout=-1); child.stdout.readline()\n"
        "mark('up')\n"
        "if rank == 1: mark(f'got {signal.sigwait([10])}')\n"
        "elif rank == 2: mark(f'child {child.wait()}')\n"
        "while not os.path.exists('go'): time.sleep(0.01)"
    )
    process = job.start("--nproc-per-node", "3", *options, job.script(text))
    job.wait_for("0.0 up", "1.0 up", "2.0 up")
    process.send_signal(SIGUSR1)
    job.wait_for("1.0 got 10", "2.0 child 7")
    (job.path / "go").touch()
    done = job.finish(process)
    assert done.returncode == 0
    line = "SIGUSR1 is not passed on to local rank 0: without a handler, the program would die of it"
    assert done.stderr.count(line) == 1


@pytest.mark.parametrize("signum", [SIGTERM, SIGINT])
def test_signals_that_the_parent_has_blocked_stop_the_job(job: Job, signum: signal.Signals) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        process = job.start(job.script("mark('up'); wait()"))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    job.wait_for("0.0 up")
    process.send_signal(signum)
    assert job.finish(process).returncode == 128 + signum


def test_an_interrupt_during_the_imports_ends_the_launcher_without_a_traceback(job: Job) -> None:
    """Of what is imported before, Python alone decides."""
    hook = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'elastic_launch.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    (job.path / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join([str(job.path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = job.run(job.script("mark('up')"), PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (-SIGINT, "")


@pytest.mark.parametrize(("text", "status"), [("os._exit(3)", 3), ("os.kill(os.getpid(), 10)", 138)])
def test_user_signal_does_not_hide_a_later_failure(job: Job, text: str, status: int) -> None:
    script = job.script(
        "def handler(*_): signal.signal(10, signal.SIG_DFL); mark('got')\n"
        "signal.signal(10, handler); mark('up')\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        f"if rank == 0: {text}\nwait()"
    )
    process = job.start(*TWO, script)
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(SIGUSR1)
    job.wait_for("0.0 got", "1.0 got")
    (job.path / "go").touch()
    done = job.finish(process)
    assert done.returncode == status
    assert "train.py FAILED" in done.stderr


def test_endless_shutdown_timeout(job: Job) -> None:
    script = job.script(
        "signal.signal(15, lambda *_: mark('got')); mark('up')\nwhile not os.path.exists('go'): time.sleep(0.01)"
    )
    process = job.start(*TWO, "--shutdown-timeout", "999999999", script)
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(SIGTERM)
    job.wait_for("0.0 got", "1.0 got")
    (job.path / "go").touch()
    assert job.finish(process).returncode == 143


def test_success_stays_success_when_a_signal_comes_too_late(job: Job) -> None:
    text = (
        "child = \"trap 'echo swept >> marks' TERM; echo ready >> marks; while :; do sleep 0.1; done\"\n"
        "if rank == 0: subprocess.Popen(['sh', '-c', child])\n"
        "wait_for('ready')"
    )
    process = job.start(*TWO, job.script(text))
    # On a busy machine the child may not be in time to say so before it is killed.
    wait_until(lambda: "swept" in job.marks() or process.poll() is not None)
    process.send_signal(SIGTERM)
    assert job.finish(process).returncode == 0


def test_user_signal_stops_the_job_where_the_user_says_so(job: Job) -> None:
    process = job.start(*TWO, "--signals-to-handle", "SIGUSR1", job.script("mark('up'); wait()"))
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(SIGUSR1)
    assert job.finish(process).returncode == 128 + SIGUSR1


def test_nohup_works(job: Job) -> None:
    script = job.script("mark('up')\nwhile not os.path.exists('go'): time.sleep(0.01)")
    command = ["nohup", sys.executable, "-m", "elastic_launch", *TWO, script]
    process = subprocess.Popen(command, cwd=job.path, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    job.wait_for("0.0 up", "1.0 up")
    process.send_signal(SIGHUP)
    (job.path / "go").touch()
    assert process.wait(DEADLINE) == 0


def test_stopped_worker_is_woken_to_end(job: Job) -> None:
    script = job.script("mark(str(os.getpid())); wait()")
    process = job.start(*TWO, "--shutdown-timeout", "600", script)
    wait_until(lambda: len(job.marks()) == 2)
    for mark in job.marks():
        os.kill(int(mark.split()[1]), signal.SIGSTOP)
    process.send_signal(SIGTERM)
    assert job.finish(process).returncode == 143


def test_ctrl_c_in_a_terminal_leaves_a_clean_prompt(job: Job) -> None:
    """Run a shell's foreground job on a terminal and press Ctrl-C: everything is over when the prompt is back."""
    script = job.script(
        "def handler(signum, frame): time.sleep(0.2); print(f'saved {rank}'); mark('saved'); sys.exit(0)\n"
        "signal.signal(2, handler); mark('up'); wait()"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(job.path)
        command = f"{sys.executable} -m elastic_launch --standalone --nproc-per-node 2 {script}; echo status $? END"
        os.execvp("bash", ["bash", "--norc", "-ic", command])
    try:
        job.wait_for("0.0 up", "1.0 up")
        os.write(terminal, b"\x03")
        text = b""
        end = time.monotonic() + DEADLINE
        while b"END" not in text and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    text += os.read(terminal, 4096)
                except OSError:
                    break
    finally:
        os.kill(pid, SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    screen = text.decode()
    assert "status 130 END" in screen, screen
    before, _, _ = screen.partition("status 130")
    assert "saved 0" in before
    assert "saved 1" in before
    assert "Traceback" not in screen
    assert "KeyboardInterrupt" not in screen


# Nothing is left behind

TREE = """
subprocess.Popen(['sleep', '1000'])
subprocess.Popen(['setsid', 'sleep', '1000'])
subprocess.Popen(['env', '-i', '/bin/sh', '-c', "trap '' TERM HUP INT; while :; do sleep 1; done"])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(15, signal.SIG_IGN)
        mark('daemon'); wait()
    os._exit(0)
os.wait()
mark('up')
"""
"""A worker's script that starts what is hard to get rid of: children in groups and sessions of their own, a daemon."""


def tree_is_up(job: Job) -> None:
    job.wait_for("0.0 up", "1.0 up", "0.0 daemon", "1.0 daemon")


def below(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@pytest.mark.quick
@pytest.mark.parametrize("victim", ["agent", "keeper"])
def test_sigkill_leaves_nothing(job: Job, victim: str) -> None:
    process = job.start(*TWO, job.script(TREE + "wait()"))
    tree_is_up(job)
    [keeper] = [child.pid for child in psutil.Process(process.pid).children()]
    family = below(process.pid)
    assert len(family) >= 1 + 2 * 5  # the keeper; a worker, its three children (one between two sleeps) and its daemon
    start = time.monotonic()
    os.kill(process.pid if victim == "agent" else keeper, SIGKILL)
    wait_until(lambda: not [pid for pid in family if is_alive(pid)], "the end of all processes")
    assert time.monotonic() - start < SOON
    done = job.finish(process)
    assert done.returncode == (-SIGKILL if victim == "agent" else 137)
    if victim == "keeper":
        assert f"the keeper process (pid {keeper}) was killed" in done.stderr


@pytest.mark.parametrize("preload", ["none", "json"])
def test_sigkill_of_agent_and_keeper_at_once_leaves_no_worker(job: Job, preload: str) -> None:
    process = job.start(*TWO, "--preload", preload, job.script("mark('up'); wait()"))
    job.wait_for("0.0 up", "1.0 up")
    [keeper] = psutil.Process(process.pid).children()
    workers = [child.pid for child in keeper.children()]
    os.kill(process.pid, signal.SIGSTOP)  # it cannot react between the two
    os.kill(keeper.pid, SIGKILL)
    os.kill(process.pid, SIGKILL)
    wait_until(lambda: not [pid for pid in workers if is_alive(pid)])
    process.wait()


def test_stopped_keeper_is_replaced_by_the_agent_at_the_end(job: Job) -> None:
    process = job.start(*TWO, "--shutdown-timeout", "0", job.script(TREE + "wait()"))
    tree_is_up(job)
    family = below(process.pid)
    os.kill(psutil.Process(process.pid).children()[0].pid, signal.SIGSTOP)
    process.send_signal(SIGTERM)
    assert job.finish(process).returncode == 143
    assert not [pid for pid in family if is_alive(pid)]


def test_stopped_keeper_is_replaced_also_where_children_are_not_waited_for(job: Job) -> None:
    script = job.script(TREE + "wait()")
    command = f"trap '' CHLD; exec {sys.executable} -m elastic_launch --nproc-per-node 1 --shutdown-timeout 0 {script}"
    process = subprocess.Popen(["bash", "-c", command], cwd=job.path, stderr=subprocess.DEVNULL)
    job.wait_for("0.0 up", "0.0 daemon")
    family = below(process.pid)
    os.kill(psutil.Process(process.pid).children()[0].pid, signal.SIGSTOP)
    process.send_signal(SIGTERM)
    assert process.wait(DEADLINE) == 143
    assert not [pid for pid in family if is_alive(pid)]


def test_job_survives_the_loss_of_its_keeper(job: Job) -> None:
    script = job.script(TREE + "if restart == 0: wait()")
    process = job.start(*TWO, "--max-restarts", "1", script)
    tree_is_up(job)
    family = below(process.pid)
    os.kill(psutil.Process(process.pid).children()[0].pid, SIGKILL)
    done = job.finish(process)
    assert done.returncode == 0
    assert {"0.1 up", "1.1 up"} <= set(job.marks())
    assert not [pid for pid in family if is_alive(pid)]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("wait_for('0.0 up', '1.0 up', '0.0 daemon', '1.0 daemon')", 0),
        ("if rank == 1: wait_for('0.0 up', '0.0 daemon', '1.0 daemon'); sys.exit(4)\nwait()", 4),
        ("wait()", 143),
    ],
    ids=["good", "failure", "signal"],
)
def test_every_end_leaves_nothing(job: Job, end: str, status: int) -> None:
    process = job.start(*TWO, "--shutdown-timeout", "1", job.script(TREE + end))
    tree_is_up(job)
    if status == 143:
        process.send_signal(SIGTERM)
    assert job.finish(process).returncode == status
    # The fixture that watches every test fails this one if anything is left.


def test_nothing_of_a_round_lives_in_the_next(job: Job) -> None:
    script = job.script(
        "if restart == 0:\n"
        + "\n".join(f"    {line}" for line in TREE.strip().splitlines())
        + "\n    if rank == 0: sys.exit(1)\n    wait()\n"
        "mine = ('TORCHELASTIC_RUN_ID=' + os.environ['TORCHELASTIC_RUN_ID']).encode()\n"
        "left = 0\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try: environ = open(f'/proc/{pid}/environ', 'rb').read().split(b'\\0')\n"
        "    except OSError: continue\n"
        "    left += mine in environ and b'TORCHELASTIC_RESTART_COUNT=0' in environ\n"
        "mark(f'left {left}')\n"
    )
    done = job.run(*TWO, "--max-restarts", "1", "--shutdown-timeout", "1", script)
    assert done.returncode == 0
    assert {"0.1 left 0", "1.1 left 0"} <= set(job.marks())


def test_what_a_failed_worker_left_has_its_grace(job: Job) -> None:
    script = job.script(
        "if rank == 0:\n"
        "    if os.fork() == 0:\n"
        "        signal.signal(15, lambda *_: (mark('child saved'), os._exit(0))); mark('child up'); wait()\n"
        "    while not os.path.exists('go'): time.sleep(0.01)\n"
        "    os._exit(1)\n"
        "wait()"
    )
    process = job.start(*TWO, script)
    job.wait_for("0.0 child up")
    (job.path / "go").touch()
    assert job.finish(process).returncode == 1
    assert "0.0 child saved" in job.marks()


def test_killed_leftovers_are_named(job: Job) -> None:
    script = job.script(
        "subprocess.Popen(['sh', '-c', \"trap '' TERM; echo ready >> marks; while :; do sleep 1; done\"])\n"
        "wait_for('ready')"
    )
    done = job.run("--nproc-per-node", "1", script)
    assert done.returncode == 0
    assert re.search(r"killed processes that the workers left behind: .*sh \(pid \d+\)", done.stderr)


def test_agent_that_cannot_write_its_log_directory(job: Job) -> None:
    (job.path / "file").touch()
    done = job.run("--log-dir", str(job.path / "file"), job.script(""))
    assert done.returncode == 69
    assert "--log-dir=" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_place_for_temporary_files_stops_no_job(job: Job) -> None:
    done = job.run("--nproc-per-node", "1", job.script("mark()\nraise ValueError('boom')"), TMPDIR="/proc/nowhere")
    assert done.returncode == 1
    assert job.marks() == ["0.0"]
    assert "ValueError: boom" in done.stderr
    assert "exit    : exit code 1" in done.stderr


def test_error_files_lie_where_the_log_directory_says(job: Job) -> None:
    script = job.script("raise ValueError('boom')")
    args = ("--nproc-per-node", "1", "--max-restarts", "1", "--log-dir", "logs", "--rdzv-id", "a/b")
    done = job.run(*args, script)
    files = sorted(str(path.relative_to(job.path)) for path in job.path.glob("logs/**/*.json"))
    assert files == [f"logs/a%2Fb/attempt_{attempt}/0/error.json" for attempt in (0, 1)]
    assert f"logs      : {job.path}/logs/a%2Fb" in done.stderr
    # A later job of the same id must not report the earlier one's exception.
    job.script("sys.exit(3)")
    done = job.run(*args, script)
    assert done.returncode == 3
    assert "boom" not in done.stderr


def test_good_job_leaves_no_temporary_file(job: Job) -> None:
    script = job.script("if restart == 0: raise ValueError('boom')")
    assert job.run("--nproc-per-node", "1", "--max-restarts", "1", script).returncode == 0
    assert os.listdir(os.environ["TMPDIR"]) == []


def test_error_of_another_job_is_never_the_cause(job: Job) -> None:
    """Two jobs of the same id in the same directory, at the same time."""
    script = job.script(
        "if sys.argv[1] == 'A': mark('up')\n"
        "while sys.argv[1] == 'A' and not os.path.exists('go'): time.sleep(0.01)\n"
        "raise ValueError(f'job {sys.argv[1]}')"
    )
    args = ("--nproc-per-node", "1", "--log-dir", "logs", "--rdzv-id", "same", script)
    first = job.start(*args, "A")
    job.wait_for("0.0 up")
    assert "error   : ValueError: job B" in job.run(*args, "B").stderr
    (job.path / "go").touch()
    done = job.finish(first)
    assert done.returncode == 1
    assert "job B" not in done.stderr


def test_full_disk_hides_no_failure(job: Job) -> None:
    script = job.script("raise ValueError('boom')")
    command = f"ulimit -f 0; exec {sys.executable} -m elastic_launch --nproc-per-node 1 --log-dir logs {script}"
    done = subprocess.run(["sh", "-c", command], cwd=job.path, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1
    assert "ValueError: boom" in done.stderr
    assert "exit    : exit code 1" in done.stderr
    assert "cannot make memory for the workers' progress: File too large; " in done.stderr
    assert not [path for path in job.path.glob("logs/**/*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize(
    "content",
    [
        '{"message": {"message": "E: x", "extraInfo": {"py_callstack": "x", "timestamp": "1", "time": NaN}}}',
        '{"message": {"message": "E: x", "extraInfo": {"py_callstack": "x", "timestamp": "1", "time": -1e300}}}',
        '{"message": {"message": "E: x", "extraInfo": {"py_callstack": "x", "timestamp": "1", "time": "soon"}}}',
        '{"message": {"message": "E: x", "extraInfo": {"py_callstack": "x"',
        '{"message": {}}',
        "[" * 100_000,
        "null",
        "",
        "\x00\xff",
    ],
)
def test_odd_error_file_hides_no_failure(job: Job, content: str) -> None:
    (job.path / "content").write_text(content)
    script = job.script("os.system('cp content $TORCHELASTIC_ERROR_FILE')\nos._exit(4)")
    done = job.run("--nproc-per-node", "1", script)
    assert done.returncode == 4
    assert "exit    : exit code 4" in done.stderr


@pytest.mark.parametrize("make", ["os.mkfifo(path)", "os.symlink('/proc/self/fd/0', path)", "os.mkdir(path)"])
def test_error_file_that_is_no_file_is_not_waited_for(job: Job, make: str) -> None:
    script = job.script(f"path = os.environ['TORCHELASTIC_ERROR_FILE']; {make}; os._exit(3)")
    process = subprocess.Popen(
        [sys.executable, "-m", "elastic_launch", "--nproc-per-node", "1", "--log-dir", "logs", script],
        cwd=job.path,
        stdin=subprocess.PIPE,  # which stays open
        stderr=subprocess.DEVNULL,
    )
    assert process.wait(DEADLINE) == 3
    process.communicate()


def test_reader_that_has_stopped_does_not_hold_up_the_agent(job: Job) -> None:
    script = job.script(
        "signal.signal(15, lambda *_: (mark('saved'), os._exit(0)))\n"
        "os.set_blocking(2, False)\n"
        "try:\n    while True: os.write(2, b'x' * 4096)\n"
        "except BlockingIOError: os.set_blocking(2, True)\n"
        "mark('full'); wait()"
    )
    process = job.start("--nproc-per-node", "1", script)  # whose stderr is read at the end only
    job.wait_for("0.0 full")
    process.send_signal(SIGTERM)
    job.wait_for("0.0 saved")
    assert process.wait(DEADLINE) == 143


def test_terminal_that_is_not_read_does_not_hold_up_the_agent(job: Job) -> None:
    script = job.script("mark('up')\nwhile not os.path.exists('go'): time.sleep(0.01)\nraise ValueError('x' * 300)")
    command = [sys.executable, "-m", "elastic_launch", "--nproc-per-node", "1", "--max-restarts", "1", script]
    reader, terminal = pty.openpty()
    os.set_blocking(terminal, False)
    while select.select([], [terminal], [], 0)[1]:
        os.write(terminal, b"x" * 100)
    os.set_blocking(terminal, True)
    os.read(reader, 1000)  # some room, for less than what is to be said
    process = subprocess.Popen(command, cwd=job.path, stdin=subprocess.DEVNULL, stderr=terminal)
    try:
        job.wait_for("0.0 up")
        process.send_signal(SIGTERM)
        assert process.wait(DEADLINE) == 143
    finally:
        os.close(reader)
        os.close(terminal)


def test_lost_keeper_of_a_job_with_an_odd_name(job: Job) -> None:
    process = job.start(*TWO[1:], "--rdzv-id", "\udcff\udcfe", job.script(TREE + "wait()"))
    tree_is_up(job)
    family = below(process.pid)
    os.kill(psutil.Process(process.pid).children()[0].pid, SIGKILL)
    assert job.finish(process).returncode == 137
    assert not [pid for pid in family if is_alive(pid)]


def test_endless_error_is_dealt_with_at_once(job: Job) -> None:
    script = job.script("raise RuntimeError('NCCL info; ' * 20000)")
    done = job.run("--nproc-per-node", "1", script)
    assert done.returncode == 1
    assert "RuntimeError: NCCL info" in done.stderr


@pytest.mark.parametrize(("end", "status"), [("raise ValueError('boom')", 1), ("os._exit(0)", 0)])
def test_storm_of_signals_at_the_end_costs_neither_report_nor_status(job: Job, end: str, status: int) -> None:
    script = job.script(
        f"signal.signal(10, signal.SIG_IGN); mark('up')\nwhile not os.path.exists('go'): time.sleep(0.01)\n{end}"
    )
    process = job.start("--nproc-per-node", "1", script)
    job.wait_for("0.0 up")
    (job.path / "go").touch()
    while process.poll() is None:
        process.send_signal(SIGUSR1)
    done = job.finish(process)
    assert done.returncode == status
    assert ("train.py FAILED" in done.stderr) == (status != 0)


def test_arguments_and_environment_are_bytes(job: Job) -> None:
    env = {**os.environb, b"NAME": b"caf\xe9", b"LC_ALL": b"C", b"PYTHONCOERCECLOCALE": b"0", b"PYTHONUTF8": b"1"}
    command = [sys.executable, "-m", "elastic_launch", "--no-python", "sh", "-c", 'printf "$1 $NAME $LC_CTYPE"', "sh"]
    done = subprocess.run([*command, b"\xff\xe2\x82\xac"], env=env, capture_output=True, check=True)
    assert done.stdout == b"\xff\xe2\x82\xac caf\xe9 "


def test_deleted_working_directory(job: Job) -> None:
    script = job.script("mark()")
    (job.path / "gone").mkdir()
    command = f"rmdir ../gone; exec {sys.executable} -m elastic_launch --log-dir logs {script}"
    done = subprocess.run(["sh", "-c", command], cwd=job.path / "gone", capture_output=True, text=True)
    assert done.returncode == 69
    assert "--log-dir=logs: cannot create" in done.stderr
    assert done.stderr.count("\n") == 1


def test_two_jobs_at_once_do_not_meet(job: Job) -> None:
    script = job.script("mark(os.environ['MASTER_PORT']); wait()")
    first, second = job.start(*TWO, script), job.start(*TWO, script)
    wait_until(lambda: len(job.marks()) == 4)
    assert len({mark.split()[1] for mark in job.marks()}) == 2
    for process in (first, second):
        process.send_signal(SIGTERM)
        assert job.finish(process).returncode == 143


def test_idle_agent_sleeps(job: Job) -> None:
    process = job.start(*TWO, job.script("mark('up'); wait()"))
    job.wait_for("0.0 up", "1.0 up")
    [keeper] = psutil.Process(process.pid).children()

    def quiet_second() -> bool:
        before = [psutil.Process(pid).num_ctx_switches().voluntary for pid in (process.pid, keeper.pid)]
        select.select([], [], [], 1.0)  # the second that is looked at
        return before == [psutil.Process(pid).num_ctx_switches().voluntary for pid in (process.pid, keeper.pid)]

    wait_until(quiet_second, "a second in which neither the agent nor its keeper wakes")
    process.send_signal(SIGTERM)
    job.finish(process)
