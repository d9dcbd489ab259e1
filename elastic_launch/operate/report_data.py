"""What the events of a job tell about it: attempts, rounds, downtime, failures. Pure: files are read elsewhere.

The events may be of several nodes, whose clocks differ, and of several attempts of a job that was requeued. They may be
cut off, or be no events at all. Whatever can be read is used, and ``Job.problems`` says what could not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

Event = dict[str, Any]

CLOCK_ERROR = 0.1
"""Seconds by which nodes may see a round form at different times, although their clocks agree."""
MAX_PROBLEMS = 20
"""Problems of one file that are listed."""
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "time": (int, float),
    "name": str,
    "job": str,
    "host": str,
    "pid": int,
    "elapsed": (int, float),
}
"""Fields without which an event is of no use."""


def parse(file: str, data: bytes) -> tuple[list[Event], list[str]]:
    """Return the events in a file, and what is wrong with it.

    Args:
        file: its name, for the problems.
        data: its content.
    """
    events, bad = [], []
    lines = data.split(b"\n")
    cut_off = lines.pop()
    for number, line in enumerate([*lines, *([cut_off] if cut_off.strip() else [])], 1):
        if (event := _event(line)) is not None:
            events.append(event)
        elif line.strip():
            bad.append(number)
    problems = []
    if bad and cut_off.strip() and bad[-1] == len(lines) + 1:
        bad.pop()
        problems.append(f"{file}: the last line is cut off")
    if bad:
        more = f" and {len(bad) - MAX_PROBLEMS} more" if len(bad) > MAX_PROBLEMS else ""
        shown = ", ".join(map(str, bad[:MAX_PROBLEMS]))
        problems.append(f"{file}: left out what is no event, in line {shown}{more}")
    return events, problems


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict):
        return None
    if not all(isinstance(event.get(name), kind) for name, kind in _NEEDED.items()):
        return None
    if type(event.get("round")) is not int:
        event["round"] = None
    # Python's JSON has infinite numbers, with which no time can be computed.
    return event if all(abs(event[name]) < 1e12 for name in ("time", "elapsed")) else None


def text(event: Event | None, name: str) -> str:
    """Return a field that should be text; empty if it is not."""
    value = event.get(name) if event else None
    return value if isinstance(value, str) else ""


def number(event: Event | None, name: str) -> float | None:
    """Return a field that should be a number; None if it is not."""
    value = event.get(name) if event else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12
    return value if is_number else None


def count(event: Event | None, name: str) -> int:
    """Return a field that should be an integer; 0 if it is not."""
    return int(number(event, name) or 0)


def objects(event: Event | None, name: str) -> list[Event]:
    """Return those parts of a list that are objects."""
    value = event.get(name) if event else None
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


@dataclass(eq=False)
class Agent:
    """One run of an agent, from its first to its last event."""

    host: str
    pid: int
    attempt: int
    """How often the scheduler had started the job before."""
    events: list[Event]
    began: float = 0.0
    """When ``elapsed`` was 0, in seconds since 1970, by the clock of the reference host."""
    name: str = ""
    """The host; with the pid if the host has several agents."""
    lost_at: float | None = None
    """When other nodes noticed that they had lost this one; None if they did not."""

    def __post_init__(self) -> None:
        self.began = self.events[0]["time"] - self.events[0]["elapsed"]

    def at(self, event: Event) -> float:
        """Return when an event happened, in seconds since 1970. Only the agent's first event counts on its clock."""
        return float(self.began + event["elapsed"])

    @cached_property
    def by_round(self) -> dict[int | None, list[Event]]:
        """The events by round, in order."""
        found: dict[int | None, list[Event]] = {}
        for event in self.events:
            found.setdefault(event.get("round"), []).append(event)
        return found

    def all(self, *names: str) -> list[Event]:
        """Return the events of these names."""
        return [event for event in self.events if event["name"] in names]

    def one(self, round_: int, *names: str) -> Event | None:
        """Return the first event of these names in a round."""
        return next((event for event in self.by_round.get(round_, []) if event["name"] in names), None)

    @property
    def last(self) -> float:
        """When its last event happened."""
        return self.at(self.events[-1])

    @cached_property
    def ended(self) -> Event | None:
        """Its end; None if the events break off before."""
        return next(iter(self.all("ended")), None)


class Lateness(NamedTuple):
    """How much later than the first node another one came to a round."""

    round: int
    agent: Agent
    seconds: float


@dataclass(eq=False)
class Round:
    """One round of an attempt. Times are in seconds since 1970."""

    number: int
    members: dict[Agent, Event]
    """The events by which they learned that the nodes had met."""

    def _times(self, *names: str) -> list[float]:
        found = [(agent, agent.one(self.number, *names)) for agent in self.members]
        return [agent.at(event) for agent, event in found if event]

    @cached_property
    def formed_at(self) -> float:
        """When the last member knew that the nodes had met."""
        return max(agent.at(event) for agent, event in self.members.items())

    @cached_property
    def started_at(self) -> float | None:
        """When the workers of all members had been started; None: nowhere."""
        return max(self._times("started"), default=None)

    @cached_property
    def first_step_at(self) -> float | None:
        """When all members that count steps had made one; None: nobody counts."""
        return max(self._times("first_step"), default=None)

    @property
    def up_at(self) -> float | None:
        """When the round got to work."""
        return self.first_step_at or self.started_at

    @cached_property
    def down_at(self) -> float | None:
        """When the first worker failed, or else when the first node began to stop; None: never."""
        failed = [
            agent.at(event) - (number(event, "seconds") or 0.0)
            for agent in self.members
            for event in agent.by_round[self.number]
            if event["name"] == "failed" or (event["name"] == "stalled" and event.get("action") != "report")
        ]
        return min([*failed, *self._times("stopping")], default=None)

    @cached_property
    def over_at(self) -> float:
        """When the workers' work was over, for whatever reason, as far as it is known."""
        known = max(agent.at(event) for agent in self.members for event in agent.by_round[self.number])
        return self.down_at or max(self._times("succeeded"), default=known)

    @cached_property
    def stopping_at(self) -> float | None:
        """When the first node began to stop its workers."""
        return min(self._times("stopping"), default=None)

    @cached_property
    def stopped_at(self) -> float | None:
        """When the last process of the round was gone, on nodes that could tell."""
        return max(self._times("stopped"), default=None)

    @cached_property
    def restarting(self) -> Event | None:
        """Why another round followed; the event of the node that speaks for the job, if there is one."""
        found = [event for agent in self.members if (event := agent.one(self.number, "restarting"))]
        return min(found, key=lambda event: event.get("scope") != "job", default=None)

    @cached_property
    def what_happened(self) -> str:
        """Why another round followed, in one line."""
        found = [event for agent in self.members if (event := agent.one(self.number, *MEMBERSHIP))]
        reason = next((text(event, "reason") for event in found if text(event, "reason")), "")
        event = self.restarting
        return headline(event) if objects(event, "failures") else reason or headline(event)

    @cached_property
    def lateness(self) -> list[Lateness]:
        """How late each member came. All waited until the same moment, so the first one has waited longest."""
        waits = {agent: wait for agent, event in self.members.items() if (wait := number(event, "seconds")) is not None}
        longest = max(waits.values(), default=0.0)
        return [Lateness(self.number, agent, longest - wait) for agent, wait in waits.items()]


MEMBERSHIP = (
    *("node_lost", "node_left", "node_joining", "node_late", "cut_off", "store_restarted", "restart_requested"),
    "membership_changed",
)
"""Events that end a round although no worker failed."""
PARTS = ("detection", "stop", "rendezvous", "start", "first step")
"""What the time between two rounds is spent on."""


class Recovery(NamedTuple):
    """The time in which a job did not work, between two rounds or two attempts."""

    cause: str
    """As in ``restarting``; or ``requeued``, ``startup``."""
    what: str
    """What happened, in one line."""
    begin: float
    """In seconds since 1970."""
    seconds: float
    parts: tuple[float | None, ...] = ()
    """Seconds by ``PARTS``; None where it is not known."""


@dataclass(eq=False)
class Attempt:
    """One start of the job by the user or by a scheduler."""

    agents: list[Agent]
    clocks: dict[str, float]
    """Seconds by which the clocks of hosts were corrected; 0 for those that needed no correction."""
    unaligned: list[str]
    """Hosts whose clock could not be compared with the others'."""

    @cached_property
    def rounds(self) -> list[Round]:
        """The rounds, in order."""
        members: dict[int, dict[Agent, Event]] = {}
        for agent in self.agents:
            for event in agent.all("formed", "re_formed"):
                if isinstance(event.get("round"), int):
                    members.setdefault(event["round"], {})[agent] = event
        return [Round(number, members[number]) for number in sorted(members)]

    @cached_property
    def begin(self) -> float:
        """When the first agent began, in seconds since 1970."""
        return min(agent.at(agent.events[0]) for agent in self.agents)

    @cached_property
    def end(self) -> float:
        """When the last known event happened."""
        return max(agent.last for agent in self.agents)

    @cached_property
    def ended(self) -> Event | None:
        """How it ended: as the node says that speaks for the job, or else the one that ended last."""
        found = [
            (event.get("scope") == "job", agent.at(event), event) for agent in self.agents if (event := agent.ended)
        ]
        return max(found, key=lambda it: it[:2])[2] if found else None

    @property
    def outcome(self) -> str:
        """How it ended, in one word; ``unknown`` if the events break off."""
        return text(self.ended, "outcome") or "unknown"

    @property
    def goodput(self) -> Event:
        """The last account of the attempt's time; empty if there is none."""
        known = [event for event in (*(round_.restarting for round_ in self.rounds), self.ended) if event]
        accounts = [account for event in known if isinstance(account := event.get("goodput"), dict)]
        return accounts[-1] if accounts else {}

    @cached_property
    def failures(self) -> list[tuple[Event, str]]:
        """Events with failures, in order, each with what followed."""
        found = [(event, "restarted") for round_ in self.rounds if (event := round_.restarting)]
        found += [(self.ended, "ended")] if self.ended else []
        return [(event, what) for event, what in found if objects(event, "failures")]


@dataclass(eq=False)
class Job:
    """A job, in all its attempts."""

    id: str
    attempts: list[Attempt]
    problems: list[str] = field(default_factory=list)
    """What could not be read, or is missing."""

    @cached_property
    def begin(self) -> float:
        """When the job began, in seconds since 1970."""
        return self.attempts[0].begin

    @property
    def seconds(self) -> float:
        """From the job's beginning to the last known event."""
        return max(0.0, max(attempt.end for attempt in self.attempts) - self.begin)

    @property
    def working(self) -> float:
        """Seconds in which the workers of a round were at work."""
        rounds = [round_ for attempt in self.attempts for round_ in attempt.rounds]
        return sum(max(0.0, round_.over_at - round_.up_at) for round_ in rounds if round_.up_at is not None)

    @cached_property
    def recoveries(self) -> list[Recovery]:
        """All times in which the job did not work, in order."""
        found: list[Recovery] = []
        before: Attempt | None = None
        for attempt in self.attempts:
            rounds = attempt.rounds
            begin = attempt.begin if before is None else before.end
            if rounds and (up := rounds[0].up_at) is not None:
                cause = ("requeued", "started again") if before else ("startup", "from the start to the first round")
                found.append(Recovery(*cause, begin, max(0.0, up - begin)))
            found += [
                recovery for past, present in pairwise(rounds) if (recovery := _recovery(past, present)) is not None
            ]
            before = attempt
        return found

    @property
    def downtime(self) -> dict[str, list[Recovery]]:
        """The same by cause, the costliest first."""
        by_cause: dict[str, list[Recovery]] = {}
        for recovery in self.recoveries:
            by_cause.setdefault(recovery.cause, []).append(recovery)
        total = {cause: sum(it.seconds for it in found) for cause, found in by_cause.items()}
        return dict(sorted(by_cause.items(), key=lambda item: -total[item[0]]))

    @property
    def restarts(self) -> int:
        """Rounds that followed another one in the same attempt."""
        return sum(max(0, len(attempt.rounds) - 1) for attempt in self.attempts)

    @property
    def latest_to_join(self) -> list[tuple[Attempt, Lateness]]:
        """Who came late to a round, the latest first."""
        found = [(attempt, late) for attempt in self.attempts for round_ in attempt.rounds for late in round_.lateness]
        return sorted((it for it in found if it[1].seconds >= CLOCK_ERROR), key=lambda it: -it[1].seconds)

    @property
    def warnings(self) -> list[tuple[Attempt, Agent, Event]]:
        """Log lines with warnings, in order."""
        found = [
            (attempt, agent, event) for attempt in self.attempts for agent in attempt.agents for event in agent.events
        ]
        shown = [it for it in found if it[2].get("level") == "warning" and text(it[2], "text")]
        return sorted(shown, key=lambda it: it[1].at(it[2]))

    @property
    def goodput(self) -> dict[str, float]:
        """The account of the job's time, all attempts together, as in the events; empty if nobody counted steps."""
        accounts = [attempt.goodput for attempt in self.attempts]
        names = ("steps", "repeated", "in_steps", "startup", "lost", "stalled", "elapsed")
        total = {name: sum(max(0.0, number(account, name) or 0.0) for account in accounts) for name in names}
        return total if total["steps"] else {}


def _recovery(past: Round, present: Round) -> Recovery | None:
    down, up = past.down_at, present.up_at
    if up is None:
        return None
    begin = past.over_at if down is None else down
    event = past.restarting
    cause = text(event, "cause") or "unknown"
    # A node that was lost has failed before the others knew of it; nobody knows when.
    stopping = None if cause in ("node_lost", "unknown") else past.stopping_at
    times = [begin, stopping, past.stopped_at, present.formed_at, present.started_at, present.first_step_at]
    parts: list[float | None] = []
    latest = begin
    for at in times[1:]:
        parts.append(None if at is None else max(0.0, at - latest))
        latest = latest if at is None else max(latest, at)
    return Recovery(cause, past.what_happened, begin, max(0.0, up - begin), tuple(parts))


def headline(event: Event | None) -> str:
    """Return in one line what a round ended with."""
    failures = objects(event, "failures")
    if not failures:
        return text(event, "text") or text(event, "reason")
    cause = failures[0]
    how = ", ".join(filter(None, (text(cause, "how"), text(cause, "error"))))
    return f"rank {count(cause, 'rank')} on {text(cause, 'host')} failed ({how})"


# --- from events to jobs


def jobs(events: Iterable[Event], problems: Sequence[str] = ()) -> list[Job]:
    """Return the jobs that events are of, by id.

    Args:
        events: from any number of files, in which the same event may occur twice.
        problems: what could not be read.
    """
    by_job: dict[str, dict[tuple[Any, ...], Event]] = {}
    for event in events:
        key = tuple(
            map(
                repr, (event["host"], event["pid"], event["time"], event["elapsed"], event["name"], text(event, "text"))
            )
        )
        by_job.setdefault(event["job"], {})[key] = event
    made = []
    for id_, found in sorted(by_job.items()):
        attempts = [_aligned(agents) for agents in _attempts(_agents(found.values()))]
        made.append(Job(id_, attempts, [*problems, *_missing(attempts)]))
    return made


def _agents(events: Iterable[Event]) -> list[Agent]:
    """Divide a job's events by agent. If a host gives a process id again, ``elapsed`` begins anew."""
    runs: dict[tuple[int, str, int], list[list[Event]]] = {}
    for event in sorted(events, key=lambda event: event["time"]):
        found = runs.setdefault((count(event, "attempt"), event["host"], event["pid"]), [])
        if not found or (event["name"] == "joined" and event["elapsed"] < found[-1][-1]["elapsed"]):
            found.append([])
        found[-1].append(event)
    return [
        Agent(host, pid, attempt, sorted(run, key=lambda event: event["elapsed"]))
        for (attempt, host, pid), found in runs.items()
        for run in found
    ]


@dataclass
class _Group:
    """Agents that belong to one attempt, as far as they are known."""

    agents: list[Agent] = field(default_factory=list)
    end: float = float("-inf")
    hosts: set[str] = field(default_factory=set)
    ranks: dict[tuple[int, int], set[float | None]] = field(default_factory=dict)
    """Group ranks by round and number of nodes."""

    def add(self, agent: Agent) -> None:
        self.agents.append(agent)
        self.end = max(self.end, agent.last)
        self.hosts.add(agent.host)
        for event in agent.all("formed", "re_formed"):
            ranks = self.ranks.setdefault((count(event, "round"), count(event, "nodes")), set())
            ranks.add(number(event, "group_rank"))

    def lacks(self, agent: Agent) -> bool:
        """Return whether the agent has a place in a round of the group that is still free."""
        if agent.host in self.hosts:
            return False
        formed = agent.all("formed", "re_formed")[:1]
        places = [(self.ranks.get((count(it, "round"), count(it, "nodes"))), number(it, "group_rank")) for it in formed]
        return any(ranks is not None and rank not in ranks for ranks, rank in places)


def _attempts(agents: list[Agent]) -> list[list[Agent]]:
    """Divide agents by attempt: as the scheduler has counted, or else by the times between which none ran.

    If clocks differ by more than an attempt took, an agent belongs where its place in a round is free.
    """
    made: list[_Group] = []
    for agent in sorted(agents, key=lambda agent: (agent.attempt, agent.began)):
        same = [group for group in made if group.agents[0].attempt == agent.attempt]
        found = [group for group in reversed(same) if agent.began <= group.end]
        found += [group for group in same if group.lacks(agent)]
        if not found:
            made.append(_Group())
            found = made[-1:]
        found[0].add(agent)
    return [group.agents for group in made]


def _aligned(agents: list[Agent]) -> Attempt:
    """Correct the clocks of an attempt's hosts by the rounds that they had in common, which form everywhere at once."""
    formed: dict[str, dict[int, float]] = {}
    for agent in agents:
        for event in agent.all("formed", "re_formed"):
            if isinstance(event.get("round"), int):
                formed.setdefault(agent.host, {}).setdefault(event["round"], agent.at(event))
    clocks: dict[str, float] = {}
    waiting = sorted(formed, key=lambda host: (-len(formed[host]), host))
    known: dict[int, float] = {}
    while waiting:
        host = next((host for host in waiting if known.keys() & formed[host].keys()), waiting[0])
        waiting.remove(host)
        differences = [known[it] - at for it, at in formed[host].items() if it in known]
        correction = median(differences) if differences else 0.0
        clocks[host] = correction if abs(correction) >= CLOCK_ERROR else 0.0
        for round_, at in formed[host].items():
            known.setdefault(round_, at + clocks[host])
    hosts = [agent.host for agent in agents]
    for agent in agents:
        agent.began += clocks.get(agent.host, 0.0)
        agent.name = agent.host if hosts.count(agent.host) == 1 else f"{agent.host} ({agent.pid})"
    lost: dict[str, float] = {}
    for agent in agents:
        for event in agent.all("node_lost", "restarting"):
            for name in _lost(event):
                lost[name] = min(agent.at(event), lost.get(name, float("inf")))
    for agent in agents:
        if agent.ended is None:
            times = [at for name, at in lost.items() if name.startswith(f"{agent.host}-{agent.pid}-")]
            agent.lost_at = min(times, default=None)
    unaligned = sorted(set(hosts) - clocks.keys()) if len(set(hosts)) > 1 else []
    return Attempt(sorted(agents, key=_order), clocks, unaligned)


def _lost(event: Event) -> list[str]:
    value = event.get("lost")
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _order(agent: Agent) -> tuple[float, str, int]:
    """Order agents by the rank that they had first; those that never had one come last."""
    ranks = (number(event, "group_rank") for event in agent.events)
    first = next((rank for rank in ranks if rank is not None), float("inf"))
    return first, agent.host, agent.pid


def _missing(attempts: list[Attempt]) -> list[str]:
    """Say which nodes of a round have written nothing, and whose events break off."""
    problems = []
    for index, attempt in enumerate(attempts, 1):
        where = f"attempt {index}: " if len(attempts) > 1 else ""
        for round_ in attempt.rounds:
            size = max(count(event, "nodes") for event in round_.members.values())
            if len(round_.members) < size:
                problems.append(
                    f"{where}round {round_.number} had {size} nodes; there are events of {len(round_.members)}"
                )
        cut = [agent.name for agent in attempt.agents if agent.ended is None and agent.lost_at is None]
        if cut:
            problems.append(f"{where}the events break off: {', '.join(cut[:8])}{' …' if len(cut) > 8 else ''}")
        if attempt.unaligned:
            problems.append(
                f"{where}clocks not compared, because these hosts were in no round: {', '.join(attempt.unaligned)}"
            )
    return problems
