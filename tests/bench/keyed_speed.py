"""Reading by key: the cost of a hit to a client and its owner, beside other systems.

    PYTHONPATH=src python tests/bench/keyed_speed.py --out tests/bench/results/keyed-speed.json

One owner process and four clients, each an asyncio program (uvloop, where it is installed). For each
size it measures, in turns that begin with another system each round:

- one client, one hit at a time, a middle time for each round: `get(key)`, `borrow(key)` and its release;
  a bare echo of as many bytes as a lookup and its answer have, over an anyio Unix socket between the
  same two processes (the floor of a round trip); the copy alone, from the same warm pages of the slab;
  Redis `GET` of the same bytes over its Unix socket, by a client that does the least there is to do and
  by redis-py (what each does is said in keyed_redis.py);
- all clients at once, each with `--flight` gets under way: hits per second of all together. The echo's
  and Redis's requests in flight go with one system call;
- a put by a client beside a put by the owner, one at a time, each released before the next;
- the CPU time of the owner's process for a lookup: all that it does meanwhile, recycling too.

Then Ray's object store, if it is installed, after the others: its processes are busy whenever it runs.
Every byte of every feature is compared before anything is timed, and the ends of some later on.

A figure is the median over the rounds, a ratio the median of the rounds' own ratios. With
`--device cuda:0` the slab is on a GPU: a time is then until the bytes are there (`synchronize`), and
only the echo and the copy are beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import crew, keyed_ray, keyed_redis, machine, resultfile
from bench.crew import Crew
from bench.host import parse_sizes
from bench.keyed_fleet import (
    BARE_REDIS,
    BORROW,
    COPY,
    ECHO,
    GET,
    GET_OUT,
    REDIS_PY,
    REDIS_PY_SINGLY,
    Hand,
    Plan,
    client,
    commit,
    feature_of,
    key_of,
    owner,
    wire_bytes,
)
from bench.quiet import quickest
from bench.report import number, size_name, table

ROUND_TRIP = 1.6
"""most that a get may take, in echoes, without the copy"""
OVER_REDIS = {64 << 10: 10, 1 << 20: 30}
"""times Redis's hits per second, pipelined, by size"""
OWNER_US = 30.0
PUT_SIZE = 1 << 20
Cells = dict[str, dict[str, dict[str, Any]]]
"""By size, by system."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="the slab's, and its clients'")
    parser.add_argument("--sizes", type=parse_sizes, default=parse_sizes("4KiB,64KiB,1MiB"))
    parser.add_argument("--keys", type=int, default=16, help="features of each size")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--flight", type=int, default=16, help="gets under way in each client")
    parser.add_argument("--rounds", type=int, default=20, help="one at a time, and puts")
    parser.add_argument("--count", type=int, default=100, help="calls of a round")
    parser.add_argument("--pipe-rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a pipelined round")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--redis", help="redis-server, if it is not on the path; 'none': without")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    return parser.parse_args(argv)


class Bench:
    """The processes and their results."""

    def __init__(
        self, options: argparse.Namespace, plan: Plan, redis: keyed_redis.Served | None
    ) -> None:
        self.options = options
        self.plan = plan
        self.redis = redis
        self.cells: Cells = {str(size): {} for size in plan.sizes}
        self.puts: dict[str, dict[str, list[float]]] = {}

    async def start(self, crew: Crew) -> None:
        plan = self.plan
        cpus: list[int | None] = [*quickest(1 + plan.clients)] or [None] * (1 + plan.clients)
        self.owner = Hand(owner, plan, cpu=cpus[0])
        crew._children.append(self.owner)
        (endpoint,) = await self.owner.expect("ready")
        self.clients = [
            Hand(client, plan, index, endpoint, cpu=cpu) for index, cpu in enumerate(cpus[1:])
        ]
        crew._children += self.clients
        for one in self.clients:
            (self.systems,) = await one.expect("ready")

    async def measure(self) -> None:
        options, sizes = self.options, self.plan.sizes
        for turn in range(options.rounds):
            for size in sizes:
                await self.alone(size, turn)
                await self.one_put(size)
            if turn * options.pipe_rounds // options.rounds != (
                (turn + 1) * options.pipe_rounds // options.rounds
            ):
                for size in sizes:
                    await self.pipelined(size, turn)
                print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
        for size in sizes:
            await self.owner_alone(size)
        for one in (*self.clients, self.owner):
            one.tell("end", 0)
            await one.ends()

    def note(self, size: int, system: str, figure: str, value: float) -> None:
        self.cells[str(size)].setdefault(system, {}).setdefault(figure, []).append(value)

    async def alone(self, size: int, turn: int) -> None:
        at = turn % len(self.systems)
        names = self.systems[at:] + self.systems[:at]
        (found,) = await self.clients[0].ask("alone", size, names, self.options.count)
        for name, (returned_us, done_us) in found.items():
            self.note(size, name, "us", done_us)
            if self.plan.device != "cpu":
                self.note(size, name, "returned_us", returned_us)

    async def one_put(self, size: int) -> None:
        cell = self.puts.setdefault(str(size), {})
        for name, who in (("owner_us", self.owner), ("client_us", self.clients[0])):
            (us,) = await who.ask("puts", size, self.options.count)
            cell.setdefault(name, []).append(us)
        cell.setdefault("echo_us", []).append(self.cells[str(size)][ECHO]["us"][-1])

    async def cpu_s(self) -> float:
        (seconds,) = await self.owner.ask("cpu", 0)
        return float(seconds)

    async def pipelined(self, size: int, turn: int) -> None:
        at = turn % len(self.systems)
        for name in self.systems[at:] + self.systems[:at]:
            redis = self.redis if name in {BARE_REDIS, REDIS_PY, REDIS_PY_SINGLY} else None
            server_s = redis.cpu_s() if redis else 0.0
            cpu_s = await self.cpu_s()
            for one in self.clients:
                one.tell("pipe", size, name, self.options.seconds)
            took = [await one.expect("pipe") for one in self.clients]
            cpu_s = await self.cpu_s() - cpu_s
            server_s = redis.cpu_s() - server_s if redis else cpu_s
            hits = sum(count for count, _, _ in took)
            self.note(size, name, "hits_per_s", sum(count / s for count, s, _ in took))
            all_s = server_s + sum(client_s for _, _, client_s in took)
            self.note(size, name, "cpu_us", 1e6 * all_s / hits)
            if name in {GET, GET_OUT, BORROW, ECHO}:
                self.note(size, name, "owner_cpu_us", 1e6 * cpu_s / hits)

    async def owner_alone(self, size: int) -> None:
        """The owner's CPU time of a lookup that comes alone: with a turn of its loop for each."""
        for name in (GET, BORROW, ECHO):
            for _ in range(5):
                cpu_s, count = await self.cpu_s(), 10 * self.options.count
                await self.clients[0].ask("alone", size, [name], count)
                cpu_s = await self.cpu_s() - cpu_s
                self.note(size, name, "owner_cpu_alone_us", 1e6 * cpu_s / count)


def middle(values: list[float]) -> float:
    return round(statistics.median(values), 2)


def ratio(values: list[float], bounds: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return round(
        statistics.median(value / bound for value, bound in zip(values, bounds, strict=True)), 3
    )


def goal(what: str, size: int | None, value: float, bound: float, *, most: bool) -> dict[str, Any]:
    return {
        "goal": what,
        "size": size,
        "value": value,
        "bound": bound,
        "reached": value <= bound if most else value >= bound,
    }


def goals(cells: Cells, puts: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """The goals and the values found; a value is a median of the rounds' own ratios."""
    return [
        *(one for size, cell in cells.items() for one in _alone_goals(int(size), cell)),
        *(one for size, cell in cells.items() for one in _pipe_goals(int(size), cell)),
        *(_put_goal(int(size), put) for size, put in puts.items()),
        *(one for size, cell in cells.items() for one in _owner_goals(int(size), cell)),
    ]


def _alone_goals(size: int, cell: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    echoes, copies = cell[ECHO]["us"], cell[COPY]["us"]
    bounds = [ROUND_TRIP * echo + copy for echo, copy in zip(echoes, copies, strict=True)]
    what = "one get at a time, over 1.6 echoes and the copy"
    yield goal(what, size, ratio(cell[GET]["us"], bounds), 1.0, most=True)
    bounds = [ROUND_TRIP * echo for echo in echoes]
    what = "one borrow at a time, over 1.6 echoes"
    yield goal(what, size, ratio(cell[BORROW]["us"], bounds), 1.0, most=True)


def _pipe_goals(size: int, cell: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    times = OVER_REDIS.get(size)
    for theirs in (BARE_REDIS, REDIS_PY, REDIS_PY_SINGLY):
        for ours in (GET, BORROW):
            if times is not None and theirs in cell:
                value = ratio(cell[ours]["hits_per_s"], cell[theirs]["hits_per_s"])
                what = f"pipelined hits/s of {ours} over {theirs}"
                yield goal(what, size, value, float(times), most=False)


def _put_goal(size: int, put: dict[str, list[float]]) -> dict[str, Any]:
    bounds = [own + 2 * echo for own, echo in zip(put["owner_us"], put["echo_us"], strict=True)]
    what = "a client's put, over the owner's and two echoes"
    return goal(what, size, ratio(put["client_us"], bounds), 1.0, most=True)


def _owner_goals(size: int, cell: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for name, how in (("owner_cpu_us", "pipelined"), ("owner_cpu_alone_us", "one at a time")):
        what = f"the owner's CPU time of a lookup, {how}, µs"
        yield goal(what, size, middle(cell[GET][name]), OWNER_US, most=True)


def summary(cells: Cells) -> Cells:
    """Medians, and the tenth and ninetieth percentile of the rounds beside the two main figures."""
    result: Cells = {}
    for size, cell in cells.items():
        result[size] = {}
        for system, figures in cell.items():
            record: dict[str, Any] = {}
            for name, values in figures.items():
                record[name] = middle(values)
                if name in {"us", "hits_per_s"} and len(values) >= 5:
                    tenths = statistics.quantiles(values, n=10)
                    record[f"{name}_p10_p90"] = [round(tenths[0], 2), round(tenths[-1], 2)]
            result[size][system] = record
    return result


def report(result: dict[str, Any]) -> str:
    cells: Cells = result["cells"]
    sizes = list(cells)
    systems = list(dict.fromkeys(system for cell in cells.values() for system in cell))
    parts = []
    for name, title in (
        ("us", "One at a time, µs"),
        ("returned_us", "The same, until the call returns, µs"),
        ("hits_per_s", f"Pipelined hits per second, {result['clients']} clients"),
        ("cpu_us", "CPU time of all processes together for each of these, µs"),
        ("owner_cpu_us", "CPU time of the owner's process for each, pipelined, µs"),
        ("owner_cpu_alone_us", "The same, one at a time, µs"),
    ):
        rows = [
            [system, *(number(cells[size].get(system, {}).get(name)) for size in sizes)]
            for system in systems
            if any(name in cells[size].get(system, {}) for size in sizes)
        ]
        if rows:
            head = ["", *(size_name(int(size)) for size in sizes)]
            parts.append(f"### {title}\n\n{table(head, rows)}")
    rows = [
        [name, *(number(result["puts"][size][name]) for size in sizes)]
        for name in ("owner_us", "client_us", "echo_us")
    ]
    parts.append(f"### Puts, µs\n\n{table(['', *(size_name(int(size)) for size in sizes)], rows)}")
    rows = [
        [
            one["goal"],
            size_name(one["size"]),
            f"{one['value']:.2f}",
            f"{one['bound']:g}",
            "reached" if one["reached"] else "MISSED",
        ]
        for one in result["goals"]
    ]
    parts.append(f"### Goals\n\n{table(['goal', 'size', 'found', 'bound', ''], rows)}")
    parts += [f"- {name}: not run: {why}\n" for name, why in result["not_run"].items()]
    return "\n".join(parts)


def versions(options: argparse.Namespace) -> dict[str, str | None]:
    packages = machine.PACKAGES if options.device == "cpu" else machine.CUDA_PACKAGES
    found = commit(machine.versions(None, packages))
    if options.device == "cpu":
        found["redis-server"] = keyed_redis.version(options.redis)
        for name in ("redis", "hiredis", "ray"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


async def fleet(options: argparse.Namespace, plan: Plan, redis: keyed_redis.Served | None) -> Bench:
    bench = Bench(options, plan, redis)
    with Crew() as crew:
        await bench.start(crew)
        await bench.measure()
    return bench


def run(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    not_run: dict[str, str] = {}
    result: dict[str, Any] = {
        "date": machine.now(),
        "command": machine.command(argv, "keyed_speed.py"),
        "machine": machine.machine() | {"gpus": machine.gpus()},
        "versions": versions(options),
        "device": options.device,
        "loop": options.loop if find_spec("uvloop") else "asyncio",
        "clients": options.clients,
        "flight": options.flight,
        "rounds": options.rounds,
        "count": options.count,
        "pipe_rounds": options.pipe_rounds,
        "seconds": options.seconds,
    }
    sizes = tuple(options.sizes)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fc-")))
        redis: keyed_redis.Served | None = None
        if options.device != "cpu" or options.redis == "none":
            not_run["Redis"] = "its memory is the host's" if options.device != "cpu" else "left out"
        else:
            try:
                redis = stack.enter_context(keyed_redis.serve(options.redis, folder))
                keyed_redis.load(
                    redis.path,
                    (
                        (key_of(size, n), feature_of(size, n).numpy().tobytes())
                        for size in sizes
                        for n in range(options.keys)
                    ),
                )
            except keyed_redis.NoRedis as error:
                not_run["Redis"] = str(error)
        if redis is not None and not keyed_redis.RedisPy.exists():
            not_run["redis-py"] = "it is not installed"
        asked, answered = asyncio.run(wire_bytes(key_of(sizes[0], 0)))
        result["lookup_bytes"], result["answer_bytes"] = asked, answered
        plan = Plan(
            device=options.device,
            sizes=sizes,
            keys=options.keys,
            clients=options.clients,
            flight=options.flight,
            asked=asked,
            answered=answered,
            echo_path=str(folder / "echo.sock"),
            redis_path=redis.path if redis else None,
            loop=options.loop,
        )
        bench = asyncio.run(fleet(options, plan, redis))
    cells = bench.cells
    result["goals"] = goals(cells, bench.puts)
    result["puts"] = {
        size: {name: middle(values) for name, values in put.items()}
        for size, put in bench.puts.items()
    }
    if options.no_ray:
        not_run["Ray"] = "left out"
    else:
        time.sleep(0.2)
        ray = keyed_ray.run(plan, 3, options.count, options.seconds)
        if "not_run" in ray:
            not_run["Ray"] = ray["not_run"]
        else:
            for size, found in ray.items():
                cells[size] |= found
    return result | {"cells": summary(cells), "not_run": not_run}


def main(argv: list[str]) -> int:
    options = parse(argv)
    crew.quiet()
    result = run(options, argv)
    print(report(result))
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
