"""What the log says while nodes join: who is there, who is missing, who has gone.

On a terminal, ``live`` is one line that is redrawn in place of most of these.
"""

from __future__ import annotations

from typing import NamedTuple

from elastic_launch.core.rendezvous import questions
from elastic_launch.core.rendezvous.leader import Leader
from elastic_launch.core.rendezvous.messages import Answer
from elastic_launch.core.rendezvous.records import NOBODY, Status, Unfit, decode, encode
from elastic_launch.core.rendezvous.state import NodeState, Phase, Step, Timer
from elastic_launch.core.text import counted, listed
from elastic_launch.job import Level, LineKind

FIRST_LINE, NEXT_LINE = 5.0, 10.0
"""Seconds until a waiting node first logs who is there, and the longest time between two such lines."""


def publish(node: NodeState, step: Step, leader: Leader) -> None:
    """Have the leader write who is there, for the others to read."""
    node.round.status = leader.status()
    if node.round.status != leader.published:
        leader.published = node.round.status
        step.write([("status", encode(node.round.status))])


def log_departures(node: NodeState, step: Step, leader: Leader) -> None:
    """Log which nodes the leader no longer waits for."""
    if leader.lost:
        deadline = f"{node.settings.keep_alive_deadline:g} s"
        step.log(f"lost {listed(leader.lost)}: no heartbeat for {deadline}", Level.INFO)
    if leader.left:
        step.log(f"left: {listed(leader.left)}", Level.INFO)
    leader.lost, leader.left = [], []


def log_unfit(step: Step, note: Unfit, is_enough: bool) -> None:
    """Log why a node is not there: it has failed, or its health check; then whether the job goes on without it."""
    if note.has_failed:
        step.log(f"{note.record.host} failed before it joined: {note.reason}", Level.INFO)
        return
    what = "has left" if note.is_gone else "going on without it" if is_enough else "waiting for it, or for another node"
    step.log(f"{note.record.host}: health check failed: {note.reason}; {what}", Level.INFO)


def log_progress(node: NodeState, step: Step) -> None:
    """Log who is there; nodes that do not lead read it first."""
    node.progress_lines += 1
    step.set_timer(Timer.PROGRESS, min(FIRST_LINE * node.progress_lines, NEXT_LINE))
    if node.round.leader:
        log_status(node, step, node.round.leader.status())
    else:
        step.get(questions.ReadStatus(), "status")


def on_status(node: NodeState, step: Step, answer: Answer[questions.ReadStatus, list[bytes]]) -> None:
    """Log what the leader has written."""
    if answer.value[0]:
        node.round.status = decode(Status, answer.value[0], node.key("status"))
    if node.phase is Phase.WAITING:
        log_status(node, step, node.round.status)


def log_status(node: NodeState, step: Step, status: Status) -> None:
    """Log a line about who is there: for everybody if the node leads, or if it is its first."""
    is_first = bool(node.round.leader) or node.progress_lines == 1
    step.log(waiting(node, step.now, status), Level.INFO if is_first else Level.DEBUG, LineKind.PROGRESS)


class Waiting(NamedTuple):
    """What a node that waits for others can tell at a time."""

    text: str
    """One line."""
    since: float
    """When it began to wait, in seconds on the node's clock. The text changes each full second from then."""


def live(node: NodeState, now: float) -> Waiting | None:
    """Describe who has joined, for a line that is redrawn; None: the node does not wait for others."""
    if node.phase is not Phase.WAITING:
        return None
    seconds = max(0, int(now - node.began_at))
    status = node.round.leader.status() if node.round.leader else node.round.status
    if status is NOBODY:  # the node has not read yet what the leader has written
        return Waiting(f"waiting for {wanted(node)} nodes … {seconds} s", node.began_at)
    return Waiting(waiting(node, node.began_at + seconds, status, " …"), node.began_at)


def waiting(node: NodeState, now: float, status: Status, after_word: str = " after") -> str:
    """Describe who has joined, who is missing, and how long the node waits for more."""
    after = now - node.began_at
    left = node.settings.join_timeout - after
    if status.joined >= node.settings.min_nodes:
        left = min(left, node.settings.last_call_timeout)  # it begins anew when another node arrives
    missing = f"; missing: {status.missing}" if status.missing else ""
    more = f"; waiting up to {left:.0f} s more" if left > 0 else ""
    have = "has" if status.joined == 1 else "have"
    hosts = f": {status.hosts}" if status.hosts else ""
    return f"{joined_of(node, status.joined)} {have} joined{after_word} {after:.0f} s{hosts}{missing}{more}"


def joined_of(node: NodeState, joined: int) -> str:
    """``2 of 3 to 4 nodes``; the leader may count more, because one of them may be dead."""
    high = node.settings.max_nodes
    more = f" and {counted(joined - high, 'spare')}" if joined > high else ""
    return f"{min(joined, high)} of {wanted(node)} nodes{more}"


def wanted(node: NodeState) -> str:
    """``3 to 4``, the number of nodes that the job can have."""
    low, high = node.settings.min_nodes, node.settings.max_nodes
    return f"{high}" if low == high else f"{low} to {high}"
