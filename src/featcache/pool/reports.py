"""Evictions and expiries told as events, at a bounded rate."""

import time
from collections.abc import Sequence
from typing import Final

from featcache import events
from featcache.control.turns import Turn
from featcache.core.effects import Evicted, Expired
from featcache.core.keyed_store import key_label
from featcache.pool.attendance import Attendance
from featcache.settings import Settings

_EVENT_UNITS: Final = 8
_now = time.monotonic


class Reports:
    """The events of one pool that come in numbers. Each that is told counts in the loop's turn."""

    def __init__(
        self, pool_name: str, settings: Settings, turn: Turn, attendance: Attendance
    ) -> None:
        self._pool_name = pool_name
        self._turn = turn
        self._attendance = attendance
        self._expiries = events.Throttle(settings.log_interval, burst=256)
        self._evictions = events.Throttle(settings.log_interval, burst=16)

    def tell(self, effects: Sequence[Evicted | Expired]) -> None:
        """Tell of what was carried out."""
        for effect in effects:
            if type(effect) is Evicted:
                self.evicted(effect)
            elif type(effect) is Expired:
                self.expired(effect)

    def evicted(self, evicted: Evicted) -> None:
        unlogged = self._evictions.pass_(_now())
        if unlogged is None:
            return
        self._turn.left -= _EVENT_UNITS
        events.emit(
            events.KeyEvicted(
                pool=self._pool_name,
                key=key_label(evicted.key)[:64],
                nbytes=evicted.nbytes,
                unused_s=evicted.unused_s,
                cause=evicted.cause,
                unlogged=unlogged,
            )
        )

    def expired(self, expired: Expired) -> None:
        unlogged = self._expiries.pass_(_now())
        if unlogged is None:
            return
        self._turn.left -= _EVENT_UNITS
        events.emit(
            events.RefExpired(
                pool=self._pool_name,
                ref=expired.label,
                nbytes=expired.nbytes,
                age_s=expired.age_s,
                owed_by=expired.owed_by,
                never_attached=self._attendance.never_attached(expired.owed_by),
                unlogged=unlogged,
            )
        )
