"""The slots that a session writes: asked for, or claimed of those that it was given ahead."""

import threading
from collections.abc import Callable
from typing import Final

from featcache.errors import FeatcacheError, MalformedRef
from featcache.memory.slab import Order, PageWords
from featcache.memory.words import RoomClaim, fence_after_lock
from featcache.ref import FeatureRef
from featcache.session.leased_reads import ONE_USE, Uses

_WRITES: Final = 1 << 40
"""Beyond any slot: pins for writing and for reading never share a key."""
_WRITTEN: Final = 2
"""An index into PageWords."""


class SlotWrites:
    """The part of an `Attachment` that writes."""

    capacity_bytes: int
    _slots: int
    _lock: threading.Lock
    _pins: dict[tuple[int, int], Uses]
    _in_flight: dict[tuple[int, int], int]
    _plain: PageWords
    _reserved: memoryview
    _own_puts: dict[int, FeatureRef]
    _gone: FeatcacheError | None

    def check(self) -> None:
        raise NotImplementedError

    def _idle(self) -> Callable[[], object] | None:
        raise NotImplementedError

    def _signal(self, which: int, index: int, value: int, order: Order) -> None:
        raise NotImplementedError

    def begin_write(self, index: int, generation: int, offset_bytes: int, nbytes: int) -> None:
        """Pin a reserved slot until `end_write`: the session stays attached for it.

        Raises:
            MalformedRef: the slot, or its extent, is not in this pool.
            OwnerLost, CacheClosed: nothing may begin any more.

        """
        self._check_room(index, offset_bytes + nbytes)
        with self._lock:
            self._pins[_WRITES + index, generation] = ONE_USE

    def _check_room(self, index: int, end_bytes: int) -> None:
        self.check()
        if index >= self._slots or end_bytes > self.capacity_bytes:
            raise MalformedRef("the owner gave room that its slab does not have")

    def claim(self, index: int, generation: int, offset_bytes: int, nbytes: int) -> bool | None:
        """As `begin_write`, of a slot that was given ahead: True if it is this session's now.

        False if the owner took it back at the same time, and may have found the claim: `end_write` and a
        message that gives it up must follow. None if it was taken back before: nothing was done.
        """
        self._check_room(index, offset_bytes + nbytes)
        opened = generation | RoomClaim.OPEN
        # First: a slot that was taken back may be this session's again by now, of a later generation,
        # and `written` say so. While this one is open there is none.
        if self._reserved[index] != opened:
            return None
        if self._in_flight:  # what a stream wrote for the slot's last tenant has landed
            self._in_flight.pop((_WRITTEN, index), None)
        with self._lock:
            if (
                self._gone is not None
            ):  # in the lock, in which its end looks for writes that are out
                self.check()
            self._pins[_WRITES + index, generation] = ONE_USE
            self._plain.written[index] = generation | RoomClaim.CLAIMED
        # The claim must be visible to the owner before `reserved` is looked at (`RoomClaim`): either this
        # session finds that the room is gone, or the owner finds the claim.
        fence_after_lock()
        return self._reserved[index] == opened

    def note_put(self, ref: FeatureRef) -> None:
        """Note a put of this session's, so that its own reads need not wait for the owner."""
        self._own_puts[ref.slot] = ref

    def end_write(self, index: int, generation: int) -> None:
        """Unpin it: it is published, or given up."""
        with self._lock:
            del self._pins[_WRITES + index, generation]
            idle = self._idle()
        if idle is not None:
            idle()

    def tell_written(self, index: int, generation: int, order: Order) -> None:
        """Say, behind `order`, that a slot which the owner reserved for this session is written."""
        self._signal(_WRITTEN, index, generation, order)
