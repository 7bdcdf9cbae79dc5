"""What was read from one home and how long it took, and what is told of it when something is amiss."""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from featcache import events
from featcache.errors import CacheClosed

_now: Final = time.monotonic
_BURST: Final = 16
_SLOW: Final = 0.5
"""Of the time after which a transfer is given up: one that takes longer than that is told of."""
_TEXT: Final = 500


class Traffic:
    """Counts of the fetches from one home."""

    __slots__ = (
        "failed",
        "fetched",
        "fetched_bytes",
        "in_progress",
        "last_s",
        "longest_s",
        "quarantined",
        "quarantined_bytes",
        "total_s",
        "transfers",
    )

    def __init__(self) -> None:
        self.fetched = self.fetched_bytes = self.failed = self.in_progress = self.transfers = 0
        self.quarantined = self.quarantined_bytes = 0
        self.last_s = self.longest_s = self.total_s = 0.0

    def landed(self, nbytes: int, took_s: float | None) -> None:
        """Count a feature that is here; one without bytes took no transfer."""
        self.fetched += 1
        self.fetched_bytes += nbytes
        if took_s is not None:
            self.transfers += 1
            self.last_s = took_s
            self.total_s += took_s
            self.longest_s = max(self.longest_s, took_s)

    @property
    def mean_s(self) -> float:
        """Seconds of a transfer, on average; 0 before the first."""
        return self.total_s / self.transfers if self.transfers else 0.0


class FetchNews:
    """What is told of fetches: those that failed, that took long, and landing places in quarantine."""

    def __init__(self, pool: str, log_interval_s: float) -> None:
        self._pool = pool
        self._kinds = [events.Throttle(log_interval_s, burst=_BURST) for _ in range(3)]

    def failed(self, address: str, nbytes: int, error: BaseException) -> None:
        """Tell of a fetch that ended without the feature, unless this owner closes."""
        if not isinstance(error, CacheClosed):
            reason = f"{type(error).__name__}: {error}"[:_TEXT]
            self._tell(0, events.FetchFailed, address, nbytes, reason=reason)

    def landed(self, address: str, nbytes: int, took_s: float, limit_s: float) -> None:
        """Tell of a transfer that has taken long."""
        if took_s > _SLOW * limit_s:
            self._tell(1, events.FetchSlow, address, nbytes, took_s=took_s, limit_s=limit_s)

    def quarantined(self, address: str, nbytes: int, quarantined_bytes: int) -> None:
        """Tell of a landing place that can't be used until nothing is written there any more."""
        more = {"quarantined_bytes": quarantined_bytes}
        self._tell(2, events.FetchQuarantined, address, nbytes, **more)

    def _tell(
        self,
        kind: int,
        make: Callable[..., events.Event],
        address: str,
        nbytes: int,
        **more: object,
    ) -> None:
        made = partial(make, pool=self._pool, address=address, nbytes=nbytes, **more)
        self._kinds[kind].emit(_now(), lambda unlogged: made(unlogged=unlogged))
