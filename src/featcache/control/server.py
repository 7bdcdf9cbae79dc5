"""The owner's end of the control connections: sessions admitted, their messages routed, their deaths.

A session ends in one of two ways: it says goodbye, or its process dies (its pidfd fires). A socket that
closes while the process lives is neither: the process may still be reading the slab, so the session is
*quarantined* and its holds stand until the pidfd fires (`SessionState`).
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from featcache import events
from featcache.control import messages
from featcache.control.channel import Channel
from featcache.control.credentials import PidWatch, check_uid, peer_pid
from featcache.control.descriptors import NO_DESCRIPTOR, close_all
from featcache.control.dispatch import Dispatcher, RequestHandlers
from featcache.control.endpoint import Listener
from featcache.control.messages import Hello, ProtocolError, decode_from_client, encode, is_request
from featcache.control.peer import Peer, Segment, SessionHost, SessionState
from featcache.control.posts import PostedNotes
from featcache.control.tails import Tails
from featcache.control.turns import ATTACH_UNITS, QUANTUM_UNITS, turn_of
from featcache.errors import OUT_OF_DESCRIPTORS, AttachRefused, FeatcacheError, explain
from featcache.settings import Settings

_ACTIVE = SessionState.ACTIVE  # members of an enum are slow to look up
_QUARANTINE_EVENT_S = 0.1
_ALL = -(1 << 30)  # of a turn's units that are left: whatever it takes
_ACCEPT_AGAIN_S = 1.0


class Server:
    """Accepts, greets and keeps the sessions. Everything runs in the loop, nothing blocks."""

    def __init__(
        self,
        listener: Listener,
        settings: Settings,
        host: SessionHost,
        handlers: RequestHandlers,
    ) -> None:
        self._listener = listener
        self._dispatcher = Dispatcher(handlers)
        self._sock = listener.sock
        self._settings = settings
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._numbers = 0
        self._greeting: set[Peer] = set()
        self.sessions: dict[int, Peer] = {}
        """ACTIVE and QUARANTINED sessions by number."""
        self.posts = PostedNotes(self._dispatcher, self.sessions, self._on_lost)
        self._tails = Tails(self.sessions)
        self.retire = self._tails.retire
        self._ended: list[Peer] = []
        """Those that were attached at `close`."""
        self._refusals = events.Throttle(settings.log_interval, burst=16)
        self._accept_retry: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    # --- arrivals -------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            self._pause_accepting(error)
            return
        self._numbers += 1
        peer = Peer(self._numbers, 0)
        try:
            peer.pid = peer_pid(sock)
            check_uid(sock)
            # Partials: a lambda would be a frame more for each message.
            calls = partial(self._on_message, peer), partial(self._on_lost, peer)
            peer.channel = Channel(sock, self._settings.message_bytes, *calls)
        except (AttachRefused, OSError) as error:
            # Not answered: another user's process is sent nothing.
            sock.close()
            self._report_refusal(peer, explain(error))
            return
        if len(self._greeting) >= (most := self._settings.sessions):
            crowd = f"{most} others are attaching, as many as Settings.sessions: try again"
            self._refuse(peer, crowd)
            return
        self._greeting.add(peer)
        peer.deadline = self._loop.call_later(
            self._settings.attach_timeout, self._refuse, peer, "no Hello within attach_timeout"
        )

    def hold(self) -> None:
        """Accept nobody until `resume`: those who connect meanwhile wait in the socket's backlog."""
        self._loop.remove_reader(self._sock.fileno())

    def resume(self) -> None:
        """Accept again."""
        self._accept_retry = None
        try:
            self._loop.add_reader(self._sock.fileno(), self._accept)
        except OSError as error:
            self._pause_accepting(error)

    def _pause_accepting(self, error: OSError) -> None:
        """Stop accepting for a second: out of descriptors, accept would fail in every turn of the loop."""
        self._loop.remove_reader(self._sock.fileno())
        self._accept_retry = self._loop.call_later(_ACCEPT_AGAIN_S, self.resume)
        self._report_refusal(Peer(0, 0), f"can't accept: {explain(error)}")

    def _on_message(self, peer: Peer, payload: bytes, fds: list[int]) -> None:
        try:
            message = decode_from_client(payload)
            if peer.state is _ACTIVE:
                if peer.posts:  # they come first: they were posted before this was sent
                    self.posts.take(peer)
                if is_request(message):
                    self._dispatcher.answer(peer, message)
                else:
                    self._take(peer, message)
            elif peer.state is SessionState.SETTLING:
                pass  # it said goodbye
            elif isinstance(message, Hello):
                taken, fds = fds, []
                self._greet(peer, message, taken)
            else:
                raise ProtocolError("the first message must be a Hello")
        finally:
            if fds:  # of a message that carries none
                close_all(fds)

    def _take(self, peer: Peer, message: messages.FromClient) -> None:
        """Take a message of an active session that is no request."""
        if isinstance(message, messages.Note):
            self._dispatcher.note(peer, message)
        elif isinstance(message, messages.TailUnmapped):
            peer.shrink_epoch = max(peer.shrink_epoch, message.shrink_epoch)
            self._tails.settle()
        elif isinstance(message, messages.Goodbye):
            self._goodbye(peer)
        else:
            raise ProtocolError(f"a second {type(message).__name__}")

    def _greet(self, peer: Peer, hello: Hello, fds: list[int]) -> None:
        if len(fds) != 1:
            close_all(fds)
            raise ProtocolError("a Hello carries one descriptor, the sender's pidfd")
        peer.name = hello.name
        try:
            if fds[0] == NO_DESCRIPTOR:
                raise AttachRefused(f"the owner is {OUT_OF_DESCRIPTORS} of its process")
            peer.watch = PidWatch(fds[0], lambda: self._on_death(peer))
            self._end_those_left(peer)
        except (FeatcacheError, OSError) as error:
            self._refuse(peer, explain(error))
            return
        if self._settles(hello.name):  # the session that had the name before is at its end
            self._turn.later(partial(self._greet_again, peer, hello))
        else:
            self._admit(peer, hello)

    def _settles(self, name: str | None) -> bool:
        settling = SessionState.SETTLING
        return name is not None and any(
            peer.name == name and peer.state is settling for peer in self.sessions.values()
        )

    def _greet_again(self, peer: Peer, hello: Hello) -> bool:
        """Greet a session once its name is free; return whether that is yet to come."""
        if peer.state is not SessionState.GREETING:
            return False
        if self._settles(hello.name):
            self._turn.left -= QUANTUM_UNITS
            return True
        self._admit(peer, hello)
        return False

    def _admit(self, peer: Peer, hello: Hello) -> None:
        self._turn.left -= ATTACH_UNITS
        try:
            before = self._check(peer, hello)
            welcome, descriptors = self._host.admit(peer)
        except (FeatcacheError, OSError) as error:
            self._refuse(peer, explain(error))
            return
        if before is not None:
            before.name_passed_on = True
        self._stop_greeting(peer)
        peer.state = _ACTIVE
        # From `admit` to the segments is one turn of the loop, so no change of the slab's size comes
        # between: the session hears of each, after its welcome.
        self.sessions[peer.number] = peer
        peer.shrink_epoch = welcome.shrink_epoch
        peer.channel.send_bytes = min(self._settings.message_bytes, hello.message_bytes)
        peer.channel.send(encode(welcome), descriptors)
        self._send_segments(peer, self._host.segments())
        self._emit(events.ReaderAttached, peer)

    def _check(self, newcomer: Peer, hello: Hello) -> Peer | None:
        """Return the session that passes its name on to this one, if one does.

        It must be the same process's, and say by its page that it leaves; what it holds stays held.
        """
        if hello.version != messages.VERSION:
            raise AttachRefused(
                f"the client speaks version {hello.version}, the owner {messages.VERSION}"
            )
        settling = SessionState.SETTLING
        if sum(peer.state is not settling for peer in self.sessions.values()) >= (
            self._settings.sessions
        ):
            taken = f"all {self._settings.sessions} sessions are taken"
            raise AttachRefused(f"{taken}: raise Settings.sessions")
        if hello.name is None:
            return None
        for peer in self.sessions.values():
            if peer.name == hello.name and not peer.name_passed_on:
                if self._host.is_leaving(peer) and peer.is_process_of(newcomer):
                    return peer
                raise AttachRefused(f"a session named {hello.name!r} is attached already")
        return None

    def _end_those_left(self, newcomer: Peer) -> None:
        """End the sessions that hold nothing and lost their socket, before a newcomer is counted.

        What was abandoned ends with a word of its process, which the newcomer is; or as others need
        its place. Until then a death would pay what its name owes.
        """
        full = len(self.sessions) >= self._settings.sessions
        for peer in list(self.sessions.values()):
            over = self._host.is_abandoned(peer) and peer.gone
            if over and (self._host.has_left(peer) or full or peer.is_process_of(newcomer)):
                peer.channel.read_rest(_ALL)  # puts that it had told of as its loop was closed
                self._goodbye(peer)

    def _refuse(self, peer: Peer, reason: str) -> None:
        self._report_refusal(peer, reason)
        peer.channel.send(encode(messages.Refused(reason[:1000])))
        self._end(peer)

    def _report_refusal(self, peer: Peer, reason: str) -> None:
        unlogged = self._refusals.pass_(self._loop.time())
        if unlogged is not None:
            events.emit(
                events.PeerRefused(
                    pool=self._host.pool_name, reason=reason, pid=peer.pid, unlogged=unlogged
                )
            )

    # --- the slab's size --------------------------------------------------------------------------

    def announce(self, segments: Sequence[Segment]) -> None:
        for peer in self.sessions.values():
            self._send_segments(peer, segments)

    def _send_segments(self, peer: Peer, segments: Sequence[Segment]) -> None:
        for first in range(0, len(segments), messages.MAX_SEGMENTS):
            starts, sizes, fds = zip(*segments[first : first + messages.MAX_SEGMENTS], strict=True)
            peer.channel.send(encode(messages.Segments(starts[0], list(sizes))), fds)

    # --- departures -----------------------------------------------------------------------------

    def _goodbye(self, peer: Peer) -> None:
        if peer.state in {SessionState.SETTLING, SessionState.ENDED}:  # by word or death already
            return
        self.posts.take_rest(peer)
        peer.state = SessionState.SETTLING

        # Folded first: once the client has its Farewell, whatever it paid is counted.
        def folded(_: int) -> None:
            peer.channel.send(encode(messages.Farewell()))
            self._end(peer)
            self._emit(events.ReaderLeft, peer)

        self._host.end(peer, folded, died=False)

    def _on_lost(self, peer: Peer, error: Exception | None) -> None:
        """Quarantine a session whose socket is gone: its process may live and be reading."""
        reason = "its socket closed" if error is None else str(error)
        if peer.state is SessionState.GREETING:
            if error is not None:  # a mere probe whether the endpoint is live is no event
                self._refuse(peer, reason)
            self._end(peer)
        elif peer.state is SessionState.ACTIVE:
            assert peer.watch is not None, "an active session has its watch"
            if self._host.has_left(peer):  # its goodbye found no room in the socket
                self._goodbye(peer)
                return
            if peer.watch.dead:
                self._on_death(peer)
                return
            self.posts.take_rest(peer)
            peer.state = SessionState.QUARANTINED
            self._turn.do_all(peer.cancel_tasks(self._turn))
            self._host.quarantine(peer)
            # A process that is killed loses its sockets a moment before its pidfd fires: only a
            # quarantine that lasts is worth a warning.
            report = partial(self._emit, events.ReaderQuarantined, peer, reason=reason)
            peer.deadline = self._loop.call_later(_QUARANTINE_EVENT_S, report)

    def _on_death(self, peer: Peer) -> None:
        """Settle a dead process's session, once what it sent is handled: its pidfd may fire before that."""

        def reads_rest() -> bool:
            more = peer.channel.read_rest(max(0, self._turn.left - QUANTUM_UNITS))
            return more or self._died(peer)

        self._turn.do(reads_rest)

    def _died(self, peer: Peer) -> Literal[False]:
        if peer.state is SessionState.SETTLING:
            return False
        if peer.state not in {_ACTIVE, SessionState.QUARANTINED}:
            self._end(peer)
            return False
        if self._host.has_left(peer):
            self._goodbye(peer)
            return False
        self.posts.take_rest(peer)  # its page has outlived it
        peer.state = SessionState.SETTLING
        self._stop_greeting(peer)

        def settled(paid: int) -> None:
            self._end(peer)
            self._emit(events.ReaderLost, peer, reads_paid=paid)

        self._host.end(peer, settled, died=True)
        return False

    def _end(self, peer: Peer) -> None:
        if peer.state is SessionState.ENDED:
            return
        peer.state = SessionState.ENDED
        peer.posts = None
        self._stop_greeting(peer)
        self.sessions.pop(peer.number, None)
        self._turn.do_all(peer.cancel_tasks(self._turn))
        self._tails.settle()  # an ended session is no longer behind
        peer.channel.close()
        if peer.watch is not None:
            peer.watch.close()

    def _stop_greeting(self, peer: Peer) -> None:
        self._greeting.discard(peer)
        if peer.deadline is not None:
            peer.deadline.cancel()
            peer.deadline = None

    def _emit(self, kind: Callable[..., events.Event], peer: Peer, **more: object) -> None:
        which = {"session": peer.number, "reader": peer.name, "pid": peer.pid}
        events.emit(kind(pool=self._host.pool_name, **which, **more))

    # --- the owner's own end --------------------------------------------------------------------

    def close(self) -> None:
        """Tell every peer, close everything, and remove the socket's file."""
        if self._accept_retry is not None:
            self._accept_retry.cancel()
        self._loop.remove_reader(self._sock.fileno())
        for peer in [*self.sessions.values(), *self._greeting]:
            self._ended.append(peer)
            self.posts.take_rest(peer)
            peer.channel.send(encode(messages.Closing()))
            self._end(peer)
        self._listener.close()

    async def ended(self) -> None:
        """Return when no request is in progress any more, after `close`."""
        while any(peer.tasks for peer in self._ended):  # noqa: ASYNC110 - a turn is what it takes
            await asyncio.sleep(0)

    def forget(self) -> None:
        """Drop descriptors in a forked child; the parent's sessions and socket file stay."""
        for peer in [*self.sessions.values(), *self._greeting]:
            peer.posts = None  # or its page stays mapped
            peer.channel.forget()
            if peer.watch is not None:
                peer.watch.forget()
        self._listener.forget()
