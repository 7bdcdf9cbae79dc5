"""The contestants: each module here makes an owner's end and a reader's end of one system.

A system with no event loop answers to `OwnerPort` and `ReaderPort`, an asyncio one to
`AsyncOwnerPort` and `AsyncReaderPort`. A module has three functions:

- `missing(cell)`: None, or the reason why the system cannot run here;
- `shared(cell)`: what must be made before the processes start (queues, locks) and is handed to all;
- `owner(cell, socks, shared)` and `reader(cell, index, sock, hello, shared)`: the two ends
  (with asyncio streams in place of sockets, and nothing shared, if the system has an event loop).
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: a system, a feature size, a number of readers."""

    system: str
    size: int
    readers: int
    window: int
    """features in flight, at most"""
    seconds: float
    """how long the pipelined phase puts"""
    threads: int = 1
    """torch's intra-op threads in every process"""
    vllm_file: str | None = None

    @property
    def variant(self) -> str:
        return SYSTEMS[self.system].variant

    @property
    def burst(self) -> int:
        """How many features the phase that times single calls puts before it sends any."""
        return max(1, min(16, self.window // 2))


class OwnerPort(Protocol):
    hello: bytes
    """sent to every reader before it makes its end"""

    def put(self, x: torch.Tensor) -> Any:
        """Makes room if there is none, stores `x`, and returns the message for `send`."""

    def send(self, token: Any) -> None:
        """Tells every reader; nothing to do where putting is sending."""

    def end(self) -> None:
        """Tells every reader that the phase is over."""

    def close(self) -> None: ...


class ReaderPort(Protocol):
    def next(self) -> Any | None:
        """Waits for a ref, or for anything that `use` takes; None when the phase is over."""

    def use(self, ref: Any, consume: Callable[[torch.Tensor], T]) -> T:
        """Gets the feature, consumes it, gives the room back."""

    def close(self) -> None: ...


class AsyncOwnerPort(Protocol):
    hello: bytes

    async def put(self, x: torch.Tensor) -> Any: ...
    async def send(self, token: Any) -> None: ...
    async def end(self) -> None: ...
    async def answer(self, nbytes: int) -> list[bytes]:
        """Reads `nbytes` from every reader."""

    async def close(self) -> None: ...


class AsyncReaderPort(Protocol):
    async def next(self) -> Any | None: ...
    async def use(self, ref: Any, consume: Callable[[torch.Tensor], T]) -> T: ...
    async def answer(self, data: bytes) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    module: str
    variant: str
    reads: str
    """'view' or 'copy': the kind of tensor that the reader gets"""
    is_async: bool = False
    blocking_reader: bool = False
    """the owner has an event loop, its readers have none"""

    def load(self) -> ModuleType:
        return importlib.import_module(f"{__name__}.{self.module}")


# In the order of their turns: what is compared most runs one after the other.
SYSTEMS: dict[str, Entry] = {
    "featcache-borrow": Entry("featcachepeer", "borrow", "view", True),
    "byhand-views": Entry("byhand", "views", "view"),
    "featcache-borrow-nowait": Entry("featcachepeer", "borrow-nowait", "view", True),
    "featcache-borrow-blocking": Entry("featcachepeer", "borrow-blocking", "view", True, True),
    "featcache-get": Entry("featcachepeer", "get", "copy", True),
    "byhand-copies": Entry("byhand", "copies", "copy"),
    "featcache-get-nowait": Entry("featcachepeer", "get-nowait", "copy", True),
    "featcache-get-blocking": Entry("featcachepeer", "get-blocking", "copy", True, True),
    "vllm": Entry("vllmstore", "", "copy"),
    "zmq": Entry("zmqpeer", "", "copy"),
    "pickled": Entry("pickled", "", "copy"),
    "torchmp-fd": Entry("torchmp", "file_descriptor", "view"),
    "torchmp-fs": Entry("torchmp", "file_system", "view"),
}

Sockets = list[socket.socket]
