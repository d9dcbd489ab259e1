"""A node whose health check fails takes no part: it tells the others, and follows the rounds that they form.

It draws no ticket, so nobody waits for it or polls it. A leader that expects it reads its note instead. Like a spare it
learns how each round ends, so it ends with the job. When the check passes, it joins the current round as any newcomer.
"""

from __future__ import annotations

from elastic_launch.core.agent.messages import Withdraw
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.ending import decision_after, read_decision, read_end
from elastic_launch.core.rendezvous.leaving import decide
from elastic_launch.core.rendezvous.messages import Answer, KeyAppeared, StoreReconnected
from elastic_launch.core.rendezvous.monitor import number
from elastic_launch.core.rendezvous.next_round import carry_over
from elastic_launch.core.rendezvous.records import MAX_UNFIT, Closed, Unfit, as_lines, decode, encode, refused
from elastic_launch.core.rendezvous.state import NodeState, Phase, Round, Step, Timer, enter
from elastic_launch.core.store_requests import Append, Get
from elastic_launch.job import EndKind


def withdraw(node: NodeState, step: Step, request: Withdraw) -> None:
    """Take no part in the next round, nor in those after it until the agent asks to join."""
    is_new = node.phase is not Phase.UNFIT
    node.unfit = _brief(request.reason)
    if is_new:
        carry_over(node, step)
        _follow(node, step, node.round.number + 1)
    else:
        find_round(node, step)  # the others may have gone on in a store that was restarted empty


def _brief(reason: str) -> str:
    """Cut a reason to what the other nodes get to see. It begins with output of the check, and ends with its end."""
    half = MAX_UNFIT // 2 - 5
    return reason if len(reason) <= MAX_UNFIT else f"{reason[:half]} ... {reason[-half:]}"


def _follow(node: NodeState, step: Step, round_: int) -> None:
    enter(node, Phase.UNFIT)
    node.timers = {Timer.JOIN_TIMEOUT: node.began_at + node.settings.join_timeout}
    node.awaited_key = None
    node.round = Round(round_)
    step.wants_store |= node.record.serves and node.settings.store_port > 0  # the workers need it all the same
    find_round(node, step)


def find_round(node: NodeState, step: Step, reconnected: StoreReconnected | None = None) -> None:
    """Ask which round the others are in."""
    step.ask(questions.FindRound(), Get((node.round_key,)))


def on_round_found(node: NodeState, step: Step, answer: Answer[questions.FindRound, list[bytes]]) -> None:
    """Tell the others why this node is not there, once a round; then find out how far the round is."""
    current = number(answer.value[0], node.round_key)
    if current > node.round.number:
        node.began_at = step.now
        _follow(node, step, current)
        return
    if not node.round.has_told:
        node.round.has_told = True
        step.ask(questions.Write(), Append(node.key("unfit"), as_lines([encode(Unfit(node.record, node.unfit))])))
    look(node, step)


def look(node: NodeState, step: Step, appeared: KeyAppeared | None = None) -> None:
    """Ask whether the round has closed, and how it has ended."""
    step.get(questions.FollowRound(), "closed", "end", "decision")


def on_followed(node: NodeState, step: Step, answer: Answer[questions.FollowRound, list[bytes]]) -> None:
    """Wait for what comes next in the round; go on to the next round with the others, or end with the job."""
    closed, end, decision = answer.value
    round_ = node.round
    if closed:
        round_.closed = decode(Closed, closed, node.key("closed"))
        if round_.closed.leader < 0 and not end:
            raise refused(node.key("closed"), "says that there is no round, but nobody has ended it")
        node.timers.pop(Timer.JOIN_TIMEOUT, None)  # the job runs: wait as long as it does
    if not end:
        step.await_key("end" if closed else "closed")
        return
    round_.end = read_end(node, end)
    following = decision_after(round_.end, node.restart_history(step.now))
    if following is None and not decision:
        step.await_key("decision")
        return
    round_.decision = following or read_decision(node, decision)
    node.decided_at = step.now
    if round_.decision.restart:
        carry_over(node, step)
        _follow(node, step, round_.number + 1)
        return
    if round_.end.kind is EndKind.DONE:
        step.log("the job has succeeded without this node, whose health check fails")
    decide(node, step, round_.decision)
