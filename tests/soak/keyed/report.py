"""The table of the keyed storm, and what makes it fail."""

from __future__ import annotations

import json
from typing import Any, Final

from bench import machine
from soak.board import ERRORS, Word
from soak.keyed.perils import STEPS
from soak.keyed.plan import KeyedWorld
from soak.keyed.storm import KeyedStorm
from soak.owners import account_file
from soak.report import failures, machine_of, show_section

_COLUMNS: Final = ("first", "busy", "last")


def summary(storm: KeyedStorm, seconds: float, argv: list[str]) -> dict[str, Any]:
    """All figures, in the form of a result file."""
    world, totals, counts = storm.world, storm.world.board.totals(), storm.counts
    assert isinstance(world, KeyedWorld)
    file = account_file(world, world.places[0])
    account = json.loads(file.read_text()) if file.exists() else {}
    files = [path.name for path in world.folder.rglob("*") if path.is_file() or path.is_socket()]
    by_pool = [0, 0]
    for place in world.places:
        by_pool[place.pool] += world.board.rows[place.number][Word.READS]
    stopped_s = sum(of_one for of_one, _ in storm.owner_stops)
    return {
        "date": machine.now(),
        "command": " ".join(["python -m tests.soak", *_without_paths(argv)]),
        "machine": machine_of(world.device),
        "versions": machine.versions(None, machine.CUDA_PACKAGES),
        "seed": world.seed,
        "seconds": round(seconds, 1),
        "reads": {
            "all": totals["reads"],
            "per_second": round(totals["reads"] / seconds),
            "of_the_lasting_owners_pool": by_pool[0],
            "of_the_pool_whose_owners_are_killed": by_pool[1],
            "misses": totals["misses"],
            "by_get_or_put": totals["made_or_found"],
        },
        "puts": totals["puts"],
        "storm": {
            "kills": counts["kills"],
            "kills_at_a_step": counts["kills at a step"],
            "owner_kills": counts["owner kills"],
            "stops": counts["stops"],
            "stops_at_a_step": sum(world.ledger.stops(step) for step in range(len(STEPS))),
            "long_stops_of_the_lasting_owner": len(storm.owner_stops),
            "seconds_of_these": round(stopped_s, 1),
            "reads_in_its_pool_meanwhile": sum(reads for _, reads in storm.owner_stops),
        },
        "killed_at": dict(sorted(storm.killed_at.items())),
        "stopped_at": {name: world.ledger.stops(step) for step, name in enumerate(STEPS)},
        "wrong": {
            "bytes": totals["wrong"],
            "versions_replaced_before": totals["stale"],
            "errors_outside_the_tree": totals["outside"],
            "ended_by_themselves": counts["ended by themselves"],
            "hung": counts["hung"],
        },
        "lost": account.get("left"),
        "endpoints_left": [f for f in files if not f.startswith(("account", "faults.txt"))],
        "descriptors_left_in_clients": totals["fds_left"],
        "lasting_owner": account.get("statistics"),
        "poisoned": account.get("poisoned"),
        "segments": account.get("segments"),
        "figures": {name: account[name] for name in _COLUMNS} if account else None,
        "errors": {name: totals[name] for name in ERRORS if totals[name]},
    }


def _without_paths(argv: list[str]) -> list[str]:
    """A command as it is written anywhere: where its result goes is nobody's business."""
    at = argv.index("--out") if "--out" in argv else len(argv)
    return argv[:at] + argv[at + 2 :]


def failures_of(storm: KeyedStorm, result: dict[str, Any]) -> list[str]:
    """What a keyed storm must not show, and what it must."""
    found = failures({**result, "endpoints_left": _of_the_living(result["endpoints_left"])})
    if storm.wanted is not None and result["reads"]["all"] < storm.wanted:
        found.append(f"{result['reads']['all']} reads where {storm.wanted} were wanted")
    told, seen = (result["lasting_owner"] or {}).get("hits", 0), result["reads"]
    if told < seen["of_the_lasting_owners_pool"]:
        found.append(f"{told} hits by its owner's statistics, fewer than were read")
    stops = storm.owner_stops
    if stops and not result["storm"]["reads_in_its_pool_meanwhile"]:
        found.append("no reads while the owner was stopped")
    return found


def _of_the_living(files: list[str]) -> list[str]:
    return [name for name in files if not name.startswith("pool1")]  # of an owner that was killed


def show(result: dict[str, Any], wrong: list[str]) -> None:
    """Print the table."""
    print(f"{result['seconds']} s, seed {result['seed']}, {result['puts']:,} puts")
    sections = ("reads", "storm", "killed_at", "stopped_at", "wrong", "lost", "lasting_owner")
    for section in (*sections, "poisoned", "segments"):
        show_section(section, result[section])
    for name in ("endpoints_left", "descriptors_left_in_clients"):
        print(f"{name.replace('_', ' '):<34}{result[name] or 0!s:>12}")
    if result["figures"]:
        print(f"\n{'owner':<34}" + "".join(f"{name:>12}" for name in _COLUMNS))
        for row in result["figures"]["first"]:
            values = [result["figures"][column][row] for column in _COLUMNS]
            print(f"{row.replace('_', ' '):<34}" + "".join(f"{value:>12,}" for value in values))
    show_section("errors", result["errors"])
    print("\n" + ("\n".join(["FAILED", *wrong]) if wrong else "no byte wrong, nothing lost"))
