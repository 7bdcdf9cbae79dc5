"""featcache at its main job: image features for four tensor-parallel ranks, each put once.

    python examples/demo [--images FILE...] [--device cpu|cuda] [--capacity 64MiB] [--repeat N]
    python examples/demo --hosts [...]      # the ranks on another host, over NIXL: make demo-hosts

This process owns the pool. It cuts pictures into patches as Qwen2-VL does, puts each picture's
patches, and sends the ref to four rank processes. Each rank multiplies them with its quarter of a
patch embedding; the shards come back here and must make the product that one process computes.
The pool holds less than all the features together, so puts wait for the ranks: that is the point.
"""

import argparse
import multiprocessing
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from importlib.util import find_spec
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import anyio
import torch
from anyio import to_thread

import featcache
import rank
from hosts import NoHosts, TwoHosts, two_hosts
from images import BadPicture, choose
from owner import PATIENCE, Demo, Sample, prepare
from rank import RANKS, Attached, Wire, log_events
from report import Outcome, Progress, summary, table


class RankLost(Exception):
    """A rank's process ended before its work did."""


class Interrupted(Exception):
    """A signal asked the demo to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@asynccontextmanager
async def ranks(
    endpoint: str, devices: Sequence[str], network: str | None, *, verbose: bool
) -> AsyncIterator[list[Wire]]:
    """The rank processes, attached, each behind a socket. They end when the sockets close."""
    wires: list[Wire] = []
    processes: list[SpawnProcess] = []
    try:
        for number, device in enumerate(devices):
            ours, theirs = socket.socketpair()
            wires.append(await Wire.open(ours))
            with theirs:
                processes.append(start(number, endpoint, device, theirs, verbose, network))
        with anyio.fail_after(PATIENCE):
            for wire in wires:
                await wire.receive(Attached)
        yield wires
    finally:
        for wire in wires:
            wire.close()
        with anyio.CancelScope(shield=True):
            for process in processes:
                await to_thread.run_sync(stop, process)
        lost = [process for process in processes if process.exitcode]
        if lost:  # the cause of any other error
            codes = [f"{process.name} ended with exit code {process.exitcode}" for process in lost]
            raise RankLost(", ".join(codes))


def start(*arguments: Any) -> SpawnProcess:
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=rank.main, args=arguments, name=f"tp{arguments[0]}", daemon=True)
    # It begins with ctrl-c ignored: that is for this process, which then closes the sockets.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, handler)
    return process


def stop(process: SpawnProcess) -> None:
    process.join(10)  # it may still be on its way to its socket
    if process.is_alive():
        process.kill()
        process.join()


async def stop_on_signal() -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            raise Interrupted(number)


async def run(
    options: argparse.Namespace,
    devices: Sequence[str],
    samples: list[Sample],
    progress: Progress,
    hosts: TwoHosts | None,
) -> Outcome:
    outcome = Outcome(
        rows=[sample.row for sample in samples],
        devices=f"owner on {devices[0]}, ranks on {', '.join(devices)}",
        hosts="one" if hosts is None else hosts.what,
    )
    listen, network = (None, None) if hosts is None else (hosts.listen, hosts.network)
    async with anyio.create_task_group() as guard:
        guard.start_soon(stop_on_signal)
        async with (
            featcache.create(device=devices[0], capacity=options.capacity, listen=listen) as cache,
            ranks(
                cache.endpoint if hosts is None else hosts.endpoint,
                *(devices, network),
                verbose=options.verbose,
            ) as wires,
        ):
            await Demo(cache, wires, samples, outcome, progress, options.repeat).run()
        guard.cancel_scope.cancel()
    return outcome


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="examples/demo",
        description="image features for four tensor-parallel ranks, each put once",
    )
    add = parser.add_argument
    add("--images", nargs="+", type=Path, default=[], metavar="FILE", help="instead of the shipped")
    able = torch.cuda.is_available() and find_spec("cuda") and find_spec("cuda.bindings")
    found = "cuda" if able else "cpu"
    add("--device", choices=["cpu", "cuda"], default=found, help="default here: %(default)s")
    add("--capacity", default="64MiB", metavar="SIZE", help="of the pool (default: %(default)s)")
    add("--hosts", action="store_true", help="have the ranks on another host; in host memory")
    add("--repeat", type=int, default=1, metavar="N", help="times that each image is put")
    add("-v", "--verbose", action="store_true", help="show the events that featcache logs")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be 1 or more")
    if options.hosts:
        options.device = "cpu"  # pools on GPUs are not read from other hosts yet
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group of groups."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in leaves(inner)]


def explain(group: BaseExceptionGroup) -> int:
    """Print the reason why the run stopped; return the exit code for it."""
    errors = leaves(group)
    for error in errors:
        if isinstance(error, Interrupted):
            print(f"demo: {error}", file=sys.stderr)
            return error.code
    if not all(isinstance(error, featcache.FeatcacheError | RankLost) for error in errors):
        raise group
    for error in errors:
        print(f"demo: {error}", file=sys.stderr)
    return 1


def main() -> int:
    options = arguments()
    log_events(verbose=options.verbose)
    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    devices = [f"cuda:{number % gpus}" if gpus else "cpu" for number in range(RANKS)]
    progress = Progress()
    try:
        samples = prepare(choose(options.images), devices[0], progress)
        with two_hosts(options.capacity) if options.hosts else nullcontext() as hosts:
            outcome = anyio.run(run, options, devices, samples, progress, hosts)
    except BadPicture as error:
        progress.clear()
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except NoHosts as error:
        progress.clear()
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.clear()
        return 128 + signal.SIGINT
    except BaseExceptionGroup as group:
        progress.clear()
        return explain(group)
    progress.clear()
    print(table(outcome.rows), summary(outcome), sep="\n\n")
    return 1 if outcome.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
