"""Ray actors whose objects go through the slab: plain ObjectRefs, by featcache's tensor transport.

    pip install 'featcache[ray]'
    python examples/ray_transport.py [--models 2] [--rounds 20]

The driver owns the slab. The encoder returns a dict of tensors; Ray carries where it is, and each model
copies it from the slab. examples/ray_actors.py does the same by refs, with less of Ray's own work.

What to mind:

- `register` comes before the actors are made; before their classes, where methods name the transport in
  `@ray.method(tensor_transport="featcache")` and not by `options`.
- Classes that only receive need `enable_tensor_transport=True`: Ray stalls for 60 seconds without.
"""

import argparse
import signal
import sys
from typing import Any

import ray
import torch

import featcache.integrations.ray
from featcache import blocking

PATCHES, WIDTH = 256, 1176
ANSWER_S = 60.0


@ray.remote(num_cpus=0, enable_tensor_transport=True)
class Encoder:
    def encode(self, number: int) -> dict[str, torch.Tensor]:
        patches = torch.full((PATCHES, WIDTH), float(number))
        return {"patches": patches, "grid": torch.tensor([1, 16, 16])}


@ray.remote(num_cpus=0, enable_tensor_transport=True)
class Model:
    def look(self, features: dict[str, torch.Tensor]) -> float:
        assert int(features["grid"].prod()) == PATCHES
        return float(features["patches"].mean())


ACTORS: tuple[Any, Any] = Encoder, Model  # what `ray.remote` makes of a class has no type


def main() -> int:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--models", type=int, default=2)
    add("--rounds", type=int, default=20)
    add("--capacity", default="64MiB", help="of the slab (default: %(default)s)")
    options = parser.parse_args()
    ray.init(include_dashboard=False)
    # After `init`, which has a handler of its own. This one leaves the blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with blocking.create(capacity=options.capacity) as cache:
            featcache.integrations.ray.register(cache.endpoint)
            encoder_class, model_class = ACTORS
            encoder = encoder_class.remote()
            encode = encoder.encode.options(tensor_transport="featcache")
            models = [model_class.remote() for _ in range(options.models)]
            for number in range(options.rounds):
                features = encode.remote(number)
                seen = ray.get([model.look.remote(features) for model in models], timeout=ANSWER_S)
                assert seen == [number] * options.models, seen
                del features  # the last reference: its room is free
            print(f"{options.rounds} rounds, {options.models} models each, all alike")
            print(f"{cache.statistics().puts} puts", flush=True)
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
