"""A socket in an event loop, read as servers that care read theirs: by a protocol, not by streams.

What has come in by one call is cut into frames with no await between them; a stream's `readexactly`
would cost more than the feature that the frame names.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from bench.wire import FRAME


class Wire(asyncio.Protocol):
    """One connection: bytes taken in order, frames written whole."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = 0
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._at:
            del self._data[: self._at]
            self._at = 0
        self._data += data
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self, nbytes: int) -> bytes:
        """The next so many bytes."""
        while len(self._data) - self._at < nbytes:
            if self._lost:
                raise ConnectionError("the other end has gone")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        at = self._at
        self._at = at + nbytes
        return bytes(self._data[at : self._at])

    async def frame(self) -> bytes:
        """The next frame, without its length."""
        data, at = self._data, self._at
        if len(data) - at >= FRAME.size:
            (nbytes,) = FRAME.unpack_from(data, at)
            start = at + FRAME.size
            if len(data) - start >= nbytes:  # it is all there, as most are when many are in flight
                self._at = start + nbytes
                return bytes(data[start : self._at])
        (nbytes,) = FRAME.unpack(await self.take(FRAME.size))
        return await self.take(nbytes) if nbytes else b""

    def write(self, data: bytes) -> None:
        """Sent now if the socket takes it. What is in flight is bounded by the pool."""
        assert self._transport is not None
        self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def open_wire(sock: socket.socket) -> Wire:
    _, wire = await asyncio.get_running_loop().create_unix_connection(Wire, sock=sock)
    return wire
