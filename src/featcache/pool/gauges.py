"""The pool's gauges: one row a gauge. A new metric is a field of `Statistics` and a row here.

The owner publishes them in the header of its block of control words once per recycle interval; a
client reads them there, for each pool that it has attached.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from featcache.core.keyed_store import KeyedStore
from featcache.memory.words import Header


class Gauge(NamedTuple):
    """One figure of a pool."""

    name: str
    """The field of `Statistics`; of one in microseconds, the field is in seconds."""
    word: int
    """The index of its header word."""
    read: Callable[[KeyedStore], int]
    combine: Callable[[Iterable[int]], int] = sum
    """How a client makes one figure of those of several pools."""


def _largest(values: Iterable[int]) -> int:
    return max(values, default=0)


def _oldest_unpaid_us(store: KeyedStore) -> int:
    oldest = next(iter(store.owing.values()), None)
    return 0 if oldest is None else max(1, int((time.monotonic() - oldest.born_s) * 1e6))


GAUGES: Final = (
    Gauge("capacity_bytes", Header.CAPACITY, lambda store: store.limits.capacity_bytes),
    Gauge("committed_bytes", Header.COMMITTED, lambda store: store.committed_bytes),
    Gauge("used_bytes", Header.USED, lambda store: store.used_bytes),
    Gauge("largest_free_bytes", Header.LARGEST_FREE, lambda s: s.largest_free_bytes, _largest),
    Gauge("slots", Header.SLOTS, lambda store: store.table.count),
    Gauge("slots_used", Header.SLOTS_USED, lambda store: store.table.used - len(store.ahead)),
    Gauge("waiters", Header.WAITERS, lambda store: store.queue.count),
    Gauge("waiting_bytes", Header.WAITING_BYTES, lambda store: store.queue.waiting_bytes),
    Gauge("keys", Header.KEYS, lambda store: len(store.directory)),
    Gauge("resident_bytes", Header.RESIDENT, lambda store: store.directory.resident_bytes),
    Gauge("pinned_bytes", Header.PINNED, lambda store: store.directory.pinned_bytes),
    Gauge("evicted", Header.EVICTED, lambda store: store.evicted),
    Gauge("oldest_unpaid_us", Header.OLDEST_UNPAID, _oldest_unpaid_us, _largest),
)


def publish(store: KeyedStore, header: memoryview) -> None:
    """Write each gauge into its header word."""
    for gauge in GAUGES:
        header[gauge.word] = gauge.read(store)


def of_store(store: KeyedStore) -> dict[str, Any]:
    """Return the gauges of a pool as its owner has them now, by field of `Statistics`."""
    return _fields({gauge.name: gauge.read(store) for gauge in GAUGES})


def of_headers(headers: Sequence[memoryview]) -> dict[str, Any]:
    """Return the gauges of several pools together, as their owners last published them."""
    return _fields(
        {gauge.name: gauge.combine([header[gauge.word] for header in headers]) for gauge in GAUGES}
    )


def _fields(gauges: dict[str, Any]) -> dict[str, Any]:
    gauges["free_bytes"] = gauges["capacity_bytes"] - gauges["used_bytes"]
    gauges["oldest_unpaid_s"] = gauges.pop("oldest_unpaid_us") / 1e6
    return gauges
