"""Keys that are not in the pool, and that a source has."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch

import featcache
from featcache import FeatureCache, FeatureClient, KeyNotFound, KeyTimeout, events
from featcache.errors import OwnerLost
from support.caches import KIB, filled, small, tensor, until


class Shelf:
    """A source that has what a test lays there, and counts what it is asked."""

    name = "a shelf"

    def __init__(self, owner: FeatureCache) -> None:
        self.features: dict[bytes, torch.Tensor] = {}
        self.asked: list[bytes] = []
        self.open = asyncio.Event()
        self.open.set()
        self.broken = False
        self._owner = owner

    async def bring(self, key: bytes) -> bool:
        self.asked.append(key)
        await self.open.wait()
        if self.broken:
            raise OwnerLost("the shelf fell")
        if key not in self.features:
            return False
        await self._owner.put(self.features[key], key=key)
        return True

    async def holds(self, keys: Sequence[bytes]) -> Sequence[bool]:
        if self.broken:
            raise OwnerLost("the shelf fell")
        return [key in self.features for key in keys]


class Scene:
    def __init__(self, owner: FeatureCache, client: FeatureClient, shelf: Shelf) -> None:
        self.owner, self.client, self.shelf = owner, client, shelf


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with (
        featcache.create(settings=small()) as owner,
        featcache.connect(owner.endpoint) as client,
    ):
        shelf = Shelf(owner)
        owner._opened().main.sources.add(shelf)
        shelf.features[b"there"] = filled(KIB, 7)
        yield Scene(owner, client, shelf)


def one_of(scene: Scene, which: str) -> Any:
    return scene.owner if which == "owner" else scene.client


@pytest.mark.parametrize("which", ["owner", "client"])
async def test_every_lookup_finds_what_a_source_has(scene: Scene, which: str) -> None:
    cache, shelf = one_of(scene, which), scene.shelf
    shelf.features |= {b"%d" % n: filled(KIB, n) for n in range(6)}
    assert int(tensor(await cache.get("0"))[0]) == 0
    assert int(tensor(await cache.get("1", timeout=5))[1]) == 1
    async with cache.borrow("2") as view:
        assert int(tensor(view)[0]) == 2
    found = await cache.get_many(["3", "0", "3"])
    assert [int(tensor(each)[0]) for each in found] == [3, 0, 3]
    ref = await cache.share("4", readers=1)
    assert int(tensor(await cache.get(ref))[0]) == 4
    made = await cache.get_or_put("5", lambda: pytest.fail("it is there"))
    assert int(tensor(made)[0]) == 5
    assert sorted(shelf.asked) == [b"0", b"1", b"2", b"3", b"4", b"5"]


@pytest.mark.parametrize("which", ["owner", "client"])
async def test_what_no_source_has_is_not_there(scene: Scene, which: str) -> None:
    cache = one_of(scene, which)
    await cache.put(filled(KIB), key="here")
    with pytest.raises(KeyNotFound):
        await cache.get("nowhere")
    with pytest.raises(KeyTimeout):
        await cache.get("nowhere", timeout=0.02)
    with pytest.raises(KeyTimeout):
        await cache.get("nowhere", timeout=0)
    with pytest.raises(KeyNotFound):
        await cache.share("nowhere", readers=1)
    with pytest.raises(KeyNotFound):
        await cache.get_many(["here", "nowhere"])
    assert int(tensor(await cache.get_or_put("nowhere", lambda: filled(KIB, 3)))[0]) == 3


@pytest.mark.parametrize("which", ["owner", "client"])
async def test_contains_asks_and_brings_nothing(scene: Scene, which: str) -> None:
    cache = one_of(scene, which)
    await cache.put(filled(KIB), key="here")
    assert [await cache.contains(key) for key in ("here", "there", "nowhere")] == [
        True,
        True,
        False,
    ]
    assert await cache.contains_many(["nowhere", "there", "here"]) == [False, True, True]
    assert scene.owner.statistics().keys == 1


@pytest.mark.parametrize("which", ["owner", "client"])
async def test_calls_without_an_await_ask_no_source(scene: Scene, which: str) -> None:
    cache = one_of(scene, which)
    await cache.put(filled(KIB, 1), key="here")
    await cache.get("here")
    assert cache.contains_nowait("here")
    assert cache.contains_nowait("there") is None
    with pytest.raises(featcache.GetTimeout):
        cache.get_nowait("there")
    assert not scene.shelf.asked


async def test_of_all_that_miss_a_key_one_asks(scene: Scene) -> None:
    scene.shelf.open.clear()
    calls = [
        *(cache.get("there") for cache in (scene.owner, scene.client) for _ in range(3)),
        *(cache.get_or_put("there", lambda: pytest.fail("made")) for cache in [scene.client] * 3),
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await until(lambda: bool(scene.shelf.asked))
    scene.shelf.open.set()
    assert all(int(tensor(each)[0]) == 7 for each in await asyncio.gather(*tasks))
    assert scene.shelf.asked == [b"there"]


async def test_a_cancelled_maker_passes_the_asking_on(scene: Scene) -> None:
    scene.shelf.open.clear()
    first = asyncio.ensure_future(scene.client.get_or_put("k", lambda: filled(KIB, 1)))
    await until(lambda: bool(scene.shelf.asked))
    second = asyncio.ensure_future(scene.owner.get_or_put("k", lambda: filled(KIB, 2)))
    first.cancel()
    await until(lambda: len(scene.shelf.asked) == 2)
    scene.shelf.open.set()
    assert int(tensor(await second)[0]) == 2
    assert not scene.owner._opened().pool.store.key_waiters.claims


async def test_a_source_that_fails_has_nothing_and_is_told_of(scene: Scene) -> None:
    told: list[events.Event] = []
    events.add_hook(told.append)
    scene.shelf.broken = True
    try:
        with pytest.raises(KeyNotFound):
            await scene.client.get("there")
        assert not await scene.client.contains("there")
        assert int(tensor(await scene.client.get_or_put("there", lambda: filled(9, 9)))[0]) == 9
    finally:
        events.remove_hook(told.append)
    failed = [each for each in told if isinstance(each, events.KeySourceFailed)]
    assert failed[0].source == "a shelf"
    assert "fell" in failed[0].reason


async def test_a_close_ends_what_is_asked() -> None:
    async with featcache.create(settings=small()) as owner:
        shelf = Shelf(owner)
        owner._opened().main.sources.add(shelf)
        shelf.open.clear()
        getting = asyncio.ensure_future(owner.get("there"))
        await until(lambda: bool(shelf.asked))
    with pytest.raises(featcache.CacheClosed):
        await getting
