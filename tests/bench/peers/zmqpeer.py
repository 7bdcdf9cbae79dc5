"""pyzmq over ipc://: a PUSH socket for every reader, the tensor's bytes as one message.

Sent with `copy=False` where pyzmq's own threshold (64 KiB) finds that it helps, one frame shared by
all readers; received with `copy=False`, so that the tensor lies over libzmq's message. Both
high-water marks together are the window. Dtype and shape are not sent (the by-hand peers do not
send them either). Putting is sending: the time of a put is that of the hand-over to libzmq's I/O
thread, the time of a read starts when the message has come.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.peers import Cell, Sockets

T = TypeVar("T")


def missing(_cell: Cell) -> str | None:
    return None if find_spec("zmq") else "pyzmq is not installed"


def shared(_cell: Cell) -> None:
    return None


def half(cell: Cell) -> int:
    return max(1, cell.window // 2)


class Owner:
    def __init__(self, cell: Cell) -> None:
        import zmq

        self.zmq = zmq
        self.context = zmq.Context()
        self.folder = tempfile.TemporaryDirectory(prefix="bench-zmq-")
        self.path = Path(self.folder.name, "s").as_posix()
        self.socks = []
        for index in range(cell.readers):
            sock = self.context.socket(zmq.PUSH)
            sock.sndhwm = half(cell)
            sock.bind(f"ipc://{self.path}{index}")
            self.socks.append(sock)
        self.hello = os.fsencode(self.path)

    def put(self, x: torch.Tensor) -> None:
        frame = self.zmq.Frame(x.numpy(), copy=None, copy_threshold=self.zmq.COPY_THRESHOLD)
        for sock in self.socks:
            sock.send(frame, copy=False)

    def send(self, token: None) -> None:
        pass

    def end(self) -> None:
        for sock in self.socks:
            sock.send(b"")

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.folder.cleanup()


class Reader:
    def __init__(self, cell: Cell, index: int, hello: bytes) -> None:
        import zmq

        self.context = zmq.Context()
        self.sock = self.context.socket(zmq.PULL)
        self.sock.rcvhwm = half(cell)
        self.sock.connect(f"ipc://{os.fsdecode(hello)}{index}")

    def next(self) -> Any | None:
        frame = self.sock.recv(copy=False)
        return frame if len(frame) else None

    def use(self, ref: Any, consume: Callable[[torch.Tensor], T]) -> T:
        return consume(torch.frombuffer(ref.buffer, dtype=torch.float32))

    def close(self) -> None:
        self.context.destroy(linger=0)


def owner(cell: Cell, _socks: Sockets, _shared: Any) -> Owner:
    return Owner(cell)


def reader(cell: Cell, index: int, _sock: Any, hello: bytes, _shared: Any) -> Reader:
    return Reader(cell, index, hello)
