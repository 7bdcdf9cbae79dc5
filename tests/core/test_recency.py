"""The eviction order, least recently used first, against a list in order of use.

Another policy throws this file away; what holds for every policy is in test_directory.py.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from core.test_directory import (
    UNIT,
    WAYS,
    Kept,
    Way,
    books,
    by_nobody,
    end_grant,
    grant,
    keep,
    keep_some,
    owe,
    pay,
    pin,
    slot_of,
)
from featcache.core.slots import Slot


def begin_use(directory: Kept, slot: Slot, now_s: float = 1.0) -> None:
    """Count a use as a lookup does, which gives out a read."""
    slot.grants += 1
    directory.recency.touch(slot, now_s)
    directory.refresh(slot)


def use(directory: Kept, slot: Slot) -> None:
    begin_use(directory, slot)
    end_grant(directory, slot)


def by_somebody(_: Slot) -> bool:
    return True


def drain(directory: Kept) -> list[Slot]:
    """Drop what could be evicted, in the directory's own order."""
    order = []
    while (slot := directory.recency.coldest(by_nobody)) is not None:
        directory.drop(slot)
        order.append(slot)
    return order


# --- the order of use -----------------------------------------------------------------------------


def test_what_was_kept_first_goes_first() -> None:
    directory = Kept()
    slots = keep_some(directory, 5)
    assert drain(directory) == slots


def test_a_use_makes_a_slot_the_last_to_go() -> None:
    directory = Kept()
    a, b, c = keep_some(directory, 3)
    use(directory, a)
    use(directory, b)
    use(directory, a)
    assert drain(directory) == [c, b, a]


def test_a_use_is_timed() -> None:
    directory = Kept()
    slot = keep(directory, b"a")
    assert slot.used_s == 0.0
    begin_use(directory, slot, 7.5)
    assert slot.used_s == 7.5


def test_to_find_or_to_ask_is_no_use() -> None:
    directory = Kept()
    slots = keep_some(directory, 3)
    assert directory.find(b"0") is slots[0]
    assert b"0" in directory
    assert directory.recency.coldest(by_nobody) is slots[0]
    assert directory.recency.coldest(by_nobody) is slots[0]
    assert drain(directory) == slots


def test_a_use_counts_from_when_it_began_not_from_when_it_ended() -> None:
    directory = Kept()
    a, b = keep_some(directory, 2)
    begin_use(directory, a)
    use(directory, b)
    end_grant(directory, a)
    assert drain(directory) == [a, b]


def test_a_slot_that_is_used_while_nothing_reads_it_is_not_lost() -> None:
    directory = Kept()
    a, b = keep_some(directory, 2)
    directory.recency.touch(a, 1.0)
    directory.refresh(a)
    assert drain(directory) == [b, a]


@pytest.mark.parametrize(("begin", "end"), WAYS)
def test_it_goes_once_however_often_it_could(begin: Way, end: Way) -> None:
    directory = Kept()
    a, b = keep_some(directory, 2)
    for _ in range(3):
        begin(directory, a)
        end(directory, a)
    assert directory.recency.coldest_few(3, by_nobody) == [a, b]
    assert drain(directory) == [a, b]


# --- held -----------------------------------------------------------------------------------------


def test_what_is_held_is_passed_over_and_keeps_its_place() -> None:
    directory = Kept()
    slots = keep_some(directory, 6)
    held = {slots[0], slots[1], slots[3]}
    assert directory.recency.coldest(held.__contains__) is slots[2]
    assert directory.recency.coldest(held.__contains__) is slots[2]
    directory.drop(slots[2])
    assert directory.recency.coldest(held.__contains__) is slots[4]
    held.remove(slots[1])
    assert directory.recency.coldest(held.__contains__) is slots[1]
    assert drain(directory) == [slots[n] for n in (0, 1, 3, 4, 5)]


def test_when_all_is_held_nothing_goes_and_nothing_is_lost() -> None:
    directory = Kept()
    slots = keep_some(directory, 6)
    for _ in range(3):
        assert directory.recency.coldest(by_somebody) is None
    assert directory.idle_bytes == 6 * UNIT
    assert drain(directory) == slots


def test_who_holds_is_asked_only_of_what_could_go() -> None:
    directory = Kept()
    slots = keep_some(directory, 4)
    pin(directory, slots[0])
    grant(directory, slots[1])
    use(directory, slots[2])
    asked = list[Slot]()

    def held(slot: Slot) -> bool:
        asked.append(slot)
        return False

    assert directory.recency.coldest(held) is slots[3]
    assert asked == [slots[3]]


def test_the_coldest_few_are_those_that_would_go_next_in_that_order() -> None:
    directory = Kept()
    slots = keep_some(directory, 6)
    use(directory, slots[0])
    pin(directory, slots[1])
    grant(directory, slots[2])
    assert directory.recency.coldest_few(2, by_nobody) == [slots[3], slots[4]]
    assert directory.recency.coldest_few(10, by_nobody) == [slots[n] for n in (3, 4, 5, 0)]
    assert directory.recency.coldest_few(2, {slots[4]}.__contains__) == [slots[3], slots[5]]
    assert directory.recency.coldest_few(2, by_somebody) == []
    assert directory.recency.coldest_few(0, by_nobody) == []
    assert drain(directory) == [slots[n] for n in (3, 4, 5, 0)]


# --- what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("begin", "end"), [pytest.param(begin_use, end_grant, id="used"), *WAYS])
def test_the_heap_is_bounded_however_often_slots_are_used(begin: Way, end: Way) -> None:
    directory = Kept()
    slots = keep_some(directory, 10)
    chance = random.Random(1)
    longest = 0
    for _ in range(2000):
        slot = chance.choice(slots)
        begin(directory, slot)
        end(directory, slot)
        longest = max(longest, len(directory.recency._heap))
    assert longest <= 2 * len(slots) + 64
    assert len(drain(directory)) == len(slots)


@pytest.mark.parametrize("count", [60, 75, 300])
def test_the_order_outlives_repairs_and_rebuilding(count: int) -> None:
    """All are used since: repaired one by one, rebuilt at the last repair that is due, and early."""
    directory = Kept()
    order = keep_some(directory, count)
    pin(directory, order[3])
    random.Random(2).shuffle(order)
    for slot in order:
        use(directory, slot)
    assert drain(directory) == [slot for slot in order if slot.key != b"3"]


def test_the_heap_is_bounded_however_many_come_and_go() -> None:
    directory = Kept()
    for n in range(2000):
        directory.drop(keep(directory, b"%d" % n))
        assert len(directory.recency._heap) <= 2 * 1 + 64
    assert directory.recency.coldest(by_nobody) is None
    assert directory.recency._heap == []


def test_a_use_lengthens_nothing() -> None:
    directory = Kept()
    slots = keep_some(directory, 200)
    before = list(directory.recency._heap)
    for slot in slots[::-1]:
        begin_use(directory, slot)
        end_grant(directory, slot)
    assert directory.recency._heap == before
    assert drain(directory) == slots[::-1]


def test_one_search_puts_right_all_that_were_used_since() -> None:
    directory = Kept()
    slots = keep_some(directory, 1000)
    unused = slots.pop(700)
    random.Random(3).shuffle(slots)
    for slot in slots:
        use(directory, slot)
    assert directory.recency.coldest(by_nobody) is unused
    directory.drop(unused)
    assert directory.recency.coldest_few(3, by_nobody) == slots[:3]
    assert [slot for *_, slot in sorted(directory.recency._heap)[:999]] == slots
    assert drain(directory) == slots


def test_a_slot_that_has_another_feature_is_listed_once() -> None:
    directory = Kept()
    first, other = keep_some(directory, 2)
    directory.drop(first)
    assert directory.keep(b"again", first, 0.0) is None
    assert [slot for *_, slot in directory.recency._heap].count(first) == 1
    assert drain(directory) == [other, first]


def test_passing_over_what_is_held_does_not_lengthen_the_heap() -> None:
    directory = Kept()
    keep_some(directory, 10)
    for _ in range(100):
        directory.recency.coldest(by_somebody)
    assert len(directory.recency._heap) + len(directory.recency._parked) == 10


# --- all at once ----------------------------------------------------------------------------------


@dataclass
class Model:
    """The same by hand: a list in order of use, looked through from its beginning."""

    directory: Kept = field(default_factory=Kept)
    order: list[Slot] = field(default_factory=list)
    """What is kept, the longest unused first."""
    pins: dict[bytes, Counter[int]] = field(default_factory=dict)
    most_idle: int = 0

    def kept(self, key: bytes) -> Slot | None:
        return next((slot for slot in self.order if slot.key == key), None)

    def idle(self) -> list[Slot]:
        return [
            slot
            for slot in self.order
            if not slot.grants and not slot.reads_left and slot.key not in self.pins
        ]

    def last(self, slot: Slot) -> None:
        self.order.remove(slot)
        self.order.append(slot)

    def keep(self, key: bytes, slot: Slot) -> None:
        old = self.kept(key)
        assert self.directory.keep(key, slot, 0.0) is old
        if old is not None:
            self.order.remove(old)
        self.order.append(slot)

    def drop(self, slot: Slot) -> None:
        assert slot.key is not None
        self.pins.pop(slot.key, None)
        self.order.remove(slot)
        self.directory.drop(slot)

    def use(self, slot: Slot) -> None:
        begin_use(self.directory, slot)
        self.last(slot)

    def pin(self, key: bytes, session: int) -> None:
        self.directory.pin(key, session)
        self.pins.setdefault(key, Counter())[session] += 1

    def unpin(self, key: bytes, session: int) -> None:
        self.directory.unpin(key, session)
        if key in self.pins:
            whose = session if session in self.pins[key] else next(iter(self.pins[key]))
            self.take_pins(key, whose, 1)

    def unpin_all(self, session: int) -> None:
        self.directory.unpin_all(session)
        for key in [key for key, pins in self.pins.items() if session in pins]:
            self.take_pins(key, session, self.pins[key][session])

    def take_pins(self, key: bytes, session: int, count: int) -> None:
        self.pins[key][session] -= count
        self.pins[key] = +self.pins[key]  # without those that came to nought
        if not self.pins[key]:
            del self.pins[key]

    def evict(self, held: set[Slot]) -> None:
        expected = next((slot for slot in self.idle() if slot not in held), None)
        few = [slot for slot in self.idle() if slot not in held][:3]
        assert self.directory.recency.coldest_few(3, held.__contains__) == few
        found = self.directory.recency.coldest(held.__contains__)
        assert found is expected
        if found is not None:
            self.drop(found)

    def check(self) -> None:
        directory, idle = self.directory, self.idle()
        self.most_idle = max(self.most_idle, len(idle))
        assert {directory.find(key) for key in directory} == set(self.order)
        assert [slot for slot in self.order if slot.idle] == idle
        pinned = [slot for slot in self.order if slot.key in self.pins]
        counts = tuple(
            sum(slot.extent.size_bytes for slot in slots if slot.extent)
            for slots in (self.order, pinned, idle)
        )
        assert books(directory) == counts
        entries = len(directory.recency._heap) + len(directory.recency._parked)
        assert entries <= 2 * self.most_idle + 64


class Walk:
    """A walk at random over a model: which step, of which slot, for which session."""

    def __init__(self, seed: int, *, keys: int) -> None:
        self.chance = random.Random(seed)
        self.model = Model()
        self.keys = [b"%d" % n for n in range(keys)]
        self.spare = [slot_of(1 + n % 5, n) for n in range(keys + 3)]  # recycled, like a table's
        self.reading: list[Slot] = []
        """A slot for each grant that is out, also of those whose key was dropped."""

    def step(self) -> None:
        steps = [self.keep, self.use, self.use, self.use, self.end_use, self.end_use, self.end_use]
        steps += [self.owe, self.pay, self.pay, self.evict, self.drop]
        steps += [self.pin, self.unpin, self.unpin, self.unpin_all]
        self.chance.choice(steps)()
        self.model.check()

    def any_kept(self) -> Slot | None:
        return self.chance.choice(self.model.order) if self.model.order else None

    def keep(self) -> None:
        free = [slot for slot in self.spare if slot.key is None and not slot.grants]
        if free:
            slot = self.chance.choice(free)
            slot.reads_left = self.chance.choice([0, 0, 1, 2])
            self.model.keep(self.chance.choice(self.keys), slot)

    def use(self) -> None:
        if (slot := self.any_kept()) is not None:
            self.model.use(slot)
            self.reading.append(slot)

    def end_use(self) -> None:
        if self.reading:
            slot = self.reading.pop(self.chance.randrange(len(self.reading)))
            end_grant(self.model.directory, slot)

    def owe(self) -> None:
        """Not what a store does to a slot it has published, and no harm."""
        if (slot := self.any_kept()) is not None and self.chance.random() < 0.3:
            owe(self.model.directory, slot)

    def pay(self) -> None:
        owing = [slot for slot in self.model.order if slot.reads_left]
        if owing:
            pay(self.model.directory, self.chance.choice(owing))

    def evict(self) -> None:
        order = self.model.order
        held = {slot for slot in order if self.chance.random() < 0.3}
        self.model.evict(held)

    def drop(self) -> None:
        if (slot := self.any_kept()) is not None and self.chance.random() < 0.5:
            self.model.drop(slot)

    def pin(self) -> None:
        slot = self.any_kept()
        if slot is not None and slot.key is not None:
            self.model.pin(slot.key, self.chance.randrange(3))

    def unpin(self) -> None:
        self.model.unpin(self.chance.choice(self.keys), self.chance.randrange(4))

    def unpin_all(self) -> None:
        if self.chance.random() < 0.3:
            self.model.unpin_all(self.chance.randrange(3))


@pytest.mark.parametrize("keys", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", range(5))
def test_the_directory_is_a_list_in_order_of_use(seed: int, keys: int) -> None:
    walk = Walk(seed, keys=keys)
    for _ in range(1500):
        walk.step()
    while walk.reading:
        walk.end_use()
    for session in range(3):
        walk.model.unpin_all(session)
    for slot in walk.model.order:
        slot.reads_left = 0
        walk.model.directory.refresh(slot)
    expected = list(walk.model.order)
    assert drain(walk.model.directory) == expected
    assert books(walk.model.directory) == (0, 0, 0)
