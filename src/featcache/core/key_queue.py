"""Who waits for a key that is not there, and who was chosen to make what it stands for.

A *seeker* waits for one key. One that `makes` may be chosen to make the feature itself: then it has
the key's *claim* until it gives it back, by which time it has published the feature or failed to. There
is one claim to a key, so of all who ask at once one makes. Handing over is a handshake, as for room
(`core.waiters`): what was handed to a seeker that gave up meanwhile goes to the next.
"""

import enum
from collections import OrderedDict

from featcache.core.slots import Slot


class KeyWaiterState(enum.Enum):
    """WAITING → FOUND or CHOSEN → TAKEN, or GONE from any but the last."""

    WAITING = "waiting"
    FOUND = "found"
    CHOSEN = "chosen"
    TAKEN = "taken"
    GONE = "gone"


class KeyWaiter:
    """One who waits for a key. `tag` is the caller's own; the core never looks."""

    __slots__ = ("claim", "key", "makes", "number", "session", "slot", "state", "tag")

    def __init__(self, number: int, key: bytes, session: int, *, makes: bool, tag: object) -> None:
        self.number = number
        self.key = key
        self.session = session
        self.makes = makes
        self.tag = tag
        self.state = KeyWaiterState.WAITING
        self.slot: Slot | None = None
        """What it was granted, once FOUND."""
        self.claim = 0
        """The number of its claim, once CHOSEN."""


class KeyQueue:
    """Seekers by key in order of arrival, and the claims that are out."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, OrderedDict[int, KeyWaiter]] = {}
        self._claims: dict[bytes, tuple[int, int]] = {}
        """By key: the claim's number and its session."""
        self._numbers = 0
        self.count = 0

    def join(self, key: bytes, session: int, *, makes: bool, tag: object) -> KeyWaiter:
        """Wait for a key. One that makes is chosen at once if nobody has the claim."""
        self._numbers += 1
        waiter = KeyWaiter(self._numbers, key, session, makes=makes, tag=tag)
        if makes and key not in self._claims:
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
        """Give up. Return the state before: what had been handed over is the caller's to pass on."""
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
        """Hand everybody who waits for a key its slot, and return them."""
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
        """How many claims are out."""
        return len(self._claims)

    def claimed(self, key: bytes) -> bool:
        """Whether somebody has the claim to a key."""
        return key in self._claims

    def holds(self, key: bytes, claim: int) -> bool:
        """Whether this is the claim that is out."""
        held = self._claims.get(key)
        return held is not None and held[0] == claim

    def release_claim(self, key: bytes, claim: int) -> KeyWaiter | None:
        """Take a claim back, if it is the one that is out; return who has it next."""
        if not self.holds(key, claim):
            return None
        del self._claims[key]
        for waiter in self._waiting.get(key, {}).values():
            if waiter.makes:
                self._take_out(waiter)
                self._choose(waiter)
                return waiter
        return None

    def has(self, key: bytes, claim: int, session: int) -> bool:
        """Whether this is the claim that is out, and a session has it."""
        return self._claims.get(key) == (claim, session)

    def claims_of(self, session: int) -> list[tuple[bytes, int]]:
        """Return the claims that a session has."""
        return [(key, claim) for key, (claim, whose) in self._claims.items() if whose == session]

    def waiting(self) -> list[KeyWaiter]:
        """Return the seekers that still wait. For ends, not for hot paths."""
        return [waiter for waiting in self._waiting.values() for waiter in waiting.values()]

    def of(self, session: int) -> list[KeyWaiter]:
        """Return those of a session."""
        return [waiter for waiter in self.waiting() if waiter.session == session]
