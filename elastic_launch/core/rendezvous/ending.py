"""How a round ends, and how the nodes agree on what follows."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from elastic_launch.core.agent.messages import Ended, ReportFailure, ReportRound, ReportSuccess, RequestRestart
from elastic_launch.core.agent.restart_policy import follow
from elastic_launch.core.agent.root_cause import is_consequence
from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.heartbeats import renew_lease
from elastic_launch.core.rendezvous.leaving import acknowledge, decide
from elastic_launch.core.rendezvous.messages import Answer, KeyAppeared
from elastic_launch.core.rendezvous.monitor import number
from elastic_launch.core.rendezvous.next_round import rejoin
from elastic_launch.core.rendezvous.records import (
    MAX_FAILURES,
    MAX_LINES,
    Consequence,
    Members,
    as_lines,
    decode,
    decode_lines,
    encode,
    refused,
)
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer, enter
from elastic_launch.core.store_requests import ANSWER_LIMIT, Add, Append, Get
from elastic_launch.core.text import MAX_LISTED, listed, shortened
from elastic_launch.errors import ExitCode, ProcessFailure, RendezvousStateError
from elastic_launch.job import Change, Decision, End, EndKind, Level, RestartHistory, Silence

TRACEBACK = 60_000
"""Number of characters of the cause's traceback that the other nodes get to see."""
STDERR = 9000
"""Number of characters of what the cause wrote to stderr last that the others get to see."""
GRACE = 1.0
"""Shortest time, in seconds, that a failure which looks like a consequence waits for its cause."""
MAX_PATH = 4096
"""Number of characters of the path of an error file that the others get to see."""
NOTE = 1000
"""Number of characters of a failure's note, and of what stands in for its traceback, that the others get to see."""

# --- the agent reports


def report_failure(node: NodeState, step: Step, request: ReportFailure) -> None:
    """End the round for all nodes; if it has ended already, tell the node that decides."""
    failure, end = request.failure, node.round.end
    node.round.report.failure = failure
    if end is None:
        reason = End(EndKind.FAILED, failure.headline(), node.record.node, failures=(brief(failure),))
        step.create(questions.LearnEnd(), "end", encode(reason))
    elif end.kind is EndKind.FAILED:
        _tell_failures(node, step, [failure])


def request_restart(node: NodeState, step: Step, request: RequestRestart) -> None:
    """End the round for all nodes, because the user asks for another one. That uses up no restart."""
    end = End(EndKind.MEMBERSHIP_CHANGED, request.reason, node.record.node, change=Change.RESTART_REQUESTED)
    step.create(questions.LearnEnd(), "end", encode(end))


def report_success(node: NodeState, step: Step, request: ReportSuccess) -> None:
    """Count this node among those whose workers have succeeded."""
    node.round.report.has_succeeded = True
    node.round.report.round = ReportRound(Decision(False))
    if request.patience < float("inf"):
        step.set_timer(Timer.EXIT_BARRIER, request.patience)
    step.write([(f"succeeded/{node.round.ticket}", b"1")])
    step.ask(questions.CountFinished(), Add(node.key("succeeded"), 1))


def on_finished(node: NodeState, step: Step, answer: Answer[questions.CountFinished, int]) -> None:
    """Check whether all members have succeeded; also while leaving, because nobody else may find out."""
    if node.round.end is None and node.round.closed and answer.value >= node.round.closed.nodes:
        if node.round.members is None:
            step.read_members()
        else:
            read_finished(node, step)


def read_finished(node: NodeState, step: Step) -> None:
    """Find out whether the workers of all members have succeeded."""
    if members := node.round.members:
        step.get(questions.ReadFinished(), *(f"succeeded/{ticket}" for ticket in members.tickets))


def on_all_finished(node: NodeState, step: Step, answer: Answer[questions.ReadFinished, list[bytes]]) -> None:
    """End the round if all workers of all members have succeeded."""
    if all(answer.value):
        step.create(questions.LearnEnd(), "end", encode(End(EndKind.DONE, "all workers succeeded", node.record.node)))


def stop_waiting(node: NodeState, step: Step) -> None:
    """Leave: this node's workers succeeded long ago, and others still run."""
    if not node.record.serves:
        step.log("this node's workers have succeeded; no longer waiting for the other nodes (exit_barrier_timeout)")
        decide(node, step, Decision(False, node.restart_history(step.now)))


def report_round(node: NodeState, step: Step, request: ReportRound) -> None:
    """Report this node's part of the round, now that its workers are gone."""
    node.round.report.round, node.round.report.reported_at = request, step.now
    _report(node, step)


# --- the round ends


def on_end_appeared(node: NodeState, step: Step, appeared: KeyAppeared) -> None:
    """Read why the round has ended."""
    step.get(questions.LearnEnd(), "end")


def on_end(node: NodeState, step: Step, answer: Answer[questions.LearnEnd, list[bytes] | bytes]) -> None:
    """End the round on this node, for the reason that came first."""
    if data := questions.held(answer.value):
        end_round(node, step, data)
    elif node.round.ticket:
        step.read_own_record()  # the reason was there, and is not any more


def end_round(node: NodeState, step: Step, data: bytes, *, is_member: bool = False) -> None:
    """Act on the record that ended the round, as all nodes do.

    Args:
        node: the state.
        step: the step.
        data: the record; empty: there is none.
        is_member: whether this node was to be a member, although it has no assignment.

    Raises:
        RendezvousStateError: no node of this job can have written it.
    """
    if not data:
        return
    round_ = node.round
    end = read_end(node, data)
    if end.kind is EndKind.DONE and (round_.assignment or is_member) and not round_.report.has_succeeded:
        raise refused(node.key("end"), "says that all workers succeeded, but this node's have not")
    round_.end = end
    round_.shutdown.stops_job &= end.mine  # otherwise another reason came first
    enter(node, Phase.ENDED)
    step.await_key("decision" if end.kind is EndKind.FAILED else "stop_at" if round_.awaits_stop else None)
    history = node.restart_history(step.now)
    round_.decision = decision_after(end, history, is_late=round_.is_late)
    match end.kind:
        case EndKind.FAILED:
            if round_.report.failure and not end.mine:
                _tell_failures(node, step, [round_.report.failure])
            elif end.mine and end.failures and is_consequence(end.failures[0]):
                step.read_members()  # to find out whether the loss of a node was the cause
            if round_.ticket and not end.mine:
                step.write([(f"seen/{round_.ticket}", b"1")])
            replace_stranger(node, step)
        case EndKind.STOP:
            renew_lease(node, step)
    if end.change is Change.NODE_LOST and node.record.node in end.gone:
        step.lease_until = step.now  # the others go on without this node, whatever it had heard before
    if round_.assignment is None and end.mine and end.change is Change.NODE_LOST:
        step.log(end.reason)  # this spare is the only one to know, if no member is left
    node.decided_at = step.now
    if round_.assignment and not round_.heartbeat.is_fenced:
        round_.report.round = None  # a node whose workers have succeeded reports this round again
        step.notify(Ended(end, 0.0))
    _report(node, step)


def read_end(node: NodeState, data: bytes) -> End:
    """Read the record that ended the round.

    Raises:
        RendezvousStateError: no node of this job can have written it.
    """
    end = decode(End, data, node.key("end"))
    return end._replace(mine=end.node == node.record.node)


def decision_after(end: End, history: RestartHistory, *, is_late: bool = False) -> Decision | None:
    """Return what follows a round that has ended; None: that remains to be decided.

    Args:
        end: how it ended.
        history: the job's restart history.
        is_late: whether the node came when the round was over.
    """
    match end.kind:
        case EndKind.MEMBERSHIP_CHANGED:
            return Decision(True, history, gone=end.gone)
        case EndKind.STOP:
            return Decision(False, history, signum=end.signum)
        case EndKind.DONE:
            return Decision(False, history)
        case EndKind.ERROR:  # nodes that come after others have not met may have better luck
            again = is_late and end.status != ExitCode.UNAVAILABLE
            return Decision(again, history, error="" if again else end.reason, status=end.status)
    return None


def _decider(end: End, members: Members) -> str:
    """Return the id of the node that decides what follows a failure: the one that had it, if it is a member."""
    return end.node if end.node in members.nodes else members.nodes[0]


def deciding_ticket(node: NodeState) -> int:
    """Return the ticket of the member that the others wait for to decide what follows a failure; 0: for none."""
    end, members = node.round.end, node.round.members
    if end is None or members is None or end.kind is not EndKind.FAILED or node.round.decision:
        return 0
    return members.tickets[members.nodes.index(_decider(end, members))]


def replace_stranger(node: NodeState, step: Step) -> None:
    """Decide what follows a failure if no member had it: nobody else would. The first in rank does that."""
    round_, end, members = node.round, node.round.end, node.round.members
    if end and members and end.node not in members.nodes and deciding_ticket(node) == round_.ticket:
        _restart_after_stranger(node, step, end)


def _restart_after_stranger(node: NodeState, step: Step, end: End, gone: tuple[str, ...] = ()) -> None:
    who = end.node or "a node"
    step.log(f"the round was ended by {who}, which is no member; restarting without using up a restart")
    step.decide_next(Decision(True, node.restart_history(step.now), gone=gone))


def lose_members(node: NodeState, step: Step, nodes: list[str], hosts: str, reason: str = "") -> None:
    """End the round because members are lost; the reason is their silence unless ``reason`` names another one.

    If it has ended already, this node decides what follows, if the lost ones were to do so, or if their loss explains
    its own failure; else it tells the node that decides.
    """
    round_, end, me = node.round, node.round.end, node.record.node
    reason = reason or f"no heartbeat from {hosts} for {node.settings.keep_alive_deadline:g} s"
    silent = _silent(node)
    if end is None:
        gone = tuple(nodes)
        end = End(EndKind.MEMBERSHIP_CHANGED, reason, me, gone, change=Change.NODE_LOST, silent=silent)
        step.create(questions.LearnEnd(), "end", encode(end))
    elif end.kind is not EndKind.FAILED or round_.decision is not None:
        return
    elif round_.report.grace_ends is not None:
        step.log(f"{reason}, which caused this failure; restarting without using up a restart", Level.INFO)
        step.decide_next(Decision(True, node.restart_history(step.now), gone=tuple(nodes), silent=silent))
    elif round_.members and end.node not in round_.members.nodes and _decider(end, round_.members) in nodes:
        _restart_after_stranger(node, step, end, tuple(nodes))
    elif end.node in nodes:
        step.log(f"{reason}, before it decided what follows its failure; deciding in its place", Level.INFO)
        decision = follow(node.settings.policy, node.restart_history(step.now), end.failures, end.node)
        step.decide_next(decision._replace(gone=tuple(nodes), silent=silent))
    elif not end.mine:
        step.create(questions.Write(), "lost", encode(End(EndKind.MEMBERSHIP_CHANGED, hosts, me, tuple(nodes))))


def _silent(node: NodeState) -> tuple[Silence, ...]:
    """Return the members that have been silent for a while, whether or not they are lost."""
    monitor = node.round.monitor or node.round.watch
    return monitor.silences(node.settings.keep_alive_interval / 2) if monitor else ()


# --- the nodes report the round


def _report(node: NodeState, step: Step) -> None:
    """After a failure, report this node's part to the node that decides; go on if it has decided."""
    round_ = node.round
    own, end = round_.report.round, round_.end
    if own and end and end.kind is EndKind.FAILED and round_.decision is None:
        if not end.mine:
            _tell_failures(node, step, own.decision.failures)
        step.ask(questions.CountReported(), Add(node.key("reported"), 1))
    conclude(node, step)


def _tell_failures(node: NodeState, step: Step, failures: Iterable[ProcessFailure]) -> None:
    """Report failures to the node that decides: consequences, or the cause if its own failure is a consequence."""
    told = node.round.report.told
    nodes = node.round.closed.nodes if node.round.closed else 1
    most = max(1, min(MAX_LISTED, MAX_LINES // 8 // nodes))  # one node reads them all
    new = [failure for failure in failures if failure.rank not in told][:most]
    told |= {failure.rank for failure in new}
    if new:
        lines = as_lines(encode(Consequence(brief(failure), node.record.node)) for failure in new)
        step.ask(questions.Write(), Append(node.key("consequences"), lines))


def on_reported(node: NodeState, step: Step, answer: Answer[questions.CountReported, int]) -> None:
    """Tell all nodes if all have reported; read the reports if this node decides."""
    if node.round.closed and answer.value >= node.round.closed.nodes:
        step.write([("all_reported", b"1")])
    if node.round.end and node.round.end.mine:
        read_consequences(node, step)


def read_consequences(node: NodeState, step: Step) -> None:
    """Read the other nodes' failures, how many nodes have reported, which are lost, and who knows of the end."""
    round_ = node.round
    own = round_.report.round.decision.failures if round_.report.round else ()
    tickets = _others(node) if own and all(map(is_consequence, own)) else ()
    names = ["consequences", "reported", "lost", f"members/{round_.closed.leader if round_.closed else 0}"]
    names += [f"seen/{ticket}" for ticket in tickets]
    step.ask(questions.ReadConsequences(tickets), Get(tuple(map(node.key, names)), ANSWER_LIMIT))  # appended to


def _others(node: NodeState) -> tuple[int, ...]:
    """Return the tickets of the other members, as far as they are known, except those that may be silent."""
    members = node.round.members.tickets if node.round.members else ()
    return tuple(sorted(set(members) - {node.round.ticket} - node.round.finished))


def on_consequences(node: NodeState, step: Step, answer: Answer[questions.ReadConsequences, list[bytes]]) -> None:
    """Decide what follows. The cause is this node's failure, unless that is plainly the consequence of another.

    In that case the others get a little time to report the cause: until all have reported, or for ``GRACE``. And all
    must have written that they know of the end, because the cause may be the death of a node.
    """
    round_ = node.round
    if round_.report.round is None or round_.assignment is None or round_.decision is not None:
        return
    also, reported, lost, everybody, *seen = answer.value
    if round_.members is None and everybody:
        take_members(node, everybody)
    own = {failure.rank: failure for failure in round_.report.round.decision.failures}
    found = {line.failure.rank: (line.failure, line.node) for line in _reports(node, step, also)}
    found |= {rank: (failure, node.record.node) for rank, failure in own.items()}
    failures = sorted(found.values(), key=lambda it: (is_consequence(it[0]), it[0].rank not in own))
    has_cause = bool(failures) and not is_consequence(failures[0][0])
    if own and not has_cause:
        known = {ticket for ticket, value in zip(answer.question.tickets, seen, strict=True) if value}
        if not _has_heard_of_all(node, step, number(reported, node.key("reported")), known):
            _wait_for_cause(node, step)
            if lost:
                _take_lost(node, step, lost)
            _give_up_on_silent(node, step, known)
            return
    history, port = node.restart_history(step.now), round_.assignment.picked_port
    may_restart = round_.report.round.may_restart
    if not own and not has_cause:  # others' consequences are those of what ended the round, which was no failure
        _decide_without_failure(node, step, may_restart)
        return
    cause_node = failures[0][1]
    told = bounded([failure for failure, _ in failures])
    step.decide_next(follow(node.settings.policy, history, told, cause_node, port, may_restart))


def _decide_without_failure(node: NodeState, step: Step, may_restart: bool) -> None:
    """Decide what follows a round that was ended in this node's name, without a failure of its own or of another."""
    text = f"the round was ended in the name of {node.record.host}, where nothing has failed"
    if may_restart:
        step.log(f"{text}; restarting without using up a restart")
        step.decide_next(Decision(True, node.restart_history(step.now)))
    else:
        step.decide_next(Decision(False, node.restart_history(step.now), error=text, status=ExitCode.UNAVAILABLE))


def _reports(node: NodeState, step: Step, data: bytes) -> list[Consequence]:
    """Return the failures that members have reported. Others cannot be members' and are ignored."""
    members = node.round.members
    ids = set(members.nodes) if members else set[str]()
    reports = decode_lines(Consequence, data, node.key("consequences"), step.log)
    return [report for report in reports if report.node in ids]


def _take_lost(node: NodeState, step: Step, data: bytes) -> None:
    """Take a node's word for it that members are lost, if they are members."""
    members = node.round.members
    try:
        end = decode(End, data, node.key("lost"))
    except RendezvousStateError as error:
        step.log(f"ignored: {error}")
        return
    if members and end.gone and set(end.gone) <= set(members.nodes):
        lose_members(node, step, list(end.gone), end.reason)


def take_members(node: NodeState, data: bytes) -> None:
    """Learn who the members of the round are.

    Raises:
        RendezvousStateError: no leader of this round can have written it.
    """
    round_ = node.round
    assert round_.closed, "members are read once the round has closed"
    key = node.key(f"members/{round_.closed.leader}")
    members = decode(Members, data, key)
    if len(members.nodes) != round_.closed.nodes:
        raise refused(key, f"must name {round_.closed.nodes} nodes, not {len(members.nodes)}")
    if round_.assignment and members.nodes[round_.assignment.group_rank] != node.record.node:
        raise refused(key, f"must name {node.record.node} at its rank, {round_.assignment.group_rank}")
    round_.members = members


def _wait_for_cause(node: NodeState, step: Step) -> None:
    report = node.round.report
    if report.grace_ends is None:
        report.grace_ends = step.now + GRACE
        step.await_key("all_reported")
        step.read_members()
    step.set_timer(Timer.CAUSE_GRACE, min(GRACE, node.settings.tick))


def _has_heard_of_all(node: NodeState, step: Step, reported: int, known: Set[int]) -> bool:
    """Return whether all members live, and have reported or had time to.

    Args:
        node: the state.
        step: the step.
        reported: how many have reported. Counters prove nothing: a stranger may have changed them, or heartbeats.
        known: tickets of other members that have written that they know of the end.
    """
    round_, ends = node.round, node.round.report.grace_ends
    if round_.closed is None or round_.closed.nodes == 1:
        return True
    if round_.members is None or not known >= set(_others(node)):
        return False
    return reported >= round_.closed.nodes or (ends is not None and step.now >= ends)


def _give_up_on_silent(node: NodeState, step: Step, known: Set[int]) -> None:
    """Treat members as lost that do not learn of the end although heartbeats come in their names.

    Their loss would have been noticed by then, unless somebody else sends the heartbeats.
    """
    members, ends = node.round.members, node.round.report.grace_ends
    silent = set(_others(node)) - known
    patience = 2 * node.settings.keep_alive_deadline
    if members and silent and ends is not None and step.now >= ends + patience and node.round.decision is None:
        who = [at for at, ticket in enumerate(members.tickets) if ticket in silent]
        step.log(
            f"{listed(members.hosts[at] for at in who)} did not notice this failure for {patience:g} s, and may have "
            "caused it; restarting without using up a restart"
        )
        gone = tuple(members.nodes[at] for at in who)
        step.decide_next(Decision(True, node.restart_history(step.now), gone=gone))


# --- what follows


def on_key(node: NodeState, step: Step, appeared: KeyAppeared) -> None:
    """Read the decision or what it depends on, or note that all nodes know that the job has ended."""
    match appeared.key.rpartition("/")[2]:
        case "decision":
            step.get(questions.LearnDecision(), "decision")
        case "all_reported":
            step.await_key("decision")
            read_consequences(node, step)
        case "stop_at":
            step.get(questions.LearnStopAt(), "stop_at")
        case "all_left":
            node.round.shutdown.is_empty = True


def on_decision(node: NodeState, step: Step, answer: Answer[questions.LearnDecision, list[bytes] | bytes]) -> None:
    """Do what was decided first."""
    if (data := questions.held(answer.value)) and node.round.decision is None:
        node.round.decision, node.decided_at = read_decision(node, data), step.now
        node.awaited_key = None
        node.timers.pop(Timer.CAUSE_GRACE, None)
        conclude(node, step)


def read_decision(node: NodeState, data: bytes) -> Decision:
    """Read what was decided after a failure.

    Raises:
        RendezvousStateError: no node of this job can have written it.
    """
    decision, longest = decode(Decision, data, node.key("decision")), node.settings.policy.backoff_limit
    if decision.pause > longest:
        raise refused(
            node.key("decision"), f"pause: must be at most {longest:g} s (--restart-backoff), not {decision.pause:g}"
        )
    return decision


def conclude(node: NodeState, step: Step) -> None:
    """Go on, once it is decided what follows and the agent, if it had workers, has reported the round."""
    round_, decision = node.round, node.round.decision
    if decision is None or node.phase is Phase.LEAVING:
        return
    if not decision.restart and not round_.awaits_stop:
        acknowledge(node, step)
    if round_.assignment is None and decision.restart and node.has_check:
        decide(node, step, decision)  # the agent joins when the check has passed
    elif round_.assignment is None and decision.restart:
        rejoin(node, step)
    elif round_.assignment is None or round_.report.round is not None:
        decide(node, step, _as_latecomer(node, step, decision) if round_.is_late else decision)


def _as_latecomer(node: NodeState, step: Step, decision: Decision) -> Decision:
    """Return what the end of a job means to a node that came when it was over."""
    end, job = node.round.end, f"job {node.settings.run_id}"
    if end and end.kind is EndKind.DONE:
        step.log(f"{job} has already ended successfully; nothing to do (use another --rdzv-id for a new job)")
    elif end and end.kind is EndKind.STOP:
        text = f"{job} has already been stopped: {end.reason}; use another --rdzv-id for a new job"
        return Decision(False, error=text, status=ExitCode.UNAVAILABLE)
    elif end and end.kind is EndKind.FAILED:
        step.log(f"{job} has already failed, as reported below; use another --rdzv-id for a new job")
    return decision


def bounded(failures: Sequence[ProcessFailure]) -> tuple[ProcessFailure, ...]:
    """Return the failures that every node gets to see, the cause first and in full: not too many, nor too long."""
    return (*map(cut, failures[:1]), *map(brief, failures[1:MAX_FAILURES]))


def brief(failure: ProcessFailure) -> ProcessFailure:
    """Return a failure without its traceback, for a list of many."""
    stderr = (
        failure.stderr[-NOTE:] if failure.exitcode == -signal.SIGABRT else ""
    )  # it may show that this is a consequence
    return replace(_within_limits(failure), traceback="", stderr=stderr)


def cut(failure: ProcessFailure) -> ProcessFailure:
    """Return a failure of moderate size, because every node reads it."""
    return replace(
        _within_limits(failure), traceback=shortened(failure.traceback, TRACEBACK), stderr=failure.stderr[-STDERR:]
    )


def _within_limits(failure: ProcessFailure) -> ProcessFailure:
    return replace(
        failure, error=failure.error_line(), note=failure.note[:NOTE], error_file=failure.error_file[:MAX_PATH]
    )
