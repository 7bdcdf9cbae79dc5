"""What owner and readers say to each other. Bounded, typed, versioned; nothing is trusted by type alone."""

from typing import Annotated, Final, Literal, TypeGuard, get_args

import msgspec

from featcache.errors import FeatcacheError
from featcache.ref import TensorSpec
from featcache.settings import MAX_KEY_BYTES

VERSION: Final = 4
"""Grows when a message or a shared layout changes; both sides must have the same."""

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_PoolId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Handle = Annotated[bytes, msgspec.Meta(max_length=64)]
_Ref = Annotated[bytes, msgspec.Meta(max_length=64 << 10)]
_Key = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_KEY_BYTES)]
_Seconds = Annotated[float, msgspec.Meta(gt=0)]
_MessageBytes = Annotated[int, msgspec.Meta(ge=1024)]

MAX_SEGMENTS: Final = 32
"""Most segments that one message can bring; each comes with its descriptor."""


class ProtocolError(FeatcacheError):
    """The peer said something that no peer of this version says."""


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Client, first. With one descriptor: the client's own pidfd."""

    version: int
    name: _Name | None
    device: _Text
    message_bytes: _MessageBytes = 64 << 10
    """The longest message that it takes."""


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


class Find(msgspec.Struct, tag="find", frozen=True):
    """Client: a read of what is under this key. Answered by `Granted`, `ClaimGranted` or `Reply`."""

    request: _Natural
    key: _Key
    waits: bool = False
    """Whether to answer only once there is something."""
    makes: bool = False
    """Whether the client would make it itself; it then waits for another who does."""


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Client: it awaits this request no longer. The request is answered all the same."""

    request: _Natural


class Unclaim(msgspec.Struct, tag="unclaim", frozen=True):
    """Client: what it was to make is published, or will not be."""

    key: _Key
    claim: _Natural


class KeyCommand(msgspec.Struct, tag="of_key", frozen=True):
    """Client: do this to a key. Answered by `Reply`."""

    request: _Natural
    key: _Key
    what: Literal["contains", "evict", "pin", "unpin"]


class PutSpec(msgspec.Struct, frozen=True):
    """What `Reserve` and `Upload` have in common: what a put asks for."""

    request: _Natural
    nbytes: _Natural
    readers: _Natural | Annotated[list[_Name], msgspec.Meta(min_length=1)]
    ttl_s: _Seconds | None
    key: _Key | None
    waits: bool
    """Whether to stand in the queue for it."""


class Reserve(PutSpec, tag="reserve", frozen=True):
    """Client: room for a feature that it writes itself. Answered by `Reserved` or `Reply`."""


class HostPool(msgspec.Struct, tag="host_pool", frozen=True):
    """Client: where does the pool in host memory beside this one listen? `Reply.text` says it."""

    request: _Natural


class Upload(PutSpec, tag="upload", frozen=True):
    """Client: put what this ref of the host pool has into the slab. Answered by `Reply` with its ref."""

    ref: _Ref


class Publish(msgspec.Struct, tag="publish", frozen=True):
    """Client: a slot that it reserved is written, or will be in its stream's order. See `Reply`."""

    request: _Natural
    slot: _Natural
    generation: _Natural
    specs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=4096)]


class Withdraw(msgspec.Struct, tag="withdraw", frozen=True):
    """Client: it will not publish this slot, of whose bytes some may be on their way."""

    slot: _Natural
    generation: _Natural
    landed: bool
    """Whether none are: no word will follow."""


class OpenForWriting(msgspec.Struct, tag="write", frozen=True):
    """Client, before its first put: what it needs to map the slab for writing. See `WriteDescriptors`."""

    request: _Natural


class TailUnmapped(msgspec.Struct, tag="retired", frozen=True):
    """Client, in answer to `UnmapTail`: what was taken away is not mapped here any more."""

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
    kin_endpoint: _Text = ""
    """Where that one listens, if puts may go there."""
    endpoint: _Text = ""
    """Where the owner listens, as its refs say it."""
    grants: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1024
    """Reads by key that the session may have out."""
    message_bytes: _MessageBytes = 64 << 10
    """The longest message that the owner takes."""


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
    flag: bool = False
    """What was asked for, if that is yes or no."""


class Granted(msgspec.Struct, tag="granted", frozen=True):
    """Owner: a read by key, paid by `serial` in the word at `index` of the session's page."""

    request: _Natural
    index: _Natural
    serial: _Natural
    ref: _Ref


class ClaimGranted(msgspec.Struct, tag="may_make", frozen=True):
    """Owner: there is nothing under the key, and this client makes it. Ended by `Unclaim`."""

    request: _Natural
    claim: _Natural


class Reserved(msgspec.Struct, tag="reserved", frozen=True):
    """Owner: the client may write there. Ended by `Publish` or `Withdraw`."""

    request: _Natural
    slot: _Natural
    generation: _Natural
    offset_bytes: _Natural


class WriteDescriptors(msgspec.Struct, tag="writable", frozen=True):
    """Owner, with the descriptors, if any, that the slab is mapped for writing by."""

    request: _Natural


class Segments(msgspec.Struct, tag="segments", frozen=True):
    """Owner: memory was put behind the slab's next addresses. With one descriptor for each size."""

    start_bytes: _Natural
    sizes: Annotated[list[_Natural], msgspec.Meta(min_length=1, max_length=MAX_SEGMENTS)]


class UnmapTail(msgspec.Struct, tag="retire", frozen=True):
    """Owner: the segments from here on are taken away. Answered by `TailUnmapped`."""

    layout: _Natural
    end_bytes: _Natural


class Farewell(msgspec.Struct, tag="farewell", frozen=True):
    """Owner, in answer to Goodbye: the session is folded."""


class Closing(msgspec.Struct, tag="closing", frozen=True):
    """Owner, last: it closes the pool."""


Request = (
    Discard | Relay | Find | KeyCommand | Reserve | Publish | OpenForWriting | HostPool | Upload
)
"""What is answered, once, under its number."""
Note = Cancel | Unclaim | Withdraw
"""What is not."""
Answer = Reply | Granted | ClaimGranted | Reserved | WriteDescriptors
FromClient = Hello | Goodbye | TailUnmapped | Request | Note
FromOwner = Welcome | Refused | Farewell | Closing | Segments | UnmapTail | Answer

_REQUESTS: Final = frozenset(get_args(Request))
_ANSWERS: Final = frozenset(get_args(Answer))


def is_request(message: object) -> TypeGuard[Request]:
    """As isinstance, which asks each class in turn, and a struct's takes long to answer."""
    return type(message) in _REQUESTS


def is_answer(message: object) -> TypeGuard[Answer]:
    """As `is_request`, of answers."""
    return type(message) in _ANSWERS


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
