"""How much room there is; and slots reserved ahead of a session's puts, before it asks for them.

A slot that is given ahead is RESERVED like any other, but counts as free: it is taken back as soon as a
put lacks room, unless its session has claimed it by then. The claim is a word of the session's
(`memory.words.CLAIMED`), which the floors above look at; here a claim is a call.
"""

from typing import TYPE_CHECKING

from featcache.core.allocator import OffsetAllocator
from featcache.core.effects import Effect, Limits
from featcache.core.put_queue import Request, WaitQueue
from featcache.core.slab_size import SizeState, SlabSize
from featcache.core.slots import Slot, SlotState

if TYPE_CHECKING:
    from collections.abc import Sequence


class Rooms:
    """The part of a `Store` that knows its room."""

    limits: Limits
    allocator: OffsetAllocator
    size: SlabSize
    queue: WaitQueue
    ahead: dict[int, Slot]
    """Slots that sessions have ahead, by index, as far as is known: not those that were claimed."""
    ahead_bytes: int
    """Their extents."""

    def reserve(self, request: Request, now_s: float, *, first: bool = False) -> Slot | None:
        raise NotImplementedError

    def serve(self, now_s: float) -> list[Effect]:
        raise NotImplementedError

    def pay_all(
        self, reads: "Sequence[tuple[int, int]]", session: int, name: str | None, now_s: float
    ) -> list[Effect]:
        raise NotImplementedError

    def _free(self, slot: Slot) -> None:
        raise NotImplementedError

    @property
    def committed_bytes(self) -> int:
        return self.allocator.end_bytes

    @property
    def used_bytes(self) -> int:
        """Extents given out, but for those given ahead, which any put can have."""
        return self.allocator.used_bytes - self.ahead_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that are not used, committed or not: with `used_bytes` they make up the capacity."""
        return self.limits.capacity_bytes - self.used_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The largest feature that would fit now, counting what the slab may still grow by."""
        return max(self.allocator.largest_free_bytes, self.size.tail_room_bytes)

    @property
    def blocked_puts(self) -> int:
        """Puts that wait for others' bytes: none while the slab changes its size."""
        return len(self.queue) if self.size.state is SizeState.STEADY else 0

    # --- room ahead -------------------------------------------------------------------------------

    def reserve_ahead(self, nbytes: int, session: int, now_s: float) -> Slot | None:
        """Return a slot for a put that a session is expected to make, or None if that room isn't free.

        None also while others wait: nobody is overtaken.
        """
        slot = self.reserve(Request(nbytes, 0, None, None, session), now_s)
        if slot is not None:
            assert slot.extent is not None, "it is reserved"
            self.ahead[slot.index] = slot
            self.ahead_bytes += slot.extent.size_bytes
        return slot

    def claim_ahead(self, slot: Slot) -> None:
        """Count a slot that was given ahead as any reservation: its session writes it."""
        assert slot.extent is not None, "it is reserved"
        del self.ahead[slot.index]
        self.ahead_bytes -= slot.extent.size_bytes

    def free_ahead(self, slot: Slot, now_s: float) -> list[Effect]:
        """Take back a slot that was given ahead, and that its session can't claim any more."""
        self.claim_ahead(slot)
        self._free(slot)
        return self.serve(now_s) if self.queue.count else []

    def fit_ahead(self, slot: Slot, request: Request, now_s: float) -> list[Effect]:
        """Fit a slot that was given ahead to the put that has taken it: it is published next."""
        assert slot.extent is not None, "it is reserved"
        slot.nbytes, slot.ttl_s, slot.wanted_key = request.nbytes, request.ttl_s, request.key
        readers = request.readers
        if isinstance(readers, int):
            slot.reads_left = readers
        else:
            slot.reads_left, slot.owed_by_names = len(readers), set(readers)
        self.allocator.trim(slot.extent, request.nbytes)
        return self.serve(now_s) if self.queue.count else []

    # --- reads that are faster than the publish -----------------------------------------------------

    @staticmethod
    def paid_early(slot: Slot, session: int, name: str | None) -> None:
        """Remember that a session paid its read of a slot that is still to be published."""
        if slot.early_paid is None:
            slot.early_paid = {}
        slot.early_paid[session] = name

    def count_early(self, slot: Slot, generation: int, now_s: float) -> list[Effect]:
        """Count what was paid early of a slot that was just published."""
        effects: list[Effect] = []
        paid, slot.early_paid = slot.early_paid or {}, None
        for session, name in paid.items():
            if slot.generation == generation and slot.state is SlotState.PUBLISHED:
                effects += self.pay_all([(slot.index, generation)], session, name, now_s)
        return effects
