"""What this machine has for a pool: memory, devices, and the folder for sockets."""

from pathlib import Path

import attrs
import torch

from featcache.control.endpoint import default_directory
from featcache.memory.cuda.driver import Driver, load
from featcache.memory.host.available import available_bytes


@attrs.frozen(kw_only=True)
class DeviceFacts:
    """A GPU, as a pool would use it."""

    device: str
    name: str
    uuid: str
    total_bytes: int
    shares_segments: bool
    """Whether it can map memory and share it by descriptor (VMM): else there is legacy IPC."""
    rdma: bool
    """Whether a network card can reach such memory."""
    reaches: tuple[str, ...]
    """The other devices here whose memory it can read."""


def host_bytes() -> int | None:
    """Return the bytes of memory that can be had, control groups considered; None if unknown."""
    return available_bytes()


def runtime_folder() -> Path:
    """Return the folder for sockets, or raise SettingsError if it can't be used."""
    return default_directory()


def cuda_devices() -> list[DeviceFacts]:
    """Return the GPUs that torch sees here.

    Raises:
        BackendUnavailable: there are some, but no cuda-bindings, or the driver failed.

    """
    count = torch.cuda.device_count()
    if not count:
        return []
    driver = load()
    return [_facts(driver, ordinal, count) for ordinal in range(count)]


def _facts(driver: Driver, ordinal: int, count: int) -> DeviceFacts:
    others = (other for other in range(count) if other != ordinal)
    return DeviceFacts(
        device=f"cuda:{ordinal}",
        name=torch.cuda.get_device_name(ordinal),
        uuid=driver.uuid_of(ordinal),
        total_bytes=int(torch.cuda.get_device_properties(ordinal).total_memory),
        shares_segments=driver.can_share_segments(ordinal),
        rdma=driver.can_rdma(ordinal),
        reaches=tuple(f"cuda:{other}" for other in others if driver.can_reach(ordinal, other)),
    )
