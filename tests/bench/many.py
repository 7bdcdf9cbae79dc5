"""What many at once cost beside one, and one by one: put_many, get_many, contains_many and share.

    PYTHONPATH=src python tests/bench/many.py --out tests/bench/results/many.json
    PYTHONPATH=src python tests/bench/many.py --device cuda:0

The owner is in a process of its own, the client in this one. Times are medians, in microseconds of one
call (or of the 16 single calls), on the host until the call has returned. For the turns, 1,000 small
members: the CPU time of the longest turn of this process's loop.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import machine, resultfile
from bench.turns import Ticker
from featcache import FeatureCache, FeatureClient, Settings
from support.processes import Pipe, starting, warm_up

MEMBERS = 16
MOST = 1000
User = FeatureCache | FeatureClient
now = time.perf_counter


def settings() -> Settings:
    return Settings(capacity=1 << 28, initial=1 << 28, slots=4096, grants=4096)


async def serve(pipe: Pipe, device: str) -> None:
    """Own a pool until this is killed."""
    async with featcache.create(device=device, settings=settings()) as owner:
        pipe.say(owner.endpoint)
        await asyncio.Event().wait()


async def median_us(rounds: int, call: Callable[[], Awaitable[object]]) -> float:
    times = []
    for _ in range(rounds):
        began_s = now()
        await call()
        times.append(now() - began_s)
    return round(statistics.median(times) * 1e6, 1)


async def beside_one(  # noqa: C901 - a small function for each thing that is timed
    user: User, features: list[torch.Tensor], rounds: int
) -> dict[str, Any]:
    """Times of one, of many singly, and of many together."""
    keys = [f"key {n}" for n in range(len(features))]
    first = features[0]
    refs: list[Any] = []

    async def put_one() -> None:
        refs.append(await user.put(first))

    async def put_each() -> None:
        refs.extend([await user.put(feature) for feature in features])

    async def put_all() -> None:
        refs.extend(await user.put_many(features))

    async def get_one() -> None:
        await user.get(refs.pop())

    async def get_each() -> None:
        for _ in features:
            await user.get(refs.pop())

    async def get_all() -> None:
        await user.get_many([refs.pop() for _ in features])

    found: dict[str, Any] = {}
    for name, put, get in (
        ("one", put_one, get_one),
        ("each", put_each, get_each),
        ("many", put_all, get_all),
    ):
        puts, gets = [], []
        for _ in range(rounds):
            puts.append(await median_us(1, put))
            gets.append(await median_us(1, get))
        found[f"put {name}"] = statistics.median(puts)
        found[f"get {name}"] = statistics.median(gets)

    async def each(call: Callable[[str], Awaitable[object]]) -> None:
        for key in keys:
            await call(key)

    await user.put_many(features, keys=keys)
    found["get key one"] = await median_us(rounds, lambda: user.get(keys[0]))
    found["get key each"] = await median_us(rounds, lambda: each(user.get))
    found["get key many"] = await median_us(rounds, lambda: user.get_many(keys))
    found["contains one"] = await median_us(rounds, lambda: user.contains(keys[0]))
    found["contains each"] = await median_us(rounds, lambda: each(user.contains))
    found["contains many"] = await median_us(rounds, lambda: user.contains_many(keys))

    async def share() -> None:
        refs.append(await user.share(keys[0], readers=1))

    found["share"] = await median_us(rounds, share)
    found["get share"] = await median_us(rounds, get_one)
    return found


async def longest_turns(user: User, device: str) -> dict[str, float]:
    """The CPU time of the longest turn, in milliseconds, with as many members as one call may have."""
    features = [torch.full((4096,), n % 256, dtype=torch.uint8, device=device) for n in range(MOST)]
    keys = [f"turn {n}" for n in range(MOST)]
    found = {}
    gc.collect()
    gc.freeze()  # a collection of torch's own objects is not what is timed
    ticker = Ticker()
    for name in ("put_many", "get_many", "put_many keyed", "get_many keyed", "contains_many"):
        await asyncio.sleep(0.02)
        ticker.take()
        if name == "put_many":
            refs = await user.put_many(features)
        elif name == "get_many":
            await user.get_many(refs)
        elif name == "put_many keyed":
            await user.put_many(features, keys=keys)
        elif name == "get_many keyed":
            await user.get_many(keys)
        else:
            await user.contains_many(keys)
        await asyncio.sleep(0.02)
        found[name] = round(ticker.take()["cpu_ms"], 2)
    ticker.stop()
    return found


async def measure(device: str, nbytes: int, rounds: int) -> dict[str, Any]:
    with starting() as start:
        child = start(serve, device)
        (endpoint,) = await child.hear()
        features = [
            torch.full((nbytes,), n, dtype=torch.uint8, device=device) for n in range(MEMBERS)
        ]
        found: dict[str, Any] = {}
        async with featcache.connect(endpoint, settings=settings()) as client:
            await beside_one(client, features, 20)
            found["client"] = await beside_one(client, features, rounds)
            found["client turns ms"] = await longest_turns(client, device)
        async with featcache.create(device=device, settings=settings()) as owner:
            await beside_one(owner, features, 20)
            found["owner"] = await beside_one(owner, features, rounds)
            found["owner turns ms"] = await longest_turns(owner, device)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nbytes", type=int, default=64 << 10)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warm_up()
    found = asyncio.run(measure(given.device, given.nbytes, given.rounds))
    for who, times in found.items():
        print(f"\n{who}")
        for name, value in times.items():
            print(f"  {name:16} {value:10.1f}")
    if given.out is not None:
        resultfile.write(given.out, {"machine": machine.machine(), "found": found})


if __name__ == "__main__":
    main()
