"""How fast `get` moves large features from one GPU to another, beside a plain copy.

    PYTHONPATH=src python tests/bench/cuda_peer.py --out tests/bench/results/cuda-peer.json

The owner and its pool are on the first device, the reader, a process of its own, on the second. The
owner puts a pool full of features; when they are there the reader gets one after the other, with `out=`
and without, between two CUDA events on its stream. In a third process torch copies as many bytes from
tensors on the first device to tensors on the second, timed likewise; so does `cuMemcpyAsync` on a
stream of the second, which is how featcache copies. Every byte of the first round is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import machine, resultfile
from bench.cuda_fleet import short
from bench.cuda_wire import make_sources, source_of, synchronize
from bench.host import parse_size, parse_sizes
from bench.peer_copies import OUTS, copy, count_of, prepare, timed
from bench.report import number, size_name, table
from featcache import blocking

PATIENCE_S = 90.0
GB = 1e9
FIRST_TURN = 3
"""turns before it compare the bytes, then warm up with each way"""
WAYS = ("get", "get, out=", "torch copy_", "cuMemcpyAsync")


def read(endpoint: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Read round after round of refs; None ends it."""
    device = torch.device(options.devices[1])
    prepare(device)
    with blocking.connect(endpoint, device=device, name="peer") as client:
        pipe.send("ready")
        checked = set[int]()
        while (work := pipe.recv()) is not None:
            size, gives_out, sent = work
            refs = [featcache.FeatureRef.from_bytes(data) for data in sent]
            if size not in checked:
                checked.add(size)
                pipe.send(all_same(client, refs, make_sources(size, device)))
                continue
            outs = [
                torch.empty(size // 4, dtype=torch.int32, device=device) for _ in range(OUTS)
            ] * gives_out
            times_ns = list[int]()
            seconds = timed(device, lambda: get_all(client, refs, outs, times_ns))  # noqa: B023 - called now
            pipe.send((seconds, statistics.median(times_ns) / 1e3))


def all_same(client: Any, refs: list[Any], sources: list[torch.Tensor]) -> bool:
    return all(torch.equal(client.get(ref), sources[source_of(n)]) for n, ref in enumerate(refs))


def get_all(client: Any, refs: list[Any], outs: list[torch.Tensor], times_ns: list[int]) -> None:
    for n, ref in enumerate(refs):
        began_ns = perf_counter_ns()
        if outs:
            client.get(ref, out=outs[n % OUTS])
        else:
            client.get(ref)
        times_ns.append(perf_counter_ns() - began_ns)


def child(main: Callable[..., None], *arguments: Any) -> None:
    pipe: Connection = arguments[-1]
    try:
        main(*arguments)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
        traceback.print_exc()
        pipe.send(ChildError(short(error)))


class ChildError(Exception):
    """A process failed, or stands still."""


def hear(pipe: Connection) -> Any:
    if not pipe.poll(PATIENCE_S):
        raise ChildError(f"nothing for {PATIENCE_S:.0f} s")
    said = pipe.recv()
    if isinstance(said, ChildError):
        raise said
    return said


def start(main: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=child, args=(main, *arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, mine


async def feed(options: argparse.Namespace, cells: dict[int, dict[str, Any]]) -> None:
    """The owner: puts a round, lets the reader get it, for all sizes, both ways."""
    device = torch.device(options.devices[0])
    prepare(device)
    pool = options.pool
    async with featcache.create(device=device, capacity=pool, initial=pool) as cache:
        process, pipe = start(read, cache.endpoint, options)
        try:
            await asyncio.to_thread(hear, pipe)
            for size in options.sizes:
                sources = make_sources(size, device)
                ways = (False, *([False, True] * (options.rounds + 1)))
                for turn, gives_out in enumerate(ways):
                    refs = [
                        await cache.put(sources[source_of(n)], readers=["peer"])
                        for n in range(count_of(options, size))
                    ]
                    await asyncio.to_thread(synchronize, device)
                    pipe.send((size, gives_out, [ref.to_bytes() for ref in refs]))
                    said = await asyncio.to_thread(hear, pipe)
                    if turn == 0 and not said:
                        raise ChildError("the reader saw other bytes than were put")
                    if turn >= FIRST_TURN:
                        seconds, host_us = said
                        way = WAYS[gives_out]
                        cells[size].setdefault(way, []).append(seconds)
                        cells[size].setdefault(f"{way} host_us", []).append(host_us)
            pipe.send(None)
            await asyncio.to_thread(process.join, 15)
        finally:
            process.kill()


def plain(options: argparse.Namespace, cells: dict[int, dict[str, Any]]) -> None:
    process, pipe = start(copy, options)
    try:
        for size in options.sizes:
            cells[size] |= hear(pipe)
        process.join(15)
    finally:
        process.kill()


def summary(options: argparse.Namespace, cells: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """GB/s, the median of the rounds; the ratio to torch's copy."""
    found = []
    for size, cell in cells.items():
        rates = {
            way: [count_of(options, size) * size / GB / seconds for seconds in cell[way]]
            for way in WAYS
            if way in cell
        }
        base = statistics.median(rates["torch copy_"]) if "torch copy_" in rates else None
        for way, rounds in rates.items():
            rate = statistics.median(rounds)
            host_us = cell.get(f"{way} host_us")
            found.append({
                "size": size,
                "way": way,
                "gb_per_s": round(rate, 1),
                "gb_per_s_rounds": [round(one, 1) for one in rounds],
                "ratio": round(rate / base, 3) if base else None,
                "host_us": round(statistics.median(host_us), 1) if host_us else None,
            })  # fmt: skip
    return found


def report(result: dict[str, Any]) -> str:
    rows = [
        [f"{cell['way']}, {size_name(cell['size'])}", number(cell["gb_per_s"]),
         number(cell["ratio"]), number(cell["host_us"])]
        for cell in result["cells"]
    ]  # fmt: skip
    text = table(["", "GB/s", "of torch copy_", "host µs a call"], rows)
    return text + "".join(f"\n- {error}\n" for error in result["errors"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=parse_sizes, default=parse_sizes("64MiB,128MiB,256MiB"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--pool", type=parse_size, default=parse_size("4GiB"))
    parser.add_argument(
        "--devices", type=lambda text: text.split(","), default=["cuda:0", "cuda:1"]
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    cells: dict[int, dict[str, Any]] = {size: {} for size in options.sizes}
    errors = []
    for name, work in (("plain copies", plain), ("featcache", lambda *a: asyncio.run(feed(*a)))):
        try:
            work(options, cells)
        except Exception as error:  # noqa: BLE001 - it goes into the result
            traceback.print_exc()
            errors.append(f"{name}: {short(error)}")
    result = {
        "date": machine.now(),
        "command": machine.command(argv, "cuda_peer.py"),
        "machine": machine.machine() | {"gpus": machine.gpus()},
        "versions": machine.versions(None, machine.CUDA_PACKAGES),
        "devices": options.devices,
        "pool_bytes": options.pool,
        "rounds": options.rounds,
        "cells": summary(options, cells),
        "errors": errors,
    }
    resultfile.write(options.out, result)
    print(report(result), end="")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
