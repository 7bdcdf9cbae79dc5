"""sglang's CUDA IPC pools: the files of its wheels, unchanged, beside sglang_stubs.py.

Used as sglang's processors and schedulers use them: the owner puts each feature in a slice of the
pool and pickles the proxy, each rank rebuilds the tensor on its device, which copies it and
acknowledges; sglang's own thread recycles every 50 ms. Two things are kinder than sglang is to itself:

- Where the pool is full sglang gives up on it and sends the feature through the host. Here the put
  is tried again after 50 µs.
- The pool's handle is opened once, not for every feature (SGLANG_USE_IPC_POOL_HANDLE_CACHE: off by
  default in 0.5.11, on in 0.5.23).

0.5.11 orders nothing between the owner's copy and the readers': what it says it has read is not
always what was put, and the report says how often.
"""

from __future__ import annotations

import gc
import logging
import pickle
import time
from pathlib import Path
from typing import Any

import torch

from bench.cuda_ports import Plan, Sockets
from bench.peers import sglang_stubs

NAP_S = 50e-6


def folder_of(plan: Plan) -> Path:
    return Path(plan.peers) / plan.system.removesuffix("-borrow")


def missing(plan: Plan) -> str | None:
    if plan.torch_device.type != "cuda":
        return "needs a GPU"
    if not (folder_of(plan) / "sglang").is_dir():
        return f"no .peers/{folder_of(plan).name}: see peers/unpack_sglang.py"
    return None


def load(plan: Plan, rank: int) -> Any:
    logging.getLogger("sglang").setLevel(logging.ERROR)  # it warns of a full pool, once
    return sglang_stubs.load(folder_of(plan), readers=plan.readers, rank=rank)


class Owner:
    """The stream-ordered pool of 0.5.23."""

    nowait = True
    hello = b""

    def __init__(self, plan: Plan) -> None:
        self.module = load(plan, 0)
        self.pool: Any = self.make_pool(plan)

    def make_pool(self, plan: Plan) -> Any:
        return self.module.MmItemMemoryPool(
            plan.pool,
            self.module.MM_ITEM_MEMORY_POOL_RECYCLE_INTERVAL,
            plan.torch_device.index,
            plan.readers,
            plan.slots,
        )

    def put_nowait(self, x: torch.Tensor) -> Any | None:
        return self.pool.wrap_tensor(x, use_pool_handle_cache=True)

    async def put(self, x: torch.Tensor) -> Any:
        return self._put(x)

    def _put(self, x: torch.Tensor) -> Any:
        while (proxy := self.put_nowait(x)) is None:
            time.sleep(NAP_S)
        return proxy

    def encode(self, token: Any) -> list[bytes]:
        return [pickle.dumps(token, pickle.HIGHEST_PROTOCOL)]

    async def close(self) -> None:
        self.pool.shutdown()
        self.pool = None  # with its files, if it has any
        gc.collect()


class OldOwner(Owner):
    """The pool of 0.5.11, with its processor's calls around it.

    It has a shared-memory file open for every slice and no limit to them but the process's own, so it
    gets the limit of the others.
    """

    def make_pool(self, plan: Plan) -> Any:
        self.slots = plan.slots
        return self.module.MmItemMemoryPool(
            plan.pool, self.module.MM_ITEM_MEMORY_POOL_RECYCLE_INTERVAL
        )

    def put_nowait(self, x: torch.Tensor) -> Any | None:
        pool = self.pool
        if len(pool.occupied_chunks) >= self.slots:
            return None
        flag, piece, offset = pool.return_a_slice_tensor_with_flag(x)
        if piece is None:
            return None
        piece.copy_(x.view(torch.int8).view(-1), non_blocking=True)
        return self.module.CudaIpcTensorTransportProxy(
            data=piece,
            info_data=x,
            sync_buffer_meta=flag,
            pool_ipc_handle=pool._pool_ipc_handle,
            pool_byte_offset=offset,
            pool_device_index=pool._pool_device_index,
        )


class Reader:
    nowait = True

    def __init__(self, plan: Plan, index: int) -> None:
        self.module = load(plan, index)
        self.device_index = plan.torch_device.index
        self.borrows = plan.variant == "borrow"
        self.lent: Any = None

    def parse(self, data: bytes) -> Any:
        return pickle.loads(data)

    def take(self, ref: Any) -> torch.Tensor:
        if self.borrows:
            self.lent = ref
            view: torch.Tensor = ref.borrow_on_target_device(self.device_index)
            return view
        copy: torch.Tensor = ref.reconstruct_on_target_device(self.device_index)
        ref.reconstruct_tensor = None  # the harness keeps the copy as long as it needs it
        return copy

    async def take_async(self, ref: Any) -> torch.Tensor:
        return self.take(ref)

    def give(self) -> None:
        if self.borrows:
            self.lent.release_borrowed_on_current_stream()

    def dry(self) -> None:
        pass

    async def close(self) -> None:
        self.module._pool_handle_cache_clear()


async def owner(plan: Plan, _credit: Sockets) -> Owner:
    torch.cuda.set_device(plan.torch_device)
    stream_ordered = sglang_stubs.is_stream_ordered(folder_of(plan))
    return Owner(plan) if stream_ordered else OldOwner(plan)


async def reader(plan: Plan, index: int, _hello: bytes, _credit: Any) -> Reader:
    torch.cuda.set_device(plan.torch_device)
    return Reader(plan, index)
