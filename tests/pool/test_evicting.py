"""What goes to make room, when, and what stays; what the pool says of it."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

import featcache
from featcache import (
    FeatureCache,
    FeatureClient,
    FeatureRef,
    KeyNotFound,
    PoolFull,
    PressureLevel,
    PutTimeout,
    SettingsError,
)
from featcache.core.put_queue import Request
from featcache.pool.recycler import Recycler
from support.caches import KIB, MIB, filled, pair, slab_allocated, steps, tensor, until
from support.keyed import CAPACITY, ONE, User, grants, nothing_lost, party, pool_of, queued, ref_of
from support.slabs import Slab, same

Logs = list[MutableMapping[str, Any]]
SIZE = 8 * KIB
PLACES = CAPACITY // SIZE
"""Features of `SIZE` that fill a pool of `CAPACITY`."""
KEYS = [f"{number}" for number in range(PLACES)]


async def keys_of(user: User, *candidates: str) -> list[str]:
    """Which of these are kept: looked at, not used."""
    return [key for key in candidates if await user.contains(key)]


async def fill(user: User, keys: list[str] = KEYS) -> None:
    for number, key in enumerate(keys):
        await user.put(filled(SIZE, number), key=key)


def evictions(logs: Logs, cause: str) -> list[str]:
    """Keys that were dropped for this cause, in order."""
    return [
        entry["key"]
        for entry in logs
        if entry["event"] == "featcache.key.evicted" and entry["cause"] == cause
    ]


# --- the order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("putter", ["owner", "client"])
async def test_the_longest_unused_goes_first(putter: str) -> None:
    """A get, a borrow, a find of get_or_put and a put are uses; a look, a pin and a read by ref none."""
    async with party(2, **ONE) as (owner, (one, two)):
        user: User = owner if putter == "owner" else one
        keys = KEYS[:-1]  # a put under a key that is there takes room of its own first
        await fill(user, keys)

        async def put_again(key: str) -> FeatureRef:
            ref = await user.put(filled(SIZE, 99), key=key)
            await until(lambda: owner.statistics().slots_used == len(keys))
            return ref

        ref = await put_again("6")
        await one.get("0")
        async with two.borrow("1"):
            pass
        await two.get_or_put("2", lambda: filled(1))
        await put_again("3")
        await owner.contains("4")
        await one.pin("5")
        await one.unpin("5")
        await two.get(ref)
        await owner.get("4")
        await user.put(filled(SIZE), key="the last room")
        order = ["5", "6", "0", "1", "2", "3", "4"]
        for number, gone in enumerate(order):
            await user.put(filled(SIZE), key=f"new {number}")
            assert await keys_of(two, *order) == order[number + 1 :], gone
        assert owner.statistics().waited == 0
        await nothing_lost(owner)


async def test_the_order_is_as_a_list_by_hand_has_it() -> None:
    """A random trace of gets, puts, evictions and pins against an LRU of a few lines."""
    rng = random.Random(4)
    async with party(2, **ONE) as (owner, (one, two)):
        users: list[User] = [owner, one, two]
        by_hand: list[str] = []
        pinned: set[str] = set()
        for _ in range(600):
            user, key = rng.choice(users), f"{rng.randrange(3 * PLACES)}"
            what = rng.random()
            if what < 0.1:
                assert await user.evict(key) == (key in by_hand)
                pinned.discard(key)
                by_hand = [known for known in by_hand if known != key]
                # Its room is free after the grace of who may be about to read it.
                await until(lambda: owner.statistics().slots_used == len(by_hand))  # noqa: B023 - awaited here
            elif what < 0.2 and key in by_hand and (key in pinned or len(pinned) < 3):
                await (user.unpin(key) if key in pinned else user.pin(key))
                pinned ^= {key}
            elif key in by_hand:
                assert tensor(await user.get(key))[0] == int(key)
                by_hand = [known for known in by_hand if known != key] + [key]
            else:
                with pytest.raises(KeyNotFound):
                    await user.get(key)
                await user.put(filled(SIZE, int(key)), key=key)
                if len(by_hand) == PLACES:
                    by_hand.remove(next(known for known in by_hand if known not in pinned))
                by_hand.append(key)
            assert {key.decode() for key in pool_of(owner).store.directory} == set(by_hand)
        assert owner.statistics().waited == 0
        await nothing_lost(owner)


async def test_only_as_many_go_as_are_needed() -> None:
    async with pair(**ONE) as (owner, client):
        await fill(owner)
        await client.put(filled(3 * SIZE - 1), key="large")
        assert await keys_of(owner, *KEYS) == KEYS[3:]
        assert owner.statistics().evicted == 3
        await client.put(filled(CAPACITY), key="all")
        assert await keys_of(owner, *KEYS, "large") == []
        await nothing_lost(owner)


async def test_on_every_kind_of_slab(slab: Slab) -> None:
    sizes = {"capacity": 8 * MIB, "segment": 2 * MIB}
    async with slab.pair(**sizes) as (owner, client):
        for number in range(12):
            user: User = client if number % 2 else owner
            feature = filled(2 * MIB, number).to(slab.device)
            await user.put(feature, key=f"{number}")
            assert same(await client.get(f"{number}"), feature)
            await until(lambda: grants(owner) == 0)  # on a GPU a read is paid by its stream
        assert await keys_of(client, *map(str, range(12))) == ["8", "9", "10", "11"]
        assert owner.statistics().evicted == 8
        await client.pin("8")
        await owner.put(filled(6 * MIB).to(slab.device), key="large")
        assert await keys_of(client, *map(str, range(12))) == ["8"]
        await nothing_lost(owner)


# --- what stays ----------------------------------------------------------------------------------

Hold = Callable[[FeatureClient, str], contextlib.AbstractAsyncContextManager[object]]


@contextlib.asynccontextmanager
async def pinned(client: FeatureClient, key: str) -> AsyncIterator[None]:
    await client.pin(key)
    yield
    await client.unpin(key)


@contextlib.asynccontextmanager
async def owed(client: FeatureClient, key: str) -> AsyncIterator[None]:
    ref = await client.put(filled(SIZE, 77), key=key, readers=1)
    yield
    await client.release(ref)


@contextlib.asynccontextmanager
async def read_by_ref(client: FeatureClient, key: str) -> AsyncIterator[None]:
    ref = await client.put(filled(SIZE, 77), key=key)
    async with client.borrow(ref) as view:
        yield
        assert torch.equal(tensor(view), filled(SIZE, 77))


HOLDS: dict[str, Hold] = {
    "pinned": pinned,
    "read by key": lambda client, key: client.borrow(key),
    "read by its ref": read_by_ref,
    "owing a read": owed,
}


@pytest.mark.parametrize("hold", HOLDS)
async def test_what_is_in_use_stays(hold: str) -> None:
    async with pair(**ONE) as (owner, client):
        await fill(owner)
        async with HOLDS[hold](client, "0"):
            for number in range(3 * PLACES):
                await owner.put(filled(SIZE), key=f"new {number}")
                assert await client.contains("0")
            assert owner.statistics().keys == PLACES
        await until(lambda: not grants(owner))
        for number in range(PLACES):
            await client.put(filled(SIZE), key=f"newer {number}")
        assert not await client.contains("0")
        await nothing_lost(owner)


@pytest.mark.parametrize("putter", ["owner", "client"])
@pytest.mark.parametrize("hold", HOLDS)
async def test_a_put_waits_when_nothing_can_go_and_is_woken_when_something_can(
    hold: str, putter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no timer that fires in this test's life: the end of the use itself wakes it."""
    monkeypatch.setattr(Recycler, "set_busy", lambda self, waiting: None)
    async with party(2, recycle_interval=60.0, **ONE) as (owner, (client, other)):
        user: User = owner if putter == "owner" else other
        await fill(owner)
        async with contextlib.AsyncExitStack() as rest:
            for key in KEYS[1:]:
                await rest.enter_async_context(owner.borrow(key))
            async with HOLDS[hold](client, "0"):
                with pytest.raises(PoolFull):
                    await user.put(filled(SIZE), key="new", on_full="raise")
                with pytest.raises(PutTimeout):
                    await user.put(filled(SIZE), key="new", timeout=0)
                task = asyncio.create_task(user.put(filled(SIZE), key="new"))
                await queued(owner, 1)
                await steps(5)
                assert not task.done()
                assert await client.contains("0")
            await task
            assert await keys_of(client, "new", *KEYS) == ["new", *KEYS[1:]]
        await nothing_lost(owner)


async def evicts(owner: FeatureCache, client: FeatureClient) -> None:
    assert await client.evict("0")


async def leaves(owner: FeatureCache, client: FeatureClient) -> None:
    await client.aclose()


async def replaces(owner: FeatureCache, client: FeatureClient) -> None:
    await owner.evict("0")
    assert not await client.contains("0")


@pytest.mark.parametrize("how", [evicts, leaves, replaces], ids=lambda how: how.__name__)
async def test_a_pinned_feature_makes_room_when(
    how: Callable[[FeatureCache, FeatureClient], Coroutine[Any, Any, None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Recycler, "set_busy", lambda self, waiting: None)
    async with pair(recycle_interval=60.0, **ONE) as (owner, client):
        await owner.put(filled(CAPACITY), key="0")
        await client.pin("0")
        task = asyncio.create_task(owner.put(filled(CAPACITY, 3), key="new"))
        await queued(owner, 1)
        await how(owner, client)
        await task
        assert same(await owner.get("new"), filled(CAPACITY, 3))
        await nothing_lost(owner)


async def test_what_is_evicted_for_one_that_waits_is_not_given_to_another() -> None:
    async with party(2, **ONE) as (owner, (one, two)):
        await owner.put(filled(CAPACITY), key="0")
        async with one.borrow("0"):
            large = asyncio.create_task(two.put(filled(CAPACITY), key="large"))
            await queued(owner, 1)
            little = asyncio.create_task(owner.put(filled(1), key="small"))
            await queued(owner, 2)
            with pytest.raises(PoolFull):
                owner.put_nowait(filled(1))
        await large
        await little
        assert await keys_of(one, "0", "large", "small") == ["small"]
        await nothing_lost(owner)


async def test_a_put_evicts_before_it_waits_in_every_form() -> None:
    async with pair(**ONE) as (owner, client):
        puts: list[Callable[[], Coroutine[Any, Any, object]]] = [
            lambda: owner.put(filled(CAPACITY), key="a"),
            lambda: client.put(filled(CAPACITY), key="b"),
            lambda: owner.put(filled(CAPACITY), key="c", on_full="raise"),
            lambda: client.put(filled(CAPACITY), key="d", on_full="raise"),
            lambda: owner.get_or_put("e", lambda: filled(CAPACITY)),
            lambda: client.get_or_put("f", lambda: filled(CAPACITY)),
        ]
        for put in puts * 3:
            await put()
        owner.put_nowait(filled(CAPACITY), key="g")
        now = owner.statistics()
        assert (now.waited, now.keys, now.evicted) == (0, 1, 18)
        ref = await client.put(filled(CAPACITY))  # also one that is kept under no key
        assert owner.statistics().keys == 0
        await client.release(ref)
        await nothing_lost(owner)


async def test_what_could_never_fit_evicts_nothing() -> None:
    async with pair(**ONE) as (owner, client):
        await fill(owner)
        await client.pin("0")
        with pytest.raises(PoolFull):  # not even if everything else went
            await client.put(filled(CAPACITY), on_full="raise")
        with pytest.raises(featcache.FeatureTooLarge):
            await client.put(filled(CAPACITY + 1))
        assert await keys_of(owner, *KEYS) == KEYS
        await nothing_lost(owner)


async def test_slots_are_evicted_for_as_bytes_are() -> None:
    async with pair(slots=4) as (owner, client):
        for number in range(10):
            await client.put(filled(1), key=f"{number}")
        assert await keys_of(owner, *map(str, range(10))) == ["6", "7", "8", "9"]
        assert owner.statistics().waited == 0
        await nothing_lost(owner)


# --- growth and eviction -------------------------------------------------------------------------

ELASTIC: dict[str, Any] = {"capacity": 4 * CAPACITY, "segment": CAPACITY}


@pytest.mark.parametrize("putter", ["owner", "client"])
@pytest.mark.parametrize("when_full", ["grow", "evict"])
async def test_a_full_slab_grows_or_evicts_first(when_full: str, putter: str) -> None:
    async with pair(when_full=when_full, **ELASTIC) as both:
        owner, user = both[0], both[putter == "client"]
        for number in range(4):
            await user.put(filled(CAPACITY), key=f"{number}")
        now = owner.statistics()
        if when_full == "grow":
            assert (now.keys, now.evicted, now.committed_bytes) == (4, 0, 4 * CAPACITY)
            await user.put(filled(CAPACITY), key="4")
            assert await keys_of(owner, "0", "1", "4") == ["1", "4"]
        else:
            assert (now.keys, now.evicted, now.committed_bytes) == (1, 3, CAPACITY)
            async with user.borrow("3"):  # what can't be evicted it grows beside
                await user.put(filled(CAPACITY), key="4")
            assert await keys_of(owner, "3", "4") == ["3", "4"]
            assert owner.statistics().committed_bytes == 2 * CAPACITY
            # What is larger than the slab is now needs both.
            await user.put(filled(3 * CAPACITY), key="5")
            assert await owner.contains("5")
        await nothing_lost(owner)


@pytest.mark.parametrize("when_full", ["grow", "evict"])
async def test_put_nowait_grows_or_evicts_first_too(when_full: str) -> None:
    async with pair(when_full=when_full, **ELASTIC) as (owner, _):
        for number in range(6):
            owner.put_nowait(filled(CAPACITY), key=f"{number}")
        now = owner.statistics()
        expected = (4, 2, 4 * CAPACITY) if when_full == "grow" else (1, 5, CAPACITY)
        assert (now.keys, now.evicted, now.committed_bytes) == expected
        await nothing_lost(owner)


async def test_a_slab_that_can_not_grow_evicts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise MemoryError

    async with pair(**ELASTIC) as (owner, client):
        await client.put(filled(CAPACITY), key="0")
        monkeypatch.setattr("featcache.memory.host.slab.HostSlab.commit", refuses)
        await client.put(filled(CAPACITY), key="1")
        await owner.put(filled(CAPACITY), key="2")
        assert await keys_of(owner, "0", "1", "2") == ["2"]
        await nothing_lost(owner)


async def test_what_is_idle_gives_nothing_back_but_an_empty_tail_does() -> None:
    async with pair(idle=0.01, **ELASTIC) as (owner, client):
        for number in range(4):
            await owner.put(filled(CAPACITY), key=f"{number}")
        assert slab_allocated() == 4 * CAPACITY
        await windows_of_idleness(owner, 3)
        assert owner.statistics().committed_bytes == 4 * CAPACITY
        assert owner.statistics().keys == 4
        await client.evict("3")
        await client.evict("1")  # in the middle: its room stays committed
        await until(lambda: owner.statistics().committed_bytes == 3 * CAPACITY)
        await until(lambda: slab_allocated() == 3 * CAPACITY)
        for key in ("0", "2"):
            assert same(await client.get(key), filled(CAPACITY))
        await nothing_lost(owner)


async def windows_of_idleness(owner: FeatureCache, count: int) -> None:
    """Return when so many have ended since."""
    store = pool_of(owner).store
    for _ in range(count):
        since_s = store.size._window_since_s
        await until(lambda: store.size._window_since_s != since_s)  # noqa: B023 - awaited here
        await until(lambda: store.size._window_since_s is not None)


@pytest.mark.parametrize("hold", ["nothing", "pinned", "read by key"])
async def test_compaction_evicts_the_few_that_hold_the_tail(hold: str) -> None:
    """With what is in use among them it leaves them all alone."""
    with capture_logs() as logs:
        async with pair(idle=0.02, compact=0.5, **ELASTIC) as (owner, client):
            await owner.put(filled(CAPACITY), key="low")
            ref = await owner.put(filled(CAPACITY))
            await fill(owner, ["0", "1"])
            assert owner.statistics().committed_bytes == 3 * CAPACITY
            holding = HOLDS[hold](client, "0") if hold in HOLDS else contextlib.nullcontext()
            async with holding:
                await client.discard(ref)
                if hold != "nothing":
                    await windows_of_idleness(owner, 3)
                    assert await keys_of(owner, "low", "0", "1") == ["low", "0", "1"]
            await until(lambda: owner.statistics().committed_bytes == CAPACITY)
            assert await keys_of(owner, "low", "0", "1") == ["low"]
            await nothing_lost(owner)
    assert evictions(logs, "compaction") == ["0", "1"]


async def test_compaction_leaves_a_tail_that_is_used_much() -> None:
    async with pair(idle=0.01, compact=0.25, **ELASTIC) as (owner, client):
        ref = await owner.put(filled(CAPACITY))
        for key in KEYS[:3]:  # three eighths of the second segment
            await owner.put(filled(SIZE), key=key)
        await client.release(ref)
        await windows_of_idleness(owner, 3)
        assert await keys_of(client, *KEYS[:3]) == KEYS[:3]
        assert owner.statistics().committed_bytes == 2 * CAPACITY
        await client.evict("0")
        await until(lambda: owner.statistics().committed_bytes == CAPACITY)
        assert await keys_of(client, *KEYS[:3]) == []
        await nothing_lost(owner)


# --- watermarks ----------------------------------------------------------------------------------


async def test_watermarks_evict_before_a_put_needs_it() -> None:
    with capture_logs() as logs:
        async with pair(evict_above=0.75, evict_to=0.5, **ONE) as (owner, client):
            await fill(client, KEYS[:6])
            await until(lambda: client.statistics().keys == 6)  # the recycler has looked
            assert owner.statistics().evicted == 0, "at the mark, not above it"
            await client.put(filled(SIZE), key="6")
            await until(lambda: owner.statistics().keys == 4)
            await until(lambda: owner.statistics().used_bytes == CAPACITY // 2)
            assert await keys_of(owner, *KEYS) == ["3", "4", "5", "6"]
            await nothing_lost(owner)
    assert evictions(logs, "watermark") == ["0", "1", "2"]
    assert evictions(logs, "room") == []


async def test_watermarks_leave_what_is_in_use() -> None:
    async with pair(evict_above=0.5, evict_to=0.0, **ONE) as (owner, client):
        await fill(client, KEYS[:4])
        await client.pin("0")
        async with client.borrow("1") as view:
            ref = await client.put(filled(SIZE), readers=1)
            await until(lambda: owner.statistics().keys == 2)
            assert await keys_of(owner, *KEYS) == ["0", "1"]
            assert tensor(view)[0] == 1
        await client.release(ref)
        await nothing_lost(owner)


@pytest.mark.parametrize(
    "wrong",
    [
        {"evict_above": 1.5},
        {"evict_above": -0.1},
        {"evict_above": "much"},
        {"evict_above": 0.5, "evict_to": 0.6},
        {"compact": 2},
        {"when_full": "panic"},
        {"grants": 0},
        {"grants": 1 << 20},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="|".join(wrong)):
        featcache.create(settings=featcache.Settings(**wrong))


# --- what is said of it --------------------------------------------------------------------------


async def test_statistics_of_keys() -> None:
    async with pair(**ONE) as (owner, client):
        await fill(client, KEYS[:4])
        ref = await owner.put(filled(SIZE))
        await client.pin("0")
        await client.get("1")
        await owner.get("2")
        with pytest.raises(KeyNotFound):
            await client.get("no such")
        await client.get_or_put("new", lambda: filled(100))
        now = owner.statistics()
        assert (now.keys, now.resident_bytes, now.pinned_bytes) == (5, 4 * SIZE + 256, SIZE)
        assert (now.hits, now.misses, now.evicted, now.puts) == (2, 2, 0, 6)
        assert now.used_bytes == 5 * SIZE + 256
        assert (client.statistics().puts, client.statistics().gets) == (5, 1)
        await until(lambda: client.statistics().keys == 5)
        theirs = client.statistics()
        assert (theirs.resident_bytes, theirs.pinned_bytes) == (4 * SIZE + 256, SIZE)
        assert theirs.used_bytes == 5 * SIZE + 256
        await client.evict("1")
        await fill(client, ["a", "b", "c", "d"])
        await until(lambda: client.statistics().evicted == owner.statistics().evicted > 1)
        await client.release(ref)
        await nothing_lost(owner)
        await until(lambda: client.statistics().keys == 0)


async def test_pressure_does_not_count_what_could_be_evicted() -> None:
    async with pair(**ONE) as (owner, client):
        await fill(owner)
        assert owner.statistics().used_bytes == CAPACITY
        assert owner.pressure.level is PressureLevel.NORMAL
        for key in KEYS[:6]:
            await client.pin(key)
        await until(lambda: owner.pressure.level is PressureLevel.ELEVATED)
        async with client.borrow("6"), client.borrow("7"):
            await until(lambda: owner.pressure.level is PressureLevel.HIGH)
            task = asyncio.create_task(owner.put(filled(1), key="new"))
            await until(lambda: owner.pressure.level is PressureLevel.EXHAUSTED)
        await task
        await owner.pressure.below("exhausted", timeout=20)
        for key in KEYS[:6]:
            await client.unpin(key)
        await owner.pressure.below("elevated", timeout=20)
        await nothing_lost(owner)


async def test_pressure_events_tell_resident_and_pinned_bytes() -> None:
    with capture_logs() as logs:
        async with pair(**ONE) as (owner, client):
            await fill(owner)
            for key in KEYS[:-1]:
                await client.pin(key)
            async with client.borrow(KEYS[-1]):
                task = asyncio.create_task(client.put(filled(SIZE), key="new"))
                pressed = [entry for entry in logs if entry["event"] == "featcache.pool.pressure"]

                def told() -> bool:
                    pressed[:] = [
                        entry
                        for entry in logs
                        if entry["event"] == "featcache.pool.pressure"
                        and entry["pressure"] == "exhausted"
                    ]
                    return bool(pressed)

                await until(told)
            await task
            await nothing_lost(owner)
    fact = pressed[0]
    assert fact["resident_bytes"] == CAPACITY
    assert fact["pinned_bytes"] == CAPACITY - SIZE
    assert fact["committed_bytes"] == fact["used_bytes"] == CAPACITY
    assert (fact["waiters"], fact["waiting_bytes"]) == (1, SIZE)


async def test_each_eviction_is_an_event_with_its_cause() -> None:
    with capture_logs() as logs:
        async with pair(**ONE) as (owner, client):
            await fill(owner, ["a", "b"])
            await client.put(filled(8), key=b"\xff\x00")
            await client.put(filled(8), key="k" * 100)
            await client.evict("a")
            await owner.evict(b"\xff\x00")
            await owner.put(filled(8), key="b")  # replaced, which is no eviction
            await client.put(filled(CAPACITY), key="all")
            await nothing_lost(owner)
    assert evictions(logs, "asked") == ["a", "ff00", "all"]
    assert set(evictions(logs, "room")) == {"k" * 64, "b"}
    told = [entry for entry in logs if entry["event"] == "featcache.key.evicted"]
    assert [entry["nbytes"] for entry in told] == [SIZE, 8, 8, 8, CAPACITY]
    assert all(entry["unused_s"] >= 0 for entry in told)
    assert all(entry["unlogged"] == 0 for entry in told)


async def test_eviction_events_are_bounded() -> None:
    with capture_logs() as logs:
        async with pair(log_interval=3600.0, slots=2) as (owner, client):
            for number in range(102):
                await client.put(filled(1), key=f"{number}")
            assert owner.statistics().evicted == 100
            await nothing_lost(owner)
    assert len(evictions(logs, "room")) == 16


async def test_a_writer_that_is_lost_takes_its_key_along() -> None:
    """Its bytes never came: the key is dropped, and who waits for them looks for it anew."""
    with capture_logs() as logs:
        async with party(2, **ONE) as (owner, (lost, other)):
            pool = pool_of(owner)
            specs = (await lost.put(filled(SIZE), key="b")).specs
            slot = pool.store.reserve(Request(SIZE, 0, None, b"a"), 0.0)
            assert slot is not None
            page = pool.pages[1]
            pool.publish_from(slot, ref_of(pool, slot, specs), page)  # and its word never lands
            patient = asyncio.create_task(owner.get("a", timeout=20))
            hasty = asyncio.create_task(other.get("a"))
            await until(lambda: grants(owner) == 2)
            pool.apply(pool.abandon_writes(page))
            with pytest.raises(KeyNotFound):
                await hasty
            assert not await other.contains("a")
            await other.put(filled(SIZE, 9), key="a")
            assert same(await patient, filled(SIZE, 9))
            await nothing_lost(owner)
    assert evictions(logs, "writer lost") == ["a"]


@pytest.mark.parametrize("policy", ["lru", "sieve"])
async def test_a_watermark_goes_on_behind_very_many_that_were_used(policy: str) -> None:
    """All pieces that it takes follow one another, and each is a piece of work that is counted."""
    count = 2600
    changes: dict[str, Any] = {"capacity": count * KIB, "slots": 2 * count, "rooms_ahead": 0}
    changes |= {"eviction": policy, "evict_above": 0.9, "evict_to": 0.85, "recycle_interval": 60.0}
    async with pair(**changes) as (owner, client):
        pool, full_bytes = pool_of(owner), int(0.9 * count) * KIB
        while pool.store.used_bytes <= full_bytes:
            owner.put_nowait(filled(KIB), key=b"%d" % pool.store.puts)
        for number in range(pool.store.puts):
            assert client.get_nowait(b"%d" % number) is not None
        looked_at, pieces = pool.store.evicting.steps, 0
        pool._upkeep = True
        while pool._upkeep:
            pool.turn.left = 128
            more = pool._keep_up()
            assert not more or pool.turn.left < 128, "it would be done again and again in one turn"
            pieces += 1
        assert pool.store.used_bytes <= 0.85 * count * KIB
        assert pieces > 2
        assert pool.store.evicting.steps > looked_at
