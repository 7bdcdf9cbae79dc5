"""Places extents in the linear range of bytes `[0, end)`, whose end can move.

The idea is Sebastian Aaltonen's OffsetAllocator (https://github.com/sebbbi/OffsetAllocator): free
extents lie in bins whose sizes are spaced like small floating point numbers, and a bit mask, here one
int, finds the next bin that is not empty. The original rounds a request up to the next bin, and so may
miss a fit in its own; here a request fails only when no free extent is large enough. Also, the end can
move, and the size of the largest free extent is known.

All of it is constant time, save that the largest of a crowded bin is found in logarithmic time
(amortised). Nothing here may be called from two threads at once.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final, TypeAlias

ALIGNMENT_BYTES: Final = 256
MAX_END_BYTES: Final = 1 << 48

_UNIT_BITS: Final = ALIGNMENT_BYTES.bit_length() - 1
_MANTISSA_BITS: Final = 4  # 16 bins to an octave: sizes in one bin differ by at most 6 %
_WALK_LIMIT: Final = 8  # a bin of more free extents than this is not walked but given a heap


def aligned_size(nbytes: int) -> int:
    """The size of the extent for so many bytes."""
    return max(-(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, ALIGNMENT_BYTES)


def _bin_of(size_bytes: int) -> int:
    """The bin of an aligned size: its exponent and the bits after the leading one."""
    units = size_bytes >> _UNIT_BITS
    shift = units.bit_length() - (_MANTISSA_BITS + 1)
    # Small sizes have a bin each, like the denormals of a float.
    return (shift << _MANTISSA_BITS) + (units >> shift) if shift > 0 else units


def _least_of(index: int) -> int:
    """The smallest size that lies in a bin."""
    shift = (index >> _MANTISSA_BITS) - 1
    if shift <= 0:
        return index << _UNIT_BITS
    return (index - (shift << _MANTISSA_BITS)) << shift << _UNIT_BITS


_BINS: Final = _bin_of(MAX_END_BYTES) + 1
_LEAST: Final = tuple(_least_of(index) for index in range(_BINS + 1))


class Extent:
    """A piece of the range. Callers may read its offset and size, until they free it."""

    __slots__ = ("_bin", "_next", "_owner", "_previous", "holder", "offset_bytes", "size_bytes")

    _owner: OffsetAllocator | None  # its allocator while in use, else None
    _bin: int  # where it lies while it is free
    _previous: Extent  # neighbours in the range: a ring, closed by the allocator's wall
    _next: Extent
    holder: object
    """The slot that it belongs to, while it is in use: the caller's, the allocator never looks."""

    def __init__(self, offset_bytes: int, size_bytes: int, owner: OffsetAllocator | None) -> None:
        self.offset_bytes = offset_bytes
        self.size_bytes = size_bytes
        self._owner = owner
        self.holder = None

    @property
    def is_free(self) -> bool:
        return self._owner is None

    def __repr__(self) -> str:
        state = "free" if self._owner is None else "used"
        return f"<Extent {state} offset_bytes={self.offset_bytes} size_bytes={self.size_bytes}>"


_HeapEntry: TypeAlias = tuple[int, int, int, Extent]


def _heap_entry(extent: Extent) -> _HeapEntry:
    # The identity only keeps heapq from comparing extents, which have no order.
    return (-extent.size_bytes, extent.offset_bytes, id(extent), extent)


class OffsetAllocator:
    """Gives out extents of `[0, end)`, aligned to 256 bytes and never overlapping."""

    __slots__ = ("_bins", "_heaps", "_mask", "_wall", "end_bytes", "used_bytes")

    def __init__(self, end_bytes: int = 0) -> None:
        self.end_bytes = self.used_bytes = 0
        """To be read only; no properties, as they are looked at in every put."""
        self._mask = 0  # a bit for each bin that holds something
        # Dicts serve as ordered sets: the newest extent of a bin is its last.
        self._bins: list[dict[Extent, None]] = [{} for _ in range(_BINS)]
        self._heaps: dict[int, list[_HeapEntry]] = {}
        # Stands before the first extent and after the last. Never free, so nothing is joined to it.
        wall = self._wall = Extent(0, 0, self)
        wall._previous = wall._next = wall
        self.grow(end_bytes)

    @property
    def free_bytes(self) -> int:
        return self.end_bytes - self.used_bytes

    @property
    def tail_free_bytes(self) -> int:
        """The free bytes that touch the end: what `shrink` could give back."""
        tail = self._wall._previous
        return tail.size_bytes if tail._owner is None else 0

    @property
    def largest_free_bytes(self) -> int:
        """The size of the largest free extent, exactly: the most that `allocate` could place."""
        return self._largest_in(self._mask.bit_length() - 1).size_bytes if self._mask else 0

    def allocate(self, size_bytes: int) -> Extent | None:
        """An extent of at least `size_bytes`, or None if no free extent is that large.

        Zero bytes take one unit of alignment, so that no two extents share an offset.
        """
        if size_bytes < 0:
            raise ValueError(f"size_bytes must not be negative, got {size_bytes}")
        size = (size_bytes + (ALIGNMENT_BYTES - 1)) & -ALIGNMENT_BYTES or ALIGNMENT_BYTES
        if size > self.end_bytes - self.used_bytes:
            return None
        if (node := self._find(size)) is None:
            return None
        # The caller's extent is always a new object: so an old one that is freed twice is refused
        # even when its bytes are in use again.
        extent = Extent(node.offset_bytes, size, self)
        previous = extent._previous = node._previous
        previous._next = extent
        extent._next = node
        node._previous = extent
        # The low part is given out, so that the tail drains and can be given back.
        node.offset_bytes += size
        rest = node.size_bytes - size
        if rest >= _LEAST[node._bin] and not self._heaps:
            node.size_bytes = rest  # it stays in its bin, and was the newest there
        else:
            self._resize(node, rest)
        self.used_bytes += size
        return extent

    def free(self, extent: Extent) -> None:
        """Takes an extent back and joins it with its free neighbours."""
        if extent._owner is not self:
            state = "is not in use" if extent._owner is None else "belongs to another allocator"
            raise ValueError(f"{extent!r} {state}")
        extent._owner = None
        size = extent.size_bytes
        self.used_bytes -= size
        previous, following = extent._previous, extent._next
        if previous._owner is None or following._owner is None:
            # As `_drop`, inline: features mostly lie beside what was free already.
            previous._next = following
            following._previous = previous
            extent._previous = extent._next = self._wall
            if previous._owner is not None:
                following.offset_bytes -= size
                self._resize(following, following.size_bytes + size)
                return
            if following._owner is None:
                self._unlink(following)
                self._drop(following)
                size += following.size_bytes
            self._resize(previous, previous.size_bytes + size)
        else:
            self._link(extent, _bin_of(size))

    def trim(self, extent: Extent, size_bytes: int) -> None:
        """Takes back what an extent in use has beyond the size for so many bytes."""
        size = aligned_size(size_bytes)
        rest = extent.size_bytes - size
        if extent._owner is not self or rest < 0:
            raise ValueError(f"{extent!r} can't be cut to {size_bytes} bytes")
        if not rest:
            return
        extent.size_bytes = size
        self.used_bytes -= rest
        following = extent._next
        if following._owner is None:
            following.offset_bytes -= rest
            self._resize(following, following.size_bytes + rest)
            return
        cut = Extent(extent.offset_bytes + size, rest, None)
        cut._previous, cut._next = extent, following
        extent._next = following._previous = cut
        self._link(cut, _bin_of(rest))

    @property
    def first(self) -> Extent | None:
        """The extent at the beginning, or None if there are no bytes."""
        return self.following(self._wall)

    def previous(self, extent: Extent) -> Extent | None:
        """The extent before this one in the range, free or not; None before the first."""
        before = extent._previous
        return None if before is self._wall else before

    def following(self, extent: Extent) -> Extent | None:
        """The extent after this one in the range, free or not; None after the last."""
        after = extent._next
        return None if after is self._wall else after

    def grow(self, end_bytes: int) -> None:
        """Moves the end up: the bytes from the old end on are free."""
        self._move_end(end_bytes, self.end_bytes, MAX_END_BYTES)

    def shrink(self, end_bytes: int) -> None:
        """Moves the end down. What lies beyond the new end must be free."""
        self._move_end(end_bytes, self.end_bytes - self.tail_free_bytes, self.end_bytes)

    def _move_end(self, end_bytes: int, lowest: int, highest: int) -> None:
        if end_bytes % ALIGNMENT_BYTES or not lowest <= end_bytes <= highest:
            allowed = f"a multiple of {ALIGNMENT_BYTES} from {lowest} to {highest}"
            raise ValueError(f"the end must be {allowed}, not {end_bytes}")
        tail = self._wall._previous
        change = end_bytes - self.end_bytes
        if tail._owner is None:
            self._resize(tail, tail.size_bytes + change)
        elif change:
            added = Extent(self.end_bytes, change, None)
            added._previous, added._next = tail, self._wall
            tail._next = self._wall._previous = added
            self._link(added, _bin_of(change))
        self.end_bytes = end_bytes

    def _find(self, size: int) -> Extent | None:
        units = size >> _UNIT_BITS
        shift = units.bit_length() - (_MANTISSA_BITS + 1)
        index = (shift << _MANTISSA_BITS) + (units >> shift) if shift > 0 else units
        # The newest of the request's own bin comes first: searching only the bins above would keep
        # features of one size from ever reusing each other's bytes.
        members = self._bins[index]
        if members:
            # Not found by `reversed`: that steps over every entry that was deleted from the end since
            # the dict last grew; taking the last out and putting it back cuts those entries off.
            newest, _ = members.popitem()
            members[newest] = None
            if newest.size_bytes >= size:
                return newest
        above = self._mask >> (index + 1)
        if above:
            # Every extent in a higher bin is large enough: the lowest such bin wastes least.
            higher = self._bins[index + (above & -above).bit_length()]
            newest, _ = higher.popitem()
            higher[newest] = None
            return newest
        if not members:
            return None
        # No higher bin holds anything, so the largest of this one is the largest of all.
        largest = self._largest_in(index)
        return largest if largest.size_bytes >= size else None

    def _largest_in(self, index: int) -> Extent:
        """The largest free extent of a bin that is not empty.

        A bin that is too crowded to walk is given a heap. Extents that leave the bin or change in
        size stay in the heap until they reach its top, so that their going costs nothing.
        """
        members = self._bins[index]
        heap = self._heaps.get(index)
        if heap is None:
            if len(members) <= _WALK_LIMIT:
                return max(members, key=lambda node: node.size_bytes)
            heap = self._heaps[index] = [_heap_entry(node) for node in members]
            heapify(heap)
        while True:
            negative_size, _, _, node = heap[0]
            if node._bin == index and node.size_bytes == -negative_size:
                return node
            heappop(heap)

    def _resize(self, node: Extent, size: int) -> None:
        """Gives a free extent another size: it is the newest of its bin then, or gone if empty."""
        node.size_bytes = size
        index = node._bin
        if _LEAST[index] <= size < _LEAST[index + 1] and not self._heaps:
            members = self._bins[index]  # which it need not leave
            if len(members) > 1:
                del members[node]
                members[node] = None
            return
        index = _bin_of(size)
        self._unlink(node)
        if size:
            self._link(node, index)
        else:
            self._drop(node)

    def _link(self, node: Extent, index: int) -> None:
        """Puts a free extent into its bin as the newest, the likeliest to be warm in a cache."""
        members = self._bins[index]
        if not members:
            self._mask |= 1 << index
        elif (heap := self._heaps.get(index)) is not None:
            if len(heap) < 2 * len(members) + 64:
                heappush(heap, _heap_entry(node))
            else:
                # Most of its entries are stale: the next search builds it anew.
                del self._heaps[index]
        members[node] = None
        node._bin = index

    def _unlink(self, node: Extent) -> None:
        index = node._bin
        members = self._bins[index]
        del members[node]
        node._bin = -1
        if not members:
            self._mask ^= 1 << index
            self._heaps.pop(index, None)

    def _drop(self, node: Extent) -> None:
        """Takes an extent, which is in no bin, out of the range."""
        previous, following = node._previous, node._next
        previous._next = following
        following._previous = previous
        # A reference to it that is left must not keep its former neighbours alive.
        node._previous = node._next = self._wall
