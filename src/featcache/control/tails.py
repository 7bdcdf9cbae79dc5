"""Segments that the slab gives back: every session unmaps them first, and says so."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from featcache.control.messages import UnmapTail, encode
from featcache.control.peer import Peer


class Tails:
    """The tails that the sessions of one server have been told to unmap."""

    def __init__(self, sessions: Mapping[int, Peer]) -> None:
        self._sessions = sessions
        self._loop = asyncio.get_running_loop()
        self._shrinking: dict[int, asyncio.Future[None]] = {}
        """By shrink epoch: done once every session has unmapped the tail."""

    def retire(
        self, shrink_epoch: int, end_bytes: int, timeout_s: float
    ) -> Coroutine[Any, Any, int]:
        """Have every session unmap the segments from `end_bytes` on.

        The messages are sent before this returns, so they come before any segment that is announced
        later. The coroutine returns how many sessions have not acknowledged within `timeout_s`; these
        keep the memory.
        """
        for peer in self._sessions.values():
            peer.channel.send(encode(UnmapTail(shrink_epoch, end_bytes)))
        return self._await_unmapped(shrink_epoch, timeout_s)

    async def _await_unmapped(self, shrink_epoch: int, timeout_s: float) -> int:
        done = self._shrinking[shrink_epoch] = self._loop.create_future()
        self.settle()  # there may be no session to wait for
        await asyncio.wait([done], timeout=timeout_s)
        del self._shrinking[shrink_epoch]
        return self._behind(shrink_epoch)

    def _behind(self, shrink_epoch: int) -> int:
        """Return how many sessions may still map the tail that this epoch took away."""
        return sum(peer.shrink_epoch < shrink_epoch for peer in self._sessions.values())

    def settle(self) -> None:
        """Go on where no session is behind any more: one has acknowledged, or ended."""
        for shrink_epoch, done in self._shrinking.items():
            if not done.done() and not self._behind(shrink_epoch):
                done.set_result(None)
