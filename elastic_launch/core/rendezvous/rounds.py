"""Layer 1: what a node knows of its round, how it asks the store, how it leaves: the base of ``rendezvous``. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from elastic_launch.core.agent.messages import Decided, ReportRound
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.rendezvous.chief import Chief
from elastic_launch.core.rendezvous.protocol import Ask, Log, Notify, Output, Phase, Settings
from elastic_launch.core.rendezvous.records import Closed, NodeRecord, Roster, Status, encode
from elastic_launch.core.rendezvous.watch import LEFT, Watch, number
from elastic_launch.core.store_requests import Add, Get, Request, Set, Swap
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Assignment, Decision, End, Level, RestartHistory

TAKE_OVER = 1 << 20
"""A counter that is set to this tells its node to take over as chief at once."""
BATCH = 256
"""Records that the chief reads with one request, and keys that are written with one."""


class Round:
    """One node, and what it knows of its round."""

    def __init__(self, record: NodeRecord, settings: Settings) -> None:
        """Take what the node tells of itself, and the job's settings."""
        self.me = record._replace(options=settings.options)
        self.settings = settings
        self.phase = Phase.IDLE
        self.round = -1
        self.awaiting: str | None = None
        self._timers: dict[str, float] = {}
        self._out: list[Output] = []
        self._now = self._began_at = self._decided_at = 0.0
        self._about: Any = None
        self.stays = False
        """The store ends with the nodes that host it: all stay until all know how the job has ended."""
        self.is_gone = False
        """Its goodbye is said: the driver may close the connection."""
        self._begin_round()

    def _begin_round(self) -> None:
        """Forget the round before."""
        self.ticket = 0
        self.assignment: Assignment | None = None
        self.end: End | None = None
        self.decision: Decision | None = None
        self._acknowledged = self._has_counted = False
        self._stops_job = False
        """It leaves, and has told the others to stop."""
        self._waits = self._is_empty = False
        """It goes when all nodes know how the job has ended; they do."""
        self._mine: ReportRound | None = None
        """This node's settlement of the round."""
        self._placed_at = 0.0
        """When its workers began."""
        self._announced: ProcessFailure | None = None
        self._told: set[int] = set()
        """Ranks whose failure the others know of."""
        self._grace_ends: float | None = None
        """Until when this node, whose failure looks like a consequence, waits for a cause."""
        self._closed: Closed | None = None
        self._stood_by = False
        """It was beside the members before the round ended."""
        self._beating = self._is_fenced = False
        self._beat_at = self._alive_at = self._looked_at = 0.0
        """When it sent its last sign of life, the last that was answered, and looked at the others'."""
        self._beats = 0
        """What its counter was at the last answer."""
        self._heard_at = 0.0
        """When it learnt that somebody watches over it: its counter had been set back."""
        self._roster: Roster | None = None
        self._beside: list[int] = []
        """Tickets of those who are no members, if this node watches over them."""
        self._watch: Watch | None = None
        """Of the members, if this node watches over them."""
        self._watchers = 0
        """How many nodes have watched over them in turn, but for the coordinator."""
        self._missed: set[int] = set()
        """Tickets of members that were silent when the round had ended."""
        self._excused: set[int] = set()
        """Tickets of members that may be silent: their workers had all ended well before."""
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
        return self.phase is Phase.LEAVING or (self.decision is not None and not self.decision.restart)

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

    def _say_what_follows(self, decision: Decision) -> None:
        self._create("next", "next", encode(decision._replace(node=self.me.node)))

    def _set(self, items: Iterable[tuple[str, bytes]]) -> None:
        everything = [(self._key(name), value) for name, value in items]
        for i in range(0, len(everything), BATCH):
            self._ask("set", Set(tuple(everything[i : i + BATCH])))

    def _get(self, what: str, *names: str, about: Any = None) -> None:
        self._ask(what, Get(tuple(map(self._key, names))), about)

    def _await(self, name: str | None) -> None:
        self.awaiting = None if name is None else self._key(name)

    def _log(self, text: str, level: Level = Level.WARNING) -> None:
        self._out.append(Log(text, level))

    def _in(self, name: str, seconds: float) -> None:
        self._timers[name] = self._now + seconds

    def _ignore(self, value: Any) -> None:
        """An answer that tells nothing."""

    def _beat_period(self) -> float:
        """Seconds between two signs of life."""
        is_deputy = self.ticket == 2 if self.assignment is None else self.assignment.group_rank == 1
        return self.settings.tick if is_deputy else self.settings.keep_alive_interval

    def _restart_history(self) -> RestartHistory:
        """What the job remembers, where the round's end adds nothing to it."""
        if self.assignment:
            return aged(self.assignment.restart_history, self._now - self._placed_at)
        return self._closed.restart_history if self._closed else self.me.restart_history

    # --- the end of its part

    def _decide(self, decision: Decision) -> None:
        self.decision, self._decided_at = decision, self._now
        self._out.append(Notify(Decided(decision)))
        if not decision.restart:
            self._say_goodbye()

    def _acknowledge(self) -> None:
        """This node knows that the job has ended: one less for the store's host to wait for."""
        if not self._acknowledged and self.ticket:
            self._acknowledged = True
            dead = self._excused - (self._watch.left if self._watch else set())  # they cannot say it themselves
            self._ask("left", Add(self._key("left"), 1 + len(dead)))
            if self.stays:
                self._await("empty")  # from now on: later there may be no majority to answer that all are gone

    def _on_left(self, count: int) -> None:
        self._get("arrivals", "ticket", about=count)

    def _on_arrivals(self, value: list[bytes]) -> None:
        if self._about >= number(value[0]):
            self._set([("empty", b"1")])
        self._has_counted = True
        self._close_quietly()

    def _close_quietly(self) -> None:
        """A node that hosts nothing is gone when the store has done all that it was asked for."""
        if self.phase is Phase.LEAVING and self._has_counted and not self._waits:
            self._get("gone", "empty")

    def _say_goodbye(self) -> None:
        if self.phase is Phase.LEAVING:
            return
        is_over = self._stops_job or (self.end is not None and self.is_settled)
        self._waits = self.me.serves or (self.stays and is_over)
        self.phase = Phase.LEAVING
        self._chief = None
        self._timers.clear()
        self.awaiting = None
        if not self.ticket:
            self.is_gone = True
            return
        self._ask("set", Add(self._key(f"beat/{self.ticket}"), LEFT))
        self._acknowledge()
        if self._waits and self._is_empty:
            self._gone_at_last()
        elif self._waits:
            self._await("empty")
            self._in("close", min(self.settings.close_timeout, self.settings.keep_alive_deadline))
        self._close_quietly()

    def _on_gone(self, value: Any) -> None:
        self._gone_at_last()

    def _gone_at_last(self) -> None:
        self._timers.clear()
        self.is_gone = True

    # --- what the classes above this one add

    def _on_end(self, data: bytes) -> None:
        """Take the round's end, as the store holds it."""
        raise NotImplementedError

    def _ask_who_is_done(self) -> None:
        """Find out whether the workers of all members have ended well."""
        raise NotImplementedError
