"""The table of metrics: names, what each means, and where its figure comes from."""

from typing import Final, NamedTuple

from featcache.api.meter import AGE_BOUNDS_S, FETCH_BOUNDS_S, HOST_BOUNDS_S, WAIT_BOUNDS_S

LABELS: Final = ("pool", "device")


class Gauge(NamedTuple):
    """A figure of a pool as it is now."""

    name: str
    field: str
    """The field of `Statistics`."""
    help: str


class Counter(NamedTuple):
    """A count since the start; its samples have the name with ``_total`` behind."""

    name: str
    field: str
    """The field of `Statistics`, or the counter of a `Meter` where it is `metered`."""
    help: str
    by_clients: bool = False
    """Whether a client counts it too: its own."""
    metered: bool = False


class Histogram(NamedTuple):
    """A distribution of seconds."""

    name: str
    field: str
    """The histogram of a `Meter`."""
    help: str
    bounds_s: tuple[float, ...]
    by_clients: bool = False


GAUGES: Final = (
    Gauge("featcache_capacity_bytes", "capacity_bytes", "The size that the slab may grow to"),
    Gauge("featcache_committed_bytes", "committed_bytes", "The memory that the slab has now"),
    Gauge("featcache_used_bytes", "used_bytes", "Extents given out"),
    Gauge("featcache_free_bytes", "free_bytes", "The rest of the capacity"),
    Gauge("featcache_kept_bytes", "resident_bytes", "Extents kept under keys, of those given out"),
    Gauge("featcache_pinned_bytes", "pinned_bytes", "Extents of pinned keys, of those kept"),
    Gauge(
        "featcache_largest_free_bytes",
        "largest_free_bytes",
        "The largest free extent: the largest feature that would fit now, growth included",
    ),
    Gauge("featcache_slots", "slots", "Entries of the slot table"),
    Gauge("featcache_slots_used", "slots_used", "Entries of the slot table in use"),
    Gauge("featcache_keys", "keys", "Keys in the directory"),
    Gauge("featcache_sessions", "sessions", "Sessions of the pool, as its owner counts them"),
    Gauge("featcache_waiters", "waiters", "Puts that wait for room"),
    Gauge("featcache_waiting_bytes", "waiting_bytes", "Bytes that those puts want"),
    Gauge(
        "featcache_oldest_unpaid_age_seconds",
        "oldest_unpaid_s",
        "Age of the oldest ref that still owes a read; 0 if none does",
    ),
)

COUNTERS: Final = (
    Counter("featcache_puts", "puts", "Features published", by_clients=True),
    Counter("featcache_gets", "gets", "Gets and borrows through this object", by_clients=True),
    Counter("featcache_hits", "hits", "Lookups by key that found something"),
    Counter("featcache_misses", "misses", "Lookups by key that found nothing"),
    Counter("featcache_put_bytes", "put_bytes", "Bytes published", by_clients=True, metered=True),
    Counter(
        "featcache_get_bytes",
        "get_bytes",
        "Bytes got and borrowed through this object",
        by_clients=True,
        metered=True,
    ),
    Counter("featcache_reads_paid", "reads_paid", "Reads that were owed, or lent by key, and paid"),
    Counter("featcache_waits", "waited", "Puts that had to wait for room"),
    Counter("featcache_recycled", "recycled", "Extents taken back"),
    Counter("featcache_evicted", "evicted", "Keys dropped"),
    Counter("featcache_expired", "expired", "Refs whose ttl passed with reads unpaid"),
    Counter("featcache_discarded", "discarded", "Refs taken back"),
    Counter("featcache_spilled", "spilled", "Puts that went to the host slab", by_clients=True),
    Counter("featcache_relayed", "relayed", "Features copied to host memory for their readers"),
    Counter(
        "featcache_fetched", "fetched", "Features of other hosts that were fetched by their refs"
    ),
    Counter("featcache_fetched_bytes", "fetched_bytes", "Bytes of those features"),
    Counter("featcache_fetches_failed", "fetches_failed", "Fetches that ended without the feature"),
    Counter("featcache_told", "told", "Reads of this pool's features that other hosts began"),
    Counter("featcache_told_bytes", "told_bytes", "Bytes of those features"),
    Counter("featcache_hosts_lost", "hosts_lost", "Other hosts that read here and vanished"),
    Counter("featcache_keys_fetched", "keys_fetched", "Features fetched from their keys' homes"),
    Counter(
        "featcache_keys_offered", "keys_offered", "Features that their keys' homes fetched here"
    ),
    Counter("featcache_claims_passed", "claims_passed", "Claims of other hosts that vanished"),
    Counter("featcache_demoted", "demoted", "Evicted features that were put into the tier"),
    Counter("featcache_demotions_dropped", "demotions_dropped", "Evicted features that were not"),
    Counter("featcache_promoted", "promoted", "Features that came back from the tier"),
    Counter("featcache_tier_failures", "tier_failures", "Calls of the tier that failed"),
    Counter("featcache_readers_lost", "readers_lost", "Sessions whose process died"),
)

HISTOGRAMS: Final = (
    Histogram(
        "featcache_put_wait_seconds",
        "put_wait",
        "Time that puts stood in the queue for room, those that gave up included",
        WAIT_BOUNDS_S,
    ),
    Histogram(
        "featcache_put_host_seconds",
        "put_host",
        "Time from the call of a put to its return, a wait for room included",
        HOST_BOUNDS_S,
        by_clients=True,
    ),
    Histogram(
        "featcache_get_host_seconds",
        "get_host",
        "Time from the call of a get to its return, a wait for its bytes included",
        HOST_BOUNDS_S,
        by_clients=True,
    ),
    Histogram(
        "featcache_fetch_seconds",
        "fetch",
        "Time that the bytes of another host's feature took, look-up and wait for room not included",
        FETCH_BOUNDS_S,
    ),
    Histogram(
        "featcache_release_age_seconds",
        "release_age",
        "Age of refs as their room was taken back",
        AGE_BOUNDS_S,
    ),
)
