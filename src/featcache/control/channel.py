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

_HEADER: Final = struct.Struct("<2sBBI")
_HEADER_BYTES: Final = _HEADER.size
_pack_header, _unpack_header = _HEADER.pack, _HEADER.unpack_from
_COUNT_AT: Final = 3  # where in the header the number of descriptors is
_MAGIC: Final = b"fc"
_NOT_OURS: Final = "the peer does not speak featcache's protocol"
_RECEIVE_BYTES: Final = 64 << 10
_GATHER_BYTES: Final = 16 << 10
"""What is gathered goes when it is so much, to a peer that may have begun to read by the time."""
MAX_DESCRIPTORS: Final = 64
"""Most descriptors one frame can carry (SCM_MAX_FD is 253)."""
_MAX_QUEUED: Final = 1 << 14
"""Frames that may wait for a peer that does not read: more than one that does can come to ask for in a
turn of its loop (`PendingRequests`), or be answered."""
_MAX_QUEUED_FULL: Final = 1 << 12
"""Frames of the greatest length that may."""
_INT_BYTES: Final = array.array("i").itemsize
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)
# As plain integers: the enum's own operators take longer than the rest of a short read.
_NO_SIGNAL: Final = int(socket.MSG_NOSIGNAL)
_CLOSE_ON_EXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_CUT: Final = int(socket.MSG_CTRUNC)

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

    What is sent while the frames of one read are handled is gathered, and goes with one system call
    when they all are: who asked many things at once is woken once. So goes, of one that `asks`, what
    is `send_next`. What is sent at any other time goes at once.
    """

    def __init__(
        self,
        sock: socket.socket,
        limit_bytes: int,
        on_message: OnMessage,
        on_lost: OnLost,
        *,
        asks: bool = False,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._limit_bytes = limit_bytes
        self.send_bytes = limit_bytes
        """The longest payload that may be sent: as many bytes as the peer takes, once that is known."""
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._incoming = bytearray()
        """The beginning of a frame whose rest has not come yet."""
        self._descriptors: deque[int] = deque()
        self._gathering = False
        self._gathered: list[bytes] = []
        """Frames that go together. There are none while any are in `_outgoing`, which went before."""
        self._gathered_bytes = 0
        self._asks = asks
        self._in_turn = False
        """Whether this turn of the loop follows from a read of several frames."""
        self._begun = False
        """Whether something was sent in it."""
        self._outgoing: deque[tuple[bytes, Sequence[int]]] = deque()
        """Frames that wait for the peer to read."""
        self._outgoing_bytes = 0
        self.closed = False
        self._losing = False
        self._loop.add_reader(self._fd, self._readable)

    # --- sending --------------------------------------------------------------------------------

    def send(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one frame now, or as soon as the peer reads. Descriptors stay the caller's to close."""
        if self.closed:
            return
        if len(payload) > self.send_bytes or len(descriptors) > MAX_DESCRIPTORS:
            raise ValueError(f"a frame of {len(payload)} bytes is over the limit")
        frame = _pack_header(_MAGIC, VERSION, len(descriptors), len(payload)) + payload
        if self._outgoing:
            self._queue(frame, descriptors)
        elif self._gathering and not descriptors:
            self._gather(frame)
        else:
            if self._gathered:
                self._flush()  # what was said before comes before
            self._send_now(frame, descriptors)

    def send_next(self, payload: bytes) -> None:
        """Send one frame that asks for what only this loop waits for.

        Where several answers came at once, those who had them are about to ask again, in one turn of
        the loop, until whose end nobody can take an answer. The first of what they ask goes at once, so
        that the peer has something to do, the others together when the turn ends.
        """
        gathering, self._gathering = self._gathering, self._gathering or self._begun
        try:
            self.send(payload)
        finally:
            self._gathering = gathering
        self._begun = self._in_turn

    def _gather(self, frame: bytes) -> None:
        self._gathered.append(frame)
        self._gathered_bytes += len(frame)
        if self._gathered_bytes >= _GATHER_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Send what was gathered, as one; what the peer has no room for waits frame by frame."""
        frames, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if len(frames) == 1:
            self._send_now(frames[0], ())
            return
        sent = self._send_some(b"".join(frames), ())
        for frame in frames:
            if sent >= len(frame):
                sent -= len(frame)
            else:
                self._wait_to_send(frame[sent:], ())
                sent = 0

    def _send_now(self, frame: bytes, descriptors: Sequence[int]) -> None:
        if self._outgoing or self.closed:  # what came before it did not go, or was too much
            self._wait_to_send(frame, descriptors)
            return
        sent = self._send_some(frame, descriptors)
        if sent < len(frame):
            self._wait_to_send(frame[sent:], () if sent else descriptors)

    def _wait_to_send(self, frame: bytes, descriptors: Sequence[int]) -> None:
        if self.closed:
            return
        if not self._outgoing:
            self._loop.add_writer(self._fd, self._writable)
        self._queue(frame, descriptors)

    def _queue(self, frame: bytes, descriptors: Sequence[int]) -> None:
        self._outgoing_bytes += len(frame)
        if (
            len(self._outgoing) >= _MAX_QUEUED
            or self._outgoing_bytes > _MAX_QUEUED_FULL * self._limit_bytes
        ):
            unread = f"{len(self._outgoing)} messages of {self._outgoing_bytes} bytes"
            self._lose(ProtocolError(f"the peer left {unread} unread"))
            return
        # The frame's own: the caller may close its descriptors before the peer reads.
        self._outgoing.append((frame, [os.dup(fd) for fd in descriptors]))

    def _send_some(self, data: bytes, descriptors: Sequence[int]) -> int:
        try:
            if not descriptors:
                return self._sock.send(data, _NO_SIGNAL)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
            return self._sock.sendmsg([data], [rights], _NO_SIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            # The reader side meets the same end and reports it, once, in its own turn.
            return len(data)

    def _writable(self) -> None:
        while self._outgoing:
            frame, descriptors = self._outgoing[0]
            sent = self._send_some(frame, descriptors)
            self._outgoing_bytes -= sent
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
                _RECEIVE_BYTES, _ANCILLARY_BYTES, _CLOSE_ON_EXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if ancillary:
            self._take_descriptors(ancillary)
        if flags & _CUT or len(self._descriptors) > 2 * MAX_DESCRIPTORS:
            self._lose(ProtocolError("more descriptors than a message may carry"))
        elif not data:
            cut = ProtocolError("the peer hung up in the middle of a message")
            self._lose(cut if self._incoming else None)
        else:
            self._take(data)

    def _take_descriptors(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights = array.array("i")
                rights.frombytes(content[: len(content) - len(content) % _INT_BYTES])
                self._descriptors.extend(rights)

    def _take(self, data: bytes) -> None:
        """Handle the frames that are whole now, and keep the beginning of the next."""
        incoming = self._incoming
        if incoming:
            incoming += data
        whole = incoming or data  # nearly always what came, as it came: it needs no copy
        done = 0
        try:
            while done < len(whole) and not (self.closed or self._losing):
                end = self._frame_end(whole, done)
                if not end:
                    break
                payload, count = bytes(whole[done + _HEADER_BYTES : end]), whole[done + _COUNT_AT]
                fds = [self._descriptors.popleft() for _ in range(count)] if count else []
                done = end
                # What answers the only one has nothing to wait for.
                self._gathering = self._gathering or done < len(whole)
                self._on_message(payload, fds)
        except ProtocolError as error:
            self._lose(error)
        finally:
            if self._gathering and self._asks and not self._in_turn:
                self._in_turn = True
                self._loop.call_soon(self._end_turn)  # after all whom these frames woke
            self._gathering = False
            if incoming:
                del incoming[:done]
            elif done < len(data):
                incoming += data[done:]
            if self._gathered:
                self._flush()

    def _end_turn(self) -> None:
        self._in_turn = self._begun = False
        if self._gathered and not self.closed:
            self._flush()

    def _frame_end(self, data: bytes | bytearray, start: int) -> int:
        """Return where the frame at `start` ends; 0 if it is not whole.

        A header is checked at once: a peer of another kind or version is found out by its first
        bytes.
        """
        left = len(data) - start
        if left < _HEADER_BYTES:
            if data[start : start + 2] != _MAGIC[:left]:
                raise ProtocolError(_NOT_OURS)
            return 0
        magic, version, count, length_bytes = _unpack_header(data, start)
        if magic != _MAGIC:
            raise ProtocolError(_NOT_OURS)
        if version != VERSION:
            raise ProtocolError(f"the peer speaks version {version}, this is version {VERSION}")
        if length_bytes > self._limit_bytes or count > MAX_DESCRIPTORS:
            raise ProtocolError(f"a frame of {length_bytes} bytes is over {self._limit_bytes}")
        if left < _HEADER_BYTES + length_bytes:
            return 0
        if count > len(self._descriptors):
            raise ProtocolError("a message came without its descriptors")
        return start + _HEADER_BYTES + int(length_bytes)

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
        """Close the socket, and the descriptors that came and were not taken. Idempotent.

        What was sent goes out first, as far as the peer has room for it.
        """
        if self.closed:
            return
        self.closed = True
        if self._gathered:
            self._send_some(b"".join(self._gathered), ())
            self._gathered.clear()
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
        self._gathered.clear()
        self._drop_descriptors()
        self._sock.close()
