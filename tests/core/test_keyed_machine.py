"""KeyedStore against a naive model with an ideal LRU, under whatever order hypothesis comes upon.

test_store_machine.py has what concerns room alone: sizes, the queue's order, growth, shrinking.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from core.model import TTLS, UNIT, Feature, RoomMachine, extents
from featcache.core.effects import (
    ClaimPassed,
    Effect,
    Evicted,
    Expired,
    Found,
    Grow,
    Limits,
)
from featcache.core.key_queue import KeyWaiter, KeyWaiterState
from featcache.core.keyed_store import KeyedStore
from featcache.core.put_queue import Request
from featcache.core.slots import Slot, SlotState
from featcache.errors import KeyNotFound, PoolFull, StaleRef

keys = st.sampled_from([b"k0", b"k1", b"k2", b"k3"])
sessions = st.integers(1, 3)
readers = st.one_of(st.sampled_from([0, 0, 1, 2]), st.frozensets(st.sampled_from("ab"), min_size=1))
sharing = st.one_of(st.integers(1, 2), st.frozensets(st.sampled_from("ab"), min_size=1))
sizes = st.integers(1, 5).map(lambda units: units * UNIT)
ttls = st.sampled_from([None, *TTLS])
keyed = st.builds(Request, sizes, readers, ttls, keys)
unkeyed = st.builds(Request, sizes, st.integers(1, 2), ttls)
requests = st.one_of(keyed, keyed, keyed, unkeyed)


Piece = tuple[int, Feature | None]
"""Bytes of the slab, and whose they are."""


def is_over(feature: Feature) -> bool:
    """Whether nothing keeps it any more."""
    published = feature.state is SlotState.PUBLISHED
    return published and feature.key is None and not feature.grants and not feature.reads_left


class KeyedMachine(RoomMachine):
    store: KeyedStore
    NAMES = {1: "a", 2: "b", 3: None}  # noqa: RUF012 - a constant

    def __init__(self) -> None:
        super().__init__()
        self.order: list[Feature] = []  # what is kept, the longest unused first
        self.pins: dict[bytes, Counter[int]] = {}
        self.grants: list[Feature] = []  # one for each grant that is out and was taken
        self.seeking: list[KeyWaiter] = []  # in order of arrival
        self.found: list[tuple[KeyWaiter, Feature]] = []  # told, and not taken yet
        self.chosen: list[KeyWaiter] = []
        self.making: list[KeyWaiter] = []  # taken, and its claim not given back
        self.past: list[KeyWaiter] = []
        self.claims: dict[bytes, KeyWaiter] = {}
        self.hits = self.misses = self.evicted = 0

    @initialize(
        capacity=st.integers(4, 20),
        segment=st.integers(2, 6),
        initial=st.sampled_from([20, 1, 8]),
        slots=st.sampled_from([8, 5, 2]),
        key_waiters=st.sampled_from([8, 2]),
        evict_first=st.booleans(),
        marks=st.sampled_from([(None, 1.0), (0.75, 0.5), (0.5, 0.0)]),
        compact=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def make(
        self,
        capacity: int,
        segment: int,
        initial: int,
        slots: int,
        key_waiters: int,
        evict_first: bool,
        marks: tuple[float | None, float],
        compact: float,
    ) -> None:
        segment = min(segment, capacity)
        limits = Limits(
            capacity_bytes=capacity * UNIT,
            segment_bytes=segment * UNIT,
            initial_bytes=min(-(-initial // segment) * segment, capacity) * UNIT,
            slots=slots,
            waiters=key_waiters,
            grace_s=0.5,
            idle_s=2.0,
            evict_first=evict_first,
            evict_above=marks[0],
            evict_to=marks[1],
            compact=compact,
        )
        self.used_words = [0] * slots
        """By slot: the tick that a session wrote at its last hit. Nobody clears them."""
        words = self.used_words
        self.begin(KeyedStore(limits, words.__getitem__, lambda high: words[:high]))

    # --- the model ------------------------------------------------------------------------------

    def kept(self, key: bytes) -> Feature | None:
        return next((feature for feature in self.order if feature.key == key), None)

    def idle(self) -> list[Feature]:
        """What could be evicted, the longest unused first: an ideal LRU."""
        return [
            feature
            for feature in self.order
            if not feature.grants and not feature.reads_left and feature.key not in self.pins
        ]

    def use(self, feature: Feature) -> None:
        feature.used_s = self.now
        self.order.remove(feature)
        self.order.append(feature)

    def drop(self, feature: Feature, *, with_pins: bool = True) -> None:
        assert feature.key is not None
        if with_pins:
            self.pins.pop(feature.key, None)
        self.order.remove(feature)
        feature.key = None

    def settle(self, feature: Feature, grace_s: float = 0.0) -> list[Effect]:
        """Retire a feature that nothing keeps; return what is then said."""
        if not feature.reads_left:
            self.owes_nothing(feature)
        return self.retire(feature, grace_s) if is_over(feature) else []

    def evict_one(self, feature: Feature, cause: str, grace_s: float = 0.0) -> list[Effect]:
        key = feature.key
        assert key is not None
        said = Evicted(key, feature.nbytes, self.now - feature.used_s, cause)
        self.drop(feature)
        self.evicted += 1
        return [said, *self.settle(feature, grace_s)]

    def pay_one_grant(self, feature: Feature) -> list[Effect]:
        feature.grants -= 1
        return self.settle(feature)

    def choose_next(self, key: bytes) -> list[Effect]:
        """Pass the claim of a key on; return what is then said."""
        del self.claims[key]
        for waiter in self.seeking:
            if waiter.key == key and waiter.can_make:
                self.seeking.remove(waiter)
                self.chosen.append(waiter)
                self.claims[key] = waiter
                return [ClaimPassed(waiter)]
        return []

    # --- puts -----------------------------------------------------------------------------------

    @rule(request=requests)
    def only_reserve(self, request: Request) -> None:
        feature = self.reserve(request)
        if feature is not None:
            self.reserved.append(feature)

    @rule(request=requests, data=st.data())
    def put(self, request: Request, data: st.DataObject) -> None:
        """Evict, or have the slab grow, until there is room, as a put does that may not wait."""
        held = self.some_held(data)
        while (feature := self.reserve(request)) is None:
            if self.waiting:
                return
            if self.evict_for(request, held):
                self.recycle(held)
            elif not self.grow_for(request):
                return
        self.publish_one(feature)

    def grow_for(self, request: Request) -> bool:
        end = self.growth_for(request.nbytes)
        if not end or self.full:
            return False
        self.store.size.begin_growth()
        self.commit(end)
        return True

    @rule(chosen=st.lists(keys, min_size=1, max_size=6), data=st.data())
    def put_some(self, chosen: list[bytes], data: st.DataObject) -> None:
        """Small features under several keys: an LRU needs something to choose from."""
        for key in chosen:
            self.put(Request(UNIT, 0, None, key), data)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self.publish_one(self.take_one(data, self.reserved))

    @staticmethod
    def take_one(data: st.DataObject, features: list[Feature]) -> Feature:
        feature = data.draw(st.sampled_from(features))
        features.remove(feature)
        return feature

    def publish_one(self, feature: Feature) -> None:
        self.count_published(feature)
        expected = self.keep(feature, feature.request.key)
        assert self.store.publish(feature.slot, self.now) == expected

    def keep(self, feature: Feature, key: bytes | None) -> list[Effect]:
        """Keep a feature under its key; return what is then said."""
        if key is None:
            return self.settle(feature)
        effects: list[Effect] = []
        old = self.kept(key)
        if old is not None:
            self.drop(old, with_pins=False)
            effects += self.settle(old, self.limits.grace_s)
        feature.key = key
        self.order.append(feature)
        for waiter in [waiter for waiter in self.seeking if waiter.key == key]:
            self.seeking.remove(waiter)
            self.found.append((waiter, feature))
            feature.grants += 1
            effects.append(Found(waiter))
        return effects

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), landed=st.booleans())
    def give_up_a_slot(self, data: st.DataObject, landed: bool) -> None:
        feature = self.take_one(data, self.reserved)
        if landed:
            self.free_reserved(feature)
        else:
            feature.revoked = True
            assert self.store.give_up_reserved(feature.slot, self.now) == self.retire(feature)

    @precondition(
        lambda self: any(
            f.state is SlotState.PUBLISHED and f.of is None for f in self.live.values()
        )
    )
    @rule(data=st.data())
    def lose_the_writer(self, data: st.DataObject) -> None:
        """Its bytes will never come."""
        published = [
            f for f in self.live.values() if f.state is SlotState.PUBLISHED and f.of is None
        ]
        feature = data.draw(st.sampled_from(published))
        expected: list[Effect] = []
        if feature.key is not None:
            self.evicted += 1
            unused_s = self.now - feature.used_s
            expected = [Evicted(feature.key, feature.nbytes, unused_s, "writer lost")]
            self.drop(feature)
        feature.forgiven = True
        expected += self.retire(feature)
        assert self.store.fail_write(feature.slot, self.now) == expected

    # --- waiting for room -----------------------------------------------------------------------

    @rule(request=requests)
    def wait(self, request: Request) -> None:
        fits = request.nbytes <= self.limits.capacity_bytes
        if fits and len(self.waiting) < self.limits.waiters:
            self.join(request)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def make_room_for_the_head(self, data: st.DataObject) -> None:
        """Evict and recycle until nothing more can go: if the slab is idle, it is served."""
        held = self.some_held(data)
        while self.waiting and self.evict_for(self.waiting[0].request, held):
            self.recycle(held)

    # --- lookups --------------------------------------------------------------------------------

    @rule(key=keys, keeps=st.booleans())
    def look_up(self, key: bytes, keeps: bool) -> None:
        feature = self.kept(key)
        slot = self.store.lookup(key, self.now)
        if feature is None:
            assert slot is None
            self.misses += 1
            return
        assert slot is feature.slot
        self.hits += 1
        feature.grants += 1
        self.use(feature)
        if keeps:
            self.grants.append(feature)
        else:
            assert self.store.pay_grant(slot, self.now) == self.pay_one_grant(feature)

    @rule(key=keys, readers=sharing, ttl_s=ttls, count=st.integers(1, 3))
    def share(
        self, key: bytes, readers: int | frozenset[str], ttl_s: float | None, count: int
    ) -> None:
        """One that looks up, for others who read; maybe for the same ones again."""
        for _ in range(count):
            self.look_up(key, keeps=True)
            if self.kept(key) is None:
                return
            base = self.grants.pop()
            if self.full:
                with pytest.raises(PoolFull):
                    self.store.share(base.slot, readers, ttl_s, self.now)
                assert self.store.pay_grant(base.slot, self.now) == self.pay_one_grant(base)
                return
            slot = self.store.share(base.slot, readers, ttl_s, self.now)
            request = Request(base.nbytes, readers, ttl_s)
            feature = Feature(slot, request, slot.index, slot.generation, base.start, of=base)
            feature.state = SlotState.PUBLISHED
            feature.born_s = self.now
            self.published.append(self.list_one(feature))

    @rule(chosen=st.lists(keys, min_size=1, max_size=6))
    def use_some(self, chosen: list[bytes]) -> None:
        for key in chosen:
            self.look_up(key, keeps=False)

    @rule(chosen=st.lists(keys, min_size=1, max_size=3))
    def hit_some_without_a_message(self, chosen: list[bytes]) -> None:
        """By sessions, each at a tick of its own, so that the order is exact."""
        for key in chosen:
            if (feature := self.kept(key)) is not None:
                self.now += 0.1
                self.store.recency.pass_time(self.now)
                self.used_words[feature.slot.index] = self.store.recency.tick
                self.use(feature)

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def pay_a_grant(self, data: st.DataObject) -> None:
        """Also of what was evicted, replaced or forsaken meanwhile."""
        feature = self.take_one(data, self.grants)
        assert feature.slot.generation == feature.generation, "recycled while it was granted"
        assert self.store.pay_grant(feature.slot, self.now) == self.pay_one_grant(feature)

    @rule(key=keys, who=st.lists(st.tuples(sessions, st.booleans()), min_size=1, max_size=4))
    def seek_at_once(self, key: bytes, who: list[tuple[int, bool]]) -> None:
        for session, can_make in who:
            self.wait_for_key(key, session, can_make)

    def wait_for_key(self, key: bytes, session: int, can_make: bool) -> None:
        self.look_up(key, keeps=False)
        if self.kept(key) is not None:
            return
        chosen = can_make and key not in self.claims
        count, most = len(self.seeking), self.limits.waiters
        if chosen:
            count, most = len(self.claims), self.limits.slots
        if count >= most:
            with pytest.raises(PoolFull):
                self.store.wait_for_key(key, session, can_make=can_make, tag=None)
            return
        tag = object()
        waiter = self.store.wait_for_key(key, session, can_make=can_make, tag=tag)
        assert (waiter.key, waiter.session, waiter.tag) == (key, session, tag)
        if chosen:
            assert waiter.state is KeyWaiterState.CHOSEN
            self.claims[key] = waiter
            self.chosen.append(waiter)
        else:
            assert waiter.state is KeyWaiterState.WAITING
            self.seeking.append(waiter)

    @precondition(lambda self: self.found)
    @rule(data=st.data())
    def take_what_was_found(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.found))
        self.found.remove(entry)
        waiter, feature = entry
        assert self.store.take(waiter) is feature.slot
        assert feature.slot.generation == feature.generation, "recycled before it was taken"
        self.past.append(waiter)
        self.grants.append(feature)

    @precondition(lambda self: self.chosen)
    @rule(data=st.data())
    def begin_to_make(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.chosen))
        self.chosen.remove(waiter)
        assert self.store.take(waiter) is None
        self.making.append(waiter)

    @precondition(lambda self: self.making)
    @rule(data=st.data(), works=st.booleans())
    def end_to_make(self, data: st.DataObject, works: bool) -> None:
        waiter = data.draw(st.sampled_from(self.making))
        if works:
            feature = self.reserve(Request(UNIT, 0, None, waiter.key))
            if feature is None:
                return
            self.publish_one(feature)
        self.making.remove(waiter)
        self.past.append(waiter)
        self.release_claim(waiter)

    @precondition(lambda self: self.seeking)
    @rule(data=st.data())
    def put_what_is_sought(self, data: st.DataObject) -> None:
        """By somebody who does not know that it is."""
        waiter = data.draw(st.sampled_from(self.seeking))
        self.put(Request(UNIT, data.draw(st.integers(0, 1)), None, waiter.key), data)

    def release_claim(self, waiter: KeyWaiter) -> None:
        is_out = self.claims.get(waiter.key) is waiter
        expected = self.choose_next(waiter.key) if is_out else []
        assert self.store.release_claim(waiter.key, waiter.claim) == expected

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def unclaim_or_unseek_what_is_over(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.past))
        assert self.store.cancel_wait(waiter, self.now) == []
        self.release_claim(waiter)

    @precondition(lambda self: self.seeking or self.found or self.chosen)
    @rule(data=st.data())
    def give_up_seeking(self, data: st.DataObject) -> None:
        told = [waiter for waiter, _ in self.found]
        waiter = data.draw(st.sampled_from(self.seeking + told + self.chosen))
        self.past.append(waiter)
        expected: list[Effect] = []
        if waiter in self.seeking:
            self.seeking.remove(waiter)
        elif waiter in self.chosen:
            self.chosen.remove(waiter)
            expected = self.choose_next(waiter.key)
        else:
            entry = next(entry for entry in self.found if entry[0] is waiter)
            self.found.remove(entry)
            expected = self.pay_one_grant(entry[1])
        assert self.store.cancel_wait(waiter, self.now) == expected
        assert waiter.state is KeyWaiterState.GONE

    # --- keys -----------------------------------------------------------------------------------

    @rule(key=keys)
    def evict(self, key: bytes) -> None:
        feature = self.kept(key)
        grace_s = self.limits.grace_s
        expected = [] if feature is None else self.evict_one(feature, "asked", grace_s)
        assert self.store.evict(key, self.now) == expected

    @rule(key=keys, session=sessions)
    def pin(self, key: bytes, session: int) -> None:
        if self.kept(key) is None:
            with pytest.raises(KeyNotFound):
                self.store.pin(key, session)
            return
        self.store.pin(key, session)
        self.pins.setdefault(key, Counter())[session] += 1

    @rule(key=keys, session=sessions)
    def unpin(self, key: bytes, session: int) -> None:
        if self.kept(key) is None:
            with pytest.raises(KeyNotFound):
                self.store.unpin(key, session)
            return
        self.store.unpin(key, session)
        if key in self.pins:
            whose = session if session in self.pins[key] else next(iter(self.pins[key]))
            self.take_pins(key, whose, 1)

    def take_pins(self, key: bytes, session: int, count: int) -> None:
        self.pins[key][session] -= count
        if not self.pins[key][session]:
            del self.pins[key][session]
        if not self.pins[key]:
            del self.pins[key]

    # --- evicting -------------------------------------------------------------------------------

    def some_held(self, data: st.DataObject) -> set[Slot]:
        if not self.live or data.draw(st.booleans()):
            return set()
        slots = [feature.slot for feature in self.live.values()]
        return data.draw(st.sets(st.sampled_from(slots)))

    def victims(self, held: set[Slot]) -> list[Feature]:
        return [feature for feature in self.idle() if feature.slot not in held]

    def evict_for(self, request: Request, held: set[Slot]) -> bool:
        may_grow = self.busy or self.may_grow_for(request.nbytes)
        grows = may_grow and not self.full and not self.limits.evict_first
        helps = self.used - extents(self.idle()) + request.nbytes <= self.limits.capacity_bytes
        victims = self.victims(held) if helps and not grows else []
        effects = self.store.evict_for(request, held.__contains__, self.now)
        told = [effect.key for effect in effects if isinstance(effect, Evicted)]
        going = [feature for key in told if (feature := self.kept(key)) is not None]
        assert set(going) <= set(victims)
        if self.full or not victims:
            assert going == victims[:1]
        else:
            self.check_window(going, victims, request.nbytes)
        expected: list[Effect] = []
        for feature in going:
            expected += self.evict_one(feature, "room")
        assert effects == expected
        return bool(effects)

    def check_window(self, going: list[Feature], victims: list[Feature], nbytes: int) -> None:
        """Of all neighbours whose going makes room, those whose last use is the longest ago.

        What the slab may still grow by is free as well, or is left out of account.
        """
        committed = self.pieces()
        growth = self.limits.capacity_bytes - self.end
        best = [
            self.best_windows(pieces, victims, nbytes)
            for pieces in (committed, [*committed, (growth, None)])
        ]
        assert set(going) in (*best[0], *best[1]) or not (going or best[0])

    @staticmethod
    def best_windows(
        pieces: list[Piece], victims: list[Feature], nbytes: int
    ) -> list[set[Feature]]:
        rows = [pieces[n:m] for n in range(len(pieces)) for m in range(n + 1, len(pieces) + 1)]
        windows = [
            {one for _, one in row if one is not None}
            for row in rows
            if sum(size for size, _ in row) >= nbytes
        ]
        may_go = [window for window in windows if window and window <= set(victims)]
        last_uses = [max(map(victims.index, window)) for window in may_go]
        coldest = min(last_uses, default=None)
        return [window for window, at in zip(may_go, last_uses, strict=True) if at == coldest]

    def pieces(self) -> list[Piece]:
        """The slab from its beginning to its end: sizes, and whose they are."""
        pieces, at = list[Piece](), 0
        for feature in self.in_place():
            pieces += [(feature.start - at, None), (feature.extent, feature)]
            at = feature.stop
        return [*pieces, (self.end - at, None)]

    @rule(nbytes=st.sampled_from([UNIT, 3 * UNIT]), count=st.integers(1, 4), data=st.data())
    def evict_some(self, nbytes: int, count: int, data: st.DataObject) -> None:
        """Whether or not there is room: that is the caller's to ask."""
        held = self.some_held(data)
        for _ in range(count):
            self.evict_for(Request(nbytes, 1, None), held)

    @rule(chosen=st.lists(keys, max_size=5), data=st.data())
    def trim(self, chosen: list[bytes], data: st.DataObject) -> None:
        self.put_some(chosen, data)
        held = self.some_held(data)
        self.recycle(held)  # as is done before each look at the watermarks
        above, to = self.limits.evict_above, self.limits.evict_to
        capacity, used = (
            self.limits.capacity_bytes,
            self.used - extents(self.retiring),
        )
        expected: list[Effect] = []
        if above is not None and used > above * capacity:
            for feature in self.victims(held):
                if used <= to * capacity:
                    break
                used -= feature.extent
                expected += self.evict_one(feature, "watermark")
        assert self.store.trim(held.__contains__, self.now) == expected

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        held, limits = self.some_held(data), self.limits
        start = (self.end - 1) // limits.segment_bytes * limits.segment_bytes
        tail = [self.live[index] for index in sorted(self.live) if self.live[index].stop > start]
        few = sum(feature.nbytes for feature in tail) <= limits.compact * (self.end - start)
        sound = set(tail) <= set(self.victims(held))
        wanted = self.store.size.tail_in_use and bool(limits.compact)
        expected: list[Effect] = []
        if wanted and few and sound and start >= limits.initial_bytes:
            for feature in tail:
                expected += self.evict_one(feature, "compaction")
        assert self.store.compact(held.__contains__, self.now) == expected

    @rule(chosen=st.lists(keys, max_size=3), data=st.data())
    def compact_after_an_idle_window(self, chosen: list[bytes], data: st.DataObject) -> None:
        self.put_some(chosen, data)
        for _ in range(2):
            self.shrink()
            self.now += self.limits.idle_s
        self.shrink()
        self.compact(data)

    @rule()
    def look_through_the_whole_order(self) -> None:
        """What would go next, and next, if all before it were held: exactly the model's order."""
        order = self.idle()
        for count in range(len(order) + 1):
            before = {feature.slot for feature in order[:count]}
            expected = order[count].slot if count < len(order) else None
            assert self.store.recency.coldest(before.__contains__) is expected

    # --- reads by ref ---------------------------------------------------------------------------

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), session=sessions, recent=st.booleans())
    def pay(self, data: st.DataObject, session: int, recent: bool) -> None:
        owing = [(f.index, f.generation) for f in self.live.values() if f.reads_left]
        index, generation = data.draw(st.sampled_from(owing if recent and owing else self.refs))
        feature, name = self.find(index, generation), self.NAMES[session]
        expected: list[Effect] = []
        if feature is not None:
            feature.pay(session, name)
            expected = self.settle(feature)
        assert self.store.pay(index, generation, session, name, self.now) == expected

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        index, generation = data.draw(st.sampled_from(self.refs))
        feature = self.find(index, generation)
        if feature is None:
            with pytest.raises(StaleRef):
                self.store.revoke(index, generation, self.now)
            return
        expected = self.forgive_all(feature)
        assert self.store.revoke(index, generation, self.now) == expected

    def forgive_all(self, feature: Feature) -> list[Effect]:
        feature.forgiven = True
        return self.settle(feature, self.limits.grace_s)

    @rule(name=st.sampled_from("ab"))
    def lose_a_name(self, name: str) -> None:
        count, expected = 0, list[Effect]()
        for _, feature in sorted(self.live.items()):
            owed_by = feature.owed_by
            if isinstance(owed_by, tuple) and name in owed_by:
                if feature.state is SlotState.RETIRING:
                    continue
                count += 1
                feature.paid.add(name)
                expected += self.settle(feature)
        assert self.store.waive_reads(name, self.now) == (count, expected)

    @rule(waits=st.booleans())
    def expire(self, waits: bool) -> None:
        """What has outlived its ttl; or, if one `waits`, the first that will have."""
        ends = {f: f.ends_s for f in self.published if f.ends_s is not None}
        if waits:
            self.now = max(self.now, min(ends.values(), default=0.0))
        old = [feature for feature, end_s in ends.items() if end_s <= self.now]
        effects = self.store.expire(self.now)
        told = [effect.label for effect in effects if isinstance(effect, Expired)]
        expected: list[Effect] = []
        # One ttl after the other; in which order, test_store_machine.py looks at.
        for feature in sorted(old, key=lambda feature: told.index(feature.label)):
            age_s = self.now - feature.born_s
            expected.append(Expired(feature.label, feature.nbytes, age_s, feature.owed_by))
            expected += self.forgive_all(feature)
        assert effects == expected
        self.expired += len(old)

    # --- the ends of others ---------------------------------------------------------------------

    @rule(session=sessions)
    def end_a_session(self, session: int) -> None:
        for key in [key for key, pins in self.pins.items() if session in pins]:
            self.take_pins(key, session, self.pins[key][session])
        mine = [waiter for waiter in self.seeking if waiter.session == session]
        self.seeking = [waiter for waiter in self.seeking if waiter not in mine]
        self.past += mine
        expected: list[Effect] = []
        for key, waiter in list(self.claims.items()):
            if waiter.session == session:
                chosen = self.chosen if waiter in self.chosen else self.making
                chosen.remove(waiter)
                self.past.append(waiter)
                expected += self.choose_next(key)
        effects = self.store.end_session(session, self.now)
        told = effects[: len(expected)]
        # In the order in which the claims were given out.
        assert sorted(told, key=str) == sorted(expected, key=str)
        assert all(waiter.state is KeyWaiterState.GONE for waiter in mine)
        self.follow(effects[len(expected) :])

    # --- recycling and size ---------------------------------------------------------------------

    @rule(data=st.data())
    def recycle_what_is_not_held(self, data: st.DataObject) -> None:
        self.recycle(self.some_held(data))

    # --- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_directory_keeps_its_books(self) -> None:
        store, directory, idle = self.store, self.store.directory, self.idle()
        assert [f for f in self.live.values() if f.slot.idle != (f in idle)] == []
        assert all(
            self.store.recency.last_used_s(feature.slot) == feature.used_s for feature in self.order
        )
        pinned = [feature for feature in self.order if feature.key in self.pins]
        assert directory.resident_bytes == extents(self.order)
        assert directory.pinned_bytes == extents(pinned)
        assert directory.idle_bytes == extents(idle)
        assert store.unevictable_bytes == self.used - extents(idle)
        counters = (store.hits, store.misses, store.evicted)
        assert counters == (self.hits, self.misses, self.evicted)

    @invariant()
    def keys_are_as_in_the_model(self) -> None:
        directory = self.store.directory
        assert {key: directory.find(key) for key in directory} == {
            feature.key: feature.slot for feature in self.order
        }
        assert len(directory) == len(self.order)
        assert directory._pins == self.pins
        assert set(self.pins) <= set(directory)
        assert all(feature.state is SlotState.PUBLISHED for feature in self.order)

    @invariant()
    def nothing_is_both_recycled_and_granted(self) -> None:
        told = [feature for _, feature in self.found]
        shared = [feature.of for feature in self.live.values() if feature.of is not None]
        granted = Counter(self.grants + told + shared)
        for feature, count in granted.items():
            assert feature.grants == count
            assert self.live.get(feature.index) is feature, "its bytes are another's"
        assert all(feature.grants == granted[feature] for feature in self.live.values())

    @invariant()
    def nothing_stays_that_nobody_keeps(self) -> None:
        assert not any(is_over(feature) for feature in self.live.values())

    @invariant()
    def nobody_is_lost_who_seeks(self) -> None:
        key_waiters = self.store.key_waiters
        assert key_waiters.count == len(self.seeking)
        waiting = [waiter for found in key_waiters._waiting.values() for waiter in found.values()]
        assert sorted(waiting, key=lambda waiter: waiter.number) == self.seeking
        assert all(waiter.state is KeyWaiterState.WAITING for waiter in self.seeking)
        assert all(waiter.state is KeyWaiterState.FOUND for waiter, _ in self.found)
        assert all(waiter.state is KeyWaiterState.CHOSEN for waiter in self.chosen)
        assert all(waiter.state is KeyWaiterState.TAKEN for waiter in self.making)
        for waiter in self.seeking:
            assert self.kept(waiter.key) is None, "waits for what is there"
            assert not waiter.can_make or waiter.key in self.claims, (
                "nobody makes what it waits for"
            )

    @invariant()
    def a_key_has_one_claim(self) -> None:
        out = Counter(waiter.key for waiter in self.chosen + self.making)
        assert out == Counter(self.claims.keys())
        claims = {key: (waiter.claim, waiter.session) for key, waiter in self.claims.items()}
        assert self.store.key_waiters._claims == claims
        assert all(self.store.key_waiters.holds(key, claim) for key, (claim, _) in claims.items())

    # --- the end --------------------------------------------------------------------------------

    def teardown(self) -> None:
        """All is free once everybody goes: nothing was lost on the way."""
        if not hasattr(self, "store"):
            return
        for session in self.NAMES:
            self.end_a_session(session)
        while self.found:
            waiter, feature = self.found.pop()
            assert self.store.cancel_wait(waiter, self.now) == self.pay_one_grant(feature)
        while self.grants:
            feature = self.grants.pop()
            assert self.store.pay_grant(feature.slot, self.now) == self.pay_one_grant(feature)
        self.leave_the_queue()
        for feature in self.reserved:
            self.store.free_reserved(feature.slot, self.now)
        for slot in list(self.store.owing.values()):
            self.store.revoke(slot.index, slot.generation, self.now)
        self.check_that_what_is_kept_gives_way()
        for key in list(self.store.directory):
            self.store.evict(key, self.now)
        self.now += 10.0
        for _ in range(2):  # what was shared goes after its shares
            self.store.recycle(self.store.due(self.now), self.now)
        self.check_that_all_is_free()

    def leave_the_queue(self) -> None:
        for waiter in self.waiting + self.granted:
            for effect in self.store.leave(waiter, self.now):
                if isinstance(effect, Grow):  # for one that then leaves as well
                    self.growing = effect.end_bytes

    def check_that_what_is_kept_gives_way(self) -> None:
        """A put that an empty pool would hold gets its room, by evicting and growing in turn."""
        store, capacity = self.store, self.limits.capacity_bytes
        if self.busy:
            store.size.grow_failed(self.now) if self.growing else store.shrunk(self.now)
        for _ in range(20):
            self.now += 10.0  # past every grace and every retry
            store.recycle(store.due(self.now), self.now)
            slot = store.reserve(Request(capacity, 1, None), self.now)
            if slot is not None:
                store.free_reserved(slot, self.now)
                return
            effects = store.evict_for(Request(capacity, 1, None), lambda _: False, self.now)
            if not effects and (end := store.size.growth_for(capacity, self.now)):
                store.size.begin_growth()
                store.grown(end, self.now)
        pytest.fail("a put waits for ever beside what could be evicted")

    def check_that_all_is_free(self) -> None:
        store, directory = self.store, self.store.directory
        assert store.allocator.used_bytes == store.table.used == 0
        assert (len(directory), directory._pins) == (0, {})
        assert (directory.resident_bytes, directory.pinned_bytes, directory.idle_bytes) == (0, 0, 0)
        assert store.recency.coldest(lambda _: False) is None
        assert (store.key_waiters.count, store.key_waiters._waiting, store.key_waiters._claims) == (
            0,
            {},
            {},
        )
        assert (store.owing, store._aging, store._retiring) == ({}, {}, {})


TestAgainstModel = KeyedMachine.TestCase
TestAgainstModel.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
