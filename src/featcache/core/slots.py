"""The slot table: which extent a slot has, in which state, and who still owes a read of it."""

import enum

from featcache.core.allocator import Extent


class SlotState(enum.IntEnum):
    """A slot's life: FREE → RESERVED → PUBLISHED → RETIRING → FREE.

    RESERVED goes back to FREE when a writer gives up, for nobody can have read it: at once, or by way of
    RETIRING where its bytes may still be on their way.
    """

    FREE = 0
    RESERVED = 1
    PUBLISHED = 2
    RETIRING = 3


# Members of an enum are slow to look up, and these are looked up at every put.
_FREE, _RESERVED = SlotState.FREE, SlotState.RESERVED


class Slot:
    """One entry of the table. `generation` grows at each `SlotTable.take` and never repeats."""

    __slots__ = (
        "born_s",
        "due_s",
        "extent",
        "generation",
        "grants",
        "idle",
        "index",
        "key",
        "listed",
        "nbytes",
        "owed_by_names",
        "paid_by",
        "reads_left",
        "retired_s",
        "state",
        "tick",
        "ttl_s",
        "used_s",
        "wanted_key",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.generation = 0
        self.state = SlotState.FREE
        self.extent: Extent | None = None
        self.nbytes = 0
        self.reads_left = 0
        """Reads still owed."""
        self.owed_by_names: set[str] | None = None
        """The names that owe them; None when the reads are anonymous."""
        self.paid_by: set[int] | None = None
        """Sessions that paid already; each pays once."""
        self.born_s = 0.0
        self.ttl_s: float | None = None
        self.retired_s = 0.0
        self.due_s = 0.0
        """When a RETIRING slot's holds may be looked at."""
        self.wanted_key: bytes | None = None
        """The key under which it is to be kept once it is published."""
        self.key: bytes | None = None
        """The key under which the directory holds it."""
        self.grants = 0
        """Reads given out by key that are not paid yet."""
        self.idle = False
        """Whether it is evictable: kept under a key and neither pinned nor read, with no reads owed."""
        # The eviction policy's own fields, written by `core.recency` alone and described there.
        self.listed = False
        self.tick = 0
        self.used_s = 0.0

    @property
    def offset_bytes(self) -> int:
        """Where the extent begins in the slab."""
        assert self.extent is not None, "only FREE slots have no extent"
        return self.extent.offset_bytes

    @property
    def owed_by(self) -> tuple[str, ...] | int:
        """Who owes: names, or a count of anonymous reads."""
        return self.reads_left if self.owed_by_names is None else tuple(sorted(self.owed_by_names))

    @property
    def label(self) -> str:
        """``slot:generation``, as logs and errors name it."""
        return f"{self.index}:{self.generation}"


class SlotTable:
    """A fixed number of slots, the most recently freed one taken first.

    Reusing low, recent indices keeps the words that a recycler has to look at few and warm.
    """

    def __init__(self, count: int) -> None:
        self.slots = [Slot(index) for index in range(count)]
        """All of them, by index."""
        self.free = self.slots[::-1]
        """The FREE ones; the last is taken next."""
        self.count = count
        self.high = 0
        """One more than the highest index ever taken: words beyond it were never written."""

    @property
    def used(self) -> int:
        """Slots that are not FREE."""
        return self.count - len(self.free)

    @property
    def full(self) -> bool:
        """Whether `take` would find nothing."""
        return not self.free

    def take(self) -> Slot:
        """Return a slot, RESERVED and of a new generation. The caller has looked at `full`."""
        slot = self.free.pop()
        slot.generation += 1
        slot.state = _RESERVED
        if slot.index >= self.high:
            self.high = slot.index + 1
        return slot

    def give(self, slot: Slot) -> None:
        """Take a slot back; its generation stays, so that old refs never match again."""
        slot.state = _FREE
        slot.extent = None
        slot.owed_by_names = slot.paid_by = slot.wanted_key = None
        slot.reads_left = 0
        self.free.append(slot)

    def find(self, index: int, generation: int) -> Slot | None:
        """Return the slot if it still has this generation, else None."""
        if not 0 <= index < self.count:
            return None
        slot = self.slots[index]
        return slot if slot.generation == generation and slot.state is not _FREE else None

    def in_use(self) -> list[Slot]:
        """Return the slots that are not FREE, by index. For deaths and reports, not for hot paths."""
        return [slot for slot in self.slots[: self.high] if slot.state is not _FREE]
