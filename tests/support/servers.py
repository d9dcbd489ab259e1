"""Stores that the tests of a process share, for tests that are not about the store's own beginning and end.

Each takes a second or two to start. Jobs are kept apart by their run ids, other tests by the prefixes of their keys.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from elastic_launch.host.ports import listen
from elastic_launch.store.etcd.server import EtcdServer
from elastic_launch.store.tcpstore_server import TCPStoreServer
from tests.support.leaks import shared_by_tests
from tests.support.waiting import wait_until

_running = contextlib.ExitStack()
_TEMP = tempfile.gettempdir()


@functools.cache
def shared_store() -> TCPStoreServer:
    """torch's TCPStore, which serves."""
    with _outside_of_tests():
        host = TCPStoreServer(listen(0), dict(os.environ))
    _running.callback(host.close)
    wait_until(lambda: host.take() or host.ready, "the shared store")
    return host


@functools.cache
def shared_etcd() -> str:
    """The endpoint of an etcd of one member."""
    server = EtcdServer()
    with _outside_of_tests():
        server.start(stderr=subprocess.DEVNULL)
    _running.callback(server.stop)
    return server.get_endpoint()


def stop_shared() -> None:
    """End them."""
    _running.close()


@contextlib.contextmanager
def _outside_of_tests() -> Iterator[None]:
    """A block that may run in any test, and starts what outlives it."""
    with pytest.MonkeyPatch.context() as patch, shared_by_tests():
        patch.setenv("TMPDIR", _TEMP)
        patch.setattr(tempfile, "tempdir", _TEMP)
        yield
