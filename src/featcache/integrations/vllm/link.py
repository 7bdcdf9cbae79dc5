"""A connector's session with the owner, which may come and go: a client with ``reconnect=True``."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, Protocol, TypeVar

import featcache
from featcache import FeatcacheError, blocking
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.outages import logger, outages

_RETRY_S: Final = 1.0
"""Between attempts to open where an owner is there, and refuses."""
_CLOSE_S: Final = 5.0


class _Client(Protocol):
    @property
    def is_attached(self) -> bool:
        """Whether its owner is there."""


C = TypeVar("C", bound=_Client)


class Link(Generic[C]):
    """What both kinds of links have in common: the client, once it is open, and whether it is attached."""

    def __init__(self, endpoint: str, counts: Counts, *, warns: bool) -> None:
        self._endpoint, self._counts = endpoint, counts
        self._client: C | None = None
        self._ends = threading.Event()
        self._refused = ""
        outages.watch(endpoint, counts, warns=warns)

    @property
    def client(self) -> C | None:
        """The open client, or None while no owner is there."""
        client = self._client
        return client if client is not None and client.is_attached else None

    def wait_attached(self, timeout_s: float) -> bool:
        """Wait for the owner, and return whether it is there. At the start of an engine alone."""
        give_up_s = time.monotonic() + timeout_s
        while self.client is None and time.monotonic() < give_up_s:
            self._ends.wait(0.01)
        return self.client is not None

    def _is_refused(self, error: FeatcacheError) -> None:
        """Tell, once, that an owner is there and refuses."""
        if str(error) != self._refused:
            self._refused = str(error)
            logger.warning("featcache: %s: every input is encoded here meanwhile", error)

    def _closed(self) -> None:
        self._ends.set()
        outages.unwatch(self._endpoint, self._counts)


class ThreadLink(Link[blocking.FeatureClient]):
    """A `featcache.blocking` client: a worker's, which reads on its own stream."""

    def __init__(self, endpoint: str, counts: Counts, *, device: Any, name: str) -> None:
        super().__init__(endpoint, counts, warns=False)
        self.device, self._name = device, name
        self._thread = threading.Thread(target=self._open, name="featcache-open", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        while not self._ends.is_set():
            try:
                client = blocking.connect(
                    self._endpoint, device=self.device, name=self._name, reconnect=True
                )
                client.open()
            except FeatcacheError as error:
                self._is_refused(error)
                self._ends.wait(_RETRY_S)
                continue
            self._client = client
            # After the store: either `close` finds this client, or this look finds that it came.
            if self._ends.is_set():  # a stopped owner held the attach for longer than `close` waits
                client.close()
            return

    def close(self) -> None:
        """Close the client."""
        self._closed()
        self._thread.join(_CLOSE_S)
        client, self._client = self._client, None
        if client is not None:
            client.close()


class LoopLink(Link[featcache.FeatureClient]):
    """A client in an event loop of its own: the scheduler's, which waits for nothing."""

    def __init__(self, endpoint: str, counts: Counts, *, name: str) -> None:
        super().__init__(endpoint, counts, warns=True)
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._leaves = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._main, name="featcache-loop", daemon=True)
        self._thread.start()

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine in the loop. In any thread."""

        def start() -> None:
            task = self._loop.create_task(work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.post(start)

    def post(self, call: Callable[[], object]) -> None:
        """Call something in the loop, if it runs still. In any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        """Cancel what runs in the loop, close the client and end the thread."""
        self._closed()
        self.post(self._leaves.set)
        self._thread.join(_CLOSE_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        while not self._leaves.is_set():
            try:
                # The CPU: the scheduler's process reads the key table alone, and makes no context on a GPU.
                async with featcache.connect(
                    self._endpoint, device="cpu", name=self._name, reconnect=True
                ) as client:
                    self._client = client
                    await self._leaves.wait()
                    await self._cancel()
                    self._client = None
            except FeatcacheError as error:
                self._is_refused(error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._leaves.wait(), _RETRY_S)

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
