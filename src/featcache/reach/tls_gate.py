"""A connection in its TLS handshake: counted and timed from its first moment, before any of it is spoken."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Final, cast

from featcache.errors import explain

_EXTRA_S: Final = 1.0
"""Seconds after a handshake's time in which the event loop ends it itself."""


class TlsGate(asyncio.Protocol):
    """An accepted TCP connection, until it is under TLS.

    The TLS servers of event loops make a protocol only when the handshake is over, so that those in it can't
    be counted. This one takes the connection before that, and gives its socket to `connect_accepted_socket`.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        timeout_s: float,
        admit: Callable[["TlsGate"], bool],
        make: Callable[["TlsGate"], asyncio.Protocol],
        on_over: Callable[["TlsGate", str | None], object],
    ) -> None:
        """Tell `admit` of the connection, which may say no, and `on_over` of its end, with the reason.

        `make` returns the protocol that is told of the connection once it is under TLS.
        """
        self.where = "an unknown address"
        """The other end's address, for logs."""
        self._context = context
        self._timeout_s = timeout_s
        self._admit = admit
        self._make = make
        self._on_over = on_over
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake, if there is a place for one."""
        transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of it
        name: Any = transport.get_extra_info("peername")
        if isinstance(name, tuple):
            self.where = f"{name[0]}:{name[1]}"
        try:
            # A descriptor of its own: the transport, which has read nothing yet, goes with the first.
            if self._admit(self):
                sock = transport.get_extra_info("socket").dup()
                self._task = asyncio.get_running_loop().create_task(self._secure(sock))
        except OSError as error:
            self._on_over(self, self._reason(error))
        finally:
            transport.abort()

    async def _secure(self, sock: Any) -> None:
        loop, reason = asyncio.get_running_loop(), None
        try:
            async with asyncio.timeout(self._timeout_s + _EXTRA_S):
                await loop.connect_accepted_socket(
                    lambda: self._make(self),
                    sock,
                    ssl=self._context,
                    ssl_handshake_timeout=self._timeout_s,
                )
        except OSError as error:  # ssl.SSLError and TimeoutError are some
            reason = self._reason(error)
            sock.close()
        except asyncio.CancelledError:
            sock.close()
            raise
        finally:
            self._on_over(self, reason)

    def _reason(self, error: OSError) -> str | None:
        """Return why there is no TLS; None if the other end just went."""
        if isinstance(
            error, ConnectionAbortedError | TimeoutError
        ):  # the loop's own: it takes too long
            return f"no TLS handshake within {self._timeout_s} s"
        if isinstance(error, ssl.SSLError):
            return f"no TLS: {error.reason or error}"
        return None if isinstance(error, ConnectionError) else f"no TLS: {explain(error)}"

    def close(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
