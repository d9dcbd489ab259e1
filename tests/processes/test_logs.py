"""The log pump with real workers, pipes and terminals: every byte in the files, every line whole on the console."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_launch.core.lines import end_as_text, last_state, last_states, matching, without_escapes
from elastic_launch.errors import UnavailableError
from elastic_launch.logs import pump as pump_module
from elastic_launch.logs import source as source_module
from elastic_launch.logs.pump import BATCH_DELAY, LogPump
from elastic_launch.logs.source import Duplicates, Route
from tests.support.consoles import Console, made_of, raw_terminal, screen, standing_in
from tests.support.waiting import DEADLINE, SOON

PYTHON = [sys.executable, "-I", "-S", "-u", "-c"]


@pytest.fixture
def console() -> Iterator[Console]:
    """A pipe."""
    with made_of(os.pipe()) as console:
        yield console


@pytest.fixture
def terminal() -> Iterator[Console]:
    """A terminal."""
    with made_of(raw_terminal()) as console:
        yield console


@pytest.fixture
def pump(request: pytest.FixtureRequest) -> Iterator[LogPump]:
    """A pump on the console or terminal of the test."""
    name = "terminal" if "terminal" in request.fixturenames else "console"
    with new_pump(request.getfixturevalue(name)) as pump:
        yield pump


@contextlib.contextmanager
def new_pump(console: Console, log: Callable[[str], None] = pytest.fail) -> Iterator[LogPump]:
    """A pump on a console. It opens pipes and terminals again, so they need not stay the standard streams."""
    with standing_in(console.writing, console.writing):
        pump = LogPump(log)
    try:
        yield pump
    finally:
        pump.close()
        pump.close()


def turn(pump: LogPump, until: Callable[[], object]) -> int:
    """Be the agent's loop until a condition holds. Returns how often it woke for the pump."""
    end = time.monotonic() + DEADLINE
    wakes = 0
    while not until():
        assert time.monotonic() < end, "the condition did not become true"
        poller = select.poll()
        for fd, mask in pump.descriptors():
            poller.register(fd, mask)
        at = pump.deadline()
        ready = {fd for fd, _ in poller.poll(20 if at is None else max(0.0, at - time.monotonic()) * 1000)}
        wakes += bool(ready)
        pump.take(ready)
    return wakes


def spawn(code: str, *ends: int) -> subprocess.Popen[bytes]:
    """Start a worker that runs Python code, with these ends as stdout and stderr."""
    return subprocess.Popen([*PYTHON, code], stdout=ends[0], stderr=ends[-1])


def run(pump: LogPump, routes: Sequence[Route], codes: Sequence[str], console: Console | None = None) -> None:
    """Run a whole round. Each code is a worker, by local rank."""
    ends = pump.open(routes)
    workers = []
    for rank, code in enumerate(codes):
        fds = {stream: fd for (of, stream), fd in ends.items() if of == rank}
        workers.append(subprocess.Popen([*PYTHON, code], stdout=fds.get(1), stderr=fds.get(2)))
    pump.close_workers_ends()
    turn(pump, reading(console, lambda: all(worker.poll() is not None for worker in workers)))
    pump.drain()
    turn(pump, reading(console, lambda: not pump.descriptors()))


def reading(console: Console | None, condition: Callable[[], object]) -> Callable[[], object]:
    """A condition that reads the console whenever it is checked."""
    return lambda: (console.read() if console else None, condition())[1]


def shows(console: Console, text: bytes) -> Callable[[], bool]:
    return lambda: text in console.read()


# ---- files and lines

BLOCKS = "import sys; sys.stdout.buffer.write(b''.join(b'%d\\n' % i for i in range({n}))); sys.stdout.flush()"
SINGLE = "import os\nfor i in range({n}): os.write(1, b'%d' % i); os.write(1, b'\\n')"


def test_lines_of_many_writers_are_whole_and_in_order(tmp_path: Path, console: Console, pump: LogPump) -> None:
    writers = [BLOCKS.format(n=100_000), SINGLE.format(n=5_000), BLOCKS.format(n=100_000), SINGLE.format(n=5_000)]
    routes = [Route(rank, 1, str(tmp_path / f"{rank}.log"), True, b"[default%d]:" % rank) for rank in range(4)]
    run(pump, routes, writers, console)
    shown: dict[int, list[bytes]] = {rank: [] for rank in range(4)}
    for line in console.read().splitlines(keepends=True):
        match = re.fullmatch(rb"\[default(\d)\]:(\d+\n)", line)
        assert match, line
        shown[int(match[1])].append(match[2])
    for rank, lines in shown.items():
        count = 100_000 if rank in (0, 2) else 5_000
        assert lines == [b"%d\n" % number for number in range(count)]
        assert (tmp_path / f"{rank}.log").read_bytes() == b"".join(lines)


ODD = [
    pytest.param(b"one\ntwo", b"#one\n#two\n", id="unfinished"),
    pytest.param(b"\n\n", b"#\n#\n", id="empty-lines"),
    pytest.param(b"a\0b\n\0", b"#a\0b\n#\0\n", id="nul"),
    pytest.param(b"\xff\xfe\n\xc3\n(\n", b"#\xff\xfe\n#\xc3\n#(\n", id="not-utf8"),
    pytest.param(b"dos\r\nend\r\n", b"#dos\r\n#end\r\n", id="crlf"),
    pytest.param(b"\x1b[31mred\x1b[0m\n", b"#\x1b[31mred\x1b[0m\n", id="colours"),
    pytest.param(b"", b"", id="nothing"),
]


@pytest.mark.parametrize(("written", "shown"), ODD)
@pytest.mark.parametrize("piece", [1, 1 << 20], ids=["bytes", "block"])
def test_odd_bytes(tmp_path: Path, console: Console, pump: LogPump, written: bytes, shown: bytes, piece: int) -> None:
    end = pump.open([Route(0, 1, str(tmp_path / "log"), True, b"#")])[0, 1]
    for at in range(0, len(written), piece):
        os.write(end, written[at : at + piece])
        pump.take({fd for fd, _ in pump.descriptors()})
    pump.drain()
    assert (tmp_path / "log").read_bytes() == written
    assert console.read() == shown


def test_a_line_of_10_mb_is_whole_among_others(tmp_path: Path, console: Console, pump: LogPump) -> None:
    long = "import sys; sys.stdout.buffer.write(b'x' * 10_000_000 + b'\\nlast'); sys.stdout.flush()"
    routes = [Route(rank, 1, str(tmp_path / f"{rank}.log"), True, b"[%d]:" % rank) for rank in (0, 1)]
    run(pump, routes, [long, SINGLE.format(n=2_000)], console)
    lines = console.read().split(b"\n")
    assert [line for line in lines if line.startswith(b"[0]:")] == [b"[0]:" + b"x" * 10_000_000, b"[0]:last"]
    assert [line for line in lines if line.startswith(b"[1]:")] == [b"[1]:%d" % number for number in range(2_000)]
    assert len(lines) == 2 + 2_000 + 1
    assert (tmp_path / "0.log").read_bytes() == b"x" * 10_000_000 + b"\nlast"


def test_a_line_without_an_end_does_not_fill_the_memory(
    tmp_path: Path, console: Console, pump: LogPump, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "MAX_LINE", 1 << 20)
    long = "import sys; sys.stdout.buffer.write(b'x' * 5_000_000); sys.stdout.flush()"
    run(pump, [Route(0, 1, str(tmp_path / "log"), True, b"#")], [long], console)
    pieces = console.read().splitlines()
    assert all(piece.startswith(b"#x") and len(piece) < 3 << 20 for piece in pieces)
    assert sum(len(piece) - 1 for piece in pieces) == (tmp_path / "log").stat().st_size == 5_000_000


def test_rounds_follow_each_other(tmp_path: Path, console: Console, pump: LogPump) -> None:
    for attempt in range(3):
        (tmp_path / f"{attempt}.log").write_bytes(b"from an earlier job")
        run(pump, [Route(0, 1, str(tmp_path / f"{attempt}.log"), True, b"#")], [f"print({attempt})"], console)
        assert (tmp_path / f"{attempt}.log").read_bytes() == b"%d\n" % attempt
    assert console.read() == b"#0\n#1\n#2\n"


def test_output_for_files_only_is_not_shown(tmp_path: Path, console: Console, pump: LogPump) -> None:
    run(pump, [Route(0, 1, str(tmp_path / "log"))], ["print('kept')"], console)
    assert console.read() == b""
    assert (tmp_path / "log").read_bytes() == b"kept\n"


def test_untouched_bytes_pass_at_once(console: Console, pump: LogPump) -> None:
    end = pump.open([Route(0, 2, show=True)])[0, 2]
    for piece in (b"Epoch 1 ", b"...", b"\r\xff\0", b"done\n"):
        os.write(end, piece)
        turn(pump, shows(console, piece))
    pump.drain()
    assert console.read() == b"Epoch 1 ...\r\xff\0done\n"
    assert pump.tail(0) == "\N{REPLACEMENT CHARACTER}done"


def test_matching_lines_also_go_to_one_file_of_all_workers(tmp_path: Path, console: Console, pump: LogPump) -> None:
    routes = [Route(rank, 1, show=rank == 0, prefix=b"[%d]:" % rank) for rank in (0, 1)]
    ends = pump.open(routes, {1: Duplicates((b"loss", b"lr"), str(tmp_path / "filtered"))})
    for rank in (0, 1):
        os.write(ends[rank, 1], b"step\nloss 1\n\nstep\nlr 2 loss 2\nstep\nunfinished lr")
        pump.take({fd for fd, _ in pump.descriptors()})
    pump.drain()
    found = (tmp_path / "filtered").read_bytes().splitlines()
    for rank in (0, 1):
        mine = [line for line in found if line.startswith(b"[%d]:" % rank)]
        assert mine == [b"[%d]:" % rank + line for line in (b"loss 1", b"lr 2 loss 2", b"unfinished lr")]
    assert len(found) == 6
    assert b"[0]:step\n" in console.read()
    assert b"[1]:" not in console.read()


def test_two_hundred_workers(tmp_path: Path, console: Console, pump: LogPump) -> None:
    routes = [
        Route(rank, stream, str(tmp_path / f"{rank}.{stream}"), True, b"[%d]:" % rank)
        for rank in range(200)
        for stream in (1, 2)
    ]
    ends = pump.open(routes)
    for (rank, stream), end in ends.items():
        os.write(end, b"%d\n" % (rank * stream))
    turn(pump, lambda: console.read().count(b"\n") == 400)
    pump.drain()
    seen = console.read()
    assert sorted(seen.split(b"\n")[:-1]) == sorted(b"[%d]:%d" % (r, r * s) for r in range(200) for s in (1, 2))
    assert (tmp_path / "199.2").read_bytes() == b"398\n"


def test_no_descriptors_left_is_an_error_that_leaks_nothing(
    tmp_path: Path, console: Console, pump: LogPump, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump_module, "raise_limit", lambda streams: None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = sorted(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(UnavailableError, match="ulimit -n"):
            pump.open([Route(rank, 1, str(tmp_path / f"{rank}.log"), True, b"#") for rank in range(50)])
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_limit_of_descriptors_is_raised_if_possible(console: Console, pump: LogPump) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        assert len(pump.open([Route(rank, 1, show=True) for rank in range(50)])) == 50
        pump.drain()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ---- redraws


def test_a_redrawn_line_is_shown_in_its_last_state(tmp_path: Path, console: Console, pump: LogPump) -> None:
    bar = "import os\nfor i in range(101): os.write(1, b'\\r%d%%|' % i)\nos.write(1, b'\\nnext\\n\\r7\\r8')"
    run(pump, [Route(0, 1, str(tmp_path / "log"), True, b"#")], [bar], console)
    assert console.read() == b"#100%|\n#next\n#8\n"
    assert (tmp_path / "log").read_bytes() == b"".join(b"\r%d%%|" % i for i in range(101)) + b"\nnext\n\r7\r8"


def test_a_bar_that_is_redrawn_for_days_needs_no_memory(console: Console, pump: LogPump) -> None:
    ends = pump.open([Route(0, 2, show=True, prefix=b"#")])
    for _ in range(50):
        os.write(ends[0, 2], b"\r 50%" * 10_000)
        pump.take({fd for fd, _ in pump.descriptors()} | set(pump._sources))
    assert all(len(source._partial) < 100 for source in pump._sources.values())
    pump.drain()
    assert console.read() == b"# 50%\n"


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        (b"a\rb\n", b"b\n"),
        (b"a\r\n", b"a\r\n"),
        (b"a\rb\r\r\nc\n", b"b\r\r\nc\n"),
        (b"\ra\n\rb\n", b"a\nb\n"),
        (b"a\n", b"a\n"),
        (b"\r\n\r\n", b"\r\n\r\n"),
    ],
)
def test_last_states(lines: bytes, left: bytes) -> None:
    assert last_states(lines) == left
    line = bytearray(lines.split(b"\n")[0])
    last_state(line)
    assert line + b"\n" == left[: left.index(b"\n") + 1]


def test_long_lines_of_odd_bytes_take_linear_time() -> None:
    begin = time.process_time()
    for line in (b"x" * (1 << 20), b"\r" * (1 << 20), b"x\r" * (1 << 19), b"\x1b[" * (1 << 19), b"\x1b]" * (1 << 19)):
        last_states(b"\r\n" + line + b"\r\n")
        end_as_text(line, True, 20, 8192)
        last_state(bytearray(line))
    assert time.process_time() - begin < 10  # some tenths of a second; quadratic time would be hours


def test_a_terminal_has_one_live_line_below_the_others(tmp_path: Path, terminal: Console, pump: LogPump) -> None:
    ends = pump.open([Route(rank, stream, "", True, b"[%d]:" % rank) for rank in (0, 1) for stream in (1, 2)])
    os.write(ends[0, 2], b"\r10%")
    turn(pump, shows(terminal, b"10%"))
    assert screen(terminal.read()) == [b"[0]:10%"]
    os.write(ends[0, 2], b"\r20%")
    turn(pump, shows(terminal, b"20%"))
    assert screen(terminal.read()) == [b"[0]:20%"]
    os.write(ends[1, 1], b"a line\n")
    turn(pump, lambda: screen(terminal.read())[-1:] == [b"[0]:20%"] and b"a line" in terminal.read())
    assert screen(terminal.read()) == [b"[1]:a line", b"[0]:20%"]
    pump.log("hello")
    assert screen(terminal.read()) == [b"[1]:a line", b"elastic-run: hello", b"[0]:20%"]
    os.write(ends[1, 2], b"\r" + b"=" * 200)
    turn(pump, shows(terminal, b"=" * 200))
    assert screen(terminal.read()) == [b"[1]:a line", b"elastic-run: hello", b"[1]:" + b"=" * 96]
    os.write(ends[0, 2], b"\r30%\nthe end\n")
    turn(pump, shows(terminal, b"the end"))
    assert screen(terminal.read())[2:4] == [b"[0]:30%", b"[0]:the end"]
    pump.drain()
    assert screen(terminal.read())[4:] == [b"[1]:" + b"=" * 96, b"=" * 100, b"====", b""]


def test_a_live_line_ends_with_its_newline(terminal: Console, pump: LogPump) -> None:
    ends = pump.open([Route(rank, 1, show=True, prefix=b"#%d:" % rank) for rank in (0, 1)])
    for rank, text in ((0, b"\r10%"), (0, b"\r20%\nplain"), (1, b"a line\n")):
        os.write(ends[rank, 1], text)
        turn(pump, shows(terminal, text.split()[0].rsplit(b"\r")[-1]))
    assert screen(terminal.read()) == [b"#0:20%", b"#1:a line", b""]
    pump.drain()
    assert screen(terminal.read()) == [b"#0:20%", b"#1:a line", b"#0:plain", b""]


def test_a_live_line_does_not_wipe_an_unfinished_line(terminal: Console, pump: LogPump) -> None:
    ends = pump.open([Route(0, 1, show=True), Route(1, 1, show=True, prefix=b"#")])
    os.write(ends[0, 1], b"Password: ")
    turn(pump, shows(terminal, b"Password: "))
    os.write(ends[1, 1], b"\r10%")
    turn(pump, shows(terminal, b"10%"))
    assert screen(terminal.read()) == [b"Password: ", b"#10%"]
    pump.drain()


# ---- consoles


def test_a_slow_console_holds_up_only_the_workers_it_shows(tmp_path: Path, console: Console, pump: LogPump) -> None:
    routes = [Route(0, 1, str(tmp_path / "0"), True, b"#"), Route(1, 1, str(tmp_path / "1"))]
    ends = pump.open(routes)
    workers = [spawn(BLOCKS.format(n=1_000_000), ends[rank, 1], 2) for rank in (0, 1)]
    pump.close_workers_ends()
    turn(pump, lambda: workers[1].poll() is not None)
    turn(pump, lambda: pump.deadline() is None and all(mask == select.POLLOUT for _, mask in pump.descriptors()))
    assert (tmp_path / "1").stat().st_size > 6_000_000
    assert workers[0].poll() is None
    assert (tmp_path / "0").stat().st_size < 4_000_000
    turn(pump, reading(console, lambda: workers[0].poll() is not None))
    pump.drain()
    turn(pump, reading(console, lambda: not pump.descriptors()))
    assert console.read() == b"".join(b"#%d\n" % number for number in range(1_000_000))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_that_closes_loses_its_lines_only(tmp_path: Path, is_terminal: bool) -> None:
    with made_of(raw_terminal() if is_terminal else os.pipe()) as console, new_pump(console) as pump:
        end = pump.open([Route(0, 1, str(tmp_path / "log"), True, b"#")])[0, 1]
        worker = spawn(SINGLE.format(n=20_000), end)
        pump.close_workers_ends()
        turn(pump, shows(console, b"#100\n"))
        console.close_reader()
        turn(pump, lambda: worker.poll() is not None)
        pump.log("nobody reads this")
        pump.drain()
        assert pump.flush(0) == 0
        assert worker.returncode == 0
    assert (tmp_path / "log").read_bytes() == b"".join(b"%d\n" % number for number in range(20_000))


def test_streams_that_were_closed(tmp_path: Path) -> None:
    out = os.dup(1)
    os.close(1)
    try:
        pump = LogPump(pytest.fail)
        end = pump.open([Route(0, 1, str(tmp_path / "log"), True, b"#")])[0, 1]
        os.write(end, b"x\n")
        pump.drain()
        pump.close()
    finally:
        os.dup2(out, 1)
        os.close(out)
    assert (tmp_path / "log").read_bytes() == b"x\n"


def test_the_console_is_a_file_for_both_streams(tmp_path: Path) -> None:
    with (tmp_path / "console").open("wb") as file, standing_in(file.fileno(), file.fileno()):
        pump = LogPump(pytest.fail)
        codes = [
            "import os\nfor i in range(3000): os.write(1, b'o' * 50 + b'\\n'); os.write(2, b'e' * 50 + b'\\n')"
        ] * 2
        run(pump, [Route(rank, stream, "", True, b"#") for rank in (0, 1) for stream in (1, 2)], codes)
        assert pump.descriptors() == []
        pump.close()
    lines = (tmp_path / "console").read_bytes().splitlines()
    assert sorted(lines) == [b"#" + b"e" * 50] * 6000 + [b"#" + b"o" * 50] * 6000


def test_one_pipe_for_both_streams_keeps_lines_whole(console: Console, pump: LogPump) -> None:
    codes = ["import os\nfor i in range(3000): os.write(1, b'o' * 50 + b'\\n'); os.write(2, b'e' * 50 + b'\\n')"] * 2
    run(pump, [Route(rank, stream, "", True, b"#") for rank in (0, 1) for stream in (1, 2)], codes, console)
    assert sorted(console.read().splitlines()) == [b"#" + b"e" * 50] * 6000 + [b"#" + b"o" * 50] * 6000


def test_lines_that_come_in_pieces_are_shown_whole(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `print` writes them under ``python -u``. At the end, and before a round, what is held is shown, too."""
    monkeypatch.setattr(pump_module, "JOIN_DELAY", 2 * DEADLINE)
    with new_pump(console) as pump:
        ends = pump.open([Route(rank, 1, show=True, joins=True) for rank in (0, 1)])
        for piece in (b"rank ", b"%d", b"\n", b"more"):
            for rank in (0, 1):
                os.write(ends[rank, 1], piece.replace(b"%d", b"%d" % rank))
                pump.take([fd for fd, _ in pump.descriptors()])
        turn(pump, lambda: console.read().count(b"\n") == 2)
        assert console.read() == b"rank 0\nrank 1\n"
        assert pump.deadline() is not None
        pump.drain()
        assert console.read() == b"rank 0\nrank 1\nmoremore"
        assert pump.deadline() is None


def test_the_beginning_of_a_line_is_shown_soon(
    console: Console, pump: LogPump, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = pump.open([Route(0, 1, show=True, joins=True)])[0, 1]
    monkeypatch.setattr(pump_module, "JOIN_DELAY", 0.01)
    for piece in (b"Loading", b" ...", b" done\n"):
        os.write(end, piece)
        turn(pump, shows(console, piece))
    monkeypatch.setattr(pump_module, "JOIN_DELAY", 2 * DEADLINE)
    long = b"x" * (source_module.MAX_HELD + 1)
    os.write(end, long)
    turn(pump, lambda: console.read() == b"Loading ... done\n" + long)


def test_each_line_has_its_own_time_to_end(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker that writes all the time, a line was shown in pieces whenever the time of the first one was over."""
    with new_pump(console) as pump:
        end = pump.open([Route(0, 1, show=True, joins=True)])[0, 1]
        monkeypatch.setattr(pump_module, "JOIN_DELAY", 0)
        os.write(end, b"step ")
        source = next(iter(pump._sources.values()))
        pump._read(source)
        monkeypatch.setattr(pump_module, "JOIN_DELAY", 2 * DEADLINE)
        os.write(end, b"1\nstep ")
        pump.take([fd for fd, _ in pump.descriptors()])
        assert console.read() == b"step 1\n"
        os.write(end, b"2\n")
        turn(pump, lambda: console.read() == b"step 1\nstep 2\n")


def test_a_held_line_neither_wakes_the_agent_nor_is_more_read_while_the_console_is_slow(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump_module, "JOIN_DELAY", 0)
    with new_pump(console) as pump:
        end = pump.open([Route(0, 1, show=True, joins=True)])[0, 1]
        source = next(iter(pump._sources.values()))
        os.write(end, b"step ")
        pump._read(source)
        source.backlog += pump._max_backlog + 1
        os.write(end, b"1\n")
        assert pump.deadline() is None
        pump.take(())
        assert source.held == b"step "
        source.backlog -= pump._max_backlog + 1
        turn(pump, lambda: console.read() == b"step 1\n")


@pytest.mark.parametrize("kind", ["socket", "pipe that cannot be opened anew"])
def test_a_console_that_could_block_does_not(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "socket":
        ours, theirs = socket.socketpair()
        ends = ours.detach(), theirs.detach()
    else:
        ends = os.pipe()
        monkeypatch.setattr("elastic_launch.logs.pump.unblocked", contextlib.nullcontext)
    with made_of(ends) as console, standing_in(ends[1], ends[1]):
        pump = LogPump(pytest.fail)
        end = pump.open([Route(0, 1, str(tmp_path / "log"), True, b"#")])[0, 1]
        worker = spawn(BLOCKS.format(n=300_000), end)
        pump.close_workers_ends()
        turn(pump, lambda: all(mask == select.POLLOUT for _, mask in pump.descriptors()))
        assert os.get_blocking(console.writing), "its flags belong to its owner"
        turn(pump, reading(console, lambda: worker.poll() is not None))
        pump.drain()
        turn(pump, reading(console, lambda: not pump.descriptors()))
        pump.close()
        assert console.read() == b"".join(b"#%d\n" % number for number in range(300_000))


def test_what_nobody_reads_is_discarded_at_the_end(console: Console) -> None:
    said: list[str] = []
    with new_pump(console, said.append) as pump:
        end = pump.open([Route(0, 1, show=True, prefix=b"#")])[0, 1]
        os.write(end, b"x" * 500_000 + b"\n")
        pump.drain()
        lost = pump.flush(0.01)
        assert lost + len(console.read()) == 500_002
        assert said == [f"stdout accepts no more output: {lost} bytes were not shown"]


def test_a_signal_ends_the_wait_for_a_reader(console: Console) -> None:
    said: list[str] = []
    reading, writing = os.pipe()
    with new_pump(console, said.append) as pump, open(reading, "rb"), open(writing, "wb", 0) as interrupt:
        end = pump.open([Route(0, 1, show=True, prefix=b"#")])[0, 1]
        os.write(end, b"x" * 500_000 + b"\n")
        pump.drain()
        interrupt.write(b"x")
        assert pump.flush(3600, reading) > 0
        assert len(said) == 1


def test_flush_lasts_as_long_as_the_reader_makes_progress(
    console: Console, pump: LogPump, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = pump.open([Route(0, 1, show=True, prefix=b"#")])[0, 1]
    os.write(end, b"x" * 1_000_000 + b"\n")
    pump.drain()
    now, seen = 0.0, 0

    class SlowReader:
        """In place of the poller: a reader who takes some output every two seconds."""

        def register(self, fd: int, mask: int) -> None:
            pass

        unregister = staticmethod(lambda fd: None)

        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            nonlocal now, seen
            assert milliseconds >= 2000
            now += 2
            seen += len(os.read(console.reading, 1 << 16))
            return []

    monkeypatch.setattr(pump_module, "select", SimpleNamespace(poll=SlowReader, POLLIN=1, POLLOUT=4))
    monkeypatch.setattr(pump_module, "time", SimpleNamespace(monotonic=lambda: now))
    assert pump.flush(3.0) == 0
    assert seen + len(console.read()) == 1_000_002
    assert now > 20, "in all it takes longer"


def test_own_lines_follow_what_the_workers_wrote_and_split_no_line(console: Console, pump: LogPump) -> None:
    ends = pump.open([Route(0, 2, show=True, prefix=b"#"), Route(1, 2, show=True)])
    os.write(ends[0, 2], b"whole\nhalf")
    os.write(ends[1, 2], b"mid line")
    pump.log("restarting")
    os.write(ends[0, 2], b" and half\n")
    pump.drain()
    assert console.read() == b"#whole\nmid line\nelastic-run: restarting\n#half and half\n"


def test_an_unread_console_loses_own_lines_only(console: Console, pump: LogPump) -> None:
    pump.open([Route(0, 2, show=True)])
    for number in range(20_000):
        pump.log(f"{number:0100}")
    assert pump._own_lines.backlog < 80_000
    turn(pump, reading(console, lambda: not [m for _, m in pump.descriptors() if m == select.POLLOUT]))
    lines = console.read().splitlines()
    assert 500 < len(lines) < 20_000
    assert lines == [b"elastic-run: %0100d" % number for number in range(len(lines))]
    pump.log("heard")
    assert console.read().endswith(b"elastic-run: heard\n")


# ---- terminals for workers


def test_a_worker_gets_a_terminal_if_the_console_is_one(terminal: Console, pump: LogPump) -> None:
    code = "import os; print(os.isatty(1), os.get_terminal_size(1).columns, os.isatty(2), '\\x1b[31mred\\r')"
    run(pump, [Route(0, 1, show=True, prefix=b"[0]:"), Route(0, 2)], [code], terminal)
    assert terminal.read().replace(b"\r\n", b"\n").endswith(b"[0]:True 96 False \x1b[31mred\x1b[0m\n")


def test_a_workers_terminal_follows_the_window(terminal: Console, pump: LogPump) -> None:
    code = (
        "import fcntl, os, struct, termios\n"
        f"window = os.open({os.ttyname(terminal.writing)!r}, os.O_RDWR | os.O_NOCTTY)\n"
        "fcntl.ioctl(window, termios.TIOCSWINSZ, struct.pack('4H', 30, 70, 0, 0))\n"
        "while os.get_terminal_size(1).columns != 66: print('waits', flush=True)\n"
        "print(*os.get_terminal_size(1))"
    )
    run(pump, [Route(0, 1, show=True, prefix=b"[0]:")], [code], terminal)
    assert terminal.read().endswith(b"[0]:66 30\n")


def test_a_worker_without_a_terminal(console: Console, pump: LogPump) -> None:
    run(pump, [Route(0, 1, show=True, prefix=b"#")], ["import os; print(os.isatty(1))"], console)
    assert console.read() == b"#False\n"


def test_nothing_is_lost_at_the_end_of_a_terminal(tmp_path: Path, terminal: Console, pump: LogPump) -> None:
    run(pump, [Route(0, 1, str(tmp_path / "log"), True, b"#")], [BLOCKS.format(n=20_000)], terminal)
    assert (tmp_path / "log").read_bytes() == b"".join(b"%d\n" % number for number in range(20_000))
    assert terminal.read() == b"".join(b"#%d\n" % number for number in range(20_000))


def test_without_terminals_a_pipe_is_used(terminal: Console, pump: LogPump, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[int, int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pty, "openpty", refuse)
    monkeypatch.setattr(os, "openpty", refuse)
    run(pump, [Route(0, 1, show=True, prefix=b"#")], ["import os; print(os.isatty(1))"], terminal)
    assert terminal.read() == b"#False\n"


# ---- disks


def test_a_full_disk_loses_the_files_only(small_disk: Path, tmp_path: Path, console: Console) -> None:
    said: list[str] = []
    paths = [small_disk / "0", small_disk / "1", tmp_path / "2"]
    with new_pump(console, said.append) as pump:
        for attempt in range(2):
            routes = [Route(rank, 1, str(path), True, b"[%d]" % rank) for rank, path in enumerate(paths)]
            run(pump, routes, [BLOCKS.format(n=50_000)] * 3, console)
            assert (attempt, len(said)) == (attempt, 1)
    assert re.fullmatch(rf"log {small_disk}/[01]: no space left on device: .*", said[0])
    whole = b"".join(b"%d\n" % number for number in range(50_000))
    kept = [path.read_bytes() for path in paths]
    assert kept[2] == whole
    assert all(whole.startswith(part) and part != whole for part in kept[:2])
    assert 0 < len(kept[0]) + len(kept[1]) <= 64 << 10
    assert console.read().count(b"\n") == 2 * 3 * 50_000


def test_a_console_file_that_is_full_gets_nothing_after_the_gap(small_disk: Path, tmp_path: Path) -> None:
    filler, shown = small_disk / "filler", small_disk / "console"
    said: list[str] = []
    with shown.open("wb") as file, standing_in(file.fileno(), file.fileno()):
        pump = LogPump(said.append)
        end = pump.open([Route(0, 1, str(tmp_path / "log"), True, b"")])[0, 1]
        for text in (b"first\n", b"x" * (64 << 10) + b"\n", b"last\n"):
            filler.write_bytes(b"x" * (32 << 10)) if text == b"first\n" else None
            if text == b"last\n":
                filler.unlink()
            os.write(end, text)
            pump.take({fd for fd, _ in pump.descriptors()} | set(pump._sources))
        pump.close()
    whole = b"first\n" + b"x" * (64 << 10) + b"\nlast\n"
    assert (tmp_path / "log").read_bytes() == whole
    assert whole.startswith(shown.read_bytes())
    assert shown.stat().st_size < len(whole)
    assert len(said) == 1
    assert said[0].startswith("stdout: no space left on device: the rest of this output is not shown")


def test_a_file_that_cannot_be_opened(tmp_path: Path, console: Console) -> None:
    said: list[str] = []
    with new_pump(console, said.append) as pump:
        run(pump, [Route(0, 1, str(tmp_path / "none" / "log"), True, b"#")], ["print('shown')"], console)
    assert console.read() == b"#shown\n"
    assert len(said) == 1
    assert said[0].startswith(f"log {tmp_path}/none/log: no such file or directory: the rest")


def test_a_file_that_may_not_grow(tmp_path: Path, console: Console) -> None:
    said: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with new_pump(console, said.append) as pump:
            end = pump.open([Route(0, 1, str(tmp_path / "log"), True)])[0, 1]
            os.write(end, b"x" * 3000)
            pump.drain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "log").read_bytes() == b"x" * 1000
    assert "file too large" in said[0]
    assert console.read() == b"x" * 3000


# ---- the end


@pytest.mark.parametrize("code", ["import signal; print(1); signal.pause()", "while True: print('y' * 1000)"])
def test_another_process_that_holds_the_pipe_does_not_hang_the_end(
    tmp_path: Path, console: Console, pump: LogPump, code: str
) -> None:
    end = pump.open([Route(0, 1, str(tmp_path / "log"))])[0, 1]
    other = spawn(code, end)
    try:
        pump.close_workers_ends()
        turn(pump, lambda: (tmp_path / "log").stat().st_size)
        begin = time.monotonic()
        pump.drain()
        assert time.monotonic() - begin < SOON
        assert pump.descriptors() == []
    finally:
        other.kill()
        other.wait()


def test_another_process_that_writes_faster_than_the_pump_reads(
    console: Console, pump: LogPump, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = pump.open([Route(0, 1)])[0, 1]
    other = os.dup(end)
    blocks: list[bytes] = []

    def feed(source: source_module.Source, block: bytes) -> None:
        blocks.append(block)
        if len(blocks) < 1000:
            os.write(other, block)

    monkeypatch.setattr(source_module.Source, "feed", feed)
    os.write(end, b"x" * 50_000)
    pump.drain()
    os.close(other)
    assert len(blocks) < 100


def test_idle_means_idle_and_a_lone_line_does_not_wait(console: Console, pump: LogPump) -> None:
    end = pump.open([Route(0, 1, show=True, prefix=b"#")])[0, 1]
    poller = select.poll()
    for fd, mask in pump.descriptors():
        poller.register(fd, mask)
    assert (poller.poll(0), pump.deadline()) == ([], None)
    os.write(end, b"lone\n")
    pump.take({fd for fd, _ in poller.poll(0)})
    assert console.read() == b"#lone\n"
    assert pump.deadline() is None
    assert len(pump.descriptors()) == 1


def test_a_burst_of_lines_is_collected_for_a_moment(console: Console, pump: LogPump) -> None:
    end = pump.open([Route(0, 1, show=True, prefix=b"#")])[0, 1]
    rests = 0
    for number in range(2000):
        os.write(end, b"%d\n" % number)
        if at := pump.deadline():
            assert at - time.monotonic() <= BATCH_DELAY <= 0.02
            rests += 1
        pump.take({fd for fd, _ in pump.descriptors()})
    assert rests > 100
    turn(pump, lambda: console.read().count(b"\n") == 2000)
    assert console.read() == b"".join(b"#%d\n" % number for number in range(2000))
    turn(pump, lambda: pump.deadline() is None)
    assert len(pump.descriptors()) == 1


# ---- the tail of stderr


def test_the_tail_outlives_the_round_and_ends_with_the_next(console: Console, pump: LogPump) -> None:
    code = "import os, signal; print('fatal: out of cheese'); os.kill(os.getpid(), signal.SIGSEGV)"
    run(pump, [Route(0, 2), Route(1, 2)], [f"import sys; sys.stdout = sys.stderr; {code}", "pass"], console)
    assert pump.tail(0) == "fatal: out of cheese"
    assert pump.tail(1) == pump.tail(2) == ""
    pump.open([])
    assert pump.tail(0) == ""


ESCAPES = (
    b"plain \x1b[1;31mred\x1b[0m, \x1b]8;;http://x\x1b\\link\x1b]8;;\x07\n",
    b"\x1b(B\x1b[?25l\x1b[ q10 %\r\x1bM20 %\x1b7\x1b[12\nbroken \x1b]title\nend",
    b"\x1bPq" + b"picture" * 50 + b"\x1b\\after \x1b]0;t\x1b[31mcut\x1b",
)
SHOWN = (b"plain red, link\n", b"10 %\r20 %\nbroken \nend", b"after cut")


@pytest.mark.parametrize(("data", "shown"), list(zip(ESCAPES, SHOWN, strict=True)))
def test_escape_sequences_go_wherever_the_stream_is_divided(data: bytes, shown: bytes) -> None:
    for size in range(1, len(data) + 1):
        kept, begun = b"", b""
        for at in range(0, len(data), size):
            block, begun = without_escapes(begun, data[at : at + size])
            kept += block
            assert len(begun) <= 3, "a sequence without an end fills the memory"
        assert kept == shown, size


@given(st.lists(st.sampled_from([b"\x1b", b"[", b"]", b"P", b"\\", b"\x07", b"3", b" ", b"m", b"\n"]), max_size=12))
def test_any_division_of_any_escape_sequence_gives_the_same(pieces: list[bytes]) -> None:
    whole, rest = without_escapes(b"", b"".join(pieces))
    kept, begun = b"", b""
    for piece in pieces:
        block, begun = without_escapes(begun, piece)
        kept += block
    assert (kept, bool(begun)) == (whole, bool(rest))
    assert b"\x1b" not in kept


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"one\ntwo", "one\ntwo"),
        (b"\n\n  indented\n\n\n", "  indented"),
        (b"\x1b[1;31mError:\x1b[0m it \x1b]8;;http://x\x1b\\broke\x1b]8;;\x07\n", "Error: it broke"),
        (b"\r 10%\r 20%\r100%\ndone\r\n", "100%\ndone"),
        (b"caf\xc3\xa9 \xff\0\x08!\n", "café \N{REPLACEMENT CHARACTER}!"),
        (b"\x1bMtab\tkept\x1b[", "tab\tkept"),
        (b"".join(b"line %d\n" % n for n in range(100)), "\n".join(f"line {n}" for n in range(80, 100))),
        (b"x" * 5000 + b"\n" + b"y" * 5000 + b"\n", "y" * 5000),
        (b"x" * 9000, "x" * 8192),
    ],
)
def test_the_end_of_a_stream_as_text(data: bytes, text: str) -> None:
    assert end_as_text(data, True, source_module.TAIL_LINES, source_module.TAIL_SIZE) == text


def test_a_truncated_tail_begins_with_a_whole_line(console: Console, pump: LogPump) -> None:
    code = "import sys\nfor i in range(20000): sys.stderr.write('\\r%d' % i * 9 if i < 19990 else '\\n%d' % i)"
    run(pump, [Route(0, 2)], [code], console)
    assert pump.tail(0).splitlines() == [str(number) for number in range(19990, 20000)]
    source = pump._by_stream[0, 2]
    assert len(source.recent) <= 2 * source_module.TAIL_KEPT


def test_what_comes_after_a_mark(console: Console, pump: LogPump) -> None:
    end = pump.open([Route(0, 2), Route(1, 2)])[0, 2]
    os.write(end, b"before\n")
    pump.mark(0)
    os.write(end, b"Thread 0x1\n")
    turn(pump, lambda: pump.since_mark(0))
    os.write(end, b"  File x\xff" + b"." * 500_000)
    os.set_blocking(end, False)
    pump.take({fd for fd, _ in pump.descriptors()} | set(pump._sources))
    os.write(end, b"." * 900_000)
    pump.drain()
    assert pump.since_mark(0) == (b"Thread 0x1\n  File x\xff" + b"." * (1 << 20))[: 1 << 20]
    assert pump.since_mark(1) == pump.since_mark(2) == b""
    pump.mark(1)
    pump.mark(2)


def test_matching_lines() -> None:
    assert matching(b"a\nb\nab\n\n", [b"a"]) == b"a\nab\n"
    assert matching(b"a\nb\n", [b"c"]) == b""
