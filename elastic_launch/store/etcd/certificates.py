"""Certificates for the members and clients of a job's embedded etcd, made from the job's token with ``openssl``.

All nodes derive the private key of the same authority from the token and the job's id. So each node makes what it needs
by itself and nothing is exchanged. Without the token, nobody can make a certificate that the others accept.
The authority's key is in the memory of the agent and of ``openssl`` only. The certificates are memory files, which
vanish with the agent. They are valid for decades, so a wrong clock does no harm: the token decides, not the time.

Imported only by jobs that need it.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import re
import tempfile
from collections.abc import Sequence
from ipaddress import ip_address
from subprocess import DEVNULL, TimeoutExpired, run

from elastic_launch.errors import UnavailableError, UsageError
from elastic_launch.host.memory_files import memory_file

PATIENCE = 60.0
"""Seconds that ``openssl`` may take for one step."""
WITHOUT = "install it, or pass cacert, cert and key in --rdzv-conf, or protocol=http to do without TLS"

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""The number of points of the curve P-256; private keys are smaller."""
_BEFORE, _AFTER = bytes.fromhex("30310201010420"), bytes.fromhex("a00a06082a8648ce3d030107")
"""What surrounds the private key in DER (RFC 5915): an ECPrivateKey of P-256 without its public key."""
_HOST = re.compile(r"[A-Za-z0-9._:-]+")
_CONFIG = """\
[req]
distinguished_name = name
[name]
[ca]
default_ca = job
[job]
database = {folder}/index
new_certs_dir = {folder}
rand_serial = yes
unique_subject = no
default_md = sha256
default_startdate = 20200101000000Z
default_enddate = 20990101000000Z
email_in_dn = no
policy = policy
[policy]
commonName = supplied
[authority]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign
subjectKeyIdentifier = hash
[member]
extendedKeyUsage = serverAuth,clientAuth
subjectAltName = @hosts
[peer]
extendedKeyUsage = clientAuth
[hosts]
{hosts}
"""


class JobCertificates:
    """The certificates of one node, as files that processes of this user can read until ``close``.

    Args:
        token: the job's.
        run_id: the job's id.
        hosts: names and addresses of the members, as in the endpoint.

    Raises:
        UnavailableError: there is no ``openssl``, or it fails.
        UsageError: a host's name cannot be in a certificate.
    """

    def __init__(self, token: bytes, run_id: str, hosts: Sequence[str]) -> None:
        self._files = contextlib.ExitStack()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._files.close)
            try:
                authority, member, peer, key = _make(authority_key(token, run_id), hosts)
                self.conf = {"cacert": self._path(authority), "cert": self._path(member), "key": self._path(key)}
                """Settings of ``--rdzv-conf``."""
                self.peer = self._path(peer)
                """The certificate with which a member connects to others. It names no host, because etcd would compare
                that with the address that a connection comes from, which may be another one."""
            except OSError as error:
                raise UnavailableError(f"cannot make certificates for embedded etcd: {error}") from error
            on_error.pop_all()

    def close(self) -> None:
        """Remove the files."""
        self._files.close()

    def _path(self, data: bytes) -> str:
        fd = memory_file("certificate")
        self._files.callback(os.close, fd)
        _write(fd, data)
        return f"/proc/{os.getpid()}/fd/{fd}"


def authority_key(token: bytes, run_id: str) -> bytes:
    """Return the private key of the job's authority as PEM."""
    id_ = run_id.encode(errors="surrogatepass")
    digest = hmac.digest(token, b"elastic-launch: authority for etcd of the job " + id_, "sha512")
    number = 1 + int.from_bytes(digest, "big") % (_ORDER - 1)  # 512 bits, so that no number is likelier than others
    body = base64.encodebytes(_BEFORE + number.to_bytes(32, "big") + _AFTER)
    return b"-----BEGIN EC PRIVATE KEY-----\n%b-----END EC PRIVATE KEY-----\n" % body


def _make(authority: bytes, hosts: Sequence[str]) -> tuple[bytes, bytes, bytes, bytes]:
    """Return the certificates of the authority, of a member, and of a member that connects to others; and their key."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="elastic_launch_"))
        config = os.path.join(folder, "config")
        with open(config, "w") as file:
            file.write(_CONFIG.format(folder=folder, hosts="\n".join(map(_name, range(len(hosts)), hosts))))
        with open(os.path.join(folder, "index"), "w"):
            pass  # the list of what was issued

        def given(data: bytes) -> str:
            fd = os.memfd_create("openssl")
            stack.callback(os.close, fd)
            _write(fd, data)
            return f"/proc/{os.getpid()}/fd/{fd}"

        def certificate(name: str, key: str, *by: str) -> bytes:
            request = given(_openssl("req", "-config", config, "-new", "-key", key, "-subj", f"/CN={name}"))
            signing = ("ca", "-config", config, "-batch", "-notext", "-keyfile", authority_file, *by)
            return _openssl(*signing, "-extensions", name, "-in", request)

        authority_file = given(authority)
        made = certificate("authority", authority_file, "-selfsign")
        key = _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
        member, peer = (certificate(name, given(key), "-cert", given(made)) for name in ("member", "peer"))
        return made, member, peer, key


def _name(number: int, host: str) -> str:
    """Return the line of a host in the configuration of ``openssl``."""
    if not _HOST.fullmatch(host):
        raise UsageError(f"--rdzv-endpoint: {host!r} cannot be a host's name in a certificate")
    try:
        ip_address(host)
    except ValueError:
        return f"DNS.{number} = {host}"
    return f"IP.{number} = {host}"


def _openssl(*args: str) -> bytes:
    try:
        done = run(["openssl", *args], stdin=DEVNULL, capture_output=True, timeout=PATIENCE, check=False)
    except FileNotFoundError as error:
        raise UnavailableError(f"embedded etcd with a token needs openssl for its certificates: {WITHOUT}") from error
    except TimeoutExpired as error:
        raise OSError(f"openssl {args[0]} takes more than {PATIENCE:g} s") from error
    if done.returncode or not done.stdout:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise OSError(f"openssl {args[0]} has ended with status {done.returncode}: {last}")
    return done.stdout


def _write(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
