"""What a session asks its owner: numbered, bounded, answered once, given back if nobody wants it."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, TypeAlias

from featcache import errors
from featcache.control.channel import Channel, close_all
from featcache.control.messages import (
    Answer,
    Cancel,
    Discard,
    Find,
    HostPool,
    KeyCommand,
    Note,
    OpenForWriting,
    ProtocolError,
    Publish,
    Relay,
    Reply,
    Request,
    Reserve,
    Upload,
    WriteDescriptors,
    encode,
)
from featcache.errors import CacheClosed, FeatcacheError, OwnerLost, SettingsError

MAX_IN_FLIGHT: Final = 2048
"""Requests of one kind that may be unanswered; one more waits here, first come, first served."""

Answered: TypeAlias = asyncio.Future[tuple[Answer, list[int]]]


class PendingRequests:
    """The requests of one session (`control.client.Link`)."""

    _channel: Channel

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: str | None = None
        """Why the owner is gone, once it is."""
        self._numbers = 0
        self._requests: dict[int, tuple[Request, Answered]] = {}
        self._orphans: dict[int, Request] = {}
        self.on_orphan: Callable[[Request, Answer], None] | None = None
        """Told of answers whose askers were cancelled."""
        self._ending: FeatcacheError | None = None
        finds, rooms, copies, others = (asyncio.Semaphore(MAX_IN_FLIGHT) for _ in range(4))
        # Lines of their own: what makes room, or makes what a key stands for, must not stand behind
        # those that wait for it. A publish stands in none: it is as many as rooms were given.
        self._lines: dict[type, asyncio.Semaphore] = {
            Find: finds,
            Reserve: rooms,
            Relay: copies,
            Upload: rooms,
            **dict.fromkeys((KeyCommand, Discard, HostPool, OpenForWriting), others),
        }

    def tell(self, note: Note | Discard | KeyCommand) -> None:
        """Send what nobody awaits an answer to. An owner that is gone needs no telling."""
        if self.lost is None and not self._channel.closed:
            self._channel.send(encode(note))

    def number(self) -> int:
        """Return the number of a new request."""
        self._numbers += 1
        return self._numbers

    async def ask(self, request: Request) -> tuple[Answer, list[int]]:
        """Return the owner's answer and its descriptors, or raise the error that it says.

        If cancelled, the owner is told, and its answer goes to `on_orphan` when it comes.
        """
        if self.lost is not None or self._channel.closed:
            raise self._ended()
        number = request.request
        payload = encode(request)
        line = self._lines.get(type(request))
        if line is not None:
            await line.acquire()
            if self._ending is not None or self.lost is not None or self._channel.closed:
                line.release()  # to the next, who finds the same
                raise self._ended() if self._ending is None else self._ending
        answer: Answered = self._loop.create_future()
        self._requests[number] = request, answer
        try:
            if type(request) is Find:
                self._channel.send_next(payload)
            else:  # which others may be waiting for
                self._channel.send(payload)
        except ValueError as error:
            self._leave_lane(self._requests.pop(number)[0])
            raise SettingsError(f"{error}: raise Settings.message_bytes, the owner's too") from None
        try:
            return await answer
        except asyncio.CancelledError:
            self._abandon(request, answer)
            raise
        finally:
            self._requests.pop(number, None)

    def _ended(self) -> FeatcacheError:
        if self.lost is not None:
            return OwnerLost(self.lost)
        return CacheClosed("the session was closed")

    def _leave_lane(self, request: Request) -> None:
        line = self._lines.get(type(request))
        if line is not None:
            line.release()

    def _abandon(self, request: Request, answer: Answered) -> None:
        """See to an answer that nobody awaits any more: what it hands over is to be given back."""
        if answer.done() and not answer.cancelled():
            if answer.exception() is None:
                with contextlib.suppress(ProtocolError):  # it is cancelled, whatever the owner says
                    self._take_orphan(request, *answer.result())
        elif request.request in self._requests and self.lost is None and not self._channel.closed:
            self._orphans[request.request] = request
            self.tell(Cancel(request.request))

    def abandon(self, error: FeatcacheError) -> None:
        """Let nobody wait for an answer any longer: each raises this. Publishing is not given up."""
        self._ending = error
        for request, future in list(self._requests.values()):
            if not isinstance(request, Publish) and not future.done():
                future.set_exception(error)
                del self._requests[request.request]
                self._orphans[request.request] = request
                self.tell(Cancel(request.request))

    def _take_orphan(self, request: Request, answer: Answer, fds: list[int]) -> None:
        close_all(fds)
        if self.on_orphan is not None:
            try:
                self.on_orphan(request, answer)
            except FeatcacheError as error:
                raise ProtocolError(f"an answer that can't be given back: {error}") from error

    def _answer(self, reply: Answer, fds: list[int]) -> None:
        if fds and type(reply) is not WriteDescriptors:
            close_all(fds)
            raise ProtocolError("descriptors came with an answer that has none")
        request, future = self._requests.pop(reply.request, (None, None))
        asked = self._orphans.pop(reply.request, None) if request is None else request
        if asked is not None:
            self._leave_lane(asked)
        refused = reply if type(reply) is Reply and reply.error is not None else None
        if future is None or future.done():
            # Cancelled: its task has found that out, or is yet to.
            if asked is None or refused is not None:
                close_all(fds)
            else:
                self._take_orphan(asked, reply, fds)
            return
        if refused is None:
            future.set_result((reply, fds))
            return
        close_all(fds)
        name = refused.error
        kind = getattr(errors, name, None) if name is not None and name in errors.__all__ else None
        future.set_exception((kind or FeatcacheError)(refused.text))

    def _refuse_all(self, error: FeatcacheError) -> None:
        """Let nobody wait for an answer that can't come."""
        for _, future in self._requests.values():
            if not future.done():
                future.set_exception(type(error)(*error.args))
        self._requests.clear()
        self._orphans.clear()
        for line in set(self._lines.values()):
            line.release()  # whom it wakes finds the end, and wakes the next
