"""featcache on a GPU (or on host memory, with `--device cpu`, to try the benchmark itself).

The owner is an asyncio program, as a model server is. Refs travel as `FeatureRef.to_bytes()`.

- `get`, `borrow`: `put_nowait` and, when the pool is full, `await put`; the readers have no event loop
  of their own but `featcache.blocking`.
- `async`: `await put` and `await get`, both ends in an event loop, their sockets too.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from bench.cuda_ports import Plan, Sockets
from bench.peers.featcachepeer import silence


def missing(_plan: Plan) -> str | None:
    return None if find_spec("featcache") else "featcache cannot be imported"


class Owner:
    def __init__(self, plan: Plan) -> None:
        import featcache

        silence()
        self.readers = plan.readers
        self.nowait = plan.variant != "async"
        self.full: type[Exception] = featcache.PoolFull
        self.cache: Any = featcache.create(
            device=plan.device, capacity=plan.pool, initial=plan.pool, name="bench"
        )

    async def open(self) -> Owner:
        await self.cache.open()
        self.hello = str(self.cache.endpoint).encode()
        return self

    def put_nowait(self, x: torch.Tensor) -> Any | None:
        try:
            return self.cache.put_nowait(x, readers=self.readers)
        except self.full:
            return None

    async def put(self, x: torch.Tensor) -> Any:
        return await self.cache.put(x, readers=self.readers)

    def encode(self, token: Any) -> list[bytes]:
        return [token.to_bytes()]

    async def close(self) -> None:
        await self.cache.aclose()


class Reader:
    """Copies, or views, with no event loop."""

    nowait = True

    def __init__(self, plan: Plan, index: int, hello: bytes) -> None:
        import featcache

        silence()
        self.parse = featcache.FeatureRef.from_bytes
        self.borrows = plan.variant == "borrow"
        self.cache: Any = featcache.blocking.connect(
            hello.decode(), device=plan.device, name=f"r{index}"
        ).open()
        self.lent: Any = None

    def take(self, ref: Any) -> torch.Tensor:
        if self.borrows:
            self.lent = self.cache.borrow(ref)
            view: torch.Tensor = self.lent.__enter__()
            return view
        copy: torch.Tensor = self.cache.get(ref)
        return copy

    async def take_async(self, ref: Any) -> torch.Tensor:
        return self.take(ref)

    def give(self) -> None:
        if self.borrows:
            self.lent.__exit__(None, None, None)

    def dry(self) -> None:
        pass

    async def close(self) -> None:
        self.cache.close()


class AsyncReader:
    nowait = False

    def __init__(self, plan: Plan, index: int, hello: bytes) -> None:
        import featcache

        silence()
        self.parse = featcache.FeatureRef.from_bytes
        self.cache: Any = featcache.connect(hello.decode(), device=plan.device, name=f"r{index}")

    async def open(self) -> AsyncReader:
        await self.cache.open()
        return self

    def take(self, ref: Any) -> torch.Tensor:
        copy: torch.Tensor = self.cache.get_nowait(ref)
        return copy

    async def take_async(self, ref: Any) -> torch.Tensor:
        copy: torch.Tensor = await self.cache.get(ref)
        return copy

    def give(self) -> None:
        pass

    def dry(self) -> None:
        pass

    async def close(self) -> None:
        await self.cache.aclose()


async def owner(plan: Plan, _credit: Sockets) -> Owner:
    return await Owner(plan).open()


async def reader(plan: Plan, index: int, hello: bytes, _credit: Any) -> Reader | AsyncReader:
    if plan.variant == "async":
        return await AsyncReader(plan, index, hello).open()
    return Reader(plan, index, hello)
