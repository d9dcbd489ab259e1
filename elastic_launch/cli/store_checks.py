"""The checks of ``--dry-run`` that concern the store of a job of several nodes: its name, its port, its packages."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ssl
import sys
from collections.abc import Sequence
from typing import NamedTuple

from elastic_launch.core.store_requests import Get
from elastic_launch.core.text import listed
from elastic_launch.errors import RendezvousConnectionError, UnavailableError
from elastic_launch.host.addresses import is_own, join_endpoint, resolve
from elastic_launch.host.ports import reserve_port
from elastic_launch.parsing import split_endpoint
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.rendezvous.backends.c10d import C10dBackend
from elastic_launch.rendezvous.backends.etcd import EmbeddedEtcdBackend, EtcdBackend, own_address_of
from elastic_launch.store.client import NotAStoreError
from elastic_launch.store.etcd import bridge, gateway
from elastic_launch.store.etcd.server import etcd_binary

PATIENCE = 2.0
"""Seconds that a store has to answer."""
OLDEST_TORCH = (2, 5)


class Doubt(NamedTuple):
    """Something that may keep the job from running, or that cannot be known before it runs."""

    text: str


def names(backend: Backend) -> str | Doubt:
    """Resolve the endpoints' names.

    Raises:
        RendezvousConnectionError: none can be resolved.
    """
    found, errors = list[str](), list[RendezvousConnectionError]()
    for host, port in _endpoints(backend):
        try:
            addresses = resolve(host, port)
        except RendezvousConnectionError as error:
            errors.append(error)
            continue
        here = " (this host)" if any(map(is_own, addresses)) else ""
        numbers = listed(dict.fromkeys(str(address[0]) for _, address in addresses))
        found.append(f"{host}{here}" if numbers == host else f"{host} is {numbers}{here}")
    if not found:
        raise errors[0]
    text = "; ".join(dict.fromkeys(found))
    return Doubt(f"{text}; {'; '.join(map(str, errors))}") if errors else text


def _endpoints(backend: Backend) -> list[tuple[str, int]]:
    match backend:
        case C10dBackend():
            return [(backend.host, backend.port)]
        case EtcdBackend():
            return [_split(endpoint) for endpoint in backend.endpoints.split(",") if endpoint.strip()]
    return []


def _split(endpoint: str) -> tuple[str, int]:
    host, port = split_endpoint(endpoint)
    return host, port or bridge.DEFAULT_PORT


# ---- packages


def packages(backend: Backend) -> str | None:
    """Look for the packages that this node needs for the store.

    Raises:
        RendezvousConnectionError: one is missing, or too old.
    """
    match backend:
        case C10dBackend() if backend.is_host():
            return _torch()
        case EtcdBackend():
            missing = [name for name in ("etcd3", "grpc", "google.protobuf") if not _is_installed(name)]
            if missing:
                raise RendezvousConnectionError(
                    "the rendezvous backend etcd needs: pip install 'elastic-launch[etcd]' "
                    f"(No module named {missing[0]!r})"
                )
            return f"grpcio {_version('grpcio')}, etcd3 {_version('etcd3')}, protobuf {_version('protobuf')}"
    return None


def _torch() -> str:
    if _is_installed("torch"):
        version = _version("torch")
        numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
        if len(numbers) < 2 or tuple(numbers) >= OLDEST_TORCH:
            return f"torch {version}, which serves the store"
        why = f"it finds torch {version}"
    else:
        why = "no module named torch"
    raise RendezvousConnectionError(
        f"the c10d store needs torch 2.5 or later, which {sys.executable} cannot import ({why}); "
        "install torch, or use --rdzv-backend etcd"
    )


def _is_installed(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # the package around it is missing
        spec = importlib.util.find_spec(module)
        return spec is not None and spec.origin is not None
    return False


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


# ---- the store itself


def store(backend: Backend, join_timeout: float) -> str | Doubt | None:
    """Ask the store, or look whether this host can serve it.

    Args:
        backend: the store, which has not been opened.
        join_timeout: seconds for which a launch waits for a store that is not there yet.

    Raises:
        LaunchError: the launch would fail.
    """
    match backend:
        case C10dBackend():
            return _c10d(backend, join_timeout)
        case EmbeddedEtcdBackend():
            return _embedded(backend)
        case EtcdBackend():
            return _etcd(backend)
    return None


def _c10d(backend: C10dBackend, join_timeout: float) -> str | Doubt | None:
    try:
        addresses = len(resolve(backend.host, backend.port))
    except RendezvousConnectionError:
        return None  # ``names`` reports it
    if backend.is_host():
        try:
            reserve_port(backend.port).close()
        except UnavailableError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno != errno.EADDRINUSE:
                raise backend.cannot_host(cause) from error
        else:
            return f"port {backend.port} is free; this host serves the store"
    try:
        _ask(backend, addresses)
    except NotAStoreError as error:
        raise backend.explain(error) from error
    except RendezvousConnectionError as error:
        return Doubt(f"{error}; the launch waits up to {join_timeout:g} s for it")
    return f"{backend.where} answers"


def _ask(backend: C10dBackend, addresses: int) -> None:
    """Have the store answer a request that changes nothing, at the first of its ``addresses`` where it does.

    Raises:
        RendezvousConnectionError: it does not answer.
    """
    error: RendezvousConnectionError | None = None
    for _ in range(addresses):  # ``connect`` tries the next one each time
        try:
            with contextlib.closing(backend.connect()) as client:
                client.call(Get(("elastic",)), PATIENCE)
                return
        except RendezvousConnectionError as failure:
            error = failure
    if error:
        raise error


def _etcd(backend: EtcdBackend) -> str | Doubt:
    settings = bridge.parse_settings(backend.endpoints, backend.conf)
    tls = _tls(backend) if settings["secure"] else None
    good, doubts, bad = list[str](), list[str](), list[str]()
    for endpoint in settings["endpoints"]:
        host, port = _split(endpoint)
        health = gateway.ask(host, port, "/health", tls=tls)
        if isinstance(health.body, dict) and health.body.get("health") == "true":
            version = gateway.ask(host, port, "/version", tls=tls).body
            number = version.get("etcdserver", "unknown") if isinstance(version, dict) else "unknown"
            good.append(f"{endpoint} is healthy (etcd {number})")
        elif health.why == gateway.NOT_HTTP:
            doubts.append(f"{endpoint} does not answer over HTTP; it may serve gRPC alone")
        else:
            bad.append(f"{endpoint}: {health.why or 'not healthy'}")
    if not good and not doubts:
        raise RendezvousConnectionError(f"{backend.where} cannot be reached: {'; '.join(bad)}")
    text = "; ".join([*good, *doubts, *bad])
    return Doubt(text) if doubts or bad else text


def _tls(backend: EtcdBackend) -> ssl.SSLContext:
    files = bridge.given_settings(backend.conf)
    try:
        return gateway.tls_context(files.get("cacert"), files.get("cert"), files.get("key"))
    except OSError as error:
        raise RendezvousConnectionError(
            f"{backend.where}: cannot use cacert, cert and key of --rdzv-conf: {error}"
        ) from error


def _embedded(backend: EmbeddedEtcdBackend) -> str | Doubt:
    """Look at the member that this host would run: its program and its two ports. Make the certificates, if any."""
    backend.make_certificates()
    own = [(host, port) for host, port in backend.members if own_address_of(host, port)]
    if not own:
        tls = _tls(backend) if bridge.is_secure(backend.conf) else None
        return _members(backend.members, "no endpoint is this host's, so it runs no member", tls)
    binary = etcd_binary()
    for port in (own[0][1], own[0][1] + 1):
        reserve_port(port).close()
    return f"this host runs the member {join_endpoint(*own[0])} with {binary}; its ports are free"


def _members(members: Sequence[tuple[str, int]], text: str, tls: ssl.SSLContext | None) -> str | Doubt:
    """Say which of the members serve already: other hosts may have started theirs."""
    serving = [join_endpoint(*member) for member in members if gateway.is_healthy(*member, tls=tls)]
    return f"{text}; {listed(serving)} serve" if serving else Doubt(f"{text}; none of the members serves yet")
