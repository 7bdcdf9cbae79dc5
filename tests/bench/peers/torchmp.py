"""torch.multiprocessing queues, one for every reader, with either sharing strategy.

A queue moves the storage of a tensor that it is given into shared memory, so a tensor put a second
time would travel free of charge. Each put here therefore makes a fresh tensor in shared memory
and copies the feature into it (as the collate function of torch's DataLoader does: one copy,
where clone and put would be two), then gives the same tensor to every queue. The queues are as long
as the window. They pickle in a thread of their own: the time of a put is the copy and the hand-over,
the time of a read is nothing much (the queue's `get` has done the work), so see the round trips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.multiprocessing as tmp

from bench.peers import Cell, Sockets

T = TypeVar("T")


def missing(cell: Cell) -> str | None:
    known: set[str] = tmp.get_all_sharing_strategies()  # type: ignore[no-untyped-call]
    if cell.variant not in known:
        return f"torch has no {cell.variant} strategy here"
    return None


def shared(cell: Cell) -> list[Any]:
    return [tmp.get_context("spawn").Queue(cell.window) for _ in range(cell.readers)]


class Owner:
    hello = b""

    def __init__(self, queues: list[Any]) -> None:
        self.queues = queues

    def put(self, x: torch.Tensor) -> None:
        fresh = _new_shared(x)
        fresh.copy_(x)
        for queue in self.queues:
            queue.put(fresh)

    def send(self, token: None) -> None:
        pass

    def end(self) -> None:
        for queue in self.queues:
            queue.put(None)

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
            queue.join_thread()


def _new_shared(x: torch.Tensor) -> torch.Tensor:
    new_shared: Callable[..., torch.UntypedStorage] = torch.UntypedStorage._new_shared
    storage = new_shared(x.nbytes, device="cpu")
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())


class Reader:
    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def next(self) -> torch.Tensor | None:
        x: torch.Tensor | None = self.queue.get()
        return x

    def use(self, ref: torch.Tensor, consume: Callable[[torch.Tensor], T]) -> T:
        return consume(ref)

    def close(self) -> None:
        self.queue.close()


def owner(cell: Cell, _socks: Sockets, queues: list[Any]) -> Owner:
    tmp.set_sharing_strategy(cell.variant)  # type: ignore[no-untyped-call]
    return Owner(queues)


def reader(cell: Cell, index: int, _sock: Any, _hello: bytes, queues: list[Any]) -> Reader:
    tmp.set_sharing_strategy(cell.variant)  # type: ignore[no-untyped-call]
    return Reader(queues[index])
