"""Hits without a message: what a client's read by key costs beside its read by ref, and its owner.

    PYTHONPATH=src python tests/bench/keyed_hits.py --out tests/bench/results/keyed-hits.json

For each event loop an owner process and its clients, all there at once; rounds take turns among the
loops. For each size it measures:

- alone: one client, one call at a time, in batches, by the clock: `contains`, `get`, `borrow` and their
  forms that wait for nothing, by key; the same reads by ref; a miss; a bare echo of 64 bytes over a Unix
  socket between the same two processes; the copy alone, into warm memory; a dict and a clone in this process;
  Redis `GET` by a client that does the least there is to do. Each key and each ref is read once a batch, so
  both walk through as much memory.
- pipelined: all clients of the last loop at once, hits per second of all together, beside Redis and
  the bare copy: no `get` can be quicker than that.
- the owner's CPU time for a hit: that of 100,000 hits, less that of as long a time without any.

Then Ray's object store, if it is installed. A figure is the median of the rounds' batches, beside the
least: the machine has other work. A goal is met or missed by the median of the rounds' own differences,
or ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import crew, keyed_ray, keyed_redis, machine, resultfile
from bench.hits_fleet import (
    ALL,
    BARE_REDIS,
    BORROW,
    BORROW_REF,
    CONTAINS,
    COPY,
    GET,
    GET_REF,
    Plan,
    start,
)
from bench.host import parse_sizes
from bench.keyed_fleet import commit, feature_of, key_of
from bench.report import number, size_name, table

CONTAINS_US = 3.0
OVER_REF_US = 4.0
OVER_REDIS = {GET: {64 << 10: 10, 1 << 20: 30}, BORROW: {64 << 10: 10, 1 << 20: 100}}
OWNER_US = 0.05
"""what is taken for 0: the owner looks at its sessions' pages a few times a second"""
START_S = 300.0
Figures = dict[str, dict[str, dict[str, list[float]]]]
"""By size, by call: of each round."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="the slab's, and its clients'")
    parser.add_argument("--sizes", type=parse_sizes, default=parse_sizes("4KiB,64KiB,1MiB"))
    parser.add_argument("--keys", type=int, default=50, help="features of each size; calls a batch")
    parser.add_argument("--loops", default="asyncio,uvloop")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--flight", type=int, default=16, help="under way in each, pipelined")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--pipe-rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a pipelined round")
    parser.add_argument("--hits", type=int, default=100_000, help="for the owner's CPU time")
    parser.add_argument("--redis", help="redis-server, if it is not on the path; 'none': without")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    return parser.parse_args(argv)


class Loop:
    """The processes of one event loop, and what they measured."""

    def __init__(self, plan: Plan, children: crew.Crew) -> None:
        self.plan = plan
        self.owner, self.clients = start(plan, children)
        self.alone: Figures = {str(size): {} for size in plan.sizes}
        self.piped: Figures = {str(size): {} for size in plan.sizes}
        self.owner_us: list[float] = []

    async def ready(self) -> None:
        (endpoint,) = await self.owner.expect("ready", START_S)
        for client in self.clients:
            client.tell("connect", endpoint)
        for client in self.clients:
            (self.systems,) = await client.expect("connect", START_S)

    async def one_at_a_time(self, size: int, turn: int) -> None:
        """A batch of each call, each round beginning with another."""
        for _ in ALL:  # one by one: a message of more than 16 KiB comes in pieces
            (refs,) = await self.owner.ask("refs", size, self.plan.keys)
            self.clients[0].tell("refs", size, refs)
        at = turn % len(self.systems)
        names = self.systems[at:] + self.systems[:at]
        (found,) = await self.clients[0].ask("alone", size, names)
        for name, us in found.items():
            self.alone[str(size)].setdefault(name, {}).setdefault("us", []).append(us)

    async def pipelined(self, size: int, seconds: float) -> None:
        for name in (GET, BORROW, COPY, BARE_REDIS):
            if name in self.systems:
                for client in self.clients:
                    client.tell("pipe", size, name, seconds)
                rate = sum([(await client.expect("pipe"))[0] for client in self.clients])
                cell = self.piped[str(size)].setdefault(name, {})
                cell.setdefault("hits_per_s", []).append(rate)

    async def owner_cpu(self, hits: int) -> None:
        """The owner's CPU time for a hit, in µs."""
        (before_s,) = await self.owner.ask("cpu")
        (took_s,) = await self.clients[0].ask("hits", self.plan.sizes[0], hits)
        (after_s,) = await self.owner.ask("cpu")
        await asyncio.sleep(took_s)
        (idle_s,) = await self.owner.ask("cpu")
        self.owner_us.append(1e6 * ((after_s - before_s) - (idle_s - after_s)) / hits)


async def measure(options: argparse.Namespace, plans: list[Plan]) -> list[Loop]:
    with crew.Crew() as children:
        loops = [Loop(plan, children) for plan in plans]
        for loop in loops:
            await loop.ready()
        for turn in range(options.rounds):
            for loop in loops if turn % 2 else loops[::-1]:
                for size in options.sizes:
                    await loop.one_at_a_time(size, turn)
        for turn in range(options.pipe_rounds):
            for loop in loops if turn % 2 else loops[::-1]:
                for size in options.sizes if loop is loops[-1] else ():
                    await loop.pipelined(size, options.seconds)
                await loop.owner_cpu(options.hits)
    return loops


def middle(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def between(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' own differences."""
    return middle([mine - other for mine, other in zip(ours, theirs, strict=True)])


def goals(loop: Loop) -> list[dict[str, Any]]:
    found = [
        goal("the owner's CPU time for a hit, µs", None, middle(loop.owner_us), OWNER_US, most=True)
    ]
    for size in loop.plan.sizes:
        alone, piped = loop.alone[str(size)], loop.piped[str(size)]
        contains_us = middle(alone[CONTAINS]["us"])
        found.append(goal("contains, µs", size, contains_us, CONTAINS_US, most=True))
        for name, beside in ((GET, GET_REF), (BORROW, BORROW_REF)):
            more_us = between(alone[name]["us"], alone[beside]["us"])
            found.append(goal(f"{name} over {beside}, µs", size, more_us, OVER_REF_US, most=True))
        if BARE_REDIS not in piped:
            continue
        redis, copies = (piped[name]["hits_per_s"] for name in (BARE_REDIS, COPY))
        for name, times in OVER_REDIS.items():
            if size in times:
                rates, bound = piped[name]["hits_per_s"], float(times[size])
                value = middle([mine / other for mine, other in zip(rates, redis, strict=True)])
                what = f"pipelined {name} over Redis"
                found.append(goal(what, size, value, bound, most=False))
                if name == GET:
                    could = [copy / other for copy, other in zip(copies, redis, strict=True)]
                    found[-1]["copy_allows"] = middle(could)
    return found


def goal(what: str, size: int | None, value: float, bound: float, *, most: bool) -> dict[str, Any]:
    reached = value <= bound if most else value >= bound
    return {"goal": what, "size": size, "value": value, "bound": bound, "reached": reached}


def summary(figures: Figures) -> dict[str, dict[str, dict[str, float]]]:
    """The median of the rounds, and the best of them."""
    return {
        size: {
            name: {
                key: value
                for figure, values in cell.items()
                for key, value in (
                    (figure, middle(values)),
                    (f"best_{figure}", round((min if figure == "us" else max)(values), 3)),
                )
            }
            for name, cell in cells.items()
        }
        for size, cells in figures.items()
    }


def report(result: dict[str, Any]) -> str:
    parts = []
    for loop, found in result["loops"].items():
        for title, figure in (("alone", "us"), ("pipelined", "hits_per_s")):
            cells = found[title]
            if not any(cells.values()):
                continue
            unit = "µs, median (least)" if figure == "us" else "hits/s, median (most)"
            rows = [
                [
                    name,
                    *(
                        f"{number(cells[size][name][figure])} "
                        f"({number(cells[size][name][f'best_{figure}'])})"
                        for size in cells
                    ),
                ]
                for name in next(iter(cells.values()))
            ]
            head = [f"{loop}, {title}, {unit}", *(size_name(int(size)) for size in cells)]
            parts.append(table(head, rows))
        rows = [
            [
                one["goal"],
                size_name(one["size"]) if one["size"] else "",
                f"{one['value']:g}",
                f"{one['bound']:g}",
                f"{one.get('copy_allows', '')}",
                "reached" if one["reached"] else "MISSED",
            ]
            for one in found["goals"]
        ]
        parts.append(table(["goal", "size", "found", "bound", "a bare copy's", ""], rows))
    if "ray" in result:
        parts.append(f"Ray: {result['ray']}\n")
    return "\n".join(parts)


def run(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "date": machine.now(),
        "command": machine.command(argv, "keyed_hits.py"),
        "machine": machine.machine() | {"gpus": machine.gpus()},
        "versions": commit(machine.versions(None)),
        "rounds": options.rounds,
        "keys": options.keys,
        "clients": options.clients,
        "flight": options.flight,
    }
    sizes, loops_of = tuple(options.sizes), options.loops.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder, redis_path = Path(name), None
        with keyed_redis.maybe(options.device, options.redis, folder) as served:
            if isinstance(served, str):
                result["redis"] = served
            else:
                redis_path = served.path
                result["versions"]["redis-server"] = keyed_redis.version(options.redis)
                features = (
                    (key_of(size, n), feature_of(size, n).numpy().tobytes())
                    for size in sizes
                    for n in range(options.keys)
                )
                keyed_redis.load(redis_path, features)
            plans = [
                Plan(
                    device=options.device,
                    sizes=sizes,
                    keys=options.keys,
                    clients=options.clients if loop == loops_of[-1] else 1,
                    flight=options.flight,
                    asked=64,
                    answered=64,
                    echo_path=str(folder / f"{loop}.sock"),
                    redis_path=redis_path,
                    loop=loop,
                )
                for loop in loops_of
            ]
            loops = asyncio.run(measure(options, plans))
    result["loops"] = {
        loop.plan.loop: {
            "alone": summary(loop.alone),
            "pipelined": summary(loop.piped),
            "owner_cpu_us": [round(us, 4) for us in loop.owner_us],
            "goals": goals(loop),
        }
        for loop in loops
    }
    if not options.no_ray:
        ray = keyed_ray.run(plans[0], 3, 100, options.seconds)
        result["ray"] = ray if "not_run" in ray else summary(ray)
    return result


def main(argv: list[str]) -> int:
    options = parse(argv)
    crew.quiet()
    result = run(options, argv)
    print(report(result))
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
