"""Names are resolved beside the agent: a name server that does not answer holds up nobody."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host import addresses, resolver
from elastic_launch.host.addresses import is_own, resolve
from elastic_launch.host.child import Child
from elastic_launch.host.resolver import Resolver
from elastic_launch.rendezvous.backends.etcd import EtcdBackend
from elastic_launch.store.client import StoreClient
from tests.support.waiting import DEADLINE, wait_until


def answer(asked: Resolver, host: str) -> Callable[[], bool]:
    """Return what tells whether an answer, or an error, has come."""

    def is_there() -> bool:
        try:
            return asked.resolve(host, 29400) == resolve(host, 29400)
        except RendezvousConnectionError as error:
            return "yet" not in str(error)

    return is_there


def test_a_helper_process_resolves_what_is_not_in_the_hosts_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_HOSTS", os.devnull)
    asked = Resolver(dict(os.environ))
    try:
        for _ in range(2):
            wait_until(answer(asked, "localhost"))
    finally:
        asked.close()


def test_addresses_and_the_hosts_file_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "Child", None)
    asked = Resolver({})
    assert asked.resolve("::1", 1) == resolve("::1", 1)
    assert asked.resolve("localhost", 1) == resolve("localhost", 1)


def test_an_address_of_a_family_that_the_system_lacks_is_not_its_own() -> None:
    """As an IPv6 address where IPv6 is turned off."""
    assert is_own((socket.AF_INET, ("127.0.0.1", 29400)))
    assert not is_own((12345, ("::1", 29400)))


class MuteChild(Child):
    """A helper process that never answers, because it is not told what to ask."""

    def __init__(self, *args: Any, message: Any) -> None:
        super().__init__(*args)


@pytest.fixture
def _no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_HOSTS", os.devnull)
    monkeypatch.setattr(resolver, "PATIENCE", 0)
    monkeypatch.setattr(resolver, "Child", MuteChild)


@pytest.mark.usefixtures("_no_answer")
def test_a_name_server_that_does_not_answer_blocks_nobody() -> None:
    """Nor does the helper process outlive the resolver, or the question."""
    asked = Resolver(dict(os.environ))
    begun = time.monotonic()
    try:
        with pytest.raises(
            RendezvousConnectionError, match=r"cannot resolve 'node-1' yet: no answer for \d+\.\d s; check"
        ):
            asked.resolve("node-1", 29400)
        with pytest.raises(RendezvousConnectionError, match="cannot resolve 'node-2' yet"):
            asked.resolve("node-2", 29400)
    finally:
        asked.close()
    assert time.monotonic() - begun < DEADLINE


@pytest.mark.usefixtures("_no_answer")
def test_an_etcd_whose_name_takes_long_does_not_block_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve_here(host: str, port: int) -> list[addresses.Address]:
        here.append(host)
        return resolve(host, port)

    here: list[str] = []
    for module in (addresses, resolver):
        monkeypatch.setattr(module, "resolve", resolve_here)
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(StoreClient(ours, "etcd")) as client:
        backend = EtcdBackend("node-1:2379,127.0.0.1:2379", "job", {}, dict(os.environ))
        with contextlib.closing(backend):
            assert backend.addresses(client) == ("127.0.0.1", "")
    assert here == ["127.0.0.1"], "the name is left to a helper process"
