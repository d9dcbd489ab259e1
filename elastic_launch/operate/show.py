"""Show the view of a job as text: summaries first, then nodes and rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_launch.core.text import counted, duration
from elastic_launch.operate.text import NONE, clock, cut, span, spans, table

MAX_NODES = 24
"""Nodes that are listed; of more, those are listed that stand out."""
MAX_ROUNDS = 8
"""Latest rounds that are listed."""
_USUAL = ("running", "joined")
"""States of nodes that do not stand out."""


def screen(view: Mapping[str, Any], now: float, width: int = 0) -> list[str]:
    """Return the lines that show a job.

    Args:
        view: as from ``core.job_view``.
        now: in seconds since 1970.
        width: columns of the terminal; 0: lines are not cut.
    """
    lines = [f"{name:<9} {text}" for name, text in _summary(view, now) if text]
    lines += ["", *_nodes(view["nodes"])]
    if len(view["rounds"]) > 1 or any(round_["end"] for round_ in view["rounds"]):
        lines += ["", *_rounds(view["rounds"], now)]
    return [cut(line, width) for line in lines]


def one_line(view: Mapping[str, Any]) -> str:
    """Return the state of a job in one line, without what changes all the time."""
    parts = [
        f"round {view['round']}" if view["round"] is not None else "",
        _size(view),
        f"restarts: {restarts}" if (restarts := _restarts(view)) else "",
        f"waits for {view['waits_for'].partition(';')[0]}" if view["waits_for"] else "",
        f"last: {view['last_trouble']}" if view["last_trouble"] else "",
    ]
    return f"{view['job']} {view['state']}: {', '.join(filter(None, parts))}"


def _summary(view: Mapping[str, Any], now: float) -> list[tuple[str, str]]:
    round_, since = view["round"], view["round_started_at"]
    state = view["state"]
    if round_ is not None:
        state += f", round {round_}" + (f" for {duration(max(0.0, now - since))}" if since else "")
    started = view["started_at"]
    store = view["store"] or {}
    progress = view["progress"] or {}
    return [
        ("job", view["job"] + (f": {view['program']}" if view["program"] else "")),
        ("state", state),
        ("size", _size(view)),
        ("since", f"{clock(started, now)}, {duration(max(0.0, now - started))} ago" if started else ""),
        ("restarts", _restarts(view)),
        ("progress", progress.get("summary", "") + (", stalled" if progress.get("stalled") else "")),
        ("waits for", view["waits_for"] or ""),
        ("last", view["last_trouble"] or ""),
        ("files", view["log_dir"] or ""),
        ("store", f"{store['backend']} at {store['endpoint']}" if store.get("endpoint") else ""),
    ]


def _size(view: Mapping[str, Any]) -> str:
    count = view["node_count"] or len(view["nodes"])
    low, high = view["min_nodes"], view["max_nodes"]
    limits = f" (of {low} to {high})" if low != high and high else ""
    workers = f", {counted(view['world_size'], 'worker')}" if view["world_size"] else ""
    return f"{counted(count, 'node')}{limits}{workers}" if count else ""


def _restarts(view: Mapping[str, Any]) -> str:
    if view["restarts"] is None:
        return ""
    limit = f" of {view['max_restarts']}" if view["max_restarts"] is not None else ""
    uncharged = view["uncharged_restarts"]
    return f"{view['restarts']}{limit} used" + (f", {uncharged} uncharged" if uncharged else "")


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = list(nodes)
    lines: list[str] = []
    if len(nodes) > MAX_NODES:
        lines.append(
            ", ".join(f"{count:,} {state}" for state, count in Counter(n["state"] for n in nodes).most_common())
        )
        stand_out = [node for node in nodes if node["state"] not in _USUAL or node["role"]]
        shown = sorted(stand_out[:MAX_NODES], key=nodes.index) or list(nodes[:MAX_NODES])
    rows = [("NODE", "HOST", "PID", "STATE", "RANKS", "ROLE", "HEARTBEAT")]
    lines += table([*rows, *map(_node, shown)])
    if more := len(nodes) - len(shown):
        lines.append(f"and {counted(more, 'node')} more; --json lists all")
    return lines


def _node(node: Mapping[str, Any]) -> tuple[Any, ...]:
    ranks, heartbeat = node["ranks"], node["heartbeat"]
    others = _others(node["workers"] or [], node["state"])
    return (
        NONE if node["group_rank"] is None else node["group_rank"],
        node["host"],
        node["pid"],
        node["state"] + (f" ({others})" if others else ""),
        span(*ranks) if ranks else None,
        node["role"],
        None if heartbeat is None else f"{duration(heartbeat)} ago",
    )


def _others(workers: Sequence[Mapping[str, Any]], state: str) -> str:
    """Name the workers whose state is not that of their node, as in ``rank 0-2 succeeded``."""
    by_state: dict[str, list[int]] = {}
    for worker in workers:
        by_state.setdefault(worker["state"], []).append(worker["rank"])
    return ", ".join(f"rank {spans(ranks)} {its}" for its, ranks in by_state.items() if its != state)


def _rounds(rounds: Sequence[Mapping[str, Any]], now: float) -> list[str]:
    rows: list[tuple[Any, ...]] = [("ROUND", "BEGAN", "NODES", "WORKERS", "LASTED", "ENDED BECAUSE")]
    for it in rounds[-MAX_ROUNDS:]:
        begin, end = it["started_at"], it["ended_at"]
        lasted = duration(max(0.0, end - begin)) if begin and end else None
        rows.append((it["round"], begin and clock(begin, now), it["nodes"], it["world_size"], lasted, it["reason"]))
    before = len(rounds) - MAX_ROUNDS
    return [*table(rows), *([f"and {counted(before, 'round')} before; --json lists them"] if before > 0 else [])]
