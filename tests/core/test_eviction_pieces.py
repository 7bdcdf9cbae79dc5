"""Victims that are found and evicted in pieces, between which the pool changes."""

import random
from collections.abc import Callable
from contextlib import closing

import attrs
import pytest

from featcache.core.allocator import ALIGNMENT_BYTES
from featcache.core.effects import Evicted, Limits
from featcache.core.keyed_store import STEPS_A_VICTIM, KeyedStore
from featcache.core.put_queue import Batch, Request
from featcache.core.recency import Lru, Sieve
from featcache.core.recency.lazy_heap import LazyHeap
from featcache.core.slots import Slot

UNIT = ALIGNMENT_BYTES
MANY = 600
FULL = Limits(
    capacity_bytes=MANY * UNIT,
    segment_bytes=MANY * UNIT,
    initial_bytes=MANY * UNIT,
    slots=2 * MANY,
    waiters=4,
    grace_s=0.5,
    idle_s=10.0,
    grow_retry_s=2.0,
)
Held = Callable[[Slot], bool]


def by_nobody(_: Slot) -> bool:
    return False


class Pool:
    """A store full of features of one unit, and what was evicted of it."""

    def __init__(self, limits: Limits = FULL, uses: int | None = None) -> None:
        """`uses` is a seed: of it, features are used in some order."""
        self.store = KeyedStore(limits)
        self.store.allocator.grow(limits.initial_bytes)
        self.slots: list[Slot] = []
        for number in range(MANY):
            self.slots.append(self.put(b"%d" % number))
        if uses is not None:
            order = list(range(MANY))
            random.Random(uses).shuffle(order)
            for number in order:
                self.use(number)

    def put(self, key: bytes, units: int = 1) -> Slot:
        slot = self.store.reserve(Request(units * UNIT, 0, None, key), 0.0)
        assert slot is not None
        self.store.publish(slot, 0.0)
        return slot

    def use(self, number: int) -> None:
        slot = self.store.lookup(b"%d" % number, 0.0)
        assert slot is not None
        self.store.pay_grant(slot, 0.0)

    def evict(self, key: bytes) -> None:
        self.store.evict(key, 0.0)
        self.store.recycle(self.store.due(10.0), 10.0)

    def piece(self, request: Request, most: int | None, held: Held = by_nobody) -> list[bytes]:
        """Do a piece of the eviction for a request; return the keys that went."""
        before = self.store.evicting.steps
        effects = self.store.evict_for(request, held, 0.0, most)
        looked_at = self.store.evicting.steps - before
        assert most is None or looked_at <= most * STEPS_A_VICTIM + 1
        self.store.recycle(self.store.due(0.0), 0.0)
        gone = [effect.key for effect in effects if isinstance(effect, Evicted)]
        assert most is None or len(gone) <= most
        return gone

    def make_room(
        self, request: Request, most: int | None, held: Held = by_nobody
    ) -> tuple[list[bytes], int]:
        """Evict until the request fits or nothing more goes; return the keys, and the pieces it took."""
        gone: list[bytes] = []
        for pieces in range(1, 10_000):
            went = self.piece(request, most, held)
            gone += went
            if not went and not self.store.evicting.in_progress:
                return gone, pieces
            if self.fits(request):
                return gone, pieces
        raise AssertionError("it never ends")

    def fits(self, request: Request) -> bool:
        slot = self.store.reserve(request, 0.0)
        if slot is None:
            return False
        self.store.free_reserved(slot, 0.0)
        return True


def room(units: int) -> Request:
    return Request(units * UNIT, 1, None)


@pytest.mark.parametrize("units", [1, 2, 40, 300, MANY])
@pytest.mark.parametrize("most", [1, 7, 64])
@pytest.mark.parametrize("seed", range(3))
def test_in_pieces_the_same_go_as_at_once(units: int, most: int, seed: int) -> None:
    at_once, _ = Pool(uses=seed).make_room(room(units), None)
    in_pieces, pieces = Pool(uses=seed).make_room(room(units), most)
    assert len(at_once) >= units
    assert set(in_pieces) == set(at_once)
    assert pieces >= units // most


@pytest.mark.parametrize("seed", range(3))
def test_in_pieces_the_best_of_all_windows_is_found_too(seed: int) -> None:
    """Pins stand in the way of every window around the coldest few."""

    def pinned(most: int | None) -> tuple[set[bytes], int]:
        pool = Pool(uses=seed)
        with closing(pool.store.recency.by_rank(64, by_nobody)) as ranked:
            coldest = [slot for _, slot in ranked]
        for slot in coldest:
            for near in (slot.index - 1, slot.index + 1):
                key = pool.slots[near % MANY].key
                if key is not None and pool.slots[near % MANY] not in coldest:
                    pool.store.pin(key, 1)
        gone, pieces = pool.make_room(room(4), most)
        assert pool.fits(room(4))
        return set(gone), pieces

    at_once, pieces = pinned(None)
    in_pieces, more_pieces = pinned(4)
    assert in_pieces == at_once
    assert more_pieces > pieces


def test_what_is_used_meanwhile_is_spared_where_others_make_room() -> None:
    pool, request = Pool(), room(200)
    assert pool.piece(request, 4) == []
    assert pool.store.evicting.is_searching
    for number in range(300):  # the search has begun around the first of these
        pool.use(number)
    gone, _ = pool.make_room(request, 4)
    used = {b"%d" % number for number in range(300)}
    assert len(used & set(gone)) < 100
    assert pool.fits(request)


@pytest.mark.parametrize("most", [2, 16])
@pytest.mark.parametrize("seed", range(4))
def test_while_others_evict_and_pin_and_put_it_comes_to_room(most: int, seed: int) -> None:
    pool, request, rng = Pool(uses=seed), room(250), random.Random(seed)
    gone: list[bytes] = []
    for step in range(3000):
        gone += pool.piece(request, most)
        if pool.fits(request):
            break
        number = rng.randrange(MANY)
        if rng.random() < 0.3:
            pool.evict(b"%d" % number)
        if step % 5 == 0 and pool.store.allocator.free_bytes >= UNIT:
            pool.put(b"new %d" % step)
    else:
        pytest.fail("it never fits")
    assert len(gone) == len(set(gone))


def test_a_victim_that_is_held_by_its_turn_stays_and_others_go() -> None:
    pool, request = Pool(), room(100)
    held: set[Slot] = set()
    while not (gone := pool.piece(request, 10)):
        assert pool.store.evicting.is_searching
    left = [slot for slot in pool.slots if slot.key is not None and slot.key not in gone]
    held |= set(left[20:40])
    more, _ = pool.make_room(request, 10, held.__contains__)
    assert not {slot.key for slot in held} & set(more)
    assert pool.fits(request)


def test_another_request_begins_anew() -> None:
    pool, first, second = Pool(), room(300), room(2)
    assert pool.piece(first, 2) == []
    gone, _ = pool.make_room(second, None)
    assert len(gone) == 2
    assert not pool.store.evicting.in_progress
    gone, _ = pool.make_room(first, 8)
    assert pool.fits(first)


def test_a_search_is_over_where_there_is_no_way_to_room() -> None:
    pool, request = Pool(), room(300)
    assert pool.piece(request, 1) == []
    assert pool.store.evicting.in_progress
    for number in range(MANY):
        pool.store.pin(b"%d" % number, 1)
    assert pool.piece(request, 1) == []
    assert not pool.store.evicting.in_progress


@pytest.mark.parametrize("policy", ["lru", "sieve"])
def test_many_that_are_held_are_passed_in_pieces(policy: str) -> None:
    """All but one stand before the only one that can go."""
    pool = Pool(attrs.evolve(FULL, eviction=policy))
    held = set(pool.slots[:-1])
    assert pool.piece(room(1), 1_000, held.__contains__) == []
    assert pool.store.evicting.is_searching
    gone, pieces = pool.make_room(room(1), 1_000, held.__contains__)
    assert gone == [b"%d" % (MANY - 1)]
    assert 1 < pieces < 5


@pytest.mark.parametrize("policy", [Lru, Sieve])
def test_very_many_that_were_used_are_passed_in_pieces(policy: type[LazyHeap]) -> None:
    slots, recency = [Slot(index) for index in range(3000)], policy()
    for slot in slots:
        slot.idle = True
        recency.enter(slot, 0.0)
        recency.add(slot)
    for slot in slots[:-1]:
        recency.touch(slot, 0.0)
    searches = 1
    while (found := recency.coldest(by_nobody, 256)) is None:
        assert recency.unfinished
        searches += 1
    assert found is slots[-1]
    assert 3000 // 256 <= searches <= 3000 // 256 + 2
    assert recency.coldest(by_nobody) is slots[-1]


def test_those_that_were_held_go_when_they_are_not() -> None:
    pool, held = Pool(), set[Slot]()
    held |= set(pool.slots)
    for _ in range(5):
        assert pool.piece(room(1), 8, held.__contains__) == []
    assert not pool.store.evicting.in_progress
    assert pool.store.evict_for(room(1), held.__contains__, 0.0) == []
    held.clear()
    gone, _ = pool.make_room(room(MANY), None, held.__contains__)
    assert len(gone) == MANY


@pytest.mark.parametrize("most", [3, 50, None])
def test_a_batch_gets_its_room_in_pieces(most: int | None) -> None:
    pool = Pool()
    members = tuple(Request(units * UNIT, 1, None) for units in (1, 30, 200, 1))
    batch = Batch(232 * UNIT, 1, None, None, 0, members)
    for _ in range(10_000):
        went = pool.piece(batch, most)
        if pool.store.reserve_batch(batch, 0.0) is not None:
            break
        assert went or pool.store.evicting.in_progress
    else:
        pytest.fail("it never fits")


def test_a_search_ends_with_its_request_where_a_batch_is_next_that_gets_no_room() -> None:
    pool = Pool()
    assert pool.piece(room(300), 1) == []  # its put is cancelled meanwhile
    assert pool.store.evicting.is_searching
    for number in range(MANY):
        pool.store.pin(b"%d" % number, 1)
    assert pool.piece(pool.store.batch([room(1), room(2)]), 4) == []
    assert not pool.store.evicting.in_progress


def test_the_search_for_a_member_ends_where_there_is_no_way_to_room_for_its_batch() -> None:
    pool = Pool()
    for number in range(0, MANY, 2):
        pool.evict(b"%d" % number)
    batch = pool.store.batch([room(1), room(200)])
    assert pool.piece(batch, 1) == []
    assert pool.store.evicting.is_searching
    for number in range(1, MANY, 2):
        pool.store.pin(b"%d" % number, 1)
    for _ in range(100):
        assert pool.store.reserve(room(1), 0.0) is not None
    assert pool.piece(batch, 1) == []
    assert not pool.store.evicting.in_progress
