"""featcache's pool in SGLang beside SGLang's own, in the same load: a tokenizer, and a rank on each GPU.

    pip download --no-deps --only-binary=:all: --python-version 3.12 sglang==0.5.23
    python -m zipfile -e sglang-0.5.23-*.whl .peers/sglang          # 86 MB of Python, and no compiled part
    SGLANG_FOLDER=.peers/sglang PYTHONPATH=src python tests/bench/sglang_pools.py --ranks 8 --json out.json

SGLang's modules come from the folder (or the environment). Where its many imports can't all be had,
``--stubs`` takes the pool's files alone from ``.peers/sglang-0.5.23`` (see peers/unpack_sglang.py) for the
CUDA IPC pool, and leaves the VMM pool out. With ``--cpu`` the slab is in host memory, and beside it is what
SGLang sends where its transport is ``cpu``: a segment of shared memory for each feature (``shm``).

With ``--daemon`` featcache's slab is owned by a process of its own, as with ``featcache serve``, and not by
the tokenizer.

The tokenizer's threads wrap features, send the pickled proxies to every rank, and each rank rebuilds them
on its GPU: rank k on GPU k, or on GPU k + 1 where there are more GPUs than ranks. A row is a pool and a size:

    per_second          features a second that all ranks have rebuilt, with so many threads that wrap
    median_us, p99_us   from the wrap to the last rank's copy, one feature at a time
    wrap_us             the wrap alone, its median in that same turn
    full                wraps that found the pool full, and tried again 50 us later
    foreign_mib         MiB that the ranks of other GPUs have on the tokenizer's GPU; -1: not known
    after_kill_per_second   the first row's figure of the ranks that are left, from the moment that the last
                        rank is killed, in the middle of the load; None with one rank
    after_kill_full     the wraps of that time that found the pool full
    stays_after_kill    features that are in the pool 3 s later, when the others have read all
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if os.environ.get("SGLANG_FOLDER"):
    sys.path.insert(0, os.environ["SGLANG_FOLDER"])

import torch

from bench import resultfile
from bench.machine import CUDA_PACKAGES, gpus, machine, versions
from bench.peers import sglang_stubs
from featcache import blocking
from integrations.sglang import cpu_standins

MIB = 1 << 20
POOLS = ("featcache", "cuda_ipc", "cuda_vmm")
CPU_POOLS = ("featcache", "shm")
STUBS = Path(__file__).resolve().parents[2] / ".peers" / "sglang-0.5.23"
RECYCLE_S = 0.05
NAP_S = 50e-6
SETTLED_S = 3.0


class Load(NamedTuple):
    pool: str
    ranks: int
    threads: int
    pool_mib: int
    stubs: bool
    cpu: bool
    server: str

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda:0"


def make_classes(load: Load, rank: int) -> Any:
    """Import SGLang in this process as one of so many ranks; return its pool's class."""
    os.environ["FEATCACHE_SGLANG_SERVER"] = load.server
    if load.cpu:
        cpu_standins.declare_torchvision_operators()
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
    if load.pool == "shm":
        return None
    if load.pool == "featcache":
        from featcache.integrations.sglang import ipc

        return ipc.FeatcacheItemPool
    if load.pool == "cuda_ipc":
        from sglang.srt.multimodal.transport import cuda_ipc

        return cuda_ipc.MmItemMemoryPool
    from sglang.srt.utils import cuda_vmm_transport_utils

    return cuda_vmm_transport_utils.CudaVmmMemoryPool


def run_rank(load: Load, rank: int, pipe: Connection, together: Any) -> None:
    """Rebuild what comes, until None does; say when each copy is done."""
    torch.set_num_threads(1)
    device = 0 if load.cpu else rank + (torch.cuda.device_count() > load.ranks)
    if not load.cpu:
        torch.cuda.set_device(device)
    make_classes(load, rank)
    pipe.send("ready")
    while True:
        message = pipe.recv()
        if message is None:
            return
        data, expected, answers = message
        proxy = pickle.loads(data)
        if load.pool == "shm":
            together.wait()  # as SGLang's ranks: the first to materialize takes the name away
            read = proxy.materialize()
        else:
            read = proxy.reconstruct_on_target_device(device)
        if answers:
            if not load.cpu:
                torch.cuda.synchronize()
            pipe.send(bool((read[:64] == expected).all() and (read[-64:] == expected).all()))


class Tokenizer:
    """The owner of the pool, with its ranks."""

    def __init__(self, load: Load) -> None:
        self.load = load
        if not load.cpu:
            torch.cuda.set_device(0)
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        together = context.Barrier(load.ranks)
        for rank in range(load.ranks):
            here, there = context.Pipe()
            arguments = (load, rank, there, together)
            process = context.Process(target=run_rank, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        pool_class = make_classes(load, 0)
        more = {"allow_posix_fallback": True} if load.pool == "cuda_vmm" else {}
        self.pool: Any = pool_class and pool_class(
            load.pool_mib * MIB, RECYCLE_S, 0, load.ranks, **more
        )
        self.full = 0
        self.sending = threading.Lock()
        """Every rank is to have the features in one order: SGLang broadcasts them."""
        for pipe in self.pipes:
            assert pipe.recv() == "ready"

    def wrap(self, feature: torch.Tensor) -> bytes:
        """Wrap, trying again while the pool is full."""
        while True:
            if self.load.pool == "shm":
                proxy = importlib.import_module("sglang.srt.managers.mm_utils").ShmPointerMMData(
                    feature
                )
            elif self.load.pool == "cuda_vmm":
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

    def rate(self, features: list[torch.Tensor], seconds: float) -> float:
        """Return the features a second that the tokenizer's threads send; every 16th is waited for."""
        self.full, sent = 0, [0] * self.load.threads
        began_s = time.perf_counter()

        def sends(thread: int) -> None:
            while time.perf_counter() < began_s + seconds:
                number = (sent[thread] + thread) % len(features)
                data = self.wrap(features[number])
                sent[thread] += 1
                with self.sending:
                    answers = sent[thread] % 16 == 0
                    self.send(data, number, answers=answers)
                    if answers:
                        self.heard()

        threads = [threading.Thread(target=sends, args=(one,)) for one in range(self.load.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with self.sending:
            self.send(self.wrap(features[0]), 0, answers=True)
            self.heard()
        return sum(sent) / (time.perf_counter() - began_s)

    def heard(self) -> None:
        right = [pipe.recv() for pipe in self.pipes]  # of every rank, whatever the first says
        if not all(right):
            raise SystemExit(f"{self.load.pool}: wrong bytes")

    def in_pool(self) -> int:
        if self.pool is None:
            return 0
        if self.load.pool == "cuda_vmm":
            return len(getattr(self.pool, "occupied_chunks", ()))
        return int(self.pool.active_lease_count)

    def foreign_mib(self) -> float:
        """MiB that ranks of other GPUs have on GPU 0, as the driver says; -1 if it does not."""
        try:
            pynvml = importlib.import_module("pynvml")
        except ImportError:
            return -1.0
        if self.load.cpu:
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
        if self.pool is not None:
            self.pool.shutdown()


def own(endpoint: str, load: Load, pipe: Connection) -> None:
    """Own featcache's slab, until told to end."""
    capacity, spill = load.pool_mib * MIB, 64 * MIB
    device = load.device
    with blocking.create(device=device, capacity=capacity, endpoint=endpoint, spill=spill):
        pipe.send("up")
        pipe.recv()


@contextlib.contextmanager
def daemon(load: Load) -> Iterator[None]:
    """Have the slab owned by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        endpoint = os.environ["FEATCACHE_ENDPOINT"] = f"{folder}/bench.sock"
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=own, args=(endpoint, load, there), daemon=True)
        process.start()
        here.recv()
        try:
            yield
        finally:
            here.send(None)
            process.join(10)
            del os.environ["FEATCACHE_ENDPOINT"]


def measure(load: Load, size_bytes: int, seconds: float) -> dict[str, Any]:
    tokenizer = Tokenizer(load)
    features = [
        torch.full((size_bytes,), number, dtype=torch.uint8, device=load.device)
        for number in range(16)
    ]
    for number, feature in enumerate(features):  # warm
        tokenizer.send(tokenizer.wrap(feature), number, answers=True)
        tokenizer.heard()
    times: list[float] = []
    wraps: list[float] = []
    until_s = time.perf_counter() + seconds / 3
    while time.perf_counter() < until_s:
        number = len(times) % len(features)
        began_s = time.perf_counter()
        data = tokenizer.wrap(features[number])
        wraps.append(time.perf_counter() - began_s)
        tokenizer.send(data, number, answers=True)
        tokenizer.heard()
        times.append(time.perf_counter() - began_s)
    rate = tokenizer.rate(features, seconds / 3)
    full, foreign = tokenizer.full, tokenizer.foreign_mib()
    after, stays = None, None
    if load.ranks > 1 and load.pool != "shm":
        after = after_a_kill(tokenizer, features, seconds / 3)
        stays = settled(tokenizer)
    tokenizer.close()
    times.sort()
    return {
        "pool": load.pool,
        "ranks": load.ranks,
        "threads": load.threads,
        "bytes": size_bytes,
        "per_second": round(rate, 1),
        "median_us": round(statistics.median(times) * 1e6, 1),
        "p99_us": round(times[int(len(times) * 0.99)] * 1e6, 1),
        "wrap_us": round(statistics.median(wraps) * 1e6, 1),
        "full": full,
        "foreign_mib": foreign,
        "after_kill_per_second": None if after is None else round(after, 1),
        "after_kill_full": None if after is None else tokenizer.full,
        "stays_after_kill": stays,
    }


def after_a_kill(tokenizer: Tokenizer, features: list[torch.Tensor], seconds: float) -> float:
    """Kill the last rank with features on their way, go on with the others; return their rate."""
    owed = [tokenizer.wrap(features[0]) for _ in range(4)]
    dies, pipe = tokenizer.processes.pop(), tokenizer.pipes.pop()
    pipe.send((owed[0], 0, True))
    dies.kill()
    dies.join()
    pipe.close()
    for data in owed:
        tokenizer.send(data, 0, answers=True)
        tokenizer.heard()
    return tokenizer.rate(features, seconds)


def settled(tokenizer: Tokenizer) -> int:
    """Return how many features stay in the pool once all that live have read."""
    until_s = time.monotonic() + SETTLED_S
    while tokenizer.in_pool() and time.monotonic() < until_s:
        time.sleep(RECYCLE_S)
    return tokenizer.in_pool()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pools", nargs="+", choices=(*POOLS, "shm"))
    parser.add_argument(
        "--ranks", type=int, default=2, help="GPUs that read; the first has the pool"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the tokenizer, that wrap")
    parser.add_argument("--mib", type=float, nargs="+", default=[0.0625, 1, 4, 16, 64])
    parser.add_argument("--pool-mib", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each row")
    parser.add_argument("--stubs", action="store_true", help="the pools' files alone")
    parser.add_argument("--cpu", action="store_true", help="a slab in host memory")
    parser.add_argument("--daemon", action="store_true", help="an owner in a process of its own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.cpu and torch.cuda.device_count() < options.ranks:
        print(f"skipped: needs {options.ranks} CUDA devices, or --cpu")
        return 0
    os.environ.setdefault("SGLANG_MM_FEATURE_CACHE_MB", str(options.pool_mib))
    rows = []
    for mib in options.mib:  # the pools of one size one after the other: a machine changes
        for pool in options.pools or (CPU_POOLS if options.cpu else POOLS):
            if pool == "cuda_vmm" and options.stubs:
                print("cuda_vmm: left out, its file needs all of SGLang")
                continue
            server = f"bench{os.getpid()}{pool}"
            load = Load(
                *(pool, options.ranks, options.threads, options.pool_mib),
                *(options.stubs, options.cpu, server),
            )
            alone = pool == "featcache" and options.daemon
            with daemon(load) if alone else contextlib.nullcontext():
                row = measure(load, int(mib * MIB), options.seconds)
            rows.append(row | {"daemon": alone})
            print(json.dumps(rows[-1]), flush=True)
    result = {"machine": machine() | {"gpus": [one["name"] for one in gpus()]}}
    result |= {"versions": versions(None, (*CUDA_PACKAGES, "sglang"))}
    resultfile.write(options.json, result | {"command": sys.argv[1:], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
