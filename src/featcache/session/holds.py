"""Holds: what reading, paying and writing a session's slots do to the words of its page.

A read goes: write `held`, fence, look at `live`. If the owner revoked the ref meanwhile then either
the look here finds `live` cleared, or the owner's look finds the hold and waits for `released`.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from featcache.errors import FeatcacheError, MalformedRef, StaleRef
from featcache.memory.slab import Mapping, Order, Words
from featcache.memory.words import Header, OwnerWords, SessionWords, fence_after_lock
from featcache.ref import FeatureRef

_WAITING, _SHRINK_EPOCH = Header.WAITING, Header.SHRINK_EPOCH
_GRANTED, _WRITTEN = 1, 2  # their places in PageWords
_WRITES = 1 << 40  # beyond any slot: what is written is held under other indices than what is read


class PageWords(NamedTuple):
    """The words of a session's page as its mapping's `signal` takes them."""

    released: Words
    granted: Words
    written: Words

    @classmethod
    def adopted(cls, mapping: Mapping, page: SessionWords) -> "PageWords":
        """Return a page's words in the form that a mapping made of them. May block."""
        return cls(*(mapping.adopt(page, words) for words in cls.plain(page)))

    @classmethod
    def plain(cls, page: SessionWords) -> "PageWords":
        """Return a page's words as they are: the CPU writes them."""
        return cls(page.released, page.granted, page.written)


class _Uses:
    """The uses of one held ref that are under way, and the places behind which its read is paid."""

    __slots__ = ("behind", "count", "pays")

    def __init__(self) -> None:
        self.count = 1
        self.pays = False
        self.behind: list[Order] = []


_ONE_USE = _Uses()
"""Of a ref with a single use, which almost all have; it is never written, but replaced."""


class Holds:
    """What this session holds of one pool. Its calls never block; a lock makes them safe in threads."""

    def __init__(
        self,
        pool_id: bytes,
        words: OwnerWords,
        page: SessionWords,
        mapping: Mapping,
        adopted: PageWords,
        ring: Callable[[], object],
    ) -> None:
        """Begin with nothing covered; `adopted` is what the mapping made of the page's words."""
        self.pool_id = pool_id
        self.mapping: Mapping = mapping
        self.header = words.header
        self.capacity_bytes = 1 << 62
        """Bytes of the slab's range, as its owner said."""
        self.layout: int | None = 0
        """How many times of segments taken away this process has heard of; None is of each at once."""
        self.covered_bytes = 0
        """Bytes from the slab's start that can be read here."""
        self._gone: FeatcacheError | None = None
        self._live, self._published = words.live, words.published
        self._offset, self._nbytes = words.offset, words.nbytes
        self._held, self._released = page.held, page.released
        self._plain = PageWords.plain(page)
        self._adopted = adopted
        self._paid = adopted.released
        self._in_flight: dict[tuple[int, int], int] = {}
        """Words that a stream was to write: their values, by which they are and their index."""
        self._slots = words.slots
        self._ring = ring
        self._unrung = 0
        self._lock = threading.Lock()
        self._holds: dict[tuple[int, int], _Uses] = {}
        """By slot and generation."""
        self._on_idle: Callable[[], object] | None = None

    def begin(self, ref: FeatureRef) -> bool:
        """Hold a ref's bytes. Return whether they are there already; `end` must follow either way.

        Raises:
            StaleRef: recycled, expired, discarded, or paid by this session before.
            MalformedRef: the ref's extent is not the one that the owner gave this slot.
            OwnerLost: the owner is gone.
            CacheClosed: this client or cache was closed, or is another process's.

        """
        index, generation = key = ref.slot, ref.generation
        if self._gone is not None:
            self.check()
        if index >= self._slots:
            raise MalformedRef(f"slot {index} of a pool with {self._slots} slots")
        with self._lock:
            uses = self._holds[key] if key in self._holds else None  # noqa: SIM401 - no call
            # Paid, and seen to be or not: the word that says so comes by a stream, and the bytes are
            # the next feature's as soon as the owner sees it.
            paid = uses is None and self._held[index] == generation
            if paid or self._released[index] == generation:
                raise StaleRef(f"ref {index}:{generation} was paid by this session already")
            if self._live[index] != generation:  # never touch the hold of the slot's next tenant
                raise StaleRef(f"ref {index}:{generation} was recycled, expired or discarded")
            if uses is None:
                self._held[index] = generation
                self._holds[key] = _ONE_USE
            else:
                if uses is _ONE_USE:
                    uses = self._holds[key] = _Uses()
                uses.count += 1
        fence_after_lock()
        if self._live[index] != generation:
            self.end(ref, pays=False)
            raise StaleRef(f"ref {index}:{generation} was recycled, expired or discarded")
        if self._offset[index] != ref.offset_bytes or self._nbytes[index] != ref.nbytes:
            self.end(ref, pays=False)
            raise MalformedRef("the ref's extent is not its slot's: it was forged or damaged")
        return (  # as `is_there`, inline
            self._published[index] == generation
            and ref.offset_bytes + ref.nbytes <= self.covered_bytes
            and (self.layout is None or self.header[_SHRINK_EPOCH] == self.layout)
        )

    def is_there(self, ref: FeatureRef) -> bool:
        """Whether the bytes of a held or granted ref are complete, and mapped as the owner has them."""
        return self._published[ref.slot] == ref.generation and self.is_mapped(
            ref.offset_bytes, ref.nbytes
        )

    def end(self, ref: FeatureRef, *, pays: bool, order: Order = None) -> None:
        """End one use. The session's read is paid when its last use ends, if any of them `pays`.

        `order` is the place behind which this use is done. A use that does not pay has nothing under
        way: no copy was asked for, or it failed.
        """
        index, generation = key = ref.slot, ref.generation
        with self._lock:
            uses = self._holds[key]
            if uses.count > 1:
                uses.count -= 1
                if pays:
                    uses.pays = True
                    uses.behind.append(order)
                return
            del self._holds[key]
            if pays or uses.pays:
                if uses.behind:
                    order = self.mapping.follow(order, uses.behind)
                self.mapping.signal(self._paid, index, generation, order)
            elif self._held[index] == generation:
                self._held[index] = 0
            idle = None if self._on_idle is None else self._idle()
        if self.header[_WAITING]:
            self._ring_if_due()
        if idle is not None:
            idle()

    def _idle(self) -> Callable[[], object] | None:
        """Return whom to tell, with the lock held, that nothing is held any more."""
        idle = None
        if not self._holds:
            idle, self._on_idle = self._on_idle, None
        return idle

    def _ring_if_due(self) -> None:
        ring_at = self.header[_WAITING]
        if ring_at:
            self._unrung += 1
            if self._unrung >= ring_at:
                self._unrung = 0
                self._ring()

    def pay(self, ref: FeatureRef) -> None:
        """Pay the read without reading (`release`)."""
        self.begin(ref)
        self.end(ref, pays=True)

    # --- reads by key -----------------------------------------------------------------------------

    def take_grant(self, index: int, serial: int) -> None:
        """Count a read that was given out by key as held. It needs no other word: the owner knows."""
        with self._lock:
            self._holds[-1 - index, serial] = _ONE_USE  # more are counted by who holds it

    def pay_grant(self, index: int, serial: int, order: Order, behind: list[Order]) -> None:
        """Pay it, once, behind `order` and all of `behind`."""
        with self._lock:
            del self._holds[-1 - index, serial]
            if behind:
                order = self.mapping.follow(order, behind)
            self._signal(_GRANTED, index, serial, order)
            idle = self._idle()
        self._ring_if_due()
        if idle is not None:
            idle()

    def return_grant(self, index: int, serial: int) -> None:
        """Pay a read that nobody took."""
        self.check_grant(index, serial)
        self._signal(_GRANTED, index, serial, None)
        self._ring_if_due()

    def check_grant(self, grant: int, serial: int) -> None:
        """Raise MalformedRef if there is no such grant in the page, or it is out already."""
        if grant >= len(self._plain.granted) or (-1 - grant, serial) in self._holds:
            raise MalformedRef(f"no grant {grant}:{serial} can be had: the owner is at fault")

    def check_granted(self, ref: FeatureRef) -> None:
        """Raise MalformedRef if a ref that came with a grant is not of this pool or its slot."""
        index = ref.slot
        if (
            ref.pool_id != self.pool_id
            or index >= self._slots
            or self._offset[index] != ref.offset_bytes
            or self._nbytes[index] != ref.nbytes
        ):
            raise MalformedRef("what was granted is not what its slot has: the owner is at fault")

    # --- bytes that this session writes -----------------------------------------------------------

    def begin_write(self, index: int, generation: int, offset_bytes: int, nbytes: int) -> None:
        """Count a slot that the owner reserved as held until `end_write`: the session stays for it.

        Raises:
            MalformedRef: the slot, or its place, is not in this pool.
            OwnerLost, CacheClosed: nothing may begin any more.

        """
        self.check()
        if index >= self._slots or offset_bytes + nbytes > self.capacity_bytes:
            raise MalformedRef("the owner gave room that its slab does not have")
        with self._lock:
            self._holds[_WRITES + index, generation] = _ONE_USE

    def end_write(self, index: int, generation: int) -> None:
        """Count it as held no longer: it is published, or given up."""
        with self._lock:
            del self._holds[_WRITES + index, generation]
            idle = self._idle()
        if idle is not None:
            idle()

    def tell_written(self, index: int, generation: int, order: Order) -> None:
        """Say, behind `order`, that a slot which the owner reserved for this session is written."""
        self._signal(_WRITTEN, index, generation, order)

    # --- what is said, and to whom ----------------------------------------------------------------

    def is_mapped(self, offset_bytes: int, nbytes: int) -> bool:
        """Whether a part of the slab is mapped here as the owner has it now."""
        return offset_bytes + nbytes <= self.covered_bytes and (
            self.layout is None or self.header[_SHRINK_EPOCH] == self.layout
        )

    def _signal(self, which: int, index: int, value: int, order: Order) -> None:
        if self.mapping.deferred and order is not None:
            self._in_flight[which, index] = value
        else:
            self._in_flight.pop((which, index), None)  # the CPU writes it now
        self.mapping.signal(self._adopted[which], index, value, order)

    @property
    def settled(self) -> bool:
        """Whether every word that this session had written is: nothing is on a stream."""
        if not self.mapping.deferred:
            return True
        plain = self._plain
        if any(
            plain[which][index] != value for (which, index), value in list(self._in_flight.items())
        ):
            return False
        held = np.frombuffer(self._held, dtype=np.uint64)
        released = np.frombuffer(self._released, dtype=np.uint64)
        return not bool(((held != 0) & (held != released)).any())

    def check(self) -> None:
        """Raise why no new read may begin, if none may."""
        if self._gone is not None:
            raise type(self._gone)(*self._gone.args)

    def refuse(self, error: FeatcacheError) -> None:
        """Let no new read begin: each raises this. Reads that have begun may end."""
        self._gone = error

    def when_idle(self, call: Callable[[], object]) -> None:
        """Call once nothing is held: now, or when the last use ends (maybe in another thread)."""
        with self._lock:
            if self._holds:
                self._on_idle = call
                return
        call()

    @property
    def holds(self) -> int:
        """Refs that this session holds now, and slots that it writes."""
        with self._lock:  # whose holder signals a word before it is done
            return len(self._holds)
