"""The owner's side: prepare features, put them, gather the ranks' shards and check the products."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import numpy as np
import torch
from anyio import to_thread
from torch import Tensor

import featcache
import images
import patches
from rank import RANKS, Shard, Task, Wire, embedding
from report import Outcome, Progress, Row

NAMES = [f"tp{number}" for number in range(RANKS)]
TOLERANCE = 1e-4  # a shard's sums are rounded in another order than those of the whole product
PATIENCE = 60.0  # seconds; a step that takes longer has failed


@dataclass
class Sample:
    """A picture, ready to be put, and the product that one process makes of it."""

    features: dict[str, Tensor]
    expected: Tensor
    row: Row


def prepare(paths: Sequence[Path], device: str, progress: Progress) -> list[Sample]:
    """Cut the pictures into patches, on the device that the pool will be on."""
    weight = embedding().to(device)
    samples = []
    for number, path in enumerate(paths, start=1):
        picture = images.load(path).to(device)
        try:
            features = patches.features(picture)
        except ValueError as error:
            raise images.BadPicture(f"{path}: {error}") from error
        expected = torch.nn.functional.linear(features["pixel_values"], weight).cpu()
        time, height, width = features["image_grid_thw"][0].tolist()
        row = Row(
            name=path.name,
            size=f"{picture.shape[1]}x{picture.shape[0]}",
            grid=(time, height, width),
            bytes=sum(tensor.nbytes for tensor in features.values()),
        )
        samples.append(Sample(features, expected, row))
        progress.show("prepared", number, len(paths), last=number == len(paths))
    return samples


@dataclass
class Demo:
    """One run over all samples, as often as `repeat` says."""

    cache: featcache.FeatureCache
    wires: list[Wire]
    samples: list[Sample]
    outcome: Outcome
    progress: Progress
    repeat: int
    shards: dict[int, dict[int, Shard]] = field(default_factory=dict)
    done: int = 0

    @property
    def total(self) -> int:
        return len(self.samples) * self.repeat

    async def run(self) -> None:
        async with anyio.create_task_group() as watching:
            watching.start_soon(self.watch)
            async with anyio.create_task_group() as work:
                for rank, wire in enumerate(self.wires):
                    work.start_soon(self.gather, rank, wire)
                await self.put()
            await self.settle()
            watching.cancel_scope.cancel()
        self.look(last=True)

    async def put(self) -> None:
        """Put each picture once and tell the ranks. Nothing but the pool sets the pace."""
        for number in range(self.total):
            sample = self.samples[number % len(self.samples)]
            waited = self.cache.statistics().waited
            begun = time.perf_counter()
            ref = await self.cache.put(sample.features, readers=NAMES, timeout=PATIENCE)
            seconds = time.perf_counter() - begun
            found_room = self.cache.statistics().waited == waited
            (sample.row.puts if found_room else sample.row.waits).append(seconds)
            self.outcome.reads_owed += len(NAMES)
            task = Task(number, "get" if number % 3 == 2 else "borrow", ref.to_bytes())
            for wire in self.wires:
                await wire.send(task)

    async def gather(self, rank: int, wire: Wire) -> None:
        """Take a rank's shards; with the last shard of a product, check the product."""
        for _ in range(self.total):
            shard = await wire.receive(Shard)
            self.outcome.reads_paid += 1
            sample = self.samples[shard.number % len(self.samples)]
            sample.row.reads[shard.way].append(shard.seconds)
            parts = self.shards.setdefault(shard.number, {})
            parts[rank] = shard
            if len(parts) == RANKS:
                del self.shards[shard.number]
                await to_thread.run_sync(check, sample, parts)
                self.done += 1

    async def settle(self) -> None:
        """Give the recycler the moment that it takes to see the last reads paid."""
        with anyio.move_on_after(PATIENCE):
            while True:
                self.look()
                if not self.outcome.left:
                    return
                await anyio.sleep(0.01)

    async def watch(self) -> None:
        while True:
            self.look()
            await anyio.sleep(0.002)

    def look(self, *, last: bool = False) -> None:
        """Note how full the pool is, and show how far we are."""
        now = self.cache.statistics()
        self.outcome.sample(self.cache.pressure.level.value, now)
        used = 100 * now.used_bytes // now.capacity_bytes
        note = f"pool {used} % full, {now.waited} puts have waited"
        self.progress.show("multiplied", self.done, self.total, note, last=last)


def check(sample: Sample, parts: Mapping[int, Shard]) -> None:
    """Compare the gathered shards with the product of one process."""
    height = len(sample.expected)
    columns = [
        np.frombuffer(parts[rank].data, dtype=np.float32).reshape(height, -1)
        for rank in range(RANKS)
    ]
    product = torch.from_numpy(np.hstack(columns))
    sample.row.error = max(sample.row.error, (product - sample.expected).abs().max().item())
    same = torch.allclose(product, sample.expected, rtol=TOLERANCE, atol=TOLERANCE)
    sample.row.wrong += not (same and all(part.grid == sample.row.grid for part in parts.values()))
