"""The rules of keys one by one; test_keyed_machine.py has them all at once."""

import attrs
import pytest

from featcache.core.allocator import ALIGNMENT_BYTES
from featcache.core.effects import (
    ClaimPassed,
    Effect,
    Evicted,
    Expired,
    Found,
    Grow,
    Limits,
    Recycled,
    SlotRetired,
    Woken,
)
from featcache.core.eviction import FEW
from featcache.core.key_queue import KeyWaiter, KeyWaiterState
from featcache.core.keyed_store import KeyedStore, key_label
from featcache.core.put_queue import Request
from featcache.core.slots import Slot, SlotState
from featcache.errors import KeyNotFound, PoolFull, StaleRef

UNIT = ALIGNMENT_BYTES
SEGMENT = 4 * UNIT
CAPACITY = 16 * UNIT
GRACE = 0.5
FIXED = Limits(
    capacity_bytes=CAPACITY,
    segment_bytes=SEGMENT,
    initial_bytes=CAPACITY,
    slots=8,
    waiters=4,
    grace_s=GRACE,
    idle_s=10.0,
    grow_retry_s=2.0,
)
ELASTIC = attrs.evolve(FIXED, initial_bytes=SEGMENT)


def store_of(limits: Limits = FIXED) -> KeyedStore:
    store = KeyedStore(limits)
    store.allocator.grow(limits.initial_bytes)
    return store


def reserve(
    store: KeyedStore,
    key: bytes | None = b"a",
    *,
    nbytes: int = UNIT,
    readers: int | set[str] = 0,
    ttl_s: float | None = None,
    now_s: float = 0.0,
) -> Slot:
    owed = readers if isinstance(readers, int) else frozenset(readers)
    slot = store.reserve(Request(nbytes, owed, ttl_s, key), now_s)
    assert slot is not None
    return slot


def put(
    store: KeyedStore,
    key: bytes | None = b"a",
    *,
    nbytes: int = UNIT,
    readers: int | set[str] = 0,
    ttl_s: float | None = None,
    now_s: float = 0.0,
) -> Slot:
    slot = reserve(store, key, nbytes=nbytes, readers=readers, ttl_s=ttl_s, now_s=now_s)
    assert store.publish(slot, now_s) == []
    return slot


def put_some(store: KeyedStore, count: int, nbytes: int = UNIT) -> list[Slot]:
    return [put(store, b"%d" % n, nbytes=nbytes) for n in range(count)]


def look(store: KeyedStore, key: bytes = b"a", now_s: float = 0.0) -> Slot:
    slot = store.lookup(key, now_s)
    assert slot is not None
    return slot


def use(store: KeyedStore, key: bytes, now_s: float = 0.0) -> None:
    """Look a feature up and pay at once."""
    assert store.pay_grant(look(store, key, now_s), now_s) == []


def pay(store: KeyedStore, slot: Slot, session: int = 1, name: str | None = None) -> list[Effect]:
    return store.pay(slot.index, slot.generation, session, name, 0.0)


def wait_for_key(
    store: KeyedStore, key: bytes = b"a", session: int = 1, *, can_make: bool = True
) -> KeyWaiter:
    assert store.lookup(key, 0.0) is None
    return store.wait_for_key(key, session, can_make=can_make, tag=None)


def by_nobody(_: Slot) -> bool:
    return False


def room_for(store: KeyedStore, nbytes: int = UNIT, now_s: float = 0.0) -> list[Effect]:
    return store.evict_for(Request(nbytes, 1, None), by_nobody, now_s)


def gone(slot: Slot, key: bytes, cause: str = "room", unused_s: float = 0.0) -> list[Effect]:
    """What it is to evict a feature of which nothing is owed."""
    return [Evicted(key, slot.nbytes, unused_s, cause), SlotRetired(slot)]


def recycle(store: KeyedStore, now_s: float = 0.0) -> list[Effect]:
    return store.recycle(store.due(now_s), now_s)


def recycled(slot: Slot) -> Recycled:
    return Recycled(slot.index, slot.generation, slot.nbytes)


def counters(store: KeyedStore) -> tuple[int, int, int]:
    return store.hits, store.misses, store.evicted


def books(store: KeyedStore) -> tuple[int, int, int]:
    directory = store.directory
    return directory.resident_bytes, directory.pinned_bytes, directory.idle_bytes


# --- keys as they are shown ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "label"),
    [
        (b"image-7", "image-7"),
        ("schön".encode(), "schön"),
        (b"", ""),
        (b"\x00\xff", "00ff"),
        (b"a\nb", "610a62"),
        ("\ufffd".encode(), "efbfbd"),
    ],
)
def test_a_key_is_shown_as_its_text_or_in_hex(key: bytes, label: str) -> None:
    assert key_label(key) == label


# --- keeping ------------------------------------------------------------------------------------


def test_a_keyed_feature_is_kept_from_its_publish() -> None:
    store = store_of()
    slot = reserve(store, b"a")
    assert (slot.key, slot.wanted_key) == (None, b"a")
    assert store.lookup(b"a", 0.0) is None
    assert store.publish(slot, 3.0) == []
    assert (slot.key, slot.wanted_key, slot.used_s) == (b"a", None, 3.0)
    assert look(store, b"a") is slot


def test_what_has_no_key_is_not_kept() -> None:
    store = store_of()
    slot = put(store, None, readers=1)
    assert len(store.directory) == 0
    assert pay(store, slot) == [SlotRetired(slot)]


@pytest.mark.parametrize("give_up", ["free_reserved", "give_up_reserved"])
def test_what_was_not_published_leaves_nothing_under_its_key(give_up: str) -> None:
    store = store_of(attrs.evolve(FIXED, slots=1))
    slot = reserve(store, b"a")
    getattr(store, give_up)(slot, 0.0)
    recycle(store)
    assert b"a" not in store.directory
    assert put(store, None, readers=1) is slot
    assert b"a" not in store.directory


def test_a_keyed_feature_that_owes_no_reads_stays() -> None:
    store = store_of()
    slot = put(store)
    assert slot.state is SlotState.PUBLISHED
    assert store.find(slot.index, slot.generation) is slot
    assert (store.owing, store.due(100.0), store.expire(100.0)) == ({}, [], [])
    assert books(store) == (UNIT, 0, UNIT)


@pytest.mark.parametrize("readers", [2, {"tp0", "tp1"}])
def test_a_keyed_feature_stays_when_its_reads_are_paid(readers: int | set[str]) -> None:
    store = store_of()
    slot = put(store, readers=readers)
    assert pay(store, slot, 1, "tp0") == []
    assert books(store) == (UNIT, 0, 0)
    assert room_for(store) == []
    assert pay(store, slot, 2, "tp1") == []
    assert slot.state is SlotState.PUBLISHED
    assert (store.owing, store.due(100.0)) == ({}, [])
    assert room_for(store) == gone(slot, b"a")


def test_a_session_pays_a_keyed_feature_once_for_its_ref_and_once_for_each_grant() -> None:
    store = store_of()
    slot = put(store, readers=2)
    look(store)
    assert pay(store, slot, 1) == []
    assert pay(store, slot, 1) == []
    assert (slot.reads_left, slot.grants) == (1, 1)
    assert store.pay_grant(slot, 0.0) == []
    assert (slot.reads_left, slot.grants) == (1, 0)


@pytest.mark.parametrize(
    "waive_reads", [pytest.param("revoke", id="discarded"), pytest.param("forgive", id="dead")]
)
def test_reads_that_are_forgiven_leave_the_key(waive_reads: str) -> None:
    store = store_of()
    slot = put(store, readers={"tp0"})
    if waive_reads == "revoke":
        assert store.revoke(slot.index, slot.generation, 0.0) == []
    else:
        assert store.waive_reads("tp0", 0.0) == (1, [])
    assert (slot.reads_left, slot.state, slot.key) == (0, SlotState.PUBLISHED, b"a")
    assert (store.owing, books(store)) == ({}, (UNIT, 0, UNIT))
    assert look(store) is slot


def test_a_dead_name_is_forgiven_only_its_own_read_of_a_keyed_feature() -> None:
    store = store_of()
    slot = put(store, readers={"tp0", "tp1"})
    assert store.waive_reads("tp0", 0.0) == (1, [])
    assert slot.owed_by == ("tp1",)
    assert room_for(store) == []
    assert pay(store, slot, 1, "tp1") == []
    assert room_for(store) == gone(slot, b"a")


def test_all_readers_that_died_before_the_publish_leave_a_feature_that_is_kept() -> None:
    store = store_of()
    slot = reserve(store, readers={"tp0"}, ttl_s=1.0)
    assert store.waive_reads("tp0", 0.0) == (1, [])
    assert store.publish(slot, 0.0) == []
    assert (slot.key, store.owing, store.expire(100.0)) == (b"a", {}, [])
    assert room_for(store) == gone(slot, b"a")


def test_the_ttl_of_a_keyed_feature_forgives_its_reads_and_keeps_the_key() -> None:
    store = store_of()
    slot = put(store, readers=2, ttl_s=4.0)
    pay(store, slot)
    assert store.expire(3.75) == []
    assert store.expire(4.0) == [Expired("0:1", UNIT, 4.0, 1)]
    assert (slot.reads_left, slot.state, slot.key) == (0, SlotState.PUBLISHED, b"a")
    assert (store.owing, store._aging, store.expired) == ({}, {}, 1)
    assert store.expire(100.0) == []
    assert books(store) == (UNIT, 0, UNIT)
    assert look(store) is slot


def test_a_read_that_was_forgiven_can_not_be_paid_later() -> None:
    store = store_of()
    slot = put(store, readers=2, ttl_s=1.0)
    store.expire(1.0)
    assert pay(store, slot) == []
    assert slot.reads_left == 0
    assert room_for(store) == gone(slot, b"a")


def test_a_keyed_feature_with_no_reads_owed_never_expires() -> None:
    store = store_of()
    slot = put(store, readers=0, ttl_s=1.0)
    assert store.expire(100.0) == []
    assert look(store) is slot


# --- lookups and grants -------------------------------------------------------------------------


def test_a_lookup_grants_a_read() -> None:
    store = store_of()
    slot = put(store)
    for count in (1, 2, 3):
        assert store.lookup(b"a", float(count)) is slot
        assert (slot.grants, slot.used_s) == (count, float(count))
    assert books(store) == (UNIT, 0, 0)
    for count in (2, 1, 0):
        assert store.pay_grant(slot, 5.0) == []
        assert slot.grants == count
    assert books(store) == (UNIT, 0, UNIT)
    assert slot.state is SlotState.PUBLISHED


def test_a_lookup_of_what_is_not_there_grants_nothing() -> None:
    store = store_of()
    put(store, b"b")
    assert store.lookup(b"a", 0.0) is None
    assert counters(store) == (0, 1, 0)


def test_a_lookup_counts_as_a_use() -> None:
    store = store_of()
    slots = put_some(store, 3)
    use(store, b"0")
    assert room_for(store) == gone(slots[1], b"1")
    assert room_for(store) == gone(slots[2], b"2")
    assert room_for(store) == gone(slots[0], b"0")


def test_a_lookup_that_finds_nothing_is_a_use_of_nothing() -> None:
    store = store_of()
    slots = put_some(store, 2)
    assert store.lookup(b"9", 0.0) is None
    assert room_for(store) == gone(slots[0], b"0")


def test_paying_is_no_use() -> None:
    store = store_of()
    a, _ = put(store, b"a", readers=1), put(store, b"b")
    pay(store, a)
    assert room_for(store) == gone(a, b"a")


@pytest.mark.parametrize("order", ["grant first", "read first"])
def test_an_evicted_feature_lives_until_its_reads_and_its_grants_are_paid(order: str) -> None:
    store = store_of()
    slot = put(store, readers=1)
    look(store)
    assert store.evict(b"a", 0.0) == [Evicted(b"a", UNIT, 0.0, "asked")]
    assert slot.state is SlotState.PUBLISHED
    assert (books(store), store.allocator.used_bytes) == ((0, 0, 0), UNIT)
    assert store.find(slot.index, slot.generation) is slot
    if order == "grant first":
        effects = [store.pay_grant(slot, 1.0), pay(store, slot)]
    else:
        effects = [pay(store, slot), store.pay_grant(slot, 1.0)]
    assert effects == [[], [SlotRetired(slot)]]
    assert recycle(store, 1.0) == [recycled(slot)]
    assert store.allocator.used_bytes == 0


def test_each_grant_of_an_evicted_feature_is_waited_for() -> None:
    store = store_of()
    slot = put(store)
    look(store)
    look(store)
    store.evict(b"a", 0.0)
    assert store.pay_grant(slot, 1.0) == []
    assert store.due(100.0) == []
    assert store.pay_grant(slot, 1.0) == [SlotRetired(slot)]
    assert store.due(1.0) == [slot]


def test_a_feature_that_is_granted_and_was_evicted_is_not_found_by_its_key() -> None:
    store = store_of()
    put(store)
    old = look(store)
    store.evict(b"a", 0.0)
    assert store.lookup(b"a", 0.0) is None
    new = put(store)
    assert look(store) is new
    assert new is not old
    assert store.pay_grant(old, 0.0) == [SlotRetired(old)]
    assert new.grants == 1


def test_what_is_forgiven_of_an_evicted_feature_leaves_it_to_its_grants() -> None:
    store = store_of()
    slot = put(store, readers=2, ttl_s=1.0)
    look(store)
    store.evict(b"a", 0.0)
    assert store.expire(1.0) == [Expired("0:1", UNIT, 1.0, 2)]
    assert slot.state is SlotState.PUBLISHED
    assert store.pay_grant(slot, 1.0) == [SlotRetired(slot)]


# --- replacing ----------------------------------------------------------------------------------


def test_a_feature_that_comes_under_a_key_replaces_the_one_before() -> None:
    store = store_of()
    old, new = put(store), reserve(store, nbytes=2 * UNIT)
    assert store.publish(new, 1.0) == [SlotRetired(old)]
    assert old.due_s == 1.0 + GRACE
    assert (old.key, new.key) == (None, b"a")
    assert books(store) == (2 * UNIT, 0, 2 * UNIT)
    assert look(store) is new
    with pytest.raises(StaleRef):
        store.find(old.index, old.generation)
    assert recycle(store, 1.0) == []
    assert recycle(store, 1.0 + GRACE) == [recycled(old)]
    assert counters(store) == (1, 0, 0)


@pytest.mark.parametrize("way", ["read", "grant"])
def test_what_is_replaced_while_something_is_owed_lives_until_it_is_paid(way: str) -> None:
    store = store_of()
    old = put(store, readers=1 if way == "read" else 0)
    if way == "grant":
        look(store)
    new = put(store)
    assert store.find(old.index, old.generation) is old
    effects = pay(store, old) if way == "read" else store.pay_grant(old, 0.0)
    assert effects == [SlotRetired(old)]
    assert look(store) is new


def test_the_replaced_feature_is_evicted_no_more() -> None:
    store = store_of()
    old = put(store, b"a")
    other = put(store, b"b")
    new = reserve(store, b"a")
    store.publish(new, 0.0)
    assert old.state is SlotState.RETIRING
    assert room_for(store) == gone(other, b"b")
    assert room_for(store) == gone(new, b"a")
    assert room_for(store) == []


def test_two_that_were_reserved_for_one_key_replace_each_other_as_they_are_published() -> None:
    store = store_of()
    first, second = reserve(store), reserve(store)
    assert store.publish(second, 0.0) == []
    assert store.publish(first, 0.0) == [SlotRetired(second)]
    assert look(store) is first


def test_pins_carry_over_to_what_replaces() -> None:
    store = store_of()
    put(store)
    store.pin(b"a", 1)
    new = reserve(store, nbytes=2 * UNIT)
    store.publish(new, 0.0)
    assert books(store) == (2 * UNIT, 2 * UNIT, 0)
    assert room_for(store) == []
    store.unpin(b"a", 1)
    assert room_for(store) == gone(new, b"a")


# --- seeking ------------------------------------------------------------------------------------


def test_who_seeks_is_granted_one_read_each_when_the_key_is_published() -> None:
    store = store_of()
    key_waiters = [wait_for_key(store, can_make=False) for _ in range(3)]
    others = wait_for_key(store, b"b", can_make=False)
    slot = reserve(store)
    assert store.publish(slot, 2.0) == [Found(waiter) for waiter in key_waiters]
    assert (slot.grants, slot.used_s) == (3, 2.0)
    assert room_for(store) == []
    for waiter in key_waiters:
        assert store.take(waiter) is slot
        assert waiter.state is KeyWaiterState.TAKEN
    assert (slot.grants, store.key_waiters.count) == (3, 1)
    assert others.state is KeyWaiterState.WAITING
    assert [store.pay_grant(slot, 2.0) for _ in key_waiters] == [[], [], []]
    assert room_for(store, now_s=2.0) == gone(slot, b"a")
    assert counters(store) == (0, 4, 1)


def test_who_was_chosen_makes_and_the_others_find_what_it_publishes() -> None:
    store = store_of()
    maker, second, plain = (
        wait_for_key(store),
        wait_for_key(store),
        wait_for_key(store, can_make=False),
    )
    assert store.take(maker) is None
    slot = reserve(store)
    assert store.publish(slot, 0.0) == [Found(second), Found(plain)]
    assert store.release_claim(b"a", maker.claim) == []
    assert store.take(second) is slot
    assert store.take(plain) is slot
    assert slot.grants == 2


def test_when_a_maker_fails_the_next_one_is_told() -> None:
    store = store_of()
    maker, plain, second = (
        wait_for_key(store),
        wait_for_key(store, can_make=False),
        wait_for_key(store),
    )
    store.take(maker)
    assert store.release_claim(b"a", maker.claim) == [ClaimPassed(second)]
    assert store.take(second) is None
    assert plain.state is KeyWaiterState.WAITING
    assert store.release_claim(b"a", maker.claim) == []
    assert store.release_claim(b"a", second.claim) == []
    assert plain.state is KeyWaiterState.WAITING


@pytest.mark.parametrize(
    "state", [KeyWaiterState.WAITING, KeyWaiterState.TAKEN, KeyWaiterState.GONE]
)
def test_only_what_was_handed_over_is_taken(state: KeyWaiterState) -> None:
    store = store_of()
    waiter = wait_for_key(store, can_make=state is not KeyWaiterState.WAITING)
    if state is KeyWaiterState.TAKEN:
        store.take(waiter)
    elif state is KeyWaiterState.GONE:
        store.cancel_wait(waiter, 0.0)
    with pytest.raises(ValueError, match=f"this waiter is {state.value}"):
        store.take(waiter)


def test_who_gives_up_waiting_is_granted_nothing() -> None:
    store = store_of()
    leaver, other = wait_for_key(store, can_make=False), wait_for_key(store, can_make=False)
    assert store.cancel_wait(leaver, 0.0) == []
    slot = reserve(store)
    assert store.publish(slot, 0.0) == [Found(other)]
    assert slot.grants == 1


def test_who_gives_up_what_it_found_pays_for_it() -> None:
    store = store_of()
    waiter = wait_for_key(store, can_make=False)
    slot = reserve(store)
    store.publish(slot, 0.0)
    assert store.cancel_wait(waiter, 1.0) == []
    assert store.cancel_wait(waiter, 1.0) == []
    assert slot.grants == 0
    assert room_for(store) == gone(slot, b"a")


def test_who_gives_up_what_was_evicted_since_lets_it_go() -> None:
    store = store_of()
    first, second = wait_for_key(store, can_make=False), wait_for_key(store, can_make=False)
    slot = reserve(store)
    store.publish(slot, 0.0)
    assert store.evict(b"a", 0.0) == [Evicted(b"a", UNIT, 0.0, "asked")]
    assert store.cancel_wait(first, 1.0) == []
    assert store.cancel_wait(second, 1.0) == [SlotRetired(slot)]


def test_who_gives_up_having_been_chosen_lets_the_next_one_make() -> None:
    store = store_of()
    maker, second, third = wait_for_key(store), wait_for_key(store), wait_for_key(store)
    assert store.cancel_wait(maker, 0.0) == [ClaimPassed(second)]
    assert store.cancel_wait(maker, 0.0) == []
    assert third.state is KeyWaiterState.WAITING
    assert store.cancel_wait(second, 0.0) == [ClaimPassed(third)]
    assert store.cancel_wait(third, 0.0) == []
    assert wait_for_key(store).state is KeyWaiterState.CHOSEN


@pytest.mark.parametrize("can_make", [False, True])
def test_who_has_taken_it_has_nothing_to_give_up(can_make: bool) -> None:
    store = store_of()
    waiter = wait_for_key(store, can_make=can_make)
    slot = reserve(store)
    store.publish(slot, 0.0)
    store.take(waiter)
    assert store.cancel_wait(waiter, 0.0) == []
    assert waiter.state is KeyWaiterState.TAKEN
    assert slot.grants == (0 if can_make else 1)
    assert store.key_waiters.holds(b"a", waiter.claim) == can_make


def test_seekers_are_bounded() -> None:
    store = store_of()
    key_waiters = [wait_for_key(store, can_make=False) for _ in range(FIXED.waiters)]
    with pytest.raises(PoolFull, match="4 wait for keys already, the bound"):
        wait_for_key(store, can_make=False)
    store.cancel_wait(key_waiters[0], 0.0)
    wait_for_key(store, can_make=False)


def test_who_would_make_at_once_is_let_in_whoever_waits() -> None:
    """It waits for nobody, and the others may wait for what it makes."""
    store = store_of()
    for _ in range(FIXED.waiters):
        wait_for_key(store, b"a", can_make=False)
    assert wait_for_key(store, b"b").state is KeyWaiterState.CHOSEN
    with pytest.raises(PoolFull, match="4 wait for keys already, the bound"):
        wait_for_key(store, b"b")


def test_claims_have_a_bound_of_their_own() -> None:
    """More than there are slots could not be put."""
    store = store_of()
    makers = [wait_for_key(store, b"%d" % n) for n in range(FIXED.slots)]
    assert {maker.state for maker in makers} == {KeyWaiterState.CHOSEN}
    with pytest.raises(PoolFull, match="8 features are being made already, the bound"):
        wait_for_key(store, b"one more")
    assert wait_for_key(store, b"one more", can_make=False).state is KeyWaiterState.WAITING
    assert wait_for_key(store, b"0").state is KeyWaiterState.WAITING
    store.release_claim(b"7", makers[7].claim)
    assert wait_for_key(store, b"one more").state is KeyWaiterState.CHOSEN


# --- evicting by name and pins ------------------------------------------------------------------


def test_a_key_is_evicted_by_name_after_a_grace() -> None:
    store = store_of()
    slot = put(store, nbytes=300)
    assert store.evict(b"a", 7.0) == [Evicted(b"a", 300, 7.0, "asked"), SlotRetired(slot)]
    assert slot.due_s == 7.0 + GRACE
    assert store.evict(b"a", 7.0) == []
    assert counters(store) == (0, 0, 1)
    assert recycle(store, 7.0) == []
    assert recycle(store, 7.0 + GRACE) == [recycled(slot)]


def test_an_eviction_says_how_long_the_feature_was_not_used() -> None:
    store = store_of()
    put(store, now_s=1.0)
    use(store, b"a", 4.0)
    assert store.evict(b"a", 10.0)[0] == Evicted(b"a", UNIT, 6.0, "asked")


def test_what_is_evicted_by_name_while_pinned_is_gone_with_its_pins() -> None:
    store = store_of()
    slot = put(store)
    store.pin(b"a", 1)
    assert store.evict(b"a", 0.0) == gone(slot, b"a", "asked")
    assert books(store) == (0, 0, 0)
    again = put(store)
    assert room_for(store) == gone(again, b"a")


@pytest.mark.parametrize("call", ["pin", "unpin"])
def test_only_what_is_there_is_pinned(call: str) -> None:
    store = store_of()
    reserve(store, b"\x00")
    for key, label in ((b"cat.png", "cat.png"), (b"\x00", "00")):
        with pytest.raises(KeyNotFound, match=f"no feature is kept under '{label}'"):
            getattr(store, call)(key, 1)


def test_what_is_pinned_is_passed_over_until_each_pin_is_taken_back() -> None:
    store = store_of()
    a, b = put(store, b"a"), put(store, b"b")
    store.pin(b"a", 1)
    store.pin(b"a", 2)
    assert room_for(store) == gone(b, b"b")
    store.unpin(b"a", 1)
    assert room_for(store) == []
    store.unpin(b"a", 2)
    assert room_for(store) == gone(a, b"a")


def test_what_is_pinned_is_still_looked_up_and_used() -> None:
    store = store_of()
    slot = put(store)
    store.pin(b"a", 1)
    use(store, b"a")
    assert room_for(store) == []
    assert books(store) == (UNIT, UNIT, 0)
    store.unpin(b"a", 1)
    assert room_for(store) == gone(slot, b"a")


# --- evicting for room --------------------------------------------------------------------------


def test_the_longest_unused_goes_first_one_at_a_time() -> None:
    store = store_of()
    slots = put_some(store, 4)
    for n in (2, 0):
        use(store, b"%d" % n, 5.0)
    assert room_for(store, now_s=9.0) == gone(slots[1], b"1", unused_s=9.0)
    assert room_for(store, now_s=9.0) == gone(slots[3], b"3", unused_s=9.0)
    assert room_for(store, now_s=9.0) == gone(slots[2], b"2", unused_s=4.0)
    assert room_for(store, now_s=9.0) == gone(slots[0], b"0", unused_s=4.0)
    assert room_for(store, now_s=9.0) == []
    assert counters(store) == (2, 0, 4)


def test_what_was_evicted_for_room_can_be_recycled_at_once() -> None:
    store = store_of()
    slot = put(store)
    room_for(store, now_s=1.0)
    assert (slot.due_s, store.due(1.0)) == (1.0, [slot])


def test_what_is_held_is_passed_over_and_not_lost() -> None:
    store = store_of()
    slots = put_some(store, 3)
    request, held = Request(UNIT, 1, None), {slots[0], slots[1]}
    assert store.evict_for(request, held.__contains__, 0.0) == gone(slots[2], b"2")
    assert store.evict_for(request, held.__contains__, 0.0) == []
    held.clear()
    assert store.evict_for(request, held.__contains__, 0.0) == gone(slots[0], b"0")
    assert store.evict_for(request, held.__contains__, 0.0) == gone(slots[1], b"1")


def test_only_what_nobody_reads_owes_or_pins_is_evicted() -> None:
    store = store_of()
    put(store, b"owed", readers=1)
    put(store, b"named", readers={"tp0"})
    put(store, b"granted")
    put(store, b"pinned")
    put(store, None, readers=1)
    reserve(store, b"reserved")
    free = put(store, b"free")
    look(store, b"granted")
    store.pin(b"pinned", 1)
    assert room_for(store) == gone(free, b"free")
    assert room_for(store) == []
    assert sorted(store.directory) == [b"granted", b"named", b"owed", b"pinned"]


def test_nothing_is_evicted_for_what_would_not_fit_if_all_were() -> None:
    store = store_of()
    slot = put(store, nbytes=4 * UNIT)
    owed = put(store, None, nbytes=4 * UNIT, readers=1)
    assert room_for(store, 12 * UNIT + 1) == []
    pay(store, owed)
    recycle(store)
    assert room_for(store, 12 * UNIT + 1) == gone(slot, b"a")


def test_a_put_gets_the_room_of_what_was_evicted_for_it() -> None:
    store = store_of()
    slots = put_some(store, 4, CAPACITY // 4)
    request = Request(CAPACITY // 2, 1, None)
    assert store.reserve(request, 0.0) is None
    assert evicted_for(store, request.nbytes) == {b"0", b"1"}
    assert recycle(store) == [recycled(slots[1]), recycled(slots[0])]
    assert store.reserve(request, 0.0) is not None
    assert store.unevictable_bytes == CAPACITY // 2


def test_who_waits_is_served_from_what_was_evicted_for_it() -> None:
    store = store_of()
    put_some(store, 4, CAPACITY // 4)
    waiter, effects = store.wait(Request(CAPACITY // 2, 1, None), 0.0, None)
    assert effects == []
    assert evicted_for(store, waiter.request.nbytes) == {b"0", b"1"}
    assert recycle(store)[2:] == [Woken(waiter)]


def test_a_slab_that_can_grow_evicts_nothing() -> None:
    store = store_of(ELASTIC)
    slot = put(store, nbytes=SEGMENT)
    assert room_for(store) == []
    store.size.begin_growth()
    assert room_for(store) == []
    store.grown(CAPACITY, 0.0)
    put(store, b"b", nbytes=CAPACITY - SEGMENT)
    assert room_for(store) == gone(slot, b"a")


def test_what_stands_before_the_room_to_grow_is_found_among_many() -> None:
    few = FEW + 8
    sizes = attrs.evolve(ELASTIC, capacity_bytes=4 * few * UNIT, segment_bytes=few * UNIT)
    store = store_of(attrs.evolve(sizes, initial_bytes=few * UNIT, slots=2 * few))
    put_some(store, few)
    store.pin(b"%d" % (few - 2), 1)  # between the cold ones and the last, before the room
    wanted = (3 * few + 1) * UNIT
    assert store.size.growth_for(wanted, 0.0) == 0
    told = [room_for(store, wanted, float(now_s)) for now_s in range(3)]
    assert any(told), "a put waits for ever beside what could be evicted"


def test_neighbours_that_make_room_are_found_among_many() -> None:
    """Those around the few coldest are looked at first, and make none here."""
    pairs = FEW + 4
    units = 2 * pairs + 2
    store = store_of(attrs.evolve(FIXED, slots=2 * units, capacity_bytes=units * UNIT))
    store.allocator.grow(units * UNIT)
    put_some(store, units)
    for n in range(1, 2 * pairs, 2):
        store.pin(b"%d" % n, 1)
    effects = room_for(store, 2 * UNIT)
    keys = {effect.key for effect in effects if isinstance(effect, Evicted)}
    assert keys == {b"%d" % (units - 2), b"%d" % (units - 1)}


def test_a_slab_whose_growth_failed_evicts_until_it_may_be_tried_again() -> None:
    store = store_of(ELASTIC)
    slots = put_some(store, 2, SEGMENT // 2)
    store.size.begin_growth()
    store.size.grow_failed(1.0)
    assert room_for(store, now_s=2.5) == gone(slots[0], b"0", unused_s=2.5)
    assert room_for(store, now_s=1.0 + FIXED.grow_retry_s) == []


def test_a_slab_evicts_what_keeps_it_from_growing_enough() -> None:
    """Neither its committed bytes nor what it may grow by is enough: without this it waits for ever."""
    store = store_of(ELASTIC)
    slot = put(store, nbytes=SEGMENT)
    assert store.size.growth_for(CAPACITY, 0.0) == 0
    assert room_for(store, CAPACITY) == gone(slot, b"a")
    recycle(store)
    assert store.size.growth_for(CAPACITY, 0.0) == CAPACITY


def test_only_what_stands_before_the_room_to_grow_is_evicted_for_it() -> None:
    store = store_of(ELASTIC)
    low, high = put_some(store, 2, SEGMENT // 2)
    use(store, b"0")
    assert store.size.growth_for(14 * UNIT, 0.0) == 0
    assert room_for(store, 14 * UNIT) == gone(high, b"1")
    assert low.key == b"0"


def test_a_slab_that_evicts_first_does_so_while_it_can_grow() -> None:
    store = store_of(attrs.evolve(ELASTIC, evict_first=True))
    slot = put(store, nbytes=SEGMENT)
    assert room_for(store) == gone(slot, b"a")
    assert room_for(store) == []


def test_a_full_slot_table_evicts_though_the_slab_can_grow() -> None:
    store = store_of(attrs.evolve(ELASTIC, slots=2))
    slots = put_some(store, 2)
    assert store.table.full
    assert room_for(store, CAPACITY // 2) == gone(slots[0], b"0")


def test_wanted_bytes_are_what_a_put_can_not_have() -> None:
    store = store_of()
    put(store, b"a", nbytes=2 * UNIT)
    put(store, b"b", nbytes=4 * UNIT)
    assert store.unevictable_bytes == 0
    store.pin(b"a", 1)
    assert store.unevictable_bytes == 2 * UNIT
    look(store, b"b")
    reserve(store, None, readers=1)
    assert store.unevictable_bytes == 7 * UNIT


# --- neighbours ---------------------------------------------------------------------------------


def evicted_for(store: KeyedStore, nbytes: int) -> set[bytes]:
    """Have one call evict for a request; return the keys."""
    return {effect.key for effect in room_for(store, nbytes) if isinstance(effect, Evicted)}


def row(store: KeyedStore, *sizes: int) -> None:
    """Fill the slab from its beginning: with features of so many units, their keys numbers."""
    for n, units in enumerate(sizes):
        assert put(store, b"%d" % n, nbytes=units * UNIT).offset_bytes == sum(sizes[:n]) * UNIT
    rest = store.allocator.free_bytes
    if rest:
        put(store, None, nbytes=rest, readers=1)


def use_in_order(store: KeyedStore, *numbers: int) -> None:
    for n in numbers:
        use(store, b"%d" % n)


def test_the_longest_unused_goes_alone_if_that_is_room_enough() -> None:
    store = store_of()
    row(store, 2, 3, 2)
    use_in_order(store, 1, 0, 2)
    assert evicted_for(store, 3 * UNIT) == {b"1"}


def test_the_longest_unused_and_free_bytes_beside_it_are_room() -> None:
    store = store_of()
    row(store, 2, 2, 2)
    use_in_order(store, 1, 0, 2)
    store.evict(b"2", 0.0)
    recycle(store, GRACE)
    assert evicted_for(store, 4 * UNIT) == {b"1"}


@pytest.mark.parametrize(("order", "going"), [((1, 0, 2), {b"0", b"1"}), ((1, 2, 0), {b"1", b"2"})])
def test_of_two_neighbours_the_longer_unused_goes_along(
    order: tuple[int, ...], going: set[bytes]
) -> None:
    store = store_of()
    row(store, 2, 2, 2)
    use_in_order(store, *order)
    assert evicted_for(store, 4 * UNIT) == going
    recycle(store)
    assert reserve(store, b"new", nbytes=4 * UNIT).state is SlotState.RESERVED


def test_of_all_neighbours_that_make_room_those_go_whose_last_use_is_the_longest_ago() -> None:
    store = store_of()
    row(store, 1, 1, 1, 1, 1)
    use_in_order(store, 0, 3, 4, 2, 1)
    assert evicted_for(store, 2 * UNIT) == {b"3", b"4"}
    assert b"0" in store.directory  # unused the longest, but its neighbour was used last


def test_neighbours_of_the_second_coldest_that_were_used_later_do_not_go_instead() -> None:
    store = store_of()
    row(store, 1, 1, 1, 1, 1)
    store.pin(b"2", 1)
    use_in_order(store, 0, 3, 1, 4)
    assert evicted_for(store, 2 * UNIT) == {b"0", b"1"}


def test_a_larger_feature_that_is_room_enough_goes_before_many_that_were_used_later() -> None:
    store = store_of()
    row(store, 1, 1, 4, 1)
    use_in_order(store, 0, 2, 1, 3)
    assert evicted_for(store, 4 * UNIT) == {b"2"}


@pytest.mark.parametrize("why", ["pinned", "granted", "held", "owed"])
def test_what_can_not_go_is_no_neighbour(why: str) -> None:
    store = store_of()
    row(store, 1, 1, 1, 1)
    use_in_order(store, 0, 1, 2, 3)
    held = {store.directory.find(b"1")} if why == "held" else set()
    if why == "pinned":
        store.pin(b"1", 1)
    elif why == "granted":
        look(store, b"1")
    elif why == "owed":
        slot = look(store, b"1")
        store.evict(b"1", 0.0)
        assert slot.state is SlotState.PUBLISHED
    effects = store.evict_for(Request(2 * UNIT, 1, None), held.__contains__, 0.0)
    keys = {effect.key for effect in effects if isinstance(effect, Evicted)}
    assert keys == {b"2", b"3"}


def test_nothing_goes_where_all_that_could_go_would_be_no_room() -> None:
    store = store_of()
    row(store, 1, 1, 1, 1)
    store.pin(b"1", 1)
    store.pin(b"3", 1)
    assert evicted_for(store, 2 * UNIT) == set()
    store.unpin(b"1", 1)
    assert evicted_for(store, 2 * UNIT) == {b"0", b"1"}


def test_a_full_table_needs_one_slot_however_many_bytes() -> None:
    store = store_of(attrs.evolve(FIXED, slots=3))
    put_some(store, 3)
    assert evicted_for(store, 2 * UNIT) == {b"0"}


# --- watermarks ---------------------------------------------------------------------------------


MARKED = attrs.evolve(FIXED, slots=16, evict_above=0.75, evict_to=0.5)


def test_with_no_watermark_nothing_is_trimmed() -> None:
    store = store_of()
    put(store, nbytes=CAPACITY)
    assert store.trim(by_nobody, 0.0) == []


def test_up_to_the_upper_mark_nothing_is_trimmed() -> None:
    store = store_of(MARKED)
    put_some(store, 12)
    assert store.trim(by_nobody, 0.0) == []


def test_above_the_upper_mark_the_coldest_are_trimmed_down_to_the_lower_one() -> None:
    store = store_of(MARKED)
    slots = put_some(store, 13)
    use(store, b"0")
    expected: list[Effect] = []
    for n in range(1, 6):
        expected += gone(slots[n], b"%d" % n, "watermark", 3.0)
    assert store.trim(by_nobody, 3.0) == expected
    recycle(store, 3.0)
    assert store.allocator.used_bytes == CAPACITY // 2
    assert store.trim(by_nobody, 3.0) == []
    assert store.evicted == 5


def test_what_is_pinned_or_held_is_not_trimmed() -> None:
    store = store_of(MARKED)
    slots = put_some(store, 16)
    for n in range(8, 15):
        store.pin(b"%d" % n, 1)
    held = set(slots[:7])
    assert store.trim(held.__contains__, 0.0) == [
        *gone(slots[7], b"7", "watermark"),
        *gone(slots[15], b"15", "watermark"),
    ]


def test_trimming_counts_what_comes_free_not_what_was_asked_for() -> None:
    """A feature of one byte has a whole unit, and one of no bytes as well."""
    store = store_of(MARKED)
    for n in range(14):
        put(store, b"%d" % n, nbytes=n % 2)
    store.trim(by_nobody, 0.0)
    recycle(store)
    assert store.allocator.used_bytes == CAPACITY // 2


def test_what_is_about_to_be_recycled_is_not_trimmed_for_again() -> None:
    store = store_of(MARKED)
    put_some(store, 14)
    store.trim(by_nobody, 0.0)
    assert len(store.directory) == 8
    assert store.trim(by_nobody, 0.0) == []


def test_what_will_be_below_the_upper_mark_by_itself_is_not_trimmed() -> None:
    store = store_of(MARKED)
    put_some(store, 13)
    store.evict(b"0", 0.0)
    assert store.allocator.used_bytes > 0.75 * CAPACITY
    assert store.trim(by_nobody, 0.0) == []


# --- compaction ---------------------------------------------------------------------------------


COMPACT = attrs.evolve(ELASTIC, compact=0.5)


def with_a_tail(limits: Limits = COMPACT) -> tuple[KeyedStore, list[Slot]]:
    """Two segments; in the last one, two units of four are taken, by two features."""
    store = store_of(limits)
    store.grown(2 * SEGMENT, 0.0)
    slots = [put(store, b"low", nbytes=SEGMENT), *put_some(store, 2)]
    return store, slots[1:]


def idle_window(store: KeyedStore, now_s: float) -> int | None:
    """Let a window of `idle_s` pass in which nothing happens, and return what is then cut off."""
    assert store.shrink(now_s) is None
    return store.shrink(now_s + store.limits.idle_s)


def test_a_tail_that_few_resident_features_hold_is_emptied_and_given_back() -> None:
    store, slots = with_a_tail()
    assert idle_window(store, 0.0) is None
    expected = [
        *gone(slots[0], b"0", "compaction", 10.0),
        *gone(slots[1], b"1", "compaction", 10.0),
    ]
    assert store.compact(by_nobody, 10.0) == expected
    assert recycle(store, 10.0) == [recycled(slot) for slot in slots]
    assert idle_window(store, 10.0) == SEGMENT
    assert list(store.directory) == [b"low"]


def test_nothing_is_compacted_before_a_whole_window_found_the_tail_in_use() -> None:
    store, _ = with_a_tail()
    assert store.compact(by_nobody, 0.0) == []
    store.shrink(0.0)
    store.shrink(COMPACT.idle_s / 2)
    assert store.compact(by_nobody, COMPACT.idle_s / 2) == []


def test_one_window_is_good_for_one_look() -> None:
    store, slots = with_a_tail()
    look(store, b"1")
    idle_window(store, 0.0)
    assert store.compact(by_nobody, 10.0) == []
    store.pay_grant(slots[1], 10.0)
    assert store.compact(by_nobody, 10.0) == []
    idle_window(store, 10.0)
    assert len(store.compact(by_nobody, 20.0)) == 4


def test_without_the_setting_an_idle_cache_gives_nothing_back() -> None:
    store, _ = with_a_tail(ELASTIC)
    assert idle_window(store, 0.0) is None
    assert store.compact(by_nobody, 10.0) == []
    assert idle_window(store, 10.0) is None
    assert len(store.directory) == 3


def test_a_tail_that_holds_more_than_the_setting_is_left() -> None:
    store, _ = with_a_tail(attrs.evolve(COMPACT, compact=0.49))
    idle_window(store, 0.0)
    assert store.compact(by_nobody, 10.0) == []


@pytest.mark.parametrize("why", ["pinned", "granted", "owed", "held", "reserved", "unkeyed"])
def test_a_tail_that_can_not_be_emptied_is_left_whole(why: str) -> None:
    store, slots = with_a_tail(attrs.evolve(COMPACT, compact=1.0))
    if why == "pinned":
        store.pin(b"1", 1)
    elif why == "granted":
        look(store, b"1")
    elif why == "owed":
        put(store, b"owed", readers=1)
    elif why == "reserved":
        reserve(store, b"reserved")
    elif why == "unkeyed":
        put(store, None, readers=1)
    idle_window(store, 0.0)
    assert store.compact(lambda slot: why == "held" and slot is slots[1], 10.0) == []
    assert store.evicted == 0


def test_a_feature_that_reaches_into_the_tail_holds_it_too() -> None:
    store = store_of(attrs.evolve(COMPACT, compact=1.0))
    store.grown(2 * SEGMENT, 0.0)
    low = put(store, b"low")
    across = put(store, b"across", nbytes=SEGMENT)
    idle_window(store, 0.0)
    assert store.compact(by_nobody, 10.0) == gone(across, b"across", "compaction", 10.0)
    assert list(store.directory) == [low.key]


def test_what_was_there_from_the_beginning_is_not_compacted() -> None:
    store = store_of(attrs.evolve(COMPACT, initial_bytes=2 * SEGMENT))
    put(store, b"low", nbytes=SEGMENT)
    put(store, b"tail")
    idle_window(store, 0.0)
    assert store.compact(by_nobody, 10.0) == []


def test_a_segment_that_came_after_the_window_is_not_compacted() -> None:
    """Its features were put a moment ago."""
    store, _ = with_a_tail()
    put(store, b"full", nbytes=2 * UNIT)
    idle_window(store, 0.0)
    store.grown(3 * SEGMENT, 10.0)
    put(store, b"new", now_s=10.0)
    assert store.compact(by_nobody, 10.0) == []


# --- the ends of others -------------------------------------------------------------------------


def test_what_a_session_pinned_is_pinned_no_more_when_it_ends() -> None:
    store = store_of()
    a, _ = put(store, b"a"), put(store, b"b")
    store.pin(b"a", 1)
    store.pin(b"a", 1)
    store.pin(b"b", 1)
    store.pin(b"b", 2)
    assert store.end_session(1, 0.0) == []
    assert books(store) == (2 * UNIT, UNIT, UNIT)
    assert room_for(store) == gone(a, b"a")
    assert room_for(store) == []


def test_who_waits_for_a_key_waits_no_more_when_its_session_ends() -> None:
    store = store_of()
    mine = [
        wait_for_key(store, b"a", 1, can_make=False),
        wait_for_key(store, b"b", 1, can_make=False),
    ]
    other = wait_for_key(store, b"a", 2, can_make=False)
    assert store.end_session(1, 0.0) == []
    assert [waiter.state for waiter in mine] == [KeyWaiterState.GONE] * 2
    slot = reserve(store, b"a")
    assert store.publish(slot, 0.0) == [Found(other)]


def test_what_a_session_was_to_make_goes_to_the_next_of_another() -> None:
    store = store_of()
    maker, mine, other = (
        wait_for_key(store, session=1),
        wait_for_key(store, session=1),
        wait_for_key(store, session=2),
    )
    last = wait_for_key(store, session=2)
    store.take(maker)
    assert store.end_session(1, 0.0) == [ClaimPassed(other)]
    assert (mine.state, last.state) == (KeyWaiterState.GONE, KeyWaiterState.WAITING)
    assert store.end_session(1, 0.0) == []


def test_each_claim_of_a_session_that_ends_is_passed_on() -> None:
    store = store_of()
    for key in (b"a", b"b"):
        wait_for_key(store, key, 1)
    following = [wait_for_key(store, key, 2) for key in (b"a", b"b")]
    assert store.end_session(1, 0.0) == [ClaimPassed(waiter) for waiter in following]
    assert store.release_claim(b"a", 1) == []


def test_a_session_that_was_chosen_and_ended_gives_up_nothing_twice() -> None:
    store = store_of()
    maker, other, last = (
        wait_for_key(store, session=1),
        wait_for_key(store, session=2),
        wait_for_key(store, session=3),
    )
    assert store.end_session(1, 0.0) == [ClaimPassed(other)]
    assert store.cancel_wait(maker, 0.0) == []
    assert (other.state, last.state) == (KeyWaiterState.CHOSEN, KeyWaiterState.WAITING)


def test_a_session_that_is_not_known_ends_with_nothing() -> None:
    store = store_of()
    put(store)
    wait_for_key(store, b"b", 1)
    assert store.end_session(9, 0.0) == []
    assert store.key_waiters.claims_of(1) != []


def test_a_feature_whose_writer_died_is_taken_back_with_its_key() -> None:
    store = store_of()
    slot = put(store, readers={"tp0", "tp1"}, ttl_s=1.0)
    assert store.fail_write(slot, 5.0) == [
        Evicted(b"a", UNIT, 5.0, "writer lost"),
        SlotRetired(slot),
    ]
    assert (slot.due_s, slot.owed_by) == (5.0, 0)
    assert b"a" not in store.directory
    assert books(store) == (0, 0, 0)
    assert (store.owing, store.expire(100.0), store.evicted) == ({}, [], 1)
    assert recycle(store, 5.0) == [recycled(slot)]


def test_a_feature_whose_writer_died_and_that_has_no_key_is_taken_back() -> None:
    store = store_of()
    slot = put(store, None, readers=2)
    assert store.fail_write(slot, 5.0) == [SlotRetired(slot)]
    assert store.evicted == 0
    assert pay(store, slot) == []
    assert recycle(store, 5.0) == [recycled(slot)]


def test_grants_of_a_feature_whose_writer_died_keep_its_bytes() -> None:
    store = store_of()
    waiter = wait_for_key(store, can_make=False)
    slot = reserve(store)
    store.publish(slot, 0.0)
    look(store)
    store.fail_write(slot, 1.0)
    assert store.due(100.0) == []
    assert store.pay_grant(slot, 1.0) == []
    assert store.due(100.0) == []
    assert store.cancel_wait(waiter, 1.0) == []
    assert store.due(1.0) == [slot]


def test_a_key_whose_writer_died_is_made_by_the_next_who_asks() -> None:
    store = store_of()
    store.fail_write(put(store), 0.0)
    assert wait_for_key(store).state is KeyWaiterState.CHOSEN


# --- slots are like new -------------------------------------------------------------------------


def test_the_next_tenant_of_a_slot_has_none_of_the_last_ones_keys_pins_or_uses() -> None:
    store = store_of(attrs.evolve(FIXED, slots=1))
    slot = put(store)
    store.pin(b"a", 1)
    use(store, b"a", 3.0)
    store.evict(b"a", 3.0)
    recycle(store, 9.0)
    assert put(store, None, readers=1) is slot
    assert (slot.key, slot.wanted_key, slot.grants, slot.idle) == (None, None, 0, False)
    assert room_for(store) == []
    assert pay(store, slot) == [SlotRetired(slot)]


# --- growth and the queue beside keys -----------------------------------------------------------


def test_the_head_of_the_queue_still_has_the_slab_grow() -> None:
    store = store_of(ELASTIC)
    put(store, nbytes=SEGMENT)
    waiter, effects = store.wait(Request(UNIT, 1, None), 0.0, None)
    assert effects == [Grow(2 * SEGMENT)]
    assert room_for(store) == []
    assert store.grown(2 * SEGMENT, 0.0) == [Woken(waiter)]


def test_a_keyed_request_that_waited_is_kept_when_it_is_published() -> None:
    store = store_of()
    blocker = put(store, None, nbytes=CAPACITY, readers=1)
    waiter, _ = store.wait(Request(UNIT, 0, None, b"a"), 0.0, None)
    pay(store, blocker)
    recycle(store)
    slot = store.accept(waiter)
    assert store.publish(slot, 0.0) == []
    assert look(store) is slot


def test_counters() -> None:
    store = store_of()
    put(store, b"a")
    put(store, b"b")
    use(store, b"a")
    use(store, b"a")
    store.lookup(b"c", 0.0)
    room_for(store)
    store.evict(b"a", 0.0)
    assert counters(store) == (2, 1, 2)
    assert store.puts == 2


def test_a_put_is_undone_with_its_key_while_that_is_its_own() -> None:
    store = store_of()
    old, new = put(store, readers=1), put(store, readers=2)
    assert [type(each) for each in store.undo(old.index, old.generation, 0.0)] == [SlotRetired]
    assert store.directory.find(b"a") is new
    lease = look(store)
    assert [type(each) for each in store.undo(new.index, new.generation, 0.0)] == [Evicted]
    assert (b"a" in store.directory, new.reads_left, new.grants) == (False, 0, 1)
    assert [type(each) for each in store.pay_grant(lease, 0.0)] == [SlotRetired]
    with pytest.raises(StaleRef):
        store.undo(new.index, new.generation, 0.0)
