"""A home or a reader that is killed, stopped or cut off, in every step; payments lost and doubled."""

import asyncio
import contextlib
import gc
import socket
import struct
from collections.abc import AsyncIterator

import msgspec
import pytest
import torch

import featcache
from featcache import FeatureCache, OwnerLost, events
from featcache.control.messages import ProtocolError
from featcache.errors import (
    AttachRefused,
    BackendUnavailable,
    FeatcacheError,
    OwnerUnreachable,
)
from featcache.owner import far_peers, landing
from featcache.owner.far_peers import FarPeers
from featcache.reach.messages import (
    MAX_NOTIFICATION_BYTES,
    Pay,
    Payment,
    Place,
    encode,
)
from featcache.ref import path_of
from reach.hosts import KEY, Hosts, clients_of, hosts, listening, plane_of, quick
from reach.proxy import Network, network
from support.caches import KIB, filled, spent, tensor, until


@contextlib.asynccontextmanager
async def apart(*, name: str | None = None) -> AsyncIterator[tuple[Hosts, Network]]:
    """Two hosts with a network between them, connected by a first read."""
    async with hosts(name=name) as both:
        assert both.home.address is not None
        async with network(both.home.address) as between:
            await both.client.get(between.ref(await both.home.put(filled(64))))
            await spent(both.home)
            yield both, between


def owed(owner: FeatureCache) -> int:
    """Reads that the refs of an owner wait for."""
    store = owner._opened().pool.store
    return sum(slot.reads_left for slot in store.owing.values())


async def hosts_left(owner: FeatureCache) -> None:
    """Return when an owner knows no other host any more."""
    beyond = owner._opened().beyond
    assert beyond is not None
    peers = beyond.peers
    assert peers is not None
    await until(lambda: peers.hosts == 0)


# --- the home ---------------------------------------------------------------------------------------


async def test_nobody_at_the_address() -> None:
    async with hosts() as both:
        ref = await both.home.put(filled(KIB))
        await both.home.aclose()
        with pytest.raises(OwnerUnreachable):
            await both.client.get(ref)
        await spent(both.reader)


async def test_a_home_that_says_nothing_is_lost_in_the_handshake() -> None:
    async with hosts() as both:
        assert both.home.address is not None
        async with network(both.home.address) as between:
            between.cut()
            ref = between.ref(await both.home.put(filled(KIB)))
            for call in (both.client.get, both.client.release, both.client.discard):
                with pytest.raises(OwnerLost, match="did not answer"):
                    await call(ref)
            assert owed(both.home) == 1


async def test_a_fault_of_the_home_is_told_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fault(*_: object) -> None:
        raise ZeroDivisionError("of the home")

    told = list[BaseException]()
    asyncio.get_running_loop().set_exception_handler(
        lambda _, found: told.append(found["exception"])
    )
    async with hosts() as both:
        ref = await both.home.put(filled(KIB))
        with monkeypatch.context() as patch:
            patch.setattr(FarPeers, "_find", fault)
            with pytest.raises(
                FeatcacheError, match="failed at it: ZeroDivisionError: of the home"
            ):
                await both.client.get(ref)
        gc.collect()  # asyncio tells of a task's exception when the task goes
        assert [type(error) for error in told] == [ZeroDivisionError]
        assert torch.equal(tensor(await both.client.get(ref)), filled(KIB))
        await spent(both.home)


@pytest.mark.parametrize("how", ["reset", "closed"])
async def test_a_home_that_dies_in_the_handshake_is_lost(how: str) -> None:
    async with hosts() as both:

        def end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()

        server = await asyncio.start_server(end, "127.0.0.1", 0)
        async with server:
            ref = await both.home.put(filled(KIB))
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            moved = msgspec.structs.replace(ref, endpoint=address + path_of(ref.endpoint))
            with pytest.raises(OwnerLost, match=address):
                await both.client.get(moved)


async def test_a_home_that_is_cut_off_is_lost_at_the_look_up() -> None:
    async with apart() as (both, between):
        ref = between.ref(await both.home.put(filled(KIB)))
        between.cut()
        with pytest.raises(OwnerLost, match="not been heard of"):
            await both.client.get(ref)
        await spent(both.reader)
        assert owed(both.home) == 1


async def test_a_home_that_is_cut_off_while_it_is_read_quarantines_the_landing_place() -> None:
    async with apart() as (both, between):
        plane = both.reader_plane
        plane.held = True
        ref = between.ref(await both.home.put(filled(KIB, 7), ttl=None))
        reading = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(plane.transfers) == 2)
        between.cut()
        with pytest.raises(OwnerLost):
            await reading
        landing = plane.transfers[-1]
        assert landing.abandoned
        # It may still be written, and so it is nobody else's.
        assert both.reader.statistics().used_bytes >= KIB
        landing.land()
        await spent(both.reader)
        await spent(both.home)  # its lease has ended: the read that was begun is paid


async def test_a_pin_whose_end_was_told_to_a_connection_that_broke_does_not_stand() -> None:
    async with apart() as (both, between):
        both.reader_plane.held = True
        reading = asyncio.create_task(
            both.reader.get(between.ref(await both.home.put(filled(KIB))))
        )
        await until(lambda: len(both.reader_plane.transfers) == 2)
        between.cut()
        reading.cancel()
        await asyncio.wait([reading])
        between.reset()
        between.mend()
        both.reader_plane.held = False
        await both.client.get(between.ref(await both.home.put(filled(64))))
        beyond = both.home._opened().beyond
        assert beyond is not None
        assert beyond.peers is not None
        (peer,) = beyond.peers._peers.values()
        await until(lambda: not peer.begun)
        assert owed(both.home) == 1  # the read itself is owed as before
        both.reader_plane.transfers[1].land()


async def test_a_home_that_closes_ends_the_reads_of_it() -> None:
    async with hosts() as both:
        plane = both.home_plane
        await both.client.get(await both.home.put(filled(KIB)))
        both.reader_plane.held = True
        ref = await both.home.put(filled(KIB))
        reading = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        await both.home.aclose()
        assert not plane.registered
        with pytest.raises(OwnerLost):
            await reading
        both.reader_plane.transfers[-1].land()  # which fails: the home's memory is gone
        await spent(both.reader)


async def test_a_read_that_fails_is_told_and_can_be_tried_again() -> None:
    async with apart() as (both, between):
        plane = both.reader_plane
        plane.held = True
        ref = between.ref(await both.home.put(filled(KIB, 7)))
        reading = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(plane.transfers) == 2)
        plane.transfers[-1].fail(BackendUnavailable("remote disconnected"))
        with pytest.raises(OwnerLost, match="remote disconnected"):
            await reading
        await spent(both.reader)
        plane.held = False
        assert torch.equal(tensor(await both.client.get(ref)), filled(KIB, 7))
        await spent(both.home)


async def test_a_read_without_end_of_a_home_that_lives_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The data plane's ports may be closed where TCP goes through."""
    monkeypatch.setattr(landing, "_SLOWEST_BYTES_PER_S", 1 << 30)
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(KIB)))
        both.reader_plane.held = True
        ref = await both.home.put(filled(KIB, 7))
        with pytest.raises(OwnerLost, match="did not come"):
            await both.client.get(ref)
        assert both.reader.statistics().used_bytes >= KIB
        for transfer in both.reader_plane.transfers:
            transfer.land()
        await spent(both.reader)
        both.reader_plane.held = False
        assert torch.equal(tensor(await both.client.get(ref)), filled(KIB, 7))


async def test_bytes_that_came_after_the_lease_are_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The home may have recycled them: what was read can be another feature's."""
    async with apart() as (both, between):
        plane = both.reader_plane
        plane.held = True
        ref = between.ref(await both.home.put(filled(KIB, 7), ttl=None))
        reading = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(plane.transfers) == 2)
        beyond = both.reader._opened().beyond
        assert beyond is not None
        link = next(iter(beyond.homes._homes.values())).link
        monkeypatch.setattr(link, "_kept_s", link._kept_s - 100)
        monkeypatch.setattr(link, "_sent", {})
        plane.transfers[-1].land()
        with pytest.raises(OwnerLost, match="too late"):
            await reading
        await spent(both.reader)


async def test_a_reader_keeps_to_the_lease_of_its_home() -> None:
    """The home's is shorter than the time in which the reader expects an answer."""
    async with (
        listening(peer_lease=0.4) as home,
        featcache.create(settings=quick(peer_timeout=60.0), cluster_key=KEY) as reader,
    ):
        await reader.get(await home.put(filled(KIB)))
        beyond = reader._opened().beyond
        assert beyond is not None
        link = next(iter(beyond.homes._homes.values())).link
        beats = link._beats
        await until(lambda: link._beats >= beats + 8)
        assert link.lost is None
        await reader.get(await home.put(filled(KIB)))
        peers = home._opened().beyond
        assert peers is not None
        assert peers.counts()["hosts_lost"] == 0


async def test_a_home_that_comes_back_at_its_address_has_other_refs() -> None:
    async with apart() as (both, between):
        before = between.ref(await both.home.put(filled(KIB)))
        await both.home.aclose()
        async with featcache.create(
            settings=quick(), listen=str(between.target), cluster_key=KEY
        ) as home:
            with pytest.raises(OwnerLost, match="another owner"):
                await both.client.get(before)
            ref = between.ref(await home.put(filled(KIB, 3)))
            assert torch.equal(tensor(await both.client.get(ref)), filled(KIB, 3))
            await spent(home)


async def test_a_home_with_another_key_refuses() -> None:
    async with (
        featcache.create(settings=quick(), listen="127.0.0.1:0", cluster_key="k" * 40) as home,
        featcache.create(settings=quick(), cluster_key=KEY) as reader,
    ):
        ref = await home.put(filled(KIB))
        with pytest.raises(AttachRefused, match="keys"):
            await reader.get(ref)
        assert owed(home) == 1


async def test_a_read_that_failed_leaves_no_pin_when_the_connection_is_made_again() -> None:
    async with apart() as (both, between):
        both.reader_plane.held = True
        ref = between.ref(await both.home.put(filled(KIB, 7), readers=2, ttl=None))
        reading = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        between.reset()
        with pytest.raises(OwnerLost):
            await reading
        both.reader_plane.held = False
        both.reader_plane.transfers[-1].land()
        other = between.ref(await both.home.put(filled(KIB, 3)))
        assert torch.equal(tensor(await both.client.get(other)), filled(KIB, 3))
        await both.home.discard(ref)
        await spent(both.home)
        await spent(both.reader)


async def test_a_pin_whose_end_was_told_in_vain_is_gone_when_the_connection_is_made_again() -> None:
    """The get is cancelled while the hosts are cut off: what it sends is lost with the connection."""
    async with apart() as (both, between):
        both.reader_plane.held = True
        ref = between.ref(await both.home.put(filled(KIB, 7), readers=2, ttl=None))
        reading = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        between.cut()
        reading.cancel()
        await until(lambda: both.reader_plane.transfers[-1].abandoned)
        between.reset()
        between.mend()
        both.reader_plane.held = False
        both.reader_plane.transfers[-1].land()
        other = between.ref(await both.home.put(filled(KIB, 3)))
        assert torch.equal(tensor(await both.client.get(other)), filled(KIB, 3))
        await both.home.discard(ref)
        await spent(both.home)
        await spent(both.reader)


async def test_a_ref_of_the_owner_that_was_at_ones_own_address_is_lost() -> None:
    async with listening() as before:
        ref = await before.put(filled(KIB))
        address = before.address
    async with (
        featcache.create(settings=quick(), listen=address, cluster_key=KEY) as owner,
        featcache.connect(owner.endpoint) as client,
    ):
        for each in (owner, client):
            with pytest.raises(OwnerLost):
                await each.get(ref)


# --- payments ---------------------------------------------------------------------------------------


async def test_a_payment_whose_notification_is_lost_is_told_again() -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(KIB)))
        both.reader_plane.notifications = 0
        await both.client.get(await both.home.put(filled(KIB)))
        await spent(both.home)
        await spent(both.reader)


async def test_a_payment_that_comes_twice_pays_once() -> None:
    async with hosts() as both, clients_of(both.reader, 1) as [other]:
        await both.client.get(await both.home.put(filled(KIB)))
        both.reader_plane.notifications = 3
        ref = await both.home.put(filled(KIB), readers=3)
        await both.client.get(ref)
        await until(lambda: owed(both.home) == 2)
        for payload in both.reader_plane.sent:
            both.home_plane.on_notification(payload)
        assert owed(both.home) == 2
        await other.get(ref)
        await until(lambda: owed(both.home) == 1)


async def test_a_forged_notification_pays_nothing() -> None:
    async with hosts() as both:
        ref = await both.home.put(filled(KIB), readers=2)
        await both.client.get(ref)
        await until(lambda: owed(both.home) == 1)
        [payload] = both.reader_plane.sent
        forged = payload.replace(b"\x01\xc0", b"\x02\xc0")  # another session's
        for each in (forged, b"", b"\xc1", payload[:-1]):
            both.home_plane.on_notification(each)
        assert owed(both.home) == 1


async def test_a_notification_of_any_length_does_not_hold_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The data plane proves nothing of its sender, so one that is too long is not even decoded."""
    decoded = list[int]()

    def decode(payload: bytes) -> object:
        decoded.append(len(payload))
        raise ProtocolError("of no use")

    async with hosts() as both:
        beyond = both.home._opened().beyond
        assert beyond is not None
        assert beyond.peers is not None
        with monkeypatch.context() as patch:
            patch.setattr(far_peers, "decode_from_reader", decode)
            beyond.peers.notified(bytes(MAX_NOTIFICATION_BYTES))
            beyond.peers.notified(bytes(MAX_NOTIFICATION_BYTES + 1))
    assert decoded == [MAX_NOTIFICATION_BYTES]


def test_the_longest_payment_is_no_longer_than_a_notification() -> None:
    most = (1 << 63) - 1
    payment = Payment(most, Place(bytes(16), most, most), most, "ü" * 256)
    assert len(encode(Pay(bytes(16), [payment]))) <= MAX_NOTIFICATION_BYTES


async def test_a_payment_outlives_the_connection() -> None:
    async with apart() as (both, between):
        both.reader_plane.notifications = 0
        ref = await both.home.put(filled(KIB), readers=2)
        second = await both.home.put(filled(KIB, 2))
        await both.client.get(between.ref(ref))
        between.reset()
        await until(lambda: between.connections == 1)
        assert torch.equal(tensor(await both.client.get(between.ref(second))), filled(KIB, 2))
        await until(lambda: owed(both.home) == 1)
        await both.home.discard(ref)


# --- the reader -------------------------------------------------------------------------------------


async def test_a_reader_that_vanishes_is_paid_for_when_its_lease_ends() -> None:
    async with apart(name="rank1") as (both, between):
        both.reader_plane.held = True
        begun = between.ref(await both.home.put(filled(KIB), readers=2, ttl=None))
        await both.home.put(filled(KIB), readers=["rank1"], ttl=None)
        reading = asyncio.create_task(both.client.get(begun))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        between.cut()
        # The read that it had begun, and the one that its name owes; of the others of `begun`, none.
        await hosts_left(both.home)
        assert owed(both.home) == 1
        with pytest.raises(OwnerLost):
            await reading
        both.reader_plane.transfers[-1].land()


async def test_a_reader_that_says_goodbye_owes_what_it_has_not_read() -> None:
    async with listening() as home:
        async with featcache.create(settings=quick(), cluster_key=KEY) as reader:
            ref = await home.put(filled(KIB), readers=2)
            await reader.get(ref)
            plane_of(reader).notifications = 0
        await hosts_left(home)
        assert owed(home) == 1


async def test_a_pinned_feature_outlives_a_discard_while_it_is_read() -> None:
    async with apart() as (both, between):
        both.reader_plane.held = True
        ref = between.ref(await both.home.put(filled(KIB, 7)))
        reading = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        await both.home.discard(ref)
        assert both.home.statistics().used_bytes
        both.reader_plane.transfers[-1].land()
        assert torch.equal(tensor(await reading), filled(KIB, 7))
        await spent(both.home)
        await spent(both.reader)


async def test_hosts_that_come_and_go_are_told() -> None:
    told: list[str] = []

    def hook(event: events.Event) -> None:
        if event.name.startswith("featcache.host"):
            told.append(event.name)

    events.add_hook(hook)
    try:
        async with apart() as (both, between):
            between.cut()
            await hosts_left(both.home)
    finally:
        events.remove_hook(hook)
    assert told == ["featcache.host.attached", "featcache.host.lost"]
