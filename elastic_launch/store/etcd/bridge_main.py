"""Layer 2: the bridge to etcd, a child process of an agent: TCPStore's protocol on one side, etcd v3 on the other.

It runs as a program of its own, ``main(CONTROL, AGENT)``: gRPC starts threads, and a process that has some cannot be
forked safely, which the agent may be. CONTROL is a socket of whole messages to the agent, AGENT a pidfd of it. It has
all signals blocked and a session of its own, and nothing that gRPC prints gets anywhere.

To the bridge: first marshalled ``{"prefix", "path", settings}``; then a byte with a descriptor for each connection that
the agent wants served. Nobody else can connect. From the bridge: one line of text when it has to give up; then it ends,
and with it the connections.

It ends with its agent. What the agent has sent until then is done first, as a TCPStore server would.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import socket
import sys
from typing import Any, NoReturn, cast

from elastic_launch.errors import UnavailableError
from elastic_launch.host.child_main import begin
from elastic_launch.store import wire
from elastic_launch.store.etcd import protobuf
from elastic_launch.store.etcd.cluster import Cluster, EtcdError, Settings
from elastic_launch.store.etcd.keys import Connection, Keys, RefusalError
from elastic_launch.store.wire import I64, U32, Op

LAST_WORDS = 1.0
"""Seconds for what an agent had asked for when it ended."""

_CHUNK = 1 << 16


class Bridge:
    """The connections of one agent."""

    def __init__(self, keys: Keys, control: socket.socket, agent: int) -> None:
        self._keys = keys
        self._control = control
        self._agent = agent
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._started = asyncio.Event()
        self._left = asyncio.Event()
        """Set when the agent is gone."""

    async def run(self) -> None:
        """Serve until the agent is gone. Raises EtcdError."""
        loop = asyncio.get_running_loop()
        self._control.setblocking(False)
        loop.add_reader(self._control, self._accept)
        loop.add_reader(self._agent, self._left.set)
        work = [
            asyncio.create_task(self._start()),
            asyncio.create_task(self._keys.watch.run()),
        ]
        leaving = asyncio.create_task(self._left.wait())
        # None of these ends but the last, except by an error.
        done, _ = await asyncio.wait((*work, leaving), return_when="FIRST_COMPLETED")
        for task in done:
            task.result()
        for sock in self._connections.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)  # what has come can still be read
        if self._connections:
            await asyncio.wait(self._connections, timeout=LAST_WORDS)

    async def _start(self) -> None:
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
            self._left.set()
        for fd in fds:
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            task = asyncio.create_task(self._serve(sock))
            self._connections[task] = sock
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).close()
        if not task.cancelled() and (error := task.exception()):
            if isinstance(error, (wire.ProtocolError, RefusalError, OSError)):
                return  # the connection's own fault: TCPStore, too, closes it
            give_up(self._control, error)

    async def _serve(self, sock: socket.socket) -> None:
        connection = self._keys.connection()
        buffer = bytearray()
        greeted = False
        while True:
            request = wire.take_request(buffer)
            if request is None:
                if not (data := await _receive(sock)):
                    return
                buffer += data
                continue
            op, fields = request[0], cast("list[Any]", request[1])
            if not greeted:
                if (op, fields) != (Op.VALIDATE, [wire.MAGIC]):
                    return
                greeted = True
            elif op is Op.PING:
                await _reply(sock, U32.pack(fields[0]))
            else:
                await self._started.wait()
                if op is Op.WAIT:
                    answer = await self._wait(sock, buffer, fields[0])
                    if answer is None:
                        return
                else:
                    answer = await self._answer(connection, op, fields)
                await _reply(sock, answer)

    async def _answer(self, connection: Connection, op: Op, fields: list[Any]) -> bytes:
        """Do what is asked. Returns the answer's bytes."""
        match op, fields:
            case Op.SET, [key, value]:
                await connection.set({key: value})
            case Op.MULTI_SET, [blobs]:
                await connection.set(dict(zip(blobs[::2], blobs[1::2], strict=True)))
            case Op.MULTI_GET, [names]:
                return wire.pack_blobs(await self._keys.get(names))
            case Op.COMPARE_SET, [key, expected, desired]:
                return wire.pack_blob(await connection.swap(key, expected, desired))
            case Op.ADD, [key, amount]:
                return I64.pack(await connection.add(key, amount))
            case Op.APPEND, [key, value]:
                await connection.append(key, value)
            case Op.DELETE_KEY, [key]:
                return I64.pack(await connection.delete(key))
            case Op.CANCEL_WAIT, []:
                return bytes([wire.STOPPED])
            case _:
                raise wire.ProtocolError(f"{op.name} is not served")
        return b""

    async def _wait(self, sock: socket.socket, buffer: bytearray, names: list[bytes]) -> bytes | None:
        """Wait for keys, or for the end of the wait. Returns the answer; None when the client is gone."""
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
        """Return True when CANCEL_WAIT has come, False when the client is gone."""
        while (request := wire.take_request(buffer)) is None:
            if not (data := await _receive(sock)):
                return False
            buffer += data
        if request[0] is not Op.CANCEL_WAIT:
            raise wire.ProtocolError("a connection that waits can be asked for nothing else")
        return True


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _receive(sock: socket.socket) -> bytes:
    """Wait for what a client sends. Where this is cancelled nothing is lost, as it can be with asyncio's sock_recv."""
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


async def _reply(sock: socket.socket, answer: bytes) -> None:
    """Send an answer. A client that is gone may have asked for more before it went, which is still to be done."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if answer:
            await asyncio.get_running_loop().sock_sendall(sock, answer)


def give_up(control: socket.socket, error: BaseException) -> NoReturn:
    """Tell the agent why, and end."""
    text = str(error) if isinstance(error, (EtcdError, UnavailableError)) else f"bug: {error!r}"
    try:
        control.send(text.encode(errors="replace")[:4000], socket.MSG_DONTWAIT)
    finally:
        os._exit(1)


def main(control_fd: int, agent: int) -> NoReturn:
    """Run the bridge; both are inherited descriptors."""
    control = begin(control_fd, agent, "elastic-etcd")
    try:
        told = marshal.loads(control.recv(1 << 20))
        sys.path += [folder for folder in told.pop("path") if folder not in sys.path]
        prefix = told.pop("prefix")
        grpc, etcdrpc = protobuf.load()

        async def serve() -> None:
            cluster = Cluster(grpc, etcdrpc, Settings(**told))
            await Bridge(Keys(cluster, prefix), control, agent).run()

        asyncio.run(serve())
    except BaseException as error:
        give_up(control, error)
    os._exit(0)
