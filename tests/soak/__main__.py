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
from soak.plan import Mail, Sizes, World, cast
from soak.report import failures, show, summary
from soak.storm import Rates, Storm


def parsed(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of the storm (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=None, help="of its chance; a new one if left out"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--kills", type=float, default=8.0, help="per second, at most (%(default)s)"
    )
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
    places = cast()
    world = World(
        seed=seed,
        device=options.device,
        folder=folder,
        places=places,
        board=Board(len(places), str(folder / "faults.txt")),
        mail=Mail.open(len(places)),
        sizes=Sizes.of(options.device),
    )
    content.warm()
    gc.collect()
    gc.freeze()  # what all processes share is looked through by none, so its pages stay shared
    # A CUDA context that could not be made, or met a limit, is broken for the rest of its process.
    usual = 1.0 if options.device == "cpu" else 0.0
    limits = usual if options.limits is None else options.limits
    rates = Rates(options.kills, 0.3, 2.0, limits, not options.no_memory_limits)
    storm, began_s = Storm(world, rates), time.monotonic()
    try:
        storm.blow(options.minutes * 60)
        seconds = time.monotonic() - began_s
        storm.calm()
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
