"""The costs of encoder-cache connectors' calls without an engine: looks, saves and loads of 1 to 64 MiB.

The connectors take turns within each round, so what else the machine does comes to all alike. Part of
`vllm_connectors.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from bench import vllm_cpu_connector

MIB = 1 << 20
SIZES_MIB = (1, 4, 16, 64)
WIDTH = vllm_cpu_connector.WIDTH
Pair = tuple[Any, Any]


def made(transfer: dict[str, Any], *, in_engines_only: bool) -> Pair:
    """Return a connector's scheduler's and worker's halves; of one that is only in engines, stood in for."""
    from vllm.config import ECTransferConfig
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    settings = ECTransferConfig(**transfer)
    if in_engines_only:
        return vllm_cpu_connector.connectors(settings, 256 * MIB)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(model="m", dtype=torch.float32, multimodal_config=None),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        ec_transfer_config=settings,
    )
    create = ECConnectorFactory.create_connector
    return create(config, ECConnectorRole.SCHEDULER), create(config, ECConnectorRole.WORKER)


def measured(pairs: dict[str, Pair], rounds: int) -> dict[str, Any]:
    """Return medians by system and size, and the least of what a busy machine spreads most."""
    found: dict[str, Any] = {name: {} for name in pairs}
    for size in SIZES_MIB:
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in pairs}
        for number in range(rounds):
            for name, pair in pairs.items():
                turns[name].append(_turn(*pair, f"{size}-{number}", size))
        for name, taken in turns.items():
            cell = {
                what: round(statistics.median(each[what] for each in taken), 2) for what in taken[0]
            }
            for what in ("saved after, us", "load, us"):
                cell[f"{what}, least"] = round(min(each[what] for each in taken), 2)
            cell["load, GB/s at best"] = round(size * MIB / cell["load, us, least"] / 1e3, 2)
            found[name][f"{size} MiB"] = cell
    for name, (scheduler, _) in pairs.items():
        looks = [_look_us(scheduler, f"nowhere {number}") for number in range(1000)]
        found[name]["a look at what is nowhere, us"] = round(statistics.median(looks), 2)
    return found


def _turn(scheduler: Any, worker: Any, name: str, size: int) -> dict[str, float]:
    """Save one output, look at it, and load it, as a scheduler and a worker have it called."""
    output = torch.rand(size * MIB // 4 // WIDTH, WIDTH)
    position = SimpleNamespace(offset=0, length=len(output), get_num_embeds=lambda: len(output))
    feature = SimpleNamespace(identifier=name, modality="image", mm_position=position, data=None)
    request = SimpleNamespace(
        request_id="r", mm_features=[feature], get_num_encoder_embeds=lambda _: len(output)
    )
    scheduler.has_cache_item(name)
    scheduler.update_state_after_alloc(request, 0)
    worker.bind_connector_metadata(scheduler.build_connector_meta(_step()))
    began_s = time.perf_counter()
    worker.save_caches({name: output}, name)
    worker.get_finished(set())  # in which some copy
    save_us = (time.perf_counter() - began_s) * 1e6
    while not _there(scheduler, worker, name):
        time.sleep(1e-4)  # a step's time, in which a saver's thread goes on
    saved_us = (time.perf_counter() - began_s) * 1e6
    first_us = _look_us(scheduler, name)
    look_us = statistics.median(_look_us(scheduler, name) for _ in range(20))
    scheduler.has_cache_item(name)
    scheduler.update_state_after_alloc(request, 0)
    worker.bind_connector_metadata(scheduler.build_connector_meta(_step()))
    cache: dict[str, torch.Tensor] = {}
    load_us = _us(lambda: worker.start_load_caches(cache))
    read_us = _us(cache[name].sum)
    assert torch.equal(cache[name], output)
    _tell(scheduler, worker)
    return {
        "save call, us": save_us,
        "saved after, us": saved_us,
        "look at a hit, first, us": first_us,
        "look at a hit, us": look_us,
        "load, us": load_us,
        "load and a first read, us": load_us + read_us,
    }


def _step() -> Any:
    return SimpleNamespace(scheduled_encoder_inputs={}, num_scheduled_tokens={})


def _tell(scheduler: Any, worker: Any) -> None:
    told = worker.build_connector_worker_meta()
    if told is not None:
        scheduler.update_connector_output(SimpleNamespace(ec_connector_worker_meta=told))


def _there(scheduler: Any, worker: Any, name: str) -> bool:
    """Whether a save has ended, by a step without work."""
    _tell(scheduler, worker)
    there = scheduler.has_cache_item(name)
    scheduler.build_connector_meta(_step())
    return bool(there)


def _look_us(scheduler: Any, name: str) -> float:
    took = _us(lambda: scheduler.has_cache_item(name))
    scheduler.build_connector_meta(_step())
    return took


def _us(call: Callable[[], Any]) -> float:
    since_s = time.perf_counter()
    call()
    return (time.perf_counter() - since_s) * 1e6
