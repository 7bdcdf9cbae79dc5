"""The TCP socket at which other hosts come in, bounded in number and time."""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Final

from featcache.errors import FeatcacheError, SettingsError, explain
from featcache.reach.handshake import Conversation, Role
from featcache.reach.secret import WILDCARDS, Address, TlsContexts
from featcache.reach.stream import Stream
from featcache.reach.tls_gate import TlsGate
from featcache.settings import Settings

_BACKLOG: Final = 64
_ANY_IPV6: Final = "::"


def _why_not(error: OSError | UnicodeError) -> str:
    """Return why an address can't be had; of one in use, in the words that `serve` ends with its code for."""
    if not isinstance(error, OSError):
        return ": no host has such a name"
    if error.errno == errno.EADDRINUSE:
        return " is in use: name another port, or stop the program that listens there"
    if error.errno == errno.EADDRNOTAVAIL:
        return " is no address of this host: name one that it has"
    return f": {explain(error)}"


class Listener:
    """Accepts hosts that prove the cluster key; each is handed over once it has."""

    def __init__(
        self,
        key: bytes,
        host: bytes,
        settings: Settings,
        tls: TlsContexts,
        on_host: Callable[[Stream], object],
        on_refused: Callable[[str, str], object],
    ) -> None:
        """`on_host` is told of a stream that is open, `on_refused` of an address and a reason."""
        self._key = key
        self._host = host
        self._settings = settings
        self._tls = tls
        self._on_host = on_host
        self._on_refused = on_refused
        self._server: asyncio.Server | None = None
        self._greeting: set[Stream] = set()
        self._securing: set[TlsGate] = set()
        """Connections in their TLS handshake, of those in any."""
        self._hosts: set[Stream] = set()
        self.address = ""
        """What refs carry: where other hosts find this one."""

    async def listen(self, wanted: Address) -> None:
        """Listen; port 0 is any. A wildcard host listens at all addresses, and refs carry the host's name.

        ``::`` is both families', ``0.0.0.0`` IPv4's.

        Raises:
            SettingsError: the address is in use, or not this host's.

        """
        loop = asyncio.get_running_loop()
        accept = self._accept if self._tls.listening is None else self._accept_tls
        try:
            if wanted.host == _ANY_IPV6:  # IPv4 as well: asyncio itself would leave that out
                place = socket.create_server(
                    tuple(wanted), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
                )
                self._server = await loop.create_server(accept, sock=place, backlog=_BACKLOG)
            else:
                self._server = await loop.create_server(
                    accept, wanted.host, wanted.port, backlog=_BACKLOG
                )
        except (OSError, UnicodeError) as error:
            raise SettingsError(f"listen={wanted}{_why_not(error)}") from error
        port = self._server.sockets[0].getsockname()[1]
        named = socket.gethostname() if wanted.host in WILDCARDS else wanted.host
        self.address = str(Address(named, port))

    def _accept(self, gate: TlsGate | None = None) -> Stream:
        talk = Conversation(Role.LISTENER, self._key, self._host)
        stream = _Incoming(talk, self._settings.peer_timeout, self, gate)
        stream.on_closed = lambda error: self._gone(stream, error)
        return stream

    def _accept_tls(self) -> TlsGate:
        tls = self._tls.listening
        assert tls is not None, "it listens with TLS"
        return TlsGate(
            tls,
            self._settings.peer_timeout,
            self._admit_tls,
            self._accept,
            self._secure_over,
        )

    def _admit_tls(self, gate: TlsGate) -> bool:
        """Count a connection that is to be put under TLS; nothing can be told to one that is sent away."""
        if self._is_full:
            self._on_refused(gate.where, self._full())
            return False
        self._securing.add(gate)
        return True

    def _secure_over(self, gate: TlsGate, reason: str | None) -> None:
        self._securing.discard(gate)
        if reason is not None:
            self._on_refused(gate.where, reason)

    @property
    def _is_full(self) -> bool:
        return len(self._greeting) + len(self._securing) >= self._settings.peers

    def _full(self) -> str:
        most = self._settings.peers
        return f"{most} hosts are in their handshake already: try again, or raise Settings.peers"

    def admit(self, stream: Stream, gate: TlsGate | None) -> bool:
        """Count a connection that was just made, or send it away. It may have had a place in its `gate`."""
        if gate is not None:
            self._securing.discard(gate)
        if self._is_full:
            stream.refuse(self._full())
            return False
        self._greeting.add(stream)
        stream.on_open = lambda: self._opened(stream)
        return True

    def _opened(self, stream: Stream) -> None:
        self._greeting.discard(stream)
        if len(self._hosts) >= self._settings.peers:
            # Its handshake is over, so it is told by the end of the connection alone.
            stream.close(FeatcacheError(f"{len(self._hosts)} hosts are connected: Settings.peers"))
            return
        self._hosts.add(stream)
        stream.on_closed = lambda _: self._hosts.discard(stream)
        self._on_host(stream)

    def forget_host(self, stream: Stream) -> None:
        """Count a host as gone; called by whoever took its `on_closed` over."""
        self._hosts.discard(stream)

    def _gone(self, stream: Stream, error: FeatcacheError | None) -> None:
        self._greeting.discard(stream)
        if error is not None:
            self._on_refused(stream.where, str(error))

    def close(self) -> None:
        """Accept nobody, and end all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for gate in list(self._securing):
            gate.close()
        for stream in [*self._greeting, *self._hosts]:
            stream.on_closed = _ignore
            stream.close()
        self._greeting.clear()
        self._hosts.clear()

    def forget(self) -> None:
        """Drop everything in a forked child."""
        for stream in [*self._greeting, *self._hosts]:
            stream.forget()


class _Incoming(Stream):
    """A connection that was accepted: counted before its handshake begins."""

    def __init__(
        self, talk: Conversation, timeout_s: float, listener: Listener, gate: TlsGate | None
    ) -> None:
        super().__init__(talk, timeout_s)
        self._listener = listener
        self._gate = gate

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it, or refuse it."""
        super().connection_made(transport)
        self._listener.admit(self, self._gate)


def _ignore(_: FeatcacheError | None) -> None:
    """Do nothing: this end closes."""
