"""Show what a launch would do on this node, and what the checks find: ``elastic-run --dry-run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

from elastic_launch.cli import checks, plan
from elastic_launch.cli.checks import Finding, Mark, Subject
from elastic_launch.cli.command import config_from_args
from elastic_launch.core.text import counted, visible
from elastic_launch.env import environment
from elastic_launch.errors import LaunchError, UnavailableError
from elastic_launch.host.console import GREEN, RED, YELLOW, paint

COLOURS = {Mark.OK: GREEN, Mark.WARNING: YELLOW, Mark.ERROR: RED}
WIDEST = 40
"""Columns that a cell may take before the next one stands out of line."""
ALWAYS = ("LOCAL_RANK", "RANK")
"""Variables that the table of the workers shows even if all have the same."""


def show(args: argparse.Namespace) -> None:
    """Print what a parsed command line would run.

    Args:
        args: as from ``parse_args``.

    Raises:
        LaunchError: the one that the launch would end with, or that says why nothing can be shown.
    """
    environ = environment()
    findings: list[Finding] = []
    try:
        config, command, command_args = config_from_args(args)
    except LaunchError as error:
        _print("Options", settings_table(plan.settings(args, None, environ)))
        findings = [Finding("options", Mark.ERROR, str(error), error)]
    else:
        _print("Options", settings_table(plan.settings(args, config, environ)))
        rendezvous, finding = checks.check_rendezvous(config, environ)
        workers = plan.workers(config, rendezvous, environ)
        _print("Command of each worker", [f"  {plan.joined([str(command), *command_args])}"])
        common, differing = split(workers)
        _print("Environment of each worker, besides what it inherits", table(sorted(common.items())))
        _print("Workers", workers_table(workers, differing))
        findings = [finding, *checks.run(Subject(args, config, environ, rendezvous))]
    _print("Checks", findings_table(findings))
    errors = [finding.error for finding in findings if finding.error]
    if errors:
        raise errors[0]
    warnings = sum(finding.mark is Mark.WARNING for finding in findings)
    _print("Nothing stands in the way of this launch" + (f"; {counted(warnings, 'warning')}" if warnings else ""))


def _print(title: str, lines: Iterable[str] = ()) -> None:
    text = "\n".join([title, *lines, *([""] if lines else [])])
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # arguments may hold any bytes
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        pass  # the reader has seen enough
    except OSError as error:
        raise UnavailableError(f"standard output: {error.strerror}") from error


def settings_table(settings: Sequence[plan.Setting]) -> list[str]:
    """Format the options: name, value, source."""
    return table(settings)


def findings_table(findings: Sequence[Finding]) -> list[str]:
    """Format what the checks found."""
    rows = table([(each.mark.value, each.name, each.text) for each in findings])
    return [
        row.replace(each.mark.value, paint(each.mark.value, COLOURS[each.mark], 1), 1)
        for row, each in zip(rows, findings, strict=True)
    ]


def split(workers: Sequence[plan.Worker]) -> tuple[dict[str, str], list[str]]:
    """Return the variables that all workers share, and the names of those in which they differ."""
    every = dict.fromkeys(name for worker in workers for name in worker.variables)
    values = {name: [worker.variables.get(name, plan.NONE) for worker in workers] for name in every}
    common = {name: each[0] for name, each in values.items() if name not in ALWAYS and len(set(each)) == 1}
    return common, sorted(every.keys() - common.keys())


def workers_table(workers: Sequence[plan.Worker], names: Sequence[str]) -> list[str]:
    """Format the workers: local rank, CPUs, and the variables in which they differ."""
    is_bound = any(worker.cpus for worker in workers)
    head = ["worker", *(["CPUs"] if is_bound else []), *names]
    rows = [
        [str(number), *([worker.cpus] if is_bound else []), *(worker.variables.get(name, plan.NONE) for name in names)]
        for number, worker in enumerate(workers)
    ]
    return table([head, *rows])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns; the last one is not padded. What is not printable is made visible.

    >>> table([("a", "1"), ("bb", "2")])
    ['  a   1', '  bb  2']
    """
    rows = [list(map(visible, row)) for row in rows]
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths[:-1], 0], strict=True)).rstrip()
        for row in rows
    ]
