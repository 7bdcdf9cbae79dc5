"""From the device that a user names to the slab that is made there."""

from typing import Final, NamedTuple

import torch

from featcache.errors import AttachRefused, BackendUnavailable
from featcache.memory.cuda import mapping as cuda
from featcache.memory.cuda.backing import IPC, VMM
from featcache.memory.cuda.driver import load
from featcache.memory.cuda.slab import CudaSlab, choose_backend
from featcache.memory.host import slab as host
from featcache.memory.host.pinned import PinnedSlab
from featcache.memory.slab import Mapping, Slab, Unreachable

_MAX_SEGMENTS: Final = 256
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
    most = 1 if kind == IPC else _MAX_SEGMENTS
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


# --- mapping a peer's ---

_HANDLE_BYTES = 64
load_in_client = load


def default_device() -> torch.device:
    """Return the device that this process reads on if it names none and can't read on the slab's."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _device_named(device_uuid: str) -> torch.device:
    """Return the device of this process that stands for a peer's."""
    if not torch.cuda.is_available():
        return host.CPU
    for ordinal in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(ordinal).uuid) == device_uuid:
            return torch.device("cuda", ordinal)
    return default_device()


def map_slab(
    kind: str,
    device_name: str,
    capacity_bytes: int,
    committed_bytes: int,
    handle: bytes,
    fds: list[int],
    device: torch.device | None,
) -> Mapping:
    """Map a peer's slab, of which no word is trusted. May block. The descriptors stay the caller's.

    Args:
        kind: the backend's name.
        device_name: ``"cpu"`` or the UUID of the slab's GPU.
        capacity_bytes: bytes of the slab's range.
        committed_bytes: bytes of it that have memory behind them.
        handle: the legacy handle, or nothing.
        fds: the descriptors that came with the welcome.
        device: the device that reads; None is the slab's own where it is visible.

    Raises:
        Unreachable: the device can't access the slab.
        AttachRefused: the owner says what no owner says.
        BackendUnavailable: a kind of slab, or a driver, that is not there.

    """
    if kind == host.KIND:
        if len(fds) != 1:
            raise AttachRefused("a host slab comes with one descriptor")
        mapping = host.HostMapping.attach(fds[0], capacity_bytes, committed_bytes)
        if device_name != "cpu" and (device is None or device.type == "cuda"):
            mapping.home = device or _device_named(device_name)
        return mapping
    if kind not in {VMM, IPC}:
        raise BackendUnavailable(f"this client can't map a slab of kind {kind!r}")
    if fds or len(handle) != (_HANDLE_BYTES if kind == IPC else 0):
        raise AttachRefused("a slab on a GPU came with other handles than its kind has")
    if device is not None and device.type == "cpu":
        raise Unreachable("the client reads on the CPU")
    if not torch.cuda.is_available():
        raise Unreachable("torch sees no CUDA device here")
    try:
        driver = load_in_client()
    except BackendUnavailable as error:
        raise Unreachable(str(error)) from error
    return cuda.attach(driver, kind, device_name, capacity_bytes, handle, device)
