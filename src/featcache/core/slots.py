"""The slot table: a slot's extent, its state, and the reads that are owed of it."""

import enum

from featcache.core.allocator import Extent


class SlotState(enum.IntEnum):
    """A slot's life.

    | from | by | to |
    | --- | --- | --- |
    | FREE | `reserve`, or a grant to the queue's head | RESERVED |
    | RESERVED | `publish` | PUBLISHED (RETIRING at once if nothing keeps it) |
    | RESERVED | `free_reserved`: the writer gave up, and no reader can have seen it | FREE |
    | RESERVED | `give_up_reserved`: the same, but a copy into it may still be running | RETIRING |
    | PUBLISHED | nothing keeps it any more: no read owed, no key, no grant | RETIRING |
    | PUBLISHED | `fail_write` | RETIRING |
    | RETIRING | `recycle`: no session holds it | FREE |
    | FREE | `share`: a ref of the bytes of another slot (`of`) | PUBLISHED |
    """

    FREE = 0
    RESERVED = 1
    PUBLISHED = 2
    RETIRING = 3


# Members of an enum are slow to look up, and these are looked up at every put.
_FREE, _RESERVED = SlotState.FREE, SlotState.RESERVED


class Slot:
    """One entry of the table. `generation` grows at each `SlotTable.allocate` and never repeats."""

    __slots__ = (
        "born_s", "due_s", "early_paid", "entry", "extent", "generation", "grants", "hits", "idle", "index",
        "key", "listed", "mark", "mates", "nbytes", "of", "owed_by_names", "paid_by", "place", "reads_left",
        "retired_s", "state", "tick", "ttl_s", "used_s", "wanted_key",
    )  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index = index
        self.generation = 0
        self.state = SlotState.FREE
        self.extent: Extent | None = None
        self.nbytes = 0
        self.mates: list[Slot] | None = None
        """For the first slot of a batch: all of them, until the batch is taken apart (`core.batches`)."""
        self.of: Slot | None = None
        """For a share: the slot that has the extent, on which it has a grant (`core.shares`)."""
        self.reads_left = 0
        """Reads still owed."""
        self.owed_by_names: set[str] | None = None
        """Names of the readers that owe them; None if the reads are anonymous."""
        self.paid_by: set[int] | None = None
        """Sessions that paid already; each pays once."""
        self.early_paid: dict[int, str | None] | None = None
        """Sessions, with their names, that paid a read before the slot was published."""
        self.born_s = 0.0
        self.ttl_s: float | None = None
        self.retired_s = 0.0
        self.due_s = 0.0
        """For a RETIRING slot: the end of its grace, when its holds may be looked at."""
        self.wanted_key: bytes | None = None
        """The key under which `publish` keeps it."""
        self.key: bytes | None = None
        """The key under which the directory holds it."""
        self.grants = 0
        """Reads granted by key and not paid yet."""
        self.hits = 0
        """Lookups by message that found it under its key."""
        self.idle = False
        """Whether it is evictable: kept under a key and neither pinned nor read, with no reads owed."""
        # The eviction policy's own fields, written by `core.recency` alone and described in its
        # `policy`.
        self.listed = False
        self.entry = 0
        self.tick = self.mark = self.place = 0
        self.used_s = 0.0

    @property
    def offset_bytes(self) -> int:
        assert self.extent is not None, "only FREE slots have no extent"
        return self.extent.offset_bytes

    @property
    def owes_nothing(self) -> bool:
        """Whether it was given ahead and has no put's terms yet. Names that have died are terms."""
        return not self.reads_left and self.owed_by_names is None and self.wanted_key is None

    @property
    def owed_by(self) -> tuple[str, ...] | int:
        """The reads owed: names of readers, or a count of anonymous reads."""
        return self.reads_left if self.owed_by_names is None else tuple(sorted(self.owed_by_names))

    def is_tenant(self, generation: int) -> bool:
        """Whether this generation still has its extent."""
        return self.generation == generation and self.extent is not None

    @property
    def label(self) -> str:
        """``slot:generation``, as logs and errors name it."""
        return f"{self.index}:{self.generation}"


class SlotTable:
    """A fixed number of slots. The most recently freed one is allocated first.

    Reusing low, recent indices keeps the words that the recycler looks at few and warm.
    """

    def __init__(self, count: int) -> None:
        self.slots = [Slot(index) for index in range(count)]
        """All of them, by index."""
        self.free_slots = self.slots[::-1]
        """The FREE ones; the last is allocated next."""
        self.count = count
        self.high = 0
        """One more than the highest index ever allocated: words beyond it were never written."""

    @property
    def used(self) -> int:
        return self.count - len(self.free_slots)

    @property
    def full(self) -> bool:
        return not self.free_slots

    def allocate(self) -> Slot:
        """Return a slot, RESERVED and of a new generation. The table must not be full."""
        slot = self.free_slots.pop()
        slot.generation += 1
        slot.state = _RESERVED
        if slot.index >= self.high:
            self.high = slot.index + 1
        return slot

    def free(self, slot: Slot) -> None:
        """Free a slot. Its generation stays, so that old refs never match again."""
        slot.state = _FREE
        slot.extent = None
        slot.owed_by_names = slot.paid_by = slot.wanted_key = slot.early_paid = None
        slot.reads_left = 0
        self.free_slots.append(slot)

    def find(self, index: int, generation: int) -> Slot | None:
        """Return the slot if it still has this generation, else None."""
        if not 0 <= index < self.count:
            return None
        slot = self.slots[index]
        return slot if slot.generation == generation and slot.state is not _FREE else None

    def in_use(self) -> list[Slot]:
        """Return the slots that are not FREE, by index. For deaths and reports, not for hot paths."""
        return [slot for slot in self.slots[: self.high] if slot.state is not _FREE]
