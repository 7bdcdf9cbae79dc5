"""Frames and file descriptors over a Unix stream socket, driven by the event loop's readiness.

Both directions are bounded: a frame longer than the limit, or a peer that leaves too much unread, ends
the channel.
"""

import array
import asyncio
import enum
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from featcache.control.descriptors import (
    ANCILLARY_BYTES,
    MAX_DESCRIPTORS,
    Received,
    close_all,
    duplicate_all,
)
from featcache.control.frames import (
    COUNT_AT,
    HEADER_BYTES,
    MAGIC,
    Batching,
    frame_end,
    pack_header,
)
from featcache.control.hangup import hang_up, has_hung_up, is_readable
from featcache.control.messages import VERSION, ProtocolError, SocketFailed
from featcache.control.turns import FRAME_UNITS, QUANTUM_UNITS, turn_of

_RECEIVE_BYTES: Final = 64 << 10
_GATHER_BYTES: Final = 16 << 10
"""Flush threshold of the write batch: the peer can begin to read while the rest is gathered."""
_MAX_QUEUED: Final = 1 << 14
"""Frames that may wait for the peer to read: more than the requests that a peer which does read can
have unanswered (`PendingRequests`), and their answers."""
_MAX_QUEUED_FULL: Final = 1 << 12
"""Frames of the greatest length that may wait: the same bound in bytes."""
# As plain integers: the enum's own operators take longer than the rest of a short read.
_NO_SIGNAL: Final = int(socket.MSG_NOSIGNAL)
_CLOSE_ON_EXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_CUT: Final = int(socket.MSG_CTRUNC)

OnMessage = Callable[[bytes, list[int]], None]
OnLost = Callable[[Exception | None], None]


class ChannelState(enum.Enum):
    """The life of a channel.

    ::

        OPEN ──→ CLOSED     `close`, `forget`, or the peer is gone
        OPEN ──→ FAILING ──→ CLOSED     the peer broke the protocol

    FAILING lasts while `on_lost` runs: a last frame, which names the error, can still be sent, but
    nothing more is read.
    """

    OPEN = "open"
    FAILING = "failing"
    CLOSED = "closed"


# Members of an enum are slow to look up, and these are compared on every frame.
_OPEN = ChannelState.OPEN
_CLOSED = ChannelState.CLOSED
_NONE = Batching.NONE
_READ = Batching.READ
_TURN = Batching.TURN
_TURN_BEGUN = Batching.TURN_BEGUN


class Channel:
    """One end of a control connection.

    `on_message` is called for each frame with its payload and its descriptors, which it then owns; one
    that this process had no room for is `NO_DESCRIPTOR`. `on_lost` is called once, when the peer is gone
    (None) or misbehaved (the error), never after `close`; with a `ProtocolError` it is called before the
    channel closes. Both run in the loop and must not block.

    Frames that the loop's turn has no units left for (`control.turns`) wait, and nothing more is read.

    Frames that are sent while those of one read are handled go with one system call, so a peer with many
    requests wakes once for their answers; a `requester` batches what it sends by `send_next` (`Batching`).
    """

    def __init__(
        self,
        sock: socket.socket,
        limit_bytes: int,
        on_message: OnMessage,
        on_lost: OnLost,
        *,
        requester: bool = False,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._limit_bytes = limit_bytes
        self.send_bytes = limit_bytes
        """The longest payload that may be sent: the peer's own limit, once it is known."""
        self.on_message = on_message
        self.on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._incoming = bytearray()
        """The beginning of a frame whose rest is still to come."""
        self._descriptors = Received()
        self._paused = False
        self._requester = requester
        self._batching = _NONE
        self._gathered: list[bytes] = []
        """The write batch. Empty while frames are in `_outgoing`, which were sent before."""
        self._gathered_bytes = 0
        self._outgoing: deque[tuple[bytes, Sequence[int]]] = deque()
        """Frames that the socket has no room for, with descriptors of their own."""
        self._outgoing_bytes = 0
        self.state = _OPEN
        self._loop.add_reader(self._fd, self._readable)

    # --- sending --------------------------------------------------------------------------------

    def send(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one frame now, or as soon as the peer reads. The caller closes the descriptors."""
        if self.state is _CLOSED:
            return
        if len(payload) > self.send_bytes or len(descriptors) > MAX_DESCRIPTORS:
            raise ValueError(f"a frame of {len(payload)} bytes is over the limit")
        frame = pack_header(MAGIC, VERSION, len(descriptors), len(payload)) + payload
        # Frames arrive in the order of these calls, on which peers rely: segments come before the refs
        # that lie there, a publish before the answers to those that waited for it. So nothing overtakes
        # frames that are queued or gathered.
        if self._outgoing:
            self._queue(frame, descriptors)
        elif self._batching is _READ and not descriptors:
            self._gather(frame)
        else:
            if self._gathered:
                self._flush()
            self._send_now(frame, descriptors)

    def send_next(self, payload: bytes) -> None:
        """Send one frame that requests what only a task of this loop waits for (`Batching`).

        Others may wait for the effect of another frame: `send` it, which is never later than the call.
        """
        batching = self._batching
        if batching is _TURN_BEGUN:
            self._batching = _READ  # for `send`, which then gathers it
            try:
                self.send(payload)
            finally:
                self._batching = _TURN_BEGUN
        else:
            self.send(payload)
            if batching is _TURN:
                self._batching = _TURN_BEGUN

    def _gather(self, frame: bytes) -> None:
        self._gathered.append(frame)
        self._gathered_bytes += len(frame)
        if self._gathered_bytes >= _GATHER_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Send the batch with one call; frames that the socket has no room for are queued one by one."""
        frames, self._gathered, self._gathered_bytes = self._gathered, [], 0
        sent = self._send_some(b"".join(frames), ())
        for frame in frames:
            if sent >= len(frame):
                sent -= len(frame)
            else:
                self._wait_to_send(frame[sent:], ())
                sent = 0

    def _send_now(self, frame: bytes, descriptors: Sequence[int]) -> None:
        # A flush just before may have queued its frames, or ended the channel by their number.
        if self._outgoing or self.state is _CLOSED:
            self._wait_to_send(frame, descriptors)
            return
        sent = self._send_some(frame, descriptors)
        if sent < len(frame):
            self._wait_to_send(frame[sent:], () if sent else descriptors)

    def _wait_to_send(self, frame: bytes, descriptors: Sequence[int]) -> None:
        if self.state is _CLOSED:
            return
        if not self._outgoing:
            try:
                self._loop.add_writer(self._fd, self._writable)
            except OSError as error:
                self._lose(SocketFailed("the socket can't be watched", error))
                return
        self._queue(frame, descriptors)

    def _queue(self, frame: bytes, descriptors: Sequence[int]) -> None:
        self._outgoing_bytes += len(frame)
        too_long = self._outgoing_bytes > _MAX_QUEUED_FULL * self._limit_bytes
        if too_long or len(self._outgoing) >= _MAX_QUEUED:
            unread = f"{len(self._outgoing)} messages of {self._outgoing_bytes} bytes"
            self._lose(ProtocolError(f"the peer left {unread} unread"))
            return
        try:  # duplicates: the caller may close its descriptors before the frame goes
            self._outgoing.append((frame, duplicate_all(descriptors)))
        except OSError as error:
            self._lose(SocketFailed("a message with descriptors can't wait", error))

    def _send_some(self, data: bytes, descriptors: Sequence[int]) -> int:
        try:
            if not descriptors:
                return self._sock.send(data, _NO_SIGNAL)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
            return self._sock.sendmsg([data], [rights], _NO_SIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            # The next read meets the same end and reports it, once, outside the sender's call.
            if not isinstance(error, ConnectionError):  # not that of the peer
                failed = SocketFailed("a message can't be sent", error)
                self._loop.call_soon(self._lose, failed)
            return len(data)

    def _writable(self) -> None:
        while self._outgoing:
            frame, descriptors = self._outgoing[0]
            sent = self._send_some(frame, descriptors)
            self._outgoing_bytes -= sent
            if sent:  # descriptors travel with a frame's first byte
                close_all(descriptors)
                descriptors = ()
            if sent < len(frame):
                self._outgoing[0] = (frame[sent:], descriptors)
                return
            self._outgoing.popleft()
        self._loop.remove_writer(self._fd)

    # --- receiving ------------------------------------------------------------------------------

    def _pause(self) -> None:
        """Go on in a later turn, and read nothing more until then."""
        if not self._paused:
            self._paused = True
            self._loop.remove_reader(self._fd)
            self._turn.later(self._go_on)

    def _go_on(self) -> bool:
        """Handle frames that have waited; return whether there are more."""
        if self.state is not _OPEN:
            return False
        until = max(0, self._turn.left - QUANTUM_UNITS)
        if self._incoming and self._take(b"", until) and self.state is _OPEN:
            return True
        self._paused = False
        if self.state is _OPEN:
            self._loop.add_reader(self._fd, self._readable)
        return False

    def _readable(self) -> None:
        if self._turn.left <= 0 or (self._receive(0) and self.state is _OPEN):
            self._pause()

    def read_rest(self, until: int) -> bool:
        """Handle what has come by now; True if later turns go on, as this has `until` units left."""
        while not (self._incoming and self._take(b"", until)):
            if self.state is not _OPEN or not is_readable(self._fd):
                return False
            if self._receive(until):
                break
        if more := self.state is _OPEN:
            self._pause()  # what is kept is in no socket any more: no readiness would come for it
        return more

    def _receive(self, until: int) -> bool:
        """Read once; return whether whole frames are kept for later (`_take`)."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _RECEIVE_BYTES, ANCILLARY_BYTES, _CLOSE_ON_EXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            is_end = isinstance(error, ConnectionError)
            self._lose(error if is_end else SocketFailed("messages can't be received", error))
            return False
        if ancillary or flags & _CUT:
            try:
                self._descriptors.add(ancillary, cut=bool(flags & _CUT))
            except ProtocolError as error:
                self._lose(error)
                return False
        if not data:
            cut = ProtocolError("the peer hung up in the middle of a message")
            self._lose(cut if self._incoming else None)
            return False
        return self._take(data, until)

    def _take(self, data: bytes, until: int) -> bool:
        """Handle the frames that are whole, and keep the beginning of the next.

        Returns whether some are kept that are whole: the turn has `until` units left by then.
        """
        incoming, turn, is_more = self._incoming, self._turn, False
        if incoming:
            incoming += data
        whole = incoming or data  # nearly always just the frames of this read: no copy
        done, found = 0, self._batching
        try:
            while done < len(whole) and self.state is _OPEN:
                if not (end := frame_end(whole, done, self._limit_bytes, self._descriptors)):
                    break
                if turn.left <= until:
                    is_more = True
                    break
                turn.left -= FRAME_UNITS
                payload, count = bytes(whole[done + HEADER_BYTES : end]), whole[done + COUNT_AT]
                fds = self._descriptors.take(count) if count else []
                done = end
                if done < len(whole):  # the answer to a frame that came alone need not wait
                    self._batching = _READ
                self.on_message(payload, fds)
        except ProtocolError as error:
            self._lose(error)
        finally:
            if incoming:
                del incoming[:done]
            elif done < len(data):
                incoming += data[done:]
            self._end_read(found)
        return is_more

    def _end_read(self, found: Batching) -> None:
        """Send what was gathered; go on in the state that the read found."""
        if self._batching is _READ:
            self._batching = found
            if found is _NONE and self._requester:
                self._batching = _TURN
                # Behind the wake-ups of all tasks that these frames answered, which are scheduled.
                self._loop.call_soon(self._end_turn)
        if self._gathered:
            self._flush()

    def _end_turn(self) -> None:
        self._batching = _NONE
        if self._gathered and self.state is not _CLOSED:
            self._flush()

    # --- the end --------------------------------------------------------------------------------

    def _lose(self, error: Exception | None) -> None:
        if self.state is not _OPEN:
            return
        if isinstance(error, ProtocolError):
            self.state = ChannelState.FAILING
            self.on_lost(error)
            self.close()
        else:
            # Closed first: there is no peer for a last frame, and `on_lost` finds its state as it stays.
            self.close()
            self.on_lost(error)

    def close(self) -> None:
        """Close the socket and the descriptors that nobody took. Idempotent."""
        if self.state is _CLOSED:
            return
        self.state = _CLOSED
        if self._gathered:  # they go out first, as far as the socket has room for them
            self._send_some(b"".join(self._gathered), ())
            self._gathered.clear()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._drop_descriptors()
        hang_up(self._sock)
        self._sock.close()

    @property
    def backlog(self) -> int:  # frames that the socket has no room for
        return len(self._outgoing)

    @property
    def hung_up(self) -> bool:
        """Whether the peer has, polled now."""
        return self.state is _CLOSED or has_hung_up(self._fd)

    def _drop_descriptors(self) -> None:
        close_all([each for _, descriptors in self._outgoing for each in descriptors])
        self._outgoing.clear()
        self._descriptors.close()

    def forget(self, *, hangs_up: bool = False) -> None:
        """Drop the socket in a forked child, whose copy of the loop must not be touched; or hang up."""
        if hangs_up:
            hang_up(self._sock)
        self.state = _CLOSED
        self._gathered.clear()
        self._drop_descriptors()
        self._sock.close()
