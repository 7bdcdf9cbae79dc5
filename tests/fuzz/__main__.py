"""Fuzz the targets with Atheris, one after another; keep what reaches new code, minimised."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.minimise import minimise
from fuzz.seeds import seeds

CORPUS = Path(__file__).parent / "corpus"
_ENGINE = Path(__file__).parent / "engine.py"


def fuzz(target: str, seconds: float, corpus: Path, found: Path) -> dict[str, Any]:
    """Fuzz one target; return its figures. A failing input is written to `found`."""
    began_s = time.monotonic()
    prefix = f"-artifact_prefix={found}/{target}-"
    options = [f"-max_total_time={int(seconds)}", "-timeout=10", "-rss_limit_mb=2048", prefix]
    options += ["-max_len=4096", "-print_final_stats=1", "-reload=0"]
    command = [sys.executable, str(_ENGINE), target, str(corpus), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    figures = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
    edges = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)
    return {
        "target": target,
        "executions": figures.get("number_of_executed_units", 0),
        "seconds": round(time.monotonic() - began_s, 1),
        "edges_at_first": int(edges[0][0]) if edges else 0,
        "edges_at_last": int(edges[-1][0]) if edges else 0,
        "new_inputs": figures.get("new_units_added", 0),
        "peak_rss_mib": figures.get("peak_rss_mb", 0),
        "failed": done.returncode != 0,
        "failure": done.stderr[-3000:] if done.returncode else "",
    }


def main(argv: list[str]) -> int:
    """Fuzz; 1 if an input broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of all targets together")
    parser.add_argument("--target", choices=[*seeds(), "all"], default="all")
    parser.add_argument("--keep", action="store_true", help="write what was found into the corpus")
    parser.add_argument("--found", type=Path, default=Path.cwd(), help="for inputs that fail")
    options = parser.parse_args(argv)
    chosen = list(seeds()) if options.target == "all" else [options.target]
    failed = False
    for target in chosen:
        with tempfile.TemporaryDirectory() as folder:
            corpus, kept = Path(folder), CORPUS / target
            inputs = seeds()[target] + [path.read_bytes() for path in kept.glob("*")]
            for number, data in enumerate(inputs):
                (corpus / f"{number:04}").write_bytes(data)
            figures = fuzz(target, options.minutes * 60 / len(chosen), corpus, options.found)
            print(json.dumps(figures), flush=True)
            failed |= figures["failed"]
            if options.keep:
                _keep(kept, minimise(target, [path.read_bytes() for path in corpus.iterdir()]))
    return int(failed)


def _keep(folder: Path, inputs: list[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("input-*"):
        path.unlink()
    for number, data in enumerate(inputs):
        (folder / f"input-{number:02}").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
