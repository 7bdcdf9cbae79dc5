"""The calls that name features by key, for code that has no event loop."""

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from featcache.api.by_key import moved
from featcache.errors import CacheClosed, GetTimeout, StaleRef
from featcache.memory.pack import Feature
from featcache.ref import FeatureRef
from featcache.session.arguments import check_make, key_bytes
from featcache.session.lease import KeyLease, MakeClaim
from featcache.session.reader import BYTES_LATE
from featcache.settings import parse_timeout

T = TypeVar("T")


class BlockingByKey:
    """As `featcache.api.by_key.ByKey`: looked up in the loop, copied in the caller's thread and order."""

    _inner: Any

    def _call(
        self, work: Callable[[], Awaitable[T]], undo: Callable[[T], object] | None = None
    ) -> T:
        raise NotImplementedError

    def put(self, feature: Feature, *, key: str | bytes | None = None) -> FeatureRef:
        """Put a feature."""
        raise NotImplementedError

    def _get_key(self, key: Any, device: Any, out: Feature | None, timeout: Any) -> Feature:
        inner, wanted, timeout_s = self._inner, key_bytes(key), parse_timeout(timeout)
        inner.check_open()
        place = inner.target(device, out)
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            read = self._call(lambda: inner.find_key(wanted, timeout_s), _give_back)  # noqa: B023 - called here
            try:
                return self._read(read, place, out, give_up_s)
            except StaleRef:  # its writer died before its bytes came, and the key went with it
                if give_up_s is not None:
                    timeout_s = max(0.0, give_up_s - time.monotonic())

    def _read(
        self, read: KeyLease, place: Any, out: Feature | None, give_up_s: float | None = None
    ) -> Feature:
        inner, there = self._inner, False
        try:
            there = read.wait_ready_blocking(float("inf") if give_up_s is None else give_up_s)
        finally:
            if not there:
                read.end(read.ref, pays=False)
        if not there:
            raise GetTimeout(BYTES_LATE)
        copied: Feature | None = inner.get_leased_blocking(read, place, out)
        if copied is not None:
            return copied
        # By way of the host: what it is copied to is this thread's.
        target = inner.empty_like(read, place) if out is None else out
        feature: Feature = self._call(lambda: inner.get_granted(read, target))
        return feature

    def get_or_put(
        self,
        key: str | bytes,
        make: Callable[[], Feature],
        *,
        device: Any = None,
        timeout: float | None = None,
    ) -> Feature:
        """As `featcache.FeatureCache.get_or_put`; `make` runs in this thread."""
        check_make(make)
        inner, wanted, timeout_s = self._inner, key_bytes(key), parse_timeout(timeout)
        inner.check_open()
        place = inner.target(device, None)
        while True:
            found = self._call(lambda: inner.find_or_claim(wanted, timeout_s), _give_back)
            if isinstance(found, MakeClaim):
                break
            with contextlib.suppress(StaleRef):  # as above
                return self._read(found, place, None)
        try:
            feature = make()
            self.put(feature, key=wanted)
        finally:
            self._end(found)
        return moved(feature, place)

    def _end(self, making: MakeClaim) -> None:
        async def end() -> None:
            making.end()

        with contextlib.suppress(CacheClosed):  # and with it the claim has ended
            self._call(end)

    def contains(self, key: str | bytes) -> bool:
        """Whether a feature is kept under a key now."""
        return bool(self._call(lambda: self._inner.contains(key)))

    def evict(self, key: str | bytes) -> bool:
        """Drop a key; return whether it was there."""
        return bool(self._call(lambda: self._inner.evict(key)))

    def pin(self, key: str | bytes) -> None:
        """Keep a feature from being evicted, as `featcache.FeatureCache.pin`."""
        self._call(lambda: self._inner.pin(key))

    def unpin(self, key: str | bytes) -> None:
        """Take back a pin, as `featcache.FeatureCache.unpin`."""
        self._call(lambda: self._inner.unpin(key))


def _give_back(found: KeyLease | MakeClaim) -> None:
    """End what was found, in the loop, for a caller who was interrupted before having it."""
    if isinstance(found, MakeClaim):
        found.end()
    else:
        found.end(found.ref, pays=False)
