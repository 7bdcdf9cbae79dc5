"""Refs of another host: fetched once, read as local ones are, paid at home."""

import asyncio

import pytest
import torch

import featcache
from featcache import FeatureCache, GetTimeout, StaleRef, UnknownPool
from reach.hosts import clients_of, hosts, listening, plane_of, quick
from support.caches import KIB, filled, spent, tensor, tensors, until


async def test_a_ref_of_another_host_is_read() -> None:
    async with hosts() as (home, reader, client):
        ref = await home.put(filled(20 * KIB, 7))
        assert ref.address == home.address
        assert len(ref.to_bytes()) < 160
        assert torch.equal(tensor(await client.get(ref)), filled(20 * KIB, 7))
        await spent(home)
        await spent(reader)


async def test_the_owner_itself_reads_another_hosts_ref() -> None:
    async with hosts() as (home, reader, _):
        ref = await home.put({"a": filled(100, 1), "b": torch.arange(9.0)})
        got = tensors(await reader.get(ref))
        assert torch.equal(got["b"], torch.arange(9.0))
        await spent(home)
        await spent(reader)


async def test_a_feature_without_bytes_is_read() -> None:
    async with hosts() as (home, reader, client):
        ref = await home.put(torch.empty(0, 4))
        assert tensor(await client.get(ref)).shape == (0, 4)
        await spent(home)
        await spent(reader)


async def test_many_ranks_cost_the_network_one_transfer() -> None:
    async with hosts() as both, clients_of(both.reader, 3) as others:
        ranks = [both.client, *others]
        ref = await both.home.put(filled(30 * KIB, 3), readers=4)
        got = await asyncio.gather(*(rank.get(ref) for rank in ranks))
        assert all(torch.equal(tensor(each), filled(30 * KIB, 3)) for each in got)
        assert len(both.reader_plane.transfers) == 1
        now = both.reader.statistics()
        assert (now.fetched, now.fetched_bytes, now.fetches_failed) == (1, 30 * KIB, 0)
        await spent(both.home)
        await spent(both.reader)


async def test_ranks_that_come_one_after_the_other_cost_one_too() -> None:
    async with hosts() as both, clients_of(both.reader, 1) as [other]:
        ref = await both.home.put(filled(KIB, 3), readers=2)
        await both.client.get(ref)
        await until(lambda: len(both.home._opened().pool.store.owing) == 1)
        await other.get(ref)
        assert len(both.reader_plane.transfers) == 1
        await spent(both.home)
        await spent(both.reader)


async def test_named_reads_are_paid_by_name() -> None:
    async with hosts(name="rank1") as both:
        ref = await both.home.put(filled(KIB), readers=["rank1", "rank2"])
        await both.client.get(ref)
        slot = both.home._opened().pool.store.find(ref.slot, ref.generation)
        await until(lambda: slot.owed_by == ("rank2",))


async def test_a_borrow_of_another_hosts_ref() -> None:
    async with hosts() as (home, reader, client):
        ref = await home.put(filled(KIB, 5))
        async with client.borrow(ref) as view:
            assert torch.equal(tensor(view), filled(KIB, 5))
        await spent(home)
        await spent(reader)


async def test_many_of_two_hosts_are_read_together() -> None:
    async with hosts() as (home, reader, client):
        refs = [await home.put(filled(KIB, n)) for n in range(3)]
        here = await reader.put(filled(KIB, 9))
        got = await client.get_many([refs[0], here, *refs[1:]])
        assert [int(tensor(each)[0]) for each in got] == [0, 9, 1, 2]
        await spent(home)
        await spent(reader)


async def test_a_release_costs_no_transfer() -> None:
    async with hosts() as both:
        ref = await both.home.put(filled(KIB))
        await both.client.release(ref)
        await spent(both.home)
        with pytest.raises(StaleRef):
            await both.client.get(ref)
        assert both.reader.statistics().puts == 0


async def test_a_read_is_paid_once_by_each_session() -> None:
    async with hosts() as (home, _, client):
        ref = await home.put(filled(KIB), readers=2)
        await client.get(ref)
        with pytest.raises(StaleRef, match="paid by this session"):
            await client.get(ref)
        with pytest.raises(StaleRef, match="paid by this session"):
            await client.release(ref)


async def test_a_discard_reaches_the_home() -> None:
    async with hosts() as (home, reader, client):
        ref = await home.put(filled(KIB), readers=3)
        await client.get(ref)
        await client.discard(ref)
        await spent(home)
        await spent(reader)
        for each in (client, reader):
            with pytest.raises(StaleRef, match="discarded"):
                await each.get(ref)


async def test_what_ended_at_home_is_recycled_here() -> None:
    async with hosts() as (home, reader, client):
        ref = await home.put(filled(KIB), readers=2)
        await client.get(ref)
        assert reader.statistics().used_bytes
        await home.discard(ref)
        await spent(reader)


async def test_a_cancelled_get_leaves_the_read_owed() -> None:
    async with hosts() as both:
        await warm(both.home, both.client)
        both.reader_plane.held = True
        ref = await both.home.put(filled(KIB, 4))
        with pytest.raises(GetTimeout):
            await both.client.get(ref, timeout=0.1)
        assert both.home.statistics().slots_used == 1
        both.reader_plane.held = False
        for transfer in both.reader_plane.transfers:
            transfer.land()
        assert torch.equal(tensor(await both.client.get(ref)), filled(KIB, 4))
        await spent(both.home)
        await spent(both.reader)


async def test_a_fetch_waits_for_room_as_a_put_does() -> None:
    async with hosts() as (home, reader, client):
        blocker = await reader.put(filled(1 << 20))
        ref = await home.put(filled(KIB, 6))
        reading = asyncio.create_task(client.get(ref))
        await until(lambda: reader.statistics().waiters == 1)
        await reader.get(blocker)
        assert torch.equal(tensor(await reading), filled(KIB, 6))


async def test_a_fetch_that_nobody_waits_for_leaves_the_queue() -> None:
    async with hosts() as (home, reader, client):
        await reader.put(filled(1 << 20), ttl=None)
        ref = await home.put(filled(KIB, 6))
        with pytest.raises(GetTimeout):
            await client.get(ref, timeout=0.1)
        await until(lambda: reader.statistics().waiters == 0)


async def test_extents_over_segments_are_read_in_pieces() -> None:
    async with hosts(segment="32KiB") as both:
        ref = await both.home.put(filled(200 * KIB, 8))
        assert torch.equal(tensor(await both.client.get(ref)), filled(200 * KIB, 8))
        assert sum(piece.nbytes for piece in both.reader_plane.transfers[0].pieces) == 200 * KIB
        assert len(both.reader_plane.transfers[0].pieces) > 200 // 64


async def test_segments_are_deregistered_before_they_are_given_back() -> None:
    async with listening(idle=0.05) as home:
        plane = plane_of(home)
        initial = dict(plane.registered)
        ref = home.put_nowait(filled(500 * KIB))
        await until(lambda: sum(plane.registered.values()) >= 500 * KIB)
        await home.get(ref)
        await until(lambda: plane.registered == initial)


async def test_a_client_of_an_owner_without_a_key_knows_no_other_host() -> None:
    async with (
        listening() as home,
        featcache.create(settings=quick()) as other,
        featcache.connect(other.endpoint) as client,
    ):
        ref = await home.put(filled(KIB))
        for each in (client, other):
            with pytest.raises(UnknownPool):
                await each.get(ref)


async def test_clients_of_an_owner_that_listens_make_refs_that_say_so() -> None:
    async with hosts() as (home, reader, client), featcache.connect(home.endpoint) as writer:
        ref = await writer.put(filled(KIB, 2))
        assert ref.address == home.address
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 2))
        again = featcache.FeatureRef.from_bytes(ref.to_bytes())
        assert again == ref
        await spent(home)
        await spent(reader)


def test_code_without_a_loop_reads_other_hosts_too() -> None:
    with (
        featcache.blocking.create(
            settings=quick(), listen="127.0.0.1:0", cluster_key="k" * 20
        ) as home,
        featcache.blocking.create(settings=quick(), cluster_key="k" * 20) as reader,
        featcache.blocking.connect(reader.endpoint) as client,
    ):
        refs = [home.put(filled(KIB, n)) for n in range(3)]
        assert torch.equal(tensor(client.get(refs[0])), filled(KIB, 0))
        with client.borrow(refs[1]) as view:
            assert torch.equal(tensor(view), filled(KIB, 1))
        client.release(refs[2])


async def warm(home: FeatureCache, client: featcache.FeatureClient) -> None:
    """Connect the hosts."""
    await client.get(await home.put(filled(KIB)))
