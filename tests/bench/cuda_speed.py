"""featcache on a GPU beside other systems, in one run on one GPU.

    PYTHONPATH=src python tests/bench/cuda_speed.py --out tests/bench/results/cuda-speed.json

One owner process and 1 or 4 reader processes on the same GPU; every reader gets every feature. For
each system, size and number of readers it measures

- pipelined features per second: the owner puts and sends for `--seconds`, with as much in flight as
  the pool takes; the clock stops when every reader has waited for its GPU and said so;
- the host time of a put and of a get (or of a borrow with its release), while features stream, and
  alone; what a put waits for room is not in it (but with `await put`, where it can't be told apart);
- the round trip: put, every reader gets, waits for its GPU and answers a byte; one at a time.

All systems get the same random tensors in the same order, the same pool, the same warm-up, the same
start method (spawn), the same number of torch threads, and the same sockets for their handles: eight
to a write while features stream. Before anything is timed every byte of 22 features is compared; of
those that stream every 31st is sampled on the GPU, in stream order, and all samples are compared
at the end. A system that hangs or fails is an error with its reason; one whose readers saw wrong bytes
keeps its figures and is marked so.

sglang's pools come from its wheels: see peers/unpack_sglang.py. What differs between the systems is
said at the top of each file peers/cuda_*.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine, resultfile
from bench.cuda_fleet import run_plan
from bench.cuda_ports import SYSTEMS, Plan
from bench.cuda_report import goals, report, summary
from bench.host import parse_counts, parse_size, parse_sizes

ROOT = Path(__file__).resolve().parents[2]
FIGURE = "features_per_s"


def parse_systems(text: str) -> list[str]:
    """Names, or their beginnings: `featcache` is all of featcache's forms."""
    chosen = []
    for part in text.split(","):
        found = [name for name in SYSTEMS if name == part or name.startswith(part + "-")]
        if not found:
            known = ", ".join(SYSTEMS)
            raise argparse.ArgumentTypeError(f"no system {part!r}; there are {known}")
        chosen += [part] if part in SYSTEMS else found
    return list(dict.fromkeys(chosen))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cuda_speed.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = [name for name, entry in SYSTEMS.items() if entry.default]
    parser.add_argument("--systems", type=parse_systems, default=default)
    parser.add_argument("--sizes", type=parse_sizes, default=parse_sizes("64KiB,1MiB,16MiB"))
    parser.add_argument("--readers", type=parse_counts, default=[1, 4])
    parser.add_argument("--seconds", type=float, default=1.0, help="of one pipelined round")
    parser.add_argument("--rounds", type=int, default=2, help="pipelined rounds of a cell")
    parser.add_argument("--pool", type=parse_size, default=parse_size("1GiB"))
    parser.add_argument("--batch", type=int, default=8, help="handles in one write")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a process")
    parser.add_argument("--device", default="cuda:0", help="cpu: to try the benchmark itself")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="unpacked sglang pools")
    parser.add_argument("--limit", type=float, default=420.0, help="start nothing after so many s")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    return parser.parse_args(argv)


def make_plan(options: argparse.Namespace, system: str, readers: int) -> Plan:
    return Plan(
        system=system,
        readers=readers,
        sizes=tuple(options.sizes),
        seconds=options.seconds,
        rounds=options.rounds,
        pool=options.pool,
        batch=options.batch,
        device=options.device,
        threads=options.threads,
        peers=str(options.peers.resolve()),
    )


def versions(peers: Path) -> dict[str, str | None]:
    unpacked = sorted(folder.name for folder in peers.glob("sglang-*"))
    sglang = {"sglang (its pools)": ", ".join(name.removeprefix("sglang-") for name in unpacked)}
    return machine.versions(None, machine.CUDA_PACKAGES) | sglang


def main(argv: list[str]) -> int:
    options = parse(argv)
    began_s = time.monotonic()
    result: dict[str, Any] = {
        "date": machine.now(),
        "command": machine.command(argv, "cuda_speed.py"),
        "machine": machine.machine() | {"gpus": machine.gpus()},
        "versions": versions(options.peers),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "pool_bytes": options.pool,
        "batch": options.batch,
        "cells": [],
    }
    for readers in options.readers:
        for system in options.systems:
            plan = make_plan(options, system, readers)
            for size, outcome in run_plan(plan, began_s + options.limit).items():
                where = {"system": system, "readers": readers, "size": size}
                cell = where | summary(outcome)
                result["cells"].append(cell)
                said = cell.get(FIGURE) or cell.get("skipped") or cell.get("error")
                at_s = time.monotonic() - began_s
                print(f"[{at_s:4.0f} s] {system}, {readers}, {size}: {said}", file=sys.stderr)
            result["goals"] = goals(result)
            result["took_s"] = round(time.monotonic() - began_s, 1)
            resultfile.write(options.out, result)
    print(report(result), end="")
    ours = [cell for cell in result["cells"] if cell["system"].startswith("featcache")]
    return int(any("error" in cell or "wrong" in cell for cell in ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
