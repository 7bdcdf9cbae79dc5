"""Which sessions are attached, and which names ever were: a debtor is named with what became of it."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from featcache.pool.page import SessionPage

_MAX_LABEL = 32
_MAX_GONE = 1024


class Attendance:
    """The sessions of a pool by name, and the names of those that ended, of which so many are kept."""

    def __init__(self, pages: Mapping[int, SessionPage]) -> None:
        self.pages = pages
        self.siblings: list[Attendance] = []
        """Of the owner's other pools."""
        self.own_name: str | None = None
        """The owner's own, which owes reads before it has read."""
        self.gone: OrderedDict[str, str] = OrderedDict()
        """Names whose session ended, the last ones, and how it did."""
        self._forgot = False

    def ended(self, page: SessionPage, *, died: bool) -> None:
        """Remember that a named session ended, and how."""
        if page.name is None:
            return
        self.gone[page.name] = "died" if died else "left"
        self.gone.move_to_end(page.name)
        if len(self.gone) > _MAX_GONE:
            self.gone.popitem(last=False)
            self._forgot = True

    def attached(self) -> dict[str, SessionPage]:
        """Return the named sessions that are attached now."""
        return {page.name: page for page in self.pages.values() if page.name is not None}

    def never_attached(self, owed_by: Iterable[str] | int) -> tuple[str, ...]:
        """Return those of the names that no session has ever had, as far as is remembered."""
        names = () if isinstance(owed_by, int) else tuple(owed_by)
        if not names:
            return ()
        known = {self.own_name, *self.attached(), *self.gone}
        for sibling in self.siblings:
            known |= {*sibling.attached(), *sibling.gone}
        return tuple(name for name in names if name not in known)

    def label(self, name: str, attached: Mapping[str, SessionPage]) -> str:
        """Return a name as messages have it, with what became of its session."""
        page = attached.get(name)
        return f"{clipped(name)} ({self._state(name) if page is None else session_of(page)})"

    def _state(self, name: str) -> str:
        if name == self.own_name:
            return "the owner itself"
        if name in self.gone:
            return self.gone[name]
        for sibling in self.siblings:
            if (page := sibling.attached().get(name)) is not None:
                return f"pid {page.pid}, attached to the owner's other pool"
            if name in sibling.gone:
                return sibling.gone[name]
        return "not attached" if self._forgot else "never attached"

    def named(self, number: int) -> str:
        """Return a session as messages have it, by its number."""
        page = self.pages.get(number)
        if page is not None:
            return label_of(page)
        # The owner has a page only once it has read.
        return "the owner" if number <= 0 else f"session {number}, which ended"


def session_of(page: SessionPage) -> str:
    """Return a session's number and process."""
    return f"{'the owner' if page.session <= 0 else f'session {page.session}'}, pid {page.pid}"


def label_of(page: SessionPage) -> str:
    """Return a session as messages have it: by its name if it has one."""
    return session_of(page) if page.name is None else f"{clipped(page.name)} ({session_of(page)})"


def clipped(name: str) -> str:
    """Return a name of others on one line of bounded length."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 1]}…"
