"""A client's puts in a row: no question before the copy and none after it; the ref is good at once."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import featcache
from core.books import check_books
from featcache import (
    FeatureCache,
    FeatureClient,
    FeatureRef,
    GetTimeout,
    MalformedRef,
    PoolFull,
    StaleRef,
)
from featcache.client.writer import ClientWriter
from featcache.control.channel import Channel
from featcache.control.server import Server
from featcache.core.endings import Ending
from featcache.memory.host.slab import HostMapping
from featcache.pool import ahead
from featcache.session import writes
from support.caches import KIB, MIB, Gate, filled, pair, small, spent, steps, tensor, until
from support.keyed import CAPACITY, ONE, nothing_lost, page_of, party, pool_of, queued, reserved
from support.slabs import Slab, at, same


def writer_of(client: FeatureClient) -> ClientWriter:
    writer = client._opened().puts.bound_writer()
    assert isinstance(writer, ClientWriter)
    return writer


def asked(client: FeatureClient) -> int:
    """Requests that the client has sent, each of which has an answer."""
    return writer_of(client).connection.link.requests._last_number


def server_of(owner: FeatureCache) -> Server:
    return owner._opened().main.server


def far_end(owner: FeatureCache, session: int = 1) -> Channel:
    return server_of(owner).sessions[session].channel


def rooms(owner: FeatureCache) -> int:
    return len(pool_of(owner).store.ahead)


async def practised(owner: FeatureCache, client: FeatureClient, nbytes: int = KIB) -> None:
    """Put until there is room ahead, and nothing else."""
    for _ in range(2):
        await owner.release(await client.put(filled(nbytes)))
    await until(lambda: rooms(owner) and not reserved(owner))
    await spent(owner)


# --- no round trip -------------------------------------------------------------------------------


async def test_puts_in_a_row_ask_for_nothing(slab: Slab) -> None:
    async with slab.pair() as (owner, client):
        await practised(owner, client)
        before = asked(client)
        for number in range(20):
            ref = await client.put(at(filled(KIB - number, number), slab.device))
            await steps(3)
            assert same(await owner.get(ref), filled(KIB - number, number))
        assert asked(client) == before
        assert owner.statistics().puts == client.statistics().puts == 22
        assert owner.statistics().waited == 0
        await nothing_lost(owner)


async def test_puts_without_a_turn_of_the_loop_between_them() -> None:
    """The rooms that came meanwhile are found in the socket, or asked for: never less right."""
    async with pair() as (owner, client):
        await practised(owner, client)
        refs = [await client.put(filled(KIB, number)) for number in range(30)]
        for number, ref in enumerate(refs):
            assert same(await owner.get(ref), filled(KIB, number))
        await nothing_lost(owner)


async def test_under_a_key_each_asks_once_and_is_found_by_all() -> None:
    async with party(2) as (owner, (client, other)):
        await practised(owner, client)
        before = asked(client)
        for number in range(8):
            await client.put(filled(KIB, number), key=f"key {number}")
            assert await owner.contains(f"key {number}")
            assert same(await other.get(f"key {number}"), filled(KIB, number))
        assert asked(client) - before == 8
        await nothing_lost(owner)


async def test_the_terms_of_a_put_hold_in_room_ahead() -> None:
    async with pair(name="tp0") as (owner, client):
        await practised(owner, client)
        ref = await client.put(filled(KIB, 1), readers=["tp0"], ttl=None)
        await owner.get(ref)  # owes none
        assert owner.statistics().slots_used == 1
        await client.get(ref)
        await spent(owner)
        ref = await client.put(filled(KIB, 2), ttl=0.01)
        await until(lambda: owner.statistics().expired == 1)
        with pytest.raises(StaleRef):
            await owner.get(ref)
        ref = await client.put(filled(100, 3), readers=1, key="k")
        assert owner.statistics().used_bytes == 256, "the rest of the room was cut off"
        assert same(await owner.get(ref), filled(100, 3))
        await nothing_lost(owner)


async def test_without_rooms_ahead_each_put_asks() -> None:
    async with pair(rooms_ahead=0) as (owner, client):
        for _ in range(4):
            await owner.release(await client.put(filled(KIB)))
        before = asked(client)
        await owner.release(await client.put(filled(KIB)))
        assert (asked(client) - before, rooms(owner)) == (1, 0)
        await spent(owner)


# --- the ref is good at once -----------------------------------------------------------------------


class Deaf:
    """An owner that does not hear a session: what it sends or posts stays where it is."""

    def __init__(self, owner: FeatureCache, patch: pytest.MonkeyPatch) -> None:
        self._channel = far_end(owner)
        self._posts = server_of(owner).posts
        self._patch = patch
        patch.setattr(self._channel, "read_rest", lambda _: False)
        patch.setattr(server_of(owner).sessions[1], "posts", None)
        asyncio.get_running_loop().remove_reader(self._channel._fd)

    def hears(self) -> None:
        self._patch.undo()
        asyncio.get_running_loop().add_reader(self._channel._fd, self._channel._readable)
        self._posts.hear_all()


async def early(
    owner: FeatureCache, client: FeatureClient, patch: pytest.MonkeyPatch, **terms: Any
) -> tuple[FeatureRef, Deaf]:
    """A ref whose publish its owner has not read."""
    await practised(owner, client)
    deaf = Deaf(owner, patch)
    ref = await client.put(filled(KIB, 7), **terms)
    assert pool_of(owner).words.live[ref.slot] != ref.generation
    return ref, deaf


@pytest.mark.parametrize("who", ["owner", "another client"])
@pytest.mark.parametrize("how", ["get", "borrow"])
async def test_a_reader_that_is_faster_than_the_owner_waits(
    who: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with party(2) as (owner, (client, other)):
        reader = owner if who == "owner" else other
        ref, deaf = await early(owner, client, monkeypatch)
        with pytest.raises(GetTimeout):
            reader.get_nowait(ref)
        with pytest.raises(GetTimeout):
            await reader.get(ref, timeout=0.01)

        async def read() -> Any:
            if how == "get":
                return await reader.get(ref)
            async with reader.borrow(ref) as view:
                return tensor(view).clone()

        reading = asyncio.create_task(read())
        await steps(5)
        assert not reading.done()
        deaf.hears()
        assert same(await reading, filled(KIB, 7))
        await nothing_lost(owner)


async def test_who_put_it_reads_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as (owner, client):
        ref, deaf = await early(owner, client, monkeypatch, readers=1)
        assert same(client.get_nowait(ref), filled(KIB, 7))
        with pytest.raises(StaleRef, match="paid"):
            client.get_nowait(ref)
        deaf.hears()
        await nothing_lost(owner)  # it was paid before it was published, and counts


@pytest.mark.parametrize("names", [None, ["tp0"]])
async def test_a_read_that_is_paid_early_counts(
    names: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        pair() as (owner, client),
        featcache.connect(owner.endpoint, name="tp0", settings=small()) as other,
    ):
        ref, deaf = await early(owner, client, monkeypatch, readers=names or 1, ttl=None)
        await other.release(ref)
        pool_of(owner).collect()  # its word is seen, and not again
        deaf.hears()
        await spent(owner)
        assert owner.statistics().reads_paid == 3


async def test_a_reader_that_left_has_paid_early(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as (owner, client):
        async with featcache.connect(owner.endpoint, settings=small()) as other:
            ref, deaf = await early(owner, client, monkeypatch, ttl=None)
            await other.release(ref)
        await until(lambda: owner.statistics().sessions == 1)
        deaf.hears()
        await spent(owner)


@pytest.mark.parametrize("who", ["owner", "client", "another client"])
async def test_a_discard_waits_for_the_publish(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with party(2) as (owner, (client, other)):
        users: dict[str, Any] = {"owner": owner, "client": client, "another client": other}
        ref, deaf = await early(owner, client, monkeypatch, readers=3, ttl=None)
        discarding = asyncio.create_task(users[who].discard(ref))
        await steps(5)
        assert not discarding.done()
        deaf.hears()
        await discarding
        await spent(owner)
        with pytest.raises(StaleRef):
            await other.get(ref)


async def test_an_early_ref_with_a_wrong_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with party(2) as (owner, (client, other)):
        ref, deaf = await early(owner, client, monkeypatch)
        forged = featcache.FeatureRef(
            *(ref.pool_id, ref.endpoint, ref.slot, ref.generation),
            *(ref.offset_bytes + 256, ref.nbytes, ref.specs),
        )
        reading = asyncio.create_task(other.get(forged))
        await steps(5)
        deaf.hears()
        with pytest.raises(MalformedRef):
            await reading
        assert same(await other.get(ref), filled(KIB, 7))
        await nothing_lost(owner)


async def test_a_put_that_its_owner_refuses_ends_stale_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with party(2, readers=4) as (owner, (client, other)):
        await practised(owner, client)
        writer_of(client).connection.readers = 1 << 20  # as if it did not know
        monkeypatch.setattr(client._opened().puts._settings.__class__, "readers", 1 << 20)
        writer = writer_of(client)
        staged = writer.stage(filled(KIB), 1, None)
        request = type(staged.request)(KIB, 5, None)
        ref = await writer.put(
            type(staged)(request, staged.specs, staged.parts, ()), None, wait=True
        )
        monkeypatch.undo()
        with pytest.raises(StaleRef):
            await other.get(ref)
        with pytest.raises(StaleRef, match=Ending.REFUSED.value[:20]):
            await owner.get(ref)
        await nothing_lost(owner)


# --- nobody waits for it ---------------------------------------------------------------------------


async def test_room_ahead_is_everybodys() -> None:
    async with party(2, capacity=MIB, segment=MIB) as (owner, (client, other)):
        await practised(owner, client)
        for put in (owner.put_nowait, owner.put, other.put):
            assert rooms(owner)
            full: Any = put(filled(MIB, 1))
            ref = full if isinstance(full, FeatureRef) else await full
            assert rooms(owner) == 0
            with pytest.raises(PoolFull):
                await client.put(filled(KIB), on_full="raise")
            assert same(await owner.get(ref), filled(MIB, 1))
            await practised(owner, client)
        assert owner.statistics().waited == 0


async def test_room_ahead_evicts_nothing() -> None:
    """As many as fit are kept, whoever has room ahead."""
    async with party(2, capacity=64 * KIB, segment=64 * KIB, slots=128) as (owner, clients):
        for number in range(64):
            await clients[number % 2].put(filled(KIB, number), key=f"{number}")
        assert owner.statistics().keys == 64
        assert owner.statistics().evicted == 0
        await nothing_lost(owner)


async def test_rooms_that_nobody_uses_go_back() -> None:
    async with pair(rooms_idle=0.02) as (owner, client):
        await practised(owner, client)
        await until(lambda: rooms(owner) == 0)
        before = asked(client)
        assert same(await owner.get(await client.put(filled(KIB, 3))), filled(KIB, 3))
        assert asked(client) == before + 1
        await nothing_lost(owner)


async def test_a_client_that_leaves_leaves_no_room_behind() -> None:
    async with pair() as (owner, client):
        await practised(owner, client)
        assert rooms(owner)
        await client.aclose()
        await until(lambda: not rooms(owner))
        assert pool_of(owner).store.allocator.used_bytes == 0


async def test_rooms_do_not_count_as_used() -> None:
    async with pair() as (owner, client):
        await practised(owner, client)
        assert rooms(owner)
        now = owner.statistics()
        assert (now.used_bytes, now.slots_used, now.free_bytes) == (0, 0, now.capacity_bytes)


async def test_a_put_does_not_overtake_an_earlier_one_of_its_client() -> None:
    async with pair(capacity=MIB, segment=MIB) as (owner, client):
        await practised(owner, client)
        first = await owner.put(filled(MIB - 8 * KIB))
        large = asyncio.create_task(client.put(filled(MIB // 2, 1)))
        await steps(1)
        little = asyncio.create_task(client.put(filled(KIB, 2)))
        await queued(owner, 2)
        assert not little.done()
        assert rooms(owner) == 0, "none while somebody waits"
        await owner.release(first)
        for ref in (await large, await little):
            await owner.release(ref)
        await nothing_lost(owner)


# --- claimed and taken back at once ----------------------------------------------------------------


async def test_the_owner_takes_it_back_between_the_claim_and_its_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The owner finds the claim, the session finds the room gone: it gives it up, and asks."""
    async with pair() as (owner, client):
        await practised(owner, client)
        taken: list[bool] = []

        def fence() -> None:
            taken.append(pool_of(owner).ahead.take_back())

        monkeypatch.setattr(writes, "fence_after_lock", fence)
        ref = await client.put(filled(KIB, 4))
        assert taken[0]
        assert same(await owner.get(ref), filled(KIB, 4))
        monkeypatch.undo()
        await until(lambda: not reserved(owner))
        await nothing_lost(owner)


async def test_it_is_claimed_between_the_owners_word_and_its_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (owner, client):
        await practised(owner, client)
        room = writer_of(client)._rooms._rooms[-1]
        attachment = writer_of(client).connection.attachment
        claims: list[bool | None] = []

        def claim() -> None:
            claims.append(attachment.claim(room.slot, room.generation, room.offset_bytes, KIB))

        # The session has looked at `reserved` and is about to store its claim; the owner comes between, and
        # has cleared the word as the claim is stored.
        monkeypatch.setattr(ahead, "fence_full", claim)
        assert pool_of(owner).ahead.take_back()
        assert claims == [None], "it is gone: nothing was claimed"
        assert not page_of(owner).reserved
        monkeypatch.undo()
        await nothing_lost(owner)


async def test_a_claimed_room_stays_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    async with pair(inline_bytes=0, capacity=MIB, segment=MIB) as (owner, client):
        await practised(owner, client)
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "write", gate.wrap(HostMapping.write))
            putting = asyncio.create_task(client.put(filled(KIB, 5)))
            await until(gate.entered.is_set)
        with pytest.raises(PoolFull):
            owner.put_nowait(filled(MIB))
        assert reserved(owner) == 1
        gate.open()
        ref = await putting
        assert same(await owner.get(ref), filled(KIB, 5))
        await nothing_lost(owner)


async def test_an_old_room_does_not_touch_what_its_slot_has_now() -> None:
    """It was taken back, and its slot is the same session's again, written and not yet published."""
    async with pair() as (owner, client):
        await practised(owner, client)
        attachment, old = (
            writer_of(client).connection.attachment,
            writer_of(client)._rooms._rooms[-1],
        )
        pool_of(owner).ahead.take_back()
        attachment._plain.written[old.slot] = old.generation + 1  # as if
        assert attachment.claim(old.slot, old.generation, old.offset_bytes, KIB) is None
        assert attachment._plain.written[old.slot] == old.generation + 1
        assert same(await owner.get(await client.put(filled(KIB, 3))), filled(KIB, 3))
        await nothing_lost(owner)


@pytest.mark.parametrize("seed", range(12))
async def test_nothing_is_lost_and_nobody_starves(seed: int) -> None:
    """Puts of three users of all sizes, some under keys, cancelled, read and discarded, in a small pool."""
    chance = random.Random(seed)
    async with party(2, capacity=32 * KIB, segment=32 * KIB, slots=64, rooms_idle=0.005) as (
        owner,
        clients,
    ):
        users: list[Any] = [owner, *clients]

        async def one(number: int) -> None:
            user, value = chance.choice(users), number % 251
            nbytes = chance.choice((1, 700, 1000, KIB, KIB, 3 * KIB, 9 * KIB))
            key = chance.choice((None, None, None, f"{number % 5}"))
            on_full = chance.choice(("wait", "wait", "raise"))
            put = asyncio.ensure_future(
                user.put(filled(nbytes, value), key=key, readers=1, on_full=on_full, timeout=20)
            )
            if chance.random() < 0.15:
                await steps(chance.randrange(4))
                put.cancel()
            await asyncio.wait([put])
            if put.cancelled() or isinstance(put.exception(), PoolFull):
                return
            ref = put.result()
            await steps(chance.randrange(3))
            if chance.random() < 0.2:
                await chance.choice(users).discard(ref)
                return
            found = tensor(await chance.choice(users).get(ref))
            assert torch.equal(found, filled(nbytes, value))

        for first in range(0, 240, 12):
            await asyncio.gather(*(one(number) for number in range(first, first + 12)))
            store = pool_of(owner).store
            check_books(store.allocator)
            assert store.ahead_bytes == sum(
                s.extent.size_bytes for s in store.ahead.values() if s.extent
            )
            assert not (store.queue.count and store.ahead)
        await nothing_lost(owner)
        await until(lambda: not rooms(owner))
        assert pool_of(owner).store.allocator.used_bytes == 0


# --- the first puts --------------------------------------------------------------------------------


async def test_first_puts_keep_the_order_of_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is called as the slab has just been opened for writing."""
    gate = Gate()
    async with pair(**ONE) as (owner, client):
        first = await owner.put(filled(CAPACITY))
        monkeypatch.setattr(
            HostMapping, "open_for_writing", gate.wrap(HostMapping.open_for_writing)
        )
        tasks = [asyncio.create_task(client.put(filled(100 + n))) for n in range(4)]
        await until(gate.entered.is_set)
        tasks[1].cancel()
        (connection,) = client._opened().registry.connections
        gate.open()
        while not connection.attachment.mapping.writable:  # noqa: ASYNC110 - each turn is looked at
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(client.put(filled(104))))
        await queued(owner, 4)
        waiting: list[Callable[[], int]] = list(pool_of(owner).store.queue._queue.values())  # type: ignore[arg-type]
        assert [waiter.request.nbytes for waiter in waiting] == [100, 102, 103, 104]  # type: ignore[attr-defined]
        await owner.release(first)
        for task in (tasks[0], *tasks[2:]):
            await owner.release(await task)
        await nothing_lost(owner)
