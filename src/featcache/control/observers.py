"""The observers of one server: admitted apart from the sessions, and answered within an allowance.

Whatever they ask for, and however many ask, the owner gives them a small share of its time: work for them
is done in pieces between those of everyone else (`control.turns`), and once it has cost more than the
allowance, the next request waits until that has grown again. An observer has one request under way and one
answer unread at a time, so nothing piles up for one that is slow, stopped or hostile.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Final, Protocol

from featcache.control import messages
from featcache.control.descriptors import close_all
from featcache.control.messages import Hello, ProtocolError, encode
from featcache.control.observing import Answer, ObserverWelcome, Request, decode_from_observer
from featcache.control.peer import Peer, SessionState
from featcache.control.turns import ATTACH_UNITS, turn_of
from featcache.errors import AttachRefused, FeatcacheError, SettingsError

_SHARE: Final = 0.01
"""Of the owner's time. A look at many sessions' pages also takes their words through the processor's caches,
which costs the owner about as much again: together that stays under two percent."""
_BURST_S: Final = 0.05
"""What may be spent at once after a rest."""
_MESSAGE_S: Final = 50e-6
"""What a message costs besides the work that it asks for."""
_UNITS_PER_S: Final = 1e5
_clock: Final = time.monotonic
_used: Final = time.thread_time
"""What the loop's thread has run: not what others ran meanwhile."""

Work = Generator[None, None, Answer]
"""A request's work: it yields where it can be interrupted, and returns the answer."""


class ObserverHost(Protocol):
    """The pool's side of its observers."""

    def welcome(self) -> tuple[ObserverWelcome, list[int]]:
        """Return what an observer is told first, and the owner's pidfd, which stays the host's."""

    def answer(self, request: Request, limit_bytes: int, /) -> Work:
        """Begin to answer a request with a message of at most so many bytes."""


class Allowance:
    """Seconds that may be spent: a share of those that pass, up to a burst."""

    def __init__(self, now_s: float) -> None:
        self._left_s = _BURST_S
        self._at_s = now_s

    def spend(self, seconds: float) -> None:
        self._left_s -= seconds

    def delay_s(self, now_s: float) -> float:
        """Return for how long nothing may be spent."""
        self._left_s = min(_BURST_S, self._left_s + (now_s - self._at_s) * _SHARE)
        self._at_s = now_s
        return max(0.0, -self._left_s / _SHARE)


class Observers:
    """The attached observers of one pool."""

    def __init__(
        self,
        most: int,
        host: ObserverHost,
        end: Callable[[Peer], object],
        report: Callable[[Peer, str], object],
    ) -> None:
        """`end` closes a peer's connection, `report` tells of one that broke the protocol."""
        self._most = most
        self._host = host
        self._end = end
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._allowance = Allowance(_clock())
        self._busy: set[Peer] = set()
        """Those with a request under way."""
        self.peers: set[Peer] = set()

    def admit(self, peer: Peer, hello: Hello, limit_bytes: int) -> None:
        """Welcome an observer, or raise AttachRefused."""
        self._turn.left -= ATTACH_UNITS
        if hello.version != messages.VERSION:
            raise AttachRefused(
                f"the observer speaks version {hello.version}, the owner {messages.VERSION}"
            )
        if len(self.peers) >= self._most:
            raise AttachRefused(
                f"all {self._most} observers are attached: raise Settings.observers"
            )
        welcome, descriptors = self._host.welcome()
        peer.state = SessionState.ACTIVE
        self.peers.add(peer)
        channel = peer.channel
        channel.on_message = partial(self._on_message, peer)
        channel.on_lost = partial(self._on_lost, peer)
        channel.send_bytes = min(limit_bytes, hello.message_bytes)
        channel.send(encode(welcome), descriptors)

    def drop(self, peer: Peer) -> None:
        """Forget an observer whose connection ends."""
        self.peers.discard(peer)
        self._busy.discard(peer)

    def _on_lost(self, peer: Peer, error: Exception | None) -> None:
        if error is not None:
            self._report(peer, str(error))
        self._end(peer)

    def _on_message(self, peer: Peer, payload: bytes, fds: list[int]) -> None:
        if fds:
            close_all(fds)
            raise ProtocolError("an observer's message carries no descriptors")
        message = decode_from_observer(payload)
        if isinstance(message, messages.Goodbye):
            self._end(peer)
            return
        if peer in self._busy or peer.channel.backlog:
            raise ProtocolError("an observer's request before it has read its last answer")
        self._busy.add(peer)
        delay_s = self._allowance.delay_s(_clock())
        if delay_s:
            self._loop.call_later(delay_s, self._begin, peer, message)
        else:
            self._begin(peer, message)

    def _begin(self, peer: Peer, request: Request) -> None:
        if peer in self._busy:  # its connection may have ended meanwhile
            self._turn.do_all(self._answering(peer, request))

    def _answering(self, peer: Peer, request: Request) -> Iterator[None]:
        """Work at a request piece by piece, each counted, and send the answer."""
        limit_bytes = peer.channel.send_bytes
        work = self._host.answer(request, limit_bytes)
        self._spend(_MESSAGE_S)
        while peer in self._busy:
            began_s = _used()
            try:
                answer = self._step(work, request)
                payload = None if answer is None else encode(answer)
            finally:
                self._spend(_used() - began_s)
            if payload is not None:
                if len(payload) > limit_bytes:
                    payload = encode(_too_long(request, limit_bytes))
                self._busy.discard(peer)
                peer.channel.send(payload)
                return
            yield

    def _step(self, work: Work, request: Request) -> Answer | None:
        """Do one piece; return the answer once there is one."""
        try:
            next(work)
        except StopIteration as done:
            answer: Answer = done.value
            return answer
        except FeatcacheError as error:
            return messages.Reply(request.request, type(error).__name__, str(error)[:500])
        except Exception as error:  # noqa: BLE001 - a bug in featcache: the observer is answered anyway
            context = {"message": f"{request!r} failed", "exception": error}
            self._loop.call_exception_handler(context)
            failed = "the owner failed: its log says why"
            return messages.Reply(request.request, FeatcacheError.__name__, failed)
        return None

    def _spend(self, seconds: float) -> None:
        self._allowance.spend(seconds)
        self._turn.left -= 1 + int(seconds * _UNITS_PER_S)


def _too_long(request: Request, limit_bytes: int) -> messages.Reply:
    error = SettingsError(f"the answer is longer than {limit_bytes} bytes: raise message_bytes")
    return messages.Reply(request.request, type(error).__name__, str(error))
