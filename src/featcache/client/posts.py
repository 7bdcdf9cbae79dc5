"""Publishes that a client leaves in its page: its owner is woken once for those of a turn of the loop."""

import asyncio
from collections.abc import Callable

from featcache.client.rooms import RoomsAhead
from featcache.control.messages import encode
from featcache.control.pending import PendingRequests
from featcache.control.rooms import PublishUnkeyed
from featcache.memory.post_ring import PostRing


class PublishPosts:
    """The posts of one connection.

    A put that posts returns without a system call. The doorbell is rung when the loop comes to it, which
    is before it waits for anything. A row of puts in which the loop never turns rings by itself when half
    of the rooms ahead are used up, so that new ones have come when the others are.
    """

    def __init__(
        self,
        ring: PostRing,
        bell: Callable[[], object],
        requests: PendingRequests,
        rooms: RoomsAhead,
    ) -> None:
        self._ring = ring
        self._bell = bell
        self._requests = requests
        self._rooms = rooms
        self._call_soon = asyncio.get_running_loop().call_soon
        self._unrung = 0
        """Posts since the doorbell was rung."""
        self._rings_soon = False

    def post(self, note: PublishUnkeyed) -> None:
        """Tell the owner of a put, or raise what a request would."""
        self._requests.check()
        payload = encode(note)
        if not self._ring.post(payload):
            self._requests.post(payload)  # behind the posts: the owner takes them first
            return
        self._unrung += 1
        if self._unrung >= len(self._rooms):
            self._ring_now()
        elif not self._rings_soon:
            self._rings_soon = True
            self._call_soon(self._ring_soon)

    def _ring_soon(self) -> None:
        self._rings_soon = False
        if self._unrung:
            self._ring_now()

    def _ring_now(self) -> None:
        self._unrung = 0
        if not self._ring.is_heard:  # a frame that was sent since makes the owner take them
            self._bell()
