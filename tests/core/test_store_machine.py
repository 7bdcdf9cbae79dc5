"""Store against a naive model, under whatever order of calls hypothesis comes upon."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from core.books import check_books
from core.model import TTLS, UNIT, Feature, RoomMachine, aligned
from featcache.core.effects import Effect, Expired, Limits, SlotRetired
from featcache.core.put_queue import Request
from featcache.core.slots import SlotState
from featcache.core.store import Store
from featcache.errors import FeatureTooLarge, PoolFull, StaleRef

sizes = st.one_of(
    st.integers(0, 6).map(lambda units: units * UNIT),
    st.integers(0, 4 * UNIT),
    st.integers(0, 26 * UNIT),
)
readers = st.one_of(st.integers(1, 3), st.frozensets(st.sampled_from("abc"), min_size=1))
requests = st.builds(Request, sizes, readers, st.sampled_from([None, None, *TTLS]))


class StoreMachine(RoomMachine):
    NAMES = {0: None, 1: "a", 2: "b", 3: "c", 4: None, 5: "a"}  # noqa: RUF012 - a constant

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
        limits = Limits(
            capacity_bytes=capacity * UNIT,
            segment_bytes=segment * UNIT,
            initial_bytes=initial * UNIT,
            slots=slots,
            waiters=waiters,
            grace_s=grace_s,
            idle_s=idle_s,
        )
        self.begin(Store(limits))

    # --- puts -----------------------------------------------------------------------------------

    @rule(request=requests)
    def only_reserve(self, request: Request) -> None:
        feature = self.reserve(request)
        if feature is not None:
            self.reserved.append(feature)

    @rule(request=requests)
    def reserve_and_publish(self, request: Request) -> None:
        feature = self.reserve(request)
        if feature is not None:
            self.publish_one(feature)

    @rule(request=requests, works=st.booleans())
    def reserve_by_growing(self, request: Request, works: bool) -> None:
        """What a put that may not wait does."""
        if self.waiting or self.fits(request.nbytes) or self.full:
            return
        end = self.growth_for(request.nbytes)
        if not end:
            return
        if works:
            self.commit(end)
            feature = self.reserve(request)
            assert feature is not None
            self.reserved.append(feature)
        else:
            self.fail_to_commit()

    @rule(request=requests)
    def wait(self, request: Request) -> None:
        if aligned(request.nbytes) > self.limits.capacity_bytes:
            with pytest.raises(FeatureTooLarge):
                self.store.wait(request, self.now, None)
        elif self.is_over_the_bound(request):
            with pytest.raises(PoolFull):
                self.store.wait(request, self.now, None)
        else:
            self.join(request)

    @rule(share=st.integers(1, 2), behind=requests)
    def wait_for_much(self, share: int, behind: Request) -> None:
        """A head that seldom fits, and one behind it that often would."""
        self.wait(Request(self.limits.capacity_bytes // share, 1, None))
        self.wait(behind)

    @precondition(lambda self: self.waiting)
    @rule()
    def leave_the_head(self) -> None:
        self.leave_one(self.waiting[0])

    @precondition(lambda self: self.finished)
    @rule(data=st.data())
    def leave_again(self, data: st.DataObject) -> None:
        """The slot of an accepted waiter may be anybody's by now."""
        waiter = data.draw(st.sampled_from(self.finished))
        self.follow(self.store.leave(waiter, self.now), served=False)

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
        self.count_published(feature)
        effects = self.store.publish(feature.slot, self.now)
        assert effects == ([] if feature.reads_left else self.retire(feature))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        feature = data.draw(st.sampled_from(self.reserved))
        self.reserved.remove(feature)
        self.free_reserved(feature)

    @precondition(lambda self: self.published or self.retiring)
    @rule(data=st.data())
    def publish_or_abandon_twice(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.published + self.retiring)).slot
        for call in (self.store.publish, self.store.free_reserved):
            with pytest.raises(ValueError, match="not RESERVED"):
                call(slot, self.now)

    # --- reads ----------------------------------------------------------------------------------

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), session=st.sampled_from(range(6)), published=st.booleans())
    def pay(self, data: st.DataObject, session: int, published: bool) -> None:
        """By whomever, owing or not, for a ref that may be long gone."""
        current = [(feature.index, feature.generation) for feature in self.published]
        chosen = current if published and current else self.refs
        self.pay_one(*data.draw(st.sampled_from(chosen)), session)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def pay_all(self, data: st.DataObject) -> None:
        feature = data.draw(st.sampled_from(self.published))
        for session in self.NAMES:
            self.pay_one(feature.index, feature.generation, session)

    def pay_one(self, index: int, generation: int, session: int) -> None:
        feature, name = self.find(index, generation), self.NAMES[session]
        done: list[Effect] = []
        if feature is not None:
            feature.pay(session, name)
            if feature.reads_left == 0:
                done = self.retire(feature)
        assert self.store.pay(index, generation, session, name, self.now) == done

    @rule(name=st.sampled_from("abc"))
    def waive_reads(self, name: str) -> None:
        count, done = 0, list[Effect]()
        for feature in sorted(self.live.values(), key=lambda feature: feature.index):
            wanted = feature.request.readers
            if isinstance(wanted, int) or feature.state is SlotState.RETIRING:
                continue
            if name in wanted - feature.paid:
                feature.paid.add(name)
                count += 1
                if feature.reads_left == 0 and feature.state is SlotState.PUBLISHED:
                    done += self.retire(feature)
        assert self.store.waive_reads(name, self.now) == (count, done)

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
        assert effects == self.retire(feature, self.limits.grace_s)

    @rule()
    def expire(self) -> None:
        old = [
            feature
            for feature in self.published
            if feature.ends_s is not None and feature.ends_s <= self.now
        ]
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
        for ttl_s in TTLS:
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
        ends = [feature.ends_s for feature in self.published if feature.ends_s is not None]
        self.now = max(self.now, min(ends, default=0.0))
        self.expire()

    # --- recycling and size ---------------------------------------------------------------------

    @rule(data=st.data(), all_of_them=st.booleans())
    def recycle_what_is_due(self, data: st.DataObject, all_of_them: bool) -> None:
        due = self.due()
        held = set() if all_of_them or not due else data.draw(st.sets(st.sampled_from(due)))
        self.recycle(held)

    @precondition(lambda self: self.published or self.reserved)
    @rule(data=st.data())
    def recycle_what_is_in_use(self, data: st.DataObject) -> None:
        feature = data.draw(st.sampled_from(self.published + self.reserved))
        with pytest.raises(ValueError, match="not RETIRING"):
            self.store.recycle([feature.slot], self.now)

    @rule(asked=st.none() | requests)
    def shrink_after_idle(self, asked: Request | None) -> None:
        self.shrink()
        self.now += self.limits.idle_s
        self.shrink()
        if asked is not None:
            self.wait(asked)

    # --- what always holds ----------------------------------------------------------------------

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
                for session in self.NAMES:
                    self.pay_one(feature.index, feature.generation, session)
            self.recycle(set())
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
