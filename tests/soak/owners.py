"""The script of an owner: puts of all kinds under load, and at the end the account of what is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from pathlib import Path
from typing import Any

import attrs
import torch

import featcache
from featcache import FeatureCache, events
from featcache.errors import FeatcacheError
from soak.board import Step, Word
from soak.cancelling import cancel_in_owner
from soak.content import KEYS, of_key
from soak.plan import TTL_S, Place, Role, World
from soak.process import GPU_FILES, Process
from soak.turns import TimedSelector, aside
from soak.workers import make
from support.leaks import mapped_memfds, open_descriptors, threads_ended
from support.processes import NotSo, until

DRAIN_S = 30.0
_cuda: Any = torch.cuda  # half of its functions have no types


class OwnerScript:
    """One owner: its pumps, what it hears of deaths, what it had open at first."""

    def __init__(self, me: Process, selector: TimedSelector) -> None:
        self.me = me
        self.selector = selector
        self.attached: set[str] = set()
        self.reads_back_s: list[float] = []
        self.lost = self.late = 0

    def note(self, event: events.Event) -> None:
        """Keep account of sessions, and of how soon a death was seen and its reads were paid."""
        if isinstance(event, events.ReaderAttached) and event.reader:
            self.attached.add(event.reader)
        elif isinstance(event, events.ReaderLeft | events.ReaderLost) and event.reader:
            self.attached.discard(event.reader)
        if isinstance(event, events.ReaderLost):
            self.lost += 1
            self._time_death(event.pid)

    def _time_death(self, pid: int) -> None:
        board = self.me.world.board
        killed_ns = board.death_of(pid)
        if not killed_ns:  # it ended by itself
            return
        if killed_ns < board.owner_stopped_ns:  # the storm held this owner back
            self.late += 1
        else:
            self.reads_back_s.append((time.monotonic_ns() - killed_ns) / 1e9)

    # --- load ------------------------------------------------------------------------------------

    async def put_to_names(self, cache: FeatureCache) -> None:
        """Put to some of the named readers that are attached now."""
        names = sorted(self.attached)
        if not names:
            return
        named = self.me.chance.sample(names, self.me.chance.randint(1, len(names)))
        places = [place for place in self.me.world.places if place.name in named]
        await self._put(cache, places, named)

    async def put_to_anyone(self, cache: FeatureCache) -> None:
        """Put to some that have no name, those who forge among them."""
        places = [one for one in self.me.world.readers(self.me.place.pool) if one.name is None]
        some = self.me.chance.sample(places, self.me.chance.randint(1, min(3, len(places))))
        await self._put(cache, some, len(some))

    async def _put(self, cache: FeatureCache, to: list[Place], readers: list[str] | int) -> None:
        me, content = self.me, self.me.content()
        on_full: Any = me.chance.choice(("wait", "wait", "spill"))
        with me.at(Step.PUT, Word.PUTS):
            ref = await cache.put(
                content.make(me.made_on), readers=readers, ttl=TTL_S, timeout=8, on_full=on_full
            )
        if not me.send(content, ref, to):
            await cache.discard(ref)

    async def use_key(self, cache: FeatureCache) -> None:
        """Make, read or drop a key of one's own pool."""
        key, content = self.me.key()
        with self.me.at(Step.KEY, Word.KEYED):
            if self.me.chance.random() < 0.05:
                await cache.evict(key)
            else:
                found = await cache.get_or_put(key, lambda: make(self.me, content), timeout=8)
                self.me.check(content, found, "owner's get_or_put")

    async def pump(self, cache: FeatureCache) -> None:
        """Put, or use a key, until the end."""
        acts = (self.put_to_names, self.put_to_anyone, self.put_to_anyone, self.use_key)
        while not self.me.stopping:
            with self.me.tolerating():
                await self.me.chance.choice(acts)(cache)
            await self.me.pause(0.006)

    # --- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Own a pool until the storm is over, then account for it."""
        me = self.me
        events.remove_hook(events.log_to_structlog)
        events.add_hook(self.note)
        settings, spill_bytes = me.world.sizes.settings(), me.world.sizes.spill_bytes
        me.row[Word.AT] = Step.ATTACH
        async with featcache.create(
            device=me.made_on, endpoint=me.endpoint, spill=spill_bytes, settings=settings
        ) as cache:
            if not me.place.mortal:  # before anybody else comes: see `Storm._await_start`
                await self._warm_up(cache)
            me.row.count(Word.BEGUN)
            first = figures()
            self.selector.reset()
            pumps = [self.pump(cache), self.pump(cache), cancel_in_owner(me, cache)]
            await asyncio.gather(*pumps)
            account = {**self._load(), "first": first, "busy": figures()}
            while me.world.board.stopping < 2:  # noqa: ASYNC110 - shared memory has no event
                await asyncio.sleep(0.01)
            account |= await drained(cache)
            account["last"] = figures()
        if not me.place.mortal:
            account_file(me.world, me.place).write_text(json.dumps(account))

    async def _warm_up(self, cache: FeatureCache) -> None:
        """Use everything once, so that what comes later and stays is a leak."""
        me = self.me
        for _ in range(40):
            await cache.get(await cache.put(me.content().make(me.made_on)))
        key, content = of_key(0, me.world.sizes.key_words)
        await cache.get_or_put(key, lambda: content.make(me.made_on))
        await cache.evict(key)
        far = attrs.evolve(me.world.sizes.settings(), through_host=True)
        async with featcache.connect(me.endpoint, device=me.device, settings=far) as client:
            await client.get(await cache.put(content.make(me.made_on)))
        await self._spill_once(cache)
        await until(lambda: not any(_left(cache).values()), DRAIN_S)
        await _shrunk(cache)

    async def _spill_once(self, cache: FeatureCache) -> None:
        """Fill the slab, so that the next put spills, and read both."""
        now = cache.statistics()
        whole = torch.zeros(now.largest_free_bytes, dtype=torch.uint8, device=self.me.made_on)
        refs = [await cache.put(whole)]
        refs.append(await cache.put(whole[:4096], on_full="spill"))
        assert cache.statistics().spilled, "the slab was full"
        for ref in refs:
            await cache.release(ref)

    def _load(self) -> dict[str, Any]:
        selector = self.selector
        return {
            "readers_lost": self.lost,
            "late_by_a_stop": self.late,
            "reads_back_s": [round(seconds, 5) for seconds in self.reads_back_s],
            "turns": selector.turns,
            "turns_over_5_ms_cpu": selector.long_turns,
            "longest_turn_cpu_ms": round(selector.longest_cpu_s * 1e3, 1),
            "longest_turn_wall_ms": round(selector.longest_wall_s * 1e3, 1),
        }


def account_file(world: World, place: Place) -> Path:
    """Where an owner leaves its account."""
    return world.folder / f"account{place.number}.json"


async def drained(cache: FeatureCache) -> dict[str, Any]:
    """Drop all keys, wait for what is owed to expire, and say what is left in both pools."""
    for number in range(KEYS):
        with contextlib.suppress(FeatcacheError):
            await cache.evict(of_key(number, 0)[0])
    began_s = time.monotonic()
    with contextlib.suppress(NotSo):
        await until(lambda: not any(_left(cache).values()), DRAIN_S)
    await _shrunk(cache)
    left = _left(cache)
    return {
        "left": left,
        "drain_s": round(time.monotonic() - began_s, 2),
        "left_slots": _left_slots(cache) if any(left.values()) else None,
    }


async def _shrunk(cache: FeatureCache) -> None:
    """Wait until the slab has given back what it grew by: on a GPU each segment has its descriptor."""
    initial_bytes = cache._settings.segment
    with contextlib.suppress(NotSo):
        await until(lambda: cache.statistics().committed_bytes <= initial_bytes, DRAIN_S / 3)


def _left_slots(cache: FeatureCache) -> list[str]:
    """What the first of the slots in use are, for whoever is to find out why."""
    engine = cache._life.engine
    assert engine is not None, "open"
    names = (
        "index",
        "generation",
        "state",
        "nbytes",
        "ttl_s",
        "owed_by",
        "grants",
        "key",
        "paid_by",
    )
    slots = [slot for served in engine.served for slot in served.pool.store.table.in_use()]
    return [str({name: getattr(slot, name) for name in names}) for slot in slots[:10]]


def _left(cache: FeatureCache) -> dict[str, int]:
    """What is not free, of either pool. Beside the figures of the API those of the spill pool."""
    now, engine = cache.statistics(), cache._life.engine
    assert engine is not None, "open"
    assert engine.spill is not None, "made at the start"
    host = engine.spill.pool.store
    return {
        "bytes": now.used_bytes + host.allocator.used_bytes,
        "slots": now.slots_used + host.table.used,
        "waiters": now.waiters + len(host.queue),
        "keys": now.keys,
        "sessions": now.sessions,
    }


@aside
def figures() -> dict[str, int]:
    """Memory and descriptors of this process, in KiB and numbers."""
    gc.collect()
    threads_ended(0.01)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {name: int(status[name].split()[0]) for name in ("VmRSS", "RssAnon", "RssShmem")}
    opened = open_descriptors()
    of_gpu = sum(n for name, n in opened.items() if name.startswith(GPU_FILES))
    free, total = _cuda.mem_get_info(0) if _cuda.is_initialized() else (0, 0)
    return {
        "rss_kib": kib["VmRSS"],
        "anon_kib": kib["RssAnon"],
        "shmem_kib": kib["RssShmem"],
        "descriptors": opened.total() - of_gpu,
        "gpu_descriptors": of_gpu,
        "gpu_used_kib": (total - free) >> 10,
        "mapped_memfds": mapped_memfds().total(),
        "threads": int(status["Threads"]),
    }


def is_owner(place: Place) -> bool:
    """Whether a place is an owner's."""
    return place.role is Role.OWNER
