"""Stacks and kernel views of small gloo jobs, recorded in ``recorded_stacks.txt``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from elastic_launch.core.progress.stacks import KernelView, Observation, parse


class Recorded:
    """The processes of one job, seen twice."""

    def __init__(self) -> None:
        self.first: list[Observation] = []
        self.second: list[Observation] = []


@cache
def _sections() -> dict[str, Recorded]:
    jobs: dict[str, Recorded] = {}
    text = Path(__file__).with_suffix(".txt").read_text()
    for number, section in enumerate(text.split("=== ")[1:]):
        head, _, body = section.partition("\n")
        name, *pairs = head.split()
        fields = dict(pair.split("=") for pair in pairs)
        texts = body.split("--- later\n")
        job = jobs.setdefault(name, Recorded())
        for looks, dump, state, cpu, at in zip(
            (job.first, job.second),
            (texts[0], texts[-1]),
            fields["state"].split(","),
            fields["cpu"].split(","),
            (100.0, 100.0 + float(fields["seconds"])),
            strict=True,
        ):
            kernel = KernelView(
                state=state,
                wchan=fields["wchan"],
                syscall=fields["syscall"],
                cpu_seconds=float(cpu),
                reads_stdin=fields["stdin"] == "1",
                command="python job.py",
            )
            seen = Observation(int(fields["rank"]), 1000 + number, fields["child"], parse(dump), kernel, at)
            looks.append(seen)
    return jobs


def recorded(name: str) -> tuple[list[Observation], list[Observation]]:
    """A job's ranks 0 to 2, and the processes below them, at the two looks."""
    job = _sections()[name]
    ranks = {seen.rank for seen in job.first}
    waiting = _sections()["skip"]
    return (
        [*job.first, *(seen for seen in waiting.first if seen.rank not in ranks)],
        [*job.second, *(seen for seen in waiting.second if seen.rank not in ranks)],
    )
