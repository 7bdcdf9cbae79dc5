"""One tensor-parallel rank: a process that reads features and multiplies them with its shard.

Refs come over a Unix socket, features through featcache, and the rank's columns of the product go
back over the socket. The messages on the socket are here too: a length, then msgpack.
"""

import asyncio
import math
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Literal, Self, TypeVar

import anyio
import msgspec
import structlog
import torch
from torch import Tensor

import featcache
import hosts
from patches import FEATURES

RANKS = 4
OUTPUTS = 1280

Way = Literal["borrow", "get"]


class WireClosed(Exception):
    """The process on the other side has closed its socket, or is gone."""


class Attached(msgspec.Struct):
    """A rank is attached to the pool and waits for tasks."""


class Task(msgspec.Struct):
    """Multiply the features behind a ref."""

    number: int
    way: Way
    ref: bytes


class Shard(msgspec.Struct):
    """A rank's columns of one product, and the host time that reaching the features took."""

    number: int
    way: Way
    seconds: float
    grid: tuple[int, int, int]
    data: memoryview


M = TypeVar("M")
LENGTH = struct.Struct("<Q")


class Wire:
    """Messages over a connected Unix socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, connected: socket.socket) -> Self:
        return cls(*await asyncio.open_unix_connection(sock=connected))

    async def send(self, message: Attached | Task | Shard) -> None:
        body = msgspec.msgpack.encode(message)
        self.writer.write(LENGTH.pack(len(body)))
        self.writer.write(body)
        await self.writer.drain()

    async def receive(self, kind: type[M]) -> M:
        """The next message; `WireClosed` once the other side has closed."""
        try:
            (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
            body = await self.reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise WireClosed("the other side has closed its socket") from error
        return msgspec.msgpack.decode(body, type=kind)

    def close(self) -> None:
        self.writer.close()


def embedding() -> Tensor:
    """The whole weight of the patch embedding: the same numbers in every process."""
    weight = torch.randn(OUTPUTS, FEATURES, generator=torch.Generator().manual_seed(22662))
    return weight.div_(math.sqrt(FEATURES))


def log_events(*, verbose: bool) -> None:
    """Send featcache's events to stderr: all that inform, or errors only."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("info" if verbose else "error"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def main(
    rank: int,
    endpoint: str,
    device: str,
    parent: socket.socket,
    verbose: bool,
    network: str | None,
) -> None:
    """What the process runs. It ends when the parent closes the socket, or is gone."""
    if network is not None:
        hosts.enter(network)
    log_events(verbose=verbose)
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    anyio.run(serve, rank, endpoint, device, parent)


async def serve(rank: int, endpoint: str, device: str, parent: socket.socket) -> None:
    weight = embedding().chunk(RANKS)[rank].to(device)
    wire = await Wire.open(parent)
    async with featcache.connect(endpoint, device=device, name=f"tp{rank}") as cache:
        with suppress(WireClosed, ConnectionError):
            await wire.send(Attached())
            while True:
                task = await wire.receive(Task)
                await wire.send(await compute(cache, task, weight))


async def compute(cache: featcache.FeatureClient, task: Task, weight: Tensor) -> Shard:
    """This rank's columns. The read is paid when this returns."""
    ref = featcache.FeatureRef.from_bytes(task.ref)
    begun = time.perf_counter()
    if task.way == "get":
        features = await cache.get(ref)
        seconds = time.perf_counter() - begun
        columns, grid = embed(features, weight)
    else:
        async with cache.borrow(ref) as features:
            entered = time.perf_counter()
            columns, grid = embed(features, weight)
            left = time.perf_counter()
        seconds = time.perf_counter() - left + entered - begun
    data = columns.cpu().numpy().data.cast("B")
    return Shard(task.number, task.way, seconds, grid, data)


def embed(
    features: Tensor | dict[str, Tensor], weight: Tensor
) -> tuple[Tensor, tuple[int, int, int]]:
    assert isinstance(features, dict)
    time, height, width = features["image_grid_thw"][0].tolist()
    return torch.nn.functional.linear(features["pixel_values"], weight), (time, height, width)
