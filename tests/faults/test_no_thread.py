"""The system starts no further thread (RLIMIT_AS, RLIMIT_NPROC, pids.max): slower or refused, never wrong."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import featcache
from featcache import BackendUnavailable, FeatureCache, FeatureClient
from featcache.memory.host.slab import HostMapping
from featcache.session import offload
from support.caches import KIB, MIB, Gate, pair, small, tensor, until
from support.processes import no_threads

Writer = FeatureCache | FeatureClient
LARGE, SMALL = 64 * KIB, 1 * KIB
BY_THREAD: dict[str, Any] = {"capacity": MIB, "initial": MIB, "inline_bytes": 2 * KIB}


def numbered(number: int, nbytes: int = SMALL) -> torch.Tensor:
    return torch.full((nbytes,), number, dtype=torch.uint8)


@contextlib.asynccontextmanager
async def writing(side: str) -> AsyncIterator[tuple[FeatureCache, Writer]]:
    """An owner, and the side that puts, which has the slab mapped for writing."""
    async with pair(**BY_THREAD) as (owner, client):
        writer: Writer = owner if side == "owner" else client
        await writer.release(await writer.put(numbered(0)))
        yield owner, writer


Copying = tuple[Gate, "asyncio.Task[featcache.FeatureRef]"]
"""A put whose copy keeps its thread until the gate opens."""


async def begun(writer: Writer) -> Copying:
    """Begin such a put, and return when it has its thread, or was refused one."""
    gate = Gate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostMapping, "write", gate.wrap(HostMapping.write))
        slow = asyncio.ensure_future(writer.put(numbered(255, LARGE)))
        await until(lambda: gate.entered.is_set() or slow.done())
    return gate, slow


async def one_is_refused(writer: Writer) -> list[Copying]:
    """Keep all threads that there are busy, until a put is refused one."""
    busy = list[Copying]()
    while not (found := await begun(writer))[1].done():
        busy.append(found)
        assert len(busy) < 4, "threads were started"
    with pytest.raises(BackendUnavailable, match="ulimit -u"):
        await found[1]
    return busy


@pytest.mark.parametrize("side", ["owner", "client"])
async def test_a_put_without_a_thread_of_its_own_writes_over_no_other(side: str) -> None:
    async with writing(side) as (_, writer):
        gate, slow = await begun(writer)
        with no_threads():
            queued = asyncio.ensure_future(writer.put(numbered(254, LARGE)))
            await asyncio.wait([queued], timeout=0.05)  # refused by now, if it is refused
            refs = [await writer.put(numbered(n)) for n in range(8)]
            gate.open()
            kept = [slow, queued]
            for number, task in zip((255, 254), kept, strict=True):
                ref = await task
                assert torch.equal(tensor(await writer.get(ref)), numbered(number, LARGE))
            for number, ref in enumerate(refs):
                assert torch.equal(tensor(await writer.get(ref)), numbered(number))


@pytest.mark.parametrize("side", ["owner", "client"])
async def test_a_put_that_is_refused_a_thread_is_never_written(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an executor that does not go on with the threads that it has, but has queued the work."""
    hook = ThreadPoolExecutor._adjust_thread_count
    monkeypatch.setattr(offload._Threads, "_adjust_thread_count", hook)
    async with writing(side) as (owner, writer):
        with no_threads():
            copying = await one_is_refused(writer)
        refs = [await writer.put(numbered(n)) for n in range(48)]  # also where the refused one lay
        for gate, slow in copying:
            gate.open()
            await writer.release(await slow)
        await writer.release(
            await writer.put(numbered(253, LARGE))
        )  # by a thread, behind the queue
        for number, ref in enumerate(refs):
            assert torch.equal(tensor(await writer.get(ref)), numbered(number))
        await until(lambda: owner.statistics().used_bytes == 0)
        assert writer.is_open


async def test_an_owner_and_a_client_close_without_a_thread(no_leaks: None) -> None:
    async with pair(**BY_THREAD) as (owner, client):
        await client.put(numbered(1))
        with no_threads():
            await client.aclose()
            await owner.aclose()


async def test_an_attach_without_a_thread_leaves_nothing(no_leaks: None) -> None:
    async with featcache.create(settings=small(**BY_THREAD)) as owner:
        with no_threads():
            client = featcache.connect(owner.endpoint, name="rank0")
            with pytest.raises(BackendUnavailable, match="thread"):
                await client.open()
        async with featcache.connect(owner.endpoint, name="rank1") as other:
            await other.put(numbered(1), key="k")
