"""What tests of clients that put into a slab on a GPU that is not there share; see `api.fakegpu`."""

import torch

from featcache import FeatureCache, FeatureRef
from support.caches import filled
from support.fakegpu import FakeGpu


def on_client(gpu: FakeGpu, value: torch.Tensor, number: int = 0, ordinal: int = 0) -> torch.Tensor:
    """A tensor on a client's GPU: its put is under way until that client's stream runs."""
    return gpu.clients[number].tensor(value.clone(), ordinal)


def on_client_filled(gpu: FakeGpu, nbytes: int, value: int, number: int = 0) -> torch.Tensor:
    return on_client(gpu, filled(nbytes, value), number)


def writable(gpu: FakeGpu, number: int = 0) -> int:
    """Bytes that a client has mapped so that its device may write them."""
    regions = gpu.clients[number].memory.regions.values()
    return sum(
        region.size
        for region in regions
        if region.kind == "mapping" and any(region.access.values())
    )


def read_only(gpu: FakeGpu, number: int = 0) -> int:
    """Bytes that a client has mapped so that its device may only read them."""
    regions = gpu.clients[number].memory.regions.values()
    return sum(
        region.size
        for region in regions
        if region.kind == "mapping" and region.access and not any(region.access.values())
    )


def run_client(gpu: FakeGpu, number: int = 0) -> None:
    """Have one client's streams do all their work, and nobody else's."""
    gpu.clients[number].run_all()


def has_landed(owner: FeatureCache, ref: FeatureRef) -> bool:
    """Whether the owner vouches for a ref's bytes, by a look now."""
    pool = owner._opened().pool
    pool.collect()
    return pool.words.published[ref.slot] == ref.generation
