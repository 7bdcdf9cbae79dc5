"""Observers that are stopped, die, or fork; owners that die under them: real processes."""

import asyncio
import os
import signal
from typing import Any

import pytest

import featcache
from featcache import FeatureCache, GetTimeout, OwnerLost
from support.caches import KIB, filled, small, spent, until
from support.processes import Child, Pipe, Start


async def looking(pipe: Pipe, endpoint: str) -> None:
    """Observe, say so, and go on looking."""
    async with featcache.observe(endpoint) as observer:
        pipe.say("sessions", (await observer.snapshot()).statistics.sessions)
        while True:
            await observer.snapshot()


async def owning(pipe: Pipe, endpoint: str) -> None:
    """Serve until told otherwise."""
    async with featcache.create(settings=small(), endpoint=endpoint) as owner:
        await owner.put(filled(KIB), key="k")
        pipe.say("serves")
        await pipe.hear()


def observers_of(owner: FeatureCache) -> int:
    assert owner._life.engine is not None
    return len(owner._life.engine.main.server.observers.peers)


async def serves(owner: FeatureCache) -> None:
    async with featcache.connect(owner.endpoint) as client:
        for _ in range(20):
            await client.get(await owner.put(filled(KIB)))
    await spent(owner)


async def heard(child: Child, *message: Any) -> None:
    assert await child.hear() == message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_dead_observer_leaves_its_place_and_nothing_else(
    start: Start, number: signal.Signals
) -> None:
    async with featcache.create(settings=small(observers=1)) as owner:
        child = start(looking, owner.endpoint)
        await heard(child, "sessions", 0)
        before = owner.statistics().readers_lost
        os.kill(child.pid, number)
        await until(lambda: not observers_of(owner))
        assert owner.statistics().readers_lost == before  # it was no reader
        async with featcache.observe(owner.endpoint) as observer:
            await observer.snapshot()
        await serves(owner)


async def test_a_stopped_observer_holds_nobody_up(start: Start) -> None:
    async with featcache.create(settings=small(observers=2)) as owner:
        child = start(looking, owner.endpoint)
        await heard(child, "sessions", 0)
        os.kill(child.pid, signal.SIGSTOP)
        await serves(owner)
        async with featcache.observe(owner.endpoint) as observer:
            for _ in range(5):
                assert (await observer.snapshot()).observers == 2
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: not observers_of(owner))


async def test_a_stopped_observer_does_not_hold_up_the_owner_s_end(start: Start) -> None:
    async with featcache.create(settings=small()) as owner:
        child = start(looking, owner.endpoint)
        await heard(child, "sessions", 0)
        os.kill(child.pid, signal.SIGSTOP)
    os.kill(child.pid, signal.SIGKILL)


async def test_a_dead_owner_is_seen_by_its_observers(start: Start, runtime_dir: Any) -> None:
    path = str(runtime_dir / "owner.sock")
    child = start(owning, path)
    await heard(child, "serves")
    async with featcache.observe(path) as observer:
        assert (await observer.snapshot()).pid == child.pid
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: observer._opened().link.lost)
        with pytest.raises(OwnerLost, match="is gone"):
            await observer.snapshot()
    async with featcache.create(settings=small(), endpoint=path):
        pass  # the next owner takes the path over, and leaves nothing


async def test_a_stopped_owner_is_not_waited_for_without_end(
    start: Start, runtime_dir: Any
) -> None:
    path = str(runtime_dir / "owner.sock")
    child = start(owning, path)
    await heard(child, "serves")
    async with featcache.observe(path, timeout=0.5) as observer:
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(GetTimeout, match="stopped or busy"):
            await observer.snapshot()
        os.kill(child.pid, signal.SIGCONT)
        # The answer to what was given up comes, and is nobody's.
        async with asyncio.timeout(20):
            while True:
                try:
                    assert (await observer.keys()).total == 1
                    break
                except GetTimeout:
                    pass
    child.tell("end")


async def test_a_fork_of_an_observer_is_cut_off(start: Start) -> None:
    async with (
        featcache.create(settings=small()) as owner,
        featcache.observe(owner.endpoint) as observer,
    ):
        pid = os.fork()
        if not pid:
            os._exit(0 if not observer.is_open else 1)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        await observer.snapshot()
