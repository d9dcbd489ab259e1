"""``elastic-job logs``: the output of a job's ranks on this host, from the files that the job writes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from elastic_launch.control.client import ControlClient, GoneError
from elastic_launch.env import environment
from elastic_launch.errors import LaunchError, UnavailableError, UsageError
from elastic_launch.host.files import open_regular
from elastic_launch.logs.job_files import output_files
from elastic_launch.operate.jobs import Job, NoJobError, choose, parser, running_jobs

POLL = 0.2
"""Seconds between two looks at files that are followed."""
_BLOCK = 1 << 16


class NoFilesError(LaunchError):
    """The job writes no such output to files."""

    exit_code = 1


class LogFile(NamedTuple):
    """A file with one stream of one rank in one round."""

    round: int
    rank: int
    stream: str
    """``stdout`` or ``stderr``."""
    path: str

    @property
    def title(self) -> str:
        """Return the line that is shown above what comes from this file."""
        return f"==> round {self.round}, rank {self.rank}, {self.stream} <=="


class Output:
    """Standard output, where each part has a title that says which file it is from, if there are several."""

    def __init__(self, *, titles: bool) -> None:
        self._titles = titles
        self._latest: LogFile | None = None

    def write(self, file: LogFile, data: bytes) -> None:
        """Write a part of a file.

        Raises:
            UnavailableError: it cannot be written.
        """
        if not data:
            return
        out = sys.stdout.buffer
        try:
            if self._titles and file != self._latest:
                out.write((b"\n" if self._latest else b"") + f"{file.title}\n".encode())
            self._latest = file
            out.write(data)
            out.flush()
        except OSError as error:
            raise UnavailableError(f"standard output: {error.strerror}; the rest is not shown") from error


def main(argv: Sequence[str]) -> int:
    """Show the files' last lines, and what follows. Return the exit status."""
    options = parser("logs", "show what a job's ranks on this host have written to its files, in all rounds")
    options.add_argument("--rank", type=int, metavar="N", help="only this global rank")
    options.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    options.add_argument("--last", type=int, default=100, metavar="N", help="lines of each stream (default: 100)")
    options.epilog = "JOB may also be a directory, LOG_DIR/ID: the files of a job that has ended, or of another host's."
    args = options.parse_args(argv)
    if args.last < 0:
        raise UsageError(f"--last={args.last}: must be at least 0")
    if os.sep in (args.job or ""):
        show_directory(args.job, args.rank, args.last, args.follow)
        return 0
    try:
        job = choose(running_jobs(environment()), args.job)
    except NoJobError as error:
        raise NoJobError(f"{error}; for one that has ended, pass the directory of its files, LOG_DIR/ID") from error
    files = files_of(job.agents, args.rank)
    if not files and not (args.follow and _may_follow(job)):
        raise NoFilesError(why_none(job.agents, args.rank))
    output = Output(titles=args.follow or len(files) > 1)
    with contextlib.ExitStack() as stack:
        clients = subscribe(job, stack) if args.follow else {}  # first: the job may end meanwhile
        ends = show_last(files, args.last, output)
        if args.follow:
            follow(job, clients, args.rank, ends, output)
    return 0


def show_directory(folder: str, rank: int | None, last: int, follow: bool) -> None:
    """Show the last lines of the files in a job's directory, whether the job runs or not.

    Raises:
        NoFilesError: there are none.
        UsageError: they cannot be followed.
    """
    if follow:
        raise UsageError(f"{folder}: only a running job can be followed: pass its id")
    found = [LogFile(*file) for file in output_files(folder)]
    files = sorted(file for file in found if rank in (None, file.rank))
    if not files:
        ranks = sorted({file.rank for file in found})
        raise NoFilesError(
            f"{folder}: no output of rank {rank}; there are files of ranks {', '.join(map(str, ranks))}"
            if ranks
            else f"{folder}: no output of a job, which would be in attempt_0/0/stdout.log and the like"
        )
    show_last(files, last, Output(titles=len(files) > 1))


def files_of(agents: Sequence[Mapping[str, Any]], rank: int | None) -> list[LogFile]:
    """Return the files of the ranks that agents of this host have run, by round, rank and stream.

    Args:
        agents: their statuses.
        rank: only this rank; None: all.
    """
    found: dict[str, LogFile] = {}
    for agent in agents:
        own = {it["round"]: range(it["ranks"][0], it["ranks"][1] + 1) for it in agent.get("rounds", [])}
        for attempt, its_rank, stream, path in output_files(agent.get("log_dir") or ""):
            if its_rank in own.get(attempt, ()):
                found[path] = LogFile(attempt, its_rank, stream, path)
        for worker in agent.get("workers", []):  # a plug-in may have a layout of its own
            for stream, path in worker["files"].items():
                found.setdefault(path, LogFile(agent["round"], worker["rank"], stream, path))
    return sorted(file for file in found.values() if rank in (None, file.rank))


def show_last(files: Sequence[LogFile], lines: int, output: Output) -> dict[str, int]:
    """Show the last lines of each rank's streams, which may be spread over rounds. Return where each file ended."""
    ends: dict[str, int] = {}
    starts: dict[str, int] = {}
    left: dict[tuple[int, str], int] = {}
    for file in reversed(files):
        key = file.rank, file.stream
        with contextlib.suppress(OSError), open(file.path, "rb", opener=open_regular) as opened:
            starts[file.path], count, ends[file.path] = find_last(opened, left.get(key, lines))
            left[key] = left.get(key, lines) - count
    for file in files:
        if file.path not in starts:
            continue
        with contextlib.suppress(OSError), open(file.path, "rb", opener=open_regular) as opened:
            opened.seek(starts[file.path])
            size = ends[file.path] - starts[file.path]
            while size > 0 and (data := opened.read(min(size, _BLOCK))):
                output.write(file, data)
                size -= len(data)
    return ends


def find_last(opened: BinaryIO, lines: int) -> tuple[int, int, int]:
    """Return where the last lines begin, how many there are, and where the file ends."""
    end = at = opened.seek(0, os.SEEK_END)
    found = 0
    while at > 0 and lines > 0:
        size = min(_BLOCK, at)
        at -= size
        opened.seek(at)
        data = opened.read(size)
        stop = len(data) - 1 if at + size == end else len(data)  # the end of the last line begins no other
        while (stop := data.rfind(b"\n", 0, max(0, stop))) >= 0:
            found += 1
            if found == lines:
                return at + stop + 1, lines, end
    return (0, found + bool(end), end) if lines > 0 else (end, 0, end)


def subscribe(job: Job, stack: contextlib.ExitStack) -> dict[int, ControlClient]:
    """Connect to a job's agents on this host, by their places among its agents, to be told of each change."""
    clients: dict[int, ControlClient] = {}
    for number, agent in enumerate(job.agents):
        with contextlib.suppress(UnavailableError):
            clients[number] = stack.enter_context(contextlib.closing(ControlClient(agent["socket"])))
            clients[number].send({"request": "subscribe"})
    return clients


def follow(job: Job, clients: dict[int, ControlClient], rank: int | None, ends: dict[str, int], output: Output) -> None:
    """Show what is appended to the files, also to those of later rounds, until the job's agents on this host end."""
    files: dict[str, LogFile] = {file.path: file for file in files_of(job.agents, rank)}
    for statuses in _statuses(job, clients):
        files |= {file.path: file for file in files_of(statuses, rank)}
        for path, file in files.items():
            with contextlib.suppress(OSError), open(path, "rb", opener=open_regular) as opened:
                opened.seek(min(ends.get(path, 0), os.fstat(opened.fileno()).st_size))
                while data := opened.read(_BLOCK):
                    output.write(file, data)
                ends[path] = opened.tell()


def _statuses(job: Job, clients: dict[int, ControlClient]) -> Iterator[list[dict[str, Any]]]:
    """Yield the statuses of a job's agents again and again, and once more when all have ended."""
    latest = list(job.agents)
    while clients:
        for number, client in list(clients.items()):
            try:
                for reply in client.take():
                    latest[number] = reply.get("status") or latest[number]
            except GoneError:
                del clients[number]
        yield latest
        if clients:
            time.sleep(POLL)
    yield latest


def _may_follow(job: Job) -> bool:
    """Whether files may come: no round has begun yet."""
    return all(not agent.get("rounds") for agent in job.agents)


def why_none(agents: Sequence[Mapping[str, Any]], rank: int | None) -> str:
    """Say why a job, or one of its ranks, has no output in files."""
    all_files = files_of(agents, None)
    if not all_files:
        return (
            f"{agents[0]['job']} writes its output to no files: start it with -t 3 (files and console) or -r 3 "
            "(files only), and --log-dir DIR"
        )
    ranks = sorted({file.rank for file in all_files})
    return f"--rank={rank}: this host has files of ranks {', '.join(map(str, ranks))}"
