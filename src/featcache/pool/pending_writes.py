"""Bytes that sessions write: when they are complete, and what becomes of those that never will be.

A session's stream stores a word in its own page behind its copy; seen here, the owner vouches for the
bytes with a word of its own, so that readers look at one block whoever wrote. On a host slab the word is
there before the message that publishes the slot.
"""

from collections.abc import Callable

from featcache.core.slots import Slot
from featcache.memory.words import fence_full
from featcache.pool.page import SessionPage


class PendingWrites:
    """Slots that sessions are writing, or were when they died."""

    def __init__(self, published: memoryview, on_change: Callable[[], object]) -> None:
        """`on_change` is called when there begins or ceases to be something to look for."""
        self._published = published
        self._on_change = on_change
        self._expected: dict[int, tuple[int, SessionPage]] = {}
        self._forsaken: dict[int, int] = {}

    def __bool__(self) -> bool:
        """Whether there is something to look for."""
        return bool(self._expected)

    def add(self, slot: Slot, page: SessionPage) -> None:
        """Have a slot count as complete once its session has written it."""
        self._forsaken.pop(slot.index, None)  # of an earlier generation, which is recycled
        if page.has_written(slot.index, slot.generation):  # as it nearly always has on a host slab
            fence_full()  # as in `poll`
            self._published[slot.index] = slot.generation
            if self._expected.pop(slot.index, None) is not None:
                self._on_change()
            return
        self._expected[slot.index] = (slot.generation, page)
        self._on_change()

    def poll(self) -> None:
        """Vouch for what has landed since the last look."""
        landed = [
            (index, generation)
            for index, (generation, page) in self._expected.items()
            if page.has_written(index, generation)
        ]
        if not landed:
            return
        fence_full()  # their word was seen, so their bytes are there; ours vouches for them
        for index, generation in landed:
            self._published[index] = generation
            del self._expected[index]
        self._on_change()

    def abandon(self, page: SessionPage) -> list[tuple[int, int]]:
        """Give up what a session that ended has not written; return slots with their generations."""
        self.poll()
        given_up = [
            (index, generation)
            for index, (generation, whose) in self._expected.items()
            if whose is page
        ]
        for index, generation in given_up:
            del self._expected[index]
            self._forsaken[index] = generation
        if given_up:
            self._on_change()
        return given_up

    def concerns(self, slot: Slot) -> bool:
        """Whether a slot's bytes are a session's matter: on their way, or never to come."""
        expected = self._expected.get(slot.index)
        return (expected is not None and expected[0] == slot.generation) or self.is_abandoned(slot)

    def is_abandoned(self, slot: Slot) -> bool:
        """Whether a slot's bytes will never come: its extent can be another's."""
        return self._forsaken.get(slot.index) == slot.generation

    def close(self) -> None:
        """Let go of the words."""
        self._expected.clear()
        del self._published
