"""An observer's end of the control connection: one request at a time, and the owner's end noticed."""

import asyncio
import contextlib
import os
import socket
from typing import Final, TypeAlias

import anyio

from featcache import errors
from featcache.control import messages, observing
from featcache.control.channel import Channel
from featcache.control.credentials import PidWatch, check_uid, own_pidfd
from featcache.control.descriptors import NO_DESCRIPTOR, close_all
from featcache.control.link import connect_socket
from featcache.control.messages import ProtocolError, encode
from featcache.control.observing import ObserverWelcome
from featcache.errors import (
    OUT_OF_DESCRIPTORS,
    AttachRefused,
    CacheClosed,
    FeatcacheError,
    GetTimeout,
    OwnerLost,
    OwnerUnreachable,
    system_errors,
)
from featcache.settings import Settings

_GOODBYE_S: Final = 1.0

Answered: TypeAlias = "asyncio.Future[observing.Answer]"


class ObserverLink:
    """One attached observer."""

    def __init__(self, sock: socket.socket, endpoint: str, settings: Settings) -> None:
        self.endpoint = endpoint
        self.lost: str | None = None
        """Why the owner is gone, once it is."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._welcome: asyncio.Future[ObserverWelcome] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()
        self._answer: Answered | None = None
        """Of the last request, until somebody has waited for it to come."""
        self._line = asyncio.Lock()
        self._number = 0
        self._closed = False
        self._watch: PidWatch | None = None
        self._message_bytes = settings.message_bytes
        self._channel = Channel(sock, settings.message_bytes, self._on_message, self._on_lost)

    async def greet(self, name: str | None) -> ObserverWelcome:
        """Say who this is; return the owner's welcome."""
        pidfd = own_pidfd()
        try:
            hello = messages.Hello(messages.VERSION, name, "", self._message_bytes, "observer")
            self._channel.send(encode(hello), [pidfd])
        finally:
            os.close(pidfd)
        welcome = await asyncio.shield(self._welcome)
        if (theirs := welcome.version) != messages.VERSION:
            raise AttachRefused(f"the owner speaks version {theirs}, not {messages.VERSION}")
        self._channel.send_bytes = min(self._message_bytes, welcome.message_bytes)
        return welcome

    def number(self) -> int:
        self._number += 1
        return self._number

    async def request(
        self, request: observing.Request, timeout_s: float | None
    ) -> observing.Answer:
        """Return the owner's answer, or raise the error that it names; requests go one by one.

        Raises:
            OwnerLost: the owner died, closed the pool, or ended this observer.
            GetTimeout: it did not answer in time.

        """
        try:
            with anyio.fail_after(timeout_s):
                answer = await self._request(request)
        except TimeoutError:
            raise GetTimeout(
                f"the owner at {self.endpoint} did not answer within {timeout_s} s: it is stopped or busy"
            ) from None
        if isinstance(answer, messages.Reply) and answer.error is not None:
            known = answer.error in errors.__all__
            kind = getattr(errors, answer.error) if known else FeatcacheError
            raise kind(answer.text)
        return answer

    async def _request(self, request: observing.Request) -> observing.Answer:
        async with self._line:
            if self._answer is not None:  # of a request that was given up: the owner is at it still
                with contextlib.suppress(FeatcacheError):
                    await asyncio.shield(self._answer)
            self._check()
            answer = self._answer = self._loop.create_future()
            self._channel.send(encode(request))
            self._check()
            try:
                return await asyncio.shield(answer)
            finally:
                if answer.done():
                    self._answer = None

    def _check(self) -> None:
        if self.lost is not None:
            raise OwnerLost(self.lost)
        if self._closed:
            raise CacheClosed("the observer was closed")

    def _on_message(self, payload: bytes, fds: list[int]) -> None:
        message = (
            observing.decode_for_observer(payload) if not fds else self._welcomed(payload, fds)
        )
        if isinstance(message, messages.Closing):
            self._lose("it closed the pool")
        elif isinstance(message, messages.Refused) and not self._welcome.done():
            self._welcome.set_exception(AttachRefused(f"refused: {message.reason}"))
        elif isinstance(message, observing.ObserverWelcome) and self._watch is not None:
            if not self._welcome.done():
                self._welcome.set_result(message)
        elif isinstance(message, observing.Answer) and self._answer is not None:
            if not self._answer.done():
                self._answer.set_result(message)
        else:
            raise ProtocolError(f"an unexpected {type(message).__name__}")

    def _welcomed(self, payload: bytes, fds: list[int]) -> observing.FromOwner:
        """Take a message with descriptors: the welcome, whose one is the owner's pidfd."""
        pidfd = fds[0]
        try:
            message = observing.decode_for_observer(payload)
            if not isinstance(message, ObserverWelcome) or len(fds) != 1 or self._watch is not None:
                raise ProtocolError(f"a {type(message).__name__} with descriptors")
            if pidfd == NO_DESCRIPTOR:
                raise ProtocolError(OUT_OF_DESCRIPTORS)
        except ProtocolError:
            close_all(fds)
            raise
        self._watch = PidWatch(pidfd, lambda: self._lose("its process died"))
        return message

    def _on_lost(self, error: Exception | None) -> None:
        self._lose("its socket closed" if error is None else str(error), error)

    def _lose(self, reason: str, error: Exception | None = None) -> None:
        if self.lost is not None or self._closed:
            self._end()
            return
        self.lost = f"the owner at {self.endpoint} is gone: {reason}"
        if not self._welcome.done():
            kind = AttachRefused if isinstance(error, ProtocolError) else OwnerUnreachable
            self._welcome.set_exception(kind(f"{self.endpoint}: {reason}"))
        self.close()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._closed = True
        self._channel.close()
        if self._watch is not None:
            self._watch.close()
        self._end()

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)
        for future in (self._welcome, self._answer):
            if future is not None and not future.done():
                why = self.lost
                error = CacheClosed("the observer was closed") if why is None else OwnerLost(why)
                future.set_exception(error)
                future.exception()  # counted as seen: nobody may be waiting
        if self._welcome.done() and not self._welcome.cancelled():
            self._welcome.exception()

    async def aclose(self) -> None:
        """Say goodbye, and return once the owner has ended this observer, or is gone."""
        if not self._closed:
            self._channel.send(encode(messages.Goodbye()))
            try:
                with contextlib.suppress(TimeoutError), anyio.fail_after(_GOODBYE_S):
                    await asyncio.shield(self._over)
            finally:
                self.close()

    def forget(self) -> None:
        """Drop the socket in a forked child."""
        self._closed = True
        self._channel.forget()
        if self._watch is not None:
            self._watch.forget()


async def dial_observer(
    endpoint: str, name: str | None, settings: Settings
) -> tuple[ObserverLink, ObserverWelcome]:
    """Attach to the owner at `endpoint` as an observer.

    Raises:
        OwnerUnreachable: nothing listens there.
        AttachRefused: another user's process, another protocol or version, no answer in time, or as
            many observers as there may be.

    """
    try:
        with (
            system_errors(AttachRefused, f"can't reach {endpoint}"),
            anyio.fail_after(settings.attach_timeout),
        ):
            sock = await connect_socket(endpoint)
            try:
                check_uid(sock)
                link = ObserverLink(sock, endpoint, settings)
            except BaseException:
                sock.close()
                raise
            try:
                return link, await link.greet(name)
            except BaseException:
                link.close()
                raise
    except TimeoutError:
        raise AttachRefused(
            f"{endpoint} did not answer within {settings.attach_timeout} s: its owner is busy or stopped"
        ) from None
    except ProtocolError as error:
        raise AttachRefused(f"{endpoint}: {error}") from error
