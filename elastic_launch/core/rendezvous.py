"""Floor 1: one node's part in the rounds of a job: how it meets the others, and how they part. Pure.

``Node.step`` takes an event (an answer of the store, a key that appeared, the clock, a wish of the agent) and gives
what to do: requests to the store, events for the agent, words for people. It keeps two more things for its driver to
look at: ``awaiting``, the key whose appearance it wants to learn of, and ``deadline``.

A round r of a job, in the store:

    round             number of the current round
    r/ticket          counter: the order of arrival, t
    r/node/t          NodeRecord, by each node
    r/chief/g         ticket of the node that took over as chief number g; chief 0 is ticket 1
    r/place/g/t       Assignment, by chief g, which decides who is in
    r/roster/g        Roster, likewise
    r/status          Status while nodes gather, by the chief
    r/closed          Closed, created once: the membership is final
    r/beat/t          counter of the node's signs of life, which the chief and later the coordinator set back to 0
    r/done, r/done/t  the nodes whose workers have all ended well: how many, and which
    r/end             End, created once: the first reason to end the round
    r/also            failures of other nodes, one JSON a line: consequences
    r/next            Verdict, created once: what follows a failure
    r/left, r/empty   how many nodes are through with a job's last round; that all are

A node sends the same few requests in each round, however many nodes there are; only the chief, who closes the round,
and the coordinator, the member with group rank 0 who watches over it, do work in proportion to them. Each node that
waits or runs adds 1 to its counter once in an interval. A counter that does not change is a silent node. A counter
that nobody sets back is a silent chief or coordinator: its deputy (ticket 2, or group rank 1) looks every ``TICK``, the
others with every beat. Every request may be carried out twice, since a connection can break before its answer comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

from elastic_launch.core.lifecycle import Announce, Asking, Assigned, Decided, Ended, Leave, Settle, Succeed
from elastic_launch.core.ranks import assign, choose
from elastic_launch.core.records import Closed, NodeRecord, Roster, Status, decode, encode
from elastic_launch.core.requests import Add, Append, Get, Request, Set, Swap
from elastic_launch.core.root_cause import is_consequence
from elastic_launch.errors import ExitCode, ProcessFailure, RendezvousStateError, signal_name
from elastic_launch.model import Assignment, End, EndKind, Verdict

TICK = 1.0
"""Seconds between two looks of a chief, a coordinator or a deputy, if the keep-alive interval is not shorter."""
LEFT = 1 << 40
"""Added to a node's counter: it has left."""
TAKE_OVER = 1 << 20
"""A counter that is set to this tells its node to take over as chief at once."""
BATCH = 256
"""Records that the chief reads with one request, and keys that are written with one."""
SAY_FIRST, SAY_LATER = 5.0, 30.0
"""Seconds until a waiting node says who is there, and between two such lines when it has said so a few times."""
MESSAGE = 60_000
"""Characters of the cause's traceback that the other nodes get to see."""
SHOWN = 8
"""Hosts that are named in a line."""


class Settings(NamedTuple):
    """What a job's nodes agree on beforehand. Times in seconds; names and defaults are torch's."""

    run_id: str
    min_nodes: int
    max_nodes: int
    join_timeout: float = 600.0
    """How long a node waits for a round to form."""
    last_call_timeout: float = 30.0
    """How long a round with enough nodes waits, after the last arrival, for more of them."""
    close_timeout: float = 30.0
    """How long the node that hosts the store waits at the end until the others are through."""
    keep_alive_interval: float = 5.0
    keep_alive_max_attempt: int = 3
    """After so many intervals without a sign of life a node counts as dead."""
    max_restarts: int = 0
    store_port: int = 0
    """The port on which the job's store serves the workers, too; 0: it does not."""

    @property
    def keep_alive_deadline(self) -> float:
        """Seconds of silence after which a node counts as dead."""
        return self.keep_alive_interval * self.keep_alive_max_attempt

    @property
    def tick(self) -> float:
        """Seconds between two looks of those who watch."""
        return min(TICK, self.keep_alive_interval / 2)


# Events, beside those wishes of the agent that are an ``Asking``.


class Opening(NamedTuple):
    """The agent wants a place in the next round; ``port`` is reserved for the workers' store."""

    port: int = 0


class Answered(NamedTuple):
    """The store's answer to an ``Ask``."""

    what: str
    round: int
    value: Any
    about: Any = None


class Appeared(NamedTuple):
    """The key that was awaited exists."""

    key: str


class Passing(NamedTuple):
    """Time has passed: ``deadline`` is over."""


class Found(NamedTuple):
    """The store is there again, after it could not be reached; it may have forgotten everything."""


class Lost(NamedTuple):
    """The store is gone for good."""

    text: str
    status: int
    """The exit status that goes with it."""


Event = Opening | Answered | Appeared | Passing | Found | Lost | Asking

# Outputs.


class Ask(NamedTuple):
    """Send a request; ``Answered`` brings the answer under the same name and round, where there is one."""

    what: str
    round: int
    request: Request
    about: Any = None
    """Comes back with the answer."""


class Tell(NamedTuple):
    """An event for the agent."""

    event: Assigned | Ended | Decided


class Say(NamedTuple):
    """Tell people, in one line."""

    text: str


Output = Ask | Tell | Say


class Phase(Enum):
    """Where the node stands in its round."""

    IDLE = "idle"
    """Before the first round, or between two."""
    OPENING = "opening"
    """It has asked for the round's number and a ticket."""
    WAITING = "waiting"
    """It waits for the round to close; as chief it closes it."""
    MEMBER = "member"
    BESIDE = "beside"
    """The round goes on without it: it came late, or there were enough."""
    ENDED = "ended"
    """The round is over; what follows may not be known yet."""
    LEAVING = "leaving"
    """It is through with the job."""


class Node:
    """One node of a job."""

    def __init__(self, record: NodeRecord, settings: Settings) -> None:
        """Take what the node tells of itself, and the job's settings."""
        self.me = record
        self.settings = settings
        self.phase = Phase.IDLE
        self.round = -1
        self.awaiting: str | None = None
        self._timers: dict[str, float] = {}
        self._out: list[Output] = []
        self._now = self._began_at = 0.0
        self._about: Any = None
        self.is_gone = False
        """Its goodbye is said: the driver may close the connection."""
        self._begin_round()

    def _begin_round(self) -> None:
        """Forget the round before."""
        self.ticket = 0
        self.place: Assignment | None = None
        self.end: End | None = None
        self.verdict: Verdict | None = None
        self._acknowledged = self._has_counted = False
        self._mine: Verdict | None = None
        """This node's settlement of the round."""
        self._closed: Closed | None = None
        self._beating = False
        self._beats_before = 0
        self._roster: Roster | None = None
        self._signs: dict[int, tuple[bytes, float]] = {}
        """By ticket: the counter as it was last seen, and when it had changed."""
        self._watched_at = 0.0
        # What a chief knows.
        self._chief = 0
        self._is_chief = False
        self._joined: dict[int, NodeRecord] = {}
        self._tickets: dict[str, int] = {}
        self._arrived: dict[int, float] = {}
        self._known = 0
        self._missing: list[int] = []
        self._gaps: set[int] = set()
        self._last_arrival = 0.0
        self._expected: dict[str, tuple[int, str]] | None = None
        """Who was in the round before and has not come yet: by node id, old ticket and host. None: not known yet."""
        self._past: dict[str, str] = {}
        """Node id and host of all who were there in the round before."""
        self._closing = False
        self._status = Status(0, "", "")

    @property
    def deadline(self) -> float | None:
        """When ``Passing`` is due, on the clock of ``now``."""
        return min(self._timers.values(), default=None)

    @property
    def is_settled(self) -> bool:
        """The job is over for this node, whatever becomes of the store."""
        return self.phase is Phase.LEAVING or (self.verdict is not None and not self.verdict.restart)

    def step(self, event: Event, now: float) -> list[Output]:
        """What an event leads to.

        Args:
            event: what happened.
            now: seconds, on any monotonic clock.

        Raises:
            RendezvousStateError: the store holds what nobody of this job can have written.
        """
        self._now, self._out = now, []
        if isinstance(event, Answered):
            if event.round == self.round and self.phase is not Phase.IDLE:
                self._about = event.about
                ANSWERS[event.what](self, event.value)
        elif isinstance(event, Passing):
            for name in [name for name, at in self._timers.items() if at <= now]:
                if self._timers.pop(name, None) is not None:
                    TIMERS[name](self)
        else:
            WISHES[type(event)](self, event)
        return self._out

    # --- small tools

    def _key(self, name: str) -> str:
        return f"elastic/{self.settings.run_id}/{self.round}/{name}"

    def _ask(self, what: str, request: Request, about: Any = None) -> None:
        self._out.append(Ask(what, self.round, request, about))

    def _create(self, what: str, name: str, value: bytes) -> None:
        self._ask(what, Swap(self._key(name), b"", value))

    def _set(self, items: Iterable[tuple[str, bytes]]) -> None:
        everything = [(self._key(name), value) for name, value in items]
        for i in range(0, len(everything), BATCH):
            self._ask("set", Set(tuple(everything[i : i + BATCH])))

    def _get(self, what: str, *names: str, about: Any = None) -> None:
        self._ask(what, Get(tuple(map(self._key, names))), about)

    def _await(self, name: str | None) -> None:
        self.awaiting = None if name is None else self._key(name)

    def _in(self, name: str, seconds: float) -> None:
        self._timers[name] = self._now + seconds

    def _ignore(self, value: Any) -> None:
        """An answer that tells nothing."""

    # --- joining

    def _begin(self, wish: Opening) -> None:
        self.me = self.me._replace(port=wish.port)
        self._rejoin()

    def _rejoin(self) -> None:
        """Find out which round comes next."""
        if self.verdict:
            self.me = self.me._replace(charged=self.verdict.charged, free=self.verdict.free)
        self.me = self.me._replace(previous=self.place.group_rank if self.place else -1)
        self.phase = Phase.OPENING
        self._timers.clear()
        self._in("give_up", self.settings.join_timeout)
        self._began_at = self._now
        self._spoken = 0
        self.awaiting = None
        after = self.round
        self._begin_round()
        self.round = after + 1
        key = f"elastic/{self.settings.run_id}/round"
        if after < 0:
            self._ask("round", Get((key,)))
        else:
            self._ask("round", Swap(key, b"%d" % after if after else b"", b"%d" % self.round))

    def _on_round(self, value: list[bytes] | bytes) -> None:
        found = value[0] if isinstance(value, list) else value
        if found and not found.isdigit():
            raise RendezvousStateError(f"the store holds {found[:60]!r} as the number of the round: not this program's")
        number = int(found or b"0")
        if number < self.round:  # the store has forgotten it
            self._ask("round", Swap(f"elastic/{self.settings.run_id}/round", found, b"%d" % self.round))
            return
        if number > self.round > 0:
            self.me = self.me._replace(previous=-1)  # the others have gone on without this node
        self.round = number
        self._ask("ticket", Add(self._key("ticket"), 1))

    def _on_ticket(self, ticket: int) -> None:
        if self.ticket:
            return
        self.ticket, self.phase = ticket, Phase.WAITING
        self._set([(f"node/{ticket}", encode(self.me))])
        self._in("say", SAY_FIRST)
        if ticket == 1:
            self._become_chief()
        else:
            self._await("closed")
        self._in("beat", self._beat_period())

    def _become_chief(self) -> None:
        self._is_chief = True
        self._last_arrival = self._watched_at = self._now
        self._await("node/1")
        self._in("watch", self.settings.tick)
        self._expected = None if self.round else {}
        if self.round:
            before = f"elastic/{self.settings.run_id}/{self.round - 1}"
            self._ask("past", Get((f"{before}/ticket", f"{before}/end")))

    def _stand_down(self) -> None:
        self._chief += 1
        self._is_chief = False
        self._beats_before = 0
        for name in ("watch", "last_call"):
            self._timers.pop(name, None)
        self._await("closed")

    def _on_past(self, value: list[bytes]) -> None:
        before = f"elastic/{self.settings.run_id}/{self.round - 1}"
        gone = set(decode(End, value[1], f"{before}/end").gone) if value[1] else set()
        self._gone_before = gone
        count = int(value[0] or b"0")
        self._ask("past_nodes", Get(tuple(f"{before}/node/{ticket}" for ticket in range(1, count + 1))))

    def _on_past_nodes(self, value: list[bytes]) -> None:
        self._expected = {}
        joined = {record.node for record in self._joined.values()}
        for ticket, data in enumerate(value, 1):
            record = decode(NodeRecord, data, f"{self.round - 1}/node/{ticket}") if data else None
            if record and record.node not in self._gone_before:
                self._past[record.node] = record.host
                if record.node not in joined:
                    self._expected[record.node] = (ticket, record.host)
        self._consider()

    def _on_key(self, event: Appeared) -> None:
        """A key that was awaited exists; one that is no longer of interest may be told of, too."""
        if event.key != self.awaiting:
            return
        self.awaiting = None
        match event.key.split("/")[-1]:
            case "closed":
                self._ask_for_place()
            case "end":
                self._get("end_read", "end")
            case "next":
                self._get("next_read", "next")
            case "empty":
                self._timers.clear()
                self.is_gone = True
            case _:
                self._get("count", "ticket")

    # --- the chief: who has come

    def _on_count(self, value: list[bytes]) -> None:
        self._note_tickets(int(value[0] or b"0"))
        self._read_nodes(self._missing)

    def _note_tickets(self, count: int) -> None:
        self._missing += range(self._known + 1, count + 1)
        self._known = max(self._known, count)

    def _read_nodes(self, tickets: list[int]) -> None:
        some = tickets[:BATCH]
        if some:
            self._get("nodes", *(f"node/{ticket}" for ticket in some), about=some)
        else:
            self._await_arrivals()

    def _on_nodes(self, value: list[bytes]) -> None:
        read: list[int] = self._about
        if self._closing or self.phase is not Phase.WAITING:
            return
        for ticket, data in zip(read, value, strict=True):
            if data and ticket not in self._arrived:
                record = decode(NodeRecord, data, self._key(f"node/{ticket}"))
                self._joined.pop(self._tickets.get(record.node, 0), None)  # the same node, come twice
                self._joined[ticket] = record
                self._tickets[record.node] = ticket
                self._signs[ticket] = (b"", self._now)
                self._arrived[ticket] = self._last_arrival = self._now
                if self._expected is not None:
                    self._expected.pop(record.node, None)
        self._missing = [ticket for ticket in self._missing if ticket not in self._arrived]
        later = [ticket for ticket in self._missing if ticket > read[-1]]
        if later:
            self._read_nodes(later)
        else:
            self._await_arrivals()
        self._consider()

    def _await_arrivals(self) -> None:
        if self._is_chief and self.phase is Phase.WAITING and not self._closing:
            slow = next((ticket for ticket in self._missing if ticket not in self._gaps), self._known + 1)
            self._await(f"node/{slow}")

    def _watch(self) -> None:
        """The chief looks: at signs of life, at tickets whose record is late, and for another chief's work."""
        self._in("watch", self.settings.tick)
        if self.phase is Phase.WAITING:
            self._gaps = set(self._missing)
            before = f"elastic/{self.settings.run_id}/{self.round - 1}/beat/"
            past = {node: ticket for node, (ticket, _) in (self._expected or {}).items()}
            keys = [f"elastic/{self.settings.run_id}/round"]
            keys += [self._key("closed"), self._key(f"chief/{self._chief + 1}"), self._key("ticket")]
            keys += [self._key(f"beat/{ticket}") for ticket in self._joined]
            keys += [f"{before}{ticket}" for ticket in past.values()]
            self._ask("beats", Get(tuple(keys)), about=(list(self._joined), past))
            self._publish()
        elif self._roster:
            self._get("member_beats", *(f"beat/{ticket}" for ticket in self._roster.tickets))

    def _on_beats(self, value: list[bytes]) -> None:
        if self.phase is not Phase.WAITING or not self._is_chief or self._closing:
            return
        number, closed, successor, count, *beats = value
        if number.isdigit() and int(number) > self.round:
            self._rejoin()  # nodes that knew more than the store, which had forgotten it, are ahead
            return
        if closed or successor:  # another chief took over while this node slept: two would confuse each other
            self._stand_down()
            return
        joined, past = self._about
        for ticket in self._silent(joined, beats):
            self._joined.pop(ticket, None)
        lost = self._silent([-ticket for ticket in past.values()], beats[len(joined) :])  # negative: of the last round
        for node, ticket in past.items():
            if -ticket in lost and self._expected:
                self._expected.pop(node, None)
        self._note_tickets(int(count or b"0"))
        self._watched_at = self._now
        self._read_nodes(self._missing)
        self._consider()

    def _silent(self, tickets: list[int], beats: list[bytes]) -> list[int]:
        """Note signs of life; return who gave none until the deadline, or has left. Set the counters back."""
        deadline = self.settings.keep_alive_deadline
        late = self._now - self._watched_at > deadline / 2 + self.settings.tick
        silent: list[int] = []
        seen: list[int] = []
        for ticket, beat in zip(tickets, beats, strict=False):
            before, at = self._signs.get(ticket, (b"", self._now))
            if int(beat or b"0") >= LEFT:
                silent.append(ticket)
            elif beat != before or late or ticket not in self._signs:  # late: this node slept, not the others
                self._signs[ticket] = (beat, self._now)
            elif self._now - at >= deadline:
                silent.append(ticket)
            if beat not in (b"", b"0") and ticket > 0 and int(beat) < LEFT:
                seen.append(ticket)
                self._signs[ticket] = (b"0", self._signs[ticket][1])
        self._set((f"beat/{ticket}", b"0") for ticket in seen)
        return silent

    def _consider(self) -> None:
        """The chief decides whether the round can be closed."""
        if self._closing or not self._is_chief or self.phase is not Phase.WAITING:
            return
        if self._expected is None or self._expected or len(self._joined) < self.settings.min_nodes:
            return
        if self._twins() or self._missing_soon():
            return
        last_call = self._last_arrival + self.settings.last_call_timeout - self._now
        as_before = self.round > 0 and all(node in self._past for node in self._tickets)
        if not as_before and len(self._joined) < self.settings.max_nodes and last_call > 0:
            self._in("last_call", last_call)
            return
        members, spares = choose(self._joined, self.settings.max_nodes)
        if len(members) == self.settings.max_nodes or (
            len(members) >= self.settings.min_nodes and (as_before or last_call <= 0)
        ):
            self._close(members, spares)

    def _missing_soon(self) -> bool:
        """Whether somebody has a ticket, and the record is on its way."""
        return any(ticket not in self._gaps for ticket in self._missing)

    def _twins(self) -> bool:
        """Whether two nodes ask for one rank. Once both are known to live, that is an error."""
        by_rank: dict[int, int] = {}
        for ticket, node in self._joined.items():
            if node.rank < 0:
                continue
            if node.rank >= self.settings.max_nodes:
                self._give_up(
                    f"{node.host} (pid {node.pid}) asks for --node-rank={node.rank}, but for {self.me.host} "
                    f"(pid {self.me.pid}) the job has at most {self.settings.max_nodes} nodes: "
                    "give all nodes the same --nnodes",
                    ExitCode.USAGE,
                )
                return True
            other = by_rank.setdefault(node.rank, ticket)
            first = self._joined[other]
            if other == ticket or max(node.previous, first.previous) >= 0:
                continue  # one that had the rank before keeps it; the other can be a spare
            both_came = max(self._arrived[ticket], self._arrived[other])
            if all(self._signs[t][0] and self._signs[t][1] > both_came for t in (ticket, other)):
                self._give_up(
                    f"two nodes ask for --node-rank={node.rank}: {first.host} (pid {first.pid}) and "
                    f"{node.host} (pid {node.pid}); give each node a rank of its own",
                    ExitCode.USAGE,
                )
            return True
        return False

    def _close(self, members: list[int], spares: list[int]) -> None:
        self._closing = True
        self.awaiting = None
        records = [self._joined[ticket] for ticket in members]
        host = next((node for node in self._joined.values() if node.serves), None)
        places = assign(
            records,
            host.address
            if host and host.named
            else "",  # else each node uses the address by which it reaches the store
            (host.port if host else 0) or self.settings.store_port,
            restart_count=self.round,
            charged=max(node.charged for node in self._joined.values()),
            free=max(node.free for node in self._joined.values()),
        )
        self._set(
            (f"place/{self._chief}/{ticket}", encode(place)) for ticket, place in zip(members, places, strict=True)
        )
        roster = Roster(tuple(members), tuple(r.node for r in records), tuple(r.host for r in records))
        self._set([(f"roster/{self._chief}", encode(roster))])
        closed = Closed(self._chief, len(members), self._known, tuple(spares))
        self._create("closed", "closed", encode(closed))

    def _on_closed(self, value: bytes) -> None:
        self._closed = decode(Closed, value, self._key("closed"))
        self._ask_for_place()

    # --- while nodes gather: words for people

    def _publish(self) -> None:
        """The chief tells the others who is there."""
        status = self._who_is_there()
        if status != self._status:
            self._status = status
            self._set([("status", encode(status))])

    def _who_is_there(self) -> Status:
        hosts = [node.host for node in self._joined.values()]
        ranks = {node.rank for node in self._joined.values()}
        missing = [host for _, host in (self._expected or {}).values()]
        if not missing and -1 not in ranks and self.settings.min_nodes == self.settings.max_nodes:
            absent = sorted(set(range(self.settings.max_nodes)) - ranks)
            missing = [f"node rank {rank}" for rank in absent]
        return Status(len(hosts), _listed(hosts), _listed(missing))

    def _say_who_is_there(self) -> None:
        self._spoken += 1
        self._in("say", min(SAY_FIRST * self._spoken, SAY_LATER))
        if self._is_chief:
            self._say_status(self._who_is_there())
        elif self.ticket:
            self._get("status", "status")
        else:
            self._say_status(self._status)

    def _on_status(self, value: list[bytes]) -> None:
        if value[0]:
            self._status = decode(Status, value[0], self._key("status"))
        if self.phase is Phase.WAITING:
            self._say_status(self._status)

    def _say_status(self, status: Status) -> None:
        self._out.append(Say(self._waiting(status)))

    def _waiting(self, status: Status) -> str:
        low, high = self.settings.min_nodes, self.settings.max_nodes
        needed = f"{high}" if low == high else f"{low} to {high}"
        after = self._now - self._began_at
        left = self.settings.join_timeout - after
        missing = f"; missing: {status.missing}" if status.missing else ""
        more = f"; waiting up to {left:.0f} s more" if left > 0 else ""
        have = "has" if status.joined == 1 else "have"
        hosts = f": {status.hosts}" if status.hosts else ""
        return f"{status.joined} of {needed} nodes {have} joined after {after:.0f} s{hosts}{missing}{more}"

    def _waited_in_vain(self) -> None:
        status = self._who_is_there() if self._is_chief else self._status
        text = f"{self._waiting(status)}: gave up (join_timeout={self.settings.join_timeout:g} s)"
        if self.me.serves:
            self._give_up(text, ExitCode.TIMEOUT)
        else:
            self._decide(Verdict(False, error=text, status=ExitCode.TIMEOUT))

    def _give_up(self, text: str, status: int) -> None:
        """End the job for all, before this round has begun."""
        self._closing = True
        self._create("end", "end", encode(End(EndKind.ERROR, text, self.me.node, status=status)))
        self._create("set", "closed", encode(Closed(-1, 0, self._known)))

    # --- signs of life

    def _beat_period(self) -> float:
        is_deputy = self.ticket == 2 if self.place is None else self.place.group_rank == 1
        return self.settings.tick if is_deputy else self.settings.keep_alive_interval

    def _beat(self) -> None:
        self._in("beat", self._beat_period())
        if not self._beating:  # one at a time, also while the store does not answer
            self._beating = True
            self._ask("beat", Add(self._key(f"beat/{self.ticket}"), 1))

    def _on_beat(self, count: int) -> None:
        self._beating = False
        if count < self._beats_before:
            self._beats_before = 0
        silent = (count - self._beats_before - 1) * self._beat_period()
        if silent >= self.settings.keep_alive_deadline:  # or the chief has set the counter to TAKE_OVER
            if self.phase is Phase.WAITING and not self._is_chief:
                self._beats_before = count
                self._create("chief", f"chief/{self._chief + 1}", b"%d" % self.ticket)
            elif self.place is not None and self.place.group_rank > 0:
                self._lose_coordinator()

    def _on_chief(self, value: bytes) -> None:
        if self.phase is not Phase.WAITING:
            return
        self._chief += 1
        if value == b"%d" % self.ticket:
            self._become_chief()

    def _on_member_beats(self, value: list[bytes]) -> None:
        """The coordinator looks at the signs of life of all members."""
        if self._roster is None or self.phase not in (Phase.MEMBER, Phase.ENDED):
            return
        silent = self._silent(list(self._roster.tickets), value)
        self._watched_at = self._now
        lost = [rank for rank, ticket in enumerate(self._roster.tickets) if ticket in silent and ticket != self.ticket]
        if lost:
            self._lose(
                [self._roster.nodes[rank] for rank in lost], _listed([self._roster.hosts[rank] for rank in lost])
            )

    def _lose_coordinator(self) -> None:
        if self._roster is None:
            self._get_roster()
        else:
            self._lose([self._roster.nodes[0]], self._roster.hosts[0])

    def _lose(self, nodes: list[str], hosts: str) -> None:
        """Members are silent: the round ends, or, if it was for them to say what follows its end, this node says it."""
        if self.end is None:
            reason = f"no sign of life from {hosts} for {self.settings.keep_alive_deadline:g} s"
            self._create("end", "end", encode(End(EndKind.REFORM, reason, self.me.node, tuple(nodes))))
        elif self.end.kind is EndKind.FAILED and self.end.node in nodes and self.verdict is None and self.place:
            charged, free = self.place.charged, self.place.free
            if charged < self.settings.max_restarts:
                verdict = Verdict(True, charged + 1, free)
            else:
                text = f"{self.end.reason}; its node is gone, and has not told more"
                verdict = Verdict(False, charged, free, error=text, status=self.end.status)
            self._create("next", "next", encode(verdict))

    # --- the round has closed

    def _ask_for_place(self) -> None:
        self._asked_chief = self._closed.chief if self._closed else self._chief
        self._get("place", "closed", f"place/{self._asked_chief}/{self.ticket}", "end")

    def _on_place(self, value: list[bytes]) -> None:
        if self.phase is not Phase.WAITING:
            return
        closed, place, end = value
        self._closed = decode(Closed, closed, self._key("closed"))
        if self._closed.chief != self._asked_chief and self._closed.chief >= 0:
            self._ask_for_place()
            return
        for name in ("give_up", "say", "watch", "last_call"):
            self._timers.pop(name, None)
        self._is_chief = False
        self._beats_before = 0
        if end:
            self.phase = Phase.BESIDE
            self._on_end(value[2])
            return
        self._await("end")
        if not place:
            self._stand_by(self._closed)
            return
        self.phase = Phase.MEMBER
        self.place = decode(Assignment, place, self._key("place"))
        self._in("beat", self._beat_period())
        if self.place.group_rank == 0:
            self._get_roster()
        self._out.append(Tell(Assigned(self.place)))

    def _get_roster(self) -> None:
        if self._closed:
            self._get("roster", f"roster/{self._closed.chief}")

    def _on_roster(self, value: list[bytes]) -> None:
        if self._roster is None:
            self._roster = decode(Roster, value[0], self._key("roster"))
            self._signs = dict.fromkeys(self._roster.tickets, (b"", self._now))
            self._watched_at = self._now
        if self.place and self.place.group_rank == 0 and "watch" not in self._timers:
            self._in("watch", self.settings.tick)
        if self._mine is not None and self.end is None:
            self._ask_who_is_done()

    def _stand_by(self, closed: Closed) -> None:
        """There is no place for this node: as a spare it waits for the round's end; with room it brings that about."""
        self.phase = Phase.BESIDE
        room = self.settings.max_nodes - closed.nodes
        late = self.ticket - closed.tickets
        if room <= 0 or self.ticket in closed.spares:
            self._out.append(Say(f"the job runs on {closed.nodes} nodes already: waiting as a spare"))
        elif late >= room:
            self._join_running()
        else:
            wait = self.settings.last_call_timeout
            self._out.append(Say(f"the job runs on {closed.nodes} nodes already: joining within {wait:g} s"))
            self._in("join_running", wait)

    def _join_running(self) -> None:
        end = End(EndKind.REFORM, f"{self.me.host} joins", self.me.node)
        self._create("end", "end", encode(end))

    # --- the round ends

    def _announce(self, wish: Announce) -> None:
        if self.end is None:
            self._create("end", "end", encode(End(EndKind.FAILED, wish.reason, self.me.node, status=wish.status)))

    def _on_end_read(self, value: list[bytes]) -> None:
        self._on_end(value[0])

    def _on_end(self, data: bytes) -> None:
        if self.end is not None or self.phase is Phase.LEAVING:
            return
        end = decode(End, data, self._key("end"))
        self.end = end = end._replace(mine=end.node == self.me.node)
        beside = self.place is None
        self.phase = Phase.ENDED
        for name in ("give_up", "say", "last_call", "join_running"):
            self._timers.pop(name, None)
        self._await("next" if end.kind is EndKind.FAILED else None)
        charged, free = (self.place.charged, self.place.free) if self.place else (0, 0)
        match end.kind:
            case EndKind.REFORM:
                self.verdict = Verdict(True, charged, free)
            case EndKind.STOP:
                self.verdict = Verdict(False, charged, free, signum=end.signum)
            case EndKind.DONE:
                self.verdict = Verdict(False, charged, free)
            case EndKind.ERROR:
                late = self._closed is not None and self.ticket > self._closed.tickets
                self.verdict = Verdict(True) if late else Verdict(False, error=end.reason, status=end.status)
        if not beside:
            self._out.append(Tell(Ended(end, 0.0)))
        self._conclude()

    def _succeed(self, wish: Succeed) -> None:
        self._mine = Verdict(False)
        self._set([(f"done/{self.ticket}", b"1")])
        self._ask("done", Add(self._key("done"), 1))

    def _on_done(self, count: int) -> None:
        if self._closed and count >= self._closed.nodes and self.end is None:
            if self._roster is None:
                self._get_roster()
            else:
                self._ask_who_is_done()

    def _ask_who_is_done(self) -> None:
        if self._roster:
            self._get("who_is_done", *(f"done/{ticket}" for ticket in self._roster.tickets))

    def _on_who_is_done(self, value: list[bytes]) -> None:
        if all(value) and self.end is None:
            self._create("end", "end", encode(End(EndKind.DONE, "all workers have ended well", self.me.node)))

    def _settle(self, wish: Settle) -> None:
        self._mine = wish.verdict
        if self.end is None or self.end.kind is not EndKind.FAILED:
            self._conclude()
        elif self.end.mine:
            self._get("also", "also")
        elif wish.verdict.failures:
            lines = b"".join(encode(_Failure(_brief(failure))) + b"\n" for failure in wish.verdict.failures[:SHOWN])
            self._ask("set", Append(self._key("also"), lines))
            self._conclude()
        else:
            self._conclude()

    def _on_also(self, value: list[bytes]) -> None:
        """Say what follows; the cause is this node's, unless that is plainly the consequence of another's."""
        if self._mine is None:
            return
        others = [decode(_Failure, line, self._key("also")).failure for line in value[0].splitlines()]
        failures = sorted((*self._mine.failures, *dict.fromkeys(others)), key=is_consequence)
        cut = (_cut(failures[0]), *map(_brief, failures[1:64])) if failures else ()
        self._create("next", "next", encode(self._mine._replace(failures=cut)))

    def _on_next_read(self, value: list[bytes]) -> None:
        self._on_next(value[0])

    def _on_next(self, data: bytes) -> None:
        if self.verdict is None:
            self.verdict = decode(Verdict, data, self._key("next"))
            self.awaiting = None
            self._conclude()

    def _conclude(self) -> None:
        """Go on when the round is settled, with the agent's word if it had workers."""
        if self.verdict is None:
            return
        if not self.verdict.restart:
            self._acknowledge()
        if self.place is None and self.verdict.restart:
            self._rejoin()
        elif self.place is None or self._mine is not None:
            if self.place is None and self.end and self.end.kind is EndKind.DONE:
                self._out.append(Say(f"job {self.settings.run_id} has ended already, well: there is nothing to do"))
            self._decide(self.verdict)

    def _decide(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self._out.append(Tell(Decided(verdict)))
        if not verdict.restart:
            self._say_goodbye()

    # --- the store comes and goes

    def _look_for_record(self, event: Found) -> None:
        if self.ticket and not self.is_settled:
            self._get("record", f"node/{self.ticket}")

    def _on_record(self, value: list[bytes]) -> None:
        """Without this node's record, it is another store, or the same one started anew: meet there again."""
        if value[0]:
            return
        if self.place is None:
            self._rejoin()
        elif self.end is None:
            self._on_end(encode(End(EndKind.REFORM, "the store was started anew", self.me.node)))
        elif self.verdict is None:
            self.verdict = Verdict(True, self.place.charged, self.place.free)
            self._conclude()

    def _lose_store(self, event: Lost) -> None:
        if self.phase is Phase.LEAVING:
            self._gone_at_last()
            return
        if self.is_settled:
            return
        self.ticket = 0
        self._timers.clear()
        if self.place is not None and self.end is None:
            self._on_end(encode(End(EndKind.ERROR, event.text, self.me.node, status=event.status)))
        else:
            self.verdict = Verdict(False, error=event.text, status=event.status)
            self._conclude()

    # --- leaving

    def _leave(self, wish: Leave) -> None:
        """The node goes: the job goes on without it if it can."""
        if self.phase is Phase.MEMBER and self._closed and self.end is None:
            name = signal_name(wish.signum)
            rest = self._closed.nodes - 1 + len(self._closed.spares)
            if rest >= self.settings.min_nodes and not self.me.serves:
                end = End(EndKind.REFORM, f"{self.me.host} leaves ({name})", self.me.node, (self.me.node,))
            else:
                reason = f"{self.me.host} leaves ({name}), and the job cannot go on without it"
                end = End(EndKind.STOP, reason, self.me.node, signum=wish.signum)
            self._create("set", "end", encode(end))
        elif self.phase is Phase.WAITING and self._is_chief:
            heir = min((ticket for ticket in self._joined if ticket != self.ticket), default=0)
            if heir:
                self._set([(f"beat/{heir}", b"%d" % TAKE_OVER)])
        self._say_goodbye()

    def _acknowledge(self) -> None:
        """This node knows that the job has ended: one less for the store's host to wait for."""
        if not self._acknowledged and self.ticket:
            self._acknowledged = True
            self._ask("left", Add(self._key("left"), 1))

    def _on_left(self, count: int) -> None:
        self._get("arrivals", "ticket", about=count)

    def _on_arrivals(self, value: list[bytes]) -> None:
        if self._about >= int(value[0] or b"0"):
            self._set([("empty", b"1")])
        self._has_counted = True
        self._close_quietly()

    def _close_quietly(self) -> None:
        """A node that hosts nothing is gone when the store has done all that it was asked for."""
        if self.phase is Phase.LEAVING and self._has_counted and not self.me.serves:
            self._get("gone", "empty")

    def _say_goodbye(self) -> None:
        if self.phase is Phase.LEAVING:
            return
        self.phase = Phase.LEAVING
        self._timers.clear()
        self.awaiting = None
        if not self.ticket:
            self.is_gone = True
            return
        self._ask("set", Add(self._key(f"beat/{self.ticket}"), LEFT))
        self._acknowledge()
        if self.me.serves:
            self._await("empty")
            self._in("close", min(self.settings.close_timeout, self.settings.keep_alive_deadline))
        self._close_quietly()

    def _on_gone(self, value: Any) -> None:
        self._gone_at_last()

    def _gone_at_last(self) -> None:
        self._timers.clear()
        self.is_gone = True


class _Failure(NamedTuple):
    """A failure in the list of consequences."""

    failure: ProcessFailure


def _brief(failure: ProcessFailure) -> ProcessFailure:
    """A failure without its traceback, for a list of many."""
    return replace(failure, error=failure.error_line(), message="")


def _cut(failure: ProcessFailure) -> ProcessFailure:
    """A failure of moderate size: every node reads it."""
    text = failure.message
    if len(text) > MESSAGE:
        text = f"{text[: MESSAGE // 2]}\n... {len(text) - MESSAGE} characters left out ...\n{text[-MESSAGE // 2 :]}"
    return replace(failure, error=failure.error_line(), message=text)


def _listed(names: list[str]) -> str:
    """``host-a, host-b (2 nodes), host-c and 12 more``."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    shown = [name if count == 1 else f"{name} ({count} nodes)" for name, count in list(counts.items())[:SHOWN]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


ANSWERS: dict[str, Callable[[Node, Any], None]] = {
    "round": Node._on_round,
    "ticket": Node._on_ticket,
    "past": Node._on_past,
    "past_nodes": Node._on_past_nodes,
    "count": Node._on_count,
    "nodes": Node._on_nodes,
    "beats": Node._on_beats,
    "closed": Node._on_closed,
    "status": Node._on_status,
    "beat": Node._on_beat,
    "chief": Node._on_chief,
    "member_beats": Node._on_member_beats,
    "place": Node._on_place,
    "roster": Node._on_roster,
    "record": Node._on_record,
    "end": Node._on_end,
    "end_read": Node._on_end_read,
    "done": Node._on_done,
    "who_is_done": Node._on_who_is_done,
    "also": Node._on_also,
    "next": Node._on_next,
    "next_read": Node._on_next_read,
    "left": Node._on_left,
    "arrivals": Node._on_arrivals,
    "gone": Node._on_gone,
    "set": Node._ignore,
}
TIMERS: dict[str, Callable[[Node], None]] = {
    "give_up": Node._waited_in_vain,
    "say": Node._say_who_is_there,
    "watch": Node._watch,
    "last_call": Node._consider,
    "beat": Node._beat,
    "join_running": Node._join_running,
    "close": Node._gone_at_last,
}
WISHES: dict[type, Callable[[Node, Any], None]] = {
    Opening: Node._begin,
    Appeared: Node._on_key,
    Announce: Node._announce,
    Succeed: Node._succeed,
    Settle: Node._settle,
    Leave: Node._leave,
    Found: Node._look_for_record,
    Lost: Node._lose_store,
}
