"""Ray's object store, as the benchmark of keys uses it: in a process of its own, with actors as clients.

The driver puts numpy arrays, the actors get them: what they hold is a view of the store's shared memory,
so `ray.get` is beside `borrow`; beside `get` it is copied. Ray has no keys: the actors are given the
references. Pipelined, an actor gets as many references with one call as may be in flight.
"""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import statistics
import traceback
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

from bench.keyed_fleet import Plan, feature_of

LIMIT_S = 180.0
VIEW, COPY = "ray, view", "ray, copy"


class Client:
    """An actor; made one by `run`."""

    def __init__(self, plan: Plan) -> None:
        import torch

        torch.set_num_threads(1)
        self.plan = plan
        self.refs: dict[int, list[Any]] = {}

    def take(self, refs: dict[int, list[Any]]) -> None:
        import numpy as np

        ray = the_module()
        self.refs = refs
        for size, some in refs.items():
            for number, ref in enumerate(some):
                if not np.array_equal(ray.get(ref), feature_of(size, number).numpy()):
                    raise RuntimeError("Ray brought other bytes than were put")

    def alone(self, size: int, count: int, *, copies: bool) -> float:
        ray = the_module()
        refs, times_ns = self.refs[size], []
        for at in range(count):
            began_ns = perf_counter_ns()
            x = ray.get(refs[at % len(refs)])
            if copies:
                x = x.copy()
            times_ns.append(perf_counter_ns() - began_ns)
            del x
        return statistics.median(times_ns) / 1e3

    def many(self, size: int, seconds: float, *, copies: bool) -> tuple[int, float]:
        ray = the_module()
        refs, flight = self.refs[size], self.plan.flight
        count, began = 0, perf_counter()
        while perf_counter() < began + seconds:
            found = ray.get([refs[at % len(refs)] for at in range(count, count + flight)])
            if copies:
                found = [x.copy() for x in found]
            count += flight
        return count, perf_counter() - began


def the_module() -> Any:
    return importlib.import_module("ray")


def missing(device: str) -> str | None:
    if device != "cpu":
        return "its object store is host memory"
    if find_spec("ray") is None:
        return "Ray is not installed"
    return None


def run(plan: Plan, rounds: int, count: int, seconds: float) -> dict[str, Any]:
    """Return {size: {name: {"us": [...], "hits_per_s": [...]}}}, or what went wrong."""
    if (reason := missing(plan.device)) is not None:
        return {"not_run": reason}
    context = mp.get_context("spawn")
    pipe, far = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(far, plan, rounds, count, seconds))
    process.start()
    far.close()
    try:
        if not pipe.poll(LIMIT_S):
            return {"not_run": f"Ray said nothing within {LIMIT_S:.0f} s"}
        said: dict[str, Any] = pipe.recv()
    except EOFError:
        said = {"not_run": "the process that uses Ray died"}
    finally:
        process.join(20)
        if process.is_alive():
            process.kill()
        process.join(10)
    return said


def _main(pipe: Any, plan: Plan, rounds: int, count: int, seconds: float) -> None:
    try:
        pipe.send(_measure(plan, rounds, count, seconds))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
        traceback.print_exc()
        pipe.send({"not_run": f"{type(error).__name__}: {str(error).splitlines()[:1]}"})


def _measure(plan: Plan, rounds: int, count: int, seconds: float) -> dict[str, Any]:
    tests = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    ray = the_module()
    ray.init(
        num_cpus=plan.clients,
        include_dashboard=False,
        object_store_memory=2 * plan.resident_bytes + (128 << 20),
        logging_level="error",
        log_to_driver=False,
    )
    try:
        refs = {
            size: [ray.put(feature_of(size, number).numpy()) for number in range(plan.keys)]
            for size in plan.sizes
        }
        actors = [ray.remote(num_cpus=1)(Client).remote(plan) for _ in range(plan.clients)]
        ray.get([actor.take.remote(refs) for actor in actors], timeout=LIMIT_S)
        found: dict[str, Any] = {
            str(size): {name: {"us": [], "hits_per_s": []} for name in (VIEW, COPY)}
            for size in plan.sizes
        }
        for _ in range(rounds):
            for size in plan.sizes:
                for name in (VIEW, COPY):
                    copies, cell = name == COPY, found[str(size)][name]
                    one = actors[0].alone.remote(size, count, copies=copies)
                    cell["us"].append(ray.get(one, timeout=LIMIT_S))
                    many = [a.many.remote(size, seconds, copies=copies) for a in actors]
                    took = ray.get(many, timeout=LIMIT_S)
                    cell["hits_per_s"].append(sum(hits / s for hits, s in took))
        return found
    finally:
        ray.shutdown()
