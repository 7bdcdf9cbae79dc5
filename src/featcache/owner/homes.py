"""The other hosts that this owner reads from: one connection to each, its data plane, what is owed to it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from featcache import events
from featcache.errors import CacheClosed, FeatcacheError, MalformedRef, OwnerLost, PoolFull
from featcache.owner.far_traffic import Traffic
from featcache.owner.registered import RegisteredSlab
from featcache.pool.pool import Pool
from featcache.reach import messages
from featcache.reach.ledger import Ledger
from featcache.reach.link import HomeLink
from featcache.reach.messages import Place, encode
from featcache.reach.secret import TlsContexts
from featcache.ref import FeatureRef
from featcache.session.offload import SharedTask

_now: Final = time.monotonic
_TELL_AGAIN_S: Final = 0.2
"""Seconds after which a payment that was not acknowledged is told again, over TCP."""
_UNKNOWN_EPOCH: Final = 0


class Home:
    """The owner at one address, over as many connections as it takes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.ledger = Ledger()
        self.plane = ""
        """The name of its data plane."""
        self.slab: RegisteredSlab | None = None
        self.epoch = _UNKNOWN_EPOCH
        self.host = b""
        """The id of its pool when it was connected last."""
        self.opening: SharedTask[HomeLink] | None = None
        self._link: HomeLink | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.pool_id = b""
        """The id of this host's own pool."""
        self.traffic = Traffic()
        self.dials_failed = 0
        self.refused = ""
        """Why it could not be dialed when it was last tried."""

    @property
    def link(self) -> HomeLink:
        """The connection; raise OwnerLost if there is none."""
        if self._link is None:
            raise OwnerLost(f"the owner at {self.address} is lost")
        return self._link

    @property
    def last_link(self) -> HomeLink | None:
        """The connection that stands, or the last one that did."""
        return self._link

    @property
    def linked(self) -> HomeLink | None:
        """The connection that stands, if one does."""
        return self._link if self._link is not None and self._link.lost is None else None

    def connected(self, link: HomeLink) -> None:
        """Take a connection; what is owed is told again if it is the same owner still."""
        if link.host != self.host:
            self.host, self.epoch, self.plane = link.host, _UNKNOWN_EPOCH, ""
            self.ledger.clear()
        self._link = link
        for payments in self.ledger.all():
            link.tell(messages.Pay(self.pool_id, payments))

    # --- requests -------------------------------------------------------------------------------------

    async def look(
        self, ref: FeatureRef, session: int, name: str | None, slab: RegisteredSlab
    ) -> messages.Found:
        """Have a ref pinned for a session, until `pay` or `drop`; return where its bytes are."""
        link, place = self.link, Place(ref.pool_id, ref.slot, ref.generation)
        self.slab = slab
        try:
            answer = await link.request(
                messages.Look(
                    *(link.number(), place, ref.offset_bytes, ref.nbytes, session, name, self.epoch)
                )
            )
            if not isinstance(answer, messages.Found) or sum(answer.pieces) != ref.nbytes:
                raise MalformedRef(f"{self.address} answered something else than was asked")
            if answer.metadata:
                plane = await slab.plane.add_peer(answer.metadata)
                link.check()  # in its stead there may be the link of another owner by now
                self.plane, self.epoch = plane, answer.epoch
        except BaseException:
            # It may have been pinned: found as this call was cancelled, or what was found is of no use.
            self.drop(place, session)
            raise
        return answer

    async def release(self, ref: FeatureRef, session: int, name: str | None) -> None:
        """Have a session's read paid that was not begun."""
        place = Place(ref.pool_id, ref.slot, ref.generation)
        where = place, ref.offset_bytes, ref.nbytes, session, name
        await self.link.request(messages.Release(self.link.number(), *where))

    async def discard(self, ref: FeatureRef) -> None:
        """Have the reads cancelled that a ref owes."""
        place = Place(ref.pool_id, ref.slot, ref.generation)
        where = place, ref.offset_bytes, ref.nbytes
        await self.link.request(messages.Discard(self.link.number(), *where))

    def drop(self, place: Place, session: int) -> None:
        """Have a session's pin taken back; its read is still owed.

        Told in vain if the connection is lost: the home takes back all pins when there is another.
        """
        if self.linked is not None:
            self.linked.tell(messages.Drop(place, session))

    def pay(self, place: Place, session: int, name: str | None) -> None:
        """Pay a read: told by a notification, and over TCP until the home has it."""
        if place.pool != self.host:
            return
        payment = self.ledger.add(place, session, name, _now())
        if self.slab is not None and self.plane:
            told = encode(messages.Pay(self.pool_id, [payment]))
            self.slab.plane.notify(self.plane, told)
        elif self.linked is not None:
            self.linked.tell(messages.Pay(self.pool_id, [payment]))
        if self._timer is None:
            self._tell_again()

    def _tell_again(self) -> None:
        self._timer = None
        link = self.linked
        if not self.ledger or link is None:
            return
        due = self.ledger.due(_now(), _TELL_AGAIN_S)
        if due:
            link.tell(messages.Pay(self.pool_id, due))
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_TELL_AGAIN_S, self._tell_again)

    def close(self) -> None:
        """Tell what is owed, and say goodbye."""
        if self._timer is not None:
            self._timer.cancel()
        link = self.linked
        if link is not None:
            for payments in self.ledger.all():
                link.tell(messages.Pay(self.pool_id, payments))
            link.on_lost = lambda: None
            link.close()


class Homes:
    """The homes by their addresses, each dialed with single flight."""

    def __init__(
        self, pool: Pool, key: bytes, tls: TlsContexts, names: Callable[[], Sequence[str]]
    ) -> None:
        self._pool = pool
        self._key = key
        self._tls = tls
        self._names = names
        self._homes: dict[str, Home] = {}
        self._closed = False
        self._refusals = events.Throttle(pool.settings.log_interval, burst=16)
        self.own_address: str | None = None
        """Where this owner itself listens."""
        self.on_gone: Callable[[Place], object] = lambda _: None
        """Told of a ref that owes nothing any more at its home."""
        self.on_lost: Callable[[str], object] = lambda _: None
        """Told the address of a home that is lost."""

    @property
    def known(self) -> list[Home]:
        """The homes of which there is a record."""
        return list(self._homes.values())

    @property
    def connected(self) -> int:
        """Homes with a connection that stands."""
        return sum(home.linked is not None for home in self._homes.values())

    async def home(self, ref: FeatureRef) -> Home:
        """Return the home of a ref, connected.

        Raises:
            OwnerLost: nobody answers there, or the owner was restarted.
            AttachRefused: it refused.
            PoolFull: `Settings.peers` others are connected and in use.

        """
        if ref.address == self.own_address:
            raise OwnerLost(f"the owner whose ref this is was at {ref.address} before this one")
        home = self._homes.get(ref.address)
        if home is None:
            self._make_place()
            home = self._homes[ref.address] = Home(ref.address)
            home.pool_id = self._pool.pool_id
        if home.linked is None:
            at = home
            if home.opening is None:
                home.opening = SharedTask(lambda: self._dial(at))
            try:
                await home.opening.join()
            except asyncio.CancelledError:
                caller = asyncio.current_task()
                if self._closed and not (caller and caller.cancelling()):
                    raise CacheClosed("the cache was closed") from None
                raise
        if home.host != ref.pool_id:
            raise OwnerLost(
                f"another owner is at {ref.address} now: the one whose ref this is has ended"
            )
        return home

    def _make_place(self) -> None:
        if len(self._homes) < self._pool.settings.peers:
            return
        for address, home in list(self._homes.items()):
            if not home.ledger and (home.linked is None or home.linked.is_idle):
                home.close()
                del self._homes[address]
                self.on_lost(address)
                return
        raise PoolFull(f"{len(self._homes)} other hosts are being read from: raise Settings.peers")

    async def _dial(self, home: Home) -> HomeLink:
        settings, own = self._pool.settings, self._pool.pool_id
        try:
            link = await HomeLink.dial(
                home.address, self._key, own, settings, self._tls, self._names
            )
        except FeatcacheError as error:
            home.refused = str(error)
            home.dials_failed += 1
            self._tell_refused(home)
            raise
        home.refused = ""
        if self._closed:
            link.close()
            raise CacheClosed("the cache was closed")
        link.on_told = lambda told: self._told(home, told)
        link.on_lost = lambda: self._lost(home, link)
        home.connected(link)
        events.emit(
            events.HomeAttached(pool=self._pool.name, host=link.host.hex(), address=home.address)
        )
        return link

    def _tell_refused(self, home: Home) -> None:
        about = {"pool": self._pool.name, "address": home.address, "reason": home.refused[:500]}
        self._refusals.emit(
            _now(), lambda unlogged: events.HomeUnreachable(**about, unlogged=unlogged)
        )

    def _told(self, home: Home, told: messages.Paid | messages.Alive) -> None:
        if isinstance(told, messages.Paid):
            home.ledger.settle(told.numbers)
        for place in told.gone:
            self.on_gone(place)

    def _lost(self, home: Home, link: HomeLink) -> None:
        events.emit(
            events.OwnerGone(pool=link.host.hex(), endpoint=home.address, reason=str(link.lost))
        )
        self.on_lost(home.address)

    def name_lost(self, name: str) -> None:
        """Tell all homes that the session of this name died."""
        for home in self._homes.values():
            if home.linked is not None:
                home.linked.tell(messages.NameLost(name))

    def close(self) -> None:
        """Pay what is owed, and say goodbye to all."""
        self._closed = True
        for home in self._homes.values():
            if home.opening is not None and home.opening.task is not None:
                home.opening.task.cancel()
            home.close()

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self._closed = True
        for home in self._homes.values():
            if home.linked is not None:
                home.linked.forget()
