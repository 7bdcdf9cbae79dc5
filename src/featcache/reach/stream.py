"""A `Conversation` over a TCP connection: the handshake in time, frames in and out, the end."""

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

from featcache.control.messages import ProtocolError
from featcache.errors import AttachRefused, FeatcacheError, OwnerLost, explain
from featcache.reach.handshake import Conversation, Phase, Role

_MAX_UNSENT_BYTES: Final = 16 << 20
"""Bytes that may wait for a peer that does not read; above that the connection ends."""
_UNREAD: Final = "the other host does not read what it is sent"


class Stream(asyncio.Protocol):
    """One connection between hosts. Each of its calls is told once, `on_closed` at last.

    `on_open` is told that the handshake is over, `on_message` each payload, `on_closed` why it ended:
    None if the other end closed it.
    """

    def __init__(self, talk: Conversation, timeout_s: float) -> None:
        """Allow `timeout_s` seconds from the connection on for the handshake."""
        self._talk = talk
        self._timeout_s = timeout_s
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._over = False
        self.on_open: Callable[[], object] = _nothing
        self.on_message: Callable[[bytes], object] = _nothing
        self.on_closed: Callable[[FeatcacheError | None], object] = _nothing

    @property
    def peer(self) -> bytes:
        """The id of the pool at the other end, once the handshake is over."""
        return self._talk.peer

    @property
    def is_open(self) -> bool:
        """Whether the handshake is over and the connection stands."""
        return self._talk.phase is Phase.OPEN and not self._over

    @property
    def where(self) -> str:
        """The other end's address, for logs."""
        name: Any = self._transport and self._transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "an unknown address"

    # --- asyncio.Protocol ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of it
        self._transport = transport
        transport.set_write_buffer_limits(high=_MAX_UNSENT_BYTES)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._timeout_s, self._too_late)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Take bytes that came."""
        if self._over:
            return
        was_open = self._talk.phase is Phase.OPEN
        try:
            payloads = self._talk.receive(data)
        except (ProtocolError, AttachRefused) as error:
            self._flush()  # a refusal
            self.close(error)
            return
        self._flush()
        if not was_open and self._talk.phase is Phase.OPEN:
            self._stop_deadline()
            self.on_open()
        for payload in payloads:
            self._hand_on(payload)

    def _hand_on(self, payload: bytes) -> None:
        if self._over:  # by what came before it
            return
        try:
            self.on_message(payload)
        except ProtocolError as error:
            self.close(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that the connection ended."""
        if exc is None:
            self.close(None)
        else:
            self.close(OwnerLost(f"the connection broke: {explain(exc)}"))

    def pause_writing(self) -> None:
        """End the connection: its writes are small, and so many wait that nobody reads them."""
        self.close(ProtocolError(_UNREAD))

    # --- calls --------------------------------------------------------------------------------------

    def send(self, payload: bytes) -> None:
        """Send a payload; no-op once the connection is over."""
        if self.is_open:
            self._talk.send(payload)
            self._flush()

    def refuse(self, reason: str) -> None:
        """Send the peer away with a reason."""
        self._talk.refuse(reason)
        self._flush()
        self.close(AttachRefused(reason))

    def close(self, error: FeatcacheError | None = None) -> None:
        """End it, what was sent first if the peer reads it; `on_closed` is told. Idempotent."""
        if self._over:
            return
        self._over = True
        self._stop_deadline()
        self._talk.close()
        if self._transport is not None:
            unread = error is not None and str(error) == _UNREAD
            (self._transport.abort if unread else self._transport.close)()
        told, self.on_closed = self.on_closed, _nothing
        self.on_open = self.on_message = _nothing
        told(error)

    def abort(self, error: FeatcacheError | None = None) -> None:
        """End it at once: nothing that waits is sent."""
        if self._transport is not None:
            self._transport.abort()
        self.close(error)

    def forget(self) -> None:
        """Tell nothing more, in a forked child. Its descriptor goes with the process, or its exec."""
        self._over = True
        self.on_open = self.on_message = self.on_closed = _nothing

    def _too_late(self) -> None:
        late = f"no handshake within {self._timeout_s} s"
        if self._talk.role is Role.LISTENER:
            self.refuse(late)
        else:
            self.close(OwnerLost(late))

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _flush(self) -> None:
        data = self._talk.take_outgoing()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def _nothing(*_: object) -> None:
    """Do nothing."""
