"""In the place of a mapping, where this process's device can't access the slab.

Holding and paying reads works as ever, since the control words are host memory; the bytes come by
way of a copy that the owner makes in host memory.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch

from featcache.memory.slab import Parts, Unreachable, Word
from featcache.memory.words import Block, fence_stores
from featcache.ref import TensorSpec


class UnreachableSlab:
    """A slab that is not mapped here."""

    deferred = False
    zero_copy = False
    end_bytes = 1 << 62
    """All of it: the owner, which copies from it, has it all."""

    def __init__(self, device: torch.device, reason: str) -> None:
        self.device = device
        """Where reads by way of the host put their copies."""
        self._reason = reason

    def _refuse(self) -> NoReturn:
        raise Unreachable(f"the slab can't be accessed from {self.device}: {self._reason}")

    def can_copy_to(self, device: torch.device | None) -> bool:
        """Whether `read` can copy there: never."""
        return False

    def enable_device(self, device: torch.device) -> None:
        """Raise Unreachable."""
        self._refuse()

    writable = False

    def open_for_writing(self, fds: Sequence[int]) -> None:
        """Raise Unreachable."""
        self._refuse()

    def stage(self, parts: Parts) -> NoReturn:
        """Raise Unreachable."""
        self._refuse()

    def blocking_write_bytes(self, parts: Parts) -> int:
        """Raise Unreachable."""
        self._refuse()

    def write(self, offset_bytes: int, parts: Parts, order: None, word: Word | None = None) -> None:
        """Raise Unreachable."""
        self._refuse()

    def order(self, device: torch.device | None = None) -> None:
        """Return the order of the CPU, which writes the words."""

    def blocking_read_bytes(self, nbytes: int, device: torch.device | None) -> int:
        """Raise Unreachable."""
        self._refuse()

    def view(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None = None
    ) -> torch.Tensor:
        """Raise Unreachable."""
        self._refuse()

    def empty(self, spec: TensorSpec, device: torch.device | None) -> torch.Tensor:
        """Raise Unreachable."""
        self._refuse()

    def fetch(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None, order: None
    ) -> torch.Tensor:
        """Raise Unreachable."""
        self._refuse()

    def read(self, offset_bytes: int, spec: TensorSpec, out: torch.Tensor, order: None) -> None:
        """Raise Unreachable."""
        self._refuse()

    def adopt(self, block: Block, words: memoryview) -> memoryview:
        """Return the words: the CPU writes them as they are."""
        return words

    def signal(self, words: memoryview, index: int, value: int, order: None) -> None:
        """Store the word now."""
        fence_stores()
        words[index] = value

    def follow(self, order: None, others: Sequence[None]) -> None:
        """Return the order: there is but one."""

    def extend(self, start_bytes: int, size_bytes: int, fd: int) -> None:
        """Map nothing."""

    def cut(self, end_bytes: int) -> None:
        """There is nothing to unmap."""

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """There is nothing to let go."""

    def forget(self) -> None:
        """There is nothing to drop."""
