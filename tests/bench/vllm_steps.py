"""What a vLLM step with no multimodal work pays for a connector: each call that vLLM makes, in microseconds.

    make test-vllm   # makes .venv-vllm
    PYTHONPATH=src .venv-vllm/bin/python tests/bench/vllm_steps.py --out vllm-steps.json

The scheduler's and the worker's calls of one step, in vLLM 0.32's order, by `FeatcacheECConnector`, vLLM's
`ECExampleConnector` and a connector that does nothing (``none``: the loop's own cost), in turns of a round;
medians over rounds of a step's mean. Two kinds of steps: no request has an image, and each of 16 requests has
one that is long computed. Whole engines, whose steps take milliseconds, can't tell tens of microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine, resultfile
from bench.vllm_connectors import EXAMPLE, FEATCACHE, NONE, PACKAGES, transfer
from featcache import blocking

REQUESTS = 16
Steps = Callable[[int], float]


def connectors(system: str, endpoint: str, folder: Path) -> tuple[Any, Any]:
    """Return a system's scheduler and worker."""
    from vllm.config import ECTransferConfig
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorRole
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    class Nothing(ECConnectorBase):  # type: ignore[misc]
        """Every call of the interface, and no work."""

        def start_load_caches(self, encoder_cache: Any, **_: Any) -> None: ...

        def save_caches(self, encoder_cache: Any, mm_hash: str, **_: Any) -> None: ...

        def has_cache_item(self, identifier: str) -> bool:
            return False

        def update_state_after_alloc(self, request: Any, index: int) -> None: ...

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            return None

    ec = transfer(FEATCACHE if system == NONE else system, "steps", endpoint, folder)
    assert ec is not None
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(model="m", dtype=torch.float32, multimodal_config=None),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        ec_transfer_config=ECTransferConfig(**ec),
    )
    roles = ECConnectorRole.SCHEDULER, ECConnectorRole.WORKER
    if system == NONE:
        return Nothing(config, roles[0]), Nothing(config, roles[1])
    made = [ECConnectorFactory.create_connector(config, role) for role in roles]
    return made[0], made[1]


def calls_of(scheduler: Any, worker: Any, images: bool) -> list[tuple[str, Callable[[], Any]]]:
    """Return the calls of a step by name, in vLLM's order."""
    feature = SimpleNamespace(
        identifier="a", mm_position=SimpleNamespace(offset=0, length=576), data=None
    )
    requests = [SimpleNamespace(request_id=str(n), mm_features=[feature]) for n in range(REQUESTS)]
    tokens = {request.request_id: 1 for request in requests}
    output = SimpleNamespace(scheduled_encoder_inputs={}, num_scheduled_tokens=tokens)
    cache: dict[str, torch.Tensor] = {}
    step: list[Any] = [None, None]

    def ready() -> None:
        for request in requests:
            scheduler.ensure_cache_available(request, 1000)

    def build() -> None:
        step[0] = scheduler.build_connector_meta(output)

    def tell() -> None:
        step[1] = worker.build_connector_worker_meta()

    def told() -> None:
        if step[1] is not None:
            scheduler.update_connector_output(SimpleNamespace(ec_connector_worker_meta=step[1]))

    return [
        *([(f"ensure_cache_available x {REQUESTS}", ready)] if images else []),
        ("build_connector_meta", build),
        ("bind_connector_metadata", lambda: worker.bind_connector_metadata(step[0])),
        ("start_save_caches", lambda: worker.start_save_caches(encoder_cache=cache)),
        ("start_load_caches", lambda: worker.start_load_caches(cache)),
        ("get_finished", lambda: worker.get_finished(set())),
        ("build_connector_worker_meta", tell),
        ("clear_connector_metadata", worker.clear_connector_metadata),
        ("take_unavailable_requests", scheduler.take_unavailable_requests),
        ("update_connector_output", told),
        ("get_ec_connector_stats", scheduler.get_ec_connector_stats),
    ]


def steps_us(calls: list[tuple[str, Callable[[], Any]]], count: int) -> float:
    """Return the mean of whole steps."""
    work = [call for _, call in calls]
    since_s = time.perf_counter()
    for _ in range(count):
        for call in work:
            call()
    return (time.perf_counter() - since_s) / count * 1e6


def each_us(calls: list[tuple[str, Callable[[], Any]]], count: int) -> dict[str, float]:
    """Return the mean of each call, the clock's own cost included."""
    took = dict.fromkeys([name for name, _ in calls], 0.0)
    for _ in range(count):
        for name, call in calls:
            since_s = time.perf_counter()
            call()
            took[name] += time.perf_counter() - since_s
    return {name: each / count * 1e6 for name, each in took.items()}


def measured(systems: dict[str, tuple[Any, Any]], rounds: int, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, images in (("no image", False), (f"{REQUESTS} images, long computed", True)):
        calls = {name: calls_of(*pair, images) for name, pair in systems.items()}
        whole: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(rounds):
            for name in systems:
                whole[name].append(steps_us(calls[name], count))
        each = {name: each_us(calls[name], count) for name in systems}
        found[kind] = {
            name: {
                "a step, us": round(statistics.median(whole[name]), 2),
                "least, us": round(min(whole[name]), 2),
                "calls, us": {call: round(value, 2) for call, value in each[name].items()},
            }
            for name in systems
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--count", type=int, default=500, help="steps of a turn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="fc-", dir="/dev/shm") as path,
        blocking.create(capacity="64MiB") as cache,
    ):
        systems = {
            name: connectors(name, cache.endpoint, Path(path))
            for name in (NONE, EXAMPLE, FEATCACHE)
        }
        found = measured(systems, options.rounds, options.count)
        for pair in systems.values():
            for one in pair:
                one.shutdown()
    result = {
        "command": machine.command(sys.argv[1:], Path(__file__).name),
        "machine": machine.machine(),
        "versions": machine.versions(None, PACKAGES),
        "steps": found,
    }
    for kind, rows in found.items():
        for name, row in rows.items():
            print(f"{kind}: {name}: {row}", flush=True)
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
