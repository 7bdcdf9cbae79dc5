"""Records as text for people."""

import errno
import os
import sys

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from featcache.observation import (
    HomeView,
    KeysPage,
    ReadingHostView,
    SessionView,
    Snapshot,
    UnpaidRef,
)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_KIB = 1024.0
_WIDE = 1000
_MILLISECOND_S = 1e-3
_TEN = 10
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


def latency(seconds: float) -> str:
    """Return the seconds of an operation as people read them: 850 us, 3.2 ms, 1.40 s."""
    if seconds < _MILLISECOND_S:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        value = seconds * 1e3
        return f"{value:.1f} ms" if value < _TEN else f"{value:.0f} ms"
    return f"{seconds:.2f} s" if seconds < _TEN else f"{seconds:.0f} s"


def printable(text: str) -> str:
    """Return a text of others in which nothing moves the cursor."""
    return text if text.isprintable() else ascii(text)[1:-1]


def snapshot_text(snapshot: Snapshot) -> Group:
    """Return a pool and its sessions."""
    parts: list[Table | Text] = [_pool(snapshot)]
    if snapshot.sessions:
        parts.append(_sessions(snapshot.sessions))
    if snapshot.homes:
        parts.append(_homes(snapshot.homes))
    if snapshot.reading_hosts:
        parts.append(_reading_hosts(snapshot.reading_hosts))
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
        *(
            [
                (
                    "hosts",
                    (
                        f"{figures.fetched} fetched, {size(figures.fetched_bytes)}, "
                        f"{figures.fetches_failed} failed; {figures.told} read by others, "
                        f"{size(figures.told_bytes)}; {figures.hosts_lost} lost; keys: "
                        f"{figures.keys_fetched} fetched, {figures.keys_offered} offered"
                    ),
                )
            ]
            if snapshot.peers
            else []
        ),
        *(
            [
                (
                    "tier",
                    (
                        f"{figures.demoted} demoted, {figures.promoted} promoted, "
                        f"{figures.demotions_dropped} dropped, {figures.tier_failures} failures"
                    ),
                )
            ]
            if figures.demoted
            or figures.promoted
            or figures.demotions_dropped
            or figures.tier_failures
            else []
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


def _homes(homes: tuple[HomeView, ...]) -> Table:
    table = _table(
        f"hosts read from ({len(homes)})",
        *("address", "state", "fetched", "now", "failed", "quarantined", "unpaid"),
        *("transfer last, mean, longest", "round trip", "heard"),
    )
    for one in homes:
        reason = f": {one.reason}" if one.reason else ""
        table.add_row(
            printable(one.address),
            printable(f"{one.state}{reason}"),
            _both(one.fetched, one.fetched_bytes),
            str(one.in_progress or "-"),
            str(one.failed or "-"),
            _both(one.quarantined, one.quarantined_bytes),
            str(one.unacknowledged or "-"),
            ", ".join(map(latency, (one.last_s, one.mean_s, one.longest_s)))
            if one.longest_s
            else "-",
            "-" if one.round_trip_s is None else latency(one.round_trip_s),
            "never" if one.silent_s is None else f"{age(one.silent_s)} ago",
        )
    return table


def _reading_hosts(hosts: tuple[ReadingHostView, ...]) -> Table:
    table = _table(
        f"hosts that read here ({len(hosts)})",
        *("address", "host", "state", "reads now", "asks", "told", "lease", "heard", "names"),
    )
    for one in hosts:
        more = f", {one.named - len(one.names)} more" if one.named > len(one.names) else ""
        table.add_row(
            printable(one.address),
            one.host[:8],
            f"{one.state}, {one.reads_paid} reads paid" if one.state == "lost" else one.state,
            _both(one.reading, one.reading_bytes),
            str(one.requests or "-"),
            _both(one.reads, one.told_bytes),
            age(one.lease_s) if one.lease_s else "-",
            f"{age(one.silent_s)} ago",
            printable(", ".join(one.names) + more),
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
