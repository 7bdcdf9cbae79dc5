"""The vLLM connector's classes on GPUs, without an engine: two instances, tensor parallel, saves and loads.

    PYTHONPATH=src python tests/bench/cuda_vllm.py --out vllm-cuda.json

The owner is on GPU 0. One instance has a worker on the last GPU; the other has a tensor-parallel rank
on each GPU. Each instance has its scheduler in a process of its own, as vLLM has. Encoder outputs of 1
to 64 MiB are saved by the first and loaded by all ranks of the second, every byte looked at on the GPUs.
"""

from __future__ import annotations

import pickle
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import proofs
from bench.crew import Child, Crew, Pipe, until
from bench.patterns import Patterns
from bench.proofs import MIB, Proof, gpu_index, is_cuda, mib
from integrations.vllm import stubs

SIZES = (1, 4, 16, 64)
ROUNDS = 8
ROW_BYTES = 8192


def _connector(endpoint: str, engine: str, role: str, ranks: int, *, scheduler: bool) -> Any:
    stubs.install()
    from vllm.distributed.ec_transfer.ec_connector.base import (
        ECConnectorRole,
    )

    from featcache.integrations.vllm import FeatcacheECConnector

    config = stubs.config(endpoint, engine, role, ranks)
    return FeatcacheECConnector(
        config, ECConnectorRole.SCHEDULER if scheduler else ECConnectorRole.WORKER
    )


async def scheduler(pipe: Pipe, endpoint: str, engine: str, role: str, ranks: int) -> None:
    """Plan a step for each list of identifiers that it is sent, and take what the ranks tell."""
    connector = _connector(endpoint, engine, role, ranks, scheduler=True)
    pipe.say("ready", torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    while (message := await pipe.hear())[0] != "end":
        what, given = message
        if what == "plan":
            pipe.say("planned", *_plan(connector, given))
            continue
        for told in given:
            meta = pickle.loads(told)
            if meta is not None:
                connector.update_connector_output(SimpleNamespace(ec_connector_worker_meta=meta))
        pipe.say("told", sum(connector._scheduler.leased.values()))
    connector.shutdown()
    pipe.say("left", torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _plan(connector: Any, identifiers: list[str]) -> tuple[bytes, list[bool], list[float]]:
    features = [SimpleNamespace(identifier=each) for each in identifiers]
    request = SimpleNamespace(request_id="r", mm_features=features)
    there, looks_us = [], []
    for each in identifiers:
        since_s = time.perf_counter()
        there.append(connector.has_cache_item(each))
        looks_us.append((time.perf_counter() - since_s) * 1e6)
    for index in range(len(identifiers)):
        connector.update_state_after_alloc(request, index)
    step = connector.build_connector_meta(SimpleNamespace(scheduled_encoder_inputs={}))
    return pickle.dumps(step), there, looks_us


async def worker(
    pipe: Pipe, endpoint: str, engine: str, role: str, ranks: int, device: str
) -> None:
    """Save or load what it is told, on a stream with work before it."""
    patterns = Patterns(device, max(SIZES) * MIB)
    pipe.say("begun")
    await pipe.hear()
    connector = _connector(endpoint, engine, role, ranks, scheduler=False)
    pipe.say("attached")
    while (message := await pipe.hear())[0] != "end":
        what, given = message
        if what == "save":
            pipe.say("saved", *_save(connector, patterns, given))
        else:
            pipe.say("loaded", *_load(connector, patterns, *given))
    connector.shutdown()
    pipe.say("left")


def _save(connector: Any, patterns: Patterns, features: dict[int, int]) -> tuple[float, float]:
    """Save each as an encoder would leave it; return microseconds of a call, and seconds of all."""
    calls, cache = [], {}
    since_s = time.perf_counter()
    for number, nbytes in features.items():
        with patterns.next_stream():
            patterns.drowse(2)  # an encoder that is yet at it
            output = (
                patterns.fill(number, nbytes)
                .clone()
                .view(torch.bfloat16)
                .reshape(-1, ROW_BYTES // 2)
            )
            cache[str(number)] = output
            begun_s = time.perf_counter()
            connector.save_caches(cache, str(number))
            calls.append((time.perf_counter() - begun_s) * 1e6)
            del output
            cache.clear()
    ended = 0
    while ended < len(features):
        meta = connector.build_connector_worker_meta()
        ended += 0 if meta is None else len(meta.saved) + len(meta.dropped)
    return statistics.median(calls), time.perf_counter() - since_s


def _load(
    connector: Any, patterns: Patterns, step: bytes, numbers: list[int]
) -> tuple[float, float, int, int, bytes]:
    """Load a step; return its call's and its whole seconds, bytes, wrong bytes, and what it tells."""
    cache: dict[str, torch.Tensor] = {}
    patterns.settle()
    with patterns.next_stream():
        connector.bind_connector_metadata(pickle.loads(step))
        since_s = time.perf_counter()
        connector.start_load_caches(cache)
        call_s = time.perf_counter() - since_s
        patterns.settle()
        whole_s = time.perf_counter() - since_s
        for number in numbers:
            if str(number) in cache:
                patterns.check(number, cache[str(number)].reshape(-1).view(torch.uint8))
    found = sum(tensor.nbytes for tensor in cache.values())
    told = pickle.dumps(connector.build_connector_worker_meta())
    return call_s, whole_s, found, patterns.wrong_bytes(), told


class Instance:
    """A scheduler and its ranks."""

    def __init__(self, crew: Crew, endpoint: str, name: str, role: str, devices: list[str]) -> None:
        ranks = len(devices)
        self.devices = devices
        self.scheduler = crew.start(scheduler, endpoint, name, role, ranks)
        self.workers: list[Child] = [
            crew.start(worker, endpoint, name, role, ranks, device) for device in devices
        ]

    async def end(self) -> bool:
        """End all; return whether the scheduler had a context on a GPU."""
        for child in self.workers:
            child.tell("end")
            await child.expect("left")
        self.scheduler.tell("end")
        (context,) = await self.scheduler.expect("left")
        return bool(context)


async def body(proof: Proof) -> None:
    device: str = proof.options.device
    devices = [f"cuda:{n}" for n in range(len(proof.nvml))][:2] if is_cuda(device) else ["cpu"] * 2
    for backend in proofs.backends(proof.options):
        settings = proofs.settings(backend)
        capacity = "2GiB" if is_cuda(device) else "1GiB"
        async with featcache.create(
            device=device, capacity=capacity, initial=capacity, settings=settings
        ) as cache:
            with Crew() as crew:
                await _scene(proof, backend, cache, crew, devices)


async def _scene(
    proof: Proof, backend: str, cache: featcache.FeatureCache, crew: Crew, devices: list[str]
) -> None:
    first = Instance(crew, cache.endpoint, "first", "ec_producer", devices[-1:])
    second = Instance(crew, cache.endpoint, "second", "ec_consumer", devices)
    contexts = [(await one.scheduler.expect("ready"))[0] for one in (first, second)]
    workers = first.workers + second.workers
    for child in workers:
        await child.expect("begun")
    for child in workers:
        child.tell("go")
    for child in workers:
        await child.expect("attached")
    await _transfers(proof, backend, cache, first, second)
    await _contexts(proof, backend, [first, second])
    contexts += [await one.end() for one in (first, second)]
    proof.claim(
        f"{backend}: schedulers with a context on a GPU", sum(contexts), "0", not any(contexts)
    )


async def _contexts(proof: Proof, backend: str, instances: list[Instance]) -> None:
    """Claim that no process but those with a rank there has a context on the owner's GPU."""
    if not len(proof.nvml):
        proof.not_run(f"{backend}: foreign contexts", "needs a GPU")
        return
    index = gpu_index(proof.options.device)
    await proof.nvml.settled()
    users = proof.nvml.process_bytes(index)
    there, foreign = 0, 0
    for one in instances:
        foreign += users.get(one.scheduler.pid, 0)
        for child, device in zip(one.workers, one.devices, strict=True):
            if gpu_index(device) == index:
                there += users.get(child.pid, 0)
            else:
                foreign += users.get(child.pid, 0)
    if not there or len({gpu_index(device) for one in instances for device in one.devices}) < 2:
        proof.not_run(
            f"{backend}: foreign contexts", "needs two GPUs, and NVML's word on processes"
        )
        return
    proof.note(f"{backend}: MiB of the ranks of the owner's GPU there", mib(there))
    proof.claim(f"{backend}: MiB of all others there", mib(foreign), "0", foreign == 0)


async def _transfers(
    proof: Proof, backend: str, cache: featcache.FeatureCache, first: Instance, second: Instance
) -> None:
    number, wrong, leases, missed = 0, 0, 0, 0
    firsts: list[float] = []
    looks: list[float] = []
    for size in SIZES:
        rates: dict[str, list[float]] = {device: [] for device in second.devices}
        saves: list[float] = []
        for _ in range(ROUNDS):
            some = {number + n: size * MIB for n in range(2)}
            number += len(some)
            first.workers[0].tell("save", some)
            call_us, seconds = await first.workers[0].expect("saved")
            saves.append(call_us)
            proof.details.setdefault(f"{backend}: save s, {size} MiB x {len(some)}", []).append(
                round(seconds, 4)
            )
            second.scheduler.tell("plan", [str(one) for one in some])
            step, there, looks_us = await second.scheduler.expect("planned")
            firsts.append(looks_us[0])  # of a process that slept meanwhile: its code is in no cache
            looks.extend(looks_us[1:])
            missed += there.count(False)
            told = []
            for device, child in zip(second.devices, second.workers, strict=True):
                child.tell("load", (step, list(some)))
                _, whole_s, nbytes, wrong_bytes, tells = await child.expect("loaded")
                told.append(tells)
                wrong += wrong_bytes
                missed += nbytes != sum(some.values())
                rates[device].append(nbytes / whole_s / 1e9)
            second.scheduler.tell("told", told)
            (leases,) = await second.scheduler.expect("told")
        best = {device: round(max(rate), 2) for device, rate in rates.items()}
        proof.note(f"{backend}: {size} MiB, GB/s of a load by rank", list(best.values()))
        proof.note(
            f"{backend}: {size} MiB, us of a save's call", round(statistics.median(saves), 1)
        )
    proof.note(f"{backend}: us of has_cache_item after idling", round(statistics.median(firsts), 1))
    proof.note(f"{backend}: us of has_cache_item, the next", round(statistics.median(looks), 1))
    proof.claim(f"{backend}: wrong bytes", wrong, "0", wrong == 0)
    proof.claim(f"{backend}: features missed", missed, "0", missed == 0)
    proof.claim(f"{backend}: leases left", leases, "0", leases == 0)
    await until("the keys are there", lambda: cache.statistics().keys)


def main() -> int:
    return proofs.run(body, proofs.options(__doc__).parse_args())


if __name__ == "__main__":
    sys.exit(main())
