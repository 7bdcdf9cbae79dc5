"""One other host that this owner reads from: what is asked of it, and what is owed to it."""

import asyncio
import time
from typing import Final

from featcache.errors import KeyNotFound, MalformedRef, OwnerLost, PoolFull
from featcache.owner.far_traffic import Traffic
from featcache.owner.registered import RegisteredSlab
from featcache.reach import messages
from featcache.reach.ledger import Ledger
from featcache.reach.link import HomeLink
from featcache.reach.messages import Place, encode
from featcache.ref import FeatureRef
from featcache.session.offload import SharedTask

_now: Final = time.monotonic
_TELL_AGAIN_S: Final = 0.2
"""Seconds after which a payment that was not acknowledged is told again, over TCP."""
_UNKNOWN_EPOCH: Final = 0


class Pins:
    """The `landing.Giver` of a home's pins over one connection.

    That connection alone vouches for it: the home takes back all pins when there is another.
    """

    def __init__(self, home: "Home") -> None:
        self.address, self.traffic, self.plane = home.address, home.traffic, home.plane
        self._link = home.link

    @property
    def gone(self) -> "asyncio.Future[None]":
        """Done when the connection is lost."""
        return self._link.gone

    def check(self) -> None:
        """Raise OwnerLost if the connection is lost."""
        self._link.check()

    async def vouch(self) -> None:
        """Raise OwnerLost unless the home keeps what it has pinned for this host."""
        self._link.check()
        if not self._link.keeps_pins:
            self._link.lose("its answers came too late to be sure of what was read")
            self._link.check()


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
        self.tickets: set[int] = set()
        """Tickets of pins and claims that the home has granted, or is asked for."""
        self._offered: tuple[HomeLink, int] | None = None
        """The connection over which the home was told the data plane's metadata, and its epoch."""
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

    @property
    def pins(self) -> Pins:
        """What it has pinned over the connection that stands; OwnerLost if there is none."""
        return Pins(self)

    def connected(self, link: HomeLink) -> None:
        """Take a connection; what is owed is told again if it is the same owner still."""
        if link.host != self.host:
            self.host, self.epoch, self.plane = link.host, _UNKNOWN_EPOCH, ""
            self.ledger.clear()
            self.tickets.clear()
        self._link = link
        for payments in self.ledger.all():
            link.tell(messages.Pay(self.pool_id, payments))
        link.tell(messages.Holding(list(self.tickets)))

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
            await self._learn(link, answer)
        except BaseException:
            # It may have been pinned: found as this call was cancelled, or what was found is of no use.
            self.drop(place, session)
            raise
        return answer

    async def _learn(self, link: HomeLink, answer: messages.Found | messages.Sought) -> None:
        """Load what an answer tells of the home's data plane; OwnerLost if the connection is over by then."""
        if answer.metadata and self.slab is not None:
            plane = await self.slab.plane.add_peer(answer.metadata)
            link.check()  # in its stead there may be that of another owner by now
            self.plane, self.epoch = plane, answer.epoch
        link.check()  # from here to `pins` no task runs: they are of this connection

    # --- keys -----------------------------------------------------------------------------------------

    async def seek(
        self, key: bytes, ticket: int, slab: RegisteredSlab, *, claims: bool, waits: bool
    ) -> messages.Sought | messages.Claimed:
        """Have the feature under a key pinned, or be the one that makes it, until `give_back`."""
        link, self.slab = self.link, slab
        if len(self.tickets) >= messages.MAX_TICKETS:
            raise PoolFull(
                f"{messages.MAX_TICKETS} keys are sought, or made, for {self.address} already"
            )
        self.tickets.add(ticket)
        try:
            answer = await link.request(
                messages.Seek(link.number(), key, ticket, claims, waits, self.epoch)
            )
            if isinstance(answer, messages.Sought):
                if sum(answer.pieces) != answer.nbytes:
                    raise MalformedRef(f"{self.address} told of other bytes than the feature has")
                await self._learn(link, answer)
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
            messages.Offer(
                *(number, key, ticket, address, ref.nbytes, pieces, ref.specs, told, slab.memory)
            )
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

    def promise(self, key: bytes, ticket: int) -> bool:
        """Tell of a feature that is to be offered under a ticket; return whether it could be told."""
        if self.linked is None or (
            ticket not in self.tickets and len(self.tickets) >= messages.MAX_TICKETS
        ):
            return False
        self.tickets.add(ticket)
        self.linked.tell(messages.Promise(ticket, key))
        return True

    def give_back(self, ticket: int) -> None:
        """End the pin or claim of a ticket."""
        if ticket in self.tickets:
            self.tickets.discard(ticket)
            if self.linked is not None:  # else the next connection tells what is still held
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
