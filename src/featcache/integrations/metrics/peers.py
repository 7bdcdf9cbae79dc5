"""The metrics of other hosts: one series a host. There are at most `Settings.peers` of each side.

Homes are told apart by the address in their refs. Of hosts that read, the address has a port of the system's
choice, so those of one machine stand together, under its address without the port.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple

from featcache.api.observing import Figures
from featcache.integrations.metrics.table import LABELS
from featcache.observation import HomeView, ReadingHostView

PEER_LABELS: Final = (*LABELS, "peer")
PeerLabels = tuple[str, str, str]


class PeerMetric(NamedTuple):
    """A figure of each host; a counter's samples have the name with ``_total`` behind."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    value: Callable[[Any], float | None]
    """Of its record; None tells nothing."""
    together: Callable[[Iterable[float]], float] = sum
    """What becomes of the figures of several hosts at one address."""


HOMES: Final = (
    PeerMetric(
        "featcache_host_connected",
        "gauge",
        "1 while there is a connection to this host, which is read from; 0 while there is none",
        lambda one: float(one.state == "connected"),
    ),
    PeerMetric(
        "featcache_host_fetches_in_progress",
        "gauge",
        "Fetches from this host now, with those that wait for room",
        lambda one: one.in_progress,
    ),
    PeerMetric(
        "featcache_host_quarantined_bytes",
        "gauge",
        "Landing places of reads from this host that were given up and may still be written",
        lambda one: one.quarantined_bytes,
    ),
    PeerMetric(
        "featcache_host_unacknowledged_payments",
        "gauge",
        "Reads paid that this host has not said it knows of",
        lambda one: one.unacknowledged,
    ),
    PeerMetric(
        "featcache_host_round_trip_seconds",
        "gauge",
        "Of the last heartbeat that this host answered",
        lambda one: one.round_trip_s,
    ),
    PeerMetric(
        "featcache_host_silent_seconds",
        "gauge",
        "Since this host was heard last",
        lambda one: one.silent_s,
    ),
    PeerMetric(
        "featcache_host_fetched",
        "counter",
        "Features that were fetched from this host",
        lambda one: one.fetched,
    ),
    PeerMetric(
        "featcache_host_fetched_bytes",
        "counter",
        "Bytes of those features",
        lambda one: one.fetched_bytes,
    ),
    PeerMetric(
        "featcache_host_fetch_seconds",
        "counter",
        "Time that those transfers took together",
        lambda one: one.total_s,
    ),
    PeerMetric(
        "featcache_host_dials_failed",
        "counter",
        "Tries to connect to this host that failed: nobody answered, or it refused",
        lambda one: one.dials_failed,
    ),
    PeerMetric(
        "featcache_host_fetches_failed",
        "counter",
        "Fetches from this host that ended without the feature",
        lambda one: one.failed,
    ),
)

READING: Final = (
    PeerMetric(
        "featcache_reading_hosts",
        "gauge",
        "Hosts at this address that read here, until their lease ends",
        lambda one: float(one.state != "lost"),
    ),
    PeerMetric(
        "featcache_reading_host_reads",
        "gauge",
        "Features that are pinned for hosts at this address",
        lambda one: one.reading,
    ),
    PeerMetric(
        "featcache_reading_host_read_bytes",
        "gauge",
        "Bytes of those features",
        lambda one: one.reading_bytes,
    ),
    PeerMetric(
        "featcache_reading_host_requests",
        "gauge",
        "Requests of hosts at this address that wait for an answer",
        lambda one: one.requests,
    ),
    PeerMetric(
        "featcache_reading_host_lease_seconds",
        "gauge",
        "What is left of the lease of hosts at this address, the least; 0 once one is lost",
        lambda one: one.lease_s,
        min,
    ),
)

PEERS: Final = (*HOMES, *READING)


def machine(address: str) -> str:
    """Return an address without its port."""
    return address.rpartition(":")[0] or address


def peer_figures(found: Figures) -> Iterator[tuple[str, PeerLabels, float]]:
    """Yield the figures of an owner's other hosts, by name and labels."""
    pool, device = found.own.pool, found.own.device
    for rows, records in ((HOMES, found.homes), (READING, found.reading_hosts)):
        by_address: dict[str, list[HomeView | ReadingHostView]] = {}
        for record in records:
            address = record.address if isinstance(record, HomeView) else machine(record.address)
            by_address.setdefault(address, []).append(record)
        for row in rows:
            for address, hosts in by_address.items():
                values = [value for one in hosts if (value := row.value(one)) is not None]
                if values:
                    yield row.name, (pool, device, address), row.together(values)
