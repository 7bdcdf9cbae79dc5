"""The README's table, and a plot, of a result file of cuda_speed.py.

    python tests/bench/plot.py tests/bench/results/cuda-speed.json

The table goes to the standard output. The plot, with matplotlib where it is installed, goes into docs/
under the name of the result file, or where `--svg` says: host times and rates against the size of the
features.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cuda_report import Cells, index
from bench.report import number, size_name, table

DOCS = Path(__file__).resolve().parents[2] / "docs"
TIMES = "\N{MULTIPLICATION SIGN}"
COLOURS = {
    "featcache-get": "#0b5394",
    "featcache-borrow": "#3d85c6",
    "featcache-async": "#6fa8dc",
    "sglang-0.5.23": "#cc4125",
    "sglang-0.5.23-borrow": "#e69138",
    "sglang-0.5.11": "#e06666",
    "torchmp": "#6aa84f",
    "copies": "#999999",
}
LABELS = {
    "featcache-get": "featcache, get",
    "featcache-borrow": "featcache, borrow",
    "featcache-async": "featcache, await",
    "sglang-0.5.23-borrow": "sglang 0.5.23, borrow",
    "sglang-0.5.23": "sglang 0.5.23",
    "sglang-0.5.11": "sglang 0.5.11",
    "torchmp": "torch.multiprocessing",
    "copies": "the copies alone",
}


def systems_of(cells: Cells) -> list[str]:
    """Those that have a figure anywhere."""
    return list(dict.fromkeys(at[0] for at, cell in cells.items() if "features_per_s" in cell))


def markdown(result: dict[str, Any]) -> str:
    """Features per second, then host times: median while features stream."""
    cells = index(result)
    columns = list(dict.fromkeys((readers, size) for _, readers, size in cells))
    head = [f"{readers} {TIMES} {size_name(size)}" for readers, size in columns]
    parts = []
    for title, names in (
        ("features per second", ("features_per_s",)),
        ("put / get, µs", ("put_us_p50", "get_us_p50")),
        ("round trip, µs", ("trip_us_p50",)),
    ):
        rows = []
        for system in systems_of(cells):
            found = [cells.get((system, *at), {}) for at in columns]
            texts = [" / ".join(number(cell.get(name)) for name in names) for cell in found]
            marks = ["*" if "wrong" in cell else "" for cell in found]
            rows.append([system, *map("".join, zip(texts, marks, strict=True))])
        parts.append(table([title, *head], rows))
    if any("wrong" in cell for cell in cells.values()):
        parts.append("\\* readers saw wrong bytes\n")
    return "\n".join(parts)


def draw(result: dict[str, Any], to: Path, readers: int) -> bool:
    """Two panels, as SVG; False where there is no matplotlib."""
    try:
        mpl = importlib.import_module("matplotlib")  # by name: it is no dependency
        mpl.use("svg")
        plt = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return False
    mpl.rcParams.update({"svg.hashsalt": "featcache", "font.size": 9, "axes.grid": True})
    cells = index(result)
    figure, (times, rates) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    sizes = sorted({size for _, at, size in cells if at == readers})
    for system in systems_of(cells):
        mine = {size: cells.get((system, readers, size), {}) for size in sizes}
        style = {"color": COLOURS.get(system), "marker": "o", "markersize": 3.5, "linewidth": 1.3}
        for name, line in (("put_us_p50", "-"), ("get_us_p50", "--")):
            line_of(times, mine, name, linestyle=line, **style)
        line_of(rates, mine, "features_per_s", label=LABELS.get(system, system), **style)
    times.set_title("host time of a put (solid) and a get (dashed), median, µs")
    rates.set_title("pipelined features per second")
    for axes in (times, rates):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [size_name(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.set_xlabel(f"size of a feature; {readers} reader{'s' if readers > 1 else ''}")
    rates.legend(fontsize=8)
    gpus = result["machine"]["gpus"]
    figure.suptitle(f"one GPU ({gpus[0]['name']})" if gpus else "no GPU", fontsize=10)
    figure.savefig(to, format="svg", metadata={"Date": None})
    plt.close(figure)
    return True


def line_of(axes: Any, cells: dict[int, dict[str, Any]], name: str, **style: Any) -> None:
    points = [(size, cell[name]) for size, cell in cells.items() if cell.get(name)]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--svg", type=Path, help="default: in docs/")
    parser.add_argument("--readers", type=int, default=4, help="of the cells that are plotted")
    options = parser.parse_args(argv)
    result = json.loads(options.result.read_text())
    print(markdown(result), end="")
    to = options.svg or DOCS / f"{options.result.stem}.svg"
    if not draw(result, to, options.readers):
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
