"""Layer 1: a node on its way into a round, and the chief that closes it. Pure."""

from __future__ import annotations

from elastic_launch.core.agent.restart_policy import aged, is_deprioritized
from elastic_launch.core.rendezvous.chief import Chief, Close, Later, Refuse
from elastic_launch.core.rendezvous.protocol import Opening, Phase, Renew
from elastic_launch.core.rendezvous.ranks import assign
from elastic_launch.core.rendezvous.records import Closed, NodeRecord, Roster, Status, decode, encode
from elastic_launch.core.rendezvous.rounds import BATCH, Round
from elastic_launch.core.rendezvous.watch import number
from elastic_launch.core.store_requests import Add, Get, Swap
from elastic_launch.core.text import MAX_LISTED, listed
from elastic_launch.errors import ExitCode
from elastic_launch.job import Decision, End, EndKind, Level

SAY_FIRST, SAY_LATER = 5.0, 10.0
"""Seconds until a waiting node says who is there, and between two such lines when it has said so a few times."""


class Gathering(Round):
    """Joins, and gathers the others as their chief."""

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
        if self.decision and (self.assignment or (self.end and self.end.kind is EndKind.FAILED)):
            restart_history = aged(self.decision.restart_history, self._now - self._decided_at)
            aside = self.me.aside or is_deprioritized(self.settings.policy, restart_history, self.me.node)
            self.me = self.me._replace(restart_history=restart_history, past=self.round, aside=aside)
        self.me = self.me._replace(previous=self.assignment.group_rank if self.assignment else -1)
        self.phase = Phase.OPENING
        self._timers.clear()
        pause_ends = self._decided_at + self.decision.pause if self.decision else self._began_at
        self._began_at = max(self._now, pause_ends)
        self._timers["give_up"] = self._began_at + self.settings.join_timeout
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
        self._alive_at = self._heard_at = self._looked_at = self._now
        self._ask("ticket", Add(self._key("ticket"), 1))

    def _on_ticket(self, ticket: int) -> None:
        if self.phase is not Phase.OPENING:
            return  # it has left meanwhile
        self.ticket, self.phase = ticket, Phase.WAITING
        self._set([(f"node/{ticket}", encode(self.me))])
        self._timers["say"] = max(self._now, self._began_at) + SAY_FIRST
        if ticket == 1:
            self._become_chief()
        else:
            self._await("closed")
        self._timers["beat"] = max(self._now, self._alive_at + self._beat_period())

    def _become_chief(self) -> None:
        self._chief = Chief(self.settings, self.me, self._chiefs, self.round, self._now, self._began_at)
        self._await("node/1")
        self._in("watch", self.settings.tick)
        if self.round:
            self._ask("past", Get(tuple(map(self._past_key, ("ticket", "end", "next", "closed")))))

    def _stand_down(self) -> None:
        """Another node took over while this one slept: two chiefs would confuse each other."""
        self._chiefs += 1
        self._chief = None
        self._heard_at = self._now
        for name in ("watch", "last_call"):
            self._timers.pop(name, None)
        self._await("closed")

    def _on_past(self, value: list[bytes]) -> None:
        count, end, following, closed = value
        gone = decode(End, end, self._past_key("end")).gone if end else ()
        restart_history = decode(Closed, closed, self._past_key("closed")).restart_history if closed else None
        if following:
            decision = decode(Decision, following, self._past_key("next"))
            gone, restart_history = gone + decision.gone, decision.restart_history
        if self._chief:
            self._chief.past_restart_history = restart_history
        keys = tuple(self._past_key(f"node/{ticket}") for ticket in range(1, number(count) + 1))
        self._ask("past_nodes", Get(keys), about=(keys, gone))

    def _on_past_nodes(self, value: list[bytes]) -> None:
        if self._chief:
            keys, gone = self._about
            nodes = [(t, decode(NodeRecord, data, keys[t - 1])) for t, data in enumerate(value, 1) if data]
            self._chief.note_past(nodes, gone)
            self._consider()

    # --- the chief

    def _on_count(self, value: list[bytes]) -> None:
        if self._chief:
            self._chief.note_tickets(number(value[0]), self._now)
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
        nodes = [(ticket, decode(NodeRecord, data, self._key(f"node/{ticket}"))) for ticket, data in found]
        for ticket, node in nodes:
            chief.note_nodes([(ticket, node)], self._now)
            is_new = ticket in chief.joined and ticket != self.ticket and chief.is_new(node)
            if is_new and self.settings.max_nodes <= MAX_LISTED:  # not of those that the chief before has told of
                self._log(f"{node.host} has joined: {self._count(len(chief.joined))}", Level.INFO)
        self._read_nodes([ticket for ticket in chief.missing if ticket > read[-1]])
        self._consider()

    def _await_arrivals(self) -> None:
        if self._chief and not self._chief.is_closing:
            self._await(f"node/{self._chief.next_ticket(self._now)}")

    def _look(self) -> None:
        """The chief looks at signs of life, tickets whose record is late, and another chief's work; the coordinator
        at the members' signs of life."""
        self._in("watch", self.settings.tick)
        if self._chief:
            joined = [*self._chief.joined, *self._chief.doubtful]
            past = {node: ticket for node, (ticket, _) in (self._chief.expected or {}).items()}
            names = ["closed", f"chief/{self._chiefs + 1}", "ticket", *(f"beat/{ticket}" for ticket in joined)]
            keys = (self._round_key, *map(self._key, names), *(self._past_key(f"beat/{t}") for t in past.values()))
            self._ask("beats", Get(keys), about=(joined, past, self._now))
            self._publish(self._chief)
        elif self._roster:
            # Also of those beside the members: they see that the coordinator lives.
            tickets = [*self._roster.tickets, *self._beside]
            self._get("member_beats", "ticket", *(f"beat/{ticket}" for ticket in tickets), about=(tickets, self._now))

    def _on_beats(self, value: list[bytes]) -> None:
        chief = self._chief
        if chief is None or chief.is_closing:
            return
        current, closed, successor, count, *beats = value
        joined, past, asked_at = self._about
        if number(current) > self.round:
            self._rejoin()  # the store had forgotten the number, and nodes that remembered it are ahead
        elif closed or successor:
            self._stand_down()
        else:
            self._set_back(chief.look(list(zip(joined, beats, strict=False)), self._now, asked_at))
            before = list(zip(past.values(), beats[len(joined) :], strict=True))
            chief.look_back(list(past), before, self._now, asked_at)
            self._say_who_is_gone(chief)
            chief.note_tickets(number(count), self._now)
            self._read_nodes(chief.missing)
            self._consider()

    def _set_back(self, tickets: list[int]) -> None:
        if tickets:
            self._set((f"beat/{ticket}", b"0") for ticket in tickets)
            self._get("set_back", "closed", about=tickets)  # any key: the answer tells that they are set back

    def _on_set_back(self, value: list[bytes]) -> None:
        for watch in (self._watch, self._chief and self._chief.watch):
            if watch:
                watch.note_set_back(self._about, self._now)

    def _consider(self) -> None:
        """Close the round, if the chief can."""
        if self._chief is None or self._chief.is_closing:
            return
        match self._chief.decide(self._now):
            case Close(members, spares):
                self._close(self._chief, members, spares)
            case Refuse(reason, status):
                self._give_up(reason, status)
            case Later(seconds):
                self._in("last_call", seconds)

    def _close(self, chief: Chief, members: list[int], spares: list[int]) -> None:
        chief.is_closing = True
        chief.silent += [node.host for node in chief.doubtful.values()]
        self._say_who_is_gone(chief)
        self.awaiting = None
        self._looked_at = self._now
        nodes = [chief.joined[ticket] for ticket in members]
        everybody = chief.joined.values()
        host = next((node for node in everybody if node.serves), None)
        assignments = assign(
            nodes,
            host.address if host and host.named else "",  # empty: each node uses the one by which it reaches the store
            self.settings.store_port and ((host.port if host else 0) or self.settings.store_port),
            restart_count=self.round,
            restart_history=chief.restart_history(self._now),
        )
        self._set(
            (f"place/{chief.number}/{t}", encode(assignment))
            for t, assignment in zip(members, assignments, strict=True)
        )
        roster = Roster(
            tuple(members),
            tuple(node.node for node in nodes),
            tuple(node.host for node in nodes),
            tuple(node.rank for node in nodes),
        )
        self._set([(f"roster/{chief.number}", encode(roster))])
        restart_history = assignments[0].restart_history
        closed = Closed(chief.number, len(members), chief.known, tuple(spares), self.me.options, restart_history)
        self._create("closed", "closed", encode(closed))

    # --- while nodes gather: words for people

    def _publish(self, chief: Chief) -> None:
        """The chief tells the others who is there."""
        self._status = chief.status()
        if self._status != chief.published:
            chief.published = self._status
            self._set([("status", encode(self._status))])

    def _say_who_is_gone(self, chief: Chief) -> None:
        if chief.silent:
            deadline = f"{self.settings.keep_alive_deadline:g} s"
            self._log(f"no sign of life from {listed(chief.silent)} for {deadline}: given up", Level.INFO)
        if chief.left:
            self._log(f"gone: {listed(chief.left)}", Level.INFO)
        chief.silent, chief.left = [], []

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
        self._log(self._waiting(status), Level.INFO if self._chief or self._spoken == 1 else Level.DEBUG)

    def _count(self, joined: int) -> str:
        low, high = self.settings.min_nodes, self.settings.max_nodes
        return f"{joined} of {f'{high}' if low == high else f'{low} to {high}'} nodes"

    def _waiting(self, status: Status) -> str:
        after = self._now - self._began_at
        left = self.settings.join_timeout - after
        missing = f"; missing: {status.missing}" if status.missing else ""
        more = f"; waiting up to {left:.0f} s more" if left > 0 else ""
        have = "has" if status.joined == 1 else "have"
        hosts = f": {status.hosts}" if status.hosts else ""
        return f"{self._count(status.joined)} {have} joined after {after:.0f} s{hosts}{missing}{more}"

    def _waited_in_vain(self) -> None:
        status = self._chief.status() if self._chief else self._status
        text = f"{self._waiting(status)}; gave up (join_timeout={self.settings.join_timeout:g} s)"
        if self.me.serves:
            self._give_up(text, ExitCode.TIMEOUT)
        else:
            self._decide(Decision(False, error=text, status=ExitCode.TIMEOUT))

    def _give_up(self, text: str, status: int) -> None:
        """End the job for all, before this round has begun."""
        if self._chief:
            self._chief.is_closing = True
        self._create("end", "end", encode(End(EndKind.ERROR, text, self.me.node, status=status)))
        self._create(
            "set", "closed", encode(Closed(-1, 0, self._known_tickets(), restart_history=self.me.restart_history))
        )

    def _known_tickets(self) -> int:
        return max(self.ticket, self._chief.known if self._chief else 0)
