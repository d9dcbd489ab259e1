"""The registry that finds rendezvous handlers by the name of their backend: built-in, registered or installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from elastic_launch.errors import LaunchError, UsageError
from elastic_launch.host import plug_ins
from elastic_launch.rendezvous import BUILT_IN
from elastic_launch.rendezvous.handler import RendezvousHandler, RendezvousInfo, RendezvousParameters, check_backend

if TYPE_CHECKING:
    from elastic_launch.rendezvous.without_agent import Member

ENTRY_POINTS = "torchrun.handlers"
"""Entry point group of packages that offer handlers: a backend's name, and a function that returns the creator."""

RendezvousHandlerCreator = Callable[[RendezvousParameters], Any]
"""Creates a handler: an object with the methods of ``RendezvousHandler``, of whatever class."""


class RendezvousHandlerRegistry:
    """Creators of handlers, by the name of the backend.

    >>> registry = RendezvousHandlerRegistry()
    >>> registry.register("my-cluster", BuiltInHandler)
    >>> registry.create_handler(RendezvousParameters("my-cluster", "host-a", "job-1", 1, 2)).get_backend()
    'my-cluster'
    """

    def __init__(self) -> None:
        self._creators: dict[str, RendezvousHandlerCreator] = {}

    def register(self, backend: str, creator: RendezvousHandlerCreator) -> None:
        """Add a backend. Adding the same creator again has no effect.

        Args:
            backend: the name for ``--rdzv-backend``.
            creator: called with the ``RendezvousParameters`` of a job; returns its handler.

        Raises:
            UsageError: the name is empty, or another creator is registered under it.
        """
        check_backend(backend)
        if self._creators.setdefault(backend, creator) != creator:
            raise UsageError(
                f"rendezvous backend {backend!r}: {self._creators[backend]!r} is already registered; "
                f"choose another name for {creator!r}"
            )

    def create_handler(self, params: RendezvousParameters) -> Any:
        """Create the handler of ``params.backend``. A backend that is not registered is loaded from its package.

        Raises:
            UsageError: the backend is unknown; the message lists those that are known.
            LaunchError: its package cannot be loaded, or its creator returned something other than its handler.
        """
        backend = params.backend
        if backend not in self._creators:
            subject, hint = f"rendezvous backend {backend!r}", ", or call register()"
            creator = plug_ins.load(ENTRY_POINTS, backend, subject, self._creators, lambda offer: offer(), hint)
            self.register(backend, creator)
        handler = self._creators[backend](params)
        # The handler comes from outside, and need not be a subclass of ours.
        if not hasattr(handler, "next_rendezvous"):
            raise LaunchError(f"rendezvous backend {backend!r}: its creator returned {handler!r}, not a handler")
        if handler.get_backend() != backend:
            raise LaunchError(
                f"rendezvous backend {backend!r}: its creator returned a handler of {handler.get_backend()!r}"
            )
        return handler

    def known_backends(self) -> list[str]:
        """Return the names of all backends, registered or installed. Takes some milliseconds."""
        return sorted(self._creators.keys() | plug_ins.offered(ENTRY_POINTS))


class BuiltInHandler(RendezvousHandler):
    """A built-in backend, as a value for ``WorkerSpec.rdzv_handler``, or for a program without an agent.

    An agent takes only the parameters, from which ``factory.adapt`` creates its rendezvous. Without an agent,
    ``next_rendezvous`` joins the job; from then on a thread answers the other nodes until ``shutdown``.
    """

    def __init__(self, params: RendezvousParameters) -> None:
        self.params = params
        self._member: Member | None = None

    def get_backend(self) -> str:
        """Return the backend's name."""
        return self.params.backend

    def get_run_id(self) -> str:
        """Return the job's id."""
        return self.params.run_id

    @property
    def use_agent_store(self) -> bool:
        """Whether the job's store also serves the workers of this round. Before the first one: False."""
        return bool(self._member and self._member.assignment and self._member.assignment.agent_store)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes, and return this node's part in the next round.

        If it is called during a round, that ends for all nodes, for which ``num_nodes_waiting`` is 1 from then on.

        Raises:
            UsageError: a parameter is missing or wrong.
            RendezvousClosedError: the job has ended.
            RendezvousTimeoutError: too few nodes came in time.
            RendezvousConnectionError: the store cannot be reached, or is lost.
        """
        if self._member is None:
            from elastic_launch.rendezvous.factory import launch_config  # late: few programs have no agent
            from elastic_launch.rendezvous.without_agent import Member
            from elastic_launch.worker_spec import WorkerSpec

            self._member = Member(launch_config(self.params, WorkerSpec("default_role", 1, self)))
        return self._member.next_rendezvous()

    def is_closed(self) -> bool:
        """Return whether the job has ended, as far as this program has taken part in it."""
        return bool(self._member and self._member.is_closed)

    def set_closed(self) -> None:
        """End the job for all nodes, if this program has taken part in it."""
        if self._member:
            self._member.end()

    def num_nodes_waiting(self) -> int:
        """Return 1 if the round has ended and another one follows, because nodes join, leave or are lost; else 0."""
        return int(bool(self._member and self._member.has_ended and not self._member.is_closed))

    def shutdown(self) -> bool:
        """End the job for all nodes, if this program has taken part in it, and release everything. Return True."""
        self.set_closed()
        return True


rendezvous_handler_registry = RendezvousHandlerRegistry()
"""The registry of ``get_rendezvous_handler`` and ``--rdzv-backend``. It has the built-in backends from the start."""
for _backend in BUILT_IN:
    rendezvous_handler_registry.register(_backend, BuiltInHandler)


def get_rendezvous_handler(params: RendezvousParameters) -> Any:
    """Create the handler of ``params.backend`` from ``rendezvous_handler_registry``.

    Returns:
        The handler, for ``WorkerSpec.rdzv_handler``.

    Raises:
        UsageError: the backend is unknown.
        LaunchError: the backend's package is broken; see ``RendezvousHandlerRegistry.create_handler``.

    >>> get_rendezvous_handler(RendezvousParameters("c10d", "host-a:29400", "job-1", 2, 4)).get_run_id()
    'job-1'
    """
    return rendezvous_handler_registry.create_handler(params)
