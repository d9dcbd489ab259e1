"""Runs in the bridge to etcd, a child process of an agent: serves TCPStore's protocol to the agent from etcd v3.

It is a process of its own because gRPC starts threads. A process with threads cannot be forked safely, and the program
around the agent may want to fork. What gRPC prints is discarded.

The agent first sends ``{"prefix", "path", settings}``, and then a byte with a descriptor for each connection to be
served. Nobody else can connect. If the bridge has to give up, it sends the reason in one line, and ends.

The bridge ends with its agent, but first completes the requests that the agent has sent, as a TCPStore would.

A slow etcd would take too long for one request after the other. So a connection's reads wait for the changes before
them, but not for other reads; and heartbeats, which concern no other key, wait for heartbeats only. For the same reason
nothing waits for the reset of counters of heartbeats, except reads of counters, and changes. Replies keep the order of
the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn, cast

from elastic_launch.errors import UnavailableError
from elastic_launch.host.child_main import receive_message
from elastic_launch.store import wire
from elastic_launch.store.etcd import protobuf
from elastic_launch.store.etcd.cluster import Cluster, EtcdError, EtcdSettings
from elastic_launch.store.etcd.keys import FencedWriter, Keyspace, RefusalError
from elastic_launch.store.wire import I64, U32, Op

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine

SHUTDOWN_PATIENCE = 1.0
"""Seconds to complete the requests of an agent that has ended."""

_CHUNK = 1 << 16


class Replies:
    """The replies of one connection. Each is sent when those before it have been."""

    def __init__(self, sock: socket.socket, on_error: Callable[[BaseException], None]) -> None:
        """Have ``on_error`` called with what goes wrong later."""
        self._sock = sock
        self._on_error = on_error
        self._last: asyncio.Task[None] | None = None
        """Sends the last reply of those that are to be sent later."""
        self._reads: set[asyncio.Future[bytes]] = set()
        """And resets: a change waits for both."""
        self._beat: asyncio.Future[bytes] | None = None
        self._reset: asyncio.Future[bytes] | None = None

    def read(self, reply: Coroutine[Any, Any, bytes], *, counters: bool) -> None:
        """Send the reply to a read when it is known. A read of counters begins after the last reset."""
        self._note(_after((self._reset,) if counters and self._reset else (), reply))

    def reset(self, reply: Coroutine[Any, Any, bytes]) -> None:
        """Have counters reset after the reads before, and later replies wait until that is done."""
        self._reset = self._note(_after(tuple(self._reads), reply))

    def beat(self, reply: Coroutine[Any, Any, bytes]) -> None:
        """Send the reply to a heartbeat, which begins after the last one, when it is known."""
        self._beat = self._send_later(_after((self._beat,) if self._beat else (), reply))

    async def reads_are_done(self) -> None:
        """Wait for the reads and resets that have begun."""
        if self._reads:
            await asyncio.wait(self._reads)

    async def send(self, reply: bytes) -> None:
        """Send a reply after all before it."""
        if reply:
            await self.all_are_sent()
            await _send(self._sock, reply)

    async def all_are_sent(self) -> None:
        """Wait for all replies that are to be sent later."""
        if self._last:
            await asyncio.wait((self._last,))

    def _note(self, reply: Coroutine[Any, Any, bytes]) -> asyncio.Future[bytes]:
        reading = self._send_later(reply)
        self._reads.add(reading)
        reading.add_done_callback(self._reads.discard)
        return reading

    def _send_later(self, reply: Coroutine[Any, Any, bytes]) -> asyncio.Future[bytes]:
        asked = asyncio.create_task(reply)
        self._last = asyncio.create_task(self._send_after(self._last, asked))
        self._last.add_done_callback(self._check)
        return asked

    async def _send_after(self, before: asyncio.Task[None] | None, asked: asyncio.Task[bytes]) -> None:
        reply = await asked
        if before:
            await before
        await _send(self._sock, reply)

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._on_error(error)


async def _after(before: Collection[asyncio.Future[bytes]], reply: Coroutine[Any, Any, bytes]) -> bytes:
    if before:
        await asyncio.wait(before)
    return await reply


class Bridge:
    """The connections of one agent."""

    def __init__(self, keys: Keyspace, control: socket.socket, agent: int) -> None:
        self._keys = keys
        self._control = control
        self._agent = agent
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._started = asyncio.Event()
        self._agent_is_gone = asyncio.Event()

    async def run(self) -> None:
        """Serve until the agent is gone. Raises EtcdError."""
        loop = asyncio.get_running_loop()
        self._control.setblocking(False)
        loop.add_reader(self._control, self._accept)
        loop.add_reader(self._agent, self._agent_is_gone.set)
        own = [asyncio.create_task(self._keys.cluster.return_to_own())] if self._keys.cluster.settings.preferred else []
        # The last of these tasks ends when the agent does, the others only by an error.
        tasks = [
            *own,
            asyncio.create_task(self._keep_lease()),
            asyncio.create_task(self._keys.watch.run()),
            asyncio.create_task(self._agent_is_gone.wait()),
        ]
        done, _ = await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
        for task in done:
            task.result()
        for sock in self._connections.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)  # what has arrived can still be read
        if self._connections:
            await asyncio.wait(self._connections, timeout=SHUTDOWN_PATIENCE)

    async def _keep_lease(self) -> None:
        await self._keys.start()
        self._started.set()
        await self._keys.keep()

    def _accept(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            asyncio.get_running_loop().remove_reader(self._control)
            self._agent_is_gone.set()
        for fd in fds:
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            task = asyncio.create_task(self._serve(sock))
            self._connections[task] = sock
            task.add_done_callback(self._close)

    def _close(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).close()
        if not task.cancelled() and (error := task.exception()):
            self._end(task, error)

    def _end(self, task: asyncio.Task[None], error: BaseException) -> None:
        """End a connection after an error, or give up."""
        if not isinstance(error, (wire.ProtocolError, RefusalError, OSError)):
            give_up(self._control, error)
        task.cancel()  # a fault of this connection; TCPStore closes it, too

    async def _serve(self, sock: socket.socket) -> None:
        this = cast("asyncio.Task[None]", asyncio.current_task())
        replies = Replies(sock, lambda error: self._end(this, error))
        writer, beats = self._keys.writer(), self._keys.writer()
        buffer = bytearray()
        is_validated = False
        while True:
            request = wire.take_request(buffer)
            if request is None:
                if not (data := await _receive(sock)):
                    await replies.all_are_sent()
                    return
                buffer += data
                continue
            op, fields = request[0], cast("list[Any]", request[1])
            if not is_validated:
                if (op, fields) != (Op.VALIDATE, [wire.MAGIC]):
                    return
                is_validated = True
            elif op is Op.PING:
                await replies.send(U32.pack(fields[0]))
            else:
                await self._started.wait()
                if op is Op.MULTI_GET:
                    replies.read(self._execute(writer, op, fields), counters=self._keys.are_counters(fields[0]))
                    continue
                if op in (Op.SET, Op.MULTI_SET) and self._keys.is_reset(_items(op, fields)):
                    replies.reset(self._execute(writer, op, fields))
                    continue
                if op is Op.ADD and self._keys.is_heartbeat(*fields):
                    replies.beat(self._execute(beats, op, fields))
                    continue
                await replies.reads_are_done()
                if op is Op.WAIT:
                    reply = await self._wait(sock, buffer, fields[0])
                    if reply is None:
                        return
                elif op is Op.DELETE_KEY:
                    reply = b"".join(map(I64.pack, await writer.delete([fields[0], *_more_to_delete(buffer)])))
                else:
                    reply = await self._execute(writer, op, fields)
                await replies.send(reply)

    async def _execute(self, writer: FencedWriter, op: Op, fields: list[Any]) -> bytes:
        """Execute a request. Returns the bytes of the reply."""
        match op, fields:
            case (Op.SET, _) | (Op.MULTI_SET, _):
                await writer.set(_items(op, fields))
            case Op.MULTI_GET, [names]:
                return wire.pack_blobs(await self._keys.get(names))
            case Op.COMPARE_SET, [key, expected, desired]:
                return wire.pack_blob(await writer.swap(key, expected, desired))
            case Op.ADD, [key, amount]:
                return I64.pack(await writer.add(key, amount))
            case Op.APPEND, [key, value]:
                await writer.append(key, value)
            case Op.CANCEL_WAIT, []:
                return bytes([wire.STOPPED])
            case _:
                raise wire.ProtocolError(f"{op.name} is not served")
        return b""

    async def _wait(self, sock: socket.socket, buffer: bytearray, names: list[bytes]) -> bytes | None:
        """Wait for keys, or for a request to cancel. Returns the reply; None if the client is gone."""
        waiting = asyncio.ensure_future(self._keys.wait(names))
        listening = asyncio.ensure_future(self._cancellation(sock, buffer))
        try:
            await asyncio.wait((waiting, listening), return_when="FIRST_COMPLETED")
            done = bytes([wire.DONE]) if waiting.done() and waiting.result() is None else b""
            if not listening.done():
                return done
            return done + bytes([wire.STOPPED]) if listening.result() else None
        finally:
            for task in (waiting, listening):
                task.cancel()
            await asyncio.wait((waiting, listening))

    async def _cancellation(self, sock: socket.socket, buffer: bytearray) -> bool:
        """Return True when the client cancels its wait, False when it is gone."""
        while (request := wire.take_request(buffer)) is None:
            if not (data := await _receive(sock)):
                return False
            buffer += data
        if request[0] is not Op.CANCEL_WAIT:
            raise wire.ProtocolError("a connection that waits accepts no other request")
        return True


def _items(op: Op, fields: list[Any]) -> dict[bytes, bytes]:
    """The keys and values that a request sets."""
    if op is Op.SET:
        return {fields[0]: fields[1]}
    blobs = fields[0]
    return dict(zip(blobs[::2], blobs[1::2], strict=True))


def _more_to_delete(buffer: bytearray) -> list[bytes]:
    """Take further requests to delete a key, as many as have come already. They are executed together."""
    names: list[bytes] = []
    while buffer and buffer[0] == Op.DELETE_KEY and (request := wire.take_request(buffer)):
        names.append(cast(bytes, request[1][0]))
    return names


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _receive(sock: socket.socket) -> bytes:
    """Wait for input. Nothing is lost if this is cancelled, as it can be with asyncio's ``sock_recv``."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return sock.recv(_CHUNK)
        except BlockingIOError:
            pass
        readable = loop.create_future()
        loop.add_reader(sock, _set, readable)
        try:
            await readable
        finally:
            loop.remove_reader(sock)


async def _send(sock: socket.socket, reply: bytes) -> None:
    """Send a reply. A client that is gone is ignored: requests that it sent before are still to be executed."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if reply:
            await asyncio.get_running_loop().sock_sendall(sock, reply)


def give_up(control: socket.socket, error: BaseException) -> NoReturn:
    """Tell the agent the reason, and end."""
    text = str(error) if isinstance(error, (EtcdError, UnavailableError)) else f"bug: {error!r}"
    try:
        control.send(text.encode(errors="replace")[:4000], socket.MSG_DONTWAIT)
    finally:
        os._exit(1)


def main(control: socket.socket, agent: int) -> NoReturn:
    """Run the bridge.

    Args:
        control: The socket to the agent.
        agent: A pidfd of the agent.
    """
    try:
        settings = receive_message(control)
        sys.path += [folder for folder in settings.pop("path") if folder not in sys.path]
        prefix = settings.pop("prefix")
        grpc, etcdrpc = protobuf.load()

        async def serve() -> None:
            cluster = Cluster(grpc, etcdrpc, EtcdSettings(**settings))
            await Bridge(Keyspace(cluster, prefix), control, agent).run()

        asyncio.run(serve())
    except BaseException as error:
        give_up(control, error)
    os._exit(0)
