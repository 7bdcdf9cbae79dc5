"""Who may come in: two ends with one key, and all that others try."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.control.messages import ProtocolError, encode
from featcache.errors import AttachRefused, FeatcacheError
from featcache.reach import handshake
from featcache.reach.handshake import MAX_FRAME_BYTES, Conversation, Phase, Role

KEY = b"k" * 32
HOST_A, HOST_B = b"a" * 16, b"b" * 16
HEADER_BYTES = 8


def ends(dialing_key: bytes = KEY, listening_key: bytes = KEY) -> tuple[Conversation, Conversation]:
    return (
        Conversation(Role.DIALER, dialing_key, HOST_B),
        Conversation(Role.LISTENER, listening_key, HOST_A),
    )


def opened() -> tuple[Conversation, Conversation]:
    dialer, listener = ends()
    listener.receive(dialer.take_outgoing())  # hello
    dialer.receive(listener.take_outgoing())  # challenge
    listener.receive(dialer.take_outgoing())  # proof
    dialer.receive(listener.take_outgoing())  # proof
    return dialer, listener


def test_two_ends_with_one_key_open_and_know_each_other() -> None:
    dialer, listener = opened()
    assert dialer.phase is listener.phase is Phase.OPEN
    assert (dialer.peer, listener.peer) == (HOST_A, HOST_B)


def test_payloads_go_both_ways_whatever_pieces_the_bytes_come_in() -> None:
    dialer, listener = opened()
    for end, other in ((dialer, listener), (listener, dialer)):
        end.send(b"one")
        end.send(b"")
        end.send(b"x" * 5000)
        got: list[bytes] = []
        for byte in end.take_outgoing():
            got += other.receive(bytes([byte]))
        assert got == [b"one", b"", b"x" * 5000]


@pytest.mark.parametrize("whose", [0, 1])
def test_another_key_is_refused_at_both_ends(whose: int) -> None:
    keys = [KEY, KEY]
    keys[whose] = b"another key, as long"
    dialer, listener = ends(*keys)
    listener.receive(dialer.take_outgoing())
    dialer.receive(listener.take_outgoing())
    with pytest.raises(AttachRefused, match="keys"):
        listener.receive(dialer.take_outgoing())
    with pytest.raises(AttachRefused, match="refused: the cluster keys"):
        dialer.receive(listener.take_outgoing())
    assert dialer.phase is listener.phase is Phase.CLOSED


def test_the_listener_proves_nothing_to_an_end_that_has_not() -> None:
    dialer, listener = ends(dialing_key=b"a guess" * 5)
    listener.receive(dialer.take_outgoing())
    challenge = listener.take_outgoing()
    dialer.receive(challenge)
    with pytest.raises(AttachRefused):
        listener.receive(dialer.take_outgoing())
    assert listener._proof(Role.LISTENER) not in challenge + listener.take_outgoing()


def test_a_listener_without_the_key_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    dialer, listener = ends(listening_key=b"an impostor" * 3)
    listener.receive(dialer.take_outgoing())
    dialer.receive(listener.take_outgoing())
    with monkeypatch.context() as patch:
        patch.setattr(listener, "_check", lambda *_: None)  # it lets everybody in
        listener.receive(dialer.take_outgoing())
    with pytest.raises(AttachRefused, match="keys"):
        dialer.receive(listener.take_outgoing())


def test_a_proof_that_is_sent_back_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reflection: an end without the key lets the other prove it, and returns the very proof."""
    dialer, listener = ends(listening_key=b"an impostor" * 3)
    listener.receive(dialer.take_outgoing())
    dialer.receive(listener.take_outgoing())
    proof = dialer._proof(Role.DIALER)
    monkeypatch.setattr(listener, "_check", lambda *_: None)
    monkeypatch.setattr(listener, "_proof", lambda _: proof)
    listener.receive(dialer.take_outgoing())
    with pytest.raises(AttachRefused, match="keys"):
        dialer.receive(listener.take_outgoing())


def test_a_proof_of_another_connection_is_none() -> None:
    first, listener = ends()
    hello = first.take_outgoing()
    listener.receive(hello)
    first.receive(listener.take_outgoing())
    proof = first.take_outgoing()
    listener.receive(proof)
    assert listener.phase is Phase.OPEN
    again = Conversation(Role.LISTENER, KEY, HOST_A)
    again.receive(hello)  # the very bytes of before
    with pytest.raises(AttachRefused):
        again.receive(proof)


def test_a_host_that_dials_itself_is_refused() -> None:
    dialer = Conversation(Role.DIALER, KEY, HOST_A)
    _, listener = ends()
    with pytest.raises(ProtocolError, match="itself"):
        listener.receive(dialer.take_outgoing())


def sealed_frames(count: int) -> tuple[Conversation, list[bytes]]:
    dialer, listener = opened()
    frames = []
    for number in range(count):
        dialer.send(b"payload %d" % number)
        frames.append(dialer.take_outgoing())
    return listener, frames


@pytest.mark.parametrize("order", [[0, 0], [1], [0, 2]], ids=["repeated", "dropped", "a gap"])
def test_frames_come_once_and_in_their_order(order: list[int]) -> None:
    listener, frames = sealed_frames(3)
    *before, last = order
    for number in before:
        assert listener.receive(frames[number]) == [b"payload %d" % number]
    with pytest.raises(ProtocolError, match="did not send"):
        listener.receive(frames[last])
    assert listener.phase is Phase.CLOSED


def test_a_frame_that_is_sent_back_is_refused() -> None:
    dialer, _ = opened()
    dialer.send(b"mine")
    with pytest.raises(ProtocolError, match="did not send"):
        dialer.receive(dialer.take_outgoing())


@given(at=st.integers(HEADER_BYTES, HEADER_BYTES + 8 + 15), bit=st.integers(0, 7))
def test_a_frame_with_a_bit_changed_is_refused(at: int, bit: int) -> None:
    listener, [frame] = sealed_frames(1)
    changed = bytearray(frame)
    changed[at] ^= 1 << bit
    with pytest.raises(ProtocolError):
        listener.receive(bytes(changed))


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_at_all_open_nothing(data: bytes) -> None:
    for end in ends():
        try:
            assert end.receive(data) == []
        except FeatcacheError:
            assert end.phase is Phase.CLOSED
        assert end.phase is not Phase.OPEN


@pytest.mark.parametrize("role", Role)
def test_a_frame_before_the_handshake_is_short(role: Role) -> None:
    end = Conversation(role, KEY, HOST_A)
    header = handshake._HEADER.pack(b"fN", handshake.VERSION, handshake.MAX_GREETING_BYTES + 1)
    with pytest.raises(ProtocolError, match="over"):
        end.receive(header)


def test_a_frame_after_it_is_bounded_too() -> None:
    dialer, listener = opened()
    header = handshake._HEADER.pack(b"fN", handshake.VERSION, MAX_FRAME_BYTES + 17)
    with pytest.raises(ProtocolError, match="over"):
        listener.receive(header)
    with pytest.raises(ValueError, match="over"):
        dialer.send(bytes(MAX_FRAME_BYTES + 1))


def test_another_version_and_another_protocol_are_told_so() -> None:
    _, listener = ends()
    with pytest.raises(ProtocolError, match=f"version {handshake.VERSION + 1}"):
        listener.receive(handshake._HEADER.pack(b"fN", handshake.VERSION + 1, 10))
    for greeting in (b"GET / HTTP/1.1\r\n", b"\x16\x03", b"fc"):
        _, listener = ends()
        with pytest.raises(ProtocolError, match="does not speak"):
            listener.receive(greeting)


ORDER = [handshake.Hello, handshake.Challenge, handshake.Proof, handshake.Accepted]


@pytest.mark.parametrize("kind", ORDER)
@pytest.mark.parametrize("role", Role)
def test_a_message_out_of_its_turn_closes(role: Role, kind: type) -> None:
    end = Conversation(role, KEY, HOST_A)
    end.take_outgoing()
    secret = secrets.token_bytes(32)
    message = kind(secret) if kind in (ORDER[2], ORDER[3]) else kind(HOST_B, secret)
    payload = encode(message)
    frame = handshake._HEADER.pack(b"fN", handshake.VERSION, len(payload)) + payload
    expected = {Role.DIALER: handshake.Challenge, Role.LISTENER: handshake.Hello}[role]
    if kind is expected:
        end.receive(frame)
        assert end.phase not in (Phase.OPEN, Phase.CLOSED)
    else:
        with pytest.raises(ProtocolError):
            end.receive(frame)
        assert end.phase is Phase.CLOSED
