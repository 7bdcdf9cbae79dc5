"""The tables under the map: their columns, their orders, and the rows of a snapshot."""

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeGuard

import attrs

from featcache import HomeView, KeysPage, KeyView, ReadingHostView, SessionView, Snapshot
from featcache.cli.top.short import both, plain, short_age, short_latency, short_size
from featcache.observation import UnpaidRef, WaitingPut

Name = Literal["sessions", "refs", "puts", "keys", "hosts"]
NAMES: Final[tuple[Name, ...]] = ("sessions", "refs", "puts", "keys", "hosts")


@attrs.frozen
class Column:
    """One column; of width 0 it has what the others leave."""

    title: str
    width: int = 0
    right: bool = False


@attrs.frozen
class Row:
    """One line: what stands in each column, and what a filter looks through."""

    cells: tuple[str, ...]
    ident: object
    """What it is about, in whatever order and wherever it stands."""
    key: KeyView | None = None
    alert: bool = False

    def matches(self, text: str) -> bool:
        """Whether a filter lets it through."""
        return not text or text.casefold() in " ".join(self.cells).casefold()


@attrs.frozen
class Table:
    """One table as it is now."""

    name: Name
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    total: int
    """How many there are in the pool; more than `seen` where a message has room for some alone."""
    seen: int
    """How many the filter was asked of."""
    order: str
    reverse: bool = False

    @property
    def ordered_by(self) -> str:
        """The title of the column that the order goes by."""
        return "#" if self.order in {"number", "turn"} else self.order


COLUMNS: Final[dict[Name, tuple[Column, ...]]] = {
    "sessions": (
        Column("#", 5, right=True),
        Column("name"),
        Column("pid", 7, right=True),
        Column("age", 6, right=True),
        Column("reads", 9, right=True),
        Column("owes", 9, right=True),
        Column("holds", 9, right=True),
        Column("pins", 9, right=True),
    ),
    "refs": (
        Column("ref", 11, right=True),
        Column("size", 6, right=True),
        Column("age", 6, right=True),
        Column("ttl", 6, right=True),
        Column("reads", 6, right=True),
        Column("owed by; read by"),
    ),
    "puts": (
        Column("#", 5, right=True),
        Column("session"),
        Column("size", 6, right=True),
        Column("waits", 6, right=True),
    ),
    "keys": (
        Column("key"),
        Column("size", 6, right=True),
        Column("age", 6, right=True),
        Column("unused", 7, right=True),
        Column("hits", 7, right=True),
        Column("reads", 6, right=True),
        Column("pinned", 6, right=True),
    ),
    "hosts": (
        Column("read", 4),
        Column("address"),
        Column("state", 9),
        Column("now", 7, right=True),
        Column("moved", 11, right=True),
        Column("failed", 6, right=True),
        Column("took", 6, right=True),
        Column("heard", 6, right=True),
        Column("lease", 6, right=True),
    ),
}

_ATTACHED: Final = ", pid "
"""In the label of a session that is attached."""
_Value = Callable[[Any], Any]

ORDERS: Final[dict[Name, dict[str, _Value]]] = {
    # The first is where a table begins. Largest first, as `top` has it; by name and number, smallest.
    "sessions": {
        "number": lambda one: -one.session,
        "reads": lambda one: (one.reading_bytes, one.reading),
        "owes": lambda one: (one.owes_bytes, one.owes),
        "holds": lambda one: (one.writing_bytes + one.ahead_bytes, one.writing + one.ahead),
        "pins": lambda one: (one.pinned_bytes, one.pins),
        "age": lambda one: one.age_s,
        "name": lambda one: _backwards(one.name or ""),
    },
    "refs": {
        "age": lambda one: one.age_s,
        "size": lambda one: one.nbytes,
        "reads": lambda one: one.reads_left,
        "ttl": lambda one: -_left(one),
    },
    "puts": {"turn": lambda one: -one[0], "size": lambda one: one[1].nbytes},
    "keys": {
        "size": lambda one: one.nbytes,
        "age": lambda one: one.age_s,
        "hits": lambda one: one.hits,
    },
    "hosts": {
        "moved": lambda one: one.fetched_bytes if _is_home(one) else one.told_bytes,
        "failed": lambda one: one.failed + one.dials_failed if _is_home(one) else one.reads_paid,
        "took": lambda one: one.mean_s if _is_home(one) else 0.0,
        "heard": lambda one: float("inf") if one.silent_s is None else one.silent_s,
        "address": lambda one: _backwards(one.address),
    },
}
"""By table and name of the order: the value that it goes by, the largest first."""


def _backwards(text: str) -> tuple[int, ...]:
    return (*(-ord(letter) for letter in text.casefold()), 0)


def _is_home(one: HomeView | ReadingHostView) -> TypeGuard[HomeView]:
    return isinstance(one, HomeView)


def _left(one: UnpaidRef) -> float:
    return float("inf") if one.ttl_s is None else one.ttl_s - one.age_s


def table_of(
    name: Name,
    snapshot: Snapshot | None,
    keys: KeysPage | None,
    *,
    order: str,
    reverse: bool = False,
    filtered: str = "",
) -> Table:
    """Return a table of what was seen."""
    records, row, total = _records(name, snapshot, keys)
    value = ORDERS[name][order]
    ordered = sorted(records, key=value, reverse=not reverse)
    rows = tuple(one for one in map(row, ordered) if one.matches(filtered))
    return Table(name, COLUMNS[name], rows, total, len(records), order, reverse)


def _records(
    name: Name, snapshot: Snapshot | None, keys: KeysPage | None
) -> tuple[Sequence[Any], Callable[[Any], Row], int]:
    if name == "keys":
        return (keys.keys, _key, keys.total) if keys is not None else ((), _key, 0)
    if snapshot is None:
        return (), _key, 0
    if name == "sessions":
        return snapshot.sessions, _session, len(snapshot.sessions)
    if name == "refs":
        return snapshot.unpaid, _ref, snapshot.unpaid_refs
    if name == "hosts":
        return (*snapshot.homes, *snapshot.reading_hosts), _host, snapshot.peers
    return tuple(enumerate(snapshot.waiting, 1)), _put, snapshot.statistics.waiters


def _session(one: SessionView) -> Row:
    name = plain(one.name) or ("(the owner)" if not one.session else "-")
    lost = one.state != "active"
    return Row(
        (
            str(one.session),
            f"{name} ({plain(one.state)})" if lost else name,
            str(one.pid) if one.pid else "?",
            short_age(one.age_s),
            both(one.reading, one.reading_bytes),
            both(one.owes, one.owes_bytes),
            both(one.writing + one.ahead, one.writing_bytes + one.ahead_bytes),
            both(one.pins, one.pinned_bytes),
        ),
        one.session,
        alert=lost,
    )


def _ref(one: UnpaidRef) -> Row:
    # Who is not there comes first, and what became of it; the others have a row among the sessions.
    there = [debtor for debtor in one.owed_by if _ATTACHED in debtor]
    absent = [debtor for debtor in one.owed_by if _ATTACHED not in debtor]
    owing = ", ".join([*absent, *map(_named, there)]) or "anyone"
    reading = f"; read by {', '.join(map(_named, one.read_by))}" if one.read_by else ""
    return Row(
        (
            plain(one.ref),
            short_size(one.nbytes),
            short_age(one.age_s),
            "-" if one.ttl_s is None else short_age(one.ttl_s),
            str(one.reads_left),
            plain(f"{owing}{reading}"),
        ),
        one.ref,
        alert=bool(absent),
    )


def _named(label: str) -> str:
    """Return a session's name of its label, which ends with its number and process in brackets."""
    return label.rpartition(" (")[0] or label


def _put(numbered: tuple[int, WaitingPut]) -> Row:
    place, one = numbered
    who = f"{one.session} {plain(one.name)}".rstrip() if one.session else "the owner"
    return Row((str(place), who, short_size(one.nbytes), short_age(one.age_s)), place)


def _host(one: HomeView | ReadingHostView) -> Row:
    if isinstance(one, HomeView):
        cells = (
            "from",
            plain(one.address),
            one.state,
            str(one.in_progress or "-"),
            both(one.fetched, one.fetched_bytes),
            str(one.failed + one.dials_failed or "-"),
            short_latency(one.mean_s) if one.mean_s else "-",
            "never" if one.silent_s is None else short_age(one.silent_s),
            "-",
        )
        return Row(cells, ("from", one.address), alert=one.state != "connected")
    cells = (
        "by",
        plain(one.address),
        one.state,
        both(one.reading, one.reading_bytes),
        both(one.reads, one.told_bytes),
        str(one.reads_paid or "-"),
        "-",
        short_age(one.silent_s),
        short_age(one.lease_s) if one.lease_s else "-",
    )
    return Row(cells, ("by", one.host), alert=one.state != "connected")


def _key(one: KeyView) -> Row:
    return Row(
        (
            plain(one.label),
            short_size(one.nbytes),
            short_age(one.age_s),
            short_age(one.unused_s),
            str(one.hits),
            str(one.reads) if one.reads else "-",
            "yes" if one.pinned else "-",
        ),
        one.key,
        key=one,
    )
