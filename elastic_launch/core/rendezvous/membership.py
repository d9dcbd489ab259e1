"""Layer 1: a node in a round that has closed: its place, its signs of life, who watches over whom. Pure."""

from __future__ import annotations

from elastic_launch.core.agent.messages import Assigned, Ended, Fence
from elastic_launch.core.agent.restart_policy import follow
from elastic_launch.core.rendezvous.chief import disagreement
from elastic_launch.core.rendezvous.gathering import Gathering
from elastic_launch.core.rendezvous.protocol import LATENESS, Lease, Notify, Phase
from elastic_launch.core.rendezvous.records import Closed, Roster, decode, encode
from elastic_launch.core.rendezvous.rounds import TAKE_OVER
from elastic_launch.core.rendezvous.watch import Watch, number
from elastic_launch.core.store_requests import Add
from elastic_launch.core.text import counted, listed
from elastic_launch.errors import ExitCode
from elastic_launch.job import Assignment, Decision, End, EndKind, Level


class Membership(Gathering):
    """Has a place in the round, or waits beside it."""

    # --- the round has closed

    def _on_closed(self, value: bytes) -> None:
        self._closed = decode(Closed, value, self._key("closed"))
        self._ask_for_place()

    def _ask_for_place(self) -> None:
        chief = self._closed.chief if self._closed else self._chiefs
        self._get("place", "closed", f"place/{chief}/{self.ticket}", "end", about=chief)

    def _on_place(self, value: list[bytes]) -> None:
        if self.phase is not Phase.WAITING:
            return
        closed, place, end = value
        if not closed:
            return  # the store was started anew: the record is missing, too
        self._closed = decode(Closed, closed, self._key("closed"))
        if self._closed.chief != self._about and self._closed.chief >= 0:
            self._ask_for_place()
            return
        assignment = decode(Assignment, place, self._key("place")) if place and not end else None
        if assignment and self._now >= self._lease_ends(assignment):
            # This node slept since it was heard of: the others may have gone on without it, or wait for its looks.
            if assignment.group_rank == 0:
                self._create(
                    "end", "end", encode(End(EndKind.MEMBERSHIP_CHANGED, f"{self.me.host} came too late", self.me.node))
                )
            else:
                self._beat()
                self._in("ask_again", self.settings.tick)
            return
        for name in ("give_up", "say", "watch", "last_call", "ask_again"):
            self._timers.pop(name, None)
        self._chief = None
        self._heard_at = self._now
        if end:
            self.phase = Phase.BESIDE
            self._on_end(value[2])
            return
        self._await("end")
        if assignment is None:
            self._stand_by(self._closed)
            return
        self.phase = Phase.MEMBER
        self.assignment = assignment
        self._placed_at = self._now
        self._timers["beat"] = min(self._timers["beat"], max(self._now, self._alive_at + self._beat_period()))
        if self.assignment.group_rank == 0:
            self._get_roster()
        self._renew_lease()
        self._out.append(Notify(Assigned(self.assignment)))

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
            self._log(f"{text}as a spare, in case that node is gone")
        elif self.phase is Phase.BESIDE and self._closed and self.me.rank >= 0:
            self._wait_beside(self._closed)
        decides = self.end is not None and self.end.mine and self.end.kind is EndKind.FAILED
        if self.assignment and (self.assignment.group_rank == 0 or decides) and "watch" not in self._timers:
            self._watch_over(self._roster)
        if self._mine is not None and self.end is None:
            self._ask_who_is_done()

    def _watch_over(self, roster: Roster) -> None:
        self._watch = Watch(self.settings.keep_alive_deadline, self.settings.tick, self._now)
        if self.phase is Phase.MEMBER and self.assignment and self.assignment.group_rank == 0:
            self._watch.greet(roster.tickets, self._now)
        self._in("watch", self.settings.tick)

    def _stand_by(self, closed: Closed) -> None:
        """There is no place for this node: as a spare it waits for the round's end; with room it brings that about."""
        self.phase = Phase.BESIDE
        if closed.options != self.me.options:
            others = "the nodes of the running job"
            text = disagreement(self.me.host, self.me.pid, self.me.options, others, closed.options)
            self._decide(Decision(False, error=text, status=ExitCode.USAGE))
            return
        self._stood_by = True
        if self.me.rank >= 0:
            self._get_roster()  # to see who has that rank
        else:
            self._wait_beside(closed)

    def _wait_beside(self, closed: Closed) -> None:
        room = self.settings.max_nodes - closed.nodes
        late = self.ticket - closed.tickets
        if self.ticket in closed.spares and self.me.aside:
            limit = self.settings.policy.node_failure_limit
            text = f"this node has caused {counted(limit, 'failure')} in a row (--node-failure-limit={limit})"
            self._log(f"{text}: a spare has its place, and it waits as a spare itself")
        elif room <= 0 or self.ticket in closed.spares:
            self._log(f"the job runs on {counted(closed.nodes, 'node')} already: waiting as a spare")
        elif late >= room:
            self._join_running()
        else:
            wait = self.settings.last_call_timeout
            self._log(f"the job runs on {counted(closed.nodes, 'node')} already: joining within {wait:g} s")
            self._in("join_running", wait)

    def _join_running(self) -> None:
        end = End(EndKind.MEMBERSHIP_CHANGED, f"{self.me.host} joins", self.me.node)
        self._create("end", "end", encode(end))

    # --- signs of life

    def _beat(self) -> None:
        self._in("beat", self._beat_period())
        if not self._beating:  # one at a time, also while the store does not answer
            self._beating = True
            self._beat_at = self._now
            self._ask("beat", Add(self._key(f"beat/{self.ticket}"), 1))
            if self.phase is Phase.WAITING and self._chief is None:
                self._get("unclosed", "closed", about=self._now)

    def _on_unclosed(self, value: list[bytes]) -> None:
        if self.phase is not Phase.WAITING:
            return
        if value[0]:
            self._ask_for_place()  # the news has not come yet by the way that it should
        else:
            self._looked_at = self._about

    def _lease_ends(self, assignment: Assignment) -> float:
        """Until when no other node can take this one's place: the others have heard of it when its last sign of life
        was on its way, or later. They hear of the coordinator by its looks, and count from the round's closing on."""
        since = self._alive_at
        if assignment.group_rank == 0:
            since = min(since, self._looked_at - self.settings.tick)
        return since + self.settings.keep_alive_deadline - self.settings.margin

    def _renew_lease(self) -> None:
        """Notify until when the workers may live."""
        if self.assignment is None or self.phase not in (Phase.MEMBER, Phase.ENDED) or self._is_fenced:
            return
        if self.me.node in (*(self.end.gone if self.end else ()), *(self.decision.gone if self.decision else ())):
            return  # they do not wait for it
        ends = self._lease_ends(self.assignment)
        self._out.append(Lease(ends))
        if self.phase is Phase.MEMBER:
            self._timers["fence"] = ends - self.settings.grace

    def _fence(self, wish: Fence | None = None) -> None:
        """The others may go on without this node, so it must not, either: the store has not answered for long, or this
        node has not asked."""
        if self.phase is Phase.MEMBER and not self._is_fenced:
            self._is_fenced = True
            self._mine = None
            slept = self._timers.get("beat", self._now) < self._now - LATENESS
            what = "this process was stopped" if slept else "the store has not answered"
            reason = f"{what} for {self._now - self._alive_at:.1f} s"
            end = End(EndKind.MEMBERSHIP_CHANGED, f"{self.me.host} was cut off: {reason}", self.me.node)
            self._create("end", "end", encode(end))  # when the store is there again; or it tells how the round ended
            self._out.append(Notify(Ended(end._replace(reason=reason, mine=True), 0.0)))

    def _on_beat(self, count: int) -> None:
        self._beating = False
        slept = self._beat_at - self._alive_at > 2 * self._beat_period() + LATENESS
        self._alive_at = self._beat_at
        self._renew_lease()
        if count <= self._beats or slept:  # this node: that says nothing of the others
            self._heard_at = self._now
        self._beats = count
        due = self._heard_at + self.settings.keep_alive_deadline
        if self._beat_at >= due or count >= TAKE_OVER:
            if self.phase is Phase.WAITING and self._chief is None:
                self._heard_at = self._now
                self._create("chief", f"chief/{self._chiefs + 1}", b"%d" % self.ticket)
            elif self.phase in (Phase.MEMBER, Phase.BESIDE, Phase.ENDED) and (
                not self.assignment or self.assignment.group_rank
            ):
                self._lose_coordinator()
        elif self._now < due and "beat" in self._timers:
            on_time = max(self._now, self._beat_at + self._beat_period())  # it may have waited for this answer
            self._timers["beat"] = min(self._timers["beat"], on_time, due)

    def _on_chief(self, value: bytes) -> None:
        if self.phase is not Phase.WAITING:
            return
        self._chiefs += 1
        if value == b"%d" % self.ticket:
            self._become_chief()

    def _on_member_beats(self, value: list[bytes]) -> None:
        """The coordinator, or who has reason to, looks at the signs of life of all members."""
        roster = self._roster
        if roster is None or self._watch is None or self.phase not in (Phase.MEMBER, Phase.ENDED):
            return
        count, *beats = value
        self._beside = sorted(set(range(1, number(count) + 1)) - set(roster.tickets))
        self._looked_at = self._now
        self._renew_lease()
        tickets, asked_at = self._about
        silent = self._watch.look(zip(tickets, beats, strict=True), self._now, asked_at)
        if self.phase is Phase.MEMBER:  # afterwards others look at the counters, too: who gathers for the next round
            self._set_back(self._watch.set_back())
        silent -= self._excused | self._missed | {self.ticket}
        self._miss([ticket for ticket in roster.tickets if ticket in silent])

    def _lose_coordinator(self) -> None:
        if self._roster is None:
            self._get_roster()
            self._in("beat", 0.0)  # whose answer comes after that
        elif self.end is None and self._roster.tickets[0] not in self._excused:
            self._miss([self._roster.tickets[0]])
        elif "watch" not in self._timers:  # somebody must watch over the others, and over who is to say what follows
            self._create("watcher", f"watcher/{self._watchers + 1}", b"%d" % self.ticket)

    def _on_watcher(self, value: bytes) -> None:
        self._watchers += 1
        self._heard_at = self._now
        if value == b"%d" % self.ticket and self._roster:
            self._watch_over(self._roster)

    def _miss(self, tickets: list[int]) -> None:
        """Members are silent. Those whose workers had all ended well need not be there any more."""
        if tickets:
            self._get("missed", *(f"done/{ticket}" for ticket in tickets), about=tickets)

    def _on_missed(self, value: list[bytes]) -> None:
        self._excused |= {ticket for ticket, done in zip(self._about, value, strict=True) if done}
        lost = set(self._about) - self._excused
        self._missed |= lost if self.end else set()  # else it must be said until that has ended the round
        if lost and self._roster:
            ranks = [rank for rank, ticket in enumerate(self._roster.tickets) if ticket in lost]
            self._lose([self._roster.nodes[rank] for rank in ranks], listed(self._roster.hosts[rank] for rank in ranks))

    def _lose(self, nodes: list[str], hosts: str) -> None:
        """Members are silent: the round ends. If it has, this node says what follows, where they were to say it; or
        where its failure is the consequence of their end; or it tells the node that will say it."""
        reason = f"no sign of life from {hosts} for {self.settings.keep_alive_deadline:g} s"
        if self.end is None:
            self._create("end", "end", encode(End(EndKind.MEMBERSHIP_CHANGED, reason, self.me.node, tuple(nodes))))
        elif self.end.kind is not EndKind.FAILED or self.decision is not None:
            return
        elif self._grace_ends is not None:
            self._log(f"{reason}, which explains the failure: another round, without charge", Level.INFO)
            self._say_what_follows(Decision(True, self._restart_history(), gone=tuple(nodes)))
        elif self.end.node in nodes:
            self._log(f"{reason}, before it told what follows the failure", Level.INFO)
            decision = follow(self.settings.policy, self._restart_history(), self.end.failures, self.end.node)
            self._say_what_follows(decision._replace(gone=tuple(nodes)))
        elif not self.end.mine:
            self._create("set", "lost", encode(End(EndKind.MEMBERSHIP_CHANGED, hosts, self.me.node, tuple(nodes))))
