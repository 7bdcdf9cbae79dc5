"""The directory against what a plain list says: keys, the order of use, pins, counts of bytes."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from featcache.core.allocator import ALIGNMENT_BYTES, Extent
from featcache.core.directory import Directory
from featcache.core.slots import Slot, SlotState

UNIT = ALIGNMENT_BYTES


def slot_of(units: int = 1, index: int = 0) -> Slot:
    """A slot as it is when it has just been published and owes no reads."""
    slot = Slot(index)
    slot.state = SlotState.PUBLISHED
    slot.extent = Extent(index * UNIT, units * UNIT, None)
    slot.nbytes = units * UNIT - 1  # books count extents, not what was asked for
    return slot


def keep(directory: Directory, key: bytes, units: int = 1) -> Slot:
    slot = slot_of(units)
    assert directory.keep(key, slot, 0.0) is None
    return slot


def keep_some(directory: Directory, count: int) -> list[Slot]:
    return [keep(directory, b"%d" % n) for n in range(count)]


def begin_use(directory: Directory, slot: Slot, now_s: float = 1.0) -> None:
    """Count a use as a lookup does, which gives out a read."""
    slot.grants += 1
    directory.touch(slot, now_s)
    directory.refresh(slot)


def end_use(directory: Directory, slot: Slot) -> None:
    slot.grants -= 1
    directory.refresh(slot)


def use(directory: Directory, slot: Slot) -> None:
    begin_use(directory, slot)
    end_use(directory, slot)


def by_nobody(_: Slot) -> bool:
    return False


def by_somebody(_: Slot) -> bool:
    return True


def drain(directory: Directory) -> list[Slot]:
    """Drop what could be evicted, in the directory's own order."""
    order = []
    while (slot := directory.coldest(by_nobody)) is not None:
        directory.drop(slot)
        order.append(slot)
    return order


def books(directory: Directory) -> tuple[int, int, int]:
    return directory.resident_bytes, directory.pinned_bytes, directory.idle_bytes


# --- keys ---------------------------------------------------------------------------------------


def test_an_empty_directory() -> None:
    directory = Directory()
    assert len(directory) == 0
    assert list(directory) == []
    assert b"a" not in directory
    assert directory.find(b"a") is None
    assert not directory.is_pinned(b"a")
    assert directory.coldest(by_nobody) is None
    assert books(directory) == (0, 0, 0)


def test_what_is_kept_is_found_under_its_key() -> None:
    directory = Directory()
    a, b = keep(directory, b"a"), keep(directory, b"b", 2)
    assert (directory.find(b"a"), directory.find(b"b")) == (a, b)
    assert (a.key, b.key) == (b"a", b"b")
    assert b"a" in directory
    assert (len(directory), list(directory)) == (2, [b"a", b"b"])
    assert books(directory) == (3 * UNIT, 0, 3 * UNIT)


def test_what_is_dropped_is_kept_no_longer() -> None:
    directory = Directory()
    a, b = keep(directory, b"a"), keep(directory, b"b", 2)
    directory.drop(a)
    assert a.key is None
    assert not a.idle
    assert directory.find(b"a") is None
    assert list(directory) == [b"b"]
    assert books(directory) == (2 * UNIT, 0, 2 * UNIT)
    assert drain(directory) == [b]
    assert books(directory) == (0, 0, 0)


def test_a_feature_that_comes_under_a_key_puts_out_the_one_before() -> None:
    directory = Directory()
    old, other = keep(directory, b"a", 3), keep(directory, b"b")
    new = slot_of(2)
    assert directory.keep(b"a", new, 5.0) is old
    assert (old.key, old.idle) == (None, False)
    assert (directory.find(b"a"), new.key, new.used_s) == (new, b"a", 5.0)
    assert len(directory) == 2
    assert books(directory) == (3 * UNIT, 0, 3 * UNIT)
    assert drain(directory) == [other, new]


def test_a_slot_can_be_kept_under_one_key_after_the_other() -> None:
    """Entries of its first life are still in the heap, and must not count for the second."""
    directory = Directory()
    slot, other = keep(directory, b"a"), keep(directory, b"b")
    directory.drop(slot)
    assert directory.keep(b"c", slot, 0.0) is None
    assert drain(directory) == [other, slot]


def test_a_slot_that_came_back_while_it_is_read_is_not_taken_for_its_first_life() -> None:
    directory = Directory()
    slot = keep(directory, b"a")
    directory.drop(slot)
    slot.reads_left = 1
    directory.keep(b"a", slot, 0.0)
    assert directory.coldest(by_nobody) is None


# --- the order of use ---------------------------------------------------------------------------


def test_what_was_kept_first_goes_first() -> None:
    directory = Directory()
    slots = keep_some(directory, 5)
    assert drain(directory) == slots


def test_a_use_makes_a_slot_the_last_to_go() -> None:
    directory = Directory()
    a, b, c = keep_some(directory, 3)
    use(directory, a)
    use(directory, b)
    use(directory, a)
    assert drain(directory) == [c, b, a]


def test_a_use_is_timed() -> None:
    directory = Directory()
    slot = keep(directory, b"a")
    assert slot.used_s == 0.0
    begin_use(directory, slot, 7.5)
    assert slot.used_s == 7.5


def test_to_find_or_to_ask_is_no_use() -> None:
    directory = Directory()
    slots = keep_some(directory, 3)
    assert directory.find(b"0") is slots[0]
    assert b"0" in directory
    assert directory.coldest(by_nobody) is slots[0]
    assert directory.coldest(by_nobody) is slots[0]
    assert drain(directory) == slots


def test_a_use_counts_from_when_it_began_not_from_when_it_ended() -> None:
    directory = Directory()
    a, b = keep_some(directory, 2)
    begin_use(directory, a)
    use(directory, b)
    end_use(directory, a)
    assert drain(directory) == [a, b]


def test_a_slot_that_is_used_while_nothing_reads_it_is_not_lost() -> None:
    directory = Directory()
    a, b = keep_some(directory, 2)
    directory.touch(a, 1.0)
    directory.refresh(a)
    assert drain(directory) == [b, a]


Way = Callable[[Directory, Slot], object]


def grant(directory: Directory, slot: Slot) -> None:
    slot.grants += 1
    directory.refresh(slot)


def owe(directory: Directory, slot: Slot) -> None:
    slot.reads_left += 1
    directory.refresh(slot)


def pay(directory: Directory, slot: Slot) -> None:
    slot.reads_left -= 1
    directory.refresh(slot)


def pin(directory: Directory, slot: Slot) -> None:
    assert slot.key is not None
    directory.pin(slot.key, 1)


def unpin(directory: Directory, slot: Slot) -> None:
    assert slot.key is not None
    directory.unpin(slot.key, 1)


WAYS = [
    pytest.param(grant, end_use, id="granted"),
    pytest.param(owe, pay, id="owed"),
    pytest.param(pin, unpin, id="pinned"),
]


@pytest.mark.parametrize(("begin", "end"), WAYS)
def test_what_is_read_owed_or_pinned_can_not_go(begin: Way, end: Way) -> None:
    directory = Directory()
    a, b, c = keep(directory, b"a", 3), keep(directory, b"b"), keep(directory, b"c")
    begin(directory, a)
    assert directory.coldest(by_nobody) is b
    assert directory.resident_bytes == 5 * UNIT
    assert directory.idle_bytes == 2 * UNIT
    end(directory, a)
    assert directory.idle_bytes == 5 * UNIT
    assert drain(directory) == [a, b, c]


@pytest.mark.parametrize(("begin", "end"), WAYS)
def test_what_is_so_twice_is_so_until_both_ended(begin: Way, end: Way) -> None:
    directory = Directory()
    slot = keep(directory, b"a")
    begin(directory, slot)
    begin(directory, slot)
    end(directory, slot)
    assert directory.coldest(by_nobody) is None
    assert directory.idle_bytes == 0
    end(directory, slot)
    assert directory.coldest(by_nobody) is slot


@pytest.mark.parametrize(("begin", "end"), WAYS)
def test_it_goes_once_however_often_it_could(begin: Way, end: Way) -> None:
    directory = Directory()
    a, b = keep_some(directory, 2)
    for _ in range(3):
        begin(directory, a)
        end(directory, a)
    assert drain(directory) == [a, b]


def test_what_is_kept_while_reads_are_owed_can_go_once_they_are_paid() -> None:
    directory = Directory()
    slot = slot_of()
    slot.reads_left = 1
    directory.keep(b"a", slot, 0.0)
    assert directory.coldest(by_nobody) is None
    assert books(directory) == (UNIT, 0, 0)
    pay(directory, slot)
    assert directory.coldest(by_nobody) is slot
    assert books(directory) == (UNIT, 0, UNIT)


@pytest.mark.parametrize("state", [SlotState.FREE, SlotState.RESERVED, SlotState.RETIRING])
def test_only_a_published_slot_can_go(state: SlotState) -> None:
    directory = Directory()
    slot = keep(directory, b"a")
    slot.state = state
    directory.refresh(slot)
    assert directory.coldest(by_nobody) is None
    assert directory.idle_bytes == 0


# --- held ---------------------------------------------------------------------------------------


def test_what_is_held_is_passed_over_and_keeps_its_place() -> None:
    directory = Directory()
    slots = keep_some(directory, 6)
    held = {slots[0], slots[1], slots[3]}
    assert directory.coldest(held.__contains__) is slots[2]
    assert directory.coldest(held.__contains__) is slots[2]
    directory.drop(slots[2])
    assert directory.coldest(held.__contains__) is slots[4]
    held.remove(slots[1])
    assert directory.coldest(held.__contains__) is slots[1]
    assert drain(directory) == [slots[n] for n in (0, 1, 3, 4, 5)]


def test_when_all_is_held_nothing_goes_and_nothing_is_lost() -> None:
    directory = Directory()
    slots = keep_some(directory, 6)
    for _ in range(3):
        assert directory.coldest(by_somebody) is None
    assert directory.idle_bytes == 6 * UNIT
    assert drain(directory) == slots


def test_who_holds_is_asked_only_of_what_could_go() -> None:
    directory = Directory()
    slots = keep_some(directory, 4)
    pin(directory, slots[0])
    grant(directory, slots[1])
    use(directory, slots[2])
    asked = list[Slot]()

    def held(slot: Slot) -> bool:
        asked.append(slot)
        return False

    assert directory.coldest(held) is slots[3]
    assert asked == [slots[3]]


def test_the_coldest_few_are_those_that_would_go_next_in_that_order() -> None:
    directory = Directory()
    slots = keep_some(directory, 6)
    use(directory, slots[0])
    pin(directory, slots[1])
    grant(directory, slots[2])
    assert directory.coldest_few(2, by_nobody) == [slots[3], slots[4]]
    assert directory.coldest_few(10, by_nobody) == [slots[n] for n in (3, 4, 5, 0)]
    assert directory.coldest_few(2, {slots[4]}.__contains__) == [slots[3], slots[5]]
    assert directory.coldest_few(2, by_somebody) == []
    assert directory.coldest_few(0, by_nobody) == []
    assert drain(directory) == [slots[n] for n in (3, 4, 5, 0)]


def test_each_of_the_coldest_few_is_told_once() -> None:
    """The heap has an entry for each time that it could go."""
    directory = Directory()
    a, b = keep_some(directory, 2)
    for _ in range(3):
        pin(directory, a)
        unpin(directory, a)
    assert directory.coldest_few(2, by_nobody) == [a, b]
    assert drain(directory) == [a, b]


# --- pins ---------------------------------------------------------------------------------------


def test_each_pin_is_taken_back_by_itself() -> None:
    directory = Directory()
    slot = keep(directory, b"a", 2)
    for session in (1, 2, 1):
        directory.pin(b"a", session)
        assert books(directory) == (2 * UNIT, 2 * UNIT, 0)
    for session in (1, 2, 1):
        assert directory.is_pinned(b"a")
        assert directory.coldest(by_nobody) is None
        directory.unpin(b"a", session)
    assert not directory.is_pinned(b"a")
    assert books(directory) == (2 * UNIT, 0, 2 * UNIT)
    assert directory.coldest(by_nobody) is slot


def test_a_session_without_a_pin_takes_back_the_oldest_of_anothers() -> None:
    directory = Directory()
    keep(directory, b"a")
    for session in (1, 2):
        directory.pin(b"a", session)
    directory.unpin(b"a", 3)
    directory.unpin_all(1)  # has none any more
    assert directory.is_pinned(b"a")
    directory.unpin_all(2)
    assert not directory.is_pinned(b"a")


def test_unpinning_what_is_not_pinned_is_nothing() -> None:
    directory = Directory()
    keep(directory, b"a")
    directory.unpin(b"a", 1)
    directory.unpin(b"b", 1)
    directory.unpin_all(1)
    assert books(directory) == (UNIT, 0, UNIT)


def test_all_pins_of_a_session_are_taken_back_at_once() -> None:
    directory = Directory()
    slots = [keep(directory, key, units) for key, units in ((b"a", 1), (b"b", 2), (b"c", 4))]
    for key, session in ((b"a", 1), (b"a", 1), (b"b", 1), (b"b", 2), (b"c", 2)):
        directory.pin(key, session)
    directory.unpin_all(1)
    assert books(directory) == (7 * UNIT, 6 * UNIT, UNIT)
    directory.unpin_all(1)
    directory.unpin_all(2)
    assert books(directory) == (7 * UNIT, 0, 7 * UNIT)
    assert drain(directory) == slots


def test_pins_are_a_keys_and_hold_for_the_feature_that_comes_under_it() -> None:
    directory = Directory()
    keep(directory, b"a", 3)
    directory.pin(b"a", 1)
    new = slot_of(2)
    directory.keep(b"a", new, 0.0)
    assert directory.is_pinned(b"a")
    assert books(directory) == (2 * UNIT, 2 * UNIT, 0)
    directory.unpin(b"a", 1)
    assert directory.coldest(by_nobody) is new


def test_pins_go_with_their_key() -> None:
    directory = Directory()
    slot = keep(directory, b"a", 3)
    directory.pin(b"a", 1)
    directory.drop(slot)
    assert not directory.is_pinned(b"a")
    assert books(directory) == (0, 0, 0)
    keep(directory, b"a")
    directory.unpin_all(1)
    assert books(directory) == (UNIT, 0, UNIT)


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize(("begin", "end"), [pytest.param(begin_use, end_use, id="used"), *WAYS])
def test_the_heap_is_bounded_however_often_slots_are_used(begin: Way, end: Way) -> None:
    directory = Directory()
    slots = keep_some(directory, 10)
    chance = random.Random(1)
    longest = 0
    for _ in range(2000):
        slot = chance.choice(slots)
        begin(directory, slot)
        end(directory, slot)
        longest = max(longest, len(directory._coldest))
    assert longest <= 2 * len(slots) + 64
    assert len(drain(directory)) == len(slots)


@pytest.mark.parametrize("uses", range(60, 100))
def test_the_order_outlives_the_heap_being_built_anew(uses: int) -> None:
    """Which it is at one of these lengths, with nothing after that could hide a fault."""
    directory = Directory()
    order = keep_some(directory, 6)
    pin(directory, order[3])
    chance = random.Random(2)
    for _ in range(uses):
        slot = chance.choice(order)
        use(directory, slot)
        order.remove(slot)
        order.append(slot)
    pinned = next(slot for slot in order if slot.key == b"3")
    assert drain(directory) == [slot for slot in order if slot is not pinned]


def test_the_heap_is_bounded_however_many_come_and_go() -> None:
    directory = Directory()
    for n in range(2000):
        directory.drop(keep(directory, b"%d" % n))
        assert len(directory._coldest) <= 2 * 1 + 64
    assert directory.coldest(by_nobody) is None
    assert directory._coldest == []


def test_a_use_lengthens_nothing() -> None:
    directory = Directory()
    slots = keep_some(directory, 200)
    before = list(directory._coldest)
    for slot in slots[::-1]:
        begin_use(directory, slot)
        end_use(directory, slot)
    assert directory._coldest == before
    assert drain(directory) == slots[::-1]


def test_one_search_puts_right_all_that_were_used_since() -> None:
    directory = Directory()
    slots = keep_some(directory, 1000)
    unused = slots.pop(700)
    random.Random(3).shuffle(slots)
    for slot in slots:
        use(directory, slot)
    assert directory.coldest(by_nobody) is unused
    directory.drop(unused)
    assert directory.coldest_few(3, by_nobody) == slots[:3]
    assert sorted(directory._coldest)[:999] == [(slot.tick, slot) for slot in slots]
    assert drain(directory) == slots


def test_a_slot_that_has_another_feature_is_listed_once() -> None:
    directory = Directory()
    first, other = keep_some(directory, 2)
    directory.drop(first)
    assert directory.keep(b"again", first, 0.0) is None
    assert [slot for _, slot in directory._coldest].count(first) == 1
    assert drain(directory) == [other, first]


def test_passing_over_what_is_held_does_not_lengthen_the_heap() -> None:
    directory = Directory()
    keep_some(directory, 10)
    for _ in range(100):
        directory.coldest(by_somebody)
    assert len(directory._coldest) == 10


# --- all at once --------------------------------------------------------------------------------


@dataclass
class Model:
    """The same by hand: a list in order of use, looked through from its beginning."""

    directory: Directory = field(default_factory=Directory)
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
        assert self.directory.coldest_few(3, held.__contains__) == few
        found = self.directory.coldest(held.__contains__)
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
        assert len(directory._coldest) <= 2 * self.most_idle + 64


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
            end_use(self.model.directory, slot)

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
