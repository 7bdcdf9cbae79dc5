"""The slab's committed size: when it grows, when its empty tail is given back."""

import enum

from featcache.core.allocator import ALIGNMENT_BYTES, OffsetAllocator
from featcache.core.effects import Limits
from featcache.settings import round_up


class SizeState(enum.Enum):
    """One change of size at a time; memory is committed and given back outside, meanwhile.

    | from | by | to |
    | --- | --- | --- |
    | STEADY | `begin_growth` | GROWING |
    | GROWING, or STEADY if it was committed at once | `grown` | STEADY, at the new end |
    | the same | `grow_failed` | STEADY, and no growth for `Limits.grow_retry_s` |
    | STEADY | `shrink` that returns an end | SHRINKING, at the new end already |
    | SHRINKING | `shrunk` | STEADY |
    """

    STEADY = "steady"
    GROWING = "growing"
    SHRINKING = "shrinking"


_STEADY = SizeState.STEADY  # members of an enum are slow to look up


class SlabSize:
    """Moves the allocator's end, by whole segments, between the initial size and the capacity."""

    def __init__(self, limits: Limits, allocator: OffsetAllocator) -> None:
        self.state = _STEADY
        self.tail_in_use = False
        """Whether an idle window ended in which the last segment was in use throughout."""
        self.limits = limits
        self._allocator = allocator
        self._grow_after_s = float("-inf")
        self._window_since_s: float | None = None
        self._window_max_bytes = 0
        """The highest end in use, of those seen in this idle window."""

    def growth_for(self, nbytes: int, now_s: float, step_bytes: int = 0) -> int:
        """Return the end in bytes to commit up to so that `nbytes` fit, or 0 if that can't help.

        The end is a multiple of a segment, or of `step_bytes` if that is not 0.
        """
        if self.state is not _STEADY or now_s < self._grow_after_s:
            return 0
        limits, end = self.limits, self._allocator.end_bytes
        size = max(round_up(nbytes, ALIGNMENT_BYTES), ALIGNMENT_BYTES)
        missing = size - self._allocator.tail_free_bytes
        if missing <= 0 or end + missing > limits.capacity_bytes:
            return 0
        step_bytes = step_bytes or limits.segment_bytes
        return min(round_up(end + missing, step_bytes), limits.capacity_bytes)

    @property
    def tail_room_bytes(self) -> int:
        """Bytes that are free in one piece at the end, with all that the slab may still grow by."""
        allocator = self._allocator
        return allocator.tail_free_bytes + self.limits.capacity_bytes - allocator.end_bytes

    def can_grow(self, now_s: float) -> bool:
        """Whether the slab will grow when somebody needs it, unless the memory is not there."""
        if self._allocator.end_bytes >= self.limits.capacity_bytes:
            return False
        return self.state is not _STEADY or now_s >= self._grow_after_s

    def begin_growth(self) -> None:
        """Note that a commit is in progress outside; `grown` or `grow_failed` ends it."""
        self.state = SizeState.GROWING

    def grown(self, end_bytes: int) -> None:
        """Count the slab as committed up to `end_bytes`. The idle window begins anew."""
        self.state = _STEADY
        self._allocator.grow(end_bytes)
        self._window_since_s = None
        self.tail_in_use = False

    def grow_failed(self, now_s: float) -> None:
        """Count the pool as full at its present size until the retry."""
        self.state = _STEADY
        self._grow_after_s = now_s + self.limits.grow_retry_s

    def shrink(self, now_s: float, *, wanted: bool) -> int | None:
        """Cut off the tail segments that were empty for `idle_s`; return the new end, or None.

        Nothing is cut while the size changes, or while a put waits for room (`wanted`). The caller
        gives the memory back and then calls `shrunk`.
        """
        allocator, limits = self._allocator, self.limits
        in_use = allocator.end_bytes - allocator.tail_free_bytes
        if self._window_since_s is None:
            self._window_since_s, self._window_max_bytes = now_s, in_use
        self._window_max_bytes = max(self._window_max_bytes, in_use)
        if self.state is not _STEADY or wanted or now_s - self._window_since_s < limits.idle_s:
            return None
        keep = max(round_up(self._window_max_bytes, limits.segment_bytes), limits.initial_bytes)
        self._window_since_s = None
        self.tail_in_use = keep >= allocator.end_bytes
        if self.tail_in_use:
            return None
        # The end moves before the memory goes, so that nothing is placed in what is given back; the
        # state keeps it from growing there again until that is done.
        allocator.shrink(keep)
        self.state = SizeState.SHRINKING
        return keep

    def shrunk(self) -> None:
        self.state = _STEADY
