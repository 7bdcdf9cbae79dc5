"""The directory as a client uses it: by the key table in its own mapping, or by one round trip."""

import asyncio
from typing import Final

import anyio

from featcache.client.registry import ConnectionRegistry
from featcache.control import messages
from featcache.control.messages import Find, KeyCommand, ProtocolError
from featcache.control.turns import CALL_UNITS, turn_of
from featcache.core.keyed_store import key_label
from featcache.errors import KeyNotFound
from featcache.memory.key_table import ABSENT, UNKNOWN
from featcache.ref import FeatureRef
from featcache.session.arguments import key_timeout, not_found, rpc_timeout
from featcache.session.hits import KeyHits
from featcache.session.lease import KeyLease, MakeClaim
from featcache.session.single_flight import Command, Device

_MAX_KNOWN: Final = 4096
_MAX_KNOWN_BYTES: Final = 512
"""Longer refs, of features of many tensors, are decoded anew each time."""


class ClientKeys:
    """The `session.single_flight.Keys` of a client, for the pool that it is bound to."""

    def __init__(self, registry: ConnectionRegistry) -> None:
        self._registry = registry
        self._connections = registry.by_pool
        self._turn = turn_of(asyncio.get_running_loop())
        self._known: dict[bytes, FeatureRef] = {}
        """Refs by the bytes that they were decoded from, and found sound."""

    @property
    def hits(self) -> KeyHits | None:
        """Lookups in the key table of the pool that this client is connected to, if it is open."""
        connection = self._connections.get(self._registry.bound_pool)
        return None if connection is None else connection.hits

    def at_hand(self, key: str | bytes, device: Device) -> KeyLease | None:
        """Return a read by the key table alone, or None, in any thread."""
        connection = self._registry.peek_bound()
        found = UNKNOWN if connection is None else connection.hits.find(key, device)
        return found if type(found) is KeyLease else None

    def find_now(self, key: str | bytes, device: Device) -> KeyLease:
        """Return a read by the key table alone, or raise, in any thread."""
        return self._registry.bound_now().hits.find_now(key, device)

    def contains_now(self, key: str | bytes) -> bool | None:
        """Whether a key is there, by the key table alone; None if the owner is to say."""
        connection = self._registry.peek_bound()
        return None if connection is None else connection.hits.contains(key)

    async def find(self, key: bytes, timeout_s: float | None, device: Device) -> KeyLease:
        """Return a read of the feature under a key; with a timeout, wait for it that long."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        connection = self._registry.peek_bound() or await self._registry.bound()
        at_hand = connection.hits.find(key, device)
        if type(at_hand) is KeyLease:
            return at_hand
        if at_hand == ABSENT and not timeout_s:
            connection.attachment.count_miss()
            raise not_found(key) if timeout_s is None else key_timeout(key_label(key), timeout_s)
        if timeout_s is None:
            found = await self._find(key, waits=False, makes=False)
        else:
            try:
                with anyio.fail_after(rpc_timeout(timeout_s)):
                    found = await self._find(key, waits=timeout_s > 0, makes=False)
            except (KeyNotFound, TimeoutError):
                raise key_timeout(key_label(key), timeout_s) from None
        if isinstance(found, MakeClaim):
            raise ProtocolError("the owner answered a lookup that can't make with a claim")
        return found

    async def find_or_claim(
        self, key: bytes, device: Device, *, waits: bool
    ) -> KeyLease | MakeClaim:
        """Return a read, once there is a feature, or the claim to make it."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        connection = self._registry.peek_bound() or await self._registry.bound()
        at_hand = connection.hits.find(key, device)
        if type(at_hand) is KeyLease:
            return at_hand
        return await self._find(key, waits=waits, makes=True)

    async def _find(self, key: bytes, *, waits: bool, makes: bool) -> KeyLease | MakeClaim:
        """Ask the owner."""
        connection = self._registry.peek_bound() or await self._registry.bound()
        answer, _ = await connection.link.request(Find(connection.link.number(), key, waits, makes))
        if isinstance(answer, messages.ClaimGranted):
            release = messages.ReleaseClaim(key, answer.claim)
            return MakeClaim(lambda: connection.link.tell(release))
        if not isinstance(answer, messages.Granted):
            raise ProtocolError(f"the owner answered a lookup with {type(answer).__name__}")
        attachment = connection.attachment
        attachment.check_grant(answer.index, answer.serial)
        try:
            ref = self._known.get(answer.ref) or self._read_ref(answer.ref)
            attachment.check_leased_ref(ref)
        except Exception:
            attachment.return_grant(answer.index, answer.serial)
            raise
        return KeyLease.granted(attachment, ref, answer.index, answer.serial)

    def _read_ref(self, data: bytes) -> FeatureRef:
        """Decode a ref, and know it when the same bytes come again.

        Whether its slot still has that feature is checked each time.
        """
        ref = FeatureRef.from_bytes(data)
        if len(data) <= _MAX_KNOWN_BYTES:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[data] = ref
        return ref

    async def command(self, command: Command, key: bytes) -> bool:
        """Do this to a key; return whether it was there. KeyNotFound of pin and unpin if it was not."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        connection = self._registry.peek_bound() or await self._registry.bound()
        if command == "contains":
            there = connection.hits.contains(key)
            if there is not None:
                return there
        link = connection.link
        answer, _ = await link.request(KeyCommand(link.number(), key, command))
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a command with {type(answer).__name__}")
        return answer.flag
