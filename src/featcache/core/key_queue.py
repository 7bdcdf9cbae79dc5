"""Who waits for a key that is not there, and who was chosen to make what it stands for.

A *seeker* waits for one key. One that `makes` may be chosen to make the feature itself: then it has
the key's *claim* until it gives it back, by which time it has published the feature or failed to. There
is one claim to a key, so of all who ask at once one makes. Handing over is a handshake, as for room
(`core.waiters`): what was handed to a seeker that gave up meanwhile goes to the next.
"""

import enum
from collections import OrderedDict

from featcache.core.slots import Slot


class SeekerState(enum.Enum):
    """WAITING → FOUND or CHOSEN → TAKEN, or GONE from any but the last."""

    WAITING = "waiting"
    FOUND = "found"
    CHOSEN = "chosen"
    TAKEN = "taken"
    GONE = "gone"


class Seeker:
    """One who waits for a key. `tag` is the caller's own; the core never looks."""

    __slots__ = ("claim", "key", "makes", "number", "session", "slot", "state", "tag")

    def __init__(self, number: int, key: bytes, session: int, *, makes: bool, tag: object) -> None:
        self.number = number
        self.key = key
        self.session = session
        self.makes = makes
        self.tag = tag
        self.state = SeekerState.WAITING
        self.slot: Slot | None = None
        """What it was granted, once FOUND."""
        self.claim = 0
        """The number of its claim, once CHOSEN."""


class Seekers:
    """Seekers by key in order of arrival, and the claims that are out."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, OrderedDict[int, Seeker]] = {}
        self._claims: dict[bytes, tuple[int, int]] = {}
        """By key: the claim's number and its session."""
        self._numbers = 0
        self.count = 0

    def join(self, key: bytes, session: int, *, makes: bool, tag: object) -> Seeker:
        """Wait for a key. One that makes is chosen at once if nobody has the claim."""
        self._numbers += 1
        seeker = Seeker(self._numbers, key, session, makes=makes, tag=tag)
        if makes and key not in self._claims:
            self._choose(seeker)
        else:
            self._waiting.setdefault(key, OrderedDict())[seeker.number] = seeker
            self.count += 1
        return seeker

    def _choose(self, seeker: Seeker) -> None:
        self._claims[seeker.key] = (seeker.number, seeker.session)
        seeker.state = SeekerState.CHOSEN
        seeker.claim = seeker.number

    def leave(self, seeker: Seeker) -> SeekerState:
        """Give up. Return the state before: what had been handed over is the caller's to pass on."""
        was = seeker.state
        if was is SeekerState.WAITING:
            self._take_out(seeker)
        if was is not SeekerState.TAKEN:
            seeker.state = SeekerState.GONE
        return was

    def _take_out(self, seeker: Seeker) -> None:
        waiting = self._waiting[seeker.key]
        del waiting[seeker.number]
        self.count -= 1
        if not waiting:
            del self._waiting[seeker.key]

    def found(self, key: bytes, slot: Slot) -> list[Seeker]:
        """Hand everybody who waits for a key its slot, and return them."""
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            return []
        self.count -= len(waiting)
        for seeker in waiting.values():
            seeker.state = SeekerState.FOUND
            seeker.slot = slot
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

    def unclaim(self, key: bytes, claim: int) -> Seeker | None:
        """Take a claim back, if it is the one that is out; return who has it next."""
        if not self.holds(key, claim):
            return None
        del self._claims[key]
        for seeker in self._waiting.get(key, {}).values():
            if seeker.makes:
                self._take_out(seeker)
                self._choose(seeker)
                return seeker
        return None

    def has(self, key: bytes, claim: int, session: int) -> bool:
        """Whether this is the claim that is out, and a session has it."""
        return self._claims.get(key) == (claim, session)

    def claims_of(self, session: int) -> list[tuple[bytes, int]]:
        """Return the claims that a session has."""
        return [(key, claim) for key, (claim, whose) in self._claims.items() if whose == session]

    def waiting(self) -> list[Seeker]:
        """Return the seekers that still wait. For ends, not for hot paths."""
        return [seeker for waiting in self._waiting.values() for seeker in waiting.values()]

    def of(self, session: int) -> list[Seeker]:
        """Return those of a session."""
        return [seeker for seeker in self.waiting() if seeker.session == session]
