"""Write a report as Markdown, for the summary of a CI job. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from elastic_launch.operate import report_text
from elastic_launch.operate.report_data import Job
from elastic_launch.operate.report_text import Failure, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&@$])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def page(jobs: Sequence[Job]) -> str:
    """Return the text."""
    return "\n\n".join(_job(job) for job in jobs) + "\n"


def _text(value: str) -> str:
    """Return text of the job's in one line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(_plain(value).split()))


def _plain(value: str) -> str:
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", value)


def _job(job: Job) -> str:
    facts = Table("", ("", ""), [(name, value) for name, value in report_text.summary(job)])
    parts = [f"# Job {_text(job.id)}", _table(facts)]
    for table in report_text.tables(job):
        parts += [f"## {_text(table.title)}", _table(table)]
    if blocks := report_text.failures(job):
        parts += ["## Failures", *map(_failure, blocks)]
    if said := report_text.remarks(job):
        parts += ["## About this report", "\n".join(f"- {_text(it)}" for it in said)]
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    rows = [table.header, tuple("---" for _ in table.header), *table.rows]
    lines = [f"| {' | '.join(cell if cell == '---' else _text(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + (f"\n\n{_text(table.note)}" if table.note else "")


def _failure(block: Failure) -> str:
    parts = [f"### {_text(block.title)}", "\n".join(f"- {_text(name)}: {_text(value)}" for name, value in block.facts)]
    if block.details:
        # A fence that is longer than any in the text.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.details)), default=0))
        parts.append(f"{fence}text\n{_plain(block.details)}\n{fence}")
    if block.consequences:
        parts += ["Then:", "\n".join(f"- {_text(line)}" for line in block.consequences)]
    return "\n\n".join(parts)
