"""Draw an attempt of a job as a time line: one row for each node, as SVG. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from elastic_launch.core.text import counted, duration
from elastic_launch.operate.report_data import Agent, Attempt, Event, count, headline, text

MAX_ROWS = 80
"""Nodes that are drawn. Those with trouble come before those without."""
_WIDTH, _NAME, _ROW, _TOP = 1000, 170, 24, 30
"""Of the picture, of the names, of a row and of the space above the first row; in units of the picture."""
_TICKS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400)
"""Distances of ticks, in seconds."""
_MIN = 1.5
"""Smallest width of anything, in units."""

STATES = {
    "waiting": "waits for the other nodes",
    "starting": "starts its workers",
    "working": "workers run",
    "stopping": "stops its workers",
    "unknown": "no events",
}
"""The states of a node, with what the legend says."""
THIN = ("waiting", "unknown")
"""States that are drawn as a thin bar, so that they differ from the others by more than colour."""


class Span(NamedTuple):
    """A state of a node, from and until when, in seconds since 1970."""

    state: str
    begin: float
    end: float


class Mark(NamedTuple):
    """Something that happened to a node at one moment."""

    sign: str
    at: float
    what: str


def spans(agent: Agent, end: float) -> list[Span]:
    """Return the states of a node in order.

    Args:
        agent: the node's agent.
        end: when the attempt ended, in seconds since 1970: up to then a node may be lost.
    """
    follows = {
        "joined": "waiting",
        "formed": "starting",
        "re_formed": "starting",
        "started": "working",
        "first_step": "working",
        "succeeded": "waiting",
        "stopping": "stopping",
        "stopped": "waiting",
    }
    changes = [(agent.at(event), follows[event["name"]]) for event in agent.events if event["name"] in follows]
    steps = {event.get("round") for event in agent.all("first_step")}
    for event in agent.all("started"):  # where steps are counted, the work begins with the first one
        if event.get("round") in steps:
            changes = [change for change in changes if change != (agent.at(event), "working")]
    found: list[Span] = []
    for (begin, state), (until, _) in zip(changes, [*changes[1:], (agent.last, "")], strict=False):
        if found and found[-1].state == state:
            found[-1] = found[-1]._replace(end=until)
        else:
            found.append(Span(state, begin, until))
    if agent.ended:
        return found
    return [*found, Span("unknown", agent.last, end if agent.lost_at is None else agent.lost_at)]


def marks(agent: Agent) -> list[Mark]:
    """Return the signs of a node's row."""
    found = []
    for event in agent.all("failed", "signalled", "stalled", "killed", "lease_expired", "cut_off"):
        found.append(Mark("×" if event["name"] == "failed" else "!", agent.at(event), what_happened(event)))
    if agent.lost_at is not None:
        found.append(Mark("?", agent.lost_at, "the other nodes noticed that this one was lost"))
    return found


def what_happened(event: Event) -> str:
    """Describe an event that has a sign."""
    if event["name"] == "failed":
        return headline({"failures": [{**event, "host": event["host"]}]})
    return " ".join(filter(None, (event["name"].replace("_", " "), text(event, "signal") or text(event, "reason"))))


def shown(attempt: Attempt) -> list[Agent]:
    """Return the nodes that are drawn, in their order."""
    if len(attempt.agents) <= MAX_ROWS:
        return attempt.agents
    by_trouble = sorted(attempt.agents, key=lambda agent: (not marks(agent), agent.ended is not None))
    chosen = set(by_trouble[:MAX_ROWS])
    return [agent for agent in attempt.agents if agent in chosen]


def span(seconds: float) -> str:
    """Return a duration, down to milliseconds: that is how long a restart may take."""
    return duration(seconds) if seconds >= 1 or seconds < 0.0005 else f"{1000 * seconds:.0f} ms"


def describe(attempt: Attempt) -> str:
    """Return what the picture shows, for those who do not see it."""
    parts = [f"{counted(len(attempt.agents), 'node')}, {counted(len(attempt.rounds), 'round')}."]
    for round_ in attempt.rounds:
        at = span(round_.formed_at - attempt.begin)
        parts.append(f"Round {round_.number} formed after {at} with {counted(len(round_.members), 'node')}.")
        if event := round_.restarting:
            parts.append(f"It ended because {cause_words(text(event, 'cause'))}.")
    return " ".join([*parts, f"The outcome: {attempt.outcome}."])


CAUSES = {
    "failed": "a worker failed",
    "port_taken": "another process had taken the workers' port",
    "node_lost": "a node was lost",
    "node_left": "a node left",
    "node_joining": "another node joined",
    "node_late": "a node came too late for its place",
    "cut_off": "a node was cut off from the store",
    "store_restarted": "the store was restarted",
    "restart_requested": "a restart was requested",
    "membership_changed": "the membership changed",
    "hang": "the job hung",
    "requeued": "the job was started again",
    "startup": "the job started",
}


def cause_words(cause: str) -> str:
    """Return a cause in words; one that is new to this version as it is."""
    return CAUSES.get(cause, cause.replace("_", " ") or "of an unknown cause")


def svg(attempt: Attempt, id_: str) -> str:
    """Return the picture.

    Args:
        attempt: what to draw.
        id_: begins the ids of the elements, which are unique in a page.
    """
    agents = shown(attempt)
    begin, seconds = attempt.begin, max(attempt.end - attempt.begin, 0.001)
    scale = (_WIDTH - _NAME - 20) / seconds
    height = _TOP + _ROW * len(agents) + 8

    def x(at: float) -> float:
        return _NAME + (at - begin) * scale

    lines = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="{id_}-title {id_}-desc">',
        f'<title id="{id_}-title">Time line of {counted(len(agents), "node")}</title>',
        f'<desc id="{id_}-desc">{escape(describe(attempt))}</desc>',
        *_axis(seconds, scale, height),
    ]
    for round_ in attempt.rounds:
        at = x(round_.formed_at)
        lines.append(f'<line class="round" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 6}" y2="{height - 8}"/>')
    for index, agent in enumerate(agents):
        top = _TOP + _ROW * index
        lines.append(f'<text class="name" x="{_NAME - 10}" y="{top + 16}">{escape(_fitting(agent.name))}</text>')
        for state, since, until in spans(agent, attempt.end):
            thickness = 4 if state in THIN else 14
            width = max(_MIN, (until - since) * scale)
            what = f"{agent.name} {STATES[state]}, {span(until - since)}"
            lines.append(
                f'<rect class="{state}" x="{x(since):.1f}" y="{top + (_ROW - thickness) / 2:.0f}" width="{width:.1f}" '
                f'height="{thickness}"><title>{escape(what)}</title></rect>'
            )
        for sign, at, what in marks(agent):
            lines.append(
                f'<text class="mark" x="{x(at):.1f}" y="{top + 17}">{sign}<title>{escape(what)}</title></text>'
            )
    return "\n".join([*lines, "</svg>"])


def _axis(seconds: float, scale: float, height: float) -> Iterator[str]:
    # A tick's text takes about 80 units.
    step = next((step for step in _TICKS if step * scale >= 80), max(_TICKS[-1], 100 / scale))
    tick = 0.0
    while tick <= seconds:
        at = _NAME + tick * scale
        yield f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 8}" y2="{height - 8}"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{_TOP - 12}">{duration(tick) if tick else "0"}</text>'
        tick += step


def _fitting(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"


def size_of(attempt: Attempt) -> tuple[int, int]:
    """Return the largest numbers of nodes and of workers that a round of the attempt had."""
    events = [event for round_ in attempt.rounds for event in round_.members.values()]
    sizes = [(count(event, "nodes"), count(event, "world_size")) for event in events]
    return max((nodes for nodes, _ in sizes), default=0), max((workers for _, workers in sizes), default=0)
