"""The directory: keys, pins, counts of bytes, and which slots are evictable, in whatever order."""

from collections.abc import Callable

import pytest

from featcache.core.allocator import ALIGNMENT_BYTES, Extent
from featcache.core.directory import Directory
from featcache.core.recency import Lru
from featcache.core.recency.lazy_heap import LazyHeap
from featcache.core.slots import Slot, SlotState

UNIT = ALIGNMENT_BYTES


class Kept(Directory):
    """A directory with its eviction order at hand."""

    def __init__(self, recency: LazyHeap | None = None) -> None:
        self.recency = recency or Lru()
        super().__init__(self.recency)


def slot_of(units: int = 1, index: int = 0) -> Slot:
    """A slot as it is when it has just been published and owes no reads."""
    slot = Slot(index)
    slot.state = SlotState.PUBLISHED
    slot.extent = Extent(index * UNIT, units * UNIT, None)
    slot.nbytes = units * UNIT - 1  # books count extents, not what was asked for
    return slot


def keep(directory: Kept, key: bytes, units: int = 1) -> Slot:
    slot = slot_of(units)
    assert directory.keep(key, slot, 0.0) is None
    return slot


def keep_some(directory: Kept, count: int) -> list[Slot]:
    return [keep(directory, b"%d" % n) for n in range(count)]


def by_nobody(_: Slot) -> bool:
    return False


def evictable(directory: Kept) -> set[Slot]:
    """What a search for victims finds, in whatever order."""
    return set(directory.recency.coldest_few(len(directory) + 1, by_nobody))


def books(directory: Kept) -> tuple[int, int, int]:
    return directory.resident_bytes, directory.pinned_bytes, directory.idle_bytes


# --- keys ---------------------------------------------------------------------------------------


def test_an_empty_directory() -> None:
    directory = Kept()
    assert len(directory) == 0
    assert list(directory) == []
    assert b"a" not in directory
    assert directory.find(b"a") is None
    assert not directory.is_pinned(b"a")
    assert evictable(directory) == set()
    assert books(directory) == (0, 0, 0)


def test_what_is_kept_is_found_under_its_key() -> None:
    directory = Kept()
    a, b = keep(directory, b"a"), keep(directory, b"b", 2)
    assert (directory.find(b"a"), directory.find(b"b")) == (a, b)
    assert (a.key, b.key) == (b"a", b"b")
    assert b"a" in directory
    assert (len(directory), list(directory)) == (2, [b"a", b"b"])
    assert books(directory) == (3 * UNIT, 0, 3 * UNIT)


def test_what_is_dropped_is_kept_no_longer() -> None:
    directory = Kept()
    a, b = keep(directory, b"a"), keep(directory, b"b", 2)
    directory.drop(a)
    assert a.key is None
    assert not a.idle
    assert directory.find(b"a") is None
    assert list(directory) == [b"b"]
    assert books(directory) == (2 * UNIT, 0, 2 * UNIT)
    assert evictable(directory) == {b}
    directory.drop(b)
    assert books(directory) == (0, 0, 0)


def test_a_feature_that_comes_under_a_key_puts_out_the_one_before() -> None:
    directory = Kept()
    old, other = keep(directory, b"a", 3), keep(directory, b"b")
    new = slot_of(2)
    assert directory.keep(b"a", new, 5.0) is old
    assert (old.key, old.idle) == (None, False)
    assert (directory.find(b"a"), new.key, new.used_s) == (new, b"a", 5.0)
    assert len(directory) == 2
    assert books(directory) == (3 * UNIT, 0, 3 * UNIT)
    assert evictable(directory) == {other, new}


def test_a_slot_that_came_back_while_it_is_read_is_not_taken_for_its_first_life() -> None:
    directory = Kept()
    slot = keep(directory, b"a")
    directory.drop(slot)
    slot.reads_left = 1
    directory.keep(b"a", slot, 0.0)
    assert evictable(directory) == set()


# --- what is evictable -------------------------------------------------------------------------


Way = Callable[[Kept, Slot], object]


def grant(directory: Kept, slot: Slot) -> None:
    slot.grants += 1
    directory.refresh(slot)


def end_grant(directory: Kept, slot: Slot) -> None:
    slot.grants -= 1
    directory.refresh(slot)


def owe(directory: Kept, slot: Slot) -> None:
    slot.reads_left += 1
    directory.refresh(slot)


def pay(directory: Kept, slot: Slot) -> None:
    slot.reads_left -= 1
    directory.refresh(slot)


def pin(directory: Kept, slot: Slot) -> None:
    assert slot.key is not None
    directory.pin(slot.key, 1)


def unpin(directory: Kept, slot: Slot) -> None:
    assert slot.key is not None
    directory.unpin(slot.key, 1)


WAYS = [
    pytest.param(grant, end_grant, id="granted"),
    pytest.param(owe, pay, id="owed"),
    pytest.param(pin, unpin, id="pinned"),
]


@pytest.mark.parametrize(("begin", "end"), WAYS)
def test_what_is_read_owed_or_pinned_can_not_go(begin: Way, end: Way) -> None:
    directory = Kept()
    a, b, c = keep(directory, b"a", 3), keep(directory, b"b"), keep(directory, b"c")
    begin(directory, a)
    assert evictable(directory) == {b, c}
    assert directory.resident_bytes == 5 * UNIT
    assert directory.idle_bytes == 2 * UNIT
    end(directory, a)
    assert directory.idle_bytes == 5 * UNIT
    assert evictable(directory) == {a, b, c}


@pytest.mark.parametrize(("begin", "end"), WAYS)
def test_what_is_so_twice_is_so_until_both_ended(begin: Way, end: Way) -> None:
    directory = Kept()
    slot = keep(directory, b"a")
    begin(directory, slot)
    begin(directory, slot)
    end(directory, slot)
    assert evictable(directory) == set()
    assert directory.idle_bytes == 0
    end(directory, slot)
    assert evictable(directory) == {slot}


def test_what_is_kept_while_reads_are_owed_can_go_once_they_are_paid() -> None:
    directory = Kept()
    slot = slot_of()
    slot.reads_left = 1
    directory.keep(b"a", slot, 0.0)
    assert evictable(directory) == set()
    assert books(directory) == (UNIT, 0, 0)
    pay(directory, slot)
    assert evictable(directory) == {slot}
    assert books(directory) == (UNIT, 0, UNIT)


@pytest.mark.parametrize("state", [SlotState.FREE, SlotState.RESERVED, SlotState.RETIRING])
def test_only_a_published_slot_can_go(state: SlotState) -> None:
    directory = Kept()
    slot = keep(directory, b"a")
    slot.state = state
    directory.refresh(slot)
    assert evictable(directory) == set()
    assert directory.idle_bytes == 0


# --- pins ---------------------------------------------------------------------------------------


def test_each_pin_is_taken_back_by_itself() -> None:
    directory = Kept()
    slot = keep(directory, b"a", 2)
    for session in (1, 2, 1):
        directory.pin(b"a", session)
        assert books(directory) == (2 * UNIT, 2 * UNIT, 0)
    for session in (1, 2, 1):
        assert directory.is_pinned(b"a")
        assert evictable(directory) == set()
        directory.unpin(b"a", session)
    assert not directory.is_pinned(b"a")
    assert books(directory) == (2 * UNIT, 0, 2 * UNIT)
    assert evictable(directory) == {slot}


def test_a_session_without_a_pin_takes_back_the_oldest_of_anothers() -> None:
    directory = Kept()
    keep(directory, b"a")
    for session in (1, 2):
        directory.pin(b"a", session)
    directory.unpin(b"a", 3)
    directory.unpin_all(1)  # has none any more
    assert directory.is_pinned(b"a")
    directory.unpin_all(2)
    assert not directory.is_pinned(b"a")


def test_unpinning_what_is_not_pinned_is_nothing() -> None:
    directory = Kept()
    keep(directory, b"a")
    directory.unpin(b"a", 1)
    directory.unpin(b"b", 1)
    directory.unpin_all(1)
    assert books(directory) == (UNIT, 0, UNIT)


def test_all_pins_of_a_session_are_taken_back_at_once() -> None:
    directory = Kept()
    slots = [keep(directory, key, units) for key, units in ((b"a", 1), (b"b", 2), (b"c", 4))]
    for key, session in ((b"a", 1), (b"a", 1), (b"b", 1), (b"b", 2), (b"c", 2)):
        directory.pin(key, session)
    directory.unpin_all(1)
    assert books(directory) == (7 * UNIT, 6 * UNIT, UNIT)
    directory.unpin_all(1)
    directory.unpin_all(2)
    assert books(directory) == (7 * UNIT, 0, 7 * UNIT)
    assert evictable(directory) == set(slots)


def test_pins_are_a_keys_and_hold_for_the_feature_that_comes_under_it() -> None:
    directory = Kept()
    keep(directory, b"a", 3)
    directory.pin(b"a", 1)
    new = slot_of(2)
    directory.keep(b"a", new, 0.0)
    assert directory.is_pinned(b"a")
    assert books(directory) == (2 * UNIT, 2 * UNIT, 0)
    directory.unpin(b"a", 1)
    assert evictable(directory) == {new}


def test_pins_go_with_their_key() -> None:
    directory = Kept()
    slot = keep(directory, b"a", 3)
    directory.pin(b"a", 1)
    directory.drop(slot)
    assert not directory.is_pinned(b"a")
    assert books(directory) == (0, 0, 0)
    keep(directory, b"a")
    directory.unpin_all(1)
    assert books(directory) == (UNIT, 0, UNIT)
