"""Layer 2: how a process that ``child.Child`` has started begins: with nothing but what is meant for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket

_PR_SET_NAME = 15


def begin(control: int, agent: int, name: str) -> socket.socket:
    """Close what the agent left open, and take a name.

    Args:
        control: the inherited descriptor of the socket to the agent.
        agent: that of a pidfd of the agent.
        name: of the process, as ``ps`` shows it.

    Returns:
        The socket.
    """
    for fd in (control, agent):
        os.set_inheritable(fd, False)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in (control, agent):
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(fd)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    return socket.socket(fileno=control)
