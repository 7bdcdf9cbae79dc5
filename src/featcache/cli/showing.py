"""Records as text for people."""

import errno
import os
import sys

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from featcache.observation import KeysPage, SessionView, Snapshot, UnpaidRef

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_KIB = 1024.0
_WIDE = 1000
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_STYLES = {"normal": "green", "elevated": "yellow", "high": "red", "exhausted": "bold red"}


class _PlainConsole(Console):
    def on_broken_pipe(self) -> None:
        # Not as rich does, which ends the process with 1: `program.run` knows what it is.
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def plain_console() -> Console:
    """Return a console on which a text of others is just that: no markup, no pictures."""
    # Into a file or a pipe a row is a line, however long.
    width = None if sys.stdout.isatty() else _WIDE
    return _PlainConsole(highlight=False, markup=False, emoji=False, width=width)


def size(nbytes: float) -> str:
    """Return bytes as people read them."""
    value = float(nbytes)
    for unit in _UNITS:
        if value < _KIB or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= _KIB
    raise AssertionError("the last unit takes all")


def age(seconds: float) -> str:
    """Return seconds as people read them."""
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    if seconds < _HOUR_S:
        return f"{seconds // _MINUTE_S:.0f} min {seconds % _MINUTE_S:.0f} s"
    if seconds < _DAY_S:
        return f"{seconds // _HOUR_S:.0f} h {seconds % _HOUR_S // _MINUTE_S:.0f} min"
    return f"{seconds // _DAY_S:.0f} d {seconds % _DAY_S // _HOUR_S:.0f} h"


def printable(text: str) -> str:
    """Return a text of others in which nothing moves the cursor."""
    return text if text.isprintable() else ascii(text)[1:-1]


def snapshot_text(snapshot: Snapshot) -> Group:
    """Return a pool and its sessions."""
    parts: list[Table | Text] = [_pool(snapshot)]
    if snapshot.sessions:
        parts.append(_sessions(snapshot.sessions))
    if snapshot.unpaid:
        parts.append(_unpaid(snapshot.unpaid, snapshot.unpaid_refs))
    if snapshot.waiting:
        table = _table(f"puts that wait ({snapshot.statistics.waiters})", "bytes", "for", "session")
        for put in snapshot.waiting:
            who = "the owner" if not put.session else f"{put.session} {put.name or ''}"
            table.add_row(size(put.nbytes), age(put.age_s), printable(who))
        parts.append(table)
    parts += [Text(printable(f"· {sentence}")) for sentence in snapshot.holders]
    if snapshot.remedy and snapshot.level != "normal":
        parts.append(Text(printable(f"to do: {snapshot.remedy}"), style="bold"))
    return Group(*parts)


def _pool(snapshot: Snapshot) -> Table:
    figures = snapshot.statistics
    lookups = figures.hits + figures.misses
    share = f", {figures.hits / lookups:.1%} hits" if lookups else ""
    rows = [
        ("endpoint", snapshot.endpoint),
        ("pool", f"{snapshot.pool} {snapshot.name or ''}".strip()),
        ("owner", f"pid {snapshot.pid}, featcache {snapshot.version}, up {age(snapshot.uptime_s)}"),
        ("slab", f"{snapshot.kind} on {snapshot.device}"),
        (
            "memory",
            (
                f"{size(figures.used_bytes)} used of {size(figures.capacity_bytes)}, "
                f"{size(figures.committed_bytes)} committed, "
                f"largest free {size(figures.largest_free_bytes)}"
            ),
        ),
        ("slots", f"{figures.slots_used} of {figures.slots}"),
        (
            "keys",
            (
                f"{figures.keys}, {size(figures.resident_bytes)}, pinned {size(figures.pinned_bytes)}"
                f"{share}"
            ),
        ),
        (
            "counters",
            (
                f"{figures.puts} puts, {figures.reads_paid} reads paid, {figures.recycled} recycled, "
                f"{figures.evicted} evicted, {figures.expired} expired, {figures.spilled} spilled"
            ),
        ),
        ("trouble", f"{figures.readers_lost} readers lost, {figures.waited} puts waited"),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(printable(value)))
    table.add_row("pressure", Text(snapshot.level, style=_STYLES.get(snapshot.level, "")))
    return table


def _sessions(sessions: tuple[SessionView, ...]) -> Table:
    table = _table(
        f"sessions ({len(sessions)})", "#", "name", "pid", "age", "reads", "owes", "writes", "pins"
    )
    for one in sessions:
        name = one.name or ("(the owner)" if not one.session else "-")
        if one.state != "active":
            name = f"{name} ({one.state})"
        table.add_row(
            str(one.session),
            printable(name),
            str(one.pid),
            age(one.age_s),
            _both(one.reading, one.reading_bytes),
            _both(one.owes, one.owes_bytes),
            _both(one.writing + one.ahead, one.writing_bytes + one.ahead_bytes),
            _both(one.pins, one.pinned_bytes),
        )
    return table


def _both(count: int, nbytes: int) -> str:
    return f"{count}, {size(nbytes)}" if count else "-"


def _unpaid(refs: tuple[UnpaidRef, ...], count: int) -> Table:
    table = _table(f"oldest unpaid refs (of {count})", "ref", "bytes", "age", "ttl", "owed by")
    for one in refs:
        who = ", ".join(one.owed_by) if one.owed_by else f"anonymous: {one.reads_left}"
        ttl = "-" if one.ttl_s is None else age(one.ttl_s)
        table.add_row(one.ref, size(one.nbytes), age(one.age_s), ttl, printable(who))
    return table


def keys_table(page: KeysPage, order: str) -> Table:
    """Return a page of keys."""
    table = _table(
        f"{len(page.keys)} of {page.total} keys, by {order}",
        *("key", "bytes", "age", "unused", "hits", "reads", "pinned"),
    )
    for one in page.keys:
        table.add_row(
            printable(one.label),
            size(one.nbytes),
            age(one.age_s),
            age(one.unused_s),
            str(one.hits),
            str(one.reads) if one.reads else "-",
            "yes" if one.pinned else "-",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
