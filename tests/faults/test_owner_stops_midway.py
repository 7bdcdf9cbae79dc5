"""The owner is stopped amid a call of a client, before any of its messages: the call ends in its time."""

import asyncio
import contextlib
import functools
import itertools
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

import pytest
import torch

import featcache
import featcache.blocking
from faults.agents import feature
from faults.keyed import host_only, owner
from faults.test_owner_stopped import account
from featcache import FeatcacheError, StaleRef
from featcache.control import many
from featcache.control.channel import Channel
from support.processes import Child, Start
from support.slabs import Slab

SIZE: Final = 4 << 10
SHORT_S: Final = 0.05
LATE_S: Final = 20.0
"""Much longer than any of the calls is given."""

Call = Callable[[Any, list[torch.Tensor]], Any]


CALLS: Final[dict[str, Call]] = {
    "put": lambda it, values: it.put(values[0], timeout=SHORT_S),
    "put, no wait": lambda it, values: it.put(values[0], timeout=SHORT_S, on_full="raise"),
    "put with a key": lambda it, values: it.put(values[0], key="k", timeout=SHORT_S),
    "put_many": lambda it, values: it.put_many(values[:3], timeout=SHORT_S),
    "put_many with keys": lambda it, values: it.put_many(
        values[:3], keys=["k", "l", None], timeout=SHORT_S
    ),
    "put_many in two messages": lambda it, values: it.put_many(
        values, keys=["k", *(None for _ in values[1:])], timeout=SHORT_S
    ),
    "get": lambda it, _: it.get("k", timeout=SHORT_S),
    "get_many": lambda it, _: it.get_many(["k", "l"], timeout=SHORT_S),
    "share": lambda it, _: it.share("k", readers=1, timeout=SHORT_S),
}
"""What is under none of these keys before; a call that reads finds nothing however far it comes."""
READS: Final = frozenset(("get", "get_many", "share"))
LEAST_FRAMES: Final = {
    "put_many": 2,
    "put_many with keys": 2,
    "put_many in two messages": 3,
}
"""Messages that each takes at least: what comes before one of them was done before the owner stopped."""


class Stopper:
    """Stops a process before this one sends its n-th frame; `frames` counts them."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.stops_at = -1
        self.frames = 0
        self.has_stopped = False

    def sends(self) -> None:
        if self.frames == self.stops_at:
            self._child.signal(signal.SIGSTOP)
            self.has_stopped = True
        self.frames += 1

    @contextlib.contextmanager
    def before(self, frame: int) -> Iterator[None]:
        """Stop it before that frame of the block; it goes on behind the block."""
        self.frames, self.stops_at, self.has_stopped = 0, frame, False
        try:
            yield
        finally:
            self.stops_at = -1
            self._child.signal(signal.SIGCONT)


@pytest.fixture
def stopper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Child], Stopper]:
    def arm(child: Child) -> Stopper:
        stops = Stopper(child)
        for name in ("send", "send_next"):
            sends = getattr(Channel, name)

            def send(self: Channel, *given: Any, sends: Any = sends) -> Any:
                stops.sends()
                return sends(self, *given)

            monkeypatch.setattr(Channel, name, send)
        return stops

    return arm


def some(slab: Slab) -> list[torch.Tensor]:
    return [feature(n, SIZE).to(slab.device) for n in range(many.MAX_PUBLISHED + 1)]


class Awaited:
    """A blocking client whose calls are made in a thread and awaited."""

    def __init__(self, client: featcache.blocking.FeatureClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return functools.partial(asyncio.to_thread, getattr(self._client, name))


@contextlib.asynccontextmanager
async def client_of(endpoint: str, slab: Slab, *, blocking: bool) -> AsyncIterator[Any]:
    if blocking:
        with featcache.blocking.connect(endpoint, settings=slab.settings()) as client:
            yield Awaited(client)
    else:
        async with featcache.connect(endpoint, settings=slab.settings()) as client:
            yield client


async def drop(cache: Any, found: Any) -> None:
    """Take back what a call has put."""
    for ref in found if isinstance(found, list) else [found]:
        with contextlib.suppress(StaleRef):  # it owes no read: it is kept under a key
            await cache.discard(ref)
    for key in ("k", "l"):
        await cache.evict(key)


@host_only
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("blocking", [False, True], ids=["awaited", "blocking"])
async def test_a_call_ends_in_its_time_wherever_its_owner_stops(
    start: Start, slab: Slab, stopper: Callable[[Child], Stopper], name: str, *, blocking: bool
) -> None:
    """And nothing of it is left: no key, no room, no claim, no waiter."""
    child, endpoint = await owner(start, slab, changes={"slots": 1024})
    values, stops, call = some(slab), stopper(child), CALLS[name]
    async with client_of(endpoint, slab, blocking=blocking) as cache:
        await drop(cache, await cache.put(values[0]))  # it can write
        for frame in itertools.count():
            found = None
            with stops.before(frame):
                try:
                    found = await asyncio.wait_for(call(cache, values), LATE_S)
                except TimeoutError as late:
                    assert isinstance(late, FeatcacheError), "it did not end by itself"  # noqa: PT017 - it may end rightly, too
                    assert stops.has_stopped or name in READS
            if found is None:
                await account(child)
                assert not await cache.contains("k"), "nobody put it in time"
            else:
                await drop(cache, found)
            if not stops.has_stopped:
                break
        await account(child)
        assert await child.ask("used") == ("used", 0)
        assert frame >= LEAST_FRAMES.get(name, 1)
