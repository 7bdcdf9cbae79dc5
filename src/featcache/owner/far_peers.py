"""A home's side of other hosts: what they may read is pinned for them, and they pay."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final

from featcache import events
from featcache.control.messages import ProtocolError
from featcache.core.slots import SlotState
from featcache.errors import CacheClosed, FeatcacheError, OwnerLost, PoolFull, StaleRef, UnknownPool
from featcache.owner.far_keys import FarKeys
from featcache.owner.far_peer import Begun, FarPeer
from featcache.owner.registered import RegisteredSlab
from featcache.owner.served_pool import ServedPool
from featcache.reach import messages
from featcache.reach.messages import Payment, Place, decode_from_reader
from featcache.reach.stream import Stream
from featcache.ref import FeatureRef, TensorSpec
from featcache.session.waiting import wait_ready

_now: Final = time.monotonic
_STILL_PART: Final = 1 / 4
"""Of a lease: so late a look shows that the owner itself was stopped, or had no core."""
_MAX_TASKS: Final = 4096
"""Requests of one host that may be unanswered."""
_MAX_SHOWN: Final = 16
"""Hosts that were lost of which a record is kept."""
_PAID: Final = (
    "was paid by this session already, and each session reads a ref once: keep what was read, or keep "
    "the feature under a key"
)


class FarPeers:
    """The hosts that read this owner's pool."""

    def __init__(self, served: ServedPool, slab: RegisteredSlab, keys: FarKeys) -> None:
        self._served = served
        self._keys = keys
        self._pool = served.pool
        self._slab = slab
        self._settings = served.pool.settings
        self._peers: dict[bytes, FarPeer] = {}
        self.forget_host: Callable[[Stream], object] = lambda _: None
        self.lost = self.told = self.told_bytes = 0
        self._gone_hosts: OrderedDict[bytes, FarPeer] = OrderedDict()
        """The last that were lost, to be shown."""
        slab.plane.on_notification = self.notified

    @property
    def hosts(self) -> int:
        """Hosts that are connected, or whose lease has not ended."""
        return len(self._peers)

    @property
    def known(self) -> list[FarPeer]:
        """The hosts of which there is a record: with the last that were lost."""
        return [*self._peers.values(), *self._gone_hosts.values()]

    def on_host(self, stream: Stream) -> None:
        """Take a host that has proved the key."""
        peer = self._peers.get(stream.peer)
        if peer is None:
            peer = self._peers[stream.peer] = FarPeer(stream.peer)
            self._gone_hosts.pop(stream.peer, None)
            self._watch(peer)
        elif peer.stream is not None:
            before, peer.stream = peer.stream, None
            self._cancel(peer)
            before.close()
        # What it had begun over the connection before: it has given that up, and may have said so in vain.
        for place, reader in list(peer.begun):
            self._drop(peer, place, reader)
        peer.stream, peer.heard_s, peer.address = stream, _now(), stream.where
        closed, forget, loop = stream.on_closed, self.forget_host, asyncio.get_running_loop()
        stream.on_message = partial(self._on_message, peer, stream)

        def gone(error: FeatcacheError | None) -> None:
            closed(error)
            forget(stream)
            if peer.stream is stream:
                peer.stream = None
                self._cancel(peer)
                if peer.given:
                    # Its pins stand for its lease; but others wait for what it was to make.
                    loop.call_later(self._settings.peer_timeout, away)

        def away() -> None:
            if peer.stream is None:
                self._keys.pass_claims(peer)

        stream.on_closed = gone
        self._emit(events.HostAttached, peer, address=stream.where)

    # --- what comes -----------------------------------------------------------------------------------

    def _on_message(self, peer: FarPeer, stream: Stream, payload: bytes) -> None:
        message = decode_from_reader(payload)
        if peer.stream is not stream:
            return
        peer.heard_s = _now()
        if isinstance(message, messages.Request):
            self._answer(peer, message)
        elif isinstance(message, messages.Pay):
            peer.send(self._paid(peer.host, message.payments))
        elif isinstance(message, messages.Drop):
            self._drop(peer, message.place, message.reader)
        elif isinstance(message, messages.Beat):
            peer.names = frozenset(message.names)
            lease_s = self._settings.peer_lease
            peer.send(messages.Alive(message.number, self._gone(peer), lease_s))
        elif isinstance(message, messages.Cancel):
            task = peer.tasks.get(message.request)
            if task is not None:
                task.cancel()
        elif isinstance(message, messages.Goodbye):
            self._end(peer, died=False)
        else:
            self._on_note(peer, message)

    def _on_note(
        self,
        peer: FarPeer,
        note: messages.NameLost
        | messages.GiveBack
        | messages.Vouch
        | messages.Holding
        | messages.Promise,
    ) -> None:
        if isinstance(note, messages.NameLost):
            self._waive(frozenset((note.name,)))
        elif isinstance(note, messages.GiveBack):
            self._keys.give_back(peer, note.ticket)
        elif isinstance(note, messages.Vouch):
            self._keys.vouched(peer, note.request)
        elif isinstance(note, messages.Promise):
            self._keys.promised(peer, note)
        else:
            self._keys.keep_only(peer, note.tickets)

    def notified(self, payload: bytes) -> None:
        """Take payments that came over the data plane, which proves nothing: of known hosts only."""
        if len(payload) > messages.MAX_NOTIFICATION_BYTES:
            return
        try:
            message = decode_from_reader(payload)
        except ProtocolError:
            return
        if isinstance(message, messages.Pay) and message.host in self._peers:
            peer = self._peers[message.host]
            # What it has begun, only: a notification is not sealed, and may be anybody's.
            known = [one for one in message.payments if (one.place, one.reader) in peer.begun]
            if known:
                peer.send(self._paid(message.host, known))

    def _answer(self, peer: FarPeer, request: messages.Request) -> None:
        number = request.request
        if number in peer.tasks or len(peer.tasks) >= _MAX_TASKS:
            raise ProtocolError(f"request {number} is in progress, or too many are")
        task = asyncio.get_running_loop().create_task(self._work(peer, request))
        peer.tasks[number] = task

        def ended(_: "asyncio.Task[None]") -> None:
            # A host that came back counts anew: by now the number may be of another of its requests.
            if peer.tasks.get(number) is task:
                del peer.tasks[number]

        task.add_done_callback(ended)

    async def _work(self, peer: FarPeer, request: messages.Request) -> None:
        try:
            if isinstance(request, messages.Look):
                peer.send(await self._look(peer, request))
                return
            if isinstance(request, messages.Seek | messages.Ask | messages.Offer):
                await self._keys.answer(peer, request)
                return
            ref = await self._find(request)
            if isinstance(request, messages.Release):
                self._check_unpaid(peer, request)
                self._pay(peer.host, request.place, request.reader, request.name)
            else:
                self._served.sessions.discard_ref(ref)
            peer.send(messages.Done(request.request))
        except FeatcacheError as error:
            kind = OwnerLost if isinstance(error, CacheClosed) else type(error)
            peer.send(messages.Failed(request.request, kind.__name__, str(error)[:2000]))
        except Exception as error:
            # A fault of this owner is told, too: the host that asks waits as long as this one lives.
            told = f"the owner failed at it: {type(error).__name__}: {error}"[:2000]
            peer.send(messages.Failed(request.request, FeatcacheError.__name__, told))
            raise

    async def _find(self, request: messages.Extent) -> FeatureRef:
        """Return the ref that a request is about, if it can be read now."""
        pool, place = self._pool, request.place
        if place.pool != pool.pool_id:
            raise UnknownPool(
                f"pool {place.pool.hex()} is not of this owner, or not for other hosts"
            )
        if place.slot >= pool.store.table.count:
            raise StaleRef(f"slot {place.slot} of a pool with {pool.store.table.count} slots")
        if pool.ahead.is_coming(place.slot, place.generation):
            await pool.ahead.arrival(place.slot, place.generation)
            pool.check_open()
        whole = TensorSpec(None, "uint8", (request.nbytes,), 0)
        where = place.slot, place.generation, request.offset_bytes, request.nbytes
        ref = FeatureRef(pool.pool_id, pool.ref_endpoint, *where, (whole,))
        pool.find(ref)
        return ref

    def _check_unpaid(self, peer: FarPeer, request: messages.Look | messages.Release) -> None:
        slot = self._pool.store.find(request.place.slot, request.place.generation)
        if slot.paid_by is not None and _session(peer.host, request.reader) in slot.paid_by:
            raise StaleRef(f"ref {slot.label} {_PAID}")

    async def _look(self, peer: FarPeer, request: messages.Look) -> messages.Found:
        """Pin a ref for a session of another host until it pays, drops it, or its host is lost."""
        place, reader = request.place, request.reader
        ref = await self._find(request)
        self._check_unpaid(peer, request)
        if len(peer.begun) >= self._settings.grants:
            raise PoolFull(f"host {peer.host.hex()} reads {len(peer.begun)} refs already")
        relaying = self._served.relaying
        await relaying.prepare()
        attachment = relaying.attach()
        there = attachment.pin(ref)
        if (before := peer.begun.get((place, reader))) is not None:
            before.attachment.unpin(before.ref, pays=False)
        peer.begun[place, reader] = begun = Begun(attachment, ref, request.name)
        peer.watched.setdefault(place)
        self._slab.plane.expect(notifications=True)
        try:
            if not there:
                # The read is in no stream's order: `published`, which a GPU's stream writes behind the
                # copy and a fence of the whole system, is what says that it finds the bytes.
                await wait_ready(attachment, ref)
            await self._slab.settled()
            epoch, metadata = await self._slab.metadata()
            pieces = self._slab.pieces(ref.offset_bytes, ref.nbytes)
        except BaseException:
            if peer.begun.get((place, reader)) is begun:
                self._drop(peer, place, reader)
            raise
        address = self._slab.address_of(ref.offset_bytes)
        told = b"" if request.epoch == epoch else metadata
        self._count(peer, ref.nbytes)
        found = request.request, address, pieces, epoch, told
        return messages.Found(*found, self._slab.memory)

    def _count(self, peer: FarPeer, nbytes: int) -> None:
        peer.reads += 1
        peer.told_bytes += nbytes
        self.told += 1
        self.told_bytes += nbytes

    # --- reads end ------------------------------------------------------------------------------------

    def _unpin(self, peer: FarPeer, place: Place, reader: int) -> Begun | None:
        begun = peer.begun.pop((place, reader), None)
        if begun is not None:
            begun.attachment.unpin(begun.ref, pays=False)
            if not any(each.begun for each in self._peers.values()):
                self._slab.plane.expect(notifications=False)
        return begun

    def _drop(self, peer: FarPeer, place: Place, reader: int) -> None:
        if self._unpin(peer, place, reader) is not None and not self._pool.closed:
            self._pool.collect()  # it may have been revoked meanwhile

    def _pay(self, host: bytes, place: Place, reader: int, name: str | None) -> None:
        """Pay one read. Again, it changes nothing: the store knows each reader of a generation."""
        pool = self._pool
        if place.pool != pool.pool_id or pool.closed:
            return
        session = _session(host, reader)
        paid = pool.store.pay(place.slot, place.generation, session, name, _now())
        pool.apply(paid)

    def _paid(self, host: bytes, payments: list[Payment]) -> messages.Paid:
        peer, gone = self._peers[host], list[Place]()
        for payment in payments:
            # Unpinned first: what is paid is recycled at once then.
            self._unpin(peer, payment.place, payment.reader)
            self._pay(host, payment.place, payment.reader, payment.name)
            if self._is_over(payment.place):
                peer.watched.pop(payment.place, None)
                gone.append(payment.place)
        if self._pool.store.queue:
            self._pool.collect()
        return messages.Paid([payment.number for payment in payments], gone)

    def _is_over(self, place: Place) -> bool:
        store = self._pool.store
        if place.pool != self._pool.pool_id or place.slot >= store.table.count:
            return True
        slot = store.table.find(place.slot, place.generation)
        return slot is None or slot.state is not SlotState.PUBLISHED

    def _gone(self, peer: FarPeer) -> list[Place]:
        found = [place for place in peer.watched if self._is_over(place)][: messages.MAX_GONE]
        for place in found:
            del peer.watched[place]
        return found

    def _waive(self, names: frozenset[str]) -> int:
        """Pay what names owe that were another host's; those that are attached here are not dead."""
        pool, paid = self._pool, 0
        here = {page.name for page in pool.pages.values()}
        pool.collect()  # what they paid themselves is not paid for them
        for name in names - here:
            for index, generation in list(pool.store.owed_by(name)):
                waived = pool.store.waive_read(index, generation, name, _now())
                if waived is not None:
                    paid += 1
                    pool.apply(waived)
        return paid

    # --- the end of a host ----------------------------------------------------------------------------

    def _watch(self, peer: FarPeer) -> None:
        """End a host's lease when it has been silent for so long."""
        now_s, lease_s = _now(), self._settings.peer_lease
        if now_s - peer.due_s > lease_s * _STILL_PART:
            # This owner stood still: heartbeats that came meanwhile are still in the socket.
            peer.heard_s = now_s
        left_s = peer.heard_s + lease_s - now_s
        if left_s <= 0:
            self._end(peer, died=True)
        else:
            peer.due_s = now_s + left_s
            loop = asyncio.get_running_loop()
            peer.timer = loop.call_later(left_s, self._watch, peer)

    def _cancel(self, peer: FarPeer) -> None:
        for task in list(peer.tasks.values()):
            task.cancel()

    def _end(self, peer: FarPeer, *, died: bool) -> None:
        if self._peers.get(peer.host) is not peer:
            return
        self._cancel(peer)
        if peer.timer is not None:
            peer.timer.cancel()
        self._keys.end(peer, died=died)
        begun = dict(peer.begun)
        for (place, reader), read in begun.items():
            self._unpin(peer, place, reader)
            if died:
                self._pay(peer.host, place, reader, read.name)
        del self._peers[peer.host]
        paid = len(begun) + self._waive(peer.names) if died and not self._pool.closed else 0
        if not self._pool.closed:
            self._pool.collect()
        stream, peer.stream = peer.stream, None
        if stream is not None:
            stream.close()
        if died:
            self.lost += 1
            peer.lost, peer.reads_paid = True, paid
            self._gone_hosts[peer.host] = peer
            if len(self._gone_hosts) > _MAX_SHOWN:
                self._gone_hosts.popitem(last=False)
            self._emit(events.HostLost, peer, reads_paid=paid)
        else:
            self._emit(events.HostLeft, peer)

    def close(self) -> None:
        """End all: this owner closes."""
        for peer in list(self._peers.values()):
            self._end(peer, died=False)

    def _emit(self, kind: Callable[..., events.Event], peer: FarPeer, **more: object) -> None:
        events.emit(kind(pool=self._pool.name, host=peer.host.hex(), **more))


def _session(host: bytes, reader: int) -> int:
    """Return the number by which the store knows a session of another host: none that is given here.

    The same for the same session, whatever becomes of the connection: so a payment is known again.
    """
    digest = hashlib.blake2b(host + reader.to_bytes(8, "little"), digest_size=8).digest()
    return -2 - int.from_bytes(digest, "little")
