"""`get_or_put`: of all who ask for a key at once, in all processes, one makes it."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Protocol

from featcache.memory.pack import Feature
from featcache.session.lease import KeyLease, MakeClaim

Make = Callable[[], Feature | Awaitable[Feature]]


class Keys(Protocol):
    """The directory, as whoever holds it or is attached to it can use it."""

    async def find(self, key: bytes, timeout_s: float | None) -> KeyLease:
        """Return a read of what is under a key; with a timeout, wait for it that long."""

    async def find_or_claim(self, key: bytes, *, waits: bool) -> KeyLease | MakeClaim:
        """Return a read, once there is something, or the right to make it.

        Unless it `waits`, raise KeyNotFound while another makes it.
        """

    async def contains(self, key: bytes) -> bool:
        """Whether there is something under a key."""

    async def evict(self, key: bytes) -> bool:
        """Drop a key; return whether it was there."""

    async def pin(self, key: bytes) -> None:
        """Keep a key from being evicted, or raise KeyNotFound."""

    async def unpin(self, key: bytes) -> None:
        """Take back a pin, or raise KeyNotFound."""


async def make_and_put(
    making: MakeClaim, make: Make, put: Callable[[Feature], Awaitable[object]]
) -> Feature:
    """Make what was claimed and put it; return it.

    However it ends the claim is given back: to nobody if the feature is there by then, else to the next
    who waits.
    """
    try:
        made = make()
        feature = await made if inspect.isawaitable(made) else made
        await put(feature)
    finally:
        making.end()
    return feature
