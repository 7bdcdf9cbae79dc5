"""Kinds of slabs, places that read them, and what tests do with the streams of a GPU.

The kinds "vmm" and "ipc" are on the first GPU and carry the mark gpu. A `Place` is a slab with who
reads it: the owner itself, or a client in the same process, on the slab's device, on another GPU, or
on the CPU, staged through host memory.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import attrs
import pytest
import torch

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef, Settings
from support.caches import MIB, Feature, raw, small, spent, tensor, tensors, until

HOME: Final = torch.device("cuda", 0)
OTHER: Final = torch.device("cuda", 1)
SEGMENT: Final = 2 * MIB
"""The least that a GPU's memory is cut into."""
Reader = FeatureCache | FeatureClient
Event = Any
"""A CUDA event: torch's own class has no types."""


@attrs.frozen
class Slab:
    """A kind of slab: "host", "vmm" or "ipc"."""

    kind: str

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.kind == "host" else HOME

    def settings(self, **changes: Any) -> Settings:
        """As `small`; sizes are those that a GPU can do."""
        chosen: dict[str, Any] = {"capacity": 2 * MIB, "segment": 2 * MIB}
        if self.kind != "host":
            chosen["backend"] = self.kind
        return small(**(chosen | changes))

    def create(self, **changes: Any) -> FeatureCache:
        return featcache.create(device=self.device, settings=self.settings(**changes))

    @contextlib.asynccontextmanager
    async def pair(self, **changes: Any) -> AsyncIterator[tuple[FeatureCache, FeatureClient]]:
        """An owner, and a client in this process on the slab's device."""
        async with (
            self.create(**changes) as owner,
            featcache.connect(owner.endpoint, settings=self.settings(**changes)) as client,
        ):
            yield owner, client


@attrs.frozen
class Place:
    """A slab and who reads it: "own", or the device of a client in this process."""

    slab: Slab
    where: str

    def __str__(self) -> str:
        return f"{self.slab.kind}-{self.where}"

    @property
    def device(self) -> torch.device:
        """Where copies are."""
        at_home = self.where in {"own", "home"}
        return self.slab.device if at_home else torch.device(self.where)

    @property
    def relayed(self) -> bool:
        """Whether reads go through the host."""
        return self.where == "cpu" and self.slab.kind != "host"

    @contextlib.asynccontextmanager
    async def open(self, **changes: Any) -> AsyncIterator[tuple[FeatureCache, Reader]]:
        settings = self.slab.settings(**changes)
        async with self.slab.create(**changes) as owner:
            if self.where == "own":
                yield owner, owner
                return
            device = None if self.where == "home" else self.where
            async with featcache.connect(
                owner.endpoint, device=device, settings=settings
            ) as client:
                yield owner, client


def slab_params(*kinds: str) -> list[Any]:
    """Parameters of tests that run on these kinds."""
    return [
        pytest.param(Slab(kind), id=kind, marks=[] if kind == "host" else [pytest.mark.gpu])
        for kind in kinds
    ]


def place_params(*places: str) -> list[Any]:
    """Parameters of tests that run at these places, each a kind and a where: "vmm-cuda:1"."""
    made = []
    for name in places:
        kind, where = name.split("-")
        marks = [] if kind == "host" and not where.startswith("cuda") else [pytest.mark.gpu]
        made.append(pytest.param(Place(Slab(kind), where), id=name, marks=marks))
    return made


on_gpu = pytest.mark.parametrize("slab", slab_params("vmm", "ipc"), indirect=True)

PLACES: Final = place_params(
    "host-own", "host-home", "vmm-own", "vmm-home", "vmm-cpu", "vmm-cuda:1",
    "ipc-own", "ipc-home", "ipc-cpu",
)  # fmt: skip


def check_devices(place: Place) -> None:
    """Skip where there is no second GPU."""
    if "cuda:1" in place.where and torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU: torch sees one here")


# --- values --------------------------------------------------------------------------------------


def bytes_of(value: torch.Tensor) -> bytes:
    """The bytes of a contiguous tensor wherever it is, whether or not torch can compute with it."""
    assert value.is_contiguous()
    at_byte = value.storage_offset() * value.element_size()
    plain = torch.empty(0, dtype=torch.uint8, device=value.device)
    return raw(plain.set_(value.untyped_storage(), at_byte, (value.nbytes,), (1,)).cpu())


def same(found: Feature, expected: torch.Tensor) -> bool:
    """Whether a copy or view, wherever it is, has the values of a tensor, wherever that is."""
    assert isinstance(found, torch.Tensor)
    wanted = expected.detach().resolve_conj().resolve_neg().contiguous()
    layout = (found.dtype, found.shape, found.is_contiguous())
    return layout == (wanted.dtype, wanted.shape, True) and bytes_of(found) == bytes_of(wanted)


def same_dict(found: Feature, expected: dict[str, torch.Tensor]) -> bool:
    return list(tensors(found)) == list(expected) and all(
        same(value, expected[name]) for name, value in tensors(found).items()
    )


def at(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same contiguous tensor on a device, moved as bytes: of every dtype."""
    whole = torch.frombuffer(bytearray(raw(value) or b"\0"), dtype=torch.uint8).to(device)
    made = torch.empty(0, dtype=value.dtype, device=device)
    return made.set_(whole.untyped_storage(), 0, value.shape, value.stride())


# --- beginning -----------------------------------------------------------------------------------


@functools.cache
def warm_up_gpus() -> None:
    """Have the driver load the kernels that tests use: it may wait for a busy stream to do so."""
    for ordinal in range(min(2, torch.cuda.device_count())):
        with torch.cuda.device(ordinal):
            device = torch.device("cuda", ordinal)
            flat = torch.full((1000,), 1, dtype=torch.uint8, device=device)
            flat.fill_(2).add_(1)
            assert not bool(((flat.clone() + 1) != 4).any())
            square = torch.zeros(20, 30, device=device)
            square += torch.arange(30.0, device=device)
            square.T.view(torch.int32).contiguous()
            flat.zero_()
            torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()


@contextlib.asynccontextmanager
async def primed(slab: Slab, **changes: Any) -> AsyncIterator[tuple[FeatureCache, FeatureClient]]:
    """As `Slab.pair`, with everything done that is done once, such as registering a page."""
    async with slab.pair(**changes) as (owner, client):
        ref = await owner.put(full_of(1, 256, slab.device), readers=2)
        assert same(await client.get(ref), tensor(await owner.get(ref)))
        await spent(owner)
        yield owner, client


# --- streams -------------------------------------------------------------------------------------


def busy(seconds: float = 0.2, device: torch.device = HOME) -> Event:
    """Keep a device's current stream busy for about so long; return an event that comes after that."""
    with torch.cuda.device(device):
        torch.cuda._sleep(int(seconds * 2e9))  # type: ignore[no-untyped-call]  # clocks are near 2 GHz
        return mark(device)


def stream_on(device: torch.device = HOME) -> torch.cuda.Stream:
    """A stream that is not torch's default one, and does not wait for it."""
    made: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return made


async def landed(owner: FeatureCache, ref: FeatureRef) -> None:
    """Return when the bytes of a ref are there, so that reads of it need not be awaited."""
    published = owner._opened().pool.words.published
    await until(lambda: published[ref.slot] == ref.generation)


def mark(device: torch.device = HOME) -> Event:
    """An event behind what a device's current stream was given so far."""
    event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def full_of(value: int, nbytes: int, device: torch.device = HOME) -> torch.Tensor:
    """Bytes of one value on a device, filled in the order of its current stream."""
    return torch.full((nbytes,), value, dtype=torch.uint8, device=device)


async def until_past(event: Event, holds: Callable[[], object]) -> int:
    """Wait for an event; `holds` must hold as long as it has not come. Return how often it was asked."""
    looks = 0
    while True:
        held = holds()
        if event.query():
            return looks
        assert held, "too early: the stream has not come so far"
        looks += 1
        await asyncio.sleep(0.001)


async def ticking(wait: Awaitable[Any]) -> tuple[Any, int]:
    """Await something, and count how often the loop turned meanwhile."""
    task, turns = asyncio.ensure_future(wait), 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    return await task, turns


def copy_of(ref: FeatureRef) -> FeatureRef:
    """The ref as another process has it."""
    return FeatureRef.from_bytes(ref.to_bytes())
