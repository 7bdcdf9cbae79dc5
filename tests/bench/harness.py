"""Starts the processes of a cell and gathers their results.

A fleet is one owner and its readers, started together (spawn), with one Unix socket (a stream
pair) between the owner and each reader for every cell. It runs its cells one after the other and
ends. When something breaks or stands still, the fleet is killed and its cell says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing as mp
import multiprocessing.connection as mpc
import socket
import sys
import time
import traceback
from collections.abc import Coroutine
from typing import Any

import torch

from bench import wire
from bench.aiowire import open_wire
from bench.aloops import AsyncOwnerLoops, AsyncReaderLoops
from bench.loops import OwnerLoops, ReaderLoops
from bench.peers import SYSTEMS, Cell, Sockets

Outcome = dict[str, Any]
OWNER = -1


def run_owner(cell: Cell, socks: Sockets, shared: Any) -> Outcome:
    port = SYSTEMS[cell.system].load().owner(cell, socks, shared)
    try:
        for sock in socks:
            wire.send_frame(sock, port.hello)
        for sock in socks:
            wire.recv_exactly(sock, 1)
        outcome = OwnerLoops(cell, port, socks).run()
        for sock in socks:
            wire.recv_exactly(sock, 1)
    finally:
        port.close()
    return outcome


def run_reader(cell: Cell, index: int, socks: Sockets, shared: Any) -> Outcome:
    (sock,) = socks
    hello = wire.recv_frame(sock)
    peer = SYSTEMS[cell.system].load()
    make = peer.blocking_reader if SYSTEMS[cell.system].blocking_reader else peer.reader
    port = make(cell, index, sock, hello, shared)
    try:
        sock.sendall(b"\1")
        outcome = ReaderLoops(cell, port, sock).run()
    finally:
        port.close()
    sock.sendall(b"\1")
    return outcome


async def arun(cell: Cell, index: int, socks: Sockets) -> Outcome:
    """The same for a system with an event loop; the greeting goes before the wires are made."""
    peer = SYSTEMS[cell.system].load()
    if index == OWNER:
        wires = [await open_wire(sock) for sock in socks]
        owner = await peer.owner(cell, wires)
        try:
            for connection in wires:
                connection.write(wire.LENGTH.pack(len(owner.hello)) + owner.hello)
            await owner.answer(1)
            outcome = await AsyncOwnerLoops(cell, owner).run()
            await owner.answer(1)
        finally:
            await owner.close()
        return outcome
    hello = wire.recv_frame(socks[0])
    wires = [await open_wire(sock) for sock in socks]
    reader = await peer.reader(cell, index, wires, hello)
    try:
        await reader.answer(b"\1")
        outcome = await AsyncReaderLoops(cell, reader).run()
    finally:
        await reader.close()
    await reader.answer(b"\1")
    return outcome


def run_loop(main: Coroutine[Any, Any, Outcome]) -> Outcome:
    """Uvloop where it is installed, as model servers run; it also writes once a turn of the loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main)


def run_cell(cell: Cell, index: int, socks: Sockets, shared: Any) -> Outcome:
    torch.set_num_threads(cell.threads)
    entry = SYSTEMS[cell.system]
    if entry.is_async and (index == OWNER or not entry.blocking_reader):
        return run_loop(arun(cell, index, socks))
    if index == OWNER:
        return run_owner(cell, socks, shared)
    return run_reader(cell, index, socks, shared)


def child(index: int, work: list[tuple[Cell, Sockets, Any]], pipe: mpc.Connection) -> None:
    """The main function of every process of a fleet."""
    for cell, socks, shared in work:
        try:
            outcome = run_cell(cell, index, socks, shared)
        except BaseException:  # noqa: BLE001 - whatever it is, the host is told
            pipe.send({"error": traceback.format_exc()})
            raise SystemExit(1) from None
        pipe.send(outcome)
        for sock in socks:
            sock.close()


class Fleet:
    def __init__(self, cells: list[Cell]) -> None:
        context = mp.get_context("spawn")
        self.cells = cells
        readers = range(cells[0].readers)
        self.shared = [SYSTEMS[cell.system].load().shared(cell) for cell in cells]
        pairs = [[socket.socketpair() for _ in readers] for _ in cells]
        self.processes: dict[int, Any] = {}
        self.pipes: dict[int, mpc.Connection] = {}
        for index in (OWNER, *readers):
            mine = [
                [ours for ours, _ in pair] if index == OWNER else [pair[index][1]] for pair in pairs
            ]
            pipe, far = context.Pipe(duplex=False)
            work = list(zip(cells, mine, self.shared, strict=True))
            process = context.Process(target=child, args=(index, work, far), daemon=True)
            process.start()
            far.close()
            self.processes[index] = process
            self.pipes[index] = pipe
        for pair in pairs:
            for ends in pair:
                for sock in ends:
                    sock.close()

    def result(self, cell: Cell, patience: float) -> Outcome:
        """The results of owner and readers for a cell, with an `error` when one of them failed."""
        deadline = time.monotonic() + patience
        said: dict[int, Outcome] = {}
        while len(said) < len(self.pipes):
            waiting: dict[Any, int] = {
                pipe: index for index, pipe in self.pipes.items() if index not in said
            }
            ready = mpc.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                return {"error": f"nothing for {patience:.0f} s from {sorted(waiting.values())}"}
            for pipe in waiting.keys() & ready:
                index = waiting[pipe]
                try:
                    said[index] = pipe.recv()
                except EOFError:
                    said[index] = {"error": f"process {index} died"}
                if "error" in said[index]:
                    return said[index]
        outcome = said[OWNER]
        read_us = sorted(said[index]["read_us"] for index in range(cell.readers))
        outcome["read_us"] = read_us[len(read_us) // 2]
        cpu_s = sum(process["cpu_s"] for process in said.values())
        outcome["cpu_us"] = 1e6 * cpu_s / outcome["features"]
        return outcome

    def close(self, *, kill: bool) -> None:
        for process in self.processes.values():
            if not kill:
                process.join(10)
            if process.is_alive():
                process.kill()
            process.join(10)
        for pipe in self.pipes.values():
            with contextlib.suppress(OSError):
                pipe.close()


def run_cells(cells: list[Cell], patience: float = 60.0) -> list[Outcome]:
    """Runs cells of one number of readers in one fleet; one outcome for each, in their order."""
    outcomes: dict[Cell, Outcome] = {}
    for cell in cells:
        reason = SYSTEMS[cell.system].load().missing(cell)
        if reason is not None:
            outcomes[cell] = {"skipped": reason}
    while left := [cell for cell in cells if cell not in outcomes]:
        fleet = Fleet(left)
        failed = False
        for cell in left:
            outcomes[cell] = fleet.result(cell, patience + 3 * cell.seconds)
            if failed := "error" in outcomes[cell]:
                print(f"{describe(cell)}: {outcomes[cell]['error']}", file=sys.stderr)
                break
        fleet.close(kill=failed)
    return [outcomes[cell] for cell in cells]


def describe(cell: Cell) -> str:
    return f"{cell.system}, {cell.readers} reader(s), {cell.size} B"


def cell_record(cell: Cell) -> dict[str, Any]:
    record = dataclasses.asdict(cell)
    del record["vllm_file"]
    return record
