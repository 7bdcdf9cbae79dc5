"""The processes of cuda_elastic.py: readers that stream, hold and read as told, and the owner's side."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from typing import Any

import featcache
from bench.crew import Child, Crew, Pipe, Post, one_way, receive, shared_numbers, until
from bench.patterns import Patterns
from bench.proofs import MIB, Proof
from featcache.events import Event

SMALL_BYTES = 1 * MIB
WINDOW = 8
"""Small features in flight."""
NAMES = ("reader0", "reader1")


class Held:
    """Obeys the proof: each command is a method, its answer the wrong bytes so far."""

    def __init__(self, client: featcache.FeatureClient, patterns: Patterns) -> None:
        self._client = client
        self._patterns = patterns
        self._borrow: Any = None
        self._view: Any = None

    async def read(self, number: int, data: bytes) -> None:
        ref = featcache.FeatureRef.from_bytes(data)
        self._patterns.check(number, await self._client.get(ref, timeout=30))

    async def release(self, number: int, data: bytes) -> None:
        await self._client.release(featcache.FeatureRef.from_bytes(data), timeout=30)

    async def borrow(self, number: int, data: bytes) -> None:
        self._borrow = self._client.borrow(featcache.FeatureRef.from_bytes(data), timeout=30)
        self._view = await self._borrow.__aenter__()
        await self.look(number, b"")

    async def look(self, number: int, data: bytes) -> None:
        self._patterns.check(number, self._view)

    async def leave(self, number: int, data: bytes) -> None:
        await self._borrow.__aexit__(None, None, None)


async def reader(
    pipe: Pipe, inbox: Connection, endpoint: str, device: str, name: str, progress: Any, most: int
) -> None:
    patterns = Patterns(device, most)
    async with featcache.connect(endpoint, device=device, name=name) as client:
        streaming = asyncio.create_task(stream(client, inbox, patterns, progress))
        pipe.say("attached")
        held = Held(client, patterns)
        while (message := await pipe.hear())[0] != "end":
            command, *arguments = message
            await getattr(held, command)(*arguments)
            pipe.say(command, patterns.wrong_bytes())
            if streaming.done():
                streaming.result()  # it never ends but by an error
        streaming.cancel()


async def stream(
    client: featcache.FeatureClient, inbox: Connection, patterns: Patterns, progress: Any
) -> None:
    while True:
        message = await receive(inbox)
        ref = featcache.FeatureRef.from_bytes(message[8:])
        patterns.check(int.from_bytes(message[:8], "little"), await client.get(ref, timeout=30))
        progress[0] += 1
        await asyncio.sleep(0)


class Stage:
    """The owner's side: the stream, and large features by number."""

    def __init__(self, proof: Proof, backend: str, cache: featcache.FeatureCache) -> None:
        chosen = proof.options
        self.proof, self.backend, self.cache = proof, backend, cache
        self.segment: int = chosen.segment
        self.large = chosen.segment - 2 * MIB + 3
        self.patterns = Patterns(chosen.device, chosen.segment)
        self.small = Patterns(chosen.device, SMALL_BYTES)
        self.children: list[Child] = []
        self.outboxes: list[Connection] = []
        self.progress: list[Any] = []
        self.events: list[Event] = []
        self.refs: dict[int, bytes] = {}
        """Large features by number, owed by both readers."""
        self.streamed = 0
        self._number = 1 << 32  # of large features; small ones count from 1
        self._flowing = asyncio.Event()
        self._post = Post()

    def claim(self, name: str, found: Any, wanted: str, holds: object) -> None:
        self.proof.claim(f"{self.backend}: {name}", found, wanted, holds)

    async def attach(self, crew: Crew, devices: list[str]) -> None:
        for device, name in zip(devices, NAMES, strict=True):
            inbox, outbox = one_way()
            progress = shared_numbers(1)
            where = (self.cache.endpoint, device, name, progress, self.segment)
            self.children.append(crew.start(reader, inbox, *where))
            inbox.close()
            self.outboxes.append(outbox)
            self.progress.append(progress)
        for child in self.children:
            await child.expect("attached")

    async def flow(self) -> None:
        """Stream small features, a window of them in flight, while the gate is open."""
        while True:
            await self._flowing.wait()
            self.streamed += 1
            ref = await self.cache.put(
                self.small.fill(self.streamed, SMALL_BYTES), readers=2, timeout=120
            )
            self._post.send(self.streamed.to_bytes(8, "little") + ref.to_bytes(), self.outboxes)
            await until("readers follow", lambda: self.streamed - self.read_by_all < WINDOW, 120)

    @property
    def read_by_all(self) -> int:
        return min(int(progress[0]) for progress in self.progress)

    async def open_gate(self) -> None:
        self._flowing.set()
        goal = self.read_by_all + 4 * WINDOW
        await until("features stream", lambda: self.read_by_all >= goal)

    async def shut_gate(self) -> None:
        self._flowing.clear()
        await until("the stream has run dry", lambda: self.read_by_all == self.streamed)
        await asyncio.sleep(0.1)

    async def put(self, nbytes: int) -> int:
        """Put a feature that both readers owe a read of, by name; return its number."""
        self._number += 1
        feature = self.patterns.fill(self._number, nbytes)
        ref = await self.cache.put(feature, readers=NAMES, timeout=120)
        self.refs[self._number] = ref.to_bytes()
        return self._number

    async def tell(self, reader_: int, command: str, number: int) -> int:
        """Have a reader do something; return its wrong bytes so far."""
        data = self.refs.get(number, b"")
        child = self.children[reader_]
        child.tell(command, number, data)
        (wrong_bytes,) = await child.expect(command)
        return int(wrong_bytes)

    async def drop(self, number: int) -> None:
        """Have it paid by both, unread."""
        for reader_ in (0, 1):
            await self.tell(reader_, "release", number)
        del self.refs[number]
