"""How much of a turn of the event loop featcache may use, and the work that goes on in later turns.

A loop calls everything that is ready before it looks at its timers and sockets again: that is a turn. So
that none takes longer than a few milliseconds, whatever comes at once, all work that comes in numbers
(calls, messages, wake-ups, evictions, payments) is counted in units of about ten microseconds, and a turn
has `TURN_UNITS` of them. What finds none left goes on in later turns: the callers in the order in which
they called, and all kinds of work round robin, `QUANTUM_UNITS` each.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

TURN_UNITS: Final = 128
QUANTUM_UNITS: Final = 32
CALL_UNITS: Final = 2
"""Of a call of the public API, whose bytes count besides (`BYTES_SHIFT`)."""
FRAME_UNITS: Final = 2
WAKE_UNITS: Final = 4
"""Of a task that is woken, or cancelled."""
ATTACH_UNITS: Final = 48
LEAVE_UNITS: Final = 16
LEAVE_QUEUE_UNITS: Final = 2
EVICT_UNITS: Final = 4
EXPIRE_UNITS: Final = 3
LEAST: Final = 32
"""Units that a call may use though the turn has none left: it came while there were some."""
BYTES_SHIFT: Final = 16
"""A copy in the loop takes a unit for each 64 KiB."""

KEPT: Final = object()
"""What the work of a caller returns that has kept its future, to have it done itself."""

Activity: TypeAlias = Callable[[], bool]
"""Does work until its quantum is used up; returns whether there is more."""


class Turn:
    """One loop's turn. It belongs to the loop's thread."""

    __slots__ = ("__weakref__", "_active", "_callers", "_loop", "_scheduled", "left")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.left = TURN_UNITS
        """Units that are left. While work waits for its turn, none are."""
        self._loop = loop
        self._active: deque[Activity] = deque()
        self._callers: deque[tuple[asyncio.Future[Any], Callable[[], Any] | None]] = deque()
        self._scheduled = False

    @property
    def has_callers(self) -> bool:
        """Whether a call waits for its turn: a later one must not overtake it."""
        return bool(self._callers)

    # --- callers ----------------------------------------------------------------------------------

    async def wait(self) -> None:
        """Return in a later turn, after all callers before. Nothing is done: it can be cancelled."""
        await self.place()

    def place(self, work: Callable[[], T] | None = None) -> "asyncio.Future[T]":
        """Take a place in the line of callers; the future is done, with what `work` returns, at its turn.

        `work` is done in the line, not by the task that is woken then: whoever calls after that comes
        after it.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if not self._callers:
            self.later(self._let_in)
        self._callers.append((future, work))
        return future

    def _let_in(self) -> bool:
        callers, until = self._callers, max(0, self.left - QUANTUM_UNITS)
        while callers and self.left > until:
            future, work = callers.popleft()
            if future.done():
                continue  # cancelled
            self.left -= CALL_UNITS
            try:
                result = None if work is None else work()
                if result is not KEPT:
                    future.set_result(result)
            except Exception as error:  # noqa: BLE001 - told to the caller
                if not future.done():
                    future.set_exception(error)
        return bool(callers)

    # --- work that goes on ------------------------------------------------------------------------

    def do(self, activity: Activity) -> None:
        """Begin an activity now if this turn has units left; what is left of it is done `later`."""
        if self.left <= 0 or activity():
            self.later(activity)

    def do_all(self, pieces: Iterator[None]) -> None:
        """As `do`, of work that yields where it can be interrupted."""

        def some() -> bool:
            until = max(0, self.left - QUANTUM_UNITS)
            return any(self.left <= until for _ in pieces)

        self.do(some)

    def later(self, activity: Activity) -> None:
        """Do an activity, a quantum at a time, from the next turn on."""
        self._active.append(activity)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        """Begin a turn: do what waits for it. If all of it is done, the rest of the turn is anyone's."""
        active = self._active
        self.left = TURN_UNITS
        try:
            while active and self.left > 0:
                activity = active.popleft()
                if activity():
                    active.append(activity)
        finally:
            self._scheduled = bool(active)
            if active:
                self.left = min(self.left, 0)
                self._loop.call_soon(self._begin)


_turns: "WeakValueDictionary[int, Turn]" = WeakValueDictionary()
"""By the id of their loop, which lives as long as its turn does."""


def turn_of(loop: asyncio.AbstractEventLoop) -> Turn:
    """Return the turn of a loop, one for all that runs in it."""
    turn = _turns.get(id(loop))
    if turn is None:
        turn = _turns[id(loop)] = Turn(loop)
    return turn
