"""A client's puts: room from the owner's one queue, or given ahead; bytes written here; then a publish.

Room that was given ahead is claimed by a word (`memory.words.RoomClaim`); where there is none that fits
the owner is asked (`Reserve`), which takes a round trip. From then on the slot is this session's alone
(`pool.pending_writes.WriteState` draws its life). The bytes go into a mapping of the slab that can be
written, apart from the one that views are lent from. A word in the session's page, stored behind the
copy, says that they have landed. The publish is told one way, by a post in the page that takes no system
call (`client.posts`), and the ref is good at once: a reader that is faster than the owner waits
(`session.early`). Under a key it is asked for: then every session finds it.
"""

import asyncio
from functools import partial
from typing import Any

from featcache.client.batch_puts import ClientBatchPuts
from featcache.client.connection import PoolConnection
from featcache.client.deadlines import UNMAPPED, UNTOLD, at_most, give_up_at, left, within
from featcache.client.posts import PublishPosts
from featcache.client.puts_here import PutsHere, terms_of, wire_form
from featcache.client.rooms import RoomsAhead
from featcache.control import messages
from featcache.control.descriptors import close_taken
from featcache.control.messages import ProtocolError, Reserved
from featcache.control.rooms import PublishUnkeyed, PutTerms, Room
from featcache.core.put_queue import Request
from featcache.errors import (
    BackendUnavailable,
    FeatcacheError,
    PutTimeout,
    SettingsError,
    system_errors,
)
from featcache.memory.words import Header
from featcache.ref import FeatureRef, TensorSpec
from featcache.session.arguments import parse_put, parse_readers
from featcache.session.line import Line
from featcache.session.offload import Offload, SharedTask
from featcache.session.staging import Staged
from featcache.session.waiting import wait_mapped
from featcache.settings import Settings


class ClientWriter(ClientBatchPuts, PutsHere):
    """Puts into the pool of one connection."""

    def __init__(self, connection: PoolConnection, settings: Settings, offload: Offload) -> None:
        self.connection = connection
        self._settings = settings
        self._offload = offload
        self._opening = SharedTask(partial(_open, connection, offload))
        self._line = Line()
        """Puts that wait for the slab to be opened for writing."""
        self._rooms = RoomsAhead()
        self._requests = connection.link.requests
        connection.link.on_rooms = self._rooms.add
        self._posts = PublishPosts(
            connection.attachment.posts, connection.ring, self._requests, self._rooms
        )
        self.puts = 0

    def stage(self, feature: Any, readers: Any, ttl: Any, key: Any = None) -> Staged:
        """Validate a put in the caller's thread.

        Raises:
            SettingsError: an argument is invalid.
            BackendUnavailable: this client's device can't access the slab.

        """
        request, specs, packed = parse_put(feature, readers, ttl, key, self._settings)
        self._check(request, specs)
        parts, order = self.connection.attachment.mapping.stage(packed)
        return Staged(request, specs, parts, order)

    async def put(self, staged: Staged, timeout_s: float | None, *, wait: bool) -> FeatureRef:
        """Copy a feature in and return its ref.

        Raises:
            FeatureTooLarge, PoolFull, PutTimeout, OwnerLost: as `FeatureClient.put`.

        """
        self.connection.attachment.check()
        request = staged.request
        until_s = None if timeout_s is None else give_up_at(timeout_s)
        room = self._claim(request.nbytes)
        if room is not None:
            return await self._fill(room, staged, terms_of(request), until_s)
        if timeout_s is None:  # a scope takes as long as a third of a round trip
            reserved = await self._reserve(request, wait=wait)
        else:
            reserved = await within(
                timeout_s,
                wait,
                request.nbytes,
                lambda waits, deadline_s: self._reserve(request, deadline_s, wait=waits),
            )
        attachment = self.connection.attachment
        try:
            at = reserved.offset_bytes
            attachment.begin_write(reserved.slot, reserved.generation, at, request.nbytes)
        except BaseException:  # closed meanwhile, or no room at all: nothing was written
            self._give_up(reserved, landed=True)
            raise
        return await self._fill(reserved, staged, None, until_s)

    def _check(self, request: Request, specs: tuple[TensorSpec, ...]) -> None:
        """Raise SettingsError for what the owner's bounds do not allow: it is told of a put one way."""
        connection, readers = self.connection, request.readers
        if len(specs) > connection.tensors:
            raise SettingsError(
                f"{len(specs)} tensors: the pool's owner takes at most {connection.tensors}"
            )
        if (readers if isinstance(readers, int) else len(readers)) > connection.readers:
            parse_readers(readers, connection.readers, least=0)

    def _claim(self, nbytes: int) -> Room | None:
        """Take a room that was given ahead; None if there is none that fits.

        None also while an earlier put of this client asks for room: it is not overtaken.
        """
        rooms, attachment = self._rooms, self.connection.attachment
        if not rooms.come or self._requests.asked_rooms or self._line.busy:
            return None
        room = rooms.pop(nbytes)
        if room is None:
            self.connection.link.read_now()  # puts in a row never let the loop read
            room = rooms.pop(nbytes)
        while room is not None:
            claimed = attachment.claim(room.slot, room.generation, room.offset_bytes, nbytes)
            if claimed:
                return room
            if claimed is False:
                attachment.end_write(room.slot, room.generation)
                self._give_up(room, landed=True)
            room = rooms.pop(nbytes)
        return None

    async def _open(self) -> None:
        """Map the slab for writing, if it is not yet, and go on in the order of the calls."""
        if self._line.busy or not self.connection.attachment.mapping.writable:
            await self._line.go(self._join_opening)
            self.connection.attachment.check()  # it may have been closed meanwhile

    async def _join_opening(self) -> None:
        if not self.connection.attachment.mapping.writable:
            await self._opening.join()

    async def _reserve(
        self, request: Request, deadline_s: float | None = None, *, wait: bool
    ) -> Reserved:
        if self._line.busy or not self.connection.attachment.mapping.writable:
            await self._open()
        link = self.connection.link
        left_s = None if deadline_s is None else left(deadline_s)
        answer, _ = await link.request(
            messages.Reserve(link.number(), *wire_form(request), wait, left_s)
        )
        if not isinstance(answer, Reserved):
            raise ProtocolError(f"the owner answered a put with {type(answer).__name__}")
        self._rooms.add(answer.rooms)
        return answer

    async def _fill(
        self,
        room: Reserved | Room,
        staged: Staged,
        terms: PutTerms | None,
        until_s: float | None,
    ) -> FeatureRef:
        """Write a slot that is this session's and publish it; give it up if that fails."""
        attachment, parts, order = self.connection.attachment, staged.parts, staged.order
        mapping, at = attachment.mapping, room.offset_bytes
        wrote = False
        try:
            if not attachment.is_mapped(at, staged.request.nbytes):
                with at_most(until_s, UNMAPPED):
                    await wait_mapped(attachment, at, staged.request.nbytes)
            if mapping.blocking_write_bytes(parts) <= self._settings.inline_bytes:
                wrote = True
                mapping.write(at, parts, order)
            else:
                # From here the slot is the thread's, until it is done; if nobody awaits that, it is
                # given up then.
                wrote = True
                await self._offload.run(
                    lambda: mapping.write(at, parts, order),
                    lambda _: self._withdraw(room, staged, wrote=True),
                )
            attachment.tell_written(room.slot, room.generation, order)
        except asyncio.CancelledError:
            if not wrote:
                self._withdraw(room, staged, wrote=False)
            raise
        except BaseException:
            self._withdraw(room, staged, wrote=wrote)
            raise
        try:
            return await self._publish(room, staged, terms, until_s)
        except FeatcacheError:
            self._give_up(room, landed=False)  # refused: the slot is still reserved
            raise
        finally:
            attachment.end_write(room.slot, room.generation)

    async def _publish(
        self,
        room: Reserved | Room,
        staged: Staged,
        terms: PutTerms | None,
        until_s: float | None,
    ) -> FeatureRef:
        connection, request, specs = self.connection, staged.request, staged.specs
        link, slot, generation = connection.link, room.slot, room.generation
        # Made first: an invalid ref is refused here, before any reader can have the slot.
        ref = FeatureRef(
            *(connection.attachment.pool_id, connection.endpoint, slot, generation),
            *(room.offset_bytes, request.nbytes, specs),
        )
        if request.key is None:
            self._posts.post(PublishUnkeyed(slot, generation, specs, terms))
            connection.attachment.note_put(ref)
        else:
            publish = messages.Publish(link.number(), slot, generation, specs, terms)
            answer = await self._published(publish, until_s)
            if not isinstance(answer, messages.Published):
                raise ProtocolError(f"the owner answered a put with {type(answer).__name__}")
            self._rooms.add(answer.rooms)
        self.puts += 1
        return ref

    async def _published(self, publish: messages.Publish, until_s: float | None) -> messages.Answer:
        """Return the owner's answer. One that is not there in time is of a put that is taken back."""
        request = self.connection.link.request
        if until_s is None:  # a scope takes as long as a third of a round trip
            return (await request(publish))[0]
        try:
            with at_most(until_s, UNTOLD):
                return (await request(publish))[0]
        except PutTimeout:
            self.connection.link.undo_soon(publish.slot, publish.generation)
            raise

    def _withdraw(self, reserved: Reserved | Room, staged: Staged, *, wrote: bool) -> None:
        """Give a slot up, after the writes that a stream may still have for it."""
        self._give_up(reserved, landed=self._has_landed(reserved, staged, wrote=wrote))
        self.connection.attachment.end_write(reserved.slot, reserved.generation)

    def _has_landed(self, reserved: Reserved | Room, staged: Staged, *, wrote: bool) -> bool:
        """Whether no stream has writes for a slot any more; if one may have, its word comes behind them."""
        attachment, order = self.connection.attachment, staged.order
        if not (wrote and attachment.mapping.deferred and order is not None):
            return True
        try:
            attachment.tell_written(reserved.slot, reserved.generation, order)
        except BackendUnavailable:
            return True  # a broken context: nothing comes any more
        return False

    def _give_up(self, reserved: Reserved | Room, *, landed: bool) -> None:
        self.connection.link.tell(
            messages.GiveUpReserved(reserved.slot, reserved.generation, landed)
        )


# --- the first time -------------------------------------------------------------------------------


async def _open(connection: PoolConnection, offload: Offload) -> None:
    """Map the slab for writing."""
    link, mapping = connection.link, connection.attachment.mapping
    answer, fds = await link.request(messages.OpenForWriting(link.number()))
    try:
        if not isinstance(answer, messages.WriteDescriptors):
            raise ProtocolError(f"the owner answered a writer with {type(answer).__name__}")
        # The descriptors are the thread's, which closes them even if the loop is gone by then.
        with system_errors(BackendUnavailable, "the slab can't be mapped for writing"):
            await offload.run(partial(_open_for_writing, mapping, fds))
        end_bytes = connection.attachment.header[Header.COMMITTED]
        offload.spawn(lambda: mapping.warm(end_bytes))  # the first put need not wait for it
    except Exception:
        close_taken(fds)  # the thread has not, if it was refused
        raise


def _open_for_writing(mapping: Any, fds: list[int]) -> None:
    try:
        mapping.open_for_writing(fds)
    finally:
        close_taken(fds)
