"""The owner's end: who may attach, what became of each session, and the one who pays for the dead.

A session ends in one of two ways: it says goodbye, or its process dies (its pidfd fires). A socket
that closes while the process lives is neither: the process may still be reading the slab, so the
session is *quarantined* and its holds stand until the pidfd fires.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from featcache import events
from featcache.control import endpoint as endpoints
from featcache.control.channel import Channel, close_all
from featcache.control.credentials import PidWatch, check_uid, peer_pid
from featcache.control.dispatch import Dispatcher, RequestHandlers
from featcache.control.messages import (
    MAX_SEGMENTS,
    VERSION,
    Closing,
    Farewell,
    Goodbye,
    Hello,
    Note,
    ProtocolError,
    Refused,
    Request,
    Segments,
    TailUnmapped,
    UnmapTail,
    decode_from_client,
    encode,
    is_request,
)
from featcache.control.peer import Peer, Segment, SessionHost, SessionState
from featcache.errors import AttachRefused, FeatcacheError
from featcache.settings import Settings

_ACTIVE = SessionState.ACTIVE  # members of an enum are slow to look up
_QUARANTINE_EVENT_S = 0.1


class Server:
    """Listens, greets, and keeps the sessions. Everything runs in the loop, nothing blocks."""

    def __init__(
        self,
        sock: socket.socket,
        path: str,
        settings: Settings,
        host: SessionHost,
        handlers: RequestHandlers,
    ) -> None:
        self.endpoint = path
        self._requests = Dispatcher(handlers)
        self._sock = sock
        self._settings = settings
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._numbers = 0
        self._greeting: set[Peer] = set()
        self.sessions: dict[int, Peer] = {}
        """ACTIVE and QUARANTINED sessions by number."""
        self._retiring: dict[int, asyncio.Future[None]] = {}
        self._refusals = events.Throttle(settings.log_interval, burst=16)
        self._accept_retry: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock.fileno(), self._accept)

    # --- arrivals -------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                raise
            self._pause_accepting(error)
            return
        self._numbers += 1
        session = Peer(self._numbers, 0)
        try:
            session.pid = peer_pid(sock)
            check_uid(sock)
            if len(self._greeting) >= self._settings.sessions:
                raise AttachRefused("too many peers are at the door already")
        except (AttachRefused, OSError) as error:
            # Not answered: who is not of this user gets nothing to read.
            sock.close()
            self._report_refusal(session, str(error))
            return
        self._greeting.add(session)
        session.channel = Channel(
            sock,
            self._settings.message_bytes,
            lambda payload, fds: self._on_message(session, payload, fds),
            lambda error: self._on_lost(session, error),
        )
        session.deadline = self._loop.call_later(
            self._settings.attach_timeout, self._turn_away, session, "it said nothing in time"
        )

    def _pause_accepting(self, error: OSError) -> None:
        """Stop listening for a moment: out of descriptors, accept would fail again at once, forever."""
        self._loop.remove_reader(self._sock.fileno())
        self._accept_retry = self._loop.call_later(1.0, self._resume_accepting)
        self._report_refusal(Peer(0, 0), f"can't accept: {error.strerror}")

    def _resume_accepting(self) -> None:
        self._accept_retry = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _on_message(self, session: Peer, payload: bytes, fds: list[int]) -> None:
        try:
            message = decode_from_client(payload)
            if session.state is _ACTIVE and is_request(message):
                self._requests.take(session, message)
            elif isinstance(message, Hello):
                taken, fds = fds, []
                self._greet(session, message, taken)
            elif session.state is not _ACTIVE:
                raise ProtocolError("the first message must be a hello")
            else:
                self._take(session, message)
        finally:
            if fds:
                close_all(fds)

    def _take(self, session: Peer, message: Goodbye | TailUnmapped | Request | Note) -> None:
        if isinstance(message, Goodbye):
            self._goodbye(session)
        elif isinstance(message, TailUnmapped):
            session.layout = max(session.layout, message.layout)
            self._settle_retired()
        else:
            self._requests.take(session, message)

    def _greet(self, session: Peer, hello: Hello, fds: list[int]) -> None:
        if session.state is not SessionState.GREETING:
            close_all(fds)
            raise ProtocolError("a second hello")
        if len(fds) != 1:
            close_all(fds)
            raise ProtocolError("a hello carries the sender's pidfd")
        session.watch = PidWatch(fds[0], lambda: self._on_death(session))
        session.name = hello.name
        try:
            self._check(hello)
            welcome, descriptors = self._host.admit(session)
        except (FeatcacheError, OSError) as error:
            self._turn_away(session, str(error))
            return
        self._stop_greeting(session)
        session.state = SessionState.ACTIVE
        self.sessions[session.number] = session
        assert session.channel is not None, "a greeting session has its channel"
        session.layout = welcome.layout
        session.channel.send_bytes = min(self._settings.message_bytes, hello.message_bytes)
        session.channel.send(encode(welcome), descriptors)
        self._send_segments(session, self._host.segments())
        self._emit(events.ReaderAttached, session)

    def _check(self, hello: Hello) -> None:
        if hello.version != VERSION:
            raise AttachRefused(f"the client speaks version {hello.version}, the owner {VERSION}")
        if len(self.sessions) >= self._settings.sessions:
            raise AttachRefused(
                f"all {self._settings.sessions} sessions are taken: raise Settings.sessions"
            )
        if hello.name is not None:
            for other in self.sessions.values():
                if other.name == hello.name:
                    raise AttachRefused(f"a session named {hello.name!r} is attached already")

    def _turn_away(self, session: Peer, reason: str) -> None:
        self._report_refusal(session, reason)
        if session.channel is not None:
            session.channel.send(encode(Refused(reason[:1000])))
        self._end(session)

    def _report_refusal(self, session: Peer, reason: str) -> None:
        unlogged = self._refusals.pass_(self._loop.time())
        if unlogged is not None:
            events.emit(
                events.PeerRefused(
                    pool=self._host.pool_name, reason=reason, pid=session.pid, unlogged=unlogged
                )
            )

    # --- the slab's size --------------------------------------------------------------------------

    def announce(self, segments: Sequence[Segment]) -> None:
        """Send every session the segments that were made."""
        for session in self.sessions.values():
            self._send_segments(session, segments)

    def _send_segments(self, session: Peer, segments: Sequence[Segment]) -> None:
        assert session.channel is not None, "an active session has its channel"
        for first in range(0, len(segments), MAX_SEGMENTS):
            some = segments[first : first + MAX_SEGMENTS]
            sizes = [segment.size_bytes for segment in some]
            session.channel.send(
                encode(Segments(some[0].start_bytes, sizes)), [segment.fd for segment in some]
            )

    def retire(self, layout: int, end_bytes: int, timeout_s: float) -> Coroutine[Any, Any, int]:
        """Have every session unmap the segments from `end_bytes` on: it is sent when this returns.

        Awaiting what it returns tells how many had not said within `timeout_s` that they have; they
        keep the memory.
        """
        for session in self.sessions.values():
            assert session.channel is not None, "an active session has its channel"
            session.channel.send(encode(UnmapTail(layout, end_bytes)))
        return self._await_retired(layout, timeout_s)

    async def _await_retired(self, layout: int, timeout_s: float) -> int:
        done = self._retiring[layout] = self._loop.create_future()
        self._settle_retired()
        await asyncio.wait([done], timeout=timeout_s)
        del self._retiring[layout]
        return self._behind(layout)

    def _behind(self, layout: int) -> int:
        return sum(session.layout < layout for session in self.sessions.values())

    def _settle_retired(self) -> None:
        for layout, done in self._retiring.items():
            if not done.done() and not self._behind(layout):
                done.set_result(None)

    # --- departures -----------------------------------------------------------------------------

    def _goodbye(self, session: Peer) -> None:
        self._host.end(session, died=False)
        assert session.channel is not None, "an active session has its channel"
        session.channel.send(encode(Farewell()))
        self._end(session)
        self._emit(events.ReaderLeft, session)

    def _on_lost(self, session: Peer, error: Exception | None) -> None:
        """Take note that the socket is gone, which says nothing about the process."""
        reason = "its socket closed" if error is None else str(error)
        if session.state is SessionState.GREETING:
            if error is not None:  # who only looks whether somebody listens is no event
                self._turn_away(session, reason)
            self._end(session)
        elif session.state is SessionState.ACTIVE:
            assert session.watch is not None, "an active session has its watch"
            if session.watch.dead:
                self._on_death(session)
                return
            session.state = SessionState.QUARANTINED
            session.cancel_tasks()
            self._host.quarantine(session)
            # A process that is killed loses its sockets a moment before its pidfd fires: only what
            # lasts is worth a warning.
            session.deadline = self._loop.call_later(
                _QUARANTINE_EVENT_S, self._report_quarantine, session, reason
            )

    def _report_quarantine(self, session: Peer, reason: str) -> None:
        events.emit(
            events.ReaderQuarantined(
                pool=self._host.pool_name,
                session=session.number,
                reader=session.name,
                pid=session.pid,
                reason=reason,
            )
        )

    def _on_death(self, session: Peer) -> None:
        if session.state not in {SessionState.ACTIVE, SessionState.QUARANTINED}:
            self._end(session)
            return
        paid = self._host.end(session, died=True)
        self._end(session)
        events.emit(
            events.ReaderLost(
                pool=self._host.pool_name,
                session=session.number,
                reader=session.name,
                pid=session.pid,
                reads_paid=paid,
            )
        )

    def _end(self, session: Peer) -> None:
        session.state = SessionState.ENDED
        self._stop_greeting(session)
        self.sessions.pop(session.number, None)
        session.cancel_tasks()
        self._settle_retired()
        if session.channel is not None:
            session.channel.close()
        if session.watch is not None:
            session.watch.close()

    def _stop_greeting(self, session: Peer) -> None:
        self._greeting.discard(session)
        if session.deadline is not None:
            session.deadline.cancel()
            session.deadline = None

    def _emit(
        self, kind: Callable[..., events.ReaderAttached | events.ReaderLeft], session: Peer
    ) -> None:
        pool = self._host.pool_name
        events.emit(kind(pool=pool, session=session.number, reader=session.name, pid=session.pid))

    # --- the owner's own end --------------------------------------------------------------------

    def close(self) -> None:
        """Tell every session, close everything, and remove the socket's file."""
        if self._accept_retry is not None:
            self._accept_retry.cancel()
        self._loop.remove_reader(self._sock.fileno())
        for session in [*self.sessions.values(), *self._greeting]:
            if session.channel is not None:
                session.channel.send(encode(Closing()))
            self._end(session)
        self._sock.close()
        endpoints.unlink(self.endpoint)

    def forget(self) -> None:
        """Drop descriptors in a forked child; the parent's sessions and socket file stay."""
        for session in [*self.sessions.values(), *self._greeting]:
            if session.channel is not None:
                session.channel.forget()
            if session.watch is not None:
                session.watch.forget()
        self._sock.close()
