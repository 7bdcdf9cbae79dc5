"""The hit rate on a trace such as servers see, beside an ideal cache of the same bytes.

    PYTHONPATH=src python tests/bench/hit_rate.py --out tests/bench/results/hit-rate.json

Requests are drawn from many images, the n-th as often as 1/n^s (Zipf). An image has as many bytes as its
vision encoder's output has: tokens by its resolution (one for 28 x 28 pixels), 1024 numbers of two bytes
each. Several clients take turns; who misses puts the feature. What is read carries its image's number at
both ends, which is looked at.

The ideal is a byte-LRU by hand: it evicts the longest unused until there is room, and has no holes between
its entries. It is given the bytes that the pool had committed at the end (`when_full="grow"` grows up to
the capacity before it evicts; `"evict"` evicts first, and so stays as large as it began); and, so that the
order of eviction and the holes can be told apart, also the bytes that the pool had resident on average.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import random
import sys
import time
from collections import OrderedDict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import crew, machine, resultfile
from bench.host import parse_size
from bench.keyed_fleet import commit
from bench.report import size_name, table

RESOLUTIONS = (
    *((224, 224, 25), (336, 336, 30), (448, 448, 15), (640, 480, 15), (800, 600, 8)),
    *((1024, 768, 5), (1280, 720, 2)),
)
"""Width, height, and how many of a hundred images have them."""
PATCH, TOKEN_BYTES = 28, 1024 * 2
ALIGNMENT_BYTES = 256
WITHIN = 0.005
"""how far the hit rate may be from the ideal's: half a point"""
LOOK_EVERY = 50


@dataclass(frozen=True)
class Trace:
    """The requested images, in order, and their sizes."""

    sizes: list[int]
    asked: list[int]

    @property
    def mean_bytes(self) -> float:
        return sum(self.sizes) / len(self.sizes)


def feature_bytes(width: int, height: int) -> int:
    return round(width / PATCH) * round(height / PATCH) * TOKEN_BYTES


def make_trace(images: int, requests: int, skew: float, seed: int = 4, shrink: int = 1) -> Trace:
    """`shrink` divides every size, for a trial."""
    random_ = random.Random(seed)
    kinds = [feature_bytes(width, height) // shrink for width, height, _ in RESOLUTIONS]
    sizes = random_.choices(kinds, [share for _, _, share in RESOLUTIONS], k=images)
    up_to = list(itertools.accumulate(1 / (n + 1) ** skew for n in range(images)))
    asked = [bisect.bisect(up_to, random_.random() * up_to[-1]) for _ in range(requests)]
    return Trace(sizes, [min(image, images - 1) for image in asked])


class IdealLru:
    """By hand."""

    def __init__(self, capacity_bytes: int) -> None:
        self.free_bytes = capacity_bytes
        self.kept: OrderedDict[int, int] = OrderedDict()

    def ask(self, image: int, nbytes: int) -> bool:
        """Whether it was there; it is now."""
        if image in self.kept:
            self.kept.move_to_end(image)
            return True
        while self.free_bytes < nbytes:
            self.free_bytes += self.kept.popitem(last=False)[1]
        self.free_bytes -= nbytes
        self.kept[image] = nbytes
        return False


def ideal_rate(trace: Trace, capacity_bytes: int, warm: int) -> tuple[float, int]:
    """The hit rate after the first `warm` requests, and how many were kept in the end."""
    cache, hits = IdealLru(capacity_bytes), 0
    for at, image in enumerate(trace.asked):
        nbytes = -(-trace.sizes[image] // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        hits += cache.ask(image, nbytes) and at >= warm
    return hits / (len(trace.asked) - warm), len(cache.kept)


class Images:
    """Features with their image's number at both ends; the same memory for all."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.memory = torch.zeros(max(trace.sizes) // 8, dtype=torch.int64)

    def make(self, image: int) -> torch.Tensor:
        feature = self.memory[: self.trace.sizes[image] // 8]
        feature[0] = feature[-1] = image
        return feature

    def check(self, image: int, found: Any) -> None:
        if found.nbytes != self.trace.sizes[image] // 8 * 8 or [found[0], found[-1]] != [image] * 2:
            raise RuntimeError(f"image {image} brought another's bytes")


async def ask(client: featcache.FeatureClient, images: Images, image: int) -> bool:
    """Whether it was there; it is now."""
    key = f"image {image}"
    try:
        async with client.borrow(key) as view:
            images.check(image, view)
    except featcache.KeyNotFound:
        await client.put(images.make(image), key=key)
        return False
    return True


async def run(trace: Trace, options: argparse.Namespace, when_full: str) -> dict[str, Any]:
    settings = featcache.Settings(when_full=when_full, slots=1 << 14, segment=options.segment)
    initial = options.segment if when_full == "grow" else options.pool // 2
    images, hits, resident_bytes = Images(trace), 0, list[int]()
    began_s = time.monotonic()
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(
            featcache.create(capacity=options.pool, initial=initial, settings=settings)
        )
        clients = [
            await stack.enter_async_context(featcache.connect(cache.endpoint))
            for _ in range(options.clients)
        ]
        for at, image in enumerate(trace.asked):
            hits += await ask(clients[at % len(clients)], images, image) and at >= options.warm
            if at >= options.warm and at % LOOK_EVERY == 0:
                resident_bytes.append(cache.statistics().resident_bytes)
        statistics = cache.statistics()
    ideal, ideal_kept = ideal_rate(trace, statistics.committed_bytes, options.warm)
    mean_bytes = round(sum(resident_bytes) / len(resident_bytes))
    ideal_of_resident, _ = ideal_rate(trace, mean_bytes, options.warm)
    rate = hits / (len(trace.asked) - options.warm)
    return {
        "when_full": when_full,
        "committed_bytes": statistics.committed_bytes,
        "resident_bytes": mean_bytes,
        "resident_share": round(mean_bytes / statistics.committed_bytes, 4),
        "kept": statistics.keys,
        "ideal_kept": ideal_kept,
        "evicted": statistics.evicted,
        "hit_rate": round(rate, 4),
        "ideal_hit_rate": round(ideal, 4),
        "difference": round(rate - ideal, 4),
        "ideal_of_resident": round(ideal_of_resident, 4),
        "difference_of_resident": round(rate - ideal_of_resident, 4),
        "reached": rate - ideal >= -WITHIN,
        "reached_of_resident": abs(rate - ideal_of_resident) <= WITHIN,
        "seconds": round(time.monotonic() - began_s, 1),
    }


def report(result: dict[str, Any]) -> str:
    names = {
        "hit_rate": "hit rate",
        "ideal_hit_rate": "ideal LRU of the committed bytes",
        "difference": "difference",
        "ideal_of_resident": "ideal LRU of the resident bytes",
        "difference_of_resident": "difference",
        "kept": "features kept at the end",
        "ideal_kept": "ideal",
        "resident_bytes": "resident bytes, on average",
        "resident_share": "their share",
        "committed_bytes": "of bytes",
        "evicted": "evicted",
        "seconds": "seconds",
    }
    runs = result["runs"]
    rows = [[name, *(f"{one[key]:,}" for one in runs)] for key, name in names.items()]
    for key, what in (("reached", "committed"), ("reached_of_resident", "resident")):
        row = [f"within {WITHIN} of the ideal of the {what} bytes"]
        rows.append([*row, *("reached" if one[key] else "MISSED" for one in runs)])
    return table(["when_full", *(one["when_full"] for one in runs)], rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=60_000)
    parser.add_argument("--warm", type=int, default=20_000, help="requests that are not counted")
    parser.add_argument("--skew", type=float, default=0.9)
    parser.add_argument("--pool", type=parse_size, default=parse_size("1024MiB"))
    parser.add_argument("--segment", type=parse_size, default=parse_size("64MiB"))
    parser.add_argument("--shrink", type=int, default=1, help="divides every size")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args(argv)
    crew.quiet()
    torch.set_num_threads(1)
    trace = make_trace(options.images, options.requests, options.skew, shrink=options.shrink)
    result: dict[str, Any] = {
        "date": machine.now(),
        "command": machine.command(argv, "hit_rate.py"),
        "machine": machine.machine(),
        "versions": commit(machine.versions(None)),
        "images": options.images,
        "requests": options.requests,
        "warm": options.warm,
        "skew": options.skew,
        "mean_bytes": round(trace.mean_bytes),
        "pool_bytes": options.pool,
        "runs": [asyncio.run(run(trace, options, when)) for when in ("grow", "evict")],
    }
    print(
        f"pool of {size_name(options.pool)}, {options.images} images of {trace.mean_bytes:,.0f} B\n"
    )
    print(report(result))
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
