"""A reader's end of the control connection: attach, ask, and notice the owner's end."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable

import anyio

from featcache.control.channel import Channel, close_all
from featcache.control.credentials import PidWatch, check_uid, own_pidfd
from featcache.control.messages import (
    VERSION,
    Closing,
    Discard,
    Farewell,
    Goodbye,
    Hello,
    KeyCommand,
    ProtocolError,
    Refused,
    Relay,
    Reply,
    Segments,
    TailUnmapped,
    UnmapTail,
    Welcome,
    decode_from_owner,
    encode,
    is_answer,
)
from featcache.control.pending import PendingRequests
from featcache.errors import (
    AttachRefused,
    CacheClosed,
    OwnerLost,
    OwnerUnreachable,
)
from featcache.settings import Settings

_CONNECT_RETRY_S = 0.005
_FAREWELL_S = 1.0
_MAX_UNTAKEN = 1024
"""Changes of the slab that may come before somebody takes them."""

SlabChange = Segments | UnmapTail


class Link(PendingRequests):
    """One attached session. `on_lost` is called once if the owner ends it, never after `close`."""

    def __init__(self, sock: socket.socket, endpoint: str, settings: Settings) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.on_lost: Callable[[str], None] | None = None
        self._welcome: asyncio.Future[Welcome] = self._loop.create_future()
        self._welcome_fds: list[int] = []  # this link's to close until `greet` hands them on
        self._farewell: asyncio.Future[None] = self._loop.create_future()
        self._on_slab: Callable[[SlabChange, list[int]], None] | None = None
        self._untaken: list[tuple[SlabChange, list[int]]] = []
        self._watch: PidWatch | None = None
        self._message_bytes = settings.message_bytes
        self._channel = Channel(
            sock, settings.message_bytes, self._on_message, self._on_channel_lost, asks=True
        )

    async def greet(self, name: str | None, device: str) -> tuple[Welcome, list[int]]:
        """Say hello; return the owner's answer and its descriptors, the owner's pidfd taken out."""
        pidfd = own_pidfd()
        try:
            hello = Hello(VERSION, name, device, self._message_bytes)
            self._channel.send(encode(hello), [pidfd])
        finally:
            os.close(pidfd)
        welcome = await asyncio.shield(self._welcome)
        if self.lost is not None:
            raise OwnerUnreachable(self.lost)
        if welcome.version != VERSION:
            raise AttachRefused(f"the owner speaks version {welcome.version}, not {VERSION}")
        if not self._welcome_fds:
            raise AttachRefused("the owner's welcome came without descriptors")
        self._watch = PidWatch(self._welcome_fds.pop(0), lambda: self._lose("its process died"))
        self._channel.send_bytes = min(self._message_bytes, welcome.message_bytes)
        fds, self._welcome_fds = self._welcome_fds, []
        return welcome, fds

    async def discard(self, slot: int, generation: int) -> None:
        """Ask the owner to cancel a ref; return when it has."""
        await self.ask(Discard(self.number(), slot, generation))

    async def relay(self, ref: bytes) -> bytes:
        """Ask the owner to copy a ref's bytes into host memory; return the copy's ref."""
        reply, _ = await self.ask(Relay(self.number(), ref))
        if not isinstance(reply, Reply):
            raise ProtocolError("the owner answered a relay with something else")
        return reply.ref

    def discard_soon(self, slot: int, generation: int) -> None:
        """As `discard`, for who does not want to know."""
        self.tell(Discard(self.number(), slot, generation))

    def unpin_soon(self, key: bytes) -> None:
        """Take a pin back, for who does not want to know."""
        self.tell(KeyCommand(self.number(), key, "unpin"))

    def take_slab_changes(self, take: Callable[[SlabChange, list[int]], None]) -> None:
        """Have `take` called with every change of the slab and its descriptors, which it then owns."""
        self._on_slab = take
        untaken, self._untaken = self._untaken, []
        for change, fds in untaken:
            take(change, fds)

    def retired(self, layout: int) -> None:
        """Say that what a `UnmapTail` took away is not mapped here any more."""
        self._channel.send(encode(TailUnmapped(layout)))

    async def goodbye(self) -> None:
        """End the session in order: when this returns the owner has folded it (or is gone)."""
        if self.lost is None and not self._channel.closed:
            self._channel.send(encode(Goodbye()))
            with contextlib.suppress(TimeoutError), anyio.fail_after(_FAREWELL_S):
                await asyncio.shield(self._farewell)
        self.close()

    def say_goodbye(self) -> None:
        """End the session in order, without waiting for the owner's answer."""
        if self.lost is None and not self._channel.closed:
            self._channel.send(encode(Goodbye()))
        self.close()

    def close(self) -> None:
        """Drop the connection without a word; the owner then waits for this process to die."""
        self._channel.close()
        if self._watch is not None:
            self._watch.close()
        self._close_welcome()
        self._on_slab = None  # the handle holds this link: without a cycle it goes at once
        self.on_orphan = None
        self._settle("the session was closed")

    def forget(self) -> None:
        """Drop descriptors in a forked child."""
        self._channel.forget()
        if self._watch is not None:
            self._watch.forget()
        self._close_welcome()

    def _close_welcome(self) -> None:
        close_all(self._welcome_fds)
        self._welcome_fds = []
        for _, fds in self._untaken:
            close_all(fds)
        self._untaken = []

    # --- what comes in --------------------------------------------------------------------------

    def _on_message(self, payload: bytes, fds: list[int]) -> None:
        try:
            message = decode_from_owner(payload)
            if is_answer(message):
                answered, fds = fds, []
                self._answer(message, answered)
            elif isinstance(message, Welcome) and not self._welcome.done():
                self._welcome.set_result(message)
                self._welcome_fds, fds = fds, []
            elif isinstance(message, Refused) and not self._welcome.done():
                self._welcome.set_exception(AttachRefused(f"refused: {message.reason}"))
            elif isinstance(message, Farewell) and self._welcome.done():
                self._resolve(self._farewell)
            elif isinstance(message, Closing):
                self._lose("it closed the pool")
            elif isinstance(message, SlabChange) and self._welcome.done():
                changed, fds = fds, []
                self._change_slab(message, changed)
            else:
                raise ProtocolError(f"an unexpected {type(message).__name__}")
        finally:
            close_all(fds)

    def _change_slab(self, change: SlabChange, fds: list[int]) -> None:
        if len(fds) != (len(change.sizes) if isinstance(change, Segments) else 0):
            close_all(fds)
            raise ProtocolError("segments and descriptors that are not as many")
        if self._on_slab is not None:
            self._on_slab(change, fds)
            return
        self._untaken.append((change, fds))
        if len(self._untaken) > _MAX_UNTAKEN:
            raise ProtocolError(f"more than {_MAX_UNTAKEN} changes of the slab at once")

    def _on_channel_lost(self, error: Exception | None) -> None:
        self._lose("its socket closed" if error is None else str(error), error)

    def _lose(self, reason: str, error: Exception | None = None) -> None:
        if self.lost is not None:
            return
        if isinstance(error, ProtocolError) and not self._welcome.done():
            self._welcome.set_exception(AttachRefused(f"{self.endpoint}: {error}"))
        self.lost = f"the owner at {self.endpoint} is gone: {reason}"
        self.close()
        if self.on_lost is not None:
            self.on_lost(reason)

    def _settle(self, reason: str) -> None:
        """Let nobody wait for an answer that can't come."""
        lost = self.lost or reason
        kind = CacheClosed if self.lost is None else OwnerLost
        if not self._welcome.done():
            refused = AttachRefused if self.lost is None else OwnerUnreachable
            self._welcome.set_exception(refused(lost))
            self._welcome.exception()  # counted as seen: nobody may be waiting
        self._resolve(self._farewell)
        self._refuse_all(kind(lost))

    @staticmethod
    def _resolve(future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)


async def dial(
    endpoint: str, name: str | None, device: str, settings: Settings
) -> tuple[Link, Welcome, list[int]]:
    """Attach to the owner at `endpoint`.

    Returns the link, the welcome, and the descriptors after the owner's pidfd: its words, the
    session's page, the eventfd, the slab's. They are the caller's.

    Raises:
        OwnerUnreachable: nobody listens there (any more).
        AttachRefused: another user's, another protocol or version, no answer in time, no place.

    """
    try:
        with anyio.fail_after(settings.attach_timeout):
            sock = await _connect(endpoint)
            try:
                check_uid(sock)
                link = Link(sock, endpoint, settings)
            except BaseException:
                sock.close()
                raise
            try:
                welcome, fds = await link.greet(name, device)
            except BaseException:
                # The owner may have let us in already: without a goodbye it would wait for this
                # process to die before it gave the name and the place to another.
                link.say_goodbye()
                raise
    except TimeoutError:
        raise AttachRefused(
            f"{endpoint} did not answer within {settings.attach_timeout} s"
        ) from None
    except ProtocolError as error:
        raise AttachRefused(f"{endpoint}: {error}") from error
    return link, welcome, fds


async def _connect(endpoint: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        # A Unix socket connects at once or, when the listener's backlog is full, says EAGAIN and has
        # nothing to wait on.
        while (code := sock.connect_ex(endpoint)) == errno.EAGAIN:  # noqa: ASYNC110 - nothing tells
            await anyio.sleep(_CONNECT_RETRY_S)
        if code in {errno.ENOENT, errno.ECONNREFUSED}:
            raise OwnerUnreachable(f"no owner listens at {endpoint}: {os.strerror(code)}")
        if code != 0:
            raise AttachRefused(f"can't reach {endpoint}: {os.strerror(code)}")
    except BaseException:
        sock.close()
        raise
    return sock
