"""Owners that send segments as no owner does: the client says so, reads nothing wrong, leaks nothing."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import featcache
from control.peers import Peer, frame
from control.test_hostile_owners import furniture, owner_that, welcome_of
from featcache import BackendUnavailable, FeatcacheError, FeatureRef, OwnerLost
from featcache.control.messages import Farewell, UnmapTail, encode
from featcache.memory.backends import map_slab
from featcache.ref import TensorSpec
from memory.fakecuda import uuid_of
from memory.fakepages import new_memory
from support.caches import Gate, small, steps, until
from support.fakegpu import SEGMENT, FakeGpu, fake_gpu

CAPACITY = 4 * SEGMENT
SLOTS = 8


@pytest.fixture(autouse=True)
def gpu(no_leaks: None) -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


def segments(start: int, *sizes: int, memory: list[int] | None = None) -> Callable[[Peer], None]:
    """Sends segments; `memory` has the sizes of what comes along, if they are others."""

    def send(peer: Peer) -> None:
        fds = [new_memory(0, size) for size in (sizes if memory is None else memory)]
        message = {"type": "segments", "start_bytes": start, "sizes": list(sizes)}
        peer.send(frame(msgspec.msgpack.encode(message), len(fds)), fds)
        for fd in fds:
            os.close(fd)

    return send


def others(*names: str) -> Callable[[Peer], None]:
    """Sends a segment that is no device memory."""

    def send(peer: Peer) -> None:
        fds = [os.eventfd(0) if name == "eventfd" else os.open("/dev/null", 0) for name in names]
        message = {"type": "segments", "start_bytes": 0, "sizes": [SEGMENT] * len(fds)}
        peer.send(frame(msgspec.msgpack.encode(message), len(fds)), fds)
        for fd in fds:
            os.close(fd)

    return send


def says(message: Any) -> Callable[[Peer], None]:
    return lambda peer: peer.send(frame(encode(message)))


def welcomes(
    *then: Callable[[Peer], None],
    before: bool = False,
    when: Callable[[], object] | None = None,
    ends: bool = False,
    **fields: Any,
) -> Callable[[Peer], Awaitable[None]]:
    """Says welcome to a slab on the fake GPU, and something before that, at once after it, or later."""

    async def act(peer: Peer) -> None:
        await peer.message()
        chosen = {"kind": "cuda-vmm", "device": uuid_of(0), "capacity_bytes": CAPACITY}
        if before:
            for send in then:
                send(peer)
        with furniture() as fds:
            peer.send(frame(welcome_of(**(chosen | fields)), 4), fds[:4])
        if when is not None:
            await until(when)
        if not before:
            for send in then:
                send(peer)
        if ends:
            return
        with contextlib.suppress(OSError, AssertionError):  # it may hang up on that
            while (await peer.message())["type"] != "goodbye":
                pass
            peer.send(frame(encode(Farewell())))
        await peer.hung_up()

    return act


AT_ONCE: dict[str, tuple[Callable[[Peer], Awaitable[None]], str]] = {
    "before the welcome": (welcomes(segments(0, SEGMENT), before=True), "unexpected Segments"),
    "retire before the welcome": (
        welcomes(says(UnmapTail(1, 0)), before=True),
        "unexpected UnmapTail",
    ),
    "none, though some were promised": (welcomes(committed_bytes=SEGMENT), "in time"),
    "fewer than were promised": (
        welcomes(segments(0, SEGMENT), committed_bytes=2 * SEGMENT),
        "in time",
    ),
    "not from the start": (welcomes(segments(SEGMENT, SEGMENT), committed_bytes=1), "not follow"),
    "twice the same place": (
        welcomes(segments(0, SEGMENT), segments(SEGMENT // 2, SEGMENT), committed_bytes=CAPACITY),
        "in time|not follow",
    ),
    "beyond the capacity": (welcomes(segments(0, 2 * CAPACITY), committed_bytes=1), "not follow"),
    "of no size": (welcomes(segments(0, 0, memory=[SEGMENT]), committed_bytes=1), "CUDA_ERROR"),
    "of a size that is none": (
        welcomes(segments(0, (1 << 63) - 1, memory=[SEGMENT]), committed_bytes=1),
        "not follow",
    ),
    "larger than its memory": (
        welcomes(segments(0, 2 * SEGMENT, memory=[SEGMENT]), committed_bytes=1),
        "CUDA_ERROR",
    ),
    "no memory": (welcomes(others("eventfd"), committed_bytes=1), "CUDA_ERROR"),
    "one memory and a device": (welcomes(others("null", "eventfd"), committed_bytes=1), "CUDA"),
    "more than were committed": (welcomes(committed_bytes=2 * CAPACITY), "in time"),
    "with a slab's descriptor": (welcomes(kind="host"), "one descriptor"),
    "with a handle": (welcomes(handle=b"x" * 64), "other handles"),
    "a capacity that is none": (welcomes(capacity_bytes=SEGMENT + 1), "CUDA_ERROR"),
}


@pytest.mark.parametrize("name", AT_ONCE)
async def test_segments_that_are_wrong_from_the_start(name: str, runtime_dir: Path) -> None:
    act, message = AT_ONCE[name]
    async with owner_that(act, runtime_dir) as endpoint:
        with pytest.raises(FeatcacheError, match=message):
            await featcache.connect(endpoint, settings=small(attach_timeout=1.0)).open()


def retire_with_a_descriptor(peer: Peer) -> None:
    fd = new_memory(0, SEGMENT)
    peer.send(frame(encode(UnmapTail(1, 0)), 1), [fd])
    os.close(fd)


UNEVEN: dict[str, Callable[[Peer], None]] = {
    "fewer descriptors": segments(0, SEGMENT, SEGMENT, memory=[SEGMENT]),
    "more descriptors": segments(0, SEGMENT, memory=[SEGMENT, SEGMENT]),
    "no descriptor": segments(0, SEGMENT, memory=[]),
    "no sizes": segments(0, memory=[]),
    "no sizes, a descriptor": segments(0, memory=[SEGMENT]),
    "too many": segments(0, *[SEGMENT] * 33),
    "a negative size": segments(0, -1, memory=[SEGMENT]),
    "a negative place": segments(-1, SEGMENT),
    "a size that is none": lambda peer: peer.send(
        frame(msgspec.msgpack.encode({"type": "segments", "start_bytes": 0, "sizes": ["1"]}))
    ),
    "descriptors announced, not sent": lambda peer: peer.send(
        frame(msgspec.msgpack.encode({"type": "segments", "start_bytes": 0, "sizes": [SEGMENT]}), 1)
    ),
    "a retire with a descriptor": retire_with_a_descriptor,
}


async def use(endpoint: str) -> None:
    """Attach, wait until the owner is lost, and read."""
    async with featcache.connect(endpoint, settings=small(attach_timeout=30.0)) as client:
        await until(lambda: client.statistics().sessions == 0)
        await client.get(a_ref(endpoint))


def mapped(gpu: FakeGpu) -> Callable[[], object]:
    """Whether the client has mapped its page, and waits for what was promised or has attached."""
    return lambda: gpu.clients and "cuMemHostRegister" in gpu.clients[0].calls


@pytest.mark.parametrize("when", ["with the welcome", "while it waits", "when it is attached"])
@pytest.mark.parametrize("name", UNEVEN)
async def test_messages_that_make_no_sense(
    gpu: FakeGpu, name: str, when: str, runtime_dir: Path
) -> None:
    """The owner is lost at that: at once, also for who waits for its segments."""
    act = welcomes(
        UNEVEN[name],
        committed_bytes=SEGMENT if when == "while it waits" else 0,
        when=None if when == "with the welcome" else mapped(gpu),
        ends=True,
    )
    async with owner_that(act, runtime_dir) as endpoint, asyncio.timeout(10):
        with pytest.raises(OwnerLost):
            await use(endpoint)


def a_ref(endpoint: str) -> FeatureRef:
    return FeatureRef(bytes(range(16)), endpoint, 0, 1, 0, 1, (TensorSpec(None, "uint8", (1,), 0),))


async def test_an_owner_that_hangs_up_before_its_segments(gpu: FakeGpu, runtime_dir: Path) -> None:
    act = welcomes(committed_bytes=SEGMENT, when=mapped(gpu), ends=True)
    async with owner_that(act, runtime_dir) as endpoint, asyncio.timeout(10):
        with pytest.raises(OwnerLost):
            await featcache.connect(endpoint, settings=small(attach_timeout=30.0)).open()


LATER: dict[str, list[Callable[[Peer], None]]] = {
    "retires what there is not": [says(UnmapTail(1, 0)), says(UnmapTail(2, 0))],
    "retires beyond the end": [segments(0, SEGMENT), says(UnmapTail(1, 1 << 60))],
    "retires in the middle of a segment": [segments(0, 2 * SEGMENT), says(UnmapTail(1, SEGMENT))],
    "retires the same again": [segments(0, SEGMENT), *[says(UnmapTail(1, 0))] * 5],
    "retires with a layout that is none": [says(UnmapTail((1 << 63) - 1, 0))],
    "sends the same again": [*[segments(0, SEGMENT)] * 5],
    "sends, retires, sends": [segments(0, SEGMENT), says(UnmapTail(1, 0))] * 4,
    "sends what does not follow": [segments(0, SEGMENT), segments(3 * SEGMENT, SEGMENT)] * 3,
}


@pytest.mark.parametrize("name", LATER)
async def test_changes_that_make_little_sense(name: str, runtime_dir: Path) -> None:
    """They harm nobody: what can be carried out is, and the client closes as ever."""
    async with (
        owner_that(welcomes(*LATER[name]), runtime_dir) as endpoint,
        featcache.connect(endpoint, settings=small()) as client,
    ):
        await steps(20)
        with pytest.raises(FeatcacheError):
            await client.get(a_ref(endpoint))


async def test_more_changes_than_a_client_keeps_until_it_has_mapped(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr("featcache.client.mapping.map_slab", gate.wrap(map_slab))
    many = b"".join(frame(encode(UnmapTail(n, 0))) for n in range(1, 1030))
    hung_up = asyncio.Event()
    act = welcomes(lambda peer: peer.send(many), when=gate.entered.is_set)

    async def then(peer: Peer) -> None:
        await act(peer)
        hung_up.set()

    async with owner_that(then, runtime_dir) as endpoint:
        opening = asyncio.create_task(featcache.connect(endpoint, settings=small()).open())
        await hung_up.wait()  # the client did, while a thread of its own maps
        gate.open()
        with pytest.raises(OwnerLost, match="changes of the slab"):
            await opening


async def test_more_changes_than_a_client_keeps_until_it_has_carried_them_out(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr("featcache.client.connection._change", gate.wrap(lambda *_: None))
    many = b"".join(frame(encode(UnmapTail(n, 0))) for n in range(1, 1030))
    attached = asyncio.Event()
    act = welcomes(lambda peer: peer.send(many), when=attached.is_set)
    async with (
        owner_that(act, runtime_dir) as endpoint,
        featcache.connect(endpoint, settings=small()) as client,
    ):
        attached.set()
        (handle,) = client._opened().registry.connections
        await until(lambda: not handle._follows)
        assert len(handle._changes) <= 1024
        with pytest.raises(BackendUnavailable, match="faster than"):
            await client.get(a_ref(endpoint))
        gate.open()
