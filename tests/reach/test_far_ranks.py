"""Ranks of a reading host that die; owners that fork."""

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
import torch

import featcache
from featcache import CacheClosed, FeatureRef
from reach.hosts import hosts
from reach.test_far_faults import owed
from support.caches import KIB, filled, spent, tensor, until
from support.processes import Pipe, Start, starting, warm_up


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    warm_up()


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as started:
        yield started


async def rank(pipe: Pipe, endpoint: str, name: str | None) -> None:
    """A reader in a process of its own, which gets the refs that it is sent."""
    async with featcache.connect(endpoint, name=name) as client:
        pipe.say("attached")
        while True:
            (data,) = await pipe.hear()
            got = await client.get(FeatureRef.from_bytes(data))
            assert isinstance(got, torch.Tensor)
            pipe.say("got", int(got[0]))


async def test_a_rank_that_dies_while_its_feature_comes_is_paid_for(start: Start) -> None:
    async with hosts() as both:
        child = start(rank, both.reader.endpoint, None)
        assert await child.hear() == ("attached",)
        first = await both.home.put(filled(KIB, 1))
        child.tell(first.to_bytes())
        assert await child.hear() == ("got", 1)
        both.reader_plane.held = True
        ref = await both.home.put(filled(KIB, 2), readers=2, ttl=None)
        child.tell(ref.to_bytes())
        await until(lambda: len(both.reader_plane.transfers) == 2)
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: owed(both.home) == 1)
        both.reader_plane.transfers[-1].land()
        await spent(both.reader)


async def test_what_the_name_of_a_rank_that_dies_owes_is_paid_at_once(start: Start) -> None:
    async with hosts() as both:
        child = start(rank, both.reader.endpoint, "rank7")
        assert await child.hear() == ("attached",)
        first = await both.home.put(filled(KIB, 1), readers=["rank7"])
        child.tell(first.to_bytes())
        assert await child.hear() == ("got", 1)
        await both.home.put(filled(KIB), readers=["rank7", "another"], ttl=None)
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: owed(both.home) == 1)


async def test_a_rank_that_leaves_with_a_copy_that_it_has_not_read_keeps_no_room() -> None:
    async with hosts() as both:
        await both.client.get(await both.home.put(filled(KIB)))
        both.reader_plane.held = True
        ref = await both.home.put(filled(KIB, 2), ttl=None)
        async with featcache.connect(both.reader.endpoint) as leaving:
            reading = asyncio.create_task(leaving.get(ref))
            await until(lambda: len(both.reader_plane.transfers) == 2)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            both.reader_plane.held = False
            both.reader_plane.transfers[-1].land()
            # Brought, and never read.
            await leaving._life.here().registry.bring(ref)
        await spent(both.reader)
        await spent(both.home)


async def test_a_fork_has_no_hosts_and_its_parent_keeps_them() -> None:
    async with hosts() as both:
        refs = [await both.home.put(filled(KIB, n)) for n in range(2)]
        await both.client.get(refs[0])
        pid = os.fork()
        if not pid:
            try:
                both.home.address  # noqa: B018 - it raises
            except CacheClosed:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7  # noqa: ASYNC222 - at once
        assert torch.equal(tensor(await both.client.get(refs[1])), filled(KIB, 1))
        await spent(both.home)
        await spent(both.reader)
