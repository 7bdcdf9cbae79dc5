"""featcache on host memory beside other systems, in one run on one machine.

    PYTHONPATH=src python tests/bench/host.py --rounds 5 --out result.json
    python tests/bench/report.py result.json      # the tables again

The result file is written after every round. The tables are printed at the end.

One owner process and 1 or 4 reader processes; every reader gets every feature. For each system,
size and number of readers it measures

- pipelined features per second: the owner puts and sends for `--seconds`, with no more features
  in flight than the window; the clock stops when the last reader has confirmed the count;
- the CPU time that all processes together spend on one of these features: it moves less than the
  clock does when others use the machine;
- the round trip: put, every reader gets and answers a byte; one at a time; median;
- the host time of single calls: put, and get or borrow (with its release), with nothing to wait
  for; median.

All systems get the same random tensors (four in turn, warm), the same window, the same touch (first
and last element), the same warm-up, the same start method (spawn), the same number of torch threads
(one, as model servers set it), and no pinning. Before anything is timed each checks the bytes that
came; in every phase the sum of what the readers touched must be right, or the cell is an error.
Systems take turns, beginning with another one each round; a figure is the median over the rounds,
a ratio the median of the rounds' own ratios. On a machine that others use too, single rounds differ
by a factor of two and more: take many short rounds.

What differs between the systems is said at the top of each file in peers/.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine, resultfile
from bench.harness import cell_record, describe, run_cells
from bench.peers import SYSTEMS, Cell
from bench.report import FIGURES, report

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str) -> int:
    number = text.rstrip("BKMGiIbkmg")
    try:
        size = int(number) * UNITS[text[len(number) :].upper()]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64KiB") from None
    if size <= 0 or size % 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8 bytes")
    return size


def parse_sizes(text: str) -> list[int]:
    return [parse_size(part) for part in text.split(",")]


def parse_counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("at least one reader")
    return counts


def parse_systems(text: str) -> list[str]:
    """Names, or their beginnings: `featcache` is all of featcache's forms."""
    chosen = []
    for part in text.split(","):
        found = [name for name in SYSTEMS if name == part or name.startswith(part + "-")]
        if not found:
            known = ", ".join(SYSTEMS)
            raise argparse.ArgumentTypeError(f"no system {part!r}; there are {known}")
        chosen += found
    return list(dict.fromkeys(chosen))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="host.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=parse_sizes, default=parse_sizes("64KiB,1MiB,16MiB"))
    parser.add_argument("--readers", type=parse_counts, default=[1, 4])
    parser.add_argument("--systems", type=parse_systems, default=list(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=1.0, help="pipelined phase of a cell")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=int, default=64, help="most features in flight")
    parser.add_argument("--pool", type=parse_size, default=parse_size("256MiB"), help="most bytes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a process")
    parser.add_argument(
        "--vllm-file",
        default=os.environ.get("FEATCACHE_BENCH_VLLM"),
        help="shm_object_storage.py of an unpacked vllm wheel",
    )
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    return parser.parse_args(argv)


def make_cells(options: argparse.Namespace, system: str, readers: int) -> list[Cell]:
    return [
        Cell(
            system=system,
            size=size,
            readers=readers,
            window=max(2, min(options.window, options.pool // size)),
            seconds=options.seconds,
            threads=options.threads,
            vllm_file=options.vllm_file,
        )
        for size in options.sizes
    ]


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over the rounds that went well, and every round's own figures."""
    good = [outcome for outcome in rounds if "features_per_s" in outcome]
    if not good:
        return rounds[0]
    result: dict[str, Any] = {
        name: round(statistics.median(outcome[name] for outcome in good), 2) for name in FIGURES
    }
    result["features"] = sum(outcome["features"] for outcome in good)
    for name in FIGURES:
        result[f"{name}_rounds"] = [
            round(outcome[name], 2) if name in outcome else None for outcome in rounds
        ]
    errors = [outcome["error"] for outcome in rounds if "error" in outcome]
    return result | ({"errors": errors} if errors else {})


def main(argv: list[str]) -> int:
    options = parse(argv)
    result: dict[str, Any] = {
        "date": machine.now(),
        "command": machine.command(argv),
        "machine": machine.machine(),
        "versions": machine.versions(options.vllm_file),
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    seen: dict[Cell, list[dict[str, Any]]] = {
        cell: []
        for readers in options.readers
        for system in options.systems
        for cell in make_cells(options, system, readers)
    }
    began = time.monotonic()
    for turn in range(options.rounds):
        first = turn * len(options.systems) // options.rounds
        for readers in options.readers:
            for system in options.systems[first:] + options.systems[:first]:
                cells = make_cells(options, system, readers)
                for cell, outcome in zip(cells, run_cells(cells), strict=True):
                    seen[cell].append(outcome)
                    said = outcome.get("features_per_s") or outcome.get("skipped") or "error"
                    told = f"{said:.0f}/s" if isinstance(said, float) else said
                    where = f"[{time.monotonic() - began:4.0f} s, round {turn + 1}]"
                    print(f"{where} {describe(cell)}: {told}", file=sys.stderr)
        result["cells"] = [cell_record(cell) | summary(rounds) for cell, rounds in seen.items()]
        resultfile.write(options.out, result)
    print(report(result), end="")
    return int(any("error" in outcome for rounds in seen.values() for outcome in rounds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
