"""How the nodes of a round find out that none of them makes progress, and collect the stacks of all workers.

A node whose workers stall *claims* so, with the number of the stall that would be the round's next. The monitor sees
that somebody has when it polls the heartbeats, and then reads the claims of all members. Members whose workers have
succeeded need none. If all others claim, the job stalls: the monitor counts the stall, and all who have claimed send
their stacks. It hands them to its agent, which judges them, and writes the verdict for all. As long as the job makes
progress, nobody asks the store anything for this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_launch.core.progress.messages import (
    AllStalled,
    ClaimStall,
    Judged,
    ReportStacks,
    ReportVerdict,
    StacksArrived,
    StacksComplete,
    WithdrawClaim,
)
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.messages import Answer
from elastic_launch.core.rendezvous.monitor import number
from elastic_launch.core.rendezvous.records import decode, encode
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer
from elastic_launch.core.text import shortened

if TYPE_CHECKING:
    from elastic_launch.core.progress.verdict import Verdict

FIRST_POLL, LAST_POLL = 0.25, 5.0
"""Seconds between two polls for a stall or a verdict: at first, when either may come at any moment, and later."""
QUICK_POLLS = 40
"""Number of polls at the shorter interval."""
COLLECT_POLL = 0.1
"""Seconds between two polls of the monitor for stacks that are missing."""
COLLECT_PATIENCE = 5.0
"""Seconds after which it goes on without them."""
COLLECT_BATCH = 32
"""Number of members whose stacks are read with one request; each may have 64 KiB."""
MAX_TEXT = 60_000
"""Characters of the merged stacks that the other nodes get to see."""


# --- the members


def claim(node: NodeState, step: Step, request: ClaimStall) -> None:
    """Claim that this node's workers stall: find out the number of the next stall first."""
    step.get(questions.CountStalls(), "stall")


def on_stalls_counted(node: NodeState, step: Step, answer: Answer[questions.CountStalls, list[bytes]]) -> None:
    """Write the claim, and poll for the stall of all."""
    stall = node.round.stall
    stall.number = number(answer.value[0])
    stall.polls = 0
    next_one = b"%d" % (stall.number + 1)
    step.write([(f"stalled/{node.round.ticket}", next_one), ("stalled", next_one)])
    step.set_timer(Timer.STALL_POLL, FIRST_POLL)


def withdraw(node: NodeState, step: Step, request: WithdrawClaim) -> None:
    """Withdraw the claim."""
    node.timers.pop(Timer.STALL_POLL, None)
    step.write([(f"stalled/{node.round.ticket}", b"0")])


def poll(node: NodeState, step: Step) -> None:
    """Poll for the stall of all, or for the verdict."""
    stall = node.round.stall
    stall.polls += 1
    step.set_timer(Timer.STALL_POLL, FIRST_POLL if stall.polls < QUICK_POLLS else LAST_POLL)
    if stall.awaits_verdict:
        step.get(questions.AwaitVerdict(), f"verdict/{stall.number}")
    else:
        step.get(questions.AwaitStall(), "stall")


def on_stall(node: NodeState, step: Step, answer: Answer[questions.AwaitStall, list[bytes]]) -> None:
    """Have the agent take the stacks if the whole job stalls."""
    if number(answer.value[0]) > node.round.stall.number and Timer.STALL_POLL in node.timers:
        _begin(node, step, number(answer.value[0]))


def _begin(node: NodeState, step: Step, stall: int) -> None:
    node.timers.pop(Timer.STALL_POLL, None)
    node.round.stall.number = stall
    step.notify(AllStalled(stall))


def report_stacks(node: NodeState, step: Step, request: ReportStacks) -> None:
    """Send this node's stacks, and poll for the verdict."""
    stall = node.round.stall
    step.write([(f"stacks/{request.number}/{node.round.ticket}", encode(request.stacks))])
    stall.awaits_verdict, stall.polls = True, 0
    step.set_timer(Timer.STALL_POLL, FIRST_POLL)


def on_verdict(node: NodeState, step: Step, answer: Answer[questions.AwaitVerdict, list[bytes]]) -> None:
    """Tell the agent what the stacks of all nodes say."""
    stall = node.round.stall
    if answer.value[0] and stall.awaits_verdict:
        from elastic_launch.core.progress.judgement import Judgement  # late: few jobs hang

        _hear(node, step, *decode(Judgement, answer.value[0], node.key(f"verdict/{stall.number}")))


def _hear(node: NodeState, step: Step, verdict: Verdict, blamed: int, text: str) -> None:
    node.round.stall.awaits_verdict = False
    node.timers.pop(Timer.STALL_POLL, None)
    step.notify(Judged(node.round.stall.number, verdict, blamed, text))


# --- the monitor


def check_claims(node: NodeState, step: Step, claimed: bytes, stalls: bytes) -> None:
    """Read the claims of all members if there is one for the next stall.

    Args:
        node: the monitor.
        step: the step.
        claimed: the number of the latest stall that anybody has claimed.
        stalls: the number of the latest stall.
    """
    members, stall = node.round.members, number(stalls)
    if node.phase is Phase.MEMBER and members and number(claimed) > stall:
        keys = (f"{name}/{ticket}" for name in ("stalled", "succeeded") for ticket in members.tickets)
        step.get(questions.CheckClaims(stall + 1, members.tickets), *keys)


def on_claims(node: NodeState, step: Step, answer: Answer[questions.CheckClaims, list[bytes]]) -> None:
    """If all members claim a stall, count it, and collect their stacks."""
    stall, (next_one, tickets) = node.round.stall, (answer.question.stall, answer.question.tickets)
    claims, finished = answer.value[: len(tickets)], answer.value[len(tickets) :]
    claiming = [ticket for ticket, value in zip(tickets, claims, strict=True) if number(value) == next_one]
    if not claiming or stall.collected >= next_one:
        return
    if all(number(value) == next_one or done for value, done in zip(claims, finished, strict=True)):
        stall.collected = next_one
        stall.missing = claiming
        stall.collect_until = step.now + COLLECT_PATIENCE
        step.write([("stall", b"%d" % next_one)])
        step.set_timer(Timer.COLLECT_STACKS, COLLECT_POLL)
        if node.round.ticket in claiming:
            _begin(node, step, next_one)


def collect(node: NodeState, step: Step) -> None:
    """Read stacks that are missing."""
    stall = node.round.stall
    some = stall.missing[:COLLECT_BATCH]
    step.get(questions.CollectStacks(stall.collected, tuple(some)), *(f"stacks/{stall.collected}/{t}" for t in some))


def on_stacks(node: NodeState, step: Step, answer: Answer[questions.CollectStacks, list[bytes]]) -> None:
    """Hand stacks to the agent as they come, and tell it when no more will."""
    from elastic_launch.core.progress.stack_groups import NodeStacks  # late: few jobs hang

    stall, question = node.round.stall, answer.question
    late = []
    for ticket, data in zip(question.tickets, answer.value, strict=True):
        if data:
            key = node.key(f"stacks/{question.stall}/{ticket}")
            step.notify(StacksArrived(question.stall, decode(NodeStacks, data, key)))
        else:
            late.append(ticket)
    stall.missing = [*stall.missing[len(question.tickets) :], *late]
    if not stall.missing or (late and step.now >= stall.collect_until):
        members = node.round.members
        hosts = dict(zip(members.tickets, members.hosts, strict=True)) if members else {}
        step.notify(StacksComplete(question.stall, tuple(hosts.get(ticket, "?") for ticket in stall.missing)))
    elif late:
        step.set_timer(Timer.COLLECT_STACKS, COLLECT_POLL)
    else:
        collect(node, step)


def report_verdict(node: NodeState, step: Step, request: ReportVerdict) -> None:
    """Tell all nodes what the stacks say, this one included."""
    from elastic_launch.core.progress.judgement import Judgement  # late: few jobs hang

    judgement = Judgement(request.verdict, request.blamed, shortened(request.text, MAX_TEXT))
    step.write([(f"verdict/{request.number}", encode(judgement))])
    if node.round.stall.awaits_verdict:
        _hear(node, step, *judgement)
