"""The processes of cuda_faults.py: readers that report their step, and an owner that is to be killed."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from multiprocessing.connection import Connection
from typing import Any

import featcache
from bench import proofs
from bench.crew import Crew, Pipe, Post, one_way, receive, shared_numbers
from bench.patterns import Patterns, log_uniform

PLAIN, KEEP, END = range(3)
"""Read it; borrow it and keep it until told; there is no more."""
HEAD = struct.Struct("<QB")
STATE, WRONG, READS, STALE, ATTACHED = range(5)
"""Indexes of a reader's shared numbers, which outlive it."""
IDLE, IN_GET, IN_BORROW = range(3)
AT = {IDLE: "between reads", IN_GET: "in a get", IN_BORROW: "in a borrow"}
LEAST_BYTES, MOST_BYTES = 16 << 10, 16 << 20
LOOK_EVERY = 32
CAPACITY_BYTES = 256 << 20
STALL_MS = 5000


class Reading:
    """Reads every ref that comes; keeps one borrow open if told to."""

    def __init__(self, client: featcache.FeatureClient, patterns: Patterns, shared: Any) -> None:
        self.client, self.patterns, self.shared = client, patterns, shared
        self.kept: Any = None
        self.kept_ref: featcache.FeatureRef | None = None
        self.kept_number = 0
        self.view: Any = None
        self._random = random.Random(shared[ATTACHED])
        self._wrong_before = shared[WRONG]  # in former lives of this reader

    async def follow(self, inbox: Connection) -> None:
        """Read until the end is told; OwnerLost or EOFError if it comes otherwise."""
        while True:
            message = await receive(inbox)
            number, kind = HEAD.unpack_from(message)
            if kind == END:
                self.look()
                return
            ref = featcache.FeatureRef.from_bytes(message[HEAD.size :])
            try:
                await (self.keep if kind == KEEP else self.read)(number, ref)
            except featcache.StaleRef:
                self.shared[STALE] += 1
            await asyncio.sleep(0)

    async def read(self, number: int, ref: featcache.FeatureRef) -> None:
        shared, patterns = self.shared, self.patterns
        late = self._random.random() < 0.2
        if self._random.random() < 0.5:
            shared[STATE] = IN_GET
            if late:
                patterns.drowse(1)
            patterns.check(number, await self.client.get(ref, timeout=60))
        else:
            async with self.client.borrow(ref, timeout=60) as view:
                shared[STATE] = IN_BORROW
                if late:
                    patterns.drowse(1)
                patterns.check(number, view)
        shared[STATE] = IDLE
        shared[READS] += 1
        if shared[READS] % LOOK_EVERY == 0:
            self.look()

    def look(self) -> None:
        self.shared[WRONG] = self._wrong_before + self.patterns.wrong_bytes()

    async def keep(self, number: int, ref: featcache.FeatureRef) -> None:
        self.kept = self.client.borrow(ref, timeout=60)
        self.view = await self.kept.__aenter__()
        self.kept_ref, self.kept_number = ref, number

    async def loss(self) -> tuple[float, str]:
        """Use the client until it raises that its owner is lost; return the time and the message."""
        assert self.kept_ref is not None, "told to keep one"
        while True:
            try:
                await self.client.get(self.kept_ref, timeout=60)
            except featcache.OwnerLost as error:
                return time.monotonic(), str(error)
            await asyncio.sleep(0.001)


async def reader(
    pipe: Pipe, inbox: Connection, endpoint: str, device: str, name: str, shared: Any
) -> None:
    """Read to the end; killed at any moment, or told to end."""
    patterns = Patterns(device, MOST_BYTES)
    async with featcache.connect(endpoint, device=device, name=name) as client:
        shared[ATTACHED] += 1
        await Reading(client, patterns, shared).follow(inbox)
        pipe.say("done")
        await pipe.hear()


class Rank:
    """One reader by name, in as many lives as it takes."""

    def __init__(self, crew: Crew, endpoint: str, device: str, name: str) -> None:
        self.name, self._crew, self._where = name, crew, (endpoint, device, name)
        self.shared = shared_numbers(5)
        # Of former lives: were one closed, the thread that sends might meet its number anew.
        self._outboxes: list[Connection] = []
        self.start()

    def start(self) -> None:
        self.began_s = time.monotonic()
        inbox, self.outbox = one_way()
        self._outboxes.append(self.outbox)
        self.child = self._crew.start(reader, inbox, *self._where, self.shared)
        inbox.close()

    async def kill(self, wanted: int, pause_s: float) -> int:
        """Kill it as soon as it is at one of these steps; return the step."""
        give_up_s = time.monotonic() + 5
        while self.shared[STATE] != wanted and time.monotonic() < give_up_s:  # noqa: ASYNC110 - the state is the event
            await asyncio.sleep(0)  # no `until`: a get lasts less than its millisecond
        await asyncio.sleep(pause_s)
        await self.child.murder()
        at, self.shared[STATE] = self.shared[STATE], IDLE
        return int(at)


async def orphan(
    pipe: Pipe, inbox: Connection, endpoint: str, device: str, name: str, shared: Any
) -> None:
    """Read until the owner is lost; say so; release the kept borrow when told."""
    patterns = Patterns(device, MOST_BYTES)
    async with featcache.connect(endpoint, device=device, name=name) as client:
        shared[ATTACHED] += 1
        reading = Reading(client, patterns, shared)
        waited = False
        try:
            await reading.follow(inbox)
        except featcache.OwnerLost:
            waited = True  # raised by a read that was under way
        except (EOFError, ConnectionError):
            pass  # of the pipe that the refs come by
        lost_s, text = await reading.loss()
        patterns.check(reading.kept_number, reading.view)
        pipe.say("lost", lost_s, text, waited, patterns.wrong_bytes())
        await pipe.hear()
        patterns.check(reading.kept_number, reading.view)
        wrong_bytes = patterns.wrong_bytes()  # which waits for the whole device: no stream hangs
        await reading.kept.__aexit__(None, None, None)
    pipe.say("let go", wrong_bytes)
    await pipe.hear()


async def owner(
    pipe: Pipe, outboxes: list[Connection], device: str, backend: str, names: list[str]
) -> None:
    """Put without end; on "stall", put one more whose bytes will not come for seconds."""
    patterns = Patterns(device, MOST_BYTES)
    settings = proofs.settings(backend, slots=64)
    async with featcache.create(
        device=device, capacity=CAPACITY_BYTES, initial=CAPACITY_BYTES, settings=settings
    ) as cache:
        pipe.say("endpoint", cache.endpoint, cache.statistics().committed_bytes)
        await pipe.hear()
        pump = asyncio.create_task(_pump(cache, outboxes, patterns, names))
        stalling = asyncio.create_task(pipe.hear())
        await asyncio.wait([pump, stalling], return_when=asyncio.FIRST_COMPLETED)
        if pump.done():
            pump.result()
        pump.cancel()
        await asyncio.wait([pump])
        patterns.drowse(STALL_MS)
        await _put(cache, Post(), outboxes, patterns, names, (1 << 40, MOST_BYTES, PLAIN))
        pipe.say("stalled")
        await asyncio.Event().wait()


async def _pump(
    cache: featcache.FeatureCache,
    outboxes: list[Connection],
    patterns: Patterns,
    names: list[str],
) -> None:
    post, random_ = Post(), random.Random(7)
    await _put(cache, post, outboxes, patterns, names, (1, MOST_BYTES, KEEP))
    number = 1
    while True:
        number += 1
        nbytes = log_uniform(random_, LEAST_BYTES, MOST_BYTES)
        await _put(cache, post, outboxes, patterns, names, (number, nbytes, PLAIN))


async def _put(
    cache: featcache.FeatureCache,
    post: Post,
    outboxes: list[Connection],
    patterns: Patterns,
    names: list[str],
    what: tuple[int, int, int],
) -> None:
    number, nbytes, kind = what
    ref = await cache.put(patterns.fill(number, nbytes), readers=names, timeout=60)
    post.send(HEAD.pack(number, kind) + ref.to_bytes(), outboxes)
