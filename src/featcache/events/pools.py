"""Events of one pool: its slab, its sessions, its puts, its keys."""

from typing import Any, ClassVar

import attrs

from featcache.events.event import Event, Severity


@attrs.frozen(kw_only=True)
class PoolOpened(Event):
    """A pool was made and can be attached to."""

    name: ClassVar[str] = "featcache.pool.opened"
    endpoint: str
    device: str
    capacity_bytes: int
    committed_bytes: int


@attrs.frozen(kw_only=True)
class BackendChosen(Event):
    """A slab on a GPU is made in one of two ways."""

    name: ClassVar[str] = "featcache.backend.chosen"
    backend: str
    """``cuda-vmm`` (segments shared by descriptor) or ``cuda-ipc`` (one legacy allocation)."""
    device: str
    reason: str


@attrs.frozen(kw_only=True)
class PoolClosed(Event):
    """The owner closed its pool; sessions were told."""

    name: ClassVar[str] = "featcache.pool.closed"
    endpoint: str
    unpaid_refs: int
    """Refs that still owed reads, spilled ones included."""


@attrs.frozen(kw_only=True)
class PoolPressure(Event):
    """The level changed, or is still high."""

    name: ClassVar[str] = "featcache.pool.pressure"
    level: str
    """In a log it is ``pressure``: ``level`` is the log's own there."""
    previous: str
    capacity_bytes: int
    committed_bytes: int
    used_bytes: int
    free_bytes: int
    largest_free_bytes: int
    slots: int
    slots_used: int
    waiters: int
    waiting_bytes: int
    resident_bytes: int
    pinned_bytes: int
    oldest_ref: str | None
    """``slot:generation`` of the oldest ref that still owes a read."""
    oldest_age_s: float
    oldest_owed_by: tuple[str, ...] | int
    """The names that owe, or how many anonymous reads are owed."""
    holders: tuple[str, ...] = ()
    """Who holds the room, a sentence each: the oldest refs with their age and debtors first."""
    remedy: str = ""

    @property
    def urgency(self) -> Severity:
        """``info``; ``warning`` if puts have waited without a break since the last report."""
        return "warning" if self.level == self.previous == "exhausted" else self.severity

    def logged(self) -> dict[str, Any]:
        """Return `facts`, with the level as ``pressure``."""
        return {"pressure" if name == "level" else name: v for name, v in self.facts().items()}


@attrs.frozen(kw_only=True)
class PutWaited(Event):
    """A put stood in the queue. At most one a `Settings.log_interval`; the others are counted."""

    name: ClassVar[str] = "featcache.put.waited"
    nbytes: int
    waited_s: float
    granted: bool
    """False when it gave up (timeout or cancellation)."""
    unlogged: int
    """Waits since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class PutWaiting(Event):
    """A put has waited for `Settings.wait_warning` and goes on waiting. Told once of each put."""

    name: ClassVar[str] = "featcache.put.waiting"
    severity: ClassVar[Severity] = "warning"
    session: int
    """The session whose put it is; 0 is the owner itself."""
    nbytes: int
    waited_s: float
    waiters: int
    waiting_bytes: int
    free_bytes: int
    largest_free_bytes: int
    holders: tuple[str, ...]
    """Who holds the room, a sentence each: the oldest refs with their age and debtors first."""
    remedy: str
    unlogged: int
    """Puts that waited as long since the last such event, and were not logged."""


@attrs.frozen(kw_only=True)
class PutSpilled(Event):
    """A put went to the host slab. At most one a `Settings.log_interval`; the others are counted."""

    name: ClassVar[str] = "featcache.put.spilled"
    spill_pool: str
    nbytes: int
    unlogged: int
    """Spills since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class ReaderAttached(Event):
    """A session began."""

    name: ClassVar[str] = "featcache.reader.attached"
    session: int
    reader: str | None
    pid: int


@attrs.frozen(kw_only=True)
class ReaderLeft(Event):
    """A session said goodbye."""

    name: ClassVar[str] = "featcache.reader.left"
    session: int
    reader: str | None
    pid: int


@attrs.frozen(kw_only=True)
class ReaderLost(Event):
    """A session's process died; the reads it had begun, and those its name owed, were paid for it."""

    name: ClassVar[str] = "featcache.reader.lost"
    severity: ClassVar[Severity] = "warning"
    session: int
    reader: str | None
    pid: int
    reads_paid: int


@attrs.frozen(kw_only=True)
class ReaderQuarantined(Event):
    """A session's socket closed without a goodbye while its process lives; its holds stand."""

    name: ClassVar[str] = "featcache.reader.quarantined"
    severity: ClassVar[Severity] = "warning"
    session: int
    reader: str | None
    pid: int
    reason: str


@attrs.frozen(kw_only=True)
class PeerRefused(Event):
    """Somebody connected and was sent away."""

    name: ClassVar[str] = "featcache.peer.refused"
    severity: ClassVar[Severity] = "warning"
    reason: str
    pid: int
    unlogged: int
    """Refusals since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class RefExpired(Event):
    """A ref outlived its ttl with reads unpaid; its bytes are taken back."""

    name: ClassVar[str] = "featcache.ref.expired"
    severity: ClassVar[Severity] = "warning"
    ref: str
    nbytes: int
    age_s: float
    owed_by: tuple[str, ...] | int
    never_attached: tuple[str, ...]
    """Those of its debtors that no session was ever named."""
    unlogged: int
    """Expiries since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class KeyEvicted(Event):
    """A key was dropped. At most 16 a `Settings.log_interval`; the others are counted."""

    name: ClassVar[str] = "featcache.key.evicted"
    severity: ClassVar[Severity] = "debug"
    key: str
    """Its text, or its bytes in hex; at most 64 characters."""
    nbytes: int
    unused_s: float
    """Seconds since it was last looked up, or put."""
    cause: str
    """``room`` (a put needed it), ``watermark``, ``compaction``, ``asked``, or ``writer lost``."""
    unlogged: int
    """Evictions since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class SegmentsCommitted(Event):
    """The slab grew."""

    name: ClassVar[str] = "featcache.slab.committed"
    severity: ClassVar[Severity] = "debug"
    committed_bytes: int
    added_bytes: int


@attrs.frozen(kw_only=True)
class SegmentsReturned(Event):
    """The slab gave memory back."""

    name: ClassVar[str] = "featcache.slab.returned"
    severity: ClassVar[Severity] = "debug"
    committed_bytes: int
    returned_bytes: int
    mapped_in_sessions: int = 0
    """Sessions that had not said in time that they unmapped it; until they do it is not free."""


@attrs.frozen(kw_only=True)
class CommitFailed(Event):
    """The system would not give the slab more memory; until it does the pool counts as full."""

    name: ClassVar[str] = "featcache.slab.commit_failed"
    severity: ClassVar[Severity] = "error"
    committed_bytes: int
    wanted_bytes: int
    error: str


@attrs.frozen(kw_only=True)
class ReturnFailed(Event):
    """Memory that the slab gave back was not taken; the pool goes on without it."""

    name: ClassVar[str] = "featcache.slab.return_failed"
    severity: ClassVar[Severity] = "error"
    returned_bytes: int
    error: str


@attrs.frozen(kw_only=True)
class PeerUnreachable(Event):
    """A client's device can't access a pool's slab; its reads go through host memory. Said once."""

    name: ClassVar[str] = "featcache.peer.unreachable"
    severity: ClassVar[Severity] = "warning"
    device: str
    reason: str


@attrs.frozen(kw_only=True)
class OwnerGone(Event):
    """A client lost the owner of a pool."""

    name: ClassVar[str] = "featcache.owner.lost"
    severity: ClassVar[Severity] = "warning"
    endpoint: str
    reason: str


@attrs.frozen(kw_only=True)
class KeySourceFailed(Event):
    """What may have a missing key, other hosts or a tier, failed as it was asked: it counts as not there."""

    name: ClassVar[str] = "featcache.key_source.failed"
    severity: ClassVar[Severity] = "warning"
    source: str
    reason: str
    unlogged: int
    """Failures since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class OwnerBack(Event):
    """A client with ``reconnect=True`` attached a pool again at the endpoint of one that it lost."""

    name: ClassVar[str] = "featcache.owner.back"
    endpoint: str
    away_s: float


@attrs.frozen(kw_only=True)
class ReconnectRefused(Event):
    """An owner is at a client's endpoint again, and refused it; it goes on trying. Once a reason."""

    name: ClassVar[str] = "featcache.owner.refused"
    severity: ClassVar[Severity] = "warning"
    endpoint: str
    reason: str
