"""Runs in the process that serves the job's c10d store: torch's own TCPStore, on a socket that the agent has bound.

It is a process of its own because loading torch takes half a second and 130 megabytes, and starts threads. The agent
starts it with ``child.Child``, so signals to the process group of a job cannot end the store before the agents that
need it.

TCPStore is written in C++. So the process loads only torch's extension module, without the Python code around it, which
takes another two seconds and ninety megabytes. If a version of torch does not allow that, the process starts over and
imports all of torch.

The process sends the agent one byte when the store serves. Each message from the agent brings a listening socket for an
additional, empty store, which replaces the additional one before. It serves the workers of one round, because keys of
an earlier round would confuse them.

Output goes to a file that the agent reads if the store cannot start. Later output is discarded: torch reports every bad
client with a page of C++ frames.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import resource
import socket
import sys
import threading
import types
from queue import SimpleQueue
from typing import Any

from elastic_launch.host.child_main import wait_for_agent

OLDEST_TORCH = (2, 5)
"""The first version of torch that answers the handshake of our client."""
_WHOLE_TORCH = "_TCPSTORE_IMPORTS_ALL_OF_TORCH"
"""The environment variable that is set if the extension module alone could not be loaded."""


def main(control: socket.socket, agent: int, listening: int) -> None:
    """Serve until the agent is gone.

    Args:
        control: The socket to the agent.
        agent: A pidfd of the agent.
        listening: Descriptor of the socket to serve.
    """
    sockets: SimpleQueue[socket.socket] = SimpleQueue()
    if _WHOLE_TORCH not in os.environ:
        try:
            _load_extension()
        except Exception:
            _start_over((control.fileno(), agent, listening))
    # Before all of torch is imported, if it must be: that takes seconds.
    threading.Thread(target=_receive_sockets, args=(control, agent, sockets), daemon=True).start()
    try:
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        stores = [_serve(socket.socket(fileno=listening))]
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in (1, 2):
            os.dup2(null, fd)
        control.send(b"!")
    except BaseException as error:
        # The first line is enough; the rest is C++ frames. The agent reads the last line of the output.
        print(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)
        os._exit(1)  # torch's threads must not keep the process alive
    while True:
        fresh = sockets.get()
        del stores[1:]  # ends the server that is replaced
        with contextlib.suppress(Exception):  # clients are refused, and report that
            stores.append(_serve(fresh))


def _load_extension() -> None:
    """Load torch's extension module, with empty modules in place of the packages that it belongs to.

    Raises:
        Exception: Whatever an extension module raises that cannot do without them. Loading it again is not possible.
    """
    spec = importlib.machinery.PathFinder.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return  # the import of torch says what is wrong
    sys.modules["numpy"] = None  # type: ignore[assignment]  # which the extension module would import
    torch: Any = types.ModuleType("torch")
    torch.__path__ = list(spec.submodule_search_locations)
    torch.distributed = types.ModuleType("torch.distributed")
    sys.modules.update({"torch": torch, "torch.distributed": torch.distributed})
    import torch._C
    import torch.version

    torch._C._c10d_init()
    torch.__version__ = torch.version.__version__
    torch.distributed.TCPStore = torch._C._distributed_c10d.TCPStore


def _start_over(descriptors: tuple[int, ...]) -> None:
    """Execute this program again, to import all of torch."""
    for fd in descriptors:
        os.set_inheritable(fd, True)
    os.execve(sys.executable, sys.orig_argv, {**os.environ, _WHOLE_TORCH: "1"})


def _serve(listening: socket.socket) -> object:
    """Have torch serve the socket, in a thread of torch's.

    Returns:
        The object that keeps the store alive.

    Raises:
        ImportError: torch is missing or too old.
        Exception: Whatever torch raises if it cannot serve.
    """
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise ImportError(f"torch {torch.__version__} is too old")
    address, port, *_ = listening.getsockname()
    # The object is also a client of its own server, hence the address.
    return TCPStore(
        "127.0.0.1" if address in ("::", "0.0.0.0") else address,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
        use_libuv=True,
    )


def _receive_sockets(control: socket.socket, agent: int, sockets: SimpleQueue[socket.socket]) -> None:
    """Queue the sockets that the agent sends, and end the process when the agent is gone."""
    while wait_for_agent(control, agent):
        try:
            data, descriptors, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_DONTWAIT)
        except OSError:
            break
        if not data:
            break
        if descriptors:  # otherwise this process may not open more: the workers find no store, and report that
            sockets.put(socket.socket(fileno=descriptors[0]))
    os._exit(0)
