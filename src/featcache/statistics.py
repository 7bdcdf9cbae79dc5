"""Frozen gauges and counters of a pool or a client."""

import attrs

__all__ = ["Statistics"]


@attrs.frozen(kw_only=True)
class Statistics:
    """Gauges are of now, counters since the start. Sizes are bytes.

    The owner counts what was released until the call; on a GPU a release whose word is still on its
    reader's stream comes when that stream has got there.

    On a client the gauges are those of the pools it has attached, as their owners last published
    them (once per `Settings.recycle_interval`), and of the counters only `puts`, `gets` and `spilled` are
    counted, its own: the others are 0, and `evicted` is the pools'.
    """

    capacity_bytes: int = 0
    """The size that the slab may grow to; `used_bytes` + `free_bytes`."""
    committed_bytes: int = 0
    """Bytes of the slab with memory behind them now."""
    used_bytes: int = 0
    """Extents given out, rounded up to their alignment of 256 bytes."""
    free_bytes: int = 0
    largest_free_bytes: int = 0
    """The largest feature that would fit now, growth included."""
    slots: int = 0
    slots_used: int = 0
    waiters: int = 0
    """Puts in the queue now."""
    waiting_bytes: int = 0
    """Bytes that those puts wait for."""
    oldest_unpaid_s: float = attrs.field(default=0.0, eq=False)
    """Age of the oldest ref that still owes a read, 0 if none does. It grows between any two looks, so
    records that differ in nothing else are equal."""
    sessions: int = 0
    keys: int = 0
    """Keys in the directory."""
    resident_bytes: int = 0
    """Extents kept under them: of `used_bytes`."""
    pinned_bytes: int = 0
    """Those of pinned keys."""
    puts: int = 0
    """Features published, with those that were spilled."""
    gets: int = 0
    """Gets and borrows begun through this object."""
    reads_paid: int = 0
    """Reads that were owed, or lent by key, and paid by a reader; one that owed nothing pays none."""
    recycled: int = 0
    """Extents taken back after they had been published."""
    waited: int = 0
    """Puts that had to stand in the queue."""
    spilled: int = 0
    """Puts through this object that went to the host slab. Of that slab's own figures only `expired`
    and `discarded` are counted here; spills of clients are among their own `spilled`."""
    relayed: int = 0
    """Features copied to host memory for readers that can't reach the slab."""
    fetched: int = 0
    """Features of other hosts that were fetched by their refs, each once for all its readers here."""
    fetched_bytes: int = 0
    fetches_failed: int = 0
    """Fetches that ended without the feature: its home was lost, or nobody waited for it any more."""
    told: int = 0
    """Reads of this pool's features that other hosts began."""
    told_bytes: int = 0
    """Bytes of those features."""
    hosts_lost: int = 0
    """Other hosts that read here and vanished: their reads were paid for them."""
    demoted: int = 0
    """Evicted features that were put into the tier below the pool."""
    demotions_dropped: int = 0
    """Evicted features that were not: too much was on its way there already."""
    promoted: int = 0
    """Features that were missed here, and came back from the tier."""
    tier_failures: int = 0
    """Calls of the tier that failed, or were not answered in time."""
    keys_fetched: int = 0
    """Features that were fetched from the homes of their keys."""
    keys_offered: int = 0
    """Features put or made here under keys, that the homes of the keys have fetched."""
    claims_passed: int = 0
    """Features that another host was to make as it vanished: the next that waits makes them."""
    expired: int = 0
    """Refs whose ttl passed with reads unpaid."""
    discarded: int = 0
    """Refs that were taken back with `discard`."""
    hits: int = 0
    """Lookups by key that found something, with those that sessions made without a message."""
    misses: int = 0
    """Lookups by key that found nothing; some then waited for it, or made it."""
    evicted: int = 0
    """Keys that were dropped: for room, by a watermark, or by `evict`."""
    readers_lost: int = 0
    """Sessions whose process died."""
