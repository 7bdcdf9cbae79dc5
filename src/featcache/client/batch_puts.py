"""A client's puts of many features: one message for their room, one for their publish, all or none."""

import asyncio
from collections.abc import Sequence

from featcache.client.connection import PoolConnection
from featcache.client.deadlines import UNMAPPED, UNTOLD, at_most, give_up_at, left, within
from featcache.client.keys import ENVELOPE_BYTES
from featcache.control import many, messages
from featcache.control.messages import ProtocolError, Reserved
from featcache.control.turns import BYTES_SHIFT, turn_of
from featcache.errors import FeatcacheError, at_member
from featcache.memory.slab import Order
from featcache.ref import FeatureRef
from featcache.session.offload import Offload
from featcache.session.staging import Staged
from featcache.session.waiting import wait_mapped
from featcache.settings import Settings


class ClientBatchPuts:
    """The part of a `ClientWriter` that puts many."""

    connection: PoolConnection
    puts: int
    _settings: Settings
    _offload: Offload

    async def _open(self) -> None:
        """Map the slab for writing, if it is not yet."""
        raise NotImplementedError

    def _withdraw(self, reserved: Reserved, staged: Staged, *, wrote: bool) -> None:
        """Give a slot up behind the writes that may be on their way."""
        raise NotImplementedError

    def _give_up(self, reserved: Reserved, *, landed: bool) -> None:
        raise NotImplementedError

    @property
    def stages_at_call(self) -> bool:
        """Whether a put is to note its place on the caller's stream before it waits for anything."""
        return self.connection.attachment.mapping.deferred

    async def put_many(
        self, staged: Sequence[Staged], timeout_s: float | None, *, wait: bool
    ) -> list[FeatureRef]:
        """Copy many features in, all or none, and return their refs. Raises as `ClientWriter.put`."""
        self.connection.attachment.check()
        until_s = None if timeout_s is None else give_up_at(timeout_s)
        if timeout_s is None:
            answer = await self._reserve_many(staged, None, wait=wait)
        else:
            answer = await within(
                timeout_s,
                wait,
                sum(each.request.nbytes for each in staged),
                lambda waits, deadline_s: self._reserve_many(staged, deadline_s, wait=waits),
            )
        rooms = [Reserved(answer.request, *slot) for slot in answer.slots]
        self._begin(rooms, staged)
        await self._write_many(rooms, staged, until_s)
        try:
            return await self._publish_many(rooms, staged, until_s)
        finally:
            for room in rooms:
                self.connection.attachment.end_write(room.slot, room.generation)

    async def _reserve_many(
        self, staged: Sequence[Staged], deadline_s: float | None, *, wait: bool
    ) -> many.ReservedMany:
        await self._open()
        link, names, counts = self.connection.link, list[str](), list[int]()
        for each in staged:
            readers = each.request.readers
            if isinstance(readers, int):
                counts.append(readers)
            else:
                names = sorted(readers)
        sizes = [each.request.nbytes for each in staged]
        ttl_s = staged[0].request.ttl_s
        left_s = None if deadline_s is None else left(deadline_s)
        answer, _ = await link.request(
            many.ReserveMany(link.number(), sizes, counts, names, ttl_s, wait, left_s)
        )
        if not isinstance(answer, many.ReservedMany) or len(answer.slots) != len(staged):
            raise ProtocolError("the owner answered a put of many with something else")
        return answer

    def _begin(self, rooms: list[Reserved], staged: Sequence[Staged]) -> None:
        attachment, begun = self.connection.attachment, 0
        try:
            for room, each in zip(rooms, staged, strict=True):
                at = room.slot, room.generation, room.offset_bytes
                attachment.begin_write(*at, each.request.nbytes)
                begun += 1
        except BaseException:  # closed meanwhile, or no room at all: nothing was written
            for index, room in enumerate(rooms):
                self._give_up(room, landed=True)
                if index < begun:
                    attachment.end_write(room.slot, room.generation)
            raise

    # --- the bytes --------------------------------------------------------------------------------

    async def _write_many(
        self, rooms: list[Reserved], staged: Sequence[Staged], until_s: float | None
    ) -> None:
        """Write all: here what is soon copied, all else in one run of a thread. If one fails, none stays."""
        mapping, turn = self.connection.attachment.mapping, turn_of(asyncio.get_running_loop())
        wrote, large, at = set[int](), list[int](), [0]
        kept = set(range(len(rooms)))  # those that are this task's to give up
        try:
            for member, (room, each) in enumerate(zip(rooms, staged, strict=True)):
                at[0] = member
                await self._wait_mapped(room, each, until_s)
                blocking_bytes = mapping.blocking_write_bytes(each.parts)
                if blocking_bytes > self._settings.inline_bytes:
                    large.append(member)
                    continue
                turn.left -= 1 + (blocking_bytes >> BYTES_SHIFT)
                if turn.left < 0:
                    await turn.wait()
                wrote.add(member)
                mapping.write(room.offset_bytes, each.parts, each.order)
            if large:
                kept -= set(large)
                wrote |= set(large)
                await self._write_large(rooms, staged, large, at)
                kept |= set(large)
            self._tell_written(rooms, staged)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                kept |= set(large)  # the thread is done
            for member in sorted(kept):
                self._withdraw(rooms[member], staged[member], wrote=member in wrote)
            at_member(error, at[0])
            raise

    async def _wait_mapped(self, room: Reserved, staged: Staged, until_s: float | None) -> None:
        attachment, extent = self.connection.attachment, (room.offset_bytes, staged.request.nbytes)
        if not attachment.is_mapped(*extent):
            with at_most(until_s, UNMAPPED):
                await wait_mapped(attachment, *extent)

    async def _write_large(
        self, rooms: list[Reserved], staged: Sequence[Staged], large: list[int], at: list[int]
    ) -> None:
        mapping = self.connection.attachment.mapping

        def write() -> None:
            for member in large:
                at[0], each = member, staged[member]
                mapping.write(rooms[member].offset_bytes, each.parts, each.order)

        def withdraw(_: object) -> None:
            for member in large:
                self._withdraw(rooms[member], staged[member], wrote=True)

        await self._offload.run(write, withdraw)

    def _tell_written(self, rooms: list[Reserved], staged: Sequence[Staged]) -> None:
        words: dict[int, tuple[Order, list[tuple[int, int]]]] = {}
        for room, each in zip(rooms, staged, strict=True):
            written = room.slot, room.generation
            words.setdefault(id(each.order), (each.order, []))[1].append(written)
        for order, values in words.values():
            self.connection.attachment.tell_written_many(values, order)

    # --- the publish ------------------------------------------------------------------------------

    async def _publish_many(
        self, rooms: list[Reserved], staged: Sequence[Staged], until_s: float | None
    ) -> list[FeatureRef]:
        connection, link = self.connection, self.connection.link
        published = 0
        try:
            # Made first: an invalid ref is refused here, before any reader can have a slot.
            refs = [
                FeatureRef(
                    *(connection.attachment.pool_id, connection.endpoint),
                    *(room.slot, room.generation, room.offset_bytes, each.request.nbytes),
                    each.specs,
                )
                for room, each in zip(rooms, staged, strict=True)
            ]
            while published < len(rooms):
                members = self._members(rooms[published:], staged[published:])
                publish = many.PublishMany(link.number(), members)
                with at_most(until_s, UNTOLD):
                    answer, _ = await link.request(publish)
                if not isinstance(answer, messages.Reply):
                    raise ProtocolError("the owner answered a put of many with something else")
                published += len(members)
        except BaseException as error:
            if isinstance(error, FeatcacheError) and error.member is not None:
                error.member += published
            for room in rooms[:published]:
                link.undo_soon(room.slot, room.generation)
            # What was sent and not answered (cancelled, or not in time) may be published by now: it is
            # undone behind that message, as the request was cancelled. If it is refused it is given up.
            for room in rooms[published:]:
                self._give_up(room, landed=False)
            raise
        self.puts += len(refs)
        return refs

    def _members(
        self, rooms: Sequence[Reserved], staged: Sequence[Staged]
    ) -> list[tuple[int, int, many.Specs, bytes | None]]:
        """Return the first members of a publish, as many as one message takes."""
        left_bytes = self.connection.link.message_bytes - ENVELOPE_BYTES
        members: list[tuple[int, int, many.Specs, bytes | None]] = []
        for room, each in zip(rooms[: many.MAX_PUBLISHED], staged, strict=False):
            member = room.slot, room.generation, each.specs, each.request.key
            left_bytes -= len(messages.encode(member))
            if left_bytes < 0 and members:
                break
            members.append(member)
        return members
