"""A node joins a round: it finds out the round's number, draws a ticket, writes its record, and waits."""

from __future__ import annotations

from elastic_launch.core.agent.messages import Leave
from elastic_launch.core.rendezvous import former, questions
from elastic_launch.core.rendezvous.leading import become_leader, refuse
from elastic_launch.core.rendezvous.leaving import decide, leave
from elastic_launch.core.rendezvous.messages import Answer
from elastic_launch.core.rendezvous.monitor import number
from elastic_launch.core.rendezvous.next_round import rejoin
from elastic_launch.core.rendezvous.progress import FIRST_LINE, waiting
from elastic_launch.core.rendezvous.records import NodeRecord, decode, encode, refused
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer, enter
from elastic_launch.core.store_requests import Add, Swap
from elastic_launch.errors import ExitCode
from elastic_launch.job import Decision


def on_round(node: NodeState, step: Step, answer: Answer[questions.LearnRound, list[bytes] | bytes]) -> None:
    """Join the current round: the next one, or a later one."""
    found = questions.held(answer.value)
    round_, current = node.round, number(found, node.round_key)
    if current < round_.number:  # the store has forgotten it
        step.ask(questions.LearnRound(), Swap(node.round_key, found, b"%d" % round_.number))
        return
    if current > round_.number > 0:
        node.record = node.record._replace(previous_rank=-1)  # the others have gone on without this node
    round_.number = current
    heartbeat = round_.heartbeat
    heartbeat.answered_at = heartbeat.monitored_at = heartbeat.polled_at = step.now
    step.ask(questions.DrawTicket(), Add(node.key("ticket"), 1))


def on_ticket(node: NodeState, step: Step, answer: Answer[questions.DrawTicket, int]) -> None:
    """Write the node's record; lead the round with the first ticket, else wait for it to close."""
    node.round.ticket = node.count_tickets(b"%d" % answer.value)
    if not node.round.ticket:
        raise refused(node.key("ticket"), "must count from 1")
    enter(node, Phase.WAITING)
    step.create(questions.WriteRecord(), f"node/{node.round.ticket}", encode(node.record))
    node.timers[Timer.PROGRESS] = max(step.now, node.began_at) + FIRST_LINE
    if node.round.ticket == 1:
        become_leader(node, step)
    else:
        step.await_key("closed")
    former.begin(node, step)
    node.timers[Timer.HEARTBEAT] = max(step.now, node.round.heartbeat.answered_at + node.heartbeat_period)


def on_record_written(node: NodeState, step: Step, answer: Answer[questions.WriteRecord, bytes]) -> None:
    """Meet in another round if the ticket is another node's, too: two nodes would get one place.

    Somebody has set the counter back, or the store came back empty in between.
    """
    if decode(NodeRecord, answer.value, node.key(f"node/{node.round.ticket}")).node != node.record.node:
        rejoin(node, step)


def on_join_timeout(node: NodeState, step: Step) -> None:
    """Give up: alone, or for all nodes if this one hosts the store."""
    if node.phase is Phase.UNFIT:
        limit = f"{node.settings.join_timeout:g} s (join_timeout)"
        text = f"health check failed: {node.unfit}; gave up, because no round has formed within {limit}"
        leave(node, step, Leave(error=text, status=ExitCode.UNAVAILABLE))
        decide(node, step, Decision(False, error=text, status=ExitCode.UNAVAILABLE))
        return
    status = node.round.leader.status() if node.round.leader else node.round.status
    text = f"{waiting(node, step.now, status)}; gave up (join_timeout={node.settings.join_timeout:g} s)"
    if node.record.serves:
        refuse(node, step, text, ExitCode.TIMEOUT)
    else:
        decide(node, step, Decision(False, error=text, status=ExitCode.TIMEOUT))
