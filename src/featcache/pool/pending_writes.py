"""Slots that sessions write: reserved, published, complete, or never to be.

A session's stream stores a word in its own page behind its copy. Once that is seen here, the owner
vouches for the bytes with a word of its own, so that readers look at one block whoever wrote. On a
host slab the word is there before the message that publishes the slot.
"""

import asyncio
import enum
from collections.abc import Callable
from typing import Final

from featcache.core.slots import Slot
from featcache.errors import StaleRef
from featcache.memory.words import RoomClaim, fence_full, fence_stores
from featcache.pool.page import SessionPage

_GENERATION: Final = RoomClaim.GENERATION


class WriteState(enum.Enum):
    """The life of a slot that a session writes; all transitions are methods of `PendingWrites`.

    | from      | by                                                   | to                   |
    | --------- | ---------------------------------------------------- | -------------------- |
    |           | `reserve`: the session may write the slot, or has    | RESERVED             |
    |           | claimed one that it was given ahead (`pool.ahead`)   |                      |
    | RESERVED  | `add`: published, or withdrawn with work on a stream | IN_FLIGHT, or LANDED |
    |           |                                                      | if its word is there |
    | RESERVED  | `drop`: withdrawn with nothing on a stream           | none: the slot frees |
    | IN_FLIGHT | `poll` sees the session's word                       | LANDED               |
    | IN_FLIGHT | `abandon`: the session ended, no word can come       | ABANDONED            |
    | ABANDONED | `add`, of the slot's next generation                 | as from RESERVED     |
    """

    RESERVED = "reserved"
    IN_FLIGHT = "in flight"
    LANDED = "landed"
    ABANDONED = "abandoned"


class PendingWrites:
    """The writes of all sessions. RESERVED slots are kept in their session's page, by slot."""

    def __init__(
        self, published: memoryview, reserved: memoryview, on_change: Callable[[], object]
    ) -> None:
        """`on_change` is called when the first write is in flight, and when none is any more."""
        self._published = published
        self._reserved = reserved
        self._on_change = on_change
        self.in_flight: dict[int, tuple[int, SessionPage]] = {}
        """By slot: the generation that is being written, and the page of its writer."""
        self._abandoned: dict[int, int] = {}
        self._awaited: dict[int, list[asyncio.Future[None]]] = {}
        """By slot: who waits for its publish, or its end."""

    def state_of(self, slot: Slot) -> WriteState | None:
        """Return the state of a published slot's write; None of one that its owner wrote or landed."""
        in_flight = self.in_flight.get(slot.index)
        if in_flight is not None and in_flight[0] == slot.generation:
            return WriteState.IN_FLIGHT
        return WriteState.ABANDONED if self.is_abandoned(slot) else None

    def is_abandoned(self, slot: Slot) -> bool:
        """Whether a slot's bytes will never come: its extent can be given out again."""
        return self._abandoned.get(slot.index) == slot.generation

    @staticmethod
    def find_reserved(page: SessionPage, index: int, generation: int) -> Slot:
        """Return a slot that a session may write, or raise StaleRef; its numbers are not trusted."""
        slot = page.reserved.get(index)
        if slot is None or slot.generation != generation:
            raise StaleRef(f"slot {index}:{generation} is not this session's to publish")
        return slot

    # --- transitions ------------------------------------------------------------------------------

    def reserve(self, slot: Slot, page: SessionPage) -> None:
        """Let a session write a slot; `reserved` says to who meets its ref that its publish may come."""
        page.reserved[slot.index] = slot
        self._reserved[slot.index] = slot.generation

    def drop(self, slot: Slot, page: SessionPage) -> None:
        """End a reservation of which no byte is, or will be, on its way."""
        del page.reserved[slot.index]
        self.end_reserved(slot.index, slot.generation)

    def end_reserved(self, index: int, generation: int) -> None:
        """Say that no publish of a slot is on its way any more: it has come, or never will.

        A slot that is published is live by now, and its `live` word was stored before this one: a reader
        that finds neither looks at `live` again.
        """
        if self._reserved[index] & _GENERATION == generation:  # not of the slot's next tenant
            fence_stores()
            self._reserved[index] = 0
        if self._awaited:
            for waiting in self._awaited.pop(index, ()):
                if not waiting.done():
                    waiting.set_result(None)

    async def arrival(self, is_coming: Callable[[], bool], index: int) -> None:
        """Return once a publish of a slot is not on its way any more."""
        while is_coming():
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._awaited.setdefault(index, []).append(waiting)
            try:
                await waiting
            finally:
                others = self._awaited.get(index)
                if others is not None and waiting in others:
                    others.remove(waiting)

    def add(self, slot: Slot, page: SessionPage) -> None:
        """Count a slot as complete once its session's word says so; it may say so already."""
        page.reserved.pop(slot.index, None)
        self._abandoned.pop(slot.index, None)  # of an earlier generation, which is recycled
        if page.has_written(slot.index, slot.generation):  # as it nearly always has on a host slab
            fence_full()  # as in `poll`
            self._published[slot.index] = slot.generation
            if self.in_flight.pop(slot.index, None) is not None:
                self._on_change()
            return
        self.in_flight[slot.index] = (slot.generation, page)
        self._on_change()

    def poll(self) -> None:
        """Vouch for the writes that have landed since the last poll."""
        landed = [
            (index, generation)
            for index, (generation, page) in self.in_flight.items()
            if page.has_written(index, generation)
        ]
        if not landed:
            return
        # The session's word was seen, so its bytes are there. Ours vouches for them, so it must not
        # become visible before theirs was read.
        fence_full()
        for index, generation in landed:
            self._published[index] = generation
            del self.in_flight[index]
        self._on_change()

    def abandon(self, page: SessionPage) -> list[tuple[int, int]]:
        """Give up the unfinished writes of a session that ended; return (slot, generation) of each."""
        self.poll()  # first: a write that landed before the session ended is complete
        given_up = [
            (index, generation)
            for index, (generation, writer) in self.in_flight.items()
            if writer is page
        ]
        for index, generation in given_up:
            del self.in_flight[index]
            self._abandoned[index] = generation
        if given_up:
            self._on_change()
        return given_up

    def close(self) -> None:
        """Release the words, which must be unmapped with the pool."""
        self.in_flight.clear()
        for waiting in [each for others in self._awaited.values() for each in others]:
            waiting.cancel()
        self._awaited.clear()
        del self._published, self._reserved
