"""The processes of keyed_speed.py: an owner that serves a pool and an echo, and their clients.

Owner and clients are asyncio programs, as model servers are (uvloop, where it is installed). The parent
tells them what to do through pipes (crew.py), one thing at a time.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import signal
import statistics
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter, perf_counter_ns, process_time
from typing import Any, Protocol

import anyio
import anyio.abc
import torch

import featcache
from bench import crew
from bench.cuda_wire import synchronize
from bench.harness import run_loop
from bench.keyed_redis import BareRedis, RedisPy
from bench.quiet import pin
from featcache.control.channel import Channel

ECHO, COPY, ECHO_AND_COPY = "echo", "copy", "echo, then copy"
GET, GET_OUT, BORROW = "featcache-get", "featcache-get-out", "featcache-borrow"
BARE_REDIS, REDIS_PY = "redis, bare client", "redis-py"
REDIS_PY_SINGLY = "redis-py, one in flight"
CHECK_EVERY = 256
"""Of the pipelined hits, how many have one whose first and last bytes are looked at."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Known to all processes of one run."""

    device: str
    sizes: tuple[int, ...]
    keys: int
    """features of each size; every system goes through them in turn"""
    clients: int
    flight: int
    """gets that a client has in flight, pipelined"""
    asked: int
    """bytes of a lookup on the wire"""
    answered: int
    """and of its answer"""
    echo_path: str
    redis_path: str | None
    loop: str = "uvloop"

    @property
    def resident_bytes(self) -> int:
        return self.keys * sum(self.sizes)

    @property
    def capacity(self) -> int:
        """Room for the kept features, and for puts beside them."""
        return 2 * self.resident_bytes + 64 * max(self.sizes)


def key_of(size: int, number: int) -> str:
    """As long as the hash of an image's content."""
    return hashlib.blake2b(f"{size}:{number}".encode(), digest_size=16).hexdigest()


def feature_of(size: int, number: int) -> torch.Tensor:
    """The bytes under a key: the same in every process."""
    generator = torch.Generator().manual_seed(size * 1009 + number)
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)


async def wire_bytes(key: str) -> tuple[int, int]:
    """Return the bytes of a lookup of a key by message and of its answer, as they go over the socket."""
    sent: list[int] = []
    send = Channel.send
    header_bytes = 8

    def counted(channel: Channel, payload: bytes, *rest: Any) -> None:
        sent.append(header_bytes + len(payload))
        send(channel, payload, *rest)

    async with (
        featcache.create(capacity="1MiB") as owner,
        featcache.connect(owner.endpoint) as client,
    ):
        await owner.put(torch.zeros(4096, dtype=torch.uint8), key=key)
        Channel.send = counted  # type: ignore[method-assign,assignment]
        try:
            hits = client._opened().keys.hits
            assert hits is not None, "it is attached"
            hits.forget()  # so that it asks
            await client.get(key)
        finally:
            Channel.send = send  # type: ignore[method-assign]
    if len(sent) != 2:
        raise RuntimeError(f"a lookup sent {len(sent)} messages, not a question and its answer")
    return sent[0], sent[1]


class Hand(crew.Child):
    """A child of a crew in whose loop model servers would run."""

    def __init__(
        self,
        script: Callable[..., Awaitable[None]],
        plan: Plan,
        *arguments: Any,
        cpu: int | None = None,
    ) -> None:
        self._connection, far = crew._CONTEXT.Pipe()
        self._process = crew._CONTEXT.Process(
            target=_child, args=(far, script, plan, arguments, cpu), daemon=True
        )
        self._process.start()
        far.close()
        assert self._process.pid is not None, "started"
        self.pid = self._process.pid


def _child(
    connection: Connection, script: Any, plan: Plan, arguments: tuple[Any, ...], cpu: int | None
) -> None:
    ctypes.CDLL(None).prctl(crew._PR_SET_PDEATHSIG, signal.SIGKILL)
    crew.quiet()
    torch.set_num_threads(1)
    pin(cpu)
    pipe = crew.Pipe(connection)
    try:
        main = script(pipe, plan, *arguments)
        if plan.loop == "uvloop":
            run_loop(main)
        else:
            asyncio.run(main)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent is told
        with suppress(OSError):
            pipe.say("failed", traceback.format_exc())
        raise SystemExit(1) from None


def commit(versions: dict[str, str | None]) -> dict[str, str | None]:
    """The commit that FEATCACHE_BENCH_COMMIT says, if it says one, in the place of the tree's own."""
    return versions | {"commit": os.environ.get("FEATCACHE_BENCH_COMMIT") or versions["commit"]}


def middle_us(times_ns: list[int]) -> float:
    return statistics.median(times_ns) / 1e3


# --- the owner ------------------------------------------------------------------------------------


async def answer_echo(stream: anyio.abc.SocketStream, plan: Plan) -> None:
    """As many bytes as a lookup's answer has, for each that come as many as a lookup has."""
    answer = bytes(plan.answered)
    left = 0
    async with stream:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                whole, left = divmod(left + len(await stream.receive()), plan.asked)
                if whole:
                    await stream.send(answer * whole)


async def owner(pipe: crew.Pipe, plan: Plan) -> None:
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(
            featcache.create(
                device=plan.device, capacity=plan.capacity, initial=plan.capacity, name="bench"
            )
        )
        sources = {}
        for size in plan.sizes:
            for n in range(plan.keys):
                await cache.put(feature_of(size, n).to(plan.device), key=key_of(size, n))
            sources[size] = feature_of(size, 0).to(plan.device)
        listener = await anyio.create_unix_listener(plan.echo_path)
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        group.start_soon(listener.serve, lambda stream: answer_echo(stream, plan))
        pipe.say("ready", str(cache.endpoint))
        while (message := await pipe.hear())[0] != "end":
            if message[0] == "puts":
                pipe.say("puts", await time_puts(cache, sources[message[1]], message[2]))
            else:
                pipe.say("cpu", process_time())


async def time_puts(
    cache: featcache.FeatureCache | featcache.FeatureClient, source: torch.Tensor, count: int
) -> float:
    """The middle time of a put, each released before the next."""
    times_ns = []
    for _ in range(count):
        began_ns = perf_counter_ns()
        ref = await cache.put(source)
        times_ns.append(perf_counter_ns() - began_ns)
        await cache.release(ref)
    synchronize(source.device)
    return middle_us(times_ns)


# --- a client -------------------------------------------------------------------------------------


class System(Protocol):
    """A client's requests, one at a time (`once`) or many at once (`many`)."""

    async def once(self, size: int, number: int) -> torch.Tensor | None:
        """Return the result; None if there is nothing to look at."""

    async def many(self, size: int, seconds: float) -> tuple[int, float]:
        """Return how many there were, in how many seconds."""


class Echo:
    def __init__(self, stream: anyio.abc.SocketStream, plan: Plan) -> None:
        self.stream = stream
        self.plan = plan
        self.request = bytes(plan.asked)

    async def ask(self, count: int) -> None:
        stream, left = self.stream, count * self.plan.answered
        await stream.send(self.request * count)
        while left:
            left -= len(await stream.receive())

    async def once(self, size: int, number: int) -> torch.Tensor | None:
        await self.ask(1)
        return None

    async def many(self, size: int, seconds: float) -> tuple[int, float]:
        """All that are in flight go with one call, and come as they come: no client does less."""
        count, began = 0, perf_counter()
        while perf_counter() < began + seconds:
            await self.ask(self.plan.flight)
            count += self.plan.flight
        return count, perf_counter() - began


class Copy:
    """From pages of the slab, which are warm and stay held, into memory that is warm too."""

    def __init__(self, views: dict[tuple[int, int], torch.Tensor], plan: Plan) -> None:
        self.views = views
        self.plan = plan
        self.outs = {size: torch.zeros_like(views[size, 0]) for size in plan.sizes}
        self.on_host = plan.device == "cpu"

    async def once(self, size: int, number: int) -> torch.Tensor | None:
        out, view = self.outs[size], self.views[size, number]
        if self.on_host:
            ctypes.memmove(out.data_ptr(), view.data_ptr(), size)
        else:
            out.copy_(view)
        return out

    async def many(self, size: int, seconds: float) -> tuple[int, float]:
        return await one_by_one(self, size, seconds, self.plan)


class EchoAndCopy:
    """One after the other, so that each finds the caches as the other leaves them."""

    def __init__(self, echo: Echo, copy: Copy) -> None:
        self.echo = echo
        self.copy = copy

    async def once(self, size: int, number: int) -> torch.Tensor | None:
        await self.echo.ask(1)
        return await self.copy.once(size, number)

    async def many(self, size: int, seconds: float) -> tuple[int, float]:
        return await one_by_one(self, size, seconds, self.echo.plan)


class OneByOne:
    """Another system, with one in flight however many may be."""

    def __init__(self, system: System, plan: Plan) -> None:
        self.system = system
        self.plan = plan

    async def once(self, size: int, number: int) -> torch.Tensor | None:
        return await self.system.once(size, number)

    async def many(self, size: int, seconds: float) -> tuple[int, float]:
        return await one_by_one(self.system, size, seconds, self.plan)


async def one_by_one(system: System, size: int, seconds: float, plan: Plan) -> tuple[int, float]:
    count, began = 0, perf_counter()
    while perf_counter() < began + seconds:
        await system.once(size, count % plan.keys)
        count += 1
    synchronize(torch.device(plan.device))
    return count, perf_counter() - began


class Cached:
    """featcache: `get`, `get` into a tensor that there is already, or `borrow`."""

    def __init__(self, cache: featcache.FeatureClient, plan: Plan, how: str) -> None:
        self.cache = cache
        self.plan = plan
        self.how = how
        self.outs = {
            size: torch.zeros(size, dtype=torch.uint8, device=plan.device) for size in plan.sizes
        }
        self.keys = {
            size: [key_of(size, number) for number in range(plan.keys)] for size in plan.sizes
        }
        self.ends = {
            (size, number): feature_of(size, number)[[0, -1]]
            for size in plan.sizes
            for number in range(plan.keys)
        }

    async def once(self, size: int, number: int) -> torch.Tensor | None:
        key = self.keys[size][number]
        if self.how == "get":
            return _bare(await self.cache.get(key))
        if self.how == "out":
            return _bare(await self.cache.get(key, out=self.outs[size]))
        async with self.cache.borrow(key):
            return None

    async def many(self, size: int, seconds: float) -> tuple[int, float]:
        """As many tasks as may be in flight, each with one get at a time."""
        began = perf_counter()
        tasks = [self._stream(size, at, began + seconds) for at in range(self.plan.flight)]
        counts = await asyncio.gather(*tasks)
        synchronize(torch.device(self.plan.device))
        return sum(counts), perf_counter() - began

    async def _stream(self, size: int, first: int, end_s: float) -> int:
        cache, keys, count = self.cache, self.keys[size], 0
        out = torch.empty_like(self.outs[size]) if self.how == "out" else None
        while perf_counter() < end_s:
            number = (first + count) % len(keys)
            if self.how == "borrow":
                async with cache.borrow(keys[number]) as view:
                    if count % CHECK_EVERY == 0:
                        _check_ends(_bare(view), self.ends[size, number])
            else:
                x = await cache.get(keys[number], out=out)
                if count % CHECK_EVERY == 0:
                    _check_ends(_bare(x), self.ends[size, number])
            count += 1
        return count


def _bare(feature: Any) -> torch.Tensor:
    assert isinstance(feature, torch.Tensor), "one tensor was put"
    return feature


def _check_ends(found: torch.Tensor, ends: torch.Tensor) -> None:
    if not torch.equal(found[[0, -1]].cpu(), ends):
        raise RuntimeError("a get by key brought other bytes than were put")


async def client(pipe: crew.Pipe, plan: Plan, index: int, endpoint: str) -> None:
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(
            featcache.connect(endpoint, device=plan.device, name=f"c{index}")
        )
        stream = await stack.enter_async_context(await anyio.connect_unix(plan.echo_path))
        views = {}
        for size in plan.sizes:
            for n in range(plan.keys):
                lent = await stack.enter_async_context(cache.borrow(key_of(size, n)))
                views[size, n] = _bare(lent)
        echo, copy = Echo(stream, plan), Copy(views, plan)
        systems: dict[str, System] = {
            ECHO: echo,
            COPY: copy,
            ECHO_AND_COPY: EchoAndCopy(echo, copy),
            GET: Cached(cache, plan, "get"),
            GET_OUT: Cached(cache, plan, "out"),
            BORROW: Cached(cache, plan, "borrow"),
        }
        if plan.redis_path is not None:
            keys = [(size, n, key_of(size, n)) for size in plan.sizes for n in range(plan.keys)]
            bare = stack.enter_context(BareRedis(plan.redis_path, keys, plan.flight))
            systems[BARE_REDIS] = bare
            if RedisPy.exists():
                redis = await stack.enter_async_context(RedisPy(plan.redis_path, keys, plan.flight))
                systems[REDIS_PY] = redis
                systems[REDIS_PY_SINGLY] = OneByOne(redis, plan)
        sources = {size: feature_of(size, 0).to(plan.device) for size in plan.sizes}
        await verify(systems, plan)
        pipe.say("ready", list(systems))
        while (message := await pipe.hear())[0] != "end":
            word, size, *rest = message
            if word == "alone":
                pipe.say(word, await alone(systems, plan, size, *rest))
            elif word == "pipe":
                name, seconds = rest
                cpu_s = process_time()
                hits, took_s = await systems[name].many(size, seconds)
                pipe.say(word, hits, took_s, process_time() - cpu_s)
            elif word == "puts":
                pipe.say(word, await time_puts(cache, sources[size], rest[0]))


async def verify(systems: dict[str, System], plan: Plan) -> None:
    """Every byte of every feature, from every system that brings any; and everything is warm then."""
    for size in plan.sizes:
        for number in range(plan.keys):
            wanted = feature_of(size, number)
            for name, system in systems.items():
                found = await system.once(size, number)
                if found is not None and not torch.equal(found.cpu(), wanted):
                    raise RuntimeError(f"{name}: feature {number} of {size} B has other bytes")


async def alone(
    systems: dict[str, System], plan: Plan, size: int, names: list[str], count: int
) -> dict[str, tuple[float, float]]:
    """For each system the middle times, one at a time: until the call returns, until it is done."""
    found = {}
    device = torch.device(plan.device)
    for name in names:
        once, keys = systems[name].once, plan.keys
        returned_ns, done_ns = [], []
        for at in range(count):
            began_ns = perf_counter_ns()
            await once(size, at % keys)
            if plan.device == "cpu":
                returned_ns.append(perf_counter_ns() - began_ns)
                continue
            returned_ns.append(perf_counter_ns() - began_ns)
            synchronize(device)
            done_ns.append(perf_counter_ns() - began_ns)
        found[name] = (middle_us(returned_ns), middle_us(done_ns or returned_ns))
    return found
