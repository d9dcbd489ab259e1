"""The challenge at a gate: both sides prove that they know the job's token, without sending it. No socket.

    gate -> client    MAGIC, a random number
    client -> gate    what a client of a TCPStore says first, a random number, a proof
    gate -> client    ACCEPTED, a proof; or REFUSED, and the connection ends

A proof is an HMAC-SHA-256 over both random numbers and the side that sends it, with a key that follows from the token
and the job's id. So it is good for one connection, in one direction, and in one job. After that the connection is a
TCPStore's. Nothing is encrypted.

The gate speaks first, so a node without ``--store-gate`` sees at once that there is a gate. The client begins with
something that a TCPStore answers, so it sees just as fast that there is none.

Imported only for jobs with a gate.
"""

from __future__ import annotations

import hmac
import os

from elastic_launch.store.wire import GATE, pack_handshake

MAGIC = GATE + b" 1\n"
ACCEPTED, REFUSED = b"+", b"-"
_RANDOM = _PROOF = 32
"""Length of a random number and of a proof, in bytes."""
_PONG = b"pong"
GREETING = pack_handshake(_PONG)
"""What a client says first; a TCPStore without a gate answers ``_PONG``."""
_CLIENT, _GATE = b"client", b"gate"


class ChallengeError(Exception):
    """The other side has not proven that it knows the token. The message continues the name of the other side."""


def gate_key(token: bytes, run_id: str) -> bytes:
    """Return the key of a job's gates.

    Args:
        token: the job's, as from ``host.token.read``.
        run_id: the job's id.
    """
    id_ = run_id.encode(errors="surrogatepass")
    return hmac.digest(token, b"elastic-launch: gate of the job " + id_, "sha256")


class _Side:
    """One side of a challenge.

    Send ``out`` and remove from it what was sent. Until ``is_passed``, hand what comes to ``receive``.
    """

    def __init__(self, key: bytes, out: bytes, needed: int) -> None:
        self.out = bytearray(out)
        """Bytes to be sent."""
        self.needed = needed
        """How many bytes to read at most. What follows them belongs to the store."""
        self.is_passed = False
        """Whether the other side knows the token."""
        self._key = key
        self._in = bytearray()

    def _proof(self, side: bytes, gates: bytes, clients: bytes) -> bytes:
        return hmac.digest(self._key, b"%b\0%b%b" % (side, gates, clients), "sha256")


class ClientChallenge(_Side):
    """A node's side."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key, GREETING, len(MAGIC) + _RANDOM)
        self.is_begun = False
        """Whether there is a gate."""
        self._expected = b""
        """The gate's proof."""

    def receive(self, data: bytes) -> None:
        """Take bytes from the gate.

        Args:
            data: at most ``needed`` bytes.

        Raises:
            ChallengeError: there is no gate, or it does not know the token, or it refuses this node's.
        """
        self._in += data
        self.needed -= len(data)
        if not self.is_begun:
            if not MAGIC.startswith(self._in[: len(MAGIC)]):
                raise ChallengeError(_what_it_is(bytes(self._in)))
            if self.needed:
                return
            gates, own = bytes(self._in[len(MAGIC) :]), os.urandom(_RANDOM)
            self._in.clear()
            self._expected = self._proof(_GATE, gates, own)
            self.out += own + self._proof(_CLIENT, gates, own)
            self.is_begun, self.needed = True, len(ACCEPTED) + _PROOF
        elif not self._in.startswith(ACCEPTED):
            raise ChallengeError(
                "refuses this node's token: give all nodes of a job the same --token-file, and another job another "
                "--rdzv-id"
            )
        elif not self.needed:
            if not hmac.compare_digest(self._in[len(ACCEPTED) :], self._expected):
                raise ChallengeError("does not know the job's token; check which program listens there")
            self.is_passed = True


class GateChallenge(_Side):
    """The gate's side."""

    def __init__(self, key: bytes) -> None:
        self._own = os.urandom(_RANDOM)
        super().__init__(key, MAGIC + self._own, len(GREETING) + _RANDOM + _PROOF)

    def receive(self, data: bytes) -> None:
        """Take bytes from a client.

        Args:
            data: at most ``needed`` bytes.

        Raises:
            ChallengeError: it does not know the token. ``out`` tells it so.
        """
        self._in += data
        self.needed -= len(data)
        is_good = GREETING.startswith(self._in[: len(GREETING)])
        if is_good and self.needed:
            return
        clients, proof = self._in[len(GREETING) : -_PROOF], self._in[-_PROOF:]
        if not is_good or not hmac.compare_digest(proof, self._proof(_CLIENT, self._own, bytes(clients))):
            self.out += REFUSED
            raise ChallengeError("does not know the job's token")
        self.out += ACCEPTED + self._proof(_GATE, self._own, bytes(clients))
        self.is_passed = True


def _what_it_is(data: bytes) -> str:
    if data.startswith(_PONG[: len(data)]):
        return (
            "has no gate: start the node that serves it with --store-gate and the same --token-file, or this one "
            "without --store-gate"
        )
    return f"answers, but not as a gate does (it sent {data[:40]!r}); check which program listens there"
