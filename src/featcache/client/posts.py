"""Publishes that a client leaves in its page: its owner is woken once for those of a turn of the loop."""

import asyncio
import threading
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
        posts: PostRing,
        bell: Callable[[], object],
        requests: PendingRequests,
        rooms: RoomsAhead,
    ) -> None:
        self._posts = posts
        self._bell = bell
        self._requests = requests
        self._rooms = rooms
        self._call_soon = asyncio.get_running_loop().call_soon
        self._rung_at = 0
        """How many posts there were when the doorbell was rung last."""
        self._rings_soon = False
        self._lock = threading.Lock()
        """Guards the ring, of which an entry is one thread's until it is counted, and `from_threads`."""
        self.from_threads = 0
        """Puts that were told of by `post_here`."""

    def post(self, note: PublishUnkeyed) -> None:
        """Tell the owner of a put, or raise what a request would."""
        self._requests.check()
        payload = encode(note)
        with self._lock:
            posted = self._posts.post(payload)
        if not posted:
            self._requests.post(payload)  # behind the posts: the owner takes them first
            return
        if self._rooms.run_low():
            self._ring()
        elif not self._rings_soon:
            self._rings_soon = True
            self._call_soon(self._ring_soon)

    def post_here(
        self, note: PublishUnkeyed, in_loop: Callable[[Callable[[], object]], object]
    ) -> None:
        """As `post`, in any thread: `in_loop` runs something in the loop, which alone uses the socket."""
        self._requests.check()
        payload = encode(note)
        with self._lock:
            self.from_threads += 1
            posted = self._posts.post(payload)
        if not posted:
            in_loop(lambda: self._requests.post(payload))
        elif not self._posts.is_heard:
            self._bell()  # the loop may stand still: this thread does not wait for its next turn

    def _ring_soon(self) -> None:
        self._rings_soon = False
        self._ring()

    def _ring(self) -> None:
        if not self._posts.is_heard and self._rung_at != self._posts.count:
            self._rung_at = self._posts.count
            self._bell()
