"""Heartbeats in etcd that leave no history.

Runs in the bridge's process only.

A write of a key stays in etcd's history until somebody compacts it. Nodes send heartbeats as long as the job runs, so
as writes they would fill any quota. But a lease without keys is kept outside of the history, and granting or revoking
one is agreed on by a majority like a write. So a heartbeat is a *mark*: a lease that nobody keeps alive, whose id is
computed from the counter's key. To add 1 to a counter is to grant its next mark, to set it to 0 is to revoke its marks.

- A node grants mark 1 of its counter. If that exists, nobody has reset the counter since its last heartbeat, and it
  grants the next mark, 2 and so on.
- A monitor reads all counters with one list of the leases that exist. The greatest mark of a counter is its value. To
  reset it, the monitor revokes the marks that it saw.
- The key itself holds what is rarely added to it or set: flags, which are added to the value.

The list comes from the memory of one member, which may be behind the others. So it is asked after a read of keys from
the same member. etcd answers that when the member has caught up with all that was committed before. For the same reason
a node may read its counter's key and generation from the memory of the member that has granted the mark.

A request may be executed late, when a frozen member resumes. A mark that is granted late is one heartbeat too many: the
node is lost a little later. A mark that is revoked late would wipe out a heartbeat that nobody has seen. So a counter
has a *generation*, which is part of its marks' ids: if a monitor does not know whether a revocation is still under way,
it begins another generation before it says that the counter is reset. A node's heartbeat counts when the generation is
still the same after its mark was granted.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from elastic_launch.store.etcd.cluster import Attempts, Cluster, EtcdError

if TYPE_CHECKING:
    from elastic_launch.store.etcd.keys import FencedWriter

MARK_SECONDS = 3600
"""After this time a mark that nobody revokes vanishes: far more than a node may be silent."""
MOST_MARKS = 255
"""Marks in one generation of a counter."""
_AT_ONCE = 64
"""Requests that are under way at the same time."""
_COUNTER = re.compile(rb"/.*/heartbeat/[0-9]+\Z", re.DOTALL)


class Marks(NamedTuple):
    """A counter as it was last read."""

    generation: int
    greatest: int
    """The greatest mark that exists; 0: none does."""
    flags: int
    """The number that the key itself holds."""


class Heartbeats:
    """The counters of heartbeats of one job, as one bridge sees them. Names of keys exclude the prefix."""

    def __init__(self, cluster: Cluster, prefix: bytes) -> None:
        self._cluster = cluster
        self._rpc = cluster.etcdrpc
        self._prefix = prefix
        self._lists_leases = True
        self._seen: dict[bytes, Marks] = {}
        """The counters that this bridge has read."""
        self._sent: dict[bytes, tuple[int, int, int]] = {}
        """The counters that it has added to: generation, latest mark, and heartbeats since the last reset."""

    async def start(self) -> None:
        """Find out whether etcd lists its leases. If not, counters are keys like all others. Raises EtcdError."""
        try:
            await self.marks()
        except EtcdError as error:
            if not error.why:
                raise
            self._lists_leases = False

    def covers(self, name: bytes) -> bool:
        """Whether a key is a counter of heartbeats."""
        return self._lists_leases and _COUNTER.match(name) is not None

    def generation_key(self, name: bytes) -> bytes:
        """The key whose version is the generation of a counter."""
        return b"\0generation" + name

    # --- reading counters

    async def marks(self, member: int = 0) -> tuple[dict[int, int], int]:
        """The greatest mark of each counter and generation, and the member that says so. Raises EtcdError.

        Args:
            member: The member to ask, if it answers; 0: any.
        """
        request = self._rpc.LeaseLeasesRequest()
        response = await self._cluster.ask(member, "LeaseLeases", request) if member else None
        if response is None:
            response = await self._cluster.call("LeaseLeases", request)
        greatest: dict[int, int] = {}
        for lease in response.leases:
            counter, mark = lease.ID >> 8, lease.ID & 255
            greatest[counter] = max(mark, greatest.get(counter, 0))
        return greatest, response.header.member_id

    def value(self, name: bytes, flags: int, generation: int, marks: dict[int, int]) -> bytes:
        """The value of a counter, from what was read at one member. It is noted for ``reset``."""
        greatest = marks.get(self._id(name, generation) >> 8, 0)
        self._seen[name] = Marks(generation, greatest, flags)
        return b"%d" % (flags + greatest)

    # --- changing them

    async def reset(self, writer: FencedWriter, names: Iterable[bytes]) -> dict[bytes, int]:
        """Revoke the marks of counters, as they were last read.

        Returns:
            What the keys of these counters hold, as far as that is known. Raises EtcdError.
        """
        known = {name: marks for name in names if (marks := self._seen.get(name))}
        ids = {
            self._id(name, seen.generation, mark): name
            for name, seen in known.items()
            for mark in range(1, seen.greatest + 1)
        }
        sure = dict(zip(ids, await _some_at_once(self._revoke, list(ids)), strict=True))
        unsure = {ids[mark] for mark, is_sure in sure.items() if not is_sure} | (set(names) - known.keys())
        if unsure:
            await writer.put_all({self.generation_key(name): b"-" for name in unsure})
        return {name: seen.flags for name, seen in known.items()}

    async def forget(self, names: Sequence[bytes]) -> None:
        """Revoke the marks of counters that are deleted. Those of other generations vanish after ``MARK_SECONDS``."""
        marks, _ = await self.marks()
        revoked: list[int] = []
        for name in names:
            seen = self._seen.pop(name, None)
            self._sent.pop(name, None)
            counter = self._id(name, seen.generation if seen else 0)
            revoked += range(counter + 1, counter + marks.get(counter >> 8, 0) + 1)
        await _some_at_once(self._revoke, revoked)

    async def beat(self, writer: FencedWriter, name: bytes, read: Callable[[int], Awaitable[tuple[int, int]]]) -> int:
        """Add 1 to a counter.

        Args:
            writer: Makes changes of keys.
            name: The counter.
            read: Reads what its key holds, and its generation, as a member has them; 0: as a majority does.

        Returns:
            The sum. It is not above an earlier one if the counter has been reset since. Raises EtcdError.
        """
        generation, mark, count = self._sent.get(name, (0, 0, 0))
        has_wrapped = False
        while True:
            is_first, member = await self._grant(self._id(name, generation, 1))
            if is_first:
                mark, count = 1, count + 1 if has_wrapped else 1
            elif mark < MOST_MARKS:
                mark, count = mark + 1, count + 1
                _, member = await self._grant(self._id(name, generation, mark))
            else:  # nobody has reset the counter for long
                await self._grant(self._id(name, generation + 1, 1))  # before it counts, so that one always does
                await writer.put_all({self.generation_key(name): b"-"})
                has_wrapped = True
            flags, current = await read(member)
            if current == generation:
                break
            generation, mark = current, 0
        self._sent[name] = generation, mark, count
        return flags + count

    async def _grant(self, mark: int) -> tuple[bool, int]:
        """Make sure that a mark exists.

        Returns:
            Whether it surely did not exist before; and the member that has granted it, 0 if that is unknown.
        """
        try:
            response = await self._cluster.call("LeaseGrant", self._rpc.LeaseGrantRequest(TTL=MARK_SECONDS, ID=mark))
        except EtcdError as error:
            if "lease already exists" not in error.why:
                raise
            return False, 0  # or an earlier attempt has granted it; then the next heartbeat sees the reset
        return True, response.header.member_id

    async def _revoke(self, mark: int) -> bool:
        """Make sure that a mark does not exist. Returns False if it may be revoked once more, later."""
        attempts = Attempts(self._cluster)
        try:
            await self._cluster.call("LeaseRevoke", self._rpc.LeaseRevokeRequest(ID=mark), attempts)
        except EtcdError as error:
            if "lease not found" not in error.why:
                raise
        return attempts.count == 0 or await attempts.are_over()

    def _id(self, name: bytes, generation: int, mark: int = 0) -> int:
        """The id of a mark: 55 bits of the counter and its generation, and 8 of the mark."""
        data = b"%s%s/%d" % (self._prefix, name, generation)
        return (int.from_bytes(hashlib.sha256(data).digest()[:7], "big") >> 1) << 8 | mark


async def _some_at_once(do: Callable[[int], Awaitable[bool]], values: Sequence[int]) -> list[bool]:
    """Do something with each value, with some of them at the same time. Returns the results."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(value: int) -> bool:
        async with places:
            return await do(value)

    return list(await asyncio.gather(*map(one, values)))
