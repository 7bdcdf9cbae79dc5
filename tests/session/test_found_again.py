"""Keys that were found before: the word of their place says whether they are there still."""

import asyncio
from typing import Any

import pytest

from featcache import FeatureCache, FeatureClient, KeyNotFound
from featcache.session import hits
from featcache.session.hits import KeyHits
from support.caches import filled, pair, tensor
from support.keyed import nothing_lost
from support.slabs import same

pytestmark = pytest.mark.usefixtures("no_leaks")

User = FeatureCache | FeatureClient
WHO = pytest.mark.parametrize("who", ["owner", "client"])
OLD, NEW = filled(64, 1), filled(128, 2)


def hits_of(user: User) -> KeyHits:
    found: KeyHits | None = user._opened().keys.hits
    assert found is not None, "it has read"
    return found


async def borrowed(user: User, key: str | bytes) -> Any:
    async with user.borrow(key) as view:
        return tensor(view).clone()


async def all_ways(user: User, key: str | bytes) -> list[Any]:
    with user.borrow(key) as view:
        lent = tensor(view).clone()
    return [
        await user.get(key),
        user.get_nowait(key),
        await borrowed(user, key),
        lent,
        await user.get_or_put(key, lambda: pytest.fail("it is there")),
    ]


@WHO
async def test_a_key_that_was_overwritten_is_found_anew_though_the_old_feature_is_still_owed(
    who: str,
) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        ref = await owner.put(OLD, key="a", readers=1)  # its slot stays live: a read is owed
        assert all(same(found, OLD) for found in await all_ways(user, "a"))
        await owner.put(NEW, key="a")
        assert all(same(found, NEW) for found in await all_ways(user, "a"))
        assert same(await both[1].get(ref), OLD)
        await nothing_lost(owner)


@WHO
async def test_a_key_that_was_evicted_is_not_there_though_its_feature_is_still_owed(
    who: str,
) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        ref = await owner.put(OLD, key="a", readers=1)
        await all_ways(user, "a")
        assert await user.contains("a")
        await owner.evict("a")
        assert not await user.contains("a")
        assert user.contains_nowait("a") is False
        with pytest.raises(KeyNotFound):
            await user.get("a")
        with pytest.raises(KeyNotFound):
            user.get_nowait("a")
        with pytest.raises(KeyNotFound):
            await borrowed(user, "a")
        # Another key that takes the entry, and maybe the slot, is not mistaken for it.
        await owner.put(NEW, key="b")
        assert user.contains_nowait("a") is False
        await owner.put(NEW, key="a")
        assert all(same(found, NEW) for found in await all_ways(user, "a"))
        assert same(await both[1].get(ref), OLD)


@WHO
async def test_a_slot_that_is_used_again_is_not_the_old_keys(who: str) -> None:
    async with pair(slots=2) as both:
        owner, user = both[0], both[who == "client"]
        for turn in range(20):
            key = f"k{turn}"
            await owner.put(filled(64, turn), key=key)
            assert all(same(found, filled(64, turn)) for found in await all_ways(user, key))
            await owner.evict(key)
            assert user.contains_nowait(key) is False
        await nothing_lost(owner)


@WHO
async def test_a_key_is_the_same_as_text_and_as_bytes(who: str) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(OLD, key="ä")
        for _ in range(2):
            for key in ("ä", "ä".encode()):
                assert all(same(found, OLD) for found in await all_ways(user, key))
                assert user.contains_nowait(key)
        await nothing_lost(owner)


class Text(str):
    """A str that can't be looked up in a dict."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]


@WHO
async def test_a_key_of_a_subclass_is_found_by_what_it_says(who: str) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(OLD, key=Text("a"))
        assert all(same(found, OLD) for found in await all_ways(user, Text("a")))
        assert await user.contains(Text("a"))
        assert user.contains_nowait(Text("a"))


@WHO
async def test_what_is_remembered_is_bounded(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hits, "_MAX_FOUND", 4)
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        for number in range(12):
            await owner.put(filled(16, number), key=f"k{number}")
        for _ in range(2):
            for number in range(12):
                assert same(await user.get(f"k{number}"), filled(16, number))
                assert user.contains_nowait(f"k{number}")
                assert len(hits_of(user)._found) <= 4
        long = "x" * 1024
        await owner.put(OLD, key=long)
        for _ in range(2):
            assert all(same(found, OLD) for found in await all_ways(user, long))
        assert long not in hits_of(user)._found
        await nothing_lost(owner)


@WHO
@pytest.mark.parametrize("call", ["get", "borrow", "contains", "get_or_put"])
async def test_hits_that_wait_for_nothing_let_others_run(who: str, call: str) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(OLD, key="a")
        await all_ways(user, "a")
        others: list[int] = []
        asyncio.get_running_loop().call_soon(others.append, 1)
        for _ in range(100_000):
            if others:
                break
            if call == "get":
                await user.get("a")
            elif call == "borrow":
                await borrowed(user, "a")
            elif call == "contains":
                await user.contains("a")
            else:
                await user.get_or_put("a", lambda: pytest.fail("it is there"))
        assert others


async def test_a_copy_that_fails_ends_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as (owner, client):
        await owner.put(OLD, key="a")
        await all_ways(client, "a")
        attachment = hits_of(client)._attachment

        def broken(*_: object) -> None:
            raise MemoryError("no room")

        for step in ("order", "fetch"):
            with monkeypatch.context() as patched:
                patched.setattr(attachment.mapping, step, broken)
                for _ in range(3):
                    with pytest.raises(MemoryError):
                        await client.get("a")
                    with pytest.raises(MemoryError):
                        client.get_nowait("a")
        assert attachment.holds == 0
        assert same(await client.get("a"), OLD)
        await nothing_lost(owner)
