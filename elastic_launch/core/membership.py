"""Floor 1: a node in a round that has closed: its place, its signs of life, who watches over whom. Pure."""

from __future__ import annotations

from elastic_launch.core.chief import disagreement, listed
from elastic_launch.core.gathering import Gathering
from elastic_launch.core.lifecycle import Assigned, Ended
from elastic_launch.core.protocol import (
    Phase,
    Say,
    Tell,
)
from elastic_launch.core.records import Closed, Roster, decode, encode
from elastic_launch.core.requests import Add
from elastic_launch.core.watch import Watch, number
from elastic_launch.errors import ExitCode
from elastic_launch.model import Assignment, End, EndKind, Verdict


class Membership(Gathering):
    """Has a place in the round, or waits beside it."""

    # --- the round has closed

    def _on_closed(self, value: bytes) -> None:
        self._closed = decode(Closed, value, self._key("closed"))
        self._ask_for_place()

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

    # --- signs of life

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
