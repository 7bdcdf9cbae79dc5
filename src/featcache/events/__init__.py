"""Events: frozen records handed to hooks; the log is the first hook, metrics another.

A record's `name` is its event (``featcache.pool.pressure``, …), its `severity` a log level, its other
fields are the facts. `featcache.events.hooks` hands them on.
"""

from typing import Final

from featcache.events.event import (
    Event,
)
from featcache.events.hooks import (
    Hook,
    Throttle,
    add_hook,
    emit,
    is_emitting,
    log_event,
    remove_hook,
)
from featcache.events.hosts import (
    FetchFailed,
    FetchQuarantined,
    FetchSlow,
    HomeAttached,
    HomeUnreachable,
    HostAttached,
    HostLeft,
    HostLost,
)
from featcache.events.pools import (
    BackendChosen,
    CommitFailed,
    KeyEvicted,
    KeySourceFailed,
    OwnerBack,
    OwnerGone,
    PeerRefused,
    PeerUnreachable,
    PoolClosed,
    PoolOpened,
    PoolPressure,
    PutSpilled,
    PutWaited,
    PutWaiting,
    ReaderAttached,
    ReaderLeft,
    ReaderLost,
    ReaderQuarantined,
    ReconnectRefused,
    RefExpired,
    ReturnFailed,
    SegmentsCommitted,
    SegmentsReturned,
)
from featcache.events.tiers import (
    DemotionDropped,
    TierFailed,
)

__all__ = [
    "BackendChosen",
    "CommitFailed",
    "DemotionDropped",
    "Event",
    "FetchFailed",
    "FetchQuarantined",
    "FetchSlow",
    "HomeAttached",
    "HomeUnreachable",
    "Hook",
    "HostAttached",
    "HostLeft",
    "HostLost",
    "KeyEvicted",
    "KeySourceFailed",
    "OwnerBack",
    "OwnerGone",
    "PeerRefused",
    "PeerUnreachable",
    "PoolClosed",
    "PoolOpened",
    "PoolPressure",
    "PutSpilled",
    "PutWaited",
    "PutWaiting",
    "ReaderAttached",
    "ReaderLeft",
    "ReaderLost",
    "ReaderQuarantined",
    "ReconnectRefused",
    "RefExpired",
    "ReturnFailed",
    "SegmentsCommitted",
    "SegmentsReturned",
    "Throttle",
    "TierFailed",
    "add_hook",
    "emit",
    "is_emitting",
    "log_event",
    "log_to_structlog",
    "remove_hook",
]

log_to_structlog: Final = log_event
"""The older name of `log_event`."""
