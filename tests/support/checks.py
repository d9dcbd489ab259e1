"""What must hold in a simulated job, whatever happens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from elastic_launch.core.agent.journal import Entry
from elastic_launch.core.agent.lifecycle import AgentPhase
from elastic_launch.core.agent.messages import Decided, Ended
from elastic_launch.core.rendezvous.messages import Ready
from elastic_launch.core.rendezvous.monitor import LOOK
from elastic_launch.core.rendezvous.monitoring import may_have_been_reset
from elastic_launch.core.rendezvous.questions import ConfirmReset, Question
from elastic_launch.core.rendezvous.records import Closed, decode
from elastic_launch.core.rendezvous.state import NodeState, Phase, Timer
from elastic_launch.errors import RendezvousStateError
from elastic_launch.job import Assignment, Decision, End

if TYPE_CHECKING:
    from tests.support.simulation import Agent, World

BEGINNING = 1000.0
"""When a world begins, on its clock."""


class Checks:
    """Sees everything that happens in a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.assignments: dict[int, dict[int, Assignment]] = {}
        """Every assignment, by round and group rank."""
        self._ended: set[tuple[int, int]] = set()
        """Numbers of agents, and rounds whose end they know of."""
        self._decided: set[tuple[int, int]] = set()
        self.asked: set[tuple[type[Question], Phase]] = set()
        """Questions to the store, and the phases in which nodes asked them."""
        self.recorded_of_job: dict[tuple[str, int | None], Entry] = {}
        """The entries of the job's life, by name and round."""

    def stepped(self, node: NodeState, ready: Ready) -> None:
        """A node's state is valid after each step."""
        validate(node)
        self.asked |= {(type(request.question), node.phase) for request in ready.requests}

    def assigned(self, assignment: Assignment) -> None:
        """An assignment fits all others of its round."""
        settings = self._world.settings
        given = self.assignments.setdefault(assignment.restart_count, {})
        rank = assignment.group_rank
        assert rank not in given, f"{self._world}: two nodes with group rank {rank} in one round"
        given[rank] = assignment
        first = next(iter(given.values()))
        for field in ("group_world_size", "world_size", "master_addr", "master_port", "restart_history"):
            same = getattr(assignment, field) == getattr(first, field)
            assert same, (
                f"{self._world}: {field} differs within a round: {getattr(first, field)}, {getattr(assignment, field)}"
            )
        before = self.assignments.get(assignment.restart_count - 1, {})
        used = assignment.restart_history.used
        used_before = min((other.restart_history.used for other in before.values()), default=used)
        assert used - used_before in (0, 1) or settings.policy.window, f"{self._world}: counted twice"
        assert used <= settings.policy.max_restarts
        made = assignment.restart_history.goodput
        steps_before = min((other.restart_history.goodput.steps for other in before.values()), default=made.steps)
        assert made.steps >= steps_before, f"{self._world}: steps are forgotten"
        assert min(made.in_steps, made.startup, *made.lost, *made.since) >= 0
        assert made.elapsed <= self._world.now - BEGINNING, f"{self._world}: more time than there was"
        assert settings.min_nodes <= assignment.group_world_size <= settings.max_nodes
        assert 0 <= rank < assignment.group_world_size
        assert 0 <= assignment.base_rank <= assignment.world_size - assignment.local_world_size
        for other in given.values():
            apart = abs(other.group_rank - rank)
            overlaps = apart != 0 and abs(other.base_rank - assignment.base_rank) < apart
            assert not overlaps, f"{self._world}: ranks overlap"

    def started(self, starting: Agent) -> None:
        """No workers run beside those of another round, nor in a round that is known to have ended."""
        is_over = (starting.number, starting.generation) in self._ended
        assert not is_over, f"{self._world}: {starting.name} runs an ended round"
        for agent in self._world.agents:
            assert not agent.alive or agent.generation == starting.generation, (
                f"{self._world}: {agent.name} still trains in round {agent.generation}, "
                f"{starting.name} in {starting.generation}"
            )

    def renewed(self, agent: Agent) -> None:
        """No other node may take this one for lost while its lease lasts."""
        node = agent.node
        if node.phase is not Phase.MEMBER or node.round.end or not self._world.store_was_up:
            return
        for other in self._world.live():
            for since in (self._monitored_at(node, other), self._heard_at(node, other)) if other is not agent else ():
                assert since is None or agent.lease <= since + node.settings.keep_alive_deadline, (
                    f"{self._world}: the lease of {agent.name} lasts until {agent.lease - BEGINNING:.3f} s, but "
                    f"{other.name} counts its silence from {since - BEGINNING:.3f} s on"
                )

    def _monitored_at(self, node: NodeState, other: Agent) -> float | None:
        """Return from when another node counts the silence of this monitor; None: its next heartbeat renews that."""
        theirs, heartbeat, place = other.node, other.node.round.heartbeat, node.round.assignment
        is_there = theirs.round.number == node.round.number and theirs.phase in (Phase.MEMBER, Phase.OUTSIDE)
        if not (place and place.group_rank == 0 and is_there):
            return None
        is_renewed = heartbeat.in_flight or may_have_been_reset(replace(heartbeat), self._counter(theirs) + 1)
        return None if is_renewed else heartbeat.monitored_at

    def _heard_at(self, node: NodeState, other: Agent) -> float | None:
        """Return from when a monitor, or the leader of the next round, counts the silence of this node.

        None: it does not, or the next poll shows that the node lives. A monitor that gets no answers stands down.
        """
        theirs, monitor = other.node.round, None
        if theirs.number == node.round.number and theirs.end is None:
            monitor = theirs.monitor
        elif theirs.number == node.round.number + 1 and theirs.leader:
            monitor = theirs.leader._past_monitor
        if monitor is None or self._world.now - monitor._polled_at > node.settings.outage:
            return None
        if any(isinstance(request.question, ConfirmReset) for request, _ in other.rendezvous._link._unanswered):
            return None
        known, at = monitor._counters.get(node.round.ticket, (b"", None))
        return at if self._counter(node) in (0, int(known or 0)) else None

    def _counter(self, node: NodeState) -> int:
        return int(self._world.store.values.get(node.key(f"heartbeat/{node.round.ticket}"), b"0")) % LOOK

    def written(self, key: str) -> None:
        """Nodes that the others go on without have no lease any more, unless they know of it, when that is written."""
        number, _, name = key.removeprefix(f"elastic/{self._world.settings.run_id}/").partition("/")
        record = {"closed": Closed, "end": End, "decision": Decision}.get(name)
        if record is None or not self._world.store_was_up:
            return
        try:
            written: Closed | End | Decision = decode(record, self._world.store.values[key], key)
        except RendezvousStateError:
            return  # it is signed, or a stranger's
        if isinstance(written, Closed):
            generation, gone = int(number) - 1, None
            if written.leader < 0:
                return  # no workers start
        else:
            generation, gone = int(number), written.gone
        for agent in self._world.live():
            if agent.alive and agent.generation == generation and (gone is None or agent.node.record.node in gone):
                assert agent.lease <= self._world.now, (
                    f"{self._world}: {name} is written, but the lease of {agent.name} lasts until "
                    f"{agent.lease - BEGINNING:.3f} s"
                )

    def recorded(self, entries: list[Entry]) -> None:
        """What is written of the job's life is written by one node. Without the store, nodes cannot agree on which."""
        for entry in entries if self._world.store_was_up else ():
            if entry.of_job:
                key = entry.name, entry.round
                assert key not in self.recorded_of_job, (
                    f"{self._world}: written twice: {self.recorded_of_job[key]} {entry}"
                )
                self.recorded_of_job[key] = entry

    def told(self, agent: Agent, event: Ended | Decided) -> None:
        """An agent gets one decision a round."""
        if isinstance(event, Decided) and event.decision.restart and agent.state.assignment is None:
            return  # a spare, which is checked before each round
        number = agent.state.assignment.restart_count if agent.state.assignment else -1
        if isinstance(event, Ended):
            self._ended.add((agent.number, number))
        else:
            assert (agent.number, number) not in self._decided, f"{self._world}: {agent.name}: decided twice"
            self._decided.add((agent.number, number))

    def has_finished(self, number: int, rank: int) -> bool:
        """Whether the workers of a member of a round have all succeeded."""

        def has(agent: Agent) -> bool:
            state = agent.state
            if state.assignment is None or state.phase not in (AgentPhase.AGREEING, AgentPhase.DONE):
                return False
            succeeded = [exit_ for exit_ in state.exits if exit_.exitcode == 0]
            is_it = (state.assignment.restart_count, state.assignment.group_rank) == (number, rank)
            return is_it and len(succeeded) == state.assignment.local_world_size

        return any(map(has, self._world.agents))


def validate(node: NodeState) -> None:
    """Check what must hold between any two steps.

    Raises:
        AssertionError: something does not hold.
    """
    round_, phase = node.round, node.phase
    not_owned = [timer for timer in node.timers if phase not in timer.phases]
    assert not not_owned, f"{phase}: timers of other phases: {not_owned}"
    assert (round_.leader is None) or phase in (Phase.WAITING, Phase.ENDED), f"{phase}: still the leader"
    assert (round_.assignment is not None) or phase is not Phase.MEMBER, "a member without an assignment"
    assert (round_.end is not None) or phase is not Phase.ENDED or round_.decision, "ended without a reason"
    assert (round_.monitor is None) or round_.members is not None, "monitors members that it does not know"
    has_none = (Phase.IDLE, Phase.UNFIT, Phase.JOINING, Phase.ENDED, Phase.LEAVING)
    assert round_.ticket or phase in has_none, f"{phase}: no ticket"
    assert Timer.HEARTBEAT in node.timers or phase not in (Phase.WAITING, Phase.MEMBER, Phase.OUTSIDE), "no heartbeat"
    assert not (node.may_disconnect and node.timers), "timers after the shutdown"
