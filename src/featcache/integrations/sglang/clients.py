"""The sessions in which this process reads: one for each name and device, opened when first needed."""

import os
import threading
from typing import Any, Final

import torch

from featcache import blocking

_clients: Final[dict[tuple[str | None, str, int], blocking.FeatureClient]] = {}
_lock: Final = threading.Lock()


def device_of(index: int) -> torch.device:
    """Return the device that SGLang numbers so: a GPU, or the host where there is none at all."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def client_for(name: str | None, device: torch.device) -> blocking.FeatureClient:
    """Return the client of a reader's name on a device.

    It is bound to no endpoint: it attaches to each pool at the first ref of it, so it also goes on with
    the next owner.
    """
    key = name, str(device), os.getpid()  # a fork has none of its parent's
    client = _clients.get(key)
    if client is not None:
        return client
    with _lock:
        client = _clients.get(key)
        if client is None:
            client = blocking.connect(device=device, name=name)
            client.open()
            _clients[key] = client
    return client


def paying_client(name: str | None, device: torch.device) -> blocking.FeatureClient:
    """Return a client of a reader's name that pays without a read: one that is open, on any device.

    A thread's current GPU need not be the one that its rank reads on.
    """
    for (other, _, pid), client in list(_clients.items()):
        if other == name and pid == os.getpid():
            return client
    return client_for(name, device)


def close_clients() -> None:
    """Close them all, as the end of the process does."""
    with _lock:
        mine = [key for key in _clients if key[2] == os.getpid()]
        closing: list[Any] = [_clients.pop(key) for key in mine]
    for client in closing:
        client.close()
