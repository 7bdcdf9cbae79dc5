"""What the store is made with, and what it hands out to be done."""

import attrs
import msgspec

from featcache.core.key_queue import KeyWaiter
from featcache.core.put_queue import Waiter
from featcache.core.slots import Slot


@attrs.frozen
class Limits:
    """The sizes that a store is made with."""

    capacity_bytes: int
    segment_bytes: int
    initial_bytes: int
    slots: int
    waiters: int
    grace_s: float
    idle_s: float
    grow_retry_s: float = 1.0
    evict_first: bool = False
    """A full slab evicts before it grows."""
    evict_above: float | None = None
    """The share of the capacity above which keys are evicted with nobody waiting for room."""
    evict_to: float = 1.0
    """The share of the capacity down to which they then are."""
    compact: float = 0.0
    """The share of a tail segment that resident features may fill and still be evicted to empty it."""


class SlotRetired(msgspec.Struct, frozen=True, gc=False):
    """The slot may no longer be read: clear its `live` word now, look at its holds from `due_s`."""

    slot: Slot


class Recycled(msgspec.Struct, frozen=True, gc=False):
    """The extent is free."""

    index: int
    generation: int
    nbytes: int


class Woken(msgspec.Struct, frozen=True, gc=False):
    """This waiter was granted its slot; tell it."""

    waiter: Waiter


class Expired(msgspec.Struct, frozen=True, gc=False):
    """The ref outlived its ttl; `SlotRetired` comes with it, unless a key keeps the feature."""

    label: str
    nbytes: int
    age_s: float
    owed_by: tuple[str, ...] | int


class Grow(msgspec.Struct, frozen=True, gc=False):
    """The head of the queue needs the slab committed up to `end_bytes`. One is out at a time."""

    end_bytes: int


class Evicted(msgspec.Struct, frozen=True, gc=False):
    """A key was dropped; if nothing more is owed of its feature, `SlotRetired` comes with it."""

    key: bytes
    nbytes: int
    unused_s: float
    """Seconds since it was last looked up or published."""
    cause: str


class Found(msgspec.Struct, frozen=True, gc=False):
    """This seeker was granted what it waited for; tell it."""

    waiter: KeyWaiter


class ClaimPassed(msgspec.Struct, frozen=True, gc=False):
    """This seeker was chosen to make what nobody has; tell it."""

    waiter: KeyWaiter


Effect = SlotRetired | Recycled | Woken | Expired | Grow | Evicted | Found | ClaimPassed
