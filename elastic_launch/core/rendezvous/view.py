"""Describe a node's part in the rendezvous for those who look at the job. Imported when somebody asks."""

from __future__ import annotations

from elastic_launch.core.rendezvous.state import NodeState, Phase
from elastic_launch.core.status import joined_text


def role(node: NodeState) -> str:
    """Return ``leader``, ``monitor`` or ``spare``; empty: the node is none of these."""
    round_ = node.round
    if node.phase is Phase.OUTSIDE:
        return "spare"
    if round_.leader is not None:
        return "leader"
    return "monitor" if node.phase is Phase.MEMBER and round_.monitor is not None else ""


def waits_for(node: NodeState, now: float) -> str:
    """Return which nodes are there and which are missing, or what else the node waits for; empty: nothing."""
    match node.phase:
        case Phase.JOINING:
            return "a ticket from the store"
        case Phase.WAITING if now < node.began_at:
            return f"the pause before the restart, {node.began_at - now:.0f} s more"
        case Phase.WAITING:
            status = node.round.leader.status() if node.round.leader else node.round.status
            if not status.joined:
                return "nodes"
            settings = node.settings
            return joined_text(status.joined, settings.min_nodes, settings.max_nodes, status.hosts, status.missing)
        case Phase.OUTSIDE:
            return "a place in the running round"
        case Phase.MEMBER if node.round.report.round is not None:
            return "the workers of the other nodes"
    return ""


def silences(node: NodeState, now: float) -> list[float | None]:
    """Return the seconds since each member's last heartbeat, by group rank, if this node is the monitor; else none.

    None stands for a node that has left.
    """
    monitor, members = node.round.monitor, node.round.members
    if monitor is None or members is None or node.phase is not Phase.MEMBER:
        return []
    return [None if ticket in monitor.left else round(monitor.silence(ticket, now), 1) for ticket in members.tickets]
