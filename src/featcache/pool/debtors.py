"""Who holds the room: the oldest refs and who owes them, pins, reads and writes in progress.

Looked at only when an error is raised or an event emitted, and then at so many entries at most.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from featcache.core.keyed_store import KeyedStore, key_label
from featcache.core.slots import Slot
from featcache.pool.attendance import Attendance, clipped, label_of
from featcache.pool.page import SessionPage

if TYPE_CHECKING:
    from featcache.pool.pool import Pool

_MOST: Final = 3
"""Entries of a kind that are named."""
_MOST_NAMES: Final = 4
_MOST_SCANNED: Final = 256
_MOST_NAMES_SORTED: Final = 64
_MOST_NAMES_SCANNED: Final = 1024
_MOST_RETIRING: Final = 32
_MOST_CHARS: Final = 800
_KEPT_S: Final = 0.02
"""How long an answer serves again while nothing is put or paid: puts that fail may come in floods."""
_now: Final = time.monotonic


def describe_room(pool: "Pool", *, besides: bool) -> str:
    """Describe the room there is, and who holds the rest; `besides` the waiter that is told."""
    store, refused = pool.store, pool.growth.refused
    # First: more capacity is of no use where there is no memory for it.
    grows = f"the slab can't grow: {refused}; " if refused else ""
    return (
        f"{grows}{store.free_bytes} of {store.limits.capacity_bytes} bytes are free, at most "
        f"{store.largest_free_bytes} in one piece, {store.table.count - store.table.used} of "
        f"{store.table.count} slots, and {len(store.queue) - besides} puts wait; "
        f"{pool.debtors.holders()}"
    )


class Holders(NamedTuple):
    """Who holds the room, a sentence each, and what to do about it."""

    sentences: tuple[str, ...]
    remedy: str

    def __str__(self) -> str:
        """Both as the end of an error's message, of bounded length."""
        text, left = [], _MOST_CHARS
        for sentence in self.sentences:
            left -= len(sentence)
            if left < 0:
                text.append("and more")
                break
            text.append(sentence)
        return f"{'; '.join([*text, ''])}to do: {self.remedy}"


class Debtors:
    """Says who holds the room of one pool."""

    def __init__(self, store: KeyedStore, attendance: Attendance) -> None:
        self._store = store
        self._attendance = attendance
        self._last: tuple[tuple[int, ...], float, Holders] | None = None

    def holders(self) -> Holders:
        """Return who holds the room now. Cheap to ask again."""
        store, now_s = self._store, _now()
        state = (
            *(store.puts, store.recycled, store.reads_paid, store.expired, len(store.owing)),
            *(store.directory.pinned_bytes, store.directory.idle_bytes, store.table.used),
            len(self._attendance.pages),
        )
        if self._last is not None and self._last[0] == state and now_s < self._last[1]:
            return self._last[2]
        found = self._look(now_s)
        self._last = state, now_s + _KEPT_S, found
        return found

    def _look(self, now_s: float) -> Holders:
        # The order is that of the sentences; each kind that says something adds its remedy.
        kinds: list[tuple[Callable[[float], Iterable[str]], str]] = [
            (self._absent, "start the readers that never attached, or discard what they owe"),
            (
                self._oldest,
                "get, release or discard the refs that are owed, or put with a shorter ttl",
            ),
            (self._held, "end the reads of refs that were taken back"),
            (self._pinned, "unpin keys"),
            (self._by_key, "end the reads by key that are open"),
            (self._writing, "let the puts that have their room finish"),
        ]
        sentences, remedies = list[str](), list[str]()
        for look, remedy in kinds:
            said = list(look(now_s))
            if said:
                sentences += said
                remedies.append(remedy)
        more = "raise Settings.slots" if self._store.table.full else "raise capacity"
        return Holders(tuple(sentences), "; ".join([*remedies, more]))

    # --- refs -------------------------------------------------------------------------------------

    def _absent(self, _: float) -> Iterator[str]:
        """Yield the names that owe and were never attached, of the oldest refs."""
        owed: dict[str, int] = {}
        left = _MOST_NAMES_SCANNED
        for slot in islice(self._store.owing.values(), _MOST_SCANNED):
            for name in islice(slot.owed_by_names or (), left):
                owed[name] = owed.get(name, 0) + 1
                left -= 1
        absent = self._attendance.never_attached(owed)
        for name in sorted(absent, key=lambda name: (-owed[name], name))[:_MOST]:
            yield f"{clipped(name)} (never attached) owes {_count(owed[name], 'ref')}"
        if len(absent) > _MOST:
            yield f"{len(absent) - _MOST} more names that never attached owe refs"

    def _oldest(self, now_s: float) -> Iterator[str]:
        attached = self._attendance.attached()
        for slot in islice(self._store.owing.values(), _MOST):
            ttl = "no ttl" if slot.ttl_s is None else f"ttl {slot.ttl_s:g} s"
            yield (
                f"ref {slot.label} of {slot.nbytes} bytes, {now_s - slot.born_s:.1f} s old, {ttl}, "
                f"owed by {self._debtors(slot, attached)}{self._readers(slot, ', read now by ')}"
            )
        others = len(self._store.owing) - _MOST
        if others > 0:
            younger = islice(self._store.owing.values(), _MOST, _MOST_SCANNED)
            largest = max(younger, key=lambda slot: slot.nbytes)
            yield (
                f"{_count(others, 'younger ref')}, such as {largest.label} of {largest.nbytes} bytes, "
                f"owed by {self._debtors(largest, attached)}"
            )

    def _debtors(self, slot: Slot, attached: dict[str, SessionPage]) -> str:
        names = slot.owed_by_names
        if names is None:
            paid = [self._attendance.named(number) for number in islice(slot.paid_by or (), _MOST)]
            by = f" (paid by {', '.join(paid)})" if paid else ""
            return f"anonymous: {_count(slot.reads_left, 'read')}{by}"
        # Those that are not attached first.
        listed = sorted(
            islice(names, _MOST_NAMES_SORTED), key=lambda name: (name in attached, name)
        )
        labels = [self._attendance.label(name, attached) for name in listed[:_MOST_NAMES]]
        return _and_more(labels, len(names))

    def _readers(self, slot: Slot, before: str) -> str:
        """Return the sessions that have a slot pinned now."""
        pages = [
            page
            for page in islice(self._attendance.pages.values(), _MOST_SCANNED)
            if page.holds(slot.index, slot.generation)
        ]
        return (
            before + _and_more([label_of(page) for page in pages[:_MOST]], len(pages))
            if pages
            else ""
        )

    def _held(self, _: float) -> Iterator[str]:
        told = 0
        for slot in self._store.first_retiring(_MOST_RETIRING):
            if told < _MOST and (readers := self._readers(slot, "is still read by ")):
                told += 1
                yield f"ref {slot.label} of {slot.nbytes} bytes was taken back and {readers}"

    # --- keys, and puts in progress -----------------------------------------------------------------

    def _pinned(self, _: float) -> Iterator[str]:
        directory = self._store.directory
        if not directory.pinned_bytes:
            return
        pinned = [
            f"{clipped(key_label(key))!r} by {self._attendance.named(next(iter(sessions)))}"
            for key, sessions in islice(directory.pins.items(), _MOST)
        ]
        yield f"pinned keys hold {directory.pinned_bytes} bytes: {_and_more(pinned, len(directory.pins))}"

    def _by_key(self, _: float) -> Iterator[str]:
        pages = self._attendance.pages.values()
        counts = ((count, page) for page in pages if (count := page.reads_by_key))
        for count, page in sorted(counts, key=lambda each: -each[0])[:_MOST]:
            yield f"{label_of(page)} has {_count(count, 'read')} by key open"

    def _writing(self, _: float) -> Iterator[str]:
        counts = (
            (len(page.reserved), page) for page in self._attendance.pages.values() if page.reserved
        )
        for count, page in sorted(counts, key=lambda each: -each[0])[:_MOST]:
            yield f"{label_of(page)} writes {_count(count, 'feature')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _and_more(labels: list[str], count: int) -> str:
    more = [f"{count - len(labels)} more"] if count > len(labels) else []
    return ", ".join([*labels, *more])
