"""When a job restarts and when it ends, as its user sees it: real agents, on one node and on several."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_launch import ChildFailedError, LaunchConfig, UsageError, elastic_launch
from tests.support.jobs import Job
from tests.support.nodes import LOST_AFTER, QUICK, STEADY, Nodes, c10d
from tests.support.waiting import SOON, is_alive, wait_until

NOTE_TIME = "mark(f'begins {time.monotonic()}')\n"


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines that the launcher itself printed, without its name and without the report."""
    lines = done.stderr.partition("=" * 80)[0].splitlines()
    return [line.removeprefix("elastic-run: ") for line in lines if line.startswith("elastic-run: ")]


def report(done: subprocess.CompletedProcess[str]) -> str:
    """Return the report at the end, and check that nothing follows it."""
    assert done.stderr.count("=" * 80) == 2, done.stderr
    before, _, text = done.stderr.partition("=" * 80)
    text, _, after = text.rpartition("=" * 80)
    assert before == "" or before.endswith("\n")
    assert after == "\n"
    return text


def restarts(job: Job) -> list[int]:
    """Return the numbers of the rounds in which rank 0 began."""
    return [int(mark.split()[0].split(".")[1]) for mark in job.marks() if mark.startswith("0.")]


def times(job: Job, word: str) -> dict[str, float]:
    """Return the times that workers have noted with a word, on ``time.monotonic``, by RANK.RESTART."""
    marks = [mark.split() for mark in job.marks()]
    return {mark[0]: float(mark[2]) for mark in marks if mark[1] == word}


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    """Read a launcher's stderr until a line contains a text."""
    stream = process.stderr
    assert stream
    wait_until(lambda: text in stream.readline(), text)


# ---- One node


@pytest.mark.parametrize(
    ("end", "status", "is_fatal"),
    [
        ("sys.exit(2)", 2, True),
        ("sys.exit(64)", 64, True),
        ("sys.exit(78)", 78, True),
        ("sys.exit(79)", 79, False),
        ("raise ValueError('no')", 1, False),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, True),
    ],
)
def test_some_statuses_are_fatal(end: str, status: int, is_fatal: bool, job: Job) -> None:
    script = job.script(f"mark()\n{end}\n")
    done = job.run("--max-restarts", "1", "--fatal-exit-codes", "2,64-78,137", script)
    print(done.stderr)
    assert done.returncode == status
    if is_fatal:
        assert restarts(job) == [0]
        assert f"restarts  : 0 of 1 used; exit status {status} is fatal (--fatal-exit-codes)\n" in report(done)
    else:
        assert restarts(job) == [0, 1]
        assert "restarts  : 1 of 1 used\n" in report(done)


def test_failures_older_than_the_window_do_not_count(job: Job) -> None:
    script = job.script("mark()\nif restart == 4: sys.exit()\ntime.sleep(0.4)\nsys.exit(10 + restart)\n")
    done = job.run("--max-restarts", "1", "--restart-window", "0.3", script)
    print(done.stderr)
    assert done.returncode == 0
    assert restarts(job) == [0, 1, 2, 3, 4]
    assert len([line for line in said(done) if line.endswith(": restart 1 of 1")]) == 4


def test_failures_within_the_window_use_up_the_restarts(job: Job) -> None:
    script = job.script("mark()\nsys.exit(10 + restart)\n")
    done = job.run("--max-restarts", "2", "--restart-window", "60", script)
    print(done.stderr)
    assert done.returncode == 12
    assert restarts(job) == [0, 1, 2]
    assert "restarts  : 2 of 2 used\n" in report(done)


def test_the_pause_before_a_restart_doubles_each_time(job: Job) -> None:
    script = job.script(f"{NOTE_TIME}if restart == 3: sys.exit()\nsys.exit(10 + restart)\n")
    done = job.run("--max-restarts", "3", "--restart-backoff", "0.3:0.6", script)
    print(done.stderr)
    assert done.returncode == 0
    lines = [line for line in said(done) if "restart " in line]
    assert [line.partition(": restart ")[2] for line in lines] == [
        "1 of 3 in 0.3 s",
        "2 of 3 in 0.6 s",
        "3 of 3 in 0.6 s",
    ]
    began = list(times(job, "begins").values())
    pauses = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert all(at_least <= pause for at_least, pause in zip((0.3, 0.6, 0.6), pauses, strict=True)), pauses


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_pause_and_the_job(signum: signal.Signals, job: Job) -> None:
    process = job.start("--max-restarts", "3", "--restart-backoff", "600:600", job.script("mark()\nsys.exit(3)\n"))
    wait_for_line(process, "restart 1 of 3 in 600 s")
    start = time.monotonic()
    process.send_signal(signum)
    done = job.finish(process)
    print(done.stderr)
    assert time.monotonic() - start < SOON
    assert done.returncode == 128 + signum
    assert restarts(job) == [0]


def test_a_crash_loop_ends_the_job(job: Job) -> None:
    script = job.script("mark()\nif rank == 1: wait_for(f'0.{restart}'); raise KeyError('lr')\nwait()\n")
    done = job.run("--nproc-per-node", "2", "--max-restarts", "100", script)
    print(done.stderr)
    assert done.returncode == 1
    assert restarts(job) == [0, 1, 2]
    why = "crash loop: rank 1 failed 3 times in a row in the same way within 10 s of each other"
    assert f"restarts  : 2 of 100 used; {why} (--crash-loop=3; 0 turns this off)\n" in report(done)
    assert "KeyError: 'lr'" in report(done)


@pytest.mark.parametrize(("limit", "rounds"), [("2", 2), ("0", 5)])
def test_the_user_decides_what_a_crash_loop_is(limit: str, rounds: int, job: Job) -> None:
    done = job.run("--max-restarts", "4", "--crash-loop", limit, job.script("mark()\nraise KeyError('lr')\n"))
    assert done.returncode == 1, done.stderr
    assert restarts(job) == list(range(rounds))
    assert ("(--crash-loop=2; 0 turns this off)" in report(done)) is (limit == "2")


def test_a_worker_killed_from_outside_is_no_crash_loop(job: Job) -> None:
    script = job.script("mark()\nif restart < 4: os.kill(os.getpid(), signal.SIGKILL)\n")
    done = job.run("--max-restarts", "6", script)
    assert done.returncode == 0, done.stderr
    assert restarts(job) == [0, 1, 2, 3, 4]


def test_different_failures_are_no_crash_loop(job: Job) -> None:
    script = job.script("mark()\nif restart == 3: sys.exit()\nraise ValueError('abc'[restart])\n")
    done = job.run("--max-restarts", "3", script)
    assert done.returncode == 0, done.stderr


OPTIONS = {
    "--restart-window": "60",
    "--restart-backoff": "0.1:0.2",
    "--fatal-exit-codes": "7",
    "--node-failure-limit": "1",
    "--max-restarts": "5",
}


@pytest.mark.parametrize("how", ["options", "variables"])
def test_options_are_variables_too(how: str, job: Job) -> None:
    script = job.script("mark()\nsys.exit(7 if restart == 2 else 10 + restart)\n")
    if how == "options":
        done = job.run(*itertools.chain(*OPTIONS.items()), script)
    else:
        done = job.run(script, **{f"PET_{name[2:].replace('-', '_').upper()}": v for name, v in OPTIONS.items()})
    print(done.stderr)
    assert done.returncode == 7
    assert restarts(job) == [0, 1, 2]
    assert [line.partition(": restart ")[2] for line in said(done) if ": restart " in line] == [
        "1 of 5 in 0.1 s",
        "2 of 5 in 0.2 s",
    ]
    assert "; exit status 7 is fatal" in report(done)


WRONG = [
    ("--restart-window", "-1"),
    ("--restart-window", "nan"),
    ("--restart-window", "1h"),
    ("--restart-backoff", "5:1"),
    ("--restart-backoff", "1:"),
    ("--restart-backoff", "inf"),
    ("--restart-backoff", "nan"),
    ("--restart-backoff", "1:2:3"),
    ("--fatal-exit-codes", "0"),
    ("--fatal-exit-codes", "256"),
    ("--fatal-exit-codes", "78-64"),
    ("--fatal-exit-codes", "2;3"),
    ("--fatal-exit-codes", "-9"),
    ("--node-failure-limit", "-1"),
    ("--node-failure-limit", "few"),
    ("--crash-loop", "1"),
    ("--crash-loop", "-1"),
]


@pytest.mark.parametrize("how", ["option", "variable"])
def test_wrong_values_are_reported_in_one_line(how: str, job: Job) -> None:
    script = job.script("mark()")
    for name, value in WRONG if how == "option" else WRONG[::5]:
        variable = f"PET_{name[2:].replace('-', '_').upper()}"
        done = job.run(f"{name}={value}", script) if how == "option" else job.run(script, **{variable: value})
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        print(line)
        assert line.startswith(f"elastic-run: {name if how == 'option' else variable}=")
        assert "must be" in line
    assert job.marks() == []


@pytest.mark.parametrize(
    "settings",
    [
        {"restart_window": -1},
        {"restart_window": float("nan")},
        {"restart_backoff": "5:1"},
        {"restart_backoff": ""},
        {"fatal_exit_codes": "0"},
        {"fatal_exit_codes": "2,,x"},
        {"node_failure_limit": -1},
        {"crash_loop": 1},
        {"crash_loop": -1},
    ],
)
def test_wrong_settings_from_python(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        LaunchConfig(1, 1, 1, **settings)  # type: ignore[arg-type]


def fail_with(path: Path, statuses: list[int]) -> None:
    with path.open("a") as file:
        file.write("began\n")
    sys.exit(statuses[int(os.environ["TORCHELASTIC_RESTART_COUNT"])])


def test_the_same_settings_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        1, 1, 1, max_restarts=5, restart_backoff="0.1", restart_window=60, fatal_exit_codes="7-9", verbosity=2
    )
    with pytest.raises(ChildFailedError) as caught:
        elastic_launch(config, fail_with)(tmp_path / "began", [4, 5, 8, 0])
    assert (caught.value.exit_code, (tmp_path / "began").read_text()) == (8, "began\n" * 3)
    assert "restarts  : 2 of 5 used; exit status 8 is fatal" in str(caught.value)
    assert "restart 2 of 5 in 0.2 s" in capfd.readouterr().err


def test_quiet_normal_and_verbose(job: Job) -> None:
    script = job.script("print('mine')\nif restart == 0: sys.exit(3)\n")
    told = {}
    for flag in ("-q", "", "-v"):
        done = job.run("--max-restarts", "1", *filter(None, [flag]), script)
        print(done.stderr, "----")
        assert (done.returncode, done.stdout) == (0, "mine\nmine\n")
        assert [f"elastic-run: {line}" for line in said(done)] == done.stderr.splitlines()
        told[flag] = [re.sub(r"on \S+ \(pid \d+\)|rank 0 \S* ?\(pid \d+\)", "", line) for line in said(done)]
    [only] = told["-q"]
    assert only.endswith(": restart 1 of 1")
    assert told[""][0] == "formed: 1 node, 1 worker"
    assert told[""][-1] == "done: 1 worker succeeded"
    assert [line for line in told["-v"] if line in told[""]] == told[""]
    begun = re.findall(
        r"^elastic-run: started: rank 0 \(pid \d+\); files: /\S+/elastic_launch_\w+/\w+$", done.stderr, re.MULTILINE
    )
    assert len(begun) == 2, done.stderr


# ---- Several nodes


def start(
    job: Job, script: str, nnodes: str, *args: str, count: int = 0, conf: str = STEADY, hosted: bool = False
) -> list[subprocess.Popen[str]]:
    """Start as many nodes as the job needs. Node n asks for rank n. The store is as for ``c10d``."""
    return start_on(c10d(job, nnodes, conf, hosted=hosted), script, *args, count=count)


def start_on(nodes: Nodes, script: str, *args: str, count: int = 0) -> list[subprocess.Popen[str]]:
    first = nodes(0, "--node-rank", "0", *args, script=script)
    nodes.wait_for_first()
    count = count or int(nodes.nnodes.rpartition(":")[2])
    return [first, *(nodes(n, "--node-rank", str(n), *args, script=script) for n in range(1, count))]


def finish(job: Job, *processes: subprocess.Popen[str]) -> list[subprocess.CompletedProcess[str]]:
    """Wait for nodes to end. Return the results; pytest shows the output if the test fails."""
    results = [job.finish(process) for process in processes]
    for number, result in enumerate(results):
        print(f"--- node {number}: {result.returncode}\n{result.stderr}")
    return results


def one_report(results: list[subprocess.CompletedProcess[str]]) -> str:
    """Return the report, after checking that all nodes print the same, except for the directories of their files."""
    [text] = {re.sub(r"logs      : .*\n", "", report(result)) for result in results}
    return text


def one_status(results: list[subprocess.CompletedProcess[str]]) -> int:
    [status] = {result.returncode for result in results}
    return status


def lines_with(results: list[subprocess.CompletedProcess[str]], text: str) -> list[str]:
    """Return the lines of all nodes that contain a text."""
    return [line for result in results for line in said(result) if text in line]


FAILURES = {
    "an exception": ("if rank == 1: raise ValueError('boom')\nwait()\n", 1, "ValueError: boom"),
    "a kill": ("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nwait()\n", 137, "killed by SIGKILL"),
    "a consequence": (  # which is noticed before its cause
        "if rank == 1: signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL)); mark('ready')\n"
        "if rank == 0:\n"
        "    wait_for('1.0 ready')\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    if os.fork() == 0: wait_for('go'); os._exit(0)\n"  # until then its node does not decide
        "    raise ConnectionResetError('Connection reset by peer')\n"
        "wait()\n",
        137,
        "killed by SIGKILL",
    ),
    "a fatal status": (
        "if rank == 1: sys.exit(64)\nwait()\n",
        64,
        "1 used; exit status 64 is fatal (--fatal-exit-codes)",
    ),
    "a crash loop": (
        "if rank == 1: raise KeyError('lr')\nwait()\n",
        1,
        "2 of 9 used; crash loop: rank 1 failed 3 times",
    ),
}
OPTIONS_FOR = {
    "a fatal status": ["--fatal-exit-codes", "64", "--max-restarts", "1"],
    "a crash loop": ["--max-restarts", "9"],
}


@pytest.mark.parametrize("kind", FAILURES)
def test_all_nodes_print_the_same_report(kind: str, job: Job) -> None:
    text, status, words = FAILURES[kind]
    count = 3 if kind == "a consequence" else 2
    nodes = c10d(job, str(count))
    script = job.script(f"mark()\nwait_for(*(f'{{r}}.{{restart}}' for r in range({count})))\n{text}")
    processes = start_on(nodes, script, *OPTIONS_FOR.get(kind, []))
    if kind == "a consequence":
        nodes.wait_for_key("0/consequences")
        job.mark("go")
    results = finish(job, *processes)
    assert one_status(results) == status
    told = one_report(results)
    cause, _, consequences = told.partition("\nThen\n")
    assert words in told
    assert "rank    : 1 (local rank 0" in cause
    assert ("rank 0 on" in consequences and "ConnectionResetError" in consequences) == (kind == "a consequence")


def test_a_spare_prints_the_same_report(job: Job) -> None:
    script = job.script("mark()\nif rank == 1: wait_for('go'); sys.exit(10 + restart)\nwait()\n")
    nodes = c10d(job, "2")
    first = nodes(0, "--max-restarts", "1", script=script)
    nodes.wait_for_first()
    second = nodes(1, "--max-restarts", "1", script=script)
    wait_until(lambda: len(job.marks()) == 2)
    spare = nodes(2, "--max-restarts", "1", script=script)
    wait_for_line(spare, "waiting as a spare")
    job.mark("go")
    results = finish(job, first, second, spare)
    assert one_status(results) == 11
    assert "restarts  : 1 of 1 used" in one_report(results)


def test_a_spare_replaces_a_node_that_keeps_failing(job: Job) -> None:
    script = job.script(
        "node = os.environ['NODE']\nmark(node)\n"
        "if node == 'bad': wait_for('go', f'{1 - rank}.{restart} good'); sys.exit(3 + restart)\n"
        "if restart < 2: wait()\n"
    )
    nodes = c10d(job, "2")
    options = ("--max-restarts", "9", "--node-failure-limit", "2")
    good = nodes(0, *options, script=script, NODE="good")
    nodes.wait_for_first()
    bad = nodes(1, *options, script=script, NODE="bad")
    wait_until(lambda: len(job.marks()) == 2)
    spare = nodes(2, *options, script=script, NODE="spare")
    wait_for_line(spare, "the job already runs on 2 nodes; waiting as a spare")
    job.mark("go")
    results = finish(job, good, bad, spare)
    assert one_status(results) == 0
    assert {mark.split()[1] for mark in job.marks() if ".1 " in mark} == {"good", "bad"}
    assert {mark.split()[1] for mark in job.marks() if ".2 " in mark} == {"good", "spare"}
    [line] = lines_with(results, "--node-failure-limit")
    assert line in said(results[1])
    assert "this node has caused 2 failures in a row" in line


def test_different_options_are_refused(job: Job) -> None:
    nodes = c10d(job, "2")
    script = job.script("mark()")
    first = nodes(0, "--restart-window", "60", "--fatal-exit-codes", "2,64-66", script=script)
    nodes.wait_for_first()
    second = nodes(1, "--restart-backoff", "1:30", "--crash-loop", "5", script=script)
    results = finish(job, first, second)
    assert one_status(results) == 2
    for result in results:
        [line] = result.stderr.splitlines()[-1:]
        assert "--restart-window=60 --fatal-exit-codes=2,64,65,66" in line
        assert "--restart-backoff=1:30 --crash-loop=5" in line
        assert all(f"(pid {process.pid})" in line for process in (first, second))
    assert job.marks() == []


def agent_dies(
    job: Job, processes: list[subprocess.Popen[str]], *victims: int
) -> list[subprocess.CompletedProcess[str]]:
    """Kill agents. Return the results of the others."""
    for victim in victims:
        processes[victim].send_signal(signal.SIGKILL)
    results = finish(job, *processes)
    assert all(results[victim].returncode == -signal.SIGKILL for victim in victims)
    return [result for number, result in enumerate(results) if number not in victims]


OF = "mark('of ' + os.environ['WORLD_SIZE'])\n"


def test_an_agent_dies_while_the_job_pauses(job: Job) -> None:
    script = job.script(
        f"{OF}wait_for(*(f'{{r}}.0 of 3' for r in range(3)))\n"
        "if restart == 0 and rank == 1: sys.exit(3)\nif restart == 0: wait()\n"
    )
    pause = LOST_AFTER + 10  # the loss is noticed before it is over, also if this process stands still for a while
    processes = start(job, script, "2:3", "--max-restarts", "3", "--restart-backoff", f"{pause}", conf=QUICK)
    wait_for_line(processes[1], f"restart 1 of 3 in {pause} s")
    results = agent_dies(job, processes, 1)
    assert one_status(results) == 0
    assert lines_with(results, "no heartbeat") == [f"lost {os.uname().nodename}: no heartbeat for {LOST_AFTER} s"]
    assert sorted(mark for mark in job.marks() if ".1 " in mark) == ["0.1 of 2", "1.1 of 2"]


def test_an_agent_dies_right_after_its_worker(job: Job) -> None:
    processes = start(
        job,
        job.script(f"mark(f'pid {{os.getpid()}}')\n{OF}if restart == 0: wait()\n"),
        "2:3",
        "--max-restarts",
        "0",
        conf=QUICK,
    )
    job.wait_for(*(f"{r}.0 of 3" for r in range(3)))
    [worker] = [int(mark.split()[2]) for mark in job.marks() if mark.startswith("2.0 pid")]
    os.kill(worker, signal.SIGKILL)
    results = agent_dies(job, processes, 2)
    # The outcome depends on what the agent reported before it died, but all others agree on it.
    assert one_status(results) in (0, 137)


def test_an_agent_dies_after_it_reported_a_failure(job: Job) -> None:
    script = job.script(
        # Rank 3 does not end, so its agent cannot decide before it is killed.
        f"{OF}signal.signal(signal.SIGTERM, lambda *_: (mark('stops'), wait() if rank == 3 else os._exit(0)))\n"
        f"wait_for(*(f'{{r}}.0 of 4' for r in range(4)))\n"
        "if restart == 0 and rank == 2: sys.exit(7)\nif restart == 0: wait()\n"
    )
    nodes = c10d(job, "2:3", QUICK)
    options = ("--max-restarts", "3")
    processes = [nodes(0, "--node-rank", "0", *options, script=script)]
    nodes.wait_for_first()
    processes.append(nodes(1, "--node-rank", "1", *options, script=script))
    processes.append(nodes(2, "--node-rank", "2", "--nproc-per-node", "2", *options, script=script))
    job.wait_for("0.0 stops", "3.0 stops")
    results = agent_dies(job, processes, 2)
    assert one_status(results) == 0
    [lost] = lines_with(results, "no heartbeat from")
    assert lost.endswith("before it decided what follows its failure; deciding in its place")
    assert len(lines_with(results, "restart 1 of 3")) == 1


def test_two_agents_die_at_once(job: Job) -> None:
    script = job.script(f"{OF}if restart == 0: wait()\n")
    processes = start(job, script, "2:4", "--max-restarts", "0", conf=QUICK)
    job.wait_for(*(f"{r}.0 of 4" for r in range(4)))
    results = agent_dies(job, processes, 1, 3)
    assert one_status(results) == 0
    assert sorted(mark for mark in job.marks() if ".1 " in mark) == ["0.1 of 2", "1.1 of 2"]
    lost = lines_with(results, "no heartbeat")
    # One line names both, unless their last heartbeats lie just before and just after a poll of the monitor.
    assert all(os.uname().nodename in line for line in lost)
    assert len(lost) == (1 if "(2 nodes)" in lost[0] else 2), lost


def test_two_agents_die_and_too_few_are_left(job: Job) -> None:
    processes = start(job, job.script(f"{OF}wait()\n"), "3:4", "--max-restarts", "0", conf=QUICK)
    job.wait_for(*(f"{r}.0 of 4" for r in range(4)))
    results = agent_dies(job, processes, 1, 3)
    assert one_status(results) == 69


def test_an_agent_dies_while_it_joins(job: Job) -> None:
    script = job.script("mark()")
    nodes = c10d(job, "3", QUICK)
    first = nodes(0, script=script)
    nodes.wait_for_first()
    dying = nodes(1, script=script)
    nodes.wait_for_key("0/node/2")
    dying.send_signal(signal.SIGKILL)
    job.finish(dying)
    results = finish(job, first, *(nodes(n, script=script) for n in (2, 3)))
    assert one_status(results) == 0
    told = [int(line.split()[3]) for line in lines_with(results, "has joined: ")]
    assert all(2 <= number <= 3 for number in told), told


def test_an_agent_dies_while_it_stops_its_workers(job: Job) -> None:
    script = job.script(
        f"if rank == 2: signal.signal(signal.SIGTERM, lambda *_: mark('stops'))\n{OF}"
        "wait_for(*(f'{r}.0 of 3' for r in range(3)))\n"
        "if restart == 0 and rank == 1: sys.exit(3)\nif restart == 0:\n    while True: wait()\n"
    )
    processes = start(job, script, "2:3", "--max-restarts", "3", conf=QUICK)
    job.wait_for("2.0 stops")
    results = agent_dies(job, processes, 2)
    assert one_status(results) == 0
    assert sorted(mark for mark in job.marks() if ".1 " in mark) == ["0.1 of 2", "1.1 of 2"]


def test_the_others_wait_for_a_checkpoint(job: Job) -> None:
    script = job.script(
        "def save(*_): time.sleep(2); mark(f'saved {time.monotonic()}'); sys.exit(0)\n"
        "if rank == 2: signal.signal(signal.SIGTERM, save)\n"
        f"{NOTE_TIME}if restart == 0: wait()\n"
    )
    processes = start(job, script, "2:3", "--max-restarts", "0")
    wait_until(lambda: len(times(job, "begins")) == 3)
    processes[2].send_signal(signal.SIGTERM)
    results = finish(job, *processes)
    assert [result.returncode for result in results] == [0, 0, 143]
    began = times(job, "begins")
    assert min(began["0.1"], began["1.1"]) >= times(job, "saved")["2.0"]
    assert len(lines_with(results, "is leaving (SIGTERM)")) == 1
    assert not lines_with(results, "restart ")


@pytest.mark.parametrize("victim", [0, 2])
def test_too_few_are_left_when_a_node_is_preempted(victim: int, job: Job) -> None:
    script = job.script(
        "signal.signal(signal.SIGTERM, lambda *_: (mark('stops'), wait_for('go'), sys.exit(0)))\nmark('up')\nwait()\n"
    )
    processes = start(job, script, "3", "--max-restarts", "3", hosted=True)
    job.wait_for(*(f"{r}.0 up" for r in range(3)))
    processes[victim].send_signal(signal.SIGTERM)
    why = "is leaving (SIGTERM), and the job cannot go on without it"
    wait_for_line(processes[victim], why)
    job.mark("go")
    results = finish(job, *processes)
    assert one_status(results) == 143
    assert {f"{r}.0 stops" for r in range(3)} <= set(job.marks())
    assert len(lines_with(results, why)) >= 2, "all print the reason"


def test_user_signals_reach_the_workers_of_one_node(job: Job) -> None:
    script = job.script(
        "signal.signal(signal.SIGUSR1, lambda *_: (mark('usr1'), sys.exit(0)))\nmark('up')\n"
        "if rank != 1: wait_for('1.0 usr1', 'go')\nelse: wait()\n"
    )
    processes = start(job, script, "2")
    job.wait_for("0.0 up", "1.0 up")
    processes[1].send_signal(signal.SIGUSR1)
    job.wait_for("1.0 usr1")
    job.mark("go")
    assert one_status(finish(job, *processes)) == 0
    assert "0.0 usr1" not in job.marks()


def test_a_frozen_agent_comes_back(job: Job) -> None:
    script = job.script(f"mark(f'pid {{os.getpid()}}')\n{NOTE_TIME}if restart < 2: wait()\n")
    processes = start(job, script, "2:3", "--max-restarts", "0", conf=QUICK)
    wait_until(lambda: len(times(job, "begins")) == 3)
    old = [int(mark.split()[2]) for mark in job.marks() if mark.startswith("2.0 pid")]
    processes[2].send_signal(signal.SIGSTOP)
    wait_until(lambda: {"0.1", "1.1"} <= times(job, "begins").keys())
    assert not any(map(is_alive, old))
    processes[2].send_signal(signal.SIGCONT)
    results = finish(job, *processes)
    assert one_status(results) == 0
    assert {"0.2", "1.2", "2.2"} <= times(job, "begins").keys()


def test_the_keeper_of_a_node_is_killed(job: Job) -> None:
    script = job.script("mark(f'keeper {os.getppid()}')\nif restart == 0: wait()\n")
    processes = start(job, script, "2", "--max-restarts", "1")
    wait_until(lambda: len(job.marks()) == 2)
    [keeper] = [int(mark.split()[2]) for mark in job.marks() if mark.startswith("1.0")]
    os.kill(keeper, signal.SIGKILL)
    results = finish(job, *processes)
    assert one_status(results) == 0
    told = lines_with(results, f"the keeper process (pid {keeper}) was killed")
    assert told
    assert all(line.endswith("restart 1 of 1") for line in told)


def test_the_keeper_of_a_node_is_stopped(job: Job) -> None:
    """The agent resumes it: otherwise its workers could not be ended any more."""
    script = job.script(
        f"mark(f'keeper {{os.getppid()}}')\n{OF}"
        "if restart == 0 and rank == 1: wait_for('go'); sys.exit(3)\nif restart == 0: wait()\n"
    )
    processes = start(job, script, "2:3", "--max-restarts", "1", "--shutdown-timeout", "1", conf=QUICK)
    job.wait_for("0.0 of 3", "1.0 of 3", "2.0 of 3")
    [keeper] = [int(mark.split()[2]) for mark in job.marks() if mark.startswith("2.0 keeper")]
    os.kill(keeper, signal.SIGSTOP)
    job.mark("go")
    results = finish(job, *processes)
    assert [result.returncode for result in results] == [0, 0, 0]
    assert lines_with(results[2:], f"the keeper process (pid {keeper}) was stopped (SIGSTOP): resumed")
    assert {"0.1 of 3", "1.1 of 3", "2.1 of 3"} <= set(job.marks())


@pytest.mark.parametrize("least", ["1", "2"])
def test_modules_that_one_node_does_not_have(least: str, job: Job) -> None:
    """The node notices when the workers of the others already run."""
    script = job.script("mark()\nif restart == 0: wait()\n")
    module = f"import os, time\nwhile not os.path.exists('{job.path}/marks'): time.sleep(0.01)\nimport no_such_module\n"
    (job.path / "slow.py").write_text(module)
    nodes = c10d(job, f"{least}:2")
    first = nodes(0, script=script)
    nodes.wait_for_first()
    second = nodes(1, "--preload", "slow", script=script, PYTHONPATH=f"{job.path}:{os.environ.get('PYTHONPATH', '')}")
    results = finish(job, first, second)
    assert results[1].returncode == 69
    assert results[0].returncode == (69 if least == "2" else 0)
    assert all("No module named 'no_such_module'" in result.stderr for result in results)
    [line] = lines_with(results[:1], "no_such_module")
    assert line.endswith(": stopping 1 worker")
    assert results[0].stderr.count("Traceback") == (least == "2"), "the error that ends the job is shown in full"


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_node_whose_workers_succeeded_may_end(signum: signal.Signals, job: Job) -> None:
    """The others run on for longer than the keep-alive deadline."""
    script = job.script(f"mark('up')\nif rank == 0: wait_for('go'); time.sleep({LOST_AFTER + 1})\n")
    nodes = c10d(job, "2", QUICK)
    first = nodes(0, "--node-rank", "0", script=script)
    nodes.wait_for_first()
    second = nodes(1, "--node-rank", "1", script=script)
    nodes.wait_for_key("0/succeeded")
    second.send_signal(signum)
    job.finish(second)
    job.mark("go")
    [result] = finish(job, first)
    assert result.returncode == 0
    assert sorted(job.marks()) == ["0.0 up", "1.0 up", "go"]


def test_a_node_whose_workers_succeeded_waits_for_the_others(job: Job) -> None:
    script = job.script("mark('up')\nif rank == 0: wait_for('go')\n")
    nodes = c10d(job, "2")
    first = nodes(0, "--node-rank", "0", script=script)
    nodes.wait_for_first()
    second = nodes(1, "--node-rank", "1", script=script)
    nodes.wait_for_key("0/succeeded")
    assert second.poll() is None
    job.mark("go")
    assert one_status(finish(job, first, second)) == 0


def test_the_host_of_the_store_comes_back_and_the_count_is_kept(job: Job) -> None:
    script = job.script(
        "mark('up')\nif restart == 0 and rank == 1: wait_for('0.0 up'); sys.exit(3)\n"
        "if restart == 2 and rank == 1: wait_for('0.2 up'); sys.exit(4)\n"
        "if restart < 3: wait()\n"
    )
    nodes = c10d(job, "2", QUICK, hosted=True)
    options = ("--max-restarts", "3")
    first = nodes(0, "--node-rank", "0", *options, script=script)
    nodes.wait_for_first()
    second = nodes(1, "--node-rank", "1", *options, script=script)
    job.wait_for("0.1 up", "1.1 up")
    first.send_signal(signal.SIGKILL)
    job.finish(first)
    again = nodes(0, "--node-rank", "0", *options, script=script)
    results = finish(job, again, second)
    assert one_status(results) == 0
    assert lines_with(results, "restart 2 of 3")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_too_few_are_left_while_the_job_pauses(signum: signal.Signals, job: Job) -> None:
    """The others know at once, or within the keep-alive deadline. They do not wait for the end of the pause."""
    script = job.script("mark()\nif rank == 1: wait_for('0.0'); sys.exit(3)\nwait()\n")
    processes = start(job, script, "2", "--max-restarts", "3", "--restart-backoff", "600:600", conf=QUICK)
    wait_for_line(processes[1], "restart 1 of 3 in 600 s")
    processes[1].send_signal(signum)
    start_time = time.monotonic()
    results = finish(job, *processes)
    assert time.monotonic() - start_time < SOON
    assert results[0].returncode == (143 if signum == signal.SIGTERM else 69)
    assert ("the job needs 2 nodes (--nnodes)" in results[0].stderr) == (signum == signal.SIGKILL)
    assert restarts(job) == [0]
