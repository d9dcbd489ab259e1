"""Layer 1: what the chief of a round knows and decides: who has come, who is expected, when the round closes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.rendezvous.protocol import LATENESS, Settings
from elastic_launch.core.rendezvous.ranks import choose
from elastic_launch.core.rendezvous.records import NodeRecord, Status
from elastic_launch.core.rendezvous.watch import Watch
from elastic_launch.core.text import listed
from elastic_launch.errors import ExitCode
from elastic_launch.job import RestartHistory


class Close(NamedTuple):
    """The round can be closed; members by group rank, both as tickets."""

    members: list[int]
    spares: list[int]


class Refuse(NamedTuple):
    """The nodes that came cannot work together, or are too few."""

    reason: str
    status: int


class Later(NamedTuple):
    """Nothing to do yet; if nobody comes, decide again in so many seconds."""

    seconds: float


class Chief:
    """The chief of one round."""

    def __init__(
        self, settings: Settings, me: NodeRecord, number: int, round_: int, now: float, not_before: float = 0.0
    ) -> None:
        """Begin to gather.

        Args:
            settings: the job's.
            me: the node that is chief.
            number: 0 for the first chief of a round; it grows with each that takes over.
            round_: the round's number; there is none before 0 that nodes come from.
            now: seconds on a monotonic clock, as everywhere here.
            not_before: when the round may close.
        """
        self._not_before = not_before
        self.number = number
        self.doubtful: dict[int, NodeRecord] = {}
        """Who came before this chief took over, until it gives a sign of life: the one that it follows is silent."""
        self._doubtful_tickets: int | None = None if number else 0
        """Tickets up to this one are such; None: not known yet."""
        self._doubts_end = now + settings.keep_alive_interval + 2 * settings.tick
        """When each of them that lives has given a sign."""
        self.is_closing = False
        self.joined: dict[int, NodeRecord] = {}
        """By ticket: who is there, and gives signs of life."""
        self.silent: list[str] = []
        """Hosts of nodes that were given up since people were told of such;"""
        self.left: list[str] = []
        """of nodes that have left."""
        self.known = 0
        """Tickets that were given out."""
        self.missing: list[int] = []
        """Tickets whose record has not come."""
        self.expected: dict[str, tuple[int, str]] | None = {} if round_ == 0 else None
        """By node id: ticket and host in the round before of those who have not come yet. None: not known yet."""
        self.past_restart_history: RestartHistory | None = None
        """What the store knows of the job's failures."""
        self.published = Status(0, "", "")
        self._settings = settings
        self._me = me
        self._round = round_
        self.watch = Watch(settings.keep_alive_deadline, settings.tick, now)
        self._past_watch = Watch(settings.keep_alive_deadline, settings.tick, now)
        self._tickets: dict[str, int] = {}
        self._arrived: dict[int, float] = {}
        self._late_at: dict[int, float] = {}
        """By ticket: if its record is still missing then, its node may be dead."""
        self._last_arrival = now
        self._past: dict[str, str] = {}
        """Hosts of the nodes of the round before, by their ids."""

    @property
    def _is_first_round(self) -> bool:
        return self._round == 0

    # --- who has come

    def note_tickets(self, count: int, now: float) -> None:
        """So many tickets were given out."""
        if self._doubtful_tickets is None:
            self._doubtful_tickets = count
        self.missing += range(self.known + 1, count + 1)
        self._late_at |= dict.fromkeys(range(self.known + 1, count + 1), now + self._settings.tick + LATENESS)
        self.known = max(self.known, count)

    def note_nodes(self, records: Iterable[tuple[int, NodeRecord]], now: float) -> None:
        """Records have come, by ticket."""
        for ticket, record in records:
            if ticket not in self._arrived:
                self.joined.pop(self._tickets.get(record.node, 0), None)  # the same node, come twice
                doubt = ticket <= (self._doubtful_tickets or 0) and record.node != self._me.node
                (self.doubtful if doubt else self.joined)[ticket] = record
                self._tickets[record.node] = ticket
                self._arrived[ticket] = self._last_arrival = now
                if not doubt:
                    self.watch.greet([ticket], now)
                if self.expected is not None:
                    self.expected.pop(record.node, None)
        self.missing = [ticket for ticket in self.missing if ticket not in self._arrived]

    def is_new(self, node: NodeRecord) -> bool:
        """Whether it was not there in the round before, as far as is known."""
        return self._is_first_round or (self.expected is not None and node.node not in self._past)

    def note_past(self, nodes: Iterable[tuple[int, NodeRecord]], gone: Collection[str] = ()) -> None:
        """Who was in the round before, by ticket, and the ids of those that are known to be gone."""
        self.expected = {}
        for ticket, record in nodes:
            self._past[record.node] = record.host
            if record.node not in self._tickets and record.node not in gone:
                self.expected[record.node] = (ticket, record.host)

    def next_ticket(self, now: float) -> int:
        """The ticket whose record will probably come next."""
        return next((ticket for ticket in self.missing if now < self._late_at[ticket]), self.known + 1)

    # --- who has gone

    def look(self, counters: Sequence[tuple[int, bytes]], now: float, asked_at: float) -> list[int]:
        """Note the counters of nodes that came; forget the silent ones. Returns which counters to set back."""
        for ticket in self.watch.look(counters, now, asked_at):
            if node := self.joined.pop(ticket, None) or self.doubtful.pop(ticket, None):
                (self.left if ticket in self.watch.left else self.silent).append(node.host)
        for ticket in list(self.doubtful):
            if self.watch.has_lived_since(ticket, self._arrived[ticket]):
                self.joined[ticket] = self.doubtful.pop(ticket)
        return self.watch.set_back()

    def look_back(
        self, nodes: Sequence[str], counters: Sequence[tuple[int, bytes]], now: float, asked_at: float
    ) -> None:
        """Note the counters, in the round before, of nodes that have not come; do not expect the silent ones."""
        silent = self._past_watch.look(counters, now, asked_at)
        for node, (ticket, _) in zip(nodes, counters, strict=True):
            if ticket in silent and self.expected and node in self.expected:
                _, host = self.expected.pop(node)
                (self.left if ticket in self._past_watch.left else self.silent).append(host)

    def restart_history(self, now: float) -> RestartHistory:
        """What the job remembers, from the node that knows of the latest round."""
        ticket, node = max(self.joined.items(), key=lambda item: item[1].past)
        if node.past < self._round - 1 and self.past_restart_history is not None:
            return self.past_restart_history  # nobody is left who was there
        return aged(node.restart_history, now - self._arrived[ticket])

    # --- what follows

    def decide(self, now: float) -> Close | Refuse | Later | None:
        """Whether the round can be closed. None: not before somebody comes or goes."""
        settings = self._settings
        if self._is_first_round and (refusal := self._refusal()):
            return Refuse(refusal, ExitCode.USAGE)
        if self.expected is None or self.expected:
            return None
        is_coming = any(now < self._late_at[ticket] for ticket in self.missing)
        if len(self.joined) < settings.min_nodes:
            if self._past and not (self.doubtful or is_coming):
                return Refuse(self._who_is_left(), ExitCode.UNAVAILABLE)
            return None
        if self.doubtful and now < self._doubts_end:
            return None
        if now < self._not_before:
            return Later(self._not_before - now)
        if (self._is_first_round and self._has_twins()) or is_coming:
            return None
        last_call = self._last_arrival + settings.last_call_timeout - now
        as_before = not self._is_first_round and self._past.keys() >= self._tickets.keys()
        is_time = as_before or last_call <= 0
        if not is_time and len(self.joined) < settings.max_nodes:
            return Later(last_call)
        members, spares = choose(self.joined, settings.max_nodes)
        if len(members) == settings.max_nodes or (len(members) >= settings.min_nodes and is_time):
            return Close(members, spares)
        return None

    def status(self) -> Status:
        """Who is there and who is missing, for people."""
        missing = [host for _, host in (self.expected or {}).values()]
        ranks = {node.rank for node in self.joined.values()}
        if not missing and -1 not in ranks and self._settings.min_nodes == self._settings.max_nodes:
            missing = [f"node rank {rank}" for rank in sorted(set(range(self._settings.max_nodes)) - ranks)]
        return Status(len(self.joined), listed(node.host for node in self.joined.values()), listed(missing))

    def _who_is_left(self) -> str:
        """Why there is no further round, where nodes were lost."""
        there = {node.node for node in self.joined.values()}
        lost = listed(host for node, host in self._past.items() if node not in there)
        hosts = listed(node.host for node in self.joined.values())
        return f"lost {lost}; still there: {hosts}; the job needs {self._settings.min_nodes} nodes (--nnodes)"

    def _twins(self) -> Iterable[tuple[int, int]]:
        """Tickets of nodes that ask for one rank, and neither of them had it before: else the other can be a spare."""
        by_rank: dict[int, int] = {}
        for ticket, node in self.joined.items():
            if node.rank >= 0:
                first = by_rank.setdefault(node.rank, ticket)
                if first != ticket and max(node.previous, self.joined[first].previous) < 0:
                    yield first, ticket

    def _has_twins(self) -> bool:
        """Whether two ask for one rank; one of them may be dead, and its place taken by the other."""
        return next(iter(self._twins()), None) is not None

    def _refusal(self) -> str:
        """Why the nodes that came cannot work together; empty: they can, as far as is known."""
        for node in self.joined.values():
            if node.options != self._me.options:
                me = f"{self._me.host} (pid {self._me.pid})"  # hosts may have one name, or be one
                return disagreement(node.host, node.pid, node.options, me, self._me.options)
            if node.rank >= self._settings.max_nodes:
                return (
                    f"{node.host} (pid {node.pid}) asks for --node-rank={node.rank}, but the job has at most "
                    f"{self._settings.max_nodes} nodes"
                )
        for first, second in self._twins():
            both_came = max(self._arrived[first], self._arrived[second])
            if all(self.watch.has_lived_since(ticket, both_came) for ticket in (first, second)):
                one, other = self.joined[first], self.joined[second]
                return (
                    f"two nodes ask for --node-rank={one.rank}: {one.host} (pid {one.pid}) and "
                    f"{other.host} (pid {other.pid}); give each node a rank of its own"
                )
        return ""


def disagreement(host: str, pid: int, options: str, other: str, others: str) -> str:
    """That two nodes were started with different options."""
    return f"{host} (pid {pid}) was started with {options}, {other} with {others}: give all nodes of a job the same"
