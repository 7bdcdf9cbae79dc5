"""What one observed object has counted: bytes, and histograms with fixed buckets.

No lock: of CPython's threads none comes between the load and the store of a ``+=`` whose operand is at
hand, as each here is. Whoever reads may see a count whose sum is still to come.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# Each is written out: `5 * 1e-6` is 4.9999999999999996e-06, and stood so in the label `le`.
HOST_BOUNDS_S: Final = (
    *(1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    *(0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0),
)
WAIT_BOUNDS_S: Final = (
    *(1e-5, 5e-5, 2e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
FETCH_BOUNDS_S: Final = (
    *(5e-5, 1e-4, 2e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
AGE_BOUNDS_S: Final = (
    *(5e-5, 2e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0),
)


class Buckets:
    """A histogram: how many values each bucket has, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        """The largest value of each bucket but the last."""
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, not cumulated."""
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Meter:
    """The counts of one object. The host time of a call is from its begin to its return, waits included."""

    __slots__ = (
        "fetch",
        "get_bytes",
        "get_host",
        "published_bytes",
        "put_bytes",
        "put_host",
        "put_wait",
        "release_age",
    )

    def __init__(self) -> None:
        self.put_bytes = 0
        """Bytes put through the object."""
        self.get_bytes = 0
        """Bytes got and borrowed through it."""
        self.published_bytes = 0
        """Of an owner: bytes published in its pool by all processes."""
        self.put_host = Buckets(HOST_BOUNDS_S)
        self.get_host = Buckets(HOST_BOUNDS_S)
        self.put_wait = Buckets(WAIT_BOUNDS_S)
        """Of an owner: seconds that puts of all processes waited for room."""
        self.fetch = Buckets(FETCH_BOUNDS_S)
        """Of an owner: seconds of transfers from other hosts."""
        self.release_age = Buckets(AGE_BOUNDS_S)
        """Of an owner: ages of refs as their room was taken back."""

    def released(self, ages_s: list[float]) -> None:
        """Count the ages of refs whose room is taken back."""
        bounds, counts = AGE_BOUNDS_S, self.release_age.counts
        for age_s in ages_s:
            counts[bisect_left(bounds, age_s)] += 1
        self.release_age.total += sum(ages_s)
