"""Which nodes are members of a round, and which ranks they get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.text import is_loopback
from elastic_launch.job import Assignment


def choose(nodes: Mapping[int, NodeRecord], max_nodes: int) -> tuple[list[int], list[int]]:
    """Choose the members of a round, and their group ranks, which are dense from 0.

    A node gets the rank that it asks for, if there are that many nodes. A node that stays keeps its rank if possible.
    The others fill the gaps in the order of their arrival.

    Args:
        nodes: the nodes that have joined, by ticket, which is the order of arrival.
        max_nodes: the largest number of members. Nodes that were in the round before are preferred, then those that
            came first; deprioritized nodes come last.

    Returns:
        The members' tickets by group rank, and the tickets of the spares.
    """
    members: list[int] = []
    asked_for: set[int] = set()
    for ticket in sorted(nodes, key=lambda t: (nodes[t].deprioritized, nodes[t].previous_rank < 0, t)):
        rank = nodes[ticket].rank
        if len(members) < max_nodes and rank not in asked_for:
            members.append(ticket)
            asked_for |= {rank} - {-1}
    by_rank: dict[int, int] = {}
    placed: set[int] = set()
    for wish in ("rank", "previous_rank"):
        for ticket in members:
            rank = getattr(nodes[ticket], wish)
            if 0 <= rank < len(members) and rank not in by_rank and ticket not in placed:
                by_rank[rank] = ticket
                placed.add(ticket)
    others = iter(sorted(set(members) - placed, key=lambda t: (nodes[t].rank, t)))
    ranks = [by_rank[rank] if rank in by_rank else next(others) for rank in range(len(members))]
    return ranks, sorted(nodes.keys() - set(members))


def assign(members: Sequence[NodeRecord], master_addr: str, master_port: int, **common: Any) -> list[Assignment]:
    """Return the assignment of each member. Global ranks follow group ranks, and so do role ranks within each role.

    Args:
        members: by group rank.
        master_addr: address of the workers' store, if the job's store serves the workers; empty: each node uses the
            address by which it reaches the job's store.
        master_port: its port; 0: the worker of rank 0 serves a store, on the port that its node has reserved.
        common: fields of ``Assignment`` that are the same for all.
    """
    first = members[0]
    if not master_port:
        is_scattered = any(not is_loopback(node.address) for node in members)
        master_addr = (is_scattered and is_loopback(first.address) and first.outward) or first.address
    role_sizes: Counter[str] = Counter()
    for node in members:
        role_sizes[node.role] += node.workers
    assignments: list[Assignment] = []
    assigned: Counter[str] = Counter()
    for rank, node in enumerate(members):
        assignments.append(
            Assignment(
                group_rank=rank,
                group_world_size=len(members),
                base_rank=assigned.total(),
                world_size=role_sizes.total(),
                local_world_size=node.workers,
                base_role_rank=assigned[node.role],
                role_world_size=role_sizes[node.role],
                master_addr=master_addr,
                master_port=master_port or first.port,
                host=node.host,
                port_picked=not master_port,
                agent_store=bool(master_port),
                **common,
            )
        )
        assigned[node.role] += node.workers
    return assignments
