"""The other hosts that this owner reads from: one connection to each, its data plane, what is owed to it."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from featcache import events
from featcache.errors import (
    CacheClosed,
    FeatcacheError,
    KeyNotFound,
    MalformedRef,
    OwnerLost,
    PoolFull,
)
from featcache.owner.registered import RegisteredSlab
from featcache.pool.pool import Pool
from featcache.reach import messages
from featcache.reach.ledger import Ledger
from featcache.reach.link import HomeLink
from featcache.reach.messages import Place, encode
from featcache.reach.secret import TlsContexts
from featcache.ref import FeatureRef
from featcache.session.offload import SharedTask

T = TypeVar("T")
_now: Final = time.monotonic
_TELL_AGAIN_S: Final = 0.2
"""Seconds after which a payment that was not acknowledged is told again, over TCP."""
_UNKNOWN_EPOCH: Final = 0
_MAX_TICKETS: Final = 2048


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
        self._reads: set[tuple[Place, int]] = set()
        """What the home was asked to pin, by place and session, and is not told to unpin yet."""
        self.tickets: set[int] = set()
        """What the home has given by key, or is asked for."""
        self._offered: tuple[HomeLink, int] | None = None
        """The connection over which the home was told the data plane's metadata, and its epoch."""
        self.pool_id = b""
        """The id of this host's own pool."""

    @property
    def link(self) -> HomeLink:
        """The connection; raise OwnerLost if there is none."""
        if self._link is None:
            raise OwnerLost(f"the owner at {self.address} is lost")
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
            self._reads.clear()
            self.tickets.clear()
        self._link = link
        # In this order: what is paid is not dropped.
        for payments in self.ledger.all():
            link.tell(messages.Pay(self.pool_id, payments))
        held = messages.MAX_HELD
        link.tell(messages.Holding(list(self._reads)[:held], list(self.tickets)[:held]))

    # --- requests -------------------------------------------------------------------------------------

    async def look(
        self, ref: FeatureRef, session: int, name: str | None, slab: RegisteredSlab
    ) -> messages.Found:
        """Have a ref pinned for a session, until `pay` or `drop`; return where its bytes are."""
        link, place = self.link, Place(ref.pool_id, ref.slot, ref.generation)
        self.slab = slab
        self._reads.add((place, session))
        try:
            answer = await link.request(
                messages.Look(
                    *(link.number(), place, ref.offset_bytes, ref.nbytes, session, name, self.epoch)
                )
            )
            if not isinstance(answer, messages.Found) or sum(answer.pieces) != ref.nbytes:
                raise MalformedRef(f"{self.address} answered something else than was asked")
            await self._learn(answer)
        except BaseException:
            # It may have been pinned: found as this call was cancelled, or what was found is of no use.
            self.drop(place, session)
            raise
        return answer

    async def _learn(self, answer: messages.Found | messages.Sought) -> None:
        """Load what an answer tells of the home's data plane."""
        if answer.metadata and self.slab is not None:
            self.plane = await self.slab.plane.add_peer(answer.metadata)
            self.epoch = answer.epoch

    # --- keys -----------------------------------------------------------------------------------------

    async def seek(
        self, key: bytes, ticket: int, slab: RegisteredSlab, *, claims: bool, waits: bool
    ) -> messages.Sought | messages.Claimed:
        """Have the feature under a key pinned, or be the one that makes it, until `give_back`."""
        link, self.slab = self.link, slab
        if len(self.tickets) >= _MAX_TICKETS:
            raise PoolFull(f"{_MAX_TICKETS} keys are sought, or made, for {self.address} already")
        self.tickets.add(ticket)
        try:
            answer = await link.request(
                messages.Seek(link.number(), key, ticket, claims, waits, self.epoch)
            )
            if isinstance(answer, messages.Sought):
                if sum(answer.pieces) != answer.nbytes:
                    raise MalformedRef(f"{self.address} told of other bytes than the feature has")
                await self._learn(answer)
            elif not isinstance(answer, messages.Claimed):
                raise MalformedRef(f"{self.address} answered something else than was asked")
        except KeyNotFound:
            self.tickets.discard(ticket)
            raise
        except BaseException:
            # It may have been given: as this call was cancelled, or the connection broke.
            self.give_back(ticket)
            raise
        return answer

    async def ask(self, keys: list[bytes]) -> list[bool]:
        """Return which of some keys the home has."""
        answer = await self.link.request(messages.Ask(self.link.number(), keys))
        if not isinstance(answer, messages.Told) or len(answer.flags) != len(keys):
            raise MalformedRef(f"{self.address} answered something else than was asked")
        return answer.flags

    async def offer(self, key: bytes, ticket: int, slab: RegisteredSlab, ref: FeatureRef) -> bool:
        """Have the home fetch a feature that is pinned until this returns; whether it did not have it."""
        link, pieces = self.link, slab.pieces(ref.offset_bytes, ref.nbytes)
        epoch, metadata = await slab.metadata()
        told = b"" if self._offered == (link, epoch) else metadata
        number, address = link.number(), slab.address_of(ref.offset_bytes)
        answer = await link.request(
            messages.Offer(number, key, ticket, address, ref.nbytes, pieces, ref.specs, told)
        )
        self._offered = link, epoch
        self.tickets.discard(ticket)
        if isinstance(answer, messages.Read):
            # Now, while it is pinned.
            link.tell(messages.Vouch(number))
            return True
        if not isinstance(answer, messages.Done):
            raise MalformedRef(f"{self.address} answered something else than was asked")
        return False

    def give_back(self, ticket: int) -> None:
        """Give back what the home gave under a ticket."""
        if ticket in self.tickets:
            self.tickets.discard(ticket)
            if self.linked is not None:  # as above
                self.linked.tell(messages.GiveBack(ticket))

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
        """Have a session's pin taken back; its read is still owed."""
        self._reads.discard((place, session))
        if self.linked is not None:  # else it is told what is still held
            self.linked.tell(messages.Drop(place, session))

    def pay(self, place: Place, session: int, name: str | None) -> None:
        """Pay a read: told by a notification, and over TCP until the home has it."""
        self._reads.discard((place, session))
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

    @property
    def gone(self) -> "asyncio.Future[None]":
        """Done when the connection is lost."""
        return self.link.gone

    def check(self) -> None:
        """Raise OwnerLost if the connection is lost."""
        self.link.check()

    async def vouch(self) -> None:
        """Raise OwnerLost unless the home keeps what it has pinned for this host."""
        link = self.link
        link.check()
        if not link.keeps_pins:
            link.lose("its answers came too late to be sure of what was read")
            link.check()

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
        self._coming_back: set[asyncio.Task[None]] = set()
        self.own_address: str | None = None
        """Where this owner itself listens."""
        self.on_gone: Callable[[Place], object] = lambda _: None
        """Told of a ref that owes nothing any more at its home."""
        self.on_lost: Callable[[str], object] = lambda _: None
        """Told the address of a home that is lost."""

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
        home = await self.at(ref.address)
        if home.host != ref.pool_id:
            raise OwnerLost(
                f"another owner is at {ref.address} now: the one whose ref this is has ended"
            )
        return home

    async def at(self, address: str) -> Home:
        """Return the home at an address, connected; raise as `home`."""
        home = self._homes.get(address)
        if home is None:
            self._make_place()
            home = self._homes[address] = Home(address)
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
        return home

    def _make_place(self) -> None:
        if len(self._homes) < self._pool.settings.peers:
            return
        for address, home in list(self._homes.items()):
            if (
                not home.ledger
                and not home.tickets
                and (home.linked is None or home.linked.is_idle)
            ):
                home.close()
                del self._homes[address]
                self.on_lost(address)
                return
        raise PoolFull(f"{len(self._homes)} other hosts are being read from: raise Settings.peers")

    async def _dial(self, home: Home) -> HomeLink:
        settings, own = self._pool.settings, self._pool.pool_id
        link = await HomeLink.dial(home.address, self._key, own, settings, self._tls, self._names)
        if self._closed:
            link.close()
            raise CacheClosed("the cache was closed")
        link.on_told = lambda told: self._told(home, told)
        link.on_lost = lambda: self._lost(home, link)
        home.connected(link)
        return link

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
        if home.tickets and link.is_broken and not self._closed:
            # What this host is to make is kept for it, for a while: it may be the network alone.
            task = asyncio.get_running_loop().create_task(self._come_back(home.address))
            self._coming_back.add(task)
            task.add_done_callback(self._coming_back.discard)

    async def _come_back(self, address: str) -> None:
        with contextlib.suppress(FeatcacheError):
            await self.at(address)

    def name_lost(self, name: str) -> None:
        """Tell all homes that the session of this name died."""
        for home in self._homes.values():
            if home.linked is not None:
                home.linked.tell(messages.NameLost(name))

    def close(self) -> None:
        """Pay what is owed, and say goodbye to all."""
        self._closed = True
        for task in self._coming_back:
            task.cancel()
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
