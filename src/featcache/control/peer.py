"""The owner's record of an attached process, and the pool's side of its session."""

import asyncio
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

from featcache.control.channel import Channel
from featcache.control.credentials import PidWatch
from featcache.control.messages import Answer, Welcome
from featcache.control.turns import QUANTUM_UNITS, WAKE_UNITS, Turn


class SessionState(enum.Enum):
    """The life of a session, as the owner sees it.

    ::

        GREETING ──welcome──→ ACTIVE ──goodbye, or its process died──→ SETTLING ──→ ENDED
            │                    │ its socket closed                      ↑           ↑
            │                    ↓                                        │           │
            │               QUARANTINED ──its process died, or its page───┘           │
            │                             says that it holds nothing                  │
            └──refused, late, or gone─────────────────────────────────────────────────┘

    QUARANTINED: the process lives and may be reading the slab, so its holds stand until its pidfd fires,
    or until it says by its page (`is_abandoned`) that there are none, and attaches anew.
    SETTLING: what it held and owed is settled, which may take several turns of the loop; it still has its
    name and its number, and nothing of what it asks for is done.
    """

    GREETING = "greeting"
    ACTIVE = "active"
    QUARANTINED = "quarantined"
    SETTLING = "settling"
    ENDED = "ended"


class Posts(Protocol):
    """What a session posts in its page: notes, each a frame's payload."""

    def __bool__(self) -> bool:
        """Whether any wait there."""

    def take(self) -> Sequence[bytes]:
        """Return those that wait, or raise ValueError: they are not as a session writes them."""


class Peer:
    """One attached process, and its session's state."""

    def __init__(self, number: int, pid: int) -> None:
        self.number = number
        """The session's number: never used again."""
        self.pid = pid
        self.name: str | None = None
        self.state = SessionState.GREETING
        self.posts: Posts | None = None
        """While any can come."""
        self.channel: Channel
        """Set as the session is accepted."""
        self.watch: PidWatch | None = None
        self.deadline: asyncio.TimerHandle | None = None
        """Of its hello while GREETING, of the quarantine's event while QUARANTINED."""
        self.shrink_epoch = 0
        """That of the last `UnmapTail` that it has carried out."""
        self.tasks: dict[int, asyncio.Task[Answer]] = {}
        """Requests in progress, by number."""
        self.copies: set[int] = set()
        """Those of them that copy through host memory."""
        self.name_passed_on = False
        """Whether a later session of the same process has its name, and what that owes when it dies."""

    @property
    def gone(self) -> bool:
        """Whether its socket has closed, at least at its end."""
        return self.state is SessionState.QUARANTINED or self.channel.hung_up

    def is_process_of(self, other: "Peer") -> bool:
        """Whether both are of one process, as the system says, not they."""
        if self.pid != other.pid or self.watch is None or other.watch is None:
            return False
        return self.watch.is_of(other.watch)

    def cancel_tasks(self, turn: Turn) -> Iterator[None]:
        """Cancel every request in progress, one at each step: no answer can reach the session."""
        for task in list(self.tasks.values()):
            turn.left -= WAKE_UNITS
            task.cancel()
            yield

    def end_tasks(self, turn: Turn) -> Iterator[None]:
        """As `cancel_tasks`, and then wait, a turn of the loop at each step, until they have ended."""
        yield from self.cancel_tasks(turn)
        while self.tasks:
            turn.left -= QUANTUM_UNITS
            yield


Segment: TypeAlias = tuple[int, int, int]
"""A piece of a slab: its offset and size in bytes, and the descriptor that it is mapped from."""


class SessionHost(Protocol):
    """The pool's side of a session's life. The server knows nothing of slabs, the pool of sockets."""

    @property
    def pool_name(self) -> str:
        """The pool's id in hex, for events."""

    def admit(self, peer: Peer, /) -> tuple[Welcome, list[int]]:
        """Make the session's page; return its welcome and descriptors, which stay the host's, open.

        Raise FeatcacheError to refuse.
        """

    def segments(self) -> Sequence[Segment]:
        """Return the segments that a session maps after its welcome, in order."""

    def quarantine(self, peer: Peer, /) -> None:
        """Revoke the claims of a session that lost its socket: it could publish nothing."""

    def is_leaving(self, peer: Peer, /) -> bool:
        """Whether the session says in its page that it begins nothing more."""

    def is_abandoned(self, peer: Peer, /) -> bool:
        """Whether it says besides that it holds nothing."""

    def has_left(self, peer: Peer, /) -> bool:
        """Whether it says besides that it was closed: a goodbye that no socket can drop."""

    def end(self, peer: Peer, ended: Callable[[int], object], /, *, died: bool) -> None:
        """Fold what the session paid; if its process died, pay for it.

        In pieces: once it is done, `ended` is called with the reads paid so, perhaps before this returns.
        """
