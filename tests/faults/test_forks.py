"""A process forks with a cache open: the child has none, the parent is unharmed, its death is seen."""

import asyncio
import contextlib
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import featcache
from faults.agents import feature, is_right, mappings, reader
from faults.checks import Log, assert_whole, events, exists
from faults.test_owner_dies import AT_ONCE_S, lost_at_once, opened, put, start
from featcache import FeatureRef
from featcache.settings import Settings
from support.processes import Child, Start, gone, until

SIZE = 128 << 10
SETTINGS = Settings(capacity=2 * SIZE, initial=2 * SIZE, slots=8, recycle_interval=60.0)

__all__ = ["start"]  # the fixture that sweeps up after killed owners


class Leash:
    """A pipe that forks hold: they live until it is closed, whether or not their parents do."""

    def __init__(self) -> None:
        self._end, self.given = multiprocessing.Pipe()
        self.pids: list[int] = []

    def let_go(self) -> None:
        """End the forks, in order."""
        self.given.close()
        self._end.close()
        for pid in self.pids:
            gone(pid)


@pytest.fixture
def leash(start: Start) -> Iterator[Leash]:
    one = Leash()
    yield one
    if not one.given.closed:
        one.let_go()


async def forked(child: Child, leash: Leash, ref: FeatureRef) -> tuple[Any, ...]:
    """Have a child fork; return what the fork said of itself."""
    answers = sorted([await child.ask("fork", ref.to_bytes()), await child.hear()])
    (_, pid, *said), (_, told) = answers  # "forked" before "parent"
    assert pid == told
    leash.pids.append(pid)
    return tuple(said)


def left_over(descriptors: list[str]) -> set[str]:
    """Descriptors of a cache; pidfds aside, of which tests have their own."""
    return {target for target in descriptors if "pidfd" not in target}


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        return state not in {"Z", "X"}
    return False


async def test_owner_forks(start: Start, leash: Leash) -> None:
    child, endpoint = await opened(start, leash=leash.given)
    first, second = await put(child, 1), await put(child, 2)
    async with featcache.connect(endpoint) as client:
        raised, descriptors, mapped = await forked(child, leash, first)
        assert set(raised.values()) == {"CacheClosed"}, raised
        assert left_over(descriptors) == set()
        assert not [mapping for mapping in mapped if "slab" in mapping]
        # the parent: everything goes on, also after the child has ended
        for _ in range(2):
            assert is_right(await client.get(first), 1)
            assert await child.ask("get", second.to_bytes(), 2) == ("right",)
            first, second = await put(child, 1), await put(child, 2)
            if not leash.given.closed:
                leash.let_go()
        assert exists(endpoint)
        assert client.statistics().sessions == 1
    child.tell("end")
    await child.ends()


async def test_owner_forks_and_the_fork_keeps_no_words(start: Start, leash: Leash) -> None:
    child, _ = await opened(start, leash=leash.given)
    raised, descriptors, mapped = await forked(child, leash, await put(child, 1))
    assert set(raised.values()) == {"CacheClosed"}
    leash.let_go()
    assert left_over(descriptors) == set()
    assert mapped == []


async def test_reader_forks(start: Start, leash: Leash, log: Log) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        first = await cache.put(feature(1, SIZE), readers=["tp0"])
        second = await cache.put(feature(2, SIZE), readers=["tp0"])
        child = start(reader, cache.endpoint, name="tp0", leash=leash.given)
        await child.expect("attached")
        raised, descriptors, mapped = await forked(child, leash, first)
        assert set(raised.values()) == {"CacheClosed"}, raised
        assert left_over(descriptors) == set()
        assert not [mapping for mapping in mapped if "slab" in mapping]
        assert await child.ask("get", first.to_bytes(), 1) == ("right",)
        leash.let_go()  # the fork's end is not the reader's
        assert await child.ask("get", second.to_bytes(), 2) == ("right",)
        assert cache.statistics().sessions == 1
        assert not events(log, "reader.quarantined")
        child.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        assert cache.statistics().readers_lost == 0
        await assert_whole(cache)


@pytest.mark.parametrize("how", ["fork", "fork_raw"], ids=["by os.fork", "with no hook run"])
async def test_owner_dies_and_its_fork_lives(
    start: Start, leash: Leash, log: Log, how: str
) -> None:
    """Raw, the fork keeps every socket of the dead owner open: only the pidfd tells."""
    child, endpoint = await opened(start, leash=leash.given)
    ref = await put(child, 1)
    async with featcache.connect(endpoint) as client, client.borrow(ref) as view:
        await fork_somehow(child, leash, how, ref)
        child.kill()
        await until(lambda: events(log, "owner.lost"), AT_ONCE_S)
        assert all(alive(pid) for pid in leash.pids)
        if how == "fork_raw":
            assert events(log, "owner.lost")[0]["reason"] == "its process died"
        assert is_right(view, 1)
        await lost_at_once(client.get(ref))
    async with featcache.create(endpoint=endpoint, settings=SETTINGS) as next_owner:
        assert all(alive(pid) for pid in leash.pids)
        async with featcache.connect(endpoint) as client:
            assert is_right(await client.get(await next_owner.put(feature(2, SIZE))), 2)
    leash.let_go()


@pytest.mark.parametrize("how", ["fork", "fork_raw"], ids=["by os.fork", "with no hook run"])
async def test_reader_dies_and_its_fork_lives(
    start: Start, leash: Leash, log: Log, how: str
) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        first = await cache.put(feature(1, SIZE), readers=["tp0"])
        await cache.put(feature(2, SIZE), readers=["tp0"])
        child = start(reader, cache.endpoint, name="tp0", leash=leash.given)
        await child.expect("attached")
        assert await child.ask("borrow", first.to_bytes(), 1) == ("right",)
        await fork_somehow(child, leash, how, first)
        child.kill()
        await until(lambda: events(log, "reader.lost"), AT_ONCE_S)
        assert all(alive(pid) for pid in leash.pids)
        assert events(log, "reader.lost")[0]["reads_paid"] == 2
        await assert_whole(cache)


async def fork_somehow(child: Child, leash: Leash, how: str, ref: FeatureRef) -> None:
    if how == "fork":
        await forked(child, leash, ref)
        return
    message, pid = await child.ask("fork_raw")
    assert message == "parent"
    leash.pids.append(pid)


async def test_a_fork_leaves_its_parents_borrow(start: Start, leash: Leash) -> None:
    """Code that unwinds in the fork ends nothing of the parent's, whose bytes stay its own."""
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, 2 * SIZE))
        child = start(reader, cache.endpoint, leash=leash.given)
        await child.expect("attached")
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        answers = sorted([await child.ask("fork_and_leave"), await child.hear()])
        assert answers[0][2:] == (0, []), "the fork's view is empty and its mapping gone"
        leash.pids.append(answers[1][1])
        cache._opened().pool.collect()
        assert cache.statistics().used_bytes == 2 * SIZE, "recycled in the middle of a borrow"
        with pytest.raises(featcache.PoolFull):
            cache.put_nowait(feature(2, 2 * SIZE))
        assert await child.ask("look", 1) == ("right",)
        assert await child.ask("leave") == ("left",)
        cache._opened().pool.collect()
        leash.let_go()
        child.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        await assert_whole(cache)


async def test_a_fork_leaves_its_owners_borrow(start: Start, leash: Leash) -> None:
    """The same where the parent is the owner, reading its own pool."""
    child, endpoint = await opened(start, leash=leash.given)
    ref = await put(child, 1)
    assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
    answers = sorted([await child.ask("fork_and_leave"), await child.hear()])
    leash.pids.append(answers[1][1])
    async with featcache.connect(endpoint) as client:
        for seed in range(8):  # more than fit: the read's bytes would be among those recycled
            await client.release(await put(child, 2 + seed))
    assert await child.ask("look", 1) == ("right",)
    assert await child.ask("leave") == ("left",)
    leash.let_go()
    child.tell("end")
    await child.ends()


async def test_a_fork_can_have_its_own(start: Start, leash: Leash) -> None:
    """What a fork opens for itself works, with the same endpoint as its parent's."""
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, SIZE), readers=2)
        child = start(forking_reader, cache.endpoint, ref.to_bytes(), leash.given)
        for _ in range(2):
            await child.expect("right")
        await child.expect("ended", 0)
        await until(lambda: cache.statistics().sessions == 0)
        await assert_whole(cache)


async def forking_reader(pipe: Any, endpoint: str, data: bytes, leash: Connection) -> None:
    """Attach, fork, and read in the fork through a client of its own; then in the parent."""

    async def reading() -> None:
        async with featcache.connect(endpoint) as own:
            pipe.say("right" if is_right(await own.get(ref), 1) else "wrong")

    ref = FeatureRef.from_bytes(data)
    async with featcache.connect(endpoint) as client:
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                asyncio.events._set_running_loop(None)  # as a fork of a loop must
                asyncio.run(reading())
                code = 0
            os._exit(code)
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - its parent is a child too, with no other work
        pipe.say("right" if is_right(await client.get(ref), 1) else "wrong")
    pipe.say("ended", os.waitstatus_to_exitcode(status))


async def test_what_is_inherited_over_exec(start: Start) -> None:
    """Nothing: a program that a process with a cache starts has none of its descriptors."""
    async with featcache.create(settings=SETTINGS) as cache:
        child = start(reader, cache.endpoint)
        await child.expect("attached")
        told = descriptors_of_a_program()
        assert "/proc/" in told
        assert not [mark for mark in ("featcache", "eventfd", "pidfd", "socket:") if mark in told]
        assert mappings()
        child.kill()
        await until(lambda: cache.statistics().sessions == 0)


def descriptors_of_a_program() -> str:
    """What a program finds open that this process starts, with all that it lets through."""
    command = ["/bin/ls", "-l", "/proc/self/fd"]
    done = subprocess.run(command, close_fds=False, capture_output=True, check=True)
    return done.stdout.decode()
