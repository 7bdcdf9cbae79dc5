"""A worker's connection to the shared cache, made again whenever it is lost.

A cache that is down costs hits, never requests: without one, or when it has no room, a feature is
computed and not shared.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from torch import Tensor

import featcache

RETRY_S: Final = 0.5
PATIENCE_S: Final = 30.0  # for a feature that another worker makes; then this one makes its own
ROOM_S: Final = 0.2  # for room for a feature that was made here; then it is not shared

log = logging.getLogger("uvicorn.error")


class SharedCache:
    """Features by key, from whichever worker of the host made them first."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.client: featcache.FeatureClient | None = None
        self.lost = anyio.Event()

    async def stay_connected(self) -> None:
        """Runs as long as the server. The owner may be started, stopped or replaced at any time."""
        said = ""
        while True:
            try:
                async with featcache.connect(self.endpoint) as client:
                    log.info("attached to the cache at %s", self.endpoint)
                    self.client, self.lost, said = client, anyio.Event(), ""
                    await self.lost.wait()
            except (featcache.AttachRefused, featcache.OwnerLost) as error:
                if str(error) != said:  # once, not every half second
                    said = str(error)
                    log.warning("no cache, so every picture is encoded here: %s", said)
            finally:
                self.client = None
            await anyio.sleep(RETRY_S)

    async def get_or_make(self, key: bytes, make: Callable[[], Awaitable[Tensor]]) -> Tensor:
        made: Tensor | None = None

        async def make_once() -> Tensor:
            nonlocal made
            made = await make()
            scope.deadline = anyio.current_time() + ROOM_S  # now it is put, which may wait for room
            return made

        client = self.client
        if client is None:
            return await make()
        try:
            with anyio.CancelScope() as scope:
                found = await client.get_or_put(key, make_once, timeout=PATIENCE_S)
                assert isinstance(found, Tensor)  # not a dict of tensors, as may be put too
                return found
        except (featcache.OwnerLost, featcache.CacheClosed):
            self.lost.set()
        except featcache.FeatcacheError as error:  # too large for the slab, say
            log.warning("not shared: %s", error)
        return await make() if made is None else made
