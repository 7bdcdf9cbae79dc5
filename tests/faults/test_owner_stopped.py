"""The owner is stopped: hits go on, what needs it waits as long as it may, and afterwards all is counted."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest

import featcache
import featcache.blocking
from faults.agents import feature, is_right
from faults.keyed import CAPACITY, client, host_only, owner
from featcache import (
    AttachRefused,
    FeatureClient,
    FeatureRef,
    GetTimeout,
    KeyNotFound,
    KeyTimeout,
    PutTimeout,
)
from support.processes import Child, Start
from support.slabs import Slab

SIZE: Final = 64 << 10
ROUNDS: Final = 50
SHORT_S: Final = 0.05
PATIENT_S: Final = 600.0
"""Longer than a test lives: what ends sooner ended for another reason."""

Read = Callable[[FeatureClient, Any, int], Awaitable[bool]]
BlockingRead = Callable[[featcache.blocking.FeatureClient, Any, int], bool]


async def _get(cache: FeatureClient, what: Any, seed: int) -> bool:
    return is_right(await cache.get(what), seed)


async def _get_nowait(cache: FeatureClient, what: Any, seed: int) -> bool:
    return is_right(cache.get_nowait(what), seed)


async def _borrow(cache: FeatureClient, what: Any, seed: int) -> bool:
    async with cache.borrow(what) as view:
        await asyncio.sleep(0)
        return is_right(view, seed)


async def _borrow_now(cache: FeatureClient, what: Any, seed: int) -> bool:
    with cache.borrow(what) as view:
        return is_right(view, seed)


async def _get_or_put(cache: FeatureClient, what: Any, seed: int) -> bool:
    return is_right(await cache.get_or_put(what, _never), seed)


async def _get_in_time(cache: FeatureClient, what: Any, seed: int) -> bool:
    return is_right(await cache.get(what, timeout=PATIENT_S), seed)


def _never() -> Any:
    raise AssertionError("it is there")


def _blocking_borrow(cache: featcache.blocking.FeatureClient, what: Any, seed: int) -> bool:
    with cache.borrow(what) as view:
        return is_right(view, seed)


BY_REF: Final[dict[str, Read]] = {
    "get": _get,
    "get_nowait": _get_nowait,
    "borrow": _borrow,
    "plain with": _borrow_now,
    "get in time": _get_in_time,
}
BY_KEY: Final[dict[str, Read]] = BY_REF | {"get_or_put": _get_or_put}
BLOCKING_BY_REF: Final[dict[str, BlockingRead]] = {
    "get": lambda it, what, seed: is_right(it.get(what), seed),
    "get_nowait": lambda it, what, seed: is_right(it.get_nowait(what), seed),
    "borrow": _blocking_borrow,
    "get in time": lambda it, what, seed: is_right(it.get(what, timeout=PATIENT_S), seed),
}
BLOCKING_BY_KEY: Final[dict[str, BlockingRead]] = BLOCKING_BY_REF | {
    "get_or_put": lambda it, what, seed: is_right(it.get_or_put(what, _never), seed),
}


async def put(child: Child, seed: int, key: str | None = None) -> FeatureRef:
    """Have the owner put a feature, under a key or owing one read."""
    _, data = await child.ask("put_key", seed, SIZE, key)
    return FeatureRef.from_bytes(data)


async def account(child: Child) -> tuple[int, int]:
    """Wait until nothing is used but what keys keep; return the owner's hits and misses."""
    while True:
        _, hits, misses, beyond = await child.ask("account")
        if not any(beyond):
            return hits, misses


@contextlib.contextmanager
def stopped(child: Child) -> Any:
    """Stop a process for the length of a block."""
    child.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        child.signal(signal.SIGCONT)


@pytest.mark.parametrize("way", BY_KEY)
async def test_hits_by_key_go_on(start: Start, slab: Slab, way: str) -> None:
    """Those of a session that has read before, and of one that reads for the first time."""
    child, endpoint = await owner(start, slab)
    await put(child, 1, "a")
    await put(child, 2, "b")
    async with (
        featcache.connect(endpoint, settings=slab.settings()) as known,
        featcache.connect(endpoint, settings=slab.settings()) as new,
    ):
        assert await BY_KEY[way](known, "a", 1)
        hits, misses = await account(child)
        with stopped(child):
            for _ in range(ROUNDS):
                assert await BY_KEY[way](known, "a", 1)
                assert await BY_KEY[way](new, "b", 2)
                assert await known.contains("a")
                assert new.contains_nowait("b") is True
        assert await account(child) == (hits + 2 * ROUNDS, misses)


@pytest.mark.parametrize("way", BY_REF)
async def test_hits_by_ref_go_on(start: Start, slab: Slab, way: str) -> None:
    """Afterwards they are counted as paid: their bytes are free."""
    child, endpoint = await owner(start, slab)
    refs = [await put(child, seed) for seed in range(8)]
    async with featcache.connect(endpoint, settings=slab.settings()) as cache:
        with stopped(child):
            for seed, ref in enumerate(refs):
                assert await BY_REF[way](cache, ref, seed)
        await account(child)
        assert await child.ask("used") == ("used", 0)


@pytest.mark.parametrize("way", BLOCKING_BY_KEY)
async def test_hits_without_a_loop_go_on(start: Start, slab: Slab, way: str) -> None:
    """By key and, where it is the same call, by ref."""
    child, endpoint = await owner(start, slab)
    await put(child, 1, "a")
    refs = [await put(child, seed) for seed in range(4)]

    def read() -> None:
        for _ in range(ROUNDS):
            assert BLOCKING_BY_KEY[way](cache, "a", 1)
            assert cache.contains("a")
        for seed, ref in enumerate(refs):
            assert BLOCKING_BY_REF.get(way, BLOCKING_BY_REF["get"])(cache, ref, seed)

    with featcache.blocking.connect(endpoint, settings=slab.settings()) as cache:
        hits, misses = await account_with(child, len(refs))
        with stopped(child):
            await asyncio.to_thread(read)
        assert await account(child) == (hits + ROUNDS, misses)


async def account_with(child: Child, owing: int) -> tuple[int, int]:
    """The owner's hits and misses while so many refs owe reads."""
    _, hits, misses, beyond = await child.ask("account")
    assert beyond == (owing * SIZE, owing, 0, 0)
    return hits, misses


async def test_misses_are_told_at_once(start: Start, slab: Slab) -> None:
    """That nothing is there the key table says."""
    child, endpoint = await owner(start, slab)
    async with featcache.connect(endpoint, settings=slab.settings()) as cache:
        hits, misses = await account(child)
        with stopped(child):
            for way in ("get", "get_nowait", "borrow", "plain with"):
                with pytest.raises(KeyNotFound):
                    await BY_KEY[way](cache, "absent", 1)
            assert not await cache.contains("absent")
            assert cache.contains_nowait("absent") is False
        assert await account(child) == (hits, misses + 4)


async def test_a_share_of_what_is_there_says_that_the_owner_did_not_answer(
    start: Start, slab: Slab
) -> None:
    """That nothing came under its key would be false."""
    child, endpoint = await owner(start, slab)
    await put(child, 1, "k")
    async with featcache.connect(endpoint, settings=slab.settings()) as cache:
        assert await cache.contains("k")
        with stopped(child):
            with pytest.raises(KeyTimeout, match=r"'k' is there, but its owner did not share it"):
                await cache.share("k", readers=1, timeout=SHORT_S)
            with pytest.raises(KeyTimeout, match="nothing came under"):
                await cache.share("absent", readers=1, timeout=SHORT_S)


async def test_what_needs_the_owner_times_out_as_asked(start: Start, slab: Slab) -> None:
    """Nothing of it is left afterwards: no key, no room, no claim, no waiter."""
    child, endpoint = await owner(start, slab)
    value = feature(1, SIZE).to(slab.device)
    async with featcache.connect(endpoint, settings=slab.settings()) as cache:
        await cache.release(await cache.put(value))  # it can write
        with stopped(child):
            with pytest.raises(KeyTimeout):
                await cache.get("k", timeout=SHORT_S)
            with pytest.raises(KeyTimeout):
                async with cache.borrow("k", timeout=SHORT_S):
                    pass
            with pytest.raises(KeyTimeout):
                await cache.get_or_put("k", _never, timeout=SHORT_S)
            with pytest.raises(PutTimeout):
                await cache.put(value, key="k", timeout=SHORT_S)
        await account(child)
        assert not await cache.contains("k"), "nobody put it in time"
        assert await asyncio.wait_for(cache.get_or_put("k", lambda: value), PATIENT_S) is not None
        await account(child)


async def test_what_needs_the_owner_times_out_without_a_loop(start: Start, slab: Slab) -> None:
    child, endpoint = await owner(start, slab)
    value = feature(1, SIZE).to(slab.device)

    def ask() -> None:
        with pytest.raises(KeyNotFound):
            cache.get("k")
        with pytest.raises(KeyTimeout):
            cache.get("k", timeout=SHORT_S)
        with pytest.raises(GetTimeout), cache.borrow("k", timeout=SHORT_S):
            pass
        with pytest.raises(KeyTimeout):
            cache.get_or_put("k", _never, timeout=SHORT_S)
        with pytest.raises(PutTimeout):
            cache.put(value, key="k", timeout=SHORT_S)

    with featcache.blocking.connect(endpoint, settings=slab.settings()) as cache:
        cache.release(cache.put(value))
        with stopped(child):
            await asyncio.to_thread(ask)
        await account(child)
        assert not cache.contains("k")


async def test_puts_without_a_key(start: Start, slab: Slab) -> None:
    """They go on while there is room ahead, then time out; each that has returned is read afterwards."""
    child, endpoint = await owner(start, slab)
    async with (
        featcache.connect(endpoint, settings=slab.settings()) as cache,
        featcache.connect(endpoint, settings=slab.settings()) as other,
    ):
        refs = [await cache.put(feature(0, SIZE).to(slab.device))]

        async def put_all() -> None:
            for seed in range(1, 2 * CAPACITY // SIZE):
                value = feature(seed, SIZE).to(slab.device)
                refs.append(await cache.put(value, timeout=SHORT_S))

        with stopped(child), pytest.raises(PutTimeout):
            await put_all()
        for seed, ref in enumerate(refs):
            assert is_right(await asyncio.wait_for(other.get(ref), PATIENT_S), seed)
        await account(child)
        assert await child.ask("used") == ("used", 0)


async def test_what_waits_goes_on_afterwards(start: Start, slab: Slab) -> None:
    """Puts, waits for keys, and what is done to keys, with no timeout."""
    child, endpoint = await owner(start, slab)
    value = feature(1, SIZE).to(slab.device)
    await put(child, 2, "old")
    async with featcache.connect(endpoint, settings=slab.settings()) as cache:
        with stopped(child):
            waits = [
                asyncio.ensure_future(cache.put(value, key="new")),
                asyncio.ensure_future(cache.get("new", timeout=PATIENT_S)),
                asyncio.ensure_future(cache.pin("old")),
            ]
            for _ in range(ROUNDS):
                assert is_right(await cache.get("old"), 2)
            assert not any(wait.done() for wait in waits)
        _, found, _ = await asyncio.wait_for(asyncio.gather(*waits), PATIENT_S)
        assert is_right(found, 1)
        assert is_right(await cache.get("new"), 1)
        await cache.unpin("old")
        await account(child)


@host_only
async def test_nobody_attaches(start: Start, slab: Slab) -> None:
    """Who comes now is told so in its time."""
    child, endpoint = await owner(start, slab)
    with stopped(child), pytest.raises(AttachRefused):
        await featcache.connect(endpoint, settings=slab.settings(attach_timeout=SHORT_S)).open()


async def test_a_reader_that_dies_meanwhile(start: Start, slab: Slab) -> None:
    """Its read is paid once the owner goes on; the bytes are free though nobody else comes."""
    child, endpoint = await owner(start, slab)
    await put(child, 1, "a")
    reader = await client(start, slab, endpoint)
    other = await client(start, slab, endpoint)
    with stopped(child):
        assert await reader.ask("borrow_key", "a", 1) == ("right",)
        reader.kill()
        assert await other.ask("get_key", "a", 1) == ("right",)
    await account(child)
    async with featcache.connect(endpoint, settings=slab.settings()) as cache:
        assert await cache.evict("a")
    await account(child)
    assert await child.ask("used") == ("used", 0)


async def test_a_put_under_a_key_times_out_with_room_ahead(start: Start, slab: Slab) -> None:
    """It has its room, and can't tell the owner: what it wrote is taken back."""
    child, endpoint = await owner(start, slab)
    value = feature(1, SIZE).to(slab.device)
    async with featcache.connect(endpoint, settings=slab.settings()) as cache:
        for _ in range(3):
            await cache.put(value, key="old")
        await account(child)
        with stopped(child):
            for timeout in (SHORT_S, 0):
                with pytest.raises(PutTimeout):
                    await asyncio.wait_for(cache.put(value, key="k", timeout=timeout), PATIENT_S)
        await account(child)
        assert not await cache.contains("k"), "nobody put it in time"
        assert is_right(await cache.get("old"), 1)
