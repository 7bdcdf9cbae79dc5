"""The hit rates of the eviction policies, with uses told only by ticks, beside an ideal LRU and the optimum.

    PYTHONPATH=src python tests/bench/hit_rate_policies.py --out tests/bench/results/hit-rate-policies.json

Each request of a trace is for one object; who misses puts it. The policies run in the real store with its
real allocator and its windows of neighbours, in one process and with no sessions: a hit writes the
present tick into a word of the object's slot, as a session would, and says nothing else to the store. The
tick moves at publishes alone (a pool moves it as time passes too, which can only help).

- The ideal LRU counts bytes exactly and has no holes between its entries.
- The optimum knows the future: it keeps out, or evicts, what is used again the latest, by bytes. Where all
  sizes are one that is Belady's and the best there is; where they are not it is an approximation, which
  some policy could beat.

Sizes are those of images' encoder outputs (`hit_rate.py`) unless the trace says otherwise; a cache size is
a share of the bytes of all objects that the trace asks for.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import random
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Final

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import hit_rate, machine, resultfile
from bench.report import table
from featcache.core.allocator import aligned_size
from featcache.core.effects import Limits, SlotRetired
from featcache.core.keyed_store import KeyedStore
from featcache.core.put_queue import Request
from featcache.core.recency import POLICIES

SHARES: Final = (0.01, 0.03, 0.1, 0.3)
WARM: Final = 0.25
"""The share of a trace that is not counted."""
WITHIN: Final = 0.01
"""How far under the ideal LRU the default may be: one point."""
SHRINK: Final = 16
"""Divides the images' sizes; the cache is as much smaller."""


@dataclass(frozen=True)
class Trace:
    """The objects that are asked for, in order, and the bytes of each."""

    asked: list[int]
    sizes: list[int]

    @property
    def bytes_of_all(self) -> int:
        return sum(self.sizes[one] for one in set(self.asked))

    @property
    def warm(self) -> int:
        return round(len(self.asked) * WARM)


# --- traces ---------------------------------------------------------------------------------------


def image_sizes(random_: random.Random, count: int) -> list[int]:
    kinds = [hit_rate.feature_bytes(width, height) for width, height, _ in hit_rate.RESOLUTIONS]
    shares = [share for *_, share in hit_rate.RESOLUTIONS]
    return [size // SHRINK for size in random_.choices(kinds, shares, k=count)]


def wide_sizes(random_: random.Random, count: int) -> list[int]:
    """As many of 256 bytes to 1 KiB as of each factor of four above, to 256 KiB."""
    return [round(2 ** random_.uniform(8, 18)) for _ in range(count)]


def zipf(random_: random.Random, count: int, skew: float) -> Iterator[int]:
    """Draw for ever: the n-th of `count` as often as 1/n^skew."""
    up_to = list(itertools.accumulate(1 / (n + 1) ** skew for n in range(count)))
    while True:
        yield min(bisect.bisect(up_to, random_.random() * up_to[-1]), count - 1)


def plain(objects: int, requests: int, skew: float, seed: int = 1) -> Trace:
    random_ = random.Random(seed)
    sizes = image_sizes(random_, objects)
    return Trace(list(itertools.islice(zipf(random_, objects, skew), requests)), sizes)


def wide(objects: int, requests: int) -> Trace:
    random_ = random.Random(2)
    sizes = wide_sizes(random_, objects)
    return Trace(list(itertools.islice(zipf(random_, objects, 0.9), requests)), sizes)


def one_size(objects: int, requests: int) -> Trace:
    return Trace(plain(objects, requests, 0.9, seed=3).asked, [16 << 10] * objects)


def scans(objects: int, requests: int) -> Trace:
    """Zipf, and at each fourth part of the time a run through objects that nobody asks for again."""
    random_ = random.Random(4)
    drawn, asked, new = zipf(random_, objects, 0.9), list[int](), objects
    run = max(1, objects // 10)
    while len(asked) < requests:
        asked += itertools.islice(drawn, 3 * run)
        asked += range(new, new + run)
        new += run
    return Trace(asked[:requests], image_sizes(random_, new))


def loops(objects: int, requests: int) -> Trace:
    """Zipf, and a catalogue that is gone through again and again, a piece at a time."""
    random_ = random.Random(5)
    drawn, asked, at = zipf(random_, objects, 0.9), list[int](), 0
    catalogue, run = max(1, objects // 4), max(1, objects // 50)
    while len(asked) < requests:
        asked += itertools.islice(drawn, 3 * run)
        asked += [objects + (at + n) % catalogue for n in range(run)]
        at += run
    return Trace(asked[:requests], image_sizes(random_, objects + catalogue))


def shifts(objects: int, requests: int) -> Trace:
    """Zipf, whose ranks are given to others, a tenth of all further on, twenty times."""
    random_ = random.Random(6)
    sizes, drawn = image_sizes(random_, objects), zipf(random_, objects, 1.0)
    whose = random_.sample(range(objects), objects)
    epoch, step = max(1, requests // 20), max(1, objects // 10)
    ranks = enumerate(itertools.islice(drawn, requests))
    return Trace([whose[(rank + n // epoch * step) % objects] for n, rank in ranks], sizes)


TRACES: Final[dict[str, Callable[[int, int], Trace]]] = {
    "zipf 0.7": lambda objects, requests: plain(objects, requests, 0.7),
    "zipf 0.9": lambda objects, requests: plain(objects, requests, 0.9),
    "zipf 1.1": lambda objects, requests: plain(objects, requests, 1.1),
    "zipf 0.9, wide sizes": wide,
    "zipf 0.9, one size": one_size,
    "zipf 0.9 and scans": scans,
    "zipf 0.9 and a loop": loops,
    "zipf 1.0 that shifts": shifts,
}


# --- caches: each says of every request whether it was a hit ---------------------------------------


def by_store(trace: Trace, capacity_bytes: int, policy: str, counts: dict[str, float]) -> bytearray:
    """The real store, told of uses by ticks."""
    limits = Limits(
        capacity_bytes=capacity_bytes,
        segment_bytes=capacity_bytes,
        initial_bytes=capacity_bytes,
        slots=min(len(trace.sizes) + 1, 1 << 16),
        waiters=1,
        grace_s=0.0,
        idle_s=1.0,
        eviction=policy,
    )
    used = array("Q", bytes(8 * limits.slots))
    looks = surveys = 0

    def latest_use(index: int) -> int:
        nonlocal looks
        looks += 1
        return used[index]

    def latest_uses(high: int) -> array[int]:
        nonlocal surveys
        surveys += 1
        return used[:high]

    store = KeyedStore(limits, latest_use, latest_uses)
    store.allocator.grow(capacity_bytes)
    find, recency = store.directory.find, store.recency
    hits = bytearray(len(trace.asked))
    resident_bytes = 0
    for at, one in enumerate(trace.asked):
        key = b"%d" % one
        slot = find(key)
        if slot is not None:
            used[slot.index] = recency.tick
            hits[at] = 1
            continue
        request = Request(trace.sizes[one], 0, None, key)
        now_s = at * 1e-3
        while (slot := store.reserve(request, now_s)) is None:
            effects = store.evict_for(request, never, now_s)
            if not effects:
                raise RuntimeError("nothing was evicted, and nothing fits")
            gone = [effect.slot for effect in effects if type(effect) is SlotRetired]
            store.recycle(gone, now_s)
        store.publish(slot, now_s)
        resident_bytes += store.directory.resident_bytes
    misses = len(hits) - sum(hits)
    counts["resident_share"] = resident_bytes / misses / capacity_bytes
    counts["looks_per_eviction"] = looks / max(1, store.evicted)
    counts["surveys_per_eviction"] = surveys / max(1, store.evicted)
    return hits


def never(_: object) -> bool:
    return False


def by_lru(trace: Trace, capacity_bytes: int) -> bytearray:
    """The least recently used go until there is room; no holes."""
    kept, free_bytes = OrderedDict[int, int](), capacity_bytes
    hits = bytearray(len(trace.asked))
    for at, one in enumerate(trace.asked):
        if one in kept:
            kept.move_to_end(one)
            hits[at] = 1
            continue
        nbytes = aligned_size(trace.sizes[one])
        while free_bytes < nbytes:
            free_bytes += kept.popitem(last=False)[1]
        kept[one] = nbytes
        free_bytes -= nbytes
    return hits


def by_future(trace: Trace, capacity_bytes: int) -> bytearray:
    """What is used again the latest goes, or does not come in at all; no holes."""
    never_again = len(trace.asked)
    following, last = [never_again] * never_again, dict[int, int]()
    for at in range(never_again - 1, -1, -1):
        following[at] = last.get(trace.asked[at], never_again)
        last[trace.asked[at]] = at
    hits, free_bytes = bytearray(never_again), capacity_bytes
    kept = dict[int, int]()  # object: its next use
    latest = list[tuple[int, int]]()  # negative next use, object; stale where `kept` says another
    for at, one in enumerate(trace.asked):
        nbytes = aligned_size(trace.sizes[one])
        if one in kept:
            hits[at] = 1
        elif following[at] == never_again:
            continue
        else:
            free_bytes -= nbytes
        kept[one] = following[at]
        heappush(latest, (-following[at], one))
        while free_bytes < 0:
            negative, goes = heappop(latest)
            if kept.get(goes) == -negative:
                del kept[goes]
                free_bytes += aligned_size(trace.sizes[goes])
    return hits


# --- figures --------------------------------------------------------------------------------------


def rates(trace: Trace, hits: bytearray) -> tuple[float, float]:
    """Return the hit rates by objects and by bytes, of what comes after the warm-up."""
    counted = [(hits[at], trace.sizes[trace.asked[at]]) for at in range(trace.warm, len(hits))]
    hit_bytes = sum(nbytes for hit, nbytes in counted if hit)
    return sum(hit for hit, _ in counted) / len(counted), hit_bytes / sum(n for _, n in counted)


def measure(trace: Trace, capacity_bytes: int) -> dict[str, float]:
    """Return each cache's figures for one trace and one size."""
    found = dict[str, float]()
    for name in ("ideal", "optimum", *POLICIES):
        counts = dict[str, float]()
        if name == "ideal":
            hits = by_lru(trace, capacity_bytes)
        elif name == "optimum":
            hits = by_future(trace, capacity_bytes)
        else:
            hits = by_store(trace, capacity_bytes, name, counts)
        found[name], found[f"{name}_bytes"] = rates(trace, hits)
        found |= {f"{name}_{what}": count for what, count in counts.items()}
    return {what: round(figure, 4) for what, figure in found.items()}


def report(result: dict[str, Any]) -> str:
    names = ["ideal", *POLICIES, "optimum"]
    rows = []
    for trace, by_share in result["traces"].items():
        for share, found in by_share.items():
            figures = [f"{found[name]:.2%}" for name in names]
            figures += [f"{found[name] - found['ideal']:+.2%}" for name in POLICIES]
            figures += [f"{found[f'{name}_bytes']:.2%}" for name in names]
            rows.append([f"{trace}, {float(share):.0%}", *figures])
    heads = ["trace, cache", *names, *(f"{name} - ideal" for name in POLICIES)]
    return table([*heads, *(f"{name}, bytes" for name in names)], rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objects", type=int, default=4_000)
    parser.add_argument("--requests", type=int, default=60_000)
    parser.add_argument("--traces", help="some of them, comma-separated parts of their names")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args(argv)
    wanted = options.traces.split(",") if options.traces else [""]
    found: dict[str, Any] = {}
    for name, make in TRACES.items():
        if any(part in name for part in wanted):
            trace = make(options.objects, options.requests)
            sizes = {share: round(share * trace.bytes_of_all) for share in SHARES}
            least = 2 * aligned_size(max(trace.sizes))
            found[name] = {
                f"{share}": measure(trace, max(size // 256 * 256, least))
                for share, size in sizes.items()
            }
    result = {
        "date": machine.now(),
        "command": machine.command(argv, "hit_rate_policies.py"),
        "machine": machine.machine(),
        "objects": options.objects,
        "requests": options.requests,
        "warm": WARM,
        "traces": found,
        "worst": {
            name: min(
                round(one[name] - one["ideal"], 4)
                for by_share in found.values()
                for one in by_share.values()
            )
            for name in POLICIES
        },
    }
    print(report(result))
    for name, worst in result["worst"].items():
        said = "within a point" if worst >= -WITHIN else "MORE than a point under"
        print(f"{name}: at worst {worst:+.2%} of the ideal LRU, {said}")
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
