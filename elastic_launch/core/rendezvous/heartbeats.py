"""A node's own heartbeats, and the lease that they hold.

No node's workers may run when the others have gone on without it. The others cannot have done so before a deadline that
counts from the last heartbeat that was answered; the workers are killed a margin before that.
"""

from __future__ import annotations

from elastic_launch.core.agent.messages import Ended, Fence
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.messages import LATENESS, Answer
from elastic_launch.core.rendezvous.monitor import LOOK
from elastic_launch.core.rendezvous.records import encode
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer
from elastic_launch.core.store_requests import Add
from elastic_launch.job import Assignment, Change, End, EndKind


def send(node: NodeState, step: Step) -> None:
    """Send a heartbeat, unless the last one is unanswered; while waiting, check whether the round has closed."""
    heartbeat = node.round.heartbeat
    step.set_timer(Timer.HEARTBEAT, node.heartbeat_period)
    if not heartbeat.in_flight:
        heartbeat.in_flight = True
        heartbeat.sent_at = step.now
        step.ask(questions.SendHeartbeat(), Add(node.key(f"heartbeat/{node.round.ticket}"), 1))
        if node.phase is Phase.WAITING and node.round.leader is None:
            step.get(questions.CheckClosed(step.now), "closed")


def lease_ends(node: NodeState, assignment: Assignment | None) -> float:
    """Return the earliest time at which the others can have gone on without this node.

    They noticed the last answered heartbeat when it was on its way, or later. They notice the monitor by its polls, and
    count from the closing of the round. A node without an assignment has a lease as well: it may get one.
    """
    heartbeat = node.round.heartbeat
    since = heartbeat.answered_at
    if assignment and assignment.group_rank == 0:
        since = min(since, heartbeat.polled_at)
    return since + node.settings.keep_alive_deadline - node.settings.margin


def renew_lease(node: NodeState, step: Step) -> None:
    """Tell the caller until when the workers may live."""
    round_ = node.round
    if round_.assignment is None or node.phase not in (Phase.MEMBER, Phase.ENDED) or round_.heartbeat.is_fenced:
        return
    gone = (*(round_.end.gone if round_.end else ()), *(round_.decision.gone if round_.decision else ()))
    if node.record.node in gone:
        return  # the others do not wait for this node
    if round_.end and round_.end.kind is EndKind.STOP:
        step.lease_until = float("inf")  # the job is over: no other node takes this one's place
        return
    step.lease_until = lease_ends(node, round_.assignment)
    if node.phase is Phase.MEMBER:
        node.timers[Timer.FENCE] = step.lease_until - node.settings.grace


def fence(node: NodeState, step: Step, request: Fence | None = None) -> None:
    """Stop the workers: the store has not answered for so long that the others may go on without this node."""
    heartbeat = node.round.heartbeat
    if heartbeat.is_fenced:
        return
    heartbeat.is_fenced = True
    node.round.report.round = None
    slept = node.timers.get(Timer.HEARTBEAT, step.now) < step.now - LATENESS
    what = "this process was stopped" if slept else "the store has not answered"
    reason = f"{what} for {step.now - heartbeat.answered_at:.1f} s"
    end = End(
        EndKind.MEMBERSHIP_CHANGED, f"{node.record.host} was cut off: {reason}", node.record.node, change=Change.CUT_OFF
    )
    step.create(
        questions.LearnEnd(), "end", encode(end)
    )  # carried out when the store answers again; the reply says why the round ended
    step.notify(Ended(end._replace(reason=reason, mine=True), 0.0))


def poll_in_time(node: NodeState, step: Step, timer: Timer, asked_at: float) -> None:
    """Poll again a tick after the last poll was asked, or at once if its reply took longer."""
    node.timers[timer] = min(node.timers.get(timer, step.now), max(step.now, asked_at + node.settings.tick))


def confirm_poll(node: NodeState, step: Step, time: float) -> None:
    """Note that the others see from their next heartbeats that this node has polled them after ``time``."""
    node.round.heartbeat.polled_at = max(node.round.heartbeat.polled_at, time)
    renew_lease(node, step)


def reset(node: NodeState, step: Step, tickets: list[int], polled_at: float) -> None:
    """Reset the counters of other nodes, which shows them that they are monitored; keep flags that they must see."""
    wanted = node.round.stall.wanted
    step.write((f"heartbeat/{ticket}", b"%d" % (LOOK if ticket in wanted else 0)) for ticket in tickets)
    step.get(questions.ConfirmReset(tickets, polled_at), "ticket")


def on_reset(node: NodeState, step: Step, answer: Answer[questions.ConfirmReset, list[bytes]]) -> None:
    """Do not count silence that the reset itself may have caused."""
    leader = node.round.leader
    for monitor in (node.round.monitor, leader and leader.monitor):
        if monitor:
            monitor.confirm_resets(answer.question.tickets, step.now)
    polled_at = answer.question.polled_at
    if node.count_tickets(answer.value[0]) > node.round.tickets:
        polled_at = min(polled_at, node.round.counted_at)  # some have come since, and were not polled
    confirm_poll(node, step, polled_at)
