"""Which rank is the odd one out, and why.

The reasons are a table, the strongest first. The first that holds for some rank decides. Some are true of a rank by
itself: it is stopped. Others need the rest of the job for comparison: it is not in the collective that they wait in.
What most ranks do makes none of them the odd one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from elastic_launch.core.progress import waits
from elastic_launch.core.progress.stack_groups import Group, Merged, RankView
from elastic_launch.core.progress.stacks import Frame, place_of
from elastic_launch.core.text import counted, listed, ranks_text

MAX_RANKS_SHOWN = 60
"""Characters of a list of ranks in a sentence."""


class Verdict(NamedTuple):
    """Which ranks hold up the job."""

    ranks: tuple[int, ...]
    """The most likely first; empty: none stands out."""
    why: str
    """What is known against them, or why none stands out, as in ``is stopped by a signal``."""
    place: str
    """Where the first of them stands, as in ``train.py:41 in step``; empty: not known."""
    certain: bool
    """Whether there is hardly another explanation."""
    kind: str
    """Name of the reason: that of a row of ``REASONS``, or ``host``. Without ranks ``advancing``, ``moving``,
    ``alike``, ``apart`` or ``unknown``.

    With ``debugger`` and ``advancing`` there is no stall."""

    @property
    def words(self) -> str:
        """``why``, with the place unless that is part of it."""
        return f"{self.why}, at {self.place}" if self.place and self.place not in self.why else self.why


class Scene(NamedTuple):
    """What the reasons compare with."""

    merged: Merged
    total: int
    """Number of ranks that are known of."""
    collective: str
    """The operation that most of those wait in that wait for other ranks; empty: none do."""
    waiting: tuple[int, ...]
    """The ranks that wait in it."""
    steps: int
    """The iterations that most ranks have made; -1: not known."""
    minority: frozenset[Group]
    """The groups of workers in the rarest place, if another has more ranks and most ranks are stuck."""
    has_advanced: bool
    """Whether every worker has made a step between the two looks."""


class Reason(NamedTuple):
    """A row of the table."""

    kind: str
    holds: Callable[[Scene, Group], bool]
    """Whether it is true of a group of workers."""
    why: Callable[[Scene, Group], str]
    """The words for it."""
    is_absolute: bool = False
    """Whether it is true of a rank whatever the others do; otherwise it must not hold for most ranks."""
    certain: bool = False


def _waits_for(kind: str) -> Callable[[Scene, Group], bool]:
    return lambda scene, group: group.is_stuck and waits.wait_of(group.frames, group.syscall) == kind


def _says(text: str) -> Callable[[Scene, Group], str]:
    return lambda scene, group: text


def _in_collective(group: Group) -> str:
    """Return the operation in which ranks wait for others; empty if they do not, or still run."""
    name = waits.collective_of(group.frames) if group.is_stuck else ""
    # A backward pass may also just take long.
    return "" if name == waits.BACKWARD and group.state == "R" else name


def _views(scene: Scene, group: Group) -> list[RankView]:
    return [view for rank in group.ranks if (view := scene.merged.workers.get(rank))]


def _behind(scene: Scene, group: Group) -> tuple[int, ...]:
    return tuple(view.rank for view in _views(scene, group) if 0 <= view.steps < scene.steps)


def _others(scene: Scene) -> str:
    ranks = ranks_text(scene.waiting)
    if len(ranks) > MAX_RANKS_SHOWN:
        ranks = f"{ranks[:MAX_RANKS_SHOWN].rpartition(',')[0]},… ({len(scene.waiting):,} ranks)"
    return f"rank {ranks} waits in" if len(scene.waiting) == 1 else f"ranks {ranks} wait in"


def _why_not_collective(scene: Scene, group: Group) -> str:
    detail = next((row.why(scene, group) for row in _DETAILS if row.holds(scene, group)), "")
    return f"is not in the {scene.collective} that {_others(scene)}" + (f", but {detail}" if detail else "")


def _why_behind(scene: Scene, group: Group) -> str:
    fewest = min(view.steps for view in _views(scene, group) if view.steps >= 0)
    return f"has made {counted(fewest, 'step')}, most others {scene.steps:,}"


def _why_data(scene: Scene, group: Group) -> str:
    child = _data_child(scene.merged, group.ranks[0])
    if child is None:
        return "waits for data from its DataLoader"
    conduct = {"T": "is stopped by a signal", "D": "waits for a device or a file system", "Z": "has ended"}
    what = conduct.get(child.state) or f"stands at {place_text(child.frames)}"
    return f"waits for its DataLoader, whose process {child.child} {what}"


def _data_child(merged: Merged, rank: int) -> Group | None:
    """Return the process that a DataLoader waits for: one below its worker that does not wait for work itself."""
    below = [group for group in merged.groups if group.child and rank in group.ranks]
    busy = [group for group in below if group.state in ("T", "D", "Z") or not waits.is_idle(group.frames)]
    return busy[0] if busy else None


def _why_device(scene: Scene, group: Group) -> str:
    return f"waits for a device or a file system (state D{f', in {group.wchan}' if group.wchan else ''})"


_DETAILS = (
    Reason("data", _waits_for("data"), _why_data),
    Reason("stdin", lambda scene, group: group.reads_stdin, _says("waits for input on stdin")),
    Reason("lock", _waits_for("lock"), _says("waits for a lock, a queue or a thread")),
    Reason("sleep", _waits_for("sleep"), _says("sleeps")),
    Reason("network", _waits_for("network"), _says("waits for a reply on a connection")),
    Reason("process", _waits_for("process"), _says("waits for a process that it has started")),
    Reason("file", _waits_for("file"), _says("waits for a file or a pipe")),
    Reason("events", _waits_for("events"), _says("waits for events (poll, select)")),
    Reason(
        "busy",
        lambda scene, group: group.state == "R",
        lambda scene, group: f"uses a CPU, {'on the same line both times' if group.is_stuck else 'and moves'}",
    ),
    # Last, because many a call into a library waits so, too.
    Reason("futex", _waits_for("futex"), _says("waits for a lock (futex)")),
)
"""What a rank does, for its own sake or to say more about the reasons above."""
REASONS = (
    Reason("stopped", lambda scene, group: group.state == "T", _says("is stopped by a signal"), True, True),
    Reason("device", lambda scene, group: group.state == "D", _why_device, True, True),
    Reason(
        "debugger",
        lambda scene, group: group.state == "t" or group.is_traced or waits.is_debugger(group.frames),
        _says("is in a debugger"),
        True,
        True,
    ),
    # A worker whose data ended earlier than the others', for example.
    Reason(
        "ended",
        lambda scene, group: bool(scene.collective) and group.state == "Z",
        lambda scene, group: f"has ended, but {_others(scene)} {scene.collective}",
        certain=True,
    ),
    Reason(
        "collective",
        lambda scene, group: bool(scene.collective) and not _in_collective(group),
        _why_not_collective,
        certain=True,
    ),
    Reason(
        "mismatch",
        lambda scene, group: bool(scene.collective) and _in_collective(group) != scene.collective,
        lambda scene, group: f"waits in {_in_collective(group)}, but {_others(scene)} {scene.collective}",
    ),
    Reason("steps", lambda scene, group: bool(_behind(scene, group)), _why_behind),
    *_DETAILS,
    Reason(
        "minority",
        lambda scene, group: group in scene.minority,
        lambda scene, group: f"is in another place than most of the {scene.total:,} ranks",
    ),
)
_DETAIL_ORDER = {reason.kind: number for number, reason in enumerate(_DETAILS)}


def judge(merged: Merged) -> Verdict:
    """Return which ranks are the odd ones out."""
    if merged.missing:
        return _absent(merged)
    groups = merged.worker_groups()
    if not groups:
        return Verdict((), "no stacks are known", "", False, "unknown")
    scene = _scene(merged, groups)
    for reason in REASONS:
        found = [group for group in groups if reason.holds(scene, group)]
        if reason.kind == "steps":
            found = [group._replace(ranks=_behind(scene, group)) for group in found]
        count = sum(len(group.ranks) for group in found)
        if not count or not (reason.is_absolute or _is_odd(scene, reason, count)):
            continue
        found.sort(key=lambda group: _suspicion(scene, group))
        ranks = tuple(rank for group in found for rank in _slowest_first(scene, group))
        # A rank that runs while others wait may be about to join them, unless its steps show that it does not.
        is_sure = reason.is_absolute or (2 * count <= scene.total and (found[0].is_stuck or scene.steps >= 0))
        certain = reason.certain and is_sure
        return Verdict(ranks, reason.why(scene, found[0]), _place(scene, found[0]), certain, reason.kind)
    return _nobody(scene, groups)


_AT_WORK = 1 << 20
"""Bytes read and written between the two looks from which on a worker is at work."""


def is_busy(merged: Merged) -> bool:
    """Return whether a worker is at work, as in an evaluation: it moves, computes, or reads or writes data."""
    has_transferred = any(view.io_bytes >= _AT_WORK for view in merged.workers.values())
    return has_transferred or any(
        not group.is_stuck or (group.state == "R" and not _in_collective(group)) for group in merged.worker_groups()
    )


def _absent(merged: Merged) -> Verdict:
    hosts = [host for host, _ in merged.missing]
    ranks = tuple(rank for _, ranks in merged.missing for rank in ranks)
    if not ranks:
        return Verdict((), f"no answer from {listed(hosts)}", "", True, "host")
    first = merged.hosts[ranks[0]]
    others = [host for host in hosts if host != first]
    more = f"; nor do {listed(others)}" if len(others) > 1 else f"; nor does {others[0]}" if others else ""
    return Verdict(ranks, f"is on {first}, which does not answer{more}", "", True, "host")


def _is_odd(scene: Scene, reason: Reason, count: int) -> bool:
    """Return whether a reason that holds for some ranks sets them apart from the others."""
    if scene.has_advanced or (count == scene.total and scene.total > 1):
        return False
    # However many do not come to the collective, the others wait for them.
    return count == 1 or reason.kind in ("ended", "collective") or 2 * count < scene.total


def _scene(merged: Merged, groups: Sequence[Group]) -> Scene:
    waiting: dict[str, list[int]] = {}
    places: dict[Frame | None, list[Group]] = {}
    for group in groups:
        if name := _in_collective(group):
            waiting.setdefault(name, []).extend(group.ranks)
        places.setdefault(place_of(group.frames), []).append(group)
    collective = max(waiting, key=lambda name: len(waiting[name]), default="")
    made: dict[int, int] = {}
    for view in merged.workers.values():
        if view.steps >= 0:
            made[view.steps] = made.get(view.steps, 0) + 1
    sizes = {place: sum(len(group.ranks) for group in members) for place, members in places.items()}
    rarest = min(sizes, key=lambda place: sizes[place])
    views = merged.workers.values()
    stuck = sum(len(group.ranks) for group in groups if group.is_stuck)
    has_minority = sizes[rarest] < max(sizes.values()) and 2 * stuck > sum(sizes.values())
    return Scene(
        merged=merged,
        total=len(merged.hosts),
        collective=collective,
        waiting=tuple(sorted(waiting.get(collective, ()))),
        steps=max(made, key=lambda steps: (made[steps], steps), default=-1),
        minority=frozenset(places[rarest]) if has_minority else frozenset(),
        has_advanced=bool(views) and all(0 <= view.since < merged.seconds for view in views),
    )


def _suspicion(scene: Scene, group: Group) -> tuple[int, bool, int, tuple[int, ...]]:
    """Sort key of groups that the same reason holds for, the most suspect first."""
    details = [_DETAIL_ORDER[row.kind] for row in _DETAILS if row.holds(scene, group)]
    return min(details, default=len(_DETAILS)), not group.is_stuck, len(group.ranks), group.ranks


def _slowest_first(scene: Scene, group: Group) -> list[int]:
    workers = scene.merged.workers
    return sorted(group.ranks, key=lambda rank: (workers[rank].steps if rank in workers else -1, rank))


def _place(scene: Scene, group: Group) -> str:
    child = _data_child(scene.merged, group.ranks[0]) if _waits_for("data")(scene, group) else None
    return place_text(child.frames if child and child.frames else group.frames)


def place_text(frames: tuple[Frame, ...]) -> str:
    """Return where a stack stands, as in ``train.py:41 in step``; empty if it is not known."""
    frame = place_of(frames)
    return f"{frame.file.rpartition('/')[2]}:{frame.line} in {frame.function}" if frame else ""


def _nobody(scene: Scene, groups: Sequence[Group]) -> Verdict:
    """Return the verdict when no rank stands out."""
    everybody = "the only rank" if scene.total == 1 else f"all {scene.total:,} ranks"
    places = {place_of(group.frames) for group in groups}
    place = place_text(groups[-1].frames) if len(places) == 1 else ""
    at = f", at {place}" if place else ""
    if scene.has_advanced:
        return Verdict((), f"{everybody} made a step between the two looks", place, True, "advancing")
    if not any(group.is_stuck for group in groups):
        return Verdict((), f"the stacks of {everybody} moved between the two looks{at}", place, False, "moving")
    if len(scene.waiting) == scene.total > 1:
        why = f"{everybody} wait in the same {scene.collective}{at}: the network or a device may be at fault"
    elif len(places) == 1:
        why = f"the stacks of {everybody} stayed in the same place{at}: the network or a device may be at fault"
    else:
        return Verdict((), f"the stacks of {everybody} are in {len(places):,} places", place, False, "apart")
    return Verdict((), why, place, False, "alike")
