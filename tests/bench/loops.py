"""The loops of the systems that have no event loop: blocking calls, one after the other.

Five phases: warm (all shared pages touched by the owner, every lazy thing made), verify (checksums),
calls (single calls timed: the owner puts a burst, then sends it, then waits), trips (one feature
at a time, every reader answers a byte), pipe (as many as go through). aloops.py is the same with
an event loop; the two are kept side by side line by line.
"""

from __future__ import annotations

import socket
from statistics import median
from time import perf_counter, perf_counter_ns, process_time
from typing import Any

import torch

from bench.peers import Cell, OwnerPort, ReaderPort, Sockets
from bench.wire import (
    CONFIRM,
    SOURCES,
    Tally,
    confirm,
    expected,
    make_sources,
    recv_exactly,
    touch,
)


class OwnerLoops:
    def __init__(self, cell: Cell, port: OwnerPort, socks: Sockets) -> None:
        self.cell = cell
        self.port = port
        self.socks = socks
        self.sources = make_sources(cell.size)

    def answers(self, nbytes: int) -> list[bytes]:
        return [recv_exactly(sock, nbytes) for sock in self.socks]

    def finish(self, phase: str, count: int) -> tuple[float, float]:
        """Ends a phase; the times (wall, CPU) at which all had confirmed; checks their answers."""
        self.port.end()
        answers = self.answers(CONFIRM.size)
        ended, cpu = perf_counter(), process_time()
        wanted = expected(self.sources, count, checked=phase == "verify")
        confirm(answers, wanted, phase)
        return ended, cpu

    def run(self) -> dict[str, Any]:
        self.pump("warm", 2 * self.cell.window)
        self.pump("verify", 2 * SOURCES + 1)
        put_us = self.calls()
        trip_us, trips = self.trips()
        rate, count, cpu_s = self.pipe()
        return {
            "put_us": put_us,
            "trip_us": trip_us,
            "trips": trips,
            "features_per_s": rate,
            "features": count,
            "cpu_s": cpu_s,
        }

    def pump(self, phase: str, count: int) -> None:
        for n in range(count):
            self.port.send(self.port.put(self.sources[n % SOURCES]))
        self.finish(phase, count)

    def calls(self) -> float:
        times = []
        count = 0
        deadline = perf_counter() + self.cell.seconds / 4
        while perf_counter() < deadline or count == 0:
            tokens = []
            for _ in range(self.cell.burst):
                x = self.sources[count % SOURCES]
                began = perf_counter_ns()
                token = self.port.put(x)
                times.append(perf_counter_ns() - began)
                tokens.append(token)
                count += 1
            for token in tokens:
                self.port.send(token)
            self.answers(1)
        self.finish("calls", count)
        return median(times) / 1e3

    def trips(self) -> tuple[float, int]:
        times = []
        count = 0
        deadline = perf_counter() + self.cell.seconds / 2
        while perf_counter() < deadline or count == 0:
            began = perf_counter_ns()
            self.port.send(self.port.put(self.sources[count % SOURCES]))
            self.answers(1)
            times.append(perf_counter_ns() - began)
            count += 1
        self.finish("trips", count)
        return median(times) / 1e3, count

    def pipe(self) -> tuple[float, int, float]:
        count = 0
        cpu_began = process_time()
        began = perf_counter()
        deadline = began + self.cell.seconds
        while perf_counter() < deadline:
            self.port.send(self.port.put(self.sources[count % SOURCES]))
            count += 1
        ended, cpu_ended = self.finish("pipe", count)
        return count / (ended - began), count, cpu_ended - cpu_began


class ReaderLoops:
    def __init__(self, cell: Cell, port: ReaderPort, sock: socket.socket) -> None:
        self.cell = cell
        self.port = port
        self.sock = sock

    def run(self) -> dict[str, Any]:
        self.drain()
        self.verify()
        read_us = self.calls()
        self.trips()
        cpu_s = self.drain()
        return {"read_us": read_us, "cpu_s": cpu_s}

    def drain(self) -> float:
        cpu_began = process_time()
        tally = Tally()
        while (ref := self.port.next()) is not None:
            tally.total += self.port.use(ref, touch)
            tally.count += 1
        self.sock.sendall(tally.pack())
        return process_time() - cpu_began

    def verify(self) -> None:
        tally = Tally()
        while (ref := self.port.next()) is not None:
            self.port.use(ref, tally.check)
            tally.count += 1
        self.sock.sendall(tally.pack())

    def calls(self) -> float:
        """The time of a read is that of all of it less that of the touch in the middle."""
        inner = 0
        times = []
        tally = Tally()

        def timed_touch(x: torch.Tensor) -> float:
            nonlocal inner
            began = perf_counter_ns()
            value = touch(x)
            inner = perf_counter_ns() - began
            return value

        while (ref := self.port.next()) is not None:
            began = perf_counter_ns()
            value = self.port.use(ref, timed_touch)
            times.append(perf_counter_ns() - began - inner)
            tally.total += value
            tally.count += 1
            if tally.count % self.cell.burst == 0:
                self.sock.sendall(b"\1")
        self.sock.sendall(tally.pack())
        return median(times) / 1e3

    def trips(self) -> None:
        tally = Tally()
        while (ref := self.port.next()) is not None:
            tally.total += self.port.use(ref, touch)
            tally.count += 1
            self.sock.sendall(b"\1")
        self.sock.sendall(tally.pack())
