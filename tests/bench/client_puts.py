"""What a client's put costs beside the owner's own put and a bare echo, in one run, interleaved.

    PYTHONPATH=src python tests/bench/client_puts.py --out tests/bench/results/client-puts.json

The owner is another process; in it runs a bare echo over a Unix socket, too (anyio's). Each round times a
few of everything, in random order: echoes of 64 bytes, the owner's own puts, the client's puts, without a
key and under one of a few keys that are given new features all the time, in a row or with a pause between
them. With ``--full`` the keys are new ones instead, in a pool that they fill: each put evicts, or is made in
room that was evicted for. Refs are paid, untimed, by who put them. The figures are the median of all calls,
and their mean without the slowest twentieth; last comes what a client's put takes over the owner's own, in
echoes.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anyio
import structlog
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import machine, resultfile

SIZES = {"64KiB": 64 << 10, "1MiB": 1 << 20}
KEYS = 8
CAPACITY = "256MiB"
ECHO = b"e" * 64
_names = itertools.count()


async def puts(
    cache: featcache.FeatureCache | featcache.FeatureClient,
    feature: torch.Tensor,
    count: int,
    *,
    keyed: bool,
    pause: bool,
    new: str = "",
) -> list[float]:
    """Return the microseconds of each of so many puts, one after the other; under `new` keys, if any."""
    spent = list[float]()
    for number in range(count):
        if pause:  # as a program that does something else between its puts
            await asyncio.sleep(0.0005)
        name = f"{new} {next(_names)}" if new else f"key {number % KEYS}"
        key = name if keyed else None
        since_ns = time.perf_counter_ns()
        ref = await cache.put(feature, key=key, readers=0 if keyed else 1)
        spent.append((time.perf_counter_ns() - since_ns) / 1e3)
        if not keyed:
            await cache.release(ref)
    return spent


async def own(pipe: Connection, path: str, loop: asyncio.AbstractEventLoop) -> None:
    """Serve: a pool, an echo, and puts of its own on request."""

    async def echo(stream: Any) -> None:
        async with stream:
            with contextlib.suppress(anyio.EndOfStream):
                while True:
                    await stream.send(await stream.receive())

    asked: asyncio.Queue[Any] = asyncio.Queue()
    loop.add_reader(pipe.fileno(), lambda: asked.put_nowait(pipe.recv()))
    listener = await anyio.create_unix_listener(path)
    async with (
        featcache.create(
            capacity=CAPACITY, settings=featcache.Settings(initial=256 << 20, slots=8192)
        ) as cache,
        anyio.create_task_group() as group,
    ):
        group.start_soon(listener.serve, echo)
        pipe.send(cache.endpoint)
        while (ask := await asked.get()) is not None:
            size, count, keyed, pause, full = ask
            feature = torch.ones(size, dtype=torch.uint8)
            new = "owner" if full else ""
            pipe.send(await puts(cache, feature, count, keyed=keyed, pause=pause, new=new))
        loop.remove_reader(pipe.fileno())
        group.cancel_scope.cancel()


def owner(pipe: Connection, path: str, kind: str) -> None:
    """Run the owner's process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

    async def main() -> None:
        await own(pipe, path, asyncio.get_running_loop())

    _run(main, kind)


def _run(main: Callable[[], Awaitable[Any]], kind: str) -> Any:
    if kind == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())  # type: ignore[arg-type]
    return asyncio.run(main())  # type: ignore[arg-type]


async def measure(
    pipe: Connection, path: str, rounds: int, count: int, *, full: bool
) -> dict[str, dict[str, float]]:
    """Return the median of each figure over the rounds."""
    endpoint = await asyncio.to_thread(pipe.recv)
    times: dict[str, list[float]] = {}
    stream = await anyio.connect_unix(path)

    async def echoes() -> list[float]:
        spent = list[float]()
        for _ in range(count):
            since_ns = time.perf_counter_ns()
            await stream.send(ECHO)
            await stream.receive()
            spent.append((time.perf_counter_ns() - since_ns) / 1e3)
        return spent

    async with featcache.connect(endpoint) as client, stream:

        async def owners(size: int, *, keyed: bool, pause: bool) -> list[float]:
            pipe.send((size, count, keyed, pause, full))
            answer: list[float] = await asyncio.to_thread(pipe.recv)
            return answer

        calls: dict[str, Callable[[], Awaitable[list[float]]]] = {"echo": echoes}

        for name, keyed, pause in itertools.product(SIZES, (False, True), (False, True)):
            label = name + (" key" if keyed else "") + (" paused" if pause else "")
            feature = torch.ones(SIZES[name], dtype=torch.uint8)
            how = {"keyed": keyed, "pause": pause}
            calls[f"owner {label}"] = partial(owners, SIZES[name], **how)
            new = "client" if full else ""
            calls[f"client {label}"] = partial(puts, client, feature, count, new=new, **how)
        if full:
            small = torch.ones(SIZES["64KiB"], dtype=torch.uint8)
            await puts(
                client, small, (256 << 20) // len(small), keyed=True, pause=False, new="fill"
            )
        for number in range(rounds + 1):
            for name in random.sample(list(calls), len(calls)):
                taken = await calls[name]()
                if number:
                    times.setdefault(name, []).extend(taken)
    pipe.send(None)
    return {
        kind: {name: round(of(taken), 2) for name, taken in sorted(times.items())}
        for kind, of in (("median_us", statistics.median), ("mean_us", _trimmed))
    }


def _trimmed(taken: list[float]) -> float:
    """Return the mean without the slowest twentieth, in which the machine did something else."""
    return statistics.mean(sorted(taken)[: len(taken) - len(taken) // 20])


def ratios(us: dict[str, float]) -> dict[str, float]:
    """Return what a client's put takes over the owner's own, in echoes."""
    return {
        name[7:]: round((us[name] - us[f"owner {name[7:]}"]) / us["echo"], 2)
        for name in us
        if name.startswith("client ")
    }


def measured(kind: str, rounds: int, count: int, *, pins: bool, full: bool) -> dict[str, Any]:
    """Measure with one kind of event loop."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "echo.sock")
        mine, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=owner, args=(theirs, path, kind)
        )
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[-1]} if pins else cores)  # the child has it, too
        process.start()
        os.sched_setaffinity(0, {cores[0]} if pins else cores)
        us: dict[str, dict[str, float]] = _run(
            lambda: measure(mine, path, rounds, count, full=full), kind
        )
        process.join()
        os.sched_setaffinity(0, cores)
    return us | {f"{kind[:-3]}_over_the_owners_in_echoes": ratios(us[kind]) for kind in us}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--loops", nargs="+", default=["asyncio", "uvloop"])
    parser.add_argument(
        "--pin", action="store_true", help="owner and client each on a core of its own"
    )
    parser.add_argument("--full", action="store_true", help="puts into a cache that is full")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    result = {
        "machine": machine.machine(),
        "versions": machine.versions(None),
        "when": machine.now(),
        "command": machine.command(sys.argv[1:], "client_puts.py"),
        "loops": {
            kind: measured(
                *(kind, arguments.rounds, arguments.count), pins=arguments.pin, full=arguments.full
            )
            for kind in arguments.loops
        },
    }
    print(resultfile.dumps(result), end="")
    resultfile.write(arguments.out, result)


if __name__ == "__main__":
    main()
