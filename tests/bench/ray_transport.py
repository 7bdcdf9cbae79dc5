"""Objects between two Ray actors: featcache's transport, refs, Ray's object store, its Gloo transport.

    PYTHONPATH=src python tests/bench/ray_transport.py --out ray-transport.json   # where Ray is installed

Interleaved, in an order of its own each round: one at a time (a method returns a tensor, another actor's
method takes it, the driver waits), and 16 in flight. What is compared are ratios within a round. With refs
the first actor puts the tensor and returns the ref, and the second borrows: Ray sees 100 bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import ray
import torch
from ray.experimental.collective import create_collective_group

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache.integrations.ray as featcache_ray
from bench import machine, resultfile
from featcache import FeatureRef, blocking

FLIGHT = 16
OURS, REFS, STORE, GLOO = SYSTEMS = ("featcache", "refs", "object store", "gloo")
LIMIT_S = 120.0
PACKAGES = ("featcache", "ray", "torch", "numpy")


def actor_class() -> Any:
    @ray.remote(num_cpus=0, enable_tensor_transport=True)
    class Actor:
        def prepare(self, size: int, endpoint: str) -> None:
            torch.set_num_threads(1)
            self.cache = getattr(self, "cache", None) or blocking.connect(endpoint).open()
            self.tensor = torch.arange(size, dtype=torch.uint8)

        def make(self) -> torch.Tensor:
            return self.tensor

        def take(self, tensor: torch.Tensor) -> int:
            return tensor.numel() + int(tensor[-1]) - int(tensor[-1])

        def make_ref(self) -> bytes:
            return self.cache.put(self.tensor, timeout=LIMIT_S).to_bytes()

        def take_ref(self, ref: bytes) -> int:
            with self.cache.borrow(FeatureRef.from_bytes(ref)) as tensor:
                assert isinstance(tensor, torch.Tensor)
                return self.take(tensor)

    return Actor


def transfers(system: str, source: Any, target: Any, size: int, count: int) -> float:
    """Return seconds for `count` objects in flight together."""
    make, take = source.make, target.take
    if system == REFS:
        make, take = source.make_ref, target.take_ref
    elif system != STORE:
        make = make.options(tensor_transport=system)
    began = perf_counter()
    took = ray.get([take.remote(make.remote()) for _ in range(count)], timeout=LIMIT_S)
    seconds = perf_counter() - began
    if set(took) != {size}:
        raise RuntimeError(f"{system} brought other tensors than were returned")
    return seconds


def measure(endpoint: str, sizes: list[int], rounds: int, count: int) -> dict[str, Any]:
    source, target = (actor_class().remote() for _ in range(2))
    create_collective_group([source, target], backend="torch_gloo")
    cells: dict[str, Any] = {}
    for size in sizes:
        ray.get(
            [actor.prepare.remote(size, endpoint) for actor in (source, target)], timeout=LIMIT_S
        )
        cell = cells[str(size)] = {s: {"ms": [], "per_s": []} for s in SYSTEMS}
        for system in SYSTEMS:
            transfers(system, source, target, size, 4)
        for _ in range(rounds):
            for system in random.sample(SYSTEMS, len(SYSTEMS)):
                alone = [transfers(system, source, target, size, 1) for _ in range(count)]
                cell[system]["ms"].append(statistics.median(alone) * 1e3)
                seconds = transfers(system, source, target, size, FLIGHT)
                cell[system]["per_s"].append(FLIGHT / seconds)
        for what in ("ms", "per_s"):
            ours = cell[OURS][what]
            for other in (REFS, STORE, GLOO):
                ratios = [b / a for a, b in zip(ours, cell[other][what], strict=True)]
                cell[other][f"{what}_to_featcache"] = statistics.median(ratios)
            for system in SYSTEMS:
                cell[system][what] = statistics.median(cell[system][what])
        print(size, cell, flush=True)
    return cells


def main() -> int:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[64 << 10, 1 << 20, 16 << 20], help="bytes")
    add("--rounds", type=int, default=8)
    add("--count", type=int, default=10, help="objects one at a time in a round")
    add("--out", type=Path)
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with blocking.create(capacity=4 * FLIGHT * max(options.sizes) + (64 << 20)) as owner:
        featcache_ray.register(owner.endpoint)
        ray.init(
            include_dashboard=False,
            object_store_memory=4 * FLIGHT * max(options.sizes) + (128 << 20),
            logging_level="error",
            log_to_driver=False,
        )
        try:
            cells = measure(owner.endpoint, options.sizes, options.rounds, options.count)
        finally:
            ray.shutdown()
    result = {
        "date": machine.now(),
        "command": machine.command(sys.argv[1:], Path(__file__).name),
        "machine": machine.machine(),
        "versions": machine.versions(None, PACKAGES),
        "rounds": options.rounds,
        "in_flight": FLIGHT,
        "cells": cells,
    }
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
