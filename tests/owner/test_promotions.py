"""What is missed here and lies in the tier comes back, byte for byte, whatever the tier does."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef, KeyNotFound, KeyTimeout, events
from featcache.memory.pack import DTYPES
from featcache.owner.tier_header import decode, encode
from featcache.ref import TensorSpec
from featcache.tier import MakeRoom
from support.caches import filled, raw, small, tensor, tensors, until
from support.keyed import nothing_lost, pool_of, queued
from support.tiers import PLACES, SIZE, MemoryTier, fill, is_kept, is_quiet, push_out, tiered

User = FeatureCache | FeatureClient


def never() -> torch.Tensor:
    pytest.fail("it lies in the tier")


async def got(user: User, key: str) -> int:
    found = tensor(await user.get(key))
    assert found.shape == (SIZE,)
    assert (found == found[0]).all()
    return int(found[0])


# --- found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [4 << 20, 0], ids=["at once", "in threads"])
@pytest.mark.parametrize("which", ["owner", "client"])
async def test_every_lookup_finds_what_lies_in_the_tier(which: str, inline: int) -> None:
    async with tiered(inline_bytes=inline) as (tier, owner, client):
        user: User = owner if which == "owner" else client
        await fill(user, count=2 * PLACES)
        await until(lambda: owner.statistics().demoted == PLACES and is_quiet(owner))
        assert await got(user, "0") == 0
        assert int(tensor(await user.get("1", timeout=5))[0]) == 1
        async with user.borrow("2") as view:
            assert int(tensor(view)[0]) == 2
        assert int(tensor(await user.get_or_put("3", never))[0]) == 3
        ref = await user.share("4", readers=1)
        assert int(tensor(await user.get(ref))[0]) == 4
        assert [int(tensor(each)[0]) for each in await user.get_many(["5", "0", "6"])] == [5, 0, 6]
        assert await user.contains_many(["7", "nothing", "0"]) == [True, False, True]
        assert not is_kept(owner, "7")  # it was looked at, not brought
        now = owner.statistics()
        assert now.promoted == tier.count("get") >= 7
        assert now.tier_failures == 0
        with pytest.raises(KeyNotFound):
            await user.get("nothing")
        with pytest.raises(KeyTimeout):
            await user.get("nothing", timeout=0.01)
        await until(lambda: is_quiet(owner))
        await nothing_lost(owner)


FEATURES: dict[str, Callable[[], Any]] = {
    "a dict": lambda: {"a": torch.arange(99.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)},
    "strided": lambda: torch.arange(600, dtype=torch.int16).reshape(20, 30).T,
    "a scalar": lambda: torch.tensor(7.5, dtype=torch.float64),
    "empty": lambda: torch.empty(0, 4, dtype=torch.complex64),
    "bool": lambda: torch.rand(77) > 0.5,
}


@pytest.mark.parametrize("what", FEATURES)
async def test_a_feature_comes_back_as_it_was_put(what: str) -> None:
    feature = FEATURES[what]()
    async with tiered() as (_, owner, client):
        await owner.put(feature, key="odd")
        await owner.put(filled(SIZE * PLACES), key="all the room")
        await until(lambda: owner.statistics().demoted == 1 and is_quiet(owner))
        found = await client.get("odd")
        assert owner.statistics().promoted == 1
        parts = tensors(found) if isinstance(feature, dict) else {"": tensor(found)}
        wanted = feature if isinstance(feature, dict) else {"": feature}
        assert list(parts) == list(wanted)
        for name, part in parts.items():
            assert (part.dtype, part.shape) == (wanted[name].dtype, wanted[name].shape)
            assert raw(part) == raw(wanted[name].contiguous())


async def test_a_key_is_looked_up_once_for_all_that_ask() -> None:
    async with tiered() as (tier, owner, client):
        await fill(owner, count=PLACES + 1)
        await until(lambda: owner.statistics().demoted == 1 and is_quiet(owner))
        tier.stop("get")
        asking = [
            asyncio.create_task(call)
            for _ in range(5)
            for call in (owner.get("0"), client.get("0"), client.get_or_put("0", never))
        ]
        await until(lambda: tier.count("get") == 1)
        asking.pop(0).cancel()
        tier.go("get")
        for found in await asyncio.gather(*asking):
            assert int(tensor(found)[0]) == 0
        assert tier.count("get") == 1


@pytest.mark.parametrize("inline", [4 << 20, 0], ids=["at once", "in threads"])
async def test_what_is_on_its_way_there_comes_back_without_the_tier(inline: int) -> None:
    async with tiered(inline_bytes=inline) as (tier, owner, client):
        tier.stop("put")
        await fill(owner, count=2 * PLACES)
        assert [await got(client, f"{number}") for number in range(PLACES)] == list(range(PLACES))
        assert tier.count("get") == 0
        tier.go("put")
        await until(lambda: is_quiet(owner))
        await nothing_lost(owner)


# --- room -----------------------------------------------------------------------------------------


async def test_it_waits_for_room_as_a_put_does_and_that_is_not_the_tiers_time() -> None:
    async with tiered(tier_timeout=0.05) as (tier, owner, client):
        await fill(owner, count=PLACES + 1)
        await until(lambda: owner.statistics().demoted == 1 and is_quiet(owner))
        refs = [await owner.put(filled(SIZE, 200)) for _ in range(PLACES)]
        asking = asyncio.create_task(client.get("0"))
        await queued(owner, 1)
        assert tier.count("get") == 1
        await asyncio.sleep(0.1)  # longer than the tier has
        assert not asking.done()
        with pytest.raises(KeyNotFound):  # others are looked up meanwhile
            await owner.get("nothing")
        await client.get(refs[0])
        assert int(tensor(await asking)[0]) == 0
        assert owner.statistics().tier_failures == 0
        for ref in refs[1:]:
            await owner.discard(ref)
        await nothing_lost(owner)


async def test_a_lookup_that_is_cancelled_leaves_the_queue() -> None:
    async with tiered() as (_, owner, client):
        await fill(owner, count=PLACES + 1)
        await until(lambda: owner.statistics().demoted == 1 and is_quiet(owner))
        refs = [await owner.put(filled(SIZE, 200)) for _ in range(PLACES)]
        asking = asyncio.create_task(client.get("0"))
        await queued(owner, 1)
        asking.cancel()
        await queued(owner, 0)
        for ref in refs:
            await owner.discard(ref)
        assert await got(client, "0") == 0
        await nothing_lost(owner)


# --- what is newer wins ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["put", "put and evicted for room", "evict"])
async def test_what_comes_from_the_tier_never_replaces_what_is_newer(what: str) -> None:
    async with tiered() as (tier, owner, client):
        await fill(owner, count=PLACES + 1)
        await until(lambda: owner.statistics().demoted == 1 and is_quiet(owner))
        tier.stop("get")
        asking = asyncio.create_task(owner.get("0"))
        await until(lambda: tier.count("get") == 1)
        if what == "evict":
            await client.evict("0")
        else:
            await client.put(filled(SIZE, 88), key="0")
        if what == "put and evicted for room":
            await fill(owner, first=20)
            assert not is_kept(owner, "0")
        tier.go("get")
        if what == "put":
            assert int(tensor(await asking)[0]) == 88
        else:
            with pytest.raises(KeyNotFound):
                await asking
        await until(lambda: is_quiet(owner))
        if what == "evict":
            with pytest.raises(KeyNotFound):
                await client.get("0")
        else:
            assert await got(client, "0") == 88
        await nothing_lost(owner)


# --- a tier that fails ----------------------------------------------------------------------------


def header(key: bytes, nbytes: int = 64) -> bytes:
    specs = (TensorSpec(None, "uint8", (nbytes,), 0),)
    return encode(key, FeatureRef(bytes(16), "/x", 0, 1, 0, nbytes, specs))


async def asks_no_room(key: bytes, room: MakeRoom) -> int:
    return 64


async def writes_less(key: bytes, room: MakeRoom) -> int:
    await room(header(key))
    return 63


async def writes_too_much(key: bytes, room: MakeRoom) -> int:
    (await room(header(key)))[:] = bytes(65)
    return 65


async def says_true(key: bytes, room: MakeRoom) -> bool:
    await room(header(key))
    return True


async def asks_twice(key: bytes, room: MakeRoom) -> int:
    await room(header(key))
    await room(header(key))
    return 64


async def is_anothers(key: bytes, room: MakeRoom) -> int:
    await room(header(b"another"))
    return 64


async def is_damaged(key: bytes, room: MakeRoom) -> int:
    await room(header(key)[:-1] + b"!")
    return 64


async def is_no_header(key: bytes, room: MakeRoom) -> int:
    await room(b"")
    return 64


async def is_no_bytes(key: bytes, room: MakeRoom) -> int:
    await room(64)  # type: ignore[arg-type]
    return 64


async def is_too_large(key: bytes, room: MakeRoom) -> int:
    await room(header(key, 1 << 40))
    return 1 << 40


async def fails_when_it_has_room(key: bytes, room: MakeRoom) -> int:
    await room(header(key))
    raise OSError("gone")


Lie = Callable[[bytes, MakeRoom], Awaitable[Any]]
LIES: list[Lie] = [
    *(asks_no_room, writes_less, writes_too_much, says_true, asks_twice, is_anothers),
    *(is_damaged, is_no_header, is_no_bytes, is_too_large, fails_when_it_has_room),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
async def test_what_a_tier_says_wrongly_is_a_miss_and_is_told(lie: Lie) -> None:
    told: list[events.Event] = []
    events.add_hook(told.append)
    try:
        async with tiered() as (tier, owner, client):
            await fill(owner, count=PLACES - 1)
            tier.lies = lie
            with pytest.raises(KeyNotFound):
                await client.get("lost")
            assert owner.statistics().tier_failures == 1
            failed = [event for event in told if isinstance(event, events.TierFailed)]
            assert [(event.operation, event.key) for event in failed] == [("get", "lost")]
            made = await client.get_or_put("lost", lambda: filled(SIZE, 5))
            assert int(tensor(made)[0]) == 5
            await until(lambda: owner.statistics().slots_used == PLACES)
            await nothing_lost(owner)
    finally:
        events.remove_hook(told.append)


def test_a_dtype_that_torch_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = header(b"k")
    monkeypatch.delitem(DTYPES, "uint8")
    with pytest.raises(ValueError, match="dtype"):
        decode(data, b"k")


async def test_a_tier_that_hangs_is_a_miss_after_its_time() -> None:
    async with tiered(tier_timeout=0.05, tier_calls=4) as (tier, owner, client):
        tier.stop("get")
        tier.stop("has")
        with pytest.raises(KeyNotFound):
            await client.get("a")
        assert not await owner.contains("a")
        made = await client.get_or_put("a", lambda: filled(SIZE, 3))
        assert int(tensor(made)[0]) == 3
        lookups = [asyncio.create_task(owner.get(f"b{number}")) for number in range(40)]
        ended = await asyncio.gather(*lookups, return_exceptions=True)
        assert all(isinstance(each, KeyNotFound) for each in ended)
        # In doubt, only one of them at a time has the tier asked.
        assert tier.count("get") <= 2 + 4
        tier.go("get")
        tier.go("has")
        for number in range(3):  # one that is answered ends the doubt
            with pytest.raises(KeyNotFound):
                await client.get(f"c{number}")
        assert tier.count("get", b"c2") == 1


async def test_a_tier_that_will_not_be_cancelled_holds_nobody_up(no_leaks: None) -> None:
    tier, go = MemoryTier(), asyncio.Event()

    async def stubborn(key: bytes, room: MakeRoom) -> int:
        view = await room(header(key))
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue
        with pytest.raises(ValueError, match="released"):
            view[:] = bytes(64)
        return 64

    async with tiered(tier, tier_timeout=0.02) as (_, owner, client):
        tier.lies = stubborn
        with pytest.raises(KeyNotFound):
            await client.get("a")
        await until(lambda: owner.statistics().slots_used == 0)
        go.set()


async def test_room_is_not_reused_while_a_thread_of_the_tiers_still_writes_there() -> None:
    go, begun = threading.Event(), threading.Event()

    def write(view: memoryview) -> None:
        part = view[8:16]
        begun.set()
        assert go.wait(30)
        part[:] = b"too late"

    async def in_a_thread(key: bytes, room: MakeRoom) -> int:
        view = await room(header(key, SIZE))
        await asyncio.to_thread(write, view)
        return SIZE

    async with tiered(tier_timeout=0.05) as (tier, owner, client):
        tier.lies = in_a_thread
        with pytest.raises(KeyNotFound):
            await client.get("late")
        assert begun.is_set()
        tier.lies = None
        assert owner.statistics().slots_used == 1  # its landing place
        await fill(owner, count=2 * PLACES)
        kept = [key for key in range(2 * PLACES) if is_kept(owner, f"{key}")]
        assert len(kept) == PLACES - 1
        go.set()
        await until(lambda: owner.statistics().slots_used == PLACES - 1)
        for key in kept:
            assert await got(client, f"{key}") == key
        await until(lambda: is_quiet(owner))
        await nothing_lost(owner)


async def test_a_tier_that_keeps_a_view_of_what_it_filled_has_a_miss() -> None:
    kept: list[memoryview] = []

    async def keeps_a_slice(key: bytes, room: MakeRoom) -> int:
        view = await room(header(key, SIZE))
        view[:] = bytes([7]) * SIZE
        kept.append(view[:1])
        return SIZE

    async with tiered() as (tier, owner, client):
        tier.lies = keeps_a_slice
        with pytest.raises(KeyNotFound):
            await client.get("a")
        assert owner.statistics().tier_failures == 1
        assert owner.statistics().slots_used == 1
        kept.clear()
        await until(lambda: owner.statistics().slots_used == 0)


async def test_what_waits_for_room_may_have_that_of_what_just_came() -> None:
    async with tiered() as (tier, owner, client):
        await owner.put(filled(SIZE * PLACES, 1), key="whole")
        await owner.put(filled(SIZE * PLACES, 2), key="next")
        await until(lambda: owner.statistics().demoted == 1 and is_quiet(owner))
        tier.stop("get")
        ref = await owner.put(filled(SIZE * PLACES, 3))
        asking = asyncio.create_task(client.get("whole"))
        await until(lambda: tier.count("get", b"whole") == 1)
        tier.go("get")
        await queued(owner, 1)
        putting = asyncio.create_task(owner.put(filled(SIZE * PLACES, 4), key="whole"))
        await queued(owner, 2)
        await owner.discard(ref)
        await putting
        await asyncio.gather(asking, return_exceptions=True)
        await push_out(owner, "whole", 0)
        await until(lambda: is_quiet(owner))
        assert int(tensor(await client.get("whole"))[0]) == 4


async def test_close_ends_a_lookup_in_progress(no_leaks: None) -> None:
    tier = MemoryTier()
    async with tiered(tier, tier_timeout=5.0) as (_, owner, _client):
        tier.stop("get")
        asking = asyncio.create_task(owner.get("a"))
        await until(lambda: tier.count("get") == 1)
        await owner.aclose()
        ended = await asyncio.gather(asking, return_exceptions=True)
        assert type(ended[0]).__name__ == "CacheClosed"
        assert (tier.cancelled, tier.closed) == (1, 1)


async def test_without_a_tier_nothing_of_it_is_there() -> None:
    async with featcache.create(settings=small()) as owner:
        pool, served = pool_of(owner), owner._opened().main
        assert owner._opened().tier is None
        assert pool.store.demotes is None
        assert served.lookups.sources is None
        assert served.lookups.forget_below is None
