"""The data plane: what moves bytes between the slabs of two hosts, and the table of what it may."""

import asyncio
import importlib
from bisect import bisect_right, insort
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate
from typing import Any, Final, Literal, NamedTuple, Protocol

from featcache.control.wire import Natural

_PLANE: Final = "featcache.reach.nixl_plane"


class Piece(NamedTuple):
    """A part of a read that lies in one registration at either end; addresses of the two processes."""

    here: int
    there: int
    nbytes: int


class Memory(NamedTuple):
    """Where a slab lies, as data planes tell each other."""

    kind: Literal["DRAM", "VRAM"]
    device: Natural
    """The GPU's number in the process that registers it; 0 for host memory."""


HOST: Final = Memory("DRAM", 0)


class Transfer(Protocol):
    """One read. Until `ended` is done its target may still be written."""

    ended: "asyncio.Future[None]"
    """Done once nothing is written any more: with no result, or the error that ended it."""

    def abandon(self) -> None:
        """Look at it rarely from now on: nobody waits for it."""


class DataPlane(Protocol):
    """One-sided reads of registered memory, all of one kind here; in the loop, which is never held.

    All of it is done in one thread of the plane's own: NIXL's agents are not thread-safe.
    """

    on_notification: Callable[[bytes], object]
    """Told in the loop what a peer's `notify` has sent; nothing vouches for it."""

    def register(self, address: int, nbytes: int) -> Awaitable[None]:
        """Let other hosts read this memory, and this one read into it."""

    def deregister(self, address: int) -> Awaitable[None]:
        """End the registration that begins there: it is to be given back."""

    def metadata(self) -> Awaitable[bytes]:
        """Return the descriptors by which a peer reads the segments that are registered now."""

    def add_peer(self, metadata: bytes) -> Awaitable[str]:
        """Load the descriptors of a peer's registered segments; return the name of its agent."""

    def read(self, peer: str, pieces: Sequence[Piece], there: Memory = HOST) -> Transfer:
        """Begin to read from a peer's memory of this kind."""

    def notify(self, peer: str, payload: bytes) -> None:
        """Send a peer a notification, which may be lost."""

    def expect(self, *, notifications: bool) -> None:
        """Say whether notifications are to be looked for often."""

    def forget(self) -> None:
        """Leave everything as it is, in a forked child: the parent's plane goes on."""

    def close(self) -> Awaitable[None]:
        """End all reads and registrations; nothing is written any more once it returns."""


def make_plane(
    name: str,
    loop: asyncio.AbstractEventLoop,
    memory: Memory = HOST,
    *,
    by_segments: bool = False,
) -> DataPlane:
    """Return a plane over NIXL, imported only here, for memory of this kind.

    `by_segments`: a GPU's memory that is mapped segment by segment, not one allocation.

    Raises:
        BackendUnavailable: the extra ``reach`` is not installed.

    """
    module: Any = importlib.import_module(_PLANE)
    plane: DataPlane = module.NixlPlane.make(name, loop, memory, by_segments=by_segments)
    return plane


class Registrations:
    """Which ranges of a slab are registered: by their offsets, none across a segment's border."""

    def __init__(self, segment_bytes: int) -> None:
        self._segment_bytes = segment_bytes
        self._ranges: list[tuple[int, int]] = []

    def cut(self, start_bytes: int, stop_bytes: int) -> list[tuple[int, int]]:
        """Return a range as ranges of which none crosses a segment's border."""
        parts = []
        while start_bytes < stop_bytes:
            border = (start_bytes // self._segment_bytes + 1) * self._segment_bytes
            parts.append((start_bytes, min(border, stop_bytes)))
            start_bytes = parts[-1][1]
        return parts

    def add(self, part: tuple[int, int]) -> None:
        insort(self._ranges, part)

    def remove(self, start_bytes: int) -> list[tuple[int, int]]:
        """Forget the ranges from an offset on, and return them."""
        at = bisect_right(self._ranges, (start_bytes, -1))
        gone = self._ranges[at:]
        del self._ranges[at:]
        return gone

    def pieces(self, offset_bytes: int, nbytes: int) -> list[int] | None:
        """Return the sizes of the parts of an extent, each in one range; None where none lies."""
        sizes: list[int] = []
        stop = offset_bytes + nbytes
        at = bisect_right(self._ranges, (offset_bytes, 1 << 62)) - 1
        while offset_bytes < stop:
            if not 0 <= at < len(self._ranges):
                return None
            start, end = self._ranges[at]
            if not start <= offset_bytes < end:
                return None
            sizes.append(min(end, stop) - offset_bytes)
            offset_bytes += sizes[-1]
            at += 1
        return sizes


def pair(here: int, ours: Sequence[int], there: int, theirs: Sequence[int]) -> list[Piece]:
    """Return the pieces of a read whose two ends are cut at different places."""
    pieces: list[Piece] = []
    borders = sorted({*accumulate(ours), *accumulate(theirs)})
    start = 0
    for border in borders:
        if border > start:
            pieces.append(Piece(here + start, there + start, border - start))
            start = border
    return pieces
