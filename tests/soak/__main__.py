"""Run the soak from a command line; see `soak`."""

from __future__ import annotations

import argparse
import gc
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import resultfile
from soak import content
from soak.board import Board
from soak.keyed import plan as keyed_plan
from soak.keyed import report as keyed_report
from soak.keyed.perils import STEPS
from soak.keyed.storm import KeyedStorm
from soak.keyed.words import Ledger
from soak.plan import Mail, Sizes, World, cast
from soak.report import failures, show, summary
from soak.storm import Rates, Storm


def parsed(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=None, help="of the storm, at most; 1, or with --reads 60"
    )
    parser.add_argument("--keyed", action="store_true", help="the storm over hits by key")
    parser.add_argument("--reads", type=int, default=None, help="of the keyed storm, to its end")
    parser.add_argument(
        "--seed", type=int, default=None, help="of its chance; a new one if left out"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kills", type=float, default=None, help="per second, at most; see `main`")
    parser.add_argument(
        "--limits", type=float, default=None, help="per second; 1 on the CPU, else 0"
    )
    parser.add_argument("--no-memory-limits", action="store_true", help="no RLIMIT_AS")
    parser.add_argument("--out", type=Path, default=None, help="a result file to write")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Storm, then show the table; 1 if anything was wrong, lost or left."""
    options = parsed(argv)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    folder = Path(
        tempfile.mkdtemp(prefix="fc-")
    )  # short: the path of a Unix socket holds 107 bytes
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    content.warm()
    gc.collect()
    gc.freeze()  # what all processes share is looked through by none, so its pages stay shared
    storm: Storm
    if options.keyed:
        storm = keyed_storm(options, seed, folder)
    else:
        storm = Storm(world(options, seed, folder), rates(options))
    began_s = time.monotonic()
    try:
        if isinstance(storm, KeyedStorm):
            minutes = options.minutes or (1.0 if options.reads is None else 60.0)
            storm.blow_until(options.reads, minutes * 60)
        else:
            storm.blow((options.minutes or 1.0) * 60)
        seconds = time.monotonic() - began_s
        storm.calm()
        if isinstance(storm, KeyedStorm):
            result = keyed_report.summary(storm, seconds, argv)
            wrong = keyed_report.failures_of(storm, result)
            keyed_report.show(result, wrong)
        else:
            result = summary(storm, seconds, argv)
            wrong = failures(result)
            show(result, wrong)
        if wrong:
            faults = (folder / "faults.txt").read_text()
            print(f"--- faults\n{faults[:20000]}", file=sys.stderr)
        resultfile.write(options.out, result)
    finally:
        storm.abandon()
        shutil.rmtree(folder)
    return 1 if wrong else 0


def world(options: argparse.Namespace, seed: int, folder: Path) -> World:
    """What the processes of the storm over all kinds of sessions share."""
    places = cast()
    return World(
        seed=seed,
        device=options.device,
        folder=folder,
        places=places,
        board=Board(len(places), str(folder / "faults.txt")),
        mail=Mail.open(len(places)),
        sizes=Sizes.of(options.device),
    )


def rates(options: argparse.Namespace) -> Rates:
    """How often what is done in it."""
    # A CUDA context that could not be made, or met a limit, is broken for the rest of its process.
    usual = 1.0 if options.device == "cpu" else 0.0
    limits = usual if options.limits is None else options.limits
    kills = 8.0 if options.kills is None else options.kills
    return Rates(kills, 0.3, 2.0, limits, not options.no_memory_limits)


def keyed_storm(options: argparse.Namespace, seed: int, folder: Path) -> KeyedStorm:
    """The keyed storm: a process takes a second or more to begin on a GPU, so fewer are killed there."""
    places, on_cpu = keyed_plan.cast(), options.device == "cpu"
    shared = keyed_plan.KeyedWorld(
        seed=seed,
        device=options.device,
        folder=folder,
        places=places,
        board=Board(len(places), str(folder / "faults.txt")),
        mail=Mail.open(len(places)),
        sizes=keyed_plan.KeyedSizes.of(options.device),
        ledger=Ledger(len(places), len(STEPS)),
        between_s=6.0 if on_cpu else 10.0,
    )
    kills = (0.25 if on_cpu else 0.2) if options.kills is None else options.kills
    owner_kills, stops = (0.1, 2.0) if on_cpu else (0.02, 1.0)
    return KeyedStorm(shared, Rates(kills, owner_kills, stops, 0.0, False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
