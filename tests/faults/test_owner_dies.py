"""The owner is killed: clients know at once, what they borrowed stays right until they let it go."""

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest

import featcache
from faults.agents import is_right, mappings, owner, reader
from faults.checks import Log, events, exists
from featcache import FeatureClient, FeatureRef, OwnerLost
from featcache.control import endpoint as endpoints
from featcache.memory.host.slab import HostMapping
from featcache.settings import Settings
from support.processes import Child, Start, starting, until

SIZE = 128 << 10
SETTINGS = Settings(capacity=4 * SIZE, initial=4 * SIZE, slots=8)
AT_ONCE_S = 2.0  # a busy machine included; no timeout of the library is as short


@pytest.fixture
def start(no_leaks: None) -> Iterator[Start]:
    """As elsewhere; the socket files of the killed are left to the next owner, which comes here."""
    with starting() as started:
        yield started
    give_up_s = time.monotonic() + AT_ONCE_S
    while slabs() and time.monotonic() < give_up_s:
        time.sleep(0.005)  # the loop is gone, the thread that unmaps may not be
    endpoints.listen(None).close()


async def opened(start: Start, **given: Any) -> tuple[Child, str]:
    child = start(owner, settings=SETTINGS, **given)
    message, endpoint = await child.hear()
    assert message == "open"
    return child, endpoint


async def put(child: Child, seed: int, nbytes: int = SIZE, readers: Any = 1) -> FeatureRef:
    message, data = await child.ask("put", seed, nbytes, readers)
    assert message == "ref"
    return FeatureRef.from_bytes(data)


def slabs() -> int:
    """Mappings of a slab that this process has, without any help of the garbage collector."""
    return sum("featcache-slab" in mapping for mapping in mappings())


async def unmapped() -> None:
    """Wait for the end of the mapping, which a thread makes."""
    await until(lambda: slabs() == 0, AT_ONCE_S)


def descriptors() -> Counter[str]:
    targets: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this listing
            targets[str(entry.readlink())] += 1
    return targets


def holds(client: FeatureClient) -> int:
    """How many refs a client holds."""
    return sum(handle.attachment.holds for handle in client._opened().registry.connections)


async def lost_at_once(waiting: Awaitable[object]) -> str:
    """A wait that must end with OwnerLost now; return what it says."""
    with pytest.raises(OwnerLost) as caught:
        await asyncio.wait_for(waiting, AT_ONCE_S)
    return str(caught.value)


async def test_killed_idle(start: Start, log: Log) -> None:
    child, endpoint = await opened(start)
    ref = await put(child, 1)
    before = descriptors()
    async with featcache.connect(endpoint) as client:
        assert slabs() == 1
        child.kill()
        await until(lambda: events(log, "owner.lost"), AT_ONCE_S)
        assert events(log, "owner.lost")[0]["endpoint"] == endpoint
        await unmapped()
        await until(lambda: descriptors() == before)
        for use in (client.get(ref), client.release(ref), client.discard(ref)):
            assert endpoint in await lost_at_once(use)
        with pytest.raises(OwnerLost):
            client.get_nowait(ref)
        with pytest.raises(OwnerLost), client.borrow(ref):
            pass
        with pytest.raises(OwnerLost):
            async with client.borrow(ref):
                pass
        now = client.statistics()
        assert (now.sessions, now.capacity_bytes, now.used_bytes) == (0, 0, 0)
    assert exists(endpoint)  # the dead don't tidy up; the next owner does
    async with featcache.create(settings=SETTINGS):
        assert not exists(endpoint)


async def test_killed_in_a_clients_borrow(start: Start, log: Log) -> None:
    """The bytes stay, and stay right, until the last borrow ends; then nothing is left."""
    child, endpoint = await opened(start)
    first, second = await put(child, 1), await put(child, 2)
    before = descriptors()
    async with featcache.connect(endpoint) as client:
        async with client.borrow(first) as one:
            async with client.borrow(second) as two:
                child.kill()
                await until(lambda: events(log, "owner.lost"), AT_ONCE_S)
                assert is_right(two, 2)
            assert slabs() == 1
            assert is_right(one, 1)
            await lost_at_once(client.get(second))
        assert not is_right(one, 1), "a view is empty after its borrow"
        await unmapped()
        gc.collect()
        await until(lambda: descriptors() == before)
        assert mappings() == []


async def test_what_is_lost_in_a_borrow_waits_for_no_garbage_collector(
    start: Start, log: Log
) -> None:
    child, endpoint = await opened(start)
    ref = await put(child, 1)
    gc.disable()
    try:
        before = descriptors()
        async with featcache.connect(endpoint) as client:
            async with client.borrow(ref):
                child.kill()
                await until(lambda: events(log, "owner.lost"), AT_ONCE_S)
            await unmapped()
            await until(lambda: descriptors() == before)
            assert mappings() == []
    finally:
        gc.enable()


async def test_killed_and_a_client_closed_in_its_borrow(start: Start, log: Log) -> None:
    child, endpoint = await opened(start)
    ref = await put(child, 1)
    client = await featcache.connect(endpoint).open()
    async with client.borrow(ref) as view:
        child.kill()
        await client.aclose()  # before the loop has seen that the owner is gone
        assert is_right(view, 1)
    await until(lambda: slabs() == 0, AT_ONCE_S)


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
async def test_killed_under_load(start: Start, log: Log, bound: bool) -> None:
    """It puts as fast as it can and dies in the middle; nobody ever reads a wrong byte."""
    child, endpoint = await opened(start)
    other = start(reader, endpoint if bound else None)
    await other.expect("attached")
    before = descriptors()
    async with featcache.connect(endpoint if bound else None) as client:
        child.tell("load", SIZE // 4)
        for count in range(200):
            _, seed, data = await child.hear()
            ref = FeatureRef.from_bytes(data)
            if count % 3 == 0:
                assert is_right(await client.get(ref), seed)
            elif count % 3 == 1:
                async with client.borrow(ref) as view:
                    assert is_right(view, seed)
            else:
                assert await other.ask("get", data, seed) == ("right",)
        _, seed, data = await child.hear()
        async with client.borrow(FeatureRef.from_bytes(data)) as view:
            os.kill(child.pid, signal.SIGKILL)  # and go on: it dies while this process reads
            await until(lambda: events(log, "owner.lost"), AT_ONCE_S)
            assert is_right(view, seed)
        await unmapped()
        gc.collect()
        await until(lambda: descriptors() == before)
        await lost_at_once(client.get(FeatureRef.from_bytes(data)))
        assert await other.ask("get", data, seed) == ("raised", other_error(bound))
    other.tell("end")
    await other.ends()


def other_error(bound: bool) -> str:
    """What another client says: one that is bound knows its owner, one that is not looks again."""
    return "OwnerLost" if bound else "OwnerUnreachable"


@pytest.mark.parametrize("step", ["reserved", "written", "publishing", "published"])
async def test_killed_in_a_put(start: Start, log: Log, step: str) -> None:
    child, endpoint = await opened(start, stop=step)
    async with featcache.connect(endpoint):
        child.tell("put", 1, SIZE, 1)
        await child.expect("at", step)
        child.kill()
        await until(lambda: events(log, "owner.lost"), AT_ONCE_S)
        await unmapped()


async def test_killed_while_bytes_are_awaited(start: Start) -> None:
    """A slab whose words come late is killed before they came: get and borrow stop waiting."""
    child, endpoint = await opened(start)
    assert await child.ask("late_bytes") == ("late",)
    ref = await put(child, 1)

    async def borrowing(client: FeatureClient) -> None:
        async with client.borrow(ref):
            pass

    async with featcache.connect(endpoint) as client:
        waiting = [asyncio.create_task(client.get(ref)), asyncio.create_task(borrowing(client))]
        await until(lambda: holds(client))
        child.kill()
        for task in waiting:
            await lost_at_once(task)
        await unmapped()


async def test_killed_while_it_is_asked(start: Start) -> None:
    child, endpoint = await opened(start, stop="discarding")
    ref = await put(child, 1)
    async with featcache.connect(endpoint) as client:
        waiting = asyncio.create_task(client.discard(ref))
        await child.expect("at", "discarding")
        child.kill()
        await lost_at_once(waiting)
        await unmapped()


@pytest.mark.parametrize("bound", [True, False], ids=["connect", "first get"])
async def test_killed_while_a_client_attaches(start: Start, bound: bool) -> None:
    child, endpoint = await opened(start, stop="greeting")
    ref = await put(child, 1)

    async def connecting() -> None:
        async with featcache.connect(endpoint):
            pass

    async with featcache.connect() as unbound:
        waiting = asyncio.create_task(connecting() if bound else unbound.get(ref))
        await child.expect("at", "greeting")
        child.kill()
        await lost_at_once(waiting)


async def test_killed_before_a_client_maps(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The welcome is there, the descriptors too; the owner is dead when they are mapped."""
    child, endpoint = await opened(start)
    attach = HostMapping.attach

    def late(fd: int, capacity_bytes: int, committed_bytes: int) -> HostMapping:
        child.kill()
        return attach(fd, capacity_bytes, committed_bytes)

    monkeypatch.setattr(HostMapping, "attach", staticmethod(late))
    before = descriptors()

    async def connecting() -> None:
        async with featcache.connect(endpoint) as client:  # may come before the news of the death
            await until(lambda: client.statistics().sessions == 0, AT_ONCE_S)
            await client.get(gone)

    gone = await put(child, 1)
    await lost_at_once(connecting())
    gc.collect()
    await unmapped()
    await until(lambda: descriptors() == before)


async def test_killed_while_a_thread_copies(
    start: Start, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A get that is in its copy gets right bytes: the mapping stays until it is done."""
    child, endpoint = await opened(start)
    ref = await put(child, 1)
    copying, go_on = threading.Event(), threading.Event()
    read = HostMapping.read

    def slow(*arguments: Any) -> Any:
        copying.set()
        assert go_on.wait(10)
        return read(*arguments)

    monkeypatch.setattr(HostMapping, "read", slow)
    settings = Settings(inline_bytes=0)  # every copy goes to a thread
    async with featcache.connect(endpoint, settings=settings) as client:
        waiting = asyncio.create_task(client.get(ref))
        await until(copying.is_set)
        child.kill()
        await until(lambda: events(log, "owner.lost"), AT_ONCE_S)
        assert slabs() == 1
        go_on.set()
        assert is_right(await waiting, 1)
        await until(lambda: slabs() == 0, AT_ONCE_S)


async def test_a_new_owner_at_the_same_endpoint(start: Start, log: Log, runtime_dir: Path) -> None:
    """It takes the path over; nobody takes the old refs for its own."""
    endpoint = str(runtime_dir / "pool.sock")
    child, _ = await opened(start, endpoint=endpoint)
    old = await put(child, 1)
    async with featcache.connect(endpoint) as bound, featcache.connect() as unbound:
        assert is_right(await unbound.get(old), 1)
        child.kill()
        await until(lambda: len(events(log, "owner.lost")) == 2, AT_ONCE_S)
        heir, _ = await opened(start, endpoint=endpoint)
        new = await put(heir, 2)
        with pytest.raises(featcache.UnknownPool):
            await unbound.get(old)
        assert is_right(await unbound.get(new), 2)
        await lost_at_once(bound.get(old))
        with pytest.raises((OwnerLost, featcache.UnknownPool)):
            await bound.get(new)
    heir.tell("end")
    await heir.ends()
    assert not exists(endpoint)


async def test_closing_is_not_death(start: Start, log: Log) -> None:
    """An owner that closes says so: the same OwnerLost, another reason, and its file goes."""
    child, endpoint = await opened(start)
    ref = await put(child, 1)
    async with featcache.connect(endpoint) as client, client.borrow(ref) as view:
        child.tell("end")
        await until(lambda: events(log, "owner.lost"), AT_ONCE_S)
        assert events(log, "owner.lost")[0]["reason"] == "it closed the pool"
        await child.ends()
        assert not exists(endpoint)
        assert is_right(view, 1)
        assert "closed the pool" in await lost_at_once(client.get(ref))


async def test_stopped_owner_is_not_lost(start: Start, log: Log) -> None:
    """An owner that is stopped is silent, not dead: borrows go on, waits wait."""
    child, endpoint = await opened(start)
    first, second = await put(child, 1), await put(child, 2)
    async with featcache.connect(endpoint) as client:
        child.signal(signal.SIGSTOP)
        assert is_right(await client.get(first), 1)  # reading needs nothing of the owner
        waiting = asyncio.create_task(client.discard(second))
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        child.signal(signal.SIGCONT)
        await asyncio.wait_for(waiting, AT_ONCE_S)
        with pytest.raises(featcache.StaleRef):
            await client.get(second)
        assert not events(log, "owner.lost")
        child.signal(signal.SIGSTOP)
        child.kill()  # the stopped can be killed
        await until(lambda: events(log, "owner.lost"), AT_ONCE_S)


async def test_waits_end_soon(start: Start) -> None:
    """At once: milliseconds from the death to the error of a wait, on a machine that is not busy."""
    child, endpoint = await opened(start)
    assert await child.ask("late_bytes") == ("late",)
    ref = await put(child, 1)
    async with featcache.connect(endpoint) as client:
        waiting = asyncio.create_task(client.get(ref))
        await until(lambda: holds(client))
        child.kill()
        since_s = time.monotonic()
        await lost_at_once(waiting)
        assert time.monotonic() - since_s < 1.0
