"""What owner and readers say to each other. Bounded, typed, versioned; nothing is trusted by type alone."""

from typing import Annotated, Final

import msgspec

from featcache.errors import FeatcacheError

__all__ = [
    "MAX_SEGMENTS",
    "VERSION",
    "Closing",
    "Discard",
    "Farewell",
    "FromClient",
    "FromOwner",
    "Goodbye",
    "Hello",
    "ProtocolError",
    "Refused",
    "Relay",
    "Reply",
    "Retire",
    "Retired",
    "Segments",
    "Welcome",
    "decode_from_client",
    "decode_from_owner",
    "encode",
]

VERSION: Final = 2
"""Grows when a message or a shared layout changes; both sides must have the same."""

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_PoolId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Handle = Annotated[bytes, msgspec.Meta(max_length=64)]
_Ref = Annotated[bytes, msgspec.Meta(max_length=64 << 10)]

MAX_SEGMENTS: Final = 32
"""Most segments that one message can bring; each comes with its descriptor."""


class ProtocolError(FeatcacheError):
    """The peer said something that no peer of this version says."""


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Client, first. With one descriptor: the client's own pidfd."""

    version: int
    name: _Name | None
    device: _Text


class Goodbye(msgspec.Struct, tag="goodbye", frozen=True):
    """Client, last: it reads nothing more and holds nothing."""


class Discard(msgspec.Struct, tag="discard", frozen=True):
    """Client: cancel what this ref still owes. Answered by `Reply`."""

    request: _Natural
    slot: _Natural
    generation: _Natural


class Relay(msgspec.Struct, tag="relay", frozen=True):
    """Client: copy this ref's bytes into host memory. Answered by `Reply` with the copy's ref."""

    request: _Natural
    ref: _Ref


class Retired(msgspec.Struct, tag="retired", frozen=True):
    """Client, in answer to `Retire`: what was taken away is not mapped here any more."""

    layout: _Natural


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """Owner, in answer to Hello.

    With descriptors: the owner's pidfd, its words, the session's page, the eventfd to ring, then
    what the slab needs. Its segments, if it has any, follow.
    """

    version: int
    pool_id: _PoolId
    session: _Natural
    slots: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    kind: _Text
    device: _Text
    """``cpu``, or the UUID of the slab's GPU."""
    capacity_bytes: _Natural
    committed_bytes: _Natural
    layout: _Natural = 0
    """How often segments were taken away so far."""
    handle: _Handle = b""
    """The legacy handle of a slab that is not shared by descriptor."""
    relays: bool = False
    """Whether the owner copies features into host memory for sessions that can't reach the slab."""
    kin: _PoolId | None = None
    """The owner's other pool, to which it spills."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Owner, in answer to Hello, and then it closes."""

    reason: _Text


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """Owner, in answer to a request. `error` names a class of featcache.errors."""

    request: _Natural
    error: _Text | None = None
    text: _Text = ""
    ref: _Ref = b""
    """What was asked for, if that is a ref."""


class Segments(msgspec.Struct, tag="segments", frozen=True):
    """Owner: memory was put behind the slab's next addresses. With one descriptor for each size."""

    start_bytes: _Natural
    sizes: Annotated[list[_Natural], msgspec.Meta(min_length=1, max_length=MAX_SEGMENTS)]


class Retire(msgspec.Struct, tag="retire", frozen=True):
    """Owner: the segments from here on are taken away. Answered by `Retired`."""

    layout: _Natural
    end_bytes: _Natural


class Farewell(msgspec.Struct, tag="farewell", frozen=True):
    """Owner, in answer to Goodbye: the session is folded."""


class Closing(msgspec.Struct, tag="closing", frozen=True):
    """Owner, last: it closes the pool."""


FromClient = Hello | Goodbye | Discard | Relay | Retired
FromOwner = Welcome | Refused | Reply | Farewell | Closing | Segments | Retire

encode = msgspec.msgpack.Encoder().encode
_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)


def decode_from_client(payload: bytes) -> FromClient:
    """Return a client's message, or raise ProtocolError."""
    try:
        return _from_client.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a message that makes no sense: {error}") from None


def decode_from_owner(payload: bytes) -> FromOwner:
    """Return an owner's message, or raise ProtocolError."""
    try:
        return _from_owner.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a message that makes no sense: {error}") from None
