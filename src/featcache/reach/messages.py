"""What two owners say to each other: the dialer reads the listener's features.

As in `control.messages`, a message of the right type is not yet a true one. To add one: define it, add
it to `FromReader` or `FromHome`, and count `handshake.VERSION` up.
"""

from typing import Annotated, Final

import msgspec

from featcache.control.messages import checked_decoder, encode
from featcache.control.wire import Key, Name, Natural, PoolId, Seconds, Specs, Text
from featcache.reach.plane import HOST, Memory

__all__ = ["decode_from_home", "decode_from_reader", "encode"]

MAX_PAYMENTS: Final = 256
"""Payments that one message has."""
MAX_GONE: Final = 1024
"""Refs that one `Alive` names."""
MAX_NAMES: Final = 1024
"""Names of readers that one `Beat` has."""
MAX_TICKETS: Final = 2048
"""Tickets that a host has at one home, and that one `Holding` names."""
MAX_NOTIFICATION_BYTES: Final = 64 << 10
"""Of the data plane, over which anybody may send. A host notifies of one payment at a time."""
MAX_KEYS: Final = 256
"""Keys that one `Ask` names."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """The slot of a ref, in one of the listener's pools."""

    pool: PoolId
    slot: Natural
    generation: Natural


class Payment(msgspec.Struct, frozen=True, array_like=True):
    """One read that is paid. The same payment, told twice, pays once."""

    number: Natural
    place: Place
    reader: Natural
    """The session of the dialer's pool that has read."""
    name: Name | None


class Asked(msgspec.Struct, frozen=True):
    """A request: it is answered once, under its number."""

    request: Natural


class Extent(Asked, frozen=True):
    """A request about a ref, whose extent is to be the slot's."""

    place: Place
    offset_bytes: Natural
    nbytes: Natural


class Look(Extent, tag="look", frozen=True):
    """Reader: this session is to read this ref. Answered by `Found`, which pins it, or `Failed`."""

    reader: Natural
    name: Name | None
    epoch: Natural
    """The registrations that the reader knows of (`Found.epoch`)."""


class Release(Extent, tag="release", frozen=True):
    """Reader: pay this session's read of a ref that it has not looked at. Answered by `Done`."""

    reader: Natural
    name: Name | None


class Discard(Extent, tag="discard", frozen=True):
    """Reader: cancel the reads that this ref owes. Answered by `Done` or `Failed`."""


class Seek(Asked, tag="seek", frozen=True):
    """Reader: what is under a key. Answered by `Sought`, `Claimed`, or `Failed` with KeyNotFound.

    What the answer gives, a pin or a claim, is the reader's until `GiveBack`, or the end of its lease.
    """

    key: Key
    ticket: Natural
    """Names what is given, among all that this host is given in its life; not 0."""
    claims: bool
    """It makes the feature if there is none and nobody makes it."""
    waits: bool
    epoch: Natural
    """As of `Look`."""


class Ask(Asked, tag="ask", frozen=True):
    """Reader: whether there are features under these keys. Answered by `Told`."""

    keys: Annotated[list[Key], msgspec.Meta(max_length=MAX_KEYS)]


class Offer(Asked, tag="offer", frozen=True):
    """Reader: it has a feature of this key, pinned. Answered by `Read`, or by `Done` if it is there.

    After `Read` it says `Vouch`. A claim under `ticket` ends with it; 0 is that of a feature put without one.
    """

    key: Key
    ticket: Natural
    address: Natural
    nbytes: Natural
    pieces: list[Natural]
    specs: Specs
    metadata: bytes
    """Of the data plane, unless the home has been told since the connection was made."""
    memory: Memory = HOST
    """The kind that the slab is."""


class Promise(msgspec.Struct, tag="promise", frozen=True):
    """Reader: it has a feature of this key, and is going to offer it under this ticket, or gives it back."""

    ticket: Natural
    key: Key


class Vouch(msgspec.Struct, tag="vouch", frozen=True):
    """Reader: what it offered under this number was pinned until now, so what was read is true."""

    request: Natural


class GiveBack(msgspec.Struct, tag="give_back", frozen=True):
    """Reader: it needs no more what it was given under this ticket."""

    ticket: Natural


class Holding(msgspec.Struct, tag="holding", frozen=True):
    """Reader, as it is connected again: the tickets that it still has; what others stand for is taken back.

    What it told last over a connection that broke may never have come. Pins by ref end with a connection.
    """

    tickets: Annotated[list[Natural], msgspec.Meta(max_length=MAX_TICKETS)]


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Reader: it no longer awaits this request; what it was given is taken back."""

    request: Natural


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """Reader: this session does not read what it looked at; the read is still owed."""

    place: Place
    reader: Natural


class Pay(msgspec.Struct, tag="pay", frozen=True):
    """Reader: these reads are done. Answered by `Paid`. It comes over the data plane as well."""

    host: PoolId
    """The dialer's pool."""
    payments: Annotated[list[Payment], msgspec.Meta(max_length=MAX_PAYMENTS)]


class NameLost(msgspec.Struct, tag="name_lost", frozen=True):
    """Reader: the session of this name died; what the name owes is paid."""

    name: Name


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """Reader, while it lives: the names of its sessions. Answered by `Alive`."""

    number: Natural
    names: Annotated[list[Name], msgspec.Meta(max_length=MAX_NAMES)]


class Goodbye(msgspec.Struct, tag="goodbye", frozen=True):
    """Reader, last: it reads nothing more, and comes back with nothing."""


class Found(msgspec.Struct, tag="found", frozen=True):
    """Home: the ref is pinned for the session until `Pay`, `Drop` or the end of the lease."""

    request: Natural
    address: Natural
    """The extent's, in the home's process."""
    pieces: list[Natural]
    """Bytes of its parts, each in one registration."""
    epoch: Natural
    metadata: bytes
    """Of the data plane, if the reader's is older than `epoch`."""
    memory: Memory = HOST
    """The kind that the home's slab is."""


class Sought(msgspec.Struct, tag="sought", frozen=True):
    """Home: the feature under the key, pinned under the ticket; where it is, as `Found` says it."""

    request: Natural
    nbytes: Natural
    specs: Specs
    address: Natural
    pieces: list[Natural]
    epoch: Natural
    metadata: bytes
    memory: Memory = HOST


class Claimed(msgspec.Struct, tag="claimed", frozen=True):
    """Home: the reader is to make the feature; until it did, or gives the ticket back, no other does."""

    request: Natural


class Told(msgspec.Struct, tag="told", frozen=True):
    """Home: which of the keys are there."""

    request: Natural
    flags: list[bool]


class Read(msgspec.Struct, tag="read", frozen=True):
    """Home: the offered bytes are read; they count once the reader says `Vouch`."""

    request: Natural


class Done(msgspec.Struct, tag="done", frozen=True):
    """Home, in answer to a request that has no result."""

    request: Natural


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Home, in answer to a request. `error` names a class of featcache.errors."""

    request: Natural
    error: Text
    text: Text


class Paid(msgspec.Struct, tag="paid", frozen=True):
    """Home: these payments have arrived; the refs in `gone` owe nothing any more."""

    numbers: list[Natural]
    gone: list[Place]


class Alive(msgspec.Struct, tag="alive", frozen=True):
    """Home, in answer to a `Beat`: the refs, of those that were looked at, that have ended since."""

    number: Natural
    gone: list[Place]
    lease_s: Seconds
    """For which the home keeps what it has pinned for this reader, from the `Beat` on."""


Request = Look | Release | Discard | Seek | Ask | Offer
Answer = Found | Done | Failed | Sought | Claimed | Told | Read
Note = Cancel | Drop | Pay | NameLost | GiveBack | Vouch | Holding | Promise
FromReader = Request | Note | Beat | Goodbye
FromHome = Answer | Paid | Alive
decode_from_reader: Final = checked_decoder(
    msgspec.msgpack.Decoder(FromReader).decode, "a reading host"
)
decode_from_home: Final = checked_decoder(msgspec.msgpack.Decoder(FromHome).decode, "a home")
