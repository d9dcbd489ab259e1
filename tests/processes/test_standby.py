"""Standbys: processes that the warm keeper forks ahead of time, for the workers of the next round."""

from __future__ import annotations

import contextlib
import errno
import json
import marshal
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from elastic_launch.core.agent.restart_policy import has_restarts
from elastic_launch.job import Policy, RestartHistory
from elastic_launch.workers import orphans, standby
from elastic_launch.workers.standby import GO, HOLD, NEVER, Standby, StandbyPool, is_listening, store_port
from elastic_launch.workers.written_pages import PAGE, written_pages
from tests.support.jobs import Job
from tests.support.waiting import DEADLINE, SOON, is_alive, wait_until

WARM = ("--max-restarts", "3", "--preload", "json")
FAILS_ONCE = "mark(os.getpid())\nif restart == 0:\n    wait_for('go')\n    sys.exit(7)\n"
"""The first round runs until the test has written the mark ``go``, and fails."""


NOBODY = 1 << 22
"""The lowest pid that no process can have."""


def is_standby(process: psutil.Process) -> bool:
    """Whether a process is a standby. It may just have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "elastic-standby"
    return False


def standbys(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """Wait until a job has so many standbys, and return them."""
    found: list[psutil.Process] = []

    def are_there() -> bool:
        found[:] = filter(is_standby, psutil.Process(process.pid).children(recursive=True))
        return len(found) == count

    wait_until(are_there, f"{count} standbys")
    return found


def keeper(process: subprocess.Popen[str]) -> psutil.Process:
    (found,) = (it for it in psutil.Process(process.pid).children() if it.name() == "elastic-keeper")
    return found


def pids(job: Job, restart: int) -> set[int]:
    """The workers of a round."""
    return {int(mark.split()[1]) for mark in job.marks() if mark.split()[0].endswith(f".{restart}")}


def start(job: Job, *args: str, ranks: int = 2) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a job that fails once, when it is told to, and wait for its standbys."""
    process = job.start("--nproc-per-node", str(ranks), *WARM, *args, job.script(FAILS_ONCE))
    return process, standbys(process, ranks)


def test_restart_uses_them_and_the_next_ones_follow(job: Job) -> None:
    script = job.script("mark(os.getpid())\nwait_for(f'go{restart}')\nsys.exit(7 if restart < 2 else 0)")
    process = job.start("--nproc-per-node", "2", *WARM, script)
    first = {it.pid for it in standbys(process, 2)}
    job.mark("go0")
    wait_until(lambda: len(pids(job, 1)) == 2)
    assert pids(job, 1) == first
    second = {it.pid for it in standbys(process, 2)}
    job.mark("go1")
    wait_until(lambda: len(pids(job, 2)) == 2)
    assert pids(job, 2) == second
    third = standbys(process, 2)
    job.mark("go2")
    assert job.finish(process).returncode == 0
    assert not any(is_alive(it.pid) for it in third)


FACTS = """
import json, random, threading
wait_for('go') if restart == 0 else None
fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1]
def content(name): return open(f"/proc/self/{name}").read()
facts = {
    "argv": sys.argv, "path": sys.path, "orig_argv": sys.orig_argv, "cwd": os.getcwd(),
    "leader": os.getpid() == os.getpgid(0) == os.getsid(0),
    "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals()) if n != 63],
    "masks": [line for line in content("status").splitlines() if line[:4] in ("SigP", "ShdP", "SigB", "SigI", "SigC")],
    "environ": {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "OUT")},
    "fds": fds, "limits": content("limits"), "oom": content("oom_score_adj"), "comm": content("comm"),
    "affinity": sorted(os.sched_getaffinity(0)), "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "threads": threading.active_count(), "title": content("cmdline").strip(chr(0)),
}
if restart == 1: json.dump(facts, open(f"{os.environ['OUT']}.{rank}", "w"))
mark(f"{restart} {random.random()}")
sys.exit(7 if restart == 0 else 0)
"""


def test_worker_that_was_a_standby_is_like_any_other(job: Job) -> None:
    script = job.script(FACTS)
    found = {}
    for how in ("--standby", "--no-standby"):
        (job.path / "marks").unlink(missing_ok=True)
        args = ("--nproc-per-node", "2", "--rdzv-id", "j", "--log-dir", "logs", how, *WARM, script, "x")
        process = job.start(*args, OUT=str(job.path / how))
        if how == "--standby":
            for each in standbys(process, 2):
                each.send_signal(signal.SIGTERM)  # of which it would die, if it heard of it once it is a worker
                each.send_signal(signal.SIGUSR1)
        else:
            wait_until(lambda: (job.path / "marks").exists())
        job.mark("go")
        ended = job.finish(process)
        assert ended.returncode == 0, ended.stderr
        found[how] = [json.loads((job.path / f"{how}.{rank}").read_text()) for rank in range(2)]
        draws = [mark.split()[2] for mark in job.marks() if mark != "go"]
        assert len(set(draws)) == len(draws), "each worker has a random state of its own"
        assert len(draws) >= 3  # in the first round, one worker's failure may end the other one before its mark
    assert found["--standby"] == found["--no-standby"]


def test_they_have_copied_what_a_worker_writes_to(job: Job) -> None:
    def pages(pid: int) -> set[int]:
        ranges = written_pages(pid, keeper(process).pid)
        return {address for begin, size in ranges for address in range(begin, begin + size, PAGE)}

    for _ in range(3):  # on a busy machine a worker may not have written much before its standby is made
        (job.path / "marks").unlink(missing_ok=True)
        process, before = start(job, ranks=1)
        wait_until(lambda: pids(job, 0))
        (worker,) = pids(job, 0)
        written = pages(worker)
        missing = written - pages(before[0].pid)
        job.mark("go")
        assert job.finish(process).returncode == 0
        if len(missing) < 0.2 * len(written):
            return
    raise AssertionError(f"{len(missing)} of {len(written)}")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_is_killed_or_stopped_is_replaced_in_silence(job: Job, signum: int) -> None:
    process, (first, second) = start(job)
    first.send_signal(signum)

    def is_out() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return first.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
        return True

    wait_until(is_out)
    job.mark("go")
    ended = job.finish(process)
    assert (ended.returncode, "standby" in ended.stderr) == (0, False), ended.stderr
    assert (first.pid in pids(job, 1), second.pid in pids(job, 1), len(pids(job, 1))) == (False, True, 2)
    assert not is_alive(first.pid)


SPY = """
import os, sys, warnings
def see(event, args):
    if event == "compile" and str(args[1]).endswith("/train.py"):
        with open(f"{os.path.dirname(__file__)}/compilers", "a") as file: file.write(f"{os.getpid()}\\n")
sys.addaudithook(see)
"""


def test_the_keeper_compiles_the_program_for_all_and_an_edited_one_is_compiled_again(job: Job) -> None:
    (job.path / "spy.py").write_text(SPY)
    script = job.script("mark(os.getpid())\nwait_for(f'go{restart}')\nsys.exit(7 if restart < 3 else 0)")
    process = job.start("--max-restarts", "3", "--crash-loop", "0", "--preload", "spy", script)
    for restart in range(3):
        wait_until(lambda: pids(job, restart))  # noqa: B023 - called at once
        standbys(process, 1)
        if restart == 1:
            with Path(script).open("a") as file:
                file.write("\n1 is 1")  # of which Python warns
        job.mark(f"go{restart}")
    job.mark("go3")
    ended = job.finish(process)
    assert ended.returncode == 0, ended.stderr
    compilers = {*map(int, (job.path / "compilers").read_text().split())}
    workers = [pids(job, restart).pop() for restart in range(4)]
    assert [worker in compilers for worker in workers] == [False, False, True, True]
    assert len(compilers) == 3, "and the keeper"
    assert ended.stderr.count("SyntaxWarning") == 2


def test_they_are_replaced_when_what_they_were_made_from_has_changed(job: Job) -> None:
    """A fork inherits the keeper's limits as they are now."""
    process, before = start(job)
    limits = resource.prlimit(keeper(process).pid, resource.RLIMIT_CORE)
    resource.prlimit(keeper(process).pid, resource.RLIMIT_CORE, (0 if limits[0] else min(4096, limits[1]), limits[1]))
    job.mark("go")
    assert job.finish(process).returncode == 0
    assert not pids(job, 1) & {it.pid for it in before}


def test_next_round_with_a_failure_while_they_are_made(job: Job) -> None:
    process = job.start("--nproc-per-node", "6", *WARM, job.script(FAILS_ONCE))
    made: list[int] = []

    def has_begun() -> bool:
        below = psutil.Process(process.pid).children(recursive=True)
        made[:] = [it.pid for it in filter(is_standby, below)]
        return bool(made)

    wait_until(has_begun)
    job.mark("go")
    ended = job.finish(process)
    assert ended.returncode == 0, ended.stderr
    assert len(pids(job, 1)) == 6
    assert pids(job, 1) >= set(made)


def test_keeper_killed_takes_them_along(job: Job) -> None:
    process, before = start(job)
    keeper(process).kill()
    wait_until(lambda: not any(is_alive(it.pid) for it in before))
    wait_until(lambda: len(pids(job, 1)) == 2)
    assert job.finish(process).returncode == 0


def test_agent_killed_leaves_none(job: Job) -> None:
    process, _ = start(job)
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(SOON)
    wait_until(lambda: not any(is_alive(it.pid) for it in below))


def test_a_program_with_children_of_its_own_keeps_them_and_no_standbys_of_a_lost_keeper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orphans, "KILL_PATIENCE", DEADLINE)
    program = "import sys; open('/proc/self/comm', 'w').write(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with contextlib.ExitStack() as stack:
        processes = []
        for name in ("elastic-standby", "mine"):
            command = [sys.executable, "-I", "-S", "-c", program, name]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout
            process.stdout.readline()
            processes.append(process)
        orphans.kill_orphans(is_alone=False, workers=(), run_id="job")
        assert [is_alive(process.pid) for process in processes] == [False, True]
        assert not psutil.pid_exists(processes[0].pid), "it has been reaped"


def test_what_a_round_leaves_is_killed_and_they_are_spared(job: Job) -> None:
    script = job.script(
        "mark(os.getpid())\n"
        "if restart == 0:\n"
        "    child = subprocess.Popen(['sh', '-c', 'trap \"\" TERM; echo ready; while :; do sleep 1; done'],\n"
        "                             stdout=subprocess.PIPE, start_new_session=True)\n"
        "    child.stdout.readline()\n    wait_for('go')\n    sys.exit(7)\n"
    )
    process = job.start("--nproc-per-node", "1", "--shutdown-timeout", "1", *WARM, script)
    (before,) = standbys(process, 1)
    job.mark("go")
    ended = job.finish(process)
    assert (ended.returncode, pids(job, 1)) == (0, {before.pid}), ended.stderr
    assert "sh (pid" in ended.stderr
    assert "elastic-standby" not in ended.stderr


def test_none_are_made_for_a_job_that_cannot_restart() -> None:
    once = Policy(max_restarts=1)
    assert not has_restarts(Policy(), RestartHistory())
    assert has_restarts(once, RestartHistory())
    assert not has_restarts(once, RestartHistory(used=1))
    assert has_restarts(once._replace(window=60.0), RestartHistory(used=1)), "that failure may be forgotten"


def test_without_memory_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", fork)
    pool = StandbyPool({})
    pool.want(2, is_busy=False)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Cannot allocate memory"):
        pool.add()
    assert (pool.standbys, pool.due, os.listdir("/proc/self/fd")) == ({}, NEVER, descriptors)


def test_worker_that_is_stopped_before_it_answers_does_not_hold_up_the_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import marshal, os, signal, socket\nkeeper = socket.socket(fileno=0)\nkeeper.recv(1)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\nkeeper.send(marshal.dumps(None))\n"
    )
    ours, theirs = socket.socketpair()
    pool = StandbyPool({})
    with theirs, subprocess.Popen([sys.executable, "-I", "-S", "-c", program], stdin=theirs.fileno()) as process:
        monkeypatch.setattr(pool, "fork", lambda is_ahead: Standby(process.pid, ours, is_ahead))
        started: list[object] = []
        thread = threading.Thread(target=lambda: started.append(pool.start([order(3)], [])), daemon=True)
        thread.start()
        thread.join(DEADLINE)
        process.kill()
    assert started == [({3: process.pid}, {})]


def test_worker_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "LIMIT", 0.0)
    ours, theirs = socket.socketpair()
    pool = StandbyPool({})
    with theirs, subprocess.Popen(["sleep", "1000"]) as process:
        monkeypatch.setattr(pool, "fork", lambda is_ahead: Standby(process.pid, ours, is_ahead))
        assert pool.start([order(3)], []) == (
            {},
            {3: (errno.ETIMEDOUT, "its process has not answered, and was killed")},
        )
        assert process.wait(SOON) == -signal.SIGKILL
    assert pool.pending == {}


def order(rank: int = 0, **variables: str) -> tuple[int, list[bytes], dict[bytes, bytes], list[int], list[int]]:
    changes = {"RANK": str(rank), **variables}
    return rank, [], {name.encode(): value.encode() for name, value in changes.items()}, [], []


def test_which_rank_serves_the_store_of_torch_and_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)  # another test may have imported it
    assert store_port(order(0, MASTER_PORT="1234")) == 0, "without torch nobody serves one"
    monkeypatch.setitem(sys.modules, "torch.distributed", sys)
    assert store_port(order(0, MASTER_PORT="1234")) == 1234
    assert store_port(order(1, MASTER_PORT="1234")) == 0
    assert store_port(order(0, MASTER_PORT="1234", TORCHELASTIC_USE_AGENT_STORE="True")) == 0
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")):
        with socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            server.bind((address, 0))
            assert not is_listening(server.getsockname()[1])
            server.listen()
            assert is_listening(server.getsockname()[1])


@pytest.mark.parametrize("head_start", [SOON, 0.0])
def test_other_ranks_are_held_until_rank_0_serves_the_store(monkeypatch: pytest.MonkeyPatch, head_start: float) -> None:
    monkeypatch.setattr(standby, "HEAD_START", head_start)
    monkeypatch.setitem(sys.modules, "torch.distributed", sys)
    started: list[tuple[dict[int, int], dict[int, tuple[int, str]]]] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", 0))
        pool = StandbyPool({})
        pairs = [socket.socketpair() for _ in range(2)]
        workers = [stack.enter_context(theirs) for _, theirs in pairs]
        forks = [Standby(NOBODY + rank, ours, is_ahead=False) for rank, (ours, _) in enumerate(pairs)]
        monkeypatch.setattr(pool, "fork", lambda is_ahead: forks.pop(0))
        orders = [order(rank, MASTER_PORT=str(server.getsockname()[1])) for rank in range(2)]
        thread = threading.Thread(target=lambda: started.append(pool.start(orders, [])), daemon=True)
        thread.start()
        for worker, when in zip(workers, (GO, HOLD if head_start else GO), strict=True):
            worker.settimeout(SOON)
            assert worker.recv(1) == when
        workers[1].send(marshal.dumps(None))
        if head_start:
            workers[1].setblocking(False)
            with pytest.raises(BlockingIOError):
                workers[1].recv(1)
            workers[1].settimeout(SOON)
            server.listen()
        assert workers[1].recv(1) == b"", "it may run its program"
        workers[0].send(marshal.dumps(None))
        thread.join(SOON)
    assert (started, pool.pending) == ([({0: NOBODY, 1: NOBODY + 1}, {})], {})
    assert [*started[0][0]] == [0, 1], "in the order of ranks, not of answers"


def test_many_restarts_in_a_row_leave_nothing(job: Job) -> None:
    """Descriptors and processes stay as many as they are, with standbys or without, complete or not."""
    script = job.script("mark(os.getpid())\nwait()")
    args = ("--nproc-per-node", "2", "--max-restarts", "1000", "--crash-loop", "0", "--preload", "json", script)
    process = job.start(*args)
    agent = psutil.Process(process.pid)

    counts: list[tuple[int, int, int]] = []

    def are_no_more() -> bool:
        counts.append((agent.num_fds(), keeper(process).num_fds(), len(agent.children(recursive=True))))
        return all(now <= before for now, before in zip(counts[-1], counts[0], strict=True))

    for restart in range(20):
        wait_until(lambda: len(pids(job, restart)) == 2)  # noqa: B023 - called at once
        if restart % 5 == 0:
            standbys(process, 2)
            wait_until(are_no_more, "no more than at first")  # what is about to be closed still counts
        os.kill(min(pids(job, restart)), signal.SIGKILL)
    wait_until(lambda: len(pids(job, 20)) == 2)
    process.terminate()
    assert job.finish(process).returncode == 143
