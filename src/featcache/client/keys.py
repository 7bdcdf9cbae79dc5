"""The directory as a client uses it: by the key table in its own mapping, or by one round trip."""

import asyncio
from collections.abc import Sequence
from typing import Final

import anyio

from featcache.client.connection import PoolConnection
from featcache.client.registry import ConnectionRegistry
from featcache.control import many, messages
from featcache.control.messages import Find, KeyCommand, ProtocolError
from featcache.control.turns import CALL_UNITS, turn_of
from featcache.core.keyed_store import key_label
from featcache.errors import FeatcacheError, KeyNotFound, KeyTimeout, at_member
from featcache.memory.key_table import ABSENT, UNKNOWN
from featcache.ref import FeatureRef
from featcache.session.arguments import key_timeout, not_found, rpc_timeout
from featcache.session.hits import KeyHits
from featcache.session.lease import KeyLease, MakeClaim, return_all
from featcache.session.single_flight import Command, Device

_MAX_KNOWN: Final = 4096
_MAX_KNOWN_BYTES: Final = 512
"""Longer refs, of features of many tensors, are decoded anew each time."""


ENVELOPE_BYTES: Final = 128
"""Bytes of a message of many besides its members."""
_MEMBER_BYTES: Final = 8


def fitting(keys: Sequence[bytes], first: int, message_bytes: int) -> list[bytes]:
    """Return the keys from `first` on, as many as one message takes; at least one."""
    some, left_bytes = list[bytes](), message_bytes - ENVELOPE_BYTES
    for key in keys[first : first + many.MAX_KEYS]:
        left_bytes -= len(key) + _MEMBER_BYTES
        if left_bytes < 0 and some:
            break
        some.append(key)
    return some


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
        if connection is None:
            self._registry.check_not_lost()
            return None
        return connection.hits.contains(key)

    async def find(
        self, key: bytes, timeout_s: float | None, device: Device, *, counted: bool = False
    ) -> KeyLease:
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
            if not counted:
                connection.attachment.count_miss()
            raise not_found(key) if timeout_s is None else key_timeout(key_label(key), timeout_s)
        if timeout_s is None:
            found = await self._find(key, waits=False, makes=False)
        else:
            try:
                with anyio.fail_after(rpc_timeout(timeout_s)):
                    found = await self._find(key, waits=timeout_s > 0, makes=False, counted=counted)
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

    async def _find(
        self, key: bytes, *, waits: bool, makes: bool, counted: bool = False
    ) -> KeyLease | MakeClaim:
        """Ask the owner."""
        connection = self._registry.peek_bound() or await self._registry.bound()
        number = connection.link.number()
        answer, _ = await connection.link.request(Find(number, key, waits, makes, counted))
        if isinstance(answer, messages.ClaimGranted):
            release = messages.ReleaseClaim(key, answer.claim)
            return MakeClaim(lambda: connection.link.tell(release))
        if not isinstance(answer, messages.Granted):
            raise ProtocolError(f"the owner answered a lookup with {type(answer).__name__}")
        return self._take(connection, answer.index, answer.serial, answer.ref)

    def _take(self, connection: PoolConnection, index: int, serial: int, data: bytes) -> KeyLease:
        """Return the lease that the owner granted, if it is sound."""
        attachment = connection.attachment
        attachment.check_grant(index, serial)
        try:
            ref = self._known.get(data) or self._read_ref(data)
            attachment.check_leased_ref(ref)
        except Exception:
            attachment.return_grant(index, serial)
            raise
        return KeyLease.granted(attachment, ref, index, serial)

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

    async def find_many(self, keys: Sequence[bytes], device: Device) -> list[KeyLease | None]:
        """Return a read of each key that is there, and None of the others.

        By the key table where it is enough; the others are asked for by one message for up to 256.
        """
        turn, leases = self._turn, list[KeyLease | None]()
        connection = self._registry.peek_bound() or await self._registry.bound()
        asks: list[int] = []
        try:
            for at, key in enumerate(keys):
                turn.left -= 1
                if turn.left < 0:
                    await turn.wait()
                found = connection.hits.find(key, device)
                leases.append(found if type(found) is KeyLease else None)
                if found == ABSENT:
                    connection.attachment.count_miss()
                elif found == UNKNOWN:
                    asks.append(at)
            await self._ask_for_some(keys, asks, leases)
        except BaseException as error:
            return_all(leases)
            at_member(error, min(len(leases), len(keys) - 1))
            raise
        return leases

    async def _ask_for_some(
        self, keys: Sequence[bytes], asks: list[int], leases: list[KeyLease | None]
    ) -> None:
        """Ask the owner for these of the keys."""
        try:
            asked = await self._ask_for_many([keys[n] for n in asks])
        except FeatcacheError as error:
            error.member = asks[error.member or 0]
            raise
        for n, lease in zip(asks, asked, strict=True):
            leases[n] = lease

    async def _ask_for_many(self, keys: Sequence[bytes]) -> list[KeyLease | None]:
        turn, leases = self._turn, list[KeyLease | None]()
        try:
            while len(leases) < len(keys):
                turn.left -= CALL_UNITS
                if turn.left < 0:
                    await turn.wait()
                connection = self._registry.peek_bound() or await self._registry.bound()
                link = connection.link
                some = fitting(keys, len(leases), link.message_bytes)
                answer, _ = await link.request(
                    many.FindMany(link.number(), some, link.message_bytes - ENVELOPE_BYTES)
                )
                if not isinstance(answer, many.GrantedMany) or len(answer.found) > len(some):
                    raise ProtocolError("the owner answered lookups with something else")
                turn.left -= len(answer.found) // 2
                self._take_all(connection, answer, leases)
        except BaseException as error:
            return_all(leases)
            if isinstance(error, FeatcacheError) and error.member is not None:
                error.member += len(leases)
            raise
        return leases

    def _take_all(
        self,
        connection: PoolConnection,
        answer: many.GrantedMany,
        leases: list[KeyLease | None],
    ) -> None:
        """Take the leases of an answer; if one is not sound, return those that were not taken."""
        taken = 0
        try:
            for one in answer.found:
                leases.append(None if one is None else self._take(connection, *one))
                taken += 1
        except BaseException:
            for one in answer.found[taken + 1 :]:  # that one was returned, if it could be
                if one is not None:
                    connection.attachment.return_grant(one[0], one[1])
            raise

    async def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether each of these keys is there; what the key table can't say by message."""
        turn = self._turn
        turn.left -= CALL_UNITS + len(keys) // 8
        if turn.left < 0:
            await turn.wait()
        connection = self._registry.peek_bound() or await self._registry.bound()
        told = [connection.hits.contains(key) for key in keys]
        asks, flags = [n for n, there in enumerate(told) if there is None], list[bool]()
        wanted = [keys[n] for n in asks]
        while len(flags) < len(wanted):
            link = (self._registry.peek_bound() or await self._registry.bound()).link
            some = fitting(wanted, len(flags), link.message_bytes)
            answer, _ = await link.request(many.ContainsMany(link.number(), some))
            if not isinstance(answer, many.Contained) or len(answer.flags) != len(some):
                raise ProtocolError("the owner answered whether keys are there with something else")
            flags += answer.flags
        for n, flag in zip(asks, flags, strict=True):
            told[n] = flag
        return [bool(there) for there in told]

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
            raise self._unanswered(key, timeout_s or 0.0) from None
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a share with {type(answer).__name__}")
        ref = FeatureRef.from_bytes(answer.ref)
        if ref.pool_id != connection.attachment.pool_id:
            raise ProtocolError("the owner answered a share with a ref of another pool")
        return ref

    def _unanswered(self, key: bytes, timeout_s: float) -> KeyTimeout:
        """Return the error of a share that took too long: its key may be there, and the owner stopped."""
        connection = self._registry.peek_bound()
        if connection is None or not connection.hits.contains(key):
            return key_timeout(key_label(key), timeout_s)
        label = key_label(key)[:64]
        return KeyTimeout(
            f"{label!r} is there, but its owner did not share it within {timeout_s:g} s: "
            "it is busy, or stopped"
        )

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
