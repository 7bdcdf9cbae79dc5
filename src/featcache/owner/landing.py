"""Where the bytes of other hosts land: room in the queue of all puts, one read, and then a key."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from featcache.core.put_queue import Request
from featcache.core.slots import Slot
from featcache.errors import CacheClosed, MalformedRef, OwnerLost
from featcache.owner.far_traffic import FetchNews, Traffic
from featcache.owner.registered import RegisteredSlab
from featcache.owner.served_pool import ServedPool
from featcache.reach import messages
from featcache.reach.plane import HOST, Memory, Transfer, pair
from featcache.ref import FeatureRef, TensorSpec

T = TypeVar("T")
_now: Final = time.monotonic
_NO_POOL: Final = bytes(16)
_SLOWEST_BYTES_PER_S: Final = 16 << 20
"""A read that is slower than this is given up."""
_HANDOVER_S: Final = 0.05
"""For which a feature that was fetched is kept until those that wait for it have their refs of it."""


class Giver(Protocol):
    """A host that has pinned what is read from it."""

    address: str
    """For errors, and what is told."""
    traffic: Traffic

    @property
    def plane(self) -> str:
        """The name of its data plane."""

    @property
    def gone(self) -> "asyncio.Future[None]":
        """Done when it is lost."""

    def check(self) -> None:
        """Raise OwnerLost if it is lost."""

    async def vouch(self) -> None:
        """Return once it is sure that all was pinned until now; or raise OwnerLost."""


class There(NamedTuple):
    """Where a feature's bytes are at the host that has them."""

    nbytes: int
    address: int
    pieces: Sequence[int]
    specs: tuple[TensorSpec, ...]
    memory: Memory = HOST


def checked_specs(told: messages.Sought | messages.Offer) -> tuple[TensorSpec, ...]:
    """Return the specs that a host tells of; MalformedRef if no feature of so many bytes has them."""
    if sum(told.pieces) != told.nbytes:
        raise MalformedRef("a host told of other bytes than the feature has")
    return FeatureRef(_NO_POOL, "/", 0, 1, 0, told.nbytes, told.specs).specs


async def or_lost(giver: Giver, work: Coroutine[Any, Any, T], unwanted: Callable[[T], object]) -> T:
    """Await work; if the host is lost before, cancel it and raise OwnerLost.

    `unwanted` is told the result that the work has all the same, if this is cancelled as it ends.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        either: list[asyncio.Future[Any]] = [task, giver.gone]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            giver.check()
    except BaseException:
        task.cancel()
        task.add_done_callback(lambda done: _hand_back(done, unwanted))
        raise
    return task.result()


def _hand_back(task: "asyncio.Task[T]", unwanted: Callable[[T], object]) -> None:
    if not task.cancelled() and task.exception() is None:
        unwanted(task.result())


class Landing:
    """Reads of other hosts' features into this pool."""

    def __init__(self, served: ServedPool, slab: Callable[[], Awaitable[RegisteredSlab]]) -> None:
        self._served = served
        self._pool = served.pool
        self._slab = slab
        self.news = FetchNews(self._pool.name, self._pool.settings.log_interval)
        self.publishing: bytes | None = None
        """The key under which a feature of another host is being kept at this moment."""

    async def land(
        self, giver: Giver, there: There, key: bytes, *, room_s: float | None = None
    ) -> None:
        """Read a feature into this pool, and keep it under a key. What is under the key by then stays.

        Args:
            giver: the host that has it pinned.
            there: where it is there.
            key: under which it is to be kept here.
            room_s: seconds to wait for room; None waits without limit.

        Raises:
            OwnerLost: the host is lost, or its bytes do not come in time.
            PutTimeout: no room came in time.
            PoolFull, FeatureTooLarge: there can be none.
            CacheClosed: this pool was closed.

        """
        pool, slab = self._pool, await self._slab()
        pool.store.check_size(there.nbytes)
        request, writer = Request(there.nbytes, 0, None, key), self._served.writer
        slot = None if writer.has_callers else writer.reserve(request)
        if slot is None:
            back = partial(pool.give_up_reserved, order=None)
            slot = await or_lost(giver, self._room(request, room_s), back)
        transfer: Transfer | None = None
        took_s: float | None = None
        try:
            await slab.settled()
            if there.nbytes:
                ours = slab.pieces(slot.offset_bytes, there.nbytes)
                here = slab.address_of(slot.offset_bytes)
                pieces = pair(here, ours, there.address, there.pieces)
                # The slot was free: on a GPU too no stream is at work there, since a reader's release
                # and a writer's word land behind the work itself.
                began_s = _now()
                transfer = slab.plane.read(giver.plane, pieces, there.memory)
                await self._landed(giver, transfer, there.nbytes)
                took_s = _now() - began_s
            await giver.vouch()
        except BaseException:
            self._give_up(slot, transfer, giver)
            raise
        # Only now, and by the CPU: the bytes are there for kernels too, and behind no stream.
        if key in pool.store.directory:
            pool.give_up_reserved(slot, None)
        else:
            self.publishing = key
            try:
                pool.publish(slot, there.specs, None)
            finally:
                self.publishing = None
        self._count(giver, there.nbytes, took_s)
        # Kept until those that wait have their shares: a put could evict it before their tasks run.
        held = pool.store.hold(key, _now())
        if held is not None:
            pool.loop.call_later(_HANDOVER_S, self._release_grant, held)

    def _count(self, giver: Giver, nbytes: int, took_s: float | None) -> None:
        """Count a feature that is here; `took_s` is of its transfer."""
        giver.traffic.landed(nbytes, took_s)
        if took_s is not None:
            self.news.landed(giver.address, nbytes, took_s, self._limit_s(nbytes))

    def _release_grant(self, slot: Slot) -> None:
        if not self._pool.closed:
            self._pool.apply(self._pool.store.pay_grant(slot, _now()))

    async def _room(self, request: Request, room_s: float | None) -> Slot:
        """Return a slot in the queue of all puts, after `reserve` found none."""
        writer = self._served.writer
        return await writer.slot_of(writer.ask(request, wait=True), room_s, wait=True)

    async def _landed(self, giver: Giver, transfer: Transfer, nbytes: int) -> None:
        """Return once a read has landed; OwnerLost if its host is lost first, or it takes too long."""
        limit_s = self._limit_s(nbytes)
        waits = [transfer.ended, giver.gone]
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not transfer.ended.done():
            giver.check()
            raise OwnerLost(f"{nbytes} bytes of {giver.address} did not come in {limit_s:.1f} s")
        failed = transfer.ended.exception()
        if failed is not None:
            if isinstance(failed, CacheClosed):
                raise CacheClosed(str(failed))
            raise OwnerLost(f"the bytes could not be read from {giver.address}: {failed}")

    def _limit_s(self, nbytes: int) -> float:
        """Return after how long a transfer is given up."""
        return self._pool.settings.peer_timeout + nbytes / _SLOWEST_BYTES_PER_S

    def _give_up(self, slot: Slot, transfer: Transfer | None, giver: Giver) -> None:
        """Give up the landing place of a read that failed, once nothing can be written there any more."""
        pool = self._pool
        if transfer is None or transfer.ended.done():
            pool.give_up_reserved(slot, None)
            return
        # Quarantined: a read that was given up may land when its home goes on, in seconds or days.
        traffic, nbytes = giver.traffic, slot.nbytes
        traffic.quarantined += 1
        traffic.quarantined_bytes += nbytes
        self.news.quarantined(giver.address, nbytes, traffic.quarantined_bytes)
        transfer.abandon()

        def ended(_: "asyncio.Future[None]") -> None:
            traffic.quarantined -= 1
            traffic.quarantined_bytes -= nbytes
            pool.give_up_reserved(slot, None)

        transfer.ended.add_done_callback(ended)
