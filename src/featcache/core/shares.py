"""Shares: refs of what is kept under a key, that owe reads of their own.

A share is a slot of the table with an index, a generation and words of its own, since a session pays a
ref's read once for each (slot, generation). Its extent is that of another slot, `Slot.of`, on which it
has a grant: so the bytes can be neither evicted nor freed while it lives. When it is recycled its
extent is not freed, but that grant is paid.
"""

from typing import Final

from featcache.core.effects import Effect, Recycled
from featcache.core.named_reads import NamedReads
from featcache.core.ripening import Ripening
from featcache.core.slots import Slot, SlotState
from featcache.errors import PoolFull

_PUBLISHED: Final = SlotState.PUBLISHED


class Shares(NamedReads):
    """The part of a `Store` that gives out shares and ends them."""

    owing: dict[int, Slot]
    _aging: dict[float, dict[int, Slot]]
    _ripening: Ripening

    def pay_grant(self, slot: Slot, now_s: float) -> list[Effect]:
        """Count a grant of a slot as paid."""
        raise NotImplementedError

    def share(
        self, base: Slot, readers: int | frozenset[str], ttl_s: float | None, now_s: float
    ) -> Slot:
        """Return a PUBLISHED slot over the bytes of another that owes these reads.

        It takes over one grant of the caller's on `base`, whose bytes are there: a share of bytes that
        never come would have no end of its own.

        Raises:
            PoolFull: the table is full; the grant is still the caller's.

        """
        assert base.of is None, "shares are of what is kept"
        assert base.grants, "the caller has a grant"
        if not self.table.free_slots:
            raise PoolFull(f"all {self.table.count} slots are in use: raise Settings.slots")
        slot = self.table.allocate()
        slot.of, slot.extent, slot.nbytes = base, base.extent, base.nbytes
        slot.ttl_s, slot.born_s = ttl_s, now_s
        if isinstance(readers, int):
            slot.reads_left = readers
        else:
            slot.reads_left, slot.owed_by_names = len(readers), set(readers)
        slot.state = _PUBLISHED
        self.owing[slot.index] = slot
        if ttl_s is not None:
            if ttl_s not in self._aging:
                self._aging[ttl_s] = {}
                self._ripening.learn(ttl_s, now_s)
            self._aging[ttl_s][slot.index] = slot
        return slot

    def _unshare(self, slot: Slot, now_s: float) -> list[Effect]:
        """Free the slot of a share, which no session holds any more, and pay its grant."""
        base = slot.of
        assert base is not None, "a share"
        said = Recycled(slot.index, slot.generation, 0)
        slot.of = None
        self.table.free(slot)
        return [said, *self.pay_grant(base, now_s)]
