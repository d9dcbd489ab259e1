"""Write a report as one HTML file, which needs nothing else: no script, no font, no image from elsewhere. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from elastic_launch.core.text import counted
from elastic_launch.operate import report_picture, report_text
from elastic_launch.operate.report_data import Attempt, Job
from elastic_launch.operate.report_text import Failure, Table

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML forbids, such as those that colour a terminal."""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --quiet: #57606a; --line: #d0d7de; --box: #f6f8fa;
  --working: #1a7f4b; --starting: #2f6feb; --stopping: #b25e00; --waiting: #7d8792; --unknown: #b42318;
  --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1419; --text: #e6e9ed; --quiet: #9aa6b2; --line: #333c47;
  --box: #171d24; --working: #3fb950; --starting: #6ea8fe; --stopping: #e3a04f; --waiting: #8b96a3; --unknown: #ff7b72;
  --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0 1rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .5rem; margin: 0; }
dl.facts div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .75rem; background: var(--box); }
dl.facts div.wide { grid-column: 1 / -1; }
dt { color: var(--quiet); font-size: .875rem; } dd { margin: 0; font-weight: 600; }
dl.failure { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: .5rem 0; }
dl.failure dt { font-size: 1rem; } dl.failure dd { font-weight: 400; }
.bad { color: var(--bad); } .note, .legend { color: var(--quiet); font-size: .875rem; }
.scroll { overflow-x: auto; } .scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--starting); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; }
.legend svg { width: 1.5rem; height: .75rem; margin-right: .4rem; }
.picture svg { min-width: 44rem; width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
svg text.name { text-anchor: end; } svg text.tick { text-anchor: middle; fill: var(--quiet); font-size: 11px; }
svg text.mark { text-anchor: middle; font-weight: 700; font-size: 16px; fill: var(--bad); stroke: var(--page);
  stroke-width: 4px; paint-order: stroke; }
svg line.tick { stroke: var(--line); } svg line.round { stroke: var(--quiet); stroke-dasharray: 3 3; }
rect.working { fill: var(--working); } rect.starting { fill: var(--starting); } rect.stopping { fill: var(--stopping); }
rect.waiting { fill: var(--waiting); } rect.unknown { fill: var(--unknown); }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
th { color: var(--quiet); font-weight: 600; white-space: nowrap; } td { min-width: 4.5rem; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .75rem; overflow-x: auto;
  font: .8125rem/1.45 ui-monospace, monospace; max-height: 40rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { details > * { display: block; } }
"""


def page(jobs: Sequence[Job]) -> str:
    """Return the file's text."""
    title = f"Job {jobs[0].id}" if len(jobs) == 1 else counted(len(jobs), "job")
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
    )
    return head + "\n".join(_job(job, f"j{index}") for index, job in enumerate(jobs)) + "\n</main>\n</body>\n</html>\n"


def _text(value: str) -> str:
    """Return text of the job's as HTML that shows it and does nothing else."""
    return escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", value))


def _job(job: Job, id_: str) -> str:
    parts = [f"<h1>Job {_text(job.id)}</h1>", _summary(job)]
    for index, attempt in enumerate(job.attempts):
        parts.append(_timeline(job, attempt, f"{id_}a{index}"))
    parts += [_table(table, f"{id_}t{index}") for index, table in enumerate(report_text.tables(job))]
    if blocks := report_text.failures(job):
        parts += ["<h2>Failures</h2>", *(_failure(block, index == 0) for index, block in enumerate(blocks))]
    if (warnings := report_text.warnings(job)).rows:
        parts.append(_table(warnings, f"{id_}w"))
    if said := report_text.remarks(job):
        parts.append("<h2>About this report</h2>\n<ul>" + "".join(f"<li>{_text(it)}</li>" for it in said) + "</ul>")
    return "\n".join(parts)


def _summary(job: Job) -> str:
    boxes = []
    for name, value in report_text.summary(job):
        is_bad = name == "Outcome" and job.attempts[-1].outcome in ("failed", "error", "unknown")
        kind = ' class="wide"' if len(value) > 60 else ""
        shown = f'<dd class="bad">{_text(value)}</dd>' if is_bad else f"<dd>{_text(value)}</dd>"
        boxes.append(f"<div{kind}><dt>{_text(name)}</dt>{shown}</div>")
    return f'<dl class="facts">{"".join(boxes)}</dl>'


def _timeline(job: Job, attempt: Attempt, id_: str) -> str:
    title = "Time line"
    if len(job.attempts) > 1:
        began = report_text.moment(attempt.begin)
        title = f"Attempt {job.attempts.index(attempt) + 1} of {len(job.attempts)}: {attempt.outcome}, began {began}"
    drawn = len(report_picture.shown(attempt))
    left_out = len(attempt.agents) - drawn
    note = f'<p class="note">{counted(left_out, "node")} without trouble not drawn.</p>' if left_out else ""
    picture = report_picture.svg(attempt, id_)
    table = report_text.lines_of_nodes(job, attempt)
    region = '<div class="scroll picture" tabindex="0" role="region" aria-label="Time line">'
    return (
        f"<h2>{_text(title)}</h2>\n{region}{_CONTROLS.sub('', picture)}</div>\n"
        f"{note}{_legend() if attempt is job.attempts[0] else ''}"
        f"<details><summary>{_text(table.title)}</summary>{_cells(table, f'{id_}-table')}</details>"
    )


def _legend() -> str:
    items = []
    for state, words in report_picture.STATES.items():
        y, height = (4, 4) if state in report_picture.THIN else (0, 12)
        bar = f'<rect class="{state}" x="0" y="{y}" width="24" height="{height}"/>'
        items.append(f'<li><svg viewBox="0 0 24 12" aria-hidden="true">{bar}</svg>{_text(words)}</li>')
    signs = "<li>× a worker failed</li><li>? lost</li><li>! signal, stall or SIGKILL</li><li>┊ a round forms</li>"
    return f'<ul class="legend">{"".join(items)}{signs}</ul>'


def _table(table: Table, id_: str) -> str:
    return f'<h2 id="{id_}">{_text(table.title)}</h2>\n{_cells(table, id_)}'


def _cells(table: Table, id_: str) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    label = f'role="region" aria-label="{_text(table.title)}"'
    return (
        f'<div class="scroll" tabindex="0" {label}><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>'
        f"</table></div>{note}"
    )


def _failure(block: Failure, is_open: bool) -> str:
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in block.facts)
    details = f'<pre tabindex="0">{_text(block.details)}</pre>' if block.details else ""
    others = "".join(f"<li>{_text(line)}</li>" for line in block.consequences)
    then = f"<p>Then</p><ul>{others}</ul>" if others else ""
    return (
        f"<details{' open' if is_open else ''}><summary>{_text(block.title)}</summary>"
        f'<dl class="failure">{facts}</dl>{details}{then}</details>'
    )
