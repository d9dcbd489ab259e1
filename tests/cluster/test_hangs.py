"""Jobs that hang, with real gloo: it is noticed, the right rank is named, and the job is restarted if asked."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from elastic_launch.core.progress.stall import SAMPLE_GAP
from elastic_launch.errors import ExitCode
from tests.support.jobs import TWO, Job, report_of
from tests.support.nodes import Nodes, c10d
from tests.support.servers import shared_etcd
from tests.support.waiting import DEADLINE, wait_until

pytestmark = pytest.mark.torch

LIMIT = 5.0
"""Seconds without a step after which these jobs count as hung: more than a busy machine takes for one."""
TRAINING = """
import threading, torch, torch.distributed as dist

def average(model):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)

def skips(model):
    while True:
        time.sleep(0.2)  # skipped the all_reduce

def loops(model):
    while True: sum(range(100))  # loops forever

def locks(model):
    lock = threading.Lock()
    with lock:
        lock.acquire()  # waits for itself

class Slow(torch.utils.data.Dataset):
    def __len__(self): return 1
    def __getitem__(self, index):
        time.sleep(600)  # slow data

def loads(model):
    for _ in torch.utils.data.DataLoader(Slow(), num_workers=1):
        pass  # waits for data

def stops(model):
    os.kill(os.getpid(), signal.SIGSTOP)
    average(model)

def debugs(model):
    breakpoint()

def train(trouble="", steps=30):
    restart, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        if step == 10 and restart == 0 and rank == 1 and trouble:
            mark(f"hangs {stepped_at}")
            globals()[trouble](model)
        average(model)
        stepped_at = time.monotonic()
        optimizer.step()
    dist.barrier()
    dist.destroy_process_group()
    mark("done")
    os._exit(0)
"""
PLACES = {
    "skips": "# skipped the all_reduce",
    "loops": "# loops forever",
    "locks": "# waits for itself",
    "loads": "# slow data",
    "stops": "",
}
"""What stands in the line where rank 1 is, by the kind of its trouble."""
WARM = ("--preload", "torch,torch._dynamo")
"""Torch, with what an optimizer imports, is imported once on each node, not by each worker of each round."""


def line_of(job: Job, text: str) -> int:
    lines = (job.path / "train.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def check(job: Job, trouble: str, stderr: str) -> None:
    """The report names rank 1 first, and the place where it stands."""
    told = re.search(r"^.*makes no progress.*(?:\n.*){0,6}", stderr, re.MULTILINE)
    assert told, stderr
    head = told[0]
    assert "rank 1" in head
    if text := PLACES[trouble]:
        assert f"train.py:{line_of(job, text)}" in head, head


def hung_at(job: Job) -> float:
    (at,) = [float(mark.split()[2]) for mark in job.marks() if " hangs " in mark]
    return at


@pytest.mark.parametrize("trouble", ["loops", "locks", "stops"])  # the others are those of three nodes, below
def test_a_job_on_one_node_that_hangs_is_explained_and_restarted(trouble: str, job: Job) -> None:
    script = job.script(f"{TRAINING}\ntrain({trouble!r})")
    options = ["--hang-timeout", f"{LIMIT:g}", "--hang-action", "restart", "--max-restarts", "1"]
    done = job.run(*TWO, *options, *WARM, "--shutdown-timeout", "2", script)
    print(done.stderr)
    assert done.returncode == 0
    check(job, trouble, done.stderr)
    assert {"0.1 done", "1.1 done"} <= set(job.marks())
    assert "rank 1 failed (hang, " in done.stderr


def test_a_hang_of_cold_workers_is_noticed_soon_after_the_limit(job: Job) -> None:
    script = job.script(f"{TRAINING}\ntrain('skips')")
    process = job.start(*TWO, "--hang-timeout", f"{LIMIT:g}", script)
    assert process.stderr
    for line in process.stderr:
        if "makes no progress" in line:
            break
    assert time.monotonic() - hung_at(job) >= LIMIT - SAMPLE_GAP
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    job.finish(process)


def test_a_report_stops_nobody_and_is_given_once(job: Job) -> None:
    loop = "while True:\n        time.sleep(0.2)  # skipped"
    assert loop in TRAINING
    script = job.script(TRAINING.replace(loop, loop.replace("True", "not os.path.exists('go')")) + "\ntrain('skips')")
    process = job.start(*TWO, *WARM, "--hang-timeout", f"{LIMIT:g}", script)
    told = []
    assert process.stderr
    for line in process.stderr:
        print(line, end="")
        told.append(line)
        if "makes no progress" in line:
            (job.path / "go").touch()
    assert process.wait(DEADLINE) == 0
    assert len([line for line in told if "makes no progress" in line]) == 1
    assert any("the job makes progress again" in line for line in told)
    assert {"0.0 done", "1.0 done"} <= set(job.marks())


def test_a_hang_can_end_the_job_with_a_status_of_its_own(job: Job) -> None:
    script = job.script(f"{TRAINING}\ntrain('locks')")
    options = [
        "--hang-timeout",
        f"{LIMIT:g}",
        "--hang-action",
        "stop",
        "--max-restarts",
        "3",
        "--shutdown-timeout",
        "1",
        *WARM,
    ]
    done = job.run(*TWO, *options, script)
    print(done.stderr)
    assert done.returncode == ExitCode.HANG
    report = report_of(done.stderr)
    assert "exit    : hang" in report
    assert "restarts  : 0 of 3 used; a hang ends the job (--hang-action=stop)" in report
    assert f"train.py:{line_of(job, PLACES['locks'])}" in report


def test_a_debugger_is_no_hang(job: Job) -> None:
    script = job.script(f"{TRAINING}\ntrain('debugs')")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "elastic_launch", *TWO, *WARM),
            *("--hang-timeout", f"{LIMIT:g}", "--hang-action", "restart", script),
        ],
        cwd=job.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    job.processes.append(process)
    wait_until(lambda: any(" hangs " in mark for mark in job.marks()))
    began = hung_at(job)
    wait_until(lambda: time.monotonic() > began + 2 * LIMIT + 1, "the limit is over, twice")
    assert process.poll() is None
    assert process.stdin
    process.stdin.write("c\n")
    err = process.communicate(timeout=DEADLINE)[1]
    print(err)
    assert process.returncode == 0
    assert "makes no progress" not in err


@pytest.mark.parametrize(("backend", "trouble"), [("c10d", "skips"), ("etcd", "loads")])
def test_three_nodes_that_hang_are_explained_once_and_restarted(backend: str, trouble: str, job: Job) -> None:
    script = job.script(f"{TRAINING}\ntrain({trouble!r})")
    nodes = c10d(job, "3", hosted=True) if backend == "c10d" else Nodes(job, "etcd", shared_etcd(), "3")
    options = ["--hang-timeout", f"{LIMIT:g}", "--hang-action", "restart", "--max-restarts", "1"]
    options += ["--shutdown-timeout", "2", *WARM]
    first = nodes(0, *options, script=script)
    if backend == "c10d":
        nodes.wait_for_first()
    processes = [first, *(nodes(number, *options, script=script) for number in (1, 2))]
    results = [job.finish(process) for process in processes]
    for done in results:
        print(done.stderr)
    assert [done.returncode for done in results] == [0, 0, 0]
    told = [done.stderr for done in results if "makes no progress" in done.stderr]
    assert len(told) == 1, "one node tells it for all"
    check(job, trouble, told[0])
    assert {f"{rank}.1 done" for rank in range(3)} <= set(job.marks())


def test_native_frames_are_shown_if_they_are_asked_for(job: Job) -> None:
    script = job.script(
        "import ctypes\nfrom elastic_launch import worker\n"
        "for step in range(6): worker.progress(step)\n"
        "ctypes.CDLL(None).usleep(2**31)  # in C\n"
    )
    options = ["--hang-timeout", f"{LIMIT:g}", "--hang-action", "stop", "--hang-native", "--shutdown-timeout", "1"]
    done = job.run(*options, script)
    print(done.stderr)
    assert done.returncode == ExitCode.HANG
    assert f"train.py:{line_of(job, '# in C')}" in done.stderr
    assert "usleep" in done.stderr


def test_the_stacks_of_a_job_that_is_well_can_be_asked_for(job: Job) -> None:
    script = job.script(
        "from elastic_launch import worker\n"
        "def waits():\n    while True: time.sleep(0.01); worker.progress()\n"
        "def is_elsewhere():\n    while True: time.sleep(0.01); worker.progress()\n"
        "mark('up')\n"
        "is_elsewhere() if rank == 1 else waits()\n"
    )
    nodes = c10d(job, "3", "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=20")
    processes = [nodes(number, script=script) for number in range(3)]
    job.wait_for("0.0 up", "1.0 up", "2.0 up")

    def stacks() -> str:
        asked = subprocess.run(
            [sys.executable, "-m", "elastic_launch.operate", "stacks", nodes.run_id],
            capture_output=True,
            text=True,
            check=False,
        )
        print(asked.stdout, asked.stderr)
        assert asked.returncode == 0
        return asked.stdout

    # A rank that stands still for a moment, or is just counting, is in a group of its own.
    wait_until(lambda: re.search(r"in is_elsewhere[\s\S]*2 ranks \(0,2\): ", stacks()))
    stopped = subprocess.run(
        [sys.executable, "-m", "elastic_launch.operate", "stop", nodes.run_id],
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 0, stopped.stderr
    for process in processes:
        assert job.finish(process).returncode == 128 + signal.SIGTERM
