"""What an observer is shown of a pool: frozen records of one moment. Sizes are bytes, times seconds.

They cross the socket as they are, so each is bounded: lists of what may be many are cut, with the number
of all beside them.
"""

import attrs

from featcache.statistics import Statistics

__all__ = [
    "HomeView",
    "KeyView",
    "KeysPage",
    "PoolView",
    "ReadingHostView",
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
    peers: int = 0
    """Other hosts that there is a record of: those read from, and those that read here."""


@attrs.frozen(kw_only=True)
class HomeView:
    """Another host's owner that this one reads from: a home. Counts are since it was read from first."""

    address: str
    """As refs carry it."""
    pool: str
    """The id of its pool, in hex, when it was connected last; empty if it never was."""
    state: str
    """``connected``; ``away`` (no connection, and none was lost: it is being dialed, or refused); ``lost``
    (its last connection was lost; the next read dials it again)."""
    reason: str
    """Why it is not connected; empty while it is."""
    fetched: int
    """Features that were fetched, by one transfer each."""
    fetched_bytes: int
    failed: int
    """Fetches that ended without the feature."""
    dials_failed: int
    """Tries to connect to it that failed: nobody answered, or it refused."""
    in_progress: int
    """Fetches now, with those that wait for room."""
    quarantined: int
    """Landing places of reads that were given up, which are nobody's until nothing can be written there."""
    quarantined_bytes: int
    unacknowledged: int
    """Reads that were paid, and which the home has not said it knows of."""
    last_s: float
    """Of the last transfer: from its begin until its bytes were here, without look-up and wait for room."""
    mean_s: float
    longest_s: float
    total_s: float
    """Of all transfers together."""
    round_trip_s: float | None
    """Of the last heartbeat that was answered, over the control connection."""
    silent_s: float | None
    """Since it was heard last; None if it never was."""


@attrs.frozen(kw_only=True)
class ReadingHostView:
    """Another host that reads here."""

    host: str
    """The id of its own pool, in hex."""
    address: str
    """From where it came last."""
    state: str
    """``connected``; ``away`` (its connection broke, its lease runs); ``lost`` (its lease ended, and what it
    had begun was paid). Of those that are lost the last 16 are shown, until they come back."""
    named: int
    """Names that its sessions have."""
    names: tuple[str, ...]
    """The first 8 of them."""
    reading: int
    """Reads that it has begun: features that are pinned for it."""
    reading_bytes: int
    requests: int
    """Its requests that wait for an answer."""
    reads: int
    """Reads that it began, in all."""
    told_bytes: int
    """Bytes of the features that it was told the place of, in all."""
    lease_s: float
    """What is left of its lease; 0 once it is lost."""
    silent_s: float
    """Since it was heard last."""
    reads_paid: int
    """Reads that were paid for it as it was lost."""


@attrs.frozen(kw_only=True)
class Snapshot(PoolView):
    """A pool and who is attached to it."""

    sessions: tuple[SessionView, ...]
    """Those attached; the owner itself (session 0) is the first once it has read something."""
    homes: tuple[HomeView, ...] = ()
    """Other hosts that this owner reads from."""
    reading_hosts: tuple[ReadingHostView, ...] = ()
    """Other hosts that read here."""


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
