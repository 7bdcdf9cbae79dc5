"""Store against a naive model, under whatever order of calls hypothesis comes upon."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.books import check_books
from featcache.core.allocator import ALIGNMENT_BYTES
from featcache.core.effects import Effect, Expired, Grow, Limits, Recycled, SlotRetired, Woken
from featcache.core.put_queue import Request, Waiter, WaiterState
from featcache.core.slots import Slot, SlotState
from featcache.core.store import Store
from featcache.errors import FeatureTooLarge, PoolFull, StaleRef

UNIT = ALIGNMENT_BYTES
NAMES = {0: None, 1: "a", 2: "b", 3: "c", 4: None, 5: "a"}  # of sessions, by their numbers

sizes = st.one_of(
    st.integers(0, 6).map(lambda units: units * UNIT),
    st.integers(0, 4 * UNIT),
    st.integers(0, 26 * UNIT),
)
readers = st.one_of(st.integers(1, 3), st.frozensets(st.sampled_from("abc"), min_size=1))
requests = st.builds(Request, sizes, readers, st.sampled_from([None, None, 1.0, 4.0]))


def aligned(nbytes: int) -> int:
    return max(UNIT, -(-nbytes // UNIT) * UNIT)


@dataclass
class Feature:
    """What the model knows of a slot that is not free."""

    slot: Slot
    index: int
    generation: int
    start: int
    stop: int
    request: Request
    state: SlotState = SlotState.RESERVED
    paid: set[int | str] = field(default_factory=set)
    born_s: float = 0.0
    due_s: float = 0.0
    revoked: bool = False

    @property
    def label(self) -> str:
        return f"{self.index}:{self.generation}"

    @property
    def owed_by(self) -> tuple[str, ...] | int:
        wanted = self.request.readers
        if isinstance(wanted, int):
            return wanted - len(self.paid)
        return tuple(sorted(wanted - self.paid))

    @property
    def reads_left(self) -> int:
        owed_by = self.owed_by
        return owed_by if isinstance(owed_by, int) else len(owed_by)

    def pay(self, session: int) -> None:
        wanted, name = self.request.readers, NAMES[session]
        if isinstance(wanted, int):
            self.paid.add(session)
        elif name in wanted:
            self.paid.add(name)

    def expired(self, now_s: float) -> bool:
        ttl_s = self.request.ttl_s
        return ttl_s is not None and self.born_s + ttl_s <= now_s


class StoreMachine(RuleBasedStateMachine):
    store: Store
    limits: Limits

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.end = 0  # committed
        self.growing: int | None = None  # the end of a commit that is under way
        self.shrinking = False
        self.grow_after = 0.0
        self.in_use_seen: list[tuple[float, int]] = []  # by each shrink since the size changed
        self.live: dict[int, Feature] = {}  # by slot
        self.reserved: list[Feature] = []  # those whose caller has the slot in its hands
        self.published: list[Feature] = []  # the oldest first
        self.retiring: list[Feature] = []
        self.waiting: list[Waiter] = []  # in order of arrival
        self.granted: list[Waiter] = []
        self.finished: list[Waiter] = []
        self.refs: list[tuple[int, int]] = []  # all that there ever were
        self.puts = self.recycled = self.expired = self.waited = 0

    @initialize(
        capacity=st.integers(1, 24),
        segment=st.integers(1, 10),
        initial=st.sampled_from([1, 0, 8, 24]),
        slots=st.integers(1, 8),
        waiters=st.sampled_from([6, 4, 2, 1, 0]),
        grace_s=st.sampled_from([0.0, 0.5]),
        idle_s=st.sampled_from([0.0, 2.0]),
    )
    def make(
        self,
        capacity: int,
        segment: int,
        initial: int,
        slots: int,
        waiters: int,
        grace_s: float,
        idle_s: float,
    ) -> None:
        segment = min(segment, capacity)
        initial = min(-(-initial // segment) * segment, capacity)
        self.limits = Limits(
            capacity_bytes=capacity * UNIT,
            segment_bytes=segment * UNIT,
            initial_bytes=initial * UNIT,
            slots=slots,
            waiters=waiters,
            grace_s=grace_s,
            idle_s=idle_s,
        )
        self.store = Store(self.limits)
        self.end = self.limits.initial_bytes
        self.store.allocator.grow(self.end)

    # --- the model ------------------------------------------------------------------------------

    @property
    def in_use_end(self) -> int:
        return max((feature.stop for feature in self.live.values()), default=0)

    @property
    def busy(self) -> bool:
        return self.growing is not None or self.shrinking

    def holes(self) -> list[int]:
        holes, at = [], 0
        for feature in sorted(self.live.values(), key=lambda feature: feature.start):
            holes.append(feature.start - at)
            at = feature.stop
        return [*holes, self.end - at]

    def fits(self, nbytes: int) -> bool:
        return len(self.live) < self.limits.slots and max(self.holes()) >= aligned(nbytes)

    def may_grow_for(self, nbytes: int) -> bool:
        """Whether a commit would make room for what does not fit now."""
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

    def admit(self, slot: Slot, request: Request) -> Feature:
        start, stop = slot.offset_bytes, slot.offset_bytes + aligned(request.nbytes)
        assert slot.nbytes == request.nbytes
        assert 0 <= start < stop <= self.end
        for other in self.live.values():
            assert stop <= other.start or other.stop <= start, "two slots share bytes"
        assert slot.index not in self.live
        earlier = [generation for index, generation in self.refs if index == slot.index]
        assert slot.generation > max(earlier, default=0)
        feature = Feature(slot, slot.index, slot.generation, start, stop, request)
        self.live[slot.index] = feature
        self.refs.append((slot.index, slot.generation))
        return feature

    def retire(self, feature: Feature, grace_s: float = 0.0) -> Feature:
        feature.state = SlotState.RETIRING
        feature.due_s = self.now + grace_s
        self.published.remove(feature)
        self.retiring.append(feature)
        return feature

    def check_retired(self, effects: Sequence[Effect], features: Iterable[Feature]) -> None:
        """Exactly these were retired, and nothing else came of it."""
        assert effects == [SlotRetired(feature.slot) for feature in features]

    def follow(self, effects: Iterable[Effect]) -> None:
        """Take over what a call that serves the queue decided; see that it went far enough."""
        for effect in effects:
            match effect:
                case Recycled(index, generation, nbytes):
                    feature = self.live.pop(index)
                    assert (generation, nbytes) == (feature.generation, feature.request.nbytes)
                    assert feature.reads_left == 0 or feature.revoked, "recycled with a read owed"
                    self.retiring.remove(feature)
                    self.recycled += 1
                case Woken(waiter):
                    assert waiter is self.waiting.pop(0), "granted out of turn"
                    assert waiter.state is WaiterState.GRANTED
                    assert waiter.slot is not None
                    self.admit(waiter.slot, waiter.request)
                    self.granted.append(waiter)
                case Grow(end_bytes):
                    assert len(self.live) < self.limits.slots, "slots are what is missing"
                    self.check_growth(end_bytes, self.waiting[0].request.nbytes)
                    self.growing = end_bytes
                case _:
                    pytest.fail(f"{effect} has no place here")
        if self.waiting and len(self.live) < self.limits.slots:
            assert not self.may_grow_for(self.waiting[0].request.nbytes), (
                "nobody grows for the head"
            )

    # --- puts -----------------------------------------------------------------------------------

    @rule(request=requests)
    def reserve(self, request: Request) -> None:
        expected = not self.waiting and self.fits(request.nbytes)
        slot = self.store.reserve(request, self.now)
        assert (slot is not None) == expected
        if slot is not None:
            self.reserved.append(self.admit(slot, request))

    @rule(request=requests)
    def reserve_and_publish(self, request: Request) -> None:
        self.reserve(request)
        if self.reserved:
            self.publish_one(self.reserved.pop())

    @rule(request=requests, works=st.booleans())
    def reserve_by_growing(self, request: Request, works: bool) -> None:
        """What a put that may not wait does."""
        if self.waiting or self.fits(request.nbytes) or len(self.live) == self.limits.slots:
            return
        end = self.store.size.growth_for(request.nbytes, self.now)
        assert bool(end) == self.may_grow_for(request.nbytes)
        if not end:
            return
        self.check_growth(end, request.nbytes)
        if works:
            self.commit(end)
            self.reserve(request)
            assert self.reserved[-1].request is request
        else:
            self.fail_to_commit()

    @rule(request=requests)
    def wait(self, request: Request) -> None:
        if aligned(request.nbytes) > self.limits.capacity_bytes:
            with pytest.raises(FeatureTooLarge):
                self.store.wait(request, self.now, None)
        elif len(self.waiting) >= self.limits.waiters:
            with pytest.raises(PoolFull):
                self.store.wait(request, self.now, None)
        else:
            tag = object()
            waiter, effects = self.store.wait(request, self.now, tag)
            assert waiter.tag is tag
            self.waiting.append(waiter)
            self.waited += 1
            self.follow(effects)

    @rule(share=st.integers(1, 2), behind=requests)
    def wait_for_much(self, share: int, behind: Request) -> None:
        """A head that seldom fits, and one behind it that often would."""
        self.wait(Request(self.limits.capacity_bytes // share, 1, None))
        self.wait(behind)

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
        waiter = data.draw(st.sampled_from(self.waiting + self.granted))
        self.leave_one(waiter)

    @precondition(lambda self: self.waiting)
    @rule()
    def leave_the_head(self) -> None:
        self.leave_one(self.waiting[0])

    def leave_one(self, waiter: Waiter) -> None:
        if waiter in self.granted:
            self.granted.remove(waiter)
            assert waiter.slot is not None
            del self.live[waiter.slot.index]
        else:
            self.waiting.remove(waiter)
        self.finished.append(waiter)
        self.follow(self.store.leave(waiter, self.now))

    @precondition(lambda self: self.finished)
    @rule(data=st.data())
    def leave_again(self, data: st.DataObject) -> None:
        """The slot of an accepted waiter may be anybody's by now."""
        waiter = data.draw(st.sampled_from(self.finished))
        self.follow(self.store.leave(waiter, self.now))

    @precondition(lambda self: self.finished or self.waiting)
    @rule(data=st.data())
    def accept_what_was_not_granted(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.finished + self.waiting))
        with pytest.raises(ValueError, match="not granted"):
            self.store.accept(waiter)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        feature = data.draw(st.sampled_from(self.reserved))
        self.reserved.remove(feature)
        self.publish_one(feature)

    def publish_one(self, feature: Feature) -> None:
        feature.state = SlotState.PUBLISHED
        feature.born_s = self.now
        self.published.append(feature)
        self.puts += 1
        effects = self.store.publish(feature.slot, self.now)
        self.check_retired(effects, [] if feature.reads_left else [self.retire(feature)])

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        feature = data.draw(st.sampled_from(self.reserved))
        self.reserved.remove(feature)
        del self.live[feature.index]
        self.follow(self.store.free_reserved(feature.slot, self.now))

    @precondition(lambda self: self.published or self.retiring)
    @rule(data=st.data())
    def publish_or_abandon_twice(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.published + self.retiring)).slot
        for call in (self.store.publish, self.store.free_reserved):
            with pytest.raises(ValueError, match="not RESERVED"):
                call(slot, self.now)

    # --- reads ----------------------------------------------------------------------------------

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), session=st.sampled_from(list(NAMES)), published=st.booleans())
    def pay(self, data: st.DataObject, session: int, published: bool) -> None:
        """By whomever, owing or not, for a ref that may be long gone."""
        current = [(feature.index, feature.generation) for feature in self.published]
        chosen = current if published and current else self.refs
        self.pay_one(*data.draw(st.sampled_from(chosen)), session)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def pay_all(self, data: st.DataObject) -> None:
        feature = data.draw(st.sampled_from(self.published))
        for session in NAMES:
            self.pay_one(feature.index, feature.generation, session)

    def pay_one(self, index: int, generation: int, session: int) -> None:
        feature, done = self.find(index, generation), []
        if feature is not None:
            feature.pay(session)
            if feature.reads_left == 0:
                done.append(self.retire(feature))
        effects = self.store.pay(index, generation, session, NAMES[session], self.now)
        self.check_retired(effects, done)

    def find(self, index: int, generation: int) -> Feature | None:
        for feature in self.published:
            if (feature.index, feature.generation) == (index, generation):
                return feature
        return None

    @rule(name=st.sampled_from("abc"))
    def waive_reads(self, name: str) -> None:
        count, done = 0, []
        for feature in sorted(self.live.values(), key=lambda feature: feature.index):
            wanted = feature.request.readers
            if isinstance(wanted, int) or feature.state is SlotState.RETIRING:
                continue
            if name in wanted - feature.paid:
                feature.paid.add(name)
                count += 1
                if feature.reads_left == 0 and feature.state is SlotState.PUBLISHED:
                    done.append(self.retire(feature))
        forgiven, effects = self.store.waive_reads(name, self.now)
        assert forgiven == count
        self.check_retired(effects, done)

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        index, generation = data.draw(st.sampled_from(self.refs))
        feature = self.find(index, generation)
        if feature is None:
            with pytest.raises(StaleRef):
                self.store.revoke(index, generation, self.now)
            return
        feature.revoked = True
        effects = self.store.revoke(index, generation, self.now)
        self.check_retired(effects, [self.retire(feature, self.limits.grace_s)])

    @rule()
    def expire(self) -> None:
        old = [feature for feature in self.published if feature.expired(self.now)]
        effects = self.store.expire(self.now)
        assert len(effects) == 2 * len(old)
        pairs = list(zip(effects[::2], effects[1::2], strict=True))
        # The oldest come first among those of one ttl; which ttl comes first is not said.
        order = {
            feature.slot: at
            for at, (_, retired) in enumerate(pairs)
            for feature in old
            if retired == SlotRetired(feature.slot)
        }
        for ttl_s in (1.0, 4.0):
            alike = [order[feature.slot] for feature in old if feature.request.ttl_s == ttl_s]
            assert alike == sorted(alike)
        for feature in sorted(old, key=lambda feature: order[feature.slot]):
            age_s = self.now - feature.born_s
            said = Expired(feature.label, feature.request.nbytes, age_s, feature.owed_by)
            assert pairs[order[feature.slot]][0] == said
            feature.revoked = True
            self.retire(feature, self.limits.grace_s)
            self.expired += 1

    @rule()
    def pass_time_until_one_expires(self) -> None:
        ends = [
            feature.born_s + feature.request.ttl_s
            for feature in self.published
            if feature.request.ttl_s is not None
        ]
        self.now = max(self.now, min(ends, default=0.0))
        self.expire()

    # --- recycling and size ---------------------------------------------------------------------

    @rule(data=st.data(), all_of_them=st.booleans())
    def recycle(self, data: st.DataObject, all_of_them: bool) -> None:
        """Of what is due, whatever no session holds."""
        due = self.due()
        held = set() if all_of_them or not due else data.draw(st.sets(st.sampled_from(due)))
        self.follow(self.store.recycle([slot for slot in due if slot not in held], self.now))

    def due(self) -> list[Slot]:
        due = self.store.due(self.now)
        assert due == [feature.slot for feature in self.retiring if feature.due_s <= self.now]
        return due

    @precondition(lambda self: self.published or self.reserved)
    @rule(data=st.data())
    def recycle_what_is_in_use(self, data: st.DataObject) -> None:
        feature = data.draw(st.sampled_from(self.published + self.reserved))
        with pytest.raises(ValueError, match="not RETIRING"):
            self.store.recycle([feature.slot], self.now)

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

    @rule(asked=st.none() | requests)
    def shrink_after_idle(self, asked: Request | None) -> None:
        self.shrink()
        self.now += self.limits.idle_s
        self.shrink()
        if asked is not None:
            self.wait(asked)

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
        used = sum(feature.stop - feature.start for feature in self.live.values())
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
        assert table.used == len(self.live)
        assert table.full == (len(self.live) == self.limits.slots)
        for slot in in_use:
            feature = self.live[slot.index]
            assert slot.generation == feature.generation
            assert slot.state is feature.state
            assert slot.state is not SlotState.RETIRING or slot.due_s == feature.due_s
            assert (slot.offset_bytes, slot.nbytes) == (feature.start, feature.request.nbytes)
            assert slot.reads_left == feature.reads_left
            assert slot.owed_by == feature.owed_by

    @invariant()
    def books_agree(self) -> None:
        store = self.store
        assert list(store.owing.values()) == [feature.slot for feature in self.published]
        assert list(store._retiring.values()) == [feature.slot for feature in self.retiring]
        aging = {
            ttl_s: [feature.slot for feature in self.published if feature.request.ttl_s == ttl_s]
            for ttl_s in (1.0, 4.0)
        }
        known = {ttl_s: list(slots.values()) for ttl_s, slots in store._aging.items()}
        assert known == {ttl_s: slots for ttl_s, slots in aging.items() if slots}
        counters = (store.puts, store.recycled, store.expired, store.waited)
        assert counters == (self.puts, self.recycled, self.expired, self.waited)

    @invariant()
    def the_queue_keeps_its_order_and_nobody_waits_beside_room(self) -> None:
        queue = self.store.queue
        assert len(queue) == len(self.waiting)
        assert bool(queue) == bool(self.waiting)
        assert queue.waiting_bytes == sum(waiter.request.nbytes for waiter in self.waiting)
        assert self.store.blocked_puts == (0 if self.busy else len(self.waiting))
        assert queue.head is (self.waiting[0] if self.waiting else None)
        assert all(waiter.state is WaiterState.WAITING for waiter in self.waiting)
        if self.waiting:
            assert not self.fits(self.waiting[0].request.nbytes), "the head was forgotten"

    @invariant()
    def only_published_refs_are_found(self) -> None:
        for index, generation in [*self.refs, (-1, 1), (0, 0), (self.limits.slots, 1)]:
            feature = self.find(index, generation)
            if feature is not None:
                assert self.store.find(index, generation) is feature.slot
            else:
                with pytest.raises(StaleRef):
                    self.store.find(index, generation)

    # --- the end --------------------------------------------------------------------------------

    @rule()
    def drain(self) -> None:
        """Who waits is granted, and all is free, once everybody pays and no commit fails."""
        for _ in range(len(self.waiting) + 3):
            self.now += 10.0  # past every grace and every retry
            if self.growing is not None:
                self.commit(self.growing)
            if self.shrinking:
                self.end_a_shrink()
            for waiter in list(self.granted):
                self.accept_one(waiter)
            while self.reserved:
                self.publish_one(self.reserved.pop())
            for feature in list(self.published):
                for session in NAMES:
                    self.pay_one(feature.index, feature.generation, session)
            self.follow(self.store.recycle(self.due(), self.now))
            self.serve()
        assert not self.waiting
        assert not self.live
        assert not self.busy
        assert self.store.largest_free_bytes == self.store.free_bytes == self.limits.capacity_bytes
        assert check_books(self.store.allocator) == self.store.table.used == 0

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.drain()
        for _ in range(3):  # a window that began before all was free, a whole one, and the cut
            self.shrink()
            if self.shrinking:
                self.end_a_shrink()
            self.now += self.limits.idle_s
        self.shrink()
        assert self.store.committed_bytes == self.limits.initial_bytes


TestAgainstModel = StoreMachine.TestCase
TestAgainstModel.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
