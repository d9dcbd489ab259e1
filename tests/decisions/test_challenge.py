"""The challenge at a gate: who knows the token gets in, and nobody else; and nobody takes a stranger for a gate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_launch.store import challenge, codec, wire
from elastic_launch.store.challenge import GREETING, MAGIC, ChallengeError, ClientChallenge, GateChallenge, gate_key

TOKEN = b"t" * 32
KEY = gate_key(TOKEN, "job")
Side = ClientChallenge | GateChallenge


def carry(sender: Side, receiver: Side, pieces: int = 1 << 16) -> bytes:
    """Hand what one side has to say to the other, in pieces; return what was said."""
    said = bytes(sender.out)
    sender.out.clear()
    at = 0
    while at < len(said):
        data = said[at : at + min(pieces, receiver.needed)]
        receiver.receive(data)
        at += len(data)
    return said


def feed(side: Side, pieces: list[bytes]) -> None:
    for piece in pieces:
        side.receive(piece[: side.needed])


@pytest.mark.parametrize("pieces", [1, 7, 1 << 16])
def test_two_sides_with_the_token_accept_each_other(pieces: int) -> None:
    client, gate = ClientChallenge(KEY), GateChallenge(KEY)
    said = carry(gate, client, pieces) + carry(client, gate, pieces)
    assert gate.is_passed
    assert not client.is_passed, "the client waits for the gate's proof"
    said += carry(gate, client, pieces)
    assert client.is_passed
    assert not client.out
    assert not gate.out
    assert TOKEN not in said
    assert KEY not in said


@pytest.mark.parametrize(("token", "run_id"), [(b"u" * 32, "job"), (TOKEN, "job2")], ids=["token", "job"])
def test_another_token_or_job_is_refused(token: bytes, run_id: str) -> None:
    client, gate = ClientChallenge(gate_key(token, run_id)), GateChallenge(KEY)
    carry(gate, client)
    with pytest.raises(ChallengeError):
        carry(client, gate)
    assert not gate.is_passed
    with pytest.raises(ChallengeError, match="refuses this node's token: give all nodes"):
        carry(gate, client)


def test_a_stranger_is_not_taken_for_the_gate() -> None:
    client, stranger = ClientChallenge(KEY), GateChallenge(gate_key(b"u" * 32, "job"))
    carry(stranger, client)
    with pytest.raises(ChallengeError):
        carry(client, stranger)
    stranger.out[:] = challenge.ACCEPTED + bytes(32)
    with pytest.raises(ChallengeError, match="does not know the job's token"):
        carry(stranger, client)


def test_what_was_said_once_is_of_no_use_again() -> None:
    client, gate = ClientChallenge(KEY), GateChallenge(KEY)
    spoken = carry(gate, client), carry(client, gate), carry(gate, client)
    other = GateChallenge(KEY)
    with pytest.raises(ChallengeError):
        other.receive(spoken[1])
    late = ClientChallenge(KEY)
    late.receive(spoken[0])
    with pytest.raises(ChallengeError, match="does not know"):
        late.receive(spoken[2])


def test_a_gate_cannot_be_answered_with_its_own_words() -> None:
    """A proof names the side that made it."""
    gate, other = GateChallenge(KEY), GateChallenge(KEY)
    own = bytes(gate.out[len(MAGIC) :])
    other._own = own
    with pytest.raises(ChallengeError):
        gate.receive(GREETING + own + other._proof(b"gate", own, own))


def test_who_has_no_gate_is_known_by_the_first_bytes() -> None:
    assert ClientChallenge(KEY).out == GREETING == wire.pack_handshake(b"pong")
    with pytest.raises(ChallengeError, match="has no gate: start the node that serves it with --store-gate"):
        ClientChallenge(KEY).receive(b"pong")
    with pytest.raises(ChallengeError, match=r"not as a gate does \(it sent b'HTTP/1.1 400'\)"):
        ClientChallenge(KEY).receive(b"HTTP/1.1 400")


def test_a_client_without_the_option_knows_a_gate_by_its_first_bytes() -> None:
    _, reader = codec.encode_handshake()
    assert reader is not None
    assert next(reader) <= len(wire.GATE)
    assert MAGIC.startswith(wire.GATE)
    with pytest.raises(wire.ProtocolError):
        reader.send(MAGIC[:4])


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=5), st.booleans())
def test_nonsense_passes_no_gate(pieces: list[bytes], is_greeted: bool) -> None:
    gate = GateChallenge(KEY)
    gate.out.clear()
    with pytest.raises(ChallengeError):
        feed(gate, [GREETING] * is_greeted + [*pieces, bytes(gate.needed)])
    assert gate.out == challenge.REFUSED
    assert not gate.is_passed


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=5), st.booleans())
def test_nonsense_is_not_taken_for_a_gate(pieces: list[bytes], is_begun: bool) -> None:
    client = ClientChallenge(KEY)
    with pytest.raises(ChallengeError):
        feed(client, [MAGIC + bytes(32)] * is_begun + [*pieces, bytes(72), bytes(72)])
    assert not client.is_passed
