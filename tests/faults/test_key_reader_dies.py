"""A client that reads by key is killed: its grants, places and pins come back at once, nothing else."""

import asyncio
import signal
from typing import Any, Final

import pytest
import torch

import featcache
from faults.agents import feature, is_right
from faults.checks import Log, events
from faults.keyed import (
    CAPACITY,
    SIZE,
    both,
    case,
    client,
    key_waiters,
    lead,
    lost,
    put,
    reads_out,
    resident,
    used,
    waiters,
    works,
)
from featcache import FeatureCache, KeyNotFound
from support.processes import Child, Start, until
from support.slabs import Slab

BY_MESSAGE: Final = {"sent find", "answered", "taken", "giving back", "paying"}
"""Steps of a read that the owner granted; the others are of one that the session found by itself."""
# The step, what leads to it, whether the read is paid by then, and its name.
STEPS: Final[list[tuple[str | None, str, bool, str]]] = [
    ("sent find", "get", False, "asked"),
    ("answered", "get", False, "granted"),
    ("taken", "get", False, "taken"),
    ("leased", "get", False, "leased"),
    ("copying", "get", False, "before the bytes"),
    ("copied", "get", False, "after the bytes"),
    ("ending", "get", False, "before paying"),
    ("paying", "get", False, "paying a grant"),
    ("ended", "get", True, "paid"),
    ("answered", "borrow", False, "granted to borrow"),
    ("giving back", "get", False, "before paying a grant"),
    ("leased", "borrow", False, "leased to borrow"),
    (None, "borrow", False, "in a borrow"),
    ("leaving", "leave", False, "leaving a borrow"),
]
ON_GPU: Final = {"asked", "after the bytes", "paying a grant", "in a borrow"}


def cases() -> list[Any]:
    return [
        case(kind, step, command, paid, name=name)
        for kind in ("host", "vmm")
        for step, command, paid, name in STEPS
        if kind == "host" or name in ON_GPU
    ]


async def lead_to(child: Child, step: str | None, command: str) -> None:
    """Bring a client to its step of reading "a"."""
    if step in BY_MESSAGE:
        await child.ask("by_message")
    if command == "leave":
        await lead(child, None, "borrow_key", "a", 1)
        await lead(child, step, "leave")
    else:
        await lead(child, step, f"{command}_key", "a", 1)


def paid_unseen(cache: FeatureCache) -> int:
    """How many reads that are out have been paid, of which the owner has not taken note."""
    return sum(
        page.words.granted[grant.index] == grant.serial
        for page in cache._opened().pool.pages.values()
        for grant in page.grants.values()
    )


@pytest.mark.parametrize(("slab", "step", "command", "paid"), cases(), indirect=["slab"])
async def test_killed_at_a_step(
    start: Start, log: Log, slab: Slab, step: str | None, command: str, paid: bool
) -> None:
    """The bytes that it read are evicted, and free once the others who read them are done."""
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        await put(cache, slab, 1, key="a")
        await put(cache, slab, 2, key="b")
        child = await client(start, slab, cache.endpoint, name="doomed")
        async with survivor.borrow("a") as view:
            await lead_to(child, step, command)
            # A lease that ended is out no more at once, a grant when the owner has taken note.
            await until(lambda: reads_out(cache) - paid_unseen(cache) == 2 - paid)
            assert await cache.evict("a")
            putting = asyncio.create_task(put(cache, slab, 3, CAPACITY))
            await until(lambda: waiters(cache) == 1)
            child.kill()
            await lost(log)
            (entry,) = events(log, "reader.lost")
            assert (entry["reader"], entry["reads_paid"]) == ("doomed", 0 if paid else 1)
            assert reads_out(cache) == 1
            assert waiters(cache) == 1
            assert used(cache) == 2 * SIZE
            assert is_right(view, 1)
            if slab.kind != "host":
                torch.cuda.synchronize(slab.device)
        ref = await asyncio.wait_for(putting, 20.0)
        assert resident(cache) == set(), "the put took the room of the other key too"
        assert is_right(await cache.get(ref), 3)
        await works(cache, slab)


@pytest.mark.parametrize(
    ("slab", "step"),
    [
        case("host", "sent find", name="asked"),
        case("host", "copying", name="before the bytes"),
        case("host", None, name="in a borrow"),
        case("vmm", "copied", name="after the bytes"),
    ],
    indirect=["slab"],
)
async def test_a_put_that_waits_gets_the_room_of_the_dead(
    start: Start, log: Log, slab: Slab, step: str | None
) -> None:
    """Its death alone is the event: what it read was evicted before, and nobody else reads it."""
    async with slab.create(recycle_interval=60.0) as cache:
        await put(cache, slab, 1, CAPACITY, key="a")
        child = await client(start, slab, cache.endpoint)
        await lead_to(child, step, "borrow" if step is None else "get")
        await until(lambda: reads_out(cache) == 1)
        putting = asyncio.create_task(put(cache, slab, 2, CAPACITY))
        await until(lambda: waiters(cache) == 1)
        assert cache.statistics().evicted == 0, "what is read is not evicted for room"
        child.kill()
        ref = await asyncio.wait_for(putting, 20.0)
        assert cache.statistics().evicted == 1
        assert is_right(await cache.get(ref), 2)
        await works(cache, slab)


# --- places ---------------------------------------------------------------------------------------


async def test_killed_while_it_waits_for_a_key(start: Start, log: Log, slab: Slab) -> None:
    """Its place is gone; another's, before and after it, is not."""
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        child = await client(start, slab, cache.endpoint)
        first = asyncio.create_task(survivor.get("a", timeout=60.0))
        await until(lambda: key_waiters(cache) == 1)
        child.tell("get_key", "a", 1, 60.0)
        await until(lambda: key_waiters(cache) == 2)
        last = asyncio.create_task(cache.get("a", timeout=60.0))
        await until(lambda: key_waiters(cache) == 3)
        child.kill()
        await until(lambda: key_waiters(cache) == 2)
        await lost(log)
        assert not first.done()
        assert not last.done()
        await put(cache, slab, 1, key="a")
        assert is_right(await first, 1)
        assert is_right(await last, 1)
        await works(cache, slab)


@pytest.mark.parametrize("seen", [False, True], ids=["with the put", "after it"])
async def test_killed_as_what_it_waits_for_comes(
    start: Start, log: Log, slab: Slab, seen: bool
) -> None:
    """The grant that it never took is nobody's."""
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint)
        await child.ask("arm", "answered")
        child.tell("get_key", "a", 1, 60.0)
        await until(lambda: key_waiters(cache) == 1)
        cache.put_nowait(feature(1, SIZE).to(slab.device), key="a")
        if seen:
            await child.expect("at", "answered")
        child.kill()  # before the loop has run, if it was not seen
        await lost(log)
        await until(lambda: reads_out(cache) == 0)
        assert is_right(await cache.get("a"), 1)
        await works(cache, slab)


async def test_killed_while_it_waits_for_the_bytes_of_a_key(
    start: Start, log: Log, slab: Slab
) -> None:
    """The key is there, its bytes are late: the dead reader's grant keeps nothing."""
    async with slab.create(recycle_interval=60.0) as cache:
        ref = await put(cache, slab, 1, key="a")
        published = cache._opened().pool.words.published
        await until(lambda: published[ref.slot] == ref.generation)
        published[ref.slot] = 0
        child = await client(start, slab, cache.endpoint)
        child.tell("get_key", "a", 1)
        await until(lambda: reads_out(cache) == 1)
        assert await cache.evict("a")
        child.kill()
        await lost(log)
        assert reads_out(cache) == 0
        assert used(cache) == SIZE, "free before its bytes came"
        published[ref.slot] = ref.generation
        await works(cache, slab)


# --- pins -----------------------------------------------------------------------------------------


async def test_killed_with_pins(start: Start, log: Log, slab: Slab) -> None:
    """Its pins go, all of them; those of others on the same key stay, and so do the features."""
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        for seed, key in enumerate("abcd"):
            await put(cache, slab, seed, key=key)
        child = await client(start, slab, cache.endpoint)
        for key in "aabbc":
            assert await child.ask("pin", key) == ("pinned",)
        await survivor.pin("a")
        await survivor.evict("d")
        assert cache.statistics().pinned_bytes == 3 * SIZE
        putting = asyncio.create_task(put(cache, slab, 9, 2 * SIZE))
        await until(lambda: waiters(cache) == 1)
        child.kill()
        ref = await asyncio.wait_for(putting, 20.0)
        assert cache.statistics().pinned_bytes == SIZE
        assert b"a" in resident(cache)
        assert is_right(await survivor.get("a"), 0)
        assert is_right(await cache.get(ref), 9)
        await survivor.unpin("a")
        await lost(log)
        await works(cache, slab)


async def test_killed_with_a_pin_on_what_was_evicted(start: Start, log: Log, slab: Slab) -> None:
    """A pin goes with its key: what is put there later is nobody's, before and after the death."""
    async with slab.create(recycle_interval=60.0) as cache:
        await put(cache, slab, 1, key="a")
        child = await client(start, slab, cache.endpoint)
        assert await child.ask("pin", "a") == ("pinned",)
        await put(cache, slab, 2, key="a")
        assert cache.statistics().pinned_bytes == SIZE, "a pin is on the key, whatever is there"
        assert await cache.evict("a")
        await put(cache, slab, 3, key="a")
        assert cache.statistics().pinned_bytes == 0
        child.kill()
        await lost(log)
        with pytest.raises(KeyNotFound):
            await cache.unpin("b")
        await cache.unpin("a")  # there is none: nothing happens
        await works(cache, slab)


# --- many, and those that only seem dead -----------------------------------------------------------


async def test_killed_with_reads_of_every_kind(start: Start, log: Log, slab: Slab) -> None:
    """By key held and paid, by ref held, owed by name, waiting: each of them ends."""
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        child = await client(start, slab, cache.endpoint, name="tp0")
        await put(cache, slab, 1, key="a")
        ref = await put(cache, slab, 2, key="b", readers=["tp0"])
        owed = await put(cache, slab, 3, readers=["tp0", "tp1"])
        for _ in range(3):
            assert await child.ask("borrow_key", "a", 1) == ("right",)
            assert await child.ask("get_key", "b", 2) == ("right",)
        assert await child.ask("leave") == ("left",)
        assert await child.ask("borrow", ref.to_bytes(), 2) == ("right",)
        assert await child.ask("begin", "wait", "get_key", "c", 4, 60.0) == ("begun",)
        await until(lambda: key_waiters(cache) == 1)
        child.kill()
        await lost(log)
        # Two borrows by key (what it had paid by then, it had paid), a borrow and a read of its name's.
        if slab.kind == "host":
            assert events(log, "reader.lost")[0]["reads_paid"] == 4
        assert resident(cache) == {b"a", b"b"}
        assert cache._opened().pool.store.owing.keys() == {owed.slot}
        assert is_right(await survivor.get("a"), 1)
        assert is_right(await survivor.get("b"), 2)
        await cache.discard(owed)
        await works(cache, slab)


async def test_stopped_in_a_borrow(start: Start, log: Log, slab: Slab) -> None:
    """Stopped is not dead: what it reads stays, though its key is dropped and a put waits."""
    async with slab.create(recycle_interval=60.0) as cache:
        await put(cache, slab, 1, CAPACITY, key="a")
        child = await client(start, slab, cache.endpoint)
        assert await child.ask("borrow_key", "a", 1) == ("right",)
        child.signal(signal.SIGSTOP)
        assert await cache.evict("a")
        with pytest.raises(featcache.PutTimeout):
            await put(cache, slab, 2, timeout=0.1)
        assert reads_out(cache) == 1
        child.signal(signal.SIGCONT)
        assert await child.ask("look", 1) == ("right",)
        putting = asyncio.create_task(put(cache, slab, 2, CAPACITY))
        await until(lambda: waiters(cache) == 1)
        child.signal(signal.SIGSTOP)
        child.kill()
        assert is_right(await cache.get(await asyncio.wait_for(putting, 20.0)), 2)
        await works(cache, slab)


async def test_quarantined(start: Start, log: Log, slab: Slab) -> None:
    """A socket that closed: its place goes, its grants and pins stay, what it pays still counts."""
    async with slab.create(recycle_interval=60.0) as cache:
        for seed, key in enumerate("abc"):  # in this order in the slab, and a quarter is free
            await put(cache, slab, seed, key=key)
        child = await client(start, slab, cache.endpoint)
        assert await child.ask("pin", "a") == ("pinned",)
        assert await child.ask("borrow_key", "b", 1) == ("right",)
        assert await child.ask("borrow_key", "c", 2) == ("right",)
        assert await child.ask("begin", "wait", "get_key", "d", 4, 60.0) == ("begun",)
        await until(lambda: key_waiters(cache) == 1)
        child.tell("hang_up")
        assert await both(child) == [
            ("hung up",),
            ("wait", "raised", "CacheClosed"),
        ]
        await until(lambda: events(log, "reader.quarantined"))
        assert key_waiters(cache) == 0
        assert reads_out(cache) == 2
        assert cache.statistics().pinned_bytes == SIZE
        putting = asyncio.create_task(put(cache, slab, 9, 2 * SIZE))
        await until(lambda: waiters(cache) == 1)
        assert await child.ask("look", 2) == ("right",)
        assert await child.ask("leave") == ("left",)
        ref = await asyncio.wait_for(
            putting, 20.0
        )  # of "c", which it has released, and the free quarter
        assert resident(cache) == {b"a", b"b"}
        assert is_right(await cache.get(ref), 9)
        assert await child.ask("look", 1) == ("right",)
        assert (reads_out(cache), cache.statistics().sessions) == (1, 1)
        child.kill()
        await lost(log)
        assert (reads_out(cache), cache.statistics().pinned_bytes) == (0, 0)
        await works(cache, slab)
