"""What the leader of a round knows and decides: who has joined, who is expected, and when the round closes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.rendezvous.messages import LATENESS, Settings
from elastic_launch.core.rendezvous.monitor import Monitor
from elastic_launch.core.rendezvous.ranks import choose
from elastic_launch.core.rendezvous.records import NOBODY, NodeRecord, Status, Unfit, newest
from elastic_launch.core.text import listed
from elastic_launch.errors import ExitCode
from elastic_launch.job import RestartHistory, Silence

MAX_REASON = 200
"""Most characters of the reason why a node has failed, where the nodes that are missing are listed."""


class Form(NamedTuple):
    """The round can be closed. Both lists hold tickets."""

    members: list[int]
    """By group rank."""
    spares: list[int]


class Refuse(NamedTuple):
    """The nodes that joined cannot work together, or are too few."""

    reason: str
    status: int
    """The exit status that goes with it."""


class Later(NamedTuple):
    """Nothing to do yet. If nothing happens, decide again after this many seconds."""

    seconds: float


class Leader:
    """The leader of one round. Times are seconds on any monotonic clock; nodes are identified by their tickets."""

    def __init__(
        self, settings: Settings, record: NodeRecord, number: int, round_: int, now: float, not_before: float = 0.0
    ) -> None:
        """Begin to gather nodes.

        Args:
            settings: the job's.
            record: of the node that leads.
            number: 0 for the first leader of a round; each that takes over has the next number.
            round_: the round's number; nodes of the round before are expected, unless it is 0.
            now: the time.
            not_before: when the round may close.
        """
        self._not_before = not_before
        self.number = number
        self.unconfirmed: dict[int, NodeRecord] = {}
        """Nodes that joined before this leader took over, until they send a heartbeat: its predecessor is silent."""
        self._unconfirmed_tickets: int | None = None if number else 0
        """Tickets up to this one are unconfirmed; None: not known yet."""
        self._confirmed_by = now + settings.keep_alive_interval + 2 * settings.tick
        """When each of them that lives has sent a heartbeat."""
        self.is_closing = False
        self.closing = b""
        """The record that this leader has closed the round with."""
        self.joined: dict[int, NodeRecord] = {}
        """Nodes that are there and send heartbeats."""
        self.lost: list[str] = []
        """Hosts of nodes that were given up and are not logged yet."""
        self.left: list[str] = []
        """Hosts of nodes that have left and are not logged yet."""
        self.tickets = 0
        """Number of tickets drawn."""
        self.missing: dict[int, None] = {}
        """Tickets whose record has not come, in order."""
        self.to_read: list[int] = []
        """Those of them whose record is to be read next."""
        self.reads = 0
        """Number of requests for records that have no answer yet."""
        self.appeared = ""
        """The key of the record that has appeared since the last poll."""
        self.expected: dict[str, tuple[int, str]] | None = {} if round_ == 0 else None
        """Nodes of the round before that have not joined yet: ticket and host, by node id. None: not known yet."""
        self.past_restart_history: RestartHistory | None = None
        """The restart history that the store holds."""
        self.published = NOBODY
        self.unfit: dict[str, Unfit] = {}
        """Notes of nodes whose health check fails, by node id; they may come when it passes."""
        self.unfit_read = 0
        """Number of bytes of these notes that have been read."""
        self.past_host = ""
        """Id of the store's host, if that was unfit in the round before. Its next note, or its record, names the port
        of a fresh store for the workers. It needs no heartbeats: without it there is no store."""
        self._settings = settings
        self._record = record
        self._round = round_
        self.monitor = Monitor(settings.keep_alive_deadline, settings.outage, now)
        self._past_monitor = Monitor(settings.keep_alive_deadline, settings.outage, now)
        self._tickets: dict[str, int] = {}
        self._arrived: dict[int, float] = {}
        self._late_at: dict[int, float] = {}
        """When the node of a ticket may be dead, if its record is still missing."""
        self._last_arrival = now
        self._past: dict[str, str] = {}
        """Hosts of the nodes of the round before, by node id."""

    @property
    def _is_first_round(self) -> bool:
        return self._round == 0

    # --- nodes that join

    def note_tickets(self, count: int, now: float) -> None:
        """Note how many tickets have been drawn."""
        if self._unconfirmed_tickets is None:
            self._unconfirmed_tickets = count
        self.missing |= dict.fromkeys(range(self.tickets + 1, count + 1))
        self._late_at |= dict.fromkeys(range(self.tickets + 1, count + 1), now + self._settings.tick + LATENESS)
        self.tickets = max(self.tickets, count)

    def note_nodes(self, records: Iterable[tuple[int, NodeRecord]], now: float) -> None:
        """Note the records of nodes that have joined, by ticket."""
        for ticket, record in records:
            self.missing.pop(ticket, None)
            if ticket not in self._arrived:
                self.joined.pop(self._tickets.get(record.node, 0), None)  # the same node has come twice
                doubt = ticket <= (self._unconfirmed_tickets or 0) and record.node != self._record.node
                (self.unconfirmed if doubt else self.joined)[ticket] = record
                self._tickets[record.node] = ticket
                self._arrived[ticket] = self._last_arrival = now
                if not doubt:
                    self.monitor.register([ticket], now)
                if self.expected is not None:
                    self.expected.pop(record.node, None)
                here = [id_ for id_, note in self.unfit.items() if note.has_failed and note.record.host == record.host]
                for id_ in (record.node, *here):  # its agent was started again
                    self.unfit.pop(id_, None)

    def ignore(self, ticket: int) -> None:
        """No longer wait for the record of a ticket: it breaks a rule, so no node of this job has drawn the ticket."""
        self.missing.pop(ticket, None)

    def is_new(self, node: NodeRecord) -> bool:
        """Whether a node was not in the round before, as far as is known."""
        return self._is_first_round or (self.expected is not None and node.node not in self._past)

    def note_past(self, nodes: Iterable[tuple[int, NodeRecord]], gone: Collection[str] = ()) -> None:
        """Expect the nodes of the round before, given by ticket, except those whose ids are in ``gone``."""
        self.expected = {}
        for ticket, record in nodes:
            self._past[record.node] = record.host
            if record.node not in self._tickets and record.node not in self.unfit and record.node not in gone:
                self.expected[record.node] = (ticket, record.host)

    def note_unfit(self, notes: Iterable[Unfit]) -> list[Unfit]:
        """Do not wait for nodes that have failed, or their health check, by their notes in order.

        Returns:
            The notes that are new.
        """
        new = []
        for note in notes:
            id_ = note.record.node
            known = self.unfit.get(id_)
            is_known = known is not None and known.is_gone >= note.is_gone
            has_passed = id_ in self._tickets and not note.has_failed  # one that has joined has passed its check since
            if not has_passed and not is_known:
                self.unfit[id_] = note
                if note.has_failed and note.record.host in self.left:
                    self.left.remove(note.record.host)
                new.append(note)
                (self.expected or {}).pop(id_, None)
        return new

    @property
    def is_enough(self) -> bool:
        """Whether there are enough nodes without those that are unfit, if all that are expected come."""
        there = len(self.joined) + len(self.unconfirmed) + len(self.expected or {})
        return there >= self._settings.min_nodes

    @property
    def host(self) -> NodeRecord | None:
        """The node that hosts the store, if it has joined or is unfit."""
        records = [*self.joined.values(), *(note.record for note in self.unfit.values())]
        return next((record for record in records if record.serves), None)

    def next_ticket(self, now: float) -> int:
        """Return the ticket whose record will probably come next."""
        return next((ticket for ticket in self.missing if now < self._late_at[ticket]), self.tickets + 1)

    # --- nodes that are lost

    def poll(self, counters: Sequence[tuple[int, bytes]], now: float, asked_at: float) -> list[int]:
        """Note the heartbeats of the nodes that have joined, and drop those that are lost or have left.

        Returns:
            The tickets whose counters to reset.
        """
        for ticket in self.monitor.poll(counters, now, asked_at):
            if node := self.joined.pop(ticket, None) or self.unconfirmed.pop(ticket, None):
                (self.left if ticket in self.monitor.left else self.lost).append(node.host)
        for ticket in list(self.unconfirmed):
            if self.monitor.has_lived_since(ticket, self._arrived[ticket]):
                self.joined[ticket] = self.unconfirmed.pop(ticket)
        return self.monitor.take_resets()

    def note_past_silences(self, silences: Iterable[Silence], now: float) -> None:
        """Go on counting how long nodes of the round before have been silent, by their tickets there."""
        self._past_monitor.resume(silences, now)

    def poll_past(
        self, nodes: Sequence[str], counters: Sequence[tuple[int, bytes]], now: float, asked_at: float
    ) -> None:
        """Note the heartbeats, in the round before, of expected nodes; no longer expect those that are lost or left."""
        suspected = self._past_monitor.poll(counters, now, asked_at)
        for node, (ticket, _) in zip(nodes, counters, strict=True):
            if ticket in suspected and self.expected and node in self.expected:
                _, host = self.expected.pop(node)
                (self.left if ticket in self._past_monitor.left else self.lost).append(host)

    def restart_history(self, now: float) -> RestartHistory:
        """Return the restart history of the node that knows of the latest round, and whose workers got furthest."""
        ticket, node = max(self.joined.items(), key=lambda item: newest(item[1]))
        if node.known_round < self._round - 1 and self.past_restart_history is not None:
            return self.past_restart_history  # no node is left that was there
        return aged(node.restart_history, now - self._arrived[ticket])

    # --- what follows

    def decide(self, now: float) -> Form | Refuse | Later | None:
        """Decide whether the round can be closed. None: not before a node comes or goes."""
        settings = self._settings
        if self._is_first_round and (refusal := self._refusal()):
            return Refuse(refusal, ExitCode.USAGE)
        if self.expected is None or self.expected:
            return None
        if self.past_host and self.past_host not in self._tickets.keys() | self.unfit.keys():
            return None
        may_come = any(not note.is_gone for note in self.unfit.values())
        is_coming = bool(self.missing) and now < self._late_at[next(reversed(self.missing))]  # the last one drawn
        if len(self.joined) < settings.min_nodes:
            if self._past and not (self.unconfirmed or is_coming or may_come):
                return Refuse(self._who_is_left(), ExitCode.UNAVAILABLE)
            return None
        if self.unconfirmed and now < self._confirmed_by:
            return None
        if now < self._not_before:
            return Later(self._not_before - now)
        if (self._is_first_round and self._has_duplicates()) or is_coming:
            return None
        last_call = self._last_arrival + settings.last_call_timeout - now
        as_before = not self._is_first_round and self._past.keys() >= self._tickets.keys()
        is_time = as_before or last_call <= 0
        if not is_time and len(self.joined) < settings.max_nodes:
            return Later(last_call)
        members, spares = choose(self.joined, settings.max_nodes)
        if len(members) == settings.max_nodes or (len(members) >= settings.min_nodes and is_time):
            return Form(members, spares)
        return None

    def status(self) -> Status:
        """Describe who is there and who is missing."""
        missing = [host for _, host in (self.expected or {}).values()]
        for note in self.unfit.values():
            if note.has_failed:
                missing.append(f"{note.record.host} (failed: {note.reason[:MAX_REASON]})")
            elif not note.is_gone:
                missing.append(f"{note.record.host} (health check failed)")
        ranks = {node.rank for node in self.joined.values()}
        if not missing and -1 not in ranks and self._settings.min_nodes == self._settings.max_nodes:
            missing = [f"node rank {rank}" for rank in sorted(set(range(self._settings.max_nodes)) - ranks)]
        return Status(len(self.joined), listed(node.host for node in self.joined.values()), listed(missing))

    def _who_is_left(self) -> str:
        """Say why there is no further round: too many nodes were lost."""
        there = {node.node for node in self.joined.values()}
        lost = listed(host for node, host in self._past.items() if node not in there)
        hosts = listed(node.host for node in self.joined.values())
        return f"lost {lost}; still there: {hosts}; the job needs {self._settings.min_nodes} nodes (--nnodes)"

    def _duplicates(self) -> Iterable[tuple[int, int]]:
        """Find pairs of tickets whose nodes ask for the same rank.

        A pair of which one had the rank before does not count: the other can be a spare.
        """
        by_rank: dict[int, int] = {}
        for ticket, node in self.joined.items():
            if node.rank >= 0:
                first = by_rank.setdefault(node.rank, ticket)
                if first != ticket and max(node.previous_rank, self.joined[first].previous_rank) < 0:
                    yield first, ticket

    def _has_duplicates(self) -> bool:
        """Whether two nodes ask for the same rank. One of them may be dead, and the other its replacement."""
        return next(iter(self._duplicates()), None) is not None

    def _refusal(self) -> str:
        """Say why the nodes that have joined cannot work together; empty: they can, as far as is known."""
        for node in self.joined.values():
            if node.options != self._record.options:
                me = f"{self._record.host} (pid {self._record.pid})"  # two nodes may share a host, or its name
                return disagreement(node.host, node.pid, node.options, me, self._record.options)
            if node.rank >= self._settings.max_nodes:
                return (
                    f"{node.host} (pid {node.pid}) asks for --node-rank={node.rank}, but the job has at most "
                    f"{self._settings.max_nodes} nodes"
                )
        for first, second in self._duplicates():
            both_came = max(self._arrived[first], self._arrived[second])
            if all(self.monitor.has_lived_since(ticket, both_came) for ticket in (first, second)):
                one, other = self.joined[first], self.joined[second]
                return (
                    f"two nodes ask for --node-rank={one.rank}: {one.host} (pid {one.pid}) and "
                    f"{other.host} (pid {other.pid}); give each node its own rank"
                )
        return ""


def disagreement(host: str, pid: int, options: str, other: str, others: str) -> str:
    """Say that two nodes were started with different options."""
    return f"{host} (pid {pid}) was started with {options}, {other} with {others}: give all nodes the same options"
