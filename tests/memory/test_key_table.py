"""The key table: an entry for each key, however full its set, and no torn or stale place."""

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.memory import key_table as module
from featcache.memory.key_table import (
    ABSENT,
    SLOT_BITS,
    SLOT_MASK,
    UNKNOWN,
    KeyTable,
    OwnKeyTable,
    place_of,
)
from featcache.memory.words import KEY_SET_BYTES, RECORD_BYTES, OwnerWords

SLOTS = 64
Tables = tuple[OwnKeyTable, KeyTable]


def tables(slots: int = SLOTS) -> Tables:
    """A table as its owner writes it, and as another process maps it."""
    words, fd = OwnerWords.create(slots)
    try:
        return OwnKeyTable(words), KeyTable(OwnerWords.attach(fd, slots))
    finally:
        os.close(fd)


@pytest.fixture
def both() -> Tables:
    return tables()


def of_one_set(table: KeyTable, count: int) -> list[bytes]:
    """Keys that belong to one set."""
    found: dict[int, list[bytes]] = {}
    for number in range(1 << 20):
        key = b"%d" % number
        (low, _) = module._words_of(table.digest(key))
        alike = found.setdefault(low & table._mask, [])
        alike.append(key)
        if len(alike) == count:
            return alike
    raise AssertionError("no such keys")


def test_a_key_is_found_as_long_as_it_is_kept(both: Tables) -> None:
    owner, reader = both
    assert reader.find(b"a") == ABSENT
    owner.keep(b"a", 5, 7)
    assert reader.find(b"a") == owner.find(b"a") == place_of(5, 7)
    owner.keep(b"a", 6, 1)
    assert reader.find(b"a") == place_of(6, 1)
    owner.drop(b"a")
    owner.drop(b"a")
    owner.drop(b"never")
    assert reader.find(b"a") == ABSENT


def test_a_place_holds_any_slot_and_long_lived_generations() -> None:
    index, generation = (1 << SLOT_BITS) - 1, (1 << (64 - SLOT_BITS)) - 1
    place = place_of(index, generation)
    assert (place & SLOT_MASK, place >> SLOT_BITS) == (index, generation)
    assert place < 1 << 64


def test_a_full_set_says_that_it_can_not_tell(both: Tables) -> None:
    owner, reader = both
    ways = len(module._PLACES)
    keys = of_one_set(owner, ways + 3)
    kept, left_out, other = keys[:ways], keys[ways : ways + 2], keys[-1]
    for number, key in enumerate(kept + left_out):
        owner.keep(key, number, 1)
    for number, key in enumerate(kept):
        assert reader.find(key) == place_of(number, 1)
    # Neither of those that had no room, nor of one that is not there: the owner is to say.
    assert {reader.find(key) for key in [*left_out, other]} == {UNKNOWN}
    owner.drop(kept[0])
    assert reader.find(other) == UNKNOWN
    owner.keep(left_out[0], 9, 2)  # nothing moves: it stays out for as long as it is kept
    assert reader.find(left_out[0]) == UNKNOWN
    for key in left_out:
        owner.drop(key)
    assert {reader.find(key) for key in [*left_out, other, kept[0]]} == {ABSENT}
    owner.keep(other, 3, 3)
    assert reader.find(other) == place_of(3, 3)


def test_pools_have_secrets_of_their_own() -> None:
    """Keys that fill one set in a pool, or are alike in it, are not so in another."""
    (one, seen), (other, _) = tables(), tables()
    assert one.digest(b"a") == seen.digest(b"a") != other.digest(b"a")
    assert len(one.digest(b"a")) == 16


def test_sessions_can_not_write_it(both: Tables) -> None:
    with pytest.raises(TypeError):
        both[1]._words[both[1]._start_bytes >> 3] = 1


@pytest.mark.parametrize("size_bytes", [0, 1, RECORD_BYTES - 8, RECORD_BYTES - 7, 10_000])
def test_a_record_is_as_it_was_written_or_nothing(both: Tables, size_bytes: int) -> None:
    owner, reader = both
    data = os.urandom(size_bytes)
    owner.write_record(SLOTS - 1, os.urandom(RECORD_BYTES - 8))
    owner.write_record(SLOTS - 1, data)
    assert reader.record(SLOTS - 1) == (data if size_bytes <= RECORD_BYTES - 8 else b"")
    assert reader.record(SLOTS - 2) == b""


def test_a_record_whose_length_is_damaged_is_none(both: Tables) -> None:
    owner, reader = both
    owner._words[owner._records_bytes >> 3] = 1 << 63
    assert reader.record(0) == b""


@settings(max_examples=60, deadline=None)
@given(
    slots=st.sampled_from([1, 2, 5, 16]),
    steps=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=150),
)
def test_it_says_what_a_dict_says(slots: int, steps: list[tuple[int, bool]]) -> None:
    """Small tables, whose sets overflow: what is not known is never told wrong."""
    owner, reader = tables(slots)
    kept: dict[bytes, int] = {}
    for generation, (number, keep) in enumerate(steps, 1):
        key = b"%d" % number
        if keep:
            kept[key] = place_of(number, generation)
            owner.keep(key, number, generation)
        else:
            kept.pop(key, None)
            owner.drop(key)
        for other in range(41):
            name = b"%d" % other
            assert reader.find(name) in {kept.get(name, ABSENT), UNKNOWN}
    for key in list(kept):
        owner.drop(key)
    assert not any(
        owner._words[(owner._start_bytes >> 3) + 1 :: KEY_SET_BYTES >> 3][: owner._mask + 1]
    )
    assert not owner._kept
    assert reader.find(b"0") == ABSENT


# --- a reader between any two words of the owner -------------------------------------------------


class Interrupted:
    """Words of which each access, a load or a store, lets somebody else run first."""

    def __init__(self, words: Any, between: Callable[[], None]) -> None:
        self._words = words
        self._between = between
        self.instead: Callable[[int], int | None] = lambda _: None
        """What was loaded earlier, if it was."""

    def __getitem__(self, index: int) -> int:
        self._between()
        early = self.instead(index)
        return int(self._words[index]) if early is None else early

    def __setitem__(self, index: int, value: int) -> None:
        self._between()
        self._words[index] = value
        self._between()


def test_a_reader_between_any_two_words_of_the_owner_finds_old_or_new() -> None:
    """Also one whose owner stopped there: it is never made to wait."""
    owner, reader = tables(1)
    keys = [b"%d" % number for number in range(len(module._PLACES))]
    kept: dict[bytes, int] = {}
    allowed: dict[bytes, set[int]] = {key: {ABSENT} for key in keys}
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        for key in keys:
            found = reader.find(key)
            assert found in allowed[key], "there is room for all: it can always tell"

    owner._words = Interrupted(owner._words, look)  # type: ignore[assignment]
    chance = random.Random(1)
    for generation in range(1, 400):
        key = chance.choice(keys)
        dropping = chance.random() < 0.5
        new = ABSENT if dropping else place_of(0, generation)
        allowed[key] = {kept.get(key, ABSENT), new}
        if dropping:
            owner.drop(key)
            kept.pop(key, None)
        else:
            owner.keep(key, 0, generation)
            kept[key] = new
        allowed[key] = {new}
        look()
    assert looks > 1500


Change = Callable[[OwnKeyTable], None]
CHANGES: dict[str, list[tuple[Change, int]]] = {
    # What the owner does, and what is kept under "a" after it.
    "to another key and back": [
        (lambda owner: owner.drop(b"a"), ABSENT),
        (lambda owner: owner.keep(b"b", 0, 8), ABSENT),
        (lambda owner: owner.drop(b"b"), ABSENT),
        (lambda owner: owner.keep(b"a", 0, 9), place_of(0, 9)),
    ],
    "to another key": [
        (lambda owner: owner.drop(b"a"), ABSENT),
        (lambda owner: owner.keep(b"b", 0, 8), ABSENT),
        (lambda owner: owner.keep(b"c", 0, 9), ABSENT),
    ],
    "from another key": [
        (lambda owner: owner.drop(b"a"), ABSENT),
        (lambda owner: owner.keep(b"b", 0, 8), ABSENT),
        (lambda owner: owner.keep(b"a", 0, 9), place_of(0, 9)),
        (lambda owner: owner.keep(b"a", 0, 10), place_of(0, 10)),
    ],
}


class Logged:
    """The owner's words, whose stores are kept in their order."""

    def __init__(self, words: Any) -> None:
        self._words = words
        self.stores: list[tuple[int, int]] = []

    def __getitem__(self, index: int) -> int:
        return int(self._words[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value
        self.stores.append((index, value))


class Beside:
    """The owner's stores, carried out one by one between the loads of a reader."""

    def __init__(self, changes: list[tuple[Change, int]], *, early: bool = False) -> None:
        """The reader's loads of places come `early`, before those of the digests that lead to them."""
        self.owner, self.reader = tables(1)
        self.owner.keep(b"a", 0, 7)
        self._memory, self._start = self.owner._mapping, self.owner._mapping[:]
        self._words = self.owner._words
        self.owner._words = logged = Logged(self._words)  # type: ignore[assignment]
        self.allowed: list[set[int]] = [{place_of(0, 7)}]
        """What may be told of "a" before the first store, and after each."""
        for change, kept in changes:
            before, done = self.allowed[-1], len(logged.stores)
            change(self.owner)
            self.allowed += [before | {kept}] * (len(logged.stores) - done - 1) + [{kept}]
        self.stores = logged.stores
        self._at = 0
        self._turns: list[int] = []
        find = self.reader._find
        self.loaded: list[int] | None = None

        def finding(*args: Any) -> int:
            if early:
                self.loaded = self._words.tolist()
            self._go_on()
            return find(*args)

        self.reader._find = finding
        self.reader._words = words = Interrupted(self.reader._words, self._go_on)  # type: ignore[assignment]
        self._heads = {self.reader._start_bytes >> 3, (self.reader._start_bytes >> 3) + 1}
        if early:
            words.instead = self._loaded_early

    def _loaded_early(self, index: int) -> int | None:
        return None if self.loaded is None or index in self._heads else self.loaded[index]

    def _go_on(self) -> None:
        if self._turns:
            self._run(self._turns.pop(0))

    def _run(self, count: int) -> None:
        for index, value in self.stores[self._at : self._at + count]:
            self._words[index] = value
        self._at += count

    def looked_up(self, begun: int, turns: tuple[int, ...]) -> tuple[int, set[int]]:
        """Look "a" up after so many stores, with so many before each load; return what may be told too."""
        self._memory[:], self._at, self._turns, self.loaded = self._start, 0, [], None
        self._run(begun)
        self._turns = list(turns)
        found = self.reader.find(b"a")
        return found, set().union(*self.allowed[begun : self._at + 1])


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_reader_and_the_owner_word_by_word_in_every_order(
    changes: list[tuple[Change, int]],
) -> None:
    """A place that is told was its key's at some moment of the lookup, or is about to be."""
    told = all_orders(Beside(changes))
    assert told >= {place_of(0, 7), ABSENT, changes[-1][1]}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_on_a_weak_processor_a_place_that_is_loaded_early_is_no_other_keys(
    changes: list[tuple[Change, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only loads are early there: the owner's stores have their fences, and so has a reader's count."""
    monkeypatch.setattr(module, "TSO", False)
    all_orders(Beside(changes, early=True))


def all_orders(beside: "Beside") -> set[int]:
    """Look up in every order of loads and stores; return what was told."""
    told = set[int]()
    count = len(beside.stores)
    for begun in range(count + 1):
        for turns in itertools.product(range(count + 1 - begun), repeat=3):
            if begun + sum(turns) <= count:
                found, allowed = beside.looked_up(begun, (0, *turns))
                assert found in allowed
                told.add(found)
    return told


def test_a_table_that_is_left_open_says_of_no_key_that_it_is_absent(both: Tables) -> None:
    owner, reader = both
    alike = of_one_set(reader, len(module._PLACES) + 2)
    owner.keep(alike[0], 1, 1)
    owner.leave_open()
    for n, key in enumerate(alike[1:], 2):
        owner.keep(key, n, 1)
    assert [reader.find(key) for key in alike[:4]] == [place_of(n, 1) for n in range(1, 5)]
    for key in alike:
        owner.drop(key)
    assert {reader.find(key) for key in [*alike, b"never"]} == {UNKNOWN}
    owner.keep(alike[-1], 9, 2)
    assert reader.find(alike[-1]) == place_of(9, 2)
