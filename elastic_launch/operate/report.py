"""``elastic-job report``: what happened to a job, from the events that its nodes have written, as one file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from elastic_launch.errors import LaunchError, UnavailableError
from elastic_launch.operate import report_html, report_md
from elastic_launch.operate.report_data import Event, Job, jobs, parse

FORMATS: dict[str, Callable[[Sequence[Job]], str]] = {"html": report_html.page, "md": report_md.page}


def main(argv: Sequence[str]) -> int:
    """Write the report that a command line asks for. Return the exit status.

    Raises:
        UnavailableError: there are no events, or the report cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="elastic-job report",
        description="Write a report of a job from the events of its nodes: time line, downtime, recoveries, failures.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="log directory of a job, or a file with events")
    parser.add_argument("-o", "--output", metavar="FILE", help="where the report goes (default: standard output)")
    parser.add_argument("--format", choices=sorted(FORMATS), help="default: md if FILE ends with .md, otherwise html")
    args = parser.parse_args(argv)
    events, problems = read(args.paths)
    if not events:
        why = f" ({problems[0]})" if problems else ""
        raise UnavailableError(f"no events in {', '.join(args.paths)}{why}; jobs write them with --log-dir or --events")
    style = args.format or ("md" if (args.output or "").endswith(".md") else "html")
    _write(FORMATS[style](jobs(events, problems)), args.output)
    return 0


def read(paths: Iterable[str]) -> tuple[list[Event], list[str]]:
    """Return the events below paths, and what could not be read."""
    events: list[Event] = []
    problems: list[str] = []
    for path in paths:
        files = [path] if not os.path.isdir(path) else sorted(_files_below(path))
        if not files:
            problems.append(f"{path}: has no events.jsonl and no events_HOST.jsonl")
        for file in files:
            try:
                with open(file, "rb") as opened:
                    found, wrong = parse(file, opened.read())
            except OSError as error:
                problems.append(f"{file}: {error.strerror}")
                continue
            events += found
            problems += wrong
    return events, problems


def _files_below(folder: str) -> Iterable[str]:
    """Yield the events files in a job's directory, or in those of a log directory."""
    inner = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    for place in (folder, *inner):
        try:
            names = os.listdir(place)
        except OSError:
            continue  # somebody else's directory
        for name in names:
            if name == "events.jsonl" or (name.startswith("events_") and name.endswith(".jsonl")):
                yield os.path.join(place, name)


def _write(report: str, path: str | None) -> None:
    data = report.encode(errors="backslashreplace")
    try:
        if path in (None, "-"):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        else:
            with open(str(path), "wb") as file:
                file.write(data)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "standard output" if path is None else f"-o {path}"
        raise UnavailableError(f"{where}: {error.strerror}; choose another file") from error


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LaunchError as error:
        print(f"elastic-job: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
