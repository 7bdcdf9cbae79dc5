"""What sessions ask, answered: at once where it can be, else by a task of its own that may wait.

Every request is answered exactly once, also one that was cancelled: its asker has to know what became
of it. An answer that hands something over and can't be sent any more is taken back.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Protocol

from featcache.control.messages import (
    Answer,
    Cancel,
    HostPool,
    Note,
    ProtocolError,
    Relay,
    Reply,
    Request,
    Unclaim,
    Upload,
    Withdraw,
    WriteDescriptors,
    encode,
    is_answer,
    is_request,
)
from featcache.control.peer import Peer, SessionState
from featcache.errors import FeatcacheError, SettingsError

_MAX_COPIES: Final = 8192
"""Copies through the host that one session may have asked for and not got yet."""

_ACTIVE: Final = SessionState.ACTIVE  # members of an enum are slow to look up
_COPIES: Final = frozenset((Relay, Upload, HostPool))
Wait = Coroutine[Any, Any, Answer]


class RequestHandlers(Protocol):
    """What is asked of the pool. What it hands over is the session's, or comes back by `revoke`."""

    def answer(self, session: int, ask: Request) -> Answer | Wait:
        """Do what is asked and return the answer, or what will. Raise FeatcacheError to refuse."""

    def note(self, session: int, note: Unclaim | Withdraw) -> None:
        """Do what needs no answer."""

    def writable(self) -> Sequence[int]:
        """Return the descriptors by which the slab is mapped for writing; they stay the pool's."""

    def revoke(self, session: int, answer: Answer) -> None:
        """Undo what an answer that was never sent handed over."""


class Dispatcher:
    """The askings of all sessions of one server."""

    def __init__(self, handlers: RequestHandlers) -> None:
        self._handlers = handlers
        self._loop = asyncio.get_running_loop()

    def take(self, session: Peer, message: Request | Note) -> None:
        """Answer a request, now or later; or take note."""
        if is_request(message):
            self._answer(session, message)
        elif isinstance(message, Cancel):
            task = session.tasks.get(message.request)
            if task is not None:
                task.cancel()
        elif isinstance(message, Unclaim | Withdraw):
            self._handlers.note(session.number, message)

    def _answer(self, session: Peer, ask: Request) -> None:
        if type(ask) in _COPIES and len(session.copies) >= _MAX_COPIES:
            raise ProtocolError(f"more than {_MAX_COPIES} copies at once")
        try:
            answer = self._handlers.answer(session.number, ask)
        except FeatcacheError as error:
            answer = _refusal(ask.request, error)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not leave the asker waiting
            self._loop.call_exception_handler({"message": f"{ask!r} failed", "exception": error})
            answer = _fault(ask.request)
        if is_answer(answer):
            self._send(session, answer)
        else:
            assert isinstance(answer, Coroutine), "what is not answered yet will be"
            self._wait(session, ask, answer)

    def _wait(self, session: Peer, ask: Request, wait: Wait) -> None:
        request = ask.request
        if request in session.tasks:
            wait.close()
            raise ProtocolError(f"request {request} is under way already")
        if type(ask) in _COPIES:
            session.copies.add(request)
        task = session.tasks[request] = self._loop.create_task(wait)
        # Not in the task itself: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda done: self._finish(session, request, done))

    def _finish(self, session: Peer, request: int, task: "asyncio.Task[Answer]") -> None:
        session.tasks.pop(request, None)
        session.copies.discard(request)
        if task.cancelled():
            self._send(
                session, Reply(request, FeatcacheError.__name__, "the request was cancelled")
            )
            return
        error = task.exception()
        if error is None:
            self._send(session, task.result())
        elif isinstance(error, FeatcacheError):
            self._send(session, _refusal(request, error))
        else:
            self._send(session, _fault(request))
            raise error  # a fault of ours: to the loop's handler of such

    def _send(self, session: Peer, answer: Answer) -> None:
        channel = session.channel
        if channel is None or channel.closed or session.state is not _ACTIVE:
            self._handlers.revoke(session.number, answer)
            return
        payload = encode(answer)
        if len(payload) > channel.send_bytes:
            self._handlers.revoke(session.number, answer)
            why = "the ref is too long for a message: raise Settings.message_bytes"
            payload = encode(Reply(answer.request, SettingsError.__name__, why))
        channel.send(payload, self._handlers.writable() if type(answer) is WriteDescriptors else ())


def _fault(request: int) -> Reply:
    return Reply(request, FeatcacheError.__name__, "the owner failed: its log says why")


def _refusal(request: int, error: FeatcacheError) -> Reply:
    return Reply(request, type(error).__name__, str(error)[:1000])
