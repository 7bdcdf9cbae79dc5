"""The host time of single calls, without the bytes: features of 1 KiB, nothing to wait for.

    PYTHONPATH=src python tests/bench/calls.py --out tests/bench/results/calls.json

Owner and two clients in one process, so that nothing but the calls themselves is timed. The figures
are CPU time of the thread, in batches of 500 calls, and the least of all batches: what the call costs
when the machine does nothing else.
"""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import machine, resultfile

BATCH = 500


class Least:
    """The least microseconds a call, by name."""

    def __init__(self) -> None:
        self.us: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.thread_time()
        yield
        us = (time.thread_time() - began) * 1e6 / BATCH
        self.us[name] = round(min(us, self.us.get(name, us)), 2)


async def batch(
    least: Least,
    owner: featcache.FeatureCache,
    one: featcache.FeatureClient,
    two: featcache.FeatureClient,
) -> None:
    """Time a batch of each call."""
    x = torch.rand(256)
    with least.of("put_nowait"):
        refs = [owner.put_nowait(x, readers=2) for _ in range(BATCH)]
    with least.of("get_nowait"):
        for ref in refs:
            one.get_nowait(ref)
    with least.of("with borrow"):
        for ref in refs:
            with two.borrow(ref):
                pass
    with least.of("recycle, two sessions"):
        owner._opened().pool.collect()
    with least.of("await put"):
        refs = [await owner.put(x, readers=2) for _ in range(BATCH)]
    with least.of("await get"):
        for ref in refs:
            await one.get(ref)
    with least.of("async with borrow"):
        for ref in refs:
            async with two.borrow(ref):
                pass
    with least.of("ref.to_bytes"):
        sent = [ref.to_bytes() for ref in refs]
    with least.of("FeatureRef.from_bytes"):
        for data in sent:
            featcache.FeatureRef.from_bytes(data)
    owner._opened().pool.collect()


async def measure(rounds: int) -> dict[str, float]:
    """Return the least of each call over so many batches."""
    least = Least()
    async with (
        featcache.create(capacity="64MiB") as owner,
        featcache.connect(owner.endpoint) as one,
        featcache.connect(owner.endpoint) as two,
    ):
        for _ in range(rounds):
            await batch(least, owner, one, two)
    return least.us


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    result = {
        "machine": machine.machine(),
        "versions": machine.versions(None),
        "when": machine.now(),
        "command": " ".join(["python tests/bench/calls.py", *sys.argv[1:]]),
        "least_us": asyncio.run(measure(arguments.rounds)),
    }
    print(resultfile.dumps(result), end="")
    resultfile.write(arguments.out, result)


if __name__ == "__main__":
    main()
