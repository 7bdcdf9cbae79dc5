"""The calls that name features by key, the same for owners and clients."""

import time
from collections.abc import Awaitable
from typing import Any

import anyio
import torch

from featcache.errors import KeyNotFound, KeyTimeout, StaleRef
from featcache.memory.pack import Feature
from featcache.session.arguments import NOWAIT_RPC_TIMEOUT_S, check_make, key_bytes
from featcache.session.borrow import Borrow
from featcache.session.lease import KeyLease, MakeClaim
from featcache.session.reader import Reader
from featcache.session.single_flight import Keys, Make, make_and_put
from featcache.settings import parse_timeout


class ByKey:
    """The directory's calls, over whatever `Keys` the object has."""

    def _keys(self) -> Keys:
        """Return the directory, or raise CacheClosed; SettingsError if there is none."""
        raise NotImplementedError

    def _reads(self) -> Reader:
        """Return the open reader, or raise CacheClosed."""
        raise NotImplementedError

    def _default_device(self) -> torch.device | None:
        raise NotImplementedError

    def _target(self, device: Any, out: Feature | None) -> torch.device | None:
        raise NotImplementedError

    async def put_made(self, feature: Feature, key: bytes) -> object:
        """Put what `get_or_put` made."""
        raise NotImplementedError

    async def _get_key(
        self, key: Any, device: torch.device | None, out: Feature | None, timeout: Any
    ) -> Feature:
        wanted, timeout_s = key_bytes(key), parse_timeout(timeout)
        since_s = 0.0 if timeout_s is None else time.monotonic()
        left_s = timeout_s
        while True:
            read = await self._keys().find(wanted, left_s)
            if timeout_s is not None:
                left_s = max(0.0, since_s + timeout_s - time.monotonic())
            try:
                return await self._reads().get_granted(read, device, out, left_s)
            except StaleRef:
                pass  # its writer died before its bytes came, and the key went with it: look again

    def _borrow_key(self, key: Any, timeout: Any) -> Borrow:
        wanted, timeout_s = key_bytes(key), parse_timeout(timeout)

        def find() -> Awaitable[KeyLease]:
            return self._keys().find(wanted, timeout_s)

        return Borrow(self._reads(), find, timeout_s)

    # What code with no loop is made of (`featcache.blocking.keys`).

    def target(self, device: Any, out: Feature | None) -> torch.device | None:
        """Return where a get puts its copy, None for the pool's own device."""
        return self._target(device, out)

    async def find_key(self, key: bytes, timeout_s: float | None) -> KeyLease:
        """Return a read of what is under a key."""
        return await self._keys().find(key, timeout_s)

    def get_leased_blocking(
        self, read: KeyLease, device: torch.device | None, out: Feature | None
    ) -> Feature | None:
        """Copy in the caller's thread, which may block; None where only host memory leads there."""
        return self._reads().get_leased_blocking(read, device, out)

    def empty_like(self, read: KeyLease, device: torch.device | None) -> Feature:
        """Return new tensors for a granted feature."""
        return self._reads().empty_like(read.ref, device or read.mapping.device)

    async def get_granted(self, read: KeyLease, out: Feature) -> Feature:
        """Copy in the loop."""
        return await self._reads().get_granted(read, None, out, None)

    async def get_or_put(
        self,
        key: str | bytes,
        make: Make,
        *,
        device: Any = None,
        timeout: float | None = None,
    ) -> Feature:
        """Return what is under a key; if there is nothing, make it and put it there.

        Of all who ask for a key at once, in all processes, one runs its `make`. The others wait for
        what it puts. If it raises, is cancelled or its process dies, one of those that wait runs its
        own `make` next; the error reaches only the caller whose `make` raised it. A `make` that asks
        for its own key waits for itself.

        Args:
            key: as in `put`.
            make: called with no arguments, in the event loop; returns a feature, or an awaitable of
                one. What takes long is to be awaitable, or to run in a thread.
            device: where the feature is to be; None is the device this object was made with, else
                the pool's own for what is read, and what `make` returned for what was made.
            timeout: seconds to wait for another's `make`; None is for ever. It does not bound one's own
                `make`, nor the wait for room for what it made.

        Raises:
            KeyTimeout: nothing came in time.
            FeatureTooLarge, PoolFull: what was made can't be put.
            OwnerLost, CacheClosed, SettingsError: as `get` and `put` do.

        """
        check_make(make)
        wanted, timeout_s = key_bytes(key), parse_timeout(timeout)
        place = self._target(device, None)
        while True:
            found = await self.find_or_claim(wanted, timeout_s)
            if isinstance(found, MakeClaim):
                made = await make_and_put(found, make, lambda made: self.put_made(made, wanted))
                return moved(made, place)
            try:
                return await self._reads().get_granted(found, place, None, None)
            except StaleRef:
                pass  # whoever made it died before its bytes came: one of those that waited makes it

    async def find_or_claim(self, key: bytes, timeout_s: float | None) -> KeyLease | MakeClaim:
        """Return a read of a key, or the right to make it; the first half of `get_or_put`."""
        at_once = timeout_s == 0  # not to wait: a round trip takes longer than that, and is no wait
        try:
            if timeout_s is None:  # a scope takes longer than many a lookup
                return await self._keys().find_or_claim(key, waits=True)
            with anyio.fail_after(NOWAIT_RPC_TIMEOUT_S if at_once else timeout_s):
                return await self._keys().find_or_claim(key, waits=not at_once)
        except (KeyNotFound, TimeoutError):
            raise KeyTimeout(f"nobody made it within {timeout_s} s") from None

    async def contains(self, key: str | bytes) -> bool:
        """Whether a feature is kept under a key now. It does not count as a use."""
        return await self._keys().contains(key_bytes(key))

    async def evict(self, key: str | bytes) -> bool:
        """Drop a key, pinned or not; return whether it was there.

        Who reads its feature may finish, and reads that its ref owes stay owed; its bytes are recycled
        after that.
        """
        return await self._keys().evict(key_bytes(key))

    async def pin(self, key: str | bytes) -> None:
        """Keep a feature from being evicted to make room.

        Pins are counted, and belong to the session that made them: they end with it.

        Raises:
            KeyNotFound: nothing is kept under the key.

        """
        await self._keys().pin(key_bytes(key))

    async def unpin(self, key: str | bytes) -> None:
        """Take back a pin: one of this session's, else the oldest of another's, if there is one.

        Raises:
            KeyNotFound: nothing is kept under the key.

        """
        await self._keys().unpin(key_bytes(key))


def moved(feature: Feature, device: torch.device | None) -> Feature:
    """Return a feature that was made, contiguous and on a device (None: where it is)."""
    if isinstance(feature, torch.Tensor):
        return _moved(feature, device)
    return {name: _moved(tensor, device) for name, tensor in feature.items()}


def _moved(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    return (tensor if device is None else tensor.to(device)).contiguous()
