"""Which ranks stand where: the processes of each node, seen twice and grouped, and the groups of all nodes united.

A node's part is a record for the job's store, so it is bounded: it has each frame once, and groups refer to frames by
number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from elastic_launch.core.progress import waits
from elastic_launch.core.progress.stacks import Frame, KernelView, Observation, Thread, is_users, short_path
from elastic_launch.core.rendezvous.records import RULES, encode, record_of
from elastic_launch.core.rendezvous.rules import Rules, each, flag, line, seconds, whole

MAX_BYTES = 65536
"""Bytes of a node's part, encoded."""
_MAX_RANKS = 512
"""Ranks of a node whose steps are told."""
_MAX_GROUPS = 2048
"""Groups of the whole job that are kept apart."""
_MAX_FRAMES = 24
"""Frames of a stack that are kept; more only if they are the user's."""
_MAX_USER_FRAMES = 8
"""The user's frames that are kept beyond these."""
_MAX_TEXT = 300
"""Characters of a path, a function or a command."""
_BUSY = 0.5
"""Share of a CPU from which on a process counts as running."""
_IDLE = 0.05
"""Share of a CPU up to which a process without a stack counts as stuck."""


class Group(NamedTuple):
    """Processes, or threads of theirs, that stand in the same place."""

    ranks: tuple[int, ...]
    """Their ranks, ascending; those of the workers that they belong to."""
    frames: tuple[Frame, ...] = ()
    """Their stack, innermost first; of a moving process, what both looks have in common. Empty: not known."""
    state: str = "S"
    """R: ran between the two looks; S: slept; else as in ``KernelView.state``."""
    is_stuck: bool = False
    """Whether the stack was the same both times, and no step was made between."""
    child: str = ""
    """Name of the processes below the workers that these are; empty: the workers themselves."""
    thread: str = ""
    """Name of the threads that these are; empty: main threads."""
    syscall: str = ""
    """The system call that they wait in, if it tells more than the stack."""
    wchan: str = ""
    """As in ``KernelView``, if the state is D, or S without a stack."""
    is_traced: bool = False
    """Whether a debugger is attached."""
    reads_stdin: bool = False
    """Whether they wait for input on descriptor 0."""
    command: str = ""
    """Their command line, if there is no stack."""

    def is_worker(self) -> bool:
        """Return whether these are the main threads of workers."""
        return not self.child and not self.thread


class RankView(NamedTuple):
    """A worker as its agent sees it."""

    rank: int
    pid: int
    steps: int = -1
    """Iterations that it has made; -1: not known."""
    since: float = -1.0
    """Seconds from its last step to the second look; -1: not known, or none yet."""
    cpu: float = 0.0
    """Seconds of CPU time that it used between the two looks."""
    io_bytes: int = 0
    """Bytes that it read and wrote between the two looks."""


class NodeStacks(NamedTuple):
    """One node's part of the answer to the question where all ranks stand."""

    host: str
    seconds: float
    """Time between the two looks."""
    ranks: tuple[RankView, ...]
    frames: tuple[Frame, ...]
    """All frames that occur, each once."""
    groups: tuple[Group, ...]
    """The groups without their frames, rarest first."""
    stacks: tuple[tuple[int, ...], ...]
    """For each group the numbers of its frames."""
    left_out: int = 0
    """Number of groups that had no room."""


_TEXT = line(1000)
_RANK = whole(0, 2**31)
_NUMBER = whole(0, MAX_BYTES)
"""How many of something, or which one: each takes more than a byte."""
RULES |= {
    Frame: Rules(MAX_BYTES, {"file": _TEXT, "line": whole(0, 2**31), "function": _TEXT}),
    Group: Rules(
        MAX_BYTES,
        {
            "ranks": each(_RANK, MAX_BYTES),
            "frames": each(record_of(Frame), 0),  # ``NodeStacks.stacks`` stands for them
            "state": line(8),
            "is_stuck": flag,
            "child": _TEXT,
            "thread": _TEXT,
            "syscall": _TEXT,
            "wchan": _TEXT,
            "is_traced": flag,
            "reads_stdin": flag,
            "command": _TEXT,
        },
        (("must have a rank", lambda it: it.ranks),),
    ),
    RankView: Rules(
        MAX_BYTES,
        {
            "rank": _RANK,
            "pid": whole(-1, 2**31),
            "steps": whole(-1, 2**64),
            "since": seconds(1e11, -1e11),
            "cpu": seconds(1e11, -1e11),
            "io_bytes": whole(-(2**64), 2**64),
        },
    ),
    NodeStacks: Rules(
        MAX_BYTES,
        {
            "host": line(300),
            "seconds": seconds(1e9),
            "ranks": each(record_of(RankView), _MAX_RANKS),
            "frames": each(record_of(Frame), MAX_BYTES),
            "groups": each(record_of(Group), MAX_BYTES),
            "stacks": each(each(_NUMBER, MAX_BYTES), MAX_BYTES),
            "left_out": _NUMBER,
        },
        (
            ("must have a stack for each group", lambda it: len(it.groups) == len(it.stacks)),
            (
                "must have the frames of all stacks",
                lambda it: max((number for stack in it.stacks for number in stack), default=-1) < len(it.frames),
            ),
        ),
    ),
}


class Merged(NamedTuple):
    """Where all ranks of a job stand."""

    groups: tuple[Group, ...]
    """Workers first, then processes below them, then other threads; the rarest first."""
    workers: Mapping[int, RankView]
    """By rank."""
    hosts: Mapping[int, str]
    """The host of each rank, also of those whose host does not answer."""
    missing: tuple[tuple[str, tuple[int, ...]], ...]
    """Hosts that do not answer, and their ranks."""
    seconds: float
    """Time between the two looks, the longest of all nodes."""
    left_out: int = 0
    """Number of groups that are not among ``groups``."""

    def worker_groups(self) -> list[Group]:
        """Return the groups of workers' main threads, rarest first."""
        return [group for group in self.groups if group.is_worker()]


# ---- one node


def summarize(
    host: str,
    first: Sequence[Observation],
    second: Sequence[Observation],
    last_steps: Mapping[int, tuple[int, float]],
) -> NodeStacks:
    """Return a node's part.

    Args:
        host: the node's name.
        first: its processes at the first look.
        second: its processes some seconds later. Those that have ended since are left out.
        last_steps: for each rank the iterations that it has made, and the seconds from the last one to the second look,
            negative if there was none.
    """
    before = {(seen.rank, seen.pid): seen for seen in first}
    found: dict[Group, set[int]] = {}
    ranks, longest = [], 0.0
    for now in second:
        then = before.get((now.rank, now.pid))
        seconds = now.time - then.time if then else 0.0
        longest = max(longest, seconds)
        used = now.kernel.cpu_seconds - then.kernel.cpu_seconds if then else 0.0
        steps, since = last_steps.get(now.rank, (-1, -1.0))
        if not now.child:
            moved = now.kernel.io_bytes - then.kernel.io_bytes if then else 0
            ranks.append(RankView(now.rank, now.pid, steps, round(since, 1), round(used, 2), moved))
        has_advanced = 0 <= since < seconds
        for group in _groups_of(then, now, used / seconds if seconds > 0 else -1.0, has_advanced):
            found.setdefault(group, set()).add(now.rank)
    groups = [group._replace(ranks=tuple(sorted(members))) for group, members in found.items()]
    return _packed(host, longest, ranks, sorted(groups, key=_order))


def _groups_of(then: Observation | None, now: Observation, share: float, has_advanced: bool) -> Iterable[Group]:
    """Yield the places where a process stands, as groups without ranks.

    Args:
        then: what was seen first; None if nothing was.
        now: what was seen last.
        share: the part of one CPU that it used between; negative: not known.
        has_advanced: whether the worker has made a step between.
    """
    kernel, kernel_then = now.kernel, then.kernel if then else KernelView()
    state = _state(kernel_then.state, kernel.state, share)
    frames, frames_then = now.main_frames(), then.main_frames() if then else ()
    if frames and frames_then:
        is_stuck = frames == frames_then
        frames = frames if is_stuck else _common(frames_then, frames)
    else:
        is_stuck = state in ("D", "T", "t", "Z") or (then is not None and not frames and 0 <= share < _IDLE)
        frames = frames or frames_then
    is_stuck = is_stuck and not has_advanced
    is_same_call = kernel.syscall == kernel_then.syscall and is_stuck and not waits.collective_of(frames)
    group = Group(
        ranks=(),
        frames=_trimmed(frames),
        state=state,
        is_stuck=is_stuck,
        child=now.child[:_MAX_TEXT],
        syscall=kernel.syscall if is_same_call and state == "S" else "",
        wchan=kernel.wchan if state == "D" or (state == "S" and not frames) else "",
        is_traced=kernel.tracer_pid > 0,
        reads_stdin=kernel.reads_stdin,
        command="" if frames else kernel.command[:_MAX_TEXT],
    )
    if not now.child or frames or state in ("D", "T", "t", "Z"):  # others below a worker are helpers of Python's
        yield group
    for thread in now.threads:
        if not thread.is_main and not waits.is_idle(thread.frames):
            # Threads have no name before Python 3.14.
            stays = then is not None and _has(then.threads, thread)
            name = thread.name[:_MAX_TEXT] or "thread"
            child, is_stuck = now.child[:_MAX_TEXT], stays and not has_advanced
            yield Group((), _trimmed(thread.frames), is_stuck=is_stuck, child=child, thread=name)


def _state(then: str, now: str, share: float) -> str:
    """Return a group's state: what lasts.

    Whether a process runs, its CPU time tells better than one look; on a crowded host it waits for a CPU, though.
    """
    if now in ("T", "t", "Z") or (now == "D" and then == "D"):
        return now
    return "R" if share >= _BUSY or (now == "R" and then in ("R", "")) else "S"


def _common(then: tuple[Frame, ...], now: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Return the outer calls that two stacks have in common, and the one in which they part, as it is now."""
    same: list[Frame] = []
    for old, new in zip(reversed(then), reversed(now), strict=False):
        if (old.file, old.function) == (new.file, new.function):
            same.append(new)
        if old != new:
            break
    return tuple(reversed(same)) or now


def _trimmed(frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Return the innermost frames, and of the others some of the user's, with short paths.

    The launcher's own frames below the user's program are left out.
    """
    kept: list[Frame] = []
    for number, frame in enumerate(frames):
        if number < _MAX_FRAMES or (is_users(frame) and len(kept) < _MAX_FRAMES + _MAX_USER_FRAMES):
            kept.append(Frame(short_path(frame.file)[-_MAX_TEXT:], frame.line, frame.function[:_MAX_TEXT]))
    while kept and "elastic_launch/workers/" in kept[-1].file:
        kept.pop()
    return tuple(kept)


def _has(threads: Sequence[Thread], thread: Thread) -> bool:
    return any(other.frames == thread.frames and other.name == thread.name for other in threads)


def _order(group: Group) -> tuple[bool, bool, int, tuple[int, ...]]:
    """Sort key of groups: workers, processes below them, other threads; the rarest first."""
    return bool(group.thread), bool(group.child), len(group.ranks), group.ranks


def _packed(host: str, seconds: float, ranks: Sequence[RankView], groups: Sequence[Group]) -> NodeStacks:
    """Return the record of a node, with as many groups as have room."""
    part = NodeStacks(host, round(seconds, 3), tuple(ranks[:_MAX_RANKS]), (), (), ())
    size = len(encode(part)) + 100  # for left_out and the like
    numbers: dict[Frame, int] = {}
    kept: list[Group] = []
    stacks: list[tuple[int, ...]] = []
    for group in groups:
        new = [frame for frame in dict.fromkeys(group.frames) if frame not in numbers]
        bare = group._replace(frames=())
        # Each number of a frame takes at most 5 digits and a comma.
        cost = len(encode(bare)) + 6 * len(group.frames) + 4 + sum(len(encode(frame)) + 1 for frame in new)
        if size + cost > MAX_BYTES:
            continue
        size += cost
        for frame in new:
            numbers[frame] = len(numbers)
        kept.append(bare)
        stacks.append(tuple(numbers[frame] for frame in group.frames))
    return part._replace(
        frames=tuple(numbers), groups=tuple(kept), stacks=tuple(stacks), left_out=len(groups) - len(kept)
    )


# ---- all nodes


class Merger:
    """Unites the parts of nodes as they arrive. Its memory is bounded by the number of ranks and of groups."""

    def __init__(self) -> None:
        self._found: dict[Group, set[int]] = {}
        self._workers: dict[int, RankView] = {}
        self._hosts: dict[int, str] = {}
        self._frames: dict[Frame, Frame] = {}
        """Each frame once, however many groups have it."""
        self._seconds = 0.0
        self._left_out = 0

    def add(self, part: NodeStacks) -> None:
        """Add a node's part."""
        self._seconds = max(self._seconds, part.seconds)
        self._left_out += part.left_out
        for view in part.ranks:
            self._workers[view.rank] = view
            self._hosts[view.rank] = part.host
        for group, stack in zip(part.groups, part.stacks, strict=True):
            key = group._replace(ranks=(), frames=tuple(part.frames[number] for number in stack))
            if key not in self._found:
                if len(self._found) == _MAX_GROUPS:
                    self._left_out += 1
                    continue
                key = key._replace(frames=tuple(self._frames.setdefault(frame, frame) for frame in key.frames))
                self._found[key] = set()
            self._found[key].update(group.ranks)
            for rank in group.ranks:
                self._hosts.setdefault(rank, part.host)

    def result(self, missing: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Merged:
        """Return where all ranks stand.

        Args:
            missing: hosts that did not answer, with their ranks.
        """
        groups = [group._replace(ranks=tuple(sorted(members))) for group, members in self._found.items()]
        absent = {rank: host for host, ranks in missing for rank in ranks}
        return Merged(
            groups=tuple(sorted(groups, key=_order)),
            workers=self._workers,
            hosts={**absent, **self._hosts},
            missing=tuple(missing),
            seconds=self._seconds,
            left_out=self._left_out,
        )


def merge(parts: Iterable[NodeStacks], missing: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Merged:
    """Return where all ranks stand; see ``Merger``."""
    merger = Merger()
    for part in parts:
        merger.add(part)
    return merger.result(missing)
