"""Runs in the process that asks for a host's addresses; see ``resolver``.

It sends the agent one message: the addresses, and the error if there are none. It ends with its agent, although the
call that resolves the name cannot be interrupted.
"""

from __future__ import annotations

import marshal
import os
import socket
import threading

from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host.addresses import Address, resolve
from elastic_launch.host.child_main import receive_message, wait_for_agent

MAX_ADDRESSES = 64
"""Most addresses that are sent."""


def main(control: socket.socket, agent: int) -> None:
    """Resolve the name in the first message.

    Args:
        control: The socket to the agent.
        agent: A pidfd of the agent.
    """
    question = receive_message(control)
    threading.Thread(target=_answer, args=(control, question["host"], question["port"]), daemon=True).start()
    wait_for_agent(control, agent)
    os._exit(0)


def _answer(control: socket.socket, host: str, port: int) -> None:
    found: list[Address] = []  # with plain numbers, which marshal knows
    why = ""
    try:
        found = [(int(family), address) for family, address in resolve(host, port)[:MAX_ADDRESSES]]
    except RendezvousConnectionError as error:
        why = str(error)
    control.send(marshal.dumps((found, why)))
