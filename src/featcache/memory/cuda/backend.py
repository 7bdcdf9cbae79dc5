"""CUDA as a backend: slabs of two kinds on a GPU, made by an owner and mapped by a client."""

from collections.abc import Callable
from typing import Final

import torch

from featcache.errors import AttachRefused, BackendUnavailable
from featcache.memory.cuda.backing import IPC, VMM, Backing, IpcBacking, SegmentBacking
from featcache.memory.cuda.driver import Driver, load
from featcache.memory.cuda.mapping import CudaMapping
from featcache.memory.cuda.slab import CudaSlab
from featcache.memory.host.pinned import PinnedSlab
from featcache.memory.host.slab import HostSlab
from featcache.memory.slab import PeerSlab, Plan, Unreachable

_MAX_SEGMENTS: Final = 256
"""Each is a descriptor in the owner, and one that travels to every session."""
_HANDLE_BYTES: Final = 64
"""Bytes of a legacy handle (CU_IPC_HANDLE_SIZE)."""


class CudaBackend:
    """As `backends.Backend`, over the driver that `load` returns when there is work for it."""

    kinds = (VMM, IPC)

    def __init__(self, load: Callable[[], Driver] = load) -> None:
        self._load = load

    def plan(self, device: torch.device, wanted: str) -> Plan:
        """Choose between segments shared by descriptor and one legacy allocation."""
        driver = self._load()
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        kind, reason = choose_kind(driver, ordinal, wanted)
        max_segments = 1 if kind == IPC else _MAX_SEGMENTS
        return Plan(kind, reason, ordinal, driver.granularity_bytes(ordinal), max_segments)

    def make(
        self, plan: Plan, capacity_bytes: int, segment_bytes: int, *, huge_pages: bool
    ) -> CudaSlab:
        try:
            return CudaSlab(self._load(), plan.kind, plan.ordinal, capacity_bytes, segment_bytes)
        except MemoryError as error:
            raise BackendUnavailable(f"the slab could not be made: {error}") from error

    def make_host(
        self, sibling: Plan, capacity_bytes: int, *, huge_pages: bool, pinned: bool
    ) -> HostSlab:
        """Make a host slab for the same GPU, which copies to and from `pinned` memory at full speed."""
        if not pinned:
            return HostSlab(capacity_bytes, huge_pages=huge_pages)
        return PinnedSlab(self._load(), sibling.ordinal, capacity_bytes, huge_pages=huge_pages)

    def map(self, peer: PeerSlab, device: torch.device | None) -> CudaMapping:
        """Map a peer's slab; its segments come by `extend`."""
        if peer.fds or len(peer.handle) != (_HANDLE_BYTES if peer.kind == IPC else 0):
            raise AttachRefused("a slab on a GPU came with other handles than its kind has")
        if device is not None and device.type == "cpu":
            raise Unreachable("the client reads on the CPU")
        if not torch.cuda.is_available():
            raise Unreachable("torch sees no CUDA device here")
        try:
            driver = self._load()
        except BackendUnavailable as error:
            raise Unreachable(str(error)) from error
        return attach(driver, peer, device)


def choose_kind(driver: Driver, ordinal: int, wanted: str) -> tuple[str, str]:
    """Return the kind of slab for a device, and the reason.

    Raises:
        BackendUnavailable: `wanted` is ``"vmm"`` and the device can't.

    """
    able, asked = driver.can_share_segments(ordinal), "Settings.backend asks for it"
    if wanted == "ipc":
        return IPC, asked
    if able:
        return VMM, asked if wanted == "vmm" else "the device can share segments"
    if wanted == "vmm":
        raise BackendUnavailable(
            "this device can't share memory segments by descriptor: Settings(backend='ipc')"
        )
    return IPC, "the device can't share memory segments by descriptor"


def attach(driver: Driver, peer: PeerSlab, device: torch.device | None) -> CudaMapping:
    """Map another process's slab for a device of this one. May block; segments come by `extend`.

    The device that reads is by default the slab's own, else torch's current one.

    Raises:
        Unreachable: the device has no peer access to the slab's.
        BackendUnavailable: the driver refused; the message names the call and the advice.

    """
    theirs = driver.ordinal_of(peer.device_name)
    if device is not None and device.index is not None:
        ordinal = device.index
    else:
        ordinal = theirs if theirs is not None and device is None else torch.cuda.current_device()
    if theirs is not None and not driver.can_reach(ordinal, theirs):
        where = f"the slab's device, {peer.device_name}"
        raise Unreachable(f"cuda:{ordinal} has no peer access to {where}")
    backing: Backing
    if peer.kind == VMM:
        backing = SegmentBacking(driver, ordinal, peer.capacity_bytes)
    else:
        assert peer.kind == IPC, peer.kind
        backing = IpcBacking(driver, ordinal, peer.capacity_bytes, handle=peer.handle)
    return CudaMapping(driver, backing, ordinal)
