"""How soon a waiting put is woken, and what an idle cache costs.

    PYTHONPATH=src python tests/bench/wake.py --out tests/bench/results/wake.json

The pool holds one feature. A put waits for room; another process reads the feature that is in the
way. Both processes take the time of the system's monotonic clock: the reader just before it pays, the
owner when its put has its room. The recycle interval is set to a minute, so that only the ring can
have done it. Then the cache, with one session attached, is left alone, and the CPU time that the
owner's process uses is taken.
"""

import argparse
import asyncio
import logging
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import machine, resultfile
from featcache import blocking

FEATURE_BYTES = 4 << 10


def reader(pipe: Connection) -> None:
    """Pay each ref that comes, and answer with the time just before."""
    with blocking.connect() as client:
        while (data := pipe.recv_bytes()) != b"end":
            ref = featcache.FeatureRef.from_bytes(data)
            if not client._portal.engine.reader.pools.has(ref):
                client.get(ref)
                pipe.send(0)
                continue
            with client.borrow(ref):
                now_ns = time.monotonic_ns()
            pipe.send(now_ns)


async def wakes(pipe: Connection, rounds: int) -> list[float]:
    """Return the microseconds from each payment to the put that it made room for."""
    settings = featcache.Settings(recycle_interval=60.0, slots=16)
    feature = torch.zeros(FEATURE_BYTES, dtype=torch.uint8)
    times_us = []
    async with featcache.create(capacity=FEATURE_BYTES, settings=settings) as cache:
        ref = await cache.put(feature)
        pipe.send_bytes(ref.to_bytes())
        while not await asyncio.to_thread(pipe.poll, 0.1):
            pass
        pipe.recv()
        ref = await cache.put(feature)
        for _ in range(rounds):
            waiting = asyncio.ensure_future(cache.put(feature))
            while not cache.statistics().waiters:  # noqa: ASYNC110 - the state is the event
                await asyncio.sleep(0)
            await asyncio.sleep(
                0.003
            )  # past the first looks of the timer, so that the ring is timed
            pipe.send_bytes(ref.to_bytes())
            ref = await waiting
            woken_ns = time.monotonic_ns()
            times_us.append((woken_ns - pipe.recv()) / 1e3)
        pipe.send_bytes(b"end")
    return times_us


async def idle(seconds: float) -> float:
    """Return the share of one core that an idle cache with one session takes, in per cent."""
    async with (
        featcache.create(capacity="64MiB") as cache,
        featcache.connect(cache.endpoint) as client,
    ):
        refs = [await cache.put(torch.zeros(1024)) for _ in range(1000)]
        for ref in refs[:500]:
            await client.get(ref)  # the others stay owed
        await asyncio.sleep(0.2)
        began, cpu = time.monotonic(), time.process_time()
        await asyncio.sleep(seconds)
        return 100 * (time.process_time() - cpu) / (time.monotonic() - began)


async def bare(seconds: float) -> float:
    """Return the same for an event loop with nothing to do."""
    began, cpu = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return 100 * (time.process_time() - cpu) / (time.monotonic() - began)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=reader, args=(theirs,))
    process.start()
    times_us = sorted(asyncio.run(wakes(mine, arguments.rounds)))
    process.join()
    result: dict[str, Any] = {
        "machine": machine.machine(),
        "versions": machine.versions(None),
        "when": machine.now(),
        "command": "python tests/bench/wake.py " + " ".join(sys.argv[1:]),
        "wake_us": {
            "rounds": len(times_us),
            "median": round(statistics.median(times_us), 1),
            "p99": round(times_us[int(0.99 * len(times_us))], 1),
            "max": round(times_us[-1], 1),
        },
        "idle_percent_of_a_core": round(asyncio.run(idle(arguments.seconds)), 3),
        "bare_loop_percent_of_a_core": round(asyncio.run(bare(arguments.seconds)), 3),
    }
    print(resultfile.dumps(result), end="")
    resultfile.write(arguments.out, result)


if __name__ == "__main__":
    main()
