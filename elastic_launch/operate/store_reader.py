"""Read what a job's nodes have written to their store. Nothing is written there."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from elastic_launch.core.job_view import MAX_ROUNDS, Records
from elastic_launch.core.rendezvous.monitor import number
from elastic_launch.core.rendezvous.records import MAX_TICKETS, Closed, decode
from elastic_launch.core.store_requests import Get
from elastic_launch.errors import RendezvousConnectionError, UsageError
from elastic_launch.parsing import read_flag
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.store.client import StoreClient

PATIENCE = 5.0
"""Seconds to wait for the store."""
BRIDGE_PATIENCE = 10.0
"""Further seconds for the start of the bridge to etcd, which imports gRPC. It says by itself what it cannot reach."""
_BATCH = 1024
"""Keys that are read with one request."""
_OF_ROUND = ("ticket", "status", "closed", "end", "decision")


class StoreReader:
    """A connection to the store of one job, for reading.

    Args:
        run_id: the job's id.
        backend: ``c10d``, ``static`` or ``etcd``.
        endpoint: where the store is, as in ``--rdzv-endpoint``.
        settings: ``--rdzv-conf``.
        environ: variables of the bridge to etcd.
        token_file: the file with the job's token; empty: it has none.
        has_gate: whether the store has a gate, for which the token is needed.

    Raises:
        UsageError: there is no such backend, or a setting is wrong, or the file holds no token, or there is none.
        RendezvousConnectionError: the store cannot be reached.
    """

    def __init__(
        self,
        run_id: str,
        backend: str,
        endpoint: str,
        settings: Mapping[str, str],
        environ: Mapping[str, str],
        token_file: str = "",
        has_gate: bool = False,
    ) -> None:
        self.run_id = run_id
        self._signer = None
        secret = b""
        if token_file:
            from elastic_launch.host import token  # late, as this needs hmac, too
            from elastic_launch.rendezvous.signing import Signer

            secret = token.read(token_file)
            self._signer = Signer(secret, run_id, _warn)
        elif has_gate:
            from elastic_launch.rendezvous.factory import NO_TOKEN

            raise UsageError(NO_TOKEN)
        self._opened = contextlib.ExitStack()
        self._end = time.monotonic() + PATIENCE
        with contextlib.ExitStack() as stack:
            self._backend = _backend(Store(run_id, backend, endpoint, settings, environ, secret, has_gate), stack)
            stack.callback(self._backend.close)
            if backend.startswith("etcd"):
                self._end += BRIDGE_PATIENCE
                self._backend.open()
            self._client = stack.enter_context(contextlib.closing(self._connect()))
            self._opened = stack.pop_all()

    def read(self) -> Records | None:
        """Read what there is of the current round and of those before it; None: no such job has met there.

        Raises:
            RendezvousConnectionError: the store is lost, or does not answer.
            RendezvousStateError: it holds something else.
        """
        self._end = time.monotonic() + PATIENCE
        prefix = f"elastic/{self.run_id}"
        (value,) = self._get([f"{prefix}/round"])
        round_ = number(value, "round")
        keys = self._named(f"{prefix}/{round_}/", _OF_ROUND)
        if not keys["ticket"] and not value:
            return None
        closed = decode(Closed, keys["closed"], "closed") if keys["closed"] else None
        leader = max(0, closed.leader) if closed else 0
        tickets = range(1, number(keys["ticket"], "ticket", MAX_TICKETS) + 1)
        kinds = ("node/", "heartbeat/", "succeeded/", f"assignment/{leader}/")
        names = [f"members/{leader}", f"leader/{max(1, leader)}", *(f"{kind}{t}" for kind in kinds for t in tickets)]
        keys |= self._named(f"{prefix}/{round_}/", names)
        past = range(max(0, round_ - MAX_ROUNDS), round_)
        before = self._named(f"{prefix}/", [f"{r}/{name}" for r in past for name in ("closed", "end", "decision")])
        found = [(r, {name: before[f"{r}/{name}"] for name in ("closed", "end", "decision")}) for r in past]
        return Records(round_, keys, found)

    def close(self) -> None:
        """Close the connection."""
        self._opened.close()

    def _named(self, prefix: str, names: Iterable[str]) -> dict[str, bytes]:
        names = list(names)
        return dict(zip(names, self._get([f"{prefix}{name}" for name in names]), strict=True))

    def _get(self, keys: Sequence[str]) -> list[bytes]:
        found: list[bytes] = []
        for at in range(0, len(keys), _BATCH):
            found += self._call(self._client, keys[at : at + _BATCH])
        return found

    def _call(self, client: StoreClient, keys: Sequence[str]) -> list[bytes]:
        request = Get(tuple(keys))
        reply = client.call(request, max(0.1, self._end - time.monotonic()))
        if self._signer:
            reply = self._signer.open(request, reply)
        assert isinstance(reply, list)
        return reply

    def _connect(self) -> StoreClient:
        """Connect to the first address of the endpoint that answers."""
        while True:
            client = self._backend.connect()
            try:
                self._call(client, [f"elastic/{self.run_id}/round"])
            except RendezvousConnectionError as error:
                client.close()
                self._check_bridge()
                if not self._backend.has_untried_address() or time.monotonic() >= self._end:
                    raise RendezvousConnectionError(str(self._backend.explain(error))) from error
            else:
                return client

    def _check_bridge(self) -> None:
        """Raise what the bridge says if it ends. It closes its connections a moment before."""
        poller = select.poll()
        waits = self._backend.descriptors()
        for fd, mask in waits:
            poller.register(fd, mask)
        if waits and poller.poll(1000):
            self._backend.take()


def _warn(text: str) -> None:
    print(f"elastic-job: {text}", file=sys.stderr)


class Store(NamedTuple):
    """A job's store, by the arguments of ``StoreReader``."""

    run_id: str
    backend: str
    endpoint: str
    settings: Mapping[str, str]
    environ: Mapping[str, str]
    token: bytes
    has_gate: bool


def _backend(store: Store, stack: contextlib.ExitStack) -> Backend:
    """Return what connects to a store. ``stack`` removes what it needs."""
    made = _BACKENDS.get(store.backend)
    if made is None:
        raise UsageError(f"--rdzv-backend={store.backend}: must be one of {', '.join(_BACKENDS)}")
    if not store.endpoint:
        raise UsageError("--rdzv-endpoint: must say where the job's store is, as for elastic-run")
    return made(store, stack)


def _tcp_store(store: Store, _: contextlib.ExitStack) -> Backend:
    from elastic_launch.parsing import split_endpoint
    from elastic_launch.rendezvous.backends.c10d import C10dBackend
    from elastic_launch.rendezvous.factory import DEFAULT_PORTS

    gate_key = b""
    if store.has_gate:
        from elastic_launch.store.challenge import gate_key as key_of

        gate_key = key_of(store.token, store.run_id)
    host, port = split_endpoint(store.endpoint)
    return C10dBackend(host, port or DEFAULT_PORTS[store.backend], False, {}, gate_key=gate_key)


def _etcd(store: Store, stack: contextlib.ExitStack) -> Backend:
    from elastic_launch.rendezvous.backends.etcd import (
        EtcdBackend,
        job_certificates,
        split_members,
        wants_certificates,
    )

    if store.has_gate:
        raise UsageError(f"--store-gate: --rdzv-backend {store.backend} has no gate")
    conf = {"read_timeout": str(PATIENCE), **store.settings}
    if store.token and read_flag(conf.get("embedded", "")) and wants_certificates(conf):
        made = stack.enter_context(job_certificates(store.token, store.run_id, split_members(store.endpoint)))
        conf.update(made.conf)
    return EtcdBackend(store.endpoint, store.run_id, conf, store.environ)


_BACKENDS: dict[str, Callable[[Store, contextlib.ExitStack], Backend]] = {
    "c10d": _tcp_store,
    "static": _tcp_store,
    "etcd": _etcd,
    "etcd-v2": _etcd,
}
