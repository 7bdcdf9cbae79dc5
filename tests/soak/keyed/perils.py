"""A process that stops or kills itself at a named step of a hit, when its time has come."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any, Final

from faults.agents import BEFORE, KEY_STEPS, KEY_STEPS_ON_GPU, ON_GPU
from soak.board import Word
from soak.keyed.plan import KeyedWorld
from soak.process import Process

STEPS: Final = ("found", "leased", "copying", "copied", "ending", "paying", "paid")


class Perils:
    """Arms a step of the next hits now and then; it goes off once, in whichever thread comes there first."""

    def __init__(self, me: Process) -> None:
        self._me = me
        assert isinstance(me.world, KeyedWorld)
        self._between_s = me.world.between_s
        self._due_s = self._later()
        self._armed: tuple[Any, str, Any] | None = None

    def _later(self) -> float:
        return time.monotonic() + self._me.chance.expovariate(1 / self._between_s)

    def come(self) -> None:
        """Arm a step if it is time."""
        if self._armed is None and time.monotonic() > self._due_s:
            self._due_s = self._later()
            self._arm(self._me.chance.randrange(len(STEPS)))

    def _arm(self, step: int) -> None:
        name, on_gpu = STEPS[step], self._me.device is not None
        target, attribute, when = KEY_STEPS[name]
        if on_gpu:
            target, attribute, when = KEY_STEPS_ON_GPU.get(name, (target, attribute, when))
            target = ON_GPU.get(target, target)
        original = getattr(target, attribute)
        kills = self._me.place.mortal and self._me.chance.random() < 0.4

        def perilous(*arguments: Any, **names: Any) -> Any:
            if when == BEFORE:
                self._go_off(step, kills=kills)
            result = original(*arguments, **names)
            if when != BEFORE:
                self._go_off(step, kills=kills)
            return result

        self._armed = target, attribute, vars(target).get(attribute)
        setattr(target, attribute, perilous)

    def _go_off(self, step: int, *, kills: bool) -> None:
        armed, self._armed = self._armed, None
        if armed is None:
            return  # another thread was first
        target, attribute, before = armed
        if before is None:  # a base's
            delattr(target, attribute)
        else:
            setattr(target, attribute, before)
        row, world = self._me.row, self._me.world
        if kills:
            row[Word.DYING_AT] = step + 1
            os.kill(os.getpid(), signal.SIGKILL)
        world.ledger.stopped(self._me.place.number, step)  # type: ignore[attr-defined]
        for_s = self._me.chance.choice((0.005, 0.02, 0.1, 0.3))
        # The conductor continues it from then on until this word is cleared: it can't know whether the
        # signal had come when it did.
        row[Word.STOPPED_NS] = time.monotonic_ns() + int(for_s * 1e9)
        # To this thread, not to the process: another one might take it, and this one go on for a while.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        row[Word.STOPPED_NS] = 0
