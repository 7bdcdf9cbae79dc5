"""Attaches a client's pool again after its owner is gone, with back-off."""

import asyncio
import contextlib
import random
import time
from typing import Final

import anyio

from featcache import events
from featcache.client.registry import ConnectionRegistry
from featcache.errors import CacheClosed, OwnerUnreachable, explain

_FIRST_PAUSE_S: Final = 0.02


class Reconnector:
    """One client's way back to the endpoint that it is bound to.

    | the pool | by                                                        | then     |
    | -------- | --------------------------------------------------------- | -------- |
    | attached | its owner is gone                                         | away     |
    | away     | a try fails: the next comes after twice the pause         | away     |
    | away     | a try attaches a pool there, of whichever owner           | attached |
    | any      | `close`                                                   | closed   |
    """

    def __init__(self, registry: ConnectionRegistry, endpoint: str, interval_s: float) -> None:
        """`interval_s` bounds the pause between two tries."""
        self._registry = registry
        self._endpoint = endpoint
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None
        self._attached = asyncio.Event()
        self._closed = False
        registry.on_gone.append(self._on_gone)

    async def start(self) -> None:
        """Attach; where nobody listens yet, go on trying in the background.

        Raises:
            AttachRefused: an owner is there, and refused.

        """
        try:
            await self._registry.attach(self._endpoint)
        except OwnerUnreachable as error:
            self._registry.lose_bound(str(error))
            events.emit(events.OwnerGone(pool="", endpoint=self._endpoint, reason=str(error)))
            self._begin()
        else:
            if self._registry.peek_bound() is not None:  # not lost again meanwhile
                self._attached.set()

    def _on_gone(self, pool_id: bytes) -> None:
        if pool_id == self._registry.bound_pool:
            self._begin()

    def _begin(self) -> None:
        self._attached.clear()
        if self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._come_back())

    async def _come_back(self) -> None:
        since_s, told = time.monotonic(), ""
        pause_s = min(_FIRST_PAUSE_S, self._interval_s)
        while True:
            # Not all at the same moment: each of the owner's sessions is on its way back.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            pause_s = min(2 * pause_s, self._interval_s)
            try:
                connection = await self._registry.attach(self._endpoint)
            except OwnerUnreachable:
                continue
            except Exception as error:  # noqa: BLE001 - whichever it was, the next try may fare better
                if (reason := explain(error)) != told:
                    told = reason
                    refused = events.ReconnectRefused(
                        pool="", endpoint=self._endpoint, reason=reason
                    )
                    events.emit(refused)
                continue
            if self._registry.is_open(connection):  # not lost again before this task went on
                break
        # In one step with the look above: an owner that is lost from here on finds no task.
        self._task = None
        self._attached.set()
        pool, away_s = connection.attachment.pool_id.hex(), time.monotonic() - since_s
        events.emit(events.OwnerBack(pool=pool, endpoint=self._endpoint, away_s=away_s))

    async def wait(self, timeout_s: float | None) -> None:
        """Return when the pool is attached.

        Raises:
            OwnerUnreachable: not in time.
            CacheClosed: the client is closed meanwhile.

        """
        try:
            with anyio.fail_after(timeout_s):
                await self._attached.wait()
        except TimeoutError:
            raise OwnerUnreachable(
                f"no owner came back to {self._endpoint} in {timeout_s:g} s"
            ) from None
        if self._closed:
            raise CacheClosed("the client was closed")

    async def close(self) -> None:
        """End the tries; waiters get CacheClosed."""
        self._closed = True
        self._attached.set()
        task = self._task
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
