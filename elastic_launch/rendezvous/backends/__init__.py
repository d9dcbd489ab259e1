"""The stores over which the nodes of a job meet, each as one node sees it.

A backend starts what its store needs on this node: the process that hosts the store, or the bridge to etcd. It makes
connections that do not block. It does not retry: that is left to its user, the rendezvous.
"""

from __future__ import annotations

import select
from collections.abc import Mapping
from typing import Protocol

from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.store.client import StoreClient


class HelperProcess(Protocol):
    """A process that a backend needs on this node."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when ``take`` is due."""

    def take(self) -> object:
        """Check that the process still runs.

        Raises:
            RendezvousConnectionError: it has ended; the message says why.
        """

    def close(self) -> None:
        """End the process."""


class Backend(Protocol):
    """A store, as seen from one node."""

    where: str
    """Name of the store in messages, such as ``the store at host-a:29400``."""
    endpoint: str = ""
    """Where the store is, as in ``--rdzv-endpoint``."""
    settings: Mapping[str, str] = {}
    """Settings of ``--rdzv-conf`` that others need to reach it, without passwords."""
    serves: bool = False
    """Whether this node hosts the store."""
    stays: bool = False
    """Whether the store ends with the nodes that host it. All of them then stay until all know how the job ended."""
    _process: HelperProcess | None = None
    """What the store needs on this node; None: nothing, or it has not been started."""

    def open(self) -> None:
        """Start what the store needs on this node.

        Raises:
            LaunchError: it cannot be started.
        """

    def fresh_store(self) -> int:
        """Serve another, empty store for the workers of the next round.

        Returns:
            Its port; 0, the default: this node does not host the store.

        Raises:
            UnavailableError: it cannot be served.
        """
        return 0

    def workers_store(self, address: str, port: int) -> tuple[str, int]:
        """Return address and port at which this node's workers reach the store that the nodes serve for them.

        Args:
            address: The address by which this node reaches it.
            port: Its port.

        Raises:
            LaunchError: what they need for that cannot be started.
        """
        return address, port

    def connect(self, again: bool = False) -> StoreClient:
        """Begin a connection; does not wait for the store.

        Args:
            again: whether it goes to the same address as the last one, and not to the next of several.

        Raises:
            RendezvousConnectionError: the connection cannot be begun.
        """

    def has_untried_address(self) -> bool:
        """Return whether the next ``connect`` tries another address than the last ones did."""
        return False

    def addresses(self, client: StoreClient) -> tuple[str, str]:
        """Return the IP addresses of both ends of a connection that is ready.

        Returns:
            The address by which this node reaches the store, and the store's; the latter is empty if the store does
            not serve workers.
        """

    def explain(self, error: RendezvousConnectionError) -> RendezvousConnectionError:
        """Return the error with what is known on this node about its cause; by default, as it is."""
        return error

    def descriptors(self) -> list[tuple[int, int]]:
        """Return the descriptors, with their poll masks, after whose events ``take`` is due."""
        return [(self._process.fileno(), select.POLLIN)] if self._process else []

    def take(self) -> None:
        """Check that the processes which this backend started still run; does not block.

        Raises:
            RendezvousConnectionError: one that the store needs has ended; the message says why.
        """
        if self._process:
            self._process.take()

    def close(self) -> None:
        """End the processes that this backend started."""
        if self._process:
            self._process.close()
            self._process = None
