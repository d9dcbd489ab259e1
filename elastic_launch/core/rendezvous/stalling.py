"""How the nodes of a round find out that none of them makes progress, and collect the stacks of all workers.

A node whose workers stall *claims* so, with the number of the stall that would be the round's next. The monitor sees
that somebody has when it polls the heartbeats, and then reads the claims of all members. Members whose workers have
succeeded need none. If all others claim, the job stalls: the monitor counts the stall, and all who have claimed send
their stacks. It hands them to its agent, which judges them, and writes the verdict for all. As long as the job makes
progress, nobody asks the store anything for this.

Somebody may also ask for the stacks of all nodes while they are well. The monitor sees that request in the same poll,
and sets a flag in the members' heartbeat counters, so that they learn of it with their next heartbeat. The rest is as
for a stall, but for the number, which is negative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_launch.core.progress.messages import (
    AllStalled,
    ClaimStall,
    Judged,
    ReportStacks,
    ReportVerdict,
    RequestStacks,
    StacksArrived,
    StacksComplete,
    StacksWanted,
    WithdrawClaim,
)
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.messages import Answer
from elastic_launch.core.rendezvous.monitor import LOOK, number
from elastic_launch.core.rendezvous.records import decode, encode
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer
from elastic_launch.core.store_requests import Add
from elastic_launch.core.text import shortened
from elastic_launch.errors import RendezvousStateError

if TYPE_CHECKING:
    from elastic_launch.core.progress.judgement import Judgement

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
MAX_NUMBER = 2**31
"""Greatest number of a stall, or of a request for stacks, in a round. Others can only be forged."""


# --- the members


def claim(node: NodeState, step: Step, request: ClaimStall) -> None:
    """Claim that this node's workers stall: find out the number of the next stall first."""
    step.get(questions.CountStalls(), "stall")


def on_stalls_counted(node: NodeState, step: Step, answer: Answer[questions.CountStalls, list[bytes]]) -> None:
    """Write the claim, and poll for the stall of all."""
    stall = node.round.stall
    stall.number = _number(node, "stall", answer.value[0])
    stall.polls = 0
    next_one = b"%d" % min(stall.number + 1, MAX_NUMBER)
    step.write([(f"stalled/{node.round.ticket}", next_one), ("stalled", next_one)])
    step.set_timer(Timer.STALL_POLL, FIRST_POLL)
    if Timer.MONITOR_POLL in node.timers:  # the others are likely to claim at the same time
        step.set_timer(Timer.MONITOR_POLL, min(FIRST_POLL, node.settings.tick))


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
    stall = _number(node, "stall", answer.value[0])
    if stall > node.round.stall.number and Timer.STALL_POLL in node.timers:
        _begin(node, step, stall)


def _begin(node: NodeState, step: Step, stall: int) -> None:
    node.timers.pop(Timer.STALL_POLL, None)
    node.round.stall.number = stall
    step.notify(AllStalled(stall))


def request_stacks(node: NodeState, step: Step, request: RequestStacks) -> None:
    """Ask for the stacks of all nodes."""
    step.get(questions.CountLooks(), "look")


def on_looks_counted(node: NodeState, step: Step, answer: Answer[questions.CountLooks, list[bytes]]) -> None:
    """Write the request, and poll for the verdict."""
    stall = node.round.stall
    stall.look = min(_number(node, "look", answer.value[0]) + 1, MAX_NUMBER)
    step.write([("look", b"%d" % stall.look)])
    step.set_timer(Timer.LOOK_POLL, FIRST_POLL)


def poll_look(node: NodeState, step: Step) -> None:
    """Poll for the verdict that this node has asked for."""
    step.set_timer(Timer.LOOK_POLL, FIRST_POLL)
    step.get(questions.AwaitLook(node.round.stall.look), f"verdict/-{node.round.stall.look}")


def on_look_judged(node: NodeState, step: Step, answer: Answer[questions.AwaitLook, list[bytes]]) -> None:
    """Tell the agent what the stacks of all nodes say."""
    stall, look = node.round.stall, answer.question.look
    if answer.value[0] and look == stall.look:
        stall.look = 0
        node.timers.pop(Timer.LOOK_POLL, None)
        if judgement := _read_judgement(node, step, answer.value[0], -look):
            step.notify(Judged(-look, *judgement))


def learn_look(node: NodeState, step: Step) -> None:
    """Find out what somebody asks for: the flag in this node's counter says that somebody does."""
    if node.phase is Phase.MEMBER:
        step.get(questions.LearnLook(), "look")


def on_look(node: NodeState, step: Step, answer: Answer[questions.LearnLook, list[bytes]]) -> None:
    """Have the agent take the stacks, once for each request."""
    _take_stacks(node, step, _number(node, "look", answer.value[0]))


def _take_stacks(node: NodeState, step: Step, look: int) -> None:
    if look > node.round.stall.looked:
        node.round.stall.looked = look
        step.notify(StacksWanted(-look))


def report_stacks(node: NodeState, step: Step, request: ReportStacks) -> None:
    """Send this node's stacks, and poll for the verdict."""
    stall = node.round.stall
    step.write([(f"stacks/{request.number}/{node.round.ticket}", encode(request.stacks))])
    if request.number < 0:
        return  # only the node that has asked awaits the verdict
    stall.awaits_verdict, stall.polls = True, 0
    step.set_timer(Timer.STALL_POLL, FIRST_POLL)


def on_verdict(node: NodeState, step: Step, answer: Answer[questions.AwaitVerdict, list[bytes]]) -> None:
    """Tell the agent what the stacks of all nodes say."""
    stall = node.round.stall
    if answer.value[0] and stall.awaits_verdict:
        _hear(node, step, _read_judgement(node, step, answer.value[0], stall.number))


def _hear(node: NodeState, step: Step, judgement: Judgement | None) -> None:
    node.round.stall.awaits_verdict = False
    node.timers.pop(Timer.STALL_POLL, None)
    if judgement:
        step.notify(Judged(node.round.stall.number, *judgement))


def _read_judgement(node: NodeState, step: Step, data: bytes, stall: int) -> Judgement | None:
    """Decode a verdict; None, with a line, if it breaks a rule. The job goes on as if there were none."""
    from elastic_launch.core.progress.judgement import Judgement  # late: few jobs hang

    try:
        return decode(Judgement, data, node.key(f"verdict/{stall}"))
    except RendezvousStateError as error:
        step.log(f"ignored a verdict: {error}")
        return None


# --- the monitor


def check_claims(node: NodeState, step: Step, claimed: bytes, stalls: bytes) -> None:
    """Read the claims of all members if there is one for the next stall.

    Args:
        node: the monitor.
        step: the step.
        claimed: the number of the latest stall that anybody has claimed.
        stalls: the number of the latest stall.
    """
    members, stall = node.round.members, _number(node, "stall", stalls)
    if node.phase is Phase.MEMBER and members and _number(node, "stalled", claimed) > stall:
        keys = (f"{name}/{ticket}" for name in ("stalled", "succeeded") for ticket in members.tickets)
        step.get(questions.CheckClaims(stall + 1, members.tickets), *keys)


def on_claims(node: NodeState, step: Step, answer: Answer[questions.CheckClaims, list[bytes]]) -> None:
    """If all members claim a stall, count it, and collect their stacks."""
    stall, (next_one, tickets) = node.round.stall, (answer.question.stall, answer.question.tickets)
    finished = answer.value[len(tickets) :]
    claims = [_number(node, f"stalled/{t}", value) for t, value in zip(tickets, answer.value, strict=False)]
    claiming = [ticket for ticket, claimed in zip(tickets, claims, strict=True) if claimed == next_one]
    if not claiming or stall.collected >= next_one or stall.missing:
        return
    if all(claimed == next_one or done for claimed, done in zip(claims, finished, strict=True)):
        stall.collected = next_one
        _begin_to_collect(node, step, next_one, claiming, COLLECT_PATIENCE)
        step.write([("stall", b"%d" % next_one)])
        if node.round.ticket in claiming:
            _begin(node, step, next_one)


def pass_on_look(node: NodeState, step: Step, look: bytes) -> None:
    """As the monitor: if somebody asks for the stacks of all nodes, find out which of them still have workers.

    Args:
        node: the monitor.
        step: the step.
        look: the number of the latest request.
    """
    members, stall, wanted = node.round.members, node.round.stall, _number(node, "look", look)
    if node.phase is Phase.MEMBER and members and wanted > stall.shown and not stall.missing:
        keys = (f"succeeded/{ticket}" for ticket in members.tickets)
        step.get(questions.CheckSucceeded(wanted, members.tickets), *keys)


def on_succeeded(node: NodeState, step: Step, answer: Answer[questions.CheckSucceeded, list[bytes]]) -> None:
    """Pass the request on to the members whose workers run, and collect their stacks."""
    stall, look = node.round.stall, answer.question.look
    if look <= stall.shown or stall.missing:
        return
    stall.shown = look
    running = [t for t, done in zip(answer.question.tickets, answer.value, strict=True) if not done]
    _begin_to_collect(node, step, -look, running, node.settings.keep_alive_interval + COLLECT_PATIENCE)
    if node.round.ticket in running:
        _take_stacks(node, step, look)
    for ticket in running:
        if ticket != node.round.ticket:  # added, because to set a counter could wipe out a heartbeat
            step.ask(questions.Write(), Add(node.key(f"heartbeat/{ticket}"), LOOK))


def _begin_to_collect(node: NodeState, step: Step, stall: int, tickets: list[int], patience: float) -> None:
    node.round.stall.collecting = stall
    node.round.stall.missing = tickets
    node.round.stall.collect_until = step.now + patience
    step.set_timer(Timer.COLLECT_STACKS, COLLECT_POLL)


def collect(node: NodeState, step: Step) -> None:
    """Read stacks that are missing."""
    stall = node.round.stall
    some = stall.missing[:COLLECT_BATCH]
    step.get(questions.CollectStacks(stall.collecting, tuple(some)), *(f"stacks/{stall.collecting}/{t}" for t in some))


def on_stacks(node: NodeState, step: Step, answer: Answer[questions.CollectStacks, list[bytes]]) -> None:
    """Hand stacks to the agent as they come, and tell it when no more will. Those that break a rule are ignored."""
    from elastic_launch.core.progress.stack_groups import NodeStacks  # late: few jobs hang

    stall, question = node.round.stall, answer.question
    late = []
    for ticket, data in zip(question.tickets, answer.value, strict=True):
        if data:
            try:
                stacks = decode(NodeStacks, data, node.key(f"stacks/{question.stall}/{ticket}"))
            except RendezvousStateError as error:
                step.log(f"ignored stacks: {error}")
            else:
                step.notify(StacksArrived(question.stall, stacks))
        else:
            late.append(ticket)
    stall.missing = [*stall.missing[len(question.tickets) :], *late]
    if not stall.missing or (late and step.now >= stall.collect_until):
        members = node.round.members
        hosts = dict(zip(members.tickets, members.hosts, strict=True)) if members else {}
        step.notify(StacksComplete(question.stall, tuple(hosts.get(ticket, "?") for ticket in stall.missing)))
        stall.missing = []
    elif late:
        step.set_timer(Timer.COLLECT_STACKS, COLLECT_POLL)
    else:
        collect(node, step)


def report_verdict(node: NodeState, step: Step, request: ReportVerdict) -> None:
    """Tell all nodes what the stacks say, this one included."""
    from elastic_launch.core.progress.judgement import MAX_TEXT, Judgement  # late: few jobs hang

    judgement = Judgement(request.verdict, request.blamed, shortened(request.text, MAX_TEXT))
    step.write([(f"verdict/{request.number}", encode(judgement))])
    if request.number > 0 and node.round.stall.awaits_verdict:
        _hear(node, step, judgement)


def _number(node: NodeState, name: str, value: bytes) -> int:
    """Read the number of a stall or of a request; 0: there is none."""
    return number(value, node.key(name), MAX_NUMBER)
