"""Shared by all systems of the CUDA benchmark: the payload, its samples, and the frames of handles.

The owner's features are a few random tensors in an irregular order, so that an extent which is
used again seldom gets what it had before: a reader that sees its last tenant's bytes sees wrong ones.
The readers make the same tensors for themselves and compare.
"""

from __future__ import annotations

import random
import socket
import struct
from collections import deque
from typing import Protocol

import torch

from bench.aiowire import Wire
from bench.wire import FRAME, recv_exactly

SOURCES = 7
ORDER = random.Random(1).choices(range(SOURCES), k=9973)
SAMPLE_EVERY = 31
"""one feature of so many is looked at while features stream: on the GPU, nothing is waited for"""
SAMPLES = 16
"""elements of it, from the first to the last"""
ROWS = 8192
"""the last so many of the samples are compared at the end"""
CONFIRM = struct.Struct("<qqq")
"""a reader's answer at the end of a phase: features, of them looked at, of them wrong"""


def source_of(n: int) -> int:
    """Which of the sources the n-th feature of a phase is."""
    return ORDER[n % len(ORDER)]


def make_sources(size: int, device: torch.device) -> list[torch.Tensor]:
    """The tensors that are put: random, the same in every process."""
    generator = torch.Generator(device).manual_seed(size)
    return [
        torch.randint(
            -(1 << 31), (1 << 31) - 1, (size // 4,), dtype=torch.int32, device=device,
            generator=generator,
        )
        for _ in range(SOURCES)
    ]  # fmt: skip


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Sampler:
    """Takes a few elements of some features, in stream order, and compares them when all is over."""

    def __init__(self, sources: list[torch.Tensor]) -> None:
        device = sources[0].device
        self._stride = (max(1, (sources[0].numel() - 1) // (SAMPLES - 1)),)
        self._rows = torch.zeros((ROWS, SAMPLES), dtype=torch.int32, device=device)
        self._row = self._rows.unbind()
        self._right = torch.stack([self._few(x) for x in sources])
        self.count = 0

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(x, (SAMPLES,), self._stride)

    def take(self, x: torch.Tensor) -> None:
        self._row[self.count % ROWS].copy_(self._few(x))
        self.count += 1

    def wrong(self) -> int:
        """The number of wrong samples; waits for the GPU."""
        kept = range(max(0, self.count - ROWS), self.count)
        if not kept:
            return 0
        device = self._rows.device
        rows = torch.tensor([at % ROWS for at in kept], device=device)
        wanted = torch.tensor([source_of(at * SAMPLE_EVERY) for at in kept], device=device)
        differs = (self._rows[rows] != self._right[wanted]).any(dim=1)
        return int(differs.sum().item())


class Lines(Protocol):
    """The owner's ends of the wires to its readers."""

    def write(self, index: int, data: bytes) -> None: ...
    async def take(self, nbytes: int) -> list[bytes]:
        """The next so many bytes of every reader."""


class SocketLines:
    """Blocking sockets."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self._socks = socks

    def write(self, index: int, data: bytes) -> None:
        self._socks[index].sendall(data)

    async def take(self, nbytes: int) -> list[bytes]:
        return [recv_exactly(sock, nbytes) for sock in self._socks]


class LoopLines:
    """The same in an event loop."""

    def __init__(self, wires: list[Wire]) -> None:
        self._wire_refs = wires

    def write(self, index: int, data: bytes) -> None:
        self._wire_refs[index].write(data)

    async def take(self, nbytes: int) -> list[bytes]:
        return [await wire.take(nbytes) for wire in self._wire_refs]


class Outbox:
    """Handles on their way to the readers, some of them in one write.

    A token is encoded as one handle for all readers, or as one for each.
    """

    def __init__(self, lines: Lines, readers: int, batch: int) -> None:
        self._lines = lines
        self._readers = readers
        self._batch = batch
        self._queued: list[list[bytes]] = []

    def add(self, handles: list[bytes]) -> None:
        self._queued.append(handles)
        if len(self._queued) >= self._batch:
            self.flush()

    def end(self) -> None:
        """Tell every reader that the phase is over."""
        self._queued.append([b""])
        self.flush()

    def flush(self) -> None:
        queued, self._queued = self._queued, []
        if not queued:
            return
        alike = all(len(handles) == 1 for handles in queued)
        data = b""
        for index in range(self._readers):
            if index == 0 or not alike:
                data = b"".join(
                    FRAME.pack(len(handle)) + handle
                    for handle in (handles[index % len(handles)] for handles in queued)
                )
            self._lines.write(index, data)


class Inbox:
    """A reader's end: frames out of the bytes of one system call, in blocking calls."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest = b""
        self._frames: deque[bytes] = deque()

    def ready(self) -> bool:
        """Whether the next frame is here already."""
        return bool(self._frames)

    async def frame(self) -> bytes:
        while not self._frames:
            more = self._sock.recv(1 << 16)
            if not more:
                raise ConnectionError("the other end has gone")
            self._split(self._rest + more)
        return self._frames.popleft()

    def _split(self, data: bytes) -> None:
        at, end = 0, len(data) - FRAME.size
        while at <= end:
            start = at + FRAME.size
            stop = start + FRAME.unpack_from(data, at)[0]
            if stop > len(data):
                break
            self._frames.append(data[start:stop])
            at = stop
        self._rest = data[at:]

    def write(self, data: bytes) -> None:
        self._sock.sendall(data)


class LoopInbox:
    """The same in an event loop."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.frame = wire.frame
        self.write = wire.write

    def ready(self) -> bool:
        return True  # nothing has to be said before it waits
