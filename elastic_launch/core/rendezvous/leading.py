"""The leader of a round: it gathers the nodes that join, and closes the round."""

from __future__ import annotations

from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.heartbeats import poll_in_time, reset
from elastic_launch.core.rendezvous.leader import Form, Later, Leader, Refuse
from elastic_launch.core.rendezvous.messages import Answer, KeyAppeared
from elastic_launch.core.rendezvous.monitor import number
from elastic_launch.core.rendezvous.next_round import rejoin
from elastic_launch.core.rendezvous.progress import joined_of, log_departures, log_unfit, publish
from elastic_launch.core.rendezvous.ranks import assign
from elastic_launch.core.rendezvous.records import (
    Closed,
    Members,
    NodeRecord,
    Unfit,
    decode,
    decode_lines,
    encode,
    refused,
)
from elastic_launch.core.rendezvous.state import BATCH, NodeState, Step, Timer
from elastic_launch.core.store_requests import ANSWER_LIMIT, Get
from elastic_launch.core.text import MAX_LISTED, counted
from elastic_launch.errors import ExitCode, RendezvousStateError
from elastic_launch.job import Decision, End, EndKind, Level, LineKind

MOST_READS = 16
"""Most requests for records that are on their way. Their answers together must not take as long as a lost store."""


def become_leader(node: NodeState, step: Step) -> None:
    """Begin to gather the nodes of the round."""
    round_ = node.round
    round_.leader = Leader(node.settings, node.record, round_.leaders, round_.number, step.now, node.began_at)
    step.await_key("node/1")
    step.set_timer(Timer.LEADER_POLL, node.settings.tick)
    past = ("ticket", "end", "decision", "closed", "unfit") if round_.number else ()
    keys = node.round_key, *(node.key(name, back=1) for name in past)
    step.ask(questions.ReadPastRound(), Get(keys, ANSWER_LIMIT))  # "unfit" is appended to


def stand_down(node: NodeState, step: Step) -> None:
    """Stop leading, because another node took over while this one slept."""
    node.round.leaders += 1
    node.round.leader = None
    node.round.heartbeat.monitored_at = step.now
    for timer in (Timer.LEADER_POLL, Timer.LAST_CALL):
        node.timers.pop(timer, None)
    step.await_key("closed")


# --- the round before


def on_past_round(node: NodeState, step: Step, answer: Answer[questions.ReadPastRound, list[bytes]]) -> None:
    """Learn how the round before ended, and ask which nodes were in it.

    This node may have slept before it drew its ticket. Then it leads a round that is over, and perhaps deleted.
    """
    current, *past = answer.value
    if number(current, node.round_key) > node.round.number:
        rejoin(node, step)
        return
    if not past:
        return
    count, end, following, closed, unfit = past
    ended = decode(End, end, node.key("end", back=1)) if end else None
    gone, silent = (ended.gone, ended.silent) if ended else ((), ())
    history = decode(Closed, closed, node.key("closed", back=1)).restart_history if closed else None
    if following:
        decision = decode(Decision, following, node.key("decision", back=1))
        gone, silent, history = gone + decision.gone, silent + decision.silent, decision.restart_history
    if node.round.leader:
        node.round.leader.note_past_silences(silent, step.now)
        node.round.leader.past_restart_history = history
        notes = decode_lines(Unfit, unfit, node.key("unfit", back=1), step.log)
        node.round.leader.past_host = next((note.record.node for note in notes if note.record.serves), "")
    tickets = range(1, node.count_tickets(count, back=1) + 1)
    keys = tuple(node.key(f"node/{ticket}", back=1) for ticket in tickets)
    step.ask(questions.ReadPastNodes(keys, gone), Get(keys))


def on_past_nodes(node: NodeState, step: Step, answer: Answer[questions.ReadPastNodes, list[bytes]]) -> None:
    """Expect the nodes that were in the round before."""
    if leader := node.round.leader:
        keys, gone = answer.question.keys, answer.question.gone
        records = [(t, _read_record(node, step, data, keys[t - 1])) for t, data in enumerate(answer.value, 1) if data]
        leader.note_past([(ticket, record) for ticket, record in records if record], gone)
        consider(node, step)


# --- who joins


def on_arrival(node: NodeState, step: Step, appeared: KeyAppeared) -> None:
    """Count the tickets: the record that the leader waited for is there."""
    if node.round.leader:
        node.round.leader.appeared = appeared.key
    step.get(questions.CountTickets(), "ticket")


def on_tickets(node: NodeState, step: Step, answer: Answer[questions.CountTickets, list[bytes]]) -> None:
    """Read the records of the nodes that have come."""
    if leader := node.round.leader:
        leader.note_tickets(node.count_tickets(answer.value[0]), step.now)
        _read_missing(node, step, leader)


def on_records(node: NodeState, step: Step, answer: Answer[questions.ReadRecords, list[bytes]]) -> None:
    """Note the nodes that have come, and close the round if that is possible."""
    leader = node.round.leader
    if leader is None or leader.is_closing or leader.number != answer.question.leader:
        return
    leader.reads -= 1
    for ticket, data in zip(answer.question.tickets, answer.value, strict=True):
        if not data:
            continue
        record = _read_record(node, step, data, node.key(f"node/{ticket}"))
        if record is None:
            leader.ignore(ticket)
            continue
        leader.note_nodes([(ticket, record)], step.now)
        is_new = ticket in leader.joined and ticket != node.round.ticket and leader.is_new(record)
        if is_new and node.settings.max_nodes <= MAX_LISTED:  # not those that the previous leader has logged
            text = f"{record.host} has joined: {joined_of(node, len(leader.joined))}"
            step.log(text, Level.INFO, LineKind.PROGRESS)
    _read_records(node, step, leader)
    if not leader.reads:
        consider(node, step)


def _read_record(node: NodeState, step: Step, data: bytes, key: str) -> NodeRecord | None:
    """Decode the record of a node; None, with a line, if it breaks a rule, so that its writer is no node of this job.

    Raises:
        RendezvousStateError: it does, and stands in place of this node's own.
    """
    try:
        record = decode(NodeRecord, data, key)
        if record.known_round >= node.round.number:
            raise refused(key, f"known_round: must be below {node.round.number}, not {record.known_round}")
    except RendezvousStateError as error:
        if key == node.key(f"node/{node.round.ticket}"):
            raise
        step.log(f"ignored a node: {error}")
        return None
    return record


def _read_missing(node: NodeState, step: Step, leader: Leader) -> None:
    """Read the records that have not come, each once. If some are being read, the others' turn comes after these."""
    if not leader.reads:
        leader.to_read = list(leader.missing)
        _read_records(node, step, leader)


def _read_records(node: NodeState, step: Step, leader: Leader) -> None:
    """Keep some requests on their way: one after another would take a second for each where the store is busy."""
    while leader.to_read and leader.reads < MOST_READS:
        some, leader.to_read = leader.to_read[:BATCH], leader.to_read[BATCH:]
        leader.reads += 1
        step.get(questions.ReadRecords(leader.number, some), *(f"node/{ticket}" for ticket in some))
    if not leader.reads and not leader.is_closing:
        name = f"node/{leader.next_ticket(step.now)}"
        # If a stranger has written it, it is there already, and waiting for it would cost a request after another.
        step.await_key(name if node.key(name) != leader.appeared else None)


# --- who goes


def poll(node: NodeState, step: Step) -> None:
    """Poll the heartbeats, the tickets, and whether another node has taken over."""
    step.set_timer(Timer.LEADER_POLL, node.settings.tick)
    leader = node.round.leader
    if leader and not leader.monitor.awaits_reply:
        leader.monitor.awaits_reply = True
        leader.appeared = ""
        joined = [*leader.joined, *leader.unconfirmed]
        past = {id_: ticket for id_, (ticket, _) in (leader.expected or {}).items()}
        names = [
            "closed",
            f"leader/{node.round.leaders + 1}",
            "ticket",
            "unfit",
            *(f"heartbeat/{ticket}" for ticket in joined),
        ]
        past_keys = (node.key(f"heartbeat/{ticket}", back=1) for ticket in past.values())
        keys = node.round_key, *map(node.key, names), *past_keys
        step.ask(questions.PollJoining(joined, past, step.now), Get(keys, ANSWER_LIMIT))  # "unfit" is appended to
        publish(node, step, leader)


def on_joining(node: NodeState, step: Step, answer: Answer[questions.PollJoining, list[bytes]]) -> None:
    """Drop nodes that are silent; stop leading if another node has taken over."""
    leader = node.round.leader
    if leader is None or leader.is_closing:
        return
    current, closed, successor, count, unfit, *counters = answer.value
    joined, past, asked_at = answer.question.joined, answer.question.past, answer.question.asked_at
    if number(current, node.round_key) > node.round.number:
        rejoin(node, step)  # the store had forgotten the number; nodes that remembered it are ahead
    elif closed or successor:
        stand_down(node, step)
    else:
        poll_in_time(node, step, Timer.LEADER_POLL, asked_at)
        if grown := leader.poll(list(zip(joined, counters, strict=False)), step.now, asked_at):
            reset(node, step, grown, asked_at)
        before = list(zip(past.values(), counters[len(joined) :], strict=True))
        leader.poll_past(list(past), before, step.now, asked_at)
        _note_unfit(node, step, leader, unfit)
        log_departures(node, step, leader)
        leader.note_tickets(node.count_tickets(count), step.now)
        _read_missing(node, step, leader)
        consider(node, step)


def _note_unfit(node: NodeState, step: Step, leader: Leader, data: bytes) -> None:
    """Note the nodes whose health check fails, by the notes that have come since the last poll."""
    since = leader.unfit_read if leader.unfit_read <= len(data) else 0
    leader.unfit_read = len(data)
    new = leader.note_unfit(decode_lines(Unfit, data[since:], node.key("unfit"), step.log))
    for note in new[:MAX_LISTED]:
        log_unfit(step, note, leader.is_enough)
    if len(new) > MAX_LISTED:
        step.log(f"health check failed on {counted(len(new) - MAX_LISTED, 'more node')}", Level.INFO)


# --- what follows


def consider(node: NodeState, step: Step) -> None:
    """Close the round if the leader can."""
    leader = node.round.leader
    if leader is None or leader.is_closing:
        return
    match leader.decide(step.now):
        case Form(members, spares):
            _close(node, step, leader, members, spares)
        case Refuse(reason, ExitCode.UNAVAILABLE as status):
            leader.is_closing = True
            step.get(questions.ReadLeaving(reason, status), "leaving")
        case Refuse(reason, status):
            refuse(node, step, reason, status)
        case Later(seconds):
            step.set_timer(Timer.LAST_CALL, seconds)


def _close(node: NodeState, step: Step, leader: Leader, members: list[int], spares: list[int]) -> None:
    leader.is_closing = True
    leader.lost += [record.host for record in leader.unconfirmed.values()]
    log_departures(node, step, leader)
    node.awaited_key = None
    records = [leader.joined[ticket] for ticket in members]
    host = leader.host
    store_port = node.settings.store_port
    assignments = assign(
        records,
        host.address if host and host.named else "",  # empty: each node uses the address by which it reaches the store
        store_port and ((host.port if host else 0) or store_port),
        restart_count=node.round.number,
        restart_history=leader.restart_history(step.now),
    )
    step.write((f"assignment/{leader.number}/{t}", encode(a)) for t, a in zip(members, assignments, strict=True))
    everybody = Members(
        tuple(members),
        tuple(record.node for record in records),
        tuple(record.host for record in records),
        tuple(record.rank for record in records),
    )
    step.write([(f"members/{leader.number}", encode(everybody))])
    history = assignments[0].restart_history
    closed = Closed(leader.number, len(members), leader.tickets, tuple(spares), node.record.options, history)
    leader.closing = encode(closed)
    step.create(questions.CloseRound(step.now), "closed", leader.closing)


def on_leaving(node: NodeState, step: Step, answer: Answer[questions.ReadLeaving, list[bytes]]) -> None:
    """End the job, as a signal to one of its nodes would have done while the workers ran, or because nodes are lost."""
    reason, status, signum = answer.question.reason, answer.question.status, 0
    if answer.value[0]:
        end = decode(End, answer.value[0], node.key("leaving"))
        if end.kind is EndKind.STOP:
            reason, signum = end.reason, end.signum
    refuse(node, step, reason, status, signum)


def refuse(node: NodeState, step: Step, reason: str, status: int, signum: int = 0) -> None:
    """End the job for all nodes before this round has begun: with an exit status, or by a signal."""
    leader = node.round.leader
    if leader:
        leader.is_closing = True
    end = End(EndKind.ERROR, reason, node.record.node, status=status)
    if signum:
        end = End(EndKind.STOP, reason, node.record.node, signum=signum)
    step.create(questions.LearnEnd(), "end", encode(end))
    tickets = max(node.round.ticket, leader.tickets if leader else 0)
    step.create(
        questions.Write(), "closed", encode(Closed(-1, 0, tickets, restart_history=node.record.restart_history))
    )
