"""What a report says, as rows of text: the same for HTML and Markdown. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from elastic_launch.core.text import counted
from elastic_launch.operate.report_data import PARTS, Attempt, Event, Job, count, number, objects, text
from elastic_launch.operate.report_picture import cause_words, size_of, span, what_happened

MAX_ROWS = 200
"""Rows of a table that may be long; the rest is counted."""
MAX_LATE = 10
"""Nodes that came late, of which a report names the latest."""
NONE = "–"
"""Stands for what is not known, or does not apply."""


class Table(NamedTuple):
    """A table of a report."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    """A sentence below it."""


class Failure(NamedTuple):
    """A block about a failure."""

    title: str
    facts: list[tuple[str, str]]
    details: str
    """Traceback or last lines of stderr."""
    consequences: list[str]


def moment(at: float) -> str:
    """Return a time, in UTC: a report is read anywhere."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def percent(part: float, whole: float) -> str:
    """Return a share."""
    return f"{100 * part / whole:.1f} %" if whole > 0 else NONE


def since(job: Job, at: float) -> str:
    """Return when something happened, counted from the job's beginning."""
    return f"+{span(max(0.0, at - job.begin))}"


def summary(job: Job) -> list[tuple[str, str]]:
    """Return what to read first: names and values."""
    last = job.attempts[-1]
    ended = last.ended
    nodes, workers = map(max, zip(*(size_of(attempt) for attempt in job.attempts), strict=True))
    status = f" (exit status {count(ended, 'status')})" if ended and last.outcome != "succeeded" else ""
    facts = [
        ("Outcome", f"{last.outcome}{status}"),
        ("Began", moment(job.begin)),
        ("Took", span(job.seconds)),
        ("Size", f"{counted(nodes, 'node')}, {counted(workers, 'worker')}"),
        ("Restarts", str(job.restarts)),
        ("Workers ran", f"{percent(job.working, job.seconds)} of the time"),
    ]
    if len(job.attempts) > 1:
        facts.insert(4, ("Attempts", str(len(job.attempts))))
    if made := job.goodput:
        share = percent(made["in_steps"], made["elapsed"])
        facts.append(("Goodput", f"{made['steps']:,.0f} steps, {share} of {span(made['elapsed'])} in steps"))
    if why := text(ended, "why") or text(ended, "error"):
        facts.append(("Because", why))
    return facts


def downtime(job: Job) -> Table:
    """Return what the time without work was spent on."""
    rows = [
        (
            cause_words(cause),
            str(len(found)),
            span(total := sum(it.seconds for it in found)),
            percent(total, job.seconds),
        )
        for cause, found in job.downtime.items()
    ]
    return Table("Downtime by cause", ("because", "times", "together", "of the job's time"), rows)


def goodput(job: Job) -> Table:
    """Return what the job's time went into, if its steps were counted."""
    made = job.goodput
    names = {
        "in_steps": "steps",
        "startup": "until the first step",
        "lost": "restarts",
        "stalled": "stalls after which the workers went on",
    }
    parts = {words: made[name] for name, words in names.items()} if made else {}
    rest = max(0.0, made["elapsed"] - sum(parts.values())) if made else 0.0
    rows = [(name, span(value), percent(value, made["elapsed"])) for name, value in parts.items()]
    rows += [("after the latest step", span(rest), percent(rest, made["elapsed"]))] if made else []
    note = f"{made['repeated']:,.0f} steps were made again after a restart." if made and made["repeated"] else ""
    return Table("Goodput", ("time in", "together", "of the job's time"), rows, note)


def recoveries(job: Job) -> Table:
    """Return how long each restart took, and what that was spent on."""
    rows = []
    for it in job.recoveries:
        if it.parts:
            parts = [NONE if part is None else span(part) for part in it.parts]
            rows.append((since(job, it.begin), it.what or cause_words(it.cause), *parts, span(it.seconds)))
    note = (
        "Detection: from the failure until the first node stops. Stop: until no process of the round is left. "
        "Rendezvous: until all nodes have met again, with any pause. Start: until the workers run. "
        f"{NONE} is not known: a lost node cannot say since when, and not every script's steps are counted."
    )
    return Table("Recovery times", ("at", "what happened", *PARTS, "together"), rows[:MAX_ROWS], note if rows else "")


def latest_to_join(job: Job) -> Table:
    """Return which nodes the others waited for."""
    rows = [
        (f"{_where(job, attempt)}round {late.round}", late.agent.name, span(late.seconds))
        for attempt, late in job.latest_to_join[:MAX_LATE]
    ]
    return Table("The slowest nodes to join", ("round", "node", "after the first one"), rows)


def lines_of_nodes(job: Job, attempt: Attempt) -> Table:
    """Return what the picture shows, as a table."""
    rows = []
    for round_ in attempt.rounds:
        for agent, event in round_.members.items():
            own = agent.by_round[round_.number]
            how = [what_happened(each) for each in own if each["name"] in ("failed", "signalled", "stalled")]
            over = next((each for each in own if each["name"] in ("succeeded", "stopping")), None)
            end = "lost" if agent.lost_at is not None and not over else ", ".join(how) or _end_words(over)
            wait = number(event, "seconds")
            started = agent.one(round_.number, "started")
            cells = (
                str(round_.number),
                agent.name,
                str(count(event, "group_rank")),
                NONE if wait is None else span(wait),
                since(job, agent.at(event)),
                since(job, agent.at(started)) if started else NONE,
                since(job, agent.at(over)) if over else NONE,
                end,
            )
            rows.append(cells)
    more = f"{len(rows) - MAX_ROWS} more rows are left out." if len(rows) > MAX_ROWS else ""
    header = ("round", "node", "rank", "waited", "formed", "started", "over", "how")
    return Table("The time line as a table", header, rows[:MAX_ROWS], more)


def _end_words(event: Event | None) -> str:
    if event is None:
        return "no event"
    return "succeeded" if event["name"] == "succeeded" else f"stopped: {cause_words(text(event, 'cause'))}"


def failures(job: Job) -> list[Failure]:
    """Return a block for each failure, in order."""
    blocks = []
    for attempt in job.attempts:
        for event, what in attempt.failures:
            cause, *others = objects(event, "failures")
            at = number(cause, "failed_at")
            facts = [
                ("rank", f"{count(cause, 'rank')} (local rank {count(cause, 'local_rank')}, {_pid(cause)})"),
                ("host", text(cause, "host")),
                ("exit", text(cause, "how")),
                ("time", NONE if at is None else moment(at)),
                ("note", text(cause, "note")),
                ("error", text(cause, "error")),
                ("then", "the job restarted" if what == "restarted" else text(event, "why") or "the job ended"),
            ]
            where = f"{_where(job, attempt)}round {count(event, 'round')}"
            title = f"{where}: rank {count(cause, 'rank')} on {text(cause, 'host')}"
            consequences = [_consequence(other) for other in others]
            details = text(cause, "traceback") or text(cause, "stderr")
            blocks.append(Failure(title, [fact for fact in facts if fact[1]], details.rstrip(), consequences))
    return blocks


def _consequence(failure: Event) -> str:
    parts = (text(failure, "how"), text(failure, "error"), text(failure, "note"))
    return f"rank {count(failure, 'rank')} on {text(failure, 'host')}: {'; '.join(filter(None, parts))}"


def _pid(failure: Event) -> str:
    pid = count(failure, "worker_pid")
    return f"pid {pid}" if pid > 0 else "not started"


def warnings(job: Job) -> Table:
    """Return the warnings of all nodes."""
    found = job.warnings
    rows = [(since(job, agent.at(event)), agent.name, text(event, "text")) for _, agent, event in found[:MAX_ROWS]]
    more = f"{len(found) - MAX_ROWS} more are left out." if len(found) > MAX_ROWS else ""
    return Table("Warnings", ("at", "node", "line"), rows, more)


def remarks(job: Job) -> list[str]:
    """Return what the reader has to know about the report itself."""
    said = list(job.problems)
    for attempt in job.attempts:
        wrong = {host: correction for host, correction in attempt.clocks.items() if correction}
        for host, correction in sorted(wrong.items()):
            how = "behind" if correction > 0 else "ahead"
            said.append(f"{_where(job, attempt)}the clock of {host} was {span(abs(correction))} {how}; corrected")
    if any(len(attempt.clocks) > 1 for attempt in job.attempts):
        said.append(
            "The clocks of hosts may differ; they were compared by the rounds, which form on all nodes at once."
        )
    return said


def _where(job: Job, attempt: Attempt) -> str:
    """Return the beginning of a text about an attempt, if there are several."""
    return f"attempt {job.attempts.index(attempt) + 1}, " if len(job.attempts) > 1 else ""


def tables(job: Job) -> Sequence[Table]:
    """Return the tables that both formats have, in order, without empty ones."""
    return [table for table in (goodput(job), downtime(job), recoveries(job), latest_to_join(job)) if table.rows]
