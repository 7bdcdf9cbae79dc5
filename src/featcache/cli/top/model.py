"""What `top` shows and what was chosen at its keys: no terminal, no clock of its own."""

from typing import Final, Literal

import attrs

from featcache import KeysPage, KeyView, SlabMap, Snapshot
from featcache.cli.top.history import History
from featcache.cli.top.short import plain, short_age, short_size
from featcache.cli.top.tables import NAMES, ORDERS, Name, Table, table_of

View = Literal["all", "sessions", "refs", "puts", "keys", "hosts"]
VIEWS: Final[tuple[View, ...]] = ("all", *NAMES)
_SILENT_S: Final = 2.0
_USUAL_MOST_S: Final = 10.0
_FORGOTTEN: Final = 0.8
"""Of the time that an answer took, by the next answer."""
_SAID_S: Final = 6.0
_LONGEST_FILTER: Final = 60
Link = Literal["connecting", "up", "lost"]


@attrs.frozen(kw_only=True)
class Seen:
    """What one look brought; None is what it did not ask for."""

    snapshot: Snapshot
    slab: SlabMap | None = None
    keys: KeysPage | None = None


@attrs.frozen
class Question:
    """Whether to evict a key: asked twice, of the key that was chosen, whatever the frame shows by then."""

    key: KeyView
    again: bool = False

    @property
    def text(self) -> str:
        """The question."""
        if self.again:
            return f"Sure? Whoever needs {plain(self.key.label)} must make it again.  y evicts it, n does not"
        how = "pinned, " if self.key.pinned else ""
        reads = f", {self.key.reads} reads of it may finish" if self.key.reads else ""
        label = plain(self.key.label)
        return f"Evict {label} ({how}{short_size(self.key.nbytes)}{reads})?  y yes, n no"


@attrs.define
class Model:
    """The state of one `top`."""

    endpoint: str
    interval_s: float = 1.0
    since_s: float = 0.0
    """When it began to connect, or to do without an owner."""
    link: Link = "connecting"
    why: str = ""
    """Why there is no owner."""
    asked_s: float | None = None
    """Since when an answer is awaited."""
    usual_s: float = 0.0
    """What an answer takes: that of an owner which is asked for much comes late."""
    snapshot: Snapshot | None = None
    slab: SlabMap | None = None
    slab_at_s: float = 0.0
    keys: KeysPage | None = None
    history: History = attrs.field(factory=History)
    view: View = "all"
    orders: dict[str, str] = attrs.field(
        factory=lambda: {name: next(iter(ORDERS[name])) for name in NAMES}
    )
    reversed_: set[str] = attrs.field(factory=set)
    filtered: str = ""
    frozen: bool = False
    cursor: int = 0
    helping: bool = False
    question: Question | None = None
    said: tuple[str, float] = ("", float("-inf"))
    """A sentence for the last line, and since when."""

    # --- what comes -------------------------------------------------------------------------------

    def asking(self, now_s: float) -> None:
        """Note that an answer is awaited."""
        self.asked_s = now_s

    def answered(self, now_s: float) -> None:
        """Note that the answer came."""
        if self.asked_s is not None:
            took_s = now_s - self.asked_s
            self.usual_s = min(_USUAL_MOST_S, max(took_s, self.usual_s * _FORGOTTEN))
        self.asked_s = None

    def saw(self, seen: Seen, now_s: float) -> None:
        """Take what a look brought."""
        self.answered(now_s)
        self.link, self.why = "up", ""
        if self.frozen:  # an answer that was on its way
            return
        chosen = self._chosen()
        self.snapshot = seen.snapshot
        self._choose_again(chosen)
        self.history.add(seen.snapshot, now_s)
        self.see_more(seen.slab, seen.keys, now_s)

    def see_more(self, slab: SlabMap | None, keys: KeysPage | None, now_s: float) -> None:
        """Take a map, or a page of keys, that followed."""
        if self.frozen:
            return
        if slab is not None:
            self.slab, self.slab_at_s = slab, now_s
        if keys is not None:
            chosen = self._chosen()
            self.keys = keys
            self._choose_again(chosen)

    def _chosen(self) -> object:
        """Return what the row under the cursor is about."""
        rows = self.table(self.table_name).rows
        return rows[self.cursor].ident if self.cursor < len(rows) else None

    def _choose_again(self, ident: object) -> None:
        """Move the cursor to the row that is about this, if there is one still."""
        rows = self.table(self.table_name).rows
        at = next((at for at, row in enumerate(rows) if row.ident == ident), None)
        if self.view != "all" and self.cursor and at is not None:  # at the top it stays there
            self.cursor = at
        self.move(0)

    def lost(self, why: str, now_s: float) -> None:
        """Note that there is no owner; what was seen stays to be looked at."""
        if self.link != "lost":
            self.link, self.since_s = "lost", now_s
        self.why, self.asked_s = why, None
        self.history.gap()

    def say(self, text: str, now_s: float) -> None:
        """Show a sentence for a while."""
        self.said = (text, now_s)

    # --- what is chosen ---------------------------------------------------------------------------

    @property
    def table_name(self) -> Name:
        """The table that the keys are about."""
        return "sessions" if self.view == "all" else self.view

    @property
    def has_hosts(self) -> bool:
        """Whether there are other hosts: without any there is no table of them."""
        return self.snapshot is not None and self.snapshot.peers > 0

    @property
    def views(self) -> tuple[View, ...]:
        """What can be shown."""
        return tuple(view for view in VIEWS if view != "hosts" or self.has_hosts)

    def choose(self, view: View) -> None:
        """Show one table, or all."""
        if view != self.view and view in self.views:
            self.view, self.cursor = view, 0

    def next_view(self, step: int = 1) -> None:
        """Show the next table."""
        views = self.views
        at = views.index(self.view) if self.view in views else 0
        self.choose(views[(at + step) % len(views)])

    def sort(self, order: str | None = None) -> None:
        """Go by another order: the next one if none is named."""
        name = self.table_name
        known = list(ORDERS[name])
        if order is None:
            order = known[(known.index(self.orders[name]) + 1) % len(known)]
        self.orders[name] = order
        self.cursor = 0

    def orders_known(self) -> tuple[str, ...]:
        """Return the orders of the table in view."""
        return tuple(ORDERS[self.table_name])

    def reverse(self) -> None:
        """Turn the order of the table round."""
        self.reversed_ ^= {self.table_name}

    def filter(self, text: str) -> None:
        """Show rows with this text alone."""
        self.filtered = text[:_LONGEST_FILTER]
        self.cursor = 0

    def move(self, step: int) -> None:
        """Move the cursor by so many rows."""
        if self.view != "all":
            last = len(self.table(self.table_name).rows) - 1
            self.cursor = max(0, min(self.cursor + step, last))

    def table(self, name: Name) -> Table:
        """Return a table as it is now."""
        return table_of(
            name,
            self.snapshot,
            self.keys,
            order=self.orders[name],
            reverse=name in self.reversed_,
            filtered=self.filtered,
        )

    @property
    def chosen_key(self) -> KeyView | None:
        """The key under the cursor."""
        rows = self.table("keys").rows if self.view == "keys" else ()
        return rows[self.cursor].key if self.cursor < len(rows) else None

    # --- eviction ---------------------------------------------------------------------------------

    def ask(self, now_s: float) -> None:
        """Ask whether to evict the key under the cursor; where none is, show the keys first."""
        if self.view != "keys":
            self.choose("keys")
            self.say("choose a key with the arrows, then e evicts it", now_s)
        elif (key := self.chosen_key) is None:
            self.say("there is no key to evict", now_s)
        else:
            self.question = Question(key)

    def answer(self, yes: bool, now_s: float) -> KeyView | None:
        """Answer a question; return the key to evict once both were answered with yes."""
        question, self.question = self.question, None
        if question is None:
            return None
        if not yes:
            self.say("not evicted", now_s)
            return None
        if not question.again:
            self.question = Question(question.key, again=True)
            return None
        return question.key

    def escape(self, now_s: float) -> None:
        """Leave what is open: a question, the help, a filter."""
        if self.question is not None:
            self.answer(False, now_s)
        elif self.helping:
            self.helping = False
        else:
            self.filter("")

    # --- what is told -----------------------------------------------------------------------------

    def silent_s(self, now_s: float) -> float:
        """Return for how long the owner owes an answer, 0 where that is no time to speak of."""
        if self.asked_s is None or self.link == "lost":
            return 0.0
        silent_s = now_s - self.asked_s
        patience_s = max(_SILENT_S, 2 * self.interval_s, 1.5 * self.usual_s)
        return silent_s if silent_s >= patience_s else 0.0

    def status(self, now_s: float) -> tuple[str, bool]:
        """Return how fresh the frame is, and whether that is bad."""
        if self.link == "lost":
            return f"NO OWNER for {short_age(now_s - self.since_s)}: {plain(self.why)}", True
        if silent_s := self.silent_s(now_s):
            return f"no answer for {silent_s:.0f} s", True
        if self.snapshot is None:
            return "connecting", False
        if self.frozen:
            return "FROZEN", True
        if self.usual_s > max(_SILENT_S, self.interval_s):
            return f"answers take {self.usual_s:.0f} s", False
        return f"every {self.interval_s:g} s", False

    def changes_by_itself(self, now_s: float) -> bool:
        """Whether the frame is another one a second later though nothing came."""
        since_s = now_s - self.said[1]
        return (
            self.link != "up" or self.silent_s(now_s) > 0 or _SAID_S - 1 <= since_s <= _SAID_S + 1
        )

    def news(self, now_s: float) -> str:
        """Return the sentence of the last line, while it is new."""
        text, since_s = self.said
        return text if now_s - since_s < _SAID_S else ""
