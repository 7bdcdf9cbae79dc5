"""The sessions of a pool as observers are shown them: what each reads, owes and holds."""

import time
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Final

import numpy as np

from featcache.control import observing
from featcache.control.observers import Work
from featcache.core.slots import Slot
from featcache.memory.key_table import SLOT_BITS, SLOT_MASK
from featcache.observation import SessionView
from featcache.owner.sessions import OWN_SESSION
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool

_MOST_REFS: Final = 1 << 14
_MOST_PINS: Final = 1 << 14
_MOST_NAMES: Final = 64
_PIECE: Final = 256
_PIECE_OF_VIEWS: Final = 8
_OVERHEAD_BYTES: Final = 128
_VIEW_BYTES: Final = 400
"""A session's, at most, besides its name."""


class Sums:
    """Counts and bytes by some name."""

    def __init__(self) -> None:
        self.counts: Counter[str | int] = Counter()
        self.nbytes: Counter[str | int] = Counter()

    def add(self, name: str | int, nbytes: int) -> None:
        self.counts[name] += 1
        self.nbytes[name] += nbytes


def listed(
    pool: Pool, states: dict[int, str], request: observing.ListSessions, limit_bytes: int
) -> Work:
    """Return the sessions with numbers above `request.after`, as many as fit a message."""
    pool.check_open()
    numbers = sorted(
        number for number in pool.pages if number > request.after and number >= OWN_SESSION
    )
    chosen = numbers[: observing.MAX_SESSIONS]
    named = {pool.pages[number].name for number in chosen} - {None}
    owed = yield from _owed(pool, named)
    pinned = yield from _pinned(pool)
    views: list[SessionView] = []
    left_bytes = limit_bytes - _OVERHEAD_BYTES
    for number in chosen:
        pool.check_open()
        page = pool.pages.get(number)
        if page is None:  # it ended meanwhile
            continue
        view = _view(pool, page, states.get(number, "active"), owed, pinned)
        left_bytes -= _VIEW_BYTES + len((view.name or "").encode())
        if left_bytes < 0:
            return observing.SessionList(request.request, tuple(views), more=bool(views))
        views.append(view)
        if len(views) % _PIECE_OF_VIEWS == 0:
            yield
    return observing.SessionList(request.request, tuple(views), more=len(numbers) > len(chosen))


def _owed(pool: Pool, names: set[str | None]) -> Generator[None, None, Sums]:
    """Sum up by name what refs owe, of the oldest so many."""
    sums = Sums()
    slots = list(islice(pool.store.owing.values(), _MOST_REFS)) if names else []
    for count, slot in enumerate(slots, 1):
        for name in islice(slot.owed_by_names or (), _MOST_NAMES):
            if name in names:
                sums.add(name, slot.nbytes)
        if count % _PIECE == 0:
            yield
    return sums


def _pinned(pool: Pool) -> Generator[None, None, Sums]:
    sums, directory = Sums(), pool.store.directory
    for count, (key, sessions) in enumerate(list(islice(directory.pins.items(), _MOST_PINS)), 1):
        slot = directory.find(key)
        if slot is not None and slot.extent is not None:
            for session in islice(sessions, _MOST_NAMES):
                sums.add(session, slot.extent.size_bytes)
        if count % _PIECE == 0:
            yield
    return sums


def _view(pool: Pool, page: SessionPage, state: str, owed: Sums, pinned: Sums) -> SessionView:
    reading, reading_bytes = _reading(pool, page)
    written = sum(slot.nbytes for slot in page.reserved.values())
    hits, misses = page.own_lookups
    name = page.name or ""
    return SessionView(
        session=page.session,
        name=page.name,
        pid=page.pid,
        state=state,
        age_s=time.monotonic() - page.since_s,
        reading=reading,
        reading_bytes=reading_bytes,
        owes=owed.counts[name],
        owes_bytes=owed.nbytes[name],
        writing=len(page.reserved),
        writing_bytes=written,
        ahead=len(page.ahead),
        ahead_bytes=sum(slot.nbytes for slot in page.ahead.values()),
        pins=pinned.counts[page.session],
        pinned_bytes=pinned.nbytes[page.session],
        hits=hits,
        misses=misses,
    )


def _reading(pool: Pool, page: SessionPage) -> tuple[int, int]:
    """Return how many features a session reads now, and their bytes. Its words are a peer's."""
    high = pool.store.table.high
    count = nbytes = 0
    if page.may_hold(high):
        held = page.holds_of(np.frombuffer(pool.words.live, np.uint64)[:high])
        sizes = np.frombuffer(pool.words.nbytes, np.uint64)[:high]
        count, nbytes = int(held.sum()), int(sizes[held].sum())
    for slot in _by_key(pool, page, high):
        count += 1
        nbytes += slot.nbytes
    return count, nbytes


def _by_key(pool: Pool, page: SessionPage, high: int) -> Iterator[Slot]:
    table = pool.store.table
    for place in page.leased():
        if (index := place & SLOT_MASK) < high:
            slot = table.find(index, place >> SLOT_BITS)
            if slot is not None:
                yield slot
    for grant in page.grants.values():
        yield grant.slot
