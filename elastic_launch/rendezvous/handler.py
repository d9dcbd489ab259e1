"""torch's interface to a rendezvous, for handlers that users bring; ``registry`` finds them by name.

Nothing in this package requires a handler to be a subclass of ``RendezvousHandler``: a handler written for torch's
interface works unchanged.
"""

from __future__ import annotations

import contextlib
import os
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from elastic_launch.errors import UsageError
from elastic_launch.host.ports import outward_address, reserve_port
from elastic_launch.parsing import read_flag


class RendezvousParameters:
    """The settings from which a handler is created. Names and order are torch's.

    Args:
        backend: the name under which the handler is registered.
        endpoint: where nodes meet, usually ``HOST:PORT``; its meaning is the backend's.
        run_id: the job's id.
        min_nodes: number of nodes that a round needs, at least 1.
        max_nodes: number of nodes that a round can have, at least ``min_nodes``.
        local_addr: address of this node, for the other nodes; None: the handler finds one.
        config: any further settings, which become the mapping ``config``.

    Raises:
        UsageError: ``backend`` is empty, or not 1 <= ``min_nodes`` <= ``max_nodes``.

    >>> params = RendezvousParameters("c10d", "host-a:29400", "job-1", 2, 4, is_host="yes", timeout="60")
    >>> params.get_as_bool("is_host"), params.get_as_int("timeout"), params.get("protocol", "http")
    (True, 60, 'http')
    """

    def __init__(
        self,
        backend: str,
        endpoint: str,
        run_id: str,
        min_nodes: int,
        max_nodes: int,
        local_addr: str | None = None,
        **config: Any,
    ) -> None:
        check_backend(backend)
        if not 1 <= min_nodes <= max_nodes:
            raise UsageError(f"min_nodes={min_nodes}, max_nodes={max_nodes}: must be 1 <= min_nodes <= max_nodes")
        self.backend = backend
        self.endpoint = endpoint
        self.run_id = run_id
        self.min_nodes = min_nodes
        self.max_nodes = max_nodes
        self.config = config
        self.local_addr = local_addr

    def get(self, key: str, default: Any = None) -> Any:
        """Return the setting ``key`` as it was given, or ``default`` if it was not."""
        return self.config.get(key, default)

    def get_as_bool(self, key: str, default: bool | None = None) -> bool | None:
        """Return the setting ``key`` as a bool, or ``default`` if it was not given.

        Accepts a bool, 1, 0, and in any case the texts 1, true, t, yes, y, 0, false, f, no and n.

        Raises:
            UsageError: the value is not one of these.
        """
        value = self.get(key, default)
        flag = read_flag(value)
        if flag is None and value is not None:
            raise UsageError(f"{key}={value!r} in the rendezvous settings: must be true or false")
        return flag

    def get_as_int(self, key: str, default: int | None = None) -> int | None:
        """Return the setting ``key`` as an int, or ``default`` if it was not given.

        Raises:
            UsageError: ``int`` does not accept the value.
        """
        value = self.get(key, default)
        try:
            return None if value is None else int(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{key}={value!r} in the rendezvous settings: must be a whole number") from error


def check_backend(name: str) -> None:
    """Raise UsageError if the name of a backend is empty."""
    if not name:
        raise UsageError("backend='': must name a rendezvous backend")


class Store(Protocol):
    """The methods of torch's ``Store`` that the launcher calls on a handler's store."""

    def get(self, key: str, /) -> bytes:
        """Return the value of a key; wait until the key exists."""

    def set(self, key: str, value: str, /) -> object:
        """Set the value of a key."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter, which begins at 0, and return the sum."""

    def check(self, keys: list[str], /) -> bool:
        """Return whether all the keys exist."""

    def delete_key(self, key: str, /) -> object:
        """Delete a key. A store that cannot is used without."""


@dataclass
class RendezvousStoreInfo:
    """Address of the store through which the workers of a round find each other."""

    MASTER_ADDR_KEY: ClassVar[str] = "MASTER_ADDR"
    """Key of the address in the nodes' store."""
    MASTER_PORT_KEY: ClassVar[str] = "MASTER_PORT"
    """Key of the port in the nodes' store."""

    master_addr: str
    """Host name or IP address."""
    master_port: int
    """TCP port."""

    @staticmethod
    def build(rank: int, store: Store, local_addr: str | None, server_port: int | None = None) -> RendezvousStoreInfo:
        """Agree on the address through the nodes' store: rank 0 writes it, the other nodes read it.

        Args:
            rank: group rank of this node.
            store: the store that all nodes of the round share. Its ``get`` waits for the key.
            local_addr: address by which the other nodes reach this one; None: this host's name if it can be resolved,
                else its IP address.
            server_port: port on which the workers' store is already served; None: a port that is free now.

        Raises:
            UnavailableError: there is no free port.
        """
        if rank == 0:
            port = server_port
            if port is None:
                with reserve_port() as free:
                    port = free.getsockname()[1]
            store.set(RendezvousStoreInfo.MASTER_ADDR_KEY, local_addr or _own_name())
            store.set(RendezvousStoreInfo.MASTER_PORT_KEY, str(port))
        address = store.get(RendezvousStoreInfo.MASTER_ADDR_KEY).decode()
        return RendezvousStoreInfo(address, int(store.get(RendezvousStoreInfo.MASTER_PORT_KEY)))


def _own_name() -> str:
    """Return a name of this host that other hosts may resolve, else its outward IP address, else 127.0.0.1."""
    for name in (socket.getfqdn(), os.uname().nodename):
        if not name.startswith("localhost"):
            with contextlib.suppress(OSError, UnicodeError):
                socket.getaddrinfo(name, None)
                return name
    return outward_address() or "127.0.0.1"


class RendezvousInfo(NamedTuple):
    """Result of ``RendezvousHandler.next_rendezvous``: this node's part in a round."""

    store: Store
    """Store that the nodes of the round share, with the methods of torch's ``Store``."""
    rank: int
    """Group rank of this node, from 0."""
    world_size: int
    """Number of nodes in the round."""
    bootstrap_store_info: RendezvousStoreInfo
    """Address of the workers' store."""


class RendezvousHandler(ABC):
    """A rendezvous that users bring: the way in which the nodes of a job find each other.

    Methods may block: the agent calls all of them in one thread beside its own. Register a handler with
    ``rendezvous_handler_registry.register``, or offer it in a package through the entry point group
    ``torchrun.handlers``.
    """

    @abstractmethod
    def get_backend(self) -> str:
        """Return the name under which this handler is registered."""

    @property
    def use_agent_store(self) -> bool:
        """Whether the workers' store is already served at ``bootstrap_store_info``; if not, rank 0 serves it there."""
        return False

    @abstractmethod
    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes, and return this node's part in the new round.

        Raises:
            RendezvousClosedError: the job has ended.
            RendezvousGracefulExitError: the job goes on without this node.
            RendezvousTimeoutError: too few nodes came in time.
            RendezvousConnectionError: the other nodes cannot be reached.
            RendezvousStateError: the state that the nodes share is corrupt.
        """

    @abstractmethod
    def is_closed(self) -> bool:
        """Return whether the job has ended."""

    @abstractmethod
    def set_closed(self) -> None:
        """Mark the job as ended."""

    @abstractmethod
    def num_nodes_waiting(self) -> int:
        """Return how many nodes wait for the next round. If it is above 0, the agent ends the current round."""

    @abstractmethod
    def get_run_id(self) -> str:
        """Return the job's id."""

    @abstractmethod
    def shutdown(self) -> bool:
        """End the job for all nodes, and release all resources. Return whether that worked."""
