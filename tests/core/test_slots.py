"""The slot table: generations, reuse, and what a free slot remembers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.core.allocator import OffsetAllocator
from featcache.core.slots import Slot, SlotState, SlotTable


def use(slot: Slot) -> None:
    """Fill in what a tenant leaves behind."""
    slot.extent = OffsetAllocator(512).allocate(512)
    slot.reads_left = 2
    slot.owed_by_names = {"tp0", "tp1"}
    slot.paid_by = {1}


def test_a_new_table_is_free() -> None:
    table = SlotTable(3)
    assert table.count == 3
    assert table.used == table.high == 0
    assert not table.full
    assert table.in_use() == []
    assert all(table.find(index, 0) is None for index in range(3))


def test_the_lowest_slots_are_taken_first() -> None:
    table = SlotTable(3)
    assert [table.take().index for _ in range(3)] == [0, 1, 2]


def test_the_most_recently_freed_slot_is_taken_first() -> None:
    table = SlotTable(4)
    slots = [table.take() for _ in range(4)]
    for index in (2, 0, 3):
        table.give(slots[index])
    assert [table.take().index for _ in range(3)] == [3, 0, 2]


def test_a_slot_is_taken_as_reserved_and_given_as_free() -> None:
    table = SlotTable(1)
    slot = table.take()
    states = [slot.state]
    table.give(slot)
    states.append(slot.state)
    assert states == [SlotState.RESERVED, SlotState.FREE]


def test_generations_begin_at_one_and_never_repeat() -> None:
    """Nought is what an unwritten word says."""
    table = SlotTable(2)
    other = table.take()
    seen = []
    for _ in range(5):
        slot = table.take()
        seen.append((slot.index, slot.generation))
        table.give(slot)
    assert seen == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5)]
    assert other.generation == 1


def test_only_the_generation_that_is_in_use_is_found() -> None:
    table = SlotTable(2)
    slot = table.take()
    table.give(slot)
    assert table.find(0, 1) is None
    again = table.take()
    assert again is slot
    assert table.find(0, 2) is slot
    assert [table.find(0, generation) for generation in (-1, 0, 1, 3)] == [None] * 4


@pytest.mark.parametrize("state", [SlotState.RESERVED, SlotState.PUBLISHED, SlotState.RETIRING])
def test_a_slot_is_found_in_every_state_but_free(state: SlotState) -> None:
    table = SlotTable(1)
    slot = table.take()
    slot.state = state
    assert table.find(0, 1) is slot
    assert table.in_use() == [slot]


@pytest.mark.parametrize("index", [-2, -1, 2, 1 << 40])
def test_an_index_outside_the_table_is_found_to_be_nothing(index: int) -> None:
    """A forged ref names any index: -1 must not be the last slot."""
    table = SlotTable(2)
    for _ in range(2):
        table.take()
    assert table.find(index, 1) is None


def test_full_and_used_follow_what_is_taken() -> None:
    table = SlotTable(2)
    first = table.take()
    assert (table.used, table.full) == (1, False)
    table.take()
    assert (table.used, table.full) == (2, True)
    table.give(first)
    assert (table.used, table.full) == (1, False)


def test_high_is_the_highest_index_ever_taken() -> None:
    table = SlotTable(4)
    slots = [table.take() for _ in range(3)]
    assert table.high == 3
    for slot in slots:
        table.give(slot)
    table.take()
    assert table.high == 3


def test_a_free_slot_remembers_nothing_of_its_tenant() -> None:
    table = SlotTable(1)
    slot = table.take()
    use(slot)
    table.give(slot)
    assert slot.extent is None
    assert slot.owed_by_names is None
    assert slot.paid_by is None
    assert slot.reads_left == 0


def test_in_use_is_by_index() -> None:
    table = SlotTable(5)
    slots = [table.take() for _ in range(4)]
    table.give(slots[3])
    table.give(slots[0])
    table.give(slots[1])
    table.take()
    assert [slot.index for slot in table.in_use()] == [1, 2]


def test_who_owes_is_a_count_or_names() -> None:
    anonymous, named = Slot(0), Slot(1)
    anonymous.reads_left = 3
    named.reads_left, named.owed_by_names = 2, {"tp1", "tp0"}
    assert anonymous.owed_by == 3
    assert named.owed_by == ("tp0", "tp1")


def test_a_label_names_slot_and_generation() -> None:
    table = SlotTable(8)
    for _ in range(7):
        table.take()
    slot = table.take()
    table.give(slot)
    assert table.take().label == "7:2"


def test_the_offset_is_that_of_the_extent() -> None:
    allocator = OffsetAllocator(512)
    allocator.allocate(256)
    slot = Slot(0)
    slot.extent = allocator.allocate(256)
    assert slot.offset_bytes == 256


@given(st.integers(1, 6), st.lists(st.integers(0, 11)))
def test_the_table_is_a_dict_of_what_is_in_use(count: int, steps: list[int]) -> None:
    """A step under the count gives that slot back, any other takes one."""
    table, model, generations = SlotTable(count), dict[int, Slot](), dict[int, int]()
    for step in steps:
        if step in model:
            table.give(model.pop(step))
        elif not table.full:
            slot = table.take()
            assert slot.index not in model
            assert slot.generation == generations.get(slot.index, 0) + 1
            generations[slot.index] = slot.generation
            model[slot.index] = slot
        assert table.in_use() == [model[index] for index in sorted(model)]
        assert table.used == len(model)
        assert table.full == (len(model) == count)
        assert table.high == max(generations, default=-1) + 1
        for index, generation in generations.items():
            assert table.find(index, generation) is model.get(index)
            assert table.find(index, generation - 1) is None
