"""The two loops of the CUDA benchmark: owner and readers with one size of feature.

The phases: warm; verify (every byte of every feature); alone (one feature at a time: the reader
synchronises and answers a byte before the next is put); pipe, as often as there are rounds (as many
as go through, some of them sampled). While features stream nobody waits for the GPU but the pool.
"""

from __future__ import annotations

import asyncio
from time import perf_counter, perf_counter_ns
from typing import Any, Protocol

import numpy as np
import torch

from bench.cuda_ports import OwnerPort, Plan, ReaderPort
from bench.cuda_wire import (
    CONFIRM,
    SAMPLE_EVERY,
    SOURCES,
    Lines,
    Outbox,
    Sampler,
    make_sources,
    source_of,
    synchronize,
)
from bench.wire import WrongContent

Outcome = dict[str, Any]
VERIFIED = 3 * SOURCES + 1
NEVER = 1 << 62


def spread(name: str, times_ns: list[int]) -> dict[str, float]:
    """Median and 90th percentile in microseconds."""
    if not times_ns:
        return {}
    p50, p90 = np.percentile(times_ns, [50, 90]) / 1e3
    return {f"{name}_us_p50": float(p50), f"{name}_us_p90": float(p90)}


class OwnerLoops:
    def __init__(self, plan: Plan, port: OwnerPort, lines: Lines) -> None:
        self.plan = plan
        self.port = port
        self.lines = lines

    async def run(self, size: int) -> Outcome:
        self.sources = make_sources(size, self.plan.torch_device)
        synchronize(self.plan.torch_device)
        self.wrong: list[str] = []
        self.sampled = 0
        await self.stream("warm", self.plan.seconds / 4)
        await self.stream("verify", NEVER, VERIFIED)
        alone = await self.alone()
        pipes = [await self.stream("pipe", self.plan.seconds) for _ in range(self.plan.rounds)]
        outcome = alone | {
            "pipes": pipes,
            "sampled": self.sampled,
        }
        return outcome | ({"wrong": "; ".join(self.wrong)} if self.wrong else {})

    async def stream(self, phase: str, seconds: float, most: int = NEVER) -> Outcome:
        port, sources, times_ns = self.port, self.sources, list[int]()
        # A put that waits must not wait for features whose handles are still here.
        batch = min(self.plan.batch, max(1, self.plan.window(sources[0].nbytes) // 4))
        outbox = Outbox(self.lines, self.plan.readers, batch)
        count = waited = 0
        began = perf_counter()
        deadline = began + seconds
        while count < most and perf_counter() < deadline:
            x = sources[source_of(count)]
            put_ns = perf_counter_ns()
            token = port.put_nowait(x) if port.nowait else await port.put(x)
            if token is not None:
                times_ns.append(perf_counter_ns() - put_ns)
            else:
                waited += 1
                outbox.flush()
                token = await port.put(x)
            outbox.add(port.encode(token))
            count += 1
        outbox.end()
        await self.lines.take(1)
        seconds_taken = perf_counter() - began
        await self.confirm(phase, count)
        return {
            "features_per_s": count / seconds_taken,
            "features": count,
            "waited": waited,
            **spread("put", times_ns),
        }

    async def confirm(self, phase: str, count: int) -> None:
        """A reader that missed a feature ends the cell; wrong bytes are counted."""
        looked = wrong = 0
        for index, data in enumerate(await self.lines.take(CONFIRM.size)):
            seen, looked_here, wrong_here = CONFIRM.unpack(data)
            if seen != count:
                raise WrongContent(f"{phase}: reader {index} saw {seen} of {count} features")
            looked += looked_here
            wrong += wrong_here
        self.sampled += looked
        if wrong:
            self.wrong.append(f"{phase}: {wrong} of {looked} reads that were looked at")

    async def alone(self) -> Outcome:
        port = self.port
        puts_ns, trips_ns = list[int](), list[int]()
        outbox = Outbox(self.lines, self.plan.readers, 1)
        count = 0
        deadline = perf_counter() + self.plan.seconds / 2
        while perf_counter() < deadline:
            x = self.sources[source_of(count)]
            began_ns = perf_counter_ns()
            token = port.put_nowait(x) if port.nowait else await port.put(x)
            if token is not None:
                puts_ns.append(perf_counter_ns() - began_ns)
            else:
                began_ns = NEVER
                token = await port.put(x)
            outbox.add(port.encode(token))
            await self.lines.take(1)
            if began_ns != NEVER:  # a trip that had to wait for a recycler is none
                trips_ns.append(perf_counter_ns() - began_ns)
            count += 1
        outbox.end()
        await self.lines.take(1)
        await self.confirm("alone", count)
        return spread("put_alone", puts_ns) | spread("trip", trips_ns) | {"trips": len(trips_ns)}


class Handles(Protocol):
    """Where a reader's handles come from, and its answers go."""

    async def frame(self) -> bytes:
        """The next handle; nothing at the end of a phase."""

    def ready(self) -> bool: ...
    def write(self, data: bytes) -> None: ...


class ReaderLoops:
    def __init__(self, plan: Plan, port: ReaderPort, handles: Handles) -> None:
        self.plan = plan
        self.port = port
        self.handles = handles
        self.device = plan.torch_device

    async def run(self, size: int) -> Outcome:
        self.sources = make_sources(size, self.device)
        self.sampler = Sampler(self.sources)
        await self.drain()
        await self.verify()
        alone_ns = await self.alone()
        pipes_ns = [await self.drain() for _ in range(self.plan.rounds)]
        return spread("get_alone", alone_ns) | {"pipes": [spread("get", ns) for ns in pipes_ns]}

    async def next(self) -> Any | None:
        if not self.handles.ready():
            self.port.dry()
        data = await self.handles.frame()
        return self.port.parse(data) if data else None

    def confirm(self, count: int, looked: int, wrong: int) -> None:
        self.handles.write(CONFIRM.pack(count, looked, wrong))

    async def finish(self) -> None:
        """Says that the last feature is here: the owner stops its clock."""
        self.port.dry()
        synchronize(self.device)
        self.handles.write(b"\1")
        await asyncio.sleep(0)  # some loops write once a turn

    async def drain(self) -> list[int]:
        port, sampler, times_ns = self.port, self.sampler, list[int]()
        handles, parse = self.handles, port.parse
        sampler.count = count = 0
        while True:
            if not handles.ready():
                port.dry()
            data = await handles.frame()
            if not data:
                break
            ref = parse(data)
            began_ns = perf_counter_ns()
            x = port.take(ref) if port.nowait else await port.take_async(ref)
            taken_ns = perf_counter_ns()
            if count % SAMPLE_EVERY == 0:
                sampler.take(x)
            give_ns = perf_counter_ns()
            port.give()
            times_ns.append(taken_ns - began_ns + perf_counter_ns() - give_ns)
            del x
            count += 1
        await self.finish()
        self.confirm(count, sampler.count, sampler.wrong())
        return times_ns

    async def verify(self) -> None:
        port = self.port
        count = wrong = 0
        while (ref := await self.next()) is not None:
            x = port.take(ref) if port.nowait else await port.take_async(ref)
            wrong += not torch.equal(x, self.sources[source_of(count)])
            port.give()
            count += 1
        await self.finish()
        self.confirm(count, count, wrong)

    async def alone(self) -> list[int]:
        port, times_ns = self.port, list[int]()
        while (ref := await self.next()) is not None:
            began_ns = perf_counter_ns()
            x = port.take(ref) if port.nowait else await port.take_async(ref)
            port.give()
            times_ns.append(perf_counter_ns() - began_ns)
            synchronize(self.device)
            port.dry()
            self.handles.write(b"\1")
            del x
        await self.finish()
        self.confirm(len(times_ns), 0, 0)
        return times_ns
