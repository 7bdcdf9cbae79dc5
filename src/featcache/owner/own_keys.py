"""The directory as the process that owns it uses it: by the key table, or in the loop."""

import asyncio
from collections.abc import Sequence

import anyio

from featcache.control.turns import CALL_UNITS, turn_of
from featcache.core.keyed_store import key_label
from featcache.errors import KeyNotFound, at_member
from featcache.memory.key_table import UNKNOWN
from featcache.owner.keys import Claim, Granted, Lookups
from featcache.owner.own_session import OwnSession
from featcache.owner.sessions import OWN_SESSION
from featcache.pool.page import SessionPage
from featcache.ref import FeatureRef
from featcache.session.arguments import key_timeout, not_found, rpc_timeout
from featcache.session.hits import KeyHits
from featcache.session.lease import KeyLease, MakeClaim, return_all
from featcache.session.single_flight import Command, Device


class OwnerKeys:
    """The `session.single_flight.Keys` of the process that has the directory itself."""

    def __init__(self, lookups: Lookups, own: OwnSession) -> None:
        self._lookups = lookups
        self._own = own
        self._turn = turn_of(asyncio.get_running_loop())

    def _lease(self, granted: Granted) -> KeyLease:
        grant, ref = granted
        return KeyLease.granted(self._own.attach(), ref, grant.index, grant.serial)

    @property
    def hits(self) -> KeyHits | None:
        """The owner's own lookups in the key table, once it has read."""
        return self._own.hits

    def at_hand(self, key: str | bytes, device: Device) -> KeyLease | None:
        """Return a read by the key table alone, or None, in any thread."""
        hits = self._own.hits
        found = UNKNOWN if hits is None else hits.find(key, device)
        return found if type(found) is KeyLease else None

    def find_now(self, key: str | bytes, device: Device) -> KeyLease:
        """Return a read by the key table alone, or raise, in any thread."""
        self._own.attach()
        assert self._own.hits is not None, "its page is open"
        return self._own.hits.find_now(key, device)

    def contains_now(self, key: str | bytes) -> bool | None:
        """Whether a key is there, by the key table alone; None if the owner is to say."""
        hits = self._own.hits
        return None if hits is None else hits.contains(key)

    def _find(self, key: bytes, device: Device, page: SessionPage) -> KeyLease | None:
        """Return a read that is at hand, or None."""
        hits = self._own.hits
        assert hits is not None, "its page is open"
        at_hand = hits.find(key, device)
        if type(at_hand) is KeyLease:
            return at_hand
        granted = self._lookups.find(key, page)  # which counts a miss
        return None if granted is None else self._lease(granted)

    async def find(
        self, key: bytes, timeout_s: float | None, device: Device, *, counted: bool = False
    ) -> KeyLease:
        """Return a read of the feature under a key; with a timeout, wait for it that long."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        page = self._own.page()
        at_hand = None if counted else self._find(key, device, page)
        if at_hand is not None:
            return at_hand
        if timeout_s is None:
            return self._lease(await self._lookups.find_elsewhere(key, page))
        if not timeout_s and self._lookups.sources is not None:
            await self._lookups.sources.bring(key)  # a round trip is no wait
        try:
            with anyio.fail_after(timeout_s):
                found = await self._lookups.wait_for_key(key, page, can_make=False)
        except TimeoutError:
            raise key_timeout(key_label(key), timeout_s) from None
        assert isinstance(found, Granted), "only a waiter that can make it is given a claim"
        return self._lease(found)

    async def find_or_claim(
        self, key: bytes, device: Device, *, waits: bool
    ) -> KeyLease | MakeClaim:
        """Return a read, once there is a feature, or the claim to make it."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        page = self._own.page()
        at_hand = self._find(key, device, page)
        if at_hand is not None:
            return at_hand
        if not waits and self._lookups.is_claimed(key):
            raise not_found(key)
        found = await self._lookups.wait_for_key(key, page, can_make=True, waits=waits)
        if not isinstance(found, Claim):
            return self._lease(found)
        claim = found
        return MakeClaim(lambda: self._lookups.release_claim(claim))

    async def find_many(self, keys: Sequence[bytes], device: Device) -> list[KeyLease | None]:
        """Return a read of each key that is there, and None of the others."""
        turn, page, leases = self._turn, self._own.page(), list[KeyLease | None]()
        if self._lookups.sources is not None:
            await self._lookups.sources.bring_many(keys)
        try:
            for key in keys:
                turn.left -= 1
                if turn.left < 0:
                    await turn.wait()
                leases.append(self._find(key, device, page))
        except BaseException as error:
            return_all(leases)
            if len(leases) < len(keys):
                at_member(error, len(leases))
            raise
        return leases

    async def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether each of these keys is there."""
        turn = self._turn
        turn.left -= CALL_UNITS + len(keys) // 32
        if turn.left < 0:
            await turn.wait()
        if self._lookups.sources is not None:
            return await self._lookups.sources.contains_many(keys)
        return self._lookups.contains_many(keys)

    async def share(
        self,
        key: bytes,
        readers: int | frozenset[str],
        ttl_s: float | None,
        timeout_s: float | None,
    ) -> FeatureRef:
        """Return a ref of the feature under a key that owes these reads; `timeout_s` as in `find`."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        page, lookups = self._own.page(), self._lookups
        shared = lookups.share_now(key, readers, ttl_s)
        if shared is not None:
            return shared
        try:
            with anyio.fail_after(rpc_timeout(timeout_s)):
                waits = bool(timeout_s)
                return await lookups.share(key, readers, ttl_s, page, waits=waits)
        except KeyNotFound:
            if timeout_s is None:
                raise
            raise key_timeout(key_label(key), timeout_s) from None
        except TimeoutError:
            raise key_timeout(key_label(key), timeout_s or 0.0) from None

    async def command(self, command: Command, key: bytes) -> bool:
        """Do this to a key, as `Lookups.command`."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        there = self._lookups.command(command, key, OWN_SESSION)
        if command == "contains" and not there and self._lookups.sources is not None:
            return (await self._lookups.sources.contains_many([key]))[0]
        return there
