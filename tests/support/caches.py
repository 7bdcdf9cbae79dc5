"""What the tests of the public API share."""

import asyncio
import contextlib
import ctypes
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import torch

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef, Settings
from support.processes import until as until  # noqa: PLC0414 - tests of the API have it from here

KIB: Final = 1 << 10
MIB: Final = 1 << 20

Feature = torch.Tensor | dict[str, torch.Tensor]


def small(**changes: Any) -> Settings:
    """Settings of a pool that is quick to fill, quick to look and says everything."""
    chosen: dict[str, Any] = {
        "capacity": MIB,
        "segment": 64 * KIB,
        "slots": 64,
        "huge_pages": False,
        "recycle_interval": 0.01,
        "log_interval": 0.0,
        "grace": 0.0005,
        "attach_timeout": 10.0,
    }
    return Settings(**(chosen | changes))


@contextlib.asynccontextmanager
async def pair(
    *, name: str | None = None, **changes: Any
) -> AsyncIterator[tuple[FeatureCache, FeatureClient]]:
    """An owner, and a client attached to it over the real socket, in one loop."""
    chosen = small(**changes)
    async with (
        featcache.create(settings=chosen) as owner,
        featcache.connect(owner.endpoint, name=name, settings=chosen) as client,
    ):
        yield owner, client


async def steps(count: int) -> None:
    """Let the loop turn so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


def filled(nbytes: int, value: int = 0) -> torch.Tensor:
    """A feature of so many bytes, all of one value."""
    return torch.full((nbytes,), value, dtype=torch.uint8)


def tensor(feature: Feature) -> torch.Tensor:
    """A feature that was put as one bare tensor."""
    assert isinstance(feature, torch.Tensor)
    return feature


def tensors(feature: Feature) -> dict[str, torch.Tensor]:
    """A feature that was put as a dict."""
    assert isinstance(feature, dict)
    return feature


def raw(value: torch.Tensor) -> bytes:
    """The bytes of a contiguous tensor: dtypes that torch only stores can be compared too."""
    assert value.is_contiguous()
    return ctypes.string_at(value.data_ptr(), value.nbytes) if value.nbytes else b""


async def spent(owner: FeatureCache) -> None:
    """Return when nothing is in the pool: no byte, no slot, no waiter."""

    def empty() -> bool:
        now = owner.statistics()
        return now.used_bytes == now.slots_used == now.waiters == 0

    await until(empty)


async def full(owner: FeatureCache, value: int = 0) -> FeatureRef:
    """Fill the whole slab with one feature."""
    return await owner.put(filled(owner.statistics().capacity_bytes, value), ttl=None)


def slab_allocated() -> int:
    """Bytes that the system has given to the slabs of this process."""
    inodes: dict[int, int] = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "memfd:featcache-slab" in str(entry.readlink()):
                found = os.fstat(int(entry.name))
                inodes[found.st_ino] = found.st_blocks * 512
    return sum(inodes.values())


class Gate:
    """Holds a thread in the middle of what it does until it is told to go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._go = threading.Event()

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call`, kept waiting at the gate."""

        def gated(*args: Any, **kwargs: Any) -> Any:
            self.entered.set()
            assert self._go.wait(30), "nobody opened the gate"
            return call(*args, **kwargs)

        return gated

    def open(self) -> None:
        """Let everything through from now on."""
        self._go.set()
