"""What must hold of an allocator's books after every call."""

from featcache.core.allocator import ALIGNMENT_BYTES, Extent, OffsetAllocator, _bin_of


def check_books(allocator: OffsetAllocator) -> int:
    """Walk everything; fail where the books are wrong. Return the number of extents in use."""
    offset = used = count = 0
    free: list[Extent] = []
    node = allocator._wall._next
    while node is not allocator._wall:
        size, is_free = node.size_bytes, node._owner is None
        assert node.offset_bytes == offset, "extents leave a gap or overlap"
        assert size > 0, "an extent is empty"
        assert size % ALIGNMENT_BYTES == 0, "a size is not aligned"
        assert node._next._previous is node, "neighbours disagree"
        if is_free:
            assert node._bin == _bin_of(size), "an extent is in a wrong bin"
            assert node._previous not in free[-1:], "free neighbours were not joined"
            free.append(node)
        else:
            used += size
            count += 1
        offset += size
        node = node._next
    assert (allocator.end_bytes, allocator.used_bytes) == (offset, used), "a total is wrong"
    assert all(node in allocator._bins[node._bin] for node in free), "one is in no bin"
    assert sum(map(len, allocator._bins)) == len(free), "a bin holds what is not free"
    mask = sum(1 << index for index, members in enumerate(allocator._bins) if members)
    assert mask == allocator._mask, "the mask is wrong"
    return count
