"""Keys in an order, a page at a time, for observers."""

from operator import itemgetter
from time import monotonic
from typing import Final

from featcache.control import observing
from featcache.control.messages import encode
from featcache.control.observers import Work
from featcache.core.slots import Slot, SlotState
from featcache.errors import SettingsError
from featcache.observation import KeysPage, KeyView
from featcache.pool.pool import Pool

_PIECE: Final = 256
_PIECE_OF_VIEWS: Final = 16
_OVERHEAD_BYTES: Final = 3200
"""Of a page besides its keys, its cursor most of all."""

_rank_of: Final = itemgetter(0)
Rank = tuple[float, bytes]
"""What keys are ordered by, least first: the key itself tells apart those of one value."""

_LAST: Final[Rank] = (float("inf"), b"")


def listed(pool: Pool, request: observing.ListKeys, limit_bytes: int) -> Work:
    """Return the keys after a cursor, as many as are asked for and fit a message."""
    pool.check_open()
    after = _cursor(request.after)
    table = pool.store.table
    for page in list(pool.pages.values()):
        pool.check_open()
        pool.uses.count_of(page, table)
        yield
    pool.check_open()
    found: list[tuple[Rank, Slot]] = []
    for first in range(0, table.high, _PIECE):
        some = _ranked(pool, table.slots[first : first + _PIECE], request.order)
        # One more than is asked for tells whether more follow.
        before = found[-1][0] if len(found) > request.limit else _LAST
        found += [each for each in some if after < each[0] < before]
        found.sort(key=_rank_of)
        del found[request.limit + 1 :]
        yield
    views: list[KeyView] = []
    last, left_bytes = after, limit_bytes - _OVERHEAD_BYTES
    is_more = len(found) > request.limit
    for count, (rank, slot) in enumerate(found[: request.limit], 1):
        if slot.key == rank[1] and slot.state is SlotState.PUBLISHED:  # else it went meanwhile
            view = _view(pool, slot)
            left_bytes -= len(encode(view))
            if left_bytes < 0 and views:
                is_more = True
                break
            views.append(view)
        last = rank
        if count % _PIECE_OF_VIEWS == 0:
            yield
            pool.check_open()
    following = f"{last[0]!r}:{last[1].hex()}" if is_more else None
    found_keys = KeysPage(keys=tuple(views), total=len(pool.store.directory), next=following)
    return observing.KeyList(request.request, found_keys)


def _ranked(pool: Pool, slots: list[Slot], order: observing.Order) -> list[tuple[Rank, Slot]]:
    """Return the slots that are under keys, each with its rank."""
    if order == "size":
        return [((-float(slot.nbytes), slot.key), slot) for slot in slots if slot.key is not None]
    if order == "age":
        return [((slot.born_s, slot.key), slot) for slot in slots if slot.key is not None]
    hits_of = pool.uses.hits_of
    return [((-float(hits_of(slot)), slot.key), slot) for slot in slots if slot.key is not None]


def _cursor(text: str) -> Rank:
    if not text:
        return float("-inf"), b""
    value, _, key = text.partition(":")
    try:
        return float(value), bytes.fromhex(key)
    except ValueError:
        raise SettingsError(f"after={text[:40]!r} is not where a page of keys ended") from None


def _view(pool: Pool, slot: Slot) -> KeyView:
    assert slot.key is not None and slot.extent is not None, "it is kept under a key"  # noqa: PT018 - one fact
    now_s = monotonic()
    return KeyView(
        key=slot.key,
        nbytes=slot.extent.size_bytes,
        age_s=now_s - slot.born_s,
        unused_s=max(0.0, now_s - pool.store.recency.last_used_s(slot)),
        hits=pool.uses.hits_of(slot),
        pinned=pool.store.directory.is_pinned(slot.key),
        reads=slot.reads_left + slot.grants,
        ref=slot.label,
    )
