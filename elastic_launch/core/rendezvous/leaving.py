"""How a node leaves the job: before its end, or at its end, once all nodes know how it has ended."""

from __future__ import annotations

import signal

from elastic_launch.core.agent.messages import Decided, Leave
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.messages import Answer, Close
from elastic_launch.core.rendezvous.monitor import LEFT, TAKE_OVER
from elastic_launch.core.rendezvous.records import MAX_ERROR, MAX_TICKETS, MAX_UNFIT, Closed, Unfit, as_lines, encode
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer, enter
from elastic_launch.core.store_requests import Add, Append, Swap
from elastic_launch.core.text import headline, shortened, visible
from elastic_launch.errors import signal_name
from elastic_launch.job import Change, Decision, End, EndKind

# --- before the job ends


def leave_membership(node: NodeState, step: Step, request: Leave, *, same_step: bool = False) -> None:
    """Leave the running round: it ends, and the job goes on without this node if it can.

    Args:
        node: the state, which is changed.
        step: collects what to do.
        request: why this node leaves.
        same_step: whether the workers of all nodes stop at the same step.
    """
    node.has_left = True
    round_, serves = node.round, node.record.serves
    if round_.closed is None or (round_.report.round and not serves and not request.reason):
        return  # its workers have succeeded, and the others' need it no more than if it had died
    rest = round_.closed.nodes - 1 + len(round_.closed.spares)
    if rest >= node.settings.min_nodes and not serves and not request.reason:
        why, id_ = _why(node, request), node.record.node
        end = End(EndKind.MEMBERSHIP_CHANGED, why, id_, signum=request.signum, change=Change.NODE_LEFT)
    else:
        end = _final(node, request, "and the job cannot go on without it")
        round_.shutdown.stops_job = True
    rank = round_.assignment.group_rank if round_.assignment else -1  # the others log it, even if this is rank 0
    step.create(questions.LearnEnd(), "end", encode(end._replace(rank=rank, same_step=same_step)))


def leave(node: NodeState, step: Step, request: Leave) -> None:
    """Leave while no workers run: hand over the lead, or stop the job if this node hosts the store or is to stop it."""
    node.has_left = True
    round_ = node.round
    goes_on = node.phase in (Phase.WAITING, Phase.ENDED) or (node.phase is Phase.JOINING and round_.number > 0)
    if (node.record.serves or request.reason) and not node.is_over:
        round_.shutdown.stops_job = True
        if node.phase is Phase.ENDED or (
            node.phase is Phase.UNFIT and round_.end
        ):  # the others have gone on to the next round, or will; this node has no part in it
            round_.number += 1
            round_.shutdown.has_acknowledged = True
        step.create(questions.Write(), "end", encode(_final(node, request, "which hosts the store")))
        # For all nodes that come: the round ends before it begins.
        step.create(questions.Write(), "closed", encode(Closed(-1, 0, MAX_TICKETS)))
    elif request.error and node.phase in (Phase.JOINING, Phase.WAITING):
        why = visible(headline(request.error))[:MAX_UNFIT]
        _note(node, step, Unfit(node.record, why, is_gone=True, has_failed=True))
    elif node.phase is Phase.UNFIT:
        _note(node, step, Unfit(node.record, node.unfit, is_gone=True))
    elif goes_on and request.signum and not node.is_over:
        # If too few remain to meet, the job ends by this signal, as it would while the workers run.
        round_.shutdown.has_counted |= node.phase is Phase.JOINING  # nobody waits for it, but this must arrive
        key = node.key("leaving", back=-(node.phase is Phase.ENDED))
        final = _final(node, request, "and the job cannot go on without it")
        step.ask(questions.Write(), Swap(key, b"", encode(final)))
    if node.phase is Phase.WAITING and round_.leader:
        heirs = sorted(ticket for ticket in round_.leader.joined if ticket != round_.ticket)
        step.write((f"heartbeat/{heir}", b"%d" % TAKE_OVER) for heir in heirs[:1])


def _note(node: NodeState, step: Step, note: Unfit) -> None:
    step.ask(questions.Write(), Append(node.key("unfit"), as_lines([encode(note)])))


def _why(node: NodeState, request: Leave) -> str:
    if request.error:
        return f"{node.record.host}: {shortened(request.error, MAX_ERROR)}"
    return f"{node.record.host} is leaving ({signal_name(request.signum)})"


def _final(node: NodeState, request: Leave, why_final: str) -> End:
    """Return the end of the job: it cannot go on without this node, or is not to go on."""
    id_ = node.record.node
    if request.error:
        return End(EndKind.ERROR, _why(node, request), id_, status=request.status)
    reason = request.reason or f"{_why(node, request)}, {why_final}"
    return End(EndKind.STOP, reason, id_, signum=request.signum)


# --- at its end


def decide(node: NodeState, step: Step, decision: Decision) -> None:
    """Tell the agent what follows the round; if the job ends, shut down."""
    node.round.decision, node.decided_at = decision, step.now
    step.notify(Decided(decision))
    if not decision.restart:
        shut_down(node, step)


def acknowledge(node: NodeState, step: Step) -> None:
    """Count this node among those that know how the job has ended. The store's host waits for all of them."""
    round_, shutdown = node.round, node.round.shutdown
    if not shutdown.has_acknowledged and round_.ticket:
        shutdown.has_acknowledged = True
        dead = round_.finished - (round_.monitor.left if round_.monitor else set())  # these cannot count themselves
        step.ask(questions.CountLeft(), Add(node.key("left"), 1 + len(dead)))
        if node.stays:
            step.await_key("all_left")  # from now on: later there may be no majority to answer


def on_left(node: NodeState, step: Step, answer: Answer[questions.CountLeft, int]) -> None:
    """Find out whether all nodes know that the job has ended."""
    step.get(questions.CompareLeft(answer.value), "ticket")


def on_left_compared(node: NodeState, step: Step, answer: Answer[questions.CompareLeft, list[bytes]]) -> None:
    """If all nodes know that the job has ended, tell them so."""
    if answer.question.left >= node.count_tickets(answer.value[0]):
        step.write([("all_left", b"1")])
    node.round.shutdown.has_counted = True
    _confirm(node, step)


def close(node: NodeState, step: Step, request: Close) -> None:
    """Shut down. A node that has neither left nor reached the end of the job leaves it first."""
    if not node.has_left and node.phase is Phase.MEMBER:
        leave_membership(node, step, Leave(signal.SIGTERM))
    elif not node.has_left or (node.phase is Phase.ENDED and _serves_others(node)):
        leave(node, step, Leave(signal.SIGTERM))
    shut_down(node, step)


def _serves_others(node: NodeState) -> bool:
    """Whether the others go on in this node's store, because another one ended the round before this one could."""
    return node.record.serves and not node.is_over and not node.round.shutdown.stops_job


def shut_down(node: NodeState, step: Step, request: Close | None = None) -> None:
    """Tell the others that this node is done, and wait for them if the store ends with it."""
    if node.phase is Phase.LEAVING:
        return
    round_, shutdown = node.round, node.round.shutdown
    is_over = shutdown.stops_job or (round_.end is not None and node.is_over)
    shutdown.is_last = node.record.serves or (node.stays and is_over)
    round_.leader = None
    shutdown.has_counted |= node.phase is Phase.UNFIT  # nobody waits for it, but what it has written must arrive
    enter(node, Phase.LEAVING)
    node.awaited_key = None
    if round_.ticket:
        step.ask(questions.Write(), Add(node.key(f"heartbeat/{round_.ticket}"), LEFT))
        acknowledge(node, step)
    elif not shutdown.has_counted:
        node.may_disconnect = True
        return
    if shutdown.is_last and shutdown.is_empty:
        disconnect(node, step)
    elif shutdown.is_last:
        step.await_key("all_left")
        step.set_timer(Timer.SHUTDOWN, min(node.settings.close_timeout, node.settings.keep_alive_deadline))
    _confirm(node, step)


def _confirm(node: NodeState, step: Step) -> None:
    """Let a node that need not stay disconnect once the store has carried out all its requests."""
    shutdown = node.round.shutdown
    if node.phase is Phase.LEAVING and shutdown.has_counted and not shutdown.is_last:
        step.get(questions.ConfirmWritten(), "all_left")


def disconnect(node: NodeState, step: Step, given: object = None) -> None:
    """Disconnect: nothing is left to tell the others, or there is no more time."""
    node.timers.clear()
    node.may_disconnect = True
