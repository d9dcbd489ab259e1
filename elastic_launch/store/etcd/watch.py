"""Waits for keys of etcd, over one stream of watches per bridge, which follows the cluster's current member.

Runs in the bridge's process only. etcd3 has a watch of its own, which is not used: its thread spins while etcd is down,
and outlives its client.

There is one watch for each key that somebody waits for. With one watch for all keys of the job, each bridge would get
the heartbeats of all agents. No event is missed, because each watch begins after the revision at which its key was
missing; so does its replacement on a new stream. If etcd has compacted that revision, the key is read again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from elastic_launch.store.etcd.cluster import FIRST_ATTEMPT, Attempts, Cluster, EtcdError

_NEEDS_LEADER = ("hasleader", "true")
"""Metadata that makes a member end its streams when it is cut off from the others."""


class _RefusedError(Exception):
    """etcd refuses a watch."""


class AwaitedKey:
    """A key that somebody waits for."""

    def __init__(self, key: bytes, revision: int) -> None:
        self.key = key
        self.revision = revision
        """The revision of the store at which the key was missing."""
        self.waiting: set[asyncio.Future[None]] = set()
        self.watch_id: int | None = None


class KeyWatch:
    """The keys that somebody waits for, and the stream that reports them. It is opened by the first wait."""

    def __init__(self, cluster: Cluster, read: Callable[[Sequence[bytes]], Awaitable[tuple[list[Any], int]]]) -> None:
        self._cluster = cluster
        self._rpc = cluster.etcdrpc
        self._read = read
        self._awaited: dict[bytes, AwaitedKey] = {}
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        """Requests to send on the current stream."""
        self._unconfirmed: deque[AwaitedKey] = deque()
        """Watches that were requested on the current stream. etcd confirms them in this order."""
        self._confirmed: dict[int, AwaitedKey] = {}
        self._has_response = False
        """Whether anything has come on the current stream."""
        self._was_refused = False
        """Whether the last watch was refused."""
        self._is_needed = asyncio.Event()

    async def wait(self, key: bytes, revision: int) -> None:
        """Return when the key is written. It was missing at the given revision."""
        self._is_needed.set()
        awaited = self._awaited.get(key)
        if awaited is None:
            awaited = self._awaited[key] = AwaitedKey(key, revision)
            self._request_watch(awaited)
        future = asyncio.get_running_loop().create_future()
        awaited.waiting.add(future)
        try:
            await future
        finally:
            awaited.waiting.discard(future)
            if not awaited.waiting and self._awaited.get(key) is awaited:
                self._forget(awaited)

    async def run(self) -> None:
        """Keep a stream to the current member, forever. Raises EtcdError if that is impossible."""
        await self._is_needed.wait()
        attempts: Attempts | None = None
        while True:
            member, metadata = self._cluster.member, self._cluster.metadata()
            self._requests = asyncio.Queue()
            self._unconfirmed.clear()
            self._confirmed.clear()
            self._has_response = False
            for awaited in self._awaited.values():
                self._request_watch(awaited)
            stream = member.watch(metadata=(*metadata, _NEEDS_LEADER))
            sending = asyncio.create_task(self._send(stream, self._requests))
            try:
                why = await self._follow(stream)
                if self._has_response or not why:
                    attempts = None
                if why:
                    attempts = attempts or Attempts(self._cluster)
                    self._cluster.switch_from(member, why)
                    await attempts.pause()
            except self._cluster.rpc_error as error:
                attempts = Attempts(self._cluster) if self._has_response or not attempts else attempts
                await attempts.failed(member, metadata, error)
            except _RefusedError as error:
                if self._was_refused or not metadata:
                    raise EtcdError(f"{self._cluster.where} refuses to watch a key: {error}") from None
                self._was_refused = True
                await self._cluster.sign_in(stale=metadata)  # the reason may be an expired token
            finally:
                stream.cancel()
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, stream: Any, requests: asyncio.Queue[Any]) -> None:
        while True:
            await stream.write(await requests.get())

    async def _follow(self, stream: Any) -> str:
        """Read a stream until it ends, or the cluster switches to another member.

        Returns:
            The reason to switch; empty if the cluster has switched.
        """
        switched = asyncio.create_task(self._cluster.switched.wait())
        try:
            while True:
                reading = asyncio.create_task(stream.read())
                try:
                    # With unconfirmed requests the member may be frozen. Otherwise the timeouts of calls tell.
                    timeout = FIRST_ATTEMPT if self._unconfirmed else None
                    done, _ = await asyncio.wait((reading, switched), timeout=timeout, return_when="FIRST_COMPLETED")
                    if not done:
                        return f"no answer within {timeout:g} s"
                    if switched in done:
                        return ""
                    response = reading.result()
                finally:
                    reading.cancel()
                if response is self._cluster.end_of_stream:
                    return "it ended the stream"
                self._has_response = True
                await self._handle(response)
        finally:
            switched.cancel()

    async def _handle(self, response: Any) -> None:
        if response.created:
            awaited = self._unconfirmed.popleft()
            if response.canceled:
                raise _RefusedError(response.cancel_reason or "no reason given")
            self._was_refused = False
            self._confirmed[response.watch_id] = awaited
            awaited.watch_id = response.watch_id
            if self._awaited.get(awaited.key) is not awaited:
                self._cancel(awaited)  # nobody waits any more
        elif response.canceled:
            cancelled = self._confirmed.pop(response.watch_id, None)
            if cancelled and self._awaited.get(cancelled.key) is cancelled:
                # Most likely its revision has been compacted.
                (kv,), revision = await self._read([cancelled.key])
                if self._awaited.get(cancelled.key) is not cancelled:
                    pass  # meanwhile nobody waits any more
                elif kv:
                    self._end_waits(cancelled)
                else:
                    cancelled.revision = max(revision, cancelled.revision)
                    self._request_watch(cancelled)
        for event in response.events:
            if (found := self._awaited.get(event.kv.key)) and event.kv.mod_revision > found.revision:
                self._end_waits(found)

    def _end_waits(self, awaited: AwaitedKey) -> None:
        self._forget(awaited)
        for future in awaited.waiting:
            if not future.done():
                future.set_result(None)

    def _forget(self, awaited: AwaitedKey) -> None:
        del self._awaited[awaited.key]
        if awaited.watch_id is not None:
            self._cancel(awaited)

    def _request_watch(self, awaited: AwaitedKey) -> None:
        awaited.watch_id = None
        self._unconfirmed.append(awaited)
        request = self._rpc.WatchCreateRequest(
            key=awaited.key, start_revision=awaited.revision + 1, filters=[self._rpc.WatchCreateRequest.NODELETE]
        )
        self._requests.put_nowait(self._rpc.WatchRequest(create_request=request))

    def _cancel(self, awaited: AwaitedKey) -> None:
        request = self._rpc.WatchCancelRequest(watch_id=awaited.watch_id)
        self._requests.put_nowait(self._rpc.WatchRequest(cancel_request=request))
