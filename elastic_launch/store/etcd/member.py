"""The agent's side of the process that runs this host's member of an embedded etcd (``member_main``).

It claims an endpoint, starts the process, and reads what that reports. It never asks a member itself, which takes time.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import time
from collections.abc import Mapping

from elastic_launch.core.text import visible
from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host.child import Child
from elastic_launch.store.etcd.plan import MemberPlan, etcd_environment

CLOSE_PATIENCE = 5.0
"""Seconds that the process has to end; then it is killed."""
LINGER = 0.5
"""Seconds that a member keeps serving after its agent has finished the job. Without it the others may have no majority.
Within a heartbeat of etcd (0.1 s) they learn what a majority agreed on last."""

_CLAIMANTS = 4096
"""Agents of a host that may find an endpoint claimed."""
_CLAIM_PATIENCE = 1.0
"""Seconds until who has claimed an endpoint says whose process it is."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
"""Environment variables that connections between members must not obey."""


def claim_endpoint(endpoint: str, run_id: str) -> socket.socket | None:
    """Claim an endpoint for this agent, among the agents of the job in the same network namespace.

    Any user could claim any name. A claim of another user's does not count: if he wants the port, too, that will show.

    Returns:
        A socket that holds the claim until it is closed or the process ends; None if another agent has the endpoint.
    """
    # An abstract name, which vanishes with the process.
    name = "\0elastic-launch/" + hashlib.sha256(f"{endpoint}/{run_id}".encode()).hexdigest()
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(name)
        holder.listen(_CLAIMANTS)  # so that others can see whose it is
    except OSError:
        if _is_held_by_us(name):
            holder.close()
            return None
    return holder


def _is_held_by_us(name: str) -> bool:
    """Return whether a process of this user, or of root, listens at an abstract name."""
    end = time.monotonic() + _CLAIM_PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            try:
                sock.connect(name)
                credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            except OSError:
                if time.monotonic() > end:
                    return False  # nobody listens, or everybody asks
            else:
                return struct.unpack("3i", credentials)[1] in (0, os.geteuid())
        time.sleep(0.01)  # it is about to listen


class EtcdMember(Child):
    """The process. ``fileno()`` is readable when ``take()`` has something to report."""

    def __init__(self, plan: MemberPlan, environ: Mapping[str, str]) -> None:
        """Start the process.

        Args:
            plan: The member to run, and how.
            environ: Environment variables of the process and of etcd. Those for proxies or another etcd are left out.

        Raises:
            UnavailableError: The system cannot start the process.
        """
        kept = {name: value for name, value in etcd_environment(environ).items() if name.lower() not in _PROXIES}
        self._temporary = plan.folder if plan.temporary else ""
        module = "elastic_launch.store.etcd.member_main"
        super().__init__("the process for an etcd member", "elastic-member", module, kept, message=tuple(plan))

    def take(self) -> list[str]:
        """Read the lines that the process has for the console.

        Raises:
            RendezvousConnectionError: The process has ended, and the member with it. ``close()`` is still necessary.
        """
        lines: list[str] = []
        while True:
            try:
                text = self.control.recv(1 << 16)
            except BlockingIOError:
                return lines
            except OSError:
                text = b""
            if not text:
                raise RendezvousConnectionError(
                    f"the process (pid {self.pid}) that ran this host's etcd member is gone, and the member with it"
                )
            lines.append(visible(text.decode(errors="replace")))

    def close(self, linger: float = LINGER) -> None:
        """End the member after ``linger`` seconds, and wait for that."""
        if self._process.closed:
            return
        self.has_ended(linger)
        self.end(CLOSE_PATIENCE)
        if os.path.exists(self._temporary):  # the process was killed before it could remove the folder
            import shutil  # late: hardly ever needed

            shutil.rmtree(self._temporary, ignore_errors=True)
