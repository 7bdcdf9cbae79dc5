"""The directory as a client uses it: one round trip to its owner for a lookup, a word to end a read."""

from collections.abc import Awaitable, Callable
from typing import Final, Literal

import anyio

from featcache.client.connection import PoolConnection
from featcache.control import messages
from featcache.control.messages import Find, KeyCommand, ProtocolError
from featcache.core.keyed_store import key_label
from featcache.errors import KeyNotFound
from featcache.ref import FeatureRef
from featcache.session.arguments import NOWAIT_RPC_TIMEOUT_S, key_timeout
from featcache.session.lease import KeyLease, MakeClaim

_What = Literal["contains", "evict", "pin", "unpin"]
_MAX_KNOWN: Final = 4096
_MAX_KNOWN_BYTES: Final = 512
"""Refs that are longer, of features of many tensors, are made sense of anew each time."""


class ClientKeys:
    """`reads.Keys` of a session. `handle` returns that of the pool it is bound to, attaching first.

    `peek` returns it if it is attached.
    """

    def __init__(
        self,
        peek: Callable[[], PoolConnection | None],
        connection: Callable[[], Awaitable[PoolConnection]],
    ) -> None:
        self._peek = peek
        self._connection = connection
        self._known: dict[bytes, FeatureRef] = {}
        """Refs by the bytes that they were read from, and found sound."""

    async def find(self, key: bytes, timeout_s: float | None) -> KeyLease:
        """Return a read of what is under a key; with a timeout, wait for it that long."""
        if timeout_s is None:
            found = await self._find(key, waits=False, makes=False)
        elif timeout_s == 0:  # not to wait: a round trip takes longer than that, and is no wait
            try:
                with anyio.fail_after(NOWAIT_RPC_TIMEOUT_S):
                    found = await self._find(key, waits=False, makes=False)
            except (KeyNotFound, TimeoutError):
                raise key_timeout(key_label(key), timeout_s) from None
        else:
            try:
                with anyio.fail_after(timeout_s):
                    found = await self._find(key, waits=True, makes=False)
            except TimeoutError:
                raise key_timeout(key_label(key), timeout_s) from None
        if isinstance(found, MakeClaim):
            raise ProtocolError("the owner gave a claim to who did not ask for one")
        return found

    async def find_or_claim(self, key: bytes, *, waits: bool) -> KeyLease | MakeClaim:
        """Return a read, once there is something, or the right to make it."""
        return await self._find(key, waits=waits, makes=True)

    async def _find(self, key: bytes, *, waits: bool, makes: bool) -> KeyLease | MakeClaim:
        connection = self._peek() or await self._connection()
        answer, _ = await connection.link.request(Find(connection.link.number(), key, waits, makes))
        if isinstance(answer, messages.ClaimGranted):
            release_claim = messages.ReleaseClaim(key, answer.claim)
            return MakeClaim(lambda: connection.link.tell(release_claim))
        if not isinstance(answer, messages.Granted):
            raise ProtocolError(f"the owner answered a lookup with {type(answer).__name__}")
        attachment = connection.attachment
        attachment.check_grant(answer.index, answer.serial)
        try:
            ref = self._known.get(answer.ref) or self._read_ref(answer.ref)
            attachment.check_granted(ref)
            attachment.check()
        except Exception:
            attachment.return_grant(answer.index, answer.serial)
            raise
        return KeyLease(attachment, ref, answer.index, answer.serial)

    def _read_ref(self, data: bytes) -> FeatureRef:
        """Return the ref that these bytes are, and know it when they come again.

        It says the same then; whether its slot is still that feature's is looked at each time.
        """
        ref = FeatureRef.from_bytes(data)
        if len(data) <= _MAX_KNOWN_BYTES:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[data] = ref
        return ref

    async def contains(self, key: bytes) -> bool:
        """Whether there is something under a key."""
        return await self._do("contains", key)

    async def evict(self, key: bytes) -> bool:
        """Drop a key; return whether it was there."""
        return await self._do("evict", key)

    async def pin(self, key: bytes) -> None:
        """Keep a key from being evicted."""
        await self._do("pin", key)

    async def unpin(self, key: bytes) -> None:
        """Take back a pin."""
        await self._do("unpin", key)

    async def _do(self, what: _What, key: bytes) -> bool:
        link = (self._peek() or await self._connection()).link
        answer, _ = await link.request(KeyCommand(link.number(), key, what))
        if not isinstance(answer, messages.Reply):
            raise ProtocolError(f"the owner answered a question with {type(answer).__name__}")
        return answer.flag
