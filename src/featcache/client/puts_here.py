"""A client's puts in the thread of their caller: where room was given ahead, the loop has no part in them.

Such a put claims a room by a word, copies the bytes, and leaves its publish in the session's page. What it
shares with the loop's thread and with other callers is the list of rooms and the page's ring of posts; each
has a lock. A room is one put's as soon as it has left the list. The pin under which it is written is set in
the lock in which the session's end looks for pins (`SlotWrites.claim`): from then on nothing is unmapped,
and no goodbye is said, until `end_write`. Whatever else goes over the socket is the loop's to send.
"""

import contextlib
from functools import partial

from featcache.client.connection import PoolConnection
from featcache.client.posts import PublishPosts
from featcache.client.rooms import RoomsAhead
from featcache.control.messages import Reserved
from featcache.control.pending import PendingRequests
from featcache.control.rooms import PublishUnkeyed, PutTerms, Room
from featcache.core.put_queue import Request
from featcache.errors import FeatcacheError
from featcache.ref import FeatureRef
from featcache.session.line import Line
from featcache.session.staging import InLoop, Staged


def wire_form(
    request: Request,
) -> tuple[int, int | list[str], float | None, bytes | None]:
    """Return a put's request as the fields of `messages.PutSpec` between its number and `waits`."""
    readers = request.readers
    owed = readers if isinstance(readers, int) else sorted(readers)
    return request.nbytes, owed, request.ttl_s, request.key


def terms_of(request: Request) -> PutTerms:
    """Return a put's request as the terms of its publish into room that was given ahead."""
    nbytes, readers, ttl_s, key = wire_form(request)
    return PutTerms(nbytes, readers, ttl_s, key)


class PutsHere:
    """The part of a `ClientWriter` that puts in the caller's thread."""

    connection: PoolConnection
    puts: int
    _rooms: RoomsAhead
    _requests: PendingRequests
    _posts: PublishPosts
    _line: Line

    puts_here = True

    @property
    def published(self) -> int:
        """Features that were put here, by whichever thread."""
        return self.puts + self._posts.from_threads

    def put_here(self, staged: Staged, in_loop: InLoop) -> FeatureRef | None:
        """Copy a feature into a room that was given ahead and return its ref; None if there is none.

        None also for a put under a key, and while another of this client asks for room.

        Raises:
            OwnerLost, CacheClosed: as `FeatureClient.put`.

        """
        request = staged.request
        room = None if request.key is not None else self._claim_here(request.nbytes, in_loop)
        if room is None:
            return None
        attachment, wrote, posted = self.connection.attachment, False, False
        try:
            if not attachment.is_mapped(room.offset_bytes, request.nbytes):
                in_loop(partial(self._give_up, room, landed=True))
                return None
            # Made first: an invalid ref is refused here, before any reader can have the slot.
            ref = FeatureRef(
                *(attachment.pool_id, self.connection.endpoint, room.slot, room.generation),
                *(room.offset_bytes, request.nbytes, staged.specs),
            )
            wrote = True
            attachment.mapping.write(room.offset_bytes, staged.parts, staged.order)
            attachment.tell_written(room.slot, room.generation, staged.order)
            posted = True
            self._posts.post_here(
                PublishUnkeyed(room.slot, room.generation, staged.specs, terms_of(request)), in_loop
            )
            attachment.note_put(ref)
        except BaseException:
            # Without a loop its session has ended, and nothing is left to take back.
            with contextlib.suppress(FeatcacheError):
                landed = self._has_landed(room, staged, wrote=wrote) and not posted
                in_loop(lambda: self._take_back_here(room, landed=landed, posted=posted))
            raise
        finally:
            attachment.end_write(room.slot, room.generation)
        return ref

    def _claim_here(self, nbytes: int, in_loop: InLoop) -> Room | None:
        """Take a room that was given ahead, in any thread, as `ClientWriter._claim` in the loop."""
        rooms, attachment = self._rooms, self.connection.attachment
        if not rooms.come or self._requests.asked_rooms or self._line.busy:
            return None
        if not attachment.mapping.writable:
            return None
        room = rooms.pop(nbytes)
        while room is not None:
            claimed = attachment.claim(room.slot, room.generation, room.offset_bytes, nbytes)
            if claimed:
                return room
            if claimed is False:  # taken back at the same time: its owner may have found the claim
                try:
                    in_loop(partial(self._give_up, room, landed=True))
                finally:
                    attachment.end_write(room.slot, room.generation)
            room = rooms.pop(nbytes)
        return None

    def _take_back_here(self, room: Room, *, landed: bool, posted: bool) -> None:
        """Have the owner take a put back, in the loop.

        An interrupt may come on either side of the post. The owner handles posts before messages: of the
        two here, it ignores the first if the put was published, and the second if it was not.
        """
        self._give_up(room, landed=landed)
        if posted:
            self.connection.link.undo_soon(room.slot, room.generation)

    def _has_landed(self, room: Reserved | Room, staged: Staged, *, wrote: bool) -> bool:
        raise NotImplementedError

    def _give_up(self, room: Reserved | Room, *, landed: bool) -> None:
        raise NotImplementedError
