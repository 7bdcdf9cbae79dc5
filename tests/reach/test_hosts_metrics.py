"""What Prometheus is told of other hosts."""

import asyncio
import math
import re

import pytest
from prometheus_client import CollectorRegistry, values

import featcache
from featcache.errors import OwnerUnreachable
from featcache.integrations import metrics
from featcache.integrations.metrics import multiprocess
from featcache.integrations.metrics.collector import CacheCollector
from featcache.integrations.metrics.peers import HOMES, PEERS, READING, machine
from featcache.owner.far_reads import FarReads
from integrations.scraping import Scraped, buckets, one, scraped
from reach.hosts import KEY, hosts, listening, quick
from support.caches import KIB, filled, pair, spent, until


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def told(found: Scraped) -> set[str]:
    """The names of what is told of hosts."""
    names = {row.name if row.kind == "gauge" else f"{row.name}_total" for row in PEERS}
    return names & set(found)


async def test_an_owner_alone_tells_of_no_host(registry: CollectorRegistry) -> None:
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        await client.get(await owner.put(filled(KIB)))
        found = scraped(registry)
        assert told(found) == set()
        assert one(found, "featcache_fetch_seconds_count") == 0


async def test_each_host_is_told_of_under_its_address(registry: CollectorRegistry) -> None:
    async with hosts() as both, listening() as third:
        metrics.register(both.reader, registry)
        await both.client.get(await both.home.put(filled(KIB)))
        for nbytes in (KIB, 3 * KIB):
            await both.client.get(await third.put(filled(nbytes)))
        found = scraped(registry)
        pool = both.reader._opened().pool.name
        assert found["featcache_host_fetched_total"] == {
            (pool, "cpu", both.home.address): 1,
            (pool, "cpu", third.address): 2,
        }
        assert (
            found["featcache_host_fetched_bytes_total"][pool, "cpu", str(third.address)] == 4 * KIB
        )
        assert set(found["featcache_host_connected"].values()) == {1}
        assert one(found, "featcache_fetched_total") == 3
        assert one(found, "featcache_fetched_bytes_total") == 5 * KIB
        taken = found["featcache_host_fetch_seconds_total"].values()
        assert sum(taken) == pytest.approx(one(found, "featcache_fetch_seconds_sum"))
        assert "featcache_reading_hosts" not in found


async def test_hosts_that_read_are_told_of_by_their_machine(registry: CollectorRegistry) -> None:
    async with hosts() as both, featcache.create(settings=quick(), cluster_key=KEY) as second:
        metrics.register(both.home, registry)
        ref = await both.home.put(filled(KIB), readers=2)
        await both.client.get(ref)
        await second.get(ref)
        await spent(both.home)
        found = scraped(registry)
        where = both.home._opened().pool.name, "cpu", "127.0.0.1"
        assert found["featcache_reading_hosts"] == {where: 2}
        assert found["featcache_reading_host_reads"] == {where: 0}
        assert 0 < found["featcache_reading_host_lease_seconds"][where] <= 1.0
        assert one(found, "featcache_told_total") == 2
        assert one(found, "featcache_told_bytes_total") == 2 * KIB
        assert "featcache_host_connected" not in found


def test_a_machine_is_an_address_without_its_port() -> None:
    assert machine("10.0.0.7:41234") == "10.0.0.7"
    assert machine("fd00::7:41234") == "fd00::7"
    assert machine("an unknown address") == "an unknown address"


async def test_a_host_that_is_not_reached_is_told_of(registry: CollectorRegistry) -> None:
    async with hosts() as both:
        metrics.register(both.reader, registry)
        ref = await both.home.put(filled(KIB))
        await both.home.aclose()
        for _ in range(2):
            with pytest.raises(OwnerUnreachable):
                await both.client.get(ref)
        found = scraped(registry)
        assert one(found, "featcache_host_connected") == 0
        assert one(found, "featcache_host_dials_failed_total") == 2
        assert "featcache_host_silent_seconds" not in found  # it was never heard


async def test_transfers_are_in_a_histogram_while_metrics_are_on_and_only_then(
    registry: CollectorRegistry,
) -> None:
    async with hosts() as both:
        beyond = both.reader._opened().beyond
        assert beyond is not None
        assert type(beyond.reads) is FarReads
        metrics.register(both.reader, registry)
        assert type(beyond.reads) is not FarReads
        await both.client.get(await both.home.put(filled(KIB)))
        await both.client.get(await both.home.put(filled(0)))  # which takes no transfer
        found = scraped(registry)
        assert one(found, "featcache_fetch_seconds_count") == 1
        counts = buckets(found, "featcache_fetch_seconds")
        assert (counts, counts[-1]) == (sorted(counts), 1)
        assert one(found, "featcache_fetched_total") == 2
        metrics.unregister(both.reader, registry)
        assert type(beyond.reads) is FarReads
        await both.client.get(await both.home.put(filled(KIB)))
        assert both.reader.statistics().fetched == 3


async def test_blocking_owners_are_told_of_alike(registry: CollectorRegistry) -> None:
    async with listening() as home:
        ref = await home.put(filled(KIB))

        def read() -> None:
            with featcache.blocking.create(settings=quick(), cluster_key=KEY) as reader:
                metrics.register(reader, registry)
                reader.get(ref)
                found = scraped(registry)
                assert one(found, "featcache_host_fetched_total") == 1
                assert one(found, "featcache_fetch_seconds_count") == 1

        await asyncio.to_thread(read)


def test_names_have_prefix_and_unit() -> None:
    for row in PEERS:
        assert re.fullmatch(r"featcache_(host|reading_host)s?_?[a-z_]*", row.name)
        assert row.help
        assert not row.name.endswith("_total")
    assert len({row.name for row in PEERS}) == len(PEERS) == len(HOMES) + len(READING)
    names = {family.name for family in CacheCollector().describe()}
    assert {row.name for row in PEERS} <= names


async def test_multi_process_files_have_them_and_forget_those_without_a_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: dict[tuple[str, tuple[str, ...]], float] = {}

    class Value:
        """As prometheus_client's, but in memory."""

        def __init__(self, kind: str, metric: str, sample: str, *more: object, **_: object) -> None:
            names, told_labels, _text = more
            assert isinstance(names, tuple)
            assert isinstance(told_labels, tuple)
            assert len(names) == len(told_labels)
            self._key = sample, told_labels

        def set(self, value: float, timestamp: float | None = None) -> None:
            written[self._key] = value

    monkeypatch.setattr(values, "ValueClass", Value)
    few = quick(peers=1)
    async with (
        listening() as home,
        listening() as other,
        featcache.create(settings=few, cluster_key=KEY) as reader,
    ):
        files = multiprocess.Files()
        files.sources.add(reader)
        await reader.get(await home.put(filled(KIB)))
        await spent(home)
        files.write()
        pool = reader._opened().pool.name
        first = pool, "cpu", str(home.address)
        assert written["featcache_host_connected", first] == 1
        assert written["featcache_host_fetched_bytes_total", first] == KIB
        await spent(reader)
        beyond = reader._opened().beyond
        assert beyond is not None
        (known,) = beyond.homes.known
        await until(lambda: not known.ledger)
        await reader.get(await other.put(filled(64)))  # its record is dropped for this one
        files.write()
        second = pool, "cpu", str(other.address)
        assert written["featcache_host_connected", second] == 1
        assert math.isnan(written["featcache_host_connected", first])
        assert written["featcache_host_fetched_bytes_total", first] == KIB
        files.sources.remove(reader)
