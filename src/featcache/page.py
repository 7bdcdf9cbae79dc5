"""One session's words, as the owner reads them."""

import os

import numpy as np

from featcache.memory.words import SessionWords

__all__ = ["Page"]


class Page:
    """What a session holds and has released. Its values are a peer's: they are compared, not trusted."""

    def __init__(self, session: int, name: str | None, words: SessionWords, fd: int) -> None:
        self.session = session
        self.name = name
        self.fd = fd
        self.words = words
        self._held, self._released = words.held, words.released
        self._now = words.released_array()
        self._seen = np.zeros_like(self._now)

    def news(self, high: int) -> list[tuple[int, int]]:
        """Return (slot, generation) for each `released` word that changed since the last call."""
        changed = np.flatnonzero(self._now[:high] != self._seen[:high])
        if not changed.size:
            return []
        values = self._now[changed]
        self._seen[changed] = values
        return list(zip(changed.tolist(), values.tolist(), strict=True))

    def holds(self, index: int, generation: int) -> bool:
        """Whether the session may be reading these bytes now."""
        return self._held[index] == generation and self._released[index] != generation

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the object."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
