"""Show where all ranks of a job stand, on one screen: the odd one first, then who stands where, the minority first."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_launch.core.progress import waits
from elastic_launch.core.progress.stack_groups import Group, Merged, RankView
from elastic_launch.core.progress.stacks import Frame, is_users, place_of
from elastic_launch.core.progress.verdict import Verdict
from elastic_launch.core.text import counted, ranks_text

MAX_LINES = 40
"""Lines of a report."""
_MAX_RANKS = 30
"""Characters of a list of ranks."""
_SUSPECT_FRAMES = 6
"""Frames shown of the first suspect's stack."""
_MUCH = 1 << 20
"""Bytes from which on it is told that a rank moved data. Its answers to the two looks move some, too."""
_STATES = {
    "D": "waiting for a device or a file system",
    "T": "stopped by a signal",
    "t": "held by a debugger",
    "Z": "ended",
}


def render(merged: Merged, verdict: Verdict, width: int) -> str:
    """Return the report.

    Args:
        merged: where all ranks stand.
        verdict: which rank is the odd one out.
        width: maximum characters of a line.
    """
    lines = _wrapped(_headline(merged, verdict), width)
    suspect = _group_of(merged, verdict.ranks[0]) if verdict.ranks else None
    if suspect is not None:
        lines += [f"  {line}" for line in _facts(merged, suspect, verdict.ranks[0])]
        lines += _frame_lines(suspect.frames, _SUSPECT_FRAMES)
        for group in _below(merged, verdict.ranks[0])[:1]:
            what = f"thread {group.thread}" if group.thread else f"process {group.child}"
            lines += [f"  its {what}: {_conduct(group)}", *_frame_lines(group.frames, _SUSPECT_FRAMES)]
    shown = [group for group in merged.worker_groups() if group != suspect or len(group.ranks) > 1]
    lines += _group_lines(merged, shown, merged.left_out, MAX_LINES - len(lines) - 1)
    return "\n".join(_cut(line, width) for line in lines)


def _headline(merged: Merged, verdict: Verdict) -> str:
    if not verdict.ranks:
        return verdict.why if verdict.kind in ("host", "advancing") else f"no rank stands out: {verdict.why}"
    first, *more = verdict.ranks
    pid = f", pid {merged.workers[first].pid}" if first in merged.workers else ""
    name = f"rank {first} ({merged.hosts.get(first, 'unknown host')}{pid})"
    if verdict.kind == "debugger":
        return f"{name} is in a debugger: not a stall"
    if len(merged.hosts) == 1:
        return f"{name} {verdict.words}"
    what, likewise = ("is", "so") if verdict.certain else ("is probably", "perhaps")
    also = f"; {likewise} are {counted(len(more), 'other')}: {_short(ranks_text(more))}" if more else ""
    return f"{name} {what} the odd one out: it {verdict.words}{also}"


def _facts(merged: Merged, group: Group, rank: int) -> list[str]:
    view = merged.workers.get(rank)
    facts = [_conduct(group)]
    if group.syscall or group.wchan:
        facts.append("in " + ", ".join(filter(None, (group.syscall, group.wchan))))
    if view is not None:
        facts += _steps([view])
        moved = f" and {_size(view.io_bytes)} read or written" if view.io_bytes >= _MUCH else ""
        facts.append(f"{view.cpu:.1f} s of CPU{moved} in {merged.seconds:.1f} s")
    return [", ".join(facts), *([group.command] if group.command else [])]


def _conduct(group: Group) -> str:
    stuck = "running on the same line" if group.state == "R" else "stuck"
    return _STATES.get(group.state, stuck if group.is_stuck else "moving")


def _group_lines(merged: Merged, groups: Sequence[Group], left_out: int, room: int) -> list[str]:
    """Return the lines on groups. The largest is always among them: it is what the others are compared with."""
    if not groups:
        return []
    frames = next((count for count in (4, 3, 2, 1) if len(groups) * (count + 1) <= room - 2), 1)
    fits = max(1, (room - 2) // (frames + 1))
    kept = groups if len(groups) <= fits else [*groups[: fits - 1], groups[-1]]
    blocks = [[_title(merged, group), *_frame_lines(group.frames, frames)] for group in kept]
    dropped = [group for group in groups if group not in kept]
    if dropped or left_out:
        ranks = sum(len(group.ranks) for group in dropped)
        more = f"and {counted(len(dropped) + left_out, 'more group')}"
        blocks.insert(len(blocks) - 1, [f"{more}, of {counted(ranks, 'rank')}" if not left_out else more])
    return ["", *(line for block in blocks for line in block)]


def _title(merged: Merged, group: Group) -> str:
    """Return a line such as ``3 ranks (0-2): stuck in all_reduce, 0 % CPU, 412 steps, the last 61 s ago``."""
    ranks = ranks_text(group.ranks)
    name = f"rank {ranks}" if len(group.ranks) == 1 else f"{len(group.ranks):,} ranks ({_short(ranks)})"
    what = _conduct(group)
    if group.is_stuck and (collective := waits.collective_of(group.frames)):
        what += f" in {collective}"
    views = [merged.workers[rank] for rank in group.ranks if rank in merged.workers]
    facts = [what]
    if group.child:
        facts.insert(0, f"process {group.child}")
    elif views and merged.seconds > 0:
        facts += [_span([view.cpu / merged.seconds * 100 for view in views], "% CPU"), *_steps(views)]
    if not group.frames and group.command:
        facts.append(group.command)
    return f"{name}: {', '.join(facts)}"


def _steps(views: Sequence[RankView]) -> list[str]:
    steps = [view.steps for view in views if view.steps >= 0]
    since = [view.since for view in views if view.since >= 0]
    return [
        *([_span(steps, "step" if steps == [1] else "steps")] if steps else []),
        *([f"the last {_span(since, 's ago')}"] if since else []),
    ]


def _span(values: Sequence[float], unit: str) -> str:
    """Return ``3 unit`` or ``3-5 unit``."""
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return f"{low} {unit}" if low == high else f"{low}-{high} {unit}"


def _frame_lines(frames: tuple[Frame, ...], limit: int) -> list[str]:
    """Return the lines of a stack, innermost first: the first call, and of the others the user's before the libraries'.

    A single line is the user's.
    """
    if limit == 1 and (place := place_of(frames)):
        frames = (place,)
    indices = range(1, len(frames))
    by_interest = sorted(indices, key=lambda index: (not is_users(frames[index]), index))
    kept = sorted([0, *by_interest[: limit - 1]]) if frames else []
    texts = []
    for position, index in enumerate(kept):
        frame = frames[index]
        gap = position and index > kept[position - 1] + 1
        line = f":{frame.line}" if frame.line else ""
        texts.append(f"      {'… ' if gap else ''}{frame.file}{line} in {frame.function}")
    return texts


def _group_of(merged: Merged, rank: int) -> Group | None:
    return next((group for group in merged.worker_groups() if rank in group.ranks), None)


def _below(merged: Merged, rank: int) -> list[Group]:
    """Return the groups of a rank's other processes and threads that do not wait for work."""
    mine = [group for group in merged.groups if not group.is_worker() and rank in group.ranks]
    return [group for group in mine if group.state in _STATES or not waits.is_idle(group.frames)]


def _short(ranks: str) -> str:
    return ranks if len(ranks) <= _MAX_RANKS else f"{ranks[:_MAX_RANKS].rpartition(',')[0]},…"


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count //= 1024
    return f"{count} GiB"


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1].strip() and len(lines[-1]) + 1 + len(word) > width:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _cut(line: str, width: int) -> str:
    """Return a line in a width; of a path the end is worth more than its beginning."""
    if len(line) <= width:
        return line
    body = line.lstrip()
    indent = line[: len(line) - len(body)]
    if ".py:" in body:
        return f"{indent}…{body[-(width - len(indent) - 1) :]}"
    return line[: width - 1] + "…"
