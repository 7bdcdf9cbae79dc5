"""Events about other hosts: those that read here, those that are read from, and what is fetched."""

from typing import ClassVar

import attrs

from featcache.events.event import Event, Severity


@attrs.frozen(kw_only=True)
class HostAttached(Event):
    """Another host, which has proved the cluster key, reads this pool."""

    name: ClassVar[str] = "featcache.host.attached"
    host: str
    """The id of its own pool, in hex."""
    address: str


@attrs.frozen(kw_only=True)
class HostLeft(Event):
    """Another host said goodbye."""

    name: ClassVar[str] = "featcache.host.left"
    host: str


@attrs.frozen(kw_only=True)
class HostLost(Event):
    """Another host's lease ended: the reads it had begun, and those its names owed, were paid for it."""

    name: ClassVar[str] = "featcache.host.lost"
    severity: ClassVar[Severity] = "warning"
    host: str
    reads_paid: int


@attrs.frozen(kw_only=True)
class HomeAttached(Event):
    """This owner connected to another host's, to read its refs."""

    name: ClassVar[str] = "featcache.home.attached"
    host: str
    """The id of the other host's pool, in hex."""
    address: str


@attrs.frozen(kw_only=True)
class HomeUnreachable(Event):
    """Another host's owner could not be connected to. At most 16 a `Settings.log_interval`."""

    name: ClassVar[str] = "featcache.home.unreachable"
    severity: ClassVar[Severity] = "warning"
    address: str
    reason: str
    """Nobody answers there; or another cluster key, TLS, version: it was refused."""
    unlogged: int
    """Tries since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class FetchFailed(Event):
    """A feature of another host could not be fetched. At most 16 a `Settings.log_interval`."""

    name: ClassVar[str] = "featcache.fetch.failed"
    severity: ClassVar[Severity] = "warning"
    address: str
    nbytes: int
    reason: str
    unlogged: int
    """Failures since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class FetchSlow(Event):
    """A transfer took more than half of the time after which it is given up. At most 16 a `log_interval`."""

    name: ClassVar[str] = "featcache.fetch.slow"
    severity: ClassVar[Severity] = "warning"
    address: str
    nbytes: int
    took_s: float
    limit_s: float
    """When it would have been given up."""
    unlogged: int
    """Slow transfers since the last such event that were not logged."""


@attrs.frozen(kw_only=True)
class FetchQuarantined(Event):
    """A read was given up, and may still be written: nobody has its landing place until it can't be.

    At most 16 a `Settings.log_interval`.
    """

    name: ClassVar[str] = "featcache.fetch.quarantined"
    severity: ClassVar[Severity] = "warning"
    address: str
    nbytes: int
    quarantined_bytes: int
    """In quarantine now, of reads from that address."""
    unlogged: int
    """Such reads since the last such event that were not logged."""
