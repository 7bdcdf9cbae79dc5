"""One frame: lines of text that fill so many columns and rows."""

from typing import Final

from rich.text import Text

from featcache.cli.top import graphs
from featcache.cli.top.history import Sample
from featcache.cli.top.look import Look
from featcache.cli.top.model import Model
from featcache.cli.top.short import plain, short_age, short_rate, short_size
from featcache.cli.top.tables import NAMES, Column, Table

KEYS: Final = "1-5 view  s sort  r reverse  / filter  space freeze  e evict  ? help  q quit"
_LEAST: Final = (20, 6)
_TITLES: Final = {
    "sessions": "SESSIONS",
    "refs": "UNPAID REFS",
    "puts": "PUTS THAT WAIT",
    "keys": "KEYS",
    "hosts": "HOSTS",
}
_NOTHING: Final = {
    "sessions": "nobody is attached",
    "refs": "no ref owes a read",
    "puts": "no put waits for room",
    "keys": "nothing is kept under a key",
    "hosts": "no other host is read from, and none reads here",
}
_GAP: Final = 2
_HALVES: Final = 2
_STALE_LOOKS: Final = 3
_TABLE_ROWS: Final = 4


def draw(
    model: Model, look: Look, width: int, height: int, now_s: float, *, keys: bool = True
) -> list[Text]:
    """Return a frame.

    Args:
        model: what is shown.
        look: what the terminal can show.
        width: columns; no line has more.
        height: rows, exactly so many.
        now_s: of the same clock as the model's times.
        keys: whether the last line tells what keys there are.

    """
    width, height = max(width, _LEAST[0]), max(height, _LEAST[1])
    map_rows = _map_rows(height)
    graph_rows = max(1, min(6, (height - 16) // 6))
    lines = _head(model, look, width, now_s)
    lines += _map(model, look, width, map_rows, now_s)
    lines += _over_time(model, look, width, graph_rows)
    room = height - len(lines) - keys
    if room < _TABLE_ROWS:  # a small terminal: the tables go before the rest
        lines = lines[: max(3, height - _TABLE_ROWS - keys)]
        room = height - len(lines) - keys
    lines += _help(room) if model.helping else _tables(model, look, width, room)
    lines = (lines + [Text() for _ in range(height)])[: height - keys]
    if keys:
        lines.append(_last(model, look, now_s))
    return [_cut(line, width) for line in lines]


def map_cells(width: int, height: int) -> int:
    """Return how many cells the map of a frame has."""
    return max(width, _LEAST[0]) * _map_rows(max(height, _LEAST[1]))


def _map_rows(height: int) -> int:
    return max(1, min(10, (height - 12) // 4))


def _cut(line: Text, width: int) -> Text:
    line.no_wrap = True
    line.truncate(width, overflow="crop")
    return line


def _head(model: Model, look: Look, width: int, now_s: float) -> list[Text]:
    status, bad = model.status(now_s)
    right = Text(status, "bold reverse" if bad else "")
    seen = model.snapshot
    if seen is None:
        left = Text(f"featcache top  {plain(model.endpoint, not look.unicode)}", "bold")
        return [_sides(left, right, width), Text(), Text()]
    left = Text(f"featcache {plain(seen.name, not look.unicode) or seen.pool[:8]}", "bold")
    left.append(f"  {seen.kind} on {plain(seen.device)}  pid {seen.pid}", "not bold")
    left.append(f"  up {short_age(seen.uptime_s)}", "not bold")
    figures = seen.statistics
    level = Text(no_wrap=True)
    level.append(f" {seen.level.upper()} ", f"{look.level(seen.level)} reverse")
    oldest = f" ({short_age(figures.oldest_unpaid_s)})" if seen.unpaid_refs else ""
    waiting = f" ({short_size(figures.waiting_bytes)})" if figures.waiters else ""
    for text in (
        f"waiting {figures.waiters}{waiting}",
        f"unpaid {seen.unpaid_refs}{oldest}",
        f"sessions {len(seen.sessions)}",
        f"keys {figures.keys}",
        f"slots {figures.slots_used}/{figures.slots}",
        *((f"hosts {seen.peers}",) if seen.peers else ()),
    ):
        if level.cell_len + 2 + len(text) <= width:  # none is cut, which would be another number
            level.append(f"  {text}")
    return [_sides(left, right, width), _memory(model, look, width), level]


def _memory(model: Model, look: Look, width: int) -> Text:
    assert model.snapshot is not None
    figures = model.snapshot.statistics
    capacity = max(1, figures.capacity_bytes)
    text = (
        f" {short_size(figures.used_bytes)} of {short_size(capacity)}, kept "
        f"{short_size(figures.resident_bytes)}, largest free {short_size(figures.largest_free_bytes)}"
    )
    bar = max(4, min(60, width - len(text) - 9))
    used = round(bar * figures.used_bytes / capacity)
    evictable = round(bar * (figures.resident_bytes - figures.pinned_bytes) / capacity)
    full, soft, empty = "█▒░" if look.unicode else "#=."
    line = Text("memory ", no_wrap=True)
    held = max(0, used - evictable)
    line.append(full * held, look.level(model.snapshot.level) or "bold")
    line.append(soft * max(0, min(evictable, used)), look.state("k", 1))
    line.append(empty * (bar - held - max(0, min(evictable, used))), look.state("f", 0))
    return line.append(text)


def _sides(left: Text, right: Text, width: int) -> Text:
    room = width - left.cell_len - right.cell_len
    if room < 1:
        left.truncate(max(0, width - min(right.cell_len, width - 8) - 1), overflow="crop")
        room = max(1, width - left.cell_len - right.cell_len)
    return left.append(" " * room).append_text(right)


def _map(model: Model, look: Look, width: int, rows: int, now_s: float) -> list[Text]:
    age_s = now_s - model.slab_at_s
    stale = age_s >= _STALE_LOOKS * model.interval_s + 1 and model.link == "up" and not model.frozen
    title = Text(graphs.map_title(model.slab, age_s if stale else 0.0), "bold")
    last = model.history.last
    rates = (
        ""
        if last is None
        else "  ".join(
            f"{name} {short_rate(last.rates[counter])}"
            for name, counter in (("puts", "puts"), ("paid", "reads_paid"), ("evicted", "evicted"))
        )
    )
    return [
        _sides(title, Text(rates), width),
        *graphs.map_lines(model.slab, look, width, rows),
        graphs.legend(model.slab, look, width),
    ]


def _held(one: Sample, look: Look) -> tuple[float | None, str]:
    return one.held, look.level(one.level)


def _hit_rate(one: Sample, look: Look) -> tuple[float | None, str]:
    return one.hit_rate, look.state("k", 1)


def _over_time(model: Model, look: Look, width: int, rows: int) -> list[Text]:
    half = (width - _GAP) // _HALVES
    samples, last = model.history.newest(half), model.history.last
    if last is None:
        titles = ("pressure", "hit rate")
    else:
        lookups = short_rate(last.rates["hits"] + last.rates["misses"])
        rate = "no lookups" if last.hit_rate is None else f"{last.hit_rate:.0%} of {lookups}"
        titles = (f"pressure {last.level}, {last.held:.0%} held", f"hit rate {rate}")
    left = [Text(titles[0], "bold"), *graphs.graph(samples, _held, look, half, rows)]
    right = [
        Text(titles[1], "bold"),
        *graphs.graph(samples, _hit_rate, look, half, rows),
    ]
    seconds = _seconds(model, half)
    left.append(graphs.level_strip(samples, look, half))
    right.append(_sides(Text(seconds, "dim"), Text("now", "dim"), half))
    return [_beside(*pair, half) for pair in zip(left, right, strict=True)]


def _seconds(model: Model, count: int) -> str:
    seen = [one for one in model.history.newest(count) if one is not None]
    if len(seen) < _HALVES:
        return ""
    return f"{short_age(seen[-1].at_s - seen[0].at_s)} ago"


def _beside(left: Text, right: Text, half: int) -> Text:
    left.truncate(half, overflow="crop", pad=True)
    return Text(no_wrap=True).append_text(left).append(" " * _GAP).append_text(right)


# --- tables -------------------------------------------------------------------------------------------


def _tables(model: Model, look: Look, width: int, room: int) -> list[Text]:
    if model.view != "all":
        table = model.table(model.table_name)
        return _table(table, model, look, width, room, cursor=model.cursor)
    tables = [
        model.table(name)
        for name in NAMES
        if name != "keys" and (name != "hosts" or model.has_hosts)
    ]
    heights = _shared(room, [1 + max(1, len(table.rows)) for table in tables])
    lines: list[Text] = []
    for table, height in zip(tables, heights, strict=True):
        lines += _table(table, model, look, width, height, cursor=None)
    return lines


def _shared(room: int, wanted: list[int]) -> list[int]:
    """Return how many lines each gets, evenly as far as each wants them."""
    given = [0] * len(wanted)
    while room > 0 and given != wanted:
        for at, most in enumerate(wanted):
            if room > 0 and given[at] < most:
                given[at] += 1
                room -= 1
    return given


def _table(
    table: Table, model: Model, look: Look, width: int, height: int, *, cursor: int | None
) -> list[Text]:
    if height <= 0:
        return []
    title = _TITLES[table.name]
    lines = [_row(_headed(table, title, look), table.columns, width, look, "bold underline")]
    room = height - 1
    first = 0 if cursor is None else max(0, min(cursor - room // 2, len(table.rows) - room))
    shown = table.rows[first : first + room]
    for at, row in enumerate(shown, first):
        style = "reverse" if at == cursor else "bold" if row.alert else ""
        lines.append(_row(row.cells, table.columns, width, look, style))
    if not shown and room:
        nothing = f"none matches {plain(model.filtered)!r}" if table.seen else _NOTHING[table.name]
        waits = table.name == "keys" and model.keys is None
        lines.append(Text("      asking for them" if waits else f"      {nothing}", "dim"))
    left = len(table.rows) - first - len(shown)
    if left > 0 and cursor is None and shown:
        lines[-1] = Text(
            f"      and {left + 1} more: {NAMES.index(table.name) + 2} shows them", "dim"
        )
    return lines


def _headed(table: Table, title: str, look: Look) -> tuple[str, ...]:
    """Return the titles of the columns, that of the table in the widest, the order marked."""
    up, down = "▲▼" if look.unicode else "^v"
    mark = up if table.reverse else down
    count = (
        f"{len(table.rows)}"
        if len(table.rows) == table.total
        else f"{len(table.rows)} of {table.total}"
    )
    heads: list[str] = []
    for column in table.columns:
        head = f"{column.title}{mark}" if column.title == table.ordered_by else column.title
        if not column.width:
            wide = head if table.name == "refs" else mark if head != column.title else ""
            head = f"{title} {count}  {wide}".rstrip()
        heads.append(head)
    return tuple(heads)


def _row(
    cells: tuple[str, ...], columns: tuple[Column, ...], width: int, look: Look, style: str
) -> Text:
    fixed = sum(column.width for column in columns) + len(columns) - 1
    wide = max(8, width - fixed)
    line = Text(style=style, no_wrap=True)
    for at, (cell, column) in enumerate(zip(cells, columns, strict=True)):
        text = Text(plain(cell, not look.unicode))
        room = column.width or wide
        if text.cell_len > room:
            text.truncate(room, overflow="ellipsis" if look.unicode else "crop")
        pad = " " * (room - text.cell_len)
        line.append(" " * bool(at))
        line.append(pad + text.plain if column.right else text.plain + pad)
    line.pad_right(max(0, width - line.cell_len))
    return line


_HELP: Final = (
    "1 2 3 4 5, Tab   all tables, sessions, unpaid refs, puts that wait, keys",
    "6                other hosts, read from and by, where there are any",
    "arrows, PgDn     move the cursor",
    "s, r             sort by the next column; turn the order round",
    "/                show only rows with some text; Esc ends it",
    "space            freeze: look no more until pressed again",
    "e                evict the key under the cursor, which is asked twice",
    "m                letters for the colours of the map, and back",
    "q, Ctrl-C        leave, with exit code 0 or 130",
    "sessions hold what they write, or were given ahead for their next puts",
    "held: what no eviction gives back; sizes in powers of 1024",
)


def _help(room: int) -> list[Text]:
    return [Text("KEYS OF THE KEYBOARD", "bold underline"), *map(Text, _HELP)][:room]


def _last(model: Model, look: Look, now_s: float) -> Text:
    if model.question is not None:
        return Text(plain(model.question.text, not look.unicode), "bold reverse")
    if news := model.news(now_s):
        return Text(plain(news, not look.unicode), "bold")
    if model.filtered:
        return Text(
            f"only rows with {plain(model.filtered, not look.unicode)!r}: / changes it, Esc ends it"
        )
    keys = KEYS.replace("1-5", "1-6") if model.has_hosts else KEYS
    return Text(keys, "dim" if look.colours != "none" else "")
