"""One round on a third-party handler: what its nodes agree on through the store that the handler gave them.

torch's interface says who is in a round, and no more. Ranks of workers, how the round ended, what follows, and that all
nodes have succeeded are agreed here, under keys below ``PREFIX``:

    node/RANK               the node's registration, for the node of rank 0
    assignment/RANK/TOKEN   rank 0's reply to it
    TOKEN/end               how the round ended; whoever writes it first decides
    TOKEN/done              number of nodes whose workers have succeeded
    TOKEN/seen              number of nodes that know that all have

All functions block, as the store does, and may raise whatever it raises. All nodes of a job must run this launcher.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple, cast

from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.rendezvous.ranks import assign
from elastic_launch.core.rendezvous.records import RULES, NodeRecord, decode, encode, newest, record_of, refused
from elastic_launch.core.rendezvous.rules import Rules, name
from elastic_launch.errors import RendezvousStateError
from elastic_launch.job import Assignment, Decision, End, EndKind, RestartHistory
from elastic_launch.rendezvous.handler import RendezvousInfo, RendezvousStoreInfo, Store

PREFIX = "elastic-launch/"
"""Prefix of all keys in the handler's store."""
LINGER = 2.0
"""Longest time, in seconds, that a node waits until all others know that all have succeeded."""
_LINGER_POLL = 0.025
"""Seconds between two checks whether they know."""
_FORGOTTEN = b"-"
"""Value of a key that was read, in a store that cannot delete keys."""
_FORGOTTEN_POLL = 0.05
"""Seconds between two looks whether such a key has another value."""


class _Registration(NamedTuple):
    """What a node sends to the node of rank 0."""

    node: NodeRecord
    reply_key: str
    """Random in part, so that the reply of an earlier round is not taken for this one's."""


class _Reply(NamedTuple):
    """What the node of rank 0 replies."""

    assignment: Assignment
    token: str
    """Identifies the round, in the names of its keys."""


class Outcome(NamedTuple):
    """How a round ended, and what follows. Written once."""

    end: End
    decision: Decision


_KEY = name(300, least=1)
RULES |= {
    _Registration: Rules(1 << 20, {"node": record_of(NodeRecord), "reply_key": _KEY}),
    _Reply: Rules(1 << 20, {"assignment": record_of(Assignment), "token": _KEY}),
    Outcome: Rules(
        4 << 20,
        {"end": record_of(End), "decision": record_of(Decision)},
        # That all have succeeded is counted, not told.
        (("must tell of an end other than success", lambda it: it.end.kind is not EndKind.DONE),),
    ),
}


class ThirdPartyRound:
    """A round from this node's point of view."""

    def __init__(self, store: Store, assignment: Assignment, token: str, max_pause: float = 0.0) -> None:
        self.assignment = assignment
        self.size = assignment.group_world_size
        """Number of nodes."""
        self._store = store
        self._max_pause = max_pause
        self._keys = f"{PREFIX}{token}/"
        self._began_at = time.monotonic()
        self._outcome: Outcome | None = None

    def restart_history(self) -> RestartHistory:
        """Return the job's restart history as of now."""
        return aged(self.assignment.restart_history, time.monotonic() - self._began_at)

    def read_outcome(self) -> Outcome | None:
        """Return how the round ended; None: it has not."""
        key = f"{self._keys}end"
        if self._outcome is None and self._store.check([key]):
            outcome = decode(Outcome, self._store.get(key), key)
            if outcome.decision.pause > self._max_pause:
                raise refused(key, f"decision: pause: must be at most {self._max_pause:g} s (--restart-backoff)")
            self._outcome = outcome
        return self._outcome

    def write_outcome(self, outcome: Outcome) -> Outcome:
        """Write how the round ended, unless another node has. Return the outcome that counts."""
        if (first := self.read_outcome()) is not None:
            return first
        self._store.set(f"{self._keys}end", encode(outcome).decode())
        self._outcome = outcome
        return outcome

    def report_success(self) -> None:
        """Count this node among those whose workers have succeeded."""
        if self.size > 1:
            self._store.add(f"{self._keys}done", 1)

    def have_all_succeeded(self) -> bool:
        """Return whether the workers of all nodes have succeeded."""
        return self.size == 1 or self._store.add(f"{self._keys}done", 0) >= self.size

    def linger(self) -> None:
        """Wait until every node knows that all have succeeded: the store may end with this process."""
        if self.size == 1:
            return
        end = time.monotonic() + LINGER
        seen = self._store.add(f"{self._keys}seen", 1)
        while seen < self.size and time.monotonic() < end:
            time.sleep(_LINGER_POLL)
            seen = self._store.add(f"{self._keys}seen", 0)


def form_round(
    info: RendezvousInfo, node: NodeRecord, use_agent_store: bool, local_addr: str | None, max_pause: float = 0.0
) -> ThirdPartyRound:
    """Register this node with the node of rank 0, and learn its assignment.

    Each node writes and reads one key, and rank 0 one for each node. Keys that were read are deleted, because some
    handlers give the same store for every round.

    Args:
        info: what the handler's ``next_rendezvous`` returned.
        node: this node; ``known_round`` is the number of its last round.
        use_agent_store: the handler's.
        local_addr: address of this node, in case the handler does not say where the workers' store is.
        max_pause: the longest pause before a restart that the job allows, in seconds.

    Raises:
        RendezvousStateError: the handler's rank is impossible, or the store holds something else.
    """
    store, rank, size = info.store, info.rank, info.world_size
    if not (isinstance(rank, int) and isinstance(size, int) and 0 <= rank < size):
        raise RendezvousStateError(f"next_rendezvous() returned rank {rank!r} of {size!r}: ranks count from 0")
    token = os.urandom(8).hex()
    own = _Registration(node, f"{PREFIX}assignment/{rank}/{token}")
    if rank:
        store.set(f"{PREFIX}node/{rank}", encode(own).decode())
        reply = decode(_Reply, store.get(own.reply_key), own.reply_key)
        _forget(store, own.reply_key)
        place = reply.assignment
        if (place.group_rank, place.group_world_size, place.local_world_size) != (rank, size, node.workers):
            raise refused(own.reply_key, f"must be for rank {rank} of {size} with {node.workers} workers")
        return ThirdPartyRound(store, *reply, max_pause)
    others = _read_registrations(store, size)
    assignments = _assign(info, [node, *(other.node for other in others)], use_agent_store, local_addr)
    for other, assignment in zip(others, assignments[1:], strict=True):
        store.set(other.reply_key, encode(_Reply(assignment, token)).decode())
    return ThirdPartyRound(store, assignments[0], token, max_pause)


def _read_registrations(store: Store, size: int) -> list[_Registration]:
    """Wait for the registrations of the other nodes; return them by rank."""
    keys = [f"{PREFIX}node/{rank}" for rank in range(1, size)]
    # torch's stores answer a request for many keys if they have the extended API. Other stores do not know the names.
    many = len(keys) > 1 and getattr(store, "has_extended_api", bool)()
    found = cast(list[bytes], store.multi_get(keys) if many else [store.get(key) for key in keys])  # type: ignore[attr-defined]
    found = [_arrived(store, key, data) for key, data in zip(keys, found, strict=True)]
    for key in keys:
        _forget(store, key)
    others = [decode(_Registration, data, key) for data, key in zip(found, keys, strict=True)]
    for rank, (other, key) in enumerate(zip(others, keys, strict=True), 1):
        if not other.reply_key.startswith(f"{PREFIX}assignment/{rank}/"):
            raise refused(key, "reply_key: must be a key for the assignment of that rank")
    return others


def _forget(store: Store, key: str) -> None:
    """Delete a key. Stores that users write in Python may be unable to; there it is overwritten."""
    try:
        store.delete_key(key)
    except Exception:  # torch's raise RuntimeError for a method that a subclass lacks, and others AttributeError
        store.set(key, _FORGOTTEN.decode())


def _arrived(store: Store, key: str, data: bytes) -> bytes:
    """Return the value of a key; wait for another one if it is what ``_forget`` has left of an earlier round."""
    while data == _FORGOTTEN:
        time.sleep(_FORGOTTEN_POLL)
        data = store.get(key)
    return data


def _assign(info: RendezvousInfo, nodes: list[NodeRecord], is_shared: bool, local_addr: str | None) -> list[Assignment]:
    """Return the assignments of all nodes, by group rank."""
    latest = max(nodes, key=newest)
    rounds, history = latest.known_round + 1, latest.restart_history
    # In a store that served an earlier round, torch's process groups would find the keys of that one.
    is_served = is_shared and rounds == 0
    where = info.bootstrap_store_info if is_served or not is_shared else None
    where = where or RendezvousStoreInfo.build(0, info.store, local_addr)
    assignments = assign(nodes, where.master_addr, where.master_port, restart_count=rounds, restart_history=history)
    # The handler may choose the same port in each round, so another round would not help if the port is taken.
    return [assignment._replace(port_picked=False, agent_store=is_served) for assignment in assignments]
