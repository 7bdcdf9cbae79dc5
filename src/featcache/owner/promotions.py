"""On miss look up: a feature in the tier is written into a slot of the pool, and published under its key."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Final

from featcache.core.put_queue import Request
from featcache.core.slots import Slot
from featcache.errors import PoolFull
from featcache.owner.demotions import CPU, Demotion, Demotions, whole
from featcache.owner.served_pool import ServedPool
from featcache.owner.tier_calls import Deadline, TierCalls, TierError
from featcache.owner.tier_header import Described, decode
from featcache.owner.tier_staging import Loan, Piece
from featcache.ref import TensorSpec

_now: Final = time.monotonic
_AT_ONCE: Final = 16
"""Keys of one call that the tier is asked for at the same time."""


class Landing:
    """The place of a feature that comes from the tier: its slot, or staging memory where that is on a GPU.

    ::

        EMPTY ──`room`──→ LENT to the tier ──its call ends, no view is left──→ PUBLISHED, or free again
    """

    def __init__(self, promotions: "Promotions", key: bytes, deadline: Deadline) -> None:
        self._promotions = promotions
        self._deadline = deadline
        self._is_lent = False
        self._asked = False
        self._ended = False
        self._loan: Loan | None = None
        self.key = key
        self.slot: Slot | None = None
        self.described: Described | None = None
        self.piece: Piece | None = None
        self.outdated = False
        """Whether the key was evicted or demoted meanwhile: what comes is older."""
        self.full: PoolFull | None = None
        """Why there is no room."""

    @property
    def has_ended(self) -> bool:
        """Whether the tier's call is over, or was given up."""
        return self._ended

    async def room(self, header: bytes) -> memoryview:
        """Return memory for a feature's bytes, as `tier.MakeRoom`."""
        if self._asked or self._ended:
            raise ValueError("room is asked for once, and before the call has ended")
        self._asked = True
        self.described = described = decode(header, self.key)
        pool, nbytes = self._promotions.served.pool, described.nbytes
        if nbytes > pool.store.max_feature_bytes:
            raise ValueError(f"{nbytes} bytes fit no pool of this capacity")
        self._deadline.pause()
        try:
            slot = await self._promotions.reserve(Request(nbytes, 0, None, self.key))
        except PoolFull as full:
            self.full = full
            await self._deadline.resume()  # a tier may go on regardless
            raise
        if self.has_ended:  # so may one that was cancelled
            pool.give_up_reserved(slot, None)
            raise ValueError("the call has ended")
        self.slot = slot  # first: `end` gives it up if this is cancelled
        await self._deadline.resume()
        if self.has_ended:
            raise ValueError("the call has ended")
        if pool.slab.deferred:
            self.piece = self._promotions.demotions.staging.take(nbytes)
            if self.piece is None:
                self.full = PoolFull("the staging memory is full: raise Settings.tier_bytes")
                raise self.full
            self._loan = self.piece.lend(writable=True)
        else:
            self._is_lent = True
            place = pool.slab.view(slot.offset_bytes, whole(nbytes))
            self._loan = Loan(place, pool.loop, self._no_view_is_left, writable=True)
        return self._loan.view

    def take_back(self) -> bool:
        """Take the memory back from the tier; return whether it refers to none of it any more."""
        if self._loan is not None and self._loan.end():
            self._loan, self._is_lent = None, False
        return not self._is_lent

    def end(self) -> None:
        """Give its slot up, unless it was published: at once, or when no view of it is left."""
        self._ended = True
        self.take_back()
        self._free()

    def _no_view_is_left(self) -> None:
        self._is_lent = False
        if self._ended:
            self._free()

    def _free(self) -> None:
        # A thread of a call that was cancelled may still write: no other feature may lie there until then.
        if self._is_lent:
            return
        slot, piece = self.slot, self.piece
        self.slot = self.piece = None
        if piece is not None:
            piece.release()
        if slot is not None:
            self._promotions.served.pool.give_up_reserved(slot, None)


class Promotions:
    """The `owner.key_sources.KeySource` over a tier."""

    name = "tier"

    def __init__(self, served: ServedPool, demotions: Demotions, calls: TierCalls) -> None:
        self.served = served
        self.demotions = demotions
        self.promoted = 0
        self._calls = calls
        self._coming: dict[bytes, Landing] = {}
        demotions.on_demoted = self._outdate

    def _outdate(self, key: bytes) -> None:
        landing = self._coming.get(key)
        if landing is not None:
            landing.outdated = True

    # --- one key --------------------------------------------------------------------------------------

    async def bring(self, key: bytes) -> bool:
        """Put a key's feature into the pool, from the staging memory or the tier; return whether it did."""
        demotions, calls = self.demotions, self._calls
        demotion = demotions.staged(key)
        if demotion is None and not demotions.may_have(key):
            return False
        deadline = calls.new_deadline()
        landing = self._coming[key] = Landing(self, key, deadline)
        try:
            if demotion is not None:
                return await self._from_staging(landing, demotion)
            written = await calls.look_up("get", key, lambda: self._get(landing), deadline)
            return written is not None and await self._land(landing, written)
        except TierError:
            return False
        finally:
            landing.end()
            if self._coming.get(key) is landing:
                del self._coming[key]

    async def _get(self, landing: Landing) -> object:
        try:
            return await self._calls.tier.get(landing.key, landing.room)
        except PoolFull as full:
            if full is not landing.full:
                raise
            return None  # no fault of the tier's

    async def reserve(self, request: Request) -> Slot:
        """Return a slot, in the queue of all puts; PoolFull if too many wait already."""
        writer = self.served.writer
        slot = None if writer.has_callers else writer.reserve(request)
        return slot or await writer.slot_of(writer.ask(request, wait=True), None, wait=True)

    async def _land(self, landing: Landing, written: object) -> bool:
        """Publish a promotion."""
        described, slot, key = landing.described, landing.slot, landing.key
        if described is None or slot is None:
            raise self._calls.failed("get", key, "it has written, but asked for no room")
        if type(written) is not int or written != described.nbytes:
            raise self._calls.failed(
                "get", key, f"it has written {written!r} of {described.nbytes} bytes"
            )
        if not landing.take_back():
            raise self._calls.failed("get", key, "it still refers to the memory that it has filled")
        if landing.piece is not None:
            landing.slot = None  # from here on it is the copy's
            if not await self._copy_in(slot, landing.piece):
                return False
            landing.slot = slot
        self.demotions.note_stored(key)
        # First: in its publish a put that waits may evict it, and have its slot.
        self.demotions.clean[slot.index] = slot.generation
        return self._publish(landing, described.specs)

    async def _from_staging(self, landing: Landing, demotion: Demotion) -> bool:
        """Copy a feature back that is on its way to the tier."""
        piece, ref = demotion.piece, demotion.ref
        piece.hold()
        try:
            if demotion.copied is not None and not await asyncio.shield(demotion.copied):
                return False
            slot = await self.reserve(Request(ref.nbytes, 0, None, demotion.key))
            if not await self._copy_in(slot, piece):
                return False
            landing.slot = slot
            return self._publish(landing, ref.specs)
        finally:
            piece.release()

    async def _copy_in(self, slot: Slot, piece: Piece) -> bool:
        """Copy a feature from the staging memory into its slot, which is given up if that fails."""
        pool, nbytes = self.served.pool, slot.nbytes
        parts, offset_bytes = [(whole(nbytes), piece.tensor)], slot.offset_bytes

        def undo(_: object) -> None:
            piece.release()
            pool.give_up_reserved(slot, None)

        piece.hold()
        try:
            if not pool.slab.deferred and nbytes <= pool.settings.inline_bytes:
                pool.slab.write(offset_bytes, parts, pool.slab.order(CPU))
            else:
                write, order = pool.slab.write, None if pool.slab.deferred else ()
                await pool.offload.run(lambda: write(offset_bytes, parts, order), undo)
        except asyncio.CancelledError:
            raise  # the thread is still copying: the slot is given up when it is done
        except BaseException:
            undo(None)
            raise
        piece.release()
        return not pool.closed

    def _publish(self, landing: Landing, specs: tuple[TensorSpec, ...]) -> bool:
        """Publish a feature under its key, unless a newer one was put, or it was evicted by name."""
        pool, slot, key = self.served.pool, landing.slot, landing.key
        pool.check_open()
        if slot is None or landing.outdated or key in pool.store.directory:
            return key in pool.store.directory
        landing.slot = None
        pool.publish(slot, specs, None)
        self.promoted += 1
        return True

    # --- many -----------------------------------------------------------------------------------------

    async def holds(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether each of these keys can be brought."""
        told = [self.demotions.staged(key) is not None for key in keys]
        left = iter([n for n, there in enumerate(told) if not there])

        async def some() -> None:
            for n in left:
                told[n] = await self._holds(keys[n])

        async with asyncio.TaskGroup() as group:
            for _ in range(min(_AT_ONCE, len(keys))):
                group.create_task(some())
        return told

    async def _holds(self, key: bytes) -> bool:
        calls = self._calls
        if not self.demotions.may_have(key):
            return False
        with contextlib.suppress(TierError):
            deadline = calls.new_deadline()
            return bool(await calls.look_up("has", key, lambda: calls.tier.has(key), deadline))
        return False
