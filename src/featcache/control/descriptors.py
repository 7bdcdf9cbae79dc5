"""File descriptors on their way between processes."""

import array
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from featcache.control.messages import ProtocolError, SocketFailed
from featcache.errors import OUT_OF_DESCRIPTORS

MAX_DESCRIPTORS: Final = 64
"""Descriptors that one frame can carry (SCM_MAX_FD is 253)."""
NO_DESCRIPTOR: Final = -1
"""In the place of a descriptor that came while this process had no room for it."""

_INT_BYTES: Final = array.array("i").itemsize
ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)
"""The buffer that `recvmsg` needs for those of a frame."""


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that have no owner."""
    for fd in descriptors:
        if fd != NO_DESCRIPTOR:
            os.close(fd)


def close_taken(descriptors: list[int]) -> None:
    """Close the descriptors of a list and empty it: of two that call this the second closes none."""
    while descriptors:
        close_all([descriptors.pop()])


def duplicate_all(descriptors: Sequence[int]) -> list[int]:
    """Return duplicates of all of these, or raise OSError with none left open."""
    made: list[int] = []
    try:
        for fd in descriptors:
            made.append(os.dup(fd))  # noqa: PERF401 - those made so far are closed if one fails
    except OSError:
        close_all(made)
        raise
    return made


class Received:
    """Descriptors that came, in order, until their frames are handled.

    The system installs as many of a message's as this process has room for, and drops the rest: these
    are `NO_DESCRIPTOR` in the list of their frame.
    """

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()
        self._cut_at: int | None = None
        """How many of those waiting came before one was dropped: the frame that wants more is its frame."""

    def add(self, ancillary: Sequence[tuple[int, int, bytes]], *, cut: bool) -> None:
        """Keep those of a message; if `cut`, it had more.

        Raises:
            ProtocolError: too many for a message.
            SocketFailed: cut once more, while the frame that was cut first is not handled.

        """
        rights = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights.frombytes(content[: len(content) - len(content) % _INT_BYTES])
        self._waiting.extend(rights)  # first: whatever ends the channel from here on closes them
        if len(self._waiting) > 2 * MAX_DESCRIPTORS or (cut and len(rights) == MAX_DESCRIPTORS):
            raise ProtocolError("more descriptors than a message may carry")
        if cut and self._cut_at is not None:
            raise SocketFailed(OUT_OF_DESCRIPTORS)
        if cut:  # though the buffer had room: the system could install no more
            self._cut_at = len(self._waiting)

    def has(self, count: int) -> bool:
        """Whether those of a frame are here, or will not come."""
        return count <= len(self._waiting) or self._cut_at is not None

    def take(self, count: int) -> list[int]:
        """Return those of the next frame, which then owns them."""
        waiting, cut_at = self._waiting, self._cut_at
        if cut_at is not None and count > cut_at:
            for _ in range(count - cut_at):
                waiting.insert(cut_at, NO_DESCRIPTOR)
            self._cut_at = None
        elif cut_at is not None:
            self._cut_at = cut_at - count
        return [waiting.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close those that no frame took."""
        close_all(self._waiting)
        self._waiting.clear()
