"""A Ray of its own for the tests, and the actors.

Their classes are local, so that Ray pickles them by value.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch


@contextmanager
def cluster() -> Iterator[None]:
    """Ray on this host, and the driver here; its workers import what this process can import."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def actor_class(endpoint: str) -> Any:
    """Return a class of actors that make objects and take them. The transport is registered already."""

    @ray.remote(num_cpus=0, max_restarts=1, enable_tensor_transport=True)
    class Actor:
        def __init__(self) -> None:
            from featcache.integrations.ray import register

            register(endpoint)  # so that it is there after a restart too

        @ray.method(tensor_transport="featcache")
        def make(self, number: int, count: int = 1000) -> torch.Tensor:
            return torch.full((count,), float(number))

        @ray.method(tensor_transport="featcache")
        def make_many(self, count: int) -> dict[str, Any]:
            tensors = [torch.full((3,), number, dtype=torch.int64) for number in range(count)]
            return {"tensors": tensors, "scalar": torch.tensor(2.5), "text": "beside them"}

        @ray.method(tensor_transport="featcache")
        def make_on(self, *devices: str) -> list[torch.Tensor]:
            return [torch.ones(2, device=device) for device in devices]

        @ray.method(tensor_transport="featcache")
        def make_text(self) -> str:
            return "no tensor at all"

        def total(self, *tensors: torch.Tensor) -> float:
            return sum(float(tensor.sum()) for tensor in tensors)

        def same(self, made: Any) -> Any:
            return made

        def fill(self, tensor: torch.Tensor) -> float:
            return float(tensor.fill_(7).sum())

        def pid(self) -> int:
            return os.getpid()

    return Actor


def async_actor_class() -> Any:
    """Return a class of asyncio actors."""

    @ray.remote(num_cpus=0, enable_tensor_transport=True)
    class AsyncActor:
        @ray.method(tensor_transport="featcache")
        async def make(self, number: int) -> torch.Tensor:
            return torch.full((1000,), float(number))

        async def total(self, tensor: torch.Tensor) -> float:
            return float(tensor.sum())

    return AsyncActor


def plain_actor_class() -> Any:
    """Return a class that was made without ``enable_tensor_transport``."""

    @ray.remote(num_cpus=0)
    class Plain:
        def total(self, tensor: torch.Tensor) -> float:
            return float(tensor.sum())

    return Plain
