"""A client that puts is killed: its own slot is given up, once it is dead, and nothing else is lost."""

import asyncio
import signal
import threading
from typing import Any

import pytest

import featcache
from faults.agents import feature, is_right
from faults.checks import Log, events
from faults.keyed import (
    CAPACITY,
    SIZE,
    both,
    case,
    client,
    host_only,
    key_waiters,
    lead,
    lost,
    put,
    reads_out,
    reserved,
    used,
    waiters,
    works,
)
from featcache import FeatureCache, FeatureRef, PutTimeout, StaleRef
from featcache.control.channel import ChannelState
from featcache.memory.host.slab import HostMapping
from support.processes import Child, Start, until
from support.slabs import Slab, landed

STEPS = ["sent reserve", "answered", "reserved", "halfway", "filled", "told"]
"""Those at which a client has a slot, or will as soon as the owner looks, and nothing is published."""


def cases() -> list[Any]:
    chosen = [("host", step, key) for step in STEPS for key in (None, "k")]
    chosen += [("vmm", "reserved", None), ("vmm", "halfway", "k"), ("vmm", "told", None)]
    return [case(kind, step, key, name=f"{step}-{key}") for kind, step, key in chosen]


async def primed(cache: FeatureCache, child: Child) -> None:
    """Have a client put once, so that what is done once is done."""
    message, data = await child.ask("put_key", 7, SIZE, None)
    assert message == "ref"
    assert is_right(await cache.get(FeatureRef.from_bytes(data)), 7)

    def empty() -> bool:
        cache._opened().pool.collect()
        return used(cache) == 0

    await until(empty)


async def begin_put(child: Child, label: str, seed: int, nbytes: int, key: str | None) -> None:
    assert await child.ask("begin", label, "put_key", seed, nbytes, key) == ("begun",)


async def served(child: Child, label: str) -> FeatureRef:
    said, message, data = await child.hear()
    assert (said, message) == (label, "ref")
    return FeatureRef.from_bytes(data)


@pytest.mark.parametrize(("slab", "step", "key"), cases(), indirect=["slab"])
async def test_killed_at_a_step(
    start: Start, log: Log, slab: Slab, step: str, key: str | None
) -> None:
    """Others stand in the queue meanwhile, and are served in order as soon as it is dead."""
    async with slab.create(recycle_interval=60.0) as cache:
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        for each in (child, other) if step == "answered" else (other,):
            await primed(cache, each)  # or the first answer were the one that it maps the slab by
        kept = await put(cache, slab, 2)
        await lead(child, step, "put_pair", 1, CAPACITY - SIZE, key)
        await until(lambda: reserved(cache) == 1)
        assert used(cache) == CAPACITY

        mine = asyncio.create_task(put(cache, slab, 3, 2 * SIZE))
        await until(lambda: waiters(cache) == 1)
        await begin_put(other, "theirs", 4, SIZE, None)
        await until(lambda: waiters(cache) == 2)
        last = asyncio.create_task(put(cache, slab, 5, SIZE))
        await until(lambda: waiters(cache) == 3)
        child.kill()
        first_ref = await asyncio.wait_for(mine, 20.0)
        second_ref = await served(other, "theirs")
        await lost(log)
        await until(lambda: reserved(cache) == 0)  # the other's ref is good before it is heard of
        assert used(cache) == CAPACITY
        assert not last.done()
        assert not await cache.contains("k")
        assert is_right(await cache.get(kept), 2)
        assert is_right(await cache.get(await asyncio.wait_for(last, 20.0)), 5)
        assert is_right(await cache.get(second_ref), 4)
        assert is_right(await cache.get(first_ref), 3)
        assert cache.statistics().evicted == 0
        await works(cache, slab)


async def test_killed_right_after_publish(start: Start, log: Log, slab: Slab) -> None:
    """What it published outlives it: by ref, by key, and for who waited for the key."""
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint)
        message, data = await child.ask("put_key", 1, SIZE, None)
        assert message == "ref"
        waiting = asyncio.create_task(cache.get("k", timeout=60.0))
        await until(lambda: key_waiters(cache) == 1)
        await lead(child, "sent publish", "put_key", 2, SIZE, "k")
        await until(lambda: cache.statistics().keys == 1)
        assert is_right(await waiting, 2)  # the bytes have landed, its `put` has not returned
        child.kill()
        await lost(log)
        assert is_right(await cache.get(FeatureRef.from_bytes(data)), 1)
        assert is_right(await cache.get("k"), 2)
        await works(cache, slab)


async def test_killed_with_publish_in_its_socket(start: Start, log: Log, slab: Slab) -> None:
    """The owner finds the message and the death at once: the feature is there, whole, or it is not."""
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint)
        assert (await child.ask("put_key", 0, SIZE, "other"))[0] == "ref"
        for step in ("told", "sent publish"):
            assert await child.ask("arm", step) == ("armed",)
        child.tell("put_key", 1, SIZE, "k")
        await child.expect("at", "told")
        child.tell("go on")
        assert child.hear_now() == ("at", "sent publish")  # the loop has not run since
        child.kill()
        await lost(log)
        if await cache.contains("k"):
            assert is_right(await cache.get("k"), 1)
        assert is_right(await cache.get("other"), 0)
        await works(cache, slab)


async def test_killed_before_its_published_bytes_came(start: Start, log: Log, slab: Slab) -> None:
    """Who waits for the bytes by ref is told so, by key looks again; the slot is another's then."""
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        child = await client(start, slab, cache.endpoint)
        await primed(cache, child)
        assert await child.ask("late") == ("late",)
        _, data = await child.ask("put_key", 1, SIZE, None)
        ref = FeatureRef.from_bytes(data)
        assert (await child.ask("put_key", 2, CAPACITY - SIZE, "k"))[0] == "ref"
        by_ref = [asyncio.create_task(who.get(ref)) for who in (cache, survivor)]
        at_once = asyncio.create_task(survivor.get("k"))
        by_key = [asyncio.create_task(who.get("k", timeout=60.0)) for who in (cache, survivor)]
        await until(lambda: reads_out(cache) == 3)
        putting = asyncio.create_task(put(cache, slab, 3, CAPACITY - SIZE))
        await until(lambda: waiters(cache) == 1)
        assert not any(task.done() for task in (*by_ref, *by_key, at_once))
        child.kill()
        for task in by_ref:
            with pytest.raises(StaleRef):
                await asyncio.wait_for(task, 20.0)
        with pytest.raises(featcache.KeyNotFound):
            await asyncio.wait_for(at_once, 20.0)
        after = await asyncio.wait_for(putting, 20.0)
        await until(lambda: key_waiters(cache) == 2)
        (evicted,) = events(log, "key.evicted")
        assert (evicted["key"], evicted["cause"]) == ("k", "writer lost")
        await put(survivor, slab, 4, key="k")
        for task in by_key:
            assert is_right(await asyncio.wait_for(task, 20.0), 4)
        assert is_right(await cache.get(after), 3)
        assert is_right(await survivor.get("k"), 4)
        await works(cache, slab)


async def test_killed_before_the_bytes_of_a_given_up_slot_came(
    start: Start, log: Log, slab: Slab
) -> None:
    """What it published is discarded first, or replaced under its key: free once it is dead."""
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint)
        await primed(cache, child)
        assert await child.ask("late") == ("late",)
        _, data = await child.ask("put_key", 1, SIZE, None)
        assert (await child.ask("put_key", 2, SIZE, "k"))[0] == "ref"
        await cache.discard(FeatureRef.from_bytes(data))
        await put(cache, slab, 3, key="k")
        assert is_right(await cache.get("k"), 3)
        with pytest.raises(PutTimeout):
            await put(cache, slab, 4, 3 * SIZE, timeout=0.1)
        assert used(cache) == 3 * SIZE, "its stream may still write there"
        child.kill()
        await lost(log)
        assert used(cache) == SIZE
        assert is_right(await cache.get("k"), 3)
        await works(cache, slab)


# --- in the queue ---------------------------------------------------------------------------------


async def test_killed_while_it_waits_for_room(start: Start, log: Log, slab: Slab) -> None:
    """Its place is gone; who stands behind it is next, and who stands before it keeps his."""
    async with slab.create(recycle_interval=60.0) as cache:
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await primed(cache, other)
        held = await put(cache, slab, 1, 3 * SIZE)
        first = asyncio.create_task(put(cache, slab, 2, 2 * SIZE))
        await until(lambda: waiters(cache) == 1)
        await begin_put(child, "doomed", 3, CAPACITY, "k")
        await until(lambda: waiters(cache) == 2)
        await begin_put(other, "theirs", 4, 2 * SIZE, None)
        await until(lambda: waiters(cache) == 3)
        child.kill()
        await lost(log)
        await until(lambda: waiters(cache) == 2)
        assert not first.done()
        assert is_right(await cache.get(held), 1)
        assert is_right(await cache.get(await asyncio.wait_for(first, 20.0)), 2)
        assert is_right(await cache.get(await served(other, "theirs")), 4)
        await works(cache, slab)


async def test_killed_at_the_head_of_the_queue(start: Start, log: Log, slab: Slab) -> None:
    """What it waits for would never come; who stands behind it has room at once."""
    async with slab.create(recycle_interval=60.0) as cache:
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await primed(cache, other)
        held = await put(cache, slab, 1)
        await begin_put(child, "doomed", 3, CAPACITY, "k")
        await until(lambda: waiters(cache) == 1)
        await begin_put(other, "theirs", 4, SIZE, None)
        await until(lambda: waiters(cache) == 2)
        child.kill()
        assert is_right(await cache.get(await served(other, "theirs")), 4)
        await lost(log)
        assert is_right(await cache.get(held), 1)
        await works(cache, slab)


@host_only
@pytest.mark.parametrize("how", ["killed", "timed out"])
async def test_who_stands_behind_the_head_of_the_queue_gets_what_can_be_evicted(
    start: Start, log: Log, slab: Slab, how: str
) -> None:
    """The head could have its room by no eviction, the next can, as soon as the head is gone."""
    async with slab.create(recycle_interval=60.0) as cache:
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await primed(cache, other)
        held = await put(cache, slab, 1)
        for seed, key in enumerate("abc"):
            await put(cache, slab, seed, key=key)
        if how == "killed":
            await begin_put(child, "doomed", 3, CAPACITY, "k")
        else:
            head = asyncio.create_task(put(cache, slab, 3, CAPACITY, timeout=2.0))
        await until(lambda: waiters(cache) == 1)
        await begin_put(other, "theirs", 4, SIZE, None)
        await until(lambda: waiters(cache) == 2)
        assert cache.statistics().evicted == 0
        if how == "killed":
            child.kill()
        else:
            with pytest.raises(PutTimeout):
                await head
        assert is_right(await cache.get(await served(other, "theirs")), 4)
        assert cache.statistics().evicted == 1
        assert is_right(await cache.get(held), 1)
        await works(cache, slab)


async def test_killed_as_it_is_given_room(start: Start, log: Log, slab: Slab) -> None:
    """The room that it never heard of goes to the next."""
    async with slab.create(recycle_interval=60.0) as cache:
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await primed(cache, other)
        held = await put(cache, slab, 1, CAPACITY)
        await begin_put(child, "doomed", 3, CAPACITY, "k")
        await until(lambda: waiters(cache) == 1)
        await begin_put(other, "theirs", 4, CAPACITY, None)
        await until(lambda: waiters(cache) == 2)
        await landed(cache, held)
        await cache.discard(held)
        cache._opened().pool.store._retiring[held.slot].due_s = 0.0  # its grace has passed
        cache._opened().pool.collect()
        child.kill()  # and the loop has not run since
        assert is_right(await cache.get(await served(other, "theirs")), 4)
        await lost(log)
        await works(cache, slab)


async def pinned_and_waiting(cache: FeatureCache, slab: Slab, child: Child) -> None:
    """Fill the slab with four features, of which a child pins two, and have it wait for the room of three."""
    for seed, key in enumerate("abcd"):
        await put(cache, slab, seed, key=key)
    for key in "ab":
        assert await child.ask("pin", key) == ("pinned",)
    await begin_put(child, "doomed", 9, CAPACITY - SIZE, "k")
    await until(lambda: waiters(cache) == 1)


@host_only
async def test_nothing_is_evicted_for_the_dead(start: Start, log: Log, slab: Slab) -> None:
    """Its pins kept a put of its own from getting room; the features are others' when it is dead."""
    async with slab.create(recycle_interval=60.0) as cache:
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await primed(cache, other)
        await pinned_and_waiting(cache, slab, child)
        child.kill()
        await lost(log)
        await until(lambda: waiters(cache) == 0)
        assert cache.statistics().evicted == 0
        for seed, key in enumerate("abcd"):
            assert is_right(await cache.get(key), seed)
        await works(cache, slab)


@host_only
async def test_only_what_the_living_need_is_evicted(start: Start, log: Log, slab: Slab) -> None:
    """The same with another put behind it, which needs one feature's room."""
    async with slab.create(recycle_interval=60.0) as cache:
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await primed(cache, other)
        await pinned_and_waiting(cache, slab, child)
        await begin_put(other, "theirs", 8, SIZE, "e")
        await until(lambda: waiters(cache) == 2)
        child.kill()
        await served(other, "theirs")
        await lost(log)
        assert set(cache._opened().pool.store.directory) == {b"b", b"c", b"d", b"e"}
        await works(cache, slab)


# --- those that only seem dead --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slab", "step"),
    [
        case("host", "reserved", name="reserved"),
        case("host", "halfway", name="halfway"),
        case("host", "told", name="told"),
        case("vmm", "halfway", name="halfway"),
    ],
    indirect=["slab"],
)
async def test_a_stopped_writer_keeps_its_slot(
    start: Start, log: Log, slab: Slab, step: str
) -> None:
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint)
        await lead(child, step, "put_pair", 1, CAPACITY, "k")
        await until(lambda: reserved(cache) == 1)
        child.signal(signal.SIGSTOP)
        waiting = asyncio.create_task(cache.get("k", timeout=60.0))
        await until(lambda: key_waiters(cache) == 1)
        with pytest.raises(PutTimeout):
            await put(cache, slab, 2, timeout=0.1)
        assert (used(cache), reserved(cache)) == (CAPACITY, 1)
        child.signal(signal.SIGCONT)
        child.tell("go on")
        if step == "halfway":  # it stops there after each of two
            await child.expect("at", step)
            child.tell("go on")
        assert (await child.hear())[0] == "ref"
        found = await asyncio.wait_for(waiting, 20.0)
        assert isinstance(found, dict)
        whole = feature(1, CAPACITY)
        halves = (found["first"].cpu(), found["second"].cpu())
        assert all(
            bool((half == part).all()) for half, part in zip(halves, whole.chunk(2), strict=True)
        )
        assert not events(log, "reader.lost")
        child.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        await works(cache, slab)


@host_only
async def test_a_quarantined_writer_keeps_its_slots(start: Start, log: Log, slab: Slab) -> None:
    """Its socket closed, threads of it still copy: only its death frees what they copy into."""
    async with slab.create(recycle_interval=60.0) as cache:
        settings = slab.settings(inline_bytes=0)
        child = await client(start, slab, cache.endpoint, settings=settings)
        other = await client(start, slab, cache.endpoint)
        await primed(cache, other)
        assert await child.ask("hold_writes") == ("holding",)
        for label in ("one", "two"):
            child.tell("begin", label, "put_key", 1, SIZE, label)
            assert {await child.hear(), await child.hear()} == {("begun",), ("at", "writing")}
        await begin_put(child, "three", 3, CAPACITY, "three")
        await until(lambda: waiters(cache) == 1)
        assert reserved(cache) == 2
        child.tell("hang_up")
        assert {await child.hear(), await child.hear()} == {
            ("hung up",),
            ("three", "raised", "CacheClosed"),
        }
        await until(lambda: events(log, "reader.quarantined"))
        await until(lambda: waiters(cache) == 0)  # it waits no longer
        await put(cache, slab, 4, 2 * SIZE, key="d")
        await begin_put(other, "theirs", 5, CAPACITY, None)
        await until(lambda: waiters(cache) == 1)
        assert await child.ask("let_go") == ("let go",)
        assert (used(cache), reserved(cache), waiters(cache)) == (CAPACITY, 2, 1)
        assert is_right(await cache.get("d"), 4)
        child.kill()
        ref = await served(other, "theirs")
        assert is_right(await cache.get(ref), 5)
        await lost(log)
        await works(cache, slab)


@host_only
async def test_a_writer_that_leaves_while_its_threads_copy(
    start: Start, log: Log, slab: Slab
) -> None:
    """Closed in the middle of a put, a client says goodbye when that is done: nobody's bytes suffer."""
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint, settings=slab.settings(inline_bytes=0))
        assert await child.ask("hold_writes") == ("holding",)
        child.tell("begin", "put", "put_key", 1, SIZE, "k")
        assert {await child.hear(), await child.hear()} == {("begun",), ("at", "writing")}
        assert await child.ask("close") == ("closed",)
        assert (cache.statistics().sessions, reserved(cache)) == (1, 1)
        child.tell("let_go")
        said: list[Any] = await both(child)
        assert said[0] == ("let go",)
        await until(lambda: cache.statistics().sessions == 0)
        assert reserved(cache) == 0
        assert events(log, "reader.left")
        if said[1][1] == "ref":
            assert is_right(await cache.get("k"), 1)
        await works(cache, slab)


@host_only
async def test_a_client_closed_before_its_first_put_has_room(
    start: Start, slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told so: its put requests room in a session that has ended."""
    mapping, go_on = threading.Event(), threading.Event()
    open_for_writing = HostMapping.open_for_writing

    def slow(*arguments: Any) -> None:
        open_for_writing(*arguments)
        mapping.set()
        assert go_on.wait(20.0)

    monkeypatch.setattr(HostMapping, "open_for_writing", slow)
    async with slab.create() as cache:
        connection = await featcache.connect(cache.endpoint, settings=slab.settings()).open()
        task = asyncio.create_task(put(connection, slab, 1))
        await until(mapping.is_set)
        link = connection._opened().registry.connections[0].link
        closing = asyncio.create_task(connection.aclose())
        await until(lambda: link._channel.state is ChannelState.CLOSED)
        go_on.set()
        await closing
        try:
            with pytest.raises((featcache.CacheClosed, featcache.OwnerLost)):
                await asyncio.wait_for(task, 20.0)
        finally:
            task.cancel()
