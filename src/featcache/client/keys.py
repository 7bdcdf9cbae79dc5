"""The directory as a client uses it: one round trip to its owner for a lookup, a word to end a read."""

import asyncio
from typing import Final

import anyio

from featcache.client.registry import ConnectionRegistry
from featcache.control import messages
from featcache.control.messages import Find, KeyCommand, ProtocolError
from featcache.control.turns import CALL_UNITS, turn_of
from featcache.core.keyed_store import key_label
from featcache.errors import KeyNotFound
from featcache.ref import FeatureRef
from featcache.session.arguments import key_timeout, rpc_timeout
from featcache.session.lease import KeyLease, MakeClaim
from featcache.session.single_flight import Command

_MAX_KNOWN: Final = 4096
_MAX_KNOWN_BYTES: Final = 512
"""Longer refs, of features of many tensors, are decoded anew each time."""


class ClientKeys:
    """The `session.single_flight.Keys` of a client, for the pool that it is bound to."""

    def __init__(self, registry: ConnectionRegistry) -> None:
        self._registry = registry
        self._turn = turn_of(asyncio.get_running_loop())
        self._known: dict[bytes, FeatureRef] = {}
        """Refs by the bytes that they were decoded from, and found sound."""

    async def find(self, key: bytes, timeout_s: float | None) -> KeyLease:
        """Return a read of the feature under a key; with a timeout, wait for it that long."""
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

    async def find_or_claim(self, key: bytes, *, waits: bool) -> KeyLease | MakeClaim:
        """Return a read, once there is a feature, or the claim to make it."""
        return await self._find(key, waits=waits, makes=True)

    async def _find(self, key: bytes, *, waits: bool, makes: bool) -> KeyLease | MakeClaim:
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        connection = self._registry.peek_bound() or await self._registry.bound()
        answer, _ = await connection.link.request(Find(connection.link.number(), key, waits, makes))
        if isinstance(answer, messages.ClaimGranted):
            release = messages.ReleaseClaim(key, answer.claim)
            return MakeClaim(lambda: connection.link.tell(release))
        if not isinstance(answer, messages.Granted):
            raise ProtocolError(f"the owner answered a lookup with {type(answer).__name__}")
        attachment = connection.attachment
        attachment.check_lease(answer.index, answer.serial)
        try:
            ref = self._known.get(answer.ref) or self._read_ref(answer.ref)
            attachment.check_leased_ref(ref)
        except Exception:
            attachment.return_lease(answer.index, answer.serial)
            raise
        return KeyLease(attachment, ref, answer.index, answer.serial)

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
        owed = readers if isinstance(readers, int) else sorted(readers)
        try:
            with anyio.fail_after(rpc_timeout(timeout_s)):
                connection = self._registry.peek_bound() or await self._registry.bound()
                number, waits = connection.link.number(), bool(timeout_s)
                answer, _ = await connection.link.request(
                    messages.Share(number, key, owed, ttl_s, waits)
                )
        except KeyNotFound:
            if timeout_s is None:
                raise
            raise key_timeout(key_label(key), timeout_s) from None
        except TimeoutError:
            raise key_timeout(key_label(key), timeout_s or 0.0) from None
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a share with {type(answer).__name__}")
        ref = FeatureRef.from_bytes(answer.ref)
        if ref.pool_id != connection.attachment.pool_id:
            raise ProtocolError("the owner answered a share with a ref of another pool")
        return ref

    async def command(self, command: Command, key: bytes) -> bool:
        """Do this to a key; return whether it was there. KeyNotFound of pin and unpin if it was not."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        link = (self._registry.peek_bound() or await self._registry.bound()).link
        answer, _ = await link.request(KeyCommand(link.number(), key, command))
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a command with {type(answer).__name__}")
        return answer.flag
