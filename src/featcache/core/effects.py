"""Store limits and effects."""

import attrs
import msgspec

from featcache.core.key_queue import KeyWaiter
from featcache.core.put_queue import Waiter
from featcache.core.slots import Slot


@attrs.frozen
class Limits:
    """Sizes and times of one pool."""

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
    """The share of the capacity above which keys are evicted though no put waits for room."""
    evict_to: float = 1.0
    """The share of the capacity down to which they are evicted then."""
    eviction: str = "lru"
    """The eviction order: a name of `core.recency.POLICIES`."""
    compact: float = 0.0
    """The share of a tail segment that resident features may fill and still be evicted to empty it."""


class SlotRetired(msgspec.Struct, frozen=True, gc=False):
    """The slot may no longer be read: clear its `live` word now, and only then look at its holds.

    Not before `due_s`: a reader writes its hold first and looks at `live` after, so either it sees the
    revocation or the owner sees the hold.
    """

    slot: Slot


class Recycled(msgspec.Struct, frozen=True, gc=False):
    """The slot is free, and its extent; of a share, whose extent is another's, `nbytes` is 0."""

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
    """The head of the queue needs the slab committed up to `end_bytes`. One at a time."""

    end_bytes: int


class Evicted(msgspec.Struct, frozen=True, gc=False):
    """A key was dropped; if no read of its feature is out, `SlotRetired` comes with it."""

    key: bytes
    nbytes: int
    unused_s: float
    """Seconds since it was last looked up or published."""
    cause: str


class Found(msgspec.Struct, frozen=True, gc=False):
    """This waiter was granted the slot under its key; tell it."""

    waiter: KeyWaiter


class ClaimPassed(msgspec.Struct, frozen=True, gc=False):
    """This waiter now holds the claim to compute its key; tell it."""

    waiter: KeyWaiter


Effect = SlotRetired | Recycled | Woken | Expired | Grow | Evicted | Found | ClaimPassed
