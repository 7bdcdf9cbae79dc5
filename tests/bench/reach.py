"""Reads of another host's features, beside raw NIXL reads and the bytes over a plain TCP socket.

Each system has a process for either host; all live at once and take turns, size by size and round by
round, so that what else the machine does meets all of them::

    PYTHONPATH=src:tests python tests/bench/reach.py [--namespaces] [--rounds N] [--out FILE] [SIZE_BYTES …]

UCX goes over TCP unless ``UCX_TLS`` says otherwise, over loopback, or over a pair of veth devices
between two network namespaces (``--namespaces``, as root). The agents of the raw reads are made as
featcache makes its own; each looks at its transfers without a pause and, in other turns, with one of
50 µs, and the better of the two is what featcache is held against. The reader of featcache is the owner
of its host, so a get has the look-up at the home, the read, the copy that the caller owns and the
payment, and no message of a client besides. A raw read has no copy: ``nixl+copy`` makes the one of get.
"""

import argparse
import multiprocessing as mp
import os
import statistics
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine, reach_systems, resultfile
from bench.reach_systems import KIB, MIB, Turn
from reach.netns import missing, two_hosts

SIZES: Final = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
WINDOW: Final = 4
"""Reads in flight where throughput is measured."""
LEAST_OF_NIXL: Final = 0.8
MOST_OF_NIXL: Final = 1.5


def reads_of(nbytes: int) -> int:
    """Reads of one turn."""
    return max(3, min(60, (48 * MIB) // nbytes))


class Pair:
    """One system: its home and its reader, each a process in its network."""

    def __init__(self, name: str, addresses: list[str], networks: list[str | None]) -> None:
        spawn = mp.get_context("spawn")
        between, theirs = spawn.Pipe()
        self._pipe, its = spawn.Pipe()
        system = reach_systems.SYSTEMS[name]
        self._processes = [
            spawn.Process(
                target=reach_systems.run, args=(end, network, pipe, addresses[0], more), daemon=True
            )
            for end, network, pipe, more in (
                (system.home, networks[0], between, None),
                (system.reader, networks[1], theirs, its),
            )
        ]
        for process in self._processes:
            process.start()
        assert self._pipe.recv() == "ready"

    def turn(self, turn: Turn) -> dict[str, list[float]]:
        """Take one turn; return seconds of each read, by kind of read."""
        self._pipe.send(turn)
        told: dict[str, list[float]] = self._pipe.recv()
        return told

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def measure(pairs: list[Pair], sizes: list[int], rounds: int) -> dict[str, Any]:
    """Return the cells: by size and system, latencies of reads alone and rates of those in flight."""
    found: dict[str, Any] = {}
    for nbytes in sizes:
        alone: dict[str, list[float]] = {}
        rates: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            for pair in pairs:
                one = pair.turn(Turn(nbytes, reads_of(nbytes), 1))
                many = pair.turn(Turn(nbytes, reads_of(nbytes), WINDOW))
                if not number:  # the first has the connections and the pages to make
                    continue
                for name, times in one.items():
                    alone.setdefault(name, []).extend(times)
                for name, [whole_s] in many.items():
                    rate = nbytes * reads_of(nbytes) / whole_s / 1e9
                    rates.setdefault(name, []).append(rate)
        found[str(nbytes)] = {name: cell(alone[name], rates.get(name, [])) for name in alone}
        print_cells(nbytes, found[str(nbytes)])
    return found


def cell(times: list[float], rates: list[float]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "us": round(statistics.median(times) * 1e6, 1),
        "quartile_us": round(statistics.quantiles(times, n=4)[0] * 1e6, 1),
        "p90_us": round(statistics.quantiles(times, n=10)[8] * 1e6, 1),
    }
    if rates:
        made["gb_per_s"] = round(statistics.median(rates), 4)
        made["gb_per_s_rounds"] = [round(rate, 4) for rate in rates]
    return made


def print_cells(nbytes: int, cells: dict[str, Any]) -> None:
    for name, has in cells.items():
        times = f"{has['us']:9.0f} µs (quartile {has['quartile_us']:.0f}, p90 {has['p90_us']:.0f})"
        rate = f"{has['gb_per_s']:7.3f} GB/s with {WINDOW}" if "gb_per_s" in has else ""
        print(f"{name:12} {nbytes >> 10:6} KiB  {times:44} {rate}", flush=True)


def goals(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bars and how they are met: figures of all rounds, in which the systems took turns."""
    made: list[dict[str, Any]] = []

    def add(goal: str, value: float, met: bool) -> None:
        made.append({"goal": goal, "value": round(value, 3), "met": met})

    for nbytes, cell in ((int(size), cell) for size, cell in cells.items()):
        best = {
            name: max(cell[each]["gb_per_s"] for each in (name, f"{name}, pausing"))
            for name in ("nixl", "nixl+copy")
        }
        if nbytes >= MIB:
            for what, beside in (("borrow", "nixl"), ("get", "nixl+copy"), ("get", "nixl")):
                ratio = cell[what]["gb_per_s"] / best[beside]
                goal = f"{what} over {beside}, {nbytes >> 20} MiB, {WINDOW} in flight"
                add(f"{goal}: at least {LEAST_OF_NIXL}", ratio, ratio >= LEAST_OF_NIXL)
        if nbytes == 64 * KIB:
            for which in ("us", "quartile_us"):
                raw = min(cell[each][which] for each in ("nixl", "nixl, pausing"))
                ratio = (cell["get"][which] - cell["echo"][which]) / raw
                goal = f"(get - echo) over nixl, 64 KiB, {which}: at most {MOST_OF_NIXL}"
                add(goal, ratio, ratio <= MOST_OF_NIXL)
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sizes", type=int, nargs="*", default=[])
    parser.add_argument("--namespaces", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--systems", default=",".join(reach_systems.SYSTEMS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    os.environ.setdefault("UCX_TLS", "tcp")
    reach_systems.api()  # or says that it is missing

    def run(addresses: list[str], networks: list[str | None]) -> dict[str, Any]:
        pairs = [Pair(name, addresses, networks) for name in args.systems.split(",")]
        try:
            return measure(pairs, args.sizes or list(SIZES), args.rounds)
        finally:
            for pair in pairs:
                pair.end()

    if args.namespaces:
        why_not = missing()
        if why_not is not None:
            raise SystemExit(why_not)
        with two_hosts() as hosts:
            cells = run([each.split(":")[0] for each in hosts.addresses], [*hosts.names])
    else:
        cells = run(["127.0.0.1"], [None, None])
    result = {
        "date": machine.now(),
        "command": machine.command(argv, "reach.py"),
        "machine": machine.machine(),
        "versions": machine.versions(None, (*machine.PACKAGES, "nixl-cu12")),
        "ucx_tls": os.environ["UCX_TLS"],
        "link": "veth between two network namespaces" if args.namespaces else "loopback",
        "window": WINDOW,
        "rounds": args.rounds,
        "goals": goals(cells) if set(args.systems.split(",")) == set(reach_systems.SYSTEMS) else [],
        "sizes": cells,
    }
    for goal in result["goals"]:
        print(f"{'met   ' if goal['met'] else 'missed'} {goal['goal']}: {goal['value']}")
    resultfile.write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
