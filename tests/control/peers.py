"""Peers that do not keep to the protocol, written against raw sockets."""

import array
import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from featcache.control.messages import VERSION, Hello, encode

HEADER: Final = struct.Struct("<2sBBI")


def frame(
    payload: bytes,
    descriptors: int = 0,
    *,
    version: int = VERSION,
    magic: bytes = b"fc",
    length: int | None = None,
) -> bytes:
    """A frame, as wrong as one likes."""
    size = len(payload) if length is None else length
    return HEADER.pack(magic, version, descriptors, size) + payload


def hello(name: str | None = None, version: int = VERSION) -> bytes:
    """The frame of a hello that carries a pidfd."""
    return frame(encode(Hello(version, name, "cpu")), 1)


@contextlib.contextmanager
def own_pidfd() -> Iterator[int]:
    """A pidfd of this process."""
    fd = os.pidfd_open(os.getpid())
    try:
        yield fd
    finally:
        os.close(fd)


class Peer:
    """One end of a Unix stream, in a loop, with no manners of its own."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.received: list[int] = []
        self._incoming = b""

    @classmethod
    def connect(cls, endpoint: str) -> "Peer":
        """Connect to a listener."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(endpoint)
        return cls(sock)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send it all, now."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        assert self.sock.sendmsg([data], [rights] if descriptors else []) == len(data)

    def greet(self, name: str | None = None) -> None:
        """Say hello as one should."""
        with own_pidfd() as pidfd:
            self.send(hello(name), [pidfd])

    async def flood(self, data: bytes) -> None:
        """Send the same again and again, until that raises."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.wait_for(loop.sock_sendall(self.sock, data), 20)

    async def _receive(self) -> bytes:
        give_up = time.monotonic() + 20
        while True:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(4 * 253))
            except BlockingIOError:
                assert time.monotonic() < give_up, "the other side neither spoke nor hung up"
                await asyncio.sleep(0.001)
                continue
            except ConnectionResetError:
                return b""
            for _, _, content in ancillary:
                rights = array.array("i")
                rights.frombytes(content)
                self.received.extend(rights)
            return data

    async def message(self) -> dict[str, Any]:
        """The next message of the other side."""
        while True:
            if len(self._incoming) >= HEADER.size:
                magic, version, _, length = HEADER.unpack_from(self._incoming)
                assert (magic, version) == (b"fc", VERSION)
                end = HEADER.size + length
                if len(self._incoming) >= end:
                    payload = self._incoming[HEADER.size : end]
                    self._incoming = self._incoming[end:]
                    message = msgspec.msgpack.decode(payload)
                    assert isinstance(message, dict)
                    return message
            data = await self._receive()
            assert data, "the other side hung up"
            self._incoming += data

    async def hung_up(self) -> None:
        """Return when the other side has closed; whatever it said is dropped."""
        while await self._receive():
            pass

    def close(self) -> None:
        """Close the socket and every descriptor that came."""
        self.sock.close()
        for fd in self.received:
            os.close(fd)
        self.received.clear()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
