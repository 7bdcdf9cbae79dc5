"""What a slab is to the layers above: the same few calls for host memory and for a GPU.

Offsets and sizes are bytes from the slab's start. Everything that touches bytes is *stream ordered*:
`write`, then `signal`, promise that whoever sees the signal sees the bytes, although both may still
be on their way when they return. On the host nothing is ever on its way.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from featcache.ref import TensorSpec

__all__ = ["Mapping", "Slab"]


class Mapping(Protocol):
    """A slab as one process sees it, for reading."""

    @property
    def device(self) -> torch.device:
        """Where `view` tensors are."""

    def view(self, offset_bytes: int, spec: TensorSpec) -> torch.Tensor:
        """Return a tensor over the slab's own bytes: no copy. Writing to it is not allowed."""

    def empty(self, spec: TensorSpec, device: torch.device | None) -> torch.Tensor:
        """Return a new tensor for `read`, contiguous, on `device` or the mapping's own.

        Separate from `read` because memory is best had in the thread that will let it go: malloc
        gives a thread's large blocks back to the system, and faults them in again, each time.
        """

    def read(self, offset_bytes: int, spec: TensorSpec, out: torch.Tensor) -> None:
        """Copy the slab's bytes into a tensor of the spec's dtype and shape."""

    @property
    def deferred(self) -> bool:
        """Whether a signal may land after `signal` returned (on a GPU's stream it does)."""

    def signal(self, words: memoryview, index: int, value: int) -> None:
        """Store a control word behind everything that this mapping was asked to do before."""

    def close(self) -> None:
        """Let the mapping go. Views that are still alive keep their bytes readable."""


class Slab(Mapping, Protocol):
    """A slab as its owner has it: one range of addresses, memory behind a growing part of it."""

    @property
    def kind(self) -> str:
        """The backend's name, which a reader needs to map the descriptors."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the range."""

    @property
    def granularity_bytes(self) -> int:
        """What segments must be a multiple of."""

    def commit(self, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        """Put memory behind a range. May block. Raise MemoryError, with nothing changed, if it can't."""

    def decommit(self, start_bytes: int, stop_bytes: int) -> None:
        """Give the memory behind a range back. May block."""

    def write(self, offset_bytes: int, parts: Sequence[tuple[TensorSpec, torch.Tensor]]) -> None:
        """Copy tensors to where their specs say, counted from `offset_bytes`."""

    def descriptors(self) -> list[int]:
        """Return the file descriptors a reader needs; they stay the slab's own."""
