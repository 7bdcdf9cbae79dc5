"""The life cycle of a cache or client object, and the engine that it has while it is open."""

import asyncio
import enum
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from featcache.errors import CacheClosed
from featcache.ref import FeatureRef
from featcache.session.reader import Reader
from featcache.session.single_flight import Keys
from featcache.session.staging import SpillCounter, Writers
from featcache.statistics import Statistics


class Engine(Protocol):
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

    async def writers(self, on_full: str, key: Any) -> Writers:
        """As `writers_nowait`, attaching first."""

    async def discard(self, ref: FeatureRef) -> None:
        """Cancel the reads that a ref still owes."""

    def statistics(self) -> Statistics:
        """Return gauges and counters."""

    async def aclose(self) -> None:
        """Close it."""

    def forget(self) -> None:
        """Drop descriptors and mappings in a forked child."""


E = TypeVar("E", bound=Engine)


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

    async def open(self, make: Callable[[], Coroutine[Any, Any, E]]) -> None:
        """Make the engine. Raise CacheClosed if it is not NEW, or is closed meanwhile."""
        if self.state is not LifeState.NEW:
            raise CacheClosed(f"a {self._noun} opens once: {self._verb} another")
        self.state = LifeState.OPENING
        self._settled.clear()
        # A task of its own, so that `aclose` can cancel the making and no more of the caller.
        self._making = asyncio.get_running_loop().create_task(make())
        try:
            engine = await self._made(self._making)
            if self.state is not LifeState.OPENING:  # closed, and its cancellation came too late
                await engine.aclose()
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
            return await making
        except asyncio.CancelledError:
            if making.done() and not making.cancelled() and making.exception() is None:
                await making.result().aclose()  # the caller was cancelled as it was made
            caller = asyncio.current_task()
            if self.state is LifeState.CLOSED and not (caller is not None and caller.cancelling()):
                raise self.closed() from None
            raise

    async def aclose(self) -> None:
        """Close it, also while it opens. Idempotent."""
        if self._making is not None:
            self._close(f"this {self._noun} was closed")
            self._making.cancel()
            await self._settled.wait()  # until the making is undone
        engine = self.engine
        if engine is not None:
            # First, so that no call begins while the engine closes.
            self._close(f"this {self._noun} was closed")
            await engine.aclose()

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

    def closed(self) -> CacheClosed:
        """Return the error of a call while it is not open."""
        return CacheClosed(self.hint)
