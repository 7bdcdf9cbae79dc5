"""Victim selection: the coldest run of adjacent extents that frees a block of a size.

How cold a feature is, its rank, is the policy's to say (`core.recency`). Where all features are of one
size the victim is the coldest. Where they are not, evicting in that order alone frees many separate
extents before one is large enough, and each costs a hit. So a window of neighbours in the slab is built
around each of a few of the coldest features, and the window is evicted whose warmest member is the
coldest. That is the same work whatever the number of features, and a request that takes very many
neighbours tries fewer windows. Only where none of those windows makes room, because pins or reads stand
between, is the whole slab gone over once, for the best of all windows.

A window may have thousands of members, so a search can be done in pieces, between which the pool
changes: an extent that was freed meanwhile is no place to go on from, and ranks are looked at anew.

A rank costs a look at the sessions' words, which the policy bounds in each search.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from math import inf
from operator import itemgetter
from typing import Final, TypeAlias

from featcache.core.allocator import Extent, OffsetAllocator
from featcache.core.put_queue import Batch, Request
from featcache.core.recency import Held, Recency
from featcache.core.slots import Slot

Pieces: TypeAlias = Generator[None, None, list["Victim"]]
"""A search that pauses where its steps are used up."""
Victim: TypeAlias = tuple[float, Slot, int]
"""Its rank, the slot, and the generation that is meant."""

FEW: Final = 32
"""Features, the coldest ones, around which a window is tried at first."""
_MAX_STEPS: Final = 1024
"""Extents that are looked at for windows, after which no further window is tried."""
_TRIES: Final = 3
"""Searches around the coldest few, if what they find is used before they have ended."""
_ALL: Final = 1 << 62
_Passed: TypeAlias = tuple[Extent | None, int, float]
"""An extent that was looked at, its size and its rank; the last may be the room to grow by."""


class EvictionPlan:
    """The victims of one request, found and evicted in pieces."""

    def __init__(self) -> None:
        self._request: Request | None = None
        self._victims: list[Victim] = []
        """Those that are still to go, the next last."""
        self.search: VictimSearch | None = None
        """While it goes on."""
        self.is_passing = False
        """Whether the coldest is still to be found, behind many that were used or are held."""
        self.steps = 0
        """Extents that all searches have looked at, or as much work."""

    @property
    def is_searching(self) -> bool:
        """Whether victims are still to be found."""
        return self.is_passing or self.search is not None

    @property
    def in_progress(self) -> bool:
        """Whether victims are still to be found, or to go."""
        return self.is_searching or bool(self._victims)

    def take_up(self, request: Request) -> "VictimSearch | None":
        """Turn to a request; return its search, if one is under way, which goes on only by `go_on`."""
        search, self.search, self.is_passing = self.search, None, False
        if self._request is not request:
            self._request, search = request, None
            self._victims.clear()
        return search

    def turn_to(self, batch: Batch) -> None:
        """Evict nothing more for a request that is no member of this batch: it is not made again."""
        self.is_passing = False
        if not any(member is self._request for member in batch.members):
            self.give_up()

    def go_on(self, search: "VictimSearch", held: Held, steps: int | None) -> None:
        """Do so many steps of a search. Its victims, once found, are the next to go."""
        self.steps += search.go_on(held, steps)
        if search.found is None:
            self.search = search
        else:
            self._victims = search.found

    def give_up(self) -> None:
        """Evict nothing more for the request, which is not made again."""
        self._request, self.search, self.is_passing = None, None, False
        self._victims.clear()

    def next(self, held: Held, most: int | None) -> list[Slot]:
        """Take the next to go, the warmest first; none, and no others, if one of them can't any more."""
        victims = self._victims
        while victims:
            cut = 0 if most is None else max(0, len(victims) - most)
            piece = sorted(victims[cut:], key=itemgetter(0), reverse=True)
            # What was freed meanwhile is room by now.
            going = [slot for _, slot, generation in piece if slot.is_tenant(generation)]
            if not all(slot.idle and not held(slot) for slot in going):
                victims.clear()  # one is in use by now: look again
                return []
            del victims[cut:]
            if going:
                return going
        return []


class VictimSearch:
    """One search for the features to evict so that an extent of a size fits.

    Tries windows around the coldest few, with each of `growths` in turn: so many more bytes may be
    committed behind the last extent once the victims have gone. Where none of them makes room and it
    `scans`, then all windows that there are: the slab is gone over once, from its beginning.
    """

    def __init__(
        self,
        recency: Recency,
        allocator: OffsetAllocator,
        size_bytes: int,
        growths: Sequence[int],
        *,
        scans: bool,
    ) -> None:
        self._recency, self._rank = recency, recency.rank
        self._allocator, self.size_bytes = allocator, size_bytes
        self._growths, self._scans = growths, scans
        self._held: Held = _by_nobody
        self._left = 0
        self._centres: Iterator[tuple[int, Slot]] = iter(())
        self._was_paused = False
        """Whether other work came since the centres were taken."""
        self._window_steps = 0
        self._pieces = self._find()
        self.found: list[Victim] | None = None
        """The victims, in no order, once the search has ended; none if no window makes room."""
        self.scanned = False
        """Whether all windows were looked at."""

    def go_on(self, held: Held, steps: int | None = None) -> int:
        """Look at about so many extents, or all that it takes; return how many that were.

        `held` says which are in use as of now.
        """
        steps = _ALL if steps is None else steps
        self._held, self._left = held, steps
        try:
            next(self._pieces)
        except StopIteration as ended:
            self.found = ended.value
        return steps - self._left

    def _find(self) -> Pieces:
        for growth_bytes in self._growths:
            for left in reversed(range(_TRIES)):
                found = yield from self._around_few(growth_bytes)
                if found and left and self._was_paused and (yield from self._has_warmed(found)):
                    continue  # others may be colder by now
                if found:
                    return found
                break
        if not self._scans:
            return []
        self.scanned = True
        passed = yield from self._look_at_all()
        for growth_bytes in self._growths:
            grown: list[_Passed] = [(None, growth_bytes, 0)] if growth_bytes else []
            if found := (yield from self._best_of([*passed, *grown])):
                return found
        return []

    def _pause(self) -> Generator[None, None, None]:
        """Let others work, then look at the uses anew."""
        self._centres = iter(list(self._centres))  # out of the policy's hands: others may call it
        self._was_paused = True
        yield
        self._recency.look_anew()

    # --- around the coldest few -------------------------------------------------------------------

    def _around_few(self, growth_bytes: int) -> Pieces:
        best, warmest = list[Victim](), inf
        self._window_steps, self._was_paused = 0, False
        passes = None if self._left > _ALL // 2 else self._left
        self._centres = ranked = self._recency.by_rank(FEW, self._held, passes)
        try:
            while centre := next(self._centres, None):
                rank, slot = centre
                if self._was_paused:
                    if not slot.idle or self._held(slot):
                        continue
                    rank = self._rank(slot)
                if self._window_steps > _MAX_STEPS or rank > warmest:
                    break  # a window is no colder than its centre, and the next are warmer still
                if window := (yield from self._window(slot, rank, warmest, growth_bytes)):
                    best, warmest = window, max(window, key=itemgetter(0))[0]
                    if len(best) == 1:
                        break  # no other window can be colder than one of the coldest alone
        finally:
            ranked.close()
        return best

    def _has_warmed(self, found: list[Victim]) -> Generator[None, None, bool]:
        """Whether one of these was used since it was looked at."""
        for rank, slot, generation in found:
            if self._left <= 0:
                yield from self._pause()
            self._left -= 1
            if slot.is_tenant(generation) and self._rank(slot) > rank:
                return True
        return False

    def _window(self, slot: Slot, centre: int, before: float, growth_bytes: int) -> Pieces:
        """Return a feature and the neighbours that free one block with it.

        `centre` is the feature's rank. The window grows by the colder of its two neighbours. Empty if
        both are in use, or no colder than the rank `before`.
        """
        middle, size_bytes = slot.extent, self.size_bytes
        assert middle is not None, "it is kept"
        if middle.size_bytes >= size_bytes:
            return [(centre, slot, slot.generation)]  # without a look at its neighbours
        rank, held, allocator = self._rank, self._held, self._allocator
        previous, following = allocator.previous, allocator.following
        below, above = list[_Passed](), list[_Passed]()
        missing_bytes, behind_bytes = size_bytes - middle.size_bytes, growth_bytes
        lower, upper = previous(middle), following(middle)
        low, high = _rank_of(lower, held, rank), _rank_of(upper, held, rank)
        while missing_bytes > 0:
            if self._left <= 0:
                yield from self._pause()
                if middle.is_free:  # it went meanwhile
                    return []
                held, behind_bytes = self._held, growth_bytes
                first, last = _edge(below) or middle, _edge(above) or middle
                end_bytes = last.offset_bytes + last.size_bytes
                missing_bytes = size_bytes - (end_bytes - first.offset_bytes)
                lower, upper = previous(first), following(last)
                low, high = _rank_of(lower, held, rank), _rank_of(upper, held, rank)
                continue
            self._left -= 1
            self._window_steps += 1
            if upper is None and behind_bytes:
                missing_bytes, behind_bytes = missing_bytes - behind_bytes, 0
                continue
            goes_low = low <= high
            taken, colder = (lower, low) if goes_low else (upper, high)
            if colder >= before:
                return []
            assert taken is not None, "it has a rank"
            missing_bytes -= taken.size_bytes
            if goes_low:
                below.append((taken, taken.size_bytes, low))
                lower = previous(taken)
                low = _rank_of(lower, held, rank)
            else:
                above.append((taken, taken.size_bytes, high))
                upper = following(taken)
                high = _rank_of(upper, held, rank)
        return [(centre, slot, slot.generation), *_victims_of(below), *_victims_of(above)]

    # --- all windows ------------------------------------------------------------------------------

    def _look_at_all(self) -> Generator[None, None, list[_Passed]]:
        """Return all extents in order, with their ranks."""
        passed, allocator, rank = list[_Passed](), self._allocator, self._rank
        extent, held = allocator.first, self._held
        while extent is not None:
            if self._left <= 0:
                yield from self._pause()
                held, last = self._held, _edge(passed)
                extent = allocator.first if last is None else allocator.following(last)
                continue
            self._left -= 1
            passed.append((extent, extent.size_bytes, _rank_of(extent, held, rank)))
            extent = allocator.following(extent)
        return passed

    def _best_of(self, passed: list[_Passed]) -> Pieces:
        """Return the window of these whose warmest member is the coldest."""
        start = total_bytes = 0  # of the window, which ends with the last that was looked at
        warmest: deque[float] = deque()  # of the window: each rank that no later one exceeds
        best_rank, best = inf, (0, 0)
        for end, (_, extent_bytes, rank) in enumerate(passed, 1):
            if self._left <= 0:
                yield from self._pause()
            self._left -= 1
            if rank == inf:
                start, total_bytes = end, 0
                warmest.clear()
                continue
            total_bytes += extent_bytes
            while warmest and warmest[-1] < rank:
                warmest.pop()
            warmest.append(rank)
            while total_bytes >= self.size_bytes:
                if 0 < warmest[0] < best_rank:
                    best_rank, best = warmest[0], (start, end)
                _, first_bytes, first_rank = passed[start]
                start += 1
                total_bytes -= first_bytes
                if first_rank == warmest[0]:
                    warmest.popleft()
        return _victims_of(passed[slice(*best)])


def _by_nobody(_: Slot) -> bool:
    return False


def _edge(passed: list[_Passed]) -> Extent | None:
    """Return the last of these extents that is where it was, without those behind it.

    One that is in use is: as it is freed it may be joined with others, and what was free may be in use.
    """
    while passed:
        extent, _, rank = passed[-1]
        if extent is not None and rank and not extent.is_free:
            return extent
        passed.pop()
    return None


def _victims_of(passed: Sequence[_Passed]) -> list[Victim]:
    """Return the features among these extents; what was freed meanwhile needs no eviction."""
    return [
        (rank, extent.holder, extent.holder.generation)
        for extent, _, rank in passed
        if rank and extent is not None and not extent.is_free and isinstance(extent.holder, Slot)
    ]


def _rank_of(extent: Extent | None, held: Held, rank: Callable[[Slot], int]) -> float:
    """Return the rank of an extent: 0 if it is free, infinity if it can't be evicted or is no extent."""
    if extent is None:
        return inf
    if extent.is_free:
        return 0
    slot = extent.holder
    return rank(slot) if isinstance(slot, Slot) and slot.idle and not held(slot) else inf
