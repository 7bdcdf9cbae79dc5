"""Why a ref is stale: a bounded memory of the refs that ended otherwise than by being paid."""

import enum
from collections import OrderedDict, deque
from typing import Final

from featcache.core.slots import Slot, SlotState, SlotTable

_AGAIN: Final = "put the feature again"


class Ending(enum.Enum):
    """How a ref ended, other than by having all its reads paid, and what to do about it."""

    EXPIRED = f"expired with reads unpaid: {_AGAIN}, with a longer ttl or with ttl=None"
    DISCARDED = f"was discarded: {_AGAIN} if it is still wanted"
    EVICTED = f"was evicted with its key: {_AGAIN}, and pin the key of one that must stay"
    REPLACED = "was replaced, as its key was given to another feature: get it by key"
    READER_LOST = f"was given up, as the readers that owed it died: {_AGAIN} for those that live"
    REFUSED = (
        "was refused by the pool's owner, whose settings (tensors, readers) or records its put did not fit: "
        f"{_AGAIN} within them"
    )
    WRITER_LOST = f"never came, as its writer died or gave it up: {_AGAIN}"

    code: int
    """Its number in an `ending` word; an attribute, since members of an enum are slow to look up."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.code = len(type(self).__members__) + 1


_BY_CODE: Final = {ending.code: ending for ending in Ending}
_CODE_BITS: Final = 4
_PAID: Final = (
    "was recycled, as every read that it owed was paid: put it with as many readers as read it, or "
    "keep it under a key"
)
_FORGOTTEN: Final = (
    f"was recycled, and its slot has had other features since: {_AGAIN}. It was paid, or it expired "
    "or was discarded too long ago to tell"
)
_NEVER: Final = "was never given out by this pool: it was forged or damaged"
RECYCLED: Final = f"was recycled, and its slot has another feature now: {_AGAIN}"
UNKNOWN: Final = (
    "was recycled (every read that it owed was paid), expired or discarded: put the feature again, "
    "with more readers or a longer ttl if need be"
)
"""These two are what a session says of a ref before the last that its slot's `ending` word tells of."""


def why_by_word(word: int, generation: int, *, published: bool, recycled: bool) -> str:
    """Say why a ref is stale, as a session knows it.

    `word` is its slot's `ending` word: the last generation that ended otherwise than by being paid, and
    how. `published` says whether the ref's generation was reached, `recycled` whether a later one was.
    """
    told = word >> _CODE_BITS
    if told == generation and (ending := _BY_CODE.get(word & (1 << _CODE_BITS) - 1)):
        return ending.text
    if told < generation and published:
        return _PAID
    return RECYCLED if recycled else UNKNOWN


class Endings:
    """The last so many refs that ended otherwise than by being paid."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[tuple[int, int], Ending] = OrderedDict()
        self._forgot = False
        self.untold: deque[tuple[int, int]] = deque(maxlen=most)
        """Slots of what was noted, each with its `ending` word, until sessions are told."""

    def note(self, slot: Slot, ending: Ending) -> None:
        """Remember how a slot's ref ended; what it was told first counts."""
        known = self._known
        if (slot.index, slot.generation) not in known:
            known[slot.index, slot.generation] = ending
            self.untold.append((slot.index, slot.generation << _CODE_BITS | ending.code))
        if len(known) > self._most:
            known.popitem(last=False)
            self._forgot = True

    def why_stale(self, table: SlotTable, index: int, generation: int) -> str:
        """Say why a ref, of which no number is trusted, can't be read, and what to do."""
        return f"ref {index}:{generation} {self._why(table, index, generation)}"

    def _why(self, table: SlotTable, index: int, generation: int) -> str:
        if not 0 <= index < table.count or not 0 < generation <= table.slots[index].generation:
            return _NEVER
        known = self._known.get((index, generation))
        if known is not None:
            return known.text
        slot = table.slots[index]
        if slot.generation == generation and slot.state is SlotState.RESERVED:
            return _NEVER
        return _FORGOTTEN if self._forgot else _PAID
