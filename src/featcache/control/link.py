"""A session's end of the control connection: attach, send requests, and notice the owner's end."""

import asyncio
import contextlib
import enum
import errno
import os
import socket
from collections.abc import Callable, Sequence

import anyio

from featcache.control import messages
from featcache.control.channel import Channel
from featcache.control.credentials import PidWatch, check_uid, own_pidfd
from featcache.control.descriptors import NO_DESCRIPTOR, close_all
from featcache.control.messages import ProtocolError, Welcome, decode_from_owner, encode, is_answer
from featcache.control.pending import PendingRequests
from featcache.control.rooms import Room, Rooms
from featcache.errors import (
    OUT_OF_DESCRIPTORS,
    AttachRefused,
    CacheClosed,
    FeatcacheError,
    OwnerLost,
    OwnerUnreachable,
    system_errors,
)
from featcache.settings import Settings

_CONNECT_RETRY_S = 0.005
_AGAIN = frozenset((errno.EAGAIN, errno.EINTR))
_FAREWELL_S = 1.0
_MAX_UNTAKEN = 1024
"""Changes of the slab that may come before `take_slab_changes`."""

SlabChange = messages.Segments | messages.UnmapTail


class LinkState(enum.Enum):
    """The life of a link, as this end sees it.

    ::

        GREETING ──→ GREETED ──→ CLOSING ──→ CLOSED
            │           │           │
            └───────────┴───────────┴──────→ LOST

    GREETING: the owner has not answered the hello. GREETED: it has, by a welcome or a refusal. CLOSING:
    new requests are refused, all but `Publish` have failed. CLOSED: this end has closed the channel (from
    any state). LOST: the owner closed, died or broke the protocol; `Link.lost` has the reason.
    """

    GREETING = "greeting"
    GREETED = "greeted"
    CLOSING = "closing"
    CLOSED = "closed"
    LOST = "lost"


_OVER = frozenset((LinkState.CLOSED, LinkState.LOST))


class Link:
    """One attached session. `on_lost` is called once if the owner ends it, never after `close`."""

    def __init__(self, sock: socket.socket, endpoint: str, settings: Settings) -> None:
        self.endpoint = endpoint
        self.on_lost: Callable[[str], None] | None = None
        self.lost: str | None = None
        """Why the owner is gone, once it is."""
        self._cause: Exception | None = None
        self._state = LinkState.GREETING
        loop = asyncio.get_running_loop()
        self._welcome: asyncio.Future[Welcome] = loop.create_future()
        self._welcome_fds: list[int] = []  # this link's to close until `greet` returns them
        self._farewell: asyncio.Future[None] = loop.create_future()
        self._on_slab: Callable[[SlabChange, list[int]], None] | None = None
        self._untaken: list[tuple[SlabChange, list[int]]] = []
        self.on_rooms: Callable[[Sequence[Room]], object] | None = None
        """Told of the slots that the owner gives ahead of this session's puts; it may do without."""
        self._watch: PidWatch | None = None
        self._message_bytes = settings.message_bytes
        self._channel = Channel(
            sock, settings.message_bytes, self._on_message, self._on_channel_lost, requester=True
        )
        self.requests = PendingRequests(self._channel)
        # Those of its requests, bound here: neither a frame nor a look-up more for each request.
        self.number = self.requests.number
        self.request = self.requests.request
        self.tell = self.requests.tell

    async def greet(self, name: str | None, device: str) -> tuple[Welcome, list[int]]:
        """Send the hello; return the welcome and its descriptors but for the owner's pidfd."""
        pidfd = own_pidfd()
        try:
            hello = messages.Hello(messages.VERSION, name, device, self._message_bytes)
            self._channel.send(encode(hello), [pidfd])
        finally:
            os.close(pidfd)
        welcome = await asyncio.shield(self._welcome)
        if self.lost is not None:
            raise OwnerUnreachable(self.lost)
        if (theirs := welcome.version) != messages.VERSION:
            raise AttachRefused(f"the owner speaks version {theirs}, not {messages.VERSION}")
        if not self._welcome_fds:
            raise AttachRefused("the owner's welcome came without descriptors")
        self._watch = PidWatch(self._welcome_fds.pop(0), lambda: self._lose("its process died"))
        self._channel.send_bytes = min(self._message_bytes, welcome.message_bytes)
        fds, self._welcome_fds = self._welcome_fds, []
        return welcome, fds

    @property
    def message_bytes(self) -> int:
        """The longest message that both ends accept."""
        return self._channel.send_bytes

    async def discard(self, slot: int, generation: int) -> None:
        """Have the owner cancel what a ref still owes; return when it has."""
        await self.request(messages.Discard(self.number(), slot, generation))

    async def relay(self, ref: bytes) -> bytes:
        """Have the owner copy a ref's bytes into host memory; return the copy's ref."""
        reply, _ = await self.request(messages.Relay(self.number(), ref))
        if not isinstance(reply, messages.Reply):
            raise ProtocolError(f"the owner answered a relay with {type(reply).__name__}")
        return reply.ref

    def discard_soon(self, slot: int, generation: int) -> None:
        self.tell(messages.Discard(self.number(), slot, generation))

    def undo_soon(self, slot: int, generation: int) -> None:
        """Have the owner drop what was put there: its reads, and its key if it is kept under one still."""
        self.tell(messages.Discard(self.number(), slot, generation, undoes=True))

    def unpin_soon(self, key: bytes) -> None:
        self.tell(messages.KeyCommand(self.number(), key, "unpin"))

    def take_slab_changes(self, take: Callable[[SlabChange, list[int]], None]) -> None:
        """Have `take` called with every change of the slab and its descriptors, which it then owns."""
        self._on_slab = take
        untaken, self._untaken = self._untaken, []
        for change, fds in untaken:
            take(change, fds)

    def read_now(self) -> None:
        """Handle what has come from the owner, in the caller's turn: the loop may not have run since."""
        if self._state not in _OVER:
            self._channel.read_rest(0)

    def tail_unmapped(self, shrink_epoch: int) -> None:
        """Acknowledge an `UnmapTail`: nothing of its segments is mapped here any more."""
        self._channel.send(encode(messages.TailUnmapped(shrink_epoch)))

    async def goodbye(self) -> None:
        """End the session in order: when this returns the owner has folded its page, or is gone."""
        if self._state not in _OVER:
            self._channel.send(encode(messages.Goodbye()))
            try:
                with contextlib.suppress(TimeoutError), anyio.fail_after(_FAREWELL_S):
                    await asyncio.shield(self._farewell)
            finally:
                self.close()  # also when this is cancelled

    def say_goodbye(self) -> None:
        """End the session in order, without waiting for the owner's answer."""
        if self._state not in _OVER:
            self._channel.send(encode(messages.Goodbye()))
        self.close()

    def fail_all(self, error: FeatcacheError) -> None:
        """Begin to close: fail every request but `Publish` with this error, and refuse new ones."""
        if self._state is LinkState.GREETED:
            self._state = LinkState.CLOSING
        self.requests.fail_all(error)

    def close(self) -> None:
        """Close the connection without a goodbye: the owner then waits for this process to die."""
        if self._state is not LinkState.LOST:
            self._state = LinkState.CLOSED
        # First: what is called below can send nothing, and no message comes in any more.
        self._channel.close()
        if self._watch is not None:
            self._watch.close()
        self._close_welcome()
        self._on_slab = self.on_rooms = (
            None  # it refers to the connection that holds this link: no cycle is left
        )
        self._end()

    def forget(self) -> None:
        self._state = LinkState.CLOSED
        self._channel.forget()
        self.requests.forget()
        if self._watch is not None:
            self._watch.forget()
        self._close_welcome()

    def abandon(self) -> None:
        """Close in a process whose loop for this link was closed under it."""
        self._channel.forget(hangs_up=True)
        self.forget()

    def _close_welcome(self) -> None:
        close_all(self._welcome_fds)
        self._welcome_fds = []
        for _, fds in self._untaken:
            close_all(fds)
        self._untaken = []

    # --- incoming messages ----------------------------------------------------------------------

    def _on_message(self, payload: bytes, fds: list[int]) -> None:
        try:
            message = decode_from_owner(payload)
            if fds and NO_DESCRIPTOR in fds:
                lacking, fds = fds, []
                self._take_without(message, lacking)
            elif is_answer(message):
                taken, fds = fds, []
                self.requests.deliver(message, taken)
            elif isinstance(message, SlabChange | Rooms) and self._state is not LinkState.GREETING:
                taken, fds = fds, []
                self._change_slab(message, taken)
            elif isinstance(message, Welcome) and self._state is LinkState.GREETING:
                self._state = LinkState.GREETED
                self._welcome_fds, fds = fds, []
                self._welcome.set_result(message)
            elif isinstance(message, messages.Refused) and self._state is LinkState.GREETING:
                self._state = LinkState.GREETED
                self._welcome.set_exception(AttachRefused(f"refused: {message.reason}"))
            elif isinstance(message, messages.Farewell) and self._state is not LinkState.GREETING:
                self._on_farewell()
            elif isinstance(message, messages.Closing):
                self._lose("it closed the pool")
            else:
                raise ProtocolError(f"an unexpected {type(message).__name__}")
        finally:
            if fds:  # no branch took them
                close_all(fds)

    def _take_without(self, message: messages.FromOwner, fds: list[int]) -> None:
        """Take a message that came while this process had no room for its descriptors.

        The session goes on, so that it can say goodbye, and can be asked again.
        """
        if isinstance(message, SlabChange) and self._state is not LinkState.GREETING:
            self._change_slab(message, fds)  # which tells it when it is mapped
            return
        close_all(fds)
        if is_answer(message):
            refusal = messages.Reply(message.request, "BackendUnavailable", OUT_OF_DESCRIPTORS)
            self.requests.deliver(refusal, [])
        elif isinstance(message, Welcome) and self._state is LinkState.GREETING:
            self._state = LinkState.GREETED
            self._welcome.set_exception(AttachRefused(f"{self.endpoint}: {OUT_OF_DESCRIPTORS}"))
        else:
            raise ProtocolError(f"a {type(message).__name__} with descriptors")

    def _change_slab(self, change: SlabChange | Rooms, fds: list[int]) -> None:
        if len(fds) != (len(change.sizes) if isinstance(change, messages.Segments) else 0):
            close_all(fds)
            raise ProtocolError("a change of the slab needs one descriptor for each new segment")
        if isinstance(change, Rooms):
            if self.on_rooms is not None:
                self.on_rooms(change.rooms)
            return
        if self._on_slab is not None:
            self._on_slab(change, fds)
            return
        self._untaken.append((change, fds))
        if len(self._untaken) > _MAX_UNTAKEN:
            raise ProtocolError(f"more than {_MAX_UNTAKEN} changes of the slab while it is mapped")

    def _on_channel_lost(self, error: Exception | None) -> None:
        self._lose("its socket closed" if error is None else str(error), error)

    def _lose(self, reason: str, error: Exception | None = None) -> None:
        if self._state in _OVER:
            return
        if isinstance(error, ProtocolError) and not self._welcome.done():
            refused = AttachRefused(f"{self.endpoint}: {error}")
            refused.__cause__ = error
            self._welcome.set_exception(refused)
        if self._on_slab is None:  # nothing is mapped yet; no-op if the channel is closed already
            self._channel.send(encode(messages.Goodbye()))
        # The reason before the end: it is what the requests that fail now raise.
        if self._state is LinkState.GREETING and not isinstance(error, ProtocolError):
            reason = f"{reason} before it answered; it ended, or could take no more (its log says)"
        ended = "session at {} ended" if isinstance(error, ProtocolError) else "owner at {} is gone"
        self.lost = f"the {ended.format(self.endpoint)}: {reason}"
        # Not its traceback, whose frames refer to the channel and so to this link.
        self._cause = None if error is None else error.with_traceback(None)
        self._state = LinkState.LOST
        self.close()
        if self.on_lost is not None:
            self.on_lost(reason)

    def _end(self) -> None:
        """Fail whatever awaits an answer that can't come."""
        why = self.lost or "the session was closed"
        if not self._welcome.done():
            refused = AttachRefused if self.lost is None else OwnerUnreachable
            self._welcome.set_exception(refused(why))
            self._welcome.exception()  # counted as seen: nobody may be waiting
        self._on_farewell()
        end = CacheClosed(why) if self.lost is None else OwnerLost(why)
        end.__cause__ = self._cause
        self.requests.end(end)

    def _on_farewell(self) -> None:
        if not self._farewell.done():
            self._farewell.set_result(None)


async def dial(
    endpoint: str, name: str | None, device: str, settings: Settings
) -> tuple[Link, Welcome, list[int]]:
    """Attach to the owner at `endpoint`.

    Returns the link, the welcome, and the descriptors after the owner's pidfd: its words, the
    session's page, the eventfd, the slab's. The caller owns them.

    Raises:
        OwnerUnreachable: nothing listens there.
        AttachRefused: another user's process, another protocol or version, no answer in time, no
            free session, or nothing left of what the system gives (descriptors, memory).
        BackendUnavailable: this process can have no pidfd.

    """
    with system_errors(AttachRefused, f"can't reach {endpoint}"):
        return await _dial(endpoint, name, device, settings)


async def _dial(
    endpoint: str, name: str | None, device: str, settings: Settings
) -> tuple[Link, Welcome, list[int]]:
    try:
        with anyio.fail_after(settings.attach_timeout):
            sock = await connect_socket(endpoint)
            try:
                check_uid(sock)
                link = Link(sock, endpoint, settings)
            except BaseException:
                sock.close()
                raise
            try:
                welcome, fds = await link.greet(name, device)
            except BaseException:
                # The owner may have admitted this session already: without a goodbye it would keep
                # its name and its place until this process dies.
                link.say_goodbye()
                raise
    except TimeoutError:
        raise AttachRefused(
            f"{endpoint} did not answer within {settings.attach_timeout} s: its owner is busy, stopped "
            "or out of file descriptors (its log says); or raise Settings.attach_timeout"
        ) from None
    except ProtocolError as error:
        raise AttachRefused(f"{endpoint}: {error}") from error
    return link, welcome, fds


async def connect_socket(endpoint: str) -> socket.socket:
    """Return a socket that is connected to an owner, or raise OwnerUnreachable."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        # A Unix socket connects at once or, while the listener's backlog is full, fails with EAGAIN;
        # it never becomes writable, so it can only be polled.
        while (code := sock.connect_ex(endpoint)) in _AGAIN:  # noqa: ASYNC110 - no event for it
            await anyio.sleep(_CONNECT_RETRY_S)
        if code in {errno.ENOENT, errno.ECONNREFUSED}:
            raise OwnerUnreachable(f"no owner listens at {endpoint}: {os.strerror(code)}")
        if code != 0:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock
