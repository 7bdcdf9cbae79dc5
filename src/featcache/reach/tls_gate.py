"""A connection in its TLS handshake: counted and timed from its first moment, before any of it is spoken."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Final

from featcache.errors import explain

_MAX_EARLY_BYTES: Final = 64 << 10
"""Bytes that may come under TLS before they are taken: a greeting has far fewer."""


class TlsGate(asyncio.Protocol):
    """An accepted TCP connection, until it is under TLS and somebody else's.

    asyncio's own TLS server makes a protocol only when the handshake is over, so that those in it can't be
    counted. This one takes the connection before that.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        timeout_s: float,
        admit: Callable[["TlsGate"], bool],
        on_secured: Callable[[asyncio.Transport, bytes], object],
        on_over: Callable[["TlsGate", str | None], object],
    ) -> None:
        """Tell `admit` of the connection, which may say no, and `on_over` of its end, with the reason.

        `on_secured` is given the transport under TLS, and what has come over it; `on_over` comes before.
        """
        self._context = context
        self._timeout_s = timeout_s
        self._admit = admit
        self._on_secured = on_secured
        self._on_over = on_over
        self._early = bytearray()
        self._lost = False
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def where(self) -> str:
        """The other end's address, for logs."""
        name: Any = self._transport and self._transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "an unknown address"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake, if there is a place for one."""
        assert isinstance(transport, asyncio.Transport), "TCP"
        self._transport = transport
        # In this order: nothing is read before TLS has the connection.
        transport.pause_reading()
        if self._admit(self):
            self._task = asyncio.get_running_loop().create_task(self._secure(transport))
        else:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Keep what comes under TLS before `on_secured` was told."""
        self._early += data
        if len(self._early) > _MAX_EARLY_BYTES and self._transport is not None:
            self._lost = True
            self._transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        """Note that it ended: the handshake may just be over."""
        self._lost = True

    async def _secure(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        secured: asyncio.Transport | None = None
        reason: str | None = None
        try:
            secured = await loop.start_tls(
                *(transport, self, self._context),
                server_side=True,
                ssl_handshake_timeout=self._timeout_s,
            )
        except OSError as error:  # ssl.SSLError is one
            reason = self._reason(error)
        finally:
            self._on_over(self, reason)
        if secured is None or self._lost:
            transport.abort()
        else:
            self._on_secured(secured, bytes(self._early))

    def _reason(self, error: OSError) -> str | None:
        """Return why there is no TLS; None if the other end just went."""
        if isinstance(
            error, ConnectionAbortedError
        ):  # asyncio's own, of a handshake that takes too long
            return f"no TLS handshake within {self._timeout_s} s"
        if isinstance(error, ssl.SSLError):
            return f"no TLS: {error.reason or error}"
        return None if isinstance(error, ConnectionError) else f"no TLS: {explain(error)}"

    def close(self) -> None:
        """End it at once."""
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()
