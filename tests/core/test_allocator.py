"""OffsetAllocator against a model of plain intervals, and promises that no model shows."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.books import check_books
from featcache.core import allocator as allocator_module
from featcache.core.allocator import ALIGNMENT_BYTES, MAX_END_BYTES, Extent, OffsetAllocator

UNIT = ALIGNMENT_BYTES
MIB = 1 << 20


def aligned(size_bytes: int) -> int:
    return max(UNIT, -(-size_bytes // UNIT) * UNIT)


def allocate(allocator: OffsetAllocator, size_bytes: int) -> Extent:
    extent = allocator.allocate(size_bytes)
    assert extent is not None
    return extent


def place(held: list[Extent], allocator: OffsetAllocator, size_bytes: int) -> None:
    held.append(allocate(allocator, size_bytes))


def bytecodes(call: Callable[[], object]) -> int:
    """How many instructions of the allocator `call` runs: work, measured without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != allocator_module.__file__:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


# Exact multiples, neighbours of powers of two (borders of bins), and sizes of every magnitude.
sizes = st.one_of(
    st.integers(0, 40).map(lambda units: units * UNIT),
    st.integers(0, 20_000),
    st.builds(lambda bit, by: max(0, (1 << bit) + by), st.integers(0, 18), st.integers(-257, 257)),
)
ends = st.integers(0, 1200).map(lambda units: units * UNIT)


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = OffsetAllocator()
        self.end = 0
        self.used: list[tuple[int, int, Extent]] = []  # start, stop

    def holes(self) -> list[tuple[int, int]]:
        holes, at = [], 0
        for start, stop, _ in sorted(self.used, key=lambda item: item[0]):
            if start > at:
                holes.append((at, start))
            at = stop
        if self.end > at:
            holes.append((at, self.end))
        return holes

    def largest(self) -> int:
        return max((stop - start for start, stop in self.holes()), default=0)

    def tail(self) -> int:
        return self.end - max((stop for _, stop, _ in self.used), default=0)

    def place(self, size_bytes: int) -> None:
        need, holes = aligned(size_bytes), self.holes()
        extent = self.allocator.allocate(size_bytes)
        assert (extent is not None) == any(stop - start >= need for start, stop in holes)
        if extent is None:
            return
        assert extent.size_bytes == need
        assert extent.offset_bytes % UNIT == 0
        # The low part of one hole: so it overlaps nothing.
        starts = dict(holes)
        assert extent.offset_bytes in starts
        stop = extent.offset_bytes + need
        assert stop <= starts[extent.offset_bytes]
        self.used.append((extent.offset_bytes, stop, extent))

    @rule(size=sizes)
    def allocate(self, size: int) -> None:
        self.place(size)

    @rule(size=sizes, count=st.integers(2, 40), step=st.sampled_from([0, UNIT]))
    def allocate_alike(self, size: int, count: int, step: int) -> None:
        for index in range(count):
            self.place(size + index % 3 * step)

    @rule(units=st.integers(32, 80))
    def crowd_a_bin(self, units: int) -> None:
        """Free extents of up to four sizes that share a bin, more of them than are walked."""
        self.free_all()
        self.move_end(1200 * UNIT)
        for index in range(12):
            self.place((units + index % 4) * UNIT)
            self.place(0)
        self.give_back_the_tail()
        self.free_many(2)

    @rule()
    def allocate_the_largest(self) -> None:
        self.place(self.largest())

    @rule()
    def refuse_more_than_the_largest(self) -> None:
        assert self.allocator.allocate(self.largest() + 1) is None

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.used) - 1))
        extent = self.used.pop(at)[2]
        self.allocator.free(extent)
        with pytest.raises(ValueError, match="not in use"):
            self.allocator.free(extent)

    @rule(step=st.integers(2, 3))
    def free_many(self, step: int) -> None:
        for _, _, extent in self.used[::step]:
            self.allocator.free(extent)
        del self.used[::step]

    @rule()
    def free_all(self) -> None:
        for _, _, extent in self.used:
            self.allocator.free(extent)
        self.used.clear()
        assert self.allocator.largest_free_bytes == self.allocator.free_bytes == self.end

    @rule(end=ends)
    def move_end(self, end: int) -> None:
        if end >= self.end:
            self.allocator.grow(end)
        elif self.end - end <= self.tail():
            self.allocator.shrink(end)
        else:
            with pytest.raises(ValueError, match="the end must be"):
                self.allocator.shrink(end)
            return
        self.end = end

    @rule()
    def give_back_the_tail(self) -> None:
        self.end -= self.tail()
        self.allocator.shrink(self.end)

    @invariant()
    def same_as_the_model(self) -> None:
        allocator = self.allocator
        used = sum(stop - start for start, stop, _ in self.used)
        assert allocator.end_bytes == self.end
        assert allocator.used_bytes == used
        assert allocator.free_bytes == self.end - used
        assert check_books(allocator) == len(self.used)
        assert allocator.largest_free_bytes == self.largest()
        assert allocator.tail_free_bytes == self.tail()
        for start, stop, extent in self.used:
            assert (extent.offset_bytes, extent.size_bytes) == (start, stop - start)


TestAgainstModel = AllocatorMachine.TestCase
TestAgainstModel.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("end", [UNIT, 17 * UNIT, MIB + UNIT, 3 * MIB - UNIT, MAX_END_BYTES])
def test_the_whole_range_fits_exactly(end: int) -> None:
    allocator = OffsetAllocator(end)
    assert allocator.allocate(end + 1) is None
    extent = allocate(allocator, end)
    assert (extent.offset_bytes, extent.size_bytes) == (0, end)
    assert allocator.largest_free_bytes == allocator.tail_free_bytes == allocator.free_bytes == 0
    assert allocator.allocate(0) is None
    allocator.free(extent)
    assert allocator.largest_free_bytes == end
    check_books(allocator)


def test_an_empty_range_holds_nothing() -> None:
    allocator = OffsetAllocator()
    assert allocator.allocate(0) is None
    assert allocator.largest_free_bytes == allocator.tail_free_bytes == 0
    check_books(allocator)


def test_a_fit_behind_the_newest_of_its_own_bin_is_found() -> None:
    # 1000 to 1007 units share a bin: rounding the request up would look past all of them.
    allocator = OffsetAllocator((1007 + 1 + 1001) * UNIT)
    large = allocate(allocator, 1007 * UNIT)
    allocate(allocator, 0)
    small = allocate(allocator, 1001 * UNIT)
    allocator.free(large)
    allocator.free(small)
    assert allocate(allocator, 1006 * UNIT).offset_bytes == 0


def test_fragmented_space_is_refused_and_joins_when_freed() -> None:
    allocator = OffsetAllocator(64 * UNIT)
    extents = [allocate(allocator, UNIT) for _ in range(64)]
    for extent in extents[::2]:
        allocator.free(extent)
    assert allocator.free_bytes == 32 * UNIT
    assert allocator.largest_free_bytes == UNIT
    assert allocator.allocate(UNIT + 1) is None
    allocator.free(extents[31])
    assert allocator.largest_free_bytes == 3 * UNIT
    assert allocate(allocator, 3 * UNIT).offset_bytes == 30 * UNIT
    check_books(allocator)


def test_zero_bytes_take_a_place_of_their_own() -> None:
    allocator = OffsetAllocator(3 * UNIT)
    offsets = {allocate(allocator, 0).offset_bytes for _ in range(3)}
    assert offsets == {0, UNIT, 2 * UNIT}
    assert allocator.allocate(0) is None


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        OffsetAllocator(UNIT).allocate(-1)


def test_double_free_is_refused_even_after_the_bytes_are_in_use_again() -> None:
    allocator = OffsetAllocator(UNIT)
    first = allocate(allocator, UNIT)
    allocator.free(first)
    with pytest.raises(ValueError, match="not in use"):
        allocator.free(first)
    second = allocate(allocator, UNIT)
    assert second.offset_bytes == 0
    with pytest.raises(ValueError, match="not in use"):
        allocator.free(first)
    assert allocator.used_bytes == UNIT
    allocator.free(second)
    check_books(allocator)


def test_an_extent_of_another_allocator_is_refused() -> None:
    ours, theirs = OffsetAllocator(UNIT), OffsetAllocator(UNIT)
    extent = allocate(theirs, UNIT)
    with pytest.raises(ValueError, match="another allocator"):
        ours.free(extent)
    assert theirs.used_bytes == UNIT
    check_books(ours)


@pytest.mark.parametrize("size", [UNIT, 1000 * UNIT, 1001 * UNIT, 1_100_000])
def test_the_newest_of_a_bin_is_used_first(size: int) -> None:
    """Whether or not the size is the lowest of its bin, and with a large tail free."""
    allocator = OffsetAllocator(64 * MIB)
    extents = []
    for _ in range(5):
        extents.append(allocate(allocator, size))
        allocate(allocator, 0)  # keeps the free ones apart
    freed = [extents[index] for index in (3, 0, 4, 1)]
    offsets = [extent.offset_bytes for extent in freed]
    for extent in freed:
        allocator.free(extent)
    assert [allocate(allocator, size).offset_bytes for _ in freed] == offsets[::-1]


def holes(units: list[int]) -> tuple[OffsetAllocator, list[int]]:
    """An allocator with free extents of these sizes, freed in this order, and their offsets."""
    allocator = OffsetAllocator((sum(units) + len(units)) * UNIT)
    extents = []
    for size in units:
        extents.append(allocate(allocator, size * UNIT))
        allocate(allocator, 0)
    offsets = [extent.offset_bytes for extent in extents]
    for extent in extents:
        allocator.free(extent)
    return allocator, offsets


def test_the_newest_of_a_higher_bin_is_used_first() -> None:
    allocator, offsets = holes([1000, 1001, 1002])
    assert [allocate(allocator, 900 * UNIT).offset_bytes for _ in offsets] == offsets[::-1]


def test_the_lowest_bin_that_fits_is_used() -> None:
    allocator, offsets = holes([40, 10, 20, 80])
    assert allocate(allocator, 9 * UNIT).offset_bytes == offsets[1]
    assert allocate(allocator, 9 * UNIT).offset_bytes == offsets[2]


def test_an_extent_that_was_joined_is_the_newest_of_its_bin() -> None:
    allocator = OffsetAllocator(2003 * UNIT)
    first, between = allocate(allocator, 1000 * UNIT), allocate(allocator, 0)
    allocate(allocator, 0)
    second = allocate(allocator, 1000 * UNIT)
    allocate(allocator, 0)
    allocator.free(first)
    allocator.free(second)
    allocator.free(between)
    assert allocate(allocator, 1000 * UNIT).offset_bytes == 0


def test_the_low_part_is_given_out_so_that_the_tail_stays_free() -> None:
    allocator = OffsetAllocator(10 * MIB)
    assert allocate(allocator, MIB).offset_bytes == 0
    assert allocate(allocator, MIB).offset_bytes == MIB
    assert allocator.tail_free_bytes == 8 * MIB


def test_growth_joins_a_free_tail_and_follows_a_used_one() -> None:
    allocator = OffsetAllocator(2 * MIB)
    extent = allocate(allocator, MIB)
    allocator.grow(4 * MIB)
    assert allocator.largest_free_bytes == allocator.tail_free_bytes == 3 * MIB
    rest = allocate(allocator, 3 * MIB)
    allocator.grow(5 * MIB)
    assert allocator.largest_free_bytes == allocator.tail_free_bytes == MIB
    allocator.free(rest)
    assert allocator.largest_free_bytes == 4 * MIB
    allocator.free(extent)
    assert allocator.largest_free_bytes == allocator.end_bytes == 5 * MIB
    check_books(allocator)


def test_shrink_takes_only_what_is_free_at_the_tail() -> None:
    allocator = OffsetAllocator(4 * MIB)
    low, high = allocate(allocator, MIB), allocate(allocator, MIB)
    allocator.free(low)
    with pytest.raises(ValueError, match="the end must be"):
        allocator.shrink(2 * MIB - UNIT)
    assert allocator.end_bytes == 4 * MIB
    allocator.shrink(3 * MIB)
    allocator.shrink(2 * MIB)
    assert allocator.tail_free_bytes == 0
    assert allocator.largest_free_bytes == MIB
    with pytest.raises(ValueError, match="the end must be"):
        allocator.shrink(MIB)
    allocator.free(high)
    allocator.shrink(0)
    assert allocator.free_bytes == allocator.largest_free_bytes == 0
    allocator.grow(MIB)
    assert allocate(allocator, MIB).offset_bytes == 0
    check_books(allocator)


@pytest.mark.parametrize("end", [-UNIT, UNIT // 2, MAX_END_BYTES + UNIT])
def test_an_impossible_end_is_refused(end: int) -> None:
    allocator = OffsetAllocator(4 * UNIT)
    for move in (OffsetAllocator, allocator.grow, allocator.shrink):
        with pytest.raises(ValueError, match="the end must be"):
            move(end)
    with pytest.raises(ValueError, match="the end must be"):
        allocator.grow(3 * UNIT)
    with pytest.raises(ValueError, match="the end must be"):
        allocator.shrink(5 * UNIT)


def free_sizes(allocator: OffsetAllocator) -> list[int]:
    """By a walk of the whole range, which no bin takes part in."""
    free = []
    node = allocator._wall._next
    while node is not allocator._wall:
        if node._owner is None:
            free.append(node.size_bytes)
        node = node._next
    return free


def crowd(count: int) -> OffsetAllocator:
    """`count` free extents of one bin, of 32 sizes, each between used ones, and nothing else."""
    allocator = OffsetAllocator(MAX_END_BYTES)
    extents = []
    for index in range(count):
        extents.append(allocate(allocator, (992 + index % 32) * UNIT))
        allocate(allocator, 0)
    allocator.shrink(allocator.end_bytes - allocator.tail_free_bytes)
    for extent in extents:
        allocator.free(extent)
    return allocator


def work(count: int) -> tuple[int, float]:
    """What work among `count` free extents of one bin takes, in bytecodes.

    The most that one allocate or free takes, and the mean of both with the largest asked for.
    """
    allocator = crowd(count)
    held: list[Extent] = []
    most = total = 0
    allocator.largest_free_bytes  # noqa: B018  builds the heap, which its extents' frees paid for
    randomness = random.Random(count)
    for _ in range(300):
        size = (992 + randomness.randrange(32)) * UNIT
        in_allocate = bytecodes(partial(place, held, allocator, size))
        total += bytecodes(lambda: allocator.largest_free_bytes)
        extent = held.pop(randomness.randrange(len(held)))
        in_free = bytecodes(partial(allocator.free, extent))
        total += bytecodes(lambda: allocator.largest_free_bytes)
        total += in_allocate + in_free
        most = max(most, in_allocate, in_free)
    return most, total / 300


def test_work_does_not_grow_with_the_number_of_extents() -> None:
    few_most, few_mean = work(100)
    many_most, many_mean = work(4000)
    assert few_most > 50  # that something is counted at all
    assert many_most <= 1.5 * few_most
    assert many_mean <= 1.5 * few_mean


def test_the_largest_of_a_crowded_bin_is_exact_through_churn() -> None:
    """What leaves the bin whole, is split or is joined stays in its heap for a while."""
    allocator = crowd(60)
    held: list[Extent] = []
    randomness = random.Random(11)
    for _ in range(6000):
        if held and randomness.random() < 0.5:
            index = randomness.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            allocator.free(held.pop())
        else:
            largest = allocator.largest_free_bytes // UNIT
            some = randomness.randint(992, 1023)
            units = randomness.choice([1, 2, 3, 30, some, some, largest, largest])
            if (extent := allocator.allocate(units * UNIT)) is not None:
                held.append(extent)
            else:
                assert units > largest
        assert allocator.largest_free_bytes == max(free_sizes(allocator), default=0)
    check_books(allocator)


def test_the_last_of_a_crowded_bin_may_change_its_size() -> None:
    allocator, _ = holes([1000 + index for index in range(16)])
    assert allocator.largest_free_bytes == 1015 * UNIT
    for index in range(15):
        allocate(allocator, (1015 - index) * UNIT)
    assert allocator.largest_free_bytes == 1000 * UNIT
    allocate(allocator, UNIT)
    assert allocator.largest_free_bytes == 999 * UNIT
    check_books(allocator)


def test_heaps_do_not_keep_what_is_gone() -> None:
    """Extents that leave a crowded bin stay in its heap, so it must be thrown away in time."""
    allocator = crowd(100)
    for _ in range(10_000):
        extent = allocate(allocator, 992 * UNIT)
        assert allocator.largest_free_bytes == 1023 * UNIT
        allocator.free(extent)
    assert all(len(heap) <= 2 * 100 + 64 for heap in allocator._heaps.values())
    check_books(allocator)


def test_random_churn_ends_in_one_free_extent() -> None:
    randomness = random.Random(7)
    allocator = OffsetAllocator(256 * MIB)
    held: list[Extent] = []
    for step in range(20_000):
        if held and randomness.random() < 0.45:
            index = randomness.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            allocator.free(held.pop())
        elif (extent := allocator.allocate(int(2 ** randomness.uniform(0, 22)))) is not None:
            held.append(extent)
        if step % 500 == 0:
            check_books(allocator)
    for extent in held:
        allocator.free(extent)
    assert allocator.largest_free_bytes == allocator.free_bytes == 256 * MIB
    check_books(allocator)
