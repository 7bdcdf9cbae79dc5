"""A client is stopped, or killed, between any two words of a post: what it posted is there, nothing else."""

import signal
from typing import Any

import pytest

import featcache
from featcache import FeatureCache, FeatureRef
from featcache.memory.words import Posts
from support.caches import KIB, filled, small, spent, until
from support.keyed import page_of, pool_of, reserved
from support.processes import Child, Pipe, Start, gone
from support.slabs import same

POSTED = "counted"
STEPS = ["claimed", "copied", "told", "half an entry", "an entry", POSTED]


class Watched:
    """A page's words or bytes at whose stores the session stands still."""

    def __init__(self, words: memoryview, pipe: Pipe, steps: dict[Any, str]) -> None:
        self._words = words
        self._pipe = pipe
        self._steps = steps

    def __getitem__(self, at: Any) -> Any:
        return self._words[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        if isinstance(at, slice):
            half = len(value) // 2
            self._words[at.start : at.start + half] = value[:half]
            self._at("half an entry")
        self._words[at] = value
        self._at("an entry" if isinstance(at, slice) else POSTED if at == Posts.POSTED else "")

    def _at(self, step: str) -> None:
        if step in self._steps:
            del self._steps[step]
            self._pipe.stand(step)


async def puts(pipe: Pipe, endpoint: str, step: str) -> None:
    """Put one that is posted and not heard, then one that stands still at a step."""
    async with featcache.connect(endpoint, settings=small()) as client:
        for _ in range(3):
            await client.discard(await client.put(filled(KIB)))
        assert await pipe.hear() == ("go on",)
        writer: Any = client._opened().puts.bound_writer()
        attachment, posts = writer.connection.attachment, writer._posts._posts
        first = await client.put(filled(KIB, 1), readers=1)
        pipe.say("first", first.to_bytes())
        left = {step: step}
        posts._entries = Watched(posts._entries, pipe, left)
        posts._header = Watched(posts._header, pipe, left)
        for name, owner, at in (
            ("claimed", attachment, "claim"),
            ("copied", attachment.mapping, "write"),
            ("told", attachment, "tell_written"),
        ):
            if name == step:
                _stand_after(owner, at, pipe, step)
        second = await client.put(filled(KIB, 2), readers=1)
        pipe.say("second", second.to_bytes())
        assert await pipe.hear() == ("leave",)


def _stand_after(owner: Any, name: str, pipe: Pipe, step: str) -> None:
    done = getattr(owner, name)

    def stands(*arguments: Any) -> Any:
        result = done(*arguments)
        delattr(owner, name)
        pipe.stand(step)
        return result

    setattr(owner, name, stands)


async def led(
    start: Start, cache: FeatureCache, step: str, discarded: int = 3
) -> tuple[Child, FeatureRef]:
    """A child that stands at a step of its second put; the owner's loop has not turned since the first."""
    child = start(puts, cache.endpoint, step)
    await until(lambda: cache.statistics().discarded == discarded)
    child.tell("go on")
    _, data = child.hear_now()
    assert child.hear_now() == ("at", step)
    return child, FeatureRef.from_bytes(data)


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_a_step_of_a_post(start: Start, step: str) -> None:
    async with featcache.create(settings=small(recycle_interval=60.0)) as cache:
        child, first = await led(start, cache, step)
        assert page_of(cache).posts
        child.kill()
        gone(child.pid)
        await until(lambda: cache.statistics().readers_lost == 1)
        assert same(await cache.get(first), filled(KIB, 1))
        assert cache.statistics().puts == 4 + (step == POSTED)
        assert not any(pool_of(cache).words.reserved)
        for slot in pool_of(cache).store.table.in_use():  # nobody has the ref of the second
            await cache.discard(_ref(cache, first, slot))
        await spent(cache)
        assert pool_of(cache).store.allocator.used_bytes == 0


def _ref(cache: FeatureCache, like: FeatureRef, slot: Any) -> FeatureRef:
    place = slot.index, slot.generation, slot.offset_bytes
    return FeatureRef(like.pool_id, like.endpoint, *place, like.nbytes, like.specs)


@pytest.mark.parametrize("step", STEPS)
async def test_stopped_at_a_step_of_a_post(start: Start, step: str) -> None:
    """Others read what it posted while it is stopped; then it goes on."""
    settings = small(recycle_interval=60.0)
    async with (
        featcache.create(settings=settings) as cache,
        featcache.connect(cache.endpoint, settings=settings) as other,
    ):
        await other.discard(await other.put(filled(KIB)))
        child, first = await led(start, cache, step, discarded=4)
        child.signal(signal.SIGSTOP)
        assert same(await other.get(first, timeout=20), filled(KIB, 1))
        assert not pool_of(cache).pages[2].posts
        assert reserved(cache) == 0
        assert same(await other.get(await other.put(filled(KIB, 3))), filled(KIB, 3))
        child.signal(signal.SIGCONT)
        child.tell("go on")
        _, data = await child.hear()
        assert same(await other.get(FeatureRef.from_bytes(data), timeout=20), filled(KIB, 2))
        child.tell("leave")
        await until(lambda: cache.statistics().sessions == 1)
        await spent(cache)
