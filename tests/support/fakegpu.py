"""A pool on a GPU that is not there: the whole library over the fake driver of tests/memory.

The owner has a fake driver of its own and each client another, as if they were in processes of their
own. Streams do their work when a test says so. Copies go to the CPU (`get(ref, device="cpu")`), since
torch knows no such GPU; views are on it.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef
from featcache.memory.backends import BY_KIND
from featcache.memory.cuda.backend import CudaBackend
from featcache.memory.cuda.backing import VMM
from featcache.memory.cuda.driver import Driver
from featcache.memory.cuda.mapping import CudaMapping
from featcache.memory.slab import PeerSlab, Plan
from memory.fakecuda import GRANULARITY_BYTES, FakeApi, driver_over
from support.caches import MIB, filled, small, tensor, until
from support.processes import Pipe

SEGMENT = GRANULARITY_BYTES


class FakeGpu:
    """The drivers of the owner and of its clients, in the order in which they attached."""

    def __init__(self) -> None:
        self.owner = FakeApi()
        self.clients: list[FakeApi] = []
        self.next: FakeApi | None = None
        """What the next client gets, if a test made it."""

    def for_client(self) -> Driver:
        api, self.next = self.next or FakeApi(), None
        self.clients.append(api)
        return driver_over(api)

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor that is on the fake GPU: a put of it is in progress until the owner's stream runs."""
        return self.owner.tensor(value.clone())

    def run(self) -> None:
        """Have all streams of all do all their work."""
        for api in (self.owner, *self.clients):
            api.run_all()

    def mapped(self, number: int = 0) -> int:
        """Bytes of segments that a client has mapped."""
        regions = self.clients[number].memory.regions.values()
        return sum(region.size for region in regions if region.kind == "mapping")

    def check(self) -> None:
        """Fail if a rule of the driver's was broken, or anything is still open."""
        for api in (self.owner, *self.clients):
            assert api.broken == []
            assert api.leftovers() == {}

    def end(self) -> None:
        """Take all of it down, whatever a test has left."""
        for api in (self.owner, *self.clients):
            api.memory.end()


class FakeBackend(CudaBackend):
    """CUDA over the fake drivers: the owner's, and a client's of its own for each slab it maps."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__(lambda: driver_over(gpu.owner))
        self._in_clients = CudaBackend(gpu.for_client)

    def map(self, peer: PeerSlab, device: torch.device | None) -> CudaMapping:
        return self._in_clients.map(peer, device)


def use_here(patch: pytest.MonkeyPatch, gpu: FakeGpu, kind: str = VMM) -> None:
    """Put the fakes where the library would load the real driver."""
    plan = Plan(kind, "it is a fake", 0, GRANULARITY_BYTES, 256 if kind == VMM else 1)
    patch.setattr("featcache.owner.owner.plan_for", lambda device, backend: plan)
    patch.setitem(BY_KIND, kind, FakeBackend(gpu))
    here = SimpleNamespace(is_available=lambda: True, current_device=lambda: 0)
    sees_one = SimpleNamespace(device=torch.device, cuda=here)
    patch.setattr("featcache.memory.devices.torch", sees_one)
    patch.setattr("featcache.memory.cuda.backend.torch", sees_one)


@contextlib.contextmanager
def fake_gpu(kind: str = VMM) -> Iterator[FakeGpu]:
    """A fake GPU, looked at when all that used it is closed."""
    gpu = FakeGpu()
    try:
        with pytest.MonkeyPatch.context() as patch:
            use_here(patch, gpu, kind)
            yield gpu
        gpu.run()
        gpu.check()
    finally:
        gpu.end()


@contextlib.asynccontextmanager
async def segmented(
    gpu: FakeGpu, *, client: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[tuple[FeatureCache, FeatureClient]]:
    """An owner whose slab is sent in segments, and a client that maps them."""
    chosen: dict[str, Any] = {"capacity": MIB, "segment": SEGMENT, "idle": 3600.0} | changes
    async with (
        featcache.create(settings=small(**chosen)) as owner,
        featcache.connect(owner.endpoint, settings=small(**(client or {}))) as reader,
    ):
        yield owner, reader
    gpu.run()


async def got(reader: FeatureCache | FeatureClient, ref: FeatureRef, **how: Any) -> torch.Tensor:
    """A copy on the CPU."""
    return tensor(await reader.get(ref, device="cpu", **how))


async def right(reader: FeatureCache | FeatureClient, ref: FeatureRef, value: int) -> None:
    """Get a feature that is all of one value."""
    assert torch.equal(await got(reader, ref), filled(ref.nbytes, value))


async def shrunk(owner: FeatureCache, nbytes: int = SEGMENT) -> None:
    """Return when the slab has released all but `nbytes`."""
    store = owner._opened().pool.store
    before, store.size.limits = store.size.limits, attrs.evolve(store.size.limits, idle_s=0.0)
    await until(lambda: store.committed_bytes == nbytes)
    store.size.limits = before


async def reader(pipe: Pipe, endpoint: str) -> None:
    """In a process of its own: get what is sent, and answer with the sum of its bytes."""
    gpu = FakeGpu()
    with pytest.MonkeyPatch.context() as patch:
        use_here(patch, gpu)
        async with featcache.connect(endpoint, settings=small()) as client:
            pipe.say("attached")
            while (message := await pipe.hear())[0] == "ref":
                ref = featcache.FeatureRef.from_bytes(message[1])
                found = await client.get(ref, device="cpu")
                assert isinstance(found, torch.Tensor)
                pipe.say("sum", int(found.long().sum()), gpu.mapped())
        gpu.check()
    gpu.end()
    pipe.say("closed")
