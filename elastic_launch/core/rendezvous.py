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
from typing import Any, NamedTuple

from elastic_launch.core.chief import SHOWN, Chief, Close, Later, Refuse, disagreement, listed
from elastic_launch.core.lifecycle import Announce, Assigned, Decided, Ended, Leave, Settle, Succeed
from elastic_launch.core.protocol import (
    Answered,
    Appeared,
    Ask,
    Event,
    Found,
    Lost,
    Opening,
    Output,
    Passing,
    Phase,
    Renew,
    Say,
    Settings,
    Tell,
)
from elastic_launch.core.ranks import assign
from elastic_launch.core.records import Closed, NodeRecord, Roster, Status, decode, encode
from elastic_launch.core.requests import Add, Append, Get, Request, Set, Swap
from elastic_launch.core.root_cause import is_consequence, shortened
from elastic_launch.core.watch import LEFT, Watch, number
from elastic_launch.errors import ExitCode, ProcessFailure, RendezvousStateError, signal_name
from elastic_launch.model import Assignment, End, EndKind, Verdict

TAKE_OVER = 1 << 20
"""A counter that is set to this tells its node to take over as chief at once."""
ANY_TICKET = 1 << 40
"""Above every ticket: of a round that ends before it begins, for whoever comes."""
BATCH = 256
"""Records that the chief reads with one request, and keys that are written with one."""
SAY_FIRST, SAY_LATER = 5.0, 10.0
"""Seconds until a waiting node says who is there, and between two such lines when it has said so a few times."""
MESSAGE = 60_000
"""Characters of the cause's traceback that the other nodes get to see."""
NOTE = 1000
"""Characters of a failure's note."""


class Node:
    """One node of a job."""

    def __init__(self, record: NodeRecord, settings: Settings) -> None:
        """Take what the node tells of itself, and the job's settings."""
        self.me = record._replace(limits=settings.limits)
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
        self._asked_chief = 0
        self._stood_by = False
        """It was beside the members before the round ended."""
        self._beating = self._is_fenced = False
        self._beat_at = 0.0
        self._beats_before = 0
        self._roster: Roster | None = None
        self._beside: list[int] = []
        """Tickets of those who are no members, if this node watches over them."""
        self._watch: Watch | None = None
        """Of the members, if this node watches over them."""
        self._chiefs = 0
        """Which chief this node follows, or is."""
        self._chief: Chief | None = None
        """What it knows as chief, if it is."""
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

    @property
    def _round_key(self) -> str:
        return f"elastic/{self.settings.run_id}/round"

    def _past_key(self, name: str) -> str:
        return f"elastic/{self.settings.run_id}/{self.round - 1}/{name}"

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
        self._look_for_round()
        self.me = self.me._replace(port=wish.port)

    def _rejoin(self) -> None:
        """Go on to the next round without the agent, which has no workers in this one."""
        if self.me.serves and self.settings.store_port:
            self._out.append(Renew())
        self._look_for_round()

    def _look_for_round(self) -> None:
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
        if after < 0:
            self._ask("round", Get((self._round_key,)))
        else:
            self._ask("round", Swap(self._round_key, b"%d" % after if after else b"", b"%d" % self.round))

    def _on_round(self, value: list[bytes] | bytes) -> None:
        if self.phase is not Phase.OPENING:
            return
        found = value[0] if isinstance(value, list) else value
        current = number(found)
        if current < self.round:  # the store has forgotten it
            self._ask("round", Swap(self._round_key, found, b"%d" % self.round))
            return
        if current > self.round > 0:
            self.me = self.me._replace(previous=-1)  # the others have gone on without this node
        self.round = current
        self._ask("ticket", Add(self._key("ticket"), 1))

    def _on_ticket(self, ticket: int) -> None:
        if self.phase is not Phase.OPENING:
            return  # it has left meanwhile
        self.ticket, self.phase = ticket, Phase.WAITING
        self._set([(f"node/{ticket}", encode(self.me))])
        self._in("say", SAY_FIRST)
        if ticket == 1:
            self._become_chief()
        else:
            self._await("closed")
        self._in("beat", self._beat_period())

    def _become_chief(self) -> None:
        self._chief = Chief(self.settings, self.me, self._chiefs, self.round == 0, self._now)
        self._await("node/1")
        self._in("watch", self.settings.tick)
        if self.round:
            self._ask("past", Get((self._past_key("ticket"), self._past_key("end"))))

    def _stand_down(self) -> None:
        """Another node took over while this one slept: two chiefs would confuse each other."""
        self._chiefs += 1
        self._chief = None
        self._beats_before = 0
        for name in ("watch", "last_call"):
            self._timers.pop(name, None)
        self._await("closed")

    def _on_past(self, value: list[bytes]) -> None:
        count, end = value
        gone = decode(End, end, self._past_key("end")).gone if end else ()
        keys = tuple(self._past_key(f"node/{ticket}") for ticket in range(1, number(count) + 1))
        self._ask("past_nodes", Get(keys), about=(keys, gone))

    def _on_past_nodes(self, value: list[bytes]) -> None:
        if self._chief:
            keys, gone = self._about
            nodes = [(t, decode(NodeRecord, data, keys[t - 1])) for t, data in enumerate(value, 1) if data]
            self._chief.note_past((ticket, node) for ticket, node in nodes if node.node not in gone)
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
                self._gone_at_last()
            case _:
                self._get("count", "ticket")

    # --- the chief

    def _on_count(self, value: list[bytes]) -> None:
        if self._chief:
            self._chief.note_tickets(number(value[0]))
            self._read_nodes(self._chief.missing)

    def _read_nodes(self, tickets: list[int]) -> None:
        if some := tickets[:BATCH]:
            self._get("nodes", *(f"node/{ticket}" for ticket in some), about=some)
        else:
            self._await_arrivals()

    def _on_nodes(self, value: list[bytes]) -> None:
        chief, read = self._chief, self._about
        if chief is None or chief.is_closing:
            return
        found = ((ticket, data) for ticket, data in zip(read, value, strict=True) if data)
        chief.note_nodes(((t, decode(NodeRecord, data, self._key(f"node/{t}"))) for t, data in found), self._now)
        self._read_nodes([ticket for ticket in chief.missing if ticket > read[-1]])
        self._consider()

    def _await_arrivals(self) -> None:
        if self._chief and not self._chief.is_closing:
            self._await(f"node/{self._chief.next_ticket()}")

    def _look(self) -> None:
        """The chief looks at signs of life, tickets whose record is late, and another chief's work; the coordinator
        at the members' signs of life."""
        self._in("watch", self.settings.tick)
        if self._chief:
            self._chief.note_tick()
            joined = [*self._chief.joined, *self._chief.doubtful]
            past = {node: ticket for node, (ticket, _) in (self._chief.expected or {}).items()}
            names = ["closed", f"chief/{self._chiefs + 1}", "ticket", *(f"beat/{ticket}" for ticket in joined)]
            keys = (self._round_key, *map(self._key, names), *(self._past_key(f"beat/{t}") for t in past.values()))
            self._ask("beats", Get(keys), about=(joined, past))
            self._publish(self._chief)
        elif self._roster:
            # Also of those beside the members: they see that the coordinator lives.
            tickets = [*self._roster.tickets, *self._beside]
            self._get("member_beats", "ticket", *(f"beat/{ticket}" for ticket in tickets), about=tickets)

    def _on_beats(self, value: list[bytes]) -> None:
        chief = self._chief
        if chief is None or chief.is_closing:
            return
        current, closed, successor, count, *beats = value
        joined, past = self._about
        if number(current) > self.round:
            self._rejoin()  # the store had forgotten the number, and nodes that remembered it are ahead
        elif closed or successor:
            self._stand_down()
        else:
            self._set_back(chief.look(list(zip(joined, beats, strict=False)), self._now))
            chief.look_back(list(past), list(zip(past.values(), beats[len(joined) :], strict=True)), self._now)
            chief.note_tickets(number(count))
            self._read_nodes(chief.missing)
            self._consider()

    def _set_back(self, tickets: list[int]) -> None:
        self._set((f"beat/{ticket}", b"0") for ticket in tickets)

    def _consider(self) -> None:
        """Close the round, if the chief can."""
        if self._chief is None or self._chief.is_closing:
            return
        match self._chief.decide(self._now):
            case Close(members, spares):
                self._close(self._chief, members, spares)
            case Refuse(reason):
                self._give_up(reason, ExitCode.USAGE)
            case Later(seconds):
                self._in("last_call", seconds)

    def _close(self, chief: Chief, members: list[int], spares: list[int]) -> None:
        chief.is_closing = True
        self.awaiting = None
        nodes = [chief.joined[ticket] for ticket in members]
        everybody = chief.joined.values()
        host = next((node for node in everybody if node.serves), None)
        places = assign(
            nodes,
            host.address if host and host.named else "",  # empty: each node uses the one by which it reaches the store
            self.settings.store_port and ((host.port if host else 0) or self.settings.store_port),
            restart_count=self.round,
            charged=max(node.charged for node in everybody),
            free=max(node.free for node in everybody),
        )
        self._set((f"place/{chief.number}/{t}", encode(place)) for t, place in zip(members, places, strict=True))
        roster = Roster(
            tuple(members),
            tuple(node.node for node in nodes),
            tuple(node.host for node in nodes),
            places[0].charged,
            places[0].free,
            tuple(node.rank for node in nodes),
        )
        self._set([(f"roster/{chief.number}", encode(roster))])
        closed = Closed(chief.number, len(members), chief.known, tuple(spares), self.me.limits)
        self._create("closed", "closed", encode(closed))

    def _on_closed(self, value: bytes) -> None:
        self._closed = decode(Closed, value, self._key("closed"))
        self._ask_for_place()

    # --- while nodes gather: words for people

    def _publish(self, chief: Chief) -> None:
        """The chief tells the others who is there."""
        self._status = chief.status()
        if self._status != chief.published:
            chief.published = self._status
            self._set([("status", encode(self._status))])

    def _say_who_is_there(self) -> None:
        self._spoken += 1
        self._in("say", min(SAY_FIRST * self._spoken, SAY_LATER))
        if self._chief:
            self._say_status(self._chief.status())
        else:
            self._get("status", "status")

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
        status = self._chief.status() if self._chief else self._status
        text = f"{self._waiting(status)}; gave up (join_timeout={self.settings.join_timeout:g} s)"
        if self.me.serves:
            self._give_up(text, ExitCode.TIMEOUT)
        else:
            self._decide(Verdict(False, error=text, status=ExitCode.TIMEOUT))

    def _give_up(self, text: str, status: int) -> None:
        """End the job for all, before this round has begun."""
        if self._chief:
            self._chief.is_closing = True
        self._create("end", "end", encode(End(EndKind.ERROR, text, self.me.node, status=status)))
        self._create("set", "closed", encode(Closed(-1, 0, self._known_tickets())))

    def _known_tickets(self) -> int:
        return max(self.ticket, self._chief.known if self._chief else 0)

    # --- signs of life

    def _beat_period(self) -> float:
        is_deputy = self.ticket == 2 if self.place is None else self.place.group_rank == 1
        return self.settings.tick if is_deputy else self.settings.keep_alive_interval

    def _beat(self) -> None:
        self._in("beat", self._beat_period())
        if not self._beating:  # one at a time, also while the store does not answer
            self._beating = True
            self._beat_at = self._now
            self._ask("beat", Add(self._key(f"beat/{self.ticket}"), 1))
        elif self._now - self._beat_at >= self.settings.keep_alive_deadline - self._beat_period():
            self._fence()

    def _fence(self) -> None:
        """The store has not answered for so long that the others may go on without this node: it must not, either."""
        if self.phase is Phase.MEMBER and not self._is_fenced:
            self._is_fenced = True
            self._mine = None
            reason = f"the store has not answered for {self._now - self._beat_at:.0f} s"
            end = End(EndKind.REFORM, f"{self.me.host} was cut off: {reason}", self.me.node)
            self._create("end", "end", encode(end))  # when the store is there again; or it tells how the round ended
            self._out.append(Tell(Ended(end._replace(reason=reason), 0.0)))

    def _on_beat(self, count: int) -> None:
        self._beating = False
        if count < self._beats_before:
            self._beats_before = 0
        silent = (count - self._beats_before - 1) * self._beat_period()
        if silent >= self.settings.keep_alive_deadline:  # or the chief has set the counter to TAKE_OVER
            if self.phase is Phase.WAITING and self._chief is None:
                self._beats_before = count
                self._create("chief", f"chief/{self._chiefs + 1}", b"%d" % self.ticket)
            elif self.phase in (Phase.MEMBER, Phase.BESIDE, Phase.ENDED) and (not self.place or self.place.group_rank):
                self._lose_coordinator()

    def _on_chief(self, value: bytes) -> None:
        if self.phase is not Phase.WAITING:
            return
        self._chiefs += 1
        if value == b"%d" % self.ticket:
            self._become_chief()

    def _on_member_beats(self, value: list[bytes]) -> None:
        """The coordinator looks at the signs of life of all members."""
        roster = self._roster
        if roster is None or self._watch is None or self.phase not in (Phase.MEMBER, Phase.ENDED):
            return
        count, *beats = value
        self._beside = sorted(set(range(1, number(count) + 1)) - set(roster.tickets))
        silent = self._watch.look(zip(self._about, beats, strict=True), self._now)
        self._set_back(self._watch.set_back())
        lost = [rank for rank, ticket in enumerate(roster.tickets) if ticket in silent and ticket != self.ticket]
        if lost:
            self._lose([roster.nodes[rank] for rank in lost], listed(roster.hosts[rank] for rank in lost))

    def _lose_coordinator(self) -> None:
        if self._roster is None:
            self._get_roster()
        elif self.end is None:
            self._lose([self._roster.nodes[0]], self._roster.hosts[0])
        elif "watch" not in self._timers:  # somebody must see whether the node that is to say what follows is alive
            self._watch_over(self._roster)

    def _lose(self, nodes: list[str], hosts: str) -> None:
        """Members are silent: the round ends, or, if it was for them to say what follows its end, this node says it."""
        if self.end is None:
            reason = f"no sign of life from {hosts} for {self.settings.keep_alive_deadline:g} s"
            self._create("end", "end", encode(End(EndKind.REFORM, reason, self.me.node, tuple(nodes))))
        elif self.end.kind is EndKind.FAILED and self.end.node in nodes and self.verdict is None and self._roster:
            charged, free = self._roster.charged, self._roster.free
            if charged < self.settings.max_restarts:
                verdict = Verdict(True, charged + 1, free)
            else:
                text = f"{self.end.reason}; its node is gone, and has not told more"
                verdict = Verdict(False, charged, free, error=text, status=self.end.status)
            self._create("next", "next", encode(verdict))

    # --- the round has closed

    def _ask_for_place(self) -> None:
        self._asked_chief = self._closed.chief if self._closed else self._chiefs
        self._get("place", "closed", f"place/{self._asked_chief}/{self.ticket}", "end")

    def _on_place(self, value: list[bytes]) -> None:
        if self.phase is not Phase.WAITING:
            return
        closed, place, end = value
        if not closed:
            return  # the store was started anew: the record is missing, too
        self._closed = decode(Closed, closed, self._key("closed"))
        if self._closed.chief != self._asked_chief and self._closed.chief >= 0:
            self._ask_for_place()
            return
        for name in ("give_up", "say", "watch", "last_call"):
            self._timers.pop(name, None)
        self._chief = None
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
        if not value[0]:
            return  # the store was started anew: the record is missing, too
        if self._roster is None:
            self._roster = decode(Roster, value[0], self._key("roster"))
        if self.phase is Phase.BESIDE and self._closed and self.me.rank in self._roster.ranks:
            holder = self._roster.hosts[self._roster.ranks.index(self.me.rank)]
            text = f"{self.me.host} asks for --node-rank={self.me.rank}, which {holder} has asked for before: waiting "
            self._out.append(Say(f"{text}as a spare, in case that node is gone"))
        elif self.phase is Phase.BESIDE and self._closed and self.me.rank >= 0:
            self._wait_beside(self._closed)
        if self.place and self.place.group_rank == 0 and "watch" not in self._timers:
            self._watch_over(self._roster)
        if self._mine is not None and self.end is None:
            self._ask_who_is_done()

    def _watch_over(self, roster: Roster) -> None:
        self._watch = Watch(self.settings.keep_alive_deadline, self.settings.tick, self._now)
        self._watch.greet(roster.tickets, self._now)
        self._in("watch", self.settings.tick)

    def _stand_by(self, closed: Closed) -> None:
        """There is no place for this node: as a spare it waits for the round's end; with room it brings that about."""
        self.phase = Phase.BESIDE
        if closed.limits != self.me.limits:
            text = disagreement(
                self.me.host, self.me.pid, self.me.limits, "the nodes of the running job", closed.limits
            )
            self._decide(Verdict(False, error=text, status=ExitCode.USAGE))
            return
        self._stood_by = True
        if self.me.rank >= 0:
            self._get_roster()  # to see who has that rank
        else:
            self._wait_beside(closed)

    def _wait_beside(self, closed: Closed) -> None:
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
        if not data or self.end is not None or self.phase is Phase.LEAVING:
            return
        end = decode(End, data, self._key("end"))
        if not (0 <= end.signum < 65 and 0 <= end.status < 256):
            raise RendezvousStateError(f"the store holds at {self._key('end')!r} no signal or status: {data[:60]!r}")
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
                self.verdict = Verdict(True) if self._is_late else Verdict(False, error=end.reason, status=end.status)
        if not beside and not self._is_fenced:
            self._mine = None  # also of a node whose workers have ended well: it settles this end
            self._out.append(Tell(Ended(end, 0.0)))
        self._report()

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
        self._report()

    def _report(self) -> None:
        """Say what follows, if that is for this node to say; else tell its failures, as consequences."""
        if self._mine and self.end and self.end.kind is EndKind.FAILED and self.verdict is None:
            if self.end.mine:
                self._get("also", "also")
                return
            if self._mine.failures:
                lines = b"".join(encode(_Failure(_brief(failure))) + b"\n" for failure in self._mine.failures[:SHOWN])
                self._ask("set", Append(self._key("also"), lines))
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
        if data and self.verdict is None:
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
            self._decide(self._as_latecomer(self.verdict) if self._is_late else self.verdict)

    @property
    def _is_late(self) -> bool:
        """It came when the round was over."""
        return self._closed is not None and self.ticket > self._closed.tickets and not self._stood_by

    def _as_latecomer(self, verdict: Verdict) -> Verdict:
        """What the end of a job means to a node that came when it was over."""
        job = f"job {self.settings.run_id}"
        if self.end and self.end.kind is EndKind.DONE:
            self._out.append(Say(f"{job} has ended already, well: there is nothing to do (a new job needs another id)"))
        elif self.end and self.end.kind is EndKind.STOP:
            text = f"{job} was stopped already: {self.end.reason}; pass another --rdzv-id for a new job"
            return Verdict(False, error=text, status=ExitCode.UNAVAILABLE)
        elif self.end and self.end.kind is EndKind.FAILED:
            self._out.append(Say(f"{job} has failed already, as follows; pass another --rdzv-id for a new job"))
        return verdict

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
        elif self.me.serves and self.phase is not Phase.IDLE and not self.is_settled:
            self.round += self.phase is Phase.ENDED  # the others have gone on, or will
            reason = f"{self.me.host}, which hosts the store, leaves ({signal_name(wish.signum)})"
            self._create("set", "end", encode(End(EndKind.STOP, reason, self.me.node, signum=wish.signum)))
            self._create("set", "closed", encode(Closed(-1, 0, ANY_TICKET)))
        elif self.phase is Phase.WAITING and self._chief:
            heirs = sorted(ticket for ticket in self._chief.joined if ticket != self.ticket)
            self._set((f"beat/{heir}", b"%d" % TAKE_OVER) for heir in heirs[:1])
        self._say_goodbye()

    def _acknowledge(self) -> None:
        """This node knows that the job has ended: one less for the store's host to wait for."""
        if not self._acknowledged and self.ticket:
            self._acknowledged = True
            self._ask("left", Add(self._key("left"), 1))

    def _on_left(self, count: int) -> None:
        self._get("arrivals", "ticket", about=count)

    def _on_arrivals(self, value: list[bytes]) -> None:
        if self._about >= number(value[0]):
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
        self._chief = None
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
    return replace(failure, error=failure.error_line(), message="", stderr="", note=failure.note[:NOTE])


def _cut(failure: ProcessFailure) -> ProcessFailure:
    """A failure of moderate size: every node reads it."""
    message = shortened(failure.message, MESSAGE)
    return replace(failure, error=failure.error_line(), message=message, note=failure.note[:NOTE])


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
    "watch": Node._look,
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
