"""Host memory between a pool and its tier: one block, in pieces that live as long as their views."""

import asyncio
import contextlib
import weakref
from collections.abc import Callable
from typing import Final

import torch

from featcache.core.allocator import Extent, OffsetAllocator

_TOUCH_BYTES: Final = 4 << 20


def lend(
    tensor: torch.Tensor, loop: asyncio.AbstractEventLoop, gone: Callable[[], object]
) -> memoryview:
    """Return a view of a tensor's bytes. `gone` is called in the loop once no view of them is left.

    Slices, and arrays and buffers over it, count: all refer to the array that is made here. So memory that a
    thread may still be writing to is known to be in use, whatever became of the call that was to write it.
    """
    array = tensor.numpy()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is reused any more
            loop.call_soon_threadsafe(gone)

    weakref.finalize(array, tell).atexit = False
    return array.data


def take_back(view: memoryview | None) -> None:
    """Make a view that was lent unusable. What still reads or writes by it, or by a slice of it, goes on."""
    if view is not None:
        with contextlib.suppress(BufferError):
            view.release()


class Piece:
    """A part of the staging memory, free again once it was released and no view of it is left."""

    __slots__ = ("_extent", "_staging", "_uses", "tensor")

    def __init__(self, staging: "Staging", extent: Extent, nbytes: int) -> None:
        self._staging = staging
        self._extent = extent
        self._uses = 1
        self.tensor = staging.memory[extent.offset_bytes : extent.offset_bytes + nbytes]

    def lend(self) -> memoryview:
        """Return a writable view of it."""
        self._uses += 1
        return lend(self.tensor, self._staging.loop, self.release)

    def hold(self) -> None:
        """Count one more user, who calls `release`."""
        self._uses += 1

    def release(self) -> None:
        """End one use of it."""
        self._uses -= 1
        if not self._uses:
            self._staging.allocator.free(self._extent)


class Staging:
    """A block of host memory, in the loop's hands."""

    def __init__(self, size_bytes: int, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.memory = torch.empty(size_bytes, dtype=torch.uint8)
        self.allocator = OffsetAllocator(0)
        self.allocator.grow(size_bytes // 256 * 256)

    def take(self, nbytes: int) -> Piece | None:
        """Return a piece, or None if there is no room for it."""
        extent = self.allocator.allocate(nbytes)
        return None if extent is None else Piece(self, extent, nbytes)

    def warm(self) -> None:
        """Touch all of it, so that copies take no page faults. For a thread, before it is used."""
        for start in range(0, self.memory.numel(), _TOUCH_BYTES):
            self.memory[start : start + _TOUCH_BYTES].zero_()
