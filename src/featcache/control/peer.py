"""A session, as the owner's end knows it, and what that end needs of the pool behind it."""

import asyncio
import enum
from collections.abc import Sequence
from typing import Protocol

from featcache.control.channel import Channel
from featcache.control.credentials import PidWatch
from featcache.control.messages import Answer, Welcome


class SessionState(enum.Enum):
    """GREETING → ACTIVE → ENDED, or ACTIVE → QUARANTINED → ENDED."""

    GREETING = "greeting"
    ACTIVE = "active"
    QUARANTINED = "quarantined"
    ENDED = "ended"


class Peer:
    """One attached process, as the owner knows it."""

    def __init__(self, number: int, pid: int) -> None:
        self.number = number
        self.pid = pid
        self.name: str | None = None
        self.state = SessionState.GREETING
        self.channel: Channel | None = None
        self.watch: PidWatch | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.layout = 0
        """The last `Retire` that it has carried out."""
        self.tasks: dict[int, asyncio.Task[Answer]] = {}
        """What is under way for it, by the number of its request."""
        self.copies: set[int] = set()
        """Those of them that are copied through the host."""

    def cancel_tasks(self) -> None:
        """Let nothing be under way for it: no answer can reach it any more."""
        for task in list(self.tasks.values()):
            task.cancel()


class Segment(Protocol):
    """A piece of a slab as the server sends it."""

    @property
    def start_bytes(self) -> int:
        """Where it lies in the slab."""

    @property
    def size_bytes(self) -> int:
        """Its bytes."""

    @property
    def fd(self) -> int:
        """What it is mapped by."""


class SessionHost(Protocol):
    """What the server needs of the pool. It knows nothing of slabs; the pool nothing of sockets."""

    @property
    def pool_name(self) -> str:
        """The pool's id in hex, for events."""

    def admit(self, session: Peer) -> tuple[Welcome, list[int]]:
        """Make what a session needs, and return it with the descriptors that go with it.

        They stay the host's, and open. Raise FeatcacheError to refuse.
        """

    def segments(self) -> Sequence[Segment]:
        """Return what a session maps beyond the welcome, in order."""

    def quarantine(self, session: Peer) -> None:
        """Take back what a session without its socket can't use: what it was to make."""

    def end(self, session: Peer, *, died: bool) -> int:
        """Fold what the session paid; if it died, pay for it. Return the reads paid for it."""
