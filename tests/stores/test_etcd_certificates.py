"""The certificates that each node makes from the job's token: whose they are accepted by, and where they are kept."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_launch.errors import UnavailableError, UsageError
from elastic_launch.store.etcd.certificates import JobCertificates, authority_key

TOKEN = b"t" * 32
HOSTS = ("127.0.0.1", "host-a", "::1")


@contextlib.contextmanager
def made(token: bytes = TOKEN, run_id: str = "job") -> Iterator[JobCertificates]:
    with contextlib.closing(JobCertificates(token, run_id, HOSTS)) as certificates:
        yield certificates


def context(certificates: JobCertificates, purpose: ssl.Purpose) -> ssl.SSLContext:
    found = ssl.create_default_context(purpose, cafile=certificates.conf["cacert"])
    found.verify_mode = ssl.CERT_REQUIRED
    is_member = purpose is ssl.Purpose.CLIENT_AUTH
    found.load_cert_chain(certificates.conf["cert"] if is_member else certificates.peer, certificates.conf["key"])
    return found


def shake_hands(client: JobCertificates, server: JobCertificates, host: str) -> None:
    """Have two nodes meet, without a network. Raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        context(client, ssl.Purpose.SERVER_AUTH).wrap_bio(to_client, to_server, server_hostname=host),
        context(server, ssl.Purpose.CLIENT_AUTH).wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        ends[0].read()  # with TLS 1.3 it hears only now that it was refused
    assert all(end.version() for end in ends)


def test_nodes_with_the_token_accept_each_other_and_nobody_else() -> None:
    with made() as first, made() as second, made(b"u" * 32) as stranger, made(run_id="other") as other:
        for host in HOSTS:
            shake_hands(first, second, host)
        with pytest.raises(ssl.SSLError, match=r"Hostname mismatch|IP address mismatch"):
            shake_hands(first, second, "host-b")
        for one in (stranger, other):
            with pytest.raises(ssl.SSLError):
                shake_hands(first, one, "host-a")
            with pytest.raises(ssl.SSLError):
                shake_hands(one, first, "host-a")


def test_what_was_made_vanishes() -> None:
    with made() as certificates:
        paths = [*certificates.conf.values(), certificates.peer]
        assert len({Path(path).read_bytes() for path in paths}) == 4
        assert authority_key(TOKEN, "job") not in {Path(path).read_bytes() for path in paths}
        assert not os.listdir(os.environ["TMPDIR"])
    assert not [path for path in paths if os.path.exists(path)]


def test_the_authority_follows_from_token_and_job() -> None:
    keys = {authority_key(token, run_id) for token in (TOKEN, b"u" * 32) for run_id in ("job", "other")}
    assert len(keys) == 4
    assert authority_key(TOKEN, "job") in keys


def test_certificates_that_cannot_be_made_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"'host\$a' cannot be a host's name in a certificate"):
        JobCertificates(TOKEN, "job", ["host$a"])
    (tmp_path / "openssl").write_text("#!/bin/sh\necho nonsense >&2\necho 'no such curve' >&2\nexit 3\n")
    (tmp_path / "openssl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"embedded etcd: openssl req has ended with status 3: no such curve$"):
        JobCertificates(TOKEN, "job", HOSTS)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnavailableError, match="needs openssl for its certificates: install it, or pass cacert"):
        JobCertificates(TOKEN, "job", HOSTS)
