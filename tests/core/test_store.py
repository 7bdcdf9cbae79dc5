"""The store's rules one by one; test_store_machine.py has them all at once."""

import itertools

import attrs
import pytest

from featcache.core.allocator import ALIGNMENT_BYTES
from featcache.core.effects import Effect, Expired, Grow, Limits, Recycled, SlotRetired, Woken
from featcache.core.put_queue import Request, Waiter, WaiterState
from featcache.core.slots import Slot, SlotState
from featcache.core.store import Store
from featcache.errors import FeatureTooLarge, PoolFull, StaleRef

UNIT = ALIGNMENT_BYTES
SEGMENT = 4 * UNIT
CAPACITY = 16 * UNIT
FIXED = Limits(
    capacity_bytes=CAPACITY,
    segment_bytes=SEGMENT,
    initial_bytes=CAPACITY,
    slots=8,
    waiters=4,
    grace_s=0.5,
    idle_s=10.0,
    grow_retry_s=2.0,
)
ELASTIC = attrs.evolve(FIXED, initial_bytes=SEGMENT)


def store_of(limits: Limits = FIXED) -> Store:
    store = Store(limits)
    store.allocator.grow(limits.initial_bytes)
    return store


def request(nbytes: int = UNIT, readers: int | set[str] = 1, ttl_s: float | None = None) -> Request:
    return Request(nbytes, readers if isinstance(readers, int) else frozenset(readers), ttl_s)


def reserve(store: Store, asked: Request | None = None, now_s: float = 0.0) -> Slot:
    slot = store.reserve(asked or request(), now_s)
    assert slot is not None
    return slot


def publish(store: Store, asked: Request | None = None, now_s: float = 0.0) -> Slot:
    slot = reserve(store, asked, now_s)
    assert store.publish(slot, now_s) == []
    return slot


def pay(store: Store, slot: Slot, session: int = 1, name: str | None = None) -> list[Effect]:
    return store.pay(slot.index, slot.generation, session, name, 0.0)


def free(store: Store, slot: Slot, now_s: float = 0.0) -> list[Effect]:
    """Let a published slot go, as a reader and the recycler do; return what that led to."""
    effects = store.revoke(slot.index, slot.generation, now_s)
    assert effects == [SlotRetired(slot)]
    recycled = Recycled(slot.index, slot.generation, slot.nbytes)
    first, *others = store.recycle([slot], now_s)
    assert first == recycled
    return others


def wait(store: Store, asked: Request | None = None, now_s: float = 0.0) -> Waiter:
    """Stand in the queue of a store that is full."""
    waiter, effects = store.wait(asked or request(), now_s, None)
    assert effects == []
    assert waiter.state is WaiterState.WAITING
    return waiter


# --- room ---------------------------------------------------------------------------------------


def test_a_reserved_slot_is_of_the_size_that_was_asked_for() -> None:
    slot = reserve(store_of(), request(300, 2, 5.0), 1.0)
    assert slot.state is SlotState.RESERVED
    assert slot.extent is not None
    assert (slot.nbytes, slot.extent.size_bytes) == (300, 2 * UNIT)
    assert (slot.reads_left, slot.ttl_s) == (2, 5.0)


def test_what_is_used_and_what_is_free_make_the_capacity() -> None:
    store = store_of(ELASTIC)
    assert (store.committed_bytes, store.free_bytes) == (SEGMENT, CAPACITY)
    reserve(store, request(UNIT + 1))
    assert store.allocator.used_bytes == 2 * UNIT
    assert store.free_bytes == CAPACITY - 2 * UNIT


def test_the_largest_free_piece_counts_what_the_slab_may_grow_by() -> None:
    store = store_of(ELASTIC)
    first = reserve(store)
    assert store.largest_free_bytes == CAPACITY - UNIT
    reserve(store, request(3 * UNIT))
    assert store.largest_free_bytes == CAPACITY - SEGMENT
    store.grown(CAPACITY, 0.0)
    reserve(store, request(CAPACITY - SEGMENT))
    store.free_reserved(first, 0.0)
    assert store.largest_free_bytes == UNIT


def test_slots_are_reused_the_last_freed_first_with_new_generations() -> None:
    store = store_of()
    slots = [reserve(store, request(100)) for _ in range(4)]
    assert [(slot.index, slot.generation) for slot in slots] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert [slot.offset_bytes for slot in slots] == [0, UNIT, 2 * UNIT, 3 * UNIT]
    for index in (2, 0, 3):
        store.free_reserved(slots[index], 0.0)
        assert (slots[index].state, slots[index].extent) == (SlotState.FREE, None)
    again = [reserve(store) for _ in range(3)]
    assert [slot.label for slot in again] == ["3:2", "0:2", "2:2"]
    assert store.table.high == 4  # words beyond it were never written


@pytest.mark.parametrize("state", list(SlotState))
def test_the_table_finds_a_slot_in_every_state_but_free(state: SlotState) -> None:
    table = store_of().table
    slot = table.allocate()
    if state is SlotState.FREE:
        table.free(slot)
    slot.state = state
    assert table.find(0, 1) is (None if state is SlotState.FREE else slot)


def test_a_full_slab_reserves_nothing() -> None:
    store = store_of()
    reserve(store, request(CAPACITY))
    assert store.reserve(request(0), 0.0) is None


def test_a_full_slot_table_reserves_nothing_however_much_is_free() -> None:
    store = store_of()
    for _ in range(FIXED.slots):
        reserve(store)
    assert store.reserve(request(), 0.0) is None
    assert store.free_bytes == CAPACITY - FIXED.slots * UNIT


@pytest.mark.parametrize("nbytes", [0, 1, CAPACITY - 1, CAPACITY])
def test_what_an_empty_pool_holds_is_not_too_large(nbytes: int) -> None:
    store = store_of()
    store.check_size(nbytes)
    _, effects = store.wait(request(nbytes), 0.0, None)
    assert [type(effect) for effect in effects] == [Woken]


@pytest.mark.parametrize("nbytes", [CAPACITY + 1, 2 * CAPACITY])
@pytest.mark.parametrize("limits", [FIXED, ELASTIC])
def test_what_no_empty_pool_holds_is_too_large_and_never_waits(nbytes: int, limits: Limits) -> None:
    store = store_of(limits)
    with pytest.raises(FeatureTooLarge, match=f"{nbytes} bytes never fits a pool of {CAPACITY}"):
        store.check_size(nbytes)
    with pytest.raises(FeatureTooLarge):
        store.wait(request(nbytes), 0.0, None)
    assert not store.queue
    assert store.waited == 0


def test_what_fits_only_before_it_is_aligned_is_too_large() -> None:
    store = store_of(attrs.evolve(FIXED, capacity_bytes=CAPACITY + UNIT // 2))
    with pytest.raises(FeatureTooLarge):
        store.check_size(CAPACITY + 1)


# --- waiting ------------------------------------------------------------------------------------


def full_store(limits: Limits = FIXED) -> tuple[Store, list[Slot]]:
    """Every unit of the capacity taken by a published slot of a quarter of it."""
    store = store_of(attrs.evolve(limits, initial_bytes=CAPACITY))
    return store, [publish(store, request(CAPACITY // 4)) for _ in range(4)]


def test_who_waits_beside_room_is_granted_at_once() -> None:
    store = store_of()
    waiter, effects = store.wait(request(), 0.0, "tag")
    assert effects == [Woken(waiter)]
    assert waiter.tag == "tag"
    slot = store.accept(waiter)
    assert slot.state is SlotState.RESERVED
    assert store.publish(slot, 0.0) == []


def test_a_waiter_keeps_what_it_came_with_and_accepts_only_once_granted() -> None:
    store, slots = full_store()
    asked = request(7, {"tp0"}, 2.0)
    waiter = wait(store, asked, 3.5)
    assert (waiter.request, waiter.slot) == (asked, None)
    with pytest.raises(ValueError, match="is waiting, not granted"):
        store.accept(waiter)
    assert store.queue.head is waiter
    free(store, slots[0])
    assert store.accept(waiter) is waiter.slot
    with pytest.raises(ValueError, match="is accepted, not granted"):
        store.accept(waiter)


def test_room_goes_to_who_came_first() -> None:
    store, slots = full_store()
    first, second = (wait(store, request(CAPACITY // 4)) for _ in range(2))
    assert free(store, slots[0]) == [Woken(first)]
    assert free(store, slots[1]) == [Woken(second)]


def test_nobody_overtakes_a_large_request_at_the_head() -> None:
    store, slots = full_store()
    large, small = wait(store, request(CAPACITY // 2)), wait(store)
    assert free(store, slots[0]) == []
    assert store.reserve(request(), 0.0) is None
    assert free(store, slots[1]) == [Woken(large)]
    assert small.state is WaiterState.WAITING
    assert free(store, slots[2]) == [Woken(small)]


def test_reserve_does_not_overtake_who_waits() -> None:
    store = store_of(attrs.evolve(FIXED, slots=2))
    slots = [publish(store) for _ in range(2)]
    wait(store, request(CAPACITY))
    free(store, slots[0])
    assert store.reserve(request(), 0.0) is None


def test_one_piece_of_room_serves_as_many_as_it_holds() -> None:
    store, slots = full_store()
    waiters = [wait(store, request(2 * UNIT)) for _ in range(3)]
    assert free(store, slots[0]) == [Woken(waiter) for waiter in waiters[:2]]
    assert list(store.queue._queue.values()) == waiters[2:]


def test_a_slot_that_comes_free_serves_who_waits_for_one() -> None:
    store = store_of(attrs.evolve(FIXED, slots=1))
    slot = publish(store)
    waiter = wait(store)
    assert free(store, slot) == [Woken(waiter)]


def test_the_queue_is_bounded() -> None:
    store, _ = full_store()
    waiters = [wait(store) for _ in range(FIXED.waiters)]
    with pytest.raises(PoolFull, match="4 puts wait already, the bound"):
        store.wait(request(), 0.0, None)
    assert (len(store.queue), store.waited) == (FIXED.waiters, FIXED.waiters)
    store.leave(waiters[0], 0.0)
    wait(store)


def test_a_bound_of_nought_lets_nobody_wait() -> None:
    with pytest.raises(PoolFull):
        store_of(attrs.evolve(FIXED, waiters=0)).wait(request(), 0.0, None)


def test_waiting_bytes_are_what_the_queue_asks_for() -> None:
    store, slots = full_store()
    first = wait(store, request(100))
    wait(store, request(1000))
    assert store.queue.waiting_bytes == 1100
    store.leave(first, 0.0)
    assert store.queue.waiting_bytes == 1000
    free(store, slots[0])
    assert store.queue.waiting_bytes == 0


def test_a_waiter_that_leaves_the_head_lets_the_next_one_in() -> None:
    """It may have been the only one that did not fit: nothing else would wake the others."""
    store, slots = full_store()
    large, small, last = wait(store, request(CAPACITY)), wait(store), wait(store)
    free(store, slots[0])
    assert store.leave(large, 0.0) == [Woken(small), Woken(last)]


def test_a_waiter_that_leaves_from_behind_changes_nothing() -> None:
    store, slots = full_store()
    first, second = (wait(store, request(CAPACITY // 4)) for _ in range(2))
    assert store.leave(second, 0.0) == []
    assert free(store, slots[0]) == [Woken(first)]


def test_a_granted_waiter_that_leaves_gives_its_room_to_the_next() -> None:
    store, slots = full_store()
    first, second = (wait(store, request(CAPACITY // 4)) for _ in range(2))
    free(store, slots[0])
    assert store.leave(first, 0.0) == [Woken(second)]
    assert store.accept(second).state is SlotState.RESERVED
    with pytest.raises(ValueError, match="gone, not granted"):
        store.accept(first)


def test_a_granted_waiter_that_leaves_gives_its_room_back() -> None:
    store = store_of()
    waiter, _ = store.wait(request(CAPACITY), 0.0, None)
    for _ in range(2):  # the second time there is nothing left to give
        assert store.leave(waiter, 0.0) == []
        assert waiter.state is WaiterState.GONE
        assert store.allocator.used_bytes == store.table.used == 0


def test_leaving_after_the_slot_was_accepted_does_not_take_it_away() -> None:
    store = store_of()
    waiter, _ = store.wait(request(), 0.0, None)
    slot = store.accept(waiter)
    assert store.leave(waiter, 0.0) == []
    assert waiter.state is WaiterState.ACCEPTED
    assert store.publish(slot, 0.0) == []
    assert store.find(slot.index, slot.generation) is slot


def test_an_abandoned_slot_goes_to_who_waits() -> None:
    store = store_of()
    slot = reserve(store, request(CAPACITY))
    waiter = wait(store)
    assert store.free_reserved(slot, 0.0) == [Woken(waiter)]
    assert store.puts == 0


@pytest.mark.parametrize("retired", [False, True])
def test_only_a_reserved_slot_is_published_or_abandoned(retired: bool) -> None:
    store = store_of()
    slot = publish(store)
    if retired:
        pay(store, slot)
    for call in (store.publish, store.free_reserved):
        with pytest.raises(ValueError, match=f"slot 0:1 is {slot.state.name}, not RESERVED"):
            call(slot, 0.0)
    assert store.puts == 1


# --- reads --------------------------------------------------------------------------------------


def test_a_ref_is_found_from_publish_to_the_last_payment() -> None:
    store = store_of()
    slot = reserve(store)
    with pytest.raises(StaleRef):
        store.find(slot.index, slot.generation)
    store.publish(slot, 0.0)
    assert store.find(slot.index, slot.generation) is slot
    pay(store, slot)
    with pytest.raises(StaleRef, match="ref 0:1 was recycled, as every read that it owed was paid"):
        store.find(slot.index, slot.generation)


@pytest.mark.parametrize(("index", "generation"), [(0, 0), (0, 2), (1, 1), (-1, 1), (8, 1)])
def test_a_ref_that_never_was_is_stale(index: int, generation: int) -> None:
    store = store_of()
    publish(store)
    with pytest.raises(StaleRef):
        store.find(index, generation)
    with pytest.raises(StaleRef):
        store.revoke(index, generation, 0.0)
    assert store.pay(index, generation, 1, None, 0.0) == []
    assert store.find(0, 1).reads_left == 1


def test_the_last_read_paid_retires_the_slot_with_no_grace() -> None:
    store = store_of()
    slot = publish(store, request(readers=3), 1.0)
    effects = [store.pay(slot.index, slot.generation, by, None, 2.0) for by in (5, 6, 7)]
    assert effects == [[], [], [SlotRetired(slot)]]
    assert (slot.retired_s, slot.due_s) == (2.0, 2.0)
    assert store.due(2.0) == [slot]


def test_a_session_pays_a_ref_once() -> None:
    store = store_of()
    slot = publish(store, request(readers=2))
    for _ in range(3):
        assert pay(store, slot, 1, "tp0") == []
    assert slot.reads_left == 1
    assert pay(store, slot, 2, "tp0") == [SlotRetired(slot)]


def test_a_session_pays_each_ref_of_its_own() -> None:
    store = store_of()
    slots = [publish(store) for _ in range(2)]
    assert [pay(store, slot, 1) for slot in slots] == [[SlotRetired(slot)] for slot in slots]


def test_payments_after_the_last_are_ignored() -> None:
    store = store_of()
    slot = publish(store)
    pay(store, slot, 1)
    assert pay(store, slot, 2) == []
    assert slot.reads_left == 0


def test_named_reads_are_paid_by_their_names_only() -> None:
    store = store_of()
    slot = publish(store, request(readers={"tp0", "tp1"}))
    assert pay(store, slot, 1, "tp2") == []
    assert pay(store, slot, 2, None) == []
    assert slot.reads_left == 2
    assert pay(store, slot, 3, "tp0") == []
    assert slot.owed_by == ("tp1",)
    assert pay(store, slot, 4, "tp1") == [SlotRetired(slot)]


def test_a_name_pays_once_whichever_session_bears_it() -> None:
    store = store_of()
    slot = publish(store, request(readers={"tp0", "tp1"}))
    assert pay(store, slot, 1, "tp0") == []
    assert pay(store, slot, 1, "tp0") == []
    assert pay(store, slot, 2, "tp0") == []
    assert slot.reads_left == 1


def test_a_reserved_slot_can_not_be_paid() -> None:
    store = store_of()
    slot = reserve(store)
    assert pay(store, slot) == []
    assert slot.reads_left == 1
    assert store.publish(slot, 0.0) == []


def test_a_late_payment_does_not_land_in_the_next_tenants_slot() -> None:
    store = store_of(attrs.evolve(FIXED, slots=1))
    old = publish(store)
    index, generation = old.index, old.generation
    free(store, old)
    new = publish(store)
    assert new.index == index
    assert store.pay(index, generation, 1, None, 0.0) == []
    with pytest.raises(StaleRef):
        store.find(index, generation)
    with pytest.raises(StaleRef):
        store.revoke(index, generation, 0.0)
    assert new.reads_left == 1
    assert store.find(index, new.generation) is new


def test_who_paid_the_last_tenant_owes_the_next() -> None:
    store = store_of(attrs.evolve(FIXED, slots=1))
    slot = publish(store)
    pay(store, slot, 1)
    store.recycle([slot], 0.0)
    assert publish(store) is slot
    assert pay(store, slot, 1) == [SlotRetired(slot)]


def test_a_slot_forgets_the_names_of_its_last_tenant() -> None:
    store = store_of(attrs.evolve(FIXED, slots=1))
    free(store, publish(store, request(readers={"tp0", "tp1"})))
    slot = publish(store, request(readers=2))
    assert slot.owed_by == 2
    assert pay(store, slot, 1, None) == []
    assert slot.reads_left == 1


# --- the dead -----------------------------------------------------------------------------------


def test_a_dead_name_is_forgiven_what_it_owes_everywhere() -> None:
    store = store_of()
    last = publish(store, request(readers={"tp0"}))
    shared = publish(store, request(readers={"tp0", "tp1"}))
    others = publish(store, request(readers={"tp1"}))
    anonymous = publish(store)
    assert store.waive_reads("tp0", 3.0) == (2, [SlotRetired(last)])
    assert last.due_s == 3.0
    assert shared.owed_by == others.owed_by == ("tp1",)
    assert anonymous.reads_left == 1
    assert store.waive_reads("tp0", 3.0) == (0, [])


def test_what_a_name_paid_is_not_forgiven_again() -> None:
    store = store_of()
    slot = publish(store, request(readers={"tp0", "tp1"}))
    pay(store, slot, 1, "tp0")
    assert store.waive_reads("tp0", 0.0) == (0, [])
    assert slot.reads_left == 1


def test_what_was_revoked_is_not_forgiven() -> None:
    store = store_of()
    slot = publish(store, request(readers={"tp0"}))
    store.revoke(slot.index, slot.generation, 0.0)
    assert store.waive_reads("tp0", 0.0) == (0, [])


def test_forgiven_while_the_bytes_are_copied_it_retires_as_it_is_published() -> None:
    store = store_of()
    slot = reserve(store, request(readers={"tp0"}, ttl_s=1.0))
    assert store.waive_reads("tp0", 0.0) == (1, [])
    assert slot.state is SlotState.RESERVED
    assert store.publish(slot, 2.0) == [SlotRetired(slot)]
    assert (store.puts, store.owing, store.due(2.0)) == (1, {}, [slot])
    assert store.expire(100.0) == []


def test_partly_forgiven_while_the_bytes_are_copied_it_owes_the_rest() -> None:
    store = store_of()
    slot = reserve(store, request(readers={"tp0", "tp1"}))
    assert store.waive_reads("tp0", 0.0) == (1, [])
    assert store.publish(slot, 0.0) == []
    assert pay(store, slot, 1, "tp1") == [SlotRetired(slot)]


# --- revocation ---------------------------------------------------------------------------------


def test_a_discarded_ref_is_stale_at_once_and_due_after_the_grace() -> None:
    store = store_of()
    slot = publish(store, request(readers=3))
    assert store.revoke(slot.index, slot.generation, 1.0) == [SlotRetired(slot)]
    with pytest.raises(StaleRef):
        store.find(slot.index, slot.generation)
    assert store.due(1.25) == []
    assert store.due(1.0 + FIXED.grace_s) == [slot]
    assert store.expired == 0


def test_a_ref_is_discarded_once() -> None:
    store = store_of()
    slot = publish(store)
    store.revoke(slot.index, slot.generation, 0.0)
    with pytest.raises(StaleRef):
        store.revoke(slot.index, slot.generation, 5.0)
    assert slot.due_s == FIXED.grace_s


def test_a_reserved_slot_can_not_be_discarded() -> None:
    store = store_of()
    slot = reserve(store)
    with pytest.raises(StaleRef):
        store.revoke(slot.index, slot.generation, 0.0)


def test_a_payment_after_the_revocation_does_not_shorten_the_grace() -> None:
    store = store_of()
    slot = publish(store)
    store.revoke(slot.index, slot.generation, 0.0)
    assert pay(store, slot) == []
    assert store.due(0.0) == []


def test_a_ref_expires_when_its_ttl_has_passed_since_it_was_published() -> None:
    store = store_of()
    slot = reserve(store, request(300, 2, ttl_s=4.0), 0.0)
    store.publish(slot, 10.0)
    pay(store, slot)
    assert store.expire(13.75) == []
    assert store.expire(14.0) == [Expired("0:1", 300, 4.0, 1), SlotRetired(slot)]
    assert store.due(14.0) == []
    assert store.due(14.0 + FIXED.grace_s) == [slot]
    assert store.expired == 1
    assert store.expire(15.0) == []


def test_expiry_says_which_names_still_owe() -> None:
    store = store_of()
    slot = publish(store, request(readers={"tp0", "tp1", "tp2"}, ttl_s=1.0))
    pay(store, slot, 1, "tp1")
    assert store.expire(1.5)[0] == Expired("0:1", UNIT, 1.5, ("tp0", "tp2"))


def test_a_ref_with_no_ttl_never_expires() -> None:
    store = store_of()
    slot = publish(store, request(ttl_s=None))
    assert store.expire(float("inf")) == []
    assert store.find(slot.index, slot.generation) is slot


def test_a_reserved_slot_does_not_expire() -> None:
    store = store_of()
    reserve(store, request(ttl_s=1.0))
    assert store.expire(100.0) == []


def test_refs_expire_by_their_own_ttl_not_by_their_order() -> None:
    store = store_of()
    slots = [publish(store, request(ttl_s=ttl_s)) for ttl_s in (9.0, 1.0, 5.0, 1.0)]
    expired = [store.expire(now_s)[1::2] for now_s in (1.0, 5.0, 9.0)]
    assert expired == [
        [SlotRetired(slots[1]), SlotRetired(slots[3])],
        [SlotRetired(slots[2])],
        [SlotRetired(slots[0])],
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_what_was_paid_or_discarded_does_not_expire(order: tuple[int, ...]) -> None:
    store = store_of()
    slots = [publish(store, request(ttl_s=1.0)) for _ in range(3)]
    pay(store, slots[order[0]])
    store.revoke(slots[order[1]].index, slots[order[1]].generation, 0.0)
    assert store.expire(1.0)[1:] == [SlotRetired(slots[order[2]])]
    assert store.expired == 1
    assert store._aging == {}


def test_published_slots_are_known_the_oldest_first() -> None:
    store = store_of()
    slots = [reserve(store) for _ in range(3)]
    for at, index in enumerate((2, 0, 1)):
        store.publish(slots[index], float(at))
    assert list(store.owing.values()) == [slots[2], slots[0], slots[1]]
    pay(store, slots[2])
    assert list(store.owing.values()) == [slots[0], slots[1]]


# --- recycling ----------------------------------------------------------------------------------


def test_the_bytes_of_a_retired_slot_are_free_only_once_it_is_recycled() -> None:
    store = store_of(attrs.evolve(FIXED, slots=1))
    slot = publish(store, request(300))
    pay(store, slot)
    assert store.reserve(request(), 0.0) is None
    assert store.allocator.used_bytes == 2 * UNIT
    assert store.recycle([slot], 0.0) == [Recycled(0, 1, 300)]
    assert store.allocator.used_bytes == store.table.used == 0
    assert store.recycled == 1
    assert reserve(store).generation == 2


def test_a_slot_that_is_held_stays_due() -> None:
    store = store_of()
    held, other = publish(store), publish(store)
    for slot in (held, other):
        pay(store, slot)
    store.recycle([other], 0.0)
    assert store.due(0.0) == [held]
    assert store.allocator.used_bytes == UNIT


@pytest.mark.parametrize("state", [SlotState.RESERVED, SlotState.PUBLISHED])
def test_what_is_not_retired_is_not_recycled(state: SlotState) -> None:
    store = store_of()
    slot = reserve(store) if state is SlotState.RESERVED else publish(store)
    with pytest.raises(ValueError, match=f"slot 0:1 is {state.name}, not RETIRING"):
        store.recycle([slot], 0.0)
    assert store.allocator.used_bytes == UNIT


def test_a_slot_is_recycled_once() -> None:
    store = store_of()
    slot = publish(store)
    free(store, slot)
    with pytest.raises(ValueError, match="is FREE, not RETIRING"):
        store.recycle([slot], 0.0)
    assert store.recycled == 1


def test_several_recycled_at_once_join_before_the_queue_is_served() -> None:
    store, slots = full_store()
    waiter = wait(store, request(CAPACITY))
    for slot in slots:
        pay(store, slot)
    *recycled, woken = store.recycle(store.due(0.0), 0.0)
    assert recycled == [Recycled(index, 1, CAPACITY // 4) for index in range(4)]
    assert woken == Woken(waiter)


# --- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "end_bytes"),
    [
        (SEGMENT + 1, 2 * SEGMENT),
        (2 * SEGMENT, 2 * SEGMENT),
        (2 * SEGMENT + 1, 3 * SEGMENT),
        (CAPACITY, CAPACITY),
    ],
)
def test_the_slab_grows_by_whole_segments_for_who_waits(nbytes: int, end_bytes: int) -> None:
    store = store_of(ELASTIC)
    waiter, effects = store.wait(request(nbytes), 0.0, None)
    assert effects == [Grow(end_bytes)]
    assert store.committed_bytes == SEGMENT
    assert store.grown(end_bytes, 0.0) == [Woken(waiter)]
    assert store.committed_bytes == end_bytes


def test_growth_counts_what_is_free_at_the_end() -> None:
    store = store_of(ELASTIC)
    reserve(store)
    assert store.size.growth_for(SEGMENT, 0.0) == 2 * SEGMENT
    assert store.size.growth_for(2 * SEGMENT - UNIT, 0.0) == 2 * SEGMENT
    assert store.size.growth_for(2 * SEGMENT, 0.0) == 3 * SEGMENT


def test_growth_ends_at_the_capacity_though_that_is_half_a_segment() -> None:
    store = store_of(attrs.evolve(ELASTIC, capacity_bytes=SEGMENT + 2 * UNIT))
    assert store.size.growth_for(SEGMENT + UNIT, 0.0) == SEGMENT + 2 * UNIT


def test_no_growth_helps_what_would_not_fit_at_full_size() -> None:
    store = store_of(ELASTIC)
    slot = publish(store)
    waiter = wait(store, request(CAPACITY))
    assert store.size.growth_for(CAPACITY, 0.0) == 0
    assert free(store, slot) == [Grow(CAPACITY)]
    assert store.grown(CAPACITY, 0.0) == [Woken(waiter)]


def test_no_growth_is_for_what_fits_already() -> None:
    assert store_of(ELASTIC).size.growth_for(SEGMENT, 0.0) == 0


def test_a_put_that_waits_for_the_slab_to_grow_is_no_crowd() -> None:
    store = store_of(ELASTIC)
    store.wait(request(CAPACITY), 0.0, None)
    assert (len(store.queue), store.blocked_puts) == (1, 0)
    store.size.grow_failed(0.0)
    assert store.blocked_puts == 1


def test_even_nothing_needs_a_place_to_grow_for() -> None:
    store = store_of(ELASTIC)
    reserve(store, request(SEGMENT))
    assert store.size.growth_for(0, 0.0) == 2 * SEGMENT


def test_the_slab_does_not_grow_while_slots_are_what_is_missing() -> None:
    store = store_of(attrs.evolve(ELASTIC, slots=1))
    slot = publish(store)
    wait(store, request(CAPACITY - SEGMENT))
    assert free(store, slot) == [Grow(CAPACITY - SEGMENT)]


def test_one_growth_is_out_at_a_time() -> None:
    store = store_of(ELASTIC)
    first, effects = store.wait(request(SEGMENT + 1), 0.0, None)
    assert effects == [Grow(2 * SEGMENT)]
    second = wait(store, request(SEGMENT))
    assert store.serve(0.0) == []
    assert store.size.growth_for(CAPACITY, 0.0) == 0
    assert store.grown(2 * SEGMENT, 0.0) == [Woken(first), Grow(3 * SEGMENT)]
    assert store.grown(3 * SEGMENT, 0.0) == [Woken(second)]


def test_a_growth_whose_waiter_left_serves_the_next() -> None:
    store = store_of(ELASTIC)
    reserve(store, request(SEGMENT))
    first, _ = store.wait(request(CAPACITY - SEGMENT), 0.0, None)
    second = wait(store)
    assert store.leave(first, 0.0) == []
    assert store.grown(CAPACITY, 0.0) == [Woken(second)]


def test_a_failed_growth_is_tried_again_only_after_a_while() -> None:
    store = store_of(ELASTIC)
    waiter, _ = store.wait(request(2 * SEGMENT), 0.0, None)
    store.size.grow_failed(10.0)
    assert store.committed_bytes == SEGMENT
    assert waiter.state is WaiterState.WAITING
    assert store.serve(11.75) == []
    assert store.size.growth_for(2 * SEGMENT, 11.75) == 0
    assert store.serve(12.0) == [Grow(2 * SEGMENT)]


def test_a_failed_growth_does_not_stop_who_fits_otherwise() -> None:
    store = store_of(ELASTIC)
    slot = publish(store)
    waiter, _ = store.wait(request(SEGMENT), 0.0, None)
    store.size.grow_failed(0.0)
    assert free(store, slot) == [Woken(waiter)]


def grown_store(limits: Limits = ELASTIC) -> Store:
    store = store_of(limits)
    store.grown(CAPACITY, 0.0)
    return store


def test_an_empty_tail_is_cut_off_when_it_was_empty_for_long_enough() -> None:
    store = grown_store()
    publish(store, request(SEGMENT + 1))
    assert store.shrink(0.0) is None
    assert store.shrink(9.75) is None
    assert store.shrink(10.0) == 2 * SEGMENT
    assert store.committed_bytes == 2 * SEGMENT
    assert store.shrunk(10.0) == []


def test_the_bytes_committed_at_the_start_are_never_given_back() -> None:
    store = grown_store(attrs.evolve(ELASTIC, initial_bytes=2 * SEGMENT))
    store.shrink(0.0)
    assert store.shrink(10.0) == 2 * SEGMENT
    store.shrunk(10.0)
    assert [store.shrink(now_s) for now_s in (20.0, 30.0, 40.0, 50.0)] == [None] * 4


def test_the_window_keeps_the_highest_end_that_was_in_use() -> None:
    store = grown_store()
    store.shrink(0.0)
    slot = publish(store, request(2 * SEGMENT + 1))
    assert store.shrink(4.0) is None
    free(store, slot)
    assert store.shrink(10.0) == 3 * SEGMENT
    store.shrunk(10.0)
    assert store.shrink(10.0) is None  # a new window, that knows nothing of the slot
    assert store.shrink(20.0) == SEGMENT


def test_a_window_in_which_all_was_in_use_is_followed_by_a_new_one() -> None:
    store = grown_store()
    slot = publish(store, request(CAPACITY))
    store.shrink(0.0)
    free(store, slot)
    assert [store.shrink(now_s) for now_s in (10.0, 15.0, 24.75)] == [None] * 3
    assert store.shrink(25.0) == SEGMENT


def test_growth_begins_a_new_window() -> None:
    store = store_of(ELASTIC)
    store.shrink(0.0)
    store.grown(CAPACITY, 9.0)
    assert [store.shrink(now_s) for now_s in (10.0, 19.75)] == [None] * 2
    assert store.shrink(20.0) == SEGMENT


def test_nothing_is_cut_off_while_somebody_waits() -> None:
    store = grown_store(attrs.evolve(ELASTIC, slots=1))
    slot = publish(store)
    wait(store)
    assert [store.shrink(now_s) for now_s in (0.0, 10.0)] == [None] * 2
    waiter = store.queue.head
    assert waiter is not None
    store.leave(waiter, 11.0)
    assert store.shrink(11.0) == SEGMENT
    assert slot.state is SlotState.PUBLISHED


def test_nothing_is_cut_off_while_a_commit_is_under_way() -> None:
    store = store_of(attrs.evolve(ELASTIC, initial_bytes=0, slots=2))
    store.grown(2 * SEGMENT, 0.0)
    store.shrink(0.0)
    waiter, effects = store.wait(request(CAPACITY), 0.0, None)
    assert effects == [Grow(CAPACITY)]
    store.leave(waiter, 0.0)
    assert store.shrink(10.0) is None
    store.size.grow_failed(10.0)
    assert store.shrink(10.0) == 0


def test_nothing_grows_into_what_is_being_given_back() -> None:
    store = grown_store()
    store.shrink(0.0)
    assert store.shrink(10.0) == SEGMENT
    assert store.size.growth_for(CAPACITY, 10.0) == 0
    waiter = wait(store, request(CAPACITY), 10.0)
    assert store.shrunk(11.0) == [Grow(CAPACITY)]
    assert store.grown(CAPACITY, 12.0) == [Woken(waiter)]


def test_what_is_left_serves_on_while_the_tail_is_given_back() -> None:
    store = grown_store()
    store.shrink(0.0)
    store.shrink(10.0)
    assert reserve(store, request(SEGMENT)).offset_bytes == 0
    assert store.reserve(request(), 10.0) is None


def test_counters_tell_what_happened() -> None:
    store = store_of()
    paid, discarded, expired = publish(store), publish(store), publish(store, request(ttl_s=1.0))
    reserved = reserve(store)
    pay(store, paid)
    store.revoke(discarded.index, discarded.generation, 0.0)
    store.expire(1.0)
    store.free_reserved(reserved, 1.0)
    store.recycle(store.due(1.0), 1.0)
    store.wait(request(), 1.0, None)
    assert (store.puts, store.recycled, store.expired, store.waited) == (3, 2, 1, 1)
    assert store.due(1.5) == [expired]
