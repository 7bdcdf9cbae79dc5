"""The messages of observers, which may look at a pool and neither read its features nor hold anything.

An observer says so in its `Hello`. From then on its messages are decoded by a decoder of their own, which
knows none that reads, reserves, finds or pins. It has one request under way at a time; each is answered
by one message.
"""

from typing import Annotated, Final, Literal

import msgspec

from featcache.control.messages import Closing, Goodbye, Refused, Reply, checked_decoder
from featcache.control.wire import Key, MessageBytes, Natural, Numbered, PoolId, Text
from featcache.observation import HomeView, KeysPage, PoolView, ReadingHostView, SessionView

MAX_CELLS: Final = 4096
MAX_KEYS: Final = 512
MAX_SESSIONS: Final = 64
MAX_HOSTS: Final = 64
Order = Literal["size", "age", "hits"]
ORDERS: Final[tuple[Order, ...]] = ("size", "age", "hits")


class Observe(Numbered, tag="observe", frozen=True):
    """Observer: the pool as it is now. Answered by `Observed`."""


class ListSessions(Numbered, tag="list_sessions", frozen=True):
    """Observer: the sessions with numbers above this one. Answered by `SessionList`."""

    after: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]


class ListHosts(Numbered, tag="list_hosts", frozen=True):
    """Observer: the other hosts whose record comes after this one. Answered by `HostList`."""

    after: Annotated[str, msgspec.Meta(max_length=1100)]


class ListKeys(Numbered, tag="list_keys", frozen=True):
    """Observer: keys in this order, the largest first. Answered by `KeyList`."""

    order: Order
    after: Annotated[str, msgspec.Meta(max_length=3000)]
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_KEYS)]


class MapSlab(Numbered, tag="map_slab", frozen=True):
    """Observer: the slab by offset. Answered by `SlabCells`."""

    cells: Annotated[int, msgspec.Meta(ge=1, le=MAX_CELLS)]


class Evict(Numbered, tag="evict", frozen=True):
    """Observer: drop a key. Answered by `Reply`; its `flag` is whether it was there."""

    key: Key


class ObserverWelcome(msgspec.Struct, tag="observer", frozen=True):
    """Owner, in answer to an observer's `Hello`. Carries one descriptor, the owner's pidfd."""

    version: int
    pool_id: PoolId
    endpoint: Text
    message_bytes: MessageBytes


class Observed(msgspec.Struct, tag="observed", frozen=True):
    """Owner: the pool but for its sessions."""

    request: Natural
    pool: PoolView


class SessionList(msgspec.Struct, tag="session_list", frozen=True):
    """Owner: sessions, in the order of their numbers."""

    request: Natural
    sessions: tuple[SessionView, ...]
    more: bool


class HostList(msgspec.Struct, tag="host_list", frozen=True):
    """Owner: other hosts, those read from first."""

    request: Natural
    homes: tuple[HomeView, ...]
    reading_hosts: tuple[ReadingHostView, ...]
    next: str | None
    """What to ask for as `after` next; None if these are the last."""


class KeyList(msgspec.Struct, tag="key_list", frozen=True):
    """Owner: a page of keys."""

    request: Natural
    page: KeysPage


class SlabCells(msgspec.Struct, tag="slab_cells", frozen=True):
    """Owner: as `observation.SlabMap`, one byte, one byte and one 32-bit float a cell."""

    request: Natural
    capacity_bytes: Natural
    committed_bytes: Natural
    states: bytes
    used: bytes
    ages_s: bytes


Request = Observe | ListSessions | ListHosts | ListKeys | MapSlab | Evict
Answer = Reply | Observed | SessionList | HostList | KeyList | SlabCells
FromObserver = Request | Goodbye
FromOwner = ObserverWelcome | Refused | Closing | Answer

_from_observer: msgspec.msgpack.Decoder[FromObserver] = msgspec.msgpack.Decoder(FromObserver)
_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)
decode_from_observer = checked_decoder(_from_observer.decode, "an observer")
decode_for_observer = checked_decoder(_from_owner.decode, "an owner")
