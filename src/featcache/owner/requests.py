"""Handlers for session requests: lookups, claims, reservations, publishes."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from featcache.control import far, many, messages
from featcache.control.dispatch import Begun, Wait
from featcache.control.messages import Answer
from featcache.control.rooms import PublishUnkeyed, Rooms
from featcache.control.turns import WAKE_UNITS
from featcache.core.endings import Ending
from featcache.core.put_queue import Request
from featcache.core.slots import Slot
from featcache.errors import FeatcacheError, MalformedRef, SettingsError, StaleRef, at_member
from featcache.owner.far_requests import FarRequests
from featcache.owner.key_requests import KeyRequests
from featcache.owner.keys import Claim, Lookups
from featcache.owner.sessions import Sessions
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool
from featcache.pool.writer import OwnerWriter, Place
from featcache.ref import FeatureRef, TensorSpec
from featcache.session.arguments import parse_readers


class RequestHandlers(FarRequests, KeyRequests):
    """The server's `control.dispatch.RequestHandlers`. No number in a session's message is trusted."""

    def __init__(
        self, pool: Pool, writer: OwnerWriter, lookups: Lookups, sessions: Sessions
    ) -> None:
        self._pool = pool
        self._writer = writer
        self._lookups = lookups
        self._sessions = sessions
        self._wire_refs = {}
        self._answers: dict[type, Callable[[int, Any], Answer | Wait]] = {
            messages.Find: self._find,
            messages.Share: self._share,
            many.FindMany: self._find_many,
            many.ContainsMany: self._contains_many,
            messages.KeyCommand: self._command,
            messages.Reserve: self._reserve,
            messages.Publish: self._publish,
            many.ReserveMany: self._reserve_many,
            many.PublishMany: self._publish_many,
            messages.OpenForWriting: lambda _, message: messages.WriteDescriptors(message.request),
            messages.Discard: self._discard,
            messages.Relay: lambda _, message: self._relay(message),
            messages.HostPool: lambda _, message: self._host_pool(message),
            far.Bring: self._bring,
            far.EndFar: self._end_far,
            messages.Upload: lambda session, message: self._upload(
                message, self._request(session, message)
            ),
        }

    def answer(self, session: int, message: messages.Request) -> Answer | Wait:
        """Handle a request; return the answer, or the coroutine that will."""
        return self._answers[type(message)](session, message)

    def note(
        self,
        session: int,
        note: messages.ReleaseClaim | messages.GiveUpReserved | PublishUnkeyed,
    ) -> Rooms | None:
        """Handle a message that has no answer."""
        if type(note) is PublishUnkeyed:
            return self._publish_unkeyed(session, note)
        if isinstance(note, messages.ReleaseClaim):
            if self._pool.store.key_waiters.has(note.key, note.claim, session):
                self._lookups.release_claim(Claim(note.key, note.claim))
        elif isinstance(note, messages.GiveUpReserved):
            self._give_up(session, note)
        return None

    def _page(self, session: int) -> SessionPage:
        return self._pool.pages[session]

    def _discard(self, _: int, message: messages.Discard) -> Answer | Wait:
        if self._pool.ahead.is_coming(message.slot, message.generation):
            return self._discard_later(
                message
            )  # another session's, which was faster than its publish
        self._sessions.discard(message.slot, message.generation, undoes=message.undoes)
        return messages.Reply(message.request)

    async def _discard_later(self, message: messages.Discard) -> Answer:
        await self._pool.ahead.arrival(message.slot, message.generation)
        self._pool.check_open()
        self._sessions.discard(message.slot, message.generation, undoes=message.undoes)
        return messages.Reply(message.request)

    async def _relay(self, message: messages.Relay) -> Answer:
        return messages.Reply(message.request, ref=await self._sessions.relays.encoded(message.ref))

    async def _host_pool(self, message: messages.HostPool) -> Answer:
        return messages.Reply(message.request, text=await self._sessions.relays.endpoint())

    async def _upload(self, message: messages.Upload, request: Request) -> Answer:
        ref = await self._sessions.relays.upload(
            message.ref, request, message.timeout_s, wait=message.waits
        )
        return messages.Reply(message.request, ref=ref)

    # --- slots that sessions write ----------------------------------------------------------------

    def _reserve(self, session: int, message: messages.Reserve) -> Answer | Wait:
        request = self._request(session, message)
        turn = self._pool.turn
        before = self._pool.store.evicted
        slot = None if turn.has_callers else self._writer.reserve(request)  # none is overtaken
        if slot is not None:
            self._writer.look_ahead()
            if self._pool.store.evicted != before:
                self._pool.ahead.count_asked(self._page(session), slot.nbytes)
            return self._reserved(session, message.request, slot)
        turn.left -= WAKE_UNITS  # a task of its own
        place = self._writer.ask(request, wait=message.waits)
        return Begun(self._room(session, message, place), lambda: self._writer.withdraw(place))

    async def _room(self, session: int, message: messages.Reserve, place: Place) -> Answer:
        """Wait for room; the owner's puts and the sessions' are served first come, first served."""
        slot = await self._writer.slot_of(place, message.timeout_s, wait=message.waits)
        return self._reserved(session, message.request, slot)

    def _request(self, session: int, message: messages.PutSpec) -> Request:
        settings = self._pool.settings
        least = 1 if message.key is None else 0
        self._pool.store.check_size(message.nbytes)
        readers = parse_readers(message.readers, settings.readers, least=least)
        return Request(message.nbytes, readers, message.ttl_s, message.key, session)

    def _reserved(self, session: int, request: int, slot: Slot) -> messages.Reserved:
        page = self._pool.pages[session]
        self._pool.pending_writes.reserve(slot, page)
        page.put_sizes.append(slot.nbytes)
        rooms = self._pool.ahead.give(page, self._writer)
        return messages.Reserved(request, slot.index, slot.generation, slot.offset_bytes, rooms)

    def _publish(self, session: int, message: messages.Publish) -> Answer:
        page = self._page(session)
        self._publish_from(page, message)
        # While it has any, or they are to be made, new ones are given once it has its answer (`more_rooms`).
        ahead, later = self._pool.ahead, page.ahead or page.to_evict_bytes
        given = ahead.untold(page) if later else ahead.give(page, self._writer)
        return messages.Published(message.request, given)

    def _publish_unkeyed(self, session: int, note: PublishUnkeyed) -> Rooms | None:
        page = self._page(session)
        try:
            self._publish_from(page, note)
        except FeatcacheError:
            self._refuse(page, note)
            return None
        return self.more_rooms(session, answered=False)

    def more_rooms(self, session: int, *, answered: bool = True) -> Rooms | None:
        """Return what a session that has published is given for its next puts, if half is due.

        If it is `answered`, and has other rooms yet, it is told with its next answer: a frame less.
        """
        page, least = self._page(session), max(1, self._pool.settings.rooms_ahead // 2)
        given = self._pool.ahead.give(page, self._writer, least=least, evicts=True)
        if answered and len(page.ahead) > len(given):
            page.untold = given
            return None
        return Rooms(given) if given else None

    def _publish_from(self, page: SessionPage, message: messages.Publish | PublishUnkeyed) -> None:
        """Publish a slot that the session wrote; readers see it once its word has landed."""
        pool, terms = self._pool, message.terms
        slot = pool.ahead.find(page, message.slot, message.generation)
        if len(message.specs) > (most := pool.settings.tensors):
            raise SettingsError(
                f"{len(message.specs)} tensors: the pool's owner takes at most {most}"
            )
        nbytes = slot.nbytes if terms is None else terms.nbytes
        if nbytes > slot.nbytes or (terms is None and slot.owes_nothing):
            raise MalformedRef("this put does not fit the room that it has")
        # Raises MalformedRef for specs that no feature of this slot has.
        place = slot.index, slot.generation, slot.offset_bytes, nbytes
        ref = FeatureRef(pool.pool_id, pool.ref_endpoint, *place, message.specs)
        if terms is not None:
            least = 1 if terms.key is None else 0
            readers = parse_readers(terms.readers, pool.settings.readers, least=least)
            request = Request(nbytes, readers, terms.ttl_s, terms.key, page.session)
            pool.ahead.fit(page, slot, request)
        pool.publish_from(slot, ref, page)

    def _refuse(self, page: SessionPage, note: PublishUnkeyed) -> None:
        """End a put whose ref is out already: whoever reads it is told that it is stale, and why."""
        slot = page.reserved.get(note.slot)
        if slot is not None and slot.generation == note.generation:
            self._pool.store.endings.note(slot, Ending.REFUSED)
            # Not as landed, which frees it at once: its ref is out, and an early reader may hold it.
            self._give_up(page.session, messages.GiveUpReserved(note.slot, note.generation, False))

    def _written(
        self, page: SessionPage, index: int, generation: int, specs: tuple[TensorSpec, ...]
    ) -> tuple[Slot, FeatureRef]:
        """Return a slot that a session wrote and may publish with these specs, and its ref, or raise."""
        pool = self._pool
        slot = pool.pending_writes.find_reserved(page, index, generation)
        if len(specs) > (most := pool.settings.tensors):
            raise SettingsError(f"{len(specs)} tensors: the pool's owner takes at most {most}")
        # Raises MalformedRef for specs that no feature of this slot has.
        place = slot.index, slot.generation, slot.offset_bytes, slot.nbytes
        return slot, FeatureRef(pool.pool_id, pool.ref_endpoint, *place, specs)

    def _reserve_many(self, session: int, message: many.ReserveMany) -> Answer | Wait:
        writer, turn, ttl_s = self._writer, self._pool.turn, message.ttl_s
        sizes = zip(message.sizes, self._readers_of(message), strict=True)
        members = [Request(nbytes, readers, ttl_s, None, session) for nbytes, readers in sizes]
        batch = self._pool.store.batch(members, session)
        late = turn.has_callers or turn.left < len(members) // 8  # as the owner's own
        slot = None if late else writer.reserve_batch(batch)
        if slot is not None:
            return self._reserved_many(session, message.request, slot)
        turn.left -= WAKE_UNITS  # a task of its own
        place = writer.ask(batch, wait=message.waits, late=late)
        return Begun(self._rooms(session, message, place), lambda: writer.withdraw(place))

    def _readers_of(self, message: many.ReserveMany) -> list[int | frozenset[str]]:
        most = self._pool.settings.readers
        if message.names:
            return [parse_readers(message.names, most, least=1)] * len(message.sizes)
        if len(message.counts) != len(message.sizes):
            raise SettingsError("a batch says of each of its members how many reads it owes")
        for count in set(message.counts):
            parse_readers(count, most, least=0)
        return [*message.counts]

    async def _rooms(self, session: int, message: many.ReserveMany, place: Place) -> Answer:
        """Wait for the room of a batch, as `_room`."""
        slot = await self._writer.slot_of(place, message.timeout_s, wait=message.waits)
        return self._reserved_many(session, message.request, slot)

    def _reserved_many(self, session: int, request: int, first: Slot) -> many.ReservedMany:
        slots, page = self._pool.store.apart(first), self._pool.pages[session]
        for slot in slots:
            self._pool.pending_writes.reserve(slot, page)
        found = [(slot.index, slot.generation, slot.offset_bytes) for slot in slots]
        return many.ReservedMany(request, found)

    def _publish_many(self, session: int, message: many.PublishMany) -> Answer:
        """Publish slots that the session wrote: all of a message, or none."""
        pool, page = self._pool, self._page(session)
        slots = []
        for index, (number, generation, specs, _) in enumerate(message.members):
            try:
                slots.append(self._written(page, number, generation, specs))
            except FeatcacheError as error:
                raise at_member(error, index) from None
        if len({slot.index for slot, _ in slots}) < len(slots):
            raise StaleRef("a slot is published once")
        pool.turn.left -= len(slots)
        for (slot, ref), member in zip(slots, message.members, strict=True):
            slot.wanted_key = member[3]
            pool.publish_from(slot, ref, page)
        return messages.Reply(message.request)

    def _give_up(self, session: int, note: messages.GiveUpReserved) -> None:
        """Give up a slot; if the session's stream may still write it, only after its word has landed."""
        pool, page = self._pool, self._page(session)
        try:
            slot = pool.ahead.find(page, note.slot, note.generation)
        except StaleRef:
            return  # a note has no answer
        if note.landed:
            pool.pending_writes.drop(slot, page)
            pool.apply(pool.store.free_reserved(slot, time.monotonic()))
        else:
            pool.apply(pool.store.give_up_reserved(slot, time.monotonic()))
            pool.pending_writes.add(slot, page)
            pool.pending_writes.end_reserved(note.slot, note.generation)
            pool.recycler.poll_after(0.0)

    def writable(self) -> Sequence[int]:
        """Return the descriptors by which the slab is mapped for writing."""
        return self._pool.slab.write_descriptors()

    # --- answers that could not be sent --------------------------------------------------------------

    def revoke(self, session: int, answer: Answer) -> None:
        """Undo the grant, claim or reservation of an answer; a session that is gone has had it undone.

        A ref in an answer is of a feature that nobody knows of then, whether the session is gone or not.
        """
        page = self._pool.pages.get(session)
        if isinstance(answer, messages.Reply) and answer.ref:
            self._sessions.discard_unsent(FeatureRef.from_bytes(answer.ref))
        elif isinstance(answer, messages.ClaimGranted):
            for key, claim in self._pool.store.key_waiters.claims_of(session):
                if claim == answer.claim:
                    self._lookups.release_claim(Claim(key, claim))
        elif page is not None and not self._pool.closed:
            self._revoke_of(session, page, answer)

    def _revoke_of(self, session: int, page: SessionPage, answer: Answer) -> None:
        """Undo the grants or reservations of an answer to a session that is there."""
        if isinstance(answer, messages.Granted):
            grant = page.grants.get(answer.index)
            if grant is not None and grant.serial == answer.serial:
                self._lookups.return_lease(page, grant)
        elif isinstance(answer, many.GrantedMany):
            for one in answer.found:
                grant = None if one is None else page.grants.get(one[0])
                if one is not None and grant is not None and grant.serial == one[1]:
                    self._lookups.return_lease(page, grant)
        elif isinstance(answer, many.ReservedMany):
            for slot, generation, _ in answer.slots:
                self._give_up(session, messages.GiveUpReserved(slot, generation, landed=True))
        elif isinstance(answer, messages.Reserved):
            self._give_up(
                session, messages.GiveUpReserved(answer.slot, answer.generation, landed=True)
            )
