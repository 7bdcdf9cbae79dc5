"""What the children do: a reader and an owner that follow commands and stop at named steps."""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import featcache
from featcache import FeatureRef
from featcache import attachment as attachment_module
from featcache.attachment import Attachment
from featcache.control.channel import Channel
from featcache.control.client import Link
from featcache.control.server import Server
from featcache.desk import Desk
from featcache.feature_cache import FeatureCache
from featcache.memory.cuda import CudaMapping
from featcache.memory.cuda_slab import CudaSlab
from featcache.memory.host import HostMapping, HostSlab
from featcache.memory.words import OwnerWords
from featcache.pool import Pool
from featcache.settings import Settings
from helpers import Pipe

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
    "ending": (Attachment, "end", BEFORE),  # before the release
    "paying": (HostMapping, "signal", BEFORE),  # in the release, before its word
    "paid": (HostMapping, "signal", AFTER),  # the word is written, nobody was told
}
OWNER_STEPS: Final[dict[str, tuple[Any, str, str]]] = {
    "greeting": (Server, "_greet", BEFORE),  # hello has come, no welcome was sent
    "discarding": (Desk, "_discard", BEFORE),  # asked, and never answers
    "reserved": (HostSlab, "write", BEFORE),  # room is given, no bytes are there
    "written": (HostSlab, "write", AFTER),  # the bytes are there, nobody knows
    "publishing": (OwnerWords, "entitle", BEFORE),  # `published` is written, `live` is not
    "published": (Pool, "announce", AFTER),  # readers may read, nobody has the ref
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


def feature(seed: int, nbytes: int) -> torch.Tensor:
    """Bytes that tell by themselves which feature they are of, at every place."""
    places = np.arange(nbytes)  # numpy: torch would use threads, which a busy machine is slow at
    return torch.from_numpy(((places * 7 + places // 256 + seed * 13) % 251).astype(np.uint8))


def is_right(found: Any, seed: int) -> bool:
    """Whether these are the bytes of the feature `seed`, all of them."""
    return bool(torch.equal(found.cpu(), feature(seed, found.numel()))) and found.numel() > 0


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


def _raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - which one is the answer
        return type(error).__name__
    return "nothing"


class ReaderAgent(Agent):
    """A reader."""

    def _link(self) -> Link:
        return next(iter(self.cache._handles.handles)).link  # type: ignore[no-any-return]

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
        self.cache._opened().pool.slab.signal = (  # type: ignore[method-assign]
            lambda words, index, value, order: None
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
