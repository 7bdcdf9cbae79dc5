"""The cost of a reader on the owner's GPU: its memory by NVML, before and after each attach.

    PYTHONPATH=src python tests/bench/cuda_contexts.py --out contexts.json

The owner is on GPU 0. One reader on each other GPU in turn attaches, gets and borrows; then readers
on all of them at once, as tensor-parallel ranks do. Each of the first also with GPU 0 hidden from the
reader by CUDA_VISIBLE_DEVICES. For comparison, the naive way: torch's own IPC handle rebuilt as it
is, which opens it on GPU 0 and makes a whole context there for each reader.
"""

from __future__ import annotations

import pickle
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import proofs
from bench.crew import Child, Crew, Pipe
from bench.order_reader import Awaitable
from bench.patterns import Patterns
from bench.proofs import MIB, SLACK_BYTES, Proof, gpu_index, mib
from featcache import blocking

FEATURE_BYTES = 8 * MIB + 5
READS = 4
ASYNC, BLOCKING = STYLES = ("async", "blocking")
"""A thread of its own, as blocking clients have, begins on GPU 0: that must not make a context there."""


async def reader(pipe: Pipe, endpoint: str, device: str, style: str) -> None:
    """Read the refs it is sent, half of them borrowed; stay attached until told to end."""
    patterns = Patterns(device, FEATURE_BYTES)
    pipe.say("ready")
    await pipe.hear()
    if style == BLOCKING:
        with blocking.connect(endpoint, device=device) as client:
            await _read(pipe, Awaitable(client), patterns)
    else:
        async with featcache.connect(endpoint, device=device) as own:
            await _read(pipe, own, patterns)
    pipe.say("left")


async def _read(pipe: Pipe, client: Any, patterns: Patterns) -> None:
    pipe.say("attached")
    for turn in range(READS):
        number, data = await pipe.hear()
        ref = featcache.FeatureRef.from_bytes(data)
        if turn % 2:
            async with client.borrow(ref, timeout=30) as view:
                patterns.check(number, view)
        else:
            patterns.check(number, await client.get(ref, timeout=30))
        pipe.say("read", patterns.wrong_bytes())
    await pipe.hear()


async def naive_reader(pipe: Pipe, device: str) -> None:
    """Rebuild a tensor of another process as torch sends it, and copy it to this reader's GPU."""
    patterns = Patterns(device, FEATURE_BYTES)
    pipe.say("ready")
    number, data = await pipe.hear()
    there = pickle.loads(data)  # rebuilt as it is: on the owner's GPU
    patterns.check(number, there.to(device))
    pipe.say("read", patterns.wrong_bytes())
    await pipe.hear()


class Scene:
    """An owner on its device, and its GPU's memory as readers come and go."""

    def __init__(self, proof: Proof, backend: str) -> None:
        self.proof = proof
        self.backend = backend
        self.device: str = proof.options.device
        self.own = Patterns(self.device, FEATURE_BYTES)
        self.wrong_bytes = 0
        self._number = 0

    async def attach_and_read(
        self, cache: featcache.FeatureCache, ranks: list[tuple[str, str]], crew: Crew, **names: Any
    ) -> list[int]:
        """Start a reader on each device and have it read; return the bytes more on each GPU."""
        before = await self.proof.nvml.settled()
        children = [
            crew.start(reader, cache.endpoint, device, style, **names) for device, style in ranks
        ]
        for child in children:
            await child.expect("ready")
            child.tell("go")
        for child in children:
            await child.expect("attached")
        for _ in range(READS):
            await self._round(cache, children)
        after = await self.proof.nvml.settled()
        for child in children:
            child.tell("end")
            await child.expect("left")
            await child.ends()
        return [now - then for now, then in zip(after, before, strict=True)]

    async def _round(self, cache: featcache.FeatureCache, children: list[Child]) -> None:
        self._number += 1
        feature = self.own.fill(self._number, FEATURE_BYTES)
        ref = await cache.put(feature, readers=len(children), timeout=30)
        for child in children:
            child.tell(self._number, ref.to_bytes())
        for child in children:
            (wrong_bytes,) = await child.expect("read")
            self.wrong_bytes += wrong_bytes

    def cost(self, name: str, more_bytes: list[int], *, nothing: bool) -> None:
        """Report the readers' cost on the owner's GPU; it is nothing, if that is the claim."""
        self.proof.details[f"{self.backend}: {name}, MiB more by GPU"] = [*map(mib, more_bytes)]
        if not more_bytes:
            self.proof.not_run(f"{self.backend}: {name}", "needs a GPU")
            return
        found_bytes = more_bytes[gpu_index(self.device)]
        label = f"{self.backend}: {name}, MiB more on the owner's GPU"
        if nothing:
            self.proof.claim(label, mib(found_bytes), "0", abs(found_bytes) < SLACK_BYTES)
        else:
            self.proof.note(label, mib(found_bytes))

    async def run(self, others: list[str], per_gpu: int) -> None:
        settings = proofs.settings(self.backend)
        size = "256MiB"
        async with featcache.create(
            device=self.device, capacity=size, initial=size, settings=settings
        ) as cache:
            own = await cache.put(self.own.fill(0, FEATURE_BYTES))
            self.own.check(0, await cache.get(own, timeout=30))
            self.own.settle()
            await self._each(cache, others)
            await self._all_at_once(cache, others, per_gpu)
        wrong_bytes = self.wrong_bytes + self.own.wrong_bytes()
        self.proof.claim(f"{self.backend}: wrong bytes", wrong_bytes, "0", wrong_bytes == 0)

    async def _each(self, cache: featcache.FeatureCache, others: list[str]) -> None:
        for device in others:
            for style in STYLES:
                with Crew() as crew:
                    more = await self.attach_and_read(cache, [(device, style)], crew)
                self.cost(f"one reader on {device}, {style}", more, nothing=True)
            hidden = {"CUDA_VISIBLE_DEVICES": proofs.gpu_uuid(gpu_index(device))}
            with Crew() as crew:
                ranks = [("cuda:0", ASYNC)]
                more = await self.attach_and_read(cache, ranks, crew, environment=hidden)
            self.cost(f"one reader on {device}, which sees no other", more, nothing=True)
        with Crew() as crew:
            more = await self.attach_and_read(cache, [(self.device, ASYNC)], crew)
        self.cost(f"one reader on {self.device} itself (its own context)", more, nothing=False)

    async def _all_at_once(
        self, cache: featcache.FeatureCache, others: list[str], per_gpu: int
    ) -> None:
        if others:
            ranks = [(device, STYLES[n % 2]) for n in range(per_gpu) for device in others]
            with Crew() as crew:
                more = await self.attach_and_read(cache, ranks, crew)
            self.cost(f"{len(ranks)} readers on all the other GPUs", more, nothing=True)
        everywhere = [self.device, *others]
        ranks = [(device, STYLES[n % 2]) for n in range(per_gpu) for device in everywhere]
        with Crew() as crew:
            more = await self.attach_and_read(cache, ranks, crew)
        name = f"{len(ranks)} readers on all GPUs ({per_gpu} contexts of their own here)"
        self.cost(name, more, nothing=False)


async def naive(proof: Proof, device: str, other: str) -> None:
    """The same by torch's own handle, rebuilt as it is by a reader on another GPU."""
    own = Patterns(device, FEATURE_BYTES)
    shared = own.fill(1, FEATURE_BYTES).clone()
    own.settle()
    before = await proof.nvml.settled()
    with Crew() as crew:
        child = crew.start(naive_reader, other)
        await child.expect("ready")
        ready = await proof.nvml.settled()
        child.tell(1, bytes(ForkingPickler.dumps(shared)))
        (wrong_bytes,) = await child.expect("read")
        after = await proof.nvml.settled()
        child.tell("end")
        await child.ends()
    here = gpu_index(device)
    proof.details["naive, MiB more on the owner's GPU"] = {
        "reader started": mib(ready[here] - before[here]),
        "handle opened and read": mib(after[here] - before[here]),
    }
    proof.note(f"torch's IPC handle, reader on {other}, wrong bytes", wrong_bytes)
    proof.note(
        f"torch's IPC handle as it is, one reader on {other}, MiB more on the owner's GPU",
        mib(after[here] - before[here]),
    )


async def body(proof: Proof) -> None:
    import torch.multiprocessing.reductions  # noqa: F401 - teaches ForkingPickler about tensors

    device = proof.options.device
    others = [f"cuda:{n}" for n in range(len(proof.nvml)) if n != gpu_index(device)]
    for backend in proofs.backends(proof.options):
        await Scene(proof, backend).run(others, proof.options.per_gpu)
    if others:
        await naive(proof, device, others[0])
    else:
        proof.not_run("readers on other GPUs, hidden GPU, torch's IPC handle", "needs two GPUs")


def main() -> int:
    parser = proofs.options(__doc__)
    parser.add_argument("--per-gpu", type=int, default=2, help="readers on each GPU at once")
    return proofs.run(body, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
