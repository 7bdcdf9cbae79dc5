"""The slab's size as a server tells it to its sessions: segments that come, and a tail that goes."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from featcache.control import messages
from featcache.control.messages import encode
from featcache.control.peer import Peer, Segment


class SlabChanges:
    """The part of a `Server` that announces segments, and has sessions unmap the tail."""

    sessions: dict[int, Peer]
    _loop: asyncio.AbstractEventLoop
    _shrinking: dict[int, asyncio.Future[None]]
    """By shrink epoch: done once every session has unmapped the tail."""

    def announce(self, segments: Sequence[Segment]) -> None:
        for peer in self.sessions.values():
            self._send_segments(peer, segments)

    def _send_segments(self, peer: Peer, segments: Sequence[Segment]) -> None:
        for first in range(0, len(segments), messages.MAX_SEGMENTS):
            starts, sizes, fds = zip(*segments[first : first + messages.MAX_SEGMENTS], strict=True)
            peer.channel.send(encode(messages.Segments(starts[0], list(sizes))), fds)

    def retire(
        self, shrink_epoch: int, end_bytes: int, timeout_s: float
    ) -> Coroutine[Any, Any, int]:
        """Have every session unmap the segments from `end_bytes` on.

        The messages are sent before this returns, so they come before any segment that is announced
        later. The coroutine returns how many sessions have not acknowledged within `timeout_s`; these
        keep the memory.
        """
        for peer in self.sessions.values():
            peer.channel.send(encode(messages.UnmapTail(shrink_epoch, end_bytes)))
        return self._await_unmapped(shrink_epoch, timeout_s)

    async def _await_unmapped(self, shrink_epoch: int, timeout_s: float) -> int:
        done = self._shrinking[shrink_epoch] = self._loop.create_future()
        self._settle_shrinking()  # there may be no session to wait for
        await asyncio.wait([done], timeout=timeout_s)
        del self._shrinking[shrink_epoch]
        return self._behind(shrink_epoch)

    def _behind(self, shrink_epoch: int) -> int:
        """Return how many sessions may still map the tail that this epoch took away."""
        return sum(peer.shrink_epoch < shrink_epoch for peer in self.sessions.values())

    def _settle_shrinking(self) -> None:
        for shrink_epoch, done in self._shrinking.items():
            if not done.done() and not self._behind(shrink_epoch):
                done.set_result(None)
