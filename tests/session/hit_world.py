"""One owner's real pool and the real sessions of some readers, over a slab that is a model.

The slab's bytes are the names of features, which are poisoned when an extent is recycled. Every access
of a shared word is a step (`support.stepping`). Where words come late, a read and the word that ends it
are on a stream, and happen when the test runs it.
"""

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest

from featcache.control.turns import TURN_UNITS
from featcache.core.allocator import ALIGNMENT_BYTES
from featcache.core.effects import Limits
from featcache.core.put_queue import Request
from featcache.core.slots import Slot
from featcache.errors import PoolFull
from featcache.memory import key_table as table_module
from featcache.memory.key_table import ABSENT, UNKNOWN, KeyTable, place_of
from featcache.memory.slab import PageWords
from featcache.memory.words import RECORD_BYTES, OwnerWords, SessionWords
from featcache.owner import sessions as sessions_module
from featcache.owner.keys import Lookups
from featcache.owner.sessions import Sessions
from featcache.pool import collector as collector_module
from featcache.pool import pool as pool_module
from featcache.pool.block import PoolBlock
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool
from featcache.ref import TensorSpec
from featcache.session.attachment import Attachment
from featcache.session.hits import KeyHits
from featcache.session.lease import KeyLease
from featcache.settings import Settings
from session.hit_slab import FakeMapping, FakeSlab, Stream
from support.stepping import Actor, Shared, StepLock, access, finding

UNIT: Final = ALIGNMENT_BYTES
POISON: Final = -1


class Feature(NamedTuple):
    """What was put: its bytes are its place, in every unit."""

    key: bytes
    place: int
    start: int
    units: int
    long: bool


class Lookup:
    """What may be answered to one that is in progress: what the table said of its key since its begin."""

    def __init__(self, reader: "Reader", key: bytes, now: int, changes: int) -> None:
        self.reader, self.key, self.seen, self.changes = reader, key, {now}, changes
        self.overflowed = reader.world.overflows(key)
        """Whether the key's set had no room for one, at some moment."""
        self.was_short = reader.is_short
        """Whether its session had no entry to take, at some moment."""


class Reading(NamedTuple):
    """A read that has begun, and has not ended in its stream's order."""

    reader: "Reader"
    feature: Feature


class World:
    """The owner, as one actor, its slab, and what is true of both."""

    def __init__(
        self, units: int = 6, slots: int = 5, *, grace_s: float = 0.0, ways: int = 10
    ) -> None:
        self.now_s = 0.0
        self.memory = [POISON] * units
        self.features: dict[int, Feature] = {}
        self.inside: list[Reading] = []
        self.truth: dict[bytes, int] = {}
        """What the table says of a key, as of its owner's last store of it."""
        self.lookups: list[Lookup] = []
        self.changes = 0
        """Of the table."""
        self.coming = b"", ABSENT
        """What the owner stored there last, or is about to."""
        self.readers: list[Reader] = []
        with contextlib.ExitStack() as undo:
            self.loop = asyncio.new_event_loop()
            undo.callback(self.loop.close)
            patch = undo.enter_context(pytest.MonkeyPatch.context())
            for module in (pool_module, collector_module):
                patch.setattr(module, "_now", lambda: self.now_s)
            patch.setattr(table_module, "_PLACES", table_module._PLACES[:ways])
            patch.setattr(sessions_module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
            limits = Limits(units * UNIT, units * UNIT, units * UNIT, slots, 8, grace_s, 1e9)

            async def make() -> Pool:
                slab: Any = FakeSlab()
                offload: Any = SimpleNamespace()
                return Pool(slab, PoolBlock.make(slab, slots), limits, Settings(), offload)

            self.pool = self.loop.run_until_complete(make())
            undo.callback(self.pool.close)
            self.sessions = Sessions(self.pool, None)
            undo.callback(self.sessions.close)
            self.granting = Lookups(self.pool)
            self.owner = Actor("owner")
            undo.callback(self.owner.end)
            self._stack = undo.pop_all()
        self._step_owner()

    def _step_owner(self) -> None:
        pool, words = self.pool, self.pool.words
        # It takes them as vectors, when it looks for a victim: what is found wrong there loses nothing.
        plain = SimpleNamespace(live=words.live, published=words.published)
        pool.is_held._words = plain  # type: ignore[assignment]
        for name in ("live", "offset", "nbytes"):
            setattr(words, name, Shared(getattr(words, name)))
        table = pool.key_table
        self._find, self._plain_words = table._find, table._words
        table._find = finding(table._find)
        table._words = Shared(table._words)  # type: ignore[assignment]
        table._mapping = Shared(table._mapping)  # type: ignore[assignment]
        self._keep, self._drop = table.keep, table.drop
        table.keep, table.drop = self._keeping, self._dropping  # type: ignore[method-assign]
        self._free = pool.store._free
        pool.store._free = self._freeing  # type: ignore[method-assign]

    @property
    def living(self) -> list["Reader"]:
        """Sessions whose process has not died."""
        return [reader for reader in self.readers if not reader.died]

    # --- what is true -----------------------------------------------------------------------------

    def _keeping(self, key: bytes, index: int, generation: int) -> None:
        self._about_to_say(key, place_of(index, generation))
        self._keep(key, index, generation)
        self.truth[key] = place_of(index, generation)
        for lookup in self.lookups:
            lookup.overflowed |= self.overflows(lookup.key)

    def _dropping(self, key: bytes) -> None:
        self._about_to_say(key, ABSENT)
        self._drop(key)
        self.truth[key] = ABSENT

    def _about_to_say(self, key: bytes, place: int) -> None:
        self.changes += 1
        self.coming = key, place
        for lookup in self.lookups:
            if lookup.key == key:
                lookup.seen.add(place)

    def _freeing(self, slot: Slot) -> None:
        """Poison an extent, which nobody reads."""
        place = place_of(slot.index, slot.generation)
        assert not [one for one in self.inside if one.feature.place == place], (
            "recycled under a read"
        )
        assert slot.extent is not None
        start = slot.extent.offset_bytes // UNIT
        for unit in range(start, start + slot.extent.size_bytes // UNIT):
            self.memory[unit] = POISON
        self._free(slot)

    def begin_lookup(self, reader: "Reader", key: bytes) -> Lookup:
        lookup = Lookup(reader, key, self.truth.get(key, ABSENT), self.changes)
        if self.coming[0] == key:
            lookup.seen.add(self.coming[1])
        self.lookups.append(lookup)
        return lookup

    def check_answer(self, lookup: Lookup, found: "KeyLease | int") -> None:
        self.lookups.remove(lookup)
        if isinstance(found, KeyLease):
            place = place_of(found.ref.slot, found.ref.generation)
            assert place in lookup.seen, "another feature than the key's"
            assert self.features[place].key == lookup.key
        elif found == ABSENT:
            assert ABSENT in lookup.seen, "the key was kept all the time"
        else:
            assert (
                lookup.overflowed
                or any(self.features[place].long for place in lookup.seen if place)
                or lookup.was_short
                or self.changes - lookup.changes > 3
            ), "the table was enough to tell"

    def overflows(self, key: bytes) -> bool:
        table = self.pool.key_table
        at = table._start_bytes + 256 * (
            int.from_bytes(table.digest(key)[:8], "little") & table._mask
        )
        return bool(self._plain_words[(at >> 3) + 1])

    def check_bytes(self, feature: Feature) -> None:
        assert self.memory[feature.start : feature.start + feature.units] == (
            [feature.place] * feature.units
        ), "bytes of another feature"

    # --- what the owner does ----------------------------------------------------------------------

    def put(self, key: bytes, units: int, *, readers: int = 0, long: bool = False) -> None:
        """Put a feature, evicting what is in its way, or do nothing if there is no room."""
        pool, store = self.pool, self.pool.store
        pool.turn.left = TURN_UNITS
        request = Request(units * UNIT, readers, 5.0 if readers else None, key)
        slot = store.reserve(request, self.now_s)
        if slot is None:
            pool.collector.collect_all()
            pool.collector.make_room(request)
            slot = store.reserve(request, self.now_s)
            if slot is None:
                return
        place = place_of(slot.index, slot.generation)
        start = slot.offset_bytes // UNIT
        self.features[place] = Feature(key, place, start, units, long)
        for unit in range(start, start + units):
            access()
            assert self.memory[unit] == POISON
            self.memory[unit] = place
        name = "n" * RECORD_BYTES if long else None
        pool.publish(slot, (TensorSpec(name, "uint8", (units * UNIT,), 0),), None)

    def evict(self, key: bytes) -> None:
        self.pool.turn.left = TURN_UNITS
        self.pool.apply(self.pool.store.evict(key, self.now_s))

    def ask(self, which: int, key: bytes) -> None:
        """Grant a session a read that it asks for, which it takes at once."""
        if not self.living:
            return
        reader = self.living[which % len(self.living)]
        try:
            granted = self.granting.find(key, reader.page)
        except PoolFull:
            return
        if granted is None:
            reader.misses_had += 1
            return
        grant, ref = granted
        assert self.truth[key] == place_of(ref.slot, ref.generation)
        reader.hits_had += 1
        lease = KeyLease.granted(reader.attachment, ref, grant.index, grant.serial)
        if not reader.died:
            self.inside.append(Reading(reader, reader.feature(lease)))
            reader.borrowed.append(lease)
            reader.note_shortage()

    def discard(self, which: int) -> None:
        """Cancel the reads that some slot owes."""
        owing = list(self.pool.store.owing.values())
        if owing:
            slot = owing[which % len(owing)]
            self.sessions.discard(slot.index, slot.generation)

    def pass_time(self, time_s: float) -> None:
        self.now_s += time_s
        self.pool.turn.left = TURN_UNITS
        self.pool.apply(self.pool.store.expire(self.now_s))
        self.pool.collector.collect_all()

    def collect(self) -> None:
        self.pool.turn.left = TURN_UNITS
        self.pool.collector.collect_all()

    def settle(self, reader: "Reader") -> None:
        """End a session whose process died."""
        peer = SimpleNamespace(
            number=reader.number, end_tasks=lambda _: iter(()), name_passed_on=False
        )
        for _ in self.sessions._settle(peer, died=True):  # type: ignore[arg-type]
            pass

    def close(self) -> None:
        for reader in self.readers:
            for actor in reader.actors:
                if not actor.dead:
                    actor.end()
        for name in ("live", "offset", "nbytes"):
            setattr(self.pool.words, name, getattr(self.pool.words, name).words)
        self._stack.close()


class Reader:
    """One session, of which two threads read."""

    def __init__(self, world: World, number: int, *, entries: int = 3, deferred: bool) -> None:
        self.world, self.number, self.deferred = world, number, deferred
        slots = world.pool.store.limits.slots
        page = SessionPage(number, None, *SessionWords.create(slots, entries))
        world.pool.pages[number] = page
        words = OwnerWords.attach(world.pool.words_fd, slots)
        own = SessionWords.attach(page.fd, slots, entries)
        leases = [Shared(each.cast("B")) for each in (own.lease, own.serial, own.ended)]
        page._lease_words = tuple(leases)  # type: ignore[arg-type]
        page._header = Shared(page._header)  # type: ignore[assignment]
        self.actors = [Actor(f"{number}.{one}") for one in range(2)]
        self.streams = [Stream(), Stream()]
        self.mapping = FakeMapping(deferred=deferred)
        ended = Shared(own.ended)
        adopted = PageWords(Shared(own.released), Shared(own.granted), Shared(own.written), ended)
        self.page, self.own = page, own
        self.attachment = attachment = Attachment(
            *(world.pool.pool_id, words, own, self.mapping, adopted, self._ring)  # type: ignore[arg-type]
        )
        attachment._lock = StepLock()  # type: ignore[assignment]
        attachment.covered_bytes = 1 << 40
        for name in ("_live", "_published", "_offset", "_nbytes", "_lease", "_page_header"):
            setattr(attachment, name, Shared(getattr(attachment, name)))
        attachment._serial = Shared(own.serial, self._taking)  # type: ignore[assignment]
        attachment._ended = ended  # type: ignore[assignment]
        attachment._used = Shared(own.used, self._using)  # type: ignore[assignment]
        table = KeyTable(words)
        table._find = finding(table._find)
        table._words = Shared(table._words)  # type: ignore[assignment]
        table._mapping = Shared(table._mapping)  # type: ignore[assignment]
        self.hits = KeyHits(attachment, table)
        self.hits_had = self.misses_had = 0
        self.borrowed: list[KeyLease] = []
        self.died = False
        self.rings = 0
        world.readers.append(self)

    def _ring(self) -> None:
        self.rings += 1

    def _taking(self, index: int, serial: int) -> None:
        """An entry is taken only when its last end has landed."""
        self.note_shortage()
        assert self.own.ended[index] == self.own.serial[index], "its last read has not ended"
        assert serial > self.own.serial[index]

    @property
    def is_short(self) -> bool:
        """Whether it has no entry to take."""
        return len(self.attachment._free) <= self.attachment._grants_out

    def note_shortage(self) -> None:
        """Tell the lookups that are in progress."""
        for lookup in self.world.lookups:
            lookup.was_short |= lookup.reader is self and self.is_short

    def _using(self, slot: int, _: int) -> None:
        """A use is told while the slot's feature is leased: later it would be the next one's."""
        own, generation = self.own, self.world.pool.store.table.slots[slot].generation
        assert any(
            own.lease[index] == place_of(slot, generation) and own.serial[index] != own.ended[index]
            for index in range(len(own.lease))
        )

    def find(self, key: bytes) -> KeyLease | None:
        """Look a key up; count what was found."""
        world, lookup = self.world, self.world.begin_lookup(self, key)
        found = self.hits.find(key, None)
        world.check_answer(lookup, found)
        if isinstance(found, KeyLease):
            self.hits_had += 1
            world.inside.append(Reading(self, self.feature(found)))
            return found
        if found == ABSENT:
            self.attachment.count_miss()
            self.misses_had += 1
        return None

    def feature(self, lease: KeyLease) -> Feature:
        return self.world.features[place_of(lease.ref.slot, lease.ref.generation)]

    def contains(self, key: bytes) -> None:
        lookup = self.world.begin_lookup(self, key)
        there = self.hits.contains(key)
        place = UNKNOWN if there is None else max(lookup.seen) if there else ABSENT
        self.world.lookups.remove(lookup)
        if place == UNKNOWN:
            assert lookup.overflowed or self.world.changes - lookup.changes > 3
        else:
            assert (place != ABSENT) is there
            assert there or ABSENT in lookup.seen

    def get(self, key: bytes, stream: int) -> None:
        lease = self.find(key)
        if lease is not None:
            self.end(lease, stream)

    def borrow(self, key: bytes) -> None:
        lease = self.find(key)
        if lease is not None:
            self.borrowed.append(lease)

    def end(self, lease: KeyLease, stream: int, *, twice: bool = False) -> None:
        """Read, and end the read, on one stream or with another use of it on the other."""
        if twice:
            lease.pin(lease.ref)
            self._use(
                lease, 1 - stream, lambda order: lease.unpin(lease.ref, pays=True, order=order)
            )
        feature = self.feature(lease)

        def over() -> None:
            self.world.inside.remove(Reading(self, feature))

        self._use(lease, stream, lambda order: lease.unpin(lease.ref, pays=True, order=order), over)

    def _use(self, lease: KeyLease, which: int, end: Any, over: Any = None) -> None:
        """Read in a stream's order; `over`, which is no step, comes just before the word of the end."""
        feature, stream = self.feature(lease), self.streams[which]
        if not self.deferred:
            for unit in range(feature.start, feature.start + feature.units):
                access()
                assert self.world.memory[unit] == feature.place, "bytes of another feature"
            if over is not None:
                over()
            end(None)
            return
        access()
        stream.add(lambda: self.world.check_bytes(feature))
        end((stream, stream.enqueued))
        if over is not None and stream.work:
            word, behind = stream.work.pop()
            stream.work.append((lambda: (over(), word()), behind))

    def give_back(self, lease: KeyLease) -> None:
        """End a read of which nothing was read."""
        self.world.inside.remove(Reading(self, self.feature(lease)))
        lease.return_lease()

    def kill(self) -> None:
        """Die, wherever its threads stand; what is on its streams dies with it."""
        self.died = True
        for actor in self.actors:
            actor.end()
        self.world.inside = [one for one in self.world.inside if one.reader is not self]
        self.world.lookups = [one for one in self.world.lookups if one.reader is not self]
        for stream in self.streams:
            stream.work.clear()
