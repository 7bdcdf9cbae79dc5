"""Single-flight: waiters by key, and which of them holds the claim to compute it.

A waiter that `can_make` may be chosen to compute the feature itself: then it holds the key's *claim*
until it releases it, by which time it has published the feature or failed to. There is one claim to a
key, so of all concurrent calls one computes. Handing over is a handshake, as for room
(`core.put_queue`): a grant or claim handed to a waiter that gave up meanwhile is not lost, the store
pays the grant and passes the claim on.
"""

import enum
from collections import OrderedDict

from featcache.core.slots import Slot


class KeyWaiterState(enum.Enum):
    """A key waiter's life.

    | from | by | to |
    | --- | --- | --- |
    | (new) | `join`, if it can make and no claim to the key is out | CHOSEN |
    | (new) | `join` otherwise | WAITING |
    | WAITING | `found`: the key was published | FOUND, with a grant on the slot |
    | WAITING | `release_claim` of the claim before | CHOSEN, with the next claim |
    | FOUND, CHOSEN | `KeyedStore.take` | TAKEN |
    | any but TAKEN | `leave` | GONE; the caller passes on what was handed over |
    """

    WAITING = "waiting"
    FOUND = "found"
    CHOSEN = "chosen"
    TAKEN = "taken"
    GONE = "gone"


class KeyWaiter:
    """A waiter for one key. `tag` is the caller's own (a future); the core never looks at it."""

    __slots__ = ("can_make", "claim", "key", "number", "session", "slot", "state", "tag")

    def __init__(
        self, number: int, key: bytes, session: int, *, can_make: bool, tag: object
    ) -> None:
        self.number, self.key, self.session = number, key, session
        self.can_make, self.tag = can_make, tag
        self.state = KeyWaiterState.WAITING
        self.slot: Slot | None = None
        """The slot on which it has a grant, once FOUND."""
        self.claim = 0
        """The number of its claim, once CHOSEN."""


class KeyQueue:
    """Waiters by key in order of arrival, and the claims that are out."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, OrderedDict[int, KeyWaiter]] = {}
        self._claims: dict[bytes, tuple[int, int]] = {}  # by key: its number and its session
        self._numbers = 0
        self.count = 0

    def join(self, key: bytes, session: int, *, can_make: bool, tag: object) -> KeyWaiter:
        """Add a waiter. One that can make is chosen at once if no claim to the key is out."""
        self._numbers += 1
        waiter = KeyWaiter(self._numbers, key, session, can_make=can_make, tag=tag)
        if can_make and key not in self._claims:
            self._choose(waiter)
        else:
            self._waiting.setdefault(key, OrderedDict())[waiter.number] = waiter
            self.count += 1
        return waiter

    def _choose(self, waiter: KeyWaiter) -> None:
        self._claims[waiter.key] = (waiter.number, waiter.session)
        waiter.state = KeyWaiterState.CHOSEN
        waiter.claim = waiter.number

    def leave(self, waiter: KeyWaiter) -> KeyWaiterState:
        """Give up. Return the state before: a grant or claim handed over is the caller's to pass on."""
        was = waiter.state
        if was is KeyWaiterState.WAITING:
            self._take_out(waiter)
        if was is not KeyWaiterState.TAKEN:
            waiter.state = KeyWaiterState.GONE
        return was

    def _take_out(self, waiter: KeyWaiter) -> None:
        waiting = self._waiting[waiter.key]
        del waiting[waiter.number]
        self.count -= 1
        if not waiting:
            del self._waiting[waiter.key]

    def found(self, key: bytes, slot: Slot) -> list[KeyWaiter]:
        """Hand the slot to all waiters of a key, and return them."""
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            return []
        self.count -= len(waiting)
        for waiter in waiting.values():
            waiter.state = KeyWaiterState.FOUND
            waiter.slot = slot
        return list(waiting.values())

    @property
    def claims(self) -> int:
        return len(self._claims)

    def claimed(self, key: bytes) -> bool:
        return key in self._claims

    def holds(self, key: bytes, claim: int) -> bool:
        return self._claims.get(key, (None, 0))[0] == claim

    def release_claim(self, key: bytes, claim: int) -> KeyWaiter | None:
        """End a claim, if it is the one that is out; return the waiter that holds the next, if any."""
        if not self.holds(key, claim):
            return None
        del self._claims[key]
        for waiter in self._waiting.get(key, {}).values():
            if waiter.can_make:
                self._take_out(waiter)
                self._choose(waiter)
                return waiter
        return None

    def has(self, key: bytes, claim: int, session: int) -> bool:
        """Whether this is the claim that is out, and held by this session."""
        return self._claims.get(key) == (claim, session)

    def claims_of(self, session: int) -> list[tuple[bytes, int]]:
        return [(key, claim) for key, (claim, holder) in self._claims.items() if holder == session]

    def waiting(self) -> list[KeyWaiter]:
        """Return all that still wait. For ends, not for hot paths."""
        return [waiter for waiting in self._waiting.values() for waiter in waiting.values()]

    def by_session(self, session: int) -> list[KeyWaiter]:
        return [waiter for waiter in self.waiting() if waiter.session == session]
