"""Layer 2: the operations of TCPStore as etcd v3 transactions, each of which takes effect exactly once.

Runs in the bridge's process only.

A request that etcd did not answer in time may have been done, and may still be done when a frozen member wakes up. So
every connection has a fence, a key that each of its changes writes along, on the condition that it has been written
exactly as often as this connection knows. A change that is sent twice, or arrives late, finds the fence moved on.

A number that is added to is stored as ``\\0+OFFSET``, and is that offset plus the version of its key, which etcd counts
up with each write: adding 1 writes the same bytes again. It never meets a conflict, however many add at once, where
reading and writing on the condition of no change in between would have one of them succeed in each round. For the same
reason a value that is appended to is stored as ``\0*NAME``, the name of a list, whose pieces are keys of their own, in
the order in which they were made. So are values that are too long for etcd.

All keys hang on one lease, which every bridge of the job keeps alive: they vanish a day after the last of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

from elastic_launch.store.etcd.cluster import Cluster, EtcdError
from elastic_launch.store.etcd.watch import Watch

LEASE_SECONDS = 24 * 3600
OPERATIONS = 128
"""What a transaction may have, by etcd's default."""
BYTES = 1 << 20
"""What we put into one; etcd's default is 1.5 MiB."""
PIECE = BYTES // 2
"""Bytes of a value that is stored in one piece."""

_COUNTER, _LIST, _ESCAPE = b"\0+", b"\0*", b"\0\0"


class RefusalError(Exception):
    """A request that makes no sense, such as adding to a text."""


def stored(value: bytes) -> bytes:
    """A value as etcd holds it."""
    return _ESCAPE + value if value.startswith(b"\0") else value


class Keys:
    """The keys below a prefix."""

    def __init__(self, cluster: Cluster, prefix: str) -> None:
        self.cluster = cluster
        self.rpc = cluster.etcdrpc
        self.prefix = prefix.encode()
        self.watch = Watch(cluster, self.read)
        # Of 63 bits, and not 0.
        self.lease = int.from_bytes(hashlib.sha256(self.prefix).digest()[:8], "big") >> 1 | 1
        self._bridge = os.urandom(8).hex().encode()
        self._connections = 0

    async def start(self) -> None:
        """Sign in, and grant the job's lease or renew it. Raises EtcdError."""
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
        await self.read([self.prefix])  # granting a lease wants no permission; this does

    async def keep(self) -> None:
        """Keep the lease alive, for ever. Raises EtcdError when it is gone: what hung on it is lost."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 10)
            if not await self.cluster.keep_alive(self.lease):
                raise EtcdError(f"the job's keys in {self.cluster.where} are gone: expired with their lease")

    def connection(self) -> Connection:
        """A new connection's view."""
        self._connections += 1
        return Connection(self, b"%s.%d" % (self._bridge, self._connections))

    async def read(self, names: Sequence[bytes], revision: int = 0) -> tuple[list[Any], int]:
        """Read keys of etcd.

        Returns:
            The key-value of each, None where there is none, and the store's revision as of which no key that is
            missing was there.
        """
        if len(names) == 1:
            response = await self.cluster.call("Range", self.rpc.RangeRequest(key=names[0], revision=revision))
            return [response.kvs[0] if response.kvs else None], response.header.revision
        requests = [
            self.rpc.TxnRequest(success=[self.range(name) for name in names[at : at + OPERATIONS]])
            for at in range(0, len(names), OPERATIONS)
        ]
        responses = await asyncio.gather(*[self.cluster.call("Txn", request) for request in requests])
        kvs = [_first(answer) for response in responses for answer in response.responses]
        return kvs, min((response.header.revision for response in responses), default=0)

    async def get(self, names: Sequence[bytes]) -> list[bytes]:
        """The values of keys, empty for what is missing."""
        kvs, _ = await self.read([self.prefix + name for name in names])
        return [await self.value(kv) for kv in kvs]

    async def value(self, kv: Any) -> bytes:
        """The value that a key stands for; empty for None. A list may have got longer since the key was read."""
        value: bytes = kv.value if kv else b""
        if value.startswith(_COUNTER):
            return b"%d" % (int(value[2:]) + kv.version)
        if value.startswith(_LIST):
            first, kinds = self.piece(value, b""), self.rpc.RangeRequest
            request = kinds(
                key=first, range_end=first[:-1] + b"0", sort_order=kinds.ASCEND, sort_target=kinds.CREATE
            )  # "0" follows "/"
            return b"".join([piece.value for piece in (await self.cluster.call("Range", request)).kvs])
        return value[2:] if value.startswith(_ESCAPE) else value

    def piece(self, value: bytes, name: bytes) -> bytes:
        """The key of a piece of the list that is stored as ``value``."""
        return self.prefix + b"\0piece/%s/%s" % (value[2:], name)

    async def wait(self, names: Sequence[bytes]) -> None:
        """Return when each of the keys has existed."""
        full = [self.prefix + name for name in names]
        kvs, revision = await self.read(full)
        missing = [name for name, kv in zip(full, kvs, strict=True) if kv is None]
        if missing:
            await asyncio.gather(*[self.watch.wait(name, revision) for name in missing])

    def range(self, name: bytes) -> Any:
        """Read a key, in a transaction."""
        return self.rpc.RequestOp(request_range=self.rpc.RangeRequest(key=name))

    def put(self, name: bytes, value: bytes) -> Any:
        """Write a key, in a transaction."""
        return self.rpc.RequestOp(request_put=self.rpc.PutRequest(key=name, value=value, lease=self.lease))

    def has_version(self, name: bytes, version: int) -> Any:
        """The condition that a key has been written so often since it was made; 0: it is not there."""
        compare = self.rpc.Compare
        return compare(key=name, target=compare.VERSION, result=compare.EQUAL, version=version)

    def exists(self, name: bytes) -> Any:
        """The condition that a key is there."""
        compare = self.rpc.Compare
        return compare(key=name, target=compare.VERSION, result=compare.GREATER, version=0)

    def has_value(self, name: bytes, value: bytes) -> Any:
        """The condition that a key holds these bytes."""
        compare = self.rpc.Compare
        return compare(key=name, target=compare.VALUE, result=compare.EQUAL, value=value)

    def is_unchanged(self, name: bytes, kv: Any) -> Any:
        """The condition that a key is as it was read; None: it is not there."""
        compare = self.rpc.Compare
        revision = kv.mod_revision if kv else 0
        return compare(key=name, target=compare.MOD, result=compare.EQUAL, mod_revision=revision)


class Connection:
    """One connection's requests, made one after the other."""

    def __init__(self, keys: Keys, name: bytes) -> None:
        self._keys = keys
        self._name = name
        self._fence = keys.prefix + b"\0fence/" + name
        self._changes = 0
        """How often the fence was written."""

    async def set(self, items: dict[bytes, bytes]) -> None:
        """Write keys; more than fit into one transaction become visible in parts."""
        for puts in self._portions({name: await self._stored(value) for name, value in items.items()}):
            if not (await self._change([], puts))[0]:
                raise self._lost()

    async def swap(self, name: bytes, expected: bytes, desired: bytes) -> bytes:
        """Compare and set. Returns the value that the key has then, ``expected`` if it has none."""
        keys, name = self._keys, self._keys.prefix + name
        condition = keys.has_value(name, stored(expected)) if expected else keys.has_version(name, 0)
        if len(expected) > PIECE:
            condition = keys.has_value(name, b"")  # never: to be read and compared here
        new = await self._stored(desired)
        conflicts = 0
        while True:
            done, kv = await self._change([condition], [keys.put(name, new)], name)
            if done:
                return desired
            value = await keys.value(kv)
            if value != expected:
                return value or expected
            # It is a number in our own form, or has just come to be as expected.
            condition = keys.is_unchanged(name, kv)
            await _back_off(conflicts := conflicts + 1)

    async def add(self, name: bytes, amount: int) -> int:
        """Add to a number. Returns the sum. Raises RefusalError where the value is none."""
        keys, name = self._keys, self._keys.prefix + name
        # The guess that serves the second and later of those who add 1 to what began at 0.
        condition, value = keys.has_value(name, _COUNTER + b"0"), _COUNTER + b"0"
        if amount != 1:
            condition, value = keys.has_version(name, 0), _COUNTER + b"%d" % (amount - 1)
        conflicts = 0
        while True:
            done, kv = await self._change([condition], [keys.put(name, value)], name)
            if done:
                return int(await keys.value(kv))
            if kv is None:
                condition, value = keys.has_version(name, 0), _COUNTER + b"%d" % (amount - 1)
            elif amount == 1 and kv.value.startswith(_COUNTER):
                condition, value = keys.has_value(name, kv.value), kv.value
            else:
                text = await keys.value(kv)
                try:
                    number = int(text)
                except ValueError:
                    raise RefusalError(f"cannot add to {text[:100]!r}") from None
                condition = keys.is_unchanged(name, kv)
                value = _COUNTER + b"%d" % (number + amount - kv.version - 1)
                await _back_off(conflicts := conflicts + 1)

    async def append(self, name: bytes, more: bytes) -> None:
        """Add bytes at the end of a value; those that are too long for etcd in several steps."""
        for at in range(0, len(more), PIECE):
            await self._append(self._keys.prefix + name, more[at : at + PIECE])

    async def _append(self, name: bytes, more: bytes) -> None:
        keys = self._keys
        marker = fresh = _new_list()
        condition, before = keys.has_version(name, 0), b""
        conflicts = 0
        while True:
            # The key is written, too, so that its version shows every change of its value.
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

    async def delete(self, name: bytes) -> bool:
        """Remove a key. Returns whether it was there."""
        keys, name = self._keys, self._keys.prefix + name
        remove = keys.rpc.RequestOp(request_delete_range=keys.rpc.DeleteRangeRequest(key=name))
        return (await self._change([keys.exists(name)], [remove]))[0]

    async def _change(self, conditions: list[Any], changes: list[Any], name: bytes | None = None) -> tuple[bool, Any]:
        """Make changes on conditions, once.

        Args:
            conditions: of etcd's kind.
            changes: operations of etcd.
            name: a key to read along.

        Returns:
            Whether they were made; and the key, as they or the unmet condition left it.
        """
        keys, look = self._keys, [self._keys.range(name)] if name else []
        request = keys.rpc.TxnRequest(
            compare=[keys.has_version(self._fence, self._changes), *conditions],
            success=[*changes, keys.put(self._fence, b"-"), *look],
            failure=[keys.range(self._fence), *look],
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
        # It was made at an earlier attempt whose answer did not come.
        self._changes += 1
        if name:
            (kv,), _ = await keys.read([name], fence.mod_revision)
        return True, kv

    async def _stored(self, value: bytes) -> bytes:
        """A value as etcd shall hold it. One that is too long is written as a list, whose name is not known yet."""
        if len(value) <= PIECE:
            return stored(value)
        marker = _new_list()
        for at in range(0, len(value), PIECE):
            if not (await self._change([], [self._put_piece(marker, value[at : at + PIECE])]))[0]:
                raise self._lost()
        return marker

    def _put_piece(self, marker: bytes, value: bytes) -> Any:
        return self._keys.put(self._keys.piece(marker, b"%s/%d" % (self._name, self._changes)), value)

    def _portions(self, items: dict[bytes, bytes]) -> Iterator[list[Any]]:
        """Writes in as many portions as etcd's limits ask for."""
        keys = self._keys
        puts: list[Any] = []
        size = 0
        for name, value in items.items():
            length = len(keys.prefix) + len(name) + len(value)
            if puts and (len(puts) == OPERATIONS - 1 or size + length > BYTES):
                yield puts
                puts, size = [], 0
            puts.append(keys.put(keys.prefix + name, value))
            size += length
        if puts:
            yield puts

    def _lost(self) -> EtcdError:
        return EtcdError(f"the job's keys in {self._keys.cluster.where} are gone: removed, or expired with their lease")


def _new_list() -> bytes:
    return _LIST + os.urandom(8).hex().encode()


def _first(answer: Any) -> Any:
    """The key that an operation read, or None."""
    kvs = answer.response_range.kvs
    return kvs[0] if kvs else None


async def _back_off(conflicts: int) -> None:
    """Pause before the next attempt, the longer the more often another was first; the first follows at once."""
    if conflicts > 1:
        await asyncio.sleep(random.uniform(0, min(0.25, 0.001 * (1 << min(conflicts, 10)))))
