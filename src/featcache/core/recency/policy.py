"""`Recency`: the calls that an eviction policy serves.

`Directory` and `KeyedStore` share one policy and make these calls, all of them in the owner's loop:

| call | when |
| --- | --- |
| `enter(slot, now_s)` | a slot was put under a key, at its publish; `slot.key` is set, `slot.idle` is not |
| `touch(slot, now_s)` | a read of it was granted: a lookup by message, or a waiter for its key |
| `add(slot)` | it became evictable (`slot.idle`) while not `slot.listed`. Any number of times |
| `pass_time(now_s)` | at the owner's upkeep, several times a second |
| `coldest(held)`, `by_rank(most, held)` | a victim is needed: for room, by the watermark |
| `rank(slot)` | after these, in the same turn: neighbours of a candidate, or all slots, are compared |
| `look_anew()` | before `rank` in later turns: a search goes on |
| `last_used_s(slot)` | the slot's key is dropped, by whatever cause |

There is no call when a slot stops being evictable, or leaves its key: that would be one more call at
every hit. An entry is checked when a search comes to it: the slot counts only while `slot.idle`. So the
same slot may have been recycled and entered under another key since its entry was made.

There is no call either for a hit that a session serves itself: it copies the policy's `tick`, which the
pool publishes, into a word of its own for that slot. `latest_use(index)` returns the highest of these
words, and a policy asks for it when a search comes to the slot. What it says is a peer's, and may be of
an earlier tenant of the slot. Such a use is older than the tick at which the present tenant entered, if
the session copied the tick before it ended its read: so nobody ever clears a word. A value above the
present tick and what may be added to it is a lie, and counts as just now.

The fields of `Slot` that belong to the policy, the only writer of them:

- `listed`: the policy has an entry of the slot, so `add` is not called. False again once the entry is
  dropped, or the slot is never evicted.
- `entry`: the number of its last entry; those before are void.
- `tick`: when it was last used, as far as is known: even, if the owner counted that use, else odd.
- `used_s`: when the owner last counted a use of it.
- `mark`, `place`: `Sieve`'s.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Final, Protocol

from featcache.core.slots import Slot

STEP: Final = 1 << 22
"""A tick is a multiple of this. A session may add less than this to what it copies, such as the last bits of
a clock's microseconds: then its hits within one tick are in order too."""

Held = Callable[[Slot], bool]
"""Whether evicting a slot would free nothing now: it is read by a ref, or its bytes are yet to come."""
LatestUse = Callable[[int], int]
"""Returns the highest tick that any session wrote for a slot's index; 0 if none did."""
LatestUses = Callable[[int], Sequence[int]]
"""Returns the same for each index below a bound, at one look: so many, or more."""


def never_used(_: int) -> int:
    """Return 0: no session serves hits by itself."""
    return 0


def none_used(high: int) -> Sequence[int]:
    """Return as many zeros."""
    return bytes(high)


class Recency(Protocol):
    """Evictable slots, in the order in which they should go."""

    tick: int
    """The present: grows at each `enter` and `touch`, and as time passes. What sessions copy."""

    unfinished: bool
    """Whether the last search ended because it had passed enough: another, in a later turn, finds more."""

    def enter(self, slot: Slot, now_s: float) -> None:
        """Count a feature as new: what sessions said of its slot's earlier tenants is void."""

    def touch(self, slot: Slot, now_s: float) -> None:
        """Count a use."""

    def add(self, slot: Slot) -> None:
        """Take in a slot that became evictable and has no entry."""

    def pass_time(self, now_s: float) -> None:
        """Advance the tick if it has stood still for long, so that uses can be told apart by time."""

    def coldest(self, held: Held, passes: int | None = None) -> Slot | None:
        """Return the evictable slot that should go first and is not held, or None.

        The search ends `unfinished` once it has passed `passes` slots that were used, or are held.
        """

    def by_rank(
        self, most: int, held: Held, passes: int | None = None
    ) -> Generator[tuple[int, Slot]]:
        """Go through up to `most` of these, the first to go first, with their ranks.

        To be closed before any other call but `rank`.
        """

    def rank(self, slot: Slot) -> int:
        """Return a kept slot's rank, above 0: the lowest goes first.

        As of the last search at least, or of `look_anew`.
        """

    def look_anew(self) -> None:
        """Have `rank` look at the sessions' uses anew."""

    def last_used_s(self, slot: Slot) -> float:
        """Return when a kept slot was last entered or used, to about 0.1 s."""
