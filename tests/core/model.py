"""A naive model of what a store does with room: what both state machines hold against the real one.

Slots are `Feature`s in lists and dicts, room is a walk over them. The machines add puts and reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.books import check_books
from featcache.core.allocator import ALIGNMENT_BYTES
from featcache.core.effects import Effect, Grow, Limits, Recycled, SlotRetired, Woken
from featcache.core.put_queue import Request, Waiter, WaiterState
from featcache.core.slots import Slot, SlotState
from featcache.core.store import Store

UNIT = ALIGNMENT_BYTES
TTLS = (1.0, 4.0)


def aligned(nbytes: int) -> int:
    return max(UNIT, -(-nbytes // UNIT) * UNIT)


@dataclass(eq=False)
class Feature:
    """What the model knows of a slot that is not free."""

    slot: Slot
    request: Request
    index: int
    generation: int
    start: int
    state: SlotState = SlotState.RESERVED
    key: bytes | None = None
    grants: int = 0
    paid: set[int | str] = field(default_factory=set)
    revoked: bool = False
    """Whether it may be recycled with reads owed."""
    forgiven: bool = False
    """Whether it owes no reads any more, whatever was paid."""
    of: "Feature | None" = None
    """Of a share: the feature whose bytes it is a ref of."""
    born_s: float = 0.0
    used_s: float = 0.0
    due_s: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.index}:{self.generation}"

    @property
    def nbytes(self) -> int:
        return self.request.nbytes

    @property
    def extent(self) -> int:
        """Bytes of the slab that it has of its own."""
        return aligned(self.nbytes) if self.of is None else 0

    @property
    def stop(self) -> int:
        return self.start + aligned(self.nbytes)

    @property
    def owed_by(self) -> tuple[str, ...] | int:
        wanted = self.request.readers
        if isinstance(wanted, int):
            return 0 if self.forgiven else wanted - len(self.paid)
        return 0 if self.forgiven else tuple(sorted(wanted - self.paid))

    @property
    def reads_left(self) -> int:
        owed_by = self.owed_by
        return owed_by if isinstance(owed_by, int) else len(owed_by)

    def pay(self, session: int, name: str | None) -> None:
        wanted = self.request.readers
        if self.state is not SlotState.PUBLISHED or not self.reads_left:
            return
        if isinstance(wanted, int):
            self.paid.add(session)
        elif name in wanted:
            self.paid.add(name)

    @property
    def ends_s(self) -> float | None:
        """When it expires."""
        owes = self.state is SlotState.PUBLISHED and self.reads_left
        ttl_s = self.request.ttl_s
        return self.born_s + ttl_s if owes and ttl_s is not None else None


def extents(features: Iterable[Feature]) -> int:
    return sum(feature.extent for feature in features)


class RoomMachine(RuleBasedStateMachine):
    """Slots, the queue and the slab's size, with the rules for them that both machines have."""

    store: Store
    limits: Limits
    NAMES: ClassVar[dict[int, str | None]]
    """Of sessions, by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.end = 0  # committed
        self.growing: int | None = None  # the end of a commit that is in progress
        self.shrinking = False
        self.grow_after = 0.0
        self.in_use_seen: list[tuple[float, int]] = []  # by each shrink since the size changed
        self.live: dict[int, Feature] = {}  # by slot
        self.reserved: list[Feature] = []  # those whose caller has the slot in its hands
        self.published: list[Feature] = []  # those that owe reads, the oldest first
        self.retiring: list[Feature] = []
        self.waiting: list[Waiter] = []  # in order of arrival
        self.granted: list[Waiter] = []
        self.finished: list[Waiter] = []
        self.refs: list[tuple[int, int]] = []  # all that there ever were
        self.puts = self.recycled = self.expired = self.waited = 0

    def begin(self, store: Store) -> None:
        self.store, self.limits = store, store.limits
        self.end = self.limits.initial_bytes
        store.allocator.grow(self.end)

    # --- room -----------------------------------------------------------------------------------

    @property
    def in_use_end(self) -> int:
        return max((feature.stop for feature in self.live.values()), default=0)

    @property
    def used(self) -> int:
        return extents(self.live.values())

    @property
    def busy(self) -> bool:
        return self.growing is not None or self.shrinking

    @property
    def full(self) -> bool:
        return len(self.live) == self.limits.slots

    def in_place(self) -> list[Feature]:
        """What has an extent, from the slab's beginning to its end."""
        own = (feature for feature in self.live.values() if feature.of is None)
        return sorted(own, key=lambda feature: feature.start)

    def holes(self) -> list[int]:
        holes, at = [], 0
        for feature in self.in_place():
            holes.append(feature.start - at)
            at = feature.stop
        return [*holes, self.end - at]

    def fits(self, nbytes: int) -> bool:
        return not self.full and max(self.holes()) >= aligned(nbytes)

    def may_grow_for(self, nbytes: int) -> bool:
        """Whether a commit would make room for a size that does not fit now."""
        if self.busy or self.now < self.grow_after:
            return False
        return self.end < self.in_use_end + aligned(nbytes) <= self.limits.capacity_bytes

    def check_growth(self, end: int, nbytes: int) -> None:
        """A commit makes room, is whole segments but at the capacity, and none more than needed."""
        assert self.may_grow_for(nbytes)
        needed = self.in_use_end + aligned(nbytes)
        assert needed <= end <= self.limits.capacity_bytes
        assert end % self.limits.segment_bytes == 0 or end == self.limits.capacity_bytes
        assert end - needed < self.limits.segment_bytes

    def growth_for(self, nbytes: int) -> int:
        end = self.store.size.growth_for(nbytes, self.now)
        assert bool(end) == self.may_grow_for(nbytes)
        if end:
            self.check_growth(end, nbytes)
        return end

    def reserve(self, request: Request) -> Feature | None:
        expected = not self.waiting and self.fits(request.nbytes)
        slot = self.store.reserve(request, self.now)
        assert (slot is not None) == expected
        return None if slot is None else self.admit(slot, request)

    def admit(self, slot: Slot, request: Request) -> Feature:
        assert slot.index not in self.live
        assert slot.nbytes == request.nbytes
        assert slot.key is None
        assert slot.grants == 0, "granted to readers of its last tenant"
        feature = Feature(slot, request, slot.index, slot.generation, slot.offset_bytes)
        assert 0 <= feature.start < feature.stop <= self.end
        for other in self.live.values():
            disjoint = feature.stop <= other.start or other.stop <= feature.start
            assert disjoint, "two slots share bytes"
        return self.list_one(feature)

    def list_one(self, feature: Feature) -> Feature:
        """Take a slot in that was just given out."""
        slot = feature.slot
        assert slot.index not in self.live
        earlier = [generation for index, generation in self.refs if index == slot.index]
        assert slot.generation > max(earlier, default=0)
        self.live[slot.index] = feature
        self.refs.append((slot.index, slot.generation))
        return feature

    def count_published(self, feature: Feature) -> None:
        feature.state = SlotState.PUBLISHED
        feature.born_s = feature.used_s = self.now
        self.puts += 1
        if feature.reads_left:
            self.published.append(feature)

    def owes_nothing(self, feature: Feature) -> None:
        if feature in self.published:
            self.published.remove(feature)

    def retire(self, feature: Feature, grace_s: float = 0.0) -> list[Effect]:
        """Retire a feature; return the effect that says so."""
        feature.state = SlotState.RETIRING
        feature.due_s = self.now + grace_s
        self.owes_nothing(feature)
        self.retiring.append(feature)
        return [SlotRetired(feature.slot)]

    def follow(self, effects: Iterable[Effect], *, served: bool = True) -> None:
        """Take over what a call that serves the queue decided; see that it went far enough."""
        told = list[Effect]()  # of the features of shares that went
        for effect in effects:
            match effect:
                case Recycled(index, generation, nbytes):
                    feature = self.live.pop(index)
                    own_bytes = feature.nbytes if feature.of is None else 0
                    assert (generation, nbytes) == (feature.generation, own_bytes)
                    assert feature.reads_left == 0 or feature.revoked, "recycled with a read owed"
                    assert feature.grants == 0, "recycled while it was granted"
                    self.retiring.remove(feature)
                    if feature.of is None:
                        self.recycled += 1
                    else:
                        told += self.pay_one_grant(feature.of)
                case SlotRetired():
                    assert effect == told.pop(0)
                case Woken(waiter):
                    assert waiter is self.waiting.pop(0), "granted out of turn"
                    assert waiter.state is WaiterState.GRANTED
                    assert waiter.slot is not None
                    self.admit(waiter.slot, waiter.request)
                    self.granted.append(waiter)
                case Grow(end_bytes):
                    assert not self.full, "slots are what is missing"
                    self.check_growth(end_bytes, self.waiting[0].request.nbytes)
                    self.growing = end_bytes
                case _:
                    pytest.fail(f"{effect} has no place here")
        assert not told
        if served and self.waiting and not self.full:
            grows = self.may_grow_for(self.waiting[0].request.nbytes)
            assert not grows, "nobody grows for the head"

    def pay_one_grant(self, feature: Feature) -> list[Effect]:
        raise NotImplementedError  # of machines that grant

    def find(self, index: int, generation: int) -> Feature | None:
        feature = self.live.get(index)
        if feature is None or feature.generation != generation:
            return None
        return feature if feature.state is SlotState.PUBLISHED else None

    # --- the queue ------------------------------------------------------------------------------

    @property
    def can_grow(self) -> bool:
        return self.end < self.limits.capacity_bytes and (self.busy or self.now >= self.grow_after)

    def comes_by_growth(self, request: Request) -> bool:
        """Whether all that wait, and one more, would have room at the end of a slab that can grow."""
        sizes = [aligned(waiter.request.nbytes) for waiter in self.waiting]
        return (
            self.can_grow
            and all(waiter.by_growth for waiter in self.waiting)
            and len(self.live) + len(sizes) < self.limits.slots
            and self.in_use_end + sum(sizes) + aligned(request.nbytes) <= self.limits.capacity_bytes
        )

    def is_over_the_bound(self, request: Request) -> bool:
        growing = [waiter for waiter in self.waiting if waiter.by_growth and self.can_grow]
        blocked = len(self.waiting) - len(growing)
        return not self.comes_by_growth(request) and blocked >= self.limits.waiters

    def join(self, request: Request) -> None:
        tag, by_growth = object(), self.comes_by_growth(request)
        waiter, effects = self.store.wait(request, self.now, tag)
        assert waiter.tag is tag
        assert waiter.by_growth == by_growth
        self.waiting.append(waiter)
        self.waited += 1
        self.follow(effects)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        self.accept_one(data.draw(st.sampled_from(self.granted)))

    def accept_one(self, waiter: Waiter) -> None:
        self.granted.remove(waiter)
        self.finished.append(waiter)
        slot = self.store.accept(waiter)
        feature = self.live[slot.index]
        assert slot is waiter.slot is feature.slot
        assert feature.request is waiter.request
        self.reserved.append(feature)

    @precondition(lambda self: self.waiting or self.granted)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.leave_one(data.draw(st.sampled_from(self.waiting + self.granted)))

    def leave_one(self, waiter: Waiter) -> None:
        served = waiter in self.granted or waiter is self.waiting[0]
        if waiter in self.granted:
            self.granted.remove(waiter)
            assert waiter.slot is not None
            del self.live[waiter.slot.index]
        else:
            self.waiting.remove(waiter)
        self.finished.append(waiter)
        self.follow(self.store.leave(waiter, self.now), served=served)

    def free_reserved(self, feature: Feature) -> None:
        del self.live[feature.index]
        self.follow(self.store.free_reserved(feature.slot, self.now))

    # --- recycling, size and time ---------------------------------------------------------------

    def due(self) -> list[Slot]:
        due = self.store.due(self.now)
        assert due == [
            feature.slot
            for feature in self.retiring
            if feature.due_s <= self.now and not feature.grants
        ]
        return due

    def recycle(self, held: set[Slot]) -> None:
        """Recycle the slots that are due and that no session holds."""
        self.follow(self.store.recycle([slot for slot in self.due() if slot not in held], self.now))

    @rule()
    def serve(self) -> None:
        self.follow(self.store.serve(self.now))

    @precondition(lambda self: self.growing is not None)
    @rule(works=st.sampled_from([True, True, False]))
    def end_a_commit(self, works: bool) -> None:
        if works:
            assert self.growing is not None
            self.commit(self.growing)
        else:
            self.fail_to_commit()

    def commit(self, end: int) -> None:
        self.growing = None
        self.end = end
        self.in_use_seen.clear()
        self.follow(self.store.grown(end, self.now))

    def fail_to_commit(self) -> None:
        self.growing = None
        self.grow_after = self.now + self.limits.grow_retry_s
        self.store.size.grow_failed(self.now)

    @rule()
    def shrink(self) -> None:
        in_use, since = self.in_use_end, self.now - self.limits.idle_s
        self.in_use_seen.append((self.now, in_use))
        keep = self.store.shrink(self.now)
        if keep is None:
            return
        assert not self.busy
        assert not self.waiting
        assert self.in_use_seen[0][0] <= since, "the slab had its size for less than idle_s"
        lately = [used for at, used in self.in_use_seen if at > since]
        assert max(in_use, self.limits.initial_bytes, *lately) <= keep < self.end
        assert keep % self.limits.segment_bytes == 0
        self.end = keep
        self.in_use_seen.clear()
        self.shrinking = True

    @precondition(lambda self: self.shrinking)
    @rule()
    def end_a_shrink(self) -> None:
        self.shrinking = False
        self.follow(self.store.shrunk(self.now))

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0, 4.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    # --- what always holds ----------------------------------------------------------------------

    @invariant()
    def bytes_are_accounted_for(self) -> None:
        store, allocator, limits = self.store, self.store.allocator, self.limits
        check_books(allocator)
        used = self.used
        assert store.committed_bytes == self.end <= limits.capacity_bytes
        assert allocator.used_bytes == used
        assert store.free_bytes == limits.capacity_bytes - used
        tail = limits.capacity_bytes - self.in_use_end
        assert store.largest_free_bytes == max(*self.holes(), tail)

    @invariant()
    def slots_are_as_in_the_model(self) -> None:
        table = self.store.table
        in_use = table.in_use()
        assert in_use == [self.live[index].slot for index in sorted(self.live)]
        assert (table.used, table.full) == (len(self.live), self.full)
        assert table.high == max((index for index, _ in self.refs), default=-1) + 1
        for feature in self.live.values():
            slot = feature.slot
            assert (slot.generation, slot.state) == (feature.generation, feature.state)
            assert (slot.offset_bytes, slot.nbytes) == (feature.start, feature.nbytes)
            assert (slot.key, slot.grants) == (feature.key, feature.grants)
            assert slot.state is not SlotState.RETIRING or slot.due_s == feature.due_s
            if not (feature.forgiven and slot.state is SlotState.RETIRING):
                assert (slot.reads_left, slot.owed_by) == (feature.reads_left, feature.owed_by)

    @invariant()
    def the_table_finds_a_slot_by_its_own_generation_only(self) -> None:
        for index, generation in [*self.refs, (-1, 1), (0, 0), (self.limits.slots, 1)]:
            feature = self.live.get(index)
            there = feature is not None and feature.generation == generation
            slot = self.store.table.find(index, generation)
            assert slot is (feature.slot if there and feature else None)

    @invariant()
    def books_agree(self) -> None:
        store = self.store
        assert list(store.owing.values()) == [feature.slot for feature in self.published]
        assert list(store._retiring.values()) == [feature.slot for feature in self.retiring]
        aging = {
            ttl_s: [feature.slot for feature in self.published if feature.request.ttl_s == ttl_s]
            for ttl_s in TTLS
        }
        known = {ttl_s: list(slots.values()) for ttl_s, slots in store._aging.items()}
        assert known == {ttl_s: slots for ttl_s, slots in aging.items() if slots}
        counters = (store.puts, store.recycled, store.expired, store.waited)
        assert counters == (self.puts, self.recycled, self.expired, self.waited)

    @invariant()
    def the_queue_keeps_its_order(self) -> None:
        queue = self.store.queue
        assert (len(queue), queue.count) == (len(self.waiting), len(self.waiting))
        assert bool(queue) == bool(self.waiting)
        assert queue.waiting_bytes == sum(waiter.request.nbytes for waiter in self.waiting)
        assert self.store.blocked_puts == (0 if self.busy else len(self.waiting))
        assert queue.head is (self.waiting[0] if self.waiting else None)
        assert all(waiter.state is WaiterState.WAITING for waiter in self.waiting)

    @invariant()
    def nobody_waits_beside_room(self) -> None:
        if self.waiting:
            assert not self.fits(self.waiting[0].request.nbytes), "the head was forgotten"
