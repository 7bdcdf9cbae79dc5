"""What observers are shown of a pool, gathered in pieces.

Between two pieces others put, read and evict: an answer is of about one moment, and each slot and session
in it is as it was when it was looked at. Slots are gone over by their index, since the table, unlike the
dicts and lists of those in use, does not change under an iteration.
"""

import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final

from featcache.control import messages, observing
from featcache.control.observers import Work
from featcache.core.put_queue import Waiter
from featcache.core.slots import Slot
from featcache.observation import PoolView, UnpaidRef, WaitingPut
from featcache.owner import host_views, key_listing, session_views, slab_map
from featcache.owner.keys import Lookups
from featcache.owner.sessions import OWN_SESSION
from featcache.pool import gauges
from featcache.pool.attendance import label_of
from featcache.pool.pool import Pool
from featcache.pool.refresh import refresh
from featcache.statistics import Statistics
from featcache.version import VERSION

if TYPE_CHECKING:
    from featcache.control.server import Server

_MOST: Final = 16
_MOST_NAMES: Final = 8
_MOST_SCANNED: Final = 64
_MOST_PAGES: Final = 256
_TEXT: Final = 200
"""Characters of one sentence or name: the whole must fit a message."""
_now: Final = time.monotonic


class Observations:
    """The server's `control.observers.ObserverHost`, of one pool."""

    def __init__(self, pool: Pool, lookups: Lookups, name: str | None, pidfd: int) -> None:
        self._pool = pool
        self._lookups = lookups
        self._name = name
        self._pidfd = pidfd
        self._since_s = _now()
        self.server: Server | None = None
        """Set once it is made; it shows who is attached."""
        self.statistics: Callable[[], Statistics] | None = None
        """The owner's own figures; without it, those of this pool alone."""
        self.hosts: host_views.Hosts | None = None
        """What there is beyond this host, if anything."""

    def close(self) -> None:
        """Show nothing more."""
        self.server = self.statistics = self.hosts = None

    def welcome(self) -> tuple[observing.ObserverWelcome, list[int]]:
        """Return what an observer is told first, and the owner's pidfd."""
        pool = self._pool
        welcome = observing.ObserverWelcome(
            messages.VERSION, pool.pool_id, pool.endpoint, pool.settings.message_bytes
        )
        return welcome, [self._pidfd]

    def answer(self, request: observing.Request, limit_bytes: int) -> Work:
        """Begin to answer a request."""
        pool = self._pool
        if isinstance(request, observing.Observe):
            return self._observe(request)
        if isinstance(request, observing.ListSessions):
            return session_views.listed(pool, self._states(), request, limit_bytes)
        if isinstance(request, observing.ListHosts):
            return host_views.listed(pool, self.hosts, request, limit_bytes)
        if isinstance(request, observing.ListKeys):
            return key_listing.listed(pool, request, limit_bytes)
        if isinstance(request, observing.MapSlab):
            return slab_map.drawn(pool, request, limit_bytes)
        return self._evict(request)

    def _states(self) -> dict[int, str]:
        peers = {} if self.server is None else self.server.sessions
        return {number: peer.state.value for number, peer in peers.items()}

    def _evict(self, request: observing.Evict) -> Work:
        yield
        self._pool.check_open()
        flag = self._lookups.command("evict", request.key, OWN_SESSION)
        return messages.Reply(request.request, flag=flag)

    # --- the pool ---------------------------------------------------------------------------------

    def _observe(self, request: observing.Observe) -> Work:
        pool, store = self._pool, self._pool.store
        pool.check_open()
        statistics = self._own() if self.statistics is None else self.statistics()
        yield
        pool.check_open()
        holders = pool.debtors.holders()
        yield
        pool.check_open()
        now_s = _now()
        unpaid = tuple(self._unpaid(now_s))
        view = PoolView(
            pool=pool.name,
            endpoint=pool.endpoint,
            name=self._name,
            kind=pool.slab.kind,
            device=pool.slab.device_name,
            version=VERSION,
            protocol=messages.VERSION,
            pid=os.getpid(),
            uptime_s=now_s - self._since_s,
            level=pool.pressure.level.value,
            holders=tuple(sentence[:_TEXT] for sentence in holders.sentences[:_MOST]),
            remedy=holders.remedy[: 2 * _TEXT] if holders.sentences else "",
            statistics=statistics,
            observers=0 if self.server is None else len(self.server.observers.peers),
            unpaid_refs=len(store.owing),
            unpaid=unpaid,
            waiting=tuple(self._waiting(waiter, now_s) for waiter in store.queue.first(_MOST)),
            peers=host_views.count(self.hosts),
        )
        return observing.Observed(request.request, view)

    def _own(self) -> Statistics:
        pool, store = self._pool, self._pool.store
        refresh(pool)
        hits, misses, reads_paid = pool.uses.lookups(store)
        return Statistics(
            **gauges.of_store(store),
            sessions=0 if self.server is None else len(self.server.sessions),
            puts=store.puts,
            reads_paid=reads_paid,
            recycled=store.recycled,
            waited=store.waited,
            expired=store.expired,
            hits=hits,
            misses=misses,
        )

    def _unpaid(self, now_s: float) -> Iterator[UnpaidRef]:
        attendance = self._pool.attendance
        attached = attendance.attached()
        for slot in islice(self._pool.store.owing.values(), _MOST):
            names = sorted(islice(slot.owed_by_names or (), _MOST_SCANNED))
            yield UnpaidRef(
                ref=slot.label,
                nbytes=slot.nbytes,
                age_s=now_s - slot.born_s,
                ttl_s=slot.ttl_s,
                reads_left=slot.reads_left,
                owed_by=tuple(attendance.label(name, attached) for name in names[:_MOST_NAMES]),
                read_by=tuple(islice(self._readers(slot), _MOST_NAMES)),
            )

    def _readers(self, slot: Slot) -> Iterator[str]:
        for page in islice(self._pool.pages.values(), _MOST_PAGES):
            if page.holds(slot.index, slot.generation):
                yield label_of(page)

    def _waiting(self, waiter: Waiter, now_s: float) -> WaitingPut:
        session = waiter.request.session
        page = self._pool.pages.get(session)
        name = self._name if session == OWN_SESSION else None
        return WaitingPut(
            nbytes=waiter.request.nbytes,
            age_s=max(0.0, now_s - waiter.since_s) if waiter.since_s else 0.0,
            session=session,
            name=name if page is None else page.name,
        )
