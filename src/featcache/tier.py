"""`Tier`: a larger, slower store below a pool. What is evicted goes there, what is missed is looked up there.

The names are those of tiered caches (Linux's memory tiers, vLLM's and LMCache's offloading): a feature is
*demoted* to the tier and *promoted* from it.
"""

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

__all__ = ["MakeRoom", "Tier"]

MakeRoom: TypeAlias = Callable[[bytes], Awaitable[memoryview]]
"""Takes the header that `Tier.put` was given and returns writable memory for exactly the data's bytes."""


class Tier(Protocol):
    """What a store below a pool does. Passed to `create(tier=…)`, which closes it with the cache.

    The calls run in the cache's event loop, several at once; of one key, one after the other. A store whose
    client blocks is called in threads (`asyncio.to_thread`). Each call has `Settings.tier_timeout` seconds,
    then it is cancelled. Whatever it raises is counted, told as an event, and costs that one feature.
    """

    async def put(self, key: bytes, header: bytes, data: memoryview) -> None:
        """Store a feature under its key, in place of what is there.

        Args:
            key: 1 to 1024 bytes.
            header: says what the data is; up to 64 KiB, about 50 bytes as a rule. To be stored as it is.
            data: the feature's bytes, one-dimensional, read-only, and gone when the call has ended.

        """

    async def get(self, key: bytes, room: MakeRoom) -> int | None:
        """Look a feature up, and write its data into memory of the cache's own.

        If it is there, ``await room(header)`` returns a writable memoryview of the data's size, which is the
        feature's place in a slab in host memory: no copy is made after that. It waits for room there, as a
        put does; that time is not the tier's. `room` is called at most once; it raises ValueError for a
        header that is damaged or another key's.

        Nothing may be written there once the call has returned. A call that was cancelled while a thread of
        its own still writes keeps the memory for as long as it refers to the view.

        Returns:
            How many bytes were written, which must be all; None if nothing is stored under the key.

        """

    async def has(self, key: bytes) -> bool:
        """Return whether something is stored under a key. Not a use of it."""

    async def remove(self, key: bytes) -> None:
        """Remove what is stored under a key, if anything is: it was evicted by name, or is out of date."""

    async def close(self) -> None:
        """Close the store's client. No other call comes after it."""


TIER_CALLS: Final = ("put", "get", "has", "remove", "close")
"""The names of its calls."""
