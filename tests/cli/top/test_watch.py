"""Looking again and again: how often, at what, and at an owner that stops, dies or comes back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

import featcache
from cli.top.fakes import Clock, FakeOwner
from cli.top.records import MIB
from featcache import AttachRefused, OwnerUnreachable
from featcache.cli.top.model import Model
from featcache.cli.top.watch import Watch
from support.caches import KIB, filled, small, until

CELLS = 240


@contextlib.asynccontextmanager
async def watching(model: Model) -> AsyncIterator[Watch]:
    watch = Watch(model, lambda: CELLS, lambda: None)
    task = asyncio.ensure_future(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_refresh_is_one_look_and_the_next_begins_after_it(owner: FakeOwner) -> None:
    async with watching(Model("x", interval_s=0.1)):
        await until(lambda: len(owner.asked) >= 6)
    assert owner.asked[:6] == ["snapshot", "map"] * 3
    assert owner.most_asking == 1


async def test_no_second_look_begins_while_the_first_has_no_answer(
    owner: FakeOwner, clock: Clock
) -> None:
    model = Model("x", interval_s=0.1)
    async with watching(model):
        await until(lambda: model.slab is not None)
        owner.answers.clear()
        asked = len(owner.asked)
        await until(lambda: len(owner.asked) == asked + 1)
        clock.ahead_s = 100.0
        assert model.status(clock())[0] == "no answer for 100 s"
        assert len(owner.asked) == asked + 1
        owner.answers.set()
        await until(lambda: len(owner.asked) > asked + 1)
        assert model.silent_s(clock()) == 0.0


async def test_a_frozen_frame_asks_for_nothing(owner: FakeOwner, clock: Clock) -> None:
    model = Model("x", interval_s=3600.0)
    async with watching(model) as watch:
        await until(lambda: model.slab is not None and model.asked_s is None)
        model.frozen = True
        clock.ahead_s = 7200.0
        watch.wake()
        for _ in range(20):
            await asyncio.sleep(0)
        assert owner.asked == ["snapshot", "map"]
        model.frozen = False
        watch.wake()
        await until(lambda: len(owner.asked) == 4)


async def test_keys_are_asked_for_only_while_they_are_shown_and_in_their_order(
    owner: FakeOwner, clock: Clock
) -> None:
    model = Model("x", interval_s=3600.0)
    async with watching(model) as watch:
        await until(lambda: model.slab is not None and model.asked_s is None)
        model.choose("keys")
        model.sort("hits")
        clock.ahead_s = 1.0
        watch.wake()
        await until(lambda: model.keys is not None)
        assert owner.asked[2:4] == ["snapshot", "keys by hits"]
        assert await watch.evict(b"k")
    assert owner.evicted == [b"k"]


async def test_an_owner_that_answers_late_is_asked_for_no_map_till_it_is_quick_again(
    owner: FakeOwner, clock: Clock
) -> None:
    def take_long(_: str) -> None:
        if owner.asked[-2:] == ["map", "snapshot"]:
            clock.ahead_s += 5.0

    owner.before_answer = take_long
    async with watching(Model("x", interval_s=0.1)):
        await until(lambda: len(owner.asked) >= 7)
    assert owner.asked[:7] == [
        "snapshot",
        "map",
        "snapshot",
        "snapshot",
        "map",
        "snapshot",
        "snapshot",
    ]


async def test_a_map_is_asked_for_at_last_however_late_answers_are(
    owner: FakeOwner, clock: Clock
) -> None:
    def take_long(what: str) -> None:
        clock.ahead_s += 10.0 * (what == "snapshot")

    owner.before_answer = take_long
    async with watching(Model("x", interval_s=0.1)):
        await until(lambda: len(owner.asked) >= 7)
    assert owner.asked[:7] == [
        "snapshot",
        "map",
        "snapshot",
        "snapshot",
        "snapshot",
        "map",
        "snapshot",
    ]


async def test_an_owner_that_comes_back_is_looked_at_again(owner: FakeOwner, clock: Clock) -> None:
    model = Model("x", interval_s=0.01)
    async with watching(model) as watch:
        await until(lambda: model.slab is not None)
        owner.dies()
        await until(lambda: model.link == "lost")
        before = len(model.history.samples)
        await until(lambda: len(model.history.samples) > before + 2)
        assert model.why == "its process died", "not that nobody listens, which follows from it"
        with pytest.raises(featcache.OwnerLost):
            await watch.evict(b"k")
        owner.comes_back()
        await until(lambda: model.link == "up")
    assert owner.opened == owner.closed == 2


@pytest.mark.parametrize("error", [OwnerUnreachable, AttachRefused])
async def test_an_owner_that_was_never_there_ends_it(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    class Nobody:
        async def open(self) -> None:
            raise error("nobody")

    monkeypatch.setattr(featcache, "observe", lambda *_, **__: Nobody())
    with pytest.raises(error):
        await Watch(Model("x"), lambda: CELLS, lambda: None).run()


async def test_a_real_pool_is_seen_as_it_is() -> None:
    async with (
        featcache.create(settings=small()) as owner,
        featcache.connect(owner.endpoint, name="r", settings=small()) as client,
    ):
        await owner.put(filled(64 * KIB), readers=["r"])
        await owner.put(filled(32 * KIB), key="k")
        model = Model(owner.endpoint, interval_s=0.1, view="keys")
        async with watching(model) as watch:
            await until(lambda: model.keys is not None)
            assert client.is_open
            assert model.snapshot is not None
            assert [one.name for one in model.snapshot.sessions] == ["r"]
            assert model.slab is not None
            assert set(model.slab.states) >= {"o", "k"}
            assert model.slab.capacity_bytes == MIB
            assert model.chosen_key is not None
            assert await watch.evict(model.chosen_key.key)
            assert not await owner.contains("k")
