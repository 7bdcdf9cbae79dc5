"""Counts of what a connector did since they were last asked for."""

import threading
from typing import Final

COUNTERS: Final = {
    "hits": "Encoder outputs that were in the pool when a step was planned",
    "misses": "Encoder outputs that were not",
    "waits": "Encoder outputs that another engine was encoding, and that were awaited",
    "wait_timeouts": "Those of them that did not come in time, and were encoded here",
    "loads": "Encoder outputs loaded by workers",
    "load_bytes": "Bytes of them",
    "load_seconds": "Seconds that steps spent in loads",
    "reencoded": "Encoder outputs that were planned to be loaded, were gone, and were encoded instead",
    "saves": "Encoder outputs saved",
    "save_bytes": "Bytes of them",
    "saves_skipped": "Encoder outputs that were in the pool already when they were to be saved",
    "saves_dropped": "Encoder outputs not saved: the queue or the pool was full, or the owner gone",
    "owner_losses": "Times that the owner was lost",
}
"""Each counter's name, and what it counts."""


class Counts:
    """Counters, safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """Count."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    def merge(self, values: dict[str, float]) -> None:
        """Count what another counted."""
        with self._lock:
            for name, amount in values.items():
                self._values[name] = self._values.get(name, 0) + amount

    def take(self) -> dict[str, float]:
        """Return the counts since the last time."""
        if not self._values:  # at most steps; what is counted meanwhile is the next call's
            return {}
        with self._lock:
            values, self._values = self._values, {}
        return values
