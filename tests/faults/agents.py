"""What the children do: a reader and an owner that follow commands and stop at named steps."""

import asyncio
import contextlib
import ctypes
import functools
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec
import numpy as np
import torch

import featcache
from featcache import FeatureRef
from featcache.api.cache import FeatureCache
from featcache.control.channel import Channel
from featcache.control.link import Link
from featcache.control.pending import PendingRequests
from featcache.control.server import Server
from featcache.memory.cuda.mapping import CudaMapping
from featcache.memory.cuda.slab import CudaSlab
from featcache.memory.cuda.streams import DeviceStreams
from featcache.memory.host import slab as host_module
from featcache.memory.host.slab import HostMapping, HostSlab
from featcache.memory.words import OwnerWords
from featcache.owner.requests import RequestHandlers
from featcache.pool.pool import Pool
from featcache.session import attachment as attachment_module
from featcache.session.attachment import Attachment
from featcache.session.lease import KeyLease
from featcache.settings import Settings
from support.processes import Pipe

BEFORE: Final = "before"
AFTER: Final = "after"

READER_STEPS: Final[dict[str, tuple[Any, str, str]]] = {
    "connected": (Link, "greet", BEFORE),  # nothing was said to the owner yet
    "hello": (Channel, "send", AFTER),  # hello is said, no answer was read
    "welcomed": (HostMapping, "attach", BEFORE),  # admitted, nothing mapped (runs in a thread)
    "holding": (
        attachment_module,
        "fence_after_lock",
        BEFORE,
    ),  # `held` is written, `live` not looked at
    "held": (HostMapping, "read", BEFORE),  # before it touches a byte
    "copied": (HostMapping, "read", AFTER),  # has the bytes
    "ending": (Attachment, "unpin", BEFORE),  # before the release
    "paying": (HostMapping, "signal", BEFORE),  # in the release, before its word
    "paid": (HostMapping, "signal", AFTER),  # the word is written, nobody was told
}
OWNER_STEPS: Final[dict[str, tuple[Any, str, str]]] = {
    "greeting": (Server, "_greet", BEFORE),  # hello has come, no welcome was sent
    "discarding": (RequestHandlers, "_discard", BEFORE),  # asked, and never answers
    "finding": (RequestHandlers, "_find", BEFORE),  # the same of a key
    "of key": (RequestHandlers, "_command", BEFORE),  # asked to pin it, evict it and so on
    "reserving": (RequestHandlers, "_reserve", BEFORE),  # the same of room
    "admitting": (
        RequestHandlers,
        "_publish",
        BEFORE,
    ),  # a client has written; nobody may read it yet
    "reserved": (HostSlab, "write", BEFORE),  # room is given, no bytes are there
    "written": (HostSlab, "write", AFTER),  # the bytes are there, nobody knows
    "publishing": (OwnerWords, "make_live", BEFORE),  # `published` is written, `live` is not
    "published": (Pool, "announce", AFTER),  # readers may read, nobody has the ref
}


# Those at which a client stops once it was told to `arm` them; besides them "sent …", of a message.
KEY_STEPS: Final[dict[str, tuple[Any, str, str]]] = {
    "answered": (PendingRequests, "deliver", BEFORE),  # it was given, and lies in its socket
    "taken": (Attachment, "take_grant", AFTER),  # it counts the grant as its own
    "found": (Attachment, "begin_lease", BEFORE),  # it knows the slot, and nobody knows of that
    "leased": (Attachment, "begin_lease", AFTER),  # its entry says so, and the slot was live
    "copying": (HostMapping, "fetch", BEFORE),  # before it touches a byte
    "copied": (HostMapping, "fetch", AFTER),  # has the bytes
    "ending": (Attachment, "end_lease", BEFORE),  # before it ends its entry's read
    "ended": (Attachment, "end_lease", AFTER),  # its word says so, nobody was told
    "leaving": (KeyLease, "unpin", BEFORE),  # the block of its borrow
    "giving back": (Attachment, "pay_grant", BEFORE),  # before it pays a grant
    "paying": (HostMapping, "signal", BEFORE),  # in it, before its word
    "paid": (HostMapping, "signal", AFTER),  # the word is written, nobody was told
    "reserved": (HostMapping, "write", BEFORE),  # a slot is its own, no bytes are there
    "halfway": (host_module, "_memmove", AFTER),  # one of two tensors is there
    "filled": (HostMapping, "write", AFTER),  # both are
    "told": (Attachment, "tell_written", AFTER),  # its word says so, nobody asked to publish it
}
KEY_STEPS_ON_GPU: Final[dict[str, tuple[Any, str, str]]] = {
    "halfway": (DeviceStreams, "copy", AFTER),
    "paid": (DeviceStreams, "write_word", AFTER),  # enqueued, and soon done
}

ON_GPU: Final[dict[Any, Any]] = {HostMapping: CudaMapping, HostSlab: CudaSlab}


def stop_at(pipe: Pipe, step: tuple[Any, str, str], name: str, kind: str = "host") -> None:
    """Make this process stand still at a step, each time that it comes there with a slab of a kind."""
    target, attribute, when = step
    if kind != "host":
        target = ON_GPU.get(target, target)
    original = getattr(target, attribute)

    def stopping(*arguments: Any, **names: Any) -> Any:
        if when == BEFORE:
            pipe.stand(name)
        result = original(*arguments, **names)
        if when == AFTER:
            pipe.stand(name)
        return result

    bound = isinstance(vars(target).get(attribute), classmethod)
    setattr(target, attribute, staticmethod(stopping) if bound else stopping)


def stop_sent(pipe: Pipe, tag: str) -> None:
    """Make this process stand still each time that it has sent such a message."""
    send = Channel.send

    def sending(channel: Channel, payload: bytes, descriptors: Any = ()) -> None:
        send(channel, payload, descriptors)
        if msgspec.msgpack.decode(payload)["type"] == tag:
            pipe.stand(f"sent {tag}")

    setattr(Channel, "send", sending)  # noqa: B010 - not what the type says


def feature(seed: int, nbytes: int) -> torch.Tensor:
    """Bytes that tell by themselves which feature they are of, at every place."""
    places = np.arange(nbytes)  # numpy: torch would use threads, which a busy machine is slow at
    return torch.from_numpy(((places * 7 + places // 256 + seed * 13) % 251).astype(np.uint8))


def is_right(found: Any, seed: int) -> bool:
    """Whether these are the bytes of the feature `seed`, all of them."""
    return found.numel() > 0 and bool(torch.equal(found.cpu(), feature(seed, found.numel())))


def kinds_of_descriptors() -> list[str]:
    """What the descriptors of this process lead to that only a cache or a client would have."""
    marks = ("memfd:featcache", "eventfd", "pidfd")
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # that of this listing
            continue
        if any(mark in target for mark in marks):
            found.append(target)
    return found


def mappings() -> list[str]:
    """The mappings that this process has of featcache's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if "memfd:featcache" in line]


class Agent:
    """Does what it is told: each command is a method, its answer the next message."""

    cache: Any

    def __init__(self, pipe: Pipe, leash: Connection | None) -> None:
        self.pipe = pipe
        self.leash = leash  # what forks of this process hang on, so that none outlives the test
        self._borrows: list[tuple[Any, torch.Tensor]] = []

    async def follow(self) -> None:
        while True:
            command, *arguments = await self.pipe.hear()
            if command == "end":
                return
            try:
                answer = await getattr(self, command)(*arguments)
            except featcache.FeatcacheError as error:
                answer = ("raised", type(error).__name__)
            self.pipe.say(*answer)

    async def get(self, data: bytes, seed: int) -> tuple[Any, ...]:
        found = await self.cache.get(FeatureRef.from_bytes(data))
        return ("right" if is_right(found, seed) else "wrong",)

    async def release(self, data: bytes) -> tuple[Any, ...]:
        await self.cache.release(FeatureRef.from_bytes(data))
        return ("released",)

    async def borrow(self, data: bytes, seed: int) -> tuple[Any, ...]:
        borrow = self.cache.borrow(FeatureRef.from_bytes(data))
        self._borrows.append((borrow, await borrow.__aenter__()))
        return self._look(seed)

    async def look(self, seed: int) -> tuple[Any, ...]:
        return self._look(seed)

    def _look(self, seed: int) -> tuple[Any, ...]:
        return ("right" if is_right(self._borrows[-1][1], seed) else "wrong",)

    async def read_slowly(self, seconds: float) -> tuple[Any, ...]:
        """Have the GPU read a borrowed view for so long; the CPU goes on at once."""
        torch.cuda._sleep(int(seconds * 2e9))  # type: ignore[no-untyped-call]
        self.kept = self._borrows[-1][1].clone()
        return ("reading",)

    async def leave(self) -> tuple[Any, ...]:
        borrow, _ = self._borrows.pop()
        await borrow.__aexit__(None, None, None)
        return ("left",)

    async def close(self) -> tuple[Any, ...]:
        await self.cache.aclose()
        return ("closed",)

    async def exit(self) -> tuple[Any, ...]:
        os._exit(0)  # no goodbye, and no signal either

    async def statistics(self) -> tuple[Any, ...]:
        return ("statistics", self.cache.statistics().gets)

    # --- forks ----------------------------------------------------------------------------------

    async def fork(self, data: bytes) -> tuple[Any, ...]:
        """Fork; answer with the child's pid after the child has told what it can do."""
        pid = os.fork()
        if pid == 0:
            try:
                self.pipe.say("forked", os.getpid(), *self._forked(FeatureRef.from_bytes(data)))
                self._hang()
            finally:
                os._exit(1)
        return ("parent", pid)

    def _forked(self, ref: FeatureRef) -> tuple[Any, ...]:
        """In the child: what each first use raises, and what is left of the parent's cache."""
        cache = self.cache
        uses: dict[str, Callable[[], Any]] = {
            "get": lambda: _step(cache.get(ref)),
            "get_nowait": lambda: cache.get_nowait(ref),
            "borrow": lambda: cache.borrow(ref),
            "release": lambda: _step(cache.release(ref)),
            "discard": lambda: _step(cache.discard(ref)),
            "statistics": cache.statistics,
        }
        if isinstance(cache, FeatureCache):
            uses["put"] = lambda: _step(cache.put(torch.zeros(1)))
            uses["put_nowait"] = lambda: cache.put_nowait(torch.zeros(1))
            uses["endpoint"] = lambda: cache.endpoint
            uses["level"] = lambda: cache.pressure.level
        keyed: dict[str, Callable[[], Any]] = {
            "get a key": lambda: cache.get("key"),
            "wait for a key": lambda: cache.get("key", timeout=1.0),
            "evict": lambda: cache.evict("key"),
            "contains": lambda: cache.contains("key"),
            "pin": lambda: cache.pin("key"),
            "unpin": lambda: cache.unpin("key"),
            "put under a key": lambda: cache.put(torch.zeros(1), key="key"),
            "borrow a key": lambda: cache.borrow("key").__aenter__(),
        }
        uses |= {use: functools.partial(_take_step, call) for use, call in keyed.items()}
        uses["get_or_put"] = lambda: _run(cache.get_or_put("key", lambda: torch.zeros(1)))
        raised = {use: _raised(call) for use, call in uses.items()}
        gc.collect()
        return raised, kinds_of_descriptors(), mappings()

    async def fork_and_leave(self) -> tuple[Any, ...]:
        """Fork in a borrow; the child leaves the block, as code that unwinds in it would."""
        borrow, view = self._borrows[-1]
        pid = os.fork()
        if pid == 0:
            try:
                _step(borrow.__aexit__(None, None, None))
                _step(self.cache.aclose())
                gc.collect()
                left = [kind for kind in mappings() if "slab" in kind]
                self.pipe.say("left", os.getpid(), view.numel(), left)
                self._hang()
            finally:
                os._exit(1)
        return ("parent", pid)

    async def fork_raw(self) -> tuple[Any, ...]:
        """Fork with no hook of Python's run: the child keeps every socket of the parent's open."""
        # A thread that asks for the GIL as this one forks asks in the child's copy too, where it is not:
        # the child would hand the GIL over at its next step and wait for ever until somebody takes it.
        # So whoever asks by now is given it, and nobody asks again: a thread that waits only waits.
        sys.setswitchinterval(1000.0)
        time.sleep(0)  # noqa: ASYNC251 - it gives the GIL away
        pid = ctypes.PyDLL(None).fork()  # PyDLL: with the GIL, which the child needs
        if pid == 0:
            self._hang()
        return ("parent", pid)

    def _hang(self) -> None:
        assert self.leash is not None, "forks need a leash"
        try:
            self.leash.recv()
        except (EOFError, OSError):
            pass
        finally:
            os._exit(0)


def _step(coroutine: Any) -> Any:
    """Run a coroutine that does not wait, in a process where no loop may be used."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def _take_step(call: Callable[[], Any]) -> Any:
    return _step(call())


def _run(coroutine: Any) -> Any:
    """Run a coroutine in a loop of this process's own, whose parent's loop it has a copy of."""
    asyncio.events._set_running_loop(None)
    return asyncio.run(coroutine)


def _raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - which one is the answer
        return type(error).__name__
    return "nothing"


class ReaderAgent(Agent):
    """A reader."""

    def _link(self) -> Link:
        return next(iter(self.cache._opened().registry.connections)).link  # type: ignore[no-any-return]

    async def hang_up(self) -> tuple[Any, ...]:
        """Lose the socket, live on."""
        self._link().close()
        return ("hung up",)

    async def garbage(self) -> tuple[Any, ...]:
        """Say what nobody says."""
        self._link()._channel._sock.send(b"GET / HTTP/1.1\r\n\r\n")
        return ("said",)

    async def discard(self, data: bytes) -> tuple[Any, ...]:
        await self.cache.discard(FeatureRef.from_bytes(data))
        return ("discarded",)


async def reader(
    pipe: Pipe,
    endpoint: str | None,
    *,
    name: str | None = None,
    stop: str | None = None,
    leash: Connection | None = None,
    kind: str = "host",
    settings: Settings | None = None,
) -> None:
    """Attach (if there is an endpoint), then follow commands; "end" says goodbye."""
    if stop is not None:
        stop_at(pipe, READER_STEPS[stop], stop, kind)
    agent = ReaderAgent(pipe, leash)
    async with featcache.connect(endpoint, name=name, settings=settings) as agent.cache:
        pipe.say("attached")
        await agent.follow()


async def busy_reader(pipe: Pipe, endpoint: str, *, name: str) -> None:
    """Read what is told, by get and by borrow in turn, and count what was wrong."""
    right = wrong = 0
    async with featcache.connect(endpoint, name=name) as client:
        pipe.say("attached")
        while (message := await pipe.hear())[0] == "ref":
            _, seed, data = message
            ref = FeatureRef.from_bytes(data)
            if seed % 2:
                good = is_right(await client.get(ref), seed)
            else:
                async with client.borrow(ref) as view:
                    good = is_right(view, seed)
            right, wrong = right + good, wrong + (not good)
        pipe.say("read", right, wrong)


class OwnerAgent(Agent):
    """An owner."""

    cache: FeatureCache
    device = "cpu"

    async def put(self, seed: int, nbytes: int, readers: Any) -> tuple[Any, ...]:
        value = feature(seed, nbytes).to(self.device)
        ref = await self.cache.put(value, readers=readers)
        return ("ref", ref.to_bytes())

    async def used(self) -> tuple[Any, ...]:
        return ("used", self.cache.statistics().used_bytes)

    async def load(self, nbytes: int) -> tuple[Any, ...]:
        """Put without end, and tell each ref."""
        seed = 0
        while True:
            ref = await self.cache.put(feature(seed, nbytes).to(self.device), readers=1)
            self.pipe.say("ref", seed, ref.to_bytes())
            seed += 1
            await asyncio.sleep(0)

    async def late_bytes(self) -> tuple[Any, ...]:
        """From now on no bytes ever arrive, as if a stream did not get to them."""
        slab = self.cache._opened().pool.slab
        write = slab.write
        slab.signal = lambda words, index, value, order: None  # type: ignore[method-assign]
        slab.write = (  # type: ignore[method-assign]
            lambda offset_bytes, parts, order, word=None: write(offset_bytes, parts, order)
        )
        return ("late",)


async def owner(
    pipe: Pipe,
    *,
    settings: Settings,
    endpoint: str | None = None,
    stop: str | None = None,
    leash: Connection | None = None,
    device: str = "cpu",
) -> None:
    """Open a pool, then follow commands; "end" closes it."""
    if stop is not None:
        stop_at(pipe, OWNER_STEPS[stop], stop, "host" if device == "cpu" else "gpu")
    agent = OwnerAgent(pipe, leash)
    agent.device = device
    created = featcache.create(device=device, endpoint=endpoint, settings=settings)
    async with created as agent.cache:
        pipe.say("open", agent.cache.endpoint)
        await agent.follow()


# --- keys, and puts of clients -------------------------------------------------------------------


class Trouble(Exception):
    """What a `make` raises that fails."""


class KeyedAgent(Agent):
    """What owners and clients do by key. A command that may wait is begun, and tells its end."""

    device = "cpu"
    kind = "host"

    def __init__(self, pipe: Pipe, leash: Connection | None) -> None:
        super().__init__(pipe, leash)
        self._begun: set[asyncio.Task[None]] = set()
        self._orders: dict[str, asyncio.Future[str]] = {}
        self._go_on = threading.Event()
        self._aside: torch.cuda.Stream | None = None

    async def begin(self, label: str, command: str, *arguments: Any) -> tuple[Any, ...]:
        """Do a command beside others; its answer comes as a message that the label is the first of."""
        task = asyncio.create_task(self._tell_end(label, command, arguments))
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return ("begun",)

    async def _tell_end(self, label: str, command: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer = await getattr(self, command)(*arguments)
        except (featcache.FeatcacheError, Trouble) as error:
            answer = ("raised", type(error).__name__)
        self.pipe.say(label, *answer)

    async def arm(self, step: str) -> tuple[Any, ...]:
        """Stand still at a step from now on."""
        if step.startswith("sent "):
            stop_sent(self.pipe, step.removeprefix("sent "))
        elif self.kind != "host" and step in KEY_STEPS_ON_GPU:
            stop_at(self.pipe, KEY_STEPS_ON_GPU[step], step)
        else:
            stop_at(self.pipe, KEY_STEPS[step], step, self.kind)
        return ("armed",)

    async def by_message(self) -> tuple[Any, ...]:
        """Ask the owner for every key from now on."""
        connection = self.cache._opened().keys._registry.peek_bound()
        connection.hits.forget()
        return ("armed",)

    def _made(self, seed: int, nbytes: int) -> torch.Tensor:
        with torch.cuda.stream(self._aside):  # None is no stream, and does nothing
            return feature(seed, nbytes).to(self.device)

    async def put_key(self, seed: int, nbytes: int, key: str | None) -> tuple[Any, ...]:
        """Put a feature, under a key or owing one read."""
        ref = await self.cache.put(self._made(seed, nbytes), key=key)
        return ("ref", ref.to_bytes())

    async def put_pair(self, seed: int, nbytes: int, key: str | None) -> tuple[Any, ...]:
        """The same of a feature that two copies write."""
        made = self._made(seed, nbytes).chunk(2)
        ref = await self.cache.put({"first": made[0], "second": made[1]}, key=key)
        return ("ref", ref.to_bytes())

    async def get_key(self, key: str, seed: int, timeout: float | None = None) -> tuple[Any, ...]:
        found = await self.cache.get(key, timeout=timeout)
        return ("right" if is_right(found, seed) else "wrong",)

    async def borrow_key(self, key: str, seed: int) -> tuple[Any, ...]:
        borrow = self.cache.borrow(key)
        self._borrows.append((borrow, await borrow.__aenter__()))
        return self._look(seed)

    async def share(self, key: str, readers: int, timeout: float | None = None) -> tuple[Any, ...]:
        return "shared", (await self.cache.share(key, readers=readers, timeout=timeout)).to_bytes()

    async def pin(self, key: str) -> tuple[Any, ...]:
        await self.cache.pin(key)
        return ("pinned",)

    async def contains(self, key: str) -> tuple[Any, ...]:
        return ("contains", await self.cache.contains(key))

    async def get_or_put(self, key: str, seed: int, nbytes: int) -> tuple[Any, ...]:
        """Its `make` tells that it was called, and waits for an `order` what to do."""

        async def make() -> torch.Tensor:
            told = self._orders[key] = asyncio.get_running_loop().create_future()
            self.pipe.say("making", key)
            if await told == "raise":
                raise Trouble(key)
            return self._made(seed, nbytes)

        found = await self.cache.get_or_put(key, make)
        return ("right" if is_right(found, seed) else "wrong",)

    async def order(self, key: str, what: str) -> tuple[Any, ...]:
        """Have a `make` that waits "make" it or "raise"."""
        self._orders.pop(key).set_result(what)
        return ("ordered",)

    async def late(self) -> tuple[Any, ...]:
        """From now on the bytes of puts do not arrive, as those of a stream that is busy elsewhere."""
        if self.kind == "host":
            Attachment.tell_written = lambda *_: None  # type: ignore[method-assign]
        else:
            # What is put is made beside the stream that is busy.
            self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            torch.cuda._sleep(int(20.0 * 2e9))  # type: ignore[no-untyped-call]
        return ("late",)

    async def hold_writes(self) -> tuple[Any, ...]:
        """From now on puts stand still in the thread that copies, and the loop goes on."""
        write = HostMapping.write

        def slow(*arguments: Any) -> None:
            self.pipe.say("at", "writing")
            assert self._go_on.wait(60.0), "never let go"
            write(*arguments)

        setattr(HostMapping, "write", slow)  # noqa: B010 - not what the type says
        return ("holding",)

    async def let_go(self) -> tuple[Any, ...]:
        self._go_on.set()
        return ("let go",)

    async def fork_in_make(self, key: str) -> tuple[Any, ...]:
        """Claim a key and fork; the child leaves its `make` by an error, as if it had the claim."""
        making = await self.cache._opened().keys.find_or_claim(key.encode(), None, waits=True)
        pid = os.fork()
        if pid == 0:
            try:
                making.end()
                self.pipe.say("ended", os.getpid())
                self._hang()
            finally:
                os._exit(1)
        return ("parent", pid)


class KeyedReader(KeyedAgent, ReaderAgent):
    """A client that looks up and puts."""


class KeyedOwner(KeyedAgent, OwnerAgent):
    """An owner that is asked."""

    async def account(self) -> tuple[Any, ...]:
        """Hits, misses, and what is used beyond that which keys keep."""
        pool = self.cache._opened().pool
        pool.collect()
        now = self.cache.statistics()
        out = sum(page.reads_by_key + len(page.reserved) for page in pool.pages.values())
        beyond = now.used_bytes - now.resident_bytes, now.slots_used - now.keys
        return ("account", now.hits, now.misses, (*beyond, now.waiters, out))


async def keyed_reader(
    pipe: Pipe,
    endpoint: str,
    *,
    name: str | None = None,
    leash: Connection | None = None,
    device: str = "cpu",
    settings: Settings | None = None,
) -> None:
    """Attach, then follow commands; "end" says goodbye."""
    agent = KeyedReader(pipe, leash)
    agent.device, agent.kind = device, "host" if device == "cpu" else "gpu"
    async with featcache.connect(endpoint, name=name, settings=settings) as agent.cache:
        pipe.say("attached")
        await agent.follow()


async def keyed_owner(
    pipe: Pipe,
    *,
    settings: Settings,
    stop: str | None = None,
    leash: Connection | None = None,
    device: str = "cpu",
) -> None:
    """Open a pool, then follow commands; "end" closes it."""
    agent = KeyedOwner(pipe, leash)
    agent.device, agent.kind = device, "host" if device == "cpu" else "gpu"
    if stop is not None:
        stop_at(pipe, OWNER_STEPS[stop], stop, agent.kind)
    async with featcache.create(device=device, settings=settings) as agent.cache:
        pipe.say("open", agent.cache.endpoint)
        await agent.follow()


# --- everything at once ---------------------------------------------------------------------------

KEYS: Final = 20
_BUSY_BYTES: Final = 48 << 10


class Busy:
    """Does all there is by key, at random, and checks every byte. What a key has, its name tells."""

    def __init__(self, cache: Any, random_: random.Random, device: str = "cpu") -> None:
        self.cache = cache
        self.done = 0
        self.wrong: list[str] = []
        self._random = random_
        self._device = device

    def _value(self, seed: int) -> torch.Tensor:
        return feature(seed, (1 + seed % 5) * _BUSY_BYTES).to(self._device)

    def _check(self, found: Any, seed: int, what: str) -> None:
        if not is_right(found, seed) or found.numel() != (1 + seed % 5) * _BUSY_BYTES:
            self.wrong.append(f"{what} of {seed}")

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop. A call that does not end in time is wrong as well."""
        uses = [self.get, self.borrow, self.get_or_put, self.put, self.pass_on, self.pin]
        uses += [self.get_or_put, self.wait, self.evict, self.give_up]
        uses += [self.share, self.get_many, self.put_many]
        expected = (
            featcache.KeyNotFound,
            featcache.PutTimeout,
            featcache.StaleRef,
            Trouble,
        )
        while not stop.is_set() and not self.wrong:
            use, seed = self._random.choice(uses), self._random.randrange(KEYS)
            try:
                with anyio.fail_after(20.0):
                    await use(seed)
            except expected:
                pass
            except featcache.FeatcacheError as error:
                self.wrong.append(f"{use.__name__}: {error!r}")
            except TimeoutError:
                self.wrong.append(f"{use.__name__} of {seed} does not end")
            self.done += 1
            await asyncio.sleep(0)

    async def get(self, seed: int) -> None:
        self._check(await self.cache.get(str(seed)), seed, "get")

    async def share(self, seed: int) -> None:
        ref = await self.cache.share(str(seed), readers=1, ttl=10.0)
        self._check(await self.cache.get(ref), seed, "share")

    async def get_many(self, seed: int) -> None:
        seeds = [seed, (seed + 1) % KEYS, seed]
        found = await self.cache.get_many([str(one) for one in seeds])
        for feature, one in zip(found, seeds, strict=True):
            self._check(feature, one, "get_many")

    async def put_many(self, seed: int) -> None:
        seeds = [seed, (seed + 1) % KEYS]
        values = [self._value(one) for one in seeds]
        await self.cache.put_many(values, keys=[str(one) for one in seeds], timeout=5.0)

    async def wait(self, seed: int) -> None:
        with contextlib.suppress(
            featcache.GetTimeout
        ):  # found in time, and its bytes not there yet
            self._check(await self.cache.get(str(seed), timeout=0.02), seed, "wait")

    async def borrow(self, seed: int) -> None:
        async with self.cache.borrow(str(seed)) as view:
            self._check(view, seed, "borrow")
            await asyncio.sleep(self._random.random() * 0.005)
            self._check(view, seed, "end of borrow")

    async def get_or_put(self, seed: int) -> None:
        async def make() -> torch.Tensor:
            await asyncio.sleep(self._random.random() * 0.005)
            if self._random.random() < 0.2:
                raise Trouble(str(seed))
            return self._value(seed)

        self._check(await self.cache.get_or_put(str(seed), make), seed, "get_or_put")

    async def put(self, seed: int) -> None:
        await self.cache.put(self._value(seed), key=str(seed), timeout=1.0)

    async def pass_on(self, seed: int) -> None:
        """By ref, to itself."""
        ref = await self.cache.put(self._value(seed), timeout=1.0, ttl=0.5)
        if self._random.random() < 0.3:
            await self.cache.discard(ref)
        else:
            self._check(await self.cache.get(ref), seed, "ref")

    async def pin(self, seed: int) -> None:
        await self.cache.pin(str(seed))
        await asyncio.sleep(self._random.random() * 0.005)
        await self.cache.unpin(str(seed))

    async def evict(self, seed: int) -> None:
        if self._random.random() < 0.3:
            await self.cache.evict(str(seed))
        await self.cache.contains(str(seed))

    async def give_up(self, seed: int) -> None:
        """Begin something and cancel it, wherever it is by then."""
        use = self._random.choice([self.get_or_put, self.put, self.wait, self.borrow])
        task = asyncio.ensure_future(use(seed))
        await asyncio.sleep(self._random.random() * 0.004)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, featcache.FeatcacheError, Trouble):
            await task


async def busy_by_key(
    pipe: Pipe, endpoint: str, *, seed: int, settings: Settings, device: str = "cpu"
) -> None:
    """Be busy, four times over, until there is a word; then say how busy, and what was wrong."""
    stop = asyncio.Event()
    async with featcache.connect(endpoint, settings=settings) as client:
        busy = [Busy(client, random.Random(seed * 10 + n), device) for n in range(4)]
        tasks = [asyncio.ensure_future(one.run(stop)) for one in busy]
        pipe.say("attached")
        await pipe.hear()
        stop.set()
        await asyncio.gather(*tasks)
    pipe.say("did", sum(one.done for one in busy), [what for one in busy for what in one.wrong])
