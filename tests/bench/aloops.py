"""The loops of the systems that live in an event loop: loops.py with `await`, line by line.

The answers of the readers and the refs go through asyncio streams over the same kind of socket.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter, perf_counter_ns, process_time
from typing import Any

import torch

from bench.peers import AsyncOwnerPort, AsyncReaderPort, Cell
from bench.wire import CONFIRM, SOURCES, Tally, confirm, expected, make_sources, touch


class AsyncOwnerLoops:
    def __init__(self, cell: Cell, port: AsyncOwnerPort) -> None:
        self.cell = cell
        self.port = port
        self.sources = make_sources(cell.size)

    async def finish(self, phase: str, count: int) -> tuple[float, float]:
        await self.port.end()
        answers = await self.port.answer(CONFIRM.size)
        ended, cpu = perf_counter(), process_time()
        wanted = expected(self.sources, count, checked=phase == "verify")
        confirm(answers, wanted, phase)
        return ended, cpu

    async def run(self) -> dict[str, Any]:
        await self.pump("warm", 2 * self.cell.window)
        await self.pump("verify", 2 * SOURCES + 1)
        put_us = await self.calls()
        trip_us, trips = await self.trips()
        rate, count, cpu_s = await self.pipe()
        return {
            "put_us": put_us,
            "trip_us": trip_us,
            "trips": trips,
            "features_per_s": rate,
            "features": count,
            "cpu_s": cpu_s,
        }

    async def pump(self, phase: str, count: int) -> None:
        for n in range(count):
            await self.port.send(await self.port.put(self.sources[n % SOURCES]))
        await self.finish(phase, count)

    async def calls(self) -> float:
        times = []
        count = 0
        deadline = perf_counter() + self.cell.seconds / 4
        while perf_counter() < deadline or count == 0:
            tokens = []
            for _ in range(self.cell.burst):
                x = self.sources[count % SOURCES]
                began = perf_counter_ns()
                token = await self.port.put(x)
                times.append(perf_counter_ns() - began)
                tokens.append(token)
                count += 1
            for token in tokens:
                await self.port.send(token)
            await self.port.answer(1)
        await self.finish("calls", count)
        return median(times) / 1e3

    async def trips(self) -> tuple[float, int]:
        times = []
        count = 0
        deadline = perf_counter() + self.cell.seconds / 2
        while perf_counter() < deadline or count == 0:
            began = perf_counter_ns()
            await self.port.send(await self.port.put(self.sources[count % SOURCES]))
            await self.port.answer(1)
            times.append(perf_counter_ns() - began)
            count += 1
        await self.finish("trips", count)
        return median(times) / 1e3, count

    async def pipe(self) -> tuple[float, int, float]:
        count = 0
        cpu_began = process_time()
        began = perf_counter()
        deadline = began + self.cell.seconds
        while perf_counter() < deadline:
            await self.port.send(await self.port.put(self.sources[count % SOURCES]))
            count += 1
        ended, cpu_ended = await self.finish("pipe", count)
        return count / (ended - began), count, cpu_ended - cpu_began


class AsyncReaderLoops:
    def __init__(self, cell: Cell, port: AsyncReaderPort) -> None:
        self.cell = cell
        self.port = port

    async def run(self) -> dict[str, Any]:
        await self.drain()
        await self.verify()
        read_us = await self.calls()
        await self.trips()
        cpu_s = await self.drain()
        return {"read_us": read_us, "cpu_s": cpu_s}

    async def drain(self) -> float:
        cpu_began = process_time()
        tally = Tally()
        while (ref := await self.port.next()) is not None:
            tally.total += await self.port.use(ref, touch)
            tally.count += 1
        await self.port.answer(tally.pack())
        return process_time() - cpu_began

    async def verify(self) -> None:
        tally = Tally()
        while (ref := await self.port.next()) is not None:
            await self.port.use(ref, tally.check)
            tally.count += 1
        await self.port.answer(tally.pack())

    async def calls(self) -> float:
        inner = 0
        times = []
        tally = Tally()

        def timed_touch(x: torch.Tensor) -> float:
            nonlocal inner
            began = perf_counter_ns()
            value = touch(x)
            inner = perf_counter_ns() - began
            return value

        while (ref := await self.port.next()) is not None:
            began = perf_counter_ns()
            value = await self.port.use(ref, timed_touch)
            times.append(perf_counter_ns() - began - inner)
            tally.total += value
            tally.count += 1
            if tally.count % self.cell.burst == 0:
                await self.port.answer(b"\1")
        await self.port.answer(tally.pack())
        return median(times) / 1e3

    async def trips(self) -> None:
        tally = Tally()
        while (ref := await self.port.next()) is not None:
            tally.total += await self.port.use(ref, touch)
            tally.count += 1
            await self.port.answer(b"\1")
        await self.port.answer(tally.pack())
