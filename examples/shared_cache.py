"""Four workers, one slab: each picture is encoded once on the host, by the first worker that needs it.

python examples/shared_cache.py
"""

import asyncio
import multiprocessing
import signal
import sys
from collections import Counter
from multiprocessing.connection import Connection

import anyio
import torch
from anyio import to_thread

import featcache

WORKERS = 4
PICTURES = [bytes([shade]) * 3 * 64 * 64 for shade in (40, 90, 140, 190, 240)]


def encode(picture: bytes) -> torch.Tensor:
    """Stands for a vision encoder: slow enough that its results are worth sharing."""
    pixels = torch.frombuffer(bytearray(picture), dtype=torch.uint8).reshape(64, 64, 3)
    return pixels.float().div(255).permute(2, 0, 1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)


async def work(endpoint: str, pipe: Connection) -> None:
    encoded = 0
    async with featcache.connect(endpoint) as cache:

        async def features(picture: bytes) -> torch.Tensor | dict[str, torch.Tensor]:
            async def make() -> torch.Tensor:
                nonlocal encoded
                encoded += 1
                return await to_thread.run_sync(encode, picture)

            return await cache.get_or_put(featcache.content_key(picture), make)

        for picture in PICTURES * 3:
            found = await features(picture)
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, encode(picture))
    pipe.send(encoded)


def worker(endpoint: str, pipe: Connection) -> None:
    anyio.run(work, endpoint, pipe)


def stop_on_sigterm() -> None:
    """Have SIGTERM, which ends a process on the spot, cancel this task instead: it leaves its blocks."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


async def own() -> Counter[str]:
    stop_on_sigterm()
    spawn = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    async with featcache.create(capacity="64MiB") as cache:
        pipes = []
        for _ in range(WORKERS):
            ours, theirs = spawn.Pipe()
            spawn.Process(target=worker, args=(cache.endpoint, theirs), daemon=True).start()
            theirs.close()  # so that ours ends, should the worker die
            pipes.append(ours)
        for pipe in pipes:
            counts["encoded"] += await to_thread.run_sync(pipe.recv)
        seen = cache.statistics()
        counts["looked up"], counts["kept"] = seen.hits + seen.misses, seen.keys
    return counts


def main() -> None:
    try:
        counts = anyio.run(own)
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    print(
        f"{WORKERS} workers asked {WORKERS * 3 * len(PICTURES)} times for {len(PICTURES)} pictures"
    )
    print(f"encoded {counts['encoded']} times; {counts['kept']} features are kept")


if __name__ == "__main__":
    main()
