"""featcache: owner and readers are asyncio programs, as a model server is.

The slab has the bytes of the window and no more (but 1 MiB at least), so the pool itself bounds what
is in flight. Refs go as frames (a length and `FeatureRef.to_bytes()`) through an asyncio protocol
over the Unix socket (aiowire.py): the owner writes each at once, one system call a reader, as the
by-hand peers do; a reader that is behind gets many of them with one call, where the by-hand readers
make one for each.

- `get`: `await put`, `await get`: a copy that the reader owns.
- `borrow`: `await put`, `async with borrow`: a view in the slab.
- `get-nowait`, `borrow-nowait`: `put_nowait` and, when the pool is full, `await put`;
  `get_nowait`, and `with borrow`.
- `get-blocking`, `borrow-blocking`: the owner as before, with `put_nowait`; the readers have no event
  loop of their own but `featcache.blocking` and a blocking socket (read through a buffer).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from bench.aiowire import Wire
from bench.peers import Cell
from bench.wire import FRAME

T = TypeVar("T")
SMALLEST = 1 << 20


def silence() -> None:
    """Lets events below warnings go: their place is a log, not the benchmark's output."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def missing(_cell: Cell) -> str | None:
    return None if find_spec("featcache") else "featcache cannot be imported"


def shared(_cell: Cell) -> None:
    return None


class Owner:
    def __init__(self, cell: Cell, wires: list[Wire]) -> None:
        self.cell = cell
        self.wires = wires
        self.nowait = cell.variant.endswith(("nowait", "blocking"))

    async def open(self) -> Owner:
        import featcache

        silence()
        self.full: type[Exception] = featcache.PoolFull
        capacity = max(SMALLEST, self.cell.window * self.cell.size)
        self.context = featcache.create(
            device="cpu", capacity=capacity, initial=capacity, name="bench"
        )
        self.cache: Any = await self.context.__aenter__()
        self.hello = str(self.cache.endpoint).encode()
        return self

    async def put(self, x: torch.Tensor) -> Any:
        if self.nowait:
            with suppress(self.full):
                return self.cache.put_nowait(x, readers=self.cell.readers)
        return await self.cache.put(x, readers=self.cell.readers)

    async def send(self, token: Any) -> None:
        await self.broadcast(token.to_bytes())

    async def broadcast(self, data: bytes) -> None:
        frame = FRAME.pack(len(data)) + data
        for wire in self.wires:
            wire.write(frame)

    async def end(self) -> None:
        await self.broadcast(b"")

    async def answer(self, nbytes: int) -> list[bytes]:
        return [await wire.take(nbytes) for wire in self.wires]

    async def close(self) -> None:
        await self.context.__aexit__(None, None, None)


class Reader:
    def __init__(self, cell: Cell, index: int, wires: list[Wire], hello: bytes) -> None:
        self.wire = wires[0]
        self.endpoint = hello.decode()
        self.name = f"r{index}"
        self.borrows = cell.variant.startswith("borrow")
        self.nowait = cell.variant.endswith("nowait")

    async def open(self) -> Reader:
        import featcache

        silence()
        self.parse = featcache.FeatureRef.from_bytes
        self.context = featcache.connect(self.endpoint, device="cpu", name=self.name)
        self.cache: Any = await self.context.__aenter__()
        return self

    async def next(self) -> Any | None:
        data = await self.wire.frame()
        return self.parse(data) if data else None

    async def use(self, ref: Any, consume: Callable[[torch.Tensor], T]) -> T:
        if self.borrows and self.nowait:
            with self.cache.borrow(ref) as x:
                return consume(x)
        if self.borrows:
            async with self.cache.borrow(ref) as x:
                return consume(x)
        if self.nowait:
            return consume(self.cache.get_nowait(ref))
        return consume(await self.cache.get(ref))

    async def answer(self, data: bytes) -> None:
        self.wire.write(data)

    async def close(self) -> None:
        await self.context.__aexit__(None, None, None)


class BlockingReader:
    def __init__(self, cell: Cell, index: int, sock: socket.socket, hello: bytes) -> None:
        import featcache

        self.stream = sock.makefile("rb")
        silence()
        self.parse = featcache.FeatureRef.from_bytes
        self.borrows = cell.variant.startswith("borrow")
        self.cache: Any = featcache.blocking.connect(
            hello.decode(), device="cpu", name=f"r{index}"
        ).open()

    def next(self) -> Any | None:
        (nbytes,) = FRAME.unpack(self.stream.read(FRAME.size))
        return self.parse(self.stream.read(nbytes)) if nbytes else None

    def use(self, ref: Any, consume: Callable[[torch.Tensor], T]) -> T:
        if self.borrows:
            with self.cache.borrow(ref) as x:
                return consume(x)
        return consume(self.cache.get(ref))

    def close(self) -> None:
        self.cache.close()
        self.stream.close()


async def owner(cell: Cell, wires: list[Wire]) -> Owner:
    return await Owner(cell, wires).open()


async def reader(cell: Cell, index: int, wires: list[Wire], hello: bytes) -> Reader:
    return await Reader(cell, index, wires, hello).open()


def blocking_reader(
    cell: Cell, index: int, sock: socket.socket, hello: bytes, _shared: Any
) -> BlockingReader:
    return BlockingReader(cell, index, sock, hello)
