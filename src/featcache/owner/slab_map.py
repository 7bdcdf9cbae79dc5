"""The slab by offset, drawn with a bounded number of cells, for observers."""

import time
from collections import Counter
from collections.abc import Container, Generator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from featcache.control import observing
from featcache.control.observers import Work
from featcache.core.slots import Slot, SlotState
from featcache.memory.key_table import SLOT_BITS, SLOT_MASK
from featcache.pool.pool import Pool

_PIECE: Final = 256
_PIECE_OF_PAGES: Final = 4
_CELL_BYTES: Final = 6
_OVERHEAD_BYTES: Final = 128
STATES: Final = "sokpr"
"""In use: reserved, owed, kept, pinned, read."""
_FREE, _UNCOMMITTED = b"f."
_RESERVED, _OWED, _KEPT, _PINNED, _READ = range(len(STATES))

Floats = NDArray[np.float64]


def drawn(pool: Pool, request: observing.MapSlab, limit_bytes: int) -> Work:
    """Return the map, of fewer cells than are asked for where more would not fit a message."""
    pool.check_open()
    cells = max(1, min(request.cells, (limit_bytes - _OVERHEAD_BYTES) // _CELL_BYTES))
    extents = yield from _extents(pool)
    pool.check_open()
    capacity_bytes, committed = pool.store.limits.capacity_bytes, pool.store.committed_bytes
    borders = np.linspace(0.0, float(capacity_bytes), cells + 1)
    widths = np.diff(borders)
    extents = extents[np.argsort(extents[:, 0], kind="stable")]
    by_state: list[Floats] = []
    for state in range(len(STATES)):
        chosen = extents[extents[:, 2] == state]
        by_state.append(_spread(borders, chosen, chosen[:, 1]))
        yield
    ages = _spread(borders, extents, extents[:, 3] * extents[:, 1])
    amounts = np.stack(by_state)
    used = amounts.sum(axis=0)
    letters = np.frombuffer(STATES.encode(), np.uint8)[amounts.argmax(axis=0)].copy()
    letters[used <= 0.0] = _FREE
    letters[(used <= 0.0) & (borders[:-1] >= committed)] = _UNCOMMITTED
    mean_ages = np.divide(ages, used, out=np.zeros_like(ages), where=used > 0.0)
    return observing.SlabCells(
        request.request,
        capacity_bytes,
        committed,
        letters.tobytes(),
        # At least one step where there is anything: a small feature in a large cell is seen.
        np.ceil(np.clip(used / widths, 0.0, 1.0) * 255.0).astype(np.uint8).tobytes(),
        mean_ages.astype("<f4").tobytes(),
    )


def _spread(borders: Floats, extents: Floats, amounts: Floats) -> Floats:
    """Return how much of the amounts of extents, which are in order, falls between each two borders."""
    if not len(extents):
        return np.zeros(len(borders) - 1)
    starts, sizes = extents[:, 0], extents[:, 1]
    edges = np.stack([starts, starts + sizes], axis=1).ravel()
    # Extents that were looked at at different moments may overlap.
    edges = np.maximum.accumulate(edges)
    sums = np.cumsum(amounts)
    levels = np.stack([np.concatenate([[0.0], sums[:-1]]), sums], axis=1).ravel()
    spread: Floats = np.diff(np.interp(borders, edges, levels))
    return spread


def _extents(pool: Pool) -> Generator[None, None, Floats]:
    """Return the offset, size, state and age of each extent in use."""
    read = yield from _read_now(pool)
    table, pins = pool.store.table, pool.store.directory.pins
    offsets, sizes, states, ages = list[int](), list[int](), list[int](), list[float]()
    shares: Counter[int] = Counter()
    granted: list[tuple[int, int, int]] = []
    for first in range(0, table.high, _PIECE):
        now_s = time.monotonic()
        for slot in table.slots[first : first + _PIECE]:
            extent = slot.extent
            if extent is None or slot.state is SlotState.FREE:
                continue
            if slot.of is not None:
                shares[slot.of.index] += 1
                continue
            state = _READ if slot.index in read else _state(slot, pins)
            if slot.grants:
                granted.append((len(states), slot.index, slot.grants))
            offsets.append(extent.offset_bytes)
            sizes.append(extent.size_bytes)
            states.append(state)
            ages.append(now_s - slot.born_s)
        yield
        pool.check_open()
    # Column by column, which is several times as quick as a list of rows.
    found = np.empty((len(states), 4))
    found[:, 0], found[:, 1], found[:, 2], found[:, 3] = offsets, sizes, states, ages
    yield
    pool.check_open()
    for row, index, grants in granted:
        # A share has a grant on its feature, which owes what the share owes; the others are reads.
        if grants > shares[index]:
            found[row, 2] = _READ
        elif found[row, 2] != _READ:
            found[row, 2] = _OWED
    return found


def _state(slot: Slot, pins: Container[bytes]) -> int:
    if slot.state is not SlotState.PUBLISHED:
        return _RESERVED
    if slot.reads_left:
        return _OWED
    if slot.key is not None:
        return _PINNED if slot.key in pins else _KEPT
    return _RESERVED


def _read_now(pool: Pool) -> Generator[None, None, set[int]]:
    """Return the slots that some session reads now."""
    high = pool.store.table.high
    held = np.zeros(high, np.bool_)
    read: set[int] = set()
    for count, page in enumerate(list(pool.pages.values()), 1):
        live = np.frombuffer(pool.words.live, np.uint64)[:high]
        if page.may_hold(high):
            held |= page.holds_of(live)
        read.update(
            index
            for place in page.leased()
            if (index := place & SLOT_MASK) < high and int(live[index]) == place >> SLOT_BITS
        )
        if count % _PIECE_OF_PAGES == 0:
            del live  # no view of the words outlives a turn: they are unmapped with the pool
            yield
            pool.check_open()
    return read | set(held.nonzero()[0].tolist())
