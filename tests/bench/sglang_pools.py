"""featcache's pool in SGLang beside SGLang's own two, in the same load: a tokenizer, and a rank on each GPU.

    pip download --no-deps --only-binary=:all: --python-version 3.12 sglang==0.5.23
    python -m zipfile -e sglang-0.5.23-*.whl .peers/sglang          # 86 MB of Python, and no compiled part
    SGLANG_FOLDER=.peers/sglang PYTHONPATH=src python tests/bench/sglang_pools.py --ranks 2 --mib 1 16

SGLang's modules come from the folder (or the environment). Where its many imports can't all be had,
``--stubs`` takes the pool's files alone from ``.peers/sglang-0.5.23`` (see peers/unpack_sglang.py) for the
CUDA IPC pool, and leaves the VMM pool out.

The tokenizer wraps a feature, sends the pickled proxy to every rank, and each rebuilds it on its GPU.
Told for each pool and size: features per second; median and 99th percentile of the time from wrapping to
the last rank's copy, one feature at a time; how many found the pool full; MiB of other processes on
the tokenizer's GPU; and, after a rank was killed with features owed, how many stay in the pool.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if os.environ.get("SGLANG_FOLDER"):
    sys.path.insert(0, os.environ["SGLANG_FOLDER"])

import torch

from bench.peers import sglang_stubs

MIB = 1 << 20
POOLS = ("featcache", "cuda_ipc", "cuda_vmm")
STUBS = Path(__file__).resolve().parents[2] / ".peers" / "sglang-0.5.23"
RECYCLE_S = 0.05
NAP_S = 50e-6
SETTLED_S = 3.0


class Load(NamedTuple):
    pool: str
    ranks: int
    pool_mib: int
    stubs: bool
    server: str


def make_classes(load: Load, rank: int) -> Any:
    """Import SGLang in this process as one of so many ranks; return its pool's class."""
    os.environ["FEATCACHE_SGLANG_SERVER"] = load.server
    if load.stubs:
        module = sglang_stubs.load(STUBS, readers=load.ranks, rank=rank)
        if load.pool == "cuda_ipc":
            return module.MmItemMemoryPool
        parallel: Any = sys.modules["sglang.srt.runtime_context"]
        parallel.get_serving = lambda: argparse.Namespace(tokenizer_worker_num=1)
        environ: Any = sys.modules["sglang.srt.environ"]
        environ.envs.SGLANG_MM_FEATURE_CACHE_MB.get = lambda: load.pool_mib
    else:
        from sglang.srt.runtime_context import get_parallel

        get_parallel().override_permanently(tp_rank=rank, tp_size=load.ranks)
    if load.pool == "featcache":
        from featcache.integrations.sglang import ipc

        return ipc.FeatcacheItemPool
    if load.pool == "cuda_ipc":
        from sglang.srt.multimodal.transport import cuda_ipc

        return cuda_ipc.MmItemMemoryPool
    from sglang.srt.utils import cuda_vmm_transport_utils

    return cuda_vmm_transport_utils.CudaVmmMemoryPool


def run_rank(load: Load, rank: int, pipe: Connection) -> None:
    """Rebuild what comes, until None does; say when each copy is done."""
    device = 1 + rank if torch.cuda.device_count() > load.ranks else rank
    torch.cuda.set_device(device)
    make_classes(load, rank)
    pipe.send("ready")
    while True:
        message = pipe.recv()
        if message is None:
            return
        data, expected, answers = message
        read = pickle.loads(data).reconstruct_on_target_device(device)
        if answers:
            torch.cuda.synchronize()
            pipe.send(bool((read[:64] == expected).all() and (read[-64:] == expected).all()))


class Tokenizer:
    """The owner of the pool, with its ranks."""

    def __init__(self, load: Load) -> None:
        self.load = load
        torch.cuda.set_device(0)
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(load.ranks):
            here, there = context.Pipe()
            process = context.Process(target=run_rank, args=(load, rank, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        pool_class = make_classes(load, 0)
        more = {"allow_posix_fallback": True} if load.pool == "cuda_vmm" else {}
        self.pool: Any = pool_class(load.pool_mib * MIB, RECYCLE_S, 0, load.ranks, **more)
        self.full = 0
        for pipe in self.pipes:
            assert pipe.recv() == "ready"

    def wrap(self, feature: torch.Tensor) -> bytes:
        """Wrap, trying again while the pool is full."""
        while True:
            if self.load.pool == "cuda_vmm":
                proxy = self.pool.wrap_tensor(feature)
                proxy = None if isinstance(proxy, torch.Tensor) else proxy
            else:
                proxy = self.pool.wrap_tensor(feature, use_pool_handle_cache=True)
            if proxy is not None:
                return pickle.dumps(proxy, pickle.HIGHEST_PROTOCOL)
            self.full += 1
            time.sleep(NAP_S)

    def send(self, data: bytes, expected: int, *, answers: bool) -> None:
        for pipe in self.pipes:
            pipe.send((data, expected, answers))

    def heard(self) -> None:
        right = [pipe.recv() for pipe in self.pipes]  # of every rank, whatever the first says
        if not all(right):
            raise SystemExit(f"{self.load.pool}: wrong bytes")

    def in_pool(self) -> int:
        if self.load.pool == "cuda_vmm":
            return len(getattr(self.pool, "occupied_chunks", ()))
        return int(self.pool.active_lease_count)

    def foreign_mib(self) -> float:
        """MiB that ranks of other GPUs have on GPU 0, as the driver says; -1 if it does not."""
        try:
            pynvml = importlib.import_module("pynvml")
        except ImportError:
            return -1.0
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        ranks = {process.pid for process in self.processes[1:]}
        users = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return sum((user.usedGpuMemory or 0) / MIB for user in users if user.pid in ranks)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(10)
        self.pool.shutdown()


def measure(load: Load, size_bytes: int, seconds: float) -> dict[str, Any]:
    tokenizer = Tokenizer(load)
    features = [
        torch.full((size_bytes,), number, dtype=torch.uint8, device="cuda:0")
        for number in range(16)
    ]
    for number, feature in enumerate(features):  # warm
        tokenizer.send(tokenizer.wrap(feature), number, answers=True)
        tokenizer.heard()
    times: list[float] = []
    until_s = time.perf_counter() + seconds / 2
    while time.perf_counter() < until_s:
        number = len(times) % len(features)
        began_s = time.perf_counter()
        tokenizer.send(tokenizer.wrap(features[number]), number, answers=True)
        tokenizer.heard()
        times.append(time.perf_counter() - began_s)
    tokenizer.full, sent = 0, 0
    began_s = time.perf_counter()
    while time.perf_counter() < began_s + seconds / 2:
        number = sent % len(features)
        sent += 1
        answers = sent % 16 == 0
        tokenizer.send(tokenizer.wrap(features[number]), number, answers=answers)
        if answers:
            tokenizer.heard()
    rate = sent / (time.perf_counter() - began_s)
    full, foreign = tokenizer.full, tokenizer.foreign_mib()
    stays = after_a_kill(tokenizer, features[0])
    tokenizer.close()
    times.sort()
    return {
        "pool": load.pool,
        "ranks": load.ranks,
        "bytes": size_bytes,
        "per_second": rate,
        "median_us": statistics.median(times) * 1e6,
        "p99_us": times[int(len(times) * 0.99)] * 1e6,
        "full": full,
        "foreign_mib": foreign,
        "stays_after_kill": stays,
    }


def after_a_kill(tokenizer: Tokenizer, feature: torch.Tensor) -> int:
    """Kill the last rank with features owed; return how many stay in the pool once the others have read."""
    owed = [tokenizer.wrap(feature) for _ in range(4)]
    dies, pipe = tokenizer.processes.pop(), tokenizer.pipes.pop()
    dies.kill()
    dies.join()
    pipe.close()
    for data in owed:
        tokenizer.send(data, 0, answers=True)
        tokenizer.heard()
    until_s = time.monotonic() + SETTLED_S
    while tokenizer.in_pool() and time.monotonic() < until_s:
        time.sleep(RECYCLE_S)
    return tokenizer.in_pool()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pools", nargs="+", default=POOLS, choices=POOLS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mib", type=float, nargs="+", default=[1, 16])
    parser.add_argument("--pool-mib", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--stubs", action="store_true", help="the pools' files alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: needs CUDA devices")
        return 0
    found = []
    for pool in options.pools:
        if pool == "cuda_vmm" and options.stubs:
            print("cuda_vmm: left out, its file needs all of SGLang")
            continue
        for mib in options.mib:
            server = f"bench{os.getpid()}{pool}"
            load = Load(pool, options.ranks, options.pool_mib, options.stubs, server)
            found.append(measure(load, int(mib * MIB), options.seconds))
            print(json.dumps(found[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
