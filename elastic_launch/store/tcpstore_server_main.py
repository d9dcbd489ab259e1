"""Layer 2: the process that hosts the job's store: torch's own TCPStore, on a socket that the agent bound before.

It runs as a program of its own, ``main(LISTENING, PORT, SOCKET, AGENT)``, because torch takes two seconds and two
hundred megabytes to import, and starts threads. LISTENING is the socket to serve; SOCKET a stream to the agent, which
gets one byte when the store serves; AGENT a pidfd of the agent, since a program that forks may keep copies of the
stream's other end. The process ends when either says that the agent is gone.

With each byte that comes from the agent comes a listening socket, for a further, empty store that replaces the further
one before: it serves the workers of one round, which would be confused by the keys of an earlier one.

It has a session of its own and all signals blocked: neither a terminal nor a batch system that signals every process
of a job can end the store before the agents that need it. What it prints goes to a file that the agent reads if it
fails to start, and nowhere afterwards: torch reports every bad client with a page of C++ frames.

It imports nothing of elastic_launch, and of torch only what it serves.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import sys
import threading
from queue import SimpleQueue

OLDEST_TORCH = (2, 5)
"""The first whose server answers the greeting of our client."""


def main(listening: int, port: int, sock: int, agent: int) -> None:
    """Serve until the agent is gone. The arguments but ``port`` are inherited descriptors."""
    sys.path.pop()  # the folder that this module was found in: its other names are nobody's business
    for fd in (listening, sock, agent):
        os.set_inheritable(fd, False)
    sockets: SimpleQueue[socket.socket] = SimpleQueue()
    watcher = threading.Thread(target=_listen_to, args=(sock, agent, sockets), daemon=True)
    watcher.start()  # before the import, which takes seconds
    try:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        store = _serve(listening, port)
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in (1, 2):
            os.dup2(nowhere, fd)
        os.write(sock, b"!")
    except BaseException as error:
        # One line, the last: what torch raises has pages of C++ frames.
        print(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)
        os._exit(1)  # the watcher must not keep the process
    stores = [store]
    while True:
        fresh = sockets.get()
        del stores[1:]  # ends the server that is replaced
        with contextlib.suppress(Exception):  # clients are refused then, and tell
            port = fresh.getsockname()[1]
            stores.append(_serve(fresh.detach(), port))


def _serve(listening: int, port: int) -> object:
    """Have torch serve the socket, in a thread of its own.

    Returns:
        What keeps the store alive.

    Raises:
        ImportError: there is no torch, or it is too old.
        Exception: whatever torch raises where it cannot serve.
    """
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise ImportError(f"torch {torch.__version__} is too old")
    # The object is a client of its own server, too: hence the address.
    return TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening, use_libuv=True
    )


def _listen_to(sock: int, agent: int, sockets: SimpleQueue[socket.socket]) -> None:
    """Take the sockets that the agent sends, and end the process when it is gone."""
    stream = socket.socket(fileno=sock)
    poller = select.poll()
    for fd in (sock, agent):
        poller.register(fd, select.POLLIN)
    while agent not in dict(poller.poll()):
        try:
            data, descriptors, _, _ = socket.recv_fds(stream, 1, 1, socket.MSG_DONTWAIT)
        except OSError:
            break
        if not data:
            break
        sockets.put(socket.socket(fileno=descriptors[0]))
    os._exit(0)
