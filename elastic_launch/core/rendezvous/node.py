"""One node's part in the rounds of a job: how it meets the others, and how they part.

``step`` takes the node's state, an input (an answer of the store, a key that appeared, the time, a request of the
agent) and the time. It changes the state and returns a ``Ready``: requests to the store, events for the agent, lines
for the log, the key that the node waits for, and when it has to be called again. ``TABLE`` lists what happens in each
phase; what is not in it raises ``UnexpectedInputError`` with the history.

A round r of a job, in the store:

    round             number of the current round
    r/ticket          counter: the order of arrival, t
    r/node/t          NodeRecord, by each node
    r/leader/g        ticket of the node that took over as leader number g; leader 0 has ticket 1
    r/assignment/g/t  Assignment, by leader g, which decides who is in
    r/members/g       Members, likewise
    r/status          Status while nodes join, by the leader
    r/unfit           Unfit, one JSON a line: nodes that take no part because they or their health checks fail
    r/leaving         End, created once: a node that got a signal before the round was formed
    r/closed          Closed, created once: the membership is final
    r/heartbeat/t     counter of the node's heartbeats, which the leader and later the monitor reset to 0
    r/succeeded       how many nodes' workers have all succeeded; r/succeeded/t: node t's have
    r/end             End, created once: the first reason to end the round
    r/stalled         number of the latest stall that a node has claimed; r/stalled/t: the one that node t claims, or 0
    r/look            number of the latest request for the stacks of all nodes, whatever their workers do
    r/stall           number of the latest stall of all nodes, by the monitor
    r/stacks/n/t      NodeStacks of node t in stall n, or in look -n
    r/verdict/n       Judgement, by the monitor: what the stacks of stall n say
    r/calls/t         how many calls of should_stop() node t's workers have begun, if all are to stop at the same step
    r/stop_at         the call at which they stop, created once; 0: the nodes could not agree
    r/seen/t          node t knows that a failure has ended the round; the node that had it need not write that
    r/consequences    Consequence, one JSON a line: failures of the other nodes
    r/lost            End, created once: members that were lost after a failure had ended the round
    r/reported        how many nodes have reported a round that a failure ended; r/all_reported: all have
    r/decision        Decision, created once: what follows a failure
    r/monitor/k       ticket of the k-th failover monitor
    r/left            how many nodes know that the job has ended; r/all_left: all do

Of round r - 2 the leader of round r deletes all but ``closed``, ``end`` and ``decision``, which are kept for 64 rounds.

A node sends the same few requests in each round, however many nodes there are. Only the leader, which closes the round,
and the monitor, the member with group rank 0, do work in proportion to them. Each node that waits or runs adds 1 to its
counter once in an interval. A counter that does not change is a silent node. A counter that nobody resets is a silent
leader or monitor: its standby (ticket 2, or group rank 1) sends a heartbeat every ``TICK`` to notice that soon. Every
request may be carried out twice, because a connection can break before its answer comes.
"""

from __future__ import annotations

from collections.abc import Callable

from elastic_launch.core.agent.messages import (
    Fence,
    GiveUpStop,
    Leave,
    ReportCalls,
    ReportFailure,
    ReportRound,
    ReportSuccess,
    RequestRestart,
    RequestStop,
    Withdraw,
)
from elastic_launch.core.progress.messages import ClaimStall, ReportStacks, ReportVerdict, RequestStacks, WithdrawClaim
from elastic_launch.core.rendezvous import (
    ending,
    forgetting,
    former,
    heartbeats,
    joining,
    leading,
    leaving,
    membership,
    messages,
    monitoring,
    next_round,
    progress,
    questions,
    reconnecting,
    stalling,
    stopping,
    unfit,
)
from elastic_launch.core.rendezvous.messages import Answer, Input, KeyAppeared, Ready, Settings, Tick
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer
from elastic_launch.errors import LaunchError

IDLE, UNFIT, JOINING, WAITING, MEMBER, OUTSIDE, ENDED, LEAVING = Phase
Handler = Callable[..., None]


class UnexpectedInputError(LaunchError):
    """An input came that the table does not list for the phase: a defect of the launcher."""

    def __init__(self, node: NodeState, kind: type | Timer) -> None:
        history = ", ".join(f"{phase.value}:{_name(past)}" for phase, past in node.history)
        super().__init__(f"internal error: {_name(kind)} while {node.phase.value}; history: {history}")


def _name(kind: type | Timer) -> str:
    return kind.label if isinstance(kind, Timer) else kind.__name__


def begin(record: NodeRecord, settings: Settings) -> NodeState:
    """A node that has not joined yet."""
    return NodeState(record._replace(options=settings.options), settings)


def step(node: NodeState, given: Input, now: float) -> Ready:
    """Take one input.

    Args:
        node: the state, which is changed.
        given: what happened.
        now: seconds on any monotonic clock, the same at every step.

    Raises:
        UnexpectedInputError: ``TABLE`` does not list the input for the phase.
        RendezvousStateError: the store holds what no node of this job can have written.
    """
    this = Step(node, now)
    match given:
        case messages.HostFacts():
            _learn(node, given)
        case Answer(question, number):
            if number == node.round.number and node.phase is not IDLE:  # others are of a round that is over
                _handler(node, type(question))(node, this, given)
        case KeyAppeared(key):
            if key == node.awaited_key:  # a key that is no longer of interest may be reported, too
                node.awaited_key = None
                _handler(node, KeyAppeared)(node, this, given)
        case Tick():
            for timer in [timer for timer, at in node.timers.items() if at <= now]:
                if node.timers.pop(timer, None) is not None:
                    _handler(node, timer)(node, this)
        case _:
            _handler(node, type(given))(node, this, given)
    return this.ready()


def _handler(node: NodeState, kind: type | Timer) -> Handler:
    handler = TABLE.get((node.phase, kind))
    if handler is None:
        raise UnexpectedInputError(node, kind)
    node.history.append((node.phase, kind))
    return handler


def _learn(node: NodeState, facts: messages.HostFacts) -> None:
    known = {name: value for name, value in facts._asdict().items() if value is not None}
    if node.record.named:  # the user has named this node's address
        known = {name: value for name, value in known.items() if name not in ("address", "outward")}
    node.stays = known.pop("stays", node.stays)
    node.record = node.record._replace(**known)


def ignore(node: NodeState, step: Step, given: object = None) -> None:
    """Do nothing: the input comes too late to matter."""


def _on_key_while_waiting(node: NodeState, step: Step, appeared: KeyAppeared) -> None:
    """The leader waits for the next node's record, the others for the round to close."""
    handler = membership.ask_for_assignment if appeared.key == node.key("closed") else leading.on_arrival
    handler(node, step, appeared)


def _row(
    kind: type | Timer, handler: Handler, *phases: Phase, ignored: tuple[Phase, ...] = ()
) -> dict[tuple[Phase, type | Timer], Handler]:
    return {(phase, kind): handler for phase in phases} | {(phase, kind): ignore for phase in ignored}


TIMERS: dict[Timer, Handler] = {
    Timer.JOIN_TIMEOUT: joining.on_join_timeout,
    Timer.PROGRESS: progress.log_progress,
    Timer.LEADER_POLL: leading.poll,
    Timer.LAST_CALL: leading.consider,
    Timer.RETRY_ASSIGNMENT: membership.ask_for_assignment,
    Timer.FORMER: former.look,
    Timer.JOIN_RUNNING: membership.join_running,
    Timer.HEARTBEAT: heartbeats.send,
    Timer.FENCE: heartbeats.fence,
    Timer.MONITOR_POLL: monitoring.poll,
    Timer.WATCH: monitoring.watch,
    Timer.STALL_POLL: stalling.poll,
    Timer.COLLECT_STACKS: stalling.collect,
    Timer.LOOK_POLL: stalling.poll_look,
    Timer.EXIT_BARRIER: ending.stop_waiting,
    Timer.CAUSE_GRACE: ending.read_consequences,
    Timer.READ_CALLS: stopping.read_calls,
    Timer.SHUTDOWN: leaving.disconnect,
}

JOINED = (WAITING, MEMBER, OUTSIDE, ENDED)
"""The phases in which a node has a ticket and has not left."""
AFTER_WAITING = (MEMBER, OUTSIDE, ENDED, LEAVING)
"""The phases in which an answer to a question of ``WAITING`` may come."""

TABLE: dict[tuple[Phase, type | Timer], Handler] = {
    **{(phase, timer): handler for timer, handler in TIMERS.items() for phase in timer.phases},
    # The agent requests.
    **_row(messages.Join, next_round.join, IDLE, ENDED, UNFIT, ignored=(LEAVING,)),
    **_row(Withdraw, unfit.withdraw, IDLE, ENDED, UNFIT, ignored=(LEAVING,)),
    **_row(RequestRestart, ending.request_restart, MEMBER, OUTSIDE, ignored=(JOINING, WAITING, ENDED, LEAVING)),
    **_row(ReportFailure, ending.report_failure, MEMBER, ENDED),
    **_row(ReportSuccess, ending.report_success, MEMBER, ignored=(ENDED,)),
    **_row(ReportRound, ending.report_round, MEMBER, ENDED, ignored=(LEAVING,)),
    **_row(Fence, heartbeats.fence, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(Leave, leaving.leave_membership, MEMBER),
    **_row(Leave, leaving.leave, JOINING, WAITING, OUTSIDE, ENDED, UNFIT, ignored=(IDLE, LEAVING)),
    **_row(RequestStop, stopping.request_stop, MEMBER, ENDED),
    **_row(ReportCalls, stopping.report_calls, ENDED),
    **_row(GiveUpStop, stopping.give_up, ENDED),
    **_row(messages.Close, leaving.shut_down, IDLE),
    **_row(messages.Close, leaving.close, JOINING, *JOINED, UNFIT, ignored=(LEAVING,)),
    # The store comes and goes.
    **_row(messages.StoreReconnected, reconnecting.on_reconnected, *JOINED, ignored=(IDLE, JOINING, LEAVING)),
    **_row(messages.StoreLost, reconnecting.on_lost, *Phase),
    **_row(questions.ReadOwnRecord, reconnecting.on_own_record, *JOINED, ignored=(LEAVING,)),
    **_row(messages.StoreReconnected, unfit.find_round, UNFIT),
    **_row(questions.Write, ignore, *Phase),
    # Its health check fails.
    **_row(questions.FindRound, unfit.on_round_found, UNFIT, ignored=(JOINING, *JOINED, LEAVING)),
    **_row(questions.FollowRound, unfit.on_followed, UNFIT, ignored=(JOINING, *JOINED, LEAVING)),
    **_row(KeyAppeared, unfit.look, UNFIT),
    # Joining.
    **_row(questions.LearnRound, joining.on_round, JOINING, ignored=(ENDED, LEAVING)),
    **_row(questions.DrawTicket, joining.on_ticket, JOINING, ignored=(ENDED, LEAVING)),
    **_row(questions.WriteRecord, joining.on_record_written, WAITING, ignored=AFTER_WAITING),
    **_row(questions.ReadStatus, progress.on_status, WAITING, ignored=AFTER_WAITING),
    # Its former self.
    **_row(questions.FindFormer, former.on_closed_found, WAITING, OUTSIDE, ignored=(MEMBER, ENDED, LEAVING)),
    **_row(questions.FindFormerMembers, former.on_members_found, WAITING, OUTSIDE, ignored=(MEMBER, ENDED, LEAVING)),
    **_row(questions.ReadFormer, former.on_records, WAITING, OUTSIDE, ignored=(MEMBER, ENDED, LEAVING)),
    **_row(messages.AgentsGone, former.on_gone, WAITING, OUTSIDE),
    # Leading.
    **_row(KeyAppeared, _on_key_while_waiting, WAITING),
    **_row(questions.ReadPastRound, leading.on_past_round, WAITING, ignored=AFTER_WAITING),
    **_row(questions.ReadPastNodes, leading.on_past_nodes, WAITING, ignored=AFTER_WAITING),
    **_row(questions.ReadLeaving, leading.on_leaving, WAITING, ignored=AFTER_WAITING),
    **_row(questions.CountTickets, leading.on_tickets, WAITING, ignored=AFTER_WAITING),
    **_row(questions.ReadRecords, leading.on_records, WAITING, ignored=AFTER_WAITING),
    **_row(questions.PollJoining, leading.on_joining, WAITING, ignored=AFTER_WAITING),
    **_row(questions.TakeOverLeading, monitoring.on_leading, WAITING, ignored=AFTER_WAITING),
    # The round closes.
    **_row(questions.CloseRound, membership.on_closed, WAITING, ignored=AFTER_WAITING),
    **_row(questions.CheckClosed, membership.on_closed_checked, WAITING, ignored=AFTER_WAITING),
    **_row(questions.ReadAssignment, membership.on_assignment, WAITING, ignored=AFTER_WAITING),
    **_row(questions.ReadMembers, membership.on_members, *AFTER_WAITING),
    # Rounds that are over.
    **_row(questions.ReadOldRounds, forgetting.on_old_rounds, *JOINED, ignored=(LEAVING,)),
    **_row(questions.Deleted, forgetting.on_deleted, *JOINED, ignored=(LEAVING,)),
    # Heartbeats.
    **_row(questions.SendHeartbeat, monitoring.on_heartbeat, *JOINED, ignored=(LEAVING,)),
    **_row(questions.ConfirmReset, heartbeats.on_reset, *JOINED, ignored=(LEAVING,)),
    **_row(questions.PollMembers, monitoring.on_members_polled, MEMBER, OUTSIDE, ENDED, ignored=(LEAVING,)),
    **_row(questions.WatchMembers, monitoring.on_members_watched, MEMBER, OUTSIDE, ignored=(ENDED, LEAVING)),
    **_row(questions.TakeOverMonitoring, monitoring.on_monitoring, MEMBER, OUTSIDE, ENDED, ignored=(LEAVING,)),
    **_row(questions.CheckFinished, monitoring.on_finished_checked, MEMBER, OUTSIDE, ENDED, ignored=(LEAVING,)),
    # The job stalls.
    **_row(RequestStacks, stalling.request_stacks, MEMBER, ignored=(IDLE, JOINING, WAITING, OUTSIDE, ENDED, LEAVING)),
    **_row(ClaimStall, stalling.claim, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(WithdrawClaim, stalling.withdraw, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(ReportStacks, stalling.report_stacks, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(ReportVerdict, stalling.report_verdict, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.CountStalls, stalling.on_stalls_counted, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.AwaitStall, stalling.on_stall, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.AwaitVerdict, stalling.on_verdict, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.CheckClaims, stalling.on_claims, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.CountLooks, stalling.on_looks_counted, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.AwaitLook, stalling.on_look_judged, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.LearnLook, stalling.on_look, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.CheckSucceeded, stalling.on_succeeded, MEMBER, ignored=(ENDED, LEAVING)),
    **_row(questions.CollectStacks, stalling.on_stacks, MEMBER, ignored=(ENDED, LEAVING)),
    # The round ends.
    **_row(questions.CountFinished, ending.on_finished, MEMBER, LEAVING, ignored=(ENDED,)),
    **_row(questions.ReadFinished, ending.on_all_finished, MEMBER, OUTSIDE, LEAVING, ignored=(ENDED,)),
    **_row(questions.LearnEnd, ending.on_end, JOINING, WAITING, MEMBER, OUTSIDE, ignored=(ENDED, LEAVING)),
    **_row(KeyAppeared, ending.on_end_appeared, MEMBER, OUTSIDE),
    **_row(questions.CountReported, ending.on_reported, ENDED, LEAVING),
    **_row(questions.ReadConsequences, ending.on_consequences, ENDED, ignored=(LEAVING,)),
    **_row(questions.LearnDecision, ending.on_decision, ENDED, ignored=(LEAVING,)),
    **_row(questions.ReadCalls, stopping.on_calls, ENDED, ignored=(LEAVING,)),
    **_row(questions.LearnStopAt, stopping.on_stop_at, ENDED, ignored=(LEAVING,)),
    **_row(KeyAppeared, ending.on_key, ENDED),
    # Leaving.
    **_row(questions.CountLeft, leaving.on_left, ENDED, LEAVING),
    **_row(questions.CompareLeft, leaving.on_left_compared, ENDED, LEAVING),
    **_row(questions.ConfirmWritten, leaving.disconnect, LEAVING),
    **_row(KeyAppeared, leaving.disconnect, LEAVING),
}
