"""What one observed object has counted: byte counters and histograms with fixed buckets.

No lock: of CPython's threads none comes between the load and the store of ``+=`` on a list's item or on an
attribute, when the value that is added is at hand. A reader may see a count whose sum is still to come.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Final

from featcache.integrations.metrics.table import (
    AGE_BOUNDS_S,
    HOST_BOUNDS_S,
    WAIT_BOUNDS_S,
)


class Buckets:
    """A histogram: how many values each bucket has, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, not cumulated; the last is of values over all bounds."""
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


_HOST: Final = HOST_BOUNDS_S


class Meter:
    """The `Observer` of one object (`featcache.api.observing`)."""

    def __init__(self, *, is_owner: bool, on_closing: Callable[[], object]) -> None:
        self.put_bytes = self.get_bytes = 0
        self.put_wait = Buckets(WAIT_BOUNDS_S)
        self.put_host = Buckets(_HOST)
        self.get_host = Buckets(_HOST)
        self.release_age = Buckets(AGE_BOUNDS_S)
        self.released = self.release_age.add
        self.closing = on_closing
        self._is_owner = is_owner

    def put(self, host_s: float, nbytes: int) -> None:
        """Count a put; its bytes too, but for an owner's, whose pool tells of all (`published`)."""
        host = self.put_host
        host.counts[bisect_left(_HOST, host_s)] += 1
        host.total += host_s
        if not self._is_owner:
            self.put_bytes += nbytes

    def put_more(self, nbytes: int) -> None:
        """Count the bytes of a `put_many`."""
        if not self._is_owner:
            self.put_bytes += nbytes

    def got(self, host_s: float, nbytes: int) -> None:
        """Count a get."""
        host = self.get_host
        host.counts[bisect_left(_HOST, host_s)] += 1
        host.total += host_s
        self.get_bytes += nbytes

    def got_more(self, nbytes: int) -> None:
        """Count the bytes of a borrow, or of many gets."""
        self.get_bytes += nbytes

    def published(self, nbytes: int) -> None:
        """Count a feature's bytes, whichever process put it."""
        self.put_bytes += nbytes
