"""Layer 2: waiting for keys of etcd: one stream of watches per bridge, which moves along with the cluster.

Runs in the bridge's process only. etcd3 has a watch of its own, whose thread spins while etcd is down and outlives its
client; it is not used.

One watch per key that is waited for, not one for all the job's keys: a bridge would else be sent every agent's beats.
No event is missed: each watch begins after the revision at which its key was read and not there, on every new stream
again. Where etcd has dropped that revision from its history, the key is read again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from elastic_launch.store.etcd.cluster import FIRST_PATIENCE, Attempts, Cluster, EtcdError

_NEEDS_LEADER = ("hasleader", "true")
"""Makes a member that is cut off from the others end its streams."""


class _RefusedError(Exception):
    """etcd does not watch this key for us."""


class Awaited:
    """A key that is waited for."""

    def __init__(self, key: bytes, revision: int) -> None:
        self.key = key
        self.revision = revision
        """As of which it was not there."""
        self.waiting: set[asyncio.Future[None]] = set()
        self.watch_id: int | None = None


class Watch:
    """The keys that are waited for, and the stream that tells of them. It runs from the first wait on."""

    def __init__(self, cluster: Cluster, read: Callable[[Sequence[bytes]], Awaitable[tuple[list[Any], int]]]) -> None:
        self._cluster = cluster
        self._rpc = cluster.etcdrpc
        self._read = read
        self._awaited: dict[bytes, Awaited] = {}
        self._orders: asyncio.Queue[Any] = asyncio.Queue()
        """To be sent on the current stream."""
        self._asked: deque[Awaited] = deque()
        """Watches that were ordered on the current stream. etcd confirms them in this order."""
        self._confirmed: dict[int, Awaited] = {}
        self._heard = False
        """Whether the current stream has answered anything."""
        self._refused = False
        """Whether the last watch was refused."""
        self.begun = asyncio.Event()

    async def wait(self, key: bytes, revision: int) -> None:
        """Return when the key is written; it was not there as of a revision."""
        self.begun.set()
        awaited = self._awaited.get(key)
        if awaited is None:
            awaited = self._awaited[key] = Awaited(key, revision)
            self._order(awaited)
        future = asyncio.get_running_loop().create_future()
        awaited.waiting.add(future)
        try:
            await future
        finally:
            awaited.waiting.discard(future)
            if not awaited.waiting and self._awaited.get(key) is awaited:
                self._forget(awaited)

    async def run(self) -> None:
        """Keep a stream to the current member, for ever. Raises EtcdError when that is impossible."""
        await self.begun.wait()
        attempts: Attempts | None = None
        while True:
            member, metadata = self._cluster.member, self._cluster.metadata()
            self._orders = asyncio.Queue()
            self._asked.clear()
            self._confirmed.clear()
            self._heard = False
            for awaited in self._awaited.values():
                self._order(awaited)
            stream = member.watch(metadata=(*metadata, _NEEDS_LEADER))
            sending = asyncio.create_task(self._send(stream, self._orders))
            try:
                why = await self._listen(stream)
                if self._heard or not why:
                    attempts = None
                if why:
                    attempts = attempts or Attempts(self._cluster)
                    self._cluster.leave(member, why)
                    await attempts.pause()
            except self._cluster.rpc_error as error:
                attempts = Attempts(self._cluster) if self._heard or not attempts else attempts
                await attempts.failed(member, metadata, error)
            except _RefusedError as error:
                if self._refused or not metadata:
                    raise EtcdError(f"{self._cluster.where} refuses to watch: {error}") from None
                self._refused = True
                await self._cluster.sign_in(stale=metadata)  # etcd says the same of a token that has expired
            finally:
                stream.cancel()
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, stream: Any, orders: asyncio.Queue[Any]) -> None:
        while True:
            await stream.write(await orders.get())

    async def _listen(self, stream: Any) -> str:
        """Read a stream until it ends, or the cluster's current member is another.

        Returns:
            Why to leave the member; empty for no reason.
        """
        moved = asyncio.create_task(self._cluster.moved.wait())
        try:
            while True:
                reading = asyncio.create_task(stream.read())
                try:
                    # Orders unanswered: the member may be frozen. A new order meanwhile is seen by the calls' timeouts.
                    patience = FIRST_PATIENCE if self._asked else None
                    done, _ = await asyncio.wait((reading, moved), timeout=patience, return_when="FIRST_COMPLETED")
                    if not done:
                        return f"no answer within {patience:g} s"
                    if moved in done:
                        return ""
                    response = reading.result()
                finally:
                    reading.cancel()
                if response is self._cluster.end_of_stream:
                    return "it ended the stream"
                self._heard = True
                await self._hear(response)
        finally:
            moved.cancel()

    async def _hear(self, response: Any) -> None:
        if response.created:
            awaited = self._asked.popleft()
            if response.canceled:
                raise _RefusedError(response.cancel_reason or "no reason given")
            self._refused = False
            self._confirmed[response.watch_id] = awaited
            awaited.watch_id = response.watch_id
            if self._awaited.get(awaited.key) is not awaited:
                self._cancel(awaited)  # nobody waits any more
        elif response.canceled:
            cancelled = self._confirmed.pop(response.watch_id, None)
            if cancelled and self._awaited.get(cancelled.key) is cancelled:
                # Its revision is no longer in etcd's history, most likely.
                (kv,), revision = await self._read([cancelled.key])
                if kv:
                    self._there(cancelled)
                else:
                    cancelled.revision = max(revision, cancelled.revision)
                    self._order(cancelled)
        for event in response.events:
            if (found := self._awaited.get(event.kv.key)) and event.kv.mod_revision > found.revision:
                self._there(found)

    def _there(self, awaited: Awaited) -> None:
        self._forget(awaited)
        for future in awaited.waiting:
            if not future.done():
                future.set_result(None)

    def _forget(self, awaited: Awaited) -> None:
        del self._awaited[awaited.key]
        if awaited.watch_id is not None:
            self._cancel(awaited)

    def _order(self, awaited: Awaited) -> None:
        awaited.watch_id = None
        self._asked.append(awaited)
        request = self._rpc.WatchCreateRequest(
            key=awaited.key, start_revision=awaited.revision + 1, filters=[self._rpc.WatchCreateRequest.NODELETE]
        )
        self._orders.put_nowait(self._rpc.WatchRequest(create_request=request))

    def _cancel(self, awaited: Awaited) -> None:
        request = self._rpc.WatchCancelRequest(watch_id=awaited.watch_id)
        self._orders.put_nowait(self._rpc.WatchRequest(cancel_request=request))
