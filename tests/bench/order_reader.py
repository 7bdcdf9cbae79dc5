"""The readers of cuda_order.py: each ref is read in every way there is, and wrong bytes are counted."""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import featcache
from bench.crew import Pipe, receive
from bench.patterns import Patterns
from featcache import blocking

PLAIN, RELEASED, DISCARDED, NEGLECTED, END = range(5)
"""The end of a feature: read by all; paid by all at once, unread; taken back by the owner; left
to its ttl by one reader."""
HEAD = struct.Struct("<QB")
LOOK_EVERY = 256
PATIENCE_S = 60.0
_WAYS = ("get", "borrow", "get(out=)", "release")
_WEIGHTS = (40, 30, 20, 10)


class Awaitable:
    """A blocking client with the async one's calls, so that one loop reads with either."""

    def __init__(self, client: blocking.FeatureClient) -> None:
        self._client = client

    async def get(self, ref: featcache.FeatureRef, **names: Any) -> Any:
        return self._client.get(ref, **names)

    def borrow(self, ref: featcache.FeatureRef, **names: Any) -> _Borrow:
        return _Borrow(self._client.borrow(ref, **names))

    async def release(self, ref: featcache.FeatureRef) -> None:
        self._client.release(ref)


class _Borrow:
    def __init__(self, manager: AbstractContextManager[Any]) -> None:
        self._manager = manager

    async def __aenter__(self) -> Any:
        return self._manager.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.__exit__(kind, error, trace)


class OrderReader:
    """Reads every feature in one of the ways, sometimes late on the GPU; looks at the count rarely."""

    def __init__(
        self, client: Any, patterns: Patterns, index: int, readers: int, seed: int
    ) -> None:
        self._client = client
        self._patterns = patterns
        self._index = index
        self._readers = readers
        self._random = random.Random(seed + 1 + index)
        self._since = 0
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, int]] = []
        self.stale: list[str] = []

    async def read(self, number: int, kind: int, ref: featcache.FeatureRef) -> None:
        if kind == NEGLECTED and number % self._readers == self._index:
            self.counts["neglected"] += 1
            return
        chosen = self._random.choices(_WAYS, _WEIGHTS)[0]
        way = "release" if kind == RELEASED else chosen
        try:
            with self._patterns.next_stream():
                if self._random.random() < 0.05:
                    self._patterns.drowse(self._random.uniform(0.05, 1.5))
                await self._by(way, number, ref)
            self.counts[way] += 1
            self.counts["bytes"] += 0 if way == "release" else ref.nbytes
        except featcache.StaleRef as error:
            expected = kind in {DISCARDED, NEGLECTED}
            self.counts["stale, expected" if expected else "stale, unexpected"] += 1
            if not expected and len(self.stale) < 5:
                self.stale.append(f"feature {number}, {way}: {error}")
        self._since += 1
        if self._since >= LOOK_EVERY:
            self.look(number)

    async def _by(self, way: str, number: int, ref: featcache.FeatureRef) -> None:
        client, patterns = self._client, self._patterns
        if way == "release":
            await client.release(ref)
        elif way == "borrow":
            async with client.borrow(ref, timeout=PATIENCE_S) as view:
                patterns.check(number, view)
        elif way == "get":
            patterns.check(number, await client.get(ref, timeout=PATIENCE_S))
        else:
            room = patterns.room(ref.nbytes)
            patterns.check(number, await client.get(ref, out=room, timeout=PATIENCE_S))

    def look(self, number: int) -> None:
        """Read the GPU's counter; note where it grew."""
        wrong_bytes = self._patterns.wrong_bytes()
        grown = wrong_bytes - self.counts["wrong bytes"]
        if grown and len(self.wrong) < 20:
            self.wrong.append({"up to feature": number, "looks": self._since, "bytes": grown})
        self.counts["wrong bytes"] = wrong_bytes
        self._since = 0


async def reader(pipe: Pipe, inbox: Connection, device: str, plan: dict[str, Any]) -> None:
    """The main function of a reader's process."""
    patterns = Patterns(device, plan["most"], plan["streams"])
    index = plan["index"]
    pipe.say("ready")
    (endpoint,) = await pipe.hear()
    names: dict[str, Any] = {"device": device, "name": f"reader{index}"}
    if index % 2:
        with blocking.connect(endpoint, **names) as client:
            await _follow(pipe, inbox, Awaitable(client), patterns, plan)
    else:
        async with featcache.connect(endpoint, **names) as own:
            await _follow(pipe, inbox, own, patterns, plan)


async def _follow(
    pipe: Pipe, inbox: Connection, client: Any, patterns: Patterns, plan: dict[str, Any]
) -> None:
    told = OrderReader(client, patterns, plan["index"], plan["readers"], plan["seed"])
    pipe.say("attached")
    number = 0
    while True:
        message = await receive(inbox)
        number, kind = HEAD.unpack_from(message)
        if kind == END:
            break
        await told.read(number, kind, featcache.FeatureRef.from_bytes(message[HEAD.size :]))
        await asyncio.sleep(0)  # the client's own loop must hear of segments
    told.look(number)
    pipe.say("done", dict(told.counts), told.wrong, told.stale)
