"""What observers cost an owner at full load: puts and gets with and without them, in turn.

    PYTHONPATH=src python tests/bench/observers.py --rounds 20 --out tests/bench/results/observers.json

The owner has 4,096 slots, 4,000 keys and 64 sessions (or as many as are asked for), and puts and gets a
feature of 64 KiB again and again in its loop. Meanwhile observers in a process of their own take a snapshot
each, ten times a second: in every other period of this owner, in the others of another, so that what their
own process does to the machine's caches is the same in both. A period is a fifth of a second; beside each
one with observers stands the one before it, and of these ratios the median is told, with the quartiles.
What counts is the CPU time of the loop's thread: other load on the machine comes and goes.
Then come, with nothing else to do, the seconds of the owner that each request took, and the longest piece
of it that ran in one go, which is what adds to a turn of the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import machine, resultfile
from bench.turns import Process
from featcache import FeatureCache, Observer, Settings
from featcache.control import observers as module

SLOTS, KEYS = 4096, 4000
PERIOD_S = 0.2
FEATURE_BYTES = 64 << 10


async def sessions(endpoint: str, count: int) -> None:
    clients = [featcache.connect(endpoint, name=f"r{number}") for number in range(count)]
    await asyncio.gather(*(client.open() for client in clients))
    await asyncio.Event().wait()


async def another(endpoint: str) -> None:
    """Own a pool in which nothing happens."""
    async with featcache.create(endpoint=endpoint, capacity="1MiB", segment="1MiB"):
        await asyncio.Event().wait()


async def looking(endpoint: str, other: str, count: int, gate: str, hertz: float) -> None:
    """Take snapshots, of the loaded owner as long as a file is there, else of the other."""
    open_gate = Path(gate)

    async def look(here: Observer, there: Observer) -> None:
        while True:
            observer = here if open_gate.exists() else there  # noqa: ASYNC240 - it is on tmpfs
            await observer.snapshot()
            await asyncio.sleep(1.0 / hertz)

    pairs = [(featcache.observe(endpoint), featcache.observe(other)) for _ in range(count)]
    await asyncio.gather(*(each.open() for pair in pairs for each in pair))
    await asyncio.gather(*(look(*pair) for pair in pairs))


async def loaded(cache: FeatureCache, feature: torch.Tensor, out: torch.Tensor) -> float:
    """Return how many features were put and got in a second of the loop's thread's own time."""
    done, until_s, began_s = 0, time.monotonic() + PERIOD_S, time.thread_time()
    while time.monotonic() < until_s:
        for _ in range(8):
            ref = await cache.put(feature)
            await cache.get(ref, out=out)
        done += 8
        await asyncio.sleep(0)
    return done / (time.thread_time() - began_s)


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    wanted = options.sessions
    settings = Settings(slots=SLOTS, sessions=wanted + 1, observers=options.observers + 1)
    feature = torch.zeros(FEATURE_BYTES, dtype=torch.uint8)
    out = torch.empty_like(feature)
    gate = folder / "gate"
    found: dict[str, Any] = {}
    async with featcache.create(settings=settings) as cache:
        small = torch.zeros(1024, dtype=torch.uint8)
        for number in range(KEYS):
            await cache.put(small, key=f"key-{number}")
        endpoint = cache.endpoint
        attached = Process(lambda: sessions(endpoint, wanted))
        other = str(folder / "other.sock")
        beside = Process(lambda: another(other))
        while not Path(other).exists():  # noqa: ASYNC110, ASYNC240 - of another process
            await asyncio.sleep(0.05)
        count, hertz = options.observers, options.hertz
        lookers = Process(lambda: looking(endpoint, other, count, str(gate), hertz))
        try:
            while cache.statistics().sessions < wanted:  # noqa: ASYNC110 - of other processes
                await asyncio.sleep(0.05)
            await loaded(cache, feature, out)
            ratios = []
            for _ in range(options.rounds):
                without = await loaded(cache, feature, out)
                gate.touch()
                ratios.append(await loaded(cache, feature, out) / without)
                gate.unlink()
            quartiles = statistics.quantiles(ratios, n=4)
            found["throughput_with_observers"] = {
                "median": round(statistics.median(ratios), 4),
                "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
            }
            found["requests"] = await alone(cache)
        finally:
            lookers.kill()
            attached.kill()
            beside.kill()
    return found


async def alone(cache: FeatureCache) -> dict[str, Any]:
    """Return what each request takes of the owner's time, and the longest piece of it."""
    engine = cache._life.engine
    assert engine is not None
    table = engine.main.server.observers
    pieces: list[float] = []
    real = table._step

    def timed(*args: Any) -> Any:
        began = time.thread_time()
        try:
            return real(*args)
        finally:
            pieces.append(time.thread_time() - began)

    table._step = timed  # type: ignore[method-assign, assignment]  # a measurement
    found: dict[str, Any] = {}
    async with featcache.observe(cache.endpoint) as observer:
        asked: dict[str, Callable[[], Awaitable[object]]] = {
            "snapshot": observer.snapshot,
            "keys": lambda: observer.keys("size", limit=256),
            "map": lambda: observer.map(1024),
        }
        for name, ask in asked.items():
            totals, longest = [], 0.0
            for _ in range(30):
                table._allowance = module.Allowance(time.monotonic())
                pieces.clear()
                await ask()
                totals.append(sum(pieces))
                longest = max(longest, *pieces)
            found[name] = {
                "ms": round(statistics.median(totals) * 1e3, 3),
                "longest_piece_ms": round(longest * 1e3, 3),
            }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--observers", type=int, default=1)
    parser.add_argument("--hertz", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(options, Path(folder)))
    result = {
        "date": machine.now(),
        "command": machine.command(sys.argv[1:]),
        "machine": machine.machine(),
        "sessions": options.sessions,
        "observers": options.observers,
        "hertz": options.hertz,
        **found,
    }
    resultfile.write(options.out, result)
    print(found)


if __name__ == "__main__":
    main()
