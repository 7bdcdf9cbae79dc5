"""Processes forked by the conductor, which is their parent: what it says of one is never of another."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import os
import resource
import signal
import sys
import traceback
from typing import Any

import attrs
import torch

from featcache import events
from soak.keyed.plan import KeyedWorld
from soak.keyed.readers import READERS, read_blocking
from soak.keyed.writers import KeyedOwner, write_by_key
from soak.owners import OwnerScript, is_owner
from soak.plan import Place, Role, World
from soak.process import Process
from soak.turns import TimedSelector, timed_runner
from soak.workers import SCRIPTS, without_loop

_PR_SET_PDEATHSIG = 1
_cuda: Any = torch.cuda  # half of its functions have no types


@attrs.define
class Child:
    """A process at its place. It is not reaped, so its pid is its own, until `Storm` has seen its end."""

    place: Place
    number: int
    pid: int
    began_s: float
    killed: bool = False
    resume_s: float | None = None
    """When it is to be continued, of one that is stopped."""
    limits: dict[int, tuple[float, tuple[int, int]]] = attrs.field(factory=dict)
    """Of each limit that is on: until when, and what it was before."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def limit(self, what: int, most: int, until_s: float) -> None:
        """Lower a limit of the process until a time."""
        before = resource.prlimit(self.pid, what)
        before = self.limits[what][1] if what in self.limits else before
        resource.prlimit(self.pid, what, (most, before[1]))
        self.limits[what] = (until_s, before)

    def lift(self, now_s: float) -> None:
        """Lift the limits, and the stop, whose time is over."""
        if self.resume_s is not None and now_s >= self.resume_s:
            self.signal(signal.SIGCONT)
            self.resume_s = None
        for what, (until_s, before) in list(self.limits.items()):
            if now_s >= until_s:
                resource.prlimit(self.pid, what, before)
                del self.limits[what]


def fork(world: World, place: Place, number: int) -> int:
    """Start a process at a place; return its pid."""
    # CUDA does not survive a fork, but a fork of a process that has only imported torch may begin to
    # use it: nothing in the conductor does, not even to count the GPUs.
    assert not _cuda.is_initialized(), "the conductor uses no GPU"
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _prepare(world, parent)
        code = _run(world, place, number)
    except BaseException:  # noqa: BLE001 - nothing may go on above
        world.board.fault(f"ENDED at {place}:\n{traceback.format_exc()}")
    finally:
        os._exit(code)


def _prepare(world: World, parent: int) -> None:
    """Make the fork a process of its own, which ends with its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, world.board.faults_fd, all_threads=True)
    faulthandler.enable(world.board.faults_fd)
    torch.set_num_threads(1)


def _run(world: World, place: Place, number: int) -> int:
    me = Process(world, place, number)
    if me.device is not None:
        torch.cuda.set_device(
            me.device
        )  # the first use of CUDA; it fails if the fork came after one
    selector = TimedSelector()
    if is_owner(place):
        with timed_runner(selector) as runner:
            script = KeyedOwner if isinstance(world, KeyedWorld) else OwnerScript
            runner.run(script(me, selector).run())
    else:
        events.remove_hook(events.log_to_structlog)
        scripts = SCRIPTS | READERS | {Role.KEYED_WRITER: write_by_key}
        if place.role is Role.BLOCKING:
            without_loop(me)
        elif place.role is Role.KEYED_BLOCKING:
            read_blocking(me)
        else:
            asyncio.run(scripts[place.role](me))  # type: ignore[arg-type]  # any coroutine
    sys.stdout.flush()
    return 0
