"""A connection to the owner that outlives it: one warning when it goes, then attempts with back-off."""

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, Protocol, TypeVar

import featcache
from featcache import FeatcacheError, OwnerLost, blocking

logger: Final = logging.getLogger("vllm.featcache")
"""Under vLLM's own logger, whose handlers and level it has."""

_FIRST_S: Final = 0.05
_LONGEST_S: Final = 5.0
_CLOSE_S: Final = 5.0
_LOOK_S: Final = 0.5
"""How often an idle link looks whether its owner is there."""


class _Client(Protocol):
    def contains_nowait(self, key: str | bytes) -> bool | None:
        """Raise OwnerLost if the owner is gone."""


C = TypeVar("C", bound=_Client)


class Backoff:
    """Seconds before the next attempt: doubled each time, with jitter, up to a bound."""

    def __init__(self) -> None:
        self._next_s = _FIRST_S

    def reset(self) -> None:
        """Begin anew: an attempt succeeded."""
        self._next_s = _FIRST_S

    def next_s(self) -> float:
        """Return how long to wait now."""
        now_s, self._next_s = self._next_s, min(_LONGEST_S, self._next_s * 2)
        return now_s * random.uniform(0.5, 1.0)  # noqa: S311 - to spread engines, no secret


class Link(Generic[C]):
    """What both kinds of links have in common: the client of now, and who is told of its loss."""

    def __init__(self, endpoint: str, on_loss: Callable[[], object]) -> None:
        self._endpoint = endpoint
        self._on_loss = on_loss
        self.client: C | None = None
        """The open client, or None while the owner is away."""
        self._tried = threading.Event()
        self._down = False
        """Whether the owner's absence was told, until it is back."""

    def wait_tried(self, timeout_s: float) -> bool:
        """Wait for the first attempt to have ended; return whether the owner is there."""
        self._tried.wait(timeout_s)
        return self.client is not None

    def _up(self, client: C) -> None:
        self.client = client
        if self._down:
            logger.info("featcache: the owner at %s is back", self._endpoint)
        self._down = False
        self._tried.set()

    def _look(self, client: C) -> None:
        """Note the loss of an owner that no call has met yet."""
        try:
            client.contains_nowait(b"featcache")
        except FeatcacheError as error:
            self._failed(error)

    def _level(self, error: BaseException) -> int:  # noqa: ARG002 - of some links it counts
        """Return the level at which a loss is told."""
        return logging.WARNING

    def _failed(self, error: BaseException) -> None:
        """Tell of an owner that is not there: once, until it is."""
        self.client = None
        if not self._down:
            self._down = True
            self._on_loss()
            logger.log(
                self._level(error),
                "featcache: no owner at %s (%s): every input is encoded here, and attempts to attach go on",
                self._endpoint,
                error,
            )
        self._tried.set()


class ThreadLink(Link[blocking.FeatureClient]):
    """A `featcache.blocking` client, opened again by a thread whenever its owner was lost."""

    def __init__(
        self, endpoint: str, on_loss: Callable[[], object], *, device: Any, name: str
    ) -> None:
        super().__init__(endpoint, on_loss)
        self._device, self._name = device, name
        self._wake = threading.Event()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="featcache-link", daemon=True)
        self._thread.start()

    def _level(self, error: BaseException) -> int:
        # Of an owner that is gone the scheduler warns, once for all ranks.
        return logging.INFO if isinstance(error, OwnerLost) else logging.WARNING

    def lost(self, client: blocking.FeatureClient, error: FeatcacheError) -> None:
        """Take note that a call of this client found its owner gone. In any thread."""
        if self.client is client:
            self._failed(error)
            self._wake.set()

    def close(self) -> None:
        """Close the client and end the thread."""
        self._ends = True
        self._wake.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        backoff = Backoff()
        while not self._ends:
            client = blocking.connect(self._endpoint, device=self._device, name=self._name)
            try:
                client.open()
            except FeatcacheError as error:
                self._failed(error)
                self._wake.wait(backoff.next_s())  # set only by `close` while there is no client
                continue
            backoff.reset()
            self._wake.clear()
            self._up(client)
            while self.client is client and not self._wake.wait(_LOOK_S):
                self._look(client)
            self.client = None
            client.close()


class LoopLink(Link[featcache.FeatureClient]):
    """A client of an event loop in a thread of its own, opened again whenever its owner was lost."""

    def __init__(self, endpoint: str, on_loss: Callable[[], object], *, name: str) -> None:
        super().__init__(endpoint, on_loss)
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._ends = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._main, name="featcache-link", daemon=True)
        self._thread.start()

    def lost(self, client: featcache.FeatureClient, error: FeatcacheError) -> None:
        """Take note that a call of this client found its owner gone. In any thread."""
        if self.client is client:
            self._failed(error)
            self.post(self._wake.set)

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine in the loop. In any thread."""

        def start() -> None:
            task = self._loop.create_task(work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.post(start)

    def post(self, call: Callable[[], object]) -> None:
        """Call something in the loop, if it runs still. In any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        """Cancel what runs in the loop, close the client and end the thread."""
        self._ends = True
        self.post(self._wake.set)
        self._thread.join(_CLOSE_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        backoff = Backoff()
        while not self._ends:
            self._wake.clear()
            try:
                # The CPU: the scheduler's process reads the key table alone, and makes no context on a GPU.
                async with featcache.connect(
                    self._endpoint, device="cpu", name=self._name
                ) as client:
                    backoff.reset()
                    self._up(client)
                    await self._until_lost(client)
            except FeatcacheError as error:
                self._failed(error)
            if not self._ends:
                await self._woken(backoff.next_s())
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _until_lost(self, client: featcache.FeatureClient) -> None:
        try:
            while self.client is client and not await self._woken(_LOOK_S):
                self._look(client)
        finally:
            self.client = None

    async def _woken(self, within_s: float) -> bool:
        """Wait for a loss to be noted, or the end; return whether it came in time."""
        try:
            await asyncio.wait_for(self._wake.wait(), within_s)
        except TimeoutError:
            return False
        return True
