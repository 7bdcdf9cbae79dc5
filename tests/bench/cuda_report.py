"""Reports of a result of cuda_speed.py: one figure for each cell, the goals, the tables.

    python tests/bench/cuda_report.py result.json

Prints the tables of a result file again, the goals last.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.report import number, size_name, table

Cell = dict[str, Any]
Cells = dict[tuple[str, int, int], Cell]
"""by system, readers and size"""
OURS, BORROW = "featcache-get", "featcache-borrow"
RIVAL = "sglang-0.5.23"
NO_RIVALS = ("featcache", "copies")
RATIOS = {64 << 10: 5.0, 1 << 20: 5.0, 16 << 20: 10.0}
MOST_CALL_US = 20.0
MOST_BORROW_US = 12.0

FIGURES = {
    "features_per_s": "features/s",
    "put_us": "put µs",
    "get_us": "get µs",
    "put_alone_us": "put alone µs",
    "get_alone_us": "get alone µs",
    "trip_us": "round trip µs",
}


def summary(outcome: dict[str, Any]) -> Cell:
    """The median over the rounds, and the rounds' own rates."""
    outcome = dict(outcome)
    pipes = outcome.pop("pipes", None)
    if pipes is None:
        return outcome
    names = dict.fromkeys(name for pipe in pipes for name in pipe)
    cell = {name: statistics.median(pipe[name] for pipe in pipes if name in pipe) for name in names}
    cell["features"] = sum(pipe["features"] for pipe in pipes)
    cell["waited"] = sum(pipe["waited"] for pipe in pipes)
    cell |= outcome
    cell = {k: round(v, 2) if isinstance(v, float) else v for k, v in cell.items()}
    cell["features_per_s_rounds"] = [round(pipe["features_per_s"], 1) for pipe in pipes]
    return cell


def index(result: dict[str, Any]) -> Cells:
    return {(cell["system"], cell["readers"], cell["size"]): cell for cell in result["cells"]}


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal at each size and number of readers: the measured value, and whether it is met.

    `ok` is None where something that it needs was not measured.
    """
    cells = index(result)
    columns = dict.fromkeys((readers, size) for _, readers, size in cells)
    return [
        {"goal": goal, "readers": readers, "size": size, "value": value, "bound": bound, "ok": ok}
        for readers, size in columns
        for goal, value, bound, ok in column_goals(cells, readers, size)
    ]


Goal = tuple[str, float | None, float | None, bool | None]


def column_goals(cells: Cells, readers: int, size: int) -> list[Goal]:
    def value(system: str, name: str) -> float | None:
        figure: float | None = cells.get((system, readers, size), {}).get(name)
        return figure

    def most(name: str, system: str, figure: str, bound: float | None) -> Goal:
        seen = value(system, figure)
        ok = None if seen is None or bound is None else seen <= bound
        return f"{name} ≤", seen, bound, ok

    mine, other = value(OURS, "features_per_s"), value(RIVAL, "features_per_s")
    ratio = round(mine / other, 2) if mine and other else None
    least = RATIOS.get(size)
    ok = None if ratio is None or least is None else ratio >= least
    trips = [
        cell["trip_us_p50"]
        for (system, *at), cell in cells.items()
        if at == [readers, size] and not system.startswith(NO_RIVALS) and "trip_us_p50" in cell
    ]
    return [
        (f"{OURS} over {RIVAL}, features/s ≥", ratio, least, ok),
        most("put µs, pipelined", OURS, "put_us_p50", MOST_CALL_US),
        most("get µs, pipelined", OURS, "get_us_p50", MOST_CALL_US),
        most("borrow and release µs", BORROW, "get_us_p50", MOST_BORROW_US),
        most(
            "round trip µs, beside the fastest other", OURS, "trip_us_p50", min(trips, default=None)
        ),
    ]


def figure(cell: Cell, name: str) -> str:
    if name == "features_per_s":
        mark = " !" if "wrong" in cell else ""
        return number(cell.get(name)) + mark
    p50, p90 = cell.get(f"{name}_p50"), cell.get(f"{name}_p90")
    return "-" if p50 is None else f"{number(p50)} / {number(p90)}"


def report(result: dict[str, Any]) -> str:
    cells = index(result)
    parts = [about(result)]
    for readers, size in dict.fromkeys((readers, size) for _, readers, size in cells):
        rows = [
            [system, *(figure(cell, name) for name in FIGURES)]
            for (system, *at), cell in cells.items()
            if at == [readers, size] and "features_per_s" in cell
        ]
        if rows:
            parts.append(table([f"{readers} x {size_name(size)}", *FIGURES.values()], rows))
    parts += notes(cells)
    parts.append(goal_table(result))
    return "\n".join(parts)


def about(result: dict[str, Any]) -> str:
    machine = result["machine"]
    gpus = machine["gpus"] or [{"name": "no GPU", "driver_version": "-"}]
    where = f"{gpus[0]['name']}, driver {gpus[0]['driver_version']}, {machine['cpu']}"
    known = ", ".join(f"{name} {is_}" for name, is_ in result["versions"].items() if is_)
    return (
        f"{where}, {machine['cores_usable']} cores; {known}; {result['date']}; median of "
        f"{result['rounds']} rounds of {result['seconds']} s; times are median / 90th percentile.\n"
        f"\n    {result['command']}\n"
    )


def notes(cells: Cells) -> list[str]:
    """Skips, errors and wrong bytes."""
    where: dict[str, list[str]] = {}
    for (system, readers, size), cell in cells.items():
        for name in ("skipped", "error", "wrong"):
            if name in cell:
                what = f"- {system}: {name}: {cell[name]}"
                where.setdefault(what, []).append(f"{readers} x {size_name(size)}")
    said = [f"{what} ({', '.join(columns)})" for what, columns in where.items()]
    return ["\n".join(said) + "\n"] if said else []


def goal_table(result: dict[str, Any]) -> str:
    columns = list(dict.fromkeys((goal["readers"], goal["size"]) for goal in result["goals"]))
    by_name: dict[str, dict[tuple[int, int], str]] = {}
    for goal in result["goals"]:
        verdict = {True: "pass", False: "FAIL", None: "?"}[goal["ok"]]
        at = goal["readers"], goal["size"]
        text = f"{number(goal['value'])} / {number(goal['bound'])} {verdict}"
        by_name.setdefault(goal["goal"], {})[at] = text
    rows = [[name, *(row.get(at, "-") for at in columns)] for name, row in by_name.items()]
    head = [f"{readers} x {size_name(size)}" for readers, size in columns]
    return table(["goals (measured / goal)", *head], rows)


def main(argv: list[str]) -> int:
    result = json.loads(Path(argv[0]).read_text())
    result["goals"] = goals(result)
    print(report(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
