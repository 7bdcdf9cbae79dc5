"""This tree beside an older one: the benchmarks of calls and of keys, in turn, as ratios.

    PYTHONPATH=src python tests/bench/beside.py --before ../old --out tests/bench/results/beside.json

Each round runs `calls.py` and `keyed_speed.py` of either tree, the old one first in every other round,
so that a machine that slows down slows both. A figure is the ratio new to old (of rates, old to new) of
one round; the median of all rounds is what counts, and more than 1 is slower. Exits with 1 if the
median of all figures of a benchmark is over its bound.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine, resultfile
from bench.report import table

HERE = Path(__file__).resolve().parents[2]
BOUND = 1.03
KEYED = ["--redis", "none", "--no-ray", "--rounds", "3", "--pipe-rounds", "2", "--seconds", "0.5"]


def run(tree: Path, script: str, *options: str) -> dict[str, Any]:
    """Run a benchmark of a tree on its own sources; return its result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        subprocess.run(
            [sys.executable, f"tests/bench/{script}", *options, "--out", str(out)],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": "src"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def calls(tree: Path) -> dict[str, float]:
    """CPU microseconds of each call."""
    return dict(run(tree, "calls.py", "--rounds", "15")["least_us"])


def keyed(tree: Path) -> dict[str, float]:
    """Microseconds, and seconds a hit, of each cell of featcache's own; and of puts."""
    return dict(figures(run(tree, "keyed_speed.py", *KEYED)))


def figures(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every figure of a keyed result that is featcache's; rates as their inverse."""
    for size, cells in result["cells"].items():
        for name, cell in cells.items():
            if name.startswith("featcache"):
                for figure, value in cell.items():
                    rate = figure.endswith("_per_s")
                    yield f"{name} {size} {figure}", 1 / value if rate else value
    for size, puts in result["puts"].items():
        for figure in ("owner_us", "client_us"):
            yield f"put {size} {figure}", puts[figure]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the older tree")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ratios: dict[str, dict[str, list[float]]] = {}
    for turn in range(arguments.rounds):
        for name, measure in (("calls.py", calls), ("keyed_speed.py", keyed)):
            trees = [arguments.before, HERE] if turn % 2 else [HERE, arguments.before]
            first, second = (measure(tree) for tree in trees)
            old, new = (first, second) if turn % 2 else (second, first)
            for figure in old:
                ratio = round(new[figure] / old[figure], 3)
                ratios.setdefault(name, {}).setdefault(figure, []).append(ratio)
    medians = {
        name: {figure: round(statistics.median(each), 3) for figure, each in found.items()}
        for name, found in ratios.items()
    }
    overall = {name: round(statistics.median(of.values()), 3) for name, of in medians.items()}
    for name, of in medians.items():
        print(f"\n### {name}: {overall[name]} in the median, at most {BOUND}\n")
        print(table(["figure", "new over old"], [[figure, str(of[figure])] for figure in of]))
    resultfile.write(
        arguments.out,
        {
            "machine": machine.machine(),
            "versions": machine.versions(None),
            "when": machine.now(),
            "command": f"python tests/bench/beside.py --before OLD --rounds {arguments.rounds}",
            "before": commit(arguments.before),
            "overall": overall,
            "new over old": medians,
            "rounds": ratios,
        },
    )
    sys.exit(any(value > BOUND for value in overall.values()))


def commit(tree: Path) -> str:
    """The commit that a tree is at."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - git of the developer's own path
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


if __name__ == "__main__":
    main()
