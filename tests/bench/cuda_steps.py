"""Where the microseconds of one put, one get and one borrow go, step by step.

    PYTHONPATH=src python tests/bench/cuda_steps.py --out result.json

An owner, and a reader in a process of its own. First the calls are timed whole; then the functions
that they are made of are wrapped, and the same is done again: each step with all that it calls, and
alone. The cost of wrapping a step stands at the top of the tables. A step that is not found, as it was
renamed or moved, is reported and does not fail the run.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import machine, resultfile
from bench.cuda_wire import make_sources, source_of, synchronize
from bench.host import parse_size, parse_sizes
from bench.peers.featcachepeer import silence
from bench.report import size_name, table
from bench.stopwatch import Stopwatch, overhead_us
from featcache import blocking


def steps(module: str, holder: str, *names: str) -> list[str]:
    """Paths of functions of a class, or of a module's imports (wrapped where they are called)."""
    start = f"featcache.{module}:{holder}." if holder else f"featcache.{module}:"
    return [start + name for name in names]


PUT_STEPS = [
    *steps("api.cache", "FeatureCache", "put_nowait"),
    *steps("pool.writer", "OwnerWriter", "put_nowait", "stage", "reserve", "_fill_now"),
    *steps("pool.writer", "", "parse_put"),
    *steps("session.arguments", "", "pack"),
    *steps("pool.collector", "Collector", "collect"),
    *steps("pool.pool", "Pool", "announce", "_observe"),
    *steps("pool.pool", "", "FeatureRef"),
    *steps("core.store", "Store", "reserve", "publish"),
    *steps("core.allocator", "OffsetAllocator", "allocate"),
    *steps("memory.words", "OwnerWords", "make_live"),
    *steps("memory.cuda.mapping", "CudaMapping", "stage", "write"),
    *steps("memory.host.slab", "HostMapping", "stage", "write"),
]
GET_STEPS = [
    *steps("api.base", "CacheBase", "get_nowait"),
    *steps("session.reader", "Reader", "get_nowait"),
    *steps("session.borrow", "Borrow", "__enter__", "__exit__"),
    *steps("session.borrow", "", "invalidate"),
    *steps("session.attachment", "Attachment", "pin", "unpin"),
    *steps("client.registry", "ConnectionRegistry", "peek"),
]
MAPPING = ("can_copy_to", "order", "empty", "read", "fetch", "view", "signal")
MAPPING_STEPS = [
    *steps("memory.cuda.mapping", "CudaMapping", *MAPPING),
    *steps("memory.host.slab", "HostMapping", *MAPPING),
    *steps("memory.cuda.streams", "", "view_over"),
    *steps("memory.cuda.streams", "DeviceStreams", "order", "copy", "write_word"),
    *steps("memory.cuda.streams", "DeviceStreams", "copy_and_signal"),
]
MOST_BATCH = 200


def wrapped(paths: list[str]) -> Stopwatch:
    watch = Stopwatch()
    for path in (*paths, *MAPPING_STEPS):
        watch.wrap(path)
    return watch


def whole(times_ns: list[int]) -> float:
    """Median microseconds."""
    return round(sorted(times_ns)[len(times_ns) // 2] / 1e3, 2)


def reader(endpoint: str, device: str, pipe: Connection) -> None:
    """Read messages `(kind, whether to look at the steps, the refs)`; None ends it."""
    torch.set_num_threads(1)
    silence()
    watch: Stopwatch | None = None
    with blocking.connect(endpoint, device=device, name="steps") as client:
        pipe.send(None)
        while (work := pipe.recv()) is not None:
            kind, looks, sent = work
            if looks and watch is None:
                watch = wrapped(GET_STEPS)
            times_ns = []
            parsed_ns = perf_counter_ns()
            refs = [featcache.FeatureRef.from_bytes(data) for data in sent]
            parsed_ns = perf_counter_ns() - parsed_ns
            for ref in refs:
                began_ns = perf_counter_ns()
                if kind == "get":
                    client.get(ref)
                else:
                    with client.borrow(ref):
                        pass
                times_ns.append(perf_counter_ns() - began_ns)
            synchronize(torch.device(device))
            steps = watch.take(len(refs)) if watch else []
            missing = watch.missing if watch else []
            pipe.send((whole(times_ns), round(parsed_ns / len(refs) / 1e3, 2), steps, missing))


class Owner:
    def __init__(self, cache: Any, pipe: Connection, options: argparse.Namespace) -> None:
        self.cache = cache
        self.pipe = pipe
        self.options = options
        self.watch: Stopwatch | None = None

    async def batch(self, sources: list[torch.Tensor], kind: str) -> dict[str, Any]:
        """A batch put, then read; with nothing else on the GPU than its copies."""
        size = sources[0].nbytes
        count = max(4, min(MOST_BATCH, self.options.pool // size // 2))
        times_ns, refs = [], []
        if self.watch:
            self.watch.take(1)  # what the recycler did meanwhile
        for n in range(count):
            x = sources[source_of(n)]
            began_ns = perf_counter_ns()
            refs.append(self.cache.put_nowait(x))
            times_ns.append(perf_counter_ns() - began_ns)
        steps = self.watch.take(count) if self.watch else []
        encoded_ns = perf_counter_ns()
        sent = [ref.to_bytes() for ref in refs]
        encoded_ns = perf_counter_ns() - encoded_ns
        synchronize(sources[0].device)
        self.pipe.send((kind, self.watch is not None, sent))
        # In a thread: a session's messages are answered in the loop here.
        us, parse_us, read_steps, missing = await asyncio.to_thread(self.pipe.recv)
        await asyncio.sleep(0.06)  # the recycler's interval: the next batch finds the pool empty
        return {
            "put_us": whole(times_ns),
            "put_steps": steps,
            "to_bytes_us": round(encoded_ns / count / 1e3, 2),
            "from_bytes_us": parse_us,
            f"{kind}_us": us,
            f"{kind}_steps": read_steps,
            f"{kind}_missing": sorted({*missing, *(self.watch.missing if self.watch else ())}),
        }

    async def size(self, size: int) -> dict[str, Any]:
        """The last of the batches: those before have warmed everything up."""
        sources = make_sources(size, torch.device(self.options.device))
        outcome: dict[str, Any] = {}
        for kind in ("get", "borrow"):
            for _ in range(self.options.rounds):
                outcome |= await self.batch(sources, kind)
        return outcome

    async def run(self) -> dict[str, Any]:
        await asyncio.to_thread(self.pipe.recv)
        result: dict[str, Any] = {}
        for size in self.options.sizes:
            result[str(size)] = {"whole": await self.size(size)}
        self.watch = wrapped(PUT_STEPS)
        for size in self.options.sizes:
            result[str(size)]["steps"] = await self.size(size)
        self.pipe.send(None)
        return result


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    pool = options.pool
    async with featcache.create(device=options.device, capacity=pool, initial=pool) as cache:
        arguments = (cache.endpoint, options.device, theirs)
        process = context.Process(target=reader, args=arguments, daemon=True)
        process.start()
        theirs.close()
        try:
            return await Owner(cache, mine, options).run()
        finally:
            mine.close()
            await asyncio.to_thread(process.join, 10)
            process.kill()


def report(result: dict[str, Any]) -> str:
    parts = [f"A wrapped step costs its caller {result['overhead_us']} µs.\n"]
    absent = ""
    for size, found in result["sizes"].items():
        plain, steps = found["whole"], found["steps"]
        for kind in ("put", "get", "borrow"):
            head = f"{kind}, {size_name(int(size))}: {plain[f'{kind}_us']} µs whole"
            rows = [
                [row["step"].replace("  ", "· "), *(str(row[k]) for k in ("calls", "us", "own_us"))]
                for row in steps[f"{kind}_steps"]
            ]
            parts.append(table([head, "calls", "µs", "µs alone"], rows))
        beside = f"to_bytes {plain['to_bytes_us']} µs, from_bytes {plain['from_bytes_us']} µs"
        parts.append(f"{size_name(int(size))}: {beside}\n")
        absent = ", ".join(path.partition(":")[2] for path in steps["borrow_missing"])
    parts.append(f"Not found: {absent or 'nothing'}\n")
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=parse_sizes, default=parse_sizes("64KiB,1MiB"))
    parser.add_argument("--rounds", type=int, default=10, help="batches of each kind")
    parser.add_argument("--pool", type=parse_size, default=parse_size("1GiB"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    silence()
    result = {
        "date": machine.now(),
        "command": machine.command(argv, "cuda_steps.py"),
        "machine": machine.machine() | {"gpus": machine.gpus()},
        "versions": machine.versions(None, machine.CUDA_PACKAGES),
        "overhead_us": overhead_us(),
        "sizes": asyncio.run(measure(options)),
    }
    print(report(result), end="")
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
