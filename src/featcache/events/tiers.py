"""The events of a tier below a pool; `featcache.events` has them."""

from typing import ClassVar

import attrs

from featcache.events.event import Event, Severity

__all__ = ["DemotionDropped", "TierFailed"]


@attrs.frozen(kw_only=True)
class TierFailed(Event):
    """A call of the tier below the pool failed, or was not answered in time; its feature alone is lost."""

    name: ClassVar[str] = "featcache.tier.failed"
    severity: ClassVar[Severity] = "warning"
    operation: str
    """``put``, ``get``, ``has``, ``remove`` or ``close``."""
    key: str
    reason: str
    unlogged: int
    """Failures since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class DemotionDropped(Event):
    """A feature was evicted without being put into the tier: too much is on its way there already."""

    name: ClassVar[str] = "featcache.tier.dropped"
    severity: ClassVar[Severity] = "warning"
    key: str
    nbytes: int
    reason: str
    unlogged: int
    """Drops since the last such event that were not logged."""
