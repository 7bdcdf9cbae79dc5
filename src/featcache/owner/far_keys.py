"""A home's side of keys: what other hosts find here, what they are to make, and what they have made."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Final

from featcache.control.messages import ProtocolError
from featcache.core.slots import Slot
from featcache.errors import BackendUnavailable, OwnerLost, PoolFull
from featcache.owner.far_peer import FarPeer
from featcache.owner.flights import Flights
from featcache.owner.keys import Claim
from featcache.owner.landing import Landing, There, checked_specs
from featcache.owner.registered import RegisteredSlab
from featcache.owner.served_pool import ServedPool
from featcache.reach import messages
from featcache.session.arguments import not_found

_now: Final = time.monotonic
_TURNS: Final = 2
"""Turns of the loop in which it reads what has come to its sockets."""


class Maker:
    """The `landing.Giver` of an offer: it answers once more, when its bytes are read."""

    def __init__(self, peer: FarPeer, request: int, timeout_s: float) -> None:
        self.address = f"host {peer.host.hex()}"
        self.traffic = peer.traffic
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Never done: the task that reads is cancelled when the connection breaks."""
        self._peer = peer
        self._request = request
        self._timeout_s = timeout_s

    @property
    def plane(self) -> str:
        """The name of its data plane."""
        return self._peer.plane

    def check(self) -> None:
        """No-op: while the task is not cancelled, the connection stands."""

    async def vouch(self) -> None:
        """Ask the host whether what was read was pinned until now."""
        vouches, number = self._peer.vouches, self._request
        future = vouches[number] = asyncio.get_running_loop().create_future()
        try:
            self._peer.send(messages.Read(number))
            async with asyncio.timeout(self._timeout_s):
                await future
        except TimeoutError:
            raise OwnerLost(f"{self.address} does not vouch for what was read") from None
        finally:
            del vouches[number]


class Coming:
    """A key that other hosts are going to offer."""

    def __init__(self, over: "asyncio.Future[None]") -> None:
        self.over = over
        """Done once none is any more."""
        self.promises = 0
        self.is_late = False
        """Whether a lookup has waited for it in vain: the next ones need not."""


class FarKeys:
    """The directory of this owner, for other hosts.

    A ticket of another host's::

        (none) ──`Seek`──→ WAITS ──a feature──→ PINNED: granted until it is fetched
                             │ └──its turn────→ CLAIMED: it makes the feature
                             └──cancelled, or not there──→ (none)
        PINNED, CLAIMED ──`GiveBack`, or the host's end──→ (none); a claim passes to the next that waits
        CLAIMED ──`Offer`, and its bytes are here──→ (none)
        CLAIMED ──no connection for `peer_timeout`──→ (none)
    """

    name: Final = "what other hosts offer"

    def __init__(self, served: ServedPool, slab: RegisteredSlab, landing: Landing) -> None:
        self._served = served
        self._pool = served.pool
        self._slab = slab
        self._landing = landing
        self._taking: Flights[bytes, None] = Flights()
        self._coming: dict[bytes, Coming] = {}
        self.passed = 0
        """Claims of hosts that vanished, passed on."""

    async def answer(
        self, peer: FarPeer, request: messages.Seek | messages.Ask | messages.Offer
    ) -> None:
        """Do what is asked, and send the answer; raise FeatcacheError to refuse."""
        if isinstance(request, messages.Seek):
            peer.send(await self._seek(peer, request))
        elif isinstance(request, messages.Ask):
            flags = await self._served.sources.contains_near(request.keys)
            peer.send(messages.Told(request.request, flags))
        else:
            await self._take(peer, request)

    # --- what is here ---------------------------------------------------------------------------------

    async def _seek(
        self, peer: FarPeer, request: messages.Seek
    ) -> messages.Sought | messages.Claimed:
        while True:
            self._check_may_have(peer, request.ticket)
            found, kept = await self._look_up(request), False
            try:
                if isinstance(found, Claim):
                    answer: messages.Sought | messages.Claimed = messages.Claimed(request.request)
                elif await self._served.lookups.landed(found):
                    answer = await self._sought(request, found)
                else:
                    continue  # its writer died before its bytes came, and the key went with it
                self._check_may_have(peer, request.ticket)  # others were answered meanwhile
                peer.given[request.ticket], kept = found, True
                return answer
            finally:
                if not kept:
                    self._end(found)

    def _check_may_have(self, peer: FarPeer, ticket: int) -> None:
        """Refuse to give a host more than it may have, or two things under one ticket."""
        if ticket in peer.given:
            raise ProtocolError(f"ticket {ticket} is in use")
        if len(peer.given) >= self._pool.settings.grants:
            raise PoolFull(f"host {peer.host.hex()} was given {len(peer.given)} keys already")

    async def _look_up(self, request: messages.Seek) -> Slot | Claim:
        """Return a slot with a grant on it, or the claim to make it; KeyNotFound if it is to be neither."""
        served, key, store = self._served, request.key, self._pool.store
        lookups, sources = served.lookups, served.sources
        if key in store.directory and (slot := store.lookup(key, _now())) is not None:
            return slot
        if await self.bring(key) and (slot := store.lookup(key, _now())) is not None:
            return slot
        # Of two hosts that ask each other neither may wait for the other.
        if request.claims and (
            sources.is_seeking(key) or (not request.waits and lookups.is_claimed(key))
        ):
            raise not_found(key)
        await served.relaying.prepare()
        page = served.relaying.page()
        if request.claims or request.waits:
            found = await sources.wait_near(key, page, can_make=request.claims)
        else:
            found = await sources.find_near(key, page)
        return found if isinstance(found, Claim) else page.revoke(found.grant).slot

    async def _sought(self, request: messages.Seek, slot: Slot) -> messages.Sought:
        slab, ref = self._slab, self._pool.kept[slot.index]
        await slab.settled()
        epoch, metadata = await slab.metadata()
        pieces = slab.pieces(ref.offset_bytes, ref.nbytes)
        told = b"" if request.epoch == epoch else metadata
        address = slab.address_of(ref.offset_bytes)
        where = address, pieces, epoch, told, slab.memory
        return messages.Sought(request.request, ref.nbytes, ref.specs, *where)

    # --- as a source of this pool: what is on its way ------------------------------------------------

    async def bring(self, key: bytes) -> bool:
        """Return once a feature is here that another host offers, or is going to; False if none does."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)  # what other hosts have told by now is heard first
        coming = self._coming.get(key)
        if coming is not None and not coming.is_late:
            await asyncio.wait([coming.over], timeout=self._pool.settings.peer_timeout)
            coming.is_late = not coming.over.done()
        await self._taking.ended(key)
        return key in self._pool.store.directory

    async def holds(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """Return which keys are on their way."""
        coming = self._coming
        return [key in self._taking or (key in coming and not coming[key].is_late) for key in keys]

    # --- what others made -----------------------------------------------------------------------------

    async def _take(self, peer: FarPeer, offer: messages.Offer) -> None:
        """Fetch a feature that another host has made or put, unless there is one: a key has one content."""
        key = offer.key
        try:
            if offer.metadata:
                peer.plane = await self._slab.plane.add_peer(offer.metadata)
            while key in self._taking:
                await self._taking.ended(key)
            if key not in self._pool.store.directory:
                await self._taking.join(key, lambda: self._land(peer, offer))
            else:
                peer.send(messages.Done(offer.request))
        except asyncio.CancelledError:
            raise  # the connection broke, and may be made again, or `GiveBack` comes: until then it stands
        except BaseException:
            self._end_offer(
                peer, offer
            )  # the host may know of no failure: it has vouched, too late
            raise
        self._end_offer(peer, offer)

    def _end_offer(self, peer: FarPeer, offer: messages.Offer) -> None:
        """End the claim or promise under an offer's ticket."""
        claim = peer.given.get(offer.ticket)
        is_claim = isinstance(claim, Claim) and claim.key == offer.key
        if is_claim or offer.ticket in peer.promised:
            self.give_back(peer, offer.ticket)

    async def _land(self, peer: FarPeer, offer: messages.Offer) -> None:
        there = There(
            *(offer.nbytes, offer.address, offer.pieces, checked_specs(offer), offer.memory)
        )
        timeout_s = self._pool.settings.peer_timeout
        maker = Maker(peer, offer.request, timeout_s)
        try:
            await self._landing.land(maker, there, offer.key, room_s=timeout_s)
        except OwnerLost as error:  # the offering host is not to think that this one is lost
            raise BackendUnavailable(str(error)) from None

    def promised(self, peer: FarPeer, note: messages.Promise) -> None:
        """Take the news that a host is going to offer a feature: lookups of it wait for that."""
        key, ticket = note.key, note.ticket
        most = self._pool.settings.grants
        if ticket in peer.promised or len(peer.promised) >= most or self._pool.closed:
            return
        peer.promised[ticket] = key
        coming = self._coming.get(key)
        if coming is None:
            coming = self._coming[key] = Coming(self._pool.loop.create_future())
        coming.promises += 1

    def _unpromise(self, key: bytes) -> None:
        coming = self._coming[key]
        coming.promises -= 1
        if not coming.promises:
            del self._coming[key]
            if not coming.over.done():
                coming.over.set_result(None)

    def vouched(self, peer: FarPeer, request: int) -> None:
        """Take the word of a host for what was read from it."""
        future = peer.vouches.get(request)
        if future is not None and not future.done():
            future.set_result(None)

    # --- the end --------------------------------------------------------------------------------------

    def give_back(self, peer: FarPeer, ticket: int) -> None:
        """End the pin, claim or promise of a host's ticket."""
        promised, given = peer.promised.pop(ticket, None), peer.given.pop(ticket, None)
        if promised is not None:
            self._unpromise(promised)
        if given is not None:
            self._end(given)

    def keep_only(self, peer: FarPeer, tickets: Iterable[int]) -> None:
        """Take back all that a host was given, but for some."""
        for ticket in {*peer.given, *peer.promised} - {*tickets}:
            self.give_back(peer, ticket)

    def _end(self, given: Slot | Claim) -> None:
        pool = self._pool
        if isinstance(given, Claim):
            self._served.lookups.release_claim(given)
        elif not pool.closed:
            pool.apply(pool.store.pay_grant(given, _now()))
            if pool.store.queue:
                pool.collect()  # a put that waits may evict it now

    def pass_claims(self, peer: FarPeer) -> None:
        """Pass the claims of a lost host to the next waiters."""
        for ticket, given in list(peer.given.items()):
            if isinstance(given, Claim):
                self.passed += 1
                self.give_back(peer, ticket)

    def end(self, peer: FarPeer, *, died: bool) -> None:
        """Take back all that a host was given."""
        if died:
            self.pass_claims(peer)
        self.keep_only(peer, ())
