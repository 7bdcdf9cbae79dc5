"""What an owner's observers are shown of other hosts, and what is told when something is amiss."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import pytest

import featcache
from featcache import FeatureCache, HomeView, OwnerLost, ReadingHostView, Snapshot, events
from featcache.cli.showing import plain_console, snapshot_text
from featcache.errors import AttachRefused, BackendUnavailable, OwnerUnreachable
from featcache.owner import landing
from reach.clusters import cluster
from reach.hosts import KEY, hosts, listening, quick
from reach.proxy import network
from support.caches import KIB, filled, pair, spent, until
from support.tiers import MemoryTier


@pytest.fixture
def told() -> Iterator[list[events.Event]]:
    """The events of this process."""
    seen: list[events.Event] = []
    events.add_hook(seen.append)
    yield seen
    events.remove_hook(seen.append)


async def seen_of(owner: FeatureCache) -> Snapshot:
    async with featcache.observe(owner.endpoint) as observer:
        return await observer.snapshot()


def text_of(seen: Snapshot) -> str:
    """What stat prints."""
    console = plain_console()
    with console.capture() as captured:
        console.print(snapshot_text(seen))
    return captured.get()


async def home_of(owner: FeatureCache) -> HomeView:
    """The one home that an owner reads from."""
    (home,) = (await seen_of(owner)).homes
    return home


async def reading_at(owner: FeatureCache) -> ReadingHostView:
    """The one host that reads at an owner."""
    (host,) = (await seen_of(owner)).reading_hosts
    return host


async def home_that(owner: FeatureCache, holds: Callable[[HomeView], object]) -> HomeView:
    """The one home that an owner reads from, once this holds of it."""
    async with featcache.observe(owner.endpoint) as observer:
        while True:
            (home,) = (await observer.snapshot()).homes
            if holds(home):
                return home


async def looks(owner: FeatureCache) -> AsyncIterator[ReadingHostView]:
    """The one host that reads at an owner, again and again."""
    while True:
        yield await reading_at(owner)


# --- the records ------------------------------------------------------------------------------------


async def test_an_owner_alone_has_no_hosts() -> None:
    async with pair() as (owner, _):
        seen = await seen_of(owner)
        assert (seen.peers, seen.homes, seen.reading_hosts) == (0, (), ())


async def test_an_owner_that_listens_has_none_before_one_comes() -> None:
    async with listening() as owner:
        seen = await seen_of(owner)
        assert (seen.peers, seen.homes, seen.reading_hosts) == (0, (), ())


async def test_a_home_shows_what_was_read_from_it() -> None:
    async with hosts() as both:
        for nbytes in (KIB, 2 * KIB):
            await both.client.get(await both.home.put(filled(nbytes)))
        await spent(both.home)
        seen = await seen_of(both.reader)
        (home,) = seen.homes
        assert seen.peers == 1
        assert (home.address, home.state, home.reason) == (both.home.address, "connected", "")
        assert home.pool == both.home._opened().pool.pool_id.hex()
        assert (home.fetched, home.fetched_bytes, home.failed) == (2, 3 * KIB, 0)
        assert (home.in_progress, home.quarantined, home.quarantined_bytes) == (0, 0, 0)
        assert 0 < home.mean_s <= home.longest_s <= home.total_s
        assert home.mean_s == pytest.approx(home.total_s / 2)
        assert 0 < home.last_s <= home.longest_s
        assert home.silent_s is not None
        assert home.silent_s >= 0


async def test_a_home_shows_its_round_trip_once_a_heartbeat_was_answered() -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(KIB)))
        home = await home_that(both.reader, lambda home: home.round_trip_s is not None)
        assert home.round_trip_s is not None
        assert home.round_trip_s > 0


async def test_a_reading_host_shows_what_it_was_told() -> None:
    async with hosts(name="rank7") as both:
        await both.client.get(await both.home.put(filled(KIB)))
        await spent(both.home)
        host = await reading_at(both.home)
        assert host.host == both.reader._opened().pool.pool_id.hex()
        assert host.address.startswith("127.0.0.1:")
        assert (host.state, host.named, host.names) == ("connected", 1, ("rank7",))
        assert (host.reading, host.requests, host.reads, host.told_bytes) == (0, 0, 1, KIB)
        assert 0 < host.lease_s <= 1.0
        counted = both.home.statistics()
        assert (counted.told, counted.told_bytes, counted.hosts_lost) == (1, KIB, 0)


async def test_a_read_in_progress_is_shown_at_both_ends() -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(64)))
        both.reader_plane.held = True
        reading = asyncio.ensure_future(both.client.get(await both.home.put(filled(KIB))))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        host, home = await reading_at(both.home), await home_of(both.reader)
        assert (host.reading, host.reading_bytes) == (1, KIB)
        assert (home.in_progress, home.fetched) == (1, 1)
        both.reader_plane.transfers[1].land()
        await reading
        assert (await home_of(both.reader)).in_progress == 0


async def test_a_payment_that_is_lost_is_shown_until_it_is_acknowledged() -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(64)))
        both.reader_plane.notifications = 0
        await both.client.get(await both.home.put(filled(64)))
        assert (await home_of(both.reader)).unacknowledged == 1
        await spent(both.home)
        await home_that(both.reader, lambda home: home.unacknowledged == 0)


async def test_a_home_that_closed_is_lost_and_says_why() -> None:
    async with hosts() as both:
        ref = await both.home.put(filled(64), readers=2)
        await both.client.get(ref)
        await both.home.aclose()
        home = await home_that(both.reader, lambda home: home.state == "lost")
        assert "closed the connection" in home.reason
        with pytest.raises(OwnerUnreachable):
            await both.reader.get(ref)
        assert "no owner answers" in (await home_of(both.reader)).reason


async def test_a_home_that_never_answered_is_away() -> None:
    async with hosts() as both:
        ref = await both.home.put(filled(64))
        await both.home.aclose()
        with pytest.raises(OwnerUnreachable):
            await both.client.get(ref)
        home = await home_of(both.reader)
        assert (home.state, home.pool, home.silent_s) == ("away", "", None)
        assert "no owner answers" in home.reason


async def test_a_reading_host_is_away_then_lost_and_shown_until_it_is_back() -> None:
    async with hosts() as both:
        assert both.home.address is not None
        async with network(both.home.address) as between:
            ref = between.ref(await both.home.put(filled(64), readers=2))
            await both.client.get(ref)
            between.cut()
            states: list[str] = []
            async for host in looks(both.home):
                if [host.state] != states[-1:]:
                    states.append(host.state)
                if host.state == "lost":
                    break
            assert states[-1] == "lost"
            assert (host.lease_s, host.reads) == (0.0, 1)
            assert both.home.statistics().hosts_lost == 1
            between.mend()
            await both.client.get(between.ref(await both.home.put(filled(64))))
            assert (await reading_at(both.home)).state == "connected"


async def test_rows_come_in_pages_where_they_do_not_fit_a_message() -> None:
    async with listening() as home, listening(message_bytes=1024, peers=16) as reader:
        ref = await home.put(filled(64))
        for port in range(1, 9):
            far = msgspec.structs.replace(ref, endpoint=f"127.0.0.1:{port}/x")
            with pytest.raises(OwnerUnreachable):
                await reader.get(far)
        await reader.get(ref)
        seen = await seen_of(reader)
        assert seen.peers == len(seen.homes) == 9
        assert len({one.address for one in seen.homes}) == 9


async def test_stat_shows_a_table_of_each_side() -> None:
    async with hosts(name="rank[7]") as both:
        await both.client.get(await both.home.put(filled(KIB)))
        await spent(both.home)
        home, reader = await seen_of(both.home), await seen_of(both.reader)
        text = text_of(reader)
        assert "hosts read from (1)" in text
        assert "hosts that read here" not in text
        assert re.search(rf"{both.home.address} +connected +1, 1.0 KiB +- ", text)
        assert "1 fetched, 1.0 KiB, 0 failed" in text
        text = text_of(home)
        assert "hosts that read here (1)" in text
        assert re.search(r"127\.0\.0\.1:\d+ +[0-9a-f]{8} +connected +- +- +1, 1.0 KiB", text)
        assert "rank[7]" in text


async def test_stat_counts_keys_of_other_hosts() -> None:
    async with cluster(1, 1) as owners:
        await owners[0].put(filled(KIB), key="k")
        await owners[1].get("k")
        assert "keys: 1 fetched, 0 offered" in text_of(await seen_of(owners[1]))


async def test_stat_has_a_row_of_a_tier_that_was_used() -> None:
    async with featcache.create(capacity="1MiB", tier=MemoryTier()) as owner:
        assert "tier" not in text_of(await seen_of(owner))
        for number in range(5):
            await owner.put(filled(300 * KIB), key=f"{number}")
        await owner.get("0")
        text = text_of(await seen_of(owner))
        assert re.search(r"tier +[1-9]\d* demoted, 1 promoted, 0 dropped, 0 failures", text)


async def test_stat_of_an_owner_alone_says_nothing_of_hosts() -> None:
    async with pair() as (owner, _):
        assert "host" not in text_of(await seen_of(owner)).replace("host on cpu", "")


# --- what is told -----------------------------------------------------------------------------------


def of(told: list[events.Event], kind: type[events.Event]) -> list[dict[str, object]]:
    return [one.facts() for one in told if isinstance(one, kind)]


async def test_a_home_that_is_connected_is_told_of(told: list[events.Event]) -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(64)))
        (attached,) = of(told, events.HomeAttached)
        assert attached["address"] == both.home.address
        assert attached["host"] == both.home._opened().pool.pool_id.hex()
        assert attached["pool"] == both.reader._opened().pool.name


async def test_another_cluster_key_is_told_of_at_both_ends(told: list[events.Event]) -> None:
    async with (
        listening() as home,
        featcache.create(settings=quick(), cluster_key=f"{KEY} of others") as reader,
    ):
        with pytest.raises(AttachRefused):
            await reader.get(await home.put(filled(64)))
        (refused,) = of(told, events.HomeUnreachable)
        assert "cluster keys" in str(refused["reason"])
        assert "cluster keys" in (await home_of(reader)).reason
        assert [str(one["reason"]).partition(": ")[2] for one in of(told, events.PeerRefused)] == [
            "the cluster keys of the two hosts differ"
        ]


async def test_a_fetch_that_fails_is_told_of_and_counted(told: list[events.Event]) -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(64)))
        both.reader_plane.held = True
        reading = asyncio.ensure_future(both.client.get(await both.home.put(filled(KIB))))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        both.reader_plane.transfers[1].fail(BackendUnavailable("remote disconnected"))
        with pytest.raises(OwnerLost):
            await reading
        (failed,) = of(told, events.FetchFailed)
        assert (failed["address"], failed["nbytes"]) == (both.home.address, KIB)
        assert "remote disconnected" in str(failed["reason"])
        assert (await home_of(both.reader)).failed == 1


async def test_a_landing_place_in_quarantine_is_told_of_and_shown_until_it_is_free(
    told: list[events.Event],
) -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(64)))
        both.reader_plane.held = True
        reading = asyncio.ensure_future(both.client.get(await both.home.put(filled(KIB))))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        reading.cancel()
        await asyncio.wait([reading])
        home = await home_that(both.reader, lambda home: home.quarantined)
        assert (home.quarantined, home.quarantined_bytes, home.in_progress) == (1, KIB, 0)
        (given_up,) = of(told, events.FetchQuarantined)
        assert (given_up["nbytes"], given_up["quarantined_bytes"]) == (KIB, KIB)
        both.reader_plane.transfers[1].land()
        await home_that(both.reader, lambda home: not home.quarantined)
        await spent(both.reader)


async def test_a_slow_transfer_is_told_of(
    told: list[events.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(64)))
        assert not of(told, events.FetchSlow)
        both.reader_plane.held = True
        reading = asyncio.ensure_future(both.client.get(await both.home.put(filled(KIB))))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        # The clock goes on by more than half of the time that a transfer has.
        began_s = landing._now()
        monkeypatch.setattr(landing, "_now", lambda: began_s + 0.3)
        both.reader_plane.transfers[1].land()
        await reading
        (slow,) = of(told, events.FetchSlow)
        assert (slow["address"], slow["nbytes"]) == (both.home.address, KIB)
        assert (await home_of(both.reader)).longest_s > 0.2
