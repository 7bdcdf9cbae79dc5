"""A reader's end of a connection to another host's owner: requests, heartbeats, its loss."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import anyio

from featcache import errors
from featcache.control.messages import ProtocolError
from featcache.errors import (
    AttachRefused,
    FeatcacheError,
    OwnerLost,
    OwnerUnreachable,
    explain,
)
from featcache.reach import messages
from featcache.reach.handshake import Conversation, Role
from featcache.reach.messages import Alive, Answer, Paid, decode_from_home, encode
from featcache.reach.secret import TlsContexts, parse_address
from featcache.reach.stream import Stream
from featcache.settings import Settings

T = TypeVar("T")
_BEATS: Final = 4
"""Heartbeats within `Settings.peer_timeout`, or the home's lease if that is shorter."""
_AGAIN_S: Final = 0.02
"""Once more a look, when the time is over: what came while this loop stood still is heard first."""


class HomeLink:
    """One connection to a home, until it is lost. Made by `dial`."""

    def __init__(
        self, address: str, stream: Stream, settings: Settings, names: Callable[[], Sequence[str]]
    ) -> None:
        """`names` returns those of this host's sessions."""
        self.address = address
        self.lost: OwnerLost | None = None
        """Why it is lost, once it is."""
        self.is_broken = False
        """Whether it is lost because the connection ended, and not by silence."""
        self.on_told: Callable[[Paid | Alive], object] = lambda _: None
        self.on_lost: Callable[[], object] = lambda: None
        self._names = names
        self._stream = stream
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._requests: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = self._beats = 0
        self._heard_s = self._kept_s = time.monotonic()
        self._lease_s = settings.peer_timeout  # until the home tells its own
        self.round_trip_s: float | None = None
        """Of the last heartbeat that was answered."""
        self._sent: dict[int, float] = {}
        """When the heartbeats that are not answered were sent, by number."""
        self.gone: asyncio.Future[None] = self._loop.create_future()
        """Done when it is lost."""
        stream.on_message, stream.on_closed = self._on_message, self._on_closed
        self._next_look: asyncio.TimerHandle | None = None
        self._next_beat: asyncio.TimerHandle | None = None
        self._beat()
        self._watch()

    @classmethod
    async def dial(
        cls,
        address: str,
        key: bytes,
        host: bytes,
        settings: Settings,
        tls: TlsContexts,
        names: Callable[[], Sequence[str]],
    ) -> "HomeLink":
        """Connect to an owner, and prove the key to each other.

        Raises:
            AttachRefused: it refused, or has another key.
            OwnerUnreachable: nobody answers there within `Settings.peer_timeout`.

        """
        loop, opened = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        where = parse_address(address, "the ref's address")
        timeout_s = settings.peer_timeout
        stream = Stream(Conversation(Role.DIALER, key, host), timeout_s)

        def ended(error: FeatcacheError | None) -> None:
            if not opened.done():
                opened.set_exception(error or OwnerLost("the other host closed the connection"))

        stream.on_open, stream.on_closed = lambda: opened.set_result(None), ended
        try:
            with anyio.fail_after(timeout_s):
                await loop.create_connection(
                    lambda: stream, where.host, where.port, ssl=tls.dialing
                )
                await opened
        except TimeoutError:
            stream.abort()
            raise OwnerUnreachable(
                f"the owner at {address} did not answer within {timeout_s} s"
            ) from None
        except OwnerLost as error:
            raise OwnerUnreachable(f"the owner at {address} is lost: {error}") from None
        except AttachRefused as error:
            raise _at(address, error) from None
        except (OSError, UnicodeError) as error:
            why = explain(error) if isinstance(error, OSError) else str(error)
            raise OwnerUnreachable(f"no owner answers at {address}: {why}") from error
        except ProtocolError as error:
            raise _at(address, error) from None
        except BaseException:
            stream.abort()
            raise
        finally:
            if opened.done() and not opened.cancelled():
                opened.exception()  # retrieved
        return cls(address, stream, settings, names)

    @property
    def host(self) -> bytes:
        """The id of the home's pool."""
        return self._stream.peer

    # --- requests -------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether no request is unanswered."""
        return not self._requests

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    async def request(self, request: messages.Request) -> Answer:
        """Return the answer, however long the home lives without one; or raise the error that it names.

        If cancelled, the home is told, and takes back what it would have given.

        Raises:
            OwnerLost: the home has not been heard of for `Settings.peer_timeout`.

        """
        self.check()
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._requests[request.request] = future
        self._stream.send(encode(request))
        try:
            answer = await future
        except asyncio.CancelledError:
            self.tell(messages.Cancel(request.request))
            raise
        finally:
            self._requests.pop(request.request, None)
        if isinstance(answer, messages.Failed):
            raise _error(answer)
        return answer

    def tell(
        self, note: messages.Cancel | messages.Drop | messages.Pay | messages.NameLost
    ) -> None:
        """Send what has no answer of its own; no-op once it is lost."""
        if self.lost is None:
            self._stream.send(encode(note))

    def check(self) -> None:
        """Raise OwnerLost if it is lost."""
        if self.lost is not None:
            raise OwnerLost(str(self.lost))

    @property
    def silent_s(self) -> float:
        """Seconds since it was heard last."""
        return time.monotonic() - self._heard_s

    @property
    def keeps_pins(self) -> bool:
        """Whether the home surely keeps now what it has pinned for this host.

        It does so for a lease after each heartbeat that it has; the time is counted from when the last
        one that it answered was sent, which is before it had it.
        """
        return time.monotonic() - self._kept_s < self._lease_s

    # --- what comes -----------------------------------------------------------------------------------

    def _on_message(self, payload: bytes) -> None:
        message = decode_from_home(payload)
        self._heard_s = time.monotonic()
        if isinstance(message, Alive):
            if message.lease_s != self._lease_s:
                self._lease_s = message.lease_s
                self._plan_beat()
            sent_s = self._sent.pop(message.number, None)
            if sent_s is not None:
                self._kept_s = max(self._kept_s, sent_s)
                self.round_trip_s = self._heard_s - sent_s
        if isinstance(message, Paid | Alive):
            self.on_told(message)
            return
        future = self._requests.get(message.request)
        if future is not None and not future.done():
            future.set_result(message)

    def _on_closed(self, error: FeatcacheError | None) -> None:
        self.is_broken = True
        self.lose(str(error) if error is not None else "it closed the connection")

    def _beat(self) -> None:
        """Tell the home that this host lives."""
        if self.lost is not None:
            return
        self._beats += 1
        self._sent[self._beats] = time.monotonic()
        if len(self._sent) > 2 * _BEATS:
            del self._sent[min(self._sent)]
        names = list(self._names())[: messages.MAX_NAMES]
        self._stream.send(encode(messages.Beat(self._beats, names)))
        self._plan_beat()

    def _plan_beat(self) -> None:
        if self._next_beat is not None:
            self._next_beat.cancel()
        every_s = min(self._settings.peer_timeout, self._lease_s) / _BEATS
        self._next_beat = self._loop.call_later(every_s, self._beat)

    def _watch(self, *, again: bool = False) -> None:
        """Lose it when it has been silent for too long."""
        if self.lost is not None:
            return
        left_s = self._heard_s + self._settings.peer_timeout - time.monotonic()
        if left_s > 0:
            self._next_look = self._loop.call_later(left_s, self._watch)
        elif not again:
            self._next_look = self._loop.call_later(_AGAIN_S, lambda: self._watch(again=True))
        else:
            self.lose(f"it has not been heard of for {self._settings.peer_timeout} s")

    # --- the end --------------------------------------------------------------------------------------

    def lose(self, reason: str) -> None:
        """Fail all requests with OwnerLost, and close. Idempotent."""
        if self.lost is None:
            self._end(f"the owner at {self.address} is lost: {reason}")
            # Nothing that waits is of use: a peer that is cut off would keep it for minutes.
            self._stream.abort()
            self.on_lost()

    def close(self) -> None:
        """Say goodbye and close; what was told before goes out."""
        if self.lost is None:
            self._stream.send(encode(messages.Goodbye()))
            self._end(f"this host closed its connection to {self.address}")
            self._stream.close()

    def _end(self, why: str) -> None:
        self.lost = OwnerLost(why)
        for timer in (self._next_beat, self._next_look):
            if timer is not None:
                timer.cancel()
        for future in self._requests.values():
            if not future.done():
                future.set_exception(OwnerLost(why))
        self._requests.clear()
        if not self.gone.done():
            self.gone.set_result(None)
        self._stream.on_closed = lambda _: None

    def forget(self) -> None:
        """Tell nothing more, in a forked child."""
        self._stream.forget()


def check_pins(link: HomeLink) -> None:
    """Raise OwnerLost unless the home keeps what it has pinned for this host over this connection."""
    link.check()
    if not link.keeps_pins:
        link.lose("its answers came too late to be sure of what was read")
        link.check()


async def or_lost(
    link: HomeLink, work: Coroutine[Any, Any, T], unwanted: Callable[[T], object]
) -> T:
    """Await work; if the home is lost before, cancel it and raise OwnerLost.

    `unwanted` is told the result that the work has all the same, if this is cancelled as it ends.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        either: list[asyncio.Future[Any]] = [task, link.gone]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            link.check()
    except BaseException:
        task.cancel()
        task.add_done_callback(lambda done: _hand_back(done, unwanted))
        raise
    return task.result()


def _hand_back(task: "asyncio.Task[T]", unwanted: Callable[[T], object]) -> None:
    if not task.cancelled() and task.exception() is None:
        unwanted(task.result())


def _error(failed: messages.Failed) -> FeatcacheError:
    kind = getattr(errors, failed.error, None) if failed.error in errors.__all__ else None
    return (kind or FeatcacheError)(failed.text)


def _at(address: str, error: FeatcacheError) -> AttachRefused:
    return AttachRefused(f"{address}: {error}")
