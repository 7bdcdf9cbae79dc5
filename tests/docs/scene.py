"""What the snippets of the pages find around them: a pool, a ref, pictures, a socket.

A snippet is written for a server that has these things. Here they are real where featcache is concerned,
and stand-ins where it is not.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, Final

import torch

import featcache

READERS: Final = 64
"""Reads that the ref of a scene owes: each snippet may read it a few times."""


class Socket:
    """Takes what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def send(self, data: bytes) -> None:
        self.sent.append(data)


class App:
    """A server to which applications are mounted."""

    def __init__(self) -> None:
        self.mounted: dict[str, Any] = {}

    def mount(self, path: str, app: Any) -> None:
        self.mounted[path] = app


def encode(image: bytes) -> torch.Tensor:
    """Stand in for an encoder."""
    return torch.full((4, 8), float(len(image)))


@contextlib.asynccontextmanager
async def scene() -> AsyncIterator[dict[str, Any]]:
    """Lend the names that snippets use, by name."""
    stream: Any = torch.cuda.Stream  # torch has no types for it
    pixel_values = torch.arange(32.0).reshape(4, 8)
    images = [pixel_values + number for number in range(4)]
    keys = ["image-a", "image-b"]
    key = "a key"
    count = itertools.count(1)
    async with (
        featcache.create(capacity="64MiB", segment="1MiB", initial="1MiB", spill="8MiB") as cache,
        featcache.connect(cache.endpoint, name="scene") as client,
    ):
        for each in (key, *keys):
            await cache.put(pixel_values, key=each)
        ref = await cache.put(pixel_values, readers=READERS)
        yield {
            "app": App(),
            "cache": cache,
            "client": client,
            "data": ref.to_bytes(),
            "encode": encode,
            "encoder": torch.sum,
            "endpoint": cache.endpoint,
            "expired": SimpleNamespace(inc=lambda _=1: next(count)),
            "featcache": featcache,
            "g": torch.tensor([[1, 2, 2]]),
            "image_bytes": b"a picture",
            "images": images,
            "key": key,
            "keys": keys,
            "pixel_values": pixel_values,
            "ref": ref,
            "side": stream() if torch.cuda.is_available() else None,
            "socket": Socket(),
            "torch": torch,
            "x": pixel_values,
        }
