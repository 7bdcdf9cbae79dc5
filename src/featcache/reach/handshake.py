"""Two hosts prove to each other that they have the cluster key; then each frame is sealed.

No I/O: bytes in, payloads and bytes out. A frame is ``fN``, a version byte, a zero, the length in four
bytes (little-endian), the payload, and once the handshake is over a tag of 16 bytes, which counts in
the length: an HMAC over the frame's number in its direction and its payload. So what a third party
inserts, repeats, drops or turns around is noticed; nobody is kept from reading it, which is what TLS
is for.

The proofs are HMAC-SHA256 of the key over the role of the prover and both opening messages, with the
nonces of both sides in them: a proof holds for one connection and one direction, so neither an old one
nor the prover's own, sent back, is any other's.
"""

import enum
import hashlib
import hmac
import secrets
import struct
from typing import Annotated, Final

import msgspec

from featcache.control.messages import ProtocolError, checked_decoder, encode
from featcache.control.wire import PoolId, Text
from featcache.errors import AttachRefused

VERSION: Final = 2
"""Of what is said between hosts; both must have the same."""
MAX_FRAME_BYTES: Final = 8 << 20
"""Bytes of the longest payload once the handshake is over: the metadata of a large slab."""
MAX_GREETING_BYTES: Final = 4096
"""Bytes of the longest payload before that: a refusal."""
_MAGIC: Final = b"fN"
_HEADER: Final = struct.Struct("<2sBxI")
_NUMBER: Final = struct.Struct("<Q")
_TAG_BYTES: Final = 16
_REASON_CHARACTERS: Final = 900
_Nonce = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Proof = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Role(enum.Enum):
    """Which end of a connection this is."""

    DIALER = "dialer"
    LISTENER = "listener"


class Phase(enum.Enum):
    """The life of a connection between hosts, as either end sees it.

    ::

        DIALER     AWAITS_CHALLENGE ──its proof is sent──→ AWAITS_WELCOME ──a true proof──→ OPEN
                         │                                      │                            │
        LISTENER   AWAITS_HELLO ──its challenge is sent──→ AWAITS_PROOF ──a true proof──→ OPEN
                         │                                      │                            │
                         └──────────────────────────────────────┴────────────────────────────┴──→ CLOSED

    CLOSED: a message of the wrong kind or size, a false proof, a false tag, a refusal, or `close`. The
    listener proves nothing before the dialer has: whoever has no key gets nothing to try keys on.
    """

    AWAITS_CHALLENGE = "awaits challenge"
    AWAITS_WELCOME = "awaits welcome"
    AWAITS_HELLO = "awaits hello"
    AWAITS_PROOF = "awaits proof"
    OPEN = "open"
    CLOSED = "closed"


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Dialer, first. `host` is the id of its pool."""

    host: PoolId
    nonce: _Nonce


class Challenge(msgspec.Struct, tag="challenge", frozen=True):
    """Listener, in answer."""

    host: PoolId
    nonce: _Nonce


class Proof(msgspec.Struct, tag="proof", frozen=True):
    """Dialer: it has the key."""

    proof: _Proof


class Accepted(msgspec.Struct, tag="accepted", frozen=True):
    """Listener, last: the proof is true, and here is its own."""

    proof: _Proof


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Listener, before it closes the connection. Nothing vouches for it."""

    reason: Text


_of_dialer: Final = checked_decoder(msgspec.msgpack.Decoder(Hello | Proof).decode, "a dialing host")
_of_listener: Final = checked_decoder(
    msgspec.msgpack.Decoder(Challenge | Accepted | Refused).decode, "a listening host"
)


class Conversation:
    """One end of a connection between hosts.

    `receive` takes what came and returns the payloads of whole frames once it is OPEN; `take_outgoing`
    returns what is to be sent. After an error it is CLOSED; what is outgoing then, a refusal, may
    still be sent.
    """

    def __init__(self, role: Role, key: bytes, host: bytes) -> None:
        self.role = role
        self.host = host
        self.peer = b""
        """The id of the pool at the other end, once it is OPEN."""
        self.phase = Phase.AWAITS_HELLO
        self._key = key
        self._said: list[bytes] = []
        """The opening messages of both sides, which every proof is over."""
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._sent = self._received = 0
        self._sealing = self._checking = b""
        if role is Role.DIALER:
            self.phase = Phase.AWAITS_CHALLENGE
            self._greet(Hello(host, secrets.token_bytes(32)))

    def take_outgoing(self) -> bytes:
        """Return the bytes that are to be sent, once."""
        data, self._outgoing = bytes(self._outgoing), bytearray()
        return data

    def send(self, payload: bytes) -> None:
        """Seal a payload and put it to what is outgoing. ValueError if it is too long."""
        if self.phase is not Phase.OPEN:
            raise ValueError(f"this connection is {self.phase.value}")
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(payload)} bytes is over {MAX_FRAME_BYTES}")
        tag = _tag(self._sealing, self._sent, payload)
        self._sent += 1
        self._outgoing += _HEADER.pack(_MAGIC, VERSION, len(payload) + _TAG_BYTES)
        self._outgoing += payload
        self._outgoing += tag

    def refuse(self, reason: str) -> None:
        """Tell the other end why it is sent away, and close."""
        if self.phase in {Phase.AWAITS_HELLO, Phase.AWAITS_PROOF}:
            self._frame(encode(Refused(reason[:_REASON_CHARACTERS])))
        self.close()

    def close(self) -> None:
        """Take nothing more."""
        self.phase = Phase.CLOSED
        self._incoming.clear()

    def receive(self, data: bytes) -> list[bytes]:
        """Take bytes that came; return the payloads of the whole frames among them.

        Raises:
            ProtocolError: the peer does not speak this protocol, or a frame was forged.
            AttachRefused: the peer refused, or does not have the key.

        """
        if self.phase is Phase.CLOSED:
            return []
        self._incoming += data
        payloads: list[bytes] = []
        start = 0
        try:
            while (end := self._frame_end(start)) != 0:
                payload = bytes(self._incoming[start + _HEADER.size : end])
                start = end
                if self.phase is Phase.OPEN:
                    payloads.append(self._unsealed(payload))
                else:
                    self._step(payload)
        except (ProtocolError, AttachRefused):
            self.close()
            raise
        del self._incoming[:start]
        return payloads

    def _frame_end(self, start: int) -> int:
        """Return the end of the frame at `start`; 0 while it is not whole. Its header is checked first."""
        left = len(self._incoming) - start
        if left < _HEADER.size:
            if self._incoming[start : start + 2] != _MAGIC[:left]:
                raise ProtocolError("the peer does not speak featcache's protocol between hosts")
            return 0
        magic, version, length_bytes = _HEADER.unpack_from(self._incoming, start)
        if magic != _MAGIC:
            raise ProtocolError("the peer does not speak featcache's protocol between hosts")
        if version != VERSION:
            raise ProtocolError(f"the host speaks version {version}, this one version {VERSION}")
        most = MAX_FRAME_BYTES + _TAG_BYTES if self.phase is Phase.OPEN else MAX_GREETING_BYTES
        if length_bytes > most:
            raise ProtocolError(f"a frame of {length_bytes} bytes is over {most}")
        end = start + _HEADER.size + int(length_bytes)
        return end if len(self._incoming) >= end else 0

    # --- the handshake ----------------------------------------------------------------------------

    def _frame(self, payload: bytes) -> None:
        self._outgoing += _HEADER.pack(_MAGIC, VERSION, len(payload))
        self._outgoing += payload

    def _greet(self, message: Hello | Challenge) -> None:
        payload = encode(message)
        self._said.append(payload)
        self._frame(payload)

    def _step(self, payload: bytes) -> None:
        message = (_of_dialer if self.role is Role.LISTENER else _of_listener)(payload)
        if isinstance(message, Refused):
            raise AttachRefused(f"the other host refused: {message.reason}")
        if isinstance(message, Hello) and self.phase is Phase.AWAITS_HELLO:
            if message.host == self.host:
                raise ProtocolError("this host was dialed by itself")
            self.peer = message.host
            self._said.append(payload)
            self._greet(Challenge(self.host, secrets.token_bytes(32)))
            self.phase = Phase.AWAITS_PROOF
        elif isinstance(message, Challenge) and self.phase is Phase.AWAITS_CHALLENGE:
            self.peer = message.host
            self._said.append(payload)
            self._frame(encode(Proof(self._proof(Role.DIALER))))
            self.phase = Phase.AWAITS_WELCOME
        elif isinstance(message, Proof) and self.phase is Phase.AWAITS_PROOF:
            self._check(message.proof, Role.DIALER)
            self._frame(encode(Accepted(self._proof(Role.LISTENER))))
            self._open()
        elif isinstance(message, Accepted) and self.phase is Phase.AWAITS_WELCOME:
            self._check(message.proof, Role.LISTENER)
            self._open()
        else:
            raise ProtocolError(f"a {type(message).__name__} while this end {self.phase.value}")

    def _keyed(self, purpose: str) -> bytes:
        lengths = b"".join(_NUMBER.pack(len(said)) for said in self._said)
        text = f"featcache {VERSION} {purpose}\0".encode() + lengths + b"".join(self._said)
        return hmac.digest(self._key, text, hashlib.sha256)

    def _proof(self, prover: Role) -> bytes:
        return self._keyed(f"proof of the {prover.value}")

    def _check(self, proof: bytes, prover: Role) -> None:
        if not hmac.compare_digest(proof, self._proof(prover)):
            if self.role is Role.LISTENER:
                self.refuse("the cluster keys of the two hosts differ")
            raise AttachRefused("the cluster keys of the two hosts differ")

    def _open(self) -> None:
        ours, theirs = Role.DIALER, Role.LISTENER
        if self.role is Role.LISTENER:
            ours, theirs = theirs, ours
        self._sealing = self._keyed(f"frames of the {ours.value}")
        self._checking = self._keyed(f"frames of the {theirs.value}")
        self.phase = Phase.OPEN

    # --- sealed frames ----------------------------------------------------------------------------

    def _unsealed(self, sealed: bytes) -> bytes:
        payload, tag = sealed[:-_TAG_BYTES], sealed[-_TAG_BYTES:]
        if not hmac.compare_digest(tag, _tag(self._checking, self._received, payload)):
            raise ProtocolError("a frame that the other host did not send so was found")
        self._received += 1
        return payload


def _tag(key: bytes, number: int, payload: bytes) -> bytes:
    return hmac.digest(key, _NUMBER.pack(number) + payload, hashlib.sha256)[:_TAG_BYTES]
