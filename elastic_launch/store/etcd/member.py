"""Layer 2: the agent's hand on the process that runs this host's member of an embedded etcd (``member_main``).

Claims an endpoint, starts one process, hears what it has to say. Asks no member anything: that takes time.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping

from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host.child import Child
from elastic_launch.store.etcd.member_main import Plan

CLOSE_PATIENCE = 5.0
"""Seconds to wait for the end of the process; it is killed then."""
LINGER = 0.5
"""Seconds that a member serves on when its agent is through with the job: the others' members, which may have no
majority afterwards, learn within a heartbeat (0.1 s) what the last thing was that a majority agreed to."""

_STRANGE = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
"""Variables of which the members' connections would make use, and must not."""


def claim(endpoint: str, run_id: str) -> socket.socket | None:
    """Claim an endpoint for this agent, among those of the job that share its network.

    Returns:
        What holds the claim until it is closed, or the process ends; None: another agent has it.
    """
    holder = socket.socket(socket.AF_UNIX)
    try:
        # An abstract name: it is gone with the process, however that ends.
        holder.bind("\0elastic-launch/" + hashlib.sha256(f"{endpoint}/{run_id}".encode()).hexdigest())
    except OSError:
        holder.close()
        return None
    return holder


class EtcdMember(Child):
    """The process. ``fileno()`` is readable when ``take()`` has something to say."""

    def __init__(self, plan: Plan, environ: Mapping[str, str]) -> None:
        """Start the process.

        Args:
            plan: which member it runs, and how.
            environ: the variables of the process and of etcd; those that configure another etcd are left out.

        Raises:
            RendezvousConnectionError: the system cannot start a process.
        """
        kept = {
            name: value
            for name, value in environ.items()
            if name.lower() not in _STRANGE and (not name.startswith("ETCD_") or name == "ETCD_UNSUPPORTED_ARCH")
        }
        self._temporary = plan.folder if plan.temporary else ""
        super().__init__("member_main", ("-I", "-S"), kept, tuple(plan), "the process for a member of etcd")

    def take(self) -> list[str]:
        """What there is to tell people.

        Raises:
            RendezvousConnectionError: the process has ended, and the member with it. ``close()`` is still due.
        """
        lines: list[str] = []
        while True:
            try:
                text = self._control.recv(1 << 16)
            except BlockingIOError:
                return lines
            except OSError:
                text = b""
            if not text:
                raise RendezvousConnectionError(
                    f"the process (pid {self.pid}) that ran this host's etcd member is gone, and the member with it"
                )
            lines.append(text.decode())

    def close(self, linger: float = LINGER) -> None:
        """End the member after ``linger`` seconds, and wait for that."""
        if self._process.closed:
            return
        self.has_ended(linger)
        self.end(CLOSE_PATIENCE)
        if os.path.exists(self._temporary):  # it was killed itself
            import shutil  # late: hardly ever needed

            shutil.rmtree(self._temporary, ignore_errors=True)
