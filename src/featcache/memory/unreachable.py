"""The mapping of a slab that this process's device can't access.

Reads are held and paid as ever, since the control words are host memory; the bytes come as a copy
that the owner stages in host memory.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from featcache.memory.slab import Unreachable
from featcache.memory.words import Block, fence_stores, store_words


class UnreachableSlab:
    """A `Mapping` with control words and no bytes: whatever touches bytes raises `Unreachable`."""

    deferred = False
    zero_copy = False
    writable = False
    end_bytes = 1 << 62
    """The whole slab: the owner, which makes the copies, has all of it mapped."""

    def __init__(self, device: torch.device, reason: str) -> None:
        self.device = device
        """The device on which reads staged through host memory end."""
        self._reason = reason

    def can_copy_to(self, device: torch.device | None) -> bool:
        return False

    def adopt(self, block: Block, words: memoryview) -> memoryview:
        return words

    def signal(self, words: memoryview, index: int, value: int, order: None) -> None:
        fence_stores()
        words[index] = value

    def signal_many(
        self, words: memoryview, values: Sequence[tuple[int, int]], order: None
    ) -> None:
        store_words(words, values)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise Unreachable(f"the slab can't be accessed from {self.device}: {self._reason}")

    enable_device = open_for_writing = stage = blocking_write_bytes = write = _refuse
    blocking_read_bytes = view = empty = fetch = read = _refuse

    def can_follow(self, order: object) -> bool:
        return False

    def _do_nothing(self, *_: Any) -> None:
        pass

    # Orders are None, since the CPU writes the words; no segment is mapped, and no work in progress.
    order = follow = extend = cut = finish = close = forget = warm = _do_nothing
