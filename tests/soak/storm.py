"""The conductor: it starts the processes, kills, stops and limits them, and sees how they end."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from soak.board import Row, Step, Word
from soak.children import Child, fork
from soak.owners import DRAIN_S, is_owner
from soak.plan import Place, Role, World

_HUNG_S: Final = 25.0
"""Without progress, of a process that is not stopped: longer than any wait of a script."""
_END_S: Final = 20.0
_GRACE_NS: Final = 1_000_000_000
_LIMIT_GRACE_NS: Final = 10_000_000_000
"""Processes of a busy machine, and those that are stopped besides, end long after what ended them."""


@attrs.frozen
class Rates:
    """How much of what, per second."""

    kills: float
    owner_kills: float
    stops: float
    limits: float
    memory: bool
    """Whether memory is limited too."""


class Storm:
    """The processes of a soak, and what becomes of them."""

    def __init__(self, world: World, rates: Rates) -> None:
        self.world = world
        self.rates = rates
        self.chance = random.Random(world.seed)
        self.children: dict[int, Child] = {}
        self.started: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()
        self.killed_at: Counter[str] = Counter()
        self._due_s = dict.fromkeys(("kill", "owner", "stop", "limit", "watch"), 0.0)

    # --- processes -------------------------------------------------------------------------------

    def start(self, place: Place) -> None:
        """Start a process at a place."""
        self.started[place.number] += 1
        number = self.started[place.number]
        self._row(place).begin()
        pid = fork(self.world, place, number)
        self.children[pid] = Child(place, number, pid, time.monotonic())

    def _row(self, place: Place) -> Row:
        return self.world.board.rows[place.number]

    def reap(self, *, again: bool) -> None:
        """See who has ended, and start the next there."""
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self.children.pop(pid)
            self._ended(child, status)
            if again:
                self.start(child.place)

    def _ended(self, child: Child, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        owner = is_owner(child.place)
        if child.killed and code == -signal.SIGKILL:
            self.counts["owner kills" if owner else "kills"] += 1
            return
        if code == 0 and (child.place.role is Role.VANDAL or self.world.board.stopping):
            return
        limited = time.monotonic_ns() < self._row(child.place)[Word.LIMITED_NS]
        self.counts["ended under a limit" if limited else "ended by themselves"] += 1
        what = "under a limit" if limited else "BY ITSELF"
        self.world.board.fault(f"ENDED {what} with {code}: {child.place}")

    def kill(self, child: Child) -> None:
        """Kill, and note where it was."""
        row = self._row(child.place)
        if not is_owner(child.place):
            self.killed_at[Step(row[Word.AT]).name.lower()] += 1
        child.killed = True
        self.world.board.died(child.pid, time.monotonic_ns())
        child.signal(signal.SIGKILL)

    # --- the storm -------------------------------------------------------------------------------

    def blow(self, seconds: float) -> None:
        """Start all, and storm for a time."""
        for place in self.world.places:
            self.start(place)
            if is_owner(place):
                self._await_start(place)
        ends_s = time.monotonic() + seconds
        while (now_s := time.monotonic()) < ends_s and not self.over:
            self.reap(again=True)
            for child in self.children.values():
                child.lift(now_s)
            self._act(now_s)
            time.sleep(0.002)

    @property
    def over(self) -> bool:
        """Whether it has done what it was for before its time is over."""
        return False

    def _await_start(self, place: Place) -> None:
        give_up_s = time.monotonic() + 60
        while not self._row(place)[Word.BEGUN]:
            if time.monotonic() > give_up_s or os.waitpid(-1, os.WNOHANG)[0]:
                raise SystemExit(f"the owner at {place} did not start")
            time.sleep(0.01)

    def _act(self, now_s: float) -> None:
        rates = self.rates
        if self._is_due("kill", now_s, rates.kills):
            some = [child for child in self.children.values() if self._is_ripe(child)]
            if some:
                self.kill(self.chance.choice(some))
        if self._is_due("owner", now_s, rates.owner_kills):
            for child in self.children.values():
                if is_owner(child.place) and child.place.mortal and now_s - child.began_s > 1:
                    self.kill(child)
        if self._is_due("stop", now_s, rates.stops):
            self._stop(now_s)
        if self._is_due("limit", now_s, rates.limits):
            self._limit(now_s)
        if self._is_due("watch", now_s, 1.0):
            self._watch()

    def _is_due(self, what: str, now_s: float, rate: float) -> bool:
        if rate <= 0 or now_s < self._due_s[what]:
            return False
        late_s = self._due_s[what] or now_s
        wait_s = self.chance.expovariate(rate) if what != "watch" else 1.0
        self._due_s[what] = (
            max(late_s, now_s - 1) + wait_s
        )  # what the machine missed is made up for
        return True

    def _is_ripe(self, child: Child) -> bool:
        """Whether it may be killed: at work, or now and then on its way there; not twice."""
        if child.killed or not child.place.mortal or is_owner(child.place):
            return False
        return bool(self._row(child.place)[Word.BEGUN]) or self.chance.random() < 0.05

    def _stop(self, now_s: float) -> None:
        """Stop one for a moment: the lasting owner seldom, and not for long."""
        child = self.chance.choice(list(self.children.values()))
        lasting = is_owner(child.place) and not child.place.mortal
        if child.killed or child.resume_s is not None:
            return
        for_s = self.chance.choice((0.005, 0.05, 0.05 if lasting else 0.5))
        child.resume_s = now_s + for_s
        if lasting:
            self.world.board.owner_stopped_ns = time.monotonic_ns() + int(for_s * 1e9) + _GRACE_NS
        child.signal(signal.SIGSTOP)
        self.counts["stops"] += 1

    def _limit(self, now_s: float) -> None:
        """Take descriptors or memory from one for a moment."""
        child = self.chance.choice(list(self.children.values()))
        for_s = self.chance.choice((0.01, 0.1, 0.4))
        what = resource.RLIMIT_NOFILE
        if self.rates.memory and self.chance.random() < 0.5:
            if is_owner(child.place):
                return
            what = resource.RLIMIT_AS
        with contextlib.suppress(OSError):  # it has just ended
            if what == resource.RLIMIT_NOFILE:
                most = len(os.listdir(f"/proc/{child.pid}/fd")) + self.chance.randrange(4)  # noqa: PTH208
            else:
                pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + self.chance.randrange(8 << 20)
            row = self._row(child.place)
            row[Word.LIMITED_NS] = time.monotonic_ns() + int(for_s * 1e9) + _LIMIT_GRACE_NS
            child.limit(what, most, now_s + for_s)
            self.counts["limits"] += 1

    def _watch(self) -> None:
        """Kill whoever hangs, and count it."""
        now_ns = time.monotonic_ns()
        for child in self.children.values():
            silent_s = (now_ns - self._row(child.place)[Word.BEAT_NS]) / 1e9
            if silent_s > _HUNG_S and not child.killed and child.resume_s is None:
                self._hangs(child)

    def _hangs(self, child: Child) -> None:
        row = self._row(child.place)
        self.counts["hung"] += 1
        status = Path(f"/proc/{child.pid}/status").read_text().splitlines()[2]
        self.world.board.fault(f"HUNG at {Step(row[Word.AT]).name}: {child.place}, {status}")
        child.signal(signal.SIGUSR1)
        time.sleep(0.2)  # its traceback goes to the file of faults
        child.killed = True
        child.signal(signal.SIGKILL)

    # --- the end ---------------------------------------------------------------------------------

    def calm(self) -> None:
        """Let the workers end, then the owners account for what is left."""
        for child in self.children.values():
            child.lift(float("inf"))
        board = self.world.board
        board.stopping = 1
        self._await(_END_S, lambda child: not is_owner(child.place))
        board.stopping = 2
        self._await(_END_S + DRAIN_S, lambda _: True)

    def abandon(self) -> None:
        """Leave no process behind, however the soak ends."""
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.children.clear()

    def _await(self, seconds: float, who: Callable[[Child], bool]) -> None:
        give_up_s = time.monotonic() + seconds
        while any(who(child) for child in self.children.values()):
            self.reap(again=False)
            if time.monotonic() > give_up_s:
                for child in self.children.values():
                    if who(child):
                        self._hangs(child)
                give_up_s = float("inf")
            time.sleep(0.01)
