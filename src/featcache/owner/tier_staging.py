"""Host memory between a pool and its tier: one block, in pieces that live as long as their views."""

import asyncio
import contextlib
import weakref
from collections.abc import Callable
from typing import Final

import torch

from featcache.core.allocator import Extent, OffsetAllocator

_TOUCH_BYTES: Final = 4 << 20


class Loan:
    """A view of a tensor's bytes that is in others' hands; `gone` is called in the loop once none is left.

    Slices, and arrays and buffers over it, count: all refer to the array that is made here. So memory that a
    thread may still be writing to is known to be in use, whatever became of the call that was to write it.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        loop: asyncio.AbstractEventLoop,
        gone: Callable[[], object],
        *,
        writable: bool,
    ) -> None:
        array = tensor.numpy()

        def tell() -> None:
            with contextlib.suppress(
                RuntimeError
            ):  # the loop is closed: nothing is reused any more
                loop.call_soon_threadsafe(gone)

        weakref.finalize(array, tell).atexit = False
        self._array = weakref.ref(array)
        self.view = array.data if writable else array.data.toreadonly()

    def end(self) -> bool:
        """Make the view unusable; return whether none is left: a copy by it, or a slice, goes on."""
        with contextlib.suppress(BufferError):
            self.view.release()
        return self._array() is None


class Piece:
    """A part of the staging memory, free again once it was released and no view of it is left."""

    __slots__ = ("_extent", "_staging", "_uses", "tensor")

    def __init__(self, staging: "Staging", extent: Extent, nbytes: int) -> None:
        self._staging = staging
        self._extent = extent
        self._uses = 1
        self.tensor = staging.memory[extent.offset_bytes : extent.offset_bytes + nbytes]

    def lend(self, *, writable: bool) -> Loan:
        """Lend it; it is in use until no view of it is left."""
        self._uses += 1
        return Loan(self.tensor, self._staging.loop, self.release, writable=writable)

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
