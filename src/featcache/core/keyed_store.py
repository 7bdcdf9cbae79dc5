"""The calls that name a key: lookups, grants, claims, pins, and evictions.

A slot that is kept under a key stays PUBLISHED when no reads are owed any more. It is retired when its
key was dropped (evicted, or given to another feature) and the last grant on it was paid.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

from featcache.core.allocator import ALIGNMENT_BYTES
from featcache.core.effects import ClaimPassed, Effect, Evicted, Limits
from featcache.core.endings import Ending
from featcache.core.eviction import FEW, EvictionPlan, VictimSearch
from featcache.core.key_queue import KeyWaiter, KeyWaiterState
from featcache.core.put_queue import Batch, Request
from featcache.core.recency import POLICIES, Held, LatestUse, LatestUses, never_used
from featcache.core.slab_size import SizeState
from featcache.core.slots import Slot, SlotState
from featcache.core.store import Store
from featcache.errors import KeyNotFound, PoolFull
from featcache.settings import round_up

_FULL_SCAN_INTERVAL_S = 0.05
STEPS_A_VICTIM = 16
"""Extents that a search looks at in the time in which one feature is evicted."""
_PASSES = 256
"""Slots that were used or are held, which a search for the coldest passes in one piece."""


def key_label(key: bytes) -> str:
    """Return a key as logs and errors name it: its text, or its bytes in hex."""
    text = key.decode("utf-8", "replace")
    return text if text.isprintable() and "\ufffd" not in text else key.hex()


class KeyedStore(Store):
    """A store whose slots can be kept under keys.

    Hits that sessions serve themselves are learnt from `latest_use` (`core.recency.policy`).
    """

    def __init__(
        self,
        limits: Limits,
        latest_use: LatestUse = never_used,
        latest_uses: LatestUses | None = None,
    ) -> None:
        super().__init__(limits, POLICIES[limits.eviction](latest_use, latest_uses))
        self.hits = self.misses = self.evicted = 0
        self.leased_bytes = 0
        """Extents of evictable slots that sessions read now, as far as was last looked at."""
        self._failed_scan = (0, float("-inf"))
        """Size and expiry of the last full scan that found no victims (negative cache)."""
        self.evicting = EvictionPlan()
        """What is evicted for the request that was asked for last."""
        self.trimming = False
        """Whether `trim` has more to evict."""
        self.demotes: Callable[[Slot, bool], bool] | None = None
        """Asked of each feature that goes, and if its room can wait; True keeps it until `demoted`."""
        self.demoting: dict[int, Slot] = {}
        """Slots without their keys, by index, that are being copied out."""
        self.on_claim_ended: Callable[[bytes, int], object] | None = None
        """Told the key and the number of each claim that has ended."""

    @property
    def unevictable_bytes(self) -> int:
        """Used bytes that no put can have: all but those of evictable slots."""
        return self.used_bytes - self.directory.idle_bytes

    @property
    def retiring_bytes(self) -> int:
        """Extents that are free as soon as no session holds them."""
        extents = [slot.extent for slot in self._retiring.values() if slot.of is None]
        extents += [slot.extent for slot in self.demoting.values()]
        return sum(extent.size_bytes for extent in extents if extent is not None)

    # --- lookups ----------------------------------------------------------------------------------

    def lookup(self, key: bytes, now_s: float) -> Slot | None:
        """Return the slot under a key with one more grant on it, or None. Counts as a use."""
        slot = self.directory.find(key)
        if slot is None:
            self.misses += 1
            return None
        self.hits += 1
        slot.hits += 1
        self._grant(slot, now_s)
        return slot

    def hold(self, key: bytes, now_s: float) -> Slot | None:
        """As `lookup`, but neither a hit nor a miss."""
        slot = self.directory.find(key)
        if slot is not None:
            self._grant(slot, now_s)
        return slot

    def pay_grant(self, slot: Slot, now_s: float) -> list[Effect]:
        slot.grants -= 1
        if slot.grants or slot.reads_left or slot.state is not SlotState.PUBLISHED:
            return []
        return self._settle(slot, now_s)

    def wait_for_key(self, key: bytes, session: int, *, can_make: bool, tag: object) -> KeyWaiter:
        """Wait for a key that `lookup` did not find; see `core.key_queue`."""
        waiters = self.key_waiters
        if can_make and not waiters.claimed(key):  # chosen at once: it does not wait
            if waiters.claims >= self.limits.slots:
                raise PoolFull(f"{waiters.claims} features are being made already, the bound")
        elif waiters.count >= self.limits.waiters:
            raise PoolFull(
                f"{waiters.count} wait for keys already, the bound: raise Settings.waiters"
            )
        return waiters.join(key, session, can_make=can_make, tag=tag)

    def take(self, waiter: KeyWaiter) -> Slot | None:
        """Finish the handshake: return the granted slot, or None if the waiter has the claim."""
        if waiter.state not in {KeyWaiterState.FOUND, KeyWaiterState.CHOSEN}:
            raise ValueError(f"this waiter is {waiter.state.value}")
        waiter.state = KeyWaiterState.TAKEN
        return waiter.slot

    def cancel_wait(self, waiter: KeyWaiter, now_s: float) -> list[Effect]:
        """Give up waiting for a key; a grant or claim handed over meanwhile is taken back."""
        was = self.key_waiters.leave(waiter)
        if was is KeyWaiterState.FOUND:
            assert waiter.slot is not None, "found"
            return self.pay_grant(waiter.slot, now_s)
        if was is KeyWaiterState.CHOSEN:
            return self.release_claim(waiter.key, waiter.claim)
        return []

    def release_claim(self, key: bytes, claim: int) -> list[Effect]:
        """End a claim, whether its feature was published or not. One that is not out is ignored."""
        if self.on_claim_ended is not None and self.key_waiters.holds(key, claim):
            self.on_claim_ended(key, claim)
        following = self.key_waiters.release_claim(key, claim)
        return [] if following is None else [ClaimPassed(following)]

    # --- dropping keys ---------------------------------------------------------------------------

    def _drop_key(self, slot: Slot, now_s: float, cause: str) -> Evicted:
        key = slot.key
        assert key is not None, "it is kept under a key"
        unused_s = now_s - self.recency.last_used_s(slot)
        self.directory.drop(slot)
        if not slot.reads_left:
            self.endings.note(slot, Ending.EVICTED)
        self.evicted += 1
        return Evicted(key, slot.nbytes, unused_s, cause)

    def evict(self, key: bytes, now_s: float) -> list[Effect]:
        """Drop a key by name, pinned or not; its readers may finish. An unknown key is no error."""
        slot = self.directory.find(key)
        if slot is None:
            return []
        evicted = self._drop_key(slot, now_s, "asked")
        return [evicted, *self._unkept(slot, now_s, self.limits.grace_s)]

    def undo(self, index: int, generation: int, now_s: float) -> list[Effect]:
        """As `revoke`, of a put that nobody was told of: its key goes too, if that is its own still."""
        slot = self.find(index, generation)
        effects = [] if slot.key is None else self.evict(slot.key, now_s)
        if slot.state is SlotState.PUBLISHED:  # else nothing else kept it
            effects += self._cancel(slot, now_s, Ending.DISCARDED)
        return effects

    def pin(self, key: bytes, session: int) -> None:
        """Pin a key against eviction, or raise KeyNotFound."""
        self._check_key(key)
        self.directory.pin(key, session)

    def unpin(self, key: bytes, session: int) -> None:
        """Take back a pin, or raise KeyNotFound."""
        self._check_key(key)
        self.directory.unpin(key, session)

    def _check_key(self, key: bytes) -> None:
        if key not in self.directory:
            raise KeyNotFound(f"no feature is kept under {key_label(key)[:64]!r}")

    # --- evicting ---------------------------------------------------------------------------------

    def evict_for(
        self,
        request: Request,
        held: Held,
        now_s: float,
        most: int | None = None,
        *,
        waits: bool = True,
    ) -> list[Effect]:
        """Evict the victims that make room for a request, if there are any.

        Their extents are free once the caller has recycled them. A slab that can still grow evicts
        nothing, unless by `Limits.evict_first`. With `most`, so much is done now as evicts so many, the
        search for them included; the rest when this is called again for the same request (`evicting`), and
        nothing while the bytes of earlier ones are copied out, if it `waits`: their room may be enough.
        """
        waits = waits and most is not None
        if self.demoting and waits:
            return []
        if isinstance(request, Batch):
            return self._evict_for_batch(request, held, now_s, most)
        search = self.evicting.take_up(request)
        going = self.evicting.next(held, most) or self._look_for(request, search, held, now_s, most)
        return self._evict_all(going, now_s, "room", waits=waits) if going else []

    def _look_for(
        self,
        request: Request,
        search: VictimSearch | None,
        held: Held,
        now_s: float,
        most: int | None,
    ) -> list[Slot]:
        """Return the victims that are to go first for a request; none if there is no way, or not yet."""
        if self.unevictable_bytes + request.nbytes > self.limits.capacity_bytes:
            return []  # not even if everything went
        grows = not self.table.full and (
            self.size.state is not SizeState.STEADY
            or self.size.growth_for(request.nbytes, now_s) > 0
        )
        if grows and not self.limits.evict_first:
            return []
        if search is None or self.table.full:
            coldest = self._coldest(held, most)
            size_bytes = max(round_up(request.nbytes, ALIGNMENT_BYTES), ALIGNMENT_BYTES)
            if coldest is None:
                return []
            extent = coldest.extent
            if self.table.full or (extent is not None and extent.size_bytes >= size_bytes):
                return [coldest]  # hot path: as where all are alike
            search = self._new_search(size_bytes, now_s, grows=grows)
        self.evicting.go_on(search, held, None if most is None else most * STEPS_A_VICTIM)
        if search.found == [] and search.scanned:
            self._failed_scan = (search.size_bytes, now_s + _FULL_SCAN_INTERVAL_S)
        return self.evicting.next(held, most)

    def _evict_for_batch(
        self, batch: Batch, held: Held, now_s: float, most: int | None
    ) -> list[Effect]:
        """Evict the coldest, as much as a batch lacks; then for the member that does not fit."""
        limits, allocator = self.limits, self.allocator
        self.evicting.turn_to(batch)
        grows = self.size.state is not SizeState.STEADY or self.growth_of(batch, now_s) > 0
        slots = len(batch.members) - len(self.table.free_slots) - len(self._retiring)
        never = self.unevictable_bytes + batch.nbytes > limits.capacity_bytes
        if never or (grows and not limits.evict_first and slots <= 0):
            self.evicting.give_up()  # not even if everything went, or others make room
            return []
        nbytes = batch.nbytes - (allocator.end_bytes - allocator.used_bytes) - self.retiring_bytes
        going: list[Slot] = []
        passes = None if most is None else _PASSES
        count = max(slots, nbytes // ALIGNMENT_BYTES, 0)
        count = min(len(self.directory) if most is None else most, count)
        with closing(self.recency.by_rank(count, held, passes)) as coldest:
            for _, slot in coldest:
                if len(going) >= slots and nbytes <= 0:
                    break
                assert slot.extent is not None, "it is kept"
                nbytes -= slot.extent.size_bytes
                going.append(slot)
        if not going and self.recency.unfinished:
            self.evicting.is_passing = True
        if going or self.recency.unfinished or len(self.table.free_slots) < len(batch.members):
            return self._evict_all(going, now_s, "room", waits=most is not None)
        missing = self.missing_of(batch, now_s)
        if missing is None:
            self.evicting.give_up()
            return []
        return self.evict_for(missing, held, now_s, most)

    def _coldest(self, held: Held, most: int | None) -> Slot | None:
        """Return the coldest that can go; with `most`, None may mean that it is not found yet."""
        if most is None:
            return self.recency.coldest(held)
        slot = self.recency.coldest(held, _PASSES)
        if self.recency.unfinished:
            self.evicting.steps += _PASSES // 2
            self.evicting.is_passing = slot is None
        return slot

    def _new_search(self, size_bytes: int, now_s: float, *, grows: bool) -> VictimSearch:
        # A window at the end of the slab may also count on the room to grow behind it.
        growth_bytes = self.limits.capacity_bytes - self.committed_bytes
        growths = [0, growth_bytes] if growth_bytes and not grows else [0]
        # While a put waits this runs at every poll, and a full scan costs time in proportion to all
        # features. A size that failed lately is not scanned for again, and no larger one is; a
        # smaller one may fit where that did not.
        failed_bytes, until_s = self._failed_scan
        scans = len(self.directory) > FEW and (size_bytes < failed_bytes or now_s >= until_s)
        return VictimSearch(self.recency, self.allocator, size_bytes, growths, scans=scans)

    def trim(self, held: Held, now_s: float, most: int | None = None) -> list[Effect]:
        """Evict down to `Limits.evict_to` if more than `Limits.evict_above` is in use.

        At most `most` features; `trimming` says that there are more, for the next calls.
        """
        above, capacity_bytes = self.limits.evict_above, self.limits.capacity_bytes
        was_trimming, self.trimming = self.trimming, False
        if above is None:
            return []
        from_bytes = (self.limits.evict_to if was_trimming else above) * capacity_bytes
        if self.used_bytes <= from_bytes:
            return []
        kept_bytes = self.used_bytes - self.retiring_bytes
        if kept_bytes <= from_bytes:
            return []
        effects: list[Effect] = []
        left = len(self.directory) if most is None else most
        while kept_bytes > self.limits.evict_to * capacity_bytes:
            slot = self.recency.coldest(held, None if most is None else _PASSES)
            if slot is None or not left:
                self.trimming = slot is not None or self.recency.unfinished
                if self.recency.unfinished:
                    self.evicting.steps += _PASSES // 2
                break
            left -= 1
            assert slot.extent is not None, "it is kept"
            kept_bytes -= slot.extent.size_bytes
            effects += self._evict_all([slot], now_s, "watermark", waits=True)
        return effects

    def compact(self, held: Held, now_s: float, most: int | None = None) -> list[Effect]:
        """Evict the few features that alone hold the last segment, so that it can be given back.

        If there are more than `most` of them, so many go now, and the others at the next calls.
        """
        limits, end_bytes = self.limits, self.committed_bytes
        if not self.size.tail_in_use or not limits.compact:
            return []
        self.size.tail_in_use = False  # one look for each idle window
        start_bytes = (end_bytes - 1) // limits.segment_bytes * limits.segment_bytes
        if start_bytes < limits.initial_bytes:
            return []
        tail = [slot for slot in self.table.in_use() if _reaches(slot, start_bytes)]  # shares too
        tail_bytes = sum(slot.nbytes for slot in tail)
        if tail_bytes > limits.compact * (end_bytes - start_bytes):
            return []
        if not all(slot.idle and not held(slot) for slot in tail):
            return []
        if most is not None and len(tail) > most:
            self.size.tail_in_use = True  # look again
            tail = tail[:most]
        return self._evict_all(tail, now_s, "compaction", waits=True)

    def _evict_all(
        self, slots: Iterable[Slot], now_s: float, cause: str, *, waits: bool
    ) -> list[Effect]:
        effects, demotes = list[Effect](), self.demotes
        for slot in slots:
            if demotes is not None and demotes(slot, waits):
                # A grant of the copy's own: no put has the extent before the bytes are out of it.
                slot.grants += 1
                self.demoting[slot.index] = slot
            effects += [self._drop_key(slot, now_s, cause), *self._unkept(slot, now_s, 0.0)]
        return effects

    def demoted(self, slot: Slot, now_s: float) -> list[Effect]:
        """End the copy that `demotes` asked for, whether it was made or not: the extent may be reused."""
        del self.demoting[slot.index]
        return self.pay_grant(slot, now_s)

    # --- the ends of others -----------------------------------------------------------------------

    def end_session(self, session: int, now_s: float) -> list[Effect]:
        """Take back a session's pins, its waiters and its claims; claims pass to others' waiters."""
        effects: list[Effect] = []
        for more in self.end_session_by_steps(session, now_s):
            effects += more
        return effects

    def end_session_by_steps(self, session: int, now_s: float) -> Iterator[list[Effect]]:
        """As `end_session`, one thing at each step; other calls may come between the steps."""
        # Its waiters first, so that nothing is evicted for them meanwhile.
        for waiter in self.queue.by_session(session):
            self.queue.drop(waiter)
            yield []
        for key in self.directory.pinned_by(session):
            self.directory.unpin_session(key, session)
            yield []
        for key_waiter in self.key_waiters.by_session(session):
            yield self.cancel_wait(key_waiter, now_s)
        for key, claim in self.key_waiters.claims_of(session):
            yield self.release_claim(key, claim)
        yield self.serve(now_s)

    def fail_write(self, slot: Slot, now_s: float) -> list[Effect]:
        """Revoke a PUBLISHED slot whose bytes will never be complete: its writer died."""
        slot.reads_left, slot.owed_by_names = 0, None
        self.endings.note(slot, Ending.WRITER_LOST)
        self._leave_owing(slot)
        evicted = [] if slot.key is None else [self._drop_key(slot, now_s, "writer lost")]
        # Retired though grants may be out: `due` passes it over until they are paid.
        return [*evicted, self._retire(slot, now_s)]


def _reaches(slot: Slot, offset_bytes: int) -> bool:
    extent = slot.extent
    return extent is not None and extent.offset_bytes + extent.size_bytes > offset_bytes
