"""The homes of keys that an owner was given: which one is asked, and which are down."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, TypeVar

import anyio

from featcache.errors import AttachRefused, CacheClosed, FeatcacheError, OwnerLost
from featcache.owner.home import Home
from featcache.owner.homes import Homes
from featcache.reach.handshake import DialedItself
from featcache.reach.rendezvous import Ranking

T = TypeVar("T")
_MOST_REFUSALS: Final = 32
"""Times `reconnect_interval` between two tries, at most, of one that refuses this host."""


class Upstreams:
    """The upstreams in the order of each key.

    ::

        UP ──can't be reached, or is lost as it is asked──→ DOWN ──a try each `reconnect_interval`──→ UP

    While one is DOWN the next in the order of a key stands in for it. This owner's own address ends the
    order: what comes after it need not be asked.
    """

    def __init__(self, homes: Homes, ranking: Ranking, interval_s: float) -> None:
        self._homes = homes
        self._ranking = ranking
        self._interval_s = interval_s
        self._down: dict[str, asyncio.Task[None]] = {}
        self._own: set[str] = set()
        self._closed = False
        self._warming: set[asyncio.Task[None]] = set()
        self._arrival = asyncio.Event()
        self.on_down: Callable[[FeatcacheError], object] = lambda _: None
        """Told why one is DOWN now."""

    def add_own(self, address: str) -> None:
        """Know an address as this owner's own."""
        self._own.add(address)

    def home_of(self, key: bytes) -> str | None:
        """Return the address of a key's home, or of its stand-in; None if it is here, or all are DOWN."""
        return next(self._order(key), None)

    def _order(self, key: bytes) -> Iterator[str]:
        for address in self._ranking.of(key):
            if address in self._own:
                return
            if address not in self._down:
                yield address

    async def warm(self, within_s: float) -> None:
        """Connect to all of them; return once each was tried, or in time.

        Those that do not answer are tried on, in the background: they may start later.
        """
        loop, tried = asyncio.get_running_loop(), []
        for address in self._ranking.addresses:
            if address not in self._own:
                tried.append(loop.create_future())
                task = loop.create_task(self._warm(address, tried[-1]))
                self._warming.add(task)
                task.add_done_callback(self._warming.discard)
        if tried:
            await asyncio.wait(tried, timeout=within_s)

    def try_now(self) -> None:
        """Connect to those that did not answer at the start: another host has come, they may have too."""
        self._arrival.set()
        self._arrival = asyncio.Event()

    async def _warm(self, address: str, tried: "asyncio.Future[None]") -> None:
        # It is not DOWN if this fails: it may be about to start. Once it is, `_revive` tries it.
        self._homes.quiet.add(address)
        try:
            while address not in self._down:
                arrival = self._arrival  # before the try: one that comes during it counts
                connected = await self._is_connected(address)
                if not tried.done():
                    tried.set_result(None)
                if connected:
                    return
                with anyio.move_on_after(self._interval_s):
                    await arrival.wait()
        finally:
            if address not in self._down:
                self._homes.quiet.discard(address)

    async def _is_connected(self, address: str) -> bool:
        """Try to connect; return whether that needs no other try."""
        try:
            await self._homes.at(address)
        except DialedItself:
            self._own.add(address)
        except OwnerLost:
            return False
        except FeatcacheError:
            pass  # it is there, and refuses
        return True

    def peek(self, key: bytes) -> Home | None:
        """Return the home of a key if it is elsewhere and connected now."""
        address = self.home_of(key)
        return None if address is None else self._homes.peek(address)

    async def ask(self, key: bytes, what: Callable[[Home], Awaitable[T]]) -> T | None:
        """Return what the home of a key answers; None if it is here, or none can be reached.

        Raises what it answers with, but for OwnerLost and AttachRefused: then the next is asked.
        """
        for address in self._order(key):
            answer = await self.ask_at(address, what)
            if answer is not None:
                return answer
            if address in self._own:
                break  # as was found now
        return None

    async def ask_at(self, address: str, what: Callable[[Home], Awaitable[T]]) -> T | None:
        """Return what the owner at an address answers; None, and it is DOWN, if it can't be reached."""
        for again in (True, False):
            if self._closed:
                raise CacheClosed("the cache was closed")
            link = None
            try:
                home = await self._homes.at(address)
                link = home.link
                return await what(home)
            except DialedItself:
                self._own.add(address)  # its name is another than that of `listen`
                return None
            except (OwnerLost, AttachRefused) as error:
                if again and link is not None and link.is_broken:
                    continue  # the connection was found to be broken: it may be restarted
                self._set_down(address, error)
                break
        return None

    def _set_down(self, address: str, error: FeatcacheError) -> None:
        if address not in self._down and not self._closed:
            self.on_down(error)
            self._homes.quiet.add(address)
            self._down[address] = asyncio.get_running_loop().create_task(self._revive(address))

    async def _revive(self, address: str) -> None:
        interval_s = self._interval_s
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._homes.at(address)
            except CacheClosed:
                return
            except OwnerLost:
                continue
            except FeatcacheError:  # it is there, and refuses: that changes by hand, if at all
                interval_s = min(2 * interval_s, _MOST_REFUSALS * self._interval_s)
                continue
            del self._down[address]
            self._homes.quiet.discard(address)
            return

    def close(self) -> None:
        """Ask, and try, no more."""
        self._closed = True
        for task in (*self._down.values(), *self._warming):
            task.cancel()
