"""Metrics of real owners and clients, as Prometheus reads them."""

import asyncio
import gc
import re
import socket
import subprocess
import sys
import threading
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge

import featcache
from featcache import CacheClosed, FeatureCache, SettingsError
from featcache.core.keyed_store import KeyedStore
from featcache.integrations import metrics
from featcache.integrations.metrics.table import COUNTERS, GAUGES, HISTOGRAMS
from integrations.scraping import Scraped, answer, buckets, one, parsed, scraped
from support.caches import KIB, filled, full, pair, small, spent, until


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def same(found: Scraped, statistics: featcache.Statistics, *, owner: bool) -> None:
    """Every figure of a scrape that `statistics` has is what that says."""
    for gauge in GAUGES:
        if gauge.field == "oldest_unpaid_s" or (gauge.field == "sessions" and not owner):
            continue
        assert one(found, gauge.name) == getattr(statistics, gauge.field), gauge.name
    for counter in COUNTERS:
        if not counter.metered and (owner or counter.by_clients):
            assert one(found, f"{counter.name}_total") == getattr(statistics, counter.field)


async def test_a_scrape_tells_what_statistics_says(registry: CollectorRegistry) -> None:
    others = CollectorRegistry()
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        metrics.register(client, others)
        for value in range(20):
            ref = await owner.put(filled(KIB, value))
            await client.get(ref)
            client.get_nowait(await client.put(filled(2 * KIB), readers=1))
        await owner.put(filled(3 * KIB), key="kept")
        await owner.pin("kept")
        await client.get("kept")
        async with client.borrow("kept"):
            pass
        assert not await client.evict("missing")
        with pytest.raises(featcache.KeyNotFound):
            await client.get("missing")
        await owner.discard(await owner.put(filled(1)))
        unpaid = await owner.put(filled(5))
        # Settled: what the client sees is published once per recycle interval.
        await until(lambda: client.statistics().used_bytes == owner.statistics().used_bytes)
        told = scraped(registry)
        same(told, owner.statistics(), owner=True)
        assert one(told, "featcache_puts_total") == 43
        assert one(told, "featcache_put_bytes_total") == 20 * 3 * KIB + 3 * KIB + 1 + 5
        assert one(told, "featcache_hits_total") == 2
        assert one(told, "featcache_oldest_unpaid_age_seconds") > 0
        (labels,) = told["featcache_used_bytes"]
        assert labels == (unpaid.pool_id.hex(), "cpu")
        seen = scraped(others)
        same(seen, client.statistics(), owner=False)
        assert one(seen, "featcache_gets_total") == 42
        assert one(seen, "featcache_get_bytes_total") == 20 * 3 * KIB + 2 * 3 * KIB
        assert one(seen, "featcache_put_bytes_total") == 20 * 2 * KIB
        assert one(seen, "featcache_get_host_seconds_count") == 41
        assert one(seen, "featcache_put_host_seconds_count") == 20
        assert set(seen["featcache_used_bytes"]) == {labels}
        assert "featcache_recycled_total" not in seen  # which only the owner counts


async def test_figures_under_load_never_fall_and_are_exact_at_the_end(
    registry: CollectorRegistry,
) -> None:
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        metrics.register(client, registry)
        seen: list[float] = []
        done = threading.Event()

        def scrape() -> None:
            while not done.is_set():
                seen.append(one(scraped(registry), "featcache_gets_total"))

        thread = threading.Thread(target=scrape)
        thread.start()
        try:

            async def work() -> None:
                for _ in range(200):
                    await client.get(await owner.put(filled(KIB)))

            await asyncio.gather(*(work() for _ in range(4)))
            await until(lambda: len(seen) > 2)
        finally:
            done.set()
            await asyncio.to_thread(thread.join)
        assert seen == sorted(seen)
        found = scraped(registry)
        assert one(found, "featcache_gets_total") == 800
        assert one(found, "featcache_get_bytes_total") == 800 * KIB
        assert one(found, "featcache_put_host_seconds_count") == 800


async def test_threads_that_read_at_once_are_all_counted(registry: CollectorRegistry) -> None:
    async with pair() as (owner, client):
        metrics.register(client, registry)
        await owner.put(filled(64), key="kept")
        await client.get("kept")

        def read() -> None:
            for _ in range(500):
                client.get_nowait("kept")

        await asyncio.gather(*(asyncio.to_thread(read) for _ in range(4)))
        found = scraped(registry)
        assert one(found, "featcache_get_host_seconds_count") == 2001
        assert one(found, "featcache_get_bytes_total") == 64 * 2001


async def test_a_put_that_waits_is_in_the_histogram_of_waits(registry: CollectorRegistry) -> None:
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        ref = await full(owner)
        before = one(scraped(registry), "featcache_put_wait_seconds_count")  # for growth
        waiting = [asyncio.create_task(each.put(filled(KIB))) for each in (owner, client)]
        await until(lambda: owner.statistics().waiters == 2)
        found = scraped(registry)
        assert one(found, "featcache_waiters") == 2
        assert one(found, "featcache_waiting_bytes") == 2 * KIB
        assert one(found, "featcache_put_wait_seconds_count") == before
        await client.release(ref)
        await asyncio.gather(*waiting)
        found = scraped(registry)
        assert one(found, "featcache_put_wait_seconds_count") == before + 2
        assert one(found, "featcache_waits_total") == before + 2
        assert one(found, "featcache_put_wait_seconds_sum") > 0
        # Waits of another owner in this process are not among them.
        async with featcache.create(settings=small()) as other:
            ref = await full(other)
            put = asyncio.create_task(other.put(filled(1)))
            await until(lambda: other.statistics().waiters == 1)
            await other.release(ref)
            await put
        assert one(scraped(registry), "featcache_put_wait_seconds_count") == before + 2


async def test_a_ref_is_told_of_as_its_room_is_taken_back(registry: CollectorRegistry) -> None:
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        refs = [await owner.put(filled(KIB)) for _ in range(3)]
        assert one(scraped(registry), "featcache_release_age_seconds_count") == 0
        for ref in refs:
            await client.get(ref)
        await spent(owner)
        found = scraped(registry)
        assert one(found, "featcache_release_age_seconds_count") == 3
        counts = buckets(found, "featcache_release_age_seconds")
        assert counts == sorted(counts)
        assert counts[-1] == 3
        assert one(found, "featcache_oldest_unpaid_age_seconds") == 0


async def test_every_call_that_moves_bytes_is_counted(registry: CollectorRegistry) -> None:
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        metrics.register(client, registry)
        refs = await client.put_many([filled(10), filled(20)])
        await owner.put_many([filled(100)], keys=["many"])
        assert one(scraped(registry), "featcache_put_bytes_total") == 130
        await client.get_many([*refs, "many"])
        assert one(scraped(registry), "featcache_get_bytes_total") == 130
        await client.get_or_put("made", lambda: filled(1000))
        found = scraped(registry)
        assert one(found, "featcache_put_bytes_total") == 1130
        assert one(found, "featcache_get_bytes_total") == 130
        await client.get_or_put("made", lambda: filled(1000))
        with client.borrow("many"):
            pass
        owner.get_nowait(owner.put_nowait({"a": filled(7), "b": filled(8)}))
        found = scraped(registry)
        assert one(found, "featcache_get_bytes_total") > 130 + 1000 + 100
        assert one(found, "featcache_puts_total") == owner.statistics().puts


def test_blocking_objects_are_counted_alike(registry: CollectorRegistry) -> None:
    blocking = featcache.blocking
    with (
        blocking.create(settings=small()) as owner,
        blocking.connect(owner.endpoint, settings=small()) as client,
    ):
        metrics.register(owner, registry)
        metrics.register(client, registry)
        client.get(client.put(filled(KIB)))
        client.get_nowait(owner.put_nowait(filled(KIB)))
        with client.borrow(owner.put(filled(KIB), key="kept")):
            pass
        client.get("kept")
        client.get_or_put("kept", lambda: filled(1))
        client.get_many(client.put_many([filled(KIB)]))
        found = scraped(registry)
        assert one(found, "featcache_puts_total") == owner.statistics().puts == 4
        assert one(found, "featcache_put_bytes_total") == 4 * KIB
        assert one(found, "featcache_get_bytes_total") == 6 * KIB
        assert one(found, "featcache_gets_total") == client.statistics().gets
        assert one(found, "featcache_put_host_seconds_count") == 3
        assert one(found, "featcache_get_host_seconds_count") == 3
        metrics.unregister(client, registry)
        assert type(client) is blocking.FeatureClient


# --- names and labels -----------------------------------------------------------------------------


def test_the_bounds_of_histograms_are_short_numbers() -> None:
    bounds = {bound for row in HISTOGRAMS for bound in row.bounds_s}
    assert [bound for bound in bounds if bound != float(f"{bound:.2g}")] == []


async def test_names_have_prefix_unit_and_total_and_labels_are_pool_and_device(
    registry: CollectorRegistry,
) -> None:
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        metrics.register(client, registry)
        families = list(registry.collect())
        assert {family.name for family in families} == {
            row.name for row in (*GAUGES, *COUNTERS, *HISTOGRAMS)
        }
        for family in families:
            assert re.fullmatch(r"featcache_[a-z_]+", family.name)
            assert family.documentation
            assert family.samples
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == {"pool", "device"}
                assert sample.name.endswith("_total") == (family.type == "counter")
            if family.type == "histogram":
                assert family.name.endswith("_seconds")
        for row in HISTOGRAMS:
            assert row.bounds_s == tuple(sorted(row.bounds_s))
            assert row.bounds_s[0] <= 1e-4
            assert row.bounds_s[-1] >= 1
            # A query names a bucket by its text: 1e-05, not 9.999999999999999e-06.
            assert row.bounds_s == tuple(float(f"{bound:.2g}") for bound in row.bounds_s)


async def test_an_owner_and_its_clients_in_one_registry_stand_once(
    registry: CollectorRegistry,
) -> None:
    async with (
        pair(name="first") as (owner, client),
        featcache.connect(owner.endpoint) as second,
    ):
        for each in (second, client, owner):
            metrics.register(each, registry)
        await client.get(await client.put(filled(KIB)))
        await second.get(await owner.put(filled(KIB)))
        found = scraped(registry)  # which fails if a series stands twice
        assert one(found, "featcache_puts_total") == 2
        assert one(found, "featcache_put_bytes_total") == 2 * KIB
        assert one(found, "featcache_gets_total") == 2
        assert one(found, "featcache_sessions") == 2


async def test_the_host_slab_beside_an_owner_has_gauges_of_its_own(
    registry: CollectorRegistry,
) -> None:
    async with featcache.create(settings=small(), spill="1MiB") as owner:
        metrics.register(owner, registry)
        await full(owner)
        spilled = await owner.put(filled(KIB), on_full="spill")
        await until(lambda: _used(registry, spilled.pool_id.hex()) == KIB)
        found = scraped(registry)
        assert len(found["featcache_capacity_bytes"]) == 2
        assert one(found, "featcache_spilled_total") == 1


def _used(registry: CollectorRegistry, pool: str) -> float | None:
    return registry.get_sample_value("featcache_used_bytes", {"pool": pool, "device": "cpu"})


async def test_a_client_of_any_pool_tells_of_each(registry: CollectorRegistry) -> None:
    async with (
        featcache.create(settings=small()) as one_owner,
        featcache.create(settings=small()) as other,
        featcache.connect(settings=small()) as client,
    ):
        metrics.register(client, registry)
        assert one(scraped(registry), "featcache_gets_total") == 0
        await client.get(await one_owner.put(filled(1)))
        await client.get(await other.put(filled(1)))
        found = scraped(registry)
        assert len(found["featcache_capacity_bytes"]) == 2
        assert found["featcache_gets_total"] == {("", ""): 2}


# --- a life ---------------------------------------------------------------------------------------


async def test_what_closed_is_told_of_no_more(registry: CollectorRegistry) -> None:
    async with pair() as (owner, client):
        metrics.register(client, registry)
        await client.get(await owner.put(filled(1)))
        assert one(scraped(registry), "featcache_gets_total") == 1
    assert "featcache_gets_total" not in scraped(registry)
    with pytest.raises(CacheClosed):
        metrics.register(owner, registry)


async def test_a_counter_does_not_fall_as_one_of_several_clients_closes(
    registry: CollectorRegistry,
) -> None:
    async with pair() as (owner, client):
        metrics.register(client, registry)
        async with featcache.connect(owner.endpoint) as second:
            metrics.register(second, registry)
            for each in (client, second):
                await each.get(await owner.put(filled(1)))
        assert one(scraped(registry), "featcache_gets_total") == 2
        assert one(scraped(registry), "featcache_get_host_seconds_count") == 2


async def test_an_object_that_is_forgotten_is_not_kept_alive(registry: CollectorRegistry) -> None:
    async with featcache.create(settings=small()) as owner:
        client = await featcache.connect(owner.endpoint).open()
        metrics.register(client, registry)
        gone = weakref.ref(client)
        await client.get(await owner.put(filled(1)))
        del client
        gc.collect()
        assert gone() is None
        await until(lambda: owner.statistics().sessions == 0)
        scraped(registry)


async def test_registered_twice_it_counts_once(registry: CollectorRegistry) -> None:
    others = CollectorRegistry()
    async with pair() as (owner, client):
        for _ in range(2):
            metrics.register(client, registry)
            metrics.register(client, others)
        await client.get(await owner.put(filled(1)))
        for each in (registry, others):
            assert one(scraped(each), "featcache_get_host_seconds_count") == 1
        metrics.unregister(client, others)
        await client.get(await owner.put(filled(1)))
        assert one(scraped(registry), "featcache_get_host_seconds_count") == 2
        assert "featcache_gets_total" not in scraped(others)


async def test_what_is_no_cache_and_names_that_are_taken_are_refused(
    registry: CollectorRegistry,
) -> None:
    with pytest.raises(SettingsError, match="FeatureCache or FeatureClient"):
        metrics.register("owner", registry)  # type: ignore[arg-type]  # that is the point
    Gauge("featcache_used_bytes", "another's", registry=registry)
    async with featcache.create(settings=small()) as owner:
        with pytest.raises(ValueError, match="featcache_used_bytes"):
            metrics.register(owner, registry)
        assert type(owner) is FeatureCache


# --- off ------------------------------------------------------------------------------------------


def calls_of(work: Callable[[], Any]) -> int:
    """How many calls, of Python and of C, some work makes."""
    count = 0

    def look(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


async def test_off_a_call_runs_the_code_that_it_ran_before(registry: CollectorRegistry) -> None:
    feature = torch.zeros(16)
    async with pair() as (owner, client):
        await client.get(await owner.put(feature))
        store = owner._opened().pool.store

        def steps() -> tuple[int, ...]:
            refs: list[featcache.FeatureRef] = []

            def put() -> None:
                with pytest.raises(StopIteration) as done:  # it waits for nothing
                    owner.put(feature).send(None)
                refs.append(done.value.value)

            puts = calls_of(put)
            gets = calls_of(lambda: client.get_nowait(refs[0]))
            refs.append(owner.put_nowait(feature))

            def borrow() -> None:
                with client.borrow(refs[1]):
                    pass

            return puts, gets, calls_of(borrow)

        steps()
        await spent(owner)
        before = steps()
        metrics.register(owner, registry)
        metrics.register(client, registry)
        await spent(owner)
        during = steps()
        metrics.unregister(owner, registry)
        metrics.unregister(client, registry)
        await spent(owner)
        assert steps() == before
        assert all(on > off for on, off in zip(during, before, strict=True))
        assert type(owner) is FeatureCache
        assert type(store) is KeyedStore


ALONE = """
import sys
import featcache
assert not {"prometheus_client", "opentelemetry"} & set(sys.modules)
sys.modules["prometheus_client"] = sys.modules["opentelemetry"] = None  # as if not installed
for name in ("metrics", "tracing"):
    try:
        __import__(f"featcache.integrations.{name}")
    except ImportError as error:
        print(error)
"""


def test_featcache_needs_neither_extra_and_each_says_how_to_get_it() -> None:
    told = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in told] == [
        "pip install 'featcache[metrics]'",
        "pip install 'featcache[tracing]'",
    ]


# --- served ---------------------------------------------------------------------------------------


async def test_the_app_answers_a_request(registry: CollectorRegistry) -> None:
    async with pair() as (owner, client):
        app = metrics.asgi_app(owner, client, registry=registry)
        await client.get(await owner.put(filled(KIB)))
        status, text = await answer(app)
        assert status == 200
        assert one(parsed(text), "featcache_puts_total") == 1
        assert one(parsed(text), "featcache_gets_total") == 1


async def test_the_app_can_be_a_server_of_its_own(registry: CollectorRegistry) -> None:
    said: list[str] = []
    told = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Any:
        return {"type": next(told)}

    async def send(message: Any) -> None:
        said.append(message["type"])

    await metrics.asgi_app(registry=registry)({"type": "lifespan"}, receive, send)
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as response:  # noqa: S310 - of this test's own server
        body: bytes = response.read()
        return body.decode()


async def test_the_server_answers_on_the_loopback(registry: CollectorRegistry) -> None:
    async with pair() as (owner, client):
        with metrics.serve(0, owner, client, registry=registry) as server:
            assert server.host == "127.0.0.1"
            await client.get(await owner.put(filled(KIB)))
            found = parsed(await asyncio.to_thread(fetched, server.url))
            assert one(found, "featcache_puts_total") == 1
        server.close()
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(fetched, server.url)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_port_in_use_is_told_in_one_line(taken: int, registry: CollectorRegistry) -> None:
    with pytest.raises(SettingsError) as refused:
        metrics.serve(taken, registry=registry)
    assert str(refused.value) == (
        f"metrics can't listen at 127.0.0.1 port {taken}: Address already in use"
    )
    with pytest.raises(SettingsError, match="port 70000"):
        metrics.serve(70000, registry=registry)


async def test_a_call_in_progress_counts_though_it_is_registered_no_more(
    registry: CollectorRegistry,
) -> None:
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        metrics.register(client, registry)
        ref = await full(owner)
        waiting = [asyncio.create_task(each.put(filled(KIB))) for each in (owner, client)]
        await until(lambda: owner.statistics().waiters == 2)
        metrics.unregister(owner, registry)
        metrics.unregister(client, registry)
        await owner.release(ref)
        for put in waiting:
            assert (await put).nbytes == KIB
