"""Batches: the room of several puts given at once or not at all, and one place in the queue."""

import random

import attrs
import pytest

from core.books import check_books
from core.test_keyed_store import (
    CAPACITY,
    ELASTIC,
    FIXED,
    GRACE,
    SEGMENT,
    UNIT,
    by_nobody,
    pay,
    put,
    put_some,
    recycle,
    store_of,
)
from featcache.core.effects import Effect, Evicted, Grow, Woken
from featcache.core.keyed_store import KeyedStore
from featcache.core.put_queue import Batch, Request, Waiter, WaiterState
from featcache.core.slots import Slot, SlotState
from featcache.errors import FeatureTooLarge, StaleRef


def batch(store: KeyedStore, *units: int, session: int = 0) -> Batch:
    return store.batch([Request(n * UNIT, 1, None) for n in units], session)


def reserve(store: KeyedStore, *units: int) -> list[Slot] | None:
    slot = store.reserve_batch(batch(store, *units), 0.0)
    return None if slot is None else store.apart(slot)


def wait(store: KeyedStore, *units: int, session: int = 0) -> Waiter:
    waiter, _ = store.wait(batch(store, *units, session=session), 0.0, None)
    return waiter


def test_a_batch_is_given_all_of_its_room() -> None:
    store = store_of()
    slots = reserve(store, 1, 2, 3)
    assert slots is not None
    assert [slot.nbytes for slot in slots] == [UNIT, 2 * UNIT, 3 * UNIT]
    assert all(slot.state is SlotState.RESERVED and slot.mates is None for slot in slots)
    for slot in slots:
        assert store.publish(slot, 0.0) == []
        pay(store, slot)
    recycle(store)
    assert store.allocator.used_bytes == store.table.used == 0


def test_what_does_not_fit_as_a_whole_takes_nothing() -> None:
    store = store_of()
    slots = [put(store, None, nbytes=4 * UNIT, readers=1) for _ in range(4)]
    for slot in slots[::2]:
        pay(store, slot)
    recycle(store)
    before = store.allocator.used_bytes, store.table.used
    assert reserve(store, 3, 3, 2) is None, "the holes are two of four units"
    assert (store.allocator.used_bytes, store.table.used) == before
    assert reserve(store, 3, 3, 1, 1) is not None
    check_books(store.allocator)


@pytest.mark.parametrize("units", [(17,), (8, 9), (1,) * 9])
def test_what_can_never_fit_is_refused_at_once(units: tuple[int, ...]) -> None:
    with pytest.raises(FeatureTooLarge) as caught:
        batch(store_of(), *units)
    assert caught.value.member == (0 if units == (17,) else None)


def test_a_batch_has_one_place_and_nobody_overtakes_it() -> None:
    store = store_of()
    slots = [put(store, None, nbytes=4 * UNIT, readers=1) for _ in range(4)]
    first = wait(store, 4, 4)
    second, _ = store.wait(Request(UNIT, 1, None), 0.0, None)
    pay(store, slots[0])
    assert Woken(first) not in recycle(store)
    assert store.reserve(Request(UNIT, 1, None), 0.0) is None
    pay(store, slots[3])
    assert recycle(store)[1:] == [Woken(first)]
    assert second.state is WaiterState.WAITING
    taken = store.apart(store.accept(first))
    assert [slot.nbytes for slot in taken] == [4 * UNIT] * 2
    assert store.free_reserved(taken[0], 0.0) == [Woken(second)]


@pytest.mark.parametrize("how", ["leave", "session ends", "free"])
def test_a_batch_that_is_given_up_gives_all_back(how: str) -> None:
    store = store_of()
    full = put(store, None, nbytes=CAPACITY, readers=1)
    waiter = wait(store, 2, 3, session=5)
    behind, _ = store.wait(Request(CAPACITY, 1, None), 0.0, None)
    if how == "session ends":
        store.end_session(5, 0.0)
        assert store.queue.head is behind
    pay(store, full)
    recycle(store)
    if how == "leave":
        assert store.leave(waiter, 0.0) == [Woken(behind)]
    elif how == "free":
        slot = store.accept(waiter)
        label = slot.index, slot.generation
        assert store.free_reserved(slot, 0.0) == [Woken(behind)]
        with pytest.raises(StaleRef):
            store.find(*label)
    assert behind.state is WaiterState.GRANTED
    assert store.table.used == 1


def test_the_slab_grows_for_all_of_a_batch() -> None:
    store = store_of(ELASTIC)
    put(store, None, nbytes=3 * UNIT, readers=1)
    waiter, effects = store.wait(batch(store, 1, 2, 2, 3), 0.0, None)
    assert effects == [Grow(3 * SEGMENT)]
    assert waiter.by_growth
    assert store.grown(3 * SEGMENT, 0.0) == [Woken(waiter)]


def test_the_coldest_go_for_a_batch_and_no_more_than_it_lacks() -> None:
    store = store_of(attrs.evolve(FIXED, slots=32))
    put_some(store, 16)
    wanted = batch(store, 1, 1, 1)
    gone = [e.key for e in store.evict_for(wanted, by_nobody, 0.0) if isinstance(e, Evicted)]
    assert gone == [b"0", b"1", b"2"]
    recycle(store)
    assert store.reserve_batch(wanted, 0.0) is not None


def test_slots_are_evicted_for_where_they_are_what_lacks() -> None:
    store = store_of()
    put_some(store, 8)
    wanted = batch(store, 1, 1)
    gone = [e.key for e in store.evict_for(wanted, by_nobody, 0.0) if isinstance(e, Evicted)]
    assert gone == [b"0", b"1"]
    recycle(store)
    assert store.reserve_batch(wanted, 0.0) is not None


def test_room_in_pieces_is_made_whole_for_a_member_that_needs_it() -> None:
    store = store_of(attrs.evolve(FIXED, slots=32))
    slots = put_some(store, 16)
    for index in (0, 2, 4, 6):
        store.evict(slots[index].key or b"", 0.0)
    recycle(store, GRACE)
    wanted = batch(store, 1, 3)
    for _ in range(8):
        if store.reserve_batch(wanted, 1.0) is not None:
            break
        assert store.evict_for(wanted, by_nobody, 1.0)
        recycle(store, 1.0)
    else:
        pytest.fail("the room of a batch is never made")
    assert store.allocator.used_bytes >= 14 * UNIT, "more went than it needs"


class Traffic:
    """Puts and batches of all sizes that an empty pool would hold, kept features, and reads."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        kind = self.chance.choice([FIXED, ELASTIC])
        self.store = store_of(attrs.evolve(kind, slots=self.chance.choice([6, 20])))
        self.now_s = 0.0
        self.waiting: list[Waiter] = []
        self.owed: list[Slot] = []
        self.growing = 0
        self.served = 0

    def come(self) -> None:
        chance, count = self.chance, self.chance.choice([0, 0, 2, 3, 5])
        key = b"%d" % chance.randrange(4) if chance.random() < 0.4 else None
        request = Request(chance.randint(1, 9) * UNIT, 0 if key else 1, None, key)
        if count:
            request = batch(self.store, *(chance.randint(1, 16 // count) for _ in range(count)))
        waiter, effects = self.store.wait(request, self.now_s, None, bounded=False)
        self.waiting.append(waiter)
        self.follow(effects)

    def go_on(self) -> None:
        store, now_s = self.store, self.now_s
        if self.owed:
            slot = self.owed.pop(self.chance.randrange(len(self.owed)))
            store.pay(slot.index, slot.generation, 1, None, now_s)
        self.follow(store.recycle(store.due(now_s), now_s))
        if self.growing:
            end_bytes, self.growing = self.growing, 0
            self.follow(store.grown(end_bytes, now_s))
        if store.queue.head is not None:
            store.evict_for(store.queue.head.request, by_nobody, now_s)
            self.follow(store.recycle(store.due(now_s), now_s))
        self.follow(store.serve(now_s))

    def follow(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Grow):
                self.growing = effect.end_bytes
            elif isinstance(effect, Woken):
                self.served += 1
                assert effect.waiter is self.waiting.pop(0), "granted out of turn"
                for slot in self.store.apart(self.store.accept(effect.waiter)):
                    self.store.publish(slot, self.now_s)
                    if slot.reads_left:
                        self.owed.append(slot)
        check_books(self.store.allocator)


@pytest.mark.parametrize("seed", range(40))
def test_everybody_is_served_in_turn_whatever_comes(seed: int) -> None:
    traffic = Traffic(seed)
    for step in range(2000):
        traffic.now_s += 1.0
        if step < 60:
            traffic.come()
        traffic.go_on()
        if step >= 60 and not traffic.waiting:
            break
    assert (traffic.served, traffic.waiting) == (60, [])
