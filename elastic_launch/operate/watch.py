"""``elastic-job status --watch``: a live screen on a terminal, and a line for each change elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from elastic_launch.control.client import PATIENCE, ControlClient, GoneError
from elastic_launch.errors import RendezvousError, UnavailableError
from elastic_launch.operate.show import one_line, screen
from elastic_launch.operate.status import View
from elastic_launch.operate.text import clock

INTERVAL = 1.0
"""Seconds between two looks, if nothing changes before."""
_ENTER = "\x1b[?1049h\x1b[?25l"
"""Use the terminal's other screen, so that nothing of ours stays on the first one, and hide the cursor."""
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_BEGIN, _COMMIT = "\x1b[?2026h", "\x1b[?2026l"
"""Between these, terminals that can do so show nothing of what changes."""
OVER = ("succeeded", "failed", "stopped")
"""States after which nothing follows."""


class Agents:
    """The agents of a job on this host, which tell each change by themselves."""

    def __init__(self, view: View) -> None:
        self._clients: dict[int, ControlClient] = {}
        self._latest: dict[int, dict[str, Any]] = {}
        self.were_any = False
        """Whether any agent runs, or has ended since it was last asked."""
        for number, agent in enumerate(view.job.agents if view.job else []):
            try:
                client = self._clients[number] = ControlClient(agent["socket"])
                client.send({"request": "subscribe"})
                self.were_any = True
            except GoneError:
                self.were_any = True
            except UnavailableError:
                pass  # it is not there for another client now
            self._latest[number] = agent
        self._asked_at: dict[int, float] = {}
        """When those were asked that have not answered yet, in seconds of the monotonic clock."""

    @property
    def are_left(self) -> bool:
        """Whether any agent still runs."""
        return bool(self._clients)

    def descriptors(self) -> list[int]:
        """Return what becomes readable when something has changed."""
        return [client.fileno() for client in self._clients.values()]

    def statuses(self) -> list[dict[str, Any]]:
        """Return the latest statuses of those that run; at the end, the last ones."""
        for number, client in list(self._clients.items()):
            try:
                for reply in client.take():
                    self._asked_at.pop(number, None)
                    self._latest[number] = reply.get("status") or self._latest[number]
            except GoneError:
                client.close()
                del self._clients[number]
                self._asked_at.pop(number, None)
                if len(self._latest) > 1:
                    del self._latest[number]
        return [self._latest[number] for number in sorted(self._latest)]

    def ask(self, seconds: float) -> None:
        """Ask for statuses as they are now: the agents tell changes by themselves, but not each step.

        Args:
            seconds: how long to wait for the answers; one that comes later is not lost.
        """
        for number, client in self._clients.items():
            if number not in self._asked_at:
                self._asked_at[number] = time.monotonic()
                client.send({"request": "status"})
        end = time.monotonic() + seconds
        while self._asked_at and (left := end - time.monotonic()) > 0:
            self.wait(left)
            self.statuses()

    def wait(self, seconds: float) -> None:
        """Wait until an agent tells something."""
        poller = select.poll()
        for fd in self.descriptors():
            poller.register(fd, select.POLLIN)
        poller.poll(seconds * 1000)

    def silent(self) -> list[int]:
        """Return the pids of those that should have answered long ago."""
        late = time.monotonic() - PATIENCE
        return [self._clients[number].pid for number, asked in self._asked_at.items() if asked < late]

    def close(self) -> None:
        """Disconnect."""
        for client in self._clients.values():
            client.close()


def watch(view: View, as_json: bool) -> int:
    """Show the job until it ends. Return the exit status.

    Raises:
        KeyboardInterrupt: the user has seen enough. The terminal is as before.
        RendezvousError: the store cannot be read any more, and no agent is here.
    """
    is_live = sys.stdout.isatty() and not as_json
    with contextlib.closing(Agents(view)) as agents, _live_screen() if is_live else contextlib.nullcontext() as wake:
        seen: dict[str, Any] = {}
        before = ""
        for statuses in _changes(agents, wake):
            try:
                seen = view.look(statuses)
            except RendezvousError:
                if not seen:
                    raise
            before = _show(seen, before, as_json=as_json, is_live=is_live)
            if (agents.were_any and not agents.are_left) or seen["state"] in OVER:
                break
    if is_live:
        print("\n".join(screen(seen, time.time(), os.get_terminal_size(1).columns)))
    return 0


def _changes(agents: Agents, wake: int | None) -> Iterator[Sequence[dict[str, Any]]]:
    """Yield the agents' statuses: at once, after each change, and every second."""
    while True:
        yield agents.statuses()
        poller = select.poll()
        for fd in [*agents.descriptors(), *([wake] if wake is not None else [])]:
            poller.register(fd, select.POLLIN)
        poller.poll(INTERVAL * 1000)
        if wake is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 64)


def _show(seen: dict[str, Any], before: str, *, as_json: bool, is_live: bool) -> str:
    """Show a view, unless that would repeat what was shown before. Return what is shown now."""
    if is_live:
        size = os.get_terminal_size(1)
        lines = screen(seen, time.time(), size.columns)
        frame = f"{_END_OF_LINE}\r\n".join(lines[: size.lines - 1])
        text = f"{size}{frame}"
        shown = f"{_BEGIN}{_HOME}{frame}{_END_OF_LINE}{_BELOW}{_COMMIT}"
    elif as_json:
        text = json.dumps({**seen, "nodes": [{**node, "heartbeat": None} for node in seen["nodes"]]})
        shown = json.dumps({"version": 1, **seen})
    else:
        text = one_line(seen)
        shown = f"{clock(time.time(), time.time())} {text}"
    if text != before:
        sys.stdout.write(shown if is_live else f"{shown}\n")
        sys.stdout.flush()
    return text


@contextlib.contextmanager
def _live_screen() -> Iterator[int]:
    """Use the terminal's other screen. Yield a descriptor that is readable when its size has changed."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGWINCH, lambda signum, frame: None)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        sys.stdout.write(_ENTER)
        sys.stdout.flush()
        yield reading
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        signal.set_wakeup_fd(wakeup)
        os.close(reading)
        os.close(writing)
