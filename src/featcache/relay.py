"""Reads by way of host memory: the owner copies a feature to its host pool, from where it is read."""

from collections.abc import Awaitable, Callable

from featcache._offload import Offload
from featcache.core.slots import Slot
from featcache.core.waiters import Request
from featcache.errors import CacheClosed, MalformedRef, UnknownPool
from featcache.ref import FeatureRef, TensorSpec
from featcache.serving import Serving

__all__ = ["Relay"]


class Relay:
    """Copies features of one pool into another, for one read each."""

    def __init__(
        self, source: Serving, target: Callable[[], Awaitable[Serving]], offload: Offload
    ) -> None:
        self._source = source
        self._target = target
        self._offload = offload
        self.relayed = 0

    async def encoded(self, data: bytes) -> bytes:
        """As `copy`, for a session: refs as bytes, of which none is trusted."""
        return (await self.copy(FeatureRef.from_bytes(data))).to_bytes()

    async def copy(self, ref: FeatureRef) -> FeatureRef:
        """Copy a feature's bytes as they are; return the ref of the copy, which owes one read.

        Who asks holds the ref and pays its read; the copy expires by itself if it is never read.

        Raises:
            StaleRef, MalformedRef, UnknownPool: as a get does.
            PoolFull: too many wait for room in the host pool.

        """
        source = self._source.pool
        if ref.pool_id != source.pool_id:
            raise UnknownPool(f"the ref is of pool {ref.pool_id.hex()}, not of this owner's")
        found = source.store.find(ref.slot, ref.generation)
        if (found.offset_bytes, found.nbytes) != (ref.offset_bytes, ref.nbytes):
            raise MalformedRef("the ref's extent is not its slot's: it was forged or damaged")
        target = await self._target()
        attachment = self._source.relaying.attach()
        there = attachment.begin(ref)
        try:
            if not there:
                await attachment.arrival(ref)
            request = Request(ref.nbytes, 1, source.settings.relay_ttl)
            slot = target.writer.reserve(request)
            if slot is None:
                slot = await target.writer.await_room(request, None)
            return await self._fill(target, slot, ref)
        finally:
            attachment.end(ref, pays=False)

    async def _fill(self, target: Serving, slot: Slot, ref: FeatureRef) -> FeatureRef:
        pool, slab = target.pool, self._source.pool.slab
        whole = TensorSpec(None, "uint8", (ref.nbytes,), 0)
        into = pool.slab.view(slot.offset_bytes, whole)
        order = slab.order(into.device)

        def abandon() -> None:
            if not pool.closed:
                pool.withdraw(slot, None)

        try:
            await self._offload.run(
                lambda: slab.read(ref.offset_bytes, whole, into, order), abandon
            )
        except Exception:
            abandon()  # after a cancellation, which is none, the thread goes on and calls it at its end
            raise
        if pool.closed:
            raise CacheClosed("the cache was closed while a feature was copied")
        self.relayed += 1
        return pool.publish(slot, ref.specs, pool.slab.order())
