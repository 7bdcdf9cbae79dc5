"""One session's page of control words, as the owner reads it, with its grants and reservations."""

import os
import time
from collections import deque
from collections.abc import Collection
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from featcache.control.rooms import Room
from featcache.core.slots import Slot
from featcache.errors import PoolFull
from featcache.memory.key_table import place_of
from featcache.memory.post_ring import PostsTaken
from featcache.memory.words import Counts, RoomClaim, SessionWords

_WORD_BYTES: Final = 8
_FEW_SLOTS: Final = 100
_NONE: Final = np.zeros(0, np.uint64)
_LOOKUPS_PER_S: Final = 50_000_000
"""More than any session can make."""
_LOOKUPS: Final = 1 << 16
"""How many more it may have made by each look: its clock and this one may differ."""


class Grant(msgspec.Struct, frozen=True, gc=False):
    """One read given out by key: `serial` in the word at `index` of the session's page pays it."""

    index: int
    serial: int
    slot: Slot


class SessionPage:
    """A session's pins, releases, writes and grants.

    The values of its words are a peer's: they are compared, not trusted.
    """

    def __init__(
        self, session: int, name: str | None, words: SessionWords, fd: int, pid: int = 0
    ) -> None:
        self.session = session
        self.name = name
        self.pid = pid
        self.since_s = time.monotonic()
        self.fd = fd
        self.words = words
        self.posts = PostsTaken(words)
        """The session's publish ring, with its unhandled posts."""
        self._held, self._released, self._written = words.held, words.released, words.written
        self._now = words.released_array()
        self._held_now = np.frombuffer(words.held, dtype=np.uint64)
        self._bytes = words.released.cast("B")
        self._seen = np.zeros_like(self._now)
        self.uses_seen = np.zeros_like(self._now)
        """The `used` words when `pool.uses` counted them last."""
        self._seen_bytes = b""
        """The beginning of `_seen` that the last poll went over."""
        self._header = words.header
        self._lease_words = tuple(
            each.cast("B") for each in (words.lease, words.serial, words.ended)
        )
        self._paid = words.granted_array()
        self._paid_seen = np.zeros_like(self._paid)
        self._serials = 0
        self._spare = list(range(len(words.granted) - 1, -1, -1))
        self._highest = 0
        """One more than the highest index of a grant that was ever out."""
        self.grants: dict[int, Grant] = {}
        """Grants that are out, by index."""
        self.reserved: dict[int, Slot] = {}
        """Slots that it may write and has not published yet, by index (`WriteState.RESERVED`)."""
        self.ahead: dict[int, Slot] = {}
        """Slots that it may claim for its next puts (`pool.ahead`), by index, the oldest first."""
        self.untold: tuple[Room, ...] = ()
        """Those of them that the session is told of with the next answer to a publish."""
        self.put_sizes: deque[int] = deque(maxlen=4)
        """Bytes of its last puts."""
        self._lookups = 0, 0
        self._lookups_at_s = self.since_s
        self.to_evict_bytes = 0
        """How much may be evicted for its next puts, as its last ones have evicted (`pool.ahead`)."""

    def newly_released(self, high: int, most: int | None = None) -> list[tuple[int, int]]:
        """Return (slot, generation) for each `released` word that changed since the last call.

        If there are more than `most`, the others are for the next calls.
        """
        if self._bytes[: high * _WORD_BYTES].tobytes() == self._seen_bytes:
            return []  # most sessions at most polls: a compare of words takes several times as long
        changed = (self._now[:high] != self._seen[:high]).nonzero()[0][:most]
        values = self._now[changed]
        self._seen[changed] = values
        self._seen_bytes = self._seen[:high].tobytes()
        return list(zip(changed.tolist(), values.tolist(), strict=True))

    def has_more(self, high: int) -> bool:
        """Whether payments have come that `newly_released` and `paid_grants` have not told yet."""
        released = self._now[:high] != self._seen[:high]
        paid = self._paid[: self._highest] != self._paid_seen[: self._highest]
        return bool(released.any()) or (bool(self.grants) and bool(paid.any()))

    def held_of(self, slots: list[Slot]) -> list[tuple[int, int]]:
        """Return those of the slots that it holds, each with its generation."""
        return [
            (slot.index, slot.generation)
            for slot in slots
            if self.holds(slot.index, slot.generation)
        ]

    def uses(self, index: int, generation: int) -> bool:
        """Whether the session may be reading these bytes now, by a ref or by their key."""
        return self.holds(index, generation) or bool(
            (self.leased_places() == place_of(index, generation)).any()
        )

    def holds(self, index: int, generation: int) -> bool:
        """Whether the session may be reading these bytes by a ref now."""
        return self._held[index] == generation and self._released[index] != generation

    def holds_of(self, live: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return what `holds` says of each slot, from the first on, with its generation in `live`."""
        high = len(live)
        held: NDArray[np.bool_] = (self._held_now[:high] == live) & (self._now[:high] != live)
        return held

    def may_hold(self, high: int) -> bool:
        """Whether `holds_of` might say yes of any slot before `high`: quicker than to ask of each."""
        # Most sessions hold nothing at most moments: what they held last they have released.
        return bool((self._held_now[:high] != self._now[:high]).any())

    def is_reading(self, live: NDArray[np.uint64]) -> bool:
        """Whether the session reads anything now, with the slots' generations in `live`."""
        return (
            bool(self.holds_of(live).any())
            or self.leases_out > 0
            or any(self._paid[grant.index] != grant.serial for grant in self.grants.values())
        )

    def leased(self) -> Collection[int]:
        """Return the places of the features that the session may be reading by their keys now."""
        places = self.leased_places()
        return set(places.tolist()) if places.size else ()

    def leased_places(self) -> NDArray[np.uint64]:
        """Return the same, one for each entry, at the cost of a few vectors whatever it wrote."""
        places, serials, ended = self._lease_words
        high = min(self._header[Counts.LEASES_HIGH], len(serials) // _WORD_BYTES)
        if not high:
            return _NONE
        size_bytes = high * _WORD_BYTES
        # An entry that is in use has the same words for as long as it is, so it does not matter that
        # these are looked at one after the other.
        taken, done = serials[:size_bytes].tobytes(), ended[:size_bytes].tobytes()
        if taken == done:
            return _NONE
        in_use = np.frombuffer(taken, dtype=np.uint64) != np.frombuffer(done, dtype=np.uint64)
        leased: NDArray[np.uint64] = np.frombuffer(places[:size_bytes].tobytes(), np.uint64)[in_use]
        return leased

    @property
    def leases_out(self) -> int:
        """Lease entries that are in use."""
        return self._header[Counts.LEASES_HIGH] and int(self.words.entries_in_use().sum())

    @property
    def reads_by_key(self) -> int:
        """Reads by key that are out: granted by the owner, or by lease entries."""
        return len(self.grants) + self.leases_out

    @property
    def own_lookups(self) -> tuple[int, int]:
        """Hits and misses that the session counted itself, as far as it can have made them.

        A hit that was counted goes again if its entry turns out to have been taken for nothing.
        """
        now_s, (hits, misses) = time.monotonic(), self.words.lookups
        old_hits, old_misses = self._lookups
        most = int((now_s - self._lookups_at_s) * _LOOKUPS_PER_S) + _LOOKUPS
        hits = min(max(hits, old_hits - len(self.words.serial)), old_hits + most)
        misses = min(max(misses, old_misses), old_misses + most)
        self._lookups, self._lookups_at_s = (hits, misses), now_s
        return self._lookups

    def not_held(self, slots: list[Slot]) -> list[Slot]:
        """Return those of the slots that it does not use, as `uses` says of each."""
        if not slots:
            return slots
        held, released = self._held, self._released
        places = self.leased_places()
        if places.size > _FEW_SLOTS * len(slots):  # quicker than a set of them
            slots = [
                slot
                for slot in slots
                if not (places == place_of(slot.index, slot.generation)).any()
            ]
        elif places.size:
            leased = set(places.tolist())
            slots = [slot for slot in slots if place_of(slot.index, slot.generation) not in leased]
        return [
            slot
            for slot in slots
            if held[slot.index] != slot.generation or released[slot.index] == slot.generation
        ]

    def has_written(self, index: int, generation: int) -> bool:
        """Whether the bytes that the session was to write there have landed."""
        return self._written[index] == generation

    def has_claimed(self, index: int, generation: int) -> bool:
        """Whether it has taken, or written, a slot that it was given ahead (`RoomClaim`)."""
        return self._written[index] & RoomClaim.GENERATION == generation

    # --- grants -----------------------------------------------------------------------------------

    @property
    def can_grant(self) -> bool:
        """Whether another grant can be out: the reads by its leases count as well."""
        return self.reads_by_key < len(self._paid)

    def check_can_grant(self) -> None:
        """Raise PoolFull if no other grant can be out."""
        if not self.can_grant:
            raise PoolFull(
                f"this session has {self.reads_by_key} reads by key out, the bound: end some of them, "
                "or raise Settings.grants"
            )

    def grant(self, slot: Slot) -> Grant:
        """Give out a read, lowest indices first: words beyond the highest are never looked at."""
        self.check_can_grant()
        self._serials += 1
        grant = Grant(self._spare.pop(), self._serials, slot)
        self.grants[grant.index] = grant
        self._highest = max(self._highest, grant.index + 1)
        return grant

    def paid_grants(self, most: int | None = None) -> list[Grant]:
        """Return the grants that were paid since the last call, up to `most`; they are out no more."""
        if not self.grants:
            return []
        high = self._highest
        changed = (self._paid[:high] != self._paid_seen[:high]).nonzero()[0][:most]
        if not changed.size:
            return []
        values = self._paid[changed]
        self._paid_seen[changed] = values
        paid: list[Grant] = []
        for index, serial in zip(changed.tolist(), values.tolist(), strict=True):
            grant = self.grants.get(index)
            if grant is not None and grant.serial == serial:
                paid.append(self.revoke(grant))
        return paid

    def revoke(self, grant: Grant) -> Grant:
        """Count a grant as out no more, and return it."""
        del self.grants[grant.index]
        self._spare.append(grant.index)
        return grant

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the object."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
