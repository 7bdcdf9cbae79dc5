"""Posts: messages that a session leaves in its page, which cost it no system call.

A ring of entries, each a length and so many bytes. The session writes an entry, fences, then stores how
many it has posted; the owner reads that count, fences, then copies the entry. A session that is killed or
stopped between any two of these has posted what its count says, no more; what it has posted stands in
memory that outlives it. The owner tells by a count of its own how many it has copied: those entries can
be written again. It keeps that number for itself besides, and believes neither word.

Fences, where stores and loads are not ordered by the processor: the session's `fence_stores` between entry
and count, with the owner's `fence_loads` between count and entry, makes an entry whole that is counted. The
owner's `fence_full` between its copy and its own count, with the session's `fence_loads` between that count
and the next entry, keeps an entry as it is until it is copied. On x86-64 stores are seen in order, loads
are made in order, and no store is made before a load that precedes it: none is needed.
"""

from collections.abc import Sequence
from typing import Final

from featcache.memory.words import (
    POST_BYTES,
    POSTS,
    TSO,
    Posts,
    SessionWords,
    fence_full,
    fence_loads,
    fence_stores,
)

MESSAGE_BYTES: Final = POST_BYTES - 8
"""The longest message that fits."""
_POSTED, _TAKEN = Posts.POSTED, Posts.TAKEN
_LENGTH: Final = 8


class PostRing:
    """The session's end. Posts are made one at a time."""

    def __init__(self, page: SessionWords) -> None:
        self._header, self._entries = page.header, page.posts
        self.count = 0
        """Messages posted."""
        self._free_until = 0

    def post(self, message: bytes) -> bool:
        """Post a message; False if it is too long, or the ring is full."""
        number, length = self.count, len(message)
        if length > MESSAGE_BYTES:
            return False
        if number >= self._free_until:
            self._free_until = self._header[_TAKEN] + POSTS
            if not TSO:
                fence_loads()
            if number >= self._free_until:
                return False
        at = number % POSTS * POST_BYTES
        self._entries[at : at + _LENGTH + length] = length.to_bytes(_LENGTH, "little") + message
        if not TSO:
            fence_stores()
        self._header[_POSTED] = self.count = number + 1
        return True

    @property
    def is_heard(self) -> bool:
        """Whether the owner has taken all of them."""
        return self._header[_TAKEN] == self.count

    def forget(self) -> None:
        """Cut a forked child off."""
        self._header = memoryview(bytearray(8 * len(self._header))).cast("Q")
        self._entries = memoryview(bytearray(len(self._entries)))


class PostsTaken:
    """The owner's end. What a session wrote is copied once, then looked at."""

    def __init__(self, page: SessionWords) -> None:
        self._header, self._entries = page.header, page.posts
        self._taken = 0

    def __bool__(self) -> bool:
        """Whether any wait here."""
        return self._header[_POSTED] != self._taken

    def take(self) -> Sequence[bytes]:
        """Return the messages that were posted since the last call.

        Raises:
            ValueError: the ring is not as a session writes it; its posts count as taken.

        """
        posted, taken = self._header[_POSTED], self._taken
        if posted == taken:
            return ()
        self._taken = posted
        if not 0 < posted - taken <= POSTS:
            raise ValueError(f"{posted} posts after {taken}")
        if not TSO:
            fence_loads()
        messages = [self._copy(number) for number in range(taken, posted)]
        if not TSO:
            fence_full()
        self._header[_TAKEN] = posted
        return messages

    def _copy(self, number: int) -> bytes:
        at = number % POSTS * POST_BYTES
        entry = bytes(self._entries[at : at + POST_BYTES])
        length = int.from_bytes(entry[:_LENGTH], "little")
        if length > MESSAGE_BYTES:
            raise ValueError(f"a post of {length} bytes")
        return entry[_LENGTH : _LENGTH + length]
