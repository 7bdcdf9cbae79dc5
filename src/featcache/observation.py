"""What an observer is shown of a pool: frozen records of one moment. Sizes are bytes, times seconds.

They cross the socket as they are, so each is bounded: lists of what may be many are cut, with the number
of all beside them.
"""

import attrs

from featcache.statistics import Statistics

__all__ = [
    "KeyView",
    "KeysPage",
    "PoolView",
    "SessionView",
    "SlabMap",
    "Snapshot",
    "UnpaidRef",
    "WaitingPut",
]


@attrs.frozen(kw_only=True)
class SessionView:
    """One attached process: what it reads, owes and holds."""

    session: int
    """Its number, never used again; 0 is the owner itself."""
    name: str | None
    pid: int
    """As the owner sees it; 0 if it is in a PID namespace that the owner does not see."""
    state: str
    """``active``, ``quarantined`` (its socket is gone, its process lives) or ``settling``."""
    age_s: float
    reading: int
    """Features that it reads now, by ref or by key."""
    reading_bytes: int
    owes: int
    """Refs that owe a read to its name."""
    owes_bytes: int
    writing: int
    """Slots that are reserved for it and not published yet."""
    writing_bytes: int
    ahead: int
    """Slots that it was given before it asked, for its next puts."""
    ahead_bytes: int
    pins: int
    """Keys that it has pinned."""
    pinned_bytes: int
    hits: int
    """Lookups by key that it served itself."""
    misses: int


@attrs.frozen(kw_only=True)
class UnpaidRef:
    """A ref that still owes reads."""

    ref: str
    """``slot:generation``, as events name it."""
    nbytes: int
    age_s: float
    ttl_s: float | None
    """Seconds of life that it was given; None is without end."""
    reads_left: int
    owed_by: tuple[str, ...]
    """Who owes, each with what became of its session; empty if the reads are anonymous. Cut after 8."""
    read_by: tuple[str, ...]
    """Sessions that are reading it now. Cut after 8."""


@attrs.frozen(kw_only=True)
class WaitingPut:
    """A put that stands in the queue for room."""

    nbytes: int
    age_s: float
    session: int
    """Whose it is; 0 is the owner's own."""
    name: str | None


@attrs.frozen(kw_only=True)
class PoolView:
    """A pool but for its sessions."""

    pool: str
    """The pool's id, in hex."""
    endpoint: str
    name: str | None
    """The owner's own."""
    kind: str
    """``host``, ``cuda-vmm`` or ``cuda-ipc``."""
    device: str
    """``cpu``, or the UUID of the slab's GPU."""
    version: str
    """Of featcache, in the owner."""
    protocol: int
    pid: int
    """The owner's."""
    uptime_s: float
    level: str
    """The pressure."""
    holders: tuple[str, ...]
    """Who holds the room, a sentence each."""
    remedy: str
    statistics: Statistics
    observers: int
    unpaid_refs: int
    unpaid: tuple[UnpaidRef, ...]
    """The oldest 16 of them."""
    waiting: tuple[WaitingPut, ...]
    """The first 16 of `Statistics.waiters`."""


@attrs.frozen(kw_only=True)
class Snapshot(PoolView):
    """A pool and who is attached to it."""

    sessions: tuple[SessionView, ...]
    """Those attached; the owner itself (session 0) is the first once it has read something."""


@attrs.frozen(kw_only=True)
class KeyView:
    """A feature that is kept under a key."""

    key: bytes
    nbytes: int
    """Of its extent in the slab."""
    age_s: float
    """Since it was put."""
    unused_s: float
    """Since it was last used, as far as the eviction order knows."""
    hits: int
    """Lookups that found it and that the owner answered, and those looks of the owner, one a second at most,
    at which a session had found it itself since the look before: which key is hit most, not how often."""
    pinned: bool
    reads: int
    """Reads of it that are out or owed, as far as the owner counts them itself."""
    ref: str
    """``slot:generation``."""

    @property
    def label(self) -> str:
        """The key as logs name it: its text, or its bytes in hex."""
        text = self.key.decode("utf-8", "replace")
        return text if text.isprintable() and "\ufffd" not in text else self.key.hex()


@attrs.frozen(kw_only=True)
class KeysPage:
    """Keys in some order, and where the next page begins."""

    keys: tuple[KeyView, ...]
    total: int
    """Keys there are in all."""
    next: str | None
    """What to pass as `after` for the keys that follow; None if these are the last."""


@attrs.frozen(kw_only=True)
class SlabMap:
    """The slab by offset, drawn with a number of cells that each stand for as many bytes."""

    capacity_bytes: int
    committed_bytes: int
    cell_bytes: float
    states: str
    """A letter a cell, that of most of its bytes in use: ``.`` not committed, ``f`` free, ``s`` reserved
    (being written, or taken back and not yet free), ``o`` owed, ``k`` kept under a key, ``p`` pinned,
    ``r`` read now."""
    used: tuple[float, ...]
    """The share of each cell that is in use, 0 to 1."""
    ages_s: tuple[float, ...]
    """How old what is in it is, on average."""
