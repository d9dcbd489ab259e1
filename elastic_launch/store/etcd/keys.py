"""TCPStore's operations as etcd v3 transactions, each of which takes effect exactly once.

Runs in the bridge's process only.

**Fences.** A request that etcd did not answer in time may have taken effect, or may do so when a frozen member resumes.
So each connection has a fence: a key that each of its changes also writes, on the condition that the key has been
written exactly as often as the connection knows. A change that is sent twice, or that arrives late, fails on the fence.

**Numbers.** A number that was added to is stored as ``\\0+OFFSET``. It means that offset plus the version of the key,
which etcd increments with each write. So to add 1 is to write the same bytes again. This never conflicts, no matter how
many connections add at once. If they read the number and wrote it back on the condition that it is unchanged, only one
of them would succeed at a time.

**Lists.** For the same reason a value that was appended to is stored as ``\\0*NAME``, the name of a list. The pieces of
a list are keys of their own, ordered by their creation. Values that are too long for etcd are stored in the same way.

**Counters of heartbeats** leave no history; ``etcd.heartbeats`` tells how.

All keys are attached to one lease, which each bridge of the job keeps alive. They vanish a day after the last bridge.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from elastic_launch.store.etcd.cluster import Cluster, EtcdError
from elastic_launch.store.etcd.heartbeats import Heartbeats
from elastic_launch.store.etcd.watch import KeyWatch

LEASE_SECONDS = 24 * 3600
MAX_OPERATIONS = 128
"""Operations in a transaction: etcd's default limit."""
MAX_BYTES = 1 << 20
"""Bytes that we put into a transaction; etcd's default limit is 1.5 MiB."""
PIECE = MAX_BYTES // 2
"""Bytes of a value that are stored in one piece."""

_SAME_MEMBER_TRIES = 20
"""How often counters of heartbeats are read until one member has answered all parts of the request."""

_NUMBER, _LIST, _ESCAPE = b"\0+", b"\0*", b"\0\0"


class RefusalError(Exception):
    """A request makes no sense, such as adding to a text."""


class Keyspace:
    """The job's keys, which share a prefix."""

    def __init__(self, cluster: Cluster, prefix: str) -> None:
        self.cluster = cluster
        self.rpc = cluster.etcdrpc
        self.prefix = prefix.encode()
        self.heartbeats = Heartbeats(cluster, self.prefix)
        self.watch = KeyWatch(cluster, self.read)
        # 63 bits, and not 0.
        self.lease = int.from_bytes(hashlib.sha256(self.prefix).digest()[:8], "big") >> 1 | 1
        self._bridge = os.urandom(8).hex().encode()
        self._writers = 0

    async def start(self) -> None:
        """Sign in, and grant or renew the job's lease. Raises EtcdError."""
        if self.cluster.settings.user is not None:
            await self.cluster.sign_in()
        request = self.rpc.LeaseGrantRequest(TTL=LEASE_SECONDS, ID=self.lease)
        while True:
            try:
                await self.cluster.call("LeaseGrant", request)
            except EtcdError as error:
                if "lease already exists" not in str(error):
                    raise
            if await self.cluster.keep_alive(self.lease):
                break
        await self.read([self.prefix])  # needs a permission, in contrast to granting a lease
        await self.heartbeats.start()

    async def keep(self) -> None:
        """Keep the lease alive, forever. Raises EtcdError if it has expired, and the keys with it."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 10)
            if not await self.cluster.keep_alive(self.lease):
                raise EtcdError(f"the job's keys in {self.cluster.where} are gone: their lease has expired")

    def writer(self) -> FencedWriter:
        """Make a writer for a new connection."""
        self._writers += 1
        return FencedWriter(self, b"%s.%d" % (self._bridge, self._writers))

    async def read(self, names: Sequence[bytes], revision: int = 0) -> tuple[list[Any], int]:
        """Read keys, whose names include the prefix.

        Args:
            names: The keys.
            revision: The revision of the store at which to read a single key; 0 for the latest.

        Returns:
            The key-value pair of each key, None if it is missing; and a revision at which these were missing.
        """
        if len(names) == 1:
            response = await self.cluster.call("Range", self.rpc.RangeRequest(key=names[0], revision=revision))
            return [response.kvs[0] if response.kvs else None], response.header.revision
        kvs, headers = await self._read_many(names)
        return kvs, min((header.revision for header in headers), default=0)

    async def _read_memory(self, names: Sequence[bytes], member: int) -> list[Any] | None:
        """Read keys as a member has them. Returns their key-value pairs; None if it does not answer.

        Not in one transaction: if that is cancelled while it reads from memory, etcd before 3.5.5 crashes.
        """
        requests = [self.rpc.RangeRequest(key=name, serializable=True) for name in names]
        responses = await asyncio.gather(*[self.cluster.ask(member, "Range", request) for request in requests])
        if any(response is None or response.header.member_id != member for response in responses):
            return None
        return [response.kvs[0] if response.kvs else None for response in responses]

    async def _read_many(self, names: Sequence[bytes]) -> tuple[list[Any], list[Any]]:
        """Read keys. Returns their key-value pairs, and the headers of the answers."""
        requests = [
            self.rpc.TxnRequest(success=[self.range(name) for name in names[at : at + MAX_OPERATIONS]])
            for at in range(0, len(names), MAX_OPERATIONS)
        ]
        responses = await asyncio.gather(*[self.cluster.call("Txn", request) for request in requests])
        kvs = [_first(result) for response in responses for result in response.responses]
        return kvs, [response.header for response in responses]

    async def get(self, names: Sequence[bytes]) -> list[bytes]:
        """Read the values of keys, empty for each key that is missing."""
        counters = [name for name in names if self.heartbeats.covers(name)]
        if counters:
            return await self._get_counters(names, counters)
        kvs, _ = await self.read([self.prefix + name for name in names])
        return [await self.value(kv) for kv in kvs]

    async def _get_counters(self, names: Sequence[bytes], counters: Sequence[bytes]) -> list[bytes]:
        """Read keys some of which are counters of heartbeats: first all keys, then the marks, at the same member."""
        keys = [self.prefix + name for name in [*names, *map(self.heartbeats.generation_key, counters)]]
        for _ in range(_SAME_MEMBER_TRIES):
            kvs, headers = await self._read_many(keys)
            marks, member = await self.heartbeats.marks(headers[0].member_id)
            if {header.member_id for header in headers} == {member}:
                break
        else:
            raise EtcdError(f"{self.cluster.where}: each request is answered by another member; name the members")
        versions = [kv.version if kv else 0 for kv in kvs[len(names) :]]
        generations = dict(zip(counters, versions, strict=True))
        values = [await self.value(kv) for kv in kvs[: len(names)]]
        return [
            self.heartbeats.value(name, int(value or b"0"), generations[name], marks)
            if name in generations and (not value or value.isdigit())
            else value
            for name, value in zip(names, values, strict=True)
        ]

    def is_reset(self, items: dict[bytes, bytes]) -> bool:
        """Whether to write these keys is to reset counters of heartbeats."""
        return all(value == b"0" and self.heartbeats.covers(name) for name, value in items.items())

    def are_counters(self, names: Sequence[bytes]) -> bool:
        """Whether there are counters of heartbeats among some keys."""
        return any(map(self.heartbeats.covers, names))

    def is_heartbeat(self, name: bytes, amount: int) -> bool:
        """Whether to add this to a key is a heartbeat."""
        return amount == 1 and self.heartbeats.covers(name)

    async def counter(self, name: bytes, member: int) -> tuple[int, int]:
        """Read what the key of a counter of heartbeats holds, and its generation.

        Args:
            name: The counter.
            member: Whose memory may be read, which needs no majority; 0: nobody's.
        """
        names = [self.prefix + name, self.prefix + self.heartbeats.generation_key(name)]
        found = await self._read_memory(names, member) if member else None
        kv, generation = found or (await self.read(names))[0]
        return _number(await self.value(kv) or b"0"), generation.version if generation else 0

    async def value(self, kv: Any) -> bytes:
        """Decode a stored value; empty for None. A list is read, and may have grown after its key was read."""
        value: bytes = kv.value if kv else b""
        if value.startswith(_NUMBER):
            return b"%d" % (int(value[2:]) + kv.version)
        if value.startswith(_LIST):
            first, kinds = self.piece(value, b""), self.rpc.RangeRequest
            request = kinds(key=first, range_end=_after(first), sort_order=kinds.ASCEND, sort_target=kinds.CREATE)
            return b"".join([piece.value for piece in (await self.cluster.call("Range", request)).kvs])
        return value[2:] if value.startswith(_ESCAPE) else value

    def piece(self, marker: bytes, name: bytes) -> bytes:
        """The key of a piece of a list, which is stored as ``marker``."""
        return self.prefix + b"\0piece/%s/%s" % (marker[2:], name)

    async def wait(self, names: Sequence[bytes]) -> None:
        """Return when each of the keys has existed."""
        full = [self.prefix + name for name in names]
        kvs, revision = await self.read(full)
        missing = [name for name, kv in zip(full, kvs, strict=True) if kv is None]
        if missing:
            await asyncio.gather(*[self.watch.wait(name, revision) for name in missing])

    def range(self, name: bytes) -> Any:
        """The operation that reads a key."""
        return self.rpc.RequestOp(request_range=self.rpc.RangeRequest(key=name))

    def put(self, name: bytes, value: bytes) -> Any:
        """The operation that writes a key."""
        return self.rpc.RequestOp(request_put=self.rpc.PutRequest(key=name, value=value, lease=self.lease))

    def remove(self, name: bytes) -> Any:
        """The operation that removes a key."""
        return self.rpc.RequestOp(request_delete_range=self.rpc.DeleteRangeRequest(key=name))

    def remove_pieces(self, marker: bytes) -> Any:
        """The operation that removes the pieces of a list."""
        first = self.piece(marker, b"")
        request = self.rpc.DeleteRangeRequest(key=first, range_end=_after(first))
        return self.rpc.RequestOp(request_delete_range=request)

    def has_version(self, name: bytes, version: int) -> Any:
        """The condition that a key has been written this often since it was created; 0 if it is missing."""
        compare = self.rpc.Compare
        return compare(key=name, target=compare.VERSION, result=compare.EQUAL, version=version)

    def exists(self, name: bytes) -> Any:
        """The condition that a key exists."""
        compare = self.rpc.Compare
        return compare(key=name, target=compare.VERSION, result=compare.GREATER, version=0)

    def has_value(self, name: bytes, value: bytes) -> Any:
        """The condition that a key holds these bytes."""
        compare = self.rpc.Compare
        return compare(key=name, target=compare.VALUE, result=compare.EQUAL, value=value)

    def is_unchanged(self, name: bytes, kv: Any) -> Any:
        """The condition that a key is as it was read; None if it was missing."""
        compare = self.rpc.Compare
        revision = kv.mod_revision if kv else 0
        return compare(key=name, target=compare.MOD, result=compare.EQUAL, mod_revision=revision)


class FencedWriter:
    """The changes of one connection, made one after the other. Names of keys exclude the prefix."""

    def __init__(self, keys: Keyspace, name: bytes) -> None:
        self._keys = keys
        self._name = name
        self._fence = keys.prefix + b"\0fence/" + name
        self._changes = 0
        """How often the fence has been written."""

    async def set(self, items: dict[bytes, bytes]) -> None:
        """Write keys. If they do not fit into one transaction, they become visible in parts."""
        if counters := [name for name in items if self._keys.heartbeats.covers(name)]:
            flags = await self._keys.heartbeats.reset(self, counters)
            items = {name: value for name, value in items.items() if value != b"0" or flags.get(name) != 0}
        await self.put_all(items)

    async def put_all(self, items: dict[bytes, bytes]) -> None:
        """Write keys, all of them as they are."""
        for puts in self._portions({name: await self._store(value) for name, value in items.items()}):
            if not (await self._change([], puts))[0]:
                raise self._lost()

    async def swap(self, name: bytes, expected: bytes, desired: bytes) -> bytes:
        """Compare and set. Returns the value that the key has afterwards, ``expected`` if it is missing."""
        keys, name = self._keys, self._keys.prefix + name
        condition = keys.has_value(name, _escaped(expected)) if expected else keys.has_version(name, 0)
        if len(expected) > PIECE:
            condition = keys.has_value(name, b"")  # never true: the value must be read and compared here
        new = await self._store(desired)
        conflicts = 0
        while True:
            done, kv = await self._change([condition], [keys.put(name, new)], name)
            if done:
                return desired
            value = await keys.value(kv)
            if value != expected:
                return value or expected
            # It is stored in another form, or has just become as expected.
            condition = keys.is_unchanged(name, kv)
            await _back_off(conflicts := conflicts + 1)

    async def add(self, name: bytes, amount: int) -> int:
        """Add to a number. Returns the sum. Raises RefusalError if the value is not a number."""
        if self._keys.is_heartbeat(name, amount):
            return await self._keys.heartbeats.beat(self, name, partial(self._keys.counter, name))
        keys, name = self._keys, self._keys.prefix + name
        # Guess what fits all but the first of those who add 1 to a number that began at 0.
        condition, value = keys.has_value(name, _NUMBER + b"0"), _NUMBER + b"0"
        if amount != 1:
            condition, value = keys.has_version(name, 0), _NUMBER + b"%d" % (amount - 1)
        conflicts = 0
        while True:
            done, kv = await self._change([condition], [keys.put(name, value)], name)
            if done:
                return int(await keys.value(kv))
            if kv is None:
                condition, value = keys.has_version(name, 0), _NUMBER + b"%d" % (amount - 1)
            elif amount == 1 and kv.value.startswith(_NUMBER):
                condition, value = keys.has_value(name, kv.value), kv.value
            else:
                text = await keys.value(kv)
                number = _number(text)
                condition = keys.is_unchanged(name, kv)
                value = _NUMBER + b"%d" % (number + amount - kv.version - 1)
                await _back_off(conflicts := conflicts + 1)

    async def append(self, name: bytes, more: bytes) -> None:
        """Append bytes to a value; in several steps if they are too long for etcd."""
        for at in range(0, len(more), PIECE):
            await self._append_piece(self._keys.prefix + name, more[at : at + PIECE])

    async def _append_piece(self, name: bytes, more: bytes) -> None:
        keys = self._keys
        marker = fresh = _new_list()
        condition, before = keys.has_version(name, 0), b""
        conflicts = 0
        while True:
            # The key itself is also written, so that its version shows every change of its value.
            changes = [keys.put(name, marker), self._put_piece(marker, before + more)]
            done, kv = await self._change([condition], changes, name)
            if done:
                return
            before = b""
            if kv and kv.value.startswith(_LIST):
                condition, marker = keys.has_value(name, kv.value), kv.value
            else:
                condition, before = keys.is_unchanged(name, kv), await keys.value(kv)
                marker = fresh
                await _back_off(conflicts := conflicts + 1)

    async def delete(self, names: list[bytes]) -> list[bool]:
        """Remove keys, some at a time. Returns whether each existed."""
        keys, existed = self._keys, list[bool]()
        for at in range(0, len(names), MAX_OPERATIONS // 2 - 1):
            existed += await self._delete_some(
                [keys.prefix + name for name in names[at : at + MAX_OPERATIONS // 2 - 1]]
            )
        if counters := [name for name in names if keys.heartbeats.covers(name)]:
            await keys.heartbeats.forget(counters)
            await self.delete([keys.heartbeats.generation_key(name) for name in counters])
        return existed

    async def _delete_some(self, names: list[bytes]) -> list[bool]:
        keys = self._keys
        conflicts = 0
        while True:
            kvs, _ = await keys.read(names)
            found = {name: kv for name, kv in zip(names, kvs, strict=True) if kv}
            lists = [kv.value for kv in found.values() if kv.value.startswith(_LIST)]
            removals = [*map(keys.remove, found), *map(keys.remove_pieces, lists)]
            conditions = [keys.is_unchanged(name, kv) for name, kv in found.items()]
            if not found or (await self._change(conditions, removals))[0]:
                return [name in found for name in names]
            await _back_off(conflicts := conflicts + 1)

    async def _change(self, conditions: list[Any], changes: list[Any], name: bytes | None = None) -> tuple[bool, Any]:
        """Make changes on conditions, once.

        Args:
            conditions: etcd's comparisons, all of which must be true.
            changes: etcd's operations.
            name: A key to read in the same transaction; None reads nothing.

        Returns:
            Whether the changes were made; and the key-value pair, after the changes or with the failed conditions.
        """
        keys, reads = self._keys, [self._keys.range(name)] if name else []
        request = keys.rpc.TxnRequest(
            compare=[keys.has_version(self._fence, self._changes), *conditions],
            success=[*changes, keys.put(self._fence, b"-"), *reads],
            failure=[keys.range(self._fence), *reads],
        )
        response = await keys.cluster.call("Txn", request)
        kv = _first(response.responses[-1]) if name else None
        if response.succeeded:
            self._changes += 1
            return True, kv
        fence = _first(response.responses[0])
        written = fence.version if fence else 0
        if written == self._changes:
            return False, kv
        if written != self._changes + 1:
            raise self._lost()
        # An earlier attempt, whose answer was lost, has made the changes.
        self._changes += 1
        if name:
            (kv,), _ = await keys.read([name], fence.mod_revision)
        return True, kv

    async def _store(self, value: bytes) -> bytes:
        """Encode a value for its key. One that is too long is written as a list first, whose name nobody knows yet."""
        if len(value) <= PIECE:
            return _escaped(value)
        marker = _new_list()
        for at in range(0, len(value), PIECE):
            if not (await self._change([], [self._put_piece(marker, value[at : at + PIECE])]))[0]:
                raise self._lost()
        return marker

    def _put_piece(self, marker: bytes, value: bytes) -> Any:
        return self._keys.put(self._keys.piece(marker, b"%s/%d" % (self._name, self._changes)), value)

    def _portions(self, items: dict[bytes, bytes]) -> Iterator[list[Any]]:
        """Divide writes into portions that respect etcd's limits."""
        keys = self._keys
        puts: list[Any] = []
        size = 0
        for name, value in items.items():
            length = len(keys.prefix) + len(name) + len(value)
            if puts and (len(puts) == MAX_OPERATIONS - 1 or size + length > MAX_BYTES):
                yield puts
                puts, size = [], 0
            puts.append(keys.put(keys.prefix + name, value))
            size += length
        if puts:
            yield puts

    def _lost(self) -> EtcdError:
        where = self._keys.cluster.where
        return EtcdError(f"the job's keys in {where} are gone: they were removed, or their lease has expired")


def _after(prefix: bytes) -> bytes:
    """The end of the range of keys that begin with a prefix, which ends with "/"."""
    return prefix[:-1] + b"0"  # "0" follows "/"


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise RefusalError(f"cannot add to {text[:100]!r}") from None


def _escaped(value: bytes) -> bytes:
    return _ESCAPE + value if value.startswith(b"\0") else value


def _new_list() -> bytes:
    return _LIST + os.urandom(8).hex().encode()


def _first(result: Any) -> Any:
    """The key-value pair that an operation has read; None if the key is missing."""
    kvs = result.response_range.kvs
    return kvs[0] if kvs else None


async def _back_off(conflicts: int) -> None:
    """Pause after a conflict. The first attempt follows at once; later pauses grow with the number of conflicts."""
    if conflicts > 1:
        await asyncio.sleep(random.uniform(0, min(0.25, 0.001 * (1 << min(conflicts, 10)))))
