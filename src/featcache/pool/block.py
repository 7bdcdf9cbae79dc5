"""The owner's block of words, and the form of it that its slab signals."""

import os
from typing import NamedTuple, Self

from featcache.memory.slab import Slab, Words
from featcache.memory.words import OwnerWords


class PoolBlock(NamedTuple):
    """What a pool keeps its words in."""

    words: OwnerWords
    fd: int
    """Descriptor of the memory, of which no new writable mapping can be made."""
    complete: Words
    """The `published` words as the slab signals them."""

    @classmethod
    def make(cls, slab: Slab, slots: int) -> Self:
        """Make the words of so many slots. May block: a driver pins them, in tens of milliseconds."""
        words, fd = OwnerWords.create(slots)
        try:
            return cls(words, fd, slab.adopt(words, words.published))
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def close(block: "PoolBlock | None") -> None:
        """Close the descriptor of a block that no pool took; the slab still knows its words."""
        if block is not None:
            os.close(block.fd)
