"""`Observer`: one who looks at a pool without taking part in it; `observe`."""

from typing import NoReturn, Self

import attrs

from featcache.api import forks
from featcache.api.arguments import no_pickle, parse_name, settings_with
from featcache.api.lifecycle import Lifecycle, LifeState
from featcache.client.observing import Observing
from featcache.control import endpoint as endpoints
from featcache.control.observer_link import dial_observer
from featcache.control.observing import MAX_CELLS, MAX_KEYS, ORDERS, Order
from featcache.errors import SettingsError
from featcache.observation import KeysPage, SlabMap, Snapshot
from featcache.session.arguments import key_bytes
from featcache.settings import Settings


class Observer:
    """Looks at a pool: it reads no feature, holds nothing, and takes no session's place. Made by `observe`.

    It belongs to the event loop that opens it. The owner answers its calls one by one, within a small
    share of its time: an observer that asks more often than that waits.
    """

    def __init__(self, endpoint: str, name: str | None, settings: Settings) -> None:
        self._life: Lifecycle[Observing] = Lifecycle("observer", "observe with")
        self._endpoint = endpoint
        self._name = name
        self._settings = settings

    # --- life -------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Attach; ``async with`` does.

        Raises:
            OwnerUnreachable: nobody listens there.
            AttachRefused: the owner speaks another version, or has `Settings.observers` already.
            CacheClosed: it was opened before, or is closed meanwhile; make another.
            WrongLoop: no asyncio loop runs here.

        """
        await self._life.open(self._attach)
        forks.watch(self)
        return self

    async def _attach(self) -> Observing:
        link, _ = await dial_observer(self._endpoint, self._name, self._settings)
        return Observing(link, self._settings.attach_timeout)

    async def aclose(self) -> None:
        """Detach; ``async with`` does. Idempotent."""
        await self._life.aclose()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed, in this process. Safe in any thread."""
        return self._life.state is LifeState.OPEN

    @property
    def endpoint(self) -> str:
        """The owner's endpoint."""
        return self._endpoint

    def _opened(self) -> Observing:
        engine = self._life.engine
        if engine is None:
            raise self._life.closed()
        return engine

    def _endpoints(self) -> set[str]:
        return {self._endpoint}

    def _forget(self) -> None:
        self._life.forget()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        no_pickle(self)

    def __repr__(self) -> str:
        return f"<Observer of {self._endpoint}>"

    # --- looking ----------------------------------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        """Return the pool as it is now: its figures, its sessions, who owes and who waits.

        Raises:
            OwnerLost: the owner died, closed the pool, or ended this observer.
            GetTimeout: it did not answer within `Settings.attach_timeout`.

        """
        return await self._life.here().snapshot()

    async def keys(
        self, order: Order = "size", *, after: str | None = None, limit: int = 100
    ) -> KeysPage:
        """Return a page of the keys, the largest, oldest or most hit first.

        Args:
            order: ``"size"``, ``"age"`` (the oldest first) or ``"hits"``.
            after: `KeysPage.next` of the page before; None begins.
            limit: keys on the page, 1 to 512; fewer come where they would not fit a message.

        Raises:
            SettingsError: no such order or limit, or `after` is of no page. Else as `snapshot`.

        """
        if order not in ORDERS:
            raise SettingsError(f"order={order!r} is none of {ORDERS}")
        if after is not None and not isinstance(after, str):
            raise SettingsError(f"after={after!r} is not a page's `next`")
        _check_count(limit, "limit", MAX_KEYS)
        return await self._life.here().keys(order, after or "", limit)

    async def map(self, cells: int = 1024) -> SlabMap:
        """Return the slab by offset, drawn with so many cells, 1 to 4096. Raises as `snapshot`."""
        _check_count(cells, "cells", MAX_CELLS)
        return await self._life.here().map(cells)

    async def evict(self, key: str | bytes) -> bool:
        """Drop a key, pinned or not; return whether it was there. Its readers may finish.

        The one command of an observer. Raises as `snapshot`.
        """
        return await self._life.here().evict(key_bytes(key))


def _check_count(value: object, name: str, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise SettingsError(f"{name}={value!r} is out of range: 1 to {most}")


def observe(
    endpoint: str,
    *,
    name: str | None = None,
    timeout: float | None = None,
    settings: Settings | None = None,
) -> Observer:
    """Return an observer of the pool at an endpoint, to be opened with ``async with``.

    Args:
        endpoint: the owner's `FeatureCache.endpoint`.
        name: for the owner's log, if it refuses this observer.
        timeout: seconds for the owner to answer; `Settings.attach_timeout` if left out.
        settings: its bounds; without it, the environment's ``FEATCACHE_…``.

    Raises:
        SettingsError: an argument is invalid.

    """
    chosen = settings_with(settings)
    if timeout is not None:
        chosen = attrs.evolve(chosen, attach_timeout=timeout)
    return Observer(endpoints.check_endpoint(endpoint), parse_name(name), chosen)
