"""The processes of keyed_hits.py: an owner with an echo beside it, and clients that time their calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from time import perf_counter, perf_counter_ns, process_time

import torch

import featcache
from bench import crew
from bench.cuda_wire import synchronize
from bench.keyed_fleet import Cached, Copy, Hand, Plan, System, feature_of, key_of
from bench.keyed_redis import BareRedis

__all__ = ["Plan", "start"]

CONTAINS, CONTAINS_NOWAIT = "contains(key)", "contains_nowait(key)"
GET, BORROW, GET_OUT = "get(key)", "borrow(key)", "get(key, out=)"
GET_NOWAIT, BORROW_NOWAIT = "get_nowait(key)", "with borrow(key)"
GET_REF, BORROW_REF = "get(ref)", "borrow(ref)"
GET_REF_NOWAIT, BORROW_REF_NOWAIT = "get_nowait(ref)", "with borrow(ref)"
MISS, ECHO, COPY, DICT, BARE_REDIS = "a miss", "echo", "copy", "dict and clone", "Redis"
ALL = (GET_REF, BORROW_REF, GET_REF_NOWAIT, BORROW_REF_NOWAIT)
"""The calls that take refs, each of which a session reads once."""
Refs = list[featcache.FeatureRef]


def start(plan: Plan, children: crew.Crew) -> tuple[Hand, list[Hand]]:
    """Start an owner and its clients."""
    owner = Hand(serve, plan)
    clients = [Hand(client, plan, index) for index in range(plan.clients)]
    children._children += [owner, *clients]
    return owner, clients


async def answer_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            writer.write(await reader.readexactly(64))
    writer.close()


async def serve(pipe: crew.Pipe, plan: Plan) -> None:
    """The owner."""
    refs_bytes = len(ALL) * plan.keys * max(plan.sizes)
    capacity = 2 * (plan.resident_bytes + refs_bytes)
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(
            featcache.create(device=plan.device, capacity=capacity, initial=capacity)
        )
        sources = {
            size: [feature_of(size, n).to(plan.device) for n in range(plan.keys)]
            for size in plan.sizes
        }
        for size, features in sources.items():
            for n, feature in enumerate(features):
                await cache.put(feature, key=key_of(size, n))
        echo = await asyncio.start_unix_server(answer_echo, plan.echo_path)
        stack.callback(echo.close)
        pipe.say("ready", str(cache.endpoint))
        while (message := await pipe.hear())[0] != "end":
            if message[0] == "refs":
                _, size, count = message
                refs = [await cache.put(sources[size][n]) for n in range(count)]
                synchronize(torch.device(plan.device))
                pipe.say("refs", [ref.to_bytes() for ref in refs])
            else:
                pipe.say("cpu", process_time())


async def client(pipe: crew.Pipe, plan: Plan, index: int) -> None:
    """A client: the calls alone, and pipelined."""
    _, endpoint = await pipe.hear()
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(
            featcache.connect(endpoint, device=plan.device, name=f"c{index}")
        )
        echo = await asyncio.open_unix_connection(plan.echo_path)
        stack.callback(echo[1].close)
        views = {}
        for size in plan.sizes:
            for n in range(plan.keys):
                lent = await stack.enter_async_context(cache.borrow(key_of(size, n)))
                assert isinstance(lent, torch.Tensor), "one tensor was put"
                if not torch.equal(lent.cpu(), feature_of(size, n)):
                    raise RuntimeError("a borrow by key brought other bytes than were put")
                views[size, n] = lent
        systems: dict[str, System] = {
            GET: Cached(cache, plan, "get"),
            BORROW: Cached(cache, plan, "borrow"),
            COPY: Copy(views, plan),
        }
        if plan.redis_path is not None:
            keys = [(size, n, key_of(size, n)) for size in plan.sizes for n in range(plan.keys)]
            bare = stack.enter_context(BareRedis(plan.redis_path, keys, plan.flight))
            systems[BARE_REDIS] = bare
        calls = Calls(cache, plan, systems, echo, views)
        pipe.say("connect", [*calls.by_name])
        while (message := await pipe.hear())[0] != "end":
            word, size, *rest = message
            if word == "refs":
                calls.refs.append([featcache.FeatureRef.from_bytes(data) for data in rest[0]])
            elif word == "alone":
                pipe.say(word, await calls.alone(size, *rest))
            elif word == "pipe":
                count, took_s = await systems[rest[0]].many(size, rest[1])
                pipe.say(word, count / took_s)
            else:
                began = perf_counter()
                keys_of = [key_of(size, n) for n in range(plan.keys)]
                for n in range(rest[0]):
                    await cache.get(keys_of[n % plan.keys])
                pipe.say(word, perf_counter() - began)


Batch = Callable[[int, list[str], Refs], Awaitable[None]]


class Calls:
    """A batch of each call: every key, or every ref, once."""

    def __init__(
        self,
        cache: featcache.FeatureClient,
        plan: Plan,
        systems: dict[str, System],
        echo: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        views: dict[tuple[int, int], torch.Tensor],
    ) -> None:
        self.cache, self.plan, self.echo = cache, plan, echo
        self.copy, self.redis = systems[COPY], systems.get(BARE_REDIS)
        self.outs = {size: torch.empty_like(views[size, 0]) for size in plan.sizes}
        self.dict = {key_of(*at): view.clone() for at, view in views.items()}
        self.keys = {size: [key_of(size, n) for n in range(plan.keys)] for size in plan.sizes}
        self.refs: list[Refs] = []
        """Yet to be read: a batch for each of the calls that take refs."""
        self.by_name: dict[str, Batch] = {
            CONTAINS: self.contains,
            CONTAINS_NOWAIT: self.contains_nowait,
            GET: self.get,
            GET_REF: self.get_ref,
            GET_OUT: self.get_out,
            GET_NOWAIT: self.get_nowait,
            GET_REF_NOWAIT: self.get_ref_nowait,
            BORROW: self.borrow,
            BORROW_REF: self.borrow_ref,
            BORROW_NOWAIT: self.borrow_nowait,
            BORROW_REF_NOWAIT: self.borrow_ref_nowait,
            MISS: self.miss,
            DICT: self.clone,
            COPY: self.bare_copy,
            ECHO: self.ask,
        }
        if self.redis is not None:
            self.by_name[BARE_REDIS] = self.redis_get

    async def alone(self, size: int, names: list[str]) -> dict[str, float]:
        """Microseconds of each call."""
        keys, found, device = self.keys[size], {}, torch.device(self.plan.device)
        for name in names:
            batch, taken = self.by_name[name], self.refs.pop() if name in ALL else []
            began_ns = perf_counter_ns()
            await batch(size, keys, taken)
            found[name] = (perf_counter_ns() - began_ns) / len(keys) / 1e3
            synchronize(device)
        return found

    async def contains(self, _: int, keys: list[str], __: Refs) -> None:
        contains = self.cache.contains
        for key in keys:
            await contains(key)

    async def contains_nowait(self, _: int, keys: list[str], __: Refs) -> None:
        contains = self.cache.contains_nowait
        for key in keys:
            contains(key)

    async def get(self, _: int, keys: list[str], __: Refs) -> None:
        get = self.cache.get
        for key in keys:
            await get(key)

    async def get_ref(self, _: int, __: list[str], refs: Refs) -> None:
        get = self.cache.get
        for ref in refs:
            await get(ref)

    async def get_out(self, size: int, keys: list[str], _: Refs) -> None:
        get, out = self.cache.get, self.outs[size]
        for key in keys:
            await get(key, out=out)

    async def get_nowait(self, _: int, keys: list[str], __: Refs) -> None:
        get = self.cache.get_nowait
        for key in keys:
            get(key)

    async def get_ref_nowait(self, _: int, __: list[str], refs: Refs) -> None:
        get = self.cache.get_nowait
        for ref in refs:
            get(ref)

    async def borrow(self, _: int, keys: list[str], __: Refs) -> None:
        borrow = self.cache.borrow
        for key in keys:
            async with borrow(key):
                pass

    async def borrow_ref(self, _: int, __: list[str], refs: Refs) -> None:
        borrow = self.cache.borrow
        for ref in refs:
            async with borrow(ref):
                pass

    async def borrow_nowait(self, _: int, keys: list[str], __: Refs) -> None:
        borrow = self.cache.borrow
        for key in keys:
            with borrow(key):
                pass

    async def borrow_ref_nowait(self, _: int, __: list[str], refs: Refs) -> None:
        borrow = self.cache.borrow
        for ref in refs:
            with borrow(ref):
                pass

    async def miss(self, _: int, keys: list[str], __: Refs) -> None:
        get = self.cache.get
        for _key in keys:
            with suppress(featcache.KeyNotFound):
                await get("kept nowhere")

    async def clone(self, _: int, keys: list[str], __: Refs) -> None:
        kept = self.dict
        for key in keys:
            kept[key].clone()

    async def bare_copy(self, size: int, keys: list[str], _: Refs) -> None:
        once = self.copy.once
        for n in range(len(keys)):
            await once(size, n)

    async def ask(self, _: int, keys: list[str], __: Refs) -> None:
        reader, writer = self.echo
        for _key in keys:
            writer.write(bytes(64))
            await reader.readexactly(64)

    async def redis_get(self, size: int, keys: list[str], _: Refs) -> None:
        assert self.redis is not None, "it is measured"
        once = self.redis.once
        for n in range(len(keys)):
            await once(size, n)
