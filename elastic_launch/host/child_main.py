"""Runs in a helper process that ``child.Child`` has started: its first steps, and how it watches its agent.

It imports next to nothing, because some helper processes stay for the whole job and are meant to be small.
"""

from __future__ import annotations

import marshal
import os
import select
import socket
import sys

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost memory
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9);"  # PR_SET_PDEATHSIG, SIGKILL
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


def run(name: str, module: str, *inherited: str) -> None:
    """Take a name, and run a module.

    Args:
        name: The name that ``ps`` shows.
        module: A module with ``main(control, agent, *others)``: the socket to the agent, a pidfd of the agent, and
            further inherited descriptors.
        inherited: The numbers of these descriptors.
    """
    control, agent, *others = numbers = [int(number) for number in inherited]
    for fd in numbers:
        os.set_inheritable(fd, False)
    with open("/proc/self/comm", "w") as file:
        file.write(name)
    __import__(module)
    sys.modules[module].main(socket.socket(fileno=control), agent, *others)


def receive_message(control: socket.socket) -> Any:
    """Receive the first message that the agent sends, the value that ``Child`` was given."""
    _, (descriptor,), _, _ = socket.recv_fds(control, 1, 1)
    with open(descriptor, "rb") as file:
        file.seek(0)  # the agent has moved the shared offset
        return marshal.load(file)


def wait_for_agent(control: socket.socket, agent: int) -> bool:
    """Wait until the agent sends a message, closes the socket, or ends. Returns False if its process has ended.

    The socket alone would not do: a program that forks may keep a copy of its other end.
    """
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(agent, select.POLLIN)
    return agent not in dict(poller.poll())


def dying_with_parent(argv: Sequence[str]) -> list[str]:
    """Wrap a command so that the kernel kills its process when the thread that starts it ends.

    A small Python program sets that up and then executes the command. Code that runs between fork and exec would be
    shorter, but may hang in a program full of threads.
    """
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *argv]
