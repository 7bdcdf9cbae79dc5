"""The other hosts that this owner reads from: one connection to each, its data plane, what is owed to it."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

from featcache import events
from featcache.errors import (
    CacheClosed,
    FeatcacheError,
    OwnerLost,
    PoolFull,
)
from featcache.owner.home import Home
from featcache.pool.pool import Pool
from featcache.reach import messages
from featcache.reach.link import HomeLink
from featcache.reach.messages import Place
from featcache.reach.secret import TlsContexts
from featcache.ref import FeatureRef
from featcache.session.offload import SharedTask

_now: Final = time.monotonic


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
        self._refusals = events.Throttle(pool.settings.log_interval, burst=16)
        self.quiet: set[str] = set()
        """Addresses that are tried again and again: of a try that fails nobody is told."""
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
        home = await self.at(ref.address)
        if home.host != ref.pool_id:
            raise OwnerLost(
                f"another owner is at {ref.address} now: the one whose ref this is has ended"
            )
        return home

    def peek(self, address: str) -> Home | None:
        """Return the home at an address, if there is a connection that stands."""
        home = self._homes.get(address)
        return None if home is None or home.linked is None else home

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
        try:
            link = await HomeLink.dial(
                home.address, self._key, own, settings, self._tls, self._names
            )
        except FeatcacheError as error:
            home.refused = str(error)
            home.dials_failed += 1
            if home.address not in self.quiet:
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
