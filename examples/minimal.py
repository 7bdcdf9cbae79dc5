"""The smallest owner and reader: two processes, one tensor, no copy between them.

python examples/minimal.py
"""

import asyncio
import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection

import anyio
import torch
from anyio import to_thread

import featcache


def stop_on_sigterm() -> None:
    """Have SIGTERM, which ends a process on the spot, cancel this task instead: it leaves its blocks."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


async def own(pipe: Connection) -> None:
    stop_on_sigterm()
    async with featcache.create(capacity="64MiB") as cache:
        ref = await cache.put(torch.arange(1_000_000.0), readers=1)
        data = ref.to_bytes()
        print(f"owner: put 1,000,000 floats; the ref is {len(data)} bytes")
        pipe.send_bytes(data)
        total = await to_thread.run_sync(pipe.recv)
        print(f"owner: the reader says {total:,.0f}")
        while cache.statistics().used_bytes:  # noqa: ASYNC110  # the recycler gives no event
            await anyio.sleep(0.01)
        print("owner: the read is paid and the bytes are free again")


async def read(pipe: Connection) -> None:
    try:
        data = pipe.recv_bytes()
    except EOFError:  # the owner was stopped before it had put anything
        return
    ref = featcache.FeatureRef.from_bytes(data)
    async with featcache.connect(name="reader") as cache, cache.borrow(ref) as features:
        assert isinstance(features, torch.Tensor)  # not a dict of tensors, as may be put too
        print(f"reader: {features.numel():,} floats, read where the owner put them")
        total = features.double().sum().item()
    pipe.send(total)


def reader(pipe: Connection) -> None:
    anyio.run(read, pipe)


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=reader, args=(theirs,))
    process.start()
    theirs.close()  # so that ours ends, should the reader die
    with suppress(asyncio.CancelledError):
        anyio.run(own, ours)
    ours.close()  # or the reader of an owner that was stopped early would wait for its ref
    process.join()


if __name__ == "__main__":
    main()
