"""`multiprocessing.shared_memory` by hand: the floor that everything else is measured against.

A ring of as many slots as there may be features in flight. The owner copies a feature into the next
slot and sends `(slot, nbytes, generation)` over a Unix socket to every reader. Each reader has one
word per slot in shared memory, where it writes the generation that it has done with; before the
owner writes a slot again it waits until every reader has written that slot's last generation.

Nothing else is there: no shape, no dtype, no stale ref, no dead reader, no other size than the
slot's. Sockets block, and nobody has an event loop.

- `views`: the reader makes a tensor over the slot, consumes it, then writes its word.
- `copies`: the reader clones it, writes its word, then consumes the clone.

The owner waits for a word by sleeping shortly: with more processes than cores, spinning takes
the core away from the reader that is waited for.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any, TypeVar

import torch

from bench.peers import Cell, Sockets
from bench.wire import recv_exactly

T = TypeVar("T")
REF = struct.Struct("<qqq")
END = -1
NAP = 20e-6


def missing(_cell: Cell) -> str | None:
    return None


def shared(_cell: Cell) -> None:
    return None


def words_of(memory: SharedMemory) -> memoryview[int]:
    assert memory.buf is not None
    return memory.buf.cast("q")


class Owner:
    def __init__(self, cell: Cell, socks: Sockets) -> None:
        self.cell = cell
        self.socks = socks
        self.data = SharedMemory(create=True, size=cell.window * cell.size)
        self.marks = SharedMemory(create=True, size=8 * cell.window * cell.readers)
        self.words = words_of(self.marks)
        torch.frombuffer(self.data.buf, dtype=torch.uint8).zero_()
        self.slots = [
            torch.frombuffer(
                self.data.buf,
                dtype=torch.float32,
                count=cell.size // 4,
                offset=slot * cell.size,
            )
            for slot in range(cell.window)
        ]
        self.count = 0
        self.hello = pickle.dumps((self.data.name, self.marks.name))

    def put(self, x: torch.Tensor) -> bytes:
        generation, slot = divmod(self.count, self.cell.window)
        first = slot * self.cell.readers
        words = self.words
        for index in range(first, first + self.cell.readers):
            while words[index] < generation:
                time.sleep(NAP)
        self.slots[slot].copy_(x)
        self.count += 1
        return REF.pack(slot, x.nbytes, generation + 1)

    def send(self, token: bytes) -> None:
        for sock in self.socks:
            sock.sendall(token)

    def end(self) -> None:
        self.send(REF.pack(END, 0, 0))

    def close(self) -> None:
        self.slots.clear()
        self.words.release()
        for memory in (self.data, self.marks):
            memory.unlink()
            with contextlib.suppress(BufferError):
                memory.close()


class Reader:
    def __init__(self, cell: Cell, index: int, sock: socket.socket, hello: bytes) -> None:
        self.cell = cell
        self.index = index
        self.sock = sock
        self.copies = cell.variant == "copies"
        self.data, self.marks = (SharedMemory(name) for name in pickle.loads(hello))
        self.words = words_of(self.marks)

    def next(self) -> tuple[int, int, int] | None:
        ref = REF.unpack(recv_exactly(self.sock, REF.size))
        return None if ref[0] == END else ref

    def use(self, ref: tuple[int, int, int], consume: Callable[[torch.Tensor], T]) -> T:
        slot, nbytes, generation = ref
        x = torch.frombuffer(
            self.data.buf, dtype=torch.float32, count=nbytes // 4, offset=slot * self.cell.size
        )
        word = slot * self.cell.readers + self.index
        if self.copies:
            x = x.clone()
            self.words[word] = generation
            return consume(x)
        value = consume(x)
        self.words[word] = generation
        return value

    def close(self) -> None:
        self.words.release()
        for memory in (self.data, self.marks):
            with contextlib.suppress(BufferError):
                memory.close()


def owner(cell: Cell, socks: Sockets, _shared: Any) -> Owner:
    return Owner(cell, socks)


def reader(cell: Cell, index: int, sock: socket.socket, hello: bytes, _shared: Any) -> Reader:
    return Reader(cell, index, sock, hello)
