"""Sessions that look keys up, and their owner, who overwrites and evicts, word by word in any order."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from featcache.errors import CacheClosed
from featcache.memory.key_table import ABSENT
from featcache.memory.words import Header
from featcache.session.leased_reads import NO_ENTRY
from session.hit_world import Reader, World
from support.stepping import Actor

KEYS = [b"k%d" % number for number in range(4)]
IN_CI = bool(os.environ.get("CI"))
ORDERS, STORMS = (200, 12) if IN_CI else (25, 4)
"""Orders at random of each change, beside all with one interruption; and storms. CI takes more of them."""
Work = Callable[[], object]


@contextmanager
def world_of(deferred: list[bool], **changes: Any) -> Iterator[World]:
    world = World(**changes)
    try:
        for number, late in enumerate(deferred, 1):
            Reader(world, number, deferred=late)
        yield world
        finish(world)
        nothing_left(world)
    finally:
        world.close()


def finish(world: World) -> None:
    """Have all that was begun come to its end, and end the reads that are out."""
    actors = [world.owner, *(a for r in world.readers if not r.died for a in r.actors)]
    while any(actor.busy for actor in actors):
        for actor in actors:
            actor.advance()
    for reader in world.readers:
        if reader.died:
            continue
        for lease in reader.borrowed:
            reader.end(lease, 0)
        reader.borrowed.clear()
        while streams := [stream for stream in reader.streams if stream.can_run]:
            streams[0].run()
        assert not any(stream.work for stream in reader.streams)
    look_at(world)


def look_at(world: World) -> None:
    """What must hold at every step."""
    for reading in world.inside:
        world.check_bytes(reading.feature)


def nothing_left(world: World) -> None:
    """Lookups are counted, entries are free, and an owner that drops its keys has all its room."""
    hits, misses, _ = world.pool.uses.lookups(world.pool.store)
    doubt = sum(len(reader.actors) for reader in world.readers if reader.died)  # it died inside one
    told_hits = sum(reader.hits_had for reader in world.readers)
    told_misses = sum(reader.misses_had for reader in world.readers)
    assert told_hits - doubt <= hits <= told_hits + doubt
    assert told_misses - doubt <= misses <= told_misses + doubt
    for reader in world.readers:
        if reader.died:
            if reader.number in world.pool.pages:
                world.owner.do(lambda: world.settle(reader))  # noqa: B023 - called now
            continue
        attachment = reader.attachment
        assert reader.own.serial.tolist() == reader.own.ended.tolist()
        assert attachment.holds == 0
        attachment._take_landed()
        assert sorted(attachment._free) == list(range(len(attachment._lease)))
    for key in KEYS:
        world.owner.do(lambda: world.evict(key))  # noqa: B023 - called now
    world.owner.do(lambda: world.pass_time(10.0))
    world.owner.do(lambda: world.pass_time(10.0))
    store = world.pool.store
    assert (store.allocator.used_bytes, store.table.used, len(store.directory)) == (0, 0, 0)
    assert all(world.pool.key_table.find(key) == ABSENT for key in KEYS)


def owners_work(world: World, what: int, key: bytes, units: int) -> Work:
    works: list[Work] = [
        *[lambda: world.put(key, units)] * 4,
        lambda: world.put(key, units, readers=1),
        lambda: world.put(key, units, long=True),
        *[lambda: world.evict(key)] * 2,
        lambda: world.discard(units),
        lambda: world.pass_time(1.0),
        world.collect,
        lambda: world.ask(units, key),
    ]
    return works[what]


def readers_work(reader: Reader, what: int, key: bytes, stream: int) -> Work:
    borrowed = reader.borrowed
    match what:
        case 0 | 1 | 2:
            return lambda: reader.get(key, stream)
        case 3:
            return lambda: reader.borrow(key)
        case 4 | 5 | 6 if borrowed:
            lease = borrowed.pop(stream % len(borrowed))
            if what == 6:
                return lambda: reader.give_back(lease)
            return lambda: reader.end(lease, stream, twice=what == 4)
        case _:
            return lambda: reader.contains(key)


# --- all orders of a few ----------------------------------------------------------------------------

Change = tuple[str, bytes, int]
OWNERS: dict[str, list[Change]] = {
    "overwrites it": [("put", b"k0", 2)],
    "overwrites it with another size": [("put", b"k0", 3)],
    "evicts it and puts another": [("evict", b"k0", 0), ("put", b"k1", 4)],
    "evicts it for room": [("put", b"k1", 4)],
    "evicts it and puts it again": [("evict", b"k0", 0), ("put", b"k0", 4)],
    "overwrites it twice": [("put", b"k0", 2), ("put", b"k0", 4)],
}


def changed(world: World, changes: list[Change]) -> None:
    for what, key, units in changes:
        if what == "put":
            world.put(key, units)
        else:
            world.evict(key)


def length(
    prepare: Callable[[World], None], work: Callable[[World], Work], who: Callable[[World], Actor]
) -> int:
    """Accesses of some work when nobody else does anything."""
    with world_of([False]) as world:
        prepare(world)
        actor = who(world)
        before = actor.accesses
        actor.do(work(world))
        return actor.accesses - before


def in_order(changes: list[Change], moves: tuple[tuple[bool, int], ...], *, deferred: bool) -> None:
    """A reader gets k0 while its owner works: who is moved, and by how much."""
    with world_of([deferred]) as world:
        world.owner.do(lambda: world.put(b"k0", 2))
        reader = world.readers[0]
        actors = world.owner, reader.actors[0]
        actors[0].begin(lambda: changed(world, changes))
        actors[1].begin(lambda: reader.get(b"k0", 0))
        for reads, accesses in moves:
            actors[reads].advance(accesses)
            look_at(world)


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "by a stream"])
@pytest.mark.parametrize("changes", OWNERS.values(), ids=OWNERS)
def test_a_reader_and_the_owner_word_by_word(changes: list[Change], *, deferred: bool) -> None:
    """Each comes between any two words of the other, as a whole and by pieces."""

    def prepare(world: World) -> None:
        world.owner.do(lambda: world.put(b"k0", 2))

    reads = length(
        prepare, lambda w: lambda: w.readers[0].get(b"k0", 0), lambda w: w.readers[0].actors[0]
    )
    writes = length(prepare, lambda w: lambda: changed(w, changes), lambda w: w.owner)
    everything = 1 << 30
    for first in range(reads + 1):
        in_order(
            changes, ((True, first), (False, everything), (True, everything)), deferred=deferred
        )
    for first in range(writes + 1):
        in_order(
            changes, ((False, first), (True, everything), (False, everything)), deferred=deferred
        )
    chance = random.Random(1)
    for _ in range(ORDERS):
        moves = [
            (bool(number % 2), chance.randint(1, 9)) for number in range(2 * max(reads, writes))
        ]
        in_order(changes, tuple(moves), deferred=deferred)


def until(actor: Actor, holds: Callable[[], bool]) -> None:
    """Move an actor until something holds, and no further."""
    while not holds():
        assert not actor.advance(1), "it never held"


@pytest.mark.parametrize("by", ["key", "ref"])
def test_no_read_begins_once_its_session_was_told_to_end(by: str) -> None:
    """Its end looks for reads that are out once: what begins later the owner would not know of."""
    with world_of([False]) as world:
        world.owner.do(lambda: world.put(b"k0", 2, readers=1))
        reader = world.readers[0]
        attachment, actor = reader.attachment, reader.actors[0]
        actor.do(lambda: reader.get(b"k0", 0))  # from now on it knows the ref
        ref = next(iter(world.pool.kept.values()))
        begin = {"key": lambda: reader.get(b"k0", 0), "ref": lambda: attachment.pin(ref)}[by]
        actor.begin(begin)
        actor.advance(0)  # it was open as it was asked
        attachment.refuse(CacheClosed("closed"))
        assert attachment.holds == 0
        with pytest.raises(CacheClosed):
            actor.advance()
        assert attachment.holds == 0
        world.lookups.clear()


def test_a_lease_that_is_taken_back_rings_like_one_that_ends() -> None:
    """The owner found it in use as it evicted for a put that waits."""
    with world_of([False]) as world:
        world.owner.do(lambda: world.put(b"k0", 2))
        reader = world.readers[0]
        actor, own, store = reader.actors[0], reader.own, world.pool.store
        actor.begin(lambda: reader.get(b"k0", 0))
        until(actor, lambda: own.serial[0] == 1)
        world.owner.do(lambda: world.evict(b"k0"))
        assert store.table.used == 1, "it may be read"
        world.pool.words.header[Header.WAITING] = 1
        actor.advance()
        assert own.ended[0] == 1
        assert reader.rings == 1
        world.pool.words.header[Header.WAITING] = 0


def test_granted_reads_and_those_of_entries_are_bounded_together() -> None:
    """By `Settings.grants`, as the owner counts them: three here."""
    with world_of([False]) as world:
        world.owner.do(lambda: world.put(b"k0", 2))
        attachment, place = world.readers[0].attachment, world.truth[b"k0"]
        for index in range(2):
            attachment.take_grant(index, 1)
        first = attachment.begin_lease(place)
        assert first[0] >= 0
        assert attachment.begin_lease(place) == (NO_ENTRY, 0)
        attachment.pay_grant(0, 1, None, None)
        second = attachment.begin_lease(place)
        assert second[0] >= 0
        for lease in (first, second):
            attachment.take_back_lease(*lease)
        attachment.pay_grant(1, 1, None, None)


def test_a_read_with_two_uses_ends_behind_the_streams_of_both() -> None:
    """The stream of the last use to end may be done long before the other's."""
    with world_of([True]) as world:
        world.owner.do(lambda: world.put(b"k0", 2))
        reader = world.readers[0]
        reader.actors[0].do(lambda: reader.borrow(b"k0"))
        lease = reader.borrowed.pop()
        reader.actors[0].do(lambda: reader.end(lease, 0, twice=True))
        while reader.streams[0].can_run:
            reader.streams[0].run()
        world.owner.do(lambda: world.evict(b"k0"))
        assert world.pool.store.table.used == 1, "the other stream still reads it"
        reader.streams[1].run()
        for stream in reader.streams:
            while stream.can_run:
                stream.run()
        world.owner.do(world.collect)
        assert world.pool.store.table.used == 0


# --- whatever comes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(STORMS))
def test_a_storm(seed: int) -> None:
    chance = random.Random(seed)
    deferred = [chance.random() < 0.5 for _ in range(2)]
    sizes = {"units": chance.randint(4, 9), "slots": chance.randint(2, 6)}
    with world_of(deferred, **sizes, ways=chance.choice([1, 2, 10])) as world:
        for _ in range(1500):
            a_step(world, chance)
            look_at(world)


def attach_anew(world: World) -> None:
    """Have a session in the place of each that died. The owner is about to begin something."""
    while len(world.living) < 2:
        Reader(world, len(world.readers) + 1, deferred=world.readers[-1].deferred)


def a_step(world: World, chance: random.Random) -> None:
    key = chance.choice(KEYS)
    if chance.random() < 0.35:
        actor = world.owner
        if not actor.busy:
            dead = [r for r in world.readers if r.died and r.number in world.pool.pages]
            what, units = chance.randrange(12), chance.randint(1, 3)
            work = owners_work(world, what, key, units)
            attach_anew(world)
            actor.begin((lambda: world.settle(dead[0])) if dead else work)
    else:
        if not world.living:
            return
        reader = chance.choice(world.living)
        if chance.random() < 0.3:
            streams = [stream for stream in reader.streams if stream.can_run]
            if streams:
                chance.choice(streams).run()
            return
        if chance.random() < 0.002:
            reader.kill()
            return
        actor = chance.choice(reader.actors)
        if not actor.busy:
            actor.begin(readers_work(reader, chance.randrange(9), key, chance.randrange(2)))
    actor.advance(chance.choice([1, 1, 2, 3, 5, 8, 20, 1 << 30]))


class HitMachine(RuleBasedStateMachine):
    """As the storm, in the order that hypothesis chooses, and made small if it fails."""

    world: World

    @initialize(
        deferred=st.lists(st.booleans(), min_size=2, max_size=2),
        units=st.integers(4, 9),
        slots=st.integers(2, 6),
        grace_s=st.sampled_from([0.0, 0.5]),
        ways=st.sampled_from([10, 1, 2]),
    )
    def make(self, deferred: list[bool], units: int, slots: int, grace_s: float, ways: int) -> None:
        self.world = World(units, slots, grace_s=grace_s, ways=ways)
        for number, late in enumerate(deferred, 1):
            Reader(self.world, number, deferred=late)

    def reader(self, who: int) -> Reader | None:
        """One of those that live."""
        living = self.world.living
        return living[who % 2] if who % 2 < len(living) else None

    @rule(
        what=st.integers(0, 11),
        key=st.sampled_from(KEYS),
        units=st.integers(1, 3),
        accesses=st.sampled_from([1 << 30, 1, 2, 5, 9]),
    )
    def the_owner_begins(self, what: int, key: bytes, units: int, accesses: int) -> None:
        world = self.world
        if not world.owner.busy:
            dead = [r for r in world.readers if r.died and r.number in world.pool.pages]
            work = owners_work(world, what, key, units)
            attach_anew(world)
            world.owner.begin((lambda: world.settle(dead[0])) if dead else work)
        world.owner.advance(accesses)

    @rule(
        who=st.integers(0, 3),
        what=st.integers(0, 8),
        key=st.sampled_from(KEYS),
        stream=st.integers(0, 1),
        accesses=st.sampled_from([1 << 30, 1, 2, 5, 9]),
    )
    def a_reader_begins(self, who: int, what: int, key: bytes, stream: int, accesses: int) -> None:
        reader = self.reader(who)
        if reader is not None:
            actor = reader.actors[who // 2]
            if not actor.busy:
                actor.begin(readers_work(reader, what, key, stream))
            actor.advance(accesses)

    @rule(who=st.integers(0, 4), accesses=st.integers(1, 6))
    def one_goes_on(self, who: int, accesses: int) -> None:
        reader = self.reader(who)
        if who == 4 or reader is None:
            self.world.owner.advance(accesses)
        else:
            reader.actors[who // 2].advance(accesses)

    @rule(who=st.integers(0, 1), stream=st.integers(0, 1))
    def a_stream_goes_on(self, who: int, stream: int) -> None:
        reader = self.reader(who)
        if reader is not None and reader.streams[stream].can_run:
            reader.streams[stream].run()

    @rule(who=st.integers(0, 1))
    def a_session_dies(self, who: int) -> None:
        reader = self.reader(who)
        if reader is not None and len(self.world.readers) < 5:
            reader.kill()

    @invariant()
    def bytes_are_the_keys(self) -> None:
        if hasattr(self, "world"):
            look_at(self.world)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            finish(self.world)
            nothing_left(self.world)
        finally:
            self.world.close()


TestHitMachine = HitMachine.TestCase
TestHitMachine.settings = settings(stateful_step_count=60)
