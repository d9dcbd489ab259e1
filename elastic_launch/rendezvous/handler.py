"""Layer 3: torch's interface to a rendezvous, for handlers that users bring, and the registry that finds them by name.

Nothing here looks whether a handler is a subclass of ours: one that was written for torch's interface does as well.
"""

from __future__ import annotations

import contextlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from elastic_launch.config import LaunchConfig, read_flag
from elastic_launch.errors import LaunchError, UsageError
from elastic_launch.host.ports import outward_address, reserve_port
from elastic_launch.rendezvous.factory import BUILT_IN, create_own
from elastic_launch.worker_spec import WorkerSpec

ENTRY_POINTS = "torchrun.handlers"
"""The group in which a package offers handlers: a name, and a function that returns the creator of handlers."""


class RendezvousParameters:
    """What a handler is made from. Names and order are torch's; what else is given by name is in ``config``."""

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
        """Take the values.

        Raises:
            UsageError: no backend is named, or there is no number from ``min_nodes`` to ``max_nodes``, or it is 0.
        """
        if not backend:
            raise UsageError("backend='': must name a rendezvous backend")
        if not 1 <= min_nodes <= max_nodes:
            raise UsageError(f"min_nodes={min_nodes}, max_nodes={max_nodes}: must be at least 1, and in this order")
        self.backend = backend
        self.endpoint = endpoint
        self.run_id = run_id
        self.min_nodes = min_nodes
        self.max_nodes = max_nodes
        self.config = config
        self.local_addr = local_addr

    def get(self, key: str, default: Any = None) -> Any:
        """A setting as it was given."""
        return self.config.get(key, default)

    def get_as_bool(self, key: str, default: bool | None = None) -> bool | None:
        """A setting that is yes or no: a bool, 1 or 0, or one of 1, true, t, yes, y, 0, false, f, no, n in any case.

        Raises:
            UsageError: it is something else.
        """
        value = self.get(key, default)
        if value is None or isinstance(value, bool):
            return value
        answer = read_flag(value) if isinstance(value, int | str) else None
        if answer is None:
            raise UsageError(f"{key}={value!r} in the settings of the rendezvous: must be true or false")
        return answer

    def get_as_int(self, key: str, default: int | None = None) -> int | None:
        """A setting that is a whole number, or what ``int`` makes one of.

        Raises:
            UsageError: it is none.
        """
        value = self.get(key, default)
        if value is None:
            return None
        try:
            return int(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{key}={value!r} in the settings of the rendezvous: must be a whole number") from error


@dataclass
class RendezvousStoreInfo:
    """Where the workers of a round find their store."""

    MASTER_ADDR_KEY: ClassVar[str] = "MASTER_ADDR"
    MASTER_PORT_KEY: ClassVar[str] = "MASTER_PORT"

    master_addr: str
    master_port: int

    @staticmethod
    def build(rank: int, store: Any, local_addr: str | None, server_port: int | None = None) -> RendezvousStoreInfo:
        """Agree on it: the node of rank 0 says where, the others read it.

        Args:
            rank: this node's.
            store: all nodes'; its ``get`` waits for the key, as that of torch's stores does.
            local_addr: by which the others reach this node; None: its name, or else its address.
            server_port: where a store serves already; None: a port that is free now.
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


class RendezvousInfo(NamedTuple):
    """A node's place in a round, as a handler gives it."""

    store: Any
    """The nodes' own, with the methods of torch's ``Store``; keys of one round must not show in the next."""
    rank: int
    """The node's."""
    world_size: int
    """Nodes."""
    bootstrap_store_info: RendezvousStoreInfo
    """Where the workers' store is."""


class RendezvousHandler(ABC):
    """A rendezvous that users bring: how nodes find each other. Its methods may block; they run in a thread."""

    @abstractmethod
    def get_backend(self) -> str:
        """The name under which it is registered."""

    @property
    def use_agent_store(self) -> bool:
        """Whether the workers' store is served already where ``bootstrap_store_info`` says; else rank 0 serves it."""
        return False

    @abstractmethod
    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes.

        Raises:
            RendezvousClosedError: the job has ended.
            RendezvousGracefulExitError: the job goes on without this node.
            RendezvousTimeoutError: too few nodes came in time.
            RendezvousConnectionError: nodes cannot be reached.
            RendezvousStateError: what the nodes share is damaged.
        """

    @abstractmethod
    def is_closed(self) -> bool:
        """Whether the job has ended."""

    @abstractmethod
    def set_closed(self) -> None:
        """Mark the job as ended."""

    @abstractmethod
    def num_nodes_waiting(self) -> int:
        """How many nodes came too late for this round and could be in the next; above 0, the round ends."""

    @abstractmethod
    def get_run_id(self) -> str:
        """The job's id."""

    @abstractmethod
    def shutdown(self) -> bool:
        """Let go of everything; the job has ended. Returns whether that worked."""


Creator = Callable[[RendezvousParameters], Any]


class RendezvousHandlerRegistry:
    """The makers of handlers, by name of backend."""

    def __init__(self) -> None:
        self._creators: dict[str, Creator] = {}

    def register(self, backend: str, creator: Creator) -> None:
        """Add a backend.

        Raises:
            UsageError: the name is empty, or another creator has it.
        """
        if not backend:
            raise UsageError("backend='': must name a rendezvous backend")
        if self._creators.setdefault(backend, creator) != creator:
            raise UsageError(
                f"rendezvous backend {backend!r}: {self._creators[backend]!r} is registered already; "
                f"choose another name for {creator!r}"
            )

    def create_handler(self, params: RendezvousParameters) -> Any:
        """Make a handler. A backend that is not registered is looked for in the installed packages.

        Raises:
            UsageError: there is no such backend; the message lists what there is.
            LaunchError: the package that offers it cannot be loaded, or what its creator returns is not its handler.
        """
        backend = params.backend
        if backend not in self._creators:
            if (creator := _load_creator(backend)) is None:
                raise UsageError(
                    f"rendezvous backend {backend!r}: unknown; there are {', '.join(self.known_backends())}. Another "
                    f"one comes with a package that offers it (entry point group {ENTRY_POINTS}), or by register()"
                )
            self.register(backend, creator)
        handler = self._creators[backend](params)
        if not hasattr(handler, "next_rendezvous"):
            raise LaunchError(f"rendezvous backend {backend!r}: its creator returned {handler!r}, which is no handler")
        if handler.get_backend() != backend:
            raise LaunchError(
                f"rendezvous backend {backend!r}: its creator returned a handler of {handler.get_backend()!r}"
            )
        return handler

    def known_backends(self) -> list[str]:
        """Names that ``create_handler`` takes. Reading what is installed takes some milliseconds."""
        from importlib.metadata import entry_points

        return sorted(self._creators.keys() | entry_points(group=ENTRY_POINTS).names)


def _load_creator(backend: str) -> Creator | None:
    """What an installed package offers under a name; only its code is imported, and none of the others'."""
    from importlib.metadata import entry_points  # late: 20 ms, and only for backends that are not the launcher's

    for entry_point in entry_points(group=ENTRY_POINTS, name=backend):
        try:
            creator = entry_point.load()()
        except Exception as error:
            package = f" of {entry_point.dist.name}" if entry_point.dist else ""
            raise LaunchError(
                f"rendezvous backend {backend!r}: entry point {entry_point.value}{package} cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        return creator  # type: ignore[no-any-return]
    return None


class BuiltInHandler(RendezvousHandler):
    """One of the launcher's own backends, for ``WorkerSpec.rdzv_handler``: agents know how to meet over it.

    They do not call ``next_rendezvous`` for that; nobody else can, either.
    """

    def __init__(self, params: RendezvousParameters) -> None:
        """Take the parameters."""
        self._params = params

    def for_agent(self, spec: WorkerSpec, environ: Mapping[str, str], log: Callable[[str], None]) -> Any:
        """What an agent with these workers talks to. Raises UsageError where a parameter is wrong."""
        params, policy = self._params, spec.get_policy()
        config = LaunchConfig(
            min_nodes=params.min_nodes,
            max_nodes=params.max_nodes,
            nproc_per_node=spec.local_world_size,
            run_id=params.run_id,
            role=spec.role,
            rdzv_endpoint=params.endpoint,
            rdzv_backend=params.backend,
            rdzv_configs=params.config,
            max_restarts=policy.max_restarts,
            restart_window=policy.window,
            restart_backoff=f"{policy.backoff}:{policy.backoff_limit}",
            fatal_exit_codes=",".join(map(str, policy.fatal_exit_codes)),
            node_failure_limit=policy.node_failure_limit,
            crash_loop=policy.crash_loop,
            local_addr=params.local_addr or spec.local_addr,
        )
        return create_own(config, environ, log)

    def get_backend(self) -> str:
        """The backend's name."""
        return self._params.backend

    def get_run_id(self) -> str:
        """The job's id."""
        return self._params.run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Raise UsageError; see the class."""
        raise UsageError(
            f"rendezvous backend {self._params.backend!r}: only agents meet over it; use LocalElasticAgent"
        )

    def is_closed(self) -> bool:
        """False: only agents know."""
        return False

    def set_closed(self) -> None:
        """Nothing: the job's agents end it."""

    def num_nodes_waiting(self) -> int:
        """0: only agents know."""
        return 0

    def shutdown(self) -> bool:
        """Nothing is open."""
        return True


rendezvous_handler_registry = RendezvousHandlerRegistry()
"""The one that ``get_rendezvous_handler`` asks."""
for _backend in BUILT_IN:
    rendezvous_handler_registry.register(_backend, BuiltInHandler)


def get_rendezvous_handler(params: RendezvousParameters) -> Any:
    """Make the handler that the parameters ask for; see ``RendezvousHandlerRegistry.create_handler``."""
    return rendezvous_handler_registry.create_handler(params)


def _own_name() -> str:
    """This host's name if it has an address that others may use; else its address on the way out; else 127.0.0.1."""
    for name in (socket.getfqdn(), os.uname().nodename):
        if not name.startswith("localhost"):
            with contextlib.suppress(OSError, UnicodeError):
                socket.getaddrinfo(name, None)
                return name
    return outward_address() or "127.0.0.1"
