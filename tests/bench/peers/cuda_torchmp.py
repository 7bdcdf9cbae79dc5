"""CUDA tensors through torch.multiprocessing's own reductions.

The owner copies the feature into a tensor of its own (it must not change under the readers) and
reduces it once for each reader, since each of them counts; the reader rebuilds it, clones it and lets
it go. What torch's queues do in a thread, pickle and write, is done here as for all others.

There is no pool: the owner keeps each tensor until every reader has said, over a second socket and
for many features at once, that it has done with it, and keeps no more bytes than the others' pools.
"""

from __future__ import annotations

import pickle
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from bench.cuda_ports import Plan, Sockets

MOST_UNTOLD = 16
"""a reader returns its features after so many, or when it must wait for more"""
HEAR_EVERY = 32
"""the owner listens at each so many features"""


def missing(plan: Plan) -> str | None:
    return None if plan.torch_device.type == "cuda" else "needs a GPU"


class Owner:
    nowait = True
    hello = b""

    def __init__(self, plan: Plan, credit: Sockets) -> None:
        self.plan = plan
        self.credit = credit
        self.count = 0
        self.done = [0] * plan.readers
        self.kept: deque[torch.Tensor] = deque()

    def put_nowait(self, x: torch.Tensor) -> Any | None:
        window = self.plan.window(x.nbytes)
        # Heard long before the window is full: a few hundred answers of one byte fill a socket, and a
        # reader that can't answer takes no more handles.
        if self.count % HEAR_EVERY == 0 or len(self.kept) >= window:
            self._hear(socket.MSG_DONTWAIT)
        if len(self.kept) >= window:
            return None
        mine = x.clone()
        self.kept.append(mine)
        self.count += 1
        reduce: Callable[[torch.Tensor], Any] = reduce_tensor
        return [reduce(mine) for _ in range(self.plan.readers)]

    async def put(self, x: torch.Tensor) -> Any:
        while (token := self.put_nowait(x)) is None:
            slowest = self.done.index(min(self.done))
            self._hear(0, slowest)
        return token

    def _hear(self, flags: int, only: int | None = None) -> None:
        for index, sock in enumerate(self.credit):
            if only in {None, index}:
                with suppress(BlockingIOError):
                    self.done[index] += len(sock.recv(1 << 16, flags))
        while self.count - len(self.kept) < min(self.done):
            self.kept.popleft()

    def encode(self, token: Any) -> list[bytes]:
        return [pickle.dumps(reduced, pickle.HIGHEST_PROTOCOL) for reduced in token]

    async def close(self) -> None:
        self.kept.clear()


class Reader:
    nowait = True

    def __init__(self, credit: socket.socket) -> None:
        self.credit = credit
        self.untold = 0

    def parse(self, data: bytes) -> Any:
        return pickle.loads(data)

    def take(self, ref: Any) -> torch.Tensor:
        rebuild, arguments = ref
        theirs: torch.Tensor = rebuild(*arguments)
        mine = theirs.clone()
        del theirs  # torch waits for the clone here, before it counts this reader out
        self.untold += 1
        if self.untold >= MOST_UNTOLD:
            self.dry()
        return mine

    async def take_async(self, ref: Any) -> torch.Tensor:
        return self.take(ref)

    def give(self) -> None:
        pass

    def dry(self) -> None:
        if self.untold:
            self.credit.sendall(bytes(self.untold))
            self.untold = 0

    async def close(self) -> None:
        pass


async def owner(plan: Plan, credit: Sockets) -> Owner:
    torch.cuda.set_device(plan.torch_device)
    return Owner(plan, credit)


async def reader(plan: Plan, _index: int, _hello: bytes, credit: socket.socket) -> Reader:
    torch.cuda.set_device(plan.torch_device)
    return Reader(credit)
