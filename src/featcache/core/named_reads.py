"""The reads that named readers owe, paid for those that died."""

from typing import Final

from featcache.core.effects import Effect
from featcache.core.endings import Ending, Endings
from featcache.core.slots import Slot, SlotState, SlotTable

_PUBLISHED: Final = SlotState.PUBLISHED
_RETIRING: Final = SlotState.RETIRING


class NamedReads:
    """The part of a `Store` that pays for dead readers."""

    table: SlotTable
    endings: Endings

    def _settle(self, slot: Slot, now_s: float, grace_s: float = 0.0) -> list[Effect]:
        raise NotImplementedError

    def waive_reads(self, name: str, now_s: float) -> tuple[int, list[Effect]]:
        """Pay all reads that a dead named reader still owes; return their number."""
        paid, effects = 0, list[Effect]()
        for index, generation in self.owed_by(name):
            more = self.waive_read(index, generation, name, now_s)
            if more is not None:
                paid += 1
                effects += more
        return paid, effects

    def owed_by(self, name: str) -> list[tuple[int, int]]:
        """Return the slots and generations of which a named reader owes a read."""
        return [
            (slot.index, slot.generation)
            for slot in self.table.in_use()
            if slot.owed_by_names is not None
            and name in slot.owed_by_names
            and slot.state is not _RETIRING
        ]

    def waive_read(
        self, index: int, generation: int, name: str, now_s: float
    ) -> list[Effect] | None:
        """Pay the read that a dead named reader owes of a slot; None if it owes none any more."""
        slot = self.table.slots[index]
        names = slot.owed_by_names
        if slot.generation != generation or names is None or name not in names:
            return None
        if slot.state is _RETIRING:
            return None
        names.remove(name)
        slot.reads_left -= 1
        if slot.reads_left == 0 and slot.state is _PUBLISHED:
            self.endings.note(slot, Ending.READER_LOST)
            return self._settle(slot, now_s)
        return []
