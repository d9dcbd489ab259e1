"""A round has closed: the node becomes a member, or stays outside."""

from __future__ import annotations

from typing import cast

from elastic_launch.core.agent.messages import Assigned
from elastic_launch.core.rendezvous import forgetting, former, heartbeats, questions
from elastic_launch.core.rendezvous.ending import end_round, read_finished, replace_stranger, take_members
from elastic_launch.core.rendezvous.leader import disagreement
from elastic_launch.core.rendezvous.leaving import decide
from elastic_launch.core.rendezvous.messages import Answer, KeyAppeared
from elastic_launch.core.rendezvous.monitoring import start_monitoring
from elastic_launch.core.rendezvous.records import Closed, Members, decode, encode, refused
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer, enter
from elastic_launch.core.text import counted
from elastic_launch.errors import ExitCode
from elastic_launch.job import Assignment, Change, Decision, End, EndKind


def on_closed(node: NodeState, step: Step, answer: Answer[questions.CloseRound, bytes]) -> None:
    """Ask for the node's place in the round that it has closed as leader."""
    closed, leader = decode(Closed, answer.value, node.key("closed")), node.round.leader
    if leader and closed.leader == leader.number and answer.value != leader.closing:
        raise refused(node.key("closed"), "was written in this node's name, which leads the round")
    node.round.closed = closed
    ask_for_assignment(node, step)
    if leader and answer.value == leader.closing:
        node.round.heartbeat.polled_at = answer.question.asked_at  # unless another leader had closed it before
        forgetting.begin(node, step)


def on_closed_checked(node: NodeState, step: Step, answer: Answer[questions.CheckClosed, list[bytes]]) -> None:
    """Ask for the node's place if the round has closed and the awaited key has not shown it yet."""
    if answer.value[0]:
        ask_for_assignment(node, step)
    else:
        node.round.heartbeat.polled_at = answer.question.asked_at


def ask_for_assignment(node: NodeState, step: Step, appeared: KeyAppeared | None = None) -> None:
    """Ask which place the leader has assigned to this node."""
    leader = node.round.closed.leader if node.round.closed else node.round.leaders
    step.get(questions.ReadAssignment(leader), "closed", f"assignment/{leader}/{node.round.ticket}", "end")


def on_assignment(node: NodeState, step: Step, answer: Answer[questions.ReadAssignment, list[bytes]]) -> None:
    """Become a member, stay outside, or learn that the round has ended."""
    round_ = node.round
    closed, place, end = answer.value
    if not closed:
        return  # the store was restarted empty; the node's record is missing, too
    round_.closed = decode(Closed, closed, node.key("closed"))
    if round_.closed.leader != answer.question.leader and round_.closed.leader >= 0:
        ask_for_assignment(node, step)
        return
    if round_.closed.leader < 0 and not end:
        raise refused(node.key("closed"), "says that there is no round, but nobody has ended it")
    assignment = _read_assignment(node, round_.closed, place) if place and not end else None
    has_lapsed = assignment and assignment.group_rank and round_.heartbeat.has_lapsed
    if assignment and (has_lapsed or step.now >= heartbeats.lease_ends(node, assignment)):
        _on_late_assignment(node, step, assignment)
        return
    round_.leader = None
    round_.heartbeat.monitored_at = step.now
    enter(node, Phase.MEMBER if assignment else Phase.OUTSIDE)
    if end:
        end_round(node, step, end, is_member=bool(place))
        return
    step.await_key("end")
    if assignment is None:
        _stand_by(node, step, round_.closed)
        return
    round_.assignment = assignment
    round_.assigned_at = step.now
    next_heartbeat = max(step.now, round_.heartbeat.answered_at + node.heartbeat_period)
    node.timers[Timer.HEARTBEAT] = min(node.timers[Timer.HEARTBEAT], next_heartbeat)
    if assignment.group_rank == 0:
        step.read_members()
    heartbeats.renew_lease(node, step)
    step.notify(Assigned(assignment))


def _read_assignment(node: NodeState, closed: Closed, data: bytes) -> Assignment:
    """Decode this node's assignment.

    Raises:
        RendezvousStateError: the leader cannot have written it.
    """
    key = node.key(f"assignment/{closed.leader}/{node.round.ticket}")
    assignment = decode(Assignment, data, key)
    for field, found, expected in (
        ("local_world_size", assignment.local_world_size, node.record.workers),
        ("group_world_size", assignment.group_world_size, closed.nodes),
        ("restart_count", assignment.restart_count, node.round.number),
    ):
        if found != expected:
            raise refused(key, f"{field}: must be {expected}, not {found}")
    return assignment


def _on_late_assignment(node: NodeState, step: Step, assignment: Assignment) -> None:
    """The node slept after its last heartbeat: the others have gone on without it, or wait for it to monitor them.

    It starts when the monitor has heard it again. If it has not within a deadline, there is none any more.
    """
    late_at = node.round.late_at = step.now if node.round.late_at is None else node.round.late_at
    if assignment.group_rank == 0 or step.now >= late_at + node.settings.keep_alive_deadline:
        reason = f"{node.record.host} joined too late for its assignment"
        end = End(EndKind.MEMBERSHIP_CHANGED, reason, node.record.node, change=Change.NODE_LATE)
        step.create(questions.LearnEnd(), "end", encode(end))
    else:
        heartbeats.send(node, step)
        step.set_timer(Timer.RETRY_ASSIGNMENT, node.settings.tick)


def on_members(node: NodeState, step: Step, answer: Answer[questions.ReadMembers, list[bytes]]) -> None:
    """Do what the members were read for: report who has the node's rank, monitor them, or see who has succeeded."""
    round_, phase = node.round, node.phase
    data, closed, end = answer.value
    if not data:
        if closed and not end:
            raise refused(node.key("closed"), "names a leader that has written no members")
        if phase in (Phase.MEMBER, Phase.OUTSIDE):
            step.read_own_record()  # the others are some rounds ahead, or the store was restarted empty
        return
    if round_.members is None:
        take_members(node, data)
    members, rank = cast(Members, round_.members), node.record.rank
    if phase is Phase.OUTSIDE and round_.closed and rank >= 0 and rank in members.ranks:
        host = members.hosts[members.ranks.index(rank)]
        step.log(f"--node-rank={rank} is already taken by {host}; waiting as a spare")
    elif phase is Phase.OUTSIDE and round_.closed and rank >= 0:
        _wait_outside(node, step, round_.closed)
    decides = round_.end is not None and round_.end.mine and round_.end.kind is EndKind.FAILED
    monitors = round_.assignment and (round_.assignment.group_rank == 0 or decides)
    if monitors and phase is not Phase.LEAVING and Timer.MONITOR_POLL not in node.timers:
        start_monitoring(node, step, members)
    if round_.report.round is not None and round_.end is None:
        read_finished(node, step)
    replace_stranger(node, step)


def _stand_by(node: NodeState, step: Step, closed: Closed) -> None:
    """Wait as a spare for the round to end, or end it if there is room for this node."""
    record = node.record
    if closed.options != record.options:
        text = disagreement(record.host, record.pid, record.options, "the nodes of the running job", closed.options)
        decide(node, step, Decision(False, error=text, status=ExitCode.USAGE))
        return
    node.round.stood_by = True
    former.begin(node, step)
    if record.rank >= 0:
        step.read_members()  # to find out who has that rank
    else:
        _wait_outside(node, step, closed)


def _wait_outside(node: NodeState, step: Step, closed: Closed) -> None:
    room = node.settings.max_nodes - closed.nodes
    is_spare = node.round.ticket in closed.spares
    if is_spare and node.record.deprioritized:
        limit = node.settings.policy.node_failure_limit
        text = f"this node has caused {counted(limit, 'failure')} in a row (--node-failure-limit={limit})"
        step.log(f"{text}: a spare has taken its place; waiting as a spare")
    elif room <= 0 or is_spare:
        step.log(f"the job already runs on {counted(closed.nodes, 'node')}; waiting as a spare")
    elif node.round.ticket - closed.tickets >= room:
        join_running(node, step)
    else:
        wait = node.settings.last_call_timeout
        step.log(f"the job already runs on {counted(closed.nodes, 'node')}; joining within {wait:g} s")
        step.set_timer(Timer.JOIN_RUNNING, wait)


def join_running(node: NodeState, step: Step) -> None:
    """End the running round, so that this node can join the next one."""
    end = End(EndKind.MEMBERSHIP_CHANGED, f"{node.record.host} joins", node.record.node, change=Change.NODE_JOINING)
    step.create(questions.LearnEnd(), "end", encode(end))
