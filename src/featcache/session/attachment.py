"""One pool as this session maps it: slots pinned, read, paid and written through the session's page.

Pinning a slot is a hazard pointer: the reader stores `held`, fences, then looks at `live`; the owner
clears `live`, fences, then looks at `held`. Whichever comes second sees the other's word, so either
the reader finds the ref revoked or the owner finds the pin and waits for `released`.
"""

import threading
from collections.abc import Callable

import numpy as np
import torch

from featcache.core.endings import why_by_word
from featcache.errors import CacheClosed, FeatcacheError, MalformedRef, StaleRef
from featcache.memory.post_ring import PostRing
from featcache.memory.slab import Mapping, Order, PageWords
from featcache.memory.unreachable import UnreachableSlab
from featcache.memory.words import (
    Header,
    OwnerWords,
    Parting,
    SessionWords,
    fence_after_lock,
    fence_stores,
)
from featcache.ref import FeatureRef
from featcache.session.early import EarlyPins
from featcache.session.leased_reads import ONE_USE, Uses
from featcache.session.payments import Payments
from featcache.session.writes import SlotWrites

_WAITING, _SHRINK_EPOCH = Header.WAITING, Header.SHRINK_EPOCH
_PAID_HERE = (
    "was paid by this session already, and each session reads a ref once: keep what was read, or keep "
    "the feature under a key"
)
_FORKED = (
    "this process was forked from the one that attached the pool: connect again, after the fork"
)


class Attachment(Payments, EarlyPins, SlotWrites):
    """One mapped pool and this session's page. No call blocks; a lock makes them thread-safe."""

    def __init__(
        self,
        pool_id: bytes,
        words: OwnerWords,
        page: SessionWords,
        mapping: Mapping,
        adopted: PageWords,
        ring: Callable[[], object],
    ) -> None:
        """Begin with nothing mapped; `adopted` is the page's words as the mapping adopted them."""
        self.pool_id = pool_id
        self.mapping: Mapping = mapping
        self.header = words.header
        self.capacity_bytes = 1 << 62
        """Bytes of the slab's range, as its owner said."""
        self.shrink_epoch: int | None = 0
        """The last shrink that this process has heard of; None: never behind the owner's."""
        self.covered_bytes = 0
        """Bytes from the slab's start that can be read here."""
        self.own_writes: dict[int, tuple[int, Order]] | None = None
        """Of the owner's own session where words come late: by slot, the generation that this process
        wrote there last and the order behind which its bytes are; None elsewhere."""
        self._gone: FeatcacheError | None = None
        self._live, self._published, self._reserved = words.live, words.published, words.reserved
        self._offset, self._nbytes, self._ending = words.offset, words.nbytes, words.ending
        self._held, self._released = page.held, page.released
        self._page_header = page.header
        self.posts = PostRing(page)
        self._plain = PageWords.plain(page)
        self._adopted = adopted
        self._paid = adopted.released
        self._in_flight: dict[tuple[int, int], int] = {}
        """Values of words that a stream is to write, by PageWords index and word index."""
        self._slots = words.slots
        self._ring = ring
        self._unrung = 0
        self._lock = threading.Lock()
        self._pins: dict[tuple[int, int], Uses] = {}
        """By slot and generation; grants by -1 - index and serial."""
        self._early: dict[tuple[int, int], bool] = {}
        self._own_puts: dict[int, FeatureRef] = {}
        self._on_idle: Callable[[], object] | None = None
        super().__init__(page)
        self.why_stale: Callable[[int, int], str] | None = None
        """In the owner: says why a ref is stale, as its store knows."""
        self.hear = self.comes = None

    # --- reads by ref ---------------------------------------------------------------------------

    def pin(self, ref: FeatureRef) -> bool:
        """Pin a ref's slot. Return whether its bytes are there already; `unpin` must follow either way.

        Raises:
            StaleRef: recycled, expired, discarded, or paid by this session before.
            MalformedRef: the ref's extent is not the one that the owner gave this slot.
            OwnerLost: the owner is gone.
            CacheClosed: this client or cache was closed, or is another process's.

        """
        index, generation = key = ref.slot, ref.generation
        if index >= self._slots:
            self.check()
            raise MalformedRef(f"slot {index} of a pool with {self._slots} slots")
        with self._lock:
            if self._gone is not None:  # in the lock, in which its end looks for reads that are out
                self.check()
            uses = self._pins[key] if key in self._pins else None  # noqa: SIM401 - no call
            # Paid, whether or not its word has landed: `released` comes by a stream, and the bytes
            # are the next tenant's as soon as the owner sees it.
            paid = uses is None and self._held[index] == generation
            if paid or self._released[index] == generation:
                raise StaleRef(f"ref {index}:{generation} {_PAID_HERE}")
            # Never overwrite the pin of the slot's next tenant.
            if self._live[index] != generation and not self._is_coming(index, generation):
                raise StaleRef(self._why_stale(index, generation))
            if uses is None:
                self._held[index] = generation
                self._pins[key] = ONE_USE
            else:
                if uses is ONE_USE:
                    uses = self._pins[key] = Uses()
                uses.count += 1
        # The hazard pointer: `held` must be visible to the owner before `live` is read again, or
        # the owner could revoke, find no pin, and recycle the extent under this read.
        fence_after_lock()
        if self._live[index] != generation:
            return self._pin_early(ref)
        if self._offset[index] != ref.offset_bytes or self._nbytes[index] != ref.nbytes:
            self.unpin(ref, pays=False)
            raise MalformedRef("the ref's extent is not its slot's: it was forged or damaged")
        return (  # as `is_ready`, inline
            self._published[index] == generation
            and ref.offset_bytes + ref.nbytes <= self.covered_bytes
            and (self.shrink_epoch is None or self.header[_SHRINK_EPOCH] == self.shrink_epoch)
        )

    def is_ready(self, ref: FeatureRef) -> bool:
        """Whether the bytes of a pinned or leased ref are complete, and mapped as the owner has them."""
        if self._early and (ref.slot, ref.generation) in self._early and not self._has_come(ref):
            return False
        return (  # hot path: as `is_mapped`, inline
            self._published[ref.slot] == ref.generation
            and ref.offset_bytes + ref.nbytes <= self.covered_bytes
            and (self.shrink_epoch is None or self.header[_SHRINK_EPOCH] == self.shrink_epoch)
        )

    def follow_write(self, ref: FeatureRef, device: torch.device | None) -> bool:
        """Put the caller's place on a device's stream behind this process's own write of a pinned ref.

        False where that can't be: the bytes are another's, the CPU is to read them, or the stream of
        the write may be gone. The stream waits by an event, or not at all if it is that stream.
        """
        if self.own_writes is None or not self.is_mapped(ref.offset_bytes, ref.nbytes):
            return False
        generation, behind = self.own_writes.get(ref.slot, (0, None))
        order = self.mapping.order(device)
        if generation != ref.generation or order is None or not self.mapping.can_follow(behind):
            return False
        self.mapping.follow(order, [behind])
        return True

    def unpin(self, ref: FeatureRef, *, pays: bool, order: Order = None) -> None:
        """End one use. The session's read is paid when its last use ends, if any of them `pays`.

        `order` is the place behind which this use is done. A use that does not pay has no copy in
        progress: none was begun, or it failed.
        """
        index, generation = key = ref.slot, ref.generation
        with self._lock:
            uses = self._pins[key]
            if uses.count > 1:
                uses.count -= 1
                if pays:
                    uses.pays = True
                    uses.behind.append(order)
                return
            del self._pins[key]
            if self._early:
                self._early.pop(key, None)
            if pays or uses.pays:
                # `held` stays: until `released` lands behind the stream's last use of the bytes,
                # the owner must still find the pin.
                if uses.behind:
                    order = self.mapping.follow(order, uses.behind)
                self.mapping.signal(self._paid, index, generation, order)
            elif self._held[index] == generation:
                self._held[index] = 0
            idle = None if self._on_idle is None else self._idle()
        # After the word: an owner that is woken must find it.
        if self.header[_WAITING]:
            self._ring_if_due()
        if idle is not None:
            idle()

    def pay(self, ref: FeatureRef) -> None:
        """Pay the read without reading (`release`)."""
        self.pin(ref)
        self.unpin(ref, pays=True)

    # --- words ------------------------------------------------------------------------------------

    def is_mapped(self, offset_bytes: int, nbytes: int) -> bool:
        """Whether a part of the slab is mapped here as the owner has it now."""
        return offset_bytes + nbytes <= self.covered_bytes and (
            self.shrink_epoch is None or self.header[_SHRINK_EPOCH] == self.shrink_epoch
        )

    @property
    def settled(self) -> bool:
        """Whether every word that this session signalled has landed: nothing is on a stream."""
        if not self.mapping.deferred:
            return True
        plain = self._plain
        if any(
            plain[which][index] != value for (which, index), value in list(self._in_flight.items())
        ):
            return False
        held = np.frombuffer(self._held, dtype=np.uint64)
        released = np.frombuffer(self._released, dtype=np.uint64)
        return not bool(((held != 0) & (held != released)).any()) and self.leases_ended

    # --- the end ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise the reason why no new read may begin, if there is one."""
        if self._gone is not None:
            raise type(self._gone)(*self._gone.args)

    def _why_stale(self, index: int, generation: int) -> str:
        """Say what is known of a ref that can't be read; a session knows it by the slot's words."""
        if self.why_stale is not None:
            return self.why_stale(index, generation)
        why = why_by_word(
            *(self._ending[index], generation),
            published=self._published[index] >= generation,
            recycled=self._live[index] > generation,
        )
        return f"ref {index}:{generation} {why}"

    def refuse(self, error: FeatcacheError) -> None:
        """Let no new read begin: each raises this. Reads that have begun may end."""
        self._gone = error

    def part(self, how_far: int) -> None:
        """Tell the owner in this session's page how far it has ended (`Parting`), in any thread."""
        fence_stores()  # behind what was paid and written
        self._page_header[Parting.WORD] = max(self._page_header[Parting.WORD], how_far)

    def when_idle(self, call: Callable[[], object]) -> None:
        """Call once nothing is pinned: now, or when the last use ends (maybe in another thread)."""
        with self._lock:
            if self._pins or self._leases_out:
                self._on_idle = call
                return
        call()

    @property
    def holds(self) -> int:
        """Slots that this session has pinned now, for reading or writing."""
        with self._lock:  # a thread that holds it may be about to signal a word
            return len(self._pins) + self._leases_out

    def fall_back_to_host(self, reason: str) -> Mapping:
        """Read through host memory from now on; return the mapping there was, to be closed."""
        mapping, self.mapping = self.mapping, UnreachableSlab(self.mapping.device, reason)
        self._adopted = self._plain
        self._paid = self._released
        return mapping

    def forget(self) -> None:
        """Cut a forked child off: a use that still ends there changes no word of its parent's."""
        self.refuse(CacheClosed(_FORKED))
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self.header = memoryview(bytes(8 * len(self.header))).cast("Q")
        self._page_header = memoryview(bytearray(8 * len(self.header))).cast("Q")
        self._held, self._released = (
            memoryview(bytearray(8 * self._slots)).cast("Q") for _ in range(2)
        )
        self._live = self._published = self._offset = self._nbytes = self._held
        self._reserved = self._ending = self._held
        self._paid = self._released
        self.posts.forget()
        self._in_flight.clear()
        self.own_writes = None
        words = max(self._slots, len(self._plain.granted))
        nowhere = memoryview(bytearray(8 * words)).cast("Q")
        self._plain = self._adopted = PageWords(nowhere, nowhere, nowhere, nowhere)
        self.forget_leases()
        mapping, self.mapping = self.mapping, UnreachableSlab(self.mapping.device, "process forked")
        mapping.forget()
