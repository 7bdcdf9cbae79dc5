"""Prints Markdown tables from a result file of host.py.

python tests/bench/report.py result.json [--pick best]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FIGURES = {
    "features_per_s": "Pipelined features per second",
    "cpu_us": "CPU time of a pipelined feature, µs (owner and all readers together)",
    "trip_us": "Round trip, µs (put, every reader gets, every reader answers)",
    "put_us": "Host time of a put, µs",
    "read_us": "Host time of a read (get, or borrow and release), µs",
}
OURS = "featcache"
Cells = dict[tuple[str, int, int], dict[str, Any]]
Picked = Callable[[dict[str, Any], str], float | None]


def size_name(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rounds_of(cell: dict[str, Any], name: str) -> list[float | None]:
    values: list[float | None] = cell.get(f"{name}_rounds", [])
    return values


def median(cell: dict[str, Any], name: str) -> float | None:
    values = [value for value in rounds_of(cell, name) if value is not None]
    return statistics.median(values) if values else None


def best(cell: dict[str, Any], name: str) -> float | None:
    values = [value for value in rounds_of(cell, name) if value is not None]
    if not values:
        return None
    return max(values) if name == "features_per_s" else min(values)


def ratio(ours: dict[str, Any], theirs: dict[str, Any], pick: Picked) -> float | None:
    """Ours over theirs in features per second; the median of the rounds' ratios, or of bests."""
    name = "features_per_s"
    if pick is best:
        mine, other = best(ours, name), best(theirs, name)
        return mine / other if mine and other else None
    pairs = zip(rounds_of(ours, name), rounds_of(theirs, name), strict=False)
    ratios = [mine / other for mine, other in pairs if mine and other]
    return statistics.median(ratios) if ratios else None


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def columns(cells: Cells) -> list[tuple[int, int]]:
    """(readers, size), in the order of the file."""
    return list(dict.fromkeys((readers, size) for _, readers, size in cells))


def heading(column: tuple[int, int]) -> str:
    readers, size = column
    return f"{readers} x {size_name(size)}"


def report(result: dict[str, Any], pick: Picked = median) -> str:
    cells: Cells = {
        (cell["system"], cell["readers"], cell["size"]): cell for cell in result["cells"]
    }
    systems = list(dict.fromkeys(system for system, _, _ in cells))
    ran = [s for s in systems if any(pick(c, "put_us") for k, c in cells.items() if k[0] == s)]
    wide = columns(cells)
    parts = [about(result, pick)]
    for name, title in FIGURES.items():
        rows = [
            [system, *(number(pick(cells[system, *column], name)) for column in wide)]
            for system in ran
        ]
        parts += [f"### {title}\n", table(["readers x size", *map(heading, wide)], rows)]
    ours = [system for system in ran if system.startswith(OURS)]
    for mine in ours:
        rows = [
            [
                other,
                *(number(ratio(cells[mine, *at], cells[other, *at], pick)) for at in wide),
            ]
            for other in ran
            if not other.startswith(OURS)
        ]
        parts += [
            f"### {mine} over the others, features per second\n",
            table(["readers x size", *map(heading, wide)], rows),
        ]
    parts += notes(cells)
    return "\n".join(parts)


def about(result: dict[str, Any], pick: Picked) -> str:
    machine, versions = result["machine"], result["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}, Linux "
        f"{machine['kernel']}; {known}; {result['date']}; {'best' if pick is best else 'median'} "
        f"of {result['rounds']} rounds of {result['seconds']} s.\n\n    {result['command']}\n"
    )


def notes(cells: Cells) -> list[str]:
    """Skips and errors, once each."""
    said: dict[str, None] = {}
    for (system, readers, size), cell in cells.items():
        if "skipped" in cell:
            said[f"- {system}: skipped: {cell['skipped']}"] = None
        errors = cell.get("errors", [cell["error"]] if "error" in cell else [])
        for error in errors:
            last = error.strip().splitlines()[-1]
            said[f"- {system}, {heading((readers, size))}: failed: {last}"] = None
    return ["\n".join(said) + "\n"] if said else []


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Prints Markdown tables from a result file.")
    parser.add_argument("result", type=Path)
    parser.add_argument("--pick", choices=["median", "best"], default="median")
    options = parser.parse_args(argv)
    result = json.loads(options.result.read_text())
    print(report(result, best if options.pick == "best" else median), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
