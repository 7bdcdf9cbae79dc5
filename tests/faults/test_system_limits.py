"""Processes at the limits that the system sets them: told what to do, and nothing is left behind."""

import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

import featcache
from control.peers import Peer
from featcache import AttachRefused, BackendUnavailable, FeatcacheError, OwnerUnreachable
from featcache.control.descriptors import NO_DESCRIPTOR, Received
from featcache.control.messages import SocketFailed
from support.caches import KIB, MIB, filled, small, until
from support.leaks import open_descriptors
from support.processes import Pipe, Start, starting

SHORT = "out of file descriptors: raise ulimit -n"


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start


@contextlib.contextmanager
def spare_descriptors(count: int) -> Iterator[None]:
    """Leave this process so many descriptors to open, and no more."""
    taken: list[int] = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in taken:
            os.close(fd)


@contextlib.contextmanager
def spare_addresses(spare_bytes: int) -> Iterator[None]:
    """Leave this process so many bytes of addresses to map, and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + spare_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- descriptors ----------------------------------------------------------------------------------


async def attach_with_few(pipe: Pipe, endpoint: str) -> None:
    """Attach with 0, 1, 2, … descriptors to spare, until that is enough."""
    for spare in range(30):
        client = featcache.connect(endpoint, name="rank0", settings=small())
        before = open_descriptors()
        with spare_descriptors(spare):
            try:
                await client.open()
            except FeatcacheError as error:
                pipe.say("refused", spare, type(error).__name__, str(error))
        if client.is_open:
            break
        left = open_descriptors()
        assert left == before, f"{spare} to spare: {left - before}"
    assert await client.contains("k")
    await client.aclose()
    pipe.say("attached")


async def test_a_client_with_few_descriptors_is_told_so_and_leaves_no_session(start: Start) -> None:
    async with featcache.create(settings=small()) as owner:
        await owner.put(filled(KIB), key="k")
        child = start(attach_with_few, owner.endpoint)
        refused = 0
        while (said := await child.hear())[0] == "refused":
            _, _, kind, text = said
            assert kind in {"AttachRefused", "BackendUnavailable"}
            assert SHORT in text
            refused += 1
        assert refused > 4
        await until(lambda: not owner.statistics().sessions)
        assert await child.ends() == 0


async def first_put_with_none(pipe: Pipe, endpoint: str) -> None:
    async with featcache.connect(endpoint, name="rank0", settings=small()) as client:
        assert await client.contains("k")
        with spare_descriptors(0), pytest.raises(BackendUnavailable, match=SHORT):
            await client.put(filled(KIB))
        await client.put(filled(KIB), key="later")  # the session goes on
    pipe.say("done")


async def test_a_first_put_without_a_descriptor_costs_no_session(start: Start) -> None:
    async with featcache.create(settings=small()) as owner:
        await owner.put(filled(KIB), key="k")
        child = start(first_put_with_none, owner.endpoint)
        await child.expect("done")
        assert await child.ends() == 0
        assert await owner.contains("later")
        assert owner.statistics().sessions == 0


async def first_put_with_no_addresses(pipe: Pipe, endpoint: str) -> None:
    async with featcache.connect(endpoint, settings=small()) as client:
        assert await client.contains("k")
        for _ in range(3):
            with (
                spare_addresses(0),
                pytest.raises(BackendUnavailable, match=r"mapped for writing: .*ulimit -v"),
            ):
                await client.put(filled(KIB))
        await client.put(filled(KIB), key="later")  # the session goes on
        assert await client.contains("later")
    pipe.say("done")


async def test_a_first_put_without_addresses_costs_no_session(start: Start) -> None:
    async with featcache.create(settings=small(capacity="64MiB")) as owner:
        await owner.put(filled(KIB), key="k")
        child = start(first_put_with_no_addresses, owner.endpoint)
        assert await child.hear() == ("done",)
        assert await child.ends() == 0
        assert owner.statistics().keys == 2
        await until(lambda: not owner.statistics().sessions)


async def own_with_few(pipe: Pipe) -> None:
    """Open, read, and take sessions with few descriptors to spare; then with plenty."""
    for spare in range(30):
        cache = featcache.create(settings=small())
        before = open_descriptors()
        with spare_descriptors(spare):
            try:
                await cache.open()
            except FeatcacheError as error:
                told = type(error), SHORT in str(error)
                assert told == (BackendUnavailable, True)
            else:
                break
        left = open_descriptors()
        assert left == before, f"{spare} to spare: {left - before}"
    ref = await cache.put(filled(KIB))
    with spare_descriptors(1), pytest.raises(BackendUnavailable, match=SHORT):
        await cache.get(ref)
    await cache.get(ref)
    # A hello brings a pidfd; the session then takes a page, and a duplicate for its mapping.
    for spare in (1, 2, 3):
        with spare_descriptors(spare):
            pipe.stand(cache.endpoint)
            await pipe.hear()
    pipe.stand(cache.endpoint)
    await pipe.hear()
    await cache.aclose()


async def test_an_owner_with_few_descriptors_says_that_it_is_the_owner(start: Start) -> None:
    child = start(own_with_few)
    for _ in range(3):
        _, endpoint = await child.hear()
        child.tell("go on")
        with pytest.raises(AttachRefused, match=r"owner.*ulimit -n"):
            await featcache.connect(endpoint, name="rank0", settings=small()).open()
        child.tell("next")
    _, endpoint = await child.hear()
    child.tell("go on")
    async with featcache.connect(endpoint, name="rank0", settings=small()) as client:
        await client.put(filled(KIB))
    child.tell("next")
    assert await child.ends() == 0


async def test_newcomers_who_crowd_at_the_door_are_not_told_that_the_owner_is_gone(
    no_leaks: None,
) -> None:
    async with featcache.create(settings=small(sessions=4)) as owner:
        crowd = [Peer.connect(owner.endpoint) for _ in range(4)]
        server = owner._opened().main.server
        await until(lambda: len(server._greeting) == 4)
        with pytest.raises(AttachRefused, match=r"Settings\.sessions") as refused:
            await featcache.connect(owner.endpoint).open()
        assert not isinstance(refused.value, OwnerUnreachable)
        for peer in crowd:
            peer.close()
        await until(lambda: not server._greeting)
        async with featcache.connect(owner.endpoint) as client:
            await client.put(filled(KIB))


def rights(descriptors: list[int]) -> list[tuple[int, int, bytes]]:
    data = b"".join(fd.to_bytes(4, "little") for fd in descriptors)
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, data)]


def test_those_that_are_missing_belong_to_the_frame_that_was_cut() -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    received = Received()
    received.add(rights(fds[:2]), cut=False)  # of a frame with two
    received.add(rights(fds[2:3]), cut=True)  # of one with three, of which two are dropped
    received.add(rights(fds[3:]), cut=False)  # of one with one, which came before both were handled
    assert received.take(2) == fds[:2]
    assert received.has(3)
    assert received.take(3) == [fds[2], NO_DESCRIPTOR, NO_DESCRIPTOR]
    assert not received.has(2)
    assert received.take(1) == fds[3:]
    received.add([], cut=True)
    with pytest.raises(SocketFailed, match=SHORT):
        received.add([], cut=True)
    for fd in fds:
        os.close(fd)


# --- memory and files -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def big_owner() -> AsyncIterator[featcache.FeatureCache]:
    async with featcache.create(capacity="1GiB", initial="1MiB", segment="1MiB") as owner:
        yield owner


async def live_in_little(pipe: Pipe, endpoint: str) -> None:
    async with featcache.connect() as first:  # its threads are there
        await first._opened()._offload.run(int)
        with spare_addresses(256 * MIB):
            for call in (
                lambda: featcache.create(capacity="1GiB"),
                lambda: featcache.connect(endpoint, name="rank0"),
            ):
                before = open_descriptors()
                with pytest.raises(BackendUnavailable, match="ulimit -v") as refused:
                    await call().open()
                assert isinstance(refused.value.__cause__, OSError)
                del refused
                assert open_descriptors() == before
    async with featcache.connect(endpoint, name="rank0") as client:
        with (
            spare_addresses(32 * MIB),
            pytest.raises(BackendUnavailable, match="copy of 67108864"),
        ):
            await client.get("large")
        await client.get("large")
    pipe.say("done")


async def test_a_limit_on_addresses(start: Start) -> None:
    async with big_owner() as owner:
        await owner.put(torch.ones(64 * MIB, dtype=torch.uint8), key="large")
        child = start(live_in_little, owner.endpoint)
        await child.expect("done")
        assert await child.ends() == 0
        assert owner.statistics().sessions == 0


async def make_small_files(pipe: Pipe) -> None:
    before = open_descriptors()
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
    with pytest.raises(BackendUnavailable, match="ulimit -f"):
        await featcache.create(capacity="1GiB").open()
    assert open_descriptors() == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    async with featcache.create(capacity="4MiB", segment="1MiB") as cache:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        await cache.get(await cache.put(filled(KIB)))
    pipe.say("done")


async def test_a_limit_on_the_size_of_files(start: Start) -> None:
    child = start(make_small_files)
    await child.expect("done")
    assert await child.ends() == 0


async def test_a_capacity_beyond_all_addresses(no_leaks: None) -> None:
    with pytest.raises(BackendUnavailable, match="lower capacity") as refused:
        await featcache.create(capacity="128TiB").open()
    assert isinstance(refused.value.__cause__, OSError)
