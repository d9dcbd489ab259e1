"""The store comes and goes: it is reachable again, perhaps empty, or it is given up."""

from __future__ import annotations

from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.ending import conclude, end_round
from elastic_launch.core.rendezvous.leaving import disconnect
from elastic_launch.core.rendezvous.messages import Answer, StoreLost, StoreReconnected
from elastic_launch.core.rendezvous.next_round import rejoin
from elastic_launch.core.rendezvous.records import NodeRecord, decode, encode
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step
from elastic_launch.core.rendezvous.stopping import follow_stop
from elastic_launch.job import Change, Decision, End, EndKind


def on_reconnected(node: NodeState, step: Step, reconnected: StoreReconnected) -> None:
    """Find out whether it is the same store. A heartbeat without an answer is sent again."""
    node.round.heartbeat.repeats += node.round.heartbeat.in_flight
    if not node.is_over:
        step.read_own_record()


def on_own_record(node: NodeState, step: Step, answer: Answer[questions.ReadOwnRecord, list[bytes]]) -> None:
    """If this node's record or ticket is missing, the store was restarted empty: meet there again.

    In an empty store another node may have drawn the same ticket, or this one may have just written its record again.
    If the round had closed and ended there, the store is the same, and the others are some rounds ahead.
    """
    round_, (data, tickets, closed, ended) = node.round, answer.value
    is_own = bool(data) and decode(NodeRecord, data, node.key(f"node/{round_.ticket}")).node == node.record.node
    if is_own and node.count_tickets(tickets) >= round_.ticket:
        return
    if round_.assignment is None:
        rejoin(node, step)
    elif round_.end is None and closed and ended:
        end_round(node, step, ended)
    elif round_.end is None:
        end = End(
            EndKind.MEMBERSHIP_CHANGED, "the store was restarted", node.record.node, change=Change.STORE_RESTARTED
        )
        end_round(node, step, encode(end))
    elif round_.decision is None:
        round_.decision = Decision(True, node.restart_history(step.now))
        conclude(node, step)


def on_lost(node: NodeState, step: Step, lost: StoreLost) -> None:
    """End the job on this node, unless it is already over."""
    round_ = node.round
    if node.phase is Phase.LEAVING:
        disconnect(node, step)
        return
    if round_.awaits_stop:
        follow_stop(node, step, 0)
    if node.is_over:
        return
    round_.ticket = 0
    node.timers.clear()
    if round_.assignment is not None and round_.end is None:
        end = End(EndKind.ERROR, lost.text, node.record.node, status=lost.status)
        end_round(node, step, encode(end))
    else:
        round_.decision = Decision(False, error=lost.text, status=lost.status)
        conclude(node, step)
