"""What fits: the room of one put, or of a batch, which is given all of its room at once or none.

A batch has one place in the queue. If it were given its room piece by piece, two batches could wait for
each other's, and one for its own. So its first slot stands for all of them, in the queue's handshake too,
until the put takes them apart.
"""

from collections.abc import Sequence

from featcache.core.allocator import OffsetAllocator, aligned_size
from featcache.core.effects import Limits
from featcache.core.put_queue import Batch, Request, WaitQueue
from featcache.core.shares import Shares
from featcache.core.slab_size import SlabSize
from featcache.core.slots import Slot
from featcache.errors import FeatureTooLarge, at_member


class Batches(Shares):
    """The part of a `Store` that says what fits, and gives batches their room."""

    limits: Limits
    max_feature_bytes: int
    queue: WaitQueue
    allocator: OffsetAllocator
    size: SlabSize

    def reserve(self, request: Request, now_s: float, *, first: bool = False) -> Slot | None:
        """Return a RESERVED slot, or None."""
        raise NotImplementedError

    def _free(self, slot: Slot) -> None:
        raise NotImplementedError

    def check_size(self, nbytes: int) -> None:
        """Raise FeatureTooLarge for a size that even an empty pool can't hold."""
        if nbytes > self.max_feature_bytes:
            raise FeatureTooLarge(
                f"a feature of {nbytes} bytes never fits a pool of {self.limits.capacity_bytes}: "
                "raise capacity or split the feature"
            )

    def comes_by_growth(self, request: Request, now_s: float) -> bool:
        """Whether growth alone has room for a request behind all that wait for room now."""
        queue = self.queue
        if queue.growing < queue.count or not self.size.can_grow(now_s):
            return False
        wanted_bytes = queue.growing_bytes + aligned_size(request.nbytes)
        slots = len(request.members) if isinstance(request, Batch) else 1
        has_slots = queue.count + slots <= len(self.table.free_slots)
        return has_slots and wanted_bytes <= self.size.tail_room_bytes

    # --- batches ----------------------------------------------------------------------------------

    def batch(self, members: Sequence[Request], session: int = 0) -> Batch:
        """Return one request for all of these, or raise FeatureTooLarge if they never fit together."""
        limits, total_bytes = self.limits, 0
        for index, member in enumerate(members):
            try:
                self.check_size(member.nbytes)
            except FeatureTooLarge as error:
                raise at_member(error, index) from None
            total_bytes += aligned_size(member.nbytes)
        if total_bytes > self.max_feature_bytes or len(members) > limits.slots:
            raise FeatureTooLarge(
                f"{len(members)} features of {total_bytes} bytes together never fit a pool of "
                f"{limits.capacity_bytes} bytes and {limits.slots} slots: put fewer at a time"
            )
        return Batch(total_bytes, 1, None, None, session, tuple(members))

    def reserve_batch(self, batch: Batch, now_s: float, *, first: bool = False) -> Slot | None:
        """Return the first of the RESERVED slots of a batch, or None if all do not fit now."""
        if (self.queue.count and not first) or not self._may_fit(batch):
            return None
        slots, missing = self._try(batch, now_s)
        if missing is not None:
            self._free_all(slots)
            return None
        slots[0].mates = slots
        return slots[0]

    def missing_of(self, batch: Batch, now_s: float) -> Request | None:
        """Return the first member of a batch that does not fit beside those before it."""
        slots, missing = self._try(batch, now_s)
        self._free_all(slots)
        return missing

    def _may_fit(self, batch: Batch) -> bool:
        free_bytes = self.allocator.end_bytes - self.allocator.used_bytes
        return free_bytes >= batch.nbytes and len(self.table.free_slots) >= len(batch.members)

    def _try(self, batch: Batch, now_s: float) -> tuple[list[Slot], Request | None]:
        slots: list[Slot] = []
        for member in batch.members:
            slot = self.reserve(member, now_s, first=True)
            if slot is None:
                return slots, member
            slots.append(slot)
        return slots, None

    def _free_all(self, slots: list[Slot]) -> None:
        for slot in reversed(slots):  # the table gives out first what was freed last
            self._free(slot)

    @staticmethod
    def apart(slot: Slot) -> list[Slot]:
        """Take the slots of a batch apart: each is its holder's to end from here on."""
        slots, slot.mates = slot.mates, None
        return [slot] if slots is None else slots

    def growth_of(self, request: Request, now_s: float) -> int:
        """Return the end in bytes to commit up to for a request, or 0 if that can't help."""
        size, allocator = self.size, self.allocator
        if not isinstance(request, Batch):
            return size.growth_for(request.nbytes, now_s)
        missing_bytes = request.nbytes - (allocator.end_bytes - allocator.used_bytes)
        if missing_bytes > 0:
            return size.growth_for(allocator.tail_free_bytes + missing_bytes, now_s)
        if len(self.table.free_slots) < len(request.members):
            return 0
        missing = self.missing_of(request, now_s)
        return 0 if missing is None else size.growth_for(missing.nbytes, now_s)
