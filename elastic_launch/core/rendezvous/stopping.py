"""A round ends with all workers at the same step, because a node leaves whose workers call ``should_stop()``.

The record that ends the round says so. Each member then holds its workers and writes the number of calls that they have
begun. The node that leaves reads these numbers. No rank has passed a later call than the greatest of them, so it lets
all stop at the next one. Whoever cannot wait any longer decides that there is no such call; the first decision holds.
"""

from __future__ import annotations

from elastic_launch.core.agent.messages import GiveUpStop, Leave, ReportCalls, RequestStop, StopAgreed
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.ending import conclude
from elastic_launch.core.rendezvous.leaving import leave, leave_membership
from elastic_launch.core.rendezvous.messages import Answer
from elastic_launch.core.rendezvous.monitor import number
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer

MAX_CALLS = 10**15
"""More calls of ``should_stop()`` are not told: workers write the number, and others read it."""
POLL = 0.1
"""Seconds between two reads of the numbers that are still missing."""


def request_stop(node: NodeState, step: Step, request: RequestStop) -> None:
    """Leave the round, and have all workers stop at the same step. If another node was first, leave after that."""
    if node.phase is Phase.MEMBER:
        leave_membership(node, step, Leave(request.signum, reason=request.reason), same_step=True)
    elif not node.round.awaits_stop:  # otherwise this node leaves when it closes
        leave(node, step, Leave(request.signum, reason=request.reason))


def report_calls(node: NodeState, step: Step, request: ReportCalls) -> None:
    """Write how far this node's workers have come."""
    round_ = node.round
    step.write([(f"calls/{round_.ticket}", b"%d" % min(request.calls, MAX_CALLS))])
    if round_.end and round_.end.mine:
        read_calls(node, step)


def read_calls(node: NodeState, step: Step) -> None:
    """Read the numbers that are missing. All tickets may have one, because only the leader knows the members."""
    round_ = node.round
    if round_.closed:
        tickets = [ticket for ticket in range(1, round_.closed.tickets + 1) if ticket not in round_.calls]
        step.get(questions.ReadCalls(tickets), *(f"calls/{ticket}" for ticket in tickets))


def on_calls(node: NodeState, step: Step, answer: Answer[questions.ReadCalls, list[bytes]]) -> None:
    """Decide at which call all workers stop, if those of all members are held."""
    round_ = node.round
    if round_.stop_at is not None:
        return
    found = zip(answer.question.tickets, answer.value, strict=True)
    round_.calls |= {ticket: number(calls, node.key(f"calls/{ticket}"), MAX_CALLS) for ticket, calls in found if calls}
    if round_.closed and len(round_.calls) >= round_.closed.nodes:
        step.create(questions.LearnStopAt(), "stop_at", b"%d" % (max(round_.calls.values()) + 1))
    else:
        step.set_timer(Timer.READ_CALLS, POLL)


def give_up(node: NodeState, step: Step, request: GiveUpStop) -> None:
    """Have all nodes stop their workers in the ordinary way, unless they have agreed on a step."""
    step.create(questions.LearnStopAt(), "stop_at", b"0")


def on_stop_at(node: NodeState, step: Step, answer: Answer[questions.LearnStopAt, list[bytes] | bytes]) -> None:
    """Follow what was decided first."""
    if data := questions.held(answer.value):
        follow_stop(node, step, number(data, node.key("stop_at"), MAX_CALLS + 1))


def follow_stop(node: NodeState, step: Step, stop_at: int) -> None:
    """Tell the agent at which call its workers stop, if it waits for that."""
    if node.round.awaits_stop:
        node.round.stop_at = stop_at
        step.await_key(None)
        node.timers.pop(Timer.READ_CALLS, None)
        step.notify(StopAgreed(stop_at))
        conclude(node, step)  # if the job is over, this node knows how
