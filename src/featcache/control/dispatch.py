"""Requests of sessions, answered: at once where that is possible, else by a task that may wait.

Every request is answered exactly once, a cancelled one too: until then it holds a place in one of its
session's lanes, and only the answer tells the session whether it was given a grant, a claim or a slot.
An answer that can't be sent is revoked.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, Final, Protocol

from featcache.control import messages
from featcache.control.channel import ChannelState
from featcache.control.messages import Answer, ProtocolError, Request, encode, is_answer
from featcache.control.peer import Peer, SessionState
from featcache.control.rooms import PublishUnkeyed, Rooms
from featcache.control.turns import WAKE_UNITS, turn_of
from featcache.errors import CacheClosed, FeatcacheError, OwnerLost, SettingsError

_MAX_COPIES: Final = 8192
"""Unanswered requests of one session for which the owner copies through host memory."""

_COPIES: Final = frozenset(kind for kind in messages.REQUESTS if kind.copies)
_REFUSAL_BYTES: Final = 256
"""Bytes of a refusal besides its text."""
_ACTIVE: Final = SessionState.ACTIVE  # members of an enum are slow to look up
_CLOSED: Final = ChannelState.CLOSED
_Published: Final = messages.Published
_WriteDescriptors: Final = messages.WriteDescriptors

Wait = Coroutine[Any, Any, Answer]
"""A request's work that may wait; it returns the answer."""


class Begun(Coroutine[Any, Any, Answer]):
    """A request's work that has taken something, a place in a queue, before its task runs.

    A task that is cancelled before its first step never runs: then `undo` gives it back.
    """

    __slots__ = ("_undo", "_work")

    def __init__(self, work: Wait, undo: Callable[[], object]) -> None:
        self._work = work
        self._undo: Callable[[], object] | None = undo

    def __await__(self) -> Generator[Any, Any, Answer]:
        """Go on with the work."""
        self._undo = None
        return self._work.__await__()

    def send(self, value: Any) -> Any:
        """Do a step of the work."""
        self._undo = None
        return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise in the work, or undo what was taken before it began."""
        self._undone()
        return self._work.throw(*error)

    def close(self) -> None:
        """End the work."""
        self._undone()
        self._work.close()

    def _undone(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


class RequestHandlers(Protocol):
    """The pool's handlers. What an answer hands over is the session's until `revoke`."""

    def answer(self, session: int, request: Request, /) -> Answer | Wait:
        """Return the answer, or the work that will return it. Raise FeatcacheError to refuse."""

    def note(
        self,
        session: int,
        note: messages.ReleaseClaim | messages.GiveUpReserved | PublishUnkeyed,
        /,
    ) -> Rooms | None:
        """Carry out a message that has no answer; return what the session is to be told all the same."""

    def more_rooms(self, session: int, /) -> Rooms | None:
        """Return the room that a session is to be told of once it has the answer to a publish."""

    def writable(self) -> Sequence[int]:
        """Return the slab's write descriptors; they stay the pool's."""

    def revoke(self, session: int, answer: Answer, /) -> None:
        """Take back the grant, claim or slot of an answer that was never sent."""


class Dispatcher:
    """The requests of all sessions of one server."""

    def __init__(self, handlers: RequestHandlers) -> None:
        self._handlers = handlers
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)

    def note(self, peer: Peer, note: messages.Note) -> None:
        if not isinstance(note, messages.Cancel):
            told = self._handlers.note(peer.number, note)
            if told is not None:
                peer.channel.send(encode(told))
        elif (task := peer.tasks.get(note.request)) is not None:
            self._turn.left -= WAKE_UNITS  # its step, in the next turn
            task.cancel()  # `_finish` answers it; a request without a task is answered already

    def answer(self, peer: Peer, request: Request) -> None:
        if type(request) in _COPIES and len(peer.copies) >= _MAX_COPIES:
            raise ProtocolError(f"more than {_MAX_COPIES} copies at once")
        try:
            answer = self._handlers.answer(peer.number, request)
        except FeatcacheError as error:
            answer = _refusal(request.request, error)
        except Exception as error:  # noqa: BLE001 - a bug in featcache: the session is answered anyway
            context = {"message": f"{request!r} failed", "exception": error}
            self._loop.call_exception_handler(context)
            answer = _fault(request.request)
        if is_answer(answer):
            self._send(peer, answer)
            if type(answer) is _Published and peer.state is _ACTIVE:
                told = self._handlers.more_rooms(peer.number)
                if told is not None:
                    peer.channel.send(encode(told))
        else:
            assert isinstance(answer, Coroutine), "a handler returns an answer or its work"
            self._wait(peer, request, answer)

    def _wait(self, peer: Peer, request: Request, wait: Wait) -> None:
        number = request.request
        if number in peer.tasks:
            wait.close()
            raise ProtocolError(f"request {number} is in progress already")
        if type(request) in _COPIES:
            peer.copies.add(number)
        task = peer.tasks[number] = self._loop.create_task(wait)
        # Not by the task itself: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda done: self._finish(peer, number, done))

    def _finish(self, peer: Peer, number: int, task: "asyncio.Task[Answer]") -> None:
        peer.tasks.pop(number, None)
        peer.copies.discard(number)
        if task.cancelled():
            self._send(peer, _refusal(number, FeatcacheError("the request was cancelled")))
            return
        failure = task.exception()
        if failure is None:
            self._send(peer, task.result())
        elif isinstance(failure, FeatcacheError):
            self._send(peer, _refusal(number, failure))
        else:
            self._send(peer, _fault(number))
            raise failure  # a bug in featcache: reported by the loop's exception handler

    def _send(self, peer: Peer, answer: Answer) -> None:
        channel = peer.channel
        # A session that has lost its socket, or ended while a task ran, can't take what the answer hands
        # over. Once a session is ACTIVE and its channel open, the answer is the session's: should the
        # channel end before the frame goes, its resources are freed with the session.
        if channel.state is _CLOSED or peer.state is not _ACTIVE:
            self._handlers.revoke(peer.number, answer)
            return
        payload = encode(answer)
        if len(payload) > channel.send_bytes:
            self._handlers.revoke(peer.number, answer)
            if isinstance(answer, messages.Reply) and answer.error is not None:
                fits = (channel.send_bytes - _REFUSAL_BYTES) // 4  # of UTF-8 a character
                answer = messages.Reply(answer.request, answer.error, answer.text[:fits])
                payload = encode(answer)
            else:
                why = "the ref is too long for a message: raise Settings.message_bytes"
                payload = encode(_refusal(answer.request, SettingsError(why)))
        fds = self._handlers.writable() if type(answer) is _WriteDescriptors else ()
        channel.send(payload, fds)


def _fault(number: int) -> messages.Reply:
    return _refusal(number, FeatcacheError("the owner failed: its log says why"))


def _refusal(number: int, error: FeatcacheError) -> messages.Reply:
    text = str(error)[:2000]
    if type(error) is CacheClosed:  # what this process closed is what a session loses
        text = f"the owner is closing: {text}"
        return messages.Reply(number, OwnerLost.__name__, text, member=error.member)
    return messages.Reply(number, type(error).__name__, text, member=error.member)
