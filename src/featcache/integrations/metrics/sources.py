"""The objects that are told of, and their figures together: one series a metric, pool and device.

Several objects of one process may tell of one pool, such as its owner and clients beside it. Then the
gauges are the owner's, or the first client's. Counts that an owner has of its whole pool are its own
alone; those that each object has of itself are added up.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import featcache
from featcache import CacheClosed, FeatureCache, FeatureClient, Statistics
from featcache.api import observing
from featcache.errors import SettingsError
from featcache.integrations.metrics.peers import PEERS, PeerLabels, peer_figures
from featcache.integrations.metrics.table import COUNTERS, GAUGES, HISTOGRAMS

Cache = (
    FeatureCache
    | FeatureClient
    | featcache.blocking.FeatureCache
    | featcache.blocking.FeatureClient
)
Labels = tuple[str, str]

_OWN: Final = frozenset(("gets", "get_bytes", "spilled", "put_host", "get_host"))
"""What each object counts of itself alone; all else an owner counts for all processes."""

_fields: Final = {row.name: row.field for row in (*COUNTERS, *HISTOGRAMS)}


class Histogram(NamedTuple):
    """The counts of a histogram, not cumulated, and the sum of its values."""

    counts: tuple[int, ...]
    total: float

    def __add__(self, other: Any) -> "Histogram":
        """Add another with the same buckets."""
        counts = tuple(map(sum, zip(self.counts, other.counts, strict=True)))
        return Histogram(counts, self.total + other.total)


class Series(NamedTuple):
    """The figures of a scrape, by name and labels."""

    gauges: dict[str, dict[Labels, float]]
    counters: dict[str, dict[Labels, float]]
    histograms: dict[str, dict[Labels, Histogram]]
    peers: dict[str, dict[PeerLabels, float]]
    """Of other hosts, gauges and counters."""


class Source:
    """One observed object."""

    def __init__(self, cache: Cache) -> None:
        """Observe an open object; what it counts besides `statistics` begins at 0 now."""
        portal = getattr(cache, "_portal", None)
        inner: Any = cache if portal is None else portal.inner
        self.is_owner = isinstance(inner, FeatureCache)
        self.meter = observing.Meter()
        # Weakly: an object that is forgotten closes, metrics or not.
        self._inner = weakref.ref(inner)
        self._outer = None if portal is None else weakref.ref(cache)
        self.users = 0
        """Registries that it is in."""
        self._last: observing.Figures | None = None
        self._closed = False
        observing.observe(inner, self.meter, self.look, blocking=None if portal is None else cache)
        if self.is_owner:
            self._pool = observing.figures(inner).own.pool
            observing.observe_waits(self._waited)

    def _waited(self, pool: str, waited_s: float, granted: bool) -> None:  # noqa: ARG002 - as it is called
        if pool == self._pool:
            self.meter.put_wait.add(waited_s)

    def look(self) -> observing.Figures | None:
        """Return its figures, or None once it is closed; `last` has its last ones then."""
        inner = self._inner()
        try:
            if inner is None:
                raise CacheClosed("it was collected")
            self._last = observing.figures(inner)
        except CacheClosed:
            self._closed = True
            return None
        return self._last

    @property
    def last(self) -> observing.Figures | None:
        """Its figures when it was last looked at."""
        return self._last

    @property
    def closed(self) -> bool:
        """Whether it was closed when it was last looked at."""
        return self._closed

    def end(self) -> None:
        """Observe it no more."""
        observing.unobserve_waits(self._waited)
        inner, outer = self._inner(), None if self._outer is None else self._outer()
        if inner is not None:
            observing.unobserve(inner, blocking=outer)


_lock = threading.Lock()
_sources: "weakref.WeakKeyDictionary[Any, Source]" = weakref.WeakKeyDictionary()


_all: "weakref.WeakSet[Sources]" = weakref.WeakSet()


def _forget() -> None:
    global _lock  # noqa: PLW0603 - another thread may have held it as this process forked
    _lock = threading.Lock()
    _sources.clear()
    for sources in _all:
        sources.forget()


os.register_at_fork(after_in_child=_forget)


def source_of(cache: Cache) -> Source:
    """Return the source of an object, for one registry more; the first time it is observed."""
    if not isinstance(cache, Cache):
        raise SettingsError(f"metrics are of a FeatureCache or FeatureClient, not {cache!r}")
    with _lock:
        source = _sources.get(cache)
        if source is None:
            source = _sources[cache] = Source(cache)
        source.users += 1
        return source


def drop(source: Source) -> None:
    """Leave a source for one registry; after the last its object is observed no more."""
    with _lock:
        source.users -= 1
        if source.users:
            return
        source.end()
        for cache in [each for each, known in _sources.items() if known is source]:
            del _sources[cache]


class Sources:
    """The sources of one registry."""

    def __init__(self) -> None:
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """Begin anew: in a forked child, whose parent goes on counting."""
        self._lock = threading.RLock()  # a look may emit an event, and a hook may look
        self._live: list[Source] = []
        self._ended: dict[tuple[str, Labels], Any] = {}
        """What clients had counted as they closed, while others count under the same labels."""

    def add(self, cache: Cache) -> None:
        """Take an object in; one that is there already stays once."""
        with self._lock:
            source = source_of(cache)
            if source in self._live:
                drop(source)
            else:
                self._live.append(source)

    def remove(self, cache: Cache) -> None:
        """Leave an object out; unknown ones are ignored."""
        with self._lock:
            source = _sources.get(cache)
            if source in self._live and source is not None:
                self._live.remove(source)
                drop(source)

    def __len__(self) -> int:
        return len(self._live)

    def read(self, *, keeps: bool = False) -> Series:
        """Return the figures of all that are open.

        What a client counted stays in the sums after it closed, as long as others count there, so that
        no counter falls; or always, if the reader `keeps` it.
        """
        with self._lock:
            looked = [(source, source.look()) for source in self._live]
            for source, found in looked:
                if found is None:
                    self._end(source)
            live = [(source, found) for source, found in looked if found is not None]
            labels = {_labels(found.own) for _, found in live}
            if not keeps:
                self._ended = {key: v for key, v in self._ended.items() if key[1] in labels}
            return _together(live, self._ended)

    def _end(self, source: Source) -> None:
        self._live.remove(source)
        drop(source)
        if source.last is not None and not source.is_owner:
            for key, value in _counts(source, source.last):
                self._ended[key] = self._ended[key] + value if key in self._ended else value


def _labels(figures: observing.PoolFigures) -> Labels:
    return figures.pool, figures.device


def _together(
    live: list[tuple[Source, observing.Figures]], ended: dict[tuple[str, Labels], Any]
) -> Series:
    """Return the figures of all sources, the owners' first."""
    live = sorted(live, key=lambda each: not each[0].is_owner)
    owned = {_labels(found.own) for source, found in live if source.is_owner}
    told = [
        (key, value, source.is_owner)
        for source, found in live
        for key, value in _counts(source, found)
    ]
    told += [(key, value, False) for key, value in ended.items()]
    totals: dict[str, dict[Labels, Any]] = {name: {} for name in _fields}
    for (name, labels), value, by_owner in told:
        if by_owner or labels not in owned or _fields[name] in _OWN:
            total = totals[name]
            total[labels] = total[labels] + value if labels in total else value
    gauges: dict[str, dict[Labels, float]] = {gauge.name: {} for gauge in GAUGES}
    for source, found in live:
        for pool in found.pools:
            _gauge(gauges, pool, is_owners=source.is_owner and pool is found.own)
    peers: dict[str, dict[PeerLabels, float]] = {row.name: {} for row in PEERS}
    for _, found in live:
        for name, peer, value in peer_figures(found):
            peers[name][peer] = value
    return Series(
        gauges,
        {row.name: totals[row.name] for row in COUNTERS},
        {row.name: totals[row.name] for row in HISTOGRAMS},
        peers,
    )


def _gauge(
    gauges: dict[str, dict[Labels, float]], pool: observing.PoolFigures, *, is_owners: bool
) -> None:
    """Take the gauges of a pool that nobody before told of."""
    for gauge in GAUGES:
        if is_owners or gauge.field != "sessions":  # which only an owner knows
            value = getattr(pool.statistics, gauge.field)
            gauges[gauge.name].setdefault(_labels(pool), value)


def _counts(source: Source, found: observing.Figures) -> Iterator[tuple[tuple[str, Labels], Any]]:
    """Yield what a source counts, by name and labels."""
    labels, meter, statistics = _labels(found.own), source.meter, found.own.statistics
    for counter in COUNTERS:
        if source.is_owner or counter.by_clients:
            of: Statistics | observing.Meter = meter if counter.metered else statistics
            # An owner's pool is told of what all processes put.
            everybodys = source.is_owner and counter.field == "put_bytes"
            field = "published_bytes" if everybodys else counter.field
            yield (counter.name, labels), getattr(of, field)
    for histogram in HISTOGRAMS:
        if source.is_owner or histogram.by_clients:
            buckets = getattr(meter, histogram.field)
            yield (histogram.name, labels), Histogram(tuple(buckets.counts), buckets.total)
