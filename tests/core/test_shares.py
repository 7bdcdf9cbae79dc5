"""Shares in the core: slots over the bytes of another, and what keeps and ends both."""

import attrs
import pytest

from core.test_keyed_store import (
    CAPACITY,
    FIXED,
    GRACE,
    SEGMENT,
    UNIT,
    gone,
    look,
    pay,
    put,
    recycle,
    recycled,
    room_for,
    store_of,
)
from featcache.core.effects import Evicted, Expired, Recycled, SlotRetired
from featcache.core.keyed_store import KeyedStore
from featcache.core.slots import Slot, SlotState
from featcache.errors import PoolFull, StaleRef


def share(
    store: KeyedStore,
    key: bytes = b"a",
    readers: int | set[str] = 1,
    ttl_s: float | None = None,
    now_s: float = 0.0,
) -> Slot:
    owed = readers if isinstance(readers, int) else frozenset(readers)
    return store.share(look(store, key, now_s), owed, ttl_s, now_s)


def went(slot: Slot, generation: int | None = None) -> Recycled:
    """What is said when a share is recycled: no byte is free by it."""
    return Recycled(slot.index, generation or slot.generation, 0)


def test_a_share_has_a_name_of_its_own_and_the_bytes_of_another() -> None:
    store = store_of()
    base = put(store, nbytes=3 * UNIT)
    first, second = share(store), share(store, readers={"x", "y"})
    for slot in (first, second):
        assert slot.state is SlotState.PUBLISHED
        assert (slot.offset_bytes, slot.nbytes) == (base.offset_bytes, base.nbytes)
        assert store.find(slot.index, slot.generation) is slot
    assert len({base.index, first.index, second.index}) == 3
    assert (base.grants, store.allocator.used_bytes, store.table.used) == (2, 3 * UNIT, 3)
    assert (first.owed_by, second.owed_by) == (1, ("x", "y"))
    assert (store.puts, store.hits) == (1, 2)


def test_what_is_shared_is_not_evicted_until_its_last_share_is_recycled() -> None:
    store = store_of()
    base = put(store, nbytes=CAPACITY)
    slots = [share(store) for _ in range(2)]
    for slot in slots:
        assert room_for(store) == []
        assert pay(store, slot) == [SlotRetired(slot)]
        assert room_for(store) == [], "a session may still hold the share"
        assert recycle(store) == [went(slot)]
    assert room_for(store) == gone(base, b"a")
    assert recycle(store) == [recycled(base)]


def test_the_bytes_of_a_dropped_key_are_free_with_the_last_share() -> None:
    store = store_of()
    base = put(store)
    slot = share(store)
    assert store.evict(b"a", 0.0) == [Evicted(b"a", base.nbytes, 0.0, "asked")]
    assert pay(store, slot) == [SlotRetired(slot)]
    assert recycle(store) == [went(slot), SlotRetired(base)]
    assert store.allocator.used_bytes == base.nbytes
    assert recycle(store) == [recycled(base)]
    assert (store.allocator.used_bytes, store.table.used, store.recycled) == (0, 0, 1)


def test_a_slot_that_was_a_share_can_be_any_other() -> None:
    store = store_of(attrs.evolve(FIXED, slots=2))
    put(store)
    slot = share(store)
    generation = slot.generation
    pay(store, slot)
    assert recycle(store) == [went(slot, generation)]
    other = put(store, b"b", nbytes=2 * UNIT)
    assert other is slot
    assert (other.of, other.generation) == (None, generation + 1)
    assert store.evict(b"b", 0.0)
    assert recycle(store, GRACE) == [recycled(other)]


def test_a_full_table_has_no_share() -> None:
    store = store_of(attrs.evolve(FIXED, slots=1))
    base = put(store)
    with pytest.raises(PoolFull, match="slots"):
        share(store)
    assert base.grants == 1, "the grant is the caller's"


def test_a_share_expires_by_a_ttl_of_its_own() -> None:
    store = store_of()
    base = put(store, readers=1, ttl_s=9.0)
    early, late = share(store, ttl_s=1.0), share(store, ttl_s=9.0)
    expected = [Expired(early.label, early.nbytes, 2.0, 1), SlotRetired(early)]
    assert store.expire(2.0) == expected
    with pytest.raises(StaleRef, match="expired"):
        store.find(early.index, early.generation)
    assert recycle(store, 2.0) == [], "not before its grace has passed"
    assert recycle(store, 2.0 + GRACE) == [went(early)]
    assert list(store.owing.values()) == [base, late]


def test_a_discarded_share_takes_nothing_from_the_others() -> None:
    store = store_of()
    base = put(store, readers=2)
    first, second = share(store), share(store)
    assert store.revoke(first.index, first.generation, 0.0) == [SlotRetired(first)]
    assert (base.reads_left, second.reads_left, base.grants) == (2, 1, 2)
    assert recycle(store, GRACE) == [went(first)]
    assert store.find(second.index, second.generation) is second
    assert look(store) is base


def test_a_discarded_base_leaves_its_shares() -> None:
    store = store_of()
    base = put(store, readers=2)
    slot = share(store)
    store.evict(b"a", 0.0)
    assert store.revoke(base.index, base.generation, 0.0) == []
    assert store.find(slot.index, slot.generation) is slot
    pay(store, slot)
    assert recycle(store) == [went(slot), SlotRetired(base)]


def test_the_reads_of_a_dead_name_are_paid_for_each_share() -> None:
    store = store_of()
    put(store)
    slots = [share(store, readers={"dead"}) for _ in range(2)]
    kept = share(store, readers={"dead", "alive"})
    assert store.waive_reads("dead", 0.0) == (3, [SlotRetired(slot) for slot in slots])
    assert kept.owed_by == ("alive",)
    with pytest.raises(StaleRef, match="readers that owed it died"):
        store.find(slots[0].index, slots[0].generation)


def test_a_share_that_is_going_has_no_bytes_to_give() -> None:
    store = store_of(attrs.evolve(FIXED, evict_above=0.5, evict_to=0.25))
    put(store, nbytes=4 * UNIT)
    put(store, b"b", nbytes=6 * UNIT)
    pay(store, share(store))
    assert store.retiring_bytes == 0
    assert [type(effect) for effect in store.trim(lambda _: False, 0.0)] == [Evicted, SlotRetired]
    assert b"b" not in store.directory


def test_a_shared_feature_is_not_compacted_away() -> None:
    limits = attrs.evolve(FIXED, initial_bytes=SEGMENT, compact=1.0, idle_s=1.0)
    store = store_of(limits)
    store.grown(2 * SEGMENT, 0.0)
    first = put(store, b"a", nbytes=SEGMENT)
    tail = put(store, b"b")
    assert tail.offset_bytes >= SEGMENT
    slot = share(store, b"b")
    store.evict(b"a", 0.0)
    assert recycle(store, GRACE) == [recycled(first)]
    for now_s in (1.0, 3.0):
        assert store.shrink(now_s) is None
    assert store.size.tail_in_use
    assert store.compact(lambda _: False, 3.0) == []
    pay(store, slot)
    recycle(store, 3.0)
    store.size.tail_in_use = True
    assert store.compact(lambda _: False, 3.0) == [
        Evicted(b"b", tail.nbytes, 3.0, "compaction"),
        SlotRetired(tail),
    ]
