"""How a node goes on to the next round."""

from __future__ import annotations

from elastic_launch.core.agent.restart_policy import aged, is_deprioritized
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.messages import Join
from elastic_launch.core.rendezvous.state import NodeState, Phase, Round, Step, Timer, enter
from elastic_launch.core.store_requests import Get, Swap
from elastic_launch.core.store_requests import Request as StoreRequest
from elastic_launch.job import EndKind


def join(node: NodeState, step: Step, request: Join) -> None:
    """Join the next round for the agent; a node that was unfit joins the current one."""
    node.has_check = request.has_check
    if node.phase is Phase.UNFIT:
        history = aged(node.record.restart_history, step.now - node.carried_at)
        node.record = node.record._replace(restart_history=history)
        node.began_at = max(step.now, node.began_at)
        _begin(node, step, node.round.number, Get((node.round_key,)))
    else:
        look_for_round(node, step)
    node.record = node.record._replace(port=request.port)


def rejoin(node: NodeState, step: Step) -> None:
    """Join the next round without the agent, which has no workers in this one."""
    step.wants_store |= node.record.serves and node.settings.store_port > 0
    look_for_round(node, step)


def look_for_round(node: NodeState, step: Step) -> None:
    """Forget the round, and find out which comes next."""
    carry_over(node, step)
    past = node.round.number
    before = b"%d" % past if past >= 0 else b""
    _begin(node, step, past + 1, Swap(node.round_key, before, b"%d" % (past + 1)))


def carry_over(node: NodeState, step: Step) -> None:
    """Note what the next round has to know of this one, and when it may close."""
    past = node.round
    if past.decision and (past.assignment or (past.end and past.end.kind is EndKind.FAILED)):
        history = aged(past.decision.restart_history, step.now - node.decided_at)
        history = node.with_own_goodput(history, step.now)
        aside = node.record.deprioritized or is_deprioritized(node.settings.policy, history, node.record.node)
        node.record = node.record._replace(restart_history=history, known_round=past.number, deprioritized=aside)
    node.record = node.record._replace(previous_rank=past.assignment.group_rank if past.assignment else -1)
    node.carried_at = step.now
    pause_ends = node.decided_at + past.decision.pause if past.decision else node.began_at
    node.began_at = max(step.now, pause_ends)


def _begin(node: NodeState, step: Step, number: int, request: StoreRequest) -> None:
    enter(node, Phase.JOINING)
    node.timers = {Timer.JOIN_TIMEOUT: node.began_at + node.settings.join_timeout}
    node.progress_lines = 0
    node.awaited_key = None
    node.round = Round(number)
    step.ask(questions.LearnRound(), request)
