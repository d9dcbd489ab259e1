"""Floor 3: the rendezvous of a job on one node: no store, nobody to wait for.

The worker of rank 0 hosts the process group's store, each round on a fresh port unless the user named one.
"""

from __future__ import annotations

import os
import socket

from elastic_launch.model import Assignment
from elastic_launch.ports import reserve_port


class LocalRendezvous:
    """Gives one node its place in each round."""

    def __init__(self, run_id: str, master_addr: str = "127.0.0.1", master_port: int = 0) -> None:
        """Take the job's id and the address of the workers' store; port 0 picks a free one for each round."""
        self._run_id = run_id
        self._addr = master_addr
        self._port = master_port
        self._reserved: socket.socket | None = None

    def get_run_id(self) -> str:
        """The job's id."""
        return self._run_id

    def next_round(self, local_world_size: int) -> Assignment:
        """The node's place in the next round.

        Raises:
            UnavailableError: the port that the user named is in use.
        """
        self.close()
        self._reserved = reserve_port(self._port)
        return Assignment(
            group_rank=0,
            group_world_size=1,
            base_rank=0,
            world_size=local_world_size,
            local_world_size=local_world_size,
            base_role_rank=0,
            role_world_size=local_world_size,
            master_addr=self._addr,
            master_port=self._reserved.getsockname()[1],
            host=os.uname().nodename,
            port_picked=self._port == 0,
        )

    def close(self) -> None:
        """End the reservation of the port."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
