"""Reads and puts staged through host memory: the owner copies between its slab and its host pool."""

from collections.abc import Awaitable, Callable

from featcache.core.put_queue import Request
from featcache.core.slots import Slot
from featcache.errors import CacheClosed, MalformedRef, UnknownPool
from featcache.owner.served_pool import ServedPool
from featcache.pool.pool import Pool
from featcache.pool.writer import Place
from featcache.ref import FeatureRef, TensorSpec
from featcache.session.attachment import Attachment
from featcache.session.offload import Offload
from featcache.session.waiting import wait_ready


class Relay:
    """Copies features of one pool into another, for one read each, and back for puts that come so."""

    def __init__(
        self, source: ServedPool, target: Callable[[], Awaitable[ServedPool]], offload: Offload
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

        The requester has pinned the ref and pays its read; the copy expires if it is never read.

        Raises:
            StaleRef, MalformedRef, UnknownPool: as a get does.
            PoolFull: too many wait for room in the host pool.

        """
        source = self._source.pool
        if ref.pool_id != source.pool_id:
            raise UnknownPool(f"the ref is of pool {ref.pool_id.hex()}, not of this owner's")
        if source.ahead.is_coming(ref.slot, ref.generation):
            await source.ahead.arrival(ref.slot, ref.generation)
        source.find(ref)
        target = await self._target()
        await self._source.relaying.prepare()
        attachment = self._source.relaying.attach()
        request = Request(ref.nbytes, 1, source.settings.relay_ttl)
        there = attachment.pin(ref)
        try:
            slot = await self._slot(
                target, request, attachment, None if there else ref, None, wait=True
            )
            return await self._fill(target, slot, ref)
        finally:
            attachment.unpin(ref, pays=False)

    @staticmethod
    async def _slot(
        target: ServedPool,
        request: Request,
        attachment: Attachment,
        late: FeatureRef | None,
        timeout_s: float | None,
        *,
        wait: bool,
    ) -> Slot:
        """Return a slot in a pool, once the bytes of a pinned ref that is `late` are there too.

        The place in the queue is taken first: a later put, whose bytes come sooner, does not overtake.
        """
        writer = target.writer
        place: Place | None = None if writer.has_callers else writer.reserve(request)
        if place is None:
            place = writer.ask(request, wait=wait)
        if late is not None:
            try:
                await wait_ready(attachment, late)
            except BaseException:
                writer.withdraw(place)
                raise
        return await writer.slot_of(place, timeout_s, wait=wait)

    async def endpoint(self) -> str:
        """Return the endpoint of the host pool, for sessions that stage their puts there."""
        return (await self._target()).pool.endpoint

    async def upload(
        self, data: bytes, request: Request, timeout_s: float | None, *, wait: bool
    ) -> bytes:
        """Put the feature of a host pool's ref into the slab, pay it, and return the new ref's bytes.

        For sessions whose device can't access the slab.

        Raises:
            StaleRef, MalformedRef, UnknownPool: as a get does.
            PoolFull: no room, and `wait` is false; PutTimeout: not in time.

        """
        ref = FeatureRef.from_bytes(data)
        host = await self._target()
        if ref.pool_id != host.pool.pool_id:
            raise UnknownPool(
                f"the ref is of pool {ref.pool_id.hex()}, not of this owner's host pool"
            )
        if ref.nbytes != request.nbytes:
            raise MalformedRef("the request's size is not the feature's")
        await host.relaying.prepare()
        attachment = host.relaying.attach()
        there, done = attachment.pin(ref), False
        try:
            late = None if there else ref
            slot = await self._slot(self._source, request, attachment, late, timeout_s, wait=wait)
            uploaded = await self._upload_into(slot, host, ref)
            done = True
        finally:
            attachment.unpin(ref, pays=done)
        return uploaded.to_bytes()

    async def _upload_into(self, slot: Slot, host: ServedPool, ref: FeatureRef) -> FeatureRef:
        pool, whole = self._source.pool, TensorSpec(None, "uint8", (ref.nbytes,), 0)
        parts = [(whole, host.pool.slab.view(ref.offset_bytes, whole))]
        return await self._copied(
            pool, slot, ref, lambda: pool.slab.write(slot.offset_bytes, parts, None)
        )

    async def _fill(self, target: ServedPool, slot: Slot, ref: FeatureRef) -> FeatureRef:
        slab, whole = self._source.pool.slab, TensorSpec(None, "uint8", (ref.nbytes,), 0)
        into = target.pool.slab.view(slot.offset_bytes, whole)
        order = slab.order(into.device)
        copied = await self._copied(
            target.pool, slot, ref, lambda: slab.read(ref.offset_bytes, whole, into, order)
        )
        self.relayed += 1
        return copied

    async def _copied(
        self, pool: Pool, slot: Slot, ref: FeatureRef, copy: Callable[[], object]
    ) -> FeatureRef:
        """Copy into a slot of a pool in a thread and publish it; its bytes are there by then."""
        try:
            await self._offload.run(copy, lambda _: pool.give_up_reserved(slot, None))
        except (
            Exception
        ):  # not a cancellation: then the thread goes on, and the slot is its until its end
            pool.give_up_reserved(slot, None)
            raise
        if pool.closed:
            raise CacheClosed("the cache was closed while a feature was copied")
        return pool.publish(slot, ref.specs, None)
