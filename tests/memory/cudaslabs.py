"""What tests of slabs on a GPU have in common: making one, putting, attaching, reading."""

import torch

from featcache.memory.cuda.backend import attach
from featcache.memory.cuda.backing import VMM
from featcache.memory.cuda.mapping import CudaMapping
from featcache.memory.cuda.slab import CudaSlab
from featcache.memory.pack import Feature, pack
from featcache.memory.slab import PeerSlab
from featcache.ref import TensorSpec
from memory.fakecuda import GRANULARITY_BYTES, FakeApi, OnDevice, driver_over

SEGMENT = GRANULARITY_BYTES
CAPACITY = 16 * SEGMENT
SECOND = torch.device("cuda", 1)


def make_slab(api: FakeApi, kind: str = VMM, *, ordinal: int = 0, committed: int = 0) -> CudaSlab:
    """Make a slab, and commit some of it in segments of the least size."""
    slab = CudaSlab(driver_over(api), kind, ordinal, CAPACITY, SEGMENT)
    if committed:
        slab.commit(0, SEGMENT, prefault=True)
        slab.commit(SEGMENT, committed, prefault=True)
    return slab


def send_segments(slab: CudaSlab, mapping: CudaMapping) -> None:
    """Have a reader map what it has not mapped yet of what the owner has."""
    for segment in slab.segments(mapping.end_bytes, CAPACITY):
        mapping.extend(*segment)


def attach_to(slab: CudaSlab, api: FakeApi, device: torch.device | None = None) -> CudaMapping:
    """Attach a reader whose driver is `api` to a slab."""
    mapping = attach(
        driver_over(api),
        PeerSlab(slab.kind, slab.device_name, CAPACITY, 0, slab.handle, []),
        device,
    )
    try:
        send_segments(slab, mapping)
    except BaseException:
        mapping.close()
        raise
    return mapping


def put(slab: CudaSlab, offset: int, feature: Feature) -> tuple[TensorSpec, ...]:
    """Write a feature; what comes from a GPU is then on its way."""
    specs, parts, _ = pack(feature, 64)
    staged, order = slab.stage(parts)
    slab.write(offset, staged, order)
    return specs


def put_one(slab: CudaSlab, offset: int, value: torch.Tensor) -> TensorSpec:
    """Write a bare tensor."""
    return put(slab, offset, value)[0]


def to_host(mapping: CudaMapping, offset: int, spec: TensorSpec) -> torch.Tensor:
    """Read to the host: done on return."""
    out = mapping.empty(spec, torch.device("cpu"))
    mapping.read(offset, spec, out, None)
    return out


def to_device(
    mapping: CudaMapping, api: FakeApi, offset: int, spec: TensorSpec, ordinal: int = 0
) -> OnDevice:
    """Enqueue a read to a device at its current stream."""
    out = api.tensor(mapping.empty(spec, None), ordinal)
    mapping.read(offset, spec, out, mapping.order(torch.device("cuda", ordinal)))
    return out


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, wherever they say they are, have the same bytes."""
    pair = [
        tensor.as_subclass(torch.Tensor).resolve_conj().resolve_neg() for tensor in (one, other)
    ]
    if pair[0].dtype != pair[1].dtype or pair[0].shape != pair[1].shape:
        return False
    if not one.numel():
        return True
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in pair]
    return torch.equal(*raw)
