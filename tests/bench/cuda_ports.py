"""The contestants of the CUDA benchmark, and the protocol of their two ends.

Each module has `missing(plan)`: None, or why the system cannot run here; `owner(plan, credit)` and
`reader(plan, index, hello, credit)`: the two ends, made inside an event loop, which only featcache
needs. `credit` are sockets beside those of the handles, for systems that have no pool of their own
that bounds what is in flight.
"""

from __future__ import annotations

import importlib
import socket
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one fleet of processes: one system, one number of readers, all sizes in turn."""

    system: str
    readers: int
    sizes: tuple[int, ...]
    seconds: float
    """of one pipelined round"""
    rounds: int
    pool: int = 1 << 30
    slots: int = 4096
    """most features in flight, whatever their size: the default of featcache and of sglang"""
    batch: int = 8
    """handles that go out in one write while features stream: fewer where the pool is small"""
    device: str = "cuda:0"
    threads: int = 1
    peers: str = ""
    """the folder that peers/unpack_sglang.py unpacked"""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def entry(self) -> Entry:
        return SYSTEMS[self.system]

    @property
    def variant(self) -> str:
        return self.entry.variant

    def window(self, size: int) -> int:
        """How many features of a size the pool has room for."""
        return max(2, min(self.slots, self.pool // size))


class OwnerPort(Protocol):
    hello: bytes
    """sent to every reader before it makes its end"""
    nowait: bool
    """whether `put_nowait` is how features are put"""

    def put_nowait(self, x: torch.Tensor) -> Any | None:
        """Stores a feature and returns its token; None if there is no room now."""

    async def put(self, x: torch.Tensor) -> Any:
        """The same, but waits for room."""

    def encode(self, token: Any) -> list[bytes]:
        """The handle that all readers get, or one for each of them."""

    async def close(self) -> None: ...


class ReaderPort(Protocol):
    nowait: bool
    """whether `take` is how features are read, `take_async` otherwise"""

    def parse(self, data: bytes) -> Any:
        """A ref from a handle."""

    def take(self, ref: Any) -> torch.Tensor:
        """The feature: a copy of the reader's own, or a view."""

    async def take_async(self, ref: Any) -> torch.Tensor: ...
    def give(self) -> None:
        """Gives a view back; nothing to do for a copy."""

    def dry(self) -> None:
        """Called before the reader waits for more handles."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    module: str
    variant: str
    is_async: bool = False
    """its handles are read in an event loop, as its features are"""
    alone: bool = False
    """it has no readers: one process does it all"""
    default: bool = True

    def load(self) -> ModuleType:
        return importlib.import_module(f"bench.peers.{self.module}")


# In the order of their turns: what is compared most runs one after the other.
SYSTEMS: dict[str, Entry] = {
    "featcache-get": Entry("cuda_featcache", "get"),
    "featcache-borrow": Entry("cuda_featcache", "borrow"),
    "sglang-0.5.23": Entry("cuda_sglang", "get"),
    "sglang-0.5.11": Entry("cuda_sglang", "get"),
    "featcache-async": Entry("cuda_featcache", "async", is_async=True),
    "torchmp": Entry("cuda_torchmp", "get"),
    "copies": Entry("cuda_copies", "", alone=True),
    "sglang-0.5.23-borrow": Entry("cuda_sglang", "borrow", default=False),
}

Sockets = list[socket.socket]
