"""Notes that sessions post in their pages instead of sending them: a client's puts without a key.

They come without a system call, and wake nobody by themselves: a session rings the owner's doorbell
once for those of a turn of its loop. They are handled before any frame that comes later, when the
doorbell rings, by the recycler's timer, and wherever the owner looks at what sessions have told it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from featcache.control.dispatch import Dispatcher
from featcache.control.messages import ProtocolError, decode_from_client
from featcache.control.peer import Peer
from featcache.control.rooms import PublishUnkeyed
from featcache.control.turns import FRAME_UNITS, QUANTUM_UNITS, turn_of


class PostedNotes:
    """The posts of all sessions of one server."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        sessions: Mapping[int, Peer],
        on_lost: Callable[[Peer, ProtocolError], object],
    ) -> None:
        """`on_lost` is told of a session whose channel was closed for what it posted."""
        self._dispatcher = dispatcher
        self._sessions = sessions
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._waiting: dict[int, None] = {}
        """Numbers of sessions whose posts are handled as the loop's turns go."""

    def take(self, peer: Peer) -> None:
        """Handle a session's new posts, or raise ProtocolError: its later posts are ignored."""
        if not peer.posts:
            return
        try:
            posts = peer.posts.take()
        except ValueError as error:
            peer.posts = None
            raise ProtocolError(f"its page is damaged: {error}") from None
        self._turn.left -= FRAME_UNITS * len(posts)
        for payload in posts:
            try:
                self._handle(peer, payload)
            except ProtocolError:
                peer.posts = None
                raise
            except Exception as error:  # noqa: BLE001 - a bug in featcache: the others are handled anyway
                context = {"message": "featcache: a post could not be handled", "exception": error}
                self._loop.call_exception_handler(context)

    def _handle(self, peer: Peer, payload: bytes) -> None:
        note = decode_from_client(payload)
        if type(note) is not PublishUnkeyed:
            raise ProtocolError(f"a {type(note).__name__} is not to be posted")
        self._dispatcher.note(peer, note)

    def hear(self, peer: Peer) -> None:
        """As `take`; a malformed post ends the session as a malformed frame does."""
        try:
            self.take(peer)
        except ProtocolError as error:
            peer.channel.close()
            self._on_lost(peer, error)

    def take_rest(self, peer: Peer) -> None:
        """As `take`, as a session ends: what is malformed ends it no more."""
        with contextlib.suppress(ProtocolError):
            self.take(peer)

    def hear_all(self) -> bool:
        """Begin to hear all sessions, some in later turns if this one has no units left.

        Returns whether any have posted.
        """
        posted = [number for number, peer in self._sessions.items() if peer.posts]
        if posted:
            begins = not self._waiting
            self._waiting.update(dict.fromkeys(posted))
            if begins:
                self._turn.do(self._hear_some)
        return bool(posted)

    def _hear_some(self) -> bool:
        until = max(0, self._turn.left - QUANTUM_UNITS)
        while self._waiting:
            if self._turn.left <= until:
                return True
            number = next(iter(self._waiting))
            del self._waiting[number]
            if (peer := self._sessions.get(number)) is not None:
                self.hear(peer)
        return False
