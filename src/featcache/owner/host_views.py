"""The other hosts of an owner as observers are shown them: those read from, and those that read here."""

import time
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol

from featcache.control import observing
from featcache.control.messages import encode
from featcache.control.observers import Work
from featcache.observation import HomeView, ReadingHostView
from featcache.owner.homes import Home
from featcache.pool.pool import Pool

if TYPE_CHECKING:
    from featcache.owner.far_peers import FarPeer

_MOST_NAMES: Final = 8
_TEXT: Final = 200
_PIECE: Final = 8
_OVERHEAD_BYTES: Final = 128
_HOME, _READING = "h", "r"
"""What begins the place of a record in the list: its address, or its id, follows."""
_now: Final = time.monotonic


class Hosts(Protocol):
    """An owner's other hosts."""

    @property
    def lease_s(self) -> float:
        """For how long a host that reads here is kept after it was heard last."""

    def homes_known(self) -> list[Home]:
        """Return those that are read from."""

    def hosts_known(self) -> "list[FarPeer]":
        """Return those that read here."""


def count(hosts: Hosts | None) -> int:
    """Return how many records there are."""
    return 0 if hosts is None else len(hosts.homes_known()) + len(hosts.hosts_known())


def home_views(hosts: Hosts) -> list[HomeView]:
    """Return all that are read from. Safe in any thread."""
    return [_home(home) for home in hosts.homes_known()]


def reading_views(hosts: Hosts) -> list[ReadingHostView]:
    """Return all that read here. Safe in any thread."""
    return [_reading(peer, hosts.lease_s) for peer in hosts.hosts_known()]


def listed(pool: Pool, hosts: Hosts | None, request: observing.ListHosts, limit_bytes: int) -> Work:
    """Return the records that come after `request.after`, as many as fit a message."""
    pool.check_open()
    homes: list[HomeView] = []
    reading: list[ReadingHostView] = []
    records = _places(hosts)
    left_bytes, last = limit_bytes - _OVERHEAD_BYTES, request.after
    for place in sorted(place for place in records if place > request.after):
        record = records[place]
        if isinstance(record, Home):
            view: HomeView | ReadingHostView = _home(record)
        else:
            view = _reading(record, 0.0 if hosts is None else hosts.lease_s)
        left_bytes -= len(encode(view))
        many = len(homes) + len(reading)
        if many and (left_bytes < 0 or many == observing.MAX_HOSTS):
            return observing.HostList(request.request, tuple(homes), tuple(reading), last)
        if isinstance(view, HomeView):
            homes.append(view)
        else:
            reading.append(view)
        last = place
        if (many + 1) % _PIECE == 0:
            yield
    return observing.HostList(request.request, tuple(homes), tuple(reading), None)


def _places(hosts: Hosts | None) -> "dict[str, Home | FarPeer]":
    places: dict[str, Home | FarPeer] = {}
    if hosts is not None:
        places |= {_HOME + home.address: home for home in hosts.homes_known()}
        places |= {_READING + peer.host.hex(): peer for peer in hosts.hosts_known()}
    return places


def _home(home: Home) -> HomeView:
    link, traffic = home.last_link, home.traffic
    lost = link is not None and link.lost is not None
    reason = home.refused or (str(link.lost) if link is not None and lost else "")
    state = "connected" if home.linked is not None else "lost" if lost else "away"
    return HomeView(
        address=home.address,
        pool=home.host.hex(),
        state=state,
        reason="" if state == "connected" else reason[:_TEXT],
        fetched=traffic.fetched,
        fetched_bytes=traffic.fetched_bytes,
        failed=traffic.failed,
        dials_failed=home.dials_failed,
        in_progress=traffic.in_progress,
        quarantined=traffic.quarantined,
        quarantined_bytes=traffic.quarantined_bytes,
        unacknowledged=len(home.ledger),
        last_s=traffic.last_s,
        mean_s=traffic.mean_s,
        longest_s=traffic.longest_s,
        total_s=traffic.total_s,
        round_trip_s=None if link is None else link.round_trip_s,
        silent_s=None if link is None else link.silent_s,
    )


def _reading(peer: "FarPeer", lease_s: float) -> ReadingHostView:
    silent_s = _now() - peer.heard_s
    begun, names = list(peer.begun.values()), peer.names
    return ReadingHostView(
        host=peer.host.hex(),
        address=peer.address,
        state="lost" if peer.lost else "away" if peer.stream is None else "connected",
        named=len(names),
        names=tuple(name[:_TEXT] for name in islice(sorted(names), _MOST_NAMES)),
        reading=len(begun),
        reading_bytes=sum(each.ref.nbytes for each in begun),
        requests=len(peer.tasks),
        reads=peer.reads,
        told_bytes=peer.told_bytes,
        lease_s=0.0 if peer.lost else max(0.0, lease_s - silent_s),
        silent_s=silent_s,
        reads_paid=peer.reads_paid,
    )
