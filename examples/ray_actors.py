"""Ray actors that pass refs: tensors by the slab, 100 bytes by Ray.

    pip install featcache ray pillow scikit-image
    python examples/ray_actors.py [--encoders 2] [--models 2] [--rounds 3]

The driver owns the slab. Encoder actors put into it, and hand the ref to the model actors as an ordinary
Ray value; these borrow the features where they lie. Nothing of them goes through Ray's object store.

What to mind:

- A ref is of one host, so the actors are pinned to the driver's node.
- Ray starts an actor that died again, but not what it had read: its reads are paid by its death, so a
  retried task would raise StaleRef. The driver has the picture encoded anew instead.
- Ray ends actors with no goodbye (`ray.kill`, the driver's end), which counts as a death: harmless, and a
  warning in the log for each. `close`, called before, spares it.
"""

import argparse
import importlib.util
import itertools
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

import featcache
from featcache import blocking

PUT_S, ANSWER_S = 10.0, 60.0
RESTART_S, PAUSE_S = 120.0, 0.1  # an actor that is starting again refuses calls at once
SHIPPED = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")


@ray.remote(max_restarts=-1)
class Encoder:
    """Decodes pictures and puts them. Any number of these share the slab."""

    def __init__(self, endpoint: str) -> None:
        self.cache = blocking.connect(endpoint).open()

    def encode(self, path: Path, readers: list[str]) -> bytes:
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        features = pixels.permute(2, 0, 1).float().div_(255)
        return self.cache.put(features, readers=readers, timeout=PUT_S).to_bytes()

    def close(self) -> None:
        self.cache.close()


@ray.remote(max_restarts=-1)
class Model:
    """Reads what the driver sends it. Named, so that what it owes is paid for it if it dies."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.cache = blocking.connect(endpoint, name=name).open()

    def look(self, ref: bytes) -> list[float]:
        """The mean colour."""
        with self.cache.borrow(featcache.FeatureRef.from_bytes(ref)) as features:
            assert isinstance(features, Tensor)
            return [round(value, 4) for value in features.mean(dim=(1, 2)).tolist()]

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self.cache.close()


ACTORS: tuple[Any, Any] = Encoder, Model  # what `ray.remote` makes of a class has no type


class Driver:
    def __init__(self, cache: blocking.FeatureCache, encoders: int, models: int) -> None:
        self.cache = cache
        self.names = [f"model{number}" for number in range(models)]
        node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        options: dict[str, Any] = {"scheduling_strategy": here, "num_cpus": 0}
        encoder, model = (actor.options(**options) for actor in ACTORS)
        self.encoders = [encoder.remote(cache.endpoint) for _ in range(encoders)]
        self.models = [model.remote(cache.endpoint, name) for name in self.names]
        self.turns = itertools.cycle(self.encoders)
        self.retries = 0

    def look(self, path: Path) -> list[list[float]]:
        """What each model sees in a picture."""
        give_up_s = time.monotonic() + RESTART_S
        while time.monotonic() < give_up_s:
            ref = next(self.turns).encode.remote(path, self.names)
            try:
                # Ray gives `look` the value of the ref, once `encode` has it.
                answers = [model.look.remote(ref) for model in self.models]
                found: list[list[float]] = ray.get(answers, timeout=ANSWER_S)
            except (RayActorError, featcache.StaleRef, GetTimeoutError) as error:
                print(f"{path.name}: {str(error).splitlines()[0]}: once more", file=sys.stderr)
                self.retries += 1
                self.take_back(ref)
                time.sleep(PAUSE_S)
            else:
                return found
        raise RuntimeError(f"{path} failed for {RESTART_S:.0f} s")

    def take_back(self, ref: Any) -> None:
        """Discard what some may have read, and others never will."""
        with suppress(RayActorError, GetTimeoutError, featcache.FeatcacheError):
            self.cache.discard(featcache.FeatureRef.from_bytes(ray.get(ref, timeout=ANSWER_S)))

    def close(self) -> None:
        with suppress(RayActorError, GetTimeoutError):
            ray.get([actor.close.remote() for actor in self.encoders + self.models], timeout=5)


def shipped() -> list[Path]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        sys.exit("install scikit-image for its pictures, or name files with --images")
    return [Path(package.origin).parent / "data" / name for name in SHIPPED]


def main() -> int:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--encoders", type=int, default=2)
    add("--models", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--capacity", default="64MiB", help="of the slab (default: %(default)s)")
    add("--images", type=Path, nargs="+", help="files, in place of scikit-image's")
    options = parser.parse_args()
    paths = [path.absolute() for path in options.images or shipped()]
    ray.init(include_dashboard=False)
    # After `init`, which has a handler of its own. This one leaves the blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with blocking.create(capacity=options.capacity) as cache:
            driver = Driver(cache, options.encoders, options.models)
            try:
                pids = ray.get([model.pid.remote() for model in driver.models])
                print(f"models {' '.join(map(str, pids))}", flush=True)
                for number in range(options.rounds):
                    found = [driver.look(path) for path in paths]
                    same = all(len(set(map(tuple, each))) == 1 for each in found)
                    print(f"round {number}: {len(found)} pictures, alike: {same}", flush=True)
            finally:
                driver.close()
            seen = cache.statistics()
            print(f"{driver.retries} retries, {seen.used_bytes} bytes left", flush=True)
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
