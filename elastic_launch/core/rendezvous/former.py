"""An agent that was started again finds its former self in the round, and tells the others that it is gone.

Otherwise they would wait for it up to the deadline. Only an agent on the same host can know better: it sees the pids.
"""

from __future__ import annotations

from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.ending import take_members
from elastic_launch.core.rendezvous.messages import AgentId, AgentsGone, Answer
from elastic_launch.core.rendezvous.monitor import LEFT
from elastic_launch.core.rendezvous.monitoring import check
from elastic_launch.core.rendezvous.records import Closed, Members, NodeRecord, decode
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer
from elastic_launch.core.store_requests import Add, Get
from elastic_launch.core.text import counted, listed
from elastic_launch.errors import RendezvousStateError
from elastic_launch.job import Level

MAX_SPARES = 16
"""Most spares that are looked at."""
MAX_FORMER = 64
"""Most nodes of this host that are looked at."""


def begin(node: NodeState, step: Step) -> None:
    """Begin to look if the agent was started recently. Later, its former self has missed the deadline anyway."""
    born_at = step.now if node.born_at is None else node.born_at
    node.born_at = born_at
    node.round.replaced = {}
    is_new = node.record.previous_rank < 0 and step.now < born_at + node.settings.keep_alive_deadline
    if is_new and node.record.space and (node.round.number or node.phase is Phase.OUTSIDE):
        step.set_timer(Timer.FORMER, 0.0)


def look(node: NodeState, step: Step) -> None:
    """Ask who is in the running round; while nodes join, who was in the one before, because they wait for those."""
    past = node.phase is Phase.WAITING
    step.ask(questions.FindFormer(past), Get((node.key("closed", back=past),)))


def on_closed_found(node: NodeState, step: Step, answer: Answer[questions.FindFormer, list[bytes]]) -> None:
    """Ask for the members."""
    past, data = answer.question.past, answer.value[0]
    if data and _is_current(node, past):
        closed = decode(Closed, data, node.key("closed", back=past))
        question = questions.FindFormerMembers(past, closed.spares[:MAX_SPARES])
        step.ask(question, Get((node.key(f"members/{closed.leader}", back=past),)))


def on_members_found(node: NodeState, step: Step, answer: Answer[questions.FindFormerMembers, list[bytes]]) -> None:
    """Ask for the records of the members on this host, and of the spares."""
    past, data = answer.question.past, answer.value[0]
    if not data or not _is_current(node, past):
        return
    members = decode(Members, data, node.key("members", back=past))
    if not past and node.round.members is None:
        take_members(node, data)
    hosts = zip(members.tickets, members.hosts, strict=True)
    here = [ticket for ticket, host in hosts if host == node.record.host][:MAX_FORMER]
    if tickets := sorted({*here, *answer.question.spares} - {0 if past else node.round.ticket}):
        keys = tuple(node.key(f"node/{ticket}", back=past) for ticket in tickets)
        step.ask(questions.ReadFormer(past, tickets), Get(keys))


def on_records(node: NodeState, step: Step, answer: Answer[questions.ReadFormer, list[bytes]]) -> None:
    """Have the caller look for those agents that share this one's pids, and ask again soon if one may still run."""
    past, tickets, own = answer.question.past, answer.question.tickets, node.record
    if not _is_current(node, past):
        return
    found = []
    for ticket, data in zip(tickets, answer.value, strict=True):
        if ticket in node.round.replaced:
            continue
        try:
            record = decode(NodeRecord, data, node.key(f"node/{ticket}", back=past))
        except RendezvousStateError:
            continue  # it is gone, or who leads says what is wrong
        if record.space == own.space and record.node != own.node and record.started:
            found.append(AgentId(ticket, record.pid, record.started))
    step.looks_for = tuple(found)
    if step.looks_for and step.now < (node.born_at or 0.0) + node.settings.keep_alive_deadline:
        step.set_timer(Timer.FORMER, node.settings.tick)


def on_gone(node: NodeState, step: Step, given: AgentsGone) -> None:
    """Tell the others which agents are gone: end the round, or have the leader of the next one not wait for them."""
    gone = given.agents
    node.round.replaced |= {agent.ticket: agent.pid for agent in gone}
    if node.phase is Phase.OUTSIDE:
        check(node, step, [agent.ticket for agent in gone])
        return
    for agent in gone:
        step.ask(questions.Write(), Add(node.key(f"heartbeat/{agent.ticket}", back=1), LEFT))
    if gone:
        pids = f"{'pid' if len(gone) == 1 else 'pids'} {listed(str(agent.pid) for agent in gone)}"
        text = f"this agent replaces {counted(len(gone), 'agent')} of the same host, now gone ({pids})"
        step.log(text, Level.INFO)


def _is_current(node: NodeState, past: bool) -> bool:
    """Whether the node is still where it was when it asked."""
    return past == (node.phase is Phase.WAITING)
