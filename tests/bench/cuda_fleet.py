"""Starts the processes of one system of the CUDA benchmark and gathers their results.

A fleet is one owner and its readers, started together (spawn): to start one takes longer than to
measure a size, so it runs all sizes in turn over one pool. Each process says that it is ready, then
what it saw of each size. When something breaks or stands still the fleet is killed and the size says
why; the sizes that are left get a new fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing as mp
import multiprocessing.connection as mpc
import re
import resource
import socket
import statistics
import sys
import time
import traceback
from typing import Any

import torch

from bench import wire
from bench.aiowire import open_wire
from bench.cuda_loops import Handles, Outcome, OwnerLoops, ReaderLoops
from bench.cuda_ports import Plan, Sockets
from bench.cuda_wire import Inbox, Lines, LoopInbox, LoopLines, SocketLines
from bench.harness import run_loop
from bench.quiet import pin, quickest

OWNER = -1
START_PATIENCE_S = 90.0


async def run_owner(
    plan: Plan, socks: Sockets, credit: Sockets, pipe: mpc.Connection, cpu: int | None
) -> Outcome:
    port = await plan.entry.load().owner(plan, credit)
    try:
        for sock in socks:
            wire.send_frame(sock, port.hello)
        for sock in socks:  # in a thread: a reader's session begins in the loop here
            await asyncio.to_thread(wire.recv_exactly, sock, 1)
        lines: Lines = SocketLines(socks)
        if plan.entry.is_async:
            lines = LoopLines([await open_wire(sock) for sock in socks])
        loops = OwnerLoops(plan, port, lines)
        pin(cpu)
        pipe.send({"ready": True})
        for size in plan.sizes:
            pipe.send(await loops.run(size))
        if plan.entry.is_async:
            await lines.take(1)
        else:
            for sock in socks:
                await asyncio.to_thread(wire.recv_exactly, sock, 1)
    finally:
        await port.close()
    return {"closed": True}


async def run_reader(
    plan: Plan,
    index: int,
    sock: socket.socket,
    credit: socket.socket,
    pipe: mpc.Connection,
    cpu: int | None,
) -> Outcome:
    hello = wire.recv_frame(sock)
    port = await plan.entry.load().reader(plan, index, hello, credit)
    try:
        sock.sendall(b"\1")
        handles: Handles = Inbox(sock)
        if plan.entry.is_async:
            handles = LoopInbox(await open_wire(sock))
        loops = ReaderLoops(plan, port, handles)
        pin(cpu)
        pipe.send({"ready": True})
        for size in plan.sizes:
            pipe.send(await loops.run(size))
    finally:
        await port.close()
    handles.write(b"\1")
    await asyncio.sleep(0.01)  # some loops write once a turn
    return {"closed": True}


async def run_alone(plan: Plan, pipe: mpc.Connection, cpu: int | None) -> Outcome:
    system = plan.entry.load().alone(plan)
    pin(cpu)
    pipe.send({"ready": True})
    for size in plan.sizes:
        pipe.send(system.run(size))
    return {"closed": True}


def child(
    index: int,
    plan: Plan,
    socks: Sockets,
    credit: Sockets,
    pipe: mpc.Connection,
    cpu: int | None,
) -> None:
    """The main function of every process of a fleet."""
    torch.set_num_threads(plan.threads)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # sglang 0.5.11: one for each feature
    try:
        if plan.entry.alone:
            main = run_alone(plan, pipe, cpu)
        elif index == OWNER:
            main = run_owner(plan, socks, credit, pipe, cpu)
        else:
            main = run_reader(plan, index, socks[0], credit[0], pipe, cpu)
        pipe.send(run_loop(main))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
        if not isinstance(error, ConnectionError):  # which another process's error brings about
            traceback.print_exc()
        pipe.send({"error": f"{who(index)}: {short(error)}"})
        raise SystemExit(1) from None


def who(index: int) -> str:
    return "owner" if index == OWNER else f"reader {index}"


def short(error: BaseException) -> str:
    """One line, with no path of this machine in it."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return re.sub(r"(?<![\w.])/[^\s:'\"]*/", "", text[-1] if text else type(error).__name__)[:300]


class Fleet:
    def __init__(self, plan: Plan) -> None:
        context = mp.get_context("spawn")
        readers = range(0 if plan.entry.alone else plan.readers)
        wires, credits_ = ([socket.socketpair() for _ in readers] for _ in range(2))
        self.pipes: dict[int, mpc.Connection] = {}
        self.processes = []
        cpus = dict(zip((OWNER, *readers), quickest(1 + len(readers)), strict=False))
        for index in (OWNER, *readers):
            mine, credit = (
                [near for near, _ in pairs] if index == OWNER else [pairs[index][1]]
                for pairs in (wires, credits_)
            )
            pipe, far = context.Pipe(duplex=False)
            arguments = (index, plan, mine, credit, far, cpus.get(index))
            process = context.Process(target=child, args=arguments, daemon=True)
            process.start()
            far.close()
            self.processes.append(process)
            self.pipes[index] = pipe
        for ends in (*wires, *credits_):
            for sock in ends:
                sock.close()

    def hear(self, patience_s: float) -> dict[int, Outcome]:
        """One message of each process; the error of one of them raises."""
        deadline = time.monotonic() + patience_s
        said: dict[int, Outcome] = {}
        while len(said) < len(self.pipes):
            waiting: dict[Any, int] = {
                pipe: index for index, pipe in self.pipes.items() if index not in said
            }
            ready = mpc.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = ", ".join(map(who, waiting.values()))
                raise FleetError(f"nothing for {patience_s:.0f} s from {silent}: killed")
            for pipe in waiting.keys() & ready:
                index = waiting[pipe]
                try:
                    said[index] = pipe.recv()
                except EOFError:
                    raise FleetError(f"{who(index)} died") from None
                if "error" in said[index]:
                    raise FleetError(self._cause(said[index]["error"]))
        return said

    def _cause(self, error: str) -> str:
        """The error that the others follow from: when one process breaks the wires of all do."""
        errors = [error]
        deadline = time.monotonic() + 1
        for pipe in self.pipes.values():
            with contextlib.suppress(EOFError, OSError):
                while pipe.poll(max(0.0, deadline - time.monotonic())):
                    errors.append(pipe.recv().get("error", ""))
        broken = ("Connection", "BrokenPipe")
        causes = [one for one in errors if one and not any(word in one for word in broken)]
        return (causes or errors)[0]

    def close(self, *, kill: bool) -> None:
        for process in self.processes:
            if not kill:
                process.join(15)
            if process.is_alive():
                process.kill()
            process.join(15)
        for pipe in self.pipes.values():
            with contextlib.suppress(OSError):
                pipe.close()


class FleetError(Exception):
    """A fleet broke or stood still."""


def merge(said: dict[int, Outcome]) -> Outcome:
    """The owner's result for a size, with the median of the readers' times."""
    outcome = said[OWNER]
    readers = [said[index] for index in sorted(said) if index != OWNER]
    if readers:
        outcome |= middle(readers)
        for at, pipe in enumerate(outcome["pipes"]):
            pipe.update(middle([reader["pipes"][at] for reader in readers]))
    return outcome


def middle(outcomes: list[Outcome]) -> Outcome:
    names = [name for name, value in outcomes[0].items() if isinstance(value, float)]
    return {name: statistics.median_high(one[name] for one in outcomes) for name in names}


def run_plan(plan: Plan, ends_at_s: float) -> dict[int, Outcome]:
    """One outcome for each size; `ends_at_s` is when the whole benchmark must have ended."""
    reason = plan.entry.load().missing(plan)
    if reason is not None:
        return {size: {"skipped": reason} for size in plan.sizes}
    outcomes: dict[int, Outcome] = {}
    while left := tuple(size for size in plan.sizes if size not in outcomes):
        if time.monotonic() > ends_at_s:
            return outcomes | {size: {"error": "not run: the time was up"} for size in left}
        outcomes |= run_fleet(dataclasses.replace(plan, sizes=left))
    return outcomes


def run_fleet(plan: Plan) -> dict[int, Outcome]:
    """The outcomes of the sizes that one fleet came to, the last of them perhaps an error."""
    outcomes: dict[int, Outcome] = {}
    patience_s = 20 + 3 * plan.seconds * (plan.rounds + 1)
    fleet = Fleet(plan)
    failed, began = True, False
    try:
        fleet.hear(START_PATIENCE_S)
        began = True
        for size in plan.sizes:
            outcomes[size] = merge(fleet.hear(patience_s))
        failed = False
    except FleetError as error:
        print(f"{plan.system}, {plan.readers} reader(s): {error}", file=sys.stderr)
        left = [size for size in plan.sizes if size not in outcomes]
        outcomes |= {size: {"error": str(error)} for size in (left[:1] if began else left)}
    finally:
        fleet.close(kill=failed)
    return outcomes
