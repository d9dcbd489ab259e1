"""A client of debugpy, as an editor has one: it stops at breakpoints in a program and its children, and goes on."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until


class Editor:
    """Sets one breakpoint in all processes, and notes where they stop."""

    def __init__(self, port: int, file: Path, line: int) -> None:
        """Connect to the adapter on this port of the host, as soon as it listens."""
        self.stops: list[int] = []
        """Lines where processes have stopped."""
        self.log: list[str] = []
        """What the processes have told."""
        self._address, self._file, self._line = ("127.0.0.1", port), file, line
        self._threads: list[threading.Thread] = []
        self._debug({"justMyCode": False, "subProcess": True})

    def wait(self) -> None:
        """Wait until all processes have ended."""
        for thread in self._threads:  # it grows meanwhile
            thread.join(120)
            assert not thread.is_alive()

    def _debug(self, settings: dict[str, Any]) -> None:
        thread = threading.Thread(target=self._session, args=(settings,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _connect(self) -> socket.socket:
        found: list[socket.socket] = []

        def connect() -> bool:
            with contextlib.suppress(OSError):
                found.append(socket.create_connection(self._address, timeout=120))
            return bool(found)

        wait_until(connect, "a debug adapter")
        return found[0]

    def _session(self, settings: dict[str, Any]) -> None:
        numbers, thread = itertools.count(1), 0
        name = settings.get("name", "launcher")
        with self._connect() as sock, sock.makefile("rwb") as stream, contextlib.suppress(ConnectionError):

            def request(command: str, **arguments: Any) -> None:
                message = {"seq": next(numbers), "type": "request", "command": command, "arguments": arguments}
                body = json.dumps(message).encode()
                stream.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                stream.flush()

            # Each request comes after the answer to the one before, as from an editor.
            request("initialize", adapterID="test", pathFormat="path", linesStartAt1=True)
            while header := stream.readline():
                stream.readline()
                message = json.loads(stream.read(int(header.split(b":")[1])))
                what = message.get("event") or message.get("command")
                self.log.append(f"{name}: {message['type']} {what}")
                match what, message.get("body"):
                    case "initialize", _:
                        request("attach", **settings)
                    case "initialized", _:
                        lines = [{"line": self._line}]
                        request("setBreakpoints", source={"path": str(self._file)}, breakpoints=lines)
                    case "setBreakpoints", _:
                        request("configurationDone")
                    case "debugpyAttach", body:
                        self._debug(body)
                    case "stopped", {"threadId": thread}:
                        request("stackTrace", threadId=thread)
                    case "stackTrace", {"stackFrames": [frame, *_]}:
                        self.stops.append(frame["line"])
                        request("continue", threadId=thread)
                    case "terminated", _:
                        request("disconnect")
