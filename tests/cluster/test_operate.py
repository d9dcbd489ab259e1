"""``elastic-job``: real jobs on one node and several, looked at and operated from outside."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_launch.control.client import sockets
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.ranks import assign
from elastic_launch.core.rendezvous.records import Closed, Members, NodeRecord, encode
from elastic_launch.core.store_requests import Get, Set
from elastic_launch.operate import jobs, logs
from elastic_launch.operate.__main__ import COMMANDS
from elastic_launch.operate.jobs import running_jobs
from elastic_launch.operate.logs import NoFilesError
from elastic_launch.operate.status import View
from elastic_launch.operate.watch import watch
from elastic_launch.store.client import connect
from tests.support.consoles import LiveScreen
from tests.support.control import asked, elastic_job, one_socket, start_elastic_job
from tests.support.jobs import TWO, Job
from tests.support.leaks import wait_for_children
from tests.support.nodes import STEADY, Nodes, c10d
from tests.support.servers import shared_etcd, shared_store
from tests.support.store_contract import frozen
from tests.support.waiting import DEADLINE, wait_until

RUN = "mark('up'); wait()\n"
NONE = "elastic-job: no job of yours runs on this host\n"


def start(job: Job, run_id: str, *args: str, script: str = RUN, ready: bool = True) -> subprocess.Popen[str]:
    """Start a job on one node, and wait until it runs."""
    before = len(sockets(os.environ))
    process = job.start("--rdzv-id", run_id, *args, job.script(script, f"{run_id}.py"))
    wait_until(lambda: len(sockets(os.environ)) > before)
    if ready:
        wait_until(lambda: job_of(run_id)["state"] == "running")
    return process


def job_of(run_id: str) -> dict[str, Any]:
    """Return how ``elastic-job status`` sees a job."""
    return dict(json.loads(elastic_job("status", run_id, "--json").stdout or '{"state": ""}'))


# ---- Which job


def test_without_jobs_a_command_says_so_and_has_status_3() -> None:
    for command in ("status", "logs", "stop", "restart"):
        done = elastic_job(command)
        hint = "; for one that has ended, pass the directory of its files, LOG_DIR/ID" if command == "logs" else ""
        assert (done.returncode, done.stdout, done.stderr) == (3, "", NONE.replace("\n", f"{hint}\n"))
    listed = elastic_job("ps")
    assert (listed.returncode, listed.stdout, listed.stderr) == (0, "", "no job of yours runs on this host\n")
    assert elastic_job("ps", "--json").stdout == "[]\n"


def test_jobs_are_listed_and_chosen_by_id_prefix_or_pid(job: Job) -> None:
    first, second = start(job, "alpha-1", *TWO, "--max-restarts", "3"), start(job, "alpha-2")
    third = start(job, "beta")
    header, *rows = elastic_job("ps").stdout.splitlines()
    assert header.split() == [
        "JOB",
        "STATE",
        "ROUND",
        "NODES",
        "WORKERS",
        "SINCE",
        "RESTARTS",
        "STEPS/S",
        "LAST",
        "TROUBLE",
    ]
    assert [row.split()[0] for row in rows] == ["beta", "alpha-2", "alpha-1"], "the latest first"
    assert re.fullmatch(r"alpha-1 +running +0 +1 +2 +\S+ s +0 of 3 +– +–", rows[2])
    for wanted in ("be", "beta", str(third.pid)):
        assert json.loads(elastic_job("status", "--json", wanted).stdout)["job"] == "beta"
    for words in (["status"], ["stop", "alpha"]):
        done = elastic_job(*words)
        assert done.returncode == 2
        assert re.search(rf"which one\? .*alpha-2 \(pid {second.pid}\), alpha-1 \(pid {first.pid}\)\n", done.stderr)
    done = elastic_job("stop", "gamma")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "gamma: no such job on this host; there are: beta (pid " in done.stderr
    assert [process.poll() for process in (first, second, third)] == [None, None, None]
    for process, run_id in ((first, "alpha-1"), (second, "alpha-2"), (third, "beta")):
        assert elastic_job("stop", run_id).stdout == f"{run_id}: stopping\n"
        assert job.finish(process).returncode == 143


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no command: must be one of ps, status, logs, "),
        (["launch"], "launch: must be one of"),
        (["logs", "--last", "-1"], "--last=-1: must be at least 0"),
        (["logs", "logs/my-job", "-f"], "logs/my-job: only a running job can be followed"),
        (["stop", "--signal", "BOOM"], "--signal=BOOM: must be the name of a signal"),
        (["status", "--rdzv-backend", "carrier-pigeon", "--rdzv-endpoint", "a:1"], "--rdzv-backend=carrier-pigeon"),
        (["status", "--rdzv-id", "x"], "--rdzv-endpoint: must say where the job's store is"),
        (["status", "x", "--rdzv-endpoint", "a:1"], "JOB is for jobs of this host"),
    ],
)
def test_wrong_arguments_are_one_line(words: list[str], text: str) -> None:
    done = elastic_job(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert text in done.stderr


def test_the_logs_of_a_job_that_has_ended(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    for round_, rank, text in ((0, 0, "a\n"), (0, 1, "b\n"), (1, 0, "c\nd\n")):
        folder = tmp_path / "my-job" / f"attempt_{round_}" / str(rank)
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text(text)
    ended = str(tmp_path / "my-job")
    assert logs.main([ended, "--rank", "1"]) == 0
    assert capsysbinary.readouterr().out == b"b\n"
    assert logs.main([ended, "--rank", "0", "--last", "2"]) == 0
    assert capsysbinary.readouterr().out == b"==> round 1, rank 0, stdout <==\nc\nd\n"
    with pytest.raises(NoFilesError, match="no output of rank 7; there are files of ranks 0, 1"):
        logs.main([ended, "--rank", "7"])
    with pytest.raises(NoFilesError, match="no output of a job"):
        logs.main([str(tmp_path / "nowhere")])


def test_help_and_version_need_no_job() -> None:
    listed = re.findall(r"^  (\w+) +(.+)$", elastic_job("--help").stdout, re.MULTILINE)
    assert listed == [(command, what) for command, (_, what) in COMMANDS.items()]
    assert elastic_job("--version").stdout == "elastic-job 0.1.0\n"
    for command in COMMANDS:
        assert f"usage: elastic-job {command} " in elastic_job(command, "--help").stdout


def test_what_a_killed_agent_left_is_not_shown_and_removed(job: Job) -> None:
    process = start(job, "killed")
    path = one_socket()
    process.kill()
    process.wait()
    assert elastic_job("status").returncode == 3
    wait_until(lambda: elastic_job("ps").stdout == "" and not os.path.exists(path))
    wait_for_children()


def test_an_agent_that_is_stopped_is_listed_as_such(job: Job) -> None:
    process = start(job, "frozen")
    process.send_signal(signal.SIGSTOP)
    assert re.search(r"^frozen +unresponsive ", elastic_job("ps").stdout, re.MULTILINE)
    assert "state     unresponsive" in elastic_job("status").stdout
    done = elastic_job("restart", "frozen")
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
    assert f"(pid {process.pid}) has not answered for 5 s" in done.stderr
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: job_of("frozen")["state"] == "running")
    process.send_signal(signal.SIGTERM)
    job.finish(process)


def test_an_agent_that_ends_without_an_answer_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living, ended = tmp_path / "a.12.abc.sock", tmp_path / "b.13.abc.sock"
    living.touch()
    monkeypatch.setattr(jobs, "ask_all", lambda paths: [(str(path), 0, None) for path in (living, ended)])
    assert [(job.id, job.pids) for job in jobs.running_jobs(os.environ)] == [("a", [12])]


def test_a_reader_that_has_seen_enough_is_no_error(job: Job) -> None:
    process = start(job, "piped")
    command = f"{sys.executable} -m elastic_launch.operate ps | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    process.send_signal(signal.SIGTERM)
    job.finish(process)


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "my-job" / "attempt_0" / "0"
    folder.mkdir(parents=True)
    (folder / "stdout.log").write_text("a\n")
    program = f"{sys.executable} -m elastic_launch.operate"
    for command, where, status, text in (
        (f"logs {tmp_path}/my-job", "> /dev/full", 69, "standard output: No space left on device; the rest is not"),
        ("--help", "> /dev/full", 69, "elastic-job: No space left on device\n"),
        (f"logs {tmp_path}/my-job", ">&-", 0, ""),
        ("ps", ">&-", 0, ""),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{program} {command} {where}"], stderr=subprocess.PIPE, text=True, timeout=DEADLINE
        )
        assert done.returncode == status, done.stderr
        assert text in done.stderr
        assert done.stderr.count("\n") <= 1


def test_the_programs_imports_are_light() -> None:
    code = (
        "import sys; from elastic_launch.operate.__main__ import main; main(['ps']);"
        "print([m for m in ('torch', 'grpc', 'asyncio', 'subprocess', 'logging', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- One node


def test_status_tells_rounds_restarts_and_trouble(job: Job) -> None:
    script = "mark('up')\nif restart == 0: raise ValueError('boom')\nwait()\n"
    process = start(job, "demo", *TWO, "--max-restarts", "2", script=script, ready=False)
    job.wait_for("0.1 up", "1.1 up")
    assert elastic_job("restart").stdout == "demo: restarting\n"
    job.wait_for("0.2 up", "1.2 up")
    shown = elastic_job("status", "demo").stdout
    assert re.search(r"^state +running, round 2 for \d", shown, re.MULTILINE)
    assert re.search(r"^restarts +1 of 2 used, 1 uncharged$", shown, re.MULTILINE)
    assert re.search(r"^0 +[\d:]+ +1 +2 +\S+ s +rank \d failed \(exit code 1, ValueError: boom\)$", shown, re.MULTILINE)
    assert re.search(r"^1 +[\d:]+ +1 +2 +\S+ s +restart requested on \S+$", shown, re.MULTILINE)
    seen = job_of("demo")
    assert (seen["version"], seen["source"], seen["restarts"], seen["uncharged_restarts"]) == (1, "agents", 1, 1)
    assert [worker["state"] for worker in seen["nodes"][0]["workers"]] == ["running", "running"]
    assert elastic_job("stop", "--signal", "INT").stdout == "demo: stopping\n"
    assert job.finish(process).returncode == 130


def test_watch_in_a_pipe_writes_a_line_for_each_change_until_the_end(job: Job) -> None:
    script = "mark('up')\nif restart == 0: wait_for('fail'); sys.exit(3)\nwait_for('end')\n"
    process = start(job, "watched", "--max-restarts", "1", script=script)
    watcher = start_elastic_job(job, "status", "--watch")
    assert watcher.stdout
    first = watcher.stdout.readline()
    assert re.match(r"[\d:]{8} watched running: round 0, 1 node, 1 worker, restarts: 0 of 1 used$", first)
    job.mark("fail")
    job.wait_for("0.1 up")
    lines: list[str] = []
    while "running: round 1" not in (lines or [""])[-1]:
        lines.append(watcher.stdout.readline())
    job.mark("end")
    assert job.finish(process).returncode == 0
    rest = job.finish(watcher)
    assert (rest.returncode, rest.stderr) == (0, "")
    assert re.search(r" watched succeeded: round 1, .*last: rank 0 failed \(exit code 3\)$", rest.stdout.rstrip())
    lines += rest.stdout.splitlines(keepends=True)
    assert len(lines) < 12, "no line that says nothing new"


def test_watch_as_json_is_a_view_a_line(job: Job) -> None:
    process = start(job, "watched")
    watcher = start_elastic_job(job, "status", "--watch", "--json")
    assert watcher.stdout
    assert json.loads(watcher.stdout.readline())["state"] == "running"
    process.send_signal(signal.SIGTERM)
    job.finish(process)
    assert json.loads(job.finish(watcher).stdout.splitlines()[-1])["state"] == "stopped"


def test_watch_ends_if_the_job_has_ended_since_it_was_found(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(job, "brief")
    [found] = running_jobs(os.environ)
    process.send_signal(signal.SIGTERM)
    job.finish(process)
    assert watch(View(found, None), as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["job"] == "brief"


# ---- A terminal


class Terminal:
    """``elastic-job`` on a terminal."""

    def __init__(self, job: Job, *words: str) -> None:
        self.screen = LiveScreen(24, 80)
        self._ours, theirs = pty.openpty()
        self.resize(24, 80)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "elastic_launch.operate", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        os.set_blocking(self._ours, False)

    def resize(self, rows: int, columns: int) -> None:
        self.screen.resize(rows, columns)
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def look(self) -> list[str]:
        """Return the rows as they are now."""
        try:
            while block := os.read(self._ours, 1 << 16):
                self.screen.feed(block)
        except (BlockingIOError, OSError):
            pass
        return self.screen.shown()

    def wait_for(self, pattern: str) -> None:
        wait_until(lambda: re.search(pattern, "\n".join(self.look()), re.MULTILINE), f"{pattern} in {self.look()}")

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    def wait(self) -> int:
        wait_until(lambda: self.look() and self.process.poll() is not None)
        self.look()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


@contextmanager
def terminal(job: Job, *words: str) -> Iterator[Terminal]:
    made = Terminal(job, *words)
    try:
        yield made
    finally:
        made.close()


def test_watch_on_a_terminal_is_a_live_screen_that_ctrl_c_leaves_clean(job: Job) -> None:
    process = start(job, "live", *TWO)
    with terminal(job, "status", "--watch") as seen:
        seen.wait_for(r"^state +running, round 0 for \d")
        assert seen.screen.is_other
        assert not seen.screen.has_cursor
        seen.wait_for(r"^since +[\d:]+, [2-9]\S* s ago")
        assert elastic_job("restart").returncode == 0
        seen.wait_for(r"^state +running, round 1 for \d")
        assert seen.screen.blank_frames == 0
        seen.press(b"\x03")
        assert seen.wait() == 130
        assert not seen.screen.is_other
        assert seen.screen.has_cursor
        assert "".join(seen.look()).replace("^C", "") == ""
    process.send_signal(signal.SIGTERM)
    job.finish(process)


def test_the_live_screen_follows_the_terminals_size(job: Job) -> None:
    process = start(job, "live", *TWO)
    with terminal(job, "status", "--watch") as seen:
        seen.wait_for(r"^NODE +HOST .*HEARTBEAT$")
        seen.resize(4, 20)
        seen.wait_for(r"^job  .{14}…$")
        seen.resize(40, 120)
        seen.wait_for(r"^NODE +HOST .*HEARTBEAT$")
        process.send_signal(signal.SIGTERM)
        job.finish(process)
        assert seen.wait() == 0
        assert not seen.screen.is_other
        seen.wait_for(r"^state +stopped, round 0")  # the last state stays


def test_a_live_screen_that_is_terminated_leaves_the_terminal_clean(job: Job) -> None:
    process = start(job, "live")
    with terminal(job, "status", "--watch") as seen:
        seen.wait_for(r"^state +running")
        seen.process.send_signal(signal.SIGTERM)
        assert seen.wait() == 143
        assert not seen.screen.is_other
        assert seen.screen.has_cursor
    process.send_signal(signal.SIGTERM)
    job.finish(process)


# ---- Output


SAYS = (
    "for i in range(5): print(f'line {i} of rank {rank} in round {restart}', flush=True)\n"
    "print(f'trouble of rank {rank} in round {restart}', file=sys.stderr, flush=True)\n"
    "mark('said')\n"
)


def wait_for_files(job: Job, text: str, count: int = 1) -> None:
    """Wait until the agent has written a text so often: it may be late with what a worker has long said."""
    files = job.path / "logs"
    wait_until(lambda: sum(file.read_text().count(text) for file in files.rglob("std*.log")) == count, text)


def test_logs_are_the_last_lines_of_each_stream_across_rounds(job: Job) -> None:
    files = ("-r", "3", "--log-dir", str(job.path / "logs"))
    process = start(job, "talk", *TWO, *files, script=SAYS + "wait()\n")
    job.wait_for("0.0 said", "1.0 said")
    elastic_job("restart")
    job.wait_for("0.1 said", "1.1 said")
    wait_for_files(job, "line 4 of", 4)
    wait_for_files(job, "trouble", 4)
    everything = elastic_job("logs").stdout
    assert everything.count("line ") == 20
    assert re.findall("==> (.*) <==", everything) == [
        f"round {round_}, rank {rank}, {stream}"
        for round_ in (0, 1)
        for rank in (0, 1)
        for stream in ("stderr", "stdout")
    ]
    last = elastic_job("logs", "--last", "7", "--rank", "1").stdout
    assert [line for line in last.splitlines() if line.startswith("line")] == [
        *(f"line {i} of rank 1 in round 0" for i in (3, 4)),
        *(f"line {i} of rank 1 in round 1" for i in range(5)),
    ]
    assert "rank 0" not in last
    assert elastic_job("logs", "--last", "0").stdout == ""
    done = elastic_job("logs", "--rank", "7")
    assert (done.returncode, done.stderr) == (1, "elastic-job: --rank=7: this host has files of ranks 0, 1\n")
    process.send_signal(signal.SIGTERM)
    job.finish(process)


def test_one_file_is_shown_as_it_is(job: Job) -> None:
    files = ("-r", "1", "--log-dir", str(job.path / "logs"))
    process = start(job, "talk", *files, script="print('no newline at the end', end='', flush=True)\n" + RUN)
    job.wait_for("0.0 up")
    wait_for_files(job, "at the end")
    assert elastic_job("logs").stdout == "no newline at the end"
    process.send_signal(signal.SIGTERM)
    job.finish(process)


def test_logs_that_are_followed_go_on_through_restarts_to_the_end(job: Job) -> None:
    script = SAYS + "if restart == 0: wait()\nwait_for('end')\nprint('the end', flush=True)\n"
    process = start(job, "talk", "-r", "1", "--log-dir", str(job.path / "logs"), script=script)
    job.wait_for("0.0 said")
    wait_for_files(job, "line 4 of")
    follower = start_elastic_job(job, "logs", "-f", "--last", "1")
    assert follower.stdout
    assert follower.stdout.readline() == "==> round 0, rank 0, stdout <==\n"
    assert follower.stdout.readline() == "line 4 of rank 0 in round 0\n"
    elastic_job("restart")
    job.wait_for("0.1 said")
    job.mark("end")
    assert job.finish(process).returncode == 0
    done = job.finish(follower)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "",
        "==> round 1, rank 0, stdout <==",
        *(f"line {i} of rank 0 in round 1" for i in range(5)),
        "the end",
    ]


def test_logs_that_are_followed_show_what_follows_while_the_last_lines_are_shown(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = SAYS + "if restart == 0: wait()\n"
    process = start(job, "brief", "-r", "1", "--log-dir", str(job.path / "logs"), script=script)
    job.wait_for("0.0 said")
    show_last = logs.show_last

    def slowly(*args: Any) -> dict[str, int]:
        ends = show_last(*args)
        elastic_job("restart")
        job.finish(process)
        return ends

    monkeypatch.setattr(logs, "show_last", slowly)
    assert logs.main(["-f"]) == 0
    assert "line 4 of rank 0 in round 1\n" in capsys.readouterr().out


def test_a_job_without_files_is_told_how_to_have_some(job: Job) -> None:
    process = start(job, "mute")
    done = elastic_job("logs")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "mute writes its output to no files: start it with -t 3" in done.stderr
    process.send_signal(signal.SIGTERM)
    job.finish(process)


# ---- Several nodes


@pytest.fixture(params=["c10d", "etcd"])
def nodes(request: pytest.FixtureRequest, job: Job) -> Nodes:
    if request.param == "etcd":
        return Nodes(job, "etcd", shared_etcd(), "2:3")
    return c10d(job, "2:3")


def from_anywhere(nodes: Nodes) -> list[str]:
    """The words by which ``elastic-job status`` finds a job without its agents."""
    return ["--rdzv-backend", nodes.backend, "--rdzv-endpoint", nodes.endpoint, "--rdzv-id", nodes.run_id]


def test_a_job_of_several_nodes_is_seen_whole_restarted_and_stopped(nodes: Nodes, job: Job, tmp_path: Path) -> None:
    """Three nodes and a spare; also from where no agent is. Neither uses up a restart."""
    script = job.script(RUN)
    processes = [nodes(number, "--max-restarts", "0", script=script) for number in range(3)]
    job.wait_for("0.0 up", "1.0 up", "2.0 up")
    processes.append(nodes(3, "--max-restarts", "0", script=script))
    wait_until(lambda: len(job_of(nodes.run_id)["nodes"]) == 4)
    elsewhere = json.loads(elastic_job("status", *from_anywhere(nodes), "--json", TMPDIR=str(tmp_path)).stdout)
    for seen in (job_of(nodes.run_id), elsewhere):
        assert (seen["source"], seen["state"], seen["round"], seen["world_size"]) == ("store", "running", 0, 3)
        assert (seen["min_nodes"], seen["max_nodes"], seen["max_restarts"]) == (2, 3, 0)
        members = [node for node in seen["nodes"] if node["group_rank"] is not None]
        assert [(n["group_rank"], n["ranks"], n["role"], n["state"]) for n in members] == [
            (0, [0, 0], "monitor", "running"),
            (1, [1, 1], None, "running"),
            (2, [2, 2], None, "running"),
        ]
        assert {node["pid"] for node in seen["nodes"]} == {process.pid for process in processes}
        assert [node["role"] for node in seen["nodes"]].count("spare") == 1
    wait_until(lambda: all(node["heartbeat"] is not None for node in job_of(nodes.run_id)["nodes"][:3]))
    assert all(node["workers"] is None and node["heartbeat"] is None for node in elsewhere["nodes"])

    assert elastic_job("restart", nodes.run_id).stdout == f"{nodes.run_id}: restarting\n"
    job.wait_for("0.1 up", "1.1 up", "2.1 up")
    wait_until(lambda: job_of(nodes.run_id)["state"] == "running")
    seen = job_of(nodes.run_id)
    assert (seen["restarts"], seen["uncharged_restarts"], seen["round"]) == (0, 1, 1)
    assert seen["rounds"][0]["reason"] == f"restart requested on {os.uname().nodename}"

    assert elastic_job("stop").stdout == f"{nodes.run_id}: stopping\n"
    assert [job.finish(process).returncode for process in processes] == [143] * 4
    after = elastic_job("status", *from_anywhere(nodes), "--json")
    assert json.loads(after.stdout)["state"] == "stopped"


def test_one_node_is_stopped_and_the_others_go_on(job: Job) -> None:
    """All nodes of this test are on one host, so ``--node`` would mean both of them."""
    nodes = c10d(job, "1:2")
    script = job.script("mark('of ' + os.environ['WORLD_SIZE']); wait()\n")
    first, second = (nodes(number, script=script) for number in range(2))
    job.wait_for("0.0 of 2", "1.0 of 2")
    done = elastic_job("stop", "--node", "elsewhere")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "--node=elsewhere: " in done.stderr
    assert "has no such node on this host" in done.stderr
    jobs = json.loads(elastic_job("ps", "--json").stdout)
    [path] = [agent["socket"] for agent in jobs[0]["agents"] if agent["pid"] == second.pid]
    assert asked(path, request="stop", scope="node")["ok"]
    assert job.finish(second).returncode == 143
    job.wait_for("0.1 of 1")
    assert first.poll() is None
    host = os.uname().nodename
    assert (
        elastic_job("stop", "--node", host).stdout
        == f"{nodes.run_id}: the node on {host} (pid {first.pid}) is stopping\n"
    )
    assert job.finish(first).returncode == 143


def test_waiting_nodes_say_what_they_wait_for(job: Job) -> None:
    nodes = c10d(job, "2")
    process = nodes(0, script=job.script(RUN))
    wait_until(lambda: job_of(nodes.run_id).get("waits_for") == f"nodes: 1 of 2 joined: {os.uname().nodename}")
    shown = elastic_job("status").stdout
    assert re.search(r"^state +joining, round 0$", shown, re.MULTILINE)
    assert re.search(r"^– +\S+ +\d+ +joined +– +leader ", shown, re.MULTILINE)
    assert elastic_job("stop").returncode == 0
    assert job.finish(process).returncode == 143


def test_a_store_that_is_away_leaves_what_the_agents_know(job: Job) -> None:
    nodes = c10d(job, "1:2", f"{STEADY},last_call_timeout=1,store_timeout=1000", hosted=True)
    process = nodes(0, script=job.script(RUN))
    job.wait_for("0.0 up")
    [store] = [child for child in psutil.Process(process.pid).children() if child.name() == "elastic-store"]
    with frozen(store.pid):
        done = elastic_job("status", "--json")
    seen = json.loads(done.stdout)
    assert (done.returncode, seen["source"], len(seen["nodes"])) == (0, "agents", 1)
    assert re.fullmatch(r"elastic-job: only what the agents on this host know: .*\n", done.stderr)
    process.send_signal(signal.SIGTERM)
    job.finish(process)


@pytest.mark.parametrize(
    ("endpoint", "more", "status", "text"),
    [
        ("127.0.0.1:9", [], 69, "connection refused"),
        ("127.0.0.1:9", ["--rdzv-backend", "etcd", "--rdzv-conf", "read_timeout=1"], 69, "Connection refused"),
        ("no-such-host.invalid:1", [], 69, "cannot resolve 'no-such-host.invalid'"),
        ("", [], 3, "never-ran: no such job at this store"),
    ],
)
def test_a_job_that_is_not_there_is_one_line(endpoint: str, more: list[str], status: int, text: str) -> None:
    where = endpoint or f"127.0.0.1:{shared_store().port}"
    done = elastic_job("status", "--rdzv-endpoint", where, "--rdzv-id", "never-ran", *more)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert text in done.stderr


def test_a_job_of_a_thousand_nodes_is_read_without_writing_anything() -> None:
    count, run_id = 1000, "thousand"
    options = Settings(run_id, 2, 2000).options
    records = [NodeRecord(f"id-{n}", f"host-{n}", 1000 + n, 8, "default", options=options) for n in range(count)]
    tickets, prefix = tuple(range(1, count + 1)), f"elastic/{run_id}/0/"
    values = {f"node/{ticket}": encode(record) for ticket, record in zip(tickets, records, strict=True)}
    assignments = zip(tickets, assign(records, "a", 1), strict=True)
    values |= {f"assignment/0/{ticket}": encode(assignment) for ticket, assignment in assignments}
    values |= {f"heartbeat/{ticket}": b"1" for ticket in tickets}
    values["members/0"] = encode(Members(tickets, tickets_of(records), tuple(it.host for it in records)))
    values |= {"closed": encode(Closed(0, count, count, (), options)), "ticket": b"%d" % count}
    everything = [(f"{prefix}{name}", value) for name, value in values.items()]
    store = shared_store()
    with closing(connect(("127.0.0.1", store.port), 2, "store")) as client:
        for at in range(0, len(everything), 500):
            client.call(Set(tuple(everything[at : at + 500])), DEADLINE)
        client.call(Get((f"{prefix}closed",)), DEADLINE)
        done = elastic_job("status", "--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-id", run_id)
        assert done.returncode == 0, done.stderr
        assert "size      1,000 nodes (of 2 to 2000), 8,000 workers\n" in done.stdout
        assert len(done.stdout.splitlines()) < 40
        keys = tuple(key for key, _ in everything)
        found = [value for at in range(0, len(keys), 500) for value in client.call(Get(keys[at : at + 500]), DEADLINE)]  # type: ignore[union-attr]
        assert found == [value for _, value in everything], "only read"


def tickets_of(records: list[NodeRecord]) -> tuple[str, ...]:
    return tuple(record.node for record in records)
