"""Runs in a helper process of the agent: runs the health check, and kills all that it leaves behind.

The process is a subreaper, so whatever the check has started stays below it. Everything is killed when the check ends,
when the agent closes its end of the socket, and when the agent ends. The result is one message: an error if the check
could not be started or killed, its exit code, the last bytes of its output, and whether these are all.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import time

from elastic_launch.env import PART
from elastic_launch.host.child_main import receive_message
from elastic_launch.workers import keeper_main

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost time
if TYPE_CHECKING:
    import socket

MAX_OUTPUT = 8192
"""Bytes of the output that are kept."""
KILL_PATIENCE = 2.0
"""Seconds to wait for the end of processes that were killed."""


def main(control: socket.socket, agent: int) -> None:
    """Run the command that comes on ``control``; ``agent`` is a pidfd of the agent."""
    keeper_main.set_subreaper(True)
    command = receive_message(control)
    output, end_of_output = os.pipe()
    os.set_blocking(output, False)
    try:
        pid = os.posix_spawnp(
            command[0],
            command,
            {name: value for name, value in os.environ.items() if name != PART},
            file_actions=[(os.POSIX_SPAWN_DUP2, end_of_output, 1), (os.POSIX_SPAWN_DUP2, end_of_output, 2)],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores these
        )
    except OSError as error:
        _reply(control, f"cannot run {command[0]}: {error.strerror}", -1, b"", True)
        return
    os.close(end_of_output)
    tail = Tail(output)
    _wait(control, agent, os.pidfd_open(pid), tail)
    exitcode = _kill_all(pid)
    tail.read()
    trouble = "a process of it cannot be killed (stuck in state D?)" if keeper_main.has_children() else ""
    _reply(control, trouble, exitcode, tail.data, tail.is_whole)


class Tail:
    """The last bytes of what comes from a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.data = b""
        self.is_whole = True

    def read(self) -> bool:
        """Read what is there. Returns whether more may come."""
        try:
            while block := os.read(self.pipe, 1 << 16):
                self.data += block
                if len(self.data) > MAX_OUTPUT:
                    self.data, self.is_whole = self.data[-MAX_OUTPUT:], False
        except BlockingIOError:
            return True
        return False


def _wait(control: socket.socket, agent: int, process: int, tail: Tail) -> None:
    """Wait until the check has ended, or is to be killed."""
    poller = select.poll()
    for fd in (control.fileno(), agent, process, tail.pipe):
        poller.register(fd, select.POLLIN)
    while {fd for fd, _ in poller.poll()} == {tail.pipe}:
        if not tail.read():
            poller.unregister(tail.pipe)


def _kill_all(pid: int) -> int:
    """Kill all descendants, and reap them for up to ``KILL_PATIENCE`` seconds. Returns the exit code of the check."""
    exitcode = -int(signal.SIGKILL)
    end = time.monotonic() + KILL_PATIENCE
    while True:
        for descendant in keeper_main.descendants(os.getpid()):
            keeper_main.kill(descendant, signal.SIGKILL)
        while keeper_main.has_children():
            reaped, status = os.waitpid(-1, os.WNOHANG)
            if not reaped:
                break
            if reaped == pid:
                exitcode = os.waitstatus_to_exitcode(status)
        if not keeper_main.has_children() or time.monotonic() >= end:
            return exitcode
        time.sleep(0.002)


def _reply(control: socket.socket, error: str, exitcode: int, output: bytes, is_whole: bool) -> None:
    try:  # noqa: SIM105 - contextlib is an import that this process does without
        control.send(marshal.dumps((error, exitcode, output, is_whole)))
    except OSError:
        pass  # the agent is gone, or does not want to know
