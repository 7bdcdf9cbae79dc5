"""What fits: the room of one put, by growth too."""

from featcache.core.allocator import OffsetAllocator, aligned_size
from featcache.core.effects import Limits
from featcache.core.put_queue import Request, WaitQueue
from featcache.core.shares import Shares
from featcache.core.slab_size import SlabSize
from featcache.errors import FeatureTooLarge


class Batches(Shares):
    """The part of a `Store` that says what fits."""

    limits: Limits
    max_feature_bytes: int
    queue: WaitQueue
    allocator: OffsetAllocator
    size: SlabSize

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
        has_slot = queue.count < len(self.table.free_slots)
        return has_slot and wanted_bytes <= self.size.tail_room_bytes
