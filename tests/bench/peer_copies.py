"""Plain copies between two GPUs in one process, for cuda_peer.py; and how it times copies."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter

import torch

from bench.cuda_wire import synchronize
from bench.peers.featcachepeer import silence

OUTS = 2
"""tensors that are copied into in turn where one is given"""


def timed(device: torch.device, work: Callable[[], None]) -> float:
    """Seconds that the device's current stream took for it."""
    if device.type != "cuda":
        began = perf_counter()
        work()
        return perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)
    synchronize(device)
    first.record(stream)
    work()
    last.record(stream)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def prepare(device: torch.device) -> None:
    torch.set_num_threads(1)
    silence()
    if device.type == "cuda":
        torch.cuda.set_device(device)


def count_of(options: argparse.Namespace, size: int) -> int:
    """Features of a round: as many as the pool has room for."""
    pool: int = options.pool
    return max(1, pool // size)


def copy(options: argparse.Namespace, pipe: Connection) -> None:
    """The plain copies of all sizes: seconds of each round, by way."""
    there, here = (torch.device(name) for name in options.devices)
    prepare(here)
    for size in options.sizes:
        count = count_of(options, size)
        pool = [torch.empty(size // 4, dtype=torch.int32, device=there) for _ in range(count)]
        outs = [torch.empty(size // 4, dtype=torch.int32, device=here) for _ in range(OUTS)]
        synchronize(there)
        outs[0].copy_(pool[0])  # torch opens the way between the devices here
        pool[0].copy_(outs[0])  # and back
        ways = {"torch copy_": torch_copy(pool, outs)}
        if here.type == "cuda":
            ways["cuMemcpyAsync"] = driver_copy(here, pool, outs)
        pipe.send({
            way: [timed(here, copy_all) for _ in range(options.rounds + 1)][1:]
            for way, copy_all in ways.items()
        })  # fmt: skip


def torch_copy(pool: list[torch.Tensor], outs: list[torch.Tensor]) -> Callable[[], None]:
    def copy_all() -> None:
        for n, source in enumerate(pool):
            outs[n % OUTS].copy_(source, non_blocking=True)

    return copy_all


def driver_copy(
    here: torch.device, pool: list[torch.Tensor], outs: list[torch.Tensor]
) -> Callable[[], None]:
    from cuda.bindings import driver

    stream = driver.CUstream(torch.cuda.current_stream(here).cuda_stream)

    def copy_all() -> None:
        for n, source in enumerate(pool):
            target = outs[n % OUTS]
            (error,) = driver.cuMemcpyAsync(
                target.data_ptr(), source.data_ptr(), target.nbytes, stream
            )
            if int(error):
                raise RuntimeError(f"cuMemcpyAsync: {error}")

    return copy_all
