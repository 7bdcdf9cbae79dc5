"""The conductor of the keyed storm: it counts reads, and stops the owner for longer."""

from __future__ import annotations

import os
import signal
import time
from typing import Final

from soak.board import Word
from soak.children import Child
from soak.keyed.perils import STEPS
from soak.owners import is_owner
from soak.storm import Rates, Storm

_OWNER_STOP_EVERY_S: Final = 15.0
_OWNER_STOP_S: Final = 1.5
_TELL_S: Final = 30.0
_LOOK_S: Final = 0.1


class KeyedStorm(Storm):
    """As the other, with readers that stop and kill themselves at the steps of a hit."""

    wanted: int | None = None
    """Reads after which it ends."""

    def blow_until(self, wanted: int | None, seconds: float) -> None:
        """Storm until so many reads were checked, at most for a time."""
        self.wanted = wanted
        now_s = self._began_s = time.monotonic()
        self.owner_stops: list[tuple[float, int]] = []
        """Of each long stop of the lasting owner its seconds, and the reads meanwhile."""
        self._stop_due_s = now_s + _OWNER_STOP_EVERY_S / 3
        self._stop_began: tuple[Child, float, int] | None = None
        self._tell_s = now_s + _TELL_S
        self._look_s = now_s
        self._has_read_enough = False
        self.blow(seconds)
        self._end_stop(time.monotonic(), at_once=True)

    @property
    def reads(self) -> int:
        """Reads by key that were checked."""
        return self.world.board.total(Word.READS)

    @property
    def over(self) -> bool:
        return self._has_read_enough

    def _act(self, now_s: float) -> None:
        super()._act(now_s)
        self._stop_owner(now_s)
        if now_s > self._look_s:
            self._look_s = now_s + _LOOK_S
            self._has_read_enough = self.wanted is not None and self.reads >= self.wanted
        if now_s > self._tell_s:
            self._tell_s = now_s + _TELL_S
            print(f"{now_s - self._began_s:.0f} s, {self.reads:,} reads", flush=True)

    def reap(self, *, again: bool) -> None:
        """Continue those that stopped themselves, too: to the very end of the storm."""
        now_ns = time.monotonic_ns()
        for child in self.children.values():
            until_ns = self._row(child.place)[Word.STOPPED_NS]
            if until_ns and now_ns > until_ns and child.resume_s is None:
                child.signal(signal.SIGCONT)  # again, if the stop had not come yet
        super().reap(again=again)

    def _stop_owner(self, now_s: float) -> None:
        """Stop the lasting owner for long, during which hits go on."""
        if self._stop_began is not None:
            self._end_stop(now_s)
        elif now_s > self._stop_due_s:
            child = next(one for one in self.children.values() if _is_lasting(one))
            if child.resume_s is None:
                until_ns = time.monotonic_ns() + int((_OWNER_STOP_S + 1) * 1e9)
                self.world.board.owner_stopped_ns = until_ns
                child.signal(signal.SIGSTOP)
                child.resume_s = float("inf")  # not continued by others
                self._stop_began = child, now_s, self._reads_of_lasting()

    def _end_stop(self, now_s: float, *, at_once: bool = False) -> None:
        if self._stop_began is None:
            return
        child, began_s, reads = self._stop_began
        if now_s - began_s < _OWNER_STOP_S and not at_once:
            return
        self.owner_stops.append((now_s - began_s, self._reads_of_lasting() - reads))
        child.signal(signal.SIGCONT)
        child.resume_s = self._stop_began = None
        self._stop_due_s = now_s + _OWNER_STOP_EVERY_S

    def _reads_of_lasting(self) -> int:
        rows = (self._row(place) for place in self.world.places if place.pool == 0)
        return sum(row[Word.READS] for row in rows)

    def _ended(self, child: Child, status: int) -> None:
        step = self._row(child.place)[Word.DYING_AT]
        if step and not child.killed and os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
            self.counts["kills at a step"] += 1
            self.killed_at[STEPS[step - 1]] += 1
            return
        super()._ended(child, status)


def _is_lasting(child: Child) -> bool:
    return is_owner(child.place) and not child.place.mortal


__all__ = ["KeyedStorm", "Rates"]
