"""When ticks were: a bounded map from the ticks of a policy to times."""

from bisect import bisect_right
from typing import Final

APART_S: Final = 0.05
"""Time between two ticks that are remembered, at least."""
MOST: Final = 1 << 13


class TickTimes:
    """Ticks and their times, the newest `MOST` / 2 at least `APART_S` apart, older ones less dense.

    A use is known to be right to the distance of its neighbours: 0.1 s for the last three minutes, if
    ticks come that often, and after that to a thousandth of its age.
    """

    def __init__(self) -> None:
        self.due_s = float("-inf")
        """Before this time `note` is not called."""
        self._ticks: list[int] = []
        self._times_s: list[float] = []

    def __len__(self) -> int:
        return len(self._ticks)

    def note(self, tick: int, now_s: float) -> None:
        """Remember that a tick began now."""
        self.due_s = now_s + APART_S
        self._ticks.append(tick)
        self._times_s.append(now_s)
        if len(self._ticks) > MOST:
            # Of the older half every second goes: so each half of what is left is half as dense.
            del self._ticks[1 : MOST // 2 : 2], self._times_s[1 : MOST // 2 : 2]

    def of(self, tick: int) -> float:
        """Return when a tick was: the time of the last that is remembered and not above it."""
        at = bisect_right(self._ticks, tick) - 1
        return self._times_s[at] if at >= 0 else float("-inf")
