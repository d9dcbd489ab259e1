"""Where the workers' output goes, end to end: real launchers, pipes, terminals and disks."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from elastic_launch.config import LogsDest
from elastic_launch.core.agent.lifecycle import SAME_SIGNAL
from elastic_launch.logs.job_files import DefaultLogsSpecs, JobFiles
from elastic_launch.logs.pump import BLOCK
from tests.support import consoles
from tests.support.consoles import screen
from tests.support.files import install_package
from tests.support.jobs import TWO, Job, report_of
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE, SOON, wait_until

HELLO = "os.write(1, b'out %d\\n' % rank); os.write(2, b'err %d\\n' % rank)"
LAST_WORDS = "print('last words', file=sys.stderr)\n"


def start(job: Job, *args: str, stdin: Any = subprocess.DEVNULL, **how: Any) -> subprocess.Popen[bytes]:
    """Start ``elastic-run -q``. Its streams are pipes of bytes by default; upper-case options are variables."""
    env = {name: how.pop(name) for name in list(how) if name.isupper()}
    process = subprocess.Popen(
        [sys.executable, "-m", "elastic_launch", "-q", *args],
        cwd=job.path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdin=stdin,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    )
    job.processes.append(cast("subprocess.Popen[str]", process))
    return process


def run(job: Job, *args: str, status: int = 0, **how: Any) -> tuple[bytes, bytes]:
    """Run ``elastic-run`` and check its status. Return what it wrote to both streams."""
    process = start(job, *args, **how)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == status, err
    return out, err


class Terminal(consoles.Terminal):
    """A terminal with a launcher in it."""

    def __init__(self, job: Job, *args: str, stdin: Any = subprocess.DEVNULL, **env: str) -> None:
        super().__init__(lambda theirs: start(job, *args, stdin=stdin, stdout=theirs, stderr=theirs, **env))


def files_in(directory: Path) -> dict[str, str]:
    """The output in files, by path."""
    return {
        str(path.relative_to(directory)): path.read_bytes().decode(errors="surrogateescape")
        for path in directory.rglob("*.log")
    }


# ---- -r and -t, and where files are

FORMS = [
    # options; streams (RANK.STREAM) in files; those that are shown unchanged; those that are shown with a prefix
    ("", "", "0o 0e 1o 1e", ""),
    ("-r 3", "0o 0e 1o 1e", "", ""),
    ("-r 1", "0o 1o", "0e 1e", ""),
    ("-r 0:1,1:2", "0o 1e", "0e 1o", ""),
    ("-t 3", "0o 0e 1o 1e", "", "0o 0e 1o 1e"),
    ("--tee=2", "0e 1e", "0o 1o", "0e 1e"),
    ("-t 0:1,1:2", "0o 1e", "0e 1o", "0o 1e"),
    ("-t 1:3", "1o 1e", "0o 0e", "1o 1e"),
    ("-r 3 -t 1:2", "0o 0e 1o 1e", "", "1e"),
    ("-r 1 -t 2", "0o 0e 1o 1e", "", "0e 1e"),
    ("-r 0:1 -t 1:3 --local-ranks-filter 1", "0o 1o 1e", "", "1o 1e"),
    ("--local-ranks-filter 1", "", "1o 1e", ""),
    ("-t 3 --local-ranks-filter 0", "0o 0e 1o 1e", "", "0o 0e"),
]


def lines(marks: str, before: str = "") -> list[str]:
    """What ranks print to these streams (RANK.STREAM)."""
    names = {"o": "out", "e": "err"}
    return [before.format(mark[0]) + f"{names[mark[1]]} {mark[0]}" for mark in marks.split()]


@pytest.mark.quick
@pytest.mark.parametrize(("options", "kept", "untouched", "prefixed"), FORMS, ids=[form[0] or "none" for form in FORMS])
def test_forms_of_redirects_and_tee(job: Job, options: str, kept: str, untouched: str, prefixed: str) -> None:
    out, err = run(job, *TWO, "--log-dir", "logs", "--rdzv-id", "j1", *options.split(), job.script(HELLO))
    names = {"o": "stdout", "e": "stderr"}
    expected = {f"j1/attempt_0/{mark[0]}/{names[mark[1]]}.log": f"{lines(mark)[0]}\n" for mark in kept.split()}
    assert files_in(job.path / "logs") == expected
    for stream, shown in (("o", out), ("e", err)):
        marks = [" ".join(mark for mark in which.split() if mark[1] == stream) for which in (untouched, prefixed)]
        assert sorted(shown.decode().splitlines()) == sorted(lines(marks[0]) + lines(marks[1], "[default{}]:"))


SAME = [
    "-r 0:1 -t 1:3 --local-ranks-filter 1",
    "-t 3 --duplicate-stdout-filters ut,zz --duplicate-stderr-filters err,,,err",
]


@pytest.mark.parametrize("options", SAME, ids=["ranks", "filters"])
def test_torchrun_shows_and_keeps_the_same(job: Job, options: str) -> None:
    words = [*TWO, "--rdzv-id", "j1", *options.split()]
    script = job.script(HELLO)
    ours = run(job, *words, "--log-dir", "ours", script)
    theirs = subprocess.run(
        [Path(sys.executable).parent / "torchrun", *words, "--log-dir", "theirs", script],
        cwd=job.path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )

    def told(shown: bytes) -> list[bytes]:
        return sorted(line for line in shown.splitlines() if re.search(rb"(out|err) [01]$", line))

    assert told(ours[0]) == told(theirs.stdout)
    assert told(ours[1]) == told(theirs.stderr)
    kept = [
        {re.sub(r"^[^/]*/", "", path): sorted(text.splitlines()) for path, text in files_in(job.path / name).items()}
        for name in ("ours", "theirs")
    ]
    assert kept[0] == kept[1]
    assert kept[0]


def test_a_restart_gets_new_files(job: Job) -> None:
    script = job.script("print('round', restart); sys.exit(5 if restart == 0 else 0)")
    out, err = run(job, "--max-restarts", "1", "--log-dir", "logs", "--rdzv-id", "j1", "-t", "1", script)
    assert out == b"[default0]:round 0\n[default0]:round 1\n"
    assert files_in(job.path / "logs") == {
        "j1/attempt_0/0/stdout.log": "round 0\n",
        "j1/attempt_1/0/stdout.log": "round 1\n",
    }
    assert b"restart 1 of 1" in err


@pytest.mark.parametrize("option", ["-r", "-t"])
def test_matching_lines_go_to_one_file_of_all_ranks(job: Job, option: str) -> None:
    script = job.script(
        "print('step'); print('loss', rank); print('lr, loss'); print('a,b', end='')\n"
        "print('Error', rank, file=sys.stderr); print('loss', file=sys.stderr)"
    )
    words = ("--log-dir", "logs", "--rdzv-id", "j1", "--duplicate-stdout-filters", "loss,a,,b")
    run(job, *TWO, option, "3", *words, "--duplicate-stderr-filters", "Error", script)
    kept = files_in(job.path / "logs")
    out = kept["j1/attempt_0/filtered_stdout.log"].splitlines()
    for rank in (0, 1):
        mine = [line for line in out if line.startswith(f"[default{rank}]:")]
        assert mine == [f"[default{rank}]:{text}" for text in (f"loss {rank}", "lr, loss", "a,b")]
    assert len(out) == 6
    err = kept["j1/attempt_0/filtered_stderr.log"].splitlines()
    assert sorted(err) == ["[default0]:Error 0", "[default1]:Error 1"]


def test_prefix_from_a_template(job: Job) -> None:
    template = "${role_name}/${local_rank}/${rank}/${host}/${other}/$5: "
    words = ("-t", "1", "--role", "trainer", "--log-dir", "logs", job.script("print('hello')"))
    out, _ = run(job, *words, TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=template)
    assert out.decode() == f"trainer/0/0/{socket.gethostname()}/${{other}}/$5: hello\n"
    out, _ = run(job, *words, TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="")
    assert out == b"hello\n"


def test_two_agents_of_one_job_on_one_host(job: Job) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    words = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "j1", *TWO)
    logs = ("-t", "3", "--log-dir", "logs", "--duplicate-stdout-filters", "out", job.script(HELLO))
    agents = [
        start(job, *words, *logs, TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=text) for text in ("${rank}>", "${rank}>")
    ]
    shown = b"".join(agent.communicate(timeout=DEADLINE)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0]
    assert sorted(shown.decode().splitlines()) == [f"{rank}>out {rank}" for rank in range(4)]
    kept = files_in(job.path / "logs")
    for rank in range(4):
        assert kept.pop(f"j1/attempt_0/{rank}/stdout.log") == f"out {rank}\n"
        assert kept.pop(f"j1/attempt_0/{rank}/stderr.log") == f"err {rank}\n"
    assert sorted(kept) == ["j1/attempt_0/filtered_stdout.log", "j1/attempt_0/filtered_stdout_1.log"]
    assert sorted("".join(kept.values()).splitlines()) == [f"{rank}>out {rank}" for rank in range(4)]


def test_on_several_nodes_the_prefix_names_host_and_rank(job: Job) -> None:
    port = str(free_port())
    words = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port, "-t", "1", "--role", "trainer")
    script = job.script("print('hello')")
    agents = [start(job, *words, "--node-rank", str(node), "--log-dir", "logs", script) for node in (0, 1)]
    shown = [agent.communicate(timeout=DEADLINE)[0].decode() for agent in agents]
    assert shown == [f"{socket.gethostname()} rank {rank} [trainer0]:hello\n" for rank in (0, 1)]


def test_without_files_no_directory_is_left(job: Job) -> None:
    words = ("--log-dir", "/dev/null", "-t", "3", "-r", "3")
    out, err = run(job, *TWO, *words, job.script(HELLO))
    assert (sorted(out.splitlines()), sorted(err.splitlines())) == ([b"out 0", b"out 1"], [b"err 0", b"err 1"])
    _, err = run(job, *words, job.script("raise ValueError('boom')"), status=1)
    assert "ValueError: boom" in report_of(err)
    assert Path("/dev/null").is_char_device()


def test_the_last_line_says_where_the_output_is(job: Job) -> None:
    """But not if the user only chose a place for files."""
    told = {}
    for options in ("-r 3", "-r 3 --log-dir logs --rdzv-id j1", "--log-dir logs", "-t 0:1"):
        done = job.run(*options.split(), job.script("print(1)"))
        assert done.returncode == 0
        told[options] = done.stderr.splitlines()[-1].removeprefix("elastic-run: ")
    assert told["-r 3 --log-dir logs --rdzv-id j1"] == f"output of the workers: {job.path}/logs/j1"
    assert told["--log-dir logs"] == "done: 1 worker succeeded"
    for options in ("-r 3", "-t 0:1"):
        folder = Path(told[options].removeprefix("output of the workers: "))
        assert (folder / "attempt_0/0/stdout.log").read_text() == "1\n"
        shutil.rmtree(folder.parent)


def test_files_without_a_directory_are_mentioned(job: Job) -> None:
    _, err = run(job, "-r", "3", job.script(f"{LAST_WORDS}print('kept'); sys.exit(3)"), status=3)
    (found,) = re.findall(r"^logs      : (.*)$", report_of(err), re.MULTILINE)
    kept = files_in(Path(found))
    assert kept == {"attempt_0/0/stdout.log": "kept\n", "attempt_0/0/stderr.log": "last words\n"}
    for path in Path(found).rglob("*.log"):
        path.unlink()


# ---- every byte to the file, every line to the console

ODD = [
    pytest.param(b"one\ntwo", b"#one\n#two\n", id="unfinished"),
    pytest.param(b"\r 1%\r 50%\r100%\nnext\n\r7", b"#100%\n#next\n#7\n", id="redrawn"),
    pytest.param(b"\xff\xfe\n\xc3\n(\n\0\n", b"#\xff\xfe\n#\xc3\n#(\n#\0\n", id="not-utf8"),
    pytest.param(b"x" * 10_000_000 + b"\n\nlast\n", b"#" + b"x" * 10_000_000 + b"\n#\n#last\n", id="10-mb"),
    pytest.param(b"\x1b[31mred\x1b[0m\r\n", b"#\x1b[31mred\x1b[0m\r\n", id="colours"),
]


@pytest.mark.parametrize(("written", "shown"), ODD)
def test_odd_output(job: Job, written: bytes, shown: bytes) -> None:
    (job.path / "data").write_bytes(written)
    words = ("--no-python", "--log-dir", "logs", "--rdzv-id", "j1", "-t", "3")
    script = "cat data; cat data >&2"
    out, err = run(job, *words, "sh", "-c", script, TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="#")
    assert out == shown
    assert err == shown
    for stream in ("stdout", "stderr"):
        assert (job.path / f"logs/j1/attempt_0/0/{stream}.log").read_bytes() == written


def test_redraws_on_a_terminal_are_one_live_line(job: Job) -> None:
    script = job.script(
        "def write(text): os.write(2, text)\n"
        "if rank == 0:\n"
        "    for percent in range(1, 100): write(b'\\r%d%%' % percent)\n"
        "    wait_for('line'); write(b'\\r100%\\nthe end\\n')\n"
        "else:\n"
        "    wait_for('row'); write(b'a line\\n')\n"
    )
    (job.path / "marks").touch()
    terminal = Terminal(job, *TWO, "-t", "3", "--log-dir", "logs", "--rdzv-id", "j1", script)
    terminal.wait_for(b"99%")
    assert screen(terminal.seen) == [b"[default0]:99%"]
    job.mark("row")
    terminal.wait_for(b"a line\n")
    job.mark("line")
    rows = terminal.finish()
    assert rows == [b"[default1]:a line", b"[default0]:100%", b"[default0]:the end", b""]
    kept = b"".join(b"\r%d%%" % percent for percent in range(1, 100)) + b"\r100%\nthe end\n"
    assert (job.path / "logs/j1/attempt_0/0/stderr.log").read_bytes() == kept


def test_lines_of_the_launcher_are_above_the_live_line_and_split_no_line(job: Job) -> None:
    script = job.script(
        "if restart == 0:\n"
        "    if rank == 0:\n"
        "        signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b'\\r50%\\n'), sys.exit(0)))\n"
        "        os.write(2, b'\\r10%'); os.write(1, b'half '); mark('written'); wait()\n"
        "    wait_for('row'); sys.exit(9)\n"
        "if rank == 0: os.write(2, b'no end')\n"
    )
    (job.path / "marks").touch()
    terminal = Terminal(job, *TWO, "--max-restarts", "1", "-t", "3", "--log-dir", "logs", script)
    terminal.wait_for(b"10%")
    job.wait_for("0.0 written")
    job.mark("row")
    rows = terminal.finish()
    own = [row for row in rows if row.startswith(b"elastic-run: ")]
    assert any(b"restart 1 of 1" in row for row in own)
    others = [row for row in rows if row not in own]
    assert sorted(others) == [b"", b"[default0]:50%", b"[default0]:half ", b"[default0]:no end"]


def test_the_report_is_below_what_was_a_live_line(job: Job) -> None:
    terminal = Terminal(job, "-t", "3", "--log-dir", "logs", job.script("os.write(2, b'\\r10%\\r20%'); os._exit(3)"))
    rows = terminal.finish(3)
    assert rows[:3] == [b"[default0]:20%", b"=" * 80, f"{job.path}/train.py FAILED".encode()]


@pytest.mark.parametrize("options", [(), ("-t", "3")], ids=["none", "tee"])
@pytest.mark.parametrize("text", ["sys.exit(3)", "os.kill(os.getpid(), 9)"], ids=["exit", "kill"])
def test_the_report_begins_on_a_new_line(job: Job, options: tuple[str, ...], text: str) -> None:
    script = job.script(f"os.write(2, b'no end'); {text}")
    _, err = run(job, *options, "--log-dir", "logs", script, status=3 if "exit" in text else 137)
    before = b"[default0]:no end\n" if options else b"no end\n"
    assert err.startswith(before + b"=" * 80 + b"\n")


def test_a_good_job_adds_no_byte(job: Job) -> None:
    out, err = run(job, job.script("os.write(1, b'no end\\r'); os.write(2, b'\\xffno\\rend')"))
    assert (out, err) == (b"no end\r", b"\xffno\rend")


COLOURS = "print(*(os.isatty(fd) for fd in (1, 2)), os.get_terminal_size(2).columns, '\\x1b[31mred\\x1b[0m')"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ((), b"True True 100 \x1b[31mred\x1b[0m"),
        (("-t", "3"), b"[default0]:True True 89 \x1b[31mred\x1b[0m"),
    ],
    ids=["none", "tee"],
)
def test_colours_on_a_terminal(job: Job, options: tuple[str, ...], shown: bytes) -> None:
    terminal = Terminal(job, *options, "--log-dir", "logs", job.script(COLOURS))
    terminal.finish()
    assert terminal.seen.replace(b"\r\n", b"\n") == shown + b"\n"
    assert set(files_in(job.path / "logs").values()) == ({"True True 89 red\n", ""} if options else set())


def test_ranks_that_share_a_terminal_see_one_and_lose_nothing(job: Job) -> None:
    terminal = Terminal(job, *TWO, job.script("for i in range(100): print(rank, os.isatty(1))"))
    terminal.finish()
    assert sorted(terminal.seen.replace(b"\r", b"")) == sorted((b"0 True\n" + b"1 True\n") * 100)


def test_what_a_rank_writes_without_a_line_end_is_shown_although_others_share_the_console(job: Job) -> None:
    script = job.script("os.write(1, b'asking ') if rank else 0\nwait_for('go')\nprint('answered' if rank else '')")
    process = start(job, *TWO, script)
    assert process.stdout
    seen = b""
    while seen != b"asking ":
        assert select.select([process.stdout], [], [], DEADLINE)[0]
        seen += os.read(process.stdout.fileno(), 100)
    job.mark("go")
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert b"answered\n" in out


def test_no_terminal_if_the_console_is_not_one(job: Job) -> None:
    script = job.script("print(os.isatty(1), os.isatty(2))")
    assert run(job, "-t", "3", "--log-dir", "logs", script)[0] == b"[default0]:False False\n"
    assert run(job, script)[0] == b"False False\n"


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_functions_have_logs_too(job: Job, method: str) -> None:
    program = job.path / "program.py"
    program.write_text(
        "import os\n"
        "from elastic_launch import LaunchConfig, elastic_launch\n"
        "from elastic_launch.multiprocessing import DefaultLogsSpecs, Std\n"
        "def hello(): rank = int(os.environ['RANK']); print('out', rank); os.write(2, b'err %d' % rank); return rank\n"
        "if __name__ == '__main__':\n"
        "    specs = DefaultLogsSpecs('logs', tee=Std.ALL)\n"
        f"    config = LaunchConfig(1, 1, 2, specs, 'j1', rdzv_backend='static', start_method='{method}')\n"
        "    config.verbosity = 0\n"
        "    print(elastic_launch(config, hello)())\n"
    )
    done = subprocess.run(
        [sys.executable, program],
        cwd=job.path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=DEADLINE,
    )
    assert sorted(done.stdout.splitlines()) == [b"[default_role0]:out 0", b"[default_role1]:out 1", b"{0: 0, 1: 1}"]
    assert sorted(done.stderr.splitlines()) == [b"[default_role0]:err 0", b"[default_role1]:err 1"]
    assert files_in(job.path / "logs") == {
        f"j1/attempt_0/{rank}/{name}.log": text
        for rank in (0, 1)
        for name, text in (("stdout", f"out {rank}\n"), ("stderr", f"err {rank}"))
    }


# ---- without -r and -t


def test_streams_are_inherited(job: Job) -> None:
    text = "mark(' '.join('%d:%d' % (s.st_dev, s.st_ino) for s in map(os.fstat, range(3)))); "
    script = job.script(text + "print(sys.stdin.read()); os.write(2, b'a' * 200_000 + b'z')")
    reading, writing = os.pipe()
    os.write(writing, b"typed")
    os.close(writing)
    for options in ((), ("-t", "3", "--log-dir", "logs")):
        (job.path / "marks").unlink(missing_ok=True)
        if options:
            reading, writing = os.pipe()
            os.write(writing, b"typed")
            os.close(writing)
        process = start(job, *options, script, stdin=reading)
        assert process.stdout
        own = [f"{status.st_dev}:{status.st_ino}" for status in map(os.fstat, (reading, process.stdout.fileno()))]
        os.close(reading)
        out, err = process.communicate(timeout=DEADLINE)
        theirs = job.marks()[0].split()[1:]
        assert theirs[0] == own[0]
        assert (theirs[1] == own[1]) is not bool(options)
        assert out == (b"[default0]:typed\n" if options else b"typed\n")
        assert err == (b"[default0]:" if options else b"") + b"a" * 200_000 + (b"z\n" if options else b"z")


# ---- consoles that are slow, closed or full


def pids_of(job: Job) -> dict[str, int]:
    return {rank: int(pid) for rank, pid in (mark.split(".0 ") for mark in job.marks())}


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_console_that_nobody_reads_does_not_hold_up_supervision(job: Job, kind: str) -> None:
    script = job.script(
        "mark(os.getpid())\n"
        "while restart == 0 and rank == 0: os.write(1, b'x' * 1000 + b'\\n'); os.write(2, b'y' * 1000 + b'\\n')\n"
        "wait()"
    )
    words = (*TWO, "--max-restarts", "1", "-t", "3", "--log-dir", "logs", "--rdzv-id", "j1", script)
    if kind == "terminal":
        terminal = Terminal(job, *words)
        process = terminal.process
    else:
        process = start(job, *words)
    wait_until(lambda: len(job.marks()) == 2)
    first = pids_of(job)
    kept = job.path / "logs/j1/attempt_0/0/stderr.log"

    def is_held_up() -> bool:
        size = kept.stat().st_size if kept.exists() else 0
        select.select([], [], [], 0.1)  # the time that is measured
        return BLOCK // 2 < size == kept.stat().st_size

    wait_until(is_held_up, "a worker that is held up")
    assert kept.stat().st_size < 4 * BLOCK
    os.kill(first["1"], signal.SIGKILL)
    wait_until(lambda: len(job.marks()) == 4, "a restart")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: not psutil.Process(process.pid).children(recursive=True), "the workers' end")
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 143
    assert time.monotonic() - begin < SOON
    if kind == "terminal":
        os.close(terminal.fd)


def test_a_second_signal_ends_the_wait_for_a_reader(job: Job) -> None:
    script = job.script("signal.signal(signal.SIGTERM, signal.SIG_IGN); mark(); os.write(1, b'x' * 500_000); wait()")
    process = start(job, "-t", "3", "--log-dir", "logs", "--rdzv-id", "j1", script)
    kept = job.path / "logs/j1/attempt_0/0/stdout.log"
    wait_until(lambda: kept.exists() and kept.stat().st_size == 500_000)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stderr
    assert b"SIGTERM received: stopping" in process.stderr.readline()
    select.select([], [], [], 2 * SAME_SIGNAL)  # sooner, the second would count as the first one, delivered twice
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 143
    assert time.monotonic() - begin < SOON
    assert b"stdout accepts no more output: " in process.stderr.read()


def test_a_console_that_is_closed_does_not_end_the_job(job: Job) -> None:
    script = job.script("for i in range(20_000): print('line', i)\nmark('end')")
    launcher = f"{sys.executable} -m elastic_launch -q -t 3 --log-dir logs --rdzv-id j1 {script}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {launcher} | head -1"],
        cwd=job.path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"[default0]:line 0\n", b"")
    assert job.marks() == ["0.0 end"]
    kept = (job.path / "logs/j1/attempt_0/0/stdout.log").read_text()
    assert kept == "".join(f"line {number}\n" for number in range(20_000))


def test_a_terminal_that_is_closed_ends_the_job_only_by_its_signal(job: Job) -> None:
    script = job.script("print('begin')\nmark('up')\nwait_for('go')\nfor i in range(2000): print(i)\nmark('end')")
    terminal = Terminal(job, "-t", "3", "--log-dir", "logs", "--rdzv-id", "j1", script)
    terminal.wait_for(b"begin")
    os.close(terminal.fd)
    job.mark("go")
    assert terminal.process.wait(DEADLINE) == 0
    assert (job.path / "logs/j1/attempt_0/0/stdout.log").read_text().endswith("\n1999\n")


def test_a_full_console_is_reported_once(job: Job) -> None:
    script = job.script("for i in range(2000): print(i); print('err', i, file=sys.stderr)")
    with open("/dev/full", "wb") as full:
        _, err = run(job, *TWO, "-t", "3", "--log-dir", "logs", "--rdzv-id", "j1", script, stdout=full)
        own = [line for line in err.splitlines() if b"err" not in line.split(b":")[-1][:3]]
        assert len(own) == 1
        assert own[0].startswith(b"elastic-run: stdout: no space left on device: the rest of this output is not shown")
        out, _ = run(job, *TWO, "-t", "3", "--log-dir", "logs", "--rdzv-id", "j1", script, stderr=full)
        assert len(out.splitlines()) == 4000
        run(job, script, stderr=full, stdout=subprocess.DEVNULL)
    kept = (job.path / "logs/j1/attempt_0/1/stderr.log").read_text()
    assert kept == "".join(f"err {number}\n" for number in range(2000))


# ---- disks


def test_a_full_disk_loses_the_logs_only(job: Job, small_disk: Path) -> None:
    text = "for i in range(10_000): print('line', i)\nprint(restart, file=sys.stderr); sys.exit(0 if restart else 7)"
    words = ("--max-restarts", "1", "--log-dir", str(small_disk), "--rdzv-id", "j1")
    out, err = run(job, *TWO, *words, "-t", "3", job.script(text))
    shown: dict[bytes, list[bytes]] = {b"0": [], b"1": []}
    for line in out.splitlines():
        shown[line[8:9]].append(line)
    for rank, found in shown.items():
        whole = [b"[default%s]:line %d" % (rank, number) for number in range(10_000)]
        assert whole == found[-10_000:]
    told = [line for line in err.splitlines() if b"no space left on device" in line]
    assert len(told) == 1
    assert told[0].startswith(f"elastic-run: log {small_disk}/j1/attempt_0/".encode())
    kept = (small_disk / "j1/attempt_0/0/stdout.log").read_text()
    assert "".join(f"line {number}\n" for number in range(10_000)).startswith(kept)


def test_a_log_directory_that_is_removed_meanwhile(job: Job) -> None:
    text = (
        "import glob, shutil\n"
        "while not any('\"started\"' in open(file).read() for file in glob.glob('logs/j1/events.jsonl')):\n"
        "    time.sleep(0.01)\n"  # or the agent would write that event, and its file be back, in the middle
        "shutil.rmtree('logs'); print('out', restart); print('last words', file=sys.stderr)\n"
        "raise ValueError('boom')"
    )
    out, err = run(
        job, "--max-restarts", "1", "-t", "3", "--log-dir", "logs", "--rdzv-id", "j1", job.script(text), status=1
    )
    assert out == b"[default0]:out 0\n[default0]:out 1\n"
    assert "ValueError: boom" in report_of(err)
    assert err.count(b"[default0]:last words\n") == 2


def test_a_log_that_is_truncated_meanwhile_has_no_hole(job: Job) -> None:
    log = "logs/j1/attempt_0/0/stdout.log"
    script = job.script(
        f"print('x' * 1000)\nwhile os.stat('{log}').st_size < 1001: time.sleep(0.01)\n"
        f"os.truncate('{log}', 0); print('after')"
    )
    run(job, "-r", "1", "--log-dir", "logs", "--rdzv-id", "j1", script)
    assert (job.path / log).read_text() == "after\n"


# ---- what workers leave behind


@pytest.mark.parametrize("own_session", [False, True])
@pytest.mark.parametrize("option", ["-t", "-r"])
def test_a_grandchild_that_keeps_the_pipe_does_not_hang_the_end(job: Job, own_session: bool, option: str) -> None:
    text = (
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=%r); print('end', flush=True); mark(child.pid)"
    )
    begin = time.monotonic()
    out, _ = run(job, option, "3", "--log-dir", "logs", "--rdzv-id", "j1", job.script(text % own_session))
    assert time.monotonic() - begin < SOON
    assert out == (b"[default0]:end\n" if option == "-t" else b"")
    assert (job.path / "logs/j1/attempt_0/0/stdout.log").read_text() == "end\n"
    assert not psutil.pid_exists(int(job.marks()[0].split()[1]))


def test_what_a_grandchild_writes_when_it_is_stopped_is_shown(job: Job) -> None:
    text = (
        "child = \"trap 'echo bye; exit' TERM; echo up; while :; do sleep 0.01; done\"\n"
        "subprocess.Popen(['sh', '-c', child], start_new_session=True); os.write(1, b'end\\n')\n"
        "while 'up' not in open(f'logs/j1/attempt_0/{rank}/stdout.log').read(): time.sleep(0.01)\n"
        "sys.exit(3)\n"  # after a success, a child has only a second
    )
    out, _ = run(job, "-t", "1", "--log-dir", "logs", "--rdzv-id", "j1", job.script(text), status=3)
    assert sorted(out.splitlines()) == [b"[default0]:bye", b"[default0]:end", b"[default0]:up"]


def test_idle_is_idle_also_with_output_in_between(job: Job) -> None:
    script = job.script("print('up', flush=True); wait()")
    terminal = Terminal(job, *TWO, "-t", "3", "--log-dir", "logs", script)
    for rank in (0, 1):
        terminal.wait_for(b"[default%d]:up\n" % rank)

    def wakes() -> int:
        return int(psutil.Process(terminal.process.pid).num_ctx_switches().voluntary)

    def is_quiet() -> bool:
        before = wakes()
        select.select([], [], [], 0.5)  # the time that is measured
        return wakes() == before

    wait_until(is_quiet, "half a second in which the agent does not wake")
    terminal.process.send_signal(signal.SIGTERM)
    terminal.finish(143)


# ---- the tail of stderr in the report

DEATHS = [
    pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", 139, "SIGSEGV", id="segfault"),
    pytest.param("sys.exit(3)", 3, "exit code 3", id="exit"),
    pytest.param("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL", id="kill"),
]
WAYS = ["", "-t 3", "-r 3", "-t 0:1", "-r 1 --local-ranks-filter 7", "-t 3 --local-ranks-filter 7"]


@pytest.mark.parametrize("options", WAYS, ids=[way or "none" for way in WAYS])
@pytest.mark.parametrize(("text", "status", "how"), DEATHS)
def test_the_report_shows_the_last_lines_of_stderr(job: Job, options: str, text: str, status: int, how: str) -> None:
    _, err = run(job, *options.split(), "--log-dir", "logs", job.script(LAST_WORDS + text), status=status)
    report = report_of(err)
    assert how in report
    assert "\n  stderr  : its last lines\n    last words\n" in report
    shown = err.decode()[: err.decode().index("=" * 80)]
    expected = {"": "last words\n", "-t 3": "[default0]:last words\n", "-t 0:1": "last words\n"}
    assert shown.startswith(expected.get(options, ""))
    assert ("last words" in shown) is (options in expected)


@pytest.mark.parametrize("options", [(), ("-t", "3"), ("-r", "3")], ids=["none", "tee", "redirects"])
@pytest.mark.parametrize(("end", "status"), [("exit 3", 3), ("kill -SEGV $$", 139)], ids=["exit", "segfault"])
def test_the_report_shows_the_last_lines_of_a_program(
    job: Job, options: tuple[str, ...], end: str, status: int
) -> None:
    words = ("--no-python", *options, "--log-dir", "logs", "sh", "-c")
    _, err = run(job, *words, f"echo first; printf 'last\\033[1m words' >&2; {end}", status=status)
    assert "\n  stderr  : its last lines\n    last words\n---" in report_of(err)


def test_the_report_shows_twenty_lines(job: Job) -> None:
    _, err = run(
        job,
        "-r",
        "3",
        "--log-dir",
        "logs",
        job.script("os.write(2, b''.join(b'%d\\n' % i for i in range(99))); os._exit(3)"),
        status=3,
    )
    shown = re.search(r"its last lines\n((?:    \d+\n)+)---", report_of(err))
    assert shown
    assert shown[1].split() == [str(number) for number in range(79, 99)]


def test_the_report_shows_the_end_of_a_huge_line(job: Job) -> None:
    _, err = run(
        job,
        "-r",
        "3",
        "--log-dir",
        "logs",
        job.script("os.write(2, b'x' * 1_000_000 + b'the end'); os._exit(3)"),
        status=3,
    )
    report = report_of(err)
    assert "the end\n" in report
    assert len(report) < 12_000


def test_the_report_has_the_tail_even_if_the_console_accepts_nothing(job: Job) -> None:
    text = "os.write(1, b'x' * 500_000); os.write(2, b'y' * 50_000 + b'\\nlast words'); os.kill(os.getpid(), 11)"
    process = start(job, "-t", "1", "-r", "2", "--log-dir", "logs", "--rdzv-id", "j1", job.script(text))
    assert process.stderr
    kept = job.path / "logs/j1/attempt_0/0/stderr.log"
    wait_until(lambda: kept.exists() and b"last words" in kept.read_bytes())
    wait_until(lambda: not psutil.Process(process.pid).children(), "the end of all processes")
    process.send_signal(signal.SIGTERM)
    report = report_of(process.stderr.read())
    assert process.wait(DEADLINE) == 139
    assert "\n    last words\n" in report


def test_an_exception_is_not_shown_twice(job: Job) -> None:
    _, err = run(job, "-r", "3", "--log-dir", "logs", job.script("raise ValueError('boom')"), status=1)
    assert "its last lines" not in report_of(err)
    assert "ValueError: boom" in report_of(err)


# ---- plug-ins


@pytest.fixture
def plugins(job: Job) -> Callable[..., dict[str, Any]]:
    """Installs a package that offers ``LogsSpecs``. Returns the variables with which a launcher finds it."""

    def install(code: str) -> dict[str, Any]:
        entry_points = "[torchrun.logs_specs]\nmine = log_plugin:Mine\ngone = log_plugin:Gone\n"
        site = install_package(job.path / "site", entry_points, log_plugin=code)
        return {"PYTHONPATH": os.pathsep.join([site, os.environ.get("PYTHONPATH", "")])}

    return install


OURS = """
import os
from elastic_launch.config import LogsDest, LogsSpecs
class Mine(LogsSpecs):
    @property
    def root_log_dir(self): return self._root_log_dir
    def reify(self, envs):
        dest = LogsDest()
        for local_rank, environ in envs.items():
            name = f"{self._root_log_dir}-{environ['TORCHELASTIC_RESTART_COUNT']}-{environ['RANK']}"
            dest.stdouts[local_rank] = dest.tee_stdouts[local_rank] = name
            dest.stderrs[local_rank] = ""
            dest.error_files[local_rank] = f"{name}.json"
        return dest
"""


def test_a_plugin_of_ours(job: Job, plugins: Callable[..., dict[str, Any]]) -> None:
    script = job.script(f"mark('up'); {HELLO}; sys.exit(0 if restart else 3)")
    words = ("--max-restarts", "1", "--log-dir", str(job.path / "x"), "--logs-specs", "mine")
    out, err = run(job, *words, script, **plugins(OURS))
    assert out == b"[default0]:out 0\n" * 2
    assert err.splitlines()[0] == b"err 0"
    assert [(job.path / f"x-{attempt}-0").read_text() for attempt in (0, 1)] == ["out 0\n"] * 2


def test_a_plugin_that_derives_from_our_default(job: Job, plugins: Callable[..., dict[str, Any]]) -> None:
    code = (
        "from elastic_launch.multiprocessing import DefaultLogsSpecs, Std\n"
        "class Mine(DefaultLogsSpecs):\n"
        "    def reify(self, envs):\n"
        "        dest = super().reify(envs)\n"
        "        dest.tee_stderrs.clear()\n"
        "        return dest\n"
    )
    words = ("-t", "3", "--log-dir", "logs", "--rdzv-id", "j1", "--logs-specs", "mine")
    out, err = run(job, *words, job.script(HELLO), **plugins(code))
    assert (out, err) == (b"[default0]:out 0\n", b"")
    assert len(files_in(job.path / "logs")) == 2


def test_a_plugin_of_torchs(job: Job, plugins: Callable[..., dict[str, Any]]) -> None:
    code = (
        "from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs\nclass Mine(DefaultLogsSpecs): pass\n"
    )
    words = ("-t", "0:1", "-r", "2", "--log-dir", "logs", "--rdzv-id", "j1", "--logs-specs", "mine")
    out, err = run(job, *words, job.script(f"{HELLO}\nraise ValueError('boom')"), status=1, **plugins(code))
    assert out == b"[default0]:out 0\n"
    assert "ValueError: boom" in report_of(err)
    (path,) = (job.path / "logs").glob("j1_*/attempt_0/0/stderr.log")
    assert path.read_text().startswith("err 0\n")


def test_a_plugin_that_names_the_null_device(
    job: Job, plugins: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = job.script("print('out'); print('err', file=sys.stderr); print(os.environ['TORCHELASTIC_ERROR_FILE'])")
    words = ("--log-dir", "x", "--logs-specs", "mine", script)
    assert run(job, *words, **plugins(OURS.replace("] = name", '] = "/dev/null"'))) == (b"", b"err\n")

    class Nowhere(DefaultLogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            return LogsDest(error_files=dict.fromkeys(envs, os.devnull))

    files = JobFiles(Nowhere(str(job.path / "y")), "j1", "")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", pytest.fail)
        assert files.prepare({0: {}}).error_files == {}, (
            "a worker with the right to do so would replace the device by a file"
        )


def test_a_plugin_that_names_what_is_not_a_file(job: Job, plugins: Callable[..., dict[str, Any]]) -> None:
    os.mkfifo(job.path / "fifo")
    words = ("--log-dir", "x", "--logs-specs", "mine", job.script("print('out')"))
    out, err = run(job, *words, **plugins(OURS.replace("] = name", "] = 'fifo'")))
    assert out == b"[default0]:out\n"
    assert err.startswith(b"elastic-run: log fifo: no such device or address: ")


BROKEN = [
    pytest.param("raise RuntimeError('boom')", "log_plugin:Mine of plugins failed: RuntimeError: boom", id="module"),
    pytest.param(
        "class Mine:\n    def __init__(self, **given): raise RuntimeError('boom')",
        "log_plugin:Mine of plugins failed: RuntimeError: boom",
        id="init",
    ),
    pytest.param(
        OURS.replace("dest = LogsDest()", "raise RuntimeError('boom')"), "reify(): RuntimeError: boom", id="reify"
    ),
    pytest.param(OURS.replace("return dest", "return None"), "Mine.reify(): AttributeError: ", id="none"),
]


@pytest.mark.parametrize(("code", "words"), BROKEN)
def test_a_plugin_that_is_broken_is_named(
    job: Job, plugins: Callable[..., dict[str, Any]], code: str, words: str
) -> None:
    process = start(job, "--logs-specs", "mine", "--log-dir", "x", job.script("mark()"), **plugins(code))
    err = process.communicate(timeout=DEADLINE)[1].decode()
    assert words in err
    assert "defect of the launcher" not in err
    assert len(err.splitlines()) == 1
    assert process.returncode not in (0, 1)
    assert job.marks() == []


def test_a_missing_plugin_is_named(job: Job, plugins: Callable[..., dict[str, Any]]) -> None:
    _, err = run(job, "--logs-specs", "other", job.script("mark()"), status=2, **plugins(OURS))
    assert "--logs-specs=other: unknown; choose one of default, gone, mine, or install" in err.decode()
