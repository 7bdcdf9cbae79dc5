"""What tests of keys, of eviction and of puts from clients share."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import anyio

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef
from featcache.core.slots import Slot
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool
from featcache.ref import TensorSpec
from support.caches import KIB, small, spent, until

User = FeatureCache | FeatureClient

CAPACITY: Final = 64 * KIB
ONE: Final[dict[str, Any]] = {"capacity": CAPACITY, "segment": CAPACITY}
"""A pool that one feature of `CAPACITY` bytes fills."""


@contextlib.asynccontextmanager
async def party(
    clients: int, **changes: Any
) -> AsyncIterator[tuple[FeatureCache, list[FeatureClient]]]:
    """An owner and several clients over the real socket, in one loop."""
    chosen = small(**changes)
    async with contextlib.AsyncExitStack() as stack:
        owner = await stack.enter_async_context(featcache.create(settings=chosen))
        yield (
            owner,
            [
                await stack.enter_async_context(featcache.connect(owner.endpoint, settings=chosen))
                for _ in range(clients)
            ],
        )


def pool_of(owner: FeatureCache) -> Pool:
    return owner._opened().pool


def ref_of(pool: Pool, slot: Slot, specs: tuple[TensorSpec, ...]) -> FeatureRef:
    """The ref of what a slot is to have."""
    place = slot.index, slot.generation, slot.offset_bytes, slot.nbytes
    return FeatureRef(pool.pool_id, pool.endpoint, *place, specs)


def page_of(owner: FeatureCache, session: int = 1) -> SessionPage:
    """A session's page as the owner has it; clients are numbered from 1 as they attached."""
    return pool_of(owner).pages[session]


def grants(owner: FeatureCache) -> int:
    """Reads by key that are out."""
    return sum(page.reads_by_key for page in pool_of(owner).pages.values())


def seeking(owner: FeatureCache) -> int:
    """How many wait for keys."""
    return pool_of(owner).store.key_waiters.count


def claims(owner: FeatureCache) -> int:
    """How many have been told to make something, and are at it."""
    return len(pool_of(owner).store.key_waiters._claims)


def reserved(owner: FeatureCache) -> int:
    """Slots that sessions have to write."""
    return sum(len(page.reserved) for page in pool_of(owner).pages.values())


def in_progress(owner: FeatureCache) -> int:
    """What sessions asked and were not answered."""
    return sum(len(session.tasks) for session in owner._opened().main.server.sessions.values())


async def queued(owner: FeatureCache, count: int) -> None:
    """Return when so many puts wait for room."""
    await until(lambda: owner.statistics().waiters == count)


async def sought(owner: FeatureCache, count: int) -> None:
    """Return when so many wait for keys."""
    await until(lambda: seeking(owner) == count)


async def nothing_lost(owner: FeatureCache) -> None:
    """Show that all that was handed out comes back: with its keys dropped the pool is empty."""
    await until(lambda: not (seeking(owner) or claims(owner) or in_progress(owner)))

    def all_paid() -> bool:
        pool_of(owner).collect()  # some tests have no timer that would
        return not (grants(owner) or reserved(owner))

    await until(all_paid)
    for key in list(pool_of(owner).store.directory):
        assert await owner.evict(key)
    await spent(owner)
    now = owner.statistics()
    assert (now.keys, now.resident_bytes, now.pinned_bytes) == (0, 0, 0)


class Cancellable:
    """A call that can be cancelled natively or through an anyio scope."""

    def __init__(self, kind: str, call: Callable[[], Awaitable[Any]]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._kind = kind
        self._scope = anyio.CancelScope()
        self._task = asyncio.create_task(self._run(call))

    async def _run(self, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            with self._scope:
                self.result = await call()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def cancel(self) -> None:
        """Cancel it now."""
        if self._kind == "native":
            self._task.cancel()
        else:
            self._scope.cancel()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._task.done()

    async def wait(self) -> None:
        """Return when it has ended."""
        await asyncio.wait([self._task])
