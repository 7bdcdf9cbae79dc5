"""Hits by key: a session finds, leases and ends by itself; what it can't tell it asks the owner."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

import featcache
from featcache import FeatureCache, FeatureClient, GetTimeout, KeyNotFound, PoolFull
from featcache.control.channel import Channel
from featcache.memory.words import Counts, SessionWords
from support.caches import filled, pair, small, steps, tensor, until
from support.keyed import grants, nothing_lost, page_of, pool_of
from support.slabs import same

pytestmark = pytest.mark.usefixtures("no_leaks")

BASE = filled(64, 7)
LONG = {f"a tensor with a long name, {number}": filled(1, number) for number in range(16)}
"""A feature whose ref has no room in a record."""
User = FeatureCache | FeatureClient
WHO = pytest.mark.parametrize("who", ["owner", "client"])


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every message that either side sends."""
    messages: list[bytes] = []
    send = Channel.send

    def sending(channel: Channel, payload: bytes, descriptors: Any = ()) -> None:
        messages.append(payload)
        send(channel, payload, descriptors)

    monkeypatch.setattr(Channel, "send", sending)
    return messages


def is_long(found: Any) -> bool:
    return isinstance(found, dict) and all(same(found[name], LONG[name]) for name in LONG)


async def borrowed(user: User, key: str) -> Any:
    async with user.borrow(key) as view:
        return view if isinstance(view, dict) else view.clone()


def borrowed_now(user: User, key: str) -> Any:
    with user.borrow(key) as view:
        return tensor(view).clone()


@WHO
async def test_a_hit_sends_nothing(who: str, sent: list[bytes]) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(BASE, key="a")
        await user.get("a")  # a client attaches
        sent.clear()
        assert await user.contains("a")
        assert user.contains_nowait("a")
        for found in (
            await user.get("a"),
            user.get_nowait("a"),
            await borrowed(user, "a"),
            borrowed_now(user, "a"),
            await user.get_or_put("a", lambda: pytest.fail("it is there")),
        ):
            assert same(found, BASE)
        with pytest.raises(KeyNotFound):
            await user.get("b")
        with pytest.raises(KeyNotFound):
            user.get_nowait("b")
        assert not await user.contains("b")
        assert user.contains_nowait("b") is False
        assert not sent
        now = owner.statistics()
        assert (now.hits, now.misses, now.reads_paid) == (6, 2, 6)
        await nothing_lost(owner)


@WHO
async def test_what_a_session_can_not_tell_the_owner_does(who: str) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(LONG, key="long")
        assert await user.contains("long")
        for found in (await user.get("long"), await user.get_or_put("long", dict)):
            assert is_long(found)
        async with user.borrow("long") as view:
            assert is_long(view)
            pool_of(owner).collect()  # what was paid before is out no more
            assert grants(owner) == 1
        with pytest.raises(GetTimeout, match="owner"):
            user.get_nowait("long")
        with pytest.raises(GetTimeout, match="owner"):
            borrowed_now(user, "long")
        await until(lambda: grants(owner) == 0)
        assert (owner.statistics().hits, owner.statistics().misses) == (3, 0)
        await nothing_lost(owner)


@WHO
async def test_leases_and_grants_have_one_bound(who: str) -> None:
    async with pair(grants=3) as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(BASE, key="a")
        await owner.put(LONG, key="long")
        borrows = [user.borrow(key) for key in ("long", "a", "a")]
        for borrow in borrows:
            await borrow.__aenter__()
        for key in ("a", "long"):
            with pytest.raises(PoolFull, match="3 reads by key"):
                await user.get(key)
        with pytest.raises(GetTimeout):
            await asyncio.to_thread(user.get_nowait, "long")
        borrows.pop().close()
        assert same(await user.get("a"), BASE)
        for borrow in borrows:
            borrow.close()
        await until(lambda: grants(owner) == 0)
        assert is_long(await user.get("long"))
        await nothing_lost(owner)


@WHO
@pytest.mark.parametrize("how", ["evict", "overwrite"])
async def test_what_is_leased_is_recycled_as_its_last_read_ends(who: str, how: str) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(BASE, key="a")
        borrows = [user.borrow("a") for _ in range(3)]
        views = [tensor(await borrow.__aenter__()) for borrow in borrows]
        if how == "evict":
            assert await owner.evict("a")
        else:
            await owner.put(filled(64, 9), key="a")
            assert same(await user.get("a"), filled(64, 9))
            assert await owner.evict("a")
        assert not user.contains_nowait("a")
        await until(lambda: owner.statistics().slots_used == 1)
        for borrow, view in zip(borrows, views, strict=True):
            assert owner.statistics().slots_used == 1
            assert same(view, BASE)
            borrow.close()
        await until(lambda: owner.statistics().slots_used == 0)
        await nothing_lost(owner)


async def test_a_closed_session_has_no_leases() -> None:
    async with pair() as (owner, _):
        await owner.put(BASE, key="a")
        other = await featcache.connect(owner.endpoint, settings=small()).open()
        borrow = other.borrow("a")
        await borrow.__aenter__()
        closing = asyncio.create_task(other.aclose())
        await steps(5)
        assert grants(owner) == 1, "it reads on: its goodbye waits for that"
        borrow.close()
        await closing
        await until(lambda: owner.statistics().sessions == 1)
        assert (owner.statistics().hits, owner.statistics().reads_paid) == (1, 1)
        await nothing_lost(owner)


async def test_hits_from_many_threads_are_counted_exactly() -> None:
    async with pair() as both:
        owner, client = both
        for number in range(8):
            await owner.put(filled(64, number), key=f"{number}")
        await client.get("0")
        await owner.get("0")

        def read(user: User) -> None:
            for number in range(400):
                assert same(user.get_nowait(f"{number % 8}"), filled(64, number % 8))

        await asyncio.gather(*(asyncio.to_thread(read, user) for user in both for _ in range(3)))
        now = owner.statistics()
        assert (now.hits, now.misses, now.reads_paid) == (2402, 0, 2402)
        await nothing_lost(owner)


def put_words(words: memoryview, value: int) -> None:
    for index in range(len(words)):
        words[index] = value


def all_in_use(page: SessionWords) -> None:
    page.header[Counts.LEASES_HIGH] = len(page.serial)
    put_words(page.serial, 1 << 63)


def a_mark_far_beyond(page: SessionWords) -> None:
    page.header[Counts.LEASES_HIGH] = 1 << 60


def more_revoked_than_taken(page: SessionWords) -> None:
    page.header[Counts.REVOKED] = 1 << 60


def uses_in_the_future(page: SessionWords) -> None:
    put_words(page.used, (1 << 64) - 1)


@pytest.mark.parametrize(
    "forge", [all_in_use, a_mark_far_beyond, more_revoked_than_taken, uses_in_the_future]
)
async def test_an_owner_trusts_no_word_of_a_page(forge: Callable[[SessionWords], None]) -> None:
    """A session that lies keeps what it says that it reads, for as long as it lives, and nothing else."""
    async with pair() as (owner, client):
        await owner.put(BASE, key="a")
        liar = await featcache.connect(owner.endpoint, settings=small()).open()
        await liar.get("a")
        forge(page_of(owner, 2).words)
        assert same(await client.get("a"), BASE)
        assert owner.statistics().hits >= 1
        await owner.put(filled(64, 2), key="b")
        assert await owner.evict("a")
        pool_of(owner).collect()
        await liar.aclose()
        await until(lambda: owner.statistics().sessions == 1)
        await nothing_lost(owner)


async def test_a_read_of_bytes_that_are_late_waits_under_its_lease() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(BASE, key="a")
        published = pool_of(owner).words.published
        published[ref.slot] = 0
        with pytest.raises(GetTimeout, match="way"):
            client.get_nowait("a")
        with pytest.raises(GetTimeout, match="way"):
            borrowed_now(client, "a")
        assert grants(owner) == 0
        waiting = asyncio.create_task(client.get("a"))
        await until(lambda: grants(owner) == 1)
        published[ref.slot] = ref.generation
        assert same(await waiting, BASE)
        await nothing_lost(owner)


async def test_a_pool_that_is_not_attached_yet() -> None:
    async with featcache.create(settings=small()) as owner:
        await owner.put(BASE, key="a")
        async with featcache.connect(owner.endpoint, settings=small()) as client:
            assert same(client.get_nowait("a"), BASE), "a bound client attaches as it opens"
        async with featcache.connect(settings=small()) as unbound:
            with pytest.raises(featcache.SettingsError, match="connect"):
                unbound.get_nowait("a")
            assert unbound.contains_nowait("a") is None
        assert torch.equal(tensor(owner.get_nowait("a")), BASE)


async def test_a_pool_whose_owner_is_gone() -> None:
    owner = await featcache.create(settings=small()).open()
    async with featcache.connect(owner.endpoint, settings=small()) as client:
        await owner.put(BASE, key="a")
        assert client.contains_nowait("a")
        await owner.aclose()
        with pytest.raises(featcache.OwnerLost):
            await client.get("b", timeout=100)
        for call in (client.contains_nowait, client.get_nowait):
            with pytest.raises(featcache.OwnerLost):
                call("a")
