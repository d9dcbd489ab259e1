"""Layer 1: one node's part in the rounds of a job: how it meets the others, and how they part. Pure.

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
    r/lost            End, created once: members that are silent since a failure ended the round
    r/settled         how many nodes are through with a round that a failure ended; r/all_settled: all are
    r/next            Verdict, created once: what follows a failure
    r/watcher/k       ticket of the k-th node that watches over the members when their coordinator does not any more
    r/left, r/empty   how many nodes are through with a job's last round; that all are

A node sends the same few requests in each round, however many nodes there are; only the chief, who closes the round,
and the coordinator, the member with group rank 0 who watches over it, do work in proportion to them. Each node that
waits or runs adds 1 to its counter once in an interval. A counter that does not change is a silent node. A counter
that nobody sets back is a silent chief or coordinator: its deputy (ticket 2, or group rank 1) looks every ``TICK``, the
others with every beat. Every request may be carried out twice, since a connection can break before its answer comes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from elastic_launch.core.agent.messages import Ended, Fence, Leave, ReportFailure, ReportRound, ReportSuccess
from elastic_launch.core.agent.restart_policy import follow
from elastic_launch.core.agent.root_cause import is_consequence
from elastic_launch.core.rendezvous.membership import Membership
from elastic_launch.core.rendezvous.protocol import (
    Answered,
    Appeared,
    Closing,
    Event,
    Found,
    Lost,
    Notify,
    Opening,
    Output,
    Passing,
    Phase,
)
from elastic_launch.core.rendezvous.records import Closed, decode, encode
from elastic_launch.core.rendezvous.rounds import TAKE_OVER
from elastic_launch.core.rendezvous.watch import number
from elastic_launch.core.store_requests import Add, Append
from elastic_launch.core.text import MAX_LISTED, shortened
from elastic_launch.errors import ExitCode, ProcessFailure, RendezvousStateError, signal_name
from elastic_launch.job import Decision, End, EndKind

ANY_TICKET = 1 << 40
"""Above every ticket: of a round that ends before it begins, for whoever comes."""
MESSAGE = 60_000
"""Characters of the cause's traceback that the other nodes get to see."""
GRACE = 1.0
"""Seconds, at least, that a failure which looks like a consequence waits for its cause."""
NOTE = 1000
"""Characters of a failure's note."""


class Node(Membership):
    """One node of a job."""

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
            case "all_settled":
                self._await("next")
                self._read_also()
            case "empty":
                self._is_empty = True
                if self.phase is Phase.LEAVING:
                    self._gone_at_last()
            case _:
                self._get("count", "ticket")

    # --- the round ends

    def _announce(self, wish: ReportFailure) -> None:
        self._announced = wish.failure
        if self.end is None:
            failure = _brief(wish.failure)
            end = End(EndKind.FAILED, wish.failure.headline(), self.me.node, failures=(failure,))
            self._create("end", "end", encode(end))
        elif self.end.kind is EndKind.FAILED:
            self._tell_failures([wish.failure])

    def _on_end_read(self, value: list[bytes]) -> None:
        self._on_end(value[0])

    def _on_end(self, data: bytes) -> None:
        if not data or self.end is not None or self.phase is Phase.LEAVING:
            return
        end = decode(End, data, self._key("end"))
        if not (0 <= end.signum < 65 and 0 <= end.status < 256):
            raise RendezvousStateError(f"the store holds at {self._key('end')!r} no signal or status: {data[:60]!r}")
        self.end = end = end._replace(mine=end.node == self.me.node)
        beside = self.assignment is None
        self.phase = Phase.ENDED
        for name in ("give_up", "say", "last_call", "join_running", "fence", "barrier"):
            self._timers.pop(name, None)
        self._await("next" if end.kind is EndKind.FAILED else None)
        restart_history = self._restart_history()
        match end.kind:
            case EndKind.FAILED:
                if self._announced and not end.mine:
                    self._tell_failures([self._announced])
                elif end.mine and end.failures and is_consequence(end.failures[0]):
                    self._get_roster()  # to see whether a node's end was the cause
            case EndKind.MEMBERSHIP_CHANGED:
                self.decision = Decision(True, restart_history, gone=end.gone)
            case EndKind.STOP:
                self.decision = Decision(False, restart_history, signum=end.signum)
            case EndKind.DONE:
                self.decision = Decision(False, restart_history)
            case EndKind.ERROR:  # nodes that come after others have not met may have better luck
                again = self._is_late and end.status != ExitCode.UNAVAILABLE
                self.decision = Decision(again, restart_history, error="" if again else end.reason, status=end.status)
        self._decided_at = self._now
        if not beside and not self._is_fenced:
            self._mine = None  # also of a node whose workers have ended well: it settles this end
            self._out.append(Notify(Ended(end, 0.0)))
        self._report()

    def _succeed(self, wish: ReportSuccess) -> None:
        self._mine = ReportRound(Decision(False))
        if wish.patience < float("inf"):
            self._in("barrier", wish.patience)
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

    def _stop_waiting(self) -> None:
        """This node's workers have ended well long ago, others run on."""
        if self.end is None and not self.me.serves:
            self._log("this node's workers have ended well; it waits no longer for the others' (exit_barrier_timeout)")
            self._decide(Decision(False, self._restart_history()))

    def _settle(self, wish: ReportRound) -> None:
        self._mine = wish
        self._report()

    def _report(self) -> None:
        """Say what follows, if that is for this node to say; else tell its failures, as consequences."""
        if self._mine and self.end and self.end.kind is EndKind.FAILED and self.decision is None:
            if not self.end.mine:
                self._tell_failures(self._mine.decision.failures)
            self._ask("settled", Add(self._key("settled"), 1))
        self._conclude()

    def _tell_failures(self, failures: Iterable[ProcessFailure]) -> None:
        """To the node that says what follows: they are consequences, or the cause if its own is one."""
        new = [failure for failure in failures if failure.rank not in self._told][:MAX_LISTED]
        self._told |= {failure.rank for failure in new}
        lines = b"".join(encode(_Failure(_brief(failure), self.me.node)) + b"\n" for failure in new)
        if lines:
            self._ask("set", Append(self._key("also"), lines))

    def _on_settled(self, count: int) -> None:
        if self._closed and count >= self._closed.nodes:
            self._set([("all_settled", b"1")])
        if self.end and self.end.mine:
            self._read_also()

    def _read_also(self) -> None:
        self._get("also", "also", "settled", "lost")

    def _on_also(self, value: list[bytes]) -> None:
        """Say what follows; the cause is this node's, unless that is plainly the consequence of another's.

        In that case the others have a little time to tell of an original cause: until all have settled, or for
        ``GRACE`` and until each has given a sign of life since, for the cause may be the end of a node.
        """
        if self._mine is None or self.end is None or self.assignment is None or self.decision is not None:
            return
        lines = [decode(_Failure, line, self._key("also")) for line in value[0].splitlines()]
        found = {failure.rank: (failure, self.me.node) for failure in self._mine.decision.failures}
        found = {line.failure.rank: (line.failure, line.node) for line in lines} | found
        own = {failure.rank for failure in self._mine.decision.failures}
        failures = sorted(found.values(), key=lambda it: (is_consequence(it[0]), it[0].rank not in own))
        if failures and is_consequence(failures[0][0]) and not self._has_heard_of_all(number(value[1])):
            self._wait_for_a_cause()
            if value[2]:
                lost = decode(End, value[2], self._key("lost"))
                self._lose(list(lost.gone), lost.reason)
            return
        node = failures[0][1] if failures else ""
        cut = (_cut(failures[0][0]), *(_brief(failure) for failure, _ in failures[1:64])) if failures else ()
        may_restart = self._mine.may_restart
        decision = follow(
            self.settings.policy, self._restart_history(), cut, node, self.assignment.picked_port, may_restart
        )
        self._say_what_follows(decision)

    def _wait_for_a_cause(self) -> None:
        if self._grace_ends is None:
            self._grace_ends = self._now + GRACE
            self._await("all_settled")
            self._get_roster()
        self._in("grace", min(GRACE, self.settings.tick))

    def _has_heard_of_all(self, settled: int) -> bool:
        """Whether each member has settled, or told in the time of grace that it lives, and nothing else."""
        if self._closed is None or settled >= self._closed.nodes:
            return True
        if self._grace_ends is None or self._now < self._grace_ends or not (self._roster and self._watch):
            return False
        since = self._grace_ends - GRACE + 2 * self.settings.tick  # what was seen sooner may be older
        others = set(self._roster.tickets) - {self.ticket} - self._excused
        return all(self._watch.has_lived_since(ticket, since) for ticket in others)

    def _on_next_read(self, value: list[bytes]) -> None:
        self._on_next(value[0])

    def _on_next(self, data: bytes) -> None:
        if data and self.decision is None:
            self.decision, self._decided_at = decode(Decision, data, self._key("next")), self._now
            self.awaiting = None
            self._timers.pop("grace", None)
            self._conclude()

    def _conclude(self) -> None:
        """Go on when the round is settled, with the agent's word if it had workers."""
        if self.decision is None or self.phase is Phase.LEAVING:
            return
        if not self.decision.restart:
            self._acknowledge()
        if self.assignment is None and self.decision.restart:
            self._rejoin()
        elif self.assignment is None or self._mine is not None:
            self._decide(self._as_latecomer(self.decision) if self._is_late else self.decision)

    @property
    def _is_late(self) -> bool:
        """It came when the round was over."""
        return self._closed is not None and self.ticket > self._closed.tickets and not self._stood_by

    def _as_latecomer(self, decision: Decision) -> Decision:
        """What the end of a job means to a node that came when it was over."""
        job = f"job {self.settings.run_id}"
        if self.end and self.end.kind is EndKind.DONE:
            self._log(f"{job} has ended already, well: there is nothing to do (a new job needs another id)")
        elif self.end and self.end.kind is EndKind.STOP:
            text = f"{job} was stopped already: {self.end.reason}; pass another --rdzv-id for a new job"
            return Decision(False, error=text, status=ExitCode.UNAVAILABLE)
        elif self.end and self.end.kind is EndKind.FAILED:
            self._log(f"{job} has failed already, as follows; pass another --rdzv-id for a new job")
        return decision

    # --- the store comes and goes

    def _look_for_record(self, event: Found) -> None:
        if self.ticket and not self.is_settled:
            self._get("record", f"node/{self.ticket}")

    def _on_record(self, value: list[bytes]) -> None:
        """Without this node's record, it is another store, or the same one started anew: meet there again."""
        if value[0]:
            return
        if self.assignment is None:
            self._rejoin()
        elif self.end is None:
            self._on_end(encode(End(EndKind.MEMBERSHIP_CHANGED, "the store was started anew", self.me.node)))
        elif self.decision is None:
            self.decision = Decision(True, self._restart_history())
            self._conclude()

    def _lose_store(self, event: Lost) -> None:
        if self.phase is Phase.LEAVING:
            self._gone_at_last()
            return
        if self.is_settled:
            return
        self.ticket = 0
        self._timers.clear()
        if self.assignment is not None and self.end is None:
            self._on_end(encode(End(EndKind.ERROR, event.text, self.me.node, status=event.status)))
        else:
            self.decision = Decision(False, error=event.text, status=event.status)
            self._conclude()

    # --- leaving

    def _leave(self, wish: Leave) -> None:
        """The node goes, when its workers have stopped: the job goes on without it if it can."""
        leaves = f"{self.me.host} leaves ({signal_name(wish.signum)})"
        why = f"{self.me.host}: {wish.error}" if wish.error else leaves
        if self.phase is Phase.MEMBER and self._mine and not self.me.serves:
            return  # its workers have ended well, and the others' need it no more than if it had died
        if self.phase is Phase.MEMBER and self._closed and self.end is None:
            rest = self._closed.nodes - 1 + len(self._closed.spares)
            if rest >= self.settings.min_nodes and not self.me.serves:
                end = End(
                    EndKind.MEMBERSHIP_CHANGED,
                    why,
                    self.me.node,
                    rank=self.assignment.group_rank if self.assignment else -1,
                )
            else:
                end = self._final(wish, f"{why}, and the job cannot go on without it")
                self._stops_job = True
            self._create("set", "end", encode(end))
        elif self.me.serves and self.phase is not Phase.IDLE and not self.is_settled:
            self.round += self.phase is Phase.ENDED  # the others have gone on, or will
            self._create("set", "end", encode(self._final(wish, f"{why}, which hosts the store")))
            self._create("set", "closed", encode(Closed(-1, 0, ANY_TICKET)))
        elif self.phase is Phase.WAITING and self._chief:
            heirs = sorted(ticket for ticket in self._chief.joined if ticket != self.ticket)
            self._set((f"beat/{heir}", b"%d" % TAKE_OVER) for heir in heirs[:1])

    def _close_connection(self, wish: Closing) -> None:
        self._say_goodbye()

    def _final(self, wish: Leave, reason: str) -> End:
        """The end of the job, since this node cannot be replaced."""
        if wish.error:
            return End(EndKind.ERROR, f"{self.me.host}: {wish.error}", self.me.node, status=wish.status)
        return End(EndKind.STOP, reason, self.me.node, signum=wish.signum)


class _Failure(NamedTuple):
    """A failure in the list of consequences."""

    failure: ProcessFailure
    node: str
    """The id of its node."""


def _brief(failure: ProcessFailure) -> ProcessFailure:
    """A failure without its traceback, for a list of many."""
    stderr = failure.stderr[-NOTE:] if failure.exitcode == -signal.SIGABRT else ""  # it tells a consequence
    return replace(failure, error=failure.error_line(), message="", stderr=stderr, note=failure.note[:NOTE])


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
    "unclosed": Node._on_unclosed,
    "set_back": Node._on_set_back,
    "member_beats": Node._on_member_beats,
    "place": Node._on_place,
    "roster": Node._on_roster,
    "record": Node._on_record,
    "watcher": Node._on_watcher,
    "missed": Node._on_missed,
    "settled": Node._on_settled,
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
    "fence": Node._fence,
    "ask_again": Node._ask_for_place,
    "barrier": Node._stop_waiting,
    "grace": Node._read_also,
}
WISHES: dict[type, Callable[[Node, Any], None]] = {
    Opening: Node._begin,
    Appeared: Node._on_key,
    ReportFailure: Node._announce,
    ReportSuccess: Node._succeed,
    ReportRound: Node._settle,
    Leave: Node._leave,
    Closing: Node._close_connection,
    Fence: Node._fence,
    Found: Node._look_for_record,
    Lost: Node._lose_store,
}
