"""Uses that sessions tell by ticks alone, and what every policy makes of them.

The words here are as the sessions' pages: each holds the tick of the slot's last hit, whoever had the slot
then, and nobody ever clears one.
"""

import random
from collections.abc import Iterator, Sequence

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from featcache.core.allocator import ALIGNMENT_BYTES
from featcache.core.effects import Limits
from featcache.core.keyed_store import KeyedStore
from featcache.core.put_queue import Request
from featcache.core.recency import POLICIES, Lru, Sieve
from featcache.core.recency.lazy_heap import LOOKS, LOOKS_SHARE, LazyHeap
from featcache.core.recency.policy import STEP
from featcache.core.recency.tick_times import APART_S, EACH, LEVELS, TickTimes
from featcache.core.slots import Slot, SlotState

UNIT = ALIGNMENT_BYTES
HIGHEST = (1 << 64) - 1
both = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def by_nobody(_: Slot) -> bool:
    return False


class Words:
    """The sessions' words, and how often they were looked at."""

    def __init__(self, slots: int) -> None:
        self.words = [0] * slots
        self.looks = self.surveys = 0

    def look(self, index: int) -> int:
        self.looks += 1
        return self.words[index]

    def look_at_all(self, high: int) -> Sequence[int]:
        self.surveys += 1
        return self.words[:high]


class Cache(Words):
    """A policy over a few slots of one size, and the sessions' words."""

    def __init__(self, policy: type[LazyHeap], slots: int, *, at_once: bool = True) -> None:
        super().__init__(slots)
        self.recency = policy(self.look, self.look_at_all if at_once else None)
        self.free = [Slot(index) for index in reversed(range(slots))]
        self.kept: dict[object, Slot] = {}

    def enter(self, name: object, now_s: float = 0.0) -> Slot:
        slot = self.kept[name] = self.free.pop()
        slot.key, slot.idle = b"%r" % name, True
        self.recency.enter(slot, now_s)
        if not slot.listed:
            self.recency.add(slot)
        return slot

    def hit(self, name: object, more: int = 0) -> None:
        """As a session does: it copies the tick, and may add a little."""
        self.words[self.kept[name].index] = self.recency.tick + more

    def touch(self, name: object, now_s: float = 0.0) -> None:
        self.recency.touch(self.kept[name], now_s)

    def evict(self) -> object:
        slot = self.recency.coldest(by_nobody)
        assert slot is not None
        assert self.recency.coldest(by_nobody) is slot, "to look moves nothing"
        name = next(name for name, one in self.kept.items() if one is slot)
        self.drop(name)
        return name

    def drop(self, name: object) -> None:
        slot = self.kept.pop(name)
        slot.idle, slot.key = False, None
        self.free.append(slot)

    def drain(self) -> Iterator[object]:
        while self.kept:
            yield self.evict()


# --- least recently used --------------------------------------------------------------------------


def test_a_hit_by_a_session_is_a_use() -> None:
    cache = Cache(Lru, 4)
    for name in "abc":
        cache.enter(name)
    cache.hit("a")
    cache.enter("d")
    assert list(cache.drain()) == ["b", "c", "a", "d"]


def test_a_hit_comes_after_what_entered_in_its_tick_and_before_the_next() -> None:
    cache = Cache(Lru, 4)
    for name in "abc":
        cache.enter(name)
    cache.hit("a")  # nothing was entered or touched since c
    cache.touch("b")
    assert list(cache.drain()) == ["c", "a", "b"]


def test_hits_within_a_tick_are_in_the_order_of_what_sessions_add() -> None:
    cache = Cache(Lru, 4)
    for name in "abcd":
        cache.enter(name)
    for more, name in ((3, "c"), (1, "a"), (STEP - 1, "b")):
        cache.hit(name, more)
    cache.touch("d")
    assert list(cache.drain()) == ["a", "c", "b", "d"]


Step = tuple[str, int]
steps = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "hit", "hit", "touch", "drop"]), st.integers(0, 11)),
    max_size=120,
)


@given(steps=steps, at_once=st.booleans())
def test_lru_is_a_list_in_order_of_use_up_to_ties(steps: list[Step], *, at_once: bool) -> None:
    """Ties are hits by sessions between two steps that the owner counts."""
    cache, last = Cache(Lru, 5, at_once=at_once), dict[object, float]()
    now = 0  # the owner's steps

    def coldest_goes() -> None:
        goes = cache.evict()
        assert last[goes] == min(last.values())
        del last[goes]

    for what, name in steps:
        if what == "ask" and name not in last:
            if not cache.free:
                coldest_goes()
            cache.enter(name)
            now += 1
            last[name] = now
        elif name not in last:
            continue
        elif what == "touch":
            cache.touch(name)
            now += 1
            last[name] = now
        elif what == "drop":
            cache.drop(name)
            del last[name]
        else:
            cache.hit(name)
            last[name] = now + 0.5
    while last:
        coldest_goes()


# --- SIEVE ----------------------------------------------------------------------------------------


class ByHand:
    """SIEVE as its authors write it: a list, the newest first, a bit each, and a hand."""

    def __init__(self) -> None:
        self.order: list[object] = []
        self.visited: set[object] = set()
        self.hand: object | None = None

    def evict(self) -> object:
        at = self.order.index(self.hand) if self.hand is not None else len(self.order) - 1
        while self.order[at] in self.visited:
            self.visited.discard(self.order[at])
            at = (at or len(self.order)) - 1
        self.hand = self.order[at - 1] if at else None
        return self.order.pop(at)

    def enter(self, name: object) -> None:
        self.visited.discard(name)
        self.order.insert(0, name)

    def drop(self, name: object) -> None:
        at = self.order.index(name)
        if self.hand == name:
            self.hand = self.order[at - 1] if at else None
        del self.order[at]


ONE_SLOT_AGAIN = [("ask", name) for name in (0, 2, 1, 1, 0, 0, 1, 2)]
"""1 has the slot of 0, behind the hand, and is not met where 0 was."""
LATE_ENTRY = [*(("ask", name) for name in (0, 1, 2, 0, 3)), ("drop", 0), ("ask", 4), ("ask", 5)]
"""4 has the slot of 0, which the hand had passed, and is met at the end of this round, not in the next."""


@example(steps=ONE_SLOT_AGAIN, capacity=2)
@example(steps=LATE_ENTRY, capacity=3)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["ask", "ask", "hit", "touch", "drop"]), st.integers(0, 11)),
        max_size=150,
    ),
    capacity=st.integers(1, 6),
)
def test_sieve_is_the_list_and_the_hand(steps: list[Step], capacity: int) -> None:
    cache, by_hand = Cache(Sieve, capacity), ByHand()
    for what, name in steps:
        if what == "drop":  # the newest would take the hand's place with it
            if name in by_hand.order[1:]:
                cache.drop(name)
                by_hand.drop(name)
        elif name in cache.kept:
            cache.touch(name) if what == "touch" else cache.hit(name)
            by_hand.visited.add(name)
        elif what == "ask":
            if not cache.free:
                assert cache.evict() == by_hand.evict()
            cache.enter(name)
            by_hand.enter(name)
    assert set(cache.kept) == set(by_hand.order)
    assert list(cache.drain()) == [by_hand.evict() for _ in list(by_hand.order)]


def test_sieve_keeps_what_is_used_from_a_scan_where_lru_does_not() -> None:
    found = {}
    for name, policy in POLICIES.items():
        cache = Cache(policy, 8)
        for hot in range(4):
            cache.enter(hot)
            cache.hit(hot)
        for cold in range(100, 110):
            if not cache.free:
                cache.evict()
            cache.enter(cold)
        found[name] = {hot for hot in range(4) if hot in cache.kept}
    assert found == {"lru": set(), "sieve": {0, 1, 2, 3}}


def test_a_visit_counts_once() -> None:
    cache = Cache(Sieve, 3)
    for name in "abc":
        cache.enter(name)
    cache.hit("a")
    cache.touch("a")
    assert cache.evict() == "b"  # the hand passed a
    assert list(cache.drain()) == ["c", "a"]


def test_behind_the_newest_the_hand_begins_with_the_oldest() -> None:
    cache = Cache(Sieve, 3)
    for name in "abc":
        cache.enter(name)
    cache.hit("a")
    cache.hit("b")
    assert cache.evict() == "c"
    cache.enter("d")
    assert list(cache.drain()) == ["a", "b", "d"]


def test_what_was_used_while_the_hand_went_round_without_it_has_the_next_round() -> None:
    cache = Cache(Sieve, 4)
    for name in "abc":
        cache.enter(name)
    a = cache.kept["a"]
    a.idle = False
    cache.hit("b")
    cache.hit("c")
    assert cache.evict() == "b"
    cache.enter("d")
    cache.touch("a")
    a.idle = True
    cache.recency.add(a)
    assert list(cache.drain()) == ["c", "d", "a"]


def test_a_visit_after_the_hand_passed_is_worth_another_round() -> None:
    cache = Cache(Sieve, 3)
    a = cache.enter("a")
    cache.enter("b")
    cache.hit("a")
    assert cache.evict() == "b"
    passed = cache.recency.rank(a)
    cache.enter("c")
    cache.hit("a")
    assert cache.recency.rank(a) > passed
    assert list(cache.drain()) == ["c", "a"]


def test_what_was_not_evictable_when_the_hand_passed_keeps_its_place() -> None:
    cache = Cache(Sieve, 3)
    for name in "abc":
        cache.enter(name)
    a = cache.kept["a"]
    a.idle = False  # it is being read
    assert cache.evict() == "b"
    assert not a.listed
    a.idle = True
    cache.recency.add(a)
    assert list(cache.drain()) == ["a", "c"]


def test_the_hand_does_not_go_back_with_what_it_had_passed_and_takes_now() -> None:
    cache = Cache(Sieve, 4)
    for name in "abcd":
        cache.enter(name)
    a = cache.kept["a"]
    a.idle = False  # it is being read
    for name in "bcd":
        cache.hit(name)
    assert cache.evict() == "b", "in its second round"
    cache.enter("e")
    a.idle = True
    cache.recency.add(a)
    assert cache.evict() == "a"
    cache.enter("f")
    assert list(cache.drain()) == ["c", "d", "e", "f"]


# --- what sessions wrote of others, or lie --------------------------------------------------------


@both
def test_the_uses_of_an_earlier_tenant_do_not_help_the_next(policy: type[LazyHeap]) -> None:
    cache = Cache(policy, 2)
    slot = cache.enter("old")
    cache.enter("other")
    cache.hit("old")  # at the last moment
    cache.drop("old")
    assert cache.enter("next") is slot
    cache.drop("other")
    cache.enter("newer")
    assert cache.recency.rank(slot) < cache.recency.rank(cache.kept["newer"])
    assert list(cache.drain()) == ["next", "newer"]


@both
@given(word=st.integers(0, HIGHEST))
def test_whatever_a_word_says_it_is_a_use_no_later_than_now(
    policy: type[LazyHeap], word: int
) -> None:
    cache = Cache(policy, 2)
    for name in "ab":
        cache.enter(name, 1.0)
    a, b = cache.kept["a"], cache.kept["b"]
    entered, cache.words[a.index] = a.tick, word
    assert cache.recency.coldest(by_nobody) in {a, b}
    assert entered <= a.tick < cache.recency.tick + STEP
    assert cache.recency.last_used_s(a) == 1.0
    cache.words[a.index] = 0
    cache.touch("b")
    assert b.tick > a.tick, "the lie ended: a later use is later"


# --- what it costs --------------------------------------------------------------------------------


@both
def test_a_search_looks_at_few_one_by_one_or_at_all_at_once(policy: type[LazyHeap]) -> None:
    count = 2000
    cache, random_ = Cache(policy, count), random.Random(1)
    for name in range(count):
        cache.enter(name)
    most = LOOKS + count // LOOKS_SHARE + 1
    for _ in range(5):
        for hot in random_.sample(list(cache.kept), len(cache.kept) - 1):
            cache.hit(hot)
            if random_.random() < 0.5:
                cache.recency.tick += STEP
        cache.looks = cache.surveys = 0
        assert cache.recency.coldest(by_nobody) is not None
        assert cache.looks <= most
        assert cache.surveys <= 1


@both
def test_a_hit_is_paid_for_once(policy: type[LazyHeap]) -> None:
    """Evictions look as often as there were hits and evictions between them, and a little more."""
    cache, random_ = Cache(policy, 500), random.Random(2)
    for name in range(500):
        cache.enter(name)
    hits = evictions = 0
    for name in range(500, 3000):
        for one in random_.sample(list(cache.kept), 3):
            cache.hit(one)
            hits += 1
        coldest = cache.recency.coldest(by_nobody)
        assert coldest is not None
        cache.drop(next(name for name, slot in cache.kept.items() if slot is coldest))
        evictions += 1
        cache.enter(name)
    assert cache.looks <= hits + evictions


def test_a_policy_without_a_look_at_all_looks_at_each() -> None:
    cache = Cache(Lru, 300, at_once=False)
    for name in range(300):
        cache.enter(name)
    for name in range(1, 300):
        cache.hit(name)
    assert cache.recency.coldest(by_nobody) is cache.kept[0]
    cache.drop(0)
    assert cache.evict() == 1


def test_many_are_looked_at_at_once_and_anew_in_each_search() -> None:
    cache = Cache(Lru, 100)
    for name in range(100):
        cache.enter(name)
    for first in (0, 1):
        cache.looks = cache.surveys = 0
        few = cache.recency.coldest_few(20, by_nobody)
        assert few[0] is cache.kept[first]
        assert (cache.looks, cache.surveys) == (2 + first, 1)
        cache.hit(first)


@both
def test_a_slot_that_came_since_all_were_looked_at_is_looked_at(policy: type[LazyHeap]) -> None:
    cache = Cache(policy, 40)
    for name in range(30):
        cache.enter(name)
    cache.recency.coldest_few(20, by_nobody)
    new = cache.enter("new")
    before = cache.recency.rank(new)
    cache.hit("new")
    assert cache.recency.rank(new) > before


# --- in the store ---------------------------------------------------------------------------------


LIMITS = Limits(
    capacity_bytes=1024 * UNIT,
    segment_bytes=1024 * UNIT,
    initial_bytes=1024 * UNIT,
    slots=1024,
    waiters=4,
    grace_s=0.0,
    idle_s=10.0,
)


class KeyedCache(Words):
    """A store, and the sessions' words."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        super().__init__(limits.slots)
        self.store = KeyedStore(limits, self.look, self.look_at_all)
        self.store.allocator.grow(limits.initial_bytes)

    def put(self, key: bytes, units: int = 1) -> Slot:
        slot = self.store.reserve(Request(units * UNIT, 0, None, key), 0.0)
        assert slot is not None
        self.store.publish(slot, 0.0)
        return slot

    def hit(self, slot: Slot) -> None:
        self.words[slot.index] = self.store.recency.tick

    def evict_for(self, units: int) -> list[bytes]:
        effects = self.store.evict_for(Request(units * UNIT, 0, None), by_nobody, 1.0)
        return [key for effect in effects if (key := getattr(effect, "key", None)) is not None]


def test_the_setting_names_the_policy() -> None:
    for name, policy in POLICIES.items():
        store = KeyedStore(attrs.evolve(LIMITS, eviction=name))
        assert type(store.recency) is policy


@both
def test_a_window_counts_what_sessions_used(policy: type[LazyHeap]) -> None:
    name = next(name for name, one in POLICIES.items() if one is policy)
    cache = KeyedCache(attrs.evolve(LIMITS, slots=9, eviction=name))
    slots = [cache.put(b"%d" % n, 128) for n in range(8)]
    for n in (1, 2, 5):
        cache.hit(slots[n])
    assert sorted(cache.evict_for(256)) == [b"3", b"4"]


@both
def test_a_window_that_needs_many_neighbours_looks_at_them_at_once(
    policy: type[LazyHeap],
) -> None:
    name = next(name for name, one in POLICIES.items() if one is policy)
    cache = KeyedCache(attrs.evolve(LIMITS, slots=1025, eviction=name))
    slots = [cache.put(b"%d" % n) for n in range(1024)]
    for n, slot in enumerate(slots):
        if n % 3:
            cache.hit(slot)
    most = LOOKS + 1024 // LOOKS_SHARE + 1
    cache.looks = cache.surveys = 0
    going = cache.evict_for(64)
    assert len(going) == 64
    assert cache.looks - len(going) <= 2 * most, "beside one for each, when it was used last"
    assert cache.surveys <= 3


# --- when it was used -----------------------------------------------------------------------------


@both
def test_a_use_by_a_session_is_timed(policy: type[LazyHeap]) -> None:
    cache = Cache(policy, 2)
    cache.enter("a", 10.0)
    assert cache.recency.last_used_s(cache.kept["a"]) == 10.0
    for tenth in range(101, 300):
        cache.recency.pass_time(tenth / 10)
        if tenth == 250:
            cache.hit("a")
    assert cache.recency.last_used_s(cache.kept["a"]) == 25.0
    cache.touch("a", 29.97)
    assert cache.recency.last_used_s(cache.kept["a"]) == 29.97


@both
def test_a_put_is_a_time_too(policy: type[LazyHeap]) -> None:
    cache = Cache(policy, 3)
    cache.enter("a", 1.0)
    cache.enter("b", 2.0)
    cache.hit("a")
    cache.enter("c", 3.0)
    assert cache.recency.last_used_s(cache.kept["a"]) == 2.0


@both
def test_time_passes_without_a_use_and_not_too_often(policy: type[LazyHeap]) -> None:
    recency = policy()
    recency.pass_time(1.0)
    before = recency.tick
    recency.pass_time(1.0 + APART_S / 2)
    assert recency.tick == before
    recency.pass_time(1.0 + APART_S)
    assert recency.tick > before


def test_times_are_bounded_and_right_to_a_share_of_the_age() -> None:
    times, ticks = TickTimes(), 200 * EACH
    for tick in range(ticks):
        times.note(tick, tick * APART_S)
    assert len(times) <= 2 * EACH * LEVELS
    for back in range(1, EACH):
        assert times.of(ticks - back) == pytest.approx((ticks - back) * APART_S)
    for tick in range(0, ticks, 997):
        age_s = (ticks - tick) * APART_S
        assert 0 <= tick * APART_S - times.of(tick) <= APART_S + age_s / EACH
    assert times.of(0) == 0.0


def test_the_oldest_times_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.core.recency.tick_times.EACH", 4)
    monkeypatch.setattr("featcache.core.recency.tick_times.LEVELS", 3)
    times, longest = TickTimes(), 0
    for tick in range(5000):
        times.note(tick, tick * APART_S)
        longest = max(longest, len(times))
    assert longest <= 2 * 4 * 3
    assert times.of(10) == float("-inf")
    assert times.of(4990) == pytest.approx(4990 * APART_S, abs=4 * APART_S)


def test_a_tick_before_all_that_are_remembered_was_at_no_known_time() -> None:
    times = TickTimes()
    assert times.of(5) == float("-inf")
    times.note(4, 1.0)
    times.note(8, 2.0)
    assert [times.of(tick) for tick in (3, 4, 7, 8, 100)] == [float("-inf"), 1.0, 1.0, 2.0, 2.0]


def test_a_session_that_hits_what_is_not_evictable_changes_nothing() -> None:
    cache = KeyedCache()
    slot = cache.put(b"a")
    assert cache.store.lookup(b"a", 0.0) is slot
    cache.hit(slot)
    assert slot.state is SlotState.PUBLISHED
    assert cache.store.recency.coldest(by_nobody) is None
    cache.store.pay_grant(slot, 0.0)
    assert cache.store.recency.coldest(by_nobody) is slot
