"""The messages between an owner and its sessions: bounded, typed, versioned.

A message of the right type is not yet a true one: whoever handles it checks slots, generations, claims
and extents against its own records.

To add a request: define it here, with its `lane` and whether it `copies`; add it to `Request`; handle it
in `owner/requests.py`; call it from `client/`.
"""

from collections.abc import Callable
from typing import Annotated, Final, Literal, TypeGuard, TypeVar, get_args

import msgspec

from featcache.control.far import Bring, EndFar
from featcache.control.many import (
    Contained,
    ContainsMany,
    FindMany,
    GrantedMany,
    PublishMany,
    ReservedMany,
    ReserveMany,
)
from featcache.control.rooms import PublishUnkeyed, PutTerms, RoomList, Rooms
from featcache.control.wire import Handle as _Handle
from featcache.control.wire import Key as _Key
from featcache.control.wire import Lane, Numbered
from featcache.control.wire import MessageBytes as _MessageBytes
from featcache.control.wire import Name as _Name
from featcache.control.wire import Natural as _Natural
from featcache.control.wire import PoolId as _PoolId
from featcache.control.wire import Ref as _Ref
from featcache.control.wire import Seconds as _Seconds
from featcache.control.wire import Specs as _Specs
from featcache.control.wire import Text as _Text
from featcache.errors import FeatcacheError, explain

VERSION: Final = 7
"""Protocol version: grows when a message or a shared layout changes; both sides must have the same."""

MAX_SEGMENTS: Final = 32
"""Segments that one message can carry; each comes with its descriptor."""


class ProtocolError(FeatcacheError):
    """The peer broke the protocol: it sent what no peer of this version sends."""


class SocketFailed(ProtocolError):
    """A call on this end's socket failed: frames or descriptors are lost, so the connection ends."""

    def __init__(self, doing: str, cause: OSError | None = None) -> None:
        super().__init__(doing if cause is None else f"{doing}: {explain(cause)}")
        # Not its traceback, whose frames refer to the channel.
        self.__cause__ = None if cause is None else cause.with_traceback(None)


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Client, first. Carries one descriptor, the client's own pidfd."""

    version: int
    name: _Name | None
    device: _Text
    message_bytes: _MessageBytes = 64 << 10
    """The longest message that the client accepts."""
    kind: Literal["session", "observer"] = "session"
    """An observer (`control.observing`) gets no descriptor of the pool's, no page and no session."""


class Goodbye(msgspec.Struct, tag="goodbye", frozen=True):
    """Client, last: it holds nothing and reads nothing more."""


class Discard(Numbered, tag="discard", frozen=True):
    """Client: cancel the reads that this ref still owes. Answered by `Reply`."""

    slot: _Natural
    generation: _Natural
    undoes: bool = False
    """Whether its key goes too, if it is kept under one still: nobody was told of the put."""


class Relay(Numbered, tag="relay", frozen=True):
    """Client: copy this ref's bytes into host memory. Answered by `Reply` with the copy's ref."""

    ref: _Ref
    lane = Lane.COPY
    copies = True


class Find(Numbered, tag="find", frozen=True):
    """Client: grant a read of a key. Answered by `Granted`, `ClaimGranted` or `Reply`."""

    key: _Key
    waits: bool = False
    """Whether the answer waits until the key is there."""
    makes: bool = False
    """Whether the client can compute the feature; while another session does, it waits for that one."""
    counted: bool = False
    """Whether this lookup was counted as a miss before, so that only a wait for the key is left."""
    lane = Lane.FIND


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Client: it no longer awaits this request, which is answered all the same."""

    request: _Natural


class ReleaseClaim(msgspec.Struct, tag="unclaim", frozen=True):
    """Client: the claim ends, the feature published or given up."""

    key: _Key
    claim: _Natural


class Share(Numbered, tag="share", frozen=True):
    """Client: make a ref of what is kept under a key. Answered by `Reply` with the ref."""

    key: _Key
    readers: Annotated[int, msgspec.Meta(ge=1)] | Annotated[list[_Name], msgspec.Meta(min_length=1)]
    ttl_s: _Seconds | None
    waits: bool = False
    """As of `Find`."""
    lane = Lane.FIND


class KeyCommand(Numbered, tag="of_key", frozen=True, rename={"command": "what"}):
    """Client: apply a directory command to a key. Answered by `Reply`."""

    key: _Key
    command: Literal["contains", "evict", "pin", "unpin"]


class PutSpec(Numbered, frozen=True):
    """The room that a put needs: the fields common to `Reserve` and `Upload`."""

    nbytes: _Natural
    readers: _Natural | Annotated[list[_Name], msgspec.Meta(min_length=1)]
    ttl_s: _Seconds | None
    key: _Key | None
    waits: bool
    """Whether to queue for the room while there is none."""
    lane = Lane.ROOM


class Reserve(PutSpec, tag="reserve", frozen=True):
    """Client: reserve a slot that the client writes. Answered by `Reserved` or `Reply`."""

    timeout_s: _Seconds | None = None
    """How long the owner is to wait for room; its answer says who holds the room."""


class HostPool(Numbered, tag="host_pool", frozen=True):
    """Client: the endpoint of the owner's pool in host memory. Answered by `Reply` with it as `text`."""

    copies = True


class Upload(PutSpec, tag="upload", frozen=True):
    """Client: copy this ref of the host pool into the slab. Answered by `Reply` with the new ref."""

    ref: _Ref
    timeout_s: _Seconds | None = None
    """As of `Reserve`."""
    copies = True


class Publish(Numbered, tag="publish", frozen=True):
    """Client: a reserved slot is written, or will be in stream order. Answered by `Published` or `Reply`."""

    slot: _Natural
    generation: _Natural
    specs: _Specs
    terms: PutTerms | None = None
    """Of a slot that was given ahead."""
    lane = None  # there are no more of them than rooms that were given


class GiveUpReserved(msgspec.Struct, tag="withdraw", frozen=True):
    """Client: it will not publish this reserved slot."""

    slot: _Natural
    generation: _Natural
    landed: bool
    """Whether no write is still in flight. Otherwise the session's `written` word follows the last."""


class OpenForWriting(Numbered, tag="write", frozen=True):
    """Client, before its first put: send the slab's write descriptors. See `WriteDescriptors`."""


class TailUnmapped(msgspec.Struct, tag="retired", frozen=True, rename={"shrink_epoch": "layout"}):
    """Client, in answer to `UnmapTail`: the segments are no longer mapped here."""

    shrink_epoch: _Natural


class Welcome(
    msgspec.Struct,
    tag="welcome",
    frozen=True,
    rename={"shrink_epoch": "layout", "sibling_pool": "kin", "sibling_endpoint": "kin_endpoint"},
):
    """Owner, in answer to `Hello`.

    Carries descriptors: the owner's pidfd, its words, the session's page, the eventfd of the owner's
    doorbell, then the slab's. `Segments` follow, if the slab has any.
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
    shrink_epoch: _Natural = 0
    """How many times the slab has shrunk."""
    handle: _Handle = b""
    """The legacy IPC handle of a slab that is not shared by descriptor."""
    relays: bool = False
    """Whether the owner copies features into host memory for sessions that can't reach the slab."""
    sibling_pool: _PoolId | None = None
    """The owner's other pool, to which it spills."""
    sibling_endpoint: _Text = ""
    """The endpoint of that pool, if puts may spill to it."""
    endpoint: _Text = ""
    """The owner's endpoint, as its refs spell it."""
    grants: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1024
    """Grants that the session may hold at once."""
    message_bytes: _MessageBytes = 64 << 10
    """The longest message that the owner accepts."""
    tensors: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 256
    """Tensors that one feature may pack."""
    readers: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 1024
    """Reads that one ref may owe."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Owner, in answer to `Hello`, before it closes the connection."""

    reason: _Text


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """Owner, in answer to a request. `error` names a class of featcache.errors."""

    request: _Natural
    error: _Text | None = None
    text: _Text = ""
    ref: _Ref = b""
    """The result of a `Relay`, an `Upload` or a `Share`."""
    flag: bool = False
    """The result of a `KeyCommand`."""
    member: _Natural | None = None
    """Of which member of a request of many the error is."""


class Granted(msgspec.Struct, tag="granted", frozen=True):
    """Owner: a read by key, paid by `serial` in the granted word `index` of the session's page."""

    request: _Natural
    index: _Natural
    serial: _Natural
    ref: _Ref


class ClaimGranted(msgspec.Struct, tag="may_make", frozen=True):
    """Owner: the key is absent and this client is to compute it. Ended by `ReleaseClaim`."""

    request: _Natural
    claim: _Natural


class Reserved(msgspec.Struct, tag="reserved", frozen=True):
    """Owner: an extent that the client may write. Ended by `Publish` or `GiveUpReserved`."""

    request: _Natural
    slot: _Natural
    generation: _Natural
    offset_bytes: _Natural
    rooms: RoomList = ()
    """For the next puts."""


class Published(msgspec.Struct, tag="published", frozen=True):
    """Owner, in answer to `Publish`: every session finds it now."""

    request: _Natural
    rooms: RoomList = ()


class WriteDescriptors(msgspec.Struct, tag="writable", frozen=True):
    """Owner: carries the descriptors, if any, for mapping the slab for writing."""

    request: _Natural


class Segments(msgspec.Struct, tag="segments", frozen=True):
    """Owner: segments were committed at the slab's end. Carries one descriptor for each size."""

    start_bytes: _Natural
    sizes: Annotated[list[_Natural], msgspec.Meta(min_length=1, max_length=MAX_SEGMENTS)]


class UnmapTail(msgspec.Struct, tag="retire", frozen=True, rename={"shrink_epoch": "layout"}):
    """Owner: unmap the segments from `end_bytes` on. Answered by `TailUnmapped`."""

    shrink_epoch: _Natural
    end_bytes: _Natural


class Farewell(msgspec.Struct, tag="farewell", frozen=True):
    """Owner, in answer to `Goodbye`: the session's payments are folded into their slots."""


class Closing(msgspec.Struct, tag="closing", frozen=True):
    """Owner, last: the pool closes."""


Request = (
    Discard
    | Relay
    | Find
    | Share
    | FindMany
    | ContainsMany
    | KeyCommand
    | Reserve
    | Publish
    | ReserveMany
    | PublishMany
    | OpenForWriting
    | HostPool
    | Upload
    | Bring
    | EndFar
)
Note = Cancel | ReleaseClaim | GiveUpReserved | PublishUnkeyed
"""Messages of a client that have no answer."""
Answer = (
    Reply
    | Granted
    | GrantedMany
    | Contained
    | ClaimGranted
    | Reserved
    | ReservedMany
    | Published
    | WriteDescriptors
)
FromClient = Hello | Goodbye | TailUnmapped | Request | Note
FromOwner = Welcome | Refused | Farewell | Closing | Segments | UnmapTail | Rooms | Answer

REQUESTS: Final[frozenset[type[Numbered]]] = frozenset(get_args(Request))
_ANSWERS: Final = frozenset(get_args(Answer))


# By a set of types: isinstance would try each class of the union in turn, and a struct's is slow.
def is_request(message: object) -> TypeGuard[Request]:
    """Whether a message is one of `Request`."""
    return type(message) in REQUESTS


def is_answer(message: object) -> TypeGuard[Answer]:
    """Whether a message is one of `Answer`."""
    return type(message) in _ANSWERS


encode = msgspec.msgpack.Encoder().encode
_M = TypeVar("_M")


def checked_decoder(decode: Callable[[bytes], _M], sender: str) -> Callable[[bytes], _M]:
    """Return a decoder that raises ProtocolError."""

    def checked(payload: bytes) -> _M:
        try:
            return decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a valid message from {sender}: {error}") from None

    return checked


_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)
decode_from_client = checked_decoder(_from_client.decode, "a client")
decode_from_owner = checked_decoder(_from_owner.decode, "an owner")
