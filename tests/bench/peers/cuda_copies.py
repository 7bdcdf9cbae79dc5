"""The floor: the copies alone, one in and one out for each reader, in one process on one stream.

No other process, no handles, nothing that says when bytes are there or done with. The host times are
those of one `cuMemcpyAsync`; while copies stream they are as long as the GPU needs, once its queue
is full.
"""

from __future__ import annotations

from importlib.util import find_spec
from time import perf_counter, perf_counter_ns
from typing import Any

import torch

from bench.cuda_loops import Outcome, spread
from bench.cuda_ports import Plan
from bench.cuda_wire import make_sources, source_of, synchronize


def missing(plan: Plan) -> str | None:
    if plan.torch_device.type != "cuda":
        return "needs a GPU"
    return None if find_spec("cuda") else "needs cuda-bindings"


class Copies:
    def __init__(self, plan: Plan) -> None:
        from cuda.bindings import driver

        self.plan = plan
        self.device = plan.torch_device
        torch.cuda.set_device(self.device)
        self.driver: Any = driver
        self.pool = torch.empty(plan.pool, dtype=torch.uint8, device=self.device)
        stream = self.keep = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.stream: Any = driver.CUstream(stream.cuda_stream)

    def copy(self, to: int, come_from: int, nbytes: int) -> int:
        """Enqueue one copy; return the nanoseconds that took."""
        began_ns = perf_counter_ns()
        (error,) = self.driver.cuMemcpyAsync(to, come_from, nbytes, self.stream)
        took_ns = perf_counter_ns() - began_ns
        if int(error):
            raise RuntimeError(f"cuMemcpyAsync: {error}")
        return took_ns

    def run(self, size: int) -> Outcome:
        kept = make_sources(size, self.device)
        sources = [x.data_ptr() for x in kept]
        outs = [torch.empty_like(kept[0]) for _ in range(self.plan.readers)]
        slots = [self.pool.data_ptr() + at * size for at in range(self.plan.window(size))]
        targets = [x.data_ptr() for x in outs]
        synchronize(self.device)

        def feature(n: int) -> tuple[int, list[int]]:
            slot = slots[n % len(slots)]
            put_ns = self.copy(slot, sources[source_of(n)], size)
            return put_ns, [self.copy(to, slot, size) for to in targets]

        def stream(seconds: float, *, alone: bool) -> tuple[list[int], list[int], list[int], float]:
            puts_ns, gets_ns, trips_ns = list[int](), list[int](), list[int]()
            began = perf_counter()
            while perf_counter() < began + seconds:
                trip_ns = perf_counter_ns()
                put_ns, gets = feature(len(puts_ns))
                puts_ns.append(put_ns)
                gets_ns += gets
                if alone:
                    synchronize(self.device)
                    trips_ns.append(perf_counter_ns() - trip_ns)
            synchronize(self.device)
            return puts_ns, gets_ns, trips_ns, len(puts_ns) / (perf_counter() - began)

        stream(self.plan.seconds / 4, alone=False)
        for n in range(len(sources)):
            feature(n)
            synchronize(self.device)
            if not all(torch.equal(out, kept[source_of(n)]) for out in outs):
                raise RuntimeError("a copy is not what was copied")
        puts_ns, gets_ns, trips_ns, _ = stream(self.plan.seconds / 2, alone=True)
        outcome = spread("put_alone", puts_ns) | spread("get_alone", gets_ns)
        pipes = []
        for _ in range(self.plan.rounds):
            puts, gets, _, rate = stream(self.plan.seconds, alone=False)
            figures = {"features_per_s": rate, "features": len(puts), "waited": 0}
            pipes.append(figures | spread("put", puts) | spread("get", gets))
        return outcome | spread("trip", trips_ns) | {"trips": len(trips_ns), "pipes": pipes}


def alone(plan: Plan) -> Copies:
    return Copies(plan)
