"""DataLoader workers put what the trainer reads: batches by the slab, refs by torch's queue.

    pip install featcache pillow scikit-image
    python examples/dataloader.py [--start fork|spawn] [--workers 2] [--epochs 2] [--device cuda]

The trainer owns the slab. A worker decodes and crops a batch, puts it, and hands the loader the ref, 100
bytes, where torch would share the tensors by a file descriptor each. The trainer borrows the batch. With
`--device cuda` the slab is on the GPU: what a worker puts is copied there by the trainer's process.

What to mind:

- A worker opens a client of its own, in `worker_init_fn`: one that a fork inherited raises CacheClosed.
- The loader hands batches out in order, so the slab has to hold those that workers are ahead with, or a
  batch would wait for room that only later ones can give. `capacity_bytes` says how much that is, and a
  put has a timeout, which ends the epoch with an error that names the batches in the way.
- A loop that is left early leaves the batches that workers were ahead with: they expire after `ttl`.
"""

import argparse
import importlib.util
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import featcache
from featcache import blocking

SIDE = 96
PREFETCH = 2  # batches that each worker is ahead, torch's default
PUT_S = 60.0  # for room: longer than a step takes, and shorter than anyone would look on
TTL_S = 120.0  # longer than a batch waits for its turn
SHIPPED = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")


class Crops(Dataset[tuple[Tensor, int]]):
    """Random crops of some pictures, and which picture each is of."""

    def __init__(self, paths: list[Path], length: int) -> None:
        self.paths = paths
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = np.random.default_rng(index)
        label = index % len(self.paths)
        with Image.open(self.paths[label]) as image:
            left, top = (int(generator.integers(0, max(1, size - SIDE))) for size in image.size)
            crop = image.convert("RGB").crop((left, top, left + SIDE, top + SIDE))
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1), label


class PutBatch:
    """What the loader's workers run: `open` as `worker_init_fn`, the object as `collate_fn`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.cache: blocking.FeatureClient | None = None  # opened in each worker

    def open(self, worker: int) -> None:
        # On the CPU: a worker puts into a slab on a GPU with no CUDA context of its own.
        cache = blocking.connect(self.endpoint, device="cpu", name=f"loader{worker}")
        self.cache = cache.open()

    def __call__(self, samples: list[tuple[Tensor, int]]) -> bytes:
        """Put a batch; return its ref."""
        assert self.cache is not None, "batches are put by workers: num_workers is at least 1"
        batch = {
            "pixels": torch.stack([pixels for pixels, _ in samples]),
            "labels": torch.tensor([label for _, label in samples]),
        }
        return self.cache.put(batch, readers=1, ttl=TTL_S, timeout=PUT_S).to_bytes()


def capacity_bytes(options: argparse.Namespace) -> int:
    """What workers are ahead with, and the batch that the trainer has."""
    batch = options.batch * (3 * SIDE * SIDE + 8) + 1024
    return int((options.workers * PREFETCH + 1) * batch)


def batches(cache: blocking.FeatureCache, loader: DataLoader[Any]) -> Iterator[dict[str, Tensor]]:
    """The loader's batches, each a view of the slab until the next is asked for."""
    for data in loader:
        with cache.borrow(featcache.FeatureRef.from_bytes(data)) as batch:
            assert isinstance(batch, dict)
            yield batch


def train(model: nn.Module, found: Iterator[dict[str, Tensor]]) -> float:
    """One epoch; return the mean loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for batch in found:
        loss = nn.functional.cross_entropy(model(batch["pixels"].float() / 255), batch["labels"])
        optimizer.zero_grad()
        torch.autograd.backward(loss)  # the last use of the batch: the next one ends its block
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def shipped() -> list[Path]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        sys.exit("install scikit-image for its pictures, or name files with --images")
    return [Path(package.origin).parent / "data" / name for name in SHIPPED]


def main() -> int:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--start", default="spawn", choices=("fork", "spawn"), help="of workers (%(default)s)")
    add("--workers", type=int, default=2)
    add("--batch", type=int, default=16)
    add("--length", type=int, default=256, help="crops in an epoch (default: %(default)s)")
    add("--epochs", type=int, default=3)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--images", type=Path, nargs="+", help="files, in place of scikit-image's")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves the block
    paths = options.images or shipped()
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    )
    model = model.append(nn.Linear(256, len(paths))).to(options.device)
    with blocking.create(device=options.device, capacity=capacity_bytes(options)) as cache:
        put = PutBatch(cache.endpoint)
        loader = DataLoader(
            Crops(paths, options.length),
            batch_size=options.batch,
            shuffle=True,
            num_workers=options.workers,
            prefetch_factor=PREFETCH,
            persistent_workers=True,  # or each epoch attaches anew
            multiprocessing_context=multiprocessing.get_context(options.start),
            worker_init_fn=put.open,
            collate_fn=put,
        )
        for epoch in range(options.epochs):
            begun = time.perf_counter()
            try:
                loss = train(model, batches(cache, loader))
            except (RuntimeError, featcache.FeatcacheError) as error:
                # A worker that was killed, or could not put: torch says which.
                print(f"epoch {epoch}: {error}", file=sys.stderr)
                return 1
            rate = options.length / (time.perf_counter() - begun)
            print(f"epoch {epoch}: loss {loss:.3f}, {rate:,.0f} crops a second", flush=True)
        del loader  # ends the workers, who say goodbye
        seen = cache.statistics()
        print(f"{seen.puts} batches put, {seen.recycled} recycled, {seen.used_bytes} bytes left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
