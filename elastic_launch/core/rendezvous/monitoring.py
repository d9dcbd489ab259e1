"""A running round is monitored: by the monitor, and by the nodes that notice when it is lost."""

from __future__ import annotations

from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.ending import deciding_ticket, lose_members, read_finished
from elastic_launch.core.rendezvous.heartbeats import confirm_poll, lease_ends, poll_in_time, renew_lease, reset
from elastic_launch.core.rendezvous.leading import become_leader
from elastic_launch.core.rendezvous.messages import Answer
from elastic_launch.core.rendezvous.monitor import LEFT, LOOK, TAKE_OVER, Monitor, without_flag
from elastic_launch.core.rendezvous.records import Members
from elastic_launch.core.rendezvous.stalling import check_claims, learn_look, pass_on_look
from elastic_launch.core.rendezvous.state import Heartbeat, NodeState, Phase, Step, Timer
from elastic_launch.core.text import listed

DOUBT = 3
"""Number of polls that a monitor must have missed before it seems to be silent."""


def on_heartbeat(node: NodeState, step: Step, answer: Answer[questions.SendHeartbeat, int]) -> None:
    """Renew the lease. A counter that has not been reset for too long shows that nobody monitors this node."""
    round_, heartbeat, count = node.round, node.round.heartbeat, answer.value
    if LOOK <= count < LEFT:
        count %= LOOK
        learn_look(node, step)
    heartbeat.in_flight = False
    was_reset = may_have_been_reset(heartbeat, count)
    if step.now >= lease_ends(node, round_.assignment):
        heartbeat.has_lapsed = True
    elif count <= heartbeat.count:
        heartbeat.has_lapsed = False
    late = heartbeat.sent_at - heartbeat.answered_at - node.heartbeat_period
    heartbeat.monitored_at += max(0.0, late - node.settings.outage)  # this node or the store slept, not the monitor
    heartbeat.answered_at = heartbeat.sent_at
    renew_lease(node, step)
    if was_reset:
        heartbeat.monitored_at = step.now
        round_.watch = None
        node.timers.pop(Timer.WATCH, None)
    heartbeat.count = count
    _doubt_monitor(node, step)
    due = heartbeat.monitored_at + node.settings.keep_alive_deadline
    if (
        node.phase in (Phase.MEMBER, Phase.OUTSIDE)
        and round_.closed
        and round_.closed.nodes > 1
        and not node.is_watcher
    ):
        due += node.settings.keep_alive_interval  # until then a watcher, which knows of other losses, ends the round
    # Not later: then the leader had closed the round before it left.
    is_heir = count >= TAKE_OVER and node.phase is Phase.WAITING
    if heartbeat.sent_at >= due or is_heir:
        if node.phase is Phase.WAITING and round_.leader is None:
            heartbeat.monitored_at = step.now
            step.create(questions.TakeOverLeading(), f"leader/{round_.leaders + 1}", b"%d" % round_.ticket)
        elif node.phase is not Phase.WAITING and not (round_.assignment and round_.assignment.group_rank == 0):
            _on_silent_monitor(node, step)
    elif step.now < due and Timer.HEARTBEAT in node.timers:
        on_time = max(step.now, heartbeat.sent_at + node.heartbeat_period)  # the timer may have waited for this answer
        node.timers[Timer.HEARTBEAT] = min(node.timers[Timer.HEARTBEAT], on_time, due)


def may_have_been_reset(heartbeat: Heartbeat, count: int) -> bool:
    """Return whether the monitor may have reset the counter since the last answer. If not, it is silent.

    After a reset the counter is 1, and more only by heartbeats that were sent twice. Each of them explains one more. A
    counter that nobody resets grows beyond that, so a dead monitor is noticed a few heartbeats later at most.
    """
    if heartbeat.count == 0 or heartbeat.count < TAKE_OVER <= count:
        return True  # there was nothing to reset before, or the leader has written over it
    if heartbeat.count < count <= heartbeat.repeats + 1:
        return True  # perhaps
    was_reset = count <= heartbeat.count
    have_come = count - 1 if was_reset else count - heartbeat.count - 1
    heartbeat.repeats = max(0, heartbeat.repeats - have_come)
    return was_reset


def _doubt_monitor(node: NodeState, step: Step) -> None:
    """Begin to watch the other members if the monitor seems to be silent, in case they were lost at the same time.

    Their silence counts from the first look; if the monitor were the only one to count it, it would be lost with it.
    """
    round_, silent_since = node.round, node.round.heartbeat.monitored_at
    has_doubts = round_.heartbeat.sent_at - silent_since >= DOUBT * node.settings.tick
    if (
        node.phase not in (Phase.MEMBER, Phase.OUTSIDE)
        or not node.is_watcher
        or not has_doubts
        or round_.watch
        or round_.monitor
    ):
        return
    if round_.members is None:
        step.read_members()  # the next heartbeat comes soon
        node.timers[Timer.HEARTBEAT] = min(node.timers[Timer.HEARTBEAT], step.now + node.settings.tick)
    else:
        round_.watch = Monitor(node.settings.keep_alive_deadline, node.settings.outage, step.now)
        watch(node, step)


def watch(node: NodeState, step: Step) -> None:
    """Read the members' heartbeats without a reset, so that nobody takes the monitor to be alive."""
    step.set_timer(Timer.WATCH, node.settings.tick)
    members, monitor = node.round.members, node.round.watch
    if members and monitor and not monitor.awaits_reply:
        monitor.awaits_reply = True
        question = questions.WatchMembers(members.tickets, step.now)
        step.get(question, *(f"heartbeat/{ticket}" for ticket in members.tickets))


def on_members_watched(node: NodeState, step: Step, answer: Answer[questions.WatchMembers, list[bytes]]) -> None:
    """Note which members are silent, for whoever leads the next round."""
    tickets, asked_at = answer.question.tickets, answer.question.asked_at
    if node.round.watch:
        counters = map(without_flag, answer.value)
        node.round.watch.poll(zip(tickets, counters, strict=True), step.now, asked_at)


def on_leading(node: NodeState, step: Step, answer: Answer[questions.TakeOverLeading, bytes]) -> None:
    """Lead if this node was the first to take over."""
    node.round.leaders += 1
    if answer.value == b"%d" % node.round.ticket:
        become_leader(node, step)


def _on_silent_monitor(node: NodeState, step: Step) -> None:
    """End the round without the monitor, or take its place."""
    round_ = node.round
    if round_.members is None:
        step.read_members()
        step.set_timer(Timer.HEARTBEAT, 0.0)  # its answer comes after that
    elif round_.end is None and round_.members.tickets[0] not in round_.finished:
        check(node, step, [round_.members.tickets[0]])
    elif Timer.MONITOR_POLL not in node.timers:
        # Somebody must monitor the other members, and the one that has to decide what follows.
        step.create(questions.TakeOverMonitoring(), f"monitor/{round_.monitors + 1}", b"%d" % round_.ticket)


def on_monitoring(node: NodeState, step: Step, answer: Answer[questions.TakeOverMonitoring, bytes]) -> None:
    """Monitor the members if this node was the first to take over."""
    node.round.monitors += 1
    node.round.heartbeat.monitored_at = step.now
    if answer.value == b"%d" % node.round.ticket and node.round.members:
        start_monitoring(node, step, node.round.members)


def start_monitoring(node: NodeState, step: Step, members: Members) -> None:
    """Poll the members' heartbeats from now on."""
    node.round.monitor = node.round.watch or Monitor(node.settings.keep_alive_deadline, node.settings.outage, step.now)
    node.round.watch, node.round.monitor.awaits_reply = None, False  # whatever the watch still asks
    # The first poll renews this node's lease, so all that may take its place must hear of it as well.
    node.round.tickets = node.round.closed.tickets if node.round.closed else 0
    if node.phase is Phase.MEMBER and node.round.assignment and node.round.assignment.group_rank == 0:
        node.round.monitor.register(members.tickets, step.now)
    step.set_timer(Timer.MONITOR_POLL, node.settings.tick)


def poll(node: NodeState, step: Step) -> None:
    """Poll the heartbeats of the members, and of outsiders, to which the resets show that the monitor is alive."""
    step.set_timer(Timer.MONITOR_POLL, node.settings.tick)
    members, monitor = node.round.members, node.round.monitor
    if members and monitor and not monitor.awaits_reply:
        monitor.awaits_reply = True
        outsiders = set(range(1, node.round.tickets + 1)) - set(members.tickets)
        tickets = [*members.tickets, *sorted(outsiders)]
        names = ["end", "ticket", f"monitor/{node.round.monitors + 1}", "stalled", "stall", "look"]
        step.get(questions.PollMembers(tickets, step.now), *names, *(f"heartbeat/{ticket}" for ticket in tickets))


def on_members_polled(node: NodeState, step: Step, answer: Answer[questions.PollMembers, list[bytes]]) -> None:
    """Suspect the members that have been silent for too long."""
    round_ = node.round
    if round_.members is None or round_.monitor is None:
        return
    ended, drawn, successor, claimed, stalls, look, *counters = answer.value
    if successor and node.phase is not Phase.ENDED:
        _stand_down(node, step)
        return
    tickets, asked_at = answer.question.tickets, answer.question.asked_at
    count = node.count_tickets(drawn)
    has_newcomers = count > round_.tickets
    heard_at = round_.counted_at if has_newcomers else asked_at  # newcomers were not polled, but have come since then
    round_.tickets, round_.counted_at = count, asked_at
    check_claims(node, step, claimed, stalls)
    pass_on_look(node, step, look)
    suspected = round_.monitor.poll(zip(tickets, map(without_flag, counters), strict=True), step.now, asked_at)
    poll_in_time(node, step, Timer.MONITOR_POLL, asked_at)
    is_over = node.phase is Phase.ENDED  # then the leader of the next round reads the counters, too
    if ended and not is_over:
        step.get(questions.LearnEnd(), "end")  # sooner than by a wait that stands still
    elif not is_over and (grown := round_.monitor.take_resets()):
        # Those whose counters have not grown see with their next heartbeat that they were polled before it.
        all_grown = not has_newcomers and set(grown) >= {*tickets} - {round_.ticket}
        reset(node, step, grown, step.now if all_grown else heard_at)
    else:
        confirm_poll(node, step, heard_at)
    if round_.finished and round_.end is None and (round_.assignment is None or round_.report.has_succeeded):
        read_finished(node, step)  # those that are lost may have been unable to count themselves
    suspected -= (round_.finished - {deciding_ticket(node)}) | round_.lost | {round_.ticket}
    check(node, step, [ticket for ticket in round_.members.tickets if ticket in suspected])


def _stand_down(node: NodeState, step: Step) -> None:
    """Leave the monitoring to a node that took over while this one slept.

    Each of two monitors would miss heartbeats that the other has reset, and lose nodes that are alive.
    """
    node.round.monitors += 1
    node.round.monitor = None
    node.round.heartbeat.monitored_at = step.now
    node.timers.pop(Timer.MONITOR_POLL, None)


def check(node: NodeState, step: Step, tickets: list[int]) -> None:
    """Suspect members. Those whose workers have all succeeded need not be there any more."""
    if tickets:
        step.get(questions.CheckFinished(tickets), *(f"succeeded/{ticket}" for ticket in tickets))


def on_finished_checked(node: NodeState, step: Step, answer: Answer[questions.CheckFinished, list[bytes]]) -> None:
    """Lose the suspected members that are still needed."""
    round_, tickets = node.round, answer.question.tickets
    round_.finished |= {ticket for ticket, done in zip(tickets, answer.value, strict=True) if done}
    if round_.end is None and round_.members and round_.finished >= set(round_.members.tickets):
        read_finished(node, step)  # all have succeeded, and died before one of them could end the round
        return
    lost = set(tickets) - (round_.finished - {deciding_ticket(node)})
    round_.lost |= lost if round_.end else set()  # before, they stay suspected until that has ended the round
    if lost and round_.members:
        members = round_.members
        ranks = [rank for rank, ticket in enumerate(members.tickets) if ticket in lost]
        hosts = listed(members.hosts[rank] for rank in ranks)
        pids = [round_.replaced[ticket] for ticket in sorted(lost) if ticket in round_.replaced]
        reason = f"{hosts}: the agent (pid {listed(map(str, pids))}) is gone; another was started" if pids else ""
        lose_members(node, step, [members.nodes[rank] for rank in ranks], hosts, reason)
