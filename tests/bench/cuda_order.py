"""The order proof: no reader ever sees a byte that is not the feature's own.

    PYTHONPATH=src python tests/bench/cuda_order.py --rounds 100000 --out order.json

One owner and readers on its GPU and on another put and read features of 1 KiB to 64 MiB through a
pool that is always too small and grows and shrinks, on several streams each, some of them kept busy
so that bytes and payments come late. Every second reader uses the blocking API. Each feature's
content follows from its number, each read is checked on the GPU in stream order, and what is freed is
poisoned at once: a read that comes too late, and a copy that comes too early, are both seen.
"""

from __future__ import annotations

import random
import sys
import time
from asyncio import TaskGroup
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import proofs
from bench.crew import Child, Crew, Post, one_way, until
from bench.order_reader import DISCARDED, END, HEAD, NEGLECTED, PLAIN, RELEASED, reader
from bench.patterns import Patterns, log_uniform
from bench.poison import Poison
from bench.proofs import MIB, Proof
from featcache.settings import parse_bytes

SMALL_BYTES = 64 << 10
TTL_S = 0.05
_KINDS = (PLAIN, RELEASED, DISCARDED, NEGLECTED)
_WEIGHTS = (94, 2, 2, 2)


class Owner:
    """Puts feature after feature."""

    def __init__(
        self, proof: Proof, cache: featcache.FeatureCache, outboxes: list[Connection]
    ) -> None:
        chosen = proof.options
        self._cache = cache
        self._patterns = Patterns(chosen.device, chosen.most, chosen.streams)
        self._random = random.Random(chosen.seed)
        self._chosen = chosen
        self._names = [f"reader{n}" for n in range(len(outboxes))]
        self._outboxes = outboxes
        self._post = Post()
        self.counts: Counter[str] = Counter()

    async def put_all(self) -> None:
        chosen = self._chosen
        give_up_s = time.monotonic() + chosen.seconds
        for number in range(1, chosen.rounds + 1):
            await self._put(number)
            if number % chosen.phase == 0:
                await self._between(number)
            if time.monotonic() > give_up_s:
                break
        self._send(0, END)

    def _send(self, number: int, kind: int, data: bytes = b"") -> None:
        self._post.send(HEAD.pack(number, kind) + data, self._outboxes)

    async def _put(self, number: int) -> None:
        random_ = self._random
        # Every third phase has small features only: the tail empties and is given back under load.
        small = number // self._chosen.phase % 3 == 2
        most = min(SMALL_BYTES, self._chosen.most) if small else self._chosen.most
        nbytes = log_uniform(random_, self._chosen.least, most)
        kind = random_.choices(_KINDS, _WEIGHTS)[0]
        readers: Any = self._names if random_.random() < 0.2 else len(self._names)
        with self._patterns.next_stream():
            if random_.random() < 0.03:
                self._patterns.drowse(random_.uniform(0.05, 2))
            feature = self._patterns.fill(number, nbytes)
            ref = await self._cache.put(
                feature,
                readers=readers,
                ttl=TTL_S if kind == NEGLECTED else None,
                timeout=60,
            )
        self._send(number, kind, ref.to_bytes())
        self.counts["rounds"] += 1
        self.counts["bytes"] += nbytes
        if kind == DISCARDED:
            try:
                await self._cache.discard(ref)
                self.counts["discards"] += 1
            except featcache.StaleRef:
                self.counts["discards that came too late"] += 1

    async def _between(self, number: int) -> None:
        """Now and then let the pool run empty, so that it shrinks as far as it can."""
        print(f"{number} rounds", file=sys.stderr, flush=True)
        if number // self._chosen.phase % 6 == 0:
            cache = self._cache
            await until("the pool is empty", lambda: not cache.statistics().used_bytes)
            idle_until_s = time.monotonic() + 3 * self._chosen.idle
            await until("idle", lambda: time.monotonic() > idle_until_s)


class Growth:
    """Counts growths and shrinks by their events."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, event: featcache.events.Event) -> None:
        self.counts[event.name] += 1


async def scene(proof: Proof, backend: str, devices: list[str]) -> None:
    chosen = proof.options
    plan = {"readers": len(devices), "streams": chosen.streams, "most": chosen.most}
    with Crew() as crew:
        children, outboxes = [], []
        for index, device in enumerate(devices):
            inbox, outbox = one_way()
            mine = plan | {"index": index, "seed": chosen.seed}
            children.append(crew.start(reader, inbox, device, mine))
            outboxes.append(outbox)
            inbox.close()
        for child in children:
            await child.expect("ready")
        await _put_and_read(proof, backend, children, outboxes, devices)


async def _put_and_read(
    proof: Proof,
    backend: str,
    children: list[Child],
    outboxes: list[Connection],
    devices: list[str],
) -> None:
    chosen = proof.options
    growth = Growth()
    cache = featcache.create(
        device=chosen.device,
        capacity=chosen.capacity,
        segment=chosen.segment,
        idle=chosen.idle,
        settings=proofs.settings(backend, slots=1024),
    )
    async with cache:
        poison = Poison(cache)
        await poison.prove(cache)
        owner = Owner(proof, cache, outboxes)
        for child in children:
            child.tell(cache.endpoint)
            await child.expect("attached")
        featcache.events.add_hook(growth)
        began_s = time.monotonic()
        async with TaskGroup() as group:
            told = [group.create_task(child.expect("done", chosen.limit)) for child in children]
            await owner.put_all()
        seconds = time.monotonic() - began_s
        await until("all is recycled", lambda: not cache.statistics().used_bytes)
        statistics = cache.statistics()
    featcache.events.remove_hook(growth)
    outcomes = [dict(zip(("counts", "wrong", "stale"), t.result(), strict=True)) for t in told]
    _claim(proof, backend, owner, outcomes)
    proof.details[backend] = {
        "readers": [
            f"{device}, {'blocking' if n % 2 else 'async'}" for n, device in enumerate(devices)
        ],
        "owner": dict(owner.counts),
        "outcomes": outcomes,
        "events": dict(growth.counts),
        "poisoned": {"extents": poison.extents, "bytes": poison.poisoned_bytes},
        "seconds": round(seconds, 1),
        "waited": statistics.waited,
        "expired": statistics.expired,
    }
    proof.note(f"{backend}: puts that waited for room", statistics.waited)
    proof.note(f"{backend}: seconds", round(seconds, 1))
    grown = growth.counts["featcache.slab.committed"], growth.counts["featcache.slab.returned"]
    name = f"{backend}: growths, shrinks"
    if backend == "ipc":
        proof.note(f"{name} (one fixed segment)", grown)
    else:
        proof.claim(name, grown, "some of each", all(grown))
    proof.claim(
        f"{backend}: poisoned extents",
        poison.extents,
        "each",
        poison.extents >= owner.counts["rounds"],
    )


def _claim(proof: Proof, backend: str, owner: Owner, outcomes: list[dict[str, Any]]) -> None:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update(outcome["counts"])
    rounds, wanted = owner.counts["rounds"], proof.options.rounds
    proof.claim(f"{backend}: rounds", rounds, str(wanted), rounds >= wanted)
    proof.note(f"{backend}: GB put", round(owner.counts["bytes"] / 1e9, 1))
    proof.note(f"{backend}: GB read and checked", round(total["bytes"] / 1e9, 1))
    for name in ("get", "borrow", "get(out=)", "release", "stale, expected"):
        proof.note(f"{backend}: {name}", total[name])
    for name in ("wrong bytes", "stale, unexpected"):
        proof.claim(f"{backend}: {name}", total[name], "0", total[name] == 0)


async def body(proof: Proof) -> None:
    chosen = proof.options
    count = torch.cuda.device_count() if proofs.is_cuda(chosen.device) else 0
    other = "cuda:1" if count > 1 else chosen.device
    devices = (chosen.readers or ",".join([chosen.device, chosen.device, other, other])).split(",")
    for backend in proofs.backends(chosen, default="vmm"):
        await scene(proof, backend, devices)
    if all(device == chosen.device for device in devices) and count:
        proof.not_run("readers on a peer", "needs two GPUs")


def main() -> int:
    parser = proofs.options(__doc__)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=480.0, help="stop putting after so long")
    parser.add_argument("--readers", help="devices; two on the owner's and two on the next")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--least", type=parse_bytes, default=1024)
    parser.add_argument("--most", type=parse_bytes, default=64 * MIB)
    parser.add_argument("--capacity", type=parse_bytes, default=512 * MIB)
    parser.add_argument("--segment", type=parse_bytes, default=16 * MIB)
    parser.add_argument("--idle", type=float, default=0.1, help="seconds until the pool shrinks")
    parser.add_argument("--phase", type=int, default=2000, help="rounds of a load")
    parser.add_argument("--seed", type=int, default=1)
    return proofs.run(body, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
