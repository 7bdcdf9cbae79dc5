"""What an owner knows of one other host that reads here."""

import asyncio
import time
from typing import Final, NamedTuple

from featcache.core.slots import Slot
from featcache.owner.far_traffic import Traffic
from featcache.owner.keys import Claim
from featcache.reach import messages
from featcache.reach.messages import Place, encode
from featcache.reach.stream import Stream
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment

_now: Final = time.monotonic


class Begun(NamedTuple):
    """A read that a session of another host has begun: pinned here until it ends."""

    attachment: Attachment
    ref: FeatureRef
    name: str | None


class FarPeer:
    """One host that reads here, from its first connection to the end of its lease.

    ::

        CONNECTED ──the connection breaks──→ AWAY ──it comes back──→ CONNECTED, no ref begun
            │ │                               │
            │ └──────a lease without a word───┴──→ LOST: what it had begun is paid, and what its names owe
            └──goodbye──→ LEFT: what it had begun is unpinned
    """

    def __init__(self, host: bytes) -> None:
        self.host = host
        self.stream: Stream | None = None
        """None while it is AWAY."""
        self.heard_s = self.due_s = _now()
        self.names: frozenset[str] = frozenset()
        self.begun: dict[tuple[Place, int], Begun] = {}
        self.watched: dict[Place, None] = {}
        """Refs that it has looked at, and of whose end it has not been told."""
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.given: dict[int, Slot | Claim] = {}
        """What it was given by key, by its tickets."""
        self.promised: dict[int, bytes] = {}
        """Keys that it is going to offer, by its tickets."""
        self.vouches: dict[int, asyncio.Future[None]] = {}
        """What it is to vouch for, by the numbers of its offers."""
        self.plane = ""
        """The name of its data plane, once it has told of it."""
        self.timer: asyncio.TimerHandle | None = None
        self.address = ""
        """From where it came last."""
        self.reads = self.told_bytes = self.reads_paid = 0
        self.lost = False
        self.traffic = Traffic()
        """Of what it offers."""

    def send(self, message: messages.FromHome) -> None:
        """Send it; no-op while it is AWAY."""
        if self.stream is not None:
            self.stream.send(encode(message))
