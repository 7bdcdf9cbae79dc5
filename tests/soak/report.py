"""The table of a soak, and what makes it fail."""

from __future__ import annotations

import json
import os
from typing import Any, Final

from bench import machine
from soak.board import ERRORS, OPERATIONS
from soak.owners import account_file
from soak.storm import Storm

_ANON_MAY_GROW_KIB: Final = 48 << 10
"""What the allocators of Python and torch may keep; a leak of a session or a put grows beyond it."""
_COLUMNS: Final = ("first", "busy", "last")


def summary(storm: Storm, seconds: float, argv: list[str]) -> dict[str, Any]:
    """All figures, in the form of a result file."""
    world, totals, counts = storm.world, storm.world.board.totals(), storm.counts
    file = account_file(world, world.places[0])
    account = json.loads(file.read_text()) if file.exists() else None
    times = sorted(account.pop("reads_back_s")) if account else []
    own = ("account", "faults.txt", "pool")
    files = [path.name for path in world.folder.rglob("*") if path.is_file() or path.is_socket()]
    return {
        "date": machine.now(),
        "command": " ".join(["python -m tests.soak", *argv]),
        "machine": machine_of(world.device),
        "versions": machine.versions(None, machine.CUDA_PACKAGES),
        "seed": world.seed,
        "seconds": round(seconds, 1),
        "operations": {
            "all": sum(totals[word.name.lower()] for word in OPERATIONS),
            **{word.name.lower(): totals[word.name.lower()] for word in OPERATIONS},
            "made": totals["made"],
        },
        "storm": {
            "kills": counts["kills"],
            "owner_kills": counts["owner kills"],
            "stops": counts["stops"],
            "limits": counts["limits"],
            "ended_under_a_limit": counts["ended under a limit"],
        },
        "killed_at": dict(sorted(storm.killed_at.items())),
        "wrong": {
            "bytes": totals["wrong"],
            "errors_outside_the_tree": totals["outside"],
            "ended_by_themselves": counts["ended by themselves"],
            "hung": counts["hung"],
        },
        "lost": account["left"] if account else None,
        "endpoints_left": [name for name in files if not name.startswith(own[:2])],
        "descriptors_left_in_clients": totals["fds_left"],
        "reads_back_ms": {
            "deaths": len(times),
            "median": _at(times, 0.5),
            "p99": _at(times, 0.99),
            "max": _at(times, 1.0),
        },
        "owner": {
            name: value
            for name, value in (account or {}).items()
            if name not in (*_COLUMNS, "left")
        },
        "figures": {name: account[name] for name in _COLUMNS} if account else None,
        "errors": {name: totals[name] for name in ERRORS if totals[name]}
        | {"outside the tree, under a limit": totals["outside_limited"]},
    }


def machine_of(device: str) -> dict[str, Any]:
    """The machine, and its GPUs if they were used."""
    return machine.machine() | ({} if device == "cpu" else {"gpus": machine.gpus()})


def _at(times: list[float], share: float) -> float | None:
    if not times:
        return None
    return round(times[min(len(times) - 1, int(share * len(times)))] * 1e3, 1)


def failures(result: dict[str, Any]) -> list[str]:
    """What a soak must not show."""
    found = [f"{name}: {count}" for name, count in result["wrong"].items() if count]
    if result["lost"] is None:
        return [*found, "the lasting owner left no account"]
    found += [f"{name} lost: {count}" for name, count in result["lost"].items() if count]
    found += [f"endpoint left: {name}" for name in result["endpoints_left"]]
    if result["descriptors_left_in_clients"]:
        found.append(f"descriptors left in clients: {result['descriptors_left_in_clients']}")
    first, last = result["figures"]["first"], result["figures"]["last"]
    for name in ("descriptors", "mapped_memfds"):
        if last[name] > first[name]:
            found.append(f"{name}: {first[name]} at first, {last[name]} at last")
    if last["anon_kib"] > first["anon_kib"] + _ANON_MAY_GROW_KIB:
        found.append(f"anonymous KiB: {first['anon_kib']} at first, {last['anon_kib']} at last")
    return found


def show(result: dict[str, Any], wrong: list[str]) -> None:
    """Print the table."""
    print(f"{result['seconds']} s, {os.cpu_count()} cores, seed {result['seed']}")
    for section in ("operations", "storm", "killed_at", "wrong", "lost", "reads_back_ms", "owner"):
        show_section(section, result[section])
    for name in ("endpoints_left", "descriptors_left_in_clients"):
        print(f"{name.replace('_', ' '):<34}{result[name] or 0!s:>12}")
    if result["figures"]:
        print(f"\n{'owner':<34}" + "".join(f"{name:>12}" for name in _COLUMNS))
        for row in result["figures"]["first"]:
            values = [result["figures"][column][row] for column in _COLUMNS]
            print(f"{row.replace('_', ' '):<34}" + "".join(f"{value:>12,}" for value in values))
    show_section("errors", result["errors"])
    print("\n" + ("\n".join(["FAILED", *wrong]) if wrong else "nothing wrong, nothing lost"))


def show_section(name: str, rows: dict[str, Any] | None) -> None:
    """Print one section of the table."""
    print(f"\n{name.replace('_', ' ')}")
    for row, value in (rows or {}).items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        print(f"  {row.replace('_', ' '):<32}{shown:>12}")
