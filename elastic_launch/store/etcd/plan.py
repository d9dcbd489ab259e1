"""What a member of an embedded etcd is to be, as values that the agent sends to the member's process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

TEMPORARY = "elastic_launch_etcd_"
"""What the names of temporary folders begin with; 12 hexadecimal digits follow."""


class MemberPlan(NamedTuple):
    """How to run this host's member. The first two fields are the same on all hosts of the job."""

    endpoints: tuple[tuple[str, int], ...]
    """Host and client port of each member, in the same order everywhere. Members reach each other at the next port."""
    token: str
    """Distinguishes the cluster of this job from others."""
    own_index: int = -1
    """The index of this host's endpoint."""
    address: str = ""
    """The IP address to listen on."""
    binary: str = ""
    """The path of etcd."""
    folder: str = ""
    """The folder for etcd's data and its log."""
    temporary: bool = False
    """Whether the folder is removed at the end."""
    tls: tuple[str, str, str] | None = None
    """Paths of the authority's certificate, and of this host's certificate and key; None: plain HTTP."""
    peer_cert: str = ""
    """Path of the certificate, for the same key, with which this member connects to others; empty: the one above."""

    @property
    def cluster_id(self) -> int:
        """The id that etcd gives to a cluster with these members. It stays when members are replaced."""
        members = (_etcd_id(f"{self.peer_url(host, port)}{self.token}".encode()) for host, port in self.endpoints)
        return int.from_bytes(_etcd_id(b"".join(sorted(members))), "big")

    @property
    def scheme(self) -> str:
        """The scheme of all URLs."""
        return "https" if self.tls else "http"

    def peer_url(self, host: str, port: int) -> str:
        """Where other members reach the one with this endpoint."""
        return f"{self.scheme}://{join_endpoint(host, port + 1)}"


def join_endpoint(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def etcd_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for an etcd, without those that configure another one."""
    kept = ("ETCD_UNSUPPORTED_ARCH",)
    return {name: value for name, value in environ.items() if not name.startswith("ETCD_") or name in kept}


def _etcd_id(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()[:8]
