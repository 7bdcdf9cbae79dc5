"""The life cycle of a cache or client object, and the engine that it has while it is open."""

import asyncio
import contextlib
import enum
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

import anyio

from featcache.errors import CacheClosed, FeatcacheError, WrongLoop
from featcache.ref import FeatureRef
from featcache.session.home import NOWHERE, Home, Runs, is_foreign, no_loop
from featcache.session.reader import Reader
from featcache.session.single_flight import Keys
from featcache.session.staging import SpillCounter, Writers
from featcache.statistics import Statistics


class Closable(Protocol):
    """The open half of any object that has a life cycle."""

    async def aclose(self) -> None:
        """Close it."""

    def forget(self) -> None:
        """Drop descriptors and mappings in a forked child."""


class Engine(Closable, Protocol):
    """The open half of a `FeatureCache` (`owner.owner.Owner`) or a client (`api.client.OpenClient`)."""

    @property
    def reader(self) -> Reader:
        """get, borrow and release."""

    @property
    def keys(self) -> Keys:
        """The directory."""

    @property
    def spills(self) -> SpillCounter:
        """Its puts that were spilled."""

    def writers_nowait(self, on_full: str, key: Any) -> Writers | None:
        """Return the writers of the pools that a put may go to; None if one is yet to be attached."""

    async def writers(self, on_full: str, key: Any, timeout_s: float | None) -> Writers:
        """As `writers_nowait`, attaching first; raises PutTimeout if that is not done in time."""

    async def discard(self, ref: FeatureRef) -> None:
        """Cancel the reads that a ref still owes."""

    def statistics(self, *, in_loop: bool) -> Statistics:
        """Return gauges and counters; outside the loop, gauges as last published."""


E = TypeVar("E", bound=Closable)


class LifeState(enum.Enum):
    """The states of an object that opens once.

    | from    | by                                        | to      |
    | ------- | ----------------------------------------- | ------- |
    | NEW     | `open` begins                             | OPENING |
    | NEW     | `aclose`                                  | NEW     |
    | OPENING | the engine is made                        | OPEN    |
    | OPENING | making it fails, or `open` is cancelled   | NEW     |
    | OPENING | `aclose`: the making is cancelled, undone | CLOSED  |
    | OPEN    | `aclose`; `forget`, in a forked child     | CLOSED  |
    """

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"


_LIVE = frozenset((LifeState.OPENING, LifeState.OPEN))


class Lifecycle(Generic[E]):
    """One object's state; the engine exists exactly while that is OPEN."""

    def __init__(self, noun: str, verb: str) -> None:
        """`noun` and `verb` name the object, and how another is made, in errors."""
        self._noun, self._verb = noun, verb
        self.state = LifeState.NEW
        self.engine: E | None = None
        self.hint = "not opened yet: use 'async with', or await open()"
        self._making: asyncio.Task[E] | None = None
        self._settled = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._closing_hint = f"this {noun} was closed"
        self.runs: Runs = NOWHERE
        self.home: Home | None = None
        """The loop that opens or opened it."""

    async def open(self, make: Callable[[], Coroutine[Any, Any, E]]) -> None:
        """Make the engine, in the loop that it then belongs to.

        Raises:
            CacheClosed: it is not NEW, or is closed meanwhile.
            WrongLoop: no asyncio loop runs here.

        """
        if self.state is not LifeState.NEW:
            raise CacheClosed(f"a {self._noun} opens once: {self._verb} another")
        home = Home()
        self.state, self.home, self.runs = LifeState.OPENING, home, home.runs
        self._settled = asyncio.Event()
        # A task of its own, so that `aclose` can cancel the making and no more of the caller.
        self._making = asyncio.get_running_loop().create_task(make())
        try:
            engine = await self._made(self._making)
            if self.state is not LifeState.OPENING:  # closed, and its cancellation came too late
                await _to_its_end(asyncio.ensure_future(engine.aclose()))
                raise self.closed()
            # In the step in which this call returns: a caller that is cancelled never has an open
            # object that it does not know of.
            self.engine, self.state = engine, LifeState.OPEN
        finally:
            self._making = None
            if self.state is LifeState.OPENING:
                self.state = LifeState.NEW
            self._settled.set()

    async def _made(self, making: "asyncio.Task[E]") -> E:
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            _cancel_once(making)
            await _to_its_end(making)
            if not making.cancelled() and making.exception() is None:  # cancelled as it was made
                await _to_its_end(asyncio.ensure_future(making.result().aclose()))
            caller = asyncio.current_task()
            if self.state is LifeState.CLOSED and not (caller is not None and caller.cancelling()):
                raise self.closed() from None
            raise

    async def aclose(self) -> None:
        """Close it, also while it opens. Idempotent: whoever comes meanwhile waits for the same end.

        If the caller is cancelled it goes on at once, and so does the closing. Raise WrongLoop in another
        loop than its own.
        """
        home = self.home
        if self.state in _LIVE and home is not None and not home.is_here():
            raise home.refusal(self._noun)
        if is_foreign():
            raise no_loop()
        if self._making is not None:
            self._close(self._closing_hint)
            _cancel_once(self._making)
            await self._settled.wait()  # until the making is undone
        engine = self.engine
        if engine is not None:
            # First, so that no call begins while the engine closes.
            self._close(self._closing_hint)
            self._closing = asyncio.get_running_loop().create_task(engine.aclose())
            self._closing.add_done_callback(self._closed)
        if self._closing is not None and home is not None and home.is_here():
            await asyncio.shield(self._closing)

    def _closed(self, _: "asyncio.Task[None]") -> None:
        self._closing = None  # its error's traceback refers to all that was open

    def on_exit(self) -> None:
        """Say in later errors that the end of the process closed it."""
        self._closing_hint += " as its process's main thread ended: have that wait for the others"

    def forget(self) -> None:
        """Close in a forked child, without a word to anybody."""
        engine = self.engine
        self._close(
            f"this process was forked from the one that opened the {self._noun}: {self._verb} another "
            "in this process, after the fork (a client connects to the parent's endpoint again)"
        )
        if engine is not None:
            engine.forget()

    def _close(self, hint: str) -> None:
        self.state, self.engine, self.hint = LifeState.CLOSED, None, hint

    def here(self) -> E:
        """Return the engine, for a call that must come in the loop.

        Raises:
            WrongLoop: it came from elsewhere.
            CacheClosed: it is not open.

        """
        engine = self.engine
        if engine is None or self.runs._thread_id != threading.get_ident():  # noqa: SLF001 - see `Runs`
            raise self.refusal()
        return engine

    def refusal(self) -> FeatcacheError:
        """Return the error of a call that `here` refused."""
        if self.engine is None or self.home is None:
            return self.closed()
        return self.home.refusal(self._noun)

    def closed(self) -> CacheClosed | WrongLoop:
        """Return the error of a call while it is not open."""
        if self.state is LifeState.NEW and is_foreign():
            return no_loop()  # the first call says what opening would
        return CacheClosed(self.hint)


def _cancel_once(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, unless it is cancelled already: a second time would cut its undo short."""
    if not task.cancelling():
        task.cancel()


async def _to_its_end(task: "asyncio.Future[Any]") -> None:
    """Wait until an undo is done, however often the caller is cancelled meanwhile."""
    with anyio.CancelScope(shield=True):
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
