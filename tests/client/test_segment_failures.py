"""Segments that can't be mapped, clients that leave or stand still meanwhile: nothing is left open."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator

import pytest
import torch
from structlog.testing import capture_logs

import featcache
from control.peers import Peer, frame
from featcache import BackendUnavailable, CacheClosed, FeatureCache, OwnerLost
from featcache.control.messages import Goodbye, TailUnmapped, encode
from featcache.memory.cuda.mapping import CudaMapping
from memory.fakecuda import Code, FakeApi
from memory.fakepages import bytes_alive
from support import processes
from support.caches import KIB, MIB, Gate, filled, small, spent, steps, tensor, until
from support.fakegpu import SEGMENT, FakeGpu, fake_gpu, got, reader, right, segmented, shrunk


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    processes.warm_up()


@pytest.fixture
def gpu(no_leaks: None) -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


def own_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - how many is what counts


# --- mapping fails -------------------------------------------------------------------------------

CALLS = ["cuMemImportFromShareableHandle", "cuMemMap"]


@pytest.mark.parametrize("more", [False, True], ids=["nothing follows", "more segments follow"])
@pytest.mark.parametrize("call", CALLS)
async def test_a_segment_that_can_not_be_mapped(gpu: FakeGpu, call: str, more: bool) -> None:
    """This client reads no more, and says why; others read on; nothing is closed twice."""
    async with (
        segmented(gpu) as (owner, client),
        featcache.connect(owner.endpoint, settings=small()) as other,
    ):
        held = await owner.put(filled(KIB, 1), readers=2)
        async with client.borrow(held) as view:
            gpu.clients[0].fail(call, code=Code.CUDA_ERROR_OPERATING_SYSTEM)
            late = await owner.put(filled(3 * SEGMENT, 2), readers=2)
            with pytest.raises(BackendUnavailable, match="mapped"):
                await got(client, late)
            if more:
                await right(other, await owner.put(filled(3 * SEGMENT, 3)), 3)
            for use in (client.get(held), client.release(late)):
                with pytest.raises(BackendUnavailable):
                    await use
            assert torch.equal(tensor(view), filled(KIB, 1))
        gpu.run()
        with open(os.devnull) as innocent:  # noqa: PTH123, ASYNC230 - a descriptor of another's
            await client.aclose()
            os.fstat(innocent.fileno())
        await right(other, held, 1)
        await right(other, late, 2)
        await until(lambda: owner.statistics().sessions == 1)


async def test_a_device_that_turns_out_to_have_no_access(gpu: FakeGpu) -> None:
    """It is told only when the first segment is mapped: reads go through the host from then on."""
    async with segmented(gpu) as (owner, client):
        gpu.next = FakeApi()
        gpu.next.fail("cuMemSetAccess", code=Code.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED)
        with capture_logs() as logs:
            async with featcache.connect(owner.endpoint, settings=small()) as far:
                for value in range(3):
                    ref = await owner.put(filled(4 * SEGMENT, value), readers=2)
                    await right(far, ref, value)
                    await right(client, ref, value)
                    await spent(owner)
                    await shrunk(owner)
                assert gpu.mapped(1) == 0
        told = [entry for entry in logs if entry["event"] == "featcache.peer.unreachable"]
        assert len(told) == 1
        assert owner.statistics().relayed == 3


@pytest.mark.parametrize("call", [*CALLS, "cuMemAddressReserve", "cuMemHostRegister"])
async def test_an_attach_whose_mapping_fails(gpu: FakeGpu, call: str) -> None:
    async with segmented(gpu) as (owner, client):
        gpu.next = FakeApi()
        gpu.next.fail(call, code=Code.CUDA_ERROR_OPERATING_SYSTEM)
        with pytest.raises(BackendUnavailable, match="CUDA_ERROR"):
            await featcache.connect(owner.endpoint, settings=small()).open()
        await until(lambda: owner.statistics().sessions == 1)
        await right(client, await owner.put(filled(MIB, 2)), 2)


async def test_an_owner_that_gets_no_more_memory(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        for nth in (1, 2):
            gpu.owner.fail("cuMemCreate", nth, Code.CUDA_ERROR_OUT_OF_MEMORY)
            with pytest.raises(featcache.PoolFull):
                owner.put_nowait(filled(8 * SEGMENT))
            assert owner.statistics().committed_bytes == bytes_alive() == SEGMENT
            owner._opened().pool.store.size._grow_after_s = 0.0
        await right(client, await owner.put(filled(8 * SEGMENT, 2)), 2)
        await spent(owner)


@pytest.mark.parametrize("call", ["cuMemUnmap", "cuMemRelease"])
async def test_a_segment_that_can_not_be_unmapped(gpu: FakeGpu, call: str) -> None:
    async with segmented(gpu, attach_timeout=0.5) as (owner, client):
        await right(client, await owner.put(filled(MIB, 1)), 1)
        await spent(owner)
        gpu.clients[0].fail(call)
        with capture_logs() as logs:
            await shrunk(owner)
            await until(lambda: logs)
        assert logs[0]["mapped_in_sessions"] == 1
        ref = await owner.put(filled(KIB, 3))
        with pytest.raises(BackendUnavailable):
            await got(client, ref)
        await owner.discard(ref)


# --- leaving in the middle -----------------------------------------------------------------------


@pytest.mark.parametrize("more", [0, 1, 3])
async def test_a_client_closes_while_it_maps(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    gate = Gate()
    async with segmented(gpu) as (owner, client):
        monkeypatch.setattr(CudaMapping, "extend", gate.wrap(CudaMapping.extend))
        ref = await owner.put(filled(2 * SEGMENT, 2))
        await until(gate.entered.is_set)
        for _ in range(more):
            await owner.put(filled(2 * SEGMENT, 2))
        task = asyncio.create_task(got(client, ref))
        await steps(3)
        task.cancel()
        await asyncio.wait([task])
        closing = asyncio.create_task(client.aclose())
        await steps(5)
        gate.open()
        await closing
        await until(lambda: owner.statistics().sessions == 0)


async def test_a_client_that_is_closed_while_it_attaches(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with featcache.create(settings=small(segment=SEGMENT)) as owner:
        ref = await owner.put(filled(KIB, 2))
        monkeypatch.setattr(CudaMapping, "extend", gate.wrap(CudaMapping.extend))
        async with featcache.connect(settings=small()) as client:
            task = asyncio.create_task(client.get(ref))
            await until(gate.entered.is_set)
            closing = asyncio.create_task(client.aclose())
            await steps(5)
            gate.open()
            await closing
            with pytest.raises((CacheClosed, asyncio.CancelledError)):
                await task
        await until(lambda: owner.statistics().sessions == 0)


async def test_the_owner_goes_while_a_client_maps(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with segmented(gpu) as (owner, client):
        monkeypatch.setattr(CudaMapping, "extend", gate.wrap(CudaMapping.extend))
        task = asyncio.create_task(got(client, await owner.put(filled(2 * SEGMENT, 2))))
        await until(gate.entered.is_set)
        await owner.put(filled(2 * SEGMENT, 2))
        closing = asyncio.create_task(owner.aclose())
        await until(lambda: client.statistics().sessions == 0)
        with pytest.raises(OwnerLost):
            await task
        gate.open()
        await closing


# --- standing still ------------------------------------------------------------------------------


async def turn_over(owner: FeatureCache, client: featcache.FeatureClient, value: int) -> None:
    """Have the slab grow to its capacity and shrink again."""
    await right(client, await owner.put(filled(MIB, value)), value)
    await spent(owner)
    await shrunk(owner)


@pytest.mark.parametrize("end", ["reads", "hangs up", "owner closes"])
async def test_a_session_that_reads_no_messages(gpu: FakeGpu, end: str) -> None:
    """What is queued for it holds descriptors of its own; they go when it reads, or goes."""
    async with segmented(gpu, attach_timeout=0.05) as (owner, client):
        before = own_descriptors()
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            await until(lambda: owner.statistics().sessions == 2)
            (channel,) = [
                session.channel
                for session in owner._opened().main.server.sessions.values()
                if session.number == 2
            ]
            assert channel is not None
            channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little as goes
            turns = 0
            while len(channel._outgoing) < 8 and turns < 50:
                turns += 1
                await turn_over(owner, client, turns)
            assert len(channel._outgoing) >= 8, "the socket takes more than thought"
            if end == "reads":
                kinds = [(await peer.message())["type"] for _ in range(2 * turns)]
                assert kinds[0] == "welcome"
                assert {"segments", "retire"} <= set(kinds)
                await until(lambda: not channel._outgoing)
                peer.send(frame(encode(TailUnmapped(turns))))
                peer.send(frame(encode(Goodbye())))
                await until(lambda: owner.statistics().sessions == 1)
            elif end == "owner closes":
                await owner.aclose()
                await peer.hung_up()
        if end == "reads":
            await until(lambda: own_descriptors() <= before)
            await turn_over(owner, client, 5)


async def test_a_stopped_process(gpu: FakeGpu) -> None:
    """Stopped while the slab grows and shrinks, it finds everything in its place when it goes on."""
    with processes.starting() as start:
        async with segmented(gpu, attach_timeout=0.05) as (owner, client):
            child = start(reader, owner.endpoint)
            await child.expect("attached")
            doomed = start(reader, owner.endpoint)
            await doomed.expect("attached")
            for process in (child, doomed):
                process.signal(signal.SIGSTOP)
            for turn in range(3):
                await turn_over(owner, client, turn)
            ref = await owner.put(filled(4 * SEGMENT, 3))
            child.tell("ref", ref.to_bytes())
            child.signal(signal.SIGCONT)
            assert await child.hear() == ("sum", 3 * 4 * SEGMENT, 4 * SEGMENT)
            doomed.kill()
            await until(lambda: owner.statistics().sessions == 2)
            child.tell("end")
            await child.expect("closed")
            await until(lambda: owner.statistics().sessions == 1)
            await spent(owner)
            await shrunk(owner)
            await until(lambda: bytes_alive() == SEGMENT)
