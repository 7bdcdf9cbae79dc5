"""What was seen over time: a sample a look, and rates between two."""

from collections import deque
from typing import Final

import attrs

from featcache import Snapshot, Statistics

LONGEST: Final = 1024
"""Samples kept: no terminal is wider."""
COUNTED: Final = (
    "puts",
    "hits",
    "misses",
    "reads_paid",
    "recycled",
    "evicted",
    "expired",
    "waited",
)


@attrs.frozen(kw_only=True)
class Sample:
    """One look."""

    at_s: float
    level: str
    held: float
    """The share of the slab that no eviction gives back: used, less what is kept and not pinned."""
    used: float
    hit_rate: float | None
    """Of the lookups since the look before; None if there were none."""
    rates: dict[str, float]
    """By name of the counter, per second."""


class History:
    """The last samples; None where no look succeeded."""

    def __init__(self) -> None:
        self.samples: deque[Sample | None] = deque(maxlen=LONGEST)
        self._last: tuple[str, Statistics, float] | None = None

    @property
    def last(self) -> Sample | None:
        """The newest sample."""
        return next((one for one in reversed(self.samples) if one is not None), None)

    def add(self, snapshot: Snapshot, at_s: float) -> None:
        """Note a look. Its rates are those since the look before, or since the owner's start."""
        now = snapshot.statistics
        before, seconds = Statistics(), snapshot.uptime_s
        if self._last is not None:
            pool, then, then_s = self._last
            if pool == snapshot.pool and all(
                getattr(now, name) >= getattr(then, name) for name in COUNTED
            ):
                before, seconds = then, at_s - then_s
        grown = {name: getattr(now, name) - getattr(before, name) for name in COUNTED}
        lookups = grown["hits"] + grown["misses"]
        capacity = max(1, now.capacity_bytes)
        held = now.used_bytes - now.resident_bytes + now.pinned_bytes
        self.samples.append(
            Sample(
                at_s=at_s,
                level=snapshot.level,
                held=min(1.0, max(0.0, held / capacity)),
                used=min(1.0, now.used_bytes / capacity),
                hit_rate=grown["hits"] / lookups if lookups else None,
                rates={name: count / max(seconds, 1e-3) for name, count in grown.items()},
            )
        )
        self._last = (snapshot.pool, now, at_s)

    def gap(self) -> None:
        """Note that a look failed."""
        self.samples.append(None)

    def newest(self, count: int) -> list[Sample | None]:
        """Return the last so many, the newest last."""
        return list(self.samples)[-count:] if count > 0 else []
