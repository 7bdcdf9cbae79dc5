"""Frames and file descriptors over a Unix stream socket, driven by the event loop's readiness.

A frame is ``fc``, a version byte, the number of descriptors that belong to it, its length in four
bytes (little-endian), then the payload. Both directions are bounded: a frame that says it is longer
than the limit, or a peer that does not read what it is sent, ends the channel.
"""

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from featcache.control.messages import VERSION, ProtocolError

__all__ = ["MAX_DESCRIPTORS", "Channel", "close_all"]

_HEADER: Final = struct.Struct("<2sBBI")
_MAGIC: Final = b"fc"
_RECEIVE_BYTES: Final = 64 << 10
MAX_DESCRIPTORS: Final = 64
"""Most descriptors one frame can carry (SCM_MAX_FD is 253)."""
_MAX_QUEUED: Final = 1024
"""Frames that may wait for a peer that does not read."""
_INT_BYTES: Final = array.array("i").itemsize

OnMessage = Callable[[bytes, list[int]], None]
OnLost = Callable[[Exception | None], None]


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in descriptors:
        os.close(fd)


class Channel:
    """One end of a control connection.

    `on_message` is called for each frame with its payload and its descriptors, which it then owns.
    `on_lost` is called once, when the peer is gone (None) or misbehaved (the error), never after
    `close`; of a `ProtocolError` it is told before the channel closes. Both run in the loop and must
    not block.
    """

    def __init__(
        self,
        sock: socket.socket,
        limit_bytes: int,
        on_message: OnMessage,
        on_lost: OnLost,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._limit_bytes = limit_bytes
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._incoming = bytearray()
        self._descriptors: deque[int] = deque()
        self._outgoing: deque[tuple[bytes, Sequence[int]]] = deque()
        self.closed = False
        self._losing = False
        self._loop.add_reader(self._fd, self._readable)

    # --- sending --------------------------------------------------------------------------------

    def send(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one frame now, or as soon as the peer reads. Descriptors stay the caller's to close."""
        if self.closed:
            return
        if len(payload) > self._limit_bytes or len(descriptors) > MAX_DESCRIPTORS:
            raise ValueError(f"a frame of {len(payload)} bytes is over the limit")
        frame = _HEADER.pack(_MAGIC, VERSION, len(descriptors), len(payload)) + payload
        if self._outgoing:
            self._queue(frame, descriptors)
            return
        sent = self._send_some(frame, descriptors)
        if sent < len(frame) and not self.closed:
            self._queue(frame[sent:], () if sent else descriptors)
            self._loop.add_writer(self._fd, self._writable)

    def _queue(self, frame: bytes, descriptors: Sequence[int]) -> None:
        if len(self._outgoing) >= _MAX_QUEUED:
            self._lose(ProtocolError(f"the peer left {_MAX_QUEUED} messages unread"))
            return
        # The frame's own: the caller may close its descriptors before the peer reads.
        self._outgoing.append((frame, [os.dup(fd) for fd in descriptors]))

    def _send_some(self, frame: bytes, descriptors: Sequence[int]) -> int:
        rights = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        try:
            return self._sock.sendmsg([frame], ancillary, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            # The reader side meets the same end and reports it, once, in its own turn.
            return len(frame)

    def _writable(self) -> None:
        while self._outgoing:
            frame, descriptors = self._outgoing[0]
            sent = self._send_some(frame, descriptors)
            if sent:
                close_all(descriptors)
                descriptors = ()
            if sent < len(frame):
                self._outgoing[0] = (frame[sent:], descriptors)
                return
            self._outgoing.popleft()
        self._loop.remove_writer(self._fd)

    # --- receiving ------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _RECEIVE_BYTES,
                socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES),
                socket.MSG_CMSG_CLOEXEC,
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights = array.array("i")
                rights.frombytes(content[: len(content) - len(content) % _INT_BYTES])
                self._descriptors.extend(rights)
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > 2 * MAX_DESCRIPTORS:
            self._lose(ProtocolError("more descriptors than a message may carry"))
        elif not data:
            cut = ProtocolError("the peer hung up in the middle of a message")
            self._lose(cut if self._incoming else None)
        else:
            self._incoming += data
            self._take_frames()

    def _take_frames(self) -> None:
        try:
            while not (self.closed or self._losing) and (frame := self._next_frame()) is not None:
                self._on_message(*frame)
        except ProtocolError as error:
            self._lose(error)

    def _next_frame(self) -> tuple[bytes, list[int]] | None:
        """Cut one frame off what came in; None if it is not whole.

        A header is checked at once: a peer of another kind or version is found out by its first
        bytes.
        """
        incoming = self._incoming
        if incoming[:2] != _MAGIC[: len(incoming)]:
            raise ProtocolError("the peer does not speak featcache's protocol")
        if len(incoming) < _HEADER.size:
            return None
        _, version, count, length_bytes = _HEADER.unpack_from(incoming)
        if version != VERSION:
            raise ProtocolError(f"the peer speaks version {version}, this is version {VERSION}")
        if length_bytes > self._limit_bytes or count > MAX_DESCRIPTORS:
            raise ProtocolError(f"a frame of {length_bytes} bytes is over {self._limit_bytes}")
        end = _HEADER.size + length_bytes
        if len(incoming) < end:
            return None
        if count > len(self._descriptors):
            raise ProtocolError("a message came without its descriptors")
        payload = bytes(incoming[_HEADER.size : end])
        del incoming[:end]
        return payload, [self._descriptors.popleft() for _ in range(count)]

    # --- the end --------------------------------------------------------------------------------

    def _lose(self, error: Exception | None) -> None:
        if self.closed or self._losing:
            return
        self._losing = True
        if isinstance(error, ProtocolError):
            self._on_lost(error)  # while a last word, that says what was wrong, can still be sent
            self.close()
        else:
            self.close()
            self._on_lost(error)

    def close(self) -> None:
        """Close the socket, and the descriptors that came and were not taken. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._drop_descriptors()
        self._sock.close()

    def _drop_descriptors(self) -> None:
        for _, descriptors in self._outgoing:
            close_all(descriptors)
        self._outgoing.clear()
        close_all(self._descriptors)
        self._descriptors.clear()

    def forget(self) -> None:
        """Drop the socket in a forked child, whose copy of the loop must not be touched."""
        self.closed = True
        self._drop_descriptors()
        self._sock.close()
