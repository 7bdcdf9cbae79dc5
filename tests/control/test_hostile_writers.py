"""Writers that break the rules: publishes that are refused, refs that they forge, counts they make up."""

import asyncio
import contextlib
from typing import Any

import pytest

import featcache
from client.test_rooms_ahead import Deaf, practised, rooms, writer_of
from featcache import FeatureCache, FeatureClient, FeatureRef, PoolFull, StaleRef
from featcache.core.endings import Ending
from featcache.core.slots import SlotState
from featcache.memory.words import Counts
from featcache.pool.page import SessionPage
from support.caches import KIB, filled, pair, small, steps, until
from support.keyed import nothing_lost, page_of, party, pool_of
from support.slabs import same

FEW_READERS: dict[str, Any] = {"readers": 4, "slots": 32}
_MOST = (1 << 64) - 1


def attachment_of(client: FeatureClient) -> Any:
    (connection,) = client._opened().registry.connections
    return connection.attachment


async def too_many_readers(client: FeatureClient) -> FeatureRef:
    """Put what the owner refuses: its client was told of no bound."""
    writer = writer_of(client)
    staged = writer.stage(filled(KIB, 1), 1, None)
    request = type(staged.request)(KIB, FEW_READERS["readers"] + 1, None)
    return await writer.put(type(staged)(request, staged.specs, staged.parts, ()), None, wait=True)


def overlaps(one: FeatureRef, other: FeatureRef) -> bool:
    return (
        one.offset_bytes < other.offset_bytes + other.nbytes
        and other.offset_bytes < one.offset_bytes + one.nbytes
    )


def fill(owner: FeatureCache) -> list[FeatureRef]:
    """Put until there is no room."""
    refs = []
    with contextlib.suppress(PoolFull):
        while True:
            refs.append(owner.put_nowait(filled(KIB, 2), ttl=None))
    return refs


@pytest.mark.parametrize("who", ["another client", "owner"])
async def test_a_refused_publish_is_no_ones_room_while_a_reader_holds_it(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ref was out before it was refused: a reader that was faster has pinned it."""
    async with party(2, **FEW_READERS) as (owner, (client, other)):
        await practised(owner, client)
        if who == "owner":
            await owner.release(await owner.put(filled(KIB)))
            attachment: Any = owner._opened().main.own.attach()
        else:
            await other.release(await owner.put(filled(KIB)))
            attachment = attachment_of(other)
        deaf = Deaf(owner, monkeypatch)
        ref = await too_many_readers(client)
        assert not attachment.pin(ref), "its bytes are not there for anybody yet"
        deaf.hears()
        slot = pool_of(owner).store.table.slots[ref.slot]
        await until(lambda: slot.state is SlotState.RETIRING)
        others = fill(owner)
        assert others
        assert not any(overlaps(ref, each) or each.slot == ref.slot for each in others)
        with pytest.raises(StaleRef, match=Ending.REFUSED.value[:20]):
            attachment.check_coming(ref)
        attachment.unpin(ref, pays=False)
        pool_of(owner).collect()
        assert any(overlaps(ref, each) for each in fill(owner)), "nobody holds it any more"
        for each in list(pool_of(owner).store.owing.values()):
            pool_of(owner).apply(pool_of(owner).store.revoke(each.index, each.generation, 0.0))
        await nothing_lost(owner)


# --- forged refs -----------------------------------------------------------------------------------


def forged(owner: FeatureCache, client: FeatureClient) -> FeatureRef:
    """A ref of room that was given ahead and that nobody has claimed."""
    room, staged = (
        writer_of(client)._rooms._rooms[-1],
        writer_of(client).stage(filled(KIB), 1, None),
    )
    connection = writer_of(client).connection
    place = room.slot, room.generation, room.offset_bytes, KIB
    return FeatureRef(connection.attachment.pool_id, owner.endpoint, *place, staged.specs)


async def test_a_ref_of_room_that_nobody_has_claimed_is_stale_to_the_owner() -> None:
    """It knows that no put is on its way there, and does not wait."""
    async with pair(rooms_idle=60.0) as (owner, client):
        await practised(owner, client)
        ref = forged(owner, client)
        for read in (owner.get(ref), owner.get(ref, timeout=60.0)):
            with pytest.raises(StaleRef):
                await asyncio.wait_for(read, 5.0)
        with pytest.raises(StaleRef):
            owner.get_nowait(ref)
        assert rooms(owner)
        assert same(await owner.get(await client.put(filled(KIB, 5))), filled(KIB, 5))
        await nothing_lost(owner)


async def test_to_a_client_it_is_stale_as_soon_as_the_room_goes_back() -> None:
    async with party(2, rooms_idle=0.05) as (owner, (client, other)):
        await practised(owner, client)
        reading = asyncio.create_task(other.get(forged(owner, client)))
        await steps(2)
        with pytest.raises(StaleRef):
            await asyncio.wait_for(reading, 10.0)
        await nothing_lost(owner)


# --- counts ----------------------------------------------------------------------------------------


def _plausible(now: featcache.Statistics) -> bool:
    return 0 <= now.hits < 1 << 40 and 0 <= now.misses < 1 << 40 and 0 <= now.reads_paid < 1 << 40


@pytest.mark.parametrize("serial", [_MOST, 1 << 63, 0])
@pytest.mark.parametrize("missed", [_MOST, 0])
@pytest.mark.parametrize("revoked", [_MOST, 0])
async def test_made_up_counts_do_not_make_the_owners_absurd(
    serial: int, missed: int, revoked: int
) -> None:
    """Neither while the session lives nor in what is folded as it ends."""
    async with pair() as (owner, client):
        await owner.put(filled(KIB), key="a")
        for _ in range(3):
            await client.get("a")
        before = owner.statistics()
        async with featcache.connect(owner.endpoint, settings=small()) as liar:
            await liar.get("a")
            words = page_of(owner, 2).words
            words.serial[0] = words.ended[0] = serial
            words.header[Counts.LEASES_HIGH] = max(1, missed)
            words.header[Counts.MISSES], words.header[Counts.REVOKED] = missed, revoked
            now = owner.statistics()
            assert _plausible(now)
            assert now.hits >= before.hits
        await until(lambda: owner.statistics().sessions == 1)
        after = owner.statistics()
        assert _plausible(after)
        assert after.misses >= before.misses
        assert await client.get("a") is not None
        assert owner.statistics().hits > before.hits


async def test_what_a_session_counted_does_not_go_back_by_its_word() -> None:
    async with pair() as (owner, client):
        await owner.put(filled(KIB), key="a")
        assert not await client.contains("b")
        with pytest.raises(featcache.KeyNotFound):
            await client.get("b")
        page: SessionPage = page_of(owner)
        assert page.own_lookups == (0, 1)
        page.words.header[Counts.MISSES] = 0
        assert page.own_lookups == (0, 1)
        page.words.header[Counts.MISSES] = 7
        assert page.own_lookups == (0, 7)
