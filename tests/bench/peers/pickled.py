"""Pickled bytes over a Unix socket: a length, then the pickle, to every reader in turn.

The tensor is pickled as its numpy array with protocol 5, pickled once for all readers. (A tensor's
own pickle goes through `torch.save` and costs several more copies of the bytes, so this is the
faster of the two plain ways.) The sockets' buffers bound what is in flight. Putting is sending:
the time of a put holds that of the send to all readers, the time of a read starts when the length
has come and so holds the time for which the bytes are still on their way.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bench.peers import Cell, Sockets
from bench.wire import LENGTH, recv_exactly

T = TypeVar("T")


def missing(_cell: Cell) -> str | None:
    return None


def shared(_cell: Cell) -> None:
    return None


class Owner:
    hello = b""

    def __init__(self, socks: Sockets) -> None:
        self.socks = socks

    def put(self, x: torch.Tensor) -> None:
        data = pickle.dumps(x.numpy(), protocol=5)
        length = LENGTH.pack(len(data))
        for sock in self.socks:
            sock.sendall(length)
            sock.sendall(data)

    def send(self, token: None) -> None:
        pass

    def end(self) -> None:
        for sock in self.socks:
            sock.sendall(LENGTH.pack(0))

    def close(self) -> None:
        pass


class Reader:
    def __init__(self, cell: Cell, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = memoryview(bytearray(cell.size + 4096))

    def next(self) -> int | None:
        (nbytes,) = LENGTH.unpack(recv_exactly(self.sock, LENGTH.size))
        return nbytes or None

    def use(self, ref: int, consume: Callable[[torch.Tensor], T]) -> T:
        data = self.buffer[:ref]
        got = 0
        while got < ref:
            got += self.sock.recv_into(data[got:], ref - got, socket.MSG_WAITALL)
        return consume(torch.from_numpy(pickle.loads(data)))

    def close(self) -> None:
        pass


def owner(_cell: Cell, socks: Sockets, _shared: Any) -> Owner:
    return Owner(socks)


def reader(cell: Cell, _index: int, sock: socket.socket, _hello: bytes, _shared: Any) -> Reader:
    return Reader(cell, sock)
