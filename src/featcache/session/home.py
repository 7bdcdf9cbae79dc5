"""Where an object belongs: the event loop that opened it, in the thread that runs it."""

import asyncio
import sys
import threading
from asyncio import _get_running_loop
from typing import Protocol

from featcache.errors import WrongLoop

_NEEDS_ASYNCIO = (
    "featcache needs a running asyncio (or uvloop) event loop, and there is none in thread {}{}; "
    "where another library runs the tasks, call featcache.blocking in a worker thread{}"
)


class Runs(Protocol):
    """What tells the thread in which a loop runs at this moment."""

    @property
    def _thread_id(self) -> int | None: ...


class _Nowhere:
    """The same where no loop is, yet."""

    __slots__ = ()
    _thread_id = None


NOWHERE: Runs = _Nowhere()


class _Asks:
    """The same of a loop that does not tell it, such as uvloop's: this thread, if the loop runs here."""

    __slots__ = ("_loop",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    @property
    def _thread_id(self) -> int | None:
        return threading.get_ident() if _get_running_loop() is self._loop else None


class Home:
    """The running loop and its thread; made where they are.

    A call compares ``home.runs._thread_id`` with ``get_ident()``. asyncio's loops have that attribute,
    which is theirs only while they run: so a loop that ended, in this thread too, is told from the one
    that runs. To ask `asyncio` for the running loop costs a system call on Python 3.11, several times
    as much as this.
    """

    __slots__ = ("loop", "runs", "thread")

    def __init__(self) -> None:
        """Raise WrongLoop where no asyncio loop runs."""
        loop = _get_running_loop()
        if loop is None:
            raise no_loop()
        self.loop = loop
        self.runs: Runs = loop if hasattr(loop, "_thread_id") else _Asks(loop)
        self.thread = threading.current_thread().name

    def is_here(self) -> bool:
        """Whether this is called in the loop."""
        return self.runs._thread_id == threading.get_ident()  # noqa: SLF001 - see above

    def refusal(self, noun: str) -> WrongLoop:
        """Return the error of a call from elsewhere; `noun` names the object."""
        loop, thread = _get_running_loop(), threading.current_thread().name
        if loop is None and _runs_trio():
            return no_loop()
        home = f"{self.loop!r} ({id(self.loop):#x}) of thread {self.thread!r}"
        caller = "no event loop" if loop is None else f"{loop!r} ({id(loop):#x})"
        if loop is not None and thread == self.thread:
            caller += ", another loop of this thread"
        ended = ", which has ended: close it before its loop ends" if self.loop.is_closed() else ""
        return WrongLoop(
            f"this {noun} belongs to {home}{ended}; the call came from thread {thread!r} with {caller}. "
            "Make it in the loop (asyncio.run_coroutine_threadsafe), open another object here, or use "
            "featcache.blocking, which is safe in any thread"
        )


def no_loop() -> WrongLoop:
    """Return the error of a call that needs a loop where none of asyncio's runs."""
    trio = _runs_trio()
    return WrongLoop(
        _NEEDS_ASYNCIO.format(
            repr(threading.current_thread().name),
            ", where trio runs" if trio else "",
            ": trio.to_thread.run_sync" if trio else "",
        )
    )


def is_foreign() -> bool:
    """Whether another library than asyncio runs tasks in this thread."""
    return _runs_trio() and _get_running_loop() is None


def _runs_trio() -> bool:
    trio = sys.modules.get("trio")
    if trio is None:
        return False
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True
