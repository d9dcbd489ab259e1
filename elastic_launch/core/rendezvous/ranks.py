"""Layer 1: who gets which rank. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.text import is_loopback
from elastic_launch.job import Assignment


def choose(nodes: Mapping[int, NodeRecord], max_nodes: int) -> tuple[list[int], list[int]]:
    """Who is in the round, and with which group rank.

    A rank that a node asks for is its own, if there are as many nodes; a node that stays keeps its rank where that can
    be; the others fill the gaps in the order of their arrival. Ranks are dense, from 0.

    Args:
        nodes: by ticket, the order of arrival.
        max_nodes: how many there can be; those that were in the round before come first, then those that came
            first; those that stand aside come last.

    Returns:
        The members' tickets by group rank, and the tickets of the spares.
    """
    members: list[int] = []
    asked_for: set[int] = set()
    for ticket in sorted(
        nodes, key=lambda ticket: (nodes[ticket].deprioritized, nodes[ticket].previous_rank < 0, ticket)
    ):
        rank = nodes[ticket].rank
        if len(members) < max_nodes and rank not in asked_for:
            members.append(ticket)
            asked_for |= {rank} - {-1}
    taken: dict[int, int] = {}
    placed: set[int] = set()
    for wish in ("rank", "previous_rank"):
        for ticket in members:
            rank = getattr(nodes[ticket], wish)
            if 0 <= rank < len(members) and rank not in taken and ticket not in placed:
                taken[rank] = ticket
                placed.add(ticket)
    others = iter(sorted(set(members) - placed, key=lambda ticket: (nodes[ticket].rank, ticket)))
    ranks = [taken[rank] if rank in taken else next(others) for rank in range(len(members))]
    return ranks, sorted(nodes.keys() - set(members))


def assign(members: Sequence[NodeRecord], master_addr: str, master_port: int, **common: Any) -> list[Assignment]:
    """The place of each member, by group rank.

    Global ranks follow group ranks; role ranks do so within each role.

    Args:
        members: by group rank.
        master_addr: the address of the workers' store, if the job's store serves it; empty: by which a node reaches it.
        master_port: its port; 0: the worker of rank 0 serves a store, on the port that its node has reserved.
        common: the fields of ``Assignment`` that are the same for all.
    """
    world_size = sum(node.workers for node in members)
    role_sizes: dict[str, int] = {}
    role_bases: list[int] = []
    for node in members:
        role_bases.append(role_sizes.get(node.role, 0))
        role_sizes[node.role] = role_bases[-1] + node.workers
    if not master_port:
        first = members[0]
        scattered = any(not is_loopback(node.address) for node in members)
        master_addr = (scattered and is_loopback(first.address) and first.outward) or first.address
    assignments: list[Assignment] = []
    base = 0
    for rank, node in enumerate(members):
        assignments.append(
            Assignment(
                group_rank=rank,
                group_world_size=len(members),
                base_rank=base,
                world_size=world_size,
                local_world_size=node.workers,
                base_role_rank=role_bases[rank],
                role_world_size=role_sizes[node.role],
                master_addr=master_addr,
                master_port=master_port or members[0].port,
                host=node.host,
                port_picked=not master_port,
                agent_store=bool(master_port),
                **common,
            )
        )
        base += node.workers
    return assignments
