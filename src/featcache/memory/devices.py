"""This process's devices, by torch's names and by UUIDs, which name them between processes."""

from typing import Final

import torch

CPU: Final = torch.device("cpu")


def default_device() -> torch.device:
    """Return the device that reads where none is named and the slab's own can't read it."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


def device_of(device_uuid: str) -> torch.device:
    """Return the device of a UUID, or the default one where it is hidden from this process."""
    if not torch.cuda.is_available():
        return CPU
    for ordinal in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(ordinal).uuid) == device_uuid:
            return torch.device("cuda", ordinal)
    return default_device()
