"""The pool's pressure: a level with hysteresis, and the rate at which it is reported."""

import enum

import attrs


class PressureLevel(enum.StrEnum):
    """``normal`` < ``elevated`` (75 %) < ``high`` (90 %) < ``exhausted`` (a put waits for others' bytes)."""

    NORMAL = "normal"
    ELEVATED = "elevated"
    HIGH = "high"
    EXHAUSTED = "exhausted"

    @property
    def rank(self) -> int:
        """0 for normal to 3 for exhausted."""
        return _RANK[self]


_RANK = {level: rank for rank, level in enumerate(PressureLevel)}
_RISES_AT = ((PressureLevel.HIGH, 0.90), (PressureLevel.ELEVATED, 0.75))
_HYSTERESIS = 0.05
ALWAYS_NORMAL = _RISES_AT[-1][1] - _HYSTERESIS


@attrs.define
class PressureGauge:
    """The level now, the level last reported, and the times that bound the reports.

    The level follows every change at once (admission control needs it); reports do not: a level
    above the last reported one is reported at once, a lower one not before `log_interval_s` after
    the last report, and a high one that stays again every `repeat_interval_s`.
    """

    log_interval_s: float
    repeat_interval_s: float
    level: PressureLevel = PressureLevel.NORMAL
    reported: PressureLevel = PressureLevel.NORMAL
    _last_s: float = float("-inf")

    def observe(self, used_bytes: int, capacity_bytes: int, waiters: int) -> bool:
        """Set the level; return whether it changed."""
        fraction = used_bytes / capacity_bytes
        if not waiters and fraction < ALWAYS_NORMAL and self.level is PressureLevel.NORMAL:
            return False  # the common case, at every put
        level = self._level(fraction, waiters)
        changed, self.level = level is not self.level, level
        return changed

    def due(self, now_s: float) -> PressureLevel | None:
        """Return the previously reported level if a report is due now, and count it as made."""
        rising = self.level.rank > self.reported.rank
        if self.level is self.reported:
            high = self.level.rank >= PressureLevel.HIGH.rank
            wanted = high and now_s - self._last_s >= self.repeat_interval_s
        else:
            wanted = rising or now_s - self._last_s >= self.log_interval_s
        if not wanted:
            return None
        previous, self.reported = self.reported, self.level
        self._last_s = now_s
        return previous

    def _level(self, fraction: float, waiters: int) -> PressureLevel:
        if waiters:
            return PressureLevel.EXHAUSTED
        for level, rises_at in _RISES_AT:
            # A level once reached is kept until the use is clearly under its mark.
            kept = self.level.rank >= level.rank
            if fraction >= rises_at - (_HYSTERESIS if kept else 0.0):
                return level
        return PressureLevel.NORMAL
