"""When ticks were: a bounded map from the ticks of a policy to times."""

from array import array
from bisect import bisect_right
from typing import Final

APART_S: Final = 0.05
"""Time between two ticks that are remembered, at least."""
EACH: Final = 1024
LEVELS: Final = 14


class TickTimes:
    """Ticks and their times in levels, each half as dense as the one before, of at most 2 x `EACH`.

    So the time of a use is right to the distance of two ticks at its level: to 0.1 s in the last minute
    or two, if ticks come that often, and beyond that to a thousandth of its age.
    """

    def __init__(self) -> None:
        self.due_s = float("-inf")
        """Before this time `note` is not called."""
        self._ticks = [array("q")]
        self._times_s = [array("d")]

    def __len__(self) -> int:
        return sum(map(len, self._ticks))

    def note(self, tick: int, now_s: float) -> None:
        """Remember that a tick began now. Ticks and times only grow."""
        self.due_s = now_s + APART_S
        self._ticks[0].append(tick)
        self._times_s[0].append(now_s)
        for level in range(LEVELS):
            if len(self._ticks[level]) <= 2 * EACH:
                break
            self._hand_down(level + 1)

    def _hand_down(self, level: int) -> None:
        """Move every second of the older half of the level before into this one."""
        if level == LEVELS:
            del self._ticks[-1][:EACH], self._times_s[-1][:EACH]
            return
        if level == len(self._ticks):
            self._ticks.append(array("q"))
            self._times_s.append(array("d"))
        self._ticks[level].extend(self._ticks[level - 1][:EACH:2])
        self._times_s[level].extend(self._times_s[level - 1][:EACH:2])
        del self._ticks[level - 1][:EACH], self._times_s[level - 1][:EACH]

    def of(self, tick: int) -> float:
        """Return when a tick was: the time of the last that is remembered and not above it."""
        for ticks, times_s in zip(self._ticks, self._times_s, strict=True):
            if at := bisect_right(ticks, tick):
                return times_s[at - 1]
        return float("-inf")
