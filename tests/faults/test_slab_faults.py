"""Processes are killed, on every kind of slab: bytes come back, survivors read right, contexts live."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import featcache
from faults.agents import feature, is_right, owner, reader
from faults.checks import Log, events, ours
from featcache import FeatureCache, FeatureRef, OwnerLost
from support import processes
from support.caches import MIB
from support.processes import Child, Start, until
from support.slabs import HOME, Slab, busy, slab_params, stream_on

CAPACITY = 2 * MIB
SIZE = MIB // 2


on_all = pytest.mark.parametrize("slab", slab_params("host", "vmm", "ipc"), indirect=True)


@pytest.fixture
def start(slab: Slab) -> Iterator[Start]:
    """As elsewhere; the look for leaks is at what is the library's own."""
    before = ours()
    with processes.starting() as started:
        yield started
    assert ours() == before
    if slab.kind != "host":
        torch.cuda.synchronize(HOME)  # this process's context is sound


def held_by_a_session(cache: FeatureCache, ref: FeatureRef) -> bool:
    pages = cache._opened().pool.pages
    return any(page.holds(ref.slot, ref.generation) for number, page in pages.items() if number > 0)


async def empties(cache: FeatureCache) -> None:
    def empty() -> bool:
        now = cache.statistics()
        return (now.used_bytes, now.slots_used) == (0, 0)

    await until(empty)


async def works(cache: FeatureCache, slab: Slab) -> None:
    """The pool can do what a new one can."""
    await empties(cache)
    ref = await cache.put(feature(99, CAPACITY).to(slab.device), timeout=20.0)
    assert is_right(await cache.get(ref), 99)
    await empties(cache)


# --- readers -------------------------------------------------------------------------------------

MOMENTS = ["waiting", "borrow", "left", "ending", "paying", "paid"]


async def lead(child: Child, moment: str, ref: FeatureRef) -> None:
    """Bring a reader that is attached to where it is to be killed."""
    data = ref.to_bytes()
    if moment in {"borrow", "kernel", "left"}:
        assert await child.ask("borrow", data, 1) == ("right",)
        if moment == "kernel":
            assert await child.ask("read_slowly", 5.0) == ("reading",)
        elif moment == "left":
            assert await child.ask("leave") == ("left",)
        return
    child.tell("get", data, 1)
    if moment != "waiting":
        await child.expect("at", moment)


def cases() -> list[Any]:
    """All moments on the host; on a GPU those that differ there."""
    chosen = [("host", moment, name) for moment in MOMENTS for name in (None, "tp0")]
    chosen += [("vmm", moment, "tp0") for moment in ("waiting", "kernel", "paying")]
    chosen += [("vmm", moment, None) for moment in ("kernel", "left")]
    chosen += [("ipc", "kernel", "tp0"), ("ipc", "paid", None)]
    return [
        pytest.param(
            *slab_params(kind)[0].values,
            moment,
            name,
            marks=slab_params(kind)[0].marks,
            id=f"{kind}-{moment}-{name}",
        )
        for kind, moment, name in chosen
        if (kind, moment) != ("host", "kernel")  # it has no stream that could go on reading
    ]


@pytest.mark.parametrize(("slab", "moment", "name"), cases(), indirect=["slab"])
async def test_a_reader_is_killed(
    start: Start, log: Log, slab: Slab, moment: str, name: str | None
) -> None:
    """What it had begun is paid for it; another reads on; the bytes are the next feature's."""
    stop = moment if moment in {"ending", "paying", "paid"} else None
    owing: Any = 2 if name is None else [name, "survivor"]
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, name="survivor", settings=slab.settings()) as survivor,
    ):
        child = start(reader, cache.endpoint, name=name, stop=stop, kind=slab.kind)
        await child.expect("attached")
        side = stream_on() if slab.kind != "host" else None
        value = feature(1, SIZE).to(slab.device)
        with torch.cuda.stream(side):  # None is no stream, and does nothing
            if moment == "waiting" and side is not None:
                side.wait_stream(torch.cuda.default_stream(HOME))
                busy(0.5)
            ref = await cache.put(value, readers=owing)
        published = cache._opened().pool.words.published
        if moment == "waiting" and side is None:
            published[ref.slot] = 0  # its bytes are late
        await lead(child, moment, ref)
        if moment == "waiting":
            await until(lambda: held_by_a_session(cache, ref))
        child.kill()
        await until(lambda: events(log, "reader.lost"))
        assert [entry["reader"] for entry in events(log, "reader.lost")] == [name]
        if moment == "waiting" and side is None:
            published[ref.slot] = ref.generation
        assert cache.statistics().slots_used == 1
        assert is_right(await survivor.get(ref), 1)
        if slab.kind != "host":
            torch.cuda.synchronize(HOME)
        cache._opened().pool.collect()
        await works_after_collect(cache, slab)
        assert cache.statistics().readers_lost == 1
        assert cache.statistics().expired == 0


async def works_after_collect(cache: FeatureCache, slab: Slab) -> None:
    """As `works`, where no timer looks."""
    pool = cache._opened().pool

    def empty() -> bool:
        pool.collect()
        return cache.statistics().slots_used == 0

    await until(empty)
    ref = await cache.put(feature(99, CAPACITY).to(slab.device), timeout=20.0)
    assert is_right(await cache.get(ref), 99)
    await until(empty)
    assert cache.statistics().used_bytes == 0


@on_all
@pytest.mark.parametrize("name", [None], ids=["anonymous"])
async def test_a_put_that_waits_gets_the_room_of_the_dead(
    start: Start, slab: Slab, name: str | None
) -> None:
    """Also while a kernel of the dead process still read it, as it was killed."""
    async with slab.create(recycle_interval=60.0) as cache:
        child = start(reader, cache.endpoint, name=name)
        await child.expect("attached")
        owing: Any = 1 if name is None else [name]
        ref = await cache.put(feature(1, CAPACITY).to(slab.device), readers=owing)
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        if slab.kind != "host":
            assert await child.ask("read_slowly", 5.0) == ("reading",)
        putting = asyncio.create_task(cache.put(feature(2, CAPACITY).to(slab.device)))
        await until(lambda: cache.statistics().waiters == 1)
        child.kill()
        after = await asyncio.wait_for(putting, 20.0)
        assert is_right(await cache.get(after), 2)
        await works_after_collect(cache, slab)


async def test_names_that_died_owe_nothing_in_the_host_slab_either(
    start: Start, log: Log, slab: Slab
) -> None:
    """One read begun in each pool, one in each not begun, and what others owe is owed as before."""
    settings = slab.settings(recycle_interval=60.0)
    created = featcache.create(device=slab.device, spill="4MiB", settings=settings)
    async with created as cache:
        child = start(reader, cache.endpoint, name="tp0")
        await child.expect("attached")
        value = feature(1, CAPACITY).to(slab.device)
        here = await cache.put(value, readers=["tp0"], on_full="spill")
        there = [await cache.put(value, readers=["tp0"], on_full="spill") for _ in range(2)]
        assert {ref.pool_id for ref in there} & {here.pool_id} == set()
        assert cache.statistics().spilled == 2
        for ref in (here, there[0]):
            assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        child.kill()
        await until(lambda: events(log, "reader.lost"))
        state = cache._opened()
        assert state.spill is not None
        spill = state.spill.pool
        await until(lambda: (cache.statistics().slots_used, spill.store.table.used) == (0, 0))
        await works_after_collect(cache, slab)


async def test_killed_while_it_waits_for_a_copy_through_the_host(
    start: Start, log: Log, slab: Slab
) -> None:
    settings = slab.settings(relay_ttl=0.1)
    async with featcache.create(device=slab.device, settings=settings) as cache:
        through = slab.settings(through_host=True)
        child = start(reader, cache.endpoint, settings=through)
        await child.expect("attached")
        value = feature(1, CAPACITY).to(slab.device)
        ref = await cache.put(value, readers=2)
        assert await child.ask("get", ref.to_bytes(), 1) == ("right",)
        await until(lambda: cache.statistics().relayed == 1)
        await cache.discard(ref)
        ref = await cache.put(value, readers=1)
        published = cache._opened().pool.words.published
        await until(lambda: published[ref.slot] == ref.generation)
        published[ref.slot] = 0
        child.tell("get", ref.to_bytes(), 1)
        await until(lambda: held_by_a_session(cache, ref))
        child.kill()
        await until(lambda: events(log, "reader.lost"))
        published[ref.slot] = ref.generation
        await works(cache, slab)
        state = cache._opened()
        assert state.spill is not None
        spill = state.spill.pool
        await until(lambda: spill.store.table.used == 0)


# --- the owner -----------------------------------------------------------------------------------


async def opened(start: Start, slab: Slab, **given: Any) -> tuple[Child, str]:
    settings = slab.settings(**given)
    child = start(owner, settings=settings, device=str(slab.device))
    message, endpoint = await child.hear()
    assert message == "open"
    return child, endpoint


async def put(child: Child, seed: int, nbytes: int = SIZE, readers: int = 1) -> FeatureRef:
    message, data = await child.ask("put", seed, nbytes, readers)
    assert message == "ref"
    return FeatureRef.from_bytes(data)


async def lost(client: featcache.FeatureClient) -> None:
    await until(lambda: client.statistics().sessions == 0)


async def test_the_owner_is_killed_idle(start: Start, slab: Slab) -> None:
    child, endpoint = await opened(start, slab)
    ref = await put(child, 1, readers=2)
    async with featcache.connect(endpoint, settings=slab.settings()) as client:
        assert is_right(await client.get(ref), 1)
        child.kill()
        await lost(client)
        for use in (client.get(ref), client.release(ref), client.discard(ref)):
            with pytest.raises(OwnerLost):
                await use


@on_all
async def test_the_owner_is_killed_in_a_borrow(start: Start, slab: Slab) -> None:
    """The bytes stay, and stay right, also for a kernel that reads them after the block was left."""
    child, endpoint = await opened(start, slab)
    first, second = await put(child, 1), await put(child, 2)
    outs = []
    async with (
        featcache.connect(endpoint, settings=slab.settings()) as client,
        client.borrow(first) as one,
    ):
        assert is_right(one, 1)
        async with client.borrow(second) as two:
            child.kill()
            await lost(client)
            assert is_right(two, 2)
        if slab.kind == "host":
            assert is_right(one, 1)
        else:
            busy(0.3)
            assert isinstance(one, torch.Tensor)
            outs.append(one.clone())
    if slab.kind != "host":
        torch.cuda.synchronize(HOME)
    assert all(is_right(out, 1) for out in outs)


async def test_the_owner_is_killed_while_puts_wait_and_bytes_are_late(
    start: Start, slab: Slab
) -> None:
    child, endpoint = await opened(start, slab)
    late = await put(child, 1)
    async with featcache.connect(endpoint, settings=slab.settings()) as client:
        assert is_right(await client.get(late), 1)
        assert await child.ask("late_bytes") == ("late",)
        ref = await put(child, 2)
        waiting = asyncio.create_task(client.get(ref))
        child.tell("load", SIZE)
        for _ in range(3):
            await child.hear()
        child.kill()
        with pytest.raises(OwnerLost):
            await asyncio.wait_for(waiting, 20.0)
        await lost(client)


@pytest.mark.parametrize("step", ["written", "published"])
async def test_the_owner_is_killed_in_a_put(start: Start, slab: Slab, step: str) -> None:
    child = start(owner, settings=slab.settings(), device=str(slab.device), stop=step)
    _, endpoint = await child.hear()
    async with featcache.connect(endpoint, settings=slab.settings()) as client:
        child.tell("put", 1, SIZE, 1)
        await child.expect("at", step)
        child.kill()
        await lost(client)


async def test_the_owner_is_killed_while_others_read_what_it_puts(start: Start, slab: Slab) -> None:
    """Half of what it puts is read here, half in another process; nobody reads a wrong byte."""
    child, endpoint = await opened(start, slab)
    other = start(reader, endpoint)
    await other.expect("attached")
    async with featcache.connect(endpoint, settings=slab.settings()) as client:
        child.tell("load", SIZE)
        for count in range(60):
            _, seed, data = await child.hear()
            if count % 2:
                assert await other.ask("get", data, seed) == ("right",)
            else:
                async with client.borrow(FeatureRef.from_bytes(data)) as view:
                    assert is_right(view, seed)
        _, seed, data = await child.hear()
        async with client.borrow(FeatureRef.from_bytes(data)) as view:
            child.kill()
            assert is_right(view, seed)
        await lost(client)
    assert await other.ask("get", data, seed) == ("raised", "OwnerLost")
    other.tell("end")
    await other.ends()
