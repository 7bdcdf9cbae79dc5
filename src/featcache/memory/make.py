"""From the device that a user names to the slab that is made there."""

from typing import Final, NamedTuple

import torch

from featcache.errors import BackendUnavailable
from featcache.memory import host
from featcache.memory.backing import IPC
from featcache.memory.cuda_slab import CudaSlab, choose_backend
from featcache.memory.driver import load
from featcache.memory.pinned import PinnedSlab
from featcache.memory.slab import Slab

__all__ = ["Plan", "make_host_slab", "make_slab", "plan_for"]

_MOST_SEGMENTS: Final = 256
"""Each is a descriptor in the owner, and one that travels to every session."""


class Plan(NamedTuple):
    """What kind of slab a device gets, and what its sizes must be like."""

    kind: str
    reason: str
    ordinal: int
    granularity_bytes: int
    """What its sizes are multiples of."""
    most_segments: int | None
    """How many segments it may be cut into; None is any number."""


def plan_for(device: torch.device, backend: str) -> Plan:
    """Choose the kind of slab for a device. May block.

    Raises:
        BackendUnavailable: no driver, no such device, or not what `backend` asks for.

    """
    if device.type == "cpu":
        return Plan(host.KIND, "", -1, host.HostSlab.granularity_bytes, None)
    driver = load()
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    kind, reason = choose_backend(driver, ordinal, backend)
    most = 1 if kind == IPC else _MOST_SEGMENTS
    return Plan(kind, reason, ordinal, driver.granularity_bytes(ordinal), most)


def make_slab(plan: Plan, capacity_bytes: int, segment_bytes: int, *, huge_pages: bool) -> Slab:
    """Make an empty slab. May block.

    Raises:
        BackendUnavailable: the memory, or the help of the system for it, is not there.

    """
    if plan.kind == host.KIND:
        return host.HostSlab(capacity_bytes, huge_pages=huge_pages)
    try:
        return CudaSlab(load(), plan.kind, plan.ordinal, capacity_bytes, segment_bytes)
    except MemoryError as error:
        raise BackendUnavailable(f"the slab could not be made: {error}") from error


def make_host_slab(beside: Plan, capacity_bytes: int, *, huge_pages: bool, pinned: bool) -> Slab:
    """Make the host slab beside another: if `pinned`, a GPU copies to and from it at full speed."""
    if beside.kind == host.KIND or not pinned:
        return host.HostSlab(capacity_bytes, huge_pages=huge_pages)
    return PinnedSlab(load(), beside.ordinal, capacity_bytes, huge_pages=huge_pages)
