"""The requests of one session that await an answer: numbered, bounded, each answered exactly once.

Every answer has one taker. If the task that awaited it was cancelled, the answer still comes, and the
resources that it hands over (a grant, a claim, a slot) go to `on_orphan`, which returns them.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from featcache import errors
from featcache.control import messages
from featcache.control.channel import Channel
from featcache.control.descriptors import close_all
from featcache.control.many import PublishMany
from featcache.control.messages import Answer, ProtocolError, Request, encode
from featcache.control.turns import WAKE_UNITS, turn_of
from featcache.control.wire import Lane
from featcache.errors import CacheClosed, FeatcacheError, SettingsError

MAX_IN_FLIGHT: Final = 2048
"""Unanswered requests in one lane; one more waits for its turn, first come, first served."""

_PUBLISHES: Final = (messages.Publish, PublishMany)

Answered: TypeAlias = asyncio.Future[tuple[Answer, list[int]]]

# The types that are tested on every message.
_Find = messages.Find
_Reply = messages.Reply
_Reserve = messages.Reserve
_WriteDescriptors = messages.WriteDescriptors


class PendingRequests:
    """The requests of one `Link`, whose life (`LinkState`) decides which of them may still be sent."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._last_number = 0
        self._unanswered: dict[int, tuple[Request, Answered]] = {}
        self._orphans: dict[int, Request] = {}
        """Requests that nobody awaits any more and whose answers are still to come."""
        self.asked_rooms = 0
        """Those of them that ask for room: a put that comes after one of these must not overtake it."""
        self.on_orphan: Callable[[Request, Answer], None] | None = None
        """Returns the resources of an answer whose task was cancelled."""
        self._closing: FeatcacheError | None = None
        """Raised by new requests other than `Publish` once this end is closing."""
        self._ended: FeatcacheError | None = None
        """Raised by all new requests once the channel is closed."""
        lanes = {lane: asyncio.Semaphore(MAX_IN_FLIGHT) for lane in Lane}
        self._lanes: dict[type, asyncio.Semaphore] = {
            kind: lanes[kind.lane] for kind in messages.REQUESTS if kind.lane is not None
        }

    def number(self) -> int:
        self._last_number += 1
        return self._last_number

    def tell(self, note: messages.Note | messages.Discard | messages.KeyCommand) -> None:
        """Send a message whose answer, if it has one, nobody awaits. No-op once the channel is closed."""
        if self._ended is None:
            self._channel.send(encode(note))

    def check(self) -> None:
        """Raise what `request` would."""
        if self._ended is not None:
            raise _copy(self._ended)

    def post(self, payload: bytes) -> None:
        """Send a message that has no answer, or raise SettingsError if it is too long."""
        try:
            self._channel.send(payload)
        except ValueError as error:
            raise _too_long(error) from None

    async def request(self, request: Request) -> tuple[Answer, list[int]]:
        """Return the owner's answer and its descriptors, or raise the error that it names.

        On cancellation the owner is sent a `Cancel`, and its answer goes to `on_orphan` when it comes.
        """
        if self._ended is not None:
            raise _copy(self._ended)
        payload = encode(request)
        lane = self._lanes.get(type(request))
        if lane is not None:
            await lane.acquire()
            refusal = self._closing or self._ended
            if refusal is not None:
                lane.release()  # the next waiter finds the same and wakes the one after it
                raise _copy(refusal)
        # From here to the answer the place in the lane is the request's, also when its task is gone:
        # the owner works on it until it has answered.
        number = request.request
        answer: Answered = self._loop.create_future()
        self._unanswered[number] = request, answer
        try:
            if type(request) is _Find:
                self._channel.send_next(payload)
            else:  # at once: other sessions may be waiting for its effect
                self._channel.send(payload)
                if type(request) is _Reserve:
                    self.asked_rooms += 1
        except ValueError as error:
            del self._unanswered[number]
            if lane is not None:
                lane.release()
            raise _too_long(error) from None
        try:
            return await answer
        except asyncio.CancelledError:
            self._cancel(request, answer)
            raise
        finally:
            self._unanswered.pop(number, None)

    def _cancel(self, request: Request, answer: Answered) -> None:
        """Take the answer of a cancelled task: it may have come already, or is still to come."""
        if answer.done() and not answer.cancelled():
            if answer.exception() is None:
                with contextlib.suppress(ProtocolError):  # the task ends as cancelled in any case
                    self._take_orphan(request, *answer.result())
        elif request.request in self._unanswered and self._ended is None:
            self._orphan(request)

    def _orphan(self, request: Request) -> None:
        if type(request) is PublishMany:
            for slot, generation, _, _ in request.members:
                self.tell(messages.Discard(self.number(), slot, generation, undoes=True))
            return
        if type(request) is messages.Publish:
            # Nobody has its ref. At once, behind it and before any goodbye: its answer may come when the
            # session has ended and no discard is heard any more.
            self.tell(messages.Discard(self.number(), request.slot, request.generation))
            return
        # Listed before the owner is told: sending may end the channel, which clears the orphans.
        self._orphans[request.request] = request
        self.tell(messages.Cancel(request.request))

    def fail_all(self, error: FeatcacheError) -> None:
        """Fail every request but `Publish` with this error, and refuse new ones."""
        # First: sending a Cancel may end the channel, and what that wakes finds this error.
        self._closing = error
        self._turn.do_all(self._failing(error))

    def _failing(self, error: FeatcacheError) -> Iterator[None]:
        for request, answer in list(self._unanswered.values()):
            # The bytes of a publish are in the slab: whoever awaits the ref still gets it.
            if type(request) in _PUBLISHES or answer.done():
                continue
            if self._unanswered.pop(request.request, None) is not None:
                self._turn.left -= WAKE_UNITS
                answer.set_exception(_copy(error))
                self._orphan(request)
                yield

    def deliver(self, answer: Answer, fds: list[int]) -> None:
        """Hand an answer and its descriptors to the task that awaits it.

        Descriptors are closed here unless the task gets them. An answer to no request is dropped.
        """
        if fds and type(answer) is not _WriteDescriptors:
            close_all(fds)
            raise ProtocolError(f"a {type(answer).__name__} carries no descriptors")
        request, future = self._unanswered.pop(answer.request, (None, None))
        if request is None:
            request = self._orphans.pop(answer.request, None)
        # Once a request: it is taken out of its table first, so a second answer frees no other place.
        if request is not None and (lane := self._lanes.get(type(request))) is not None:
            lane.release()
            if type(request) is _Reserve:
                self.asked_rooms -= 1
        refusal = answer if type(answer) is _Reply and answer.error is not None else None
        if future is None or future.done():
            # Cancelled: the task has run since and made this an orphan, or is yet to run and will find
            # no answer in its future. Either way the answer is taken here.
            if request is None or refusal is not None:
                close_all(fds)
            else:
                self._take_orphan(request, answer, fds)
        elif refusal is None:
            if fds and type(request) is not messages.OpenForWriting:
                close_all(fds)  # its caller expects none, and would leave them open
                fds = []
            future.set_result((answer, fds))
        else:
            close_all(fds)
            future.set_exception(_error_of(refusal))

    def _take_orphan(self, request: Request, answer: Answer, fds: list[int]) -> None:
        close_all(fds)
        if self.on_orphan is not None:
            try:
                self.on_orphan(request, answer)
            except FeatcacheError as error:
                raise ProtocolError(f"an answer that can't be returned: {error}") from error

    def end(self, error: FeatcacheError) -> None:
        """Fail every request with this error and refuse new ones: the channel is closed."""
        self._ended = error
        self.on_orphan = None  # it refers to the connection that holds this link: no cycle is left
        self._turn.do_all(self._ending(list(self._unanswered.values()), error))
        self._unanswered.clear()
        self._orphans.clear()
        # Last: the waiter that each wakes must find the end, and passes the place on.
        for lane in set(self._lanes.values()):
            lane.release()

    def _ending(
        self, unanswered: "list[tuple[Request, Answered]]", error: FeatcacheError
    ) -> Iterator[None]:
        """Fail the answers that can't come, one at each step."""
        for _, answer in unanswered:
            if not answer.done():
                self._turn.left -= WAKE_UNITS
                answer.set_exception(_copy(error))
                yield

    def forget(self) -> None:
        """Refuse new requests in a forked child, whose copy of the loop must not be touched."""
        self._ended = CacheClosed("the session was closed")


def _too_long(error: ValueError) -> SettingsError:
    return SettingsError(f"{error}: raise Settings.message_bytes, the owner's too")


def _copy(error: FeatcacheError) -> FeatcacheError:
    """Return an error of its own for each task: a raised one grows a traceback."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def _error_of(refusal: messages.Reply) -> FeatcacheError:
    """Return the error that a reply names, if featcache has one of that name."""
    name = refusal.error
    kind = getattr(errors, name, None) if name is not None and name in errors.__all__ else None
    error: FeatcacheError = (kind or FeatcacheError)(refusal.text)
    error.member = refusal.member
    return error
