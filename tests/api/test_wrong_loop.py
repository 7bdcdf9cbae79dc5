"""An object belongs to the loop that opened it: elsewhere it is refused, by an error that names both."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

import featcache
from featcache import CacheClosed, FeatureCache, FeatureClient, FeatureRef, WrongLoop
from featcache.session.home import Home
from support.caches import KIB, filled, pair, small

User = FeatureCache | FeatureClient
Call = Callable[[Any, FeatureRef], Any]

pytestmark = pytest.mark.usefixtures("no_leaks")


async def _entered(cache: User, what: FeatureRef | str) -> None:
    async with cache.borrow(what):
        pass


AWAITED: dict[str, Call] = {
    "put": lambda cache, _: cache.put(filled(1)),
    "put that does not wait": lambda cache, _: cache.put(filled(1), on_full="raise"),
    "get": lambda cache, ref: cache.get(ref),
    "get of a key": lambda cache, _: cache.get("k"),
    "borrow": _entered,
    "borrow of a key": lambda cache, _: _entered(cache, "k"),
    "release": lambda cache, ref: cache.release(ref),
    "discard": lambda cache, ref: cache.discard(ref),
    "get_or_put": lambda cache, _: cache.get_or_put("k", lambda: filled(1)),
    "contains": lambda cache, _: cache.contains("k"),
    "share": lambda cache, _: cache.share("k", readers=1),
    "get_many": lambda cache, ref: cache.get_many([ref, "k"]),
    "put_many": lambda cache, _: cache.put_many([filled(1)]),
    "contains_many": lambda cache, _: cache.contains_many(["k"]),
    "evict": lambda cache, _: cache.evict("k"),
    "pin": lambda cache, _: cache.pin("k"),
    "unpin": lambda cache, _: cache.unpin("k"),
    "aclose": lambda cache, _: cache.aclose(),
}
OWNERS: dict[str, Call] = AWAITED | {
    "below": lambda cache, _: cache.pressure.below("high"),
    "put_nowait": lambda cache, _: cache.put_nowait(filled(1)),
}


async def _made(call: Call, cache: User, ref: FeatureRef) -> None:
    result = call(cache, ref)
    if hasattr(result, "__await__"):
        await result


def _in_a_thread(work: Callable[[], object]) -> None:
    """Do it in a thread that is named, to its end: the loop of this one stands still."""
    with ThreadPoolExecutor(1, thread_name_prefix="stranger") as threads:
        threads.submit(work).result()


@pytest.mark.parametrize("call", OWNERS)
async def test_the_owner_from_the_loop_of_another_thread(call: str) -> None:
    async with pair() as (owner, _):
        ref = await owner.put(filled(KIB), key="k", readers=1)

        def misuse() -> None:
            with pytest.raises(WrongLoop, match=r"'MainThread'.*'stranger_0' with <"):
                asyncio.run(_made(OWNERS[call], owner, ref))

        _in_a_thread(misuse)
        assert owner.statistics().puts == 1
        await owner.get(ref)
        assert await owner.contains("k")


@pytest.mark.parametrize("call", AWAITED)
async def test_a_client_from_the_loop_of_another_thread(call: str) -> None:
    async with pair() as (owner, client):
        ref = await client.put(filled(KIB), key="k", readers=1)

        def misuse() -> None:
            with pytest.raises(
                WrongLoop, match=r"this client .*'MainThread'.*'stranger_0' with <|borrow"
            ):
                asyncio.run(_made(AWAITED[call], client, ref))

        _in_a_thread(misuse)
        await client.get(ref)
        assert await client.contains("k")
        assert owner.statistics().puts == 1


async def test_a_put_without_waiting_from_a_thread_without_a_loop() -> None:
    async with pair() as (owner, _):

        def misuse() -> None:
            with pytest.raises(WrongLoop, match=r"'MainThread'.*'stranger_0' with no event loop"):
                owner.put_nowait(filled(1))

        _in_a_thread(misuse)
        assert owner.statistics().slots_used == 0


async def test_what_is_safe_in_any_thread() -> None:
    async with pair() as (owner, client):
        refs = [await owner.put(filled(KIB, 7), readers=4) for _ in range(2)]

        def use() -> None:
            for cache in (owner, client):
                assert cache.is_open
                assert cache.statistics().puts in {0, 2}
                assert repr(cache)
                got = cache.get_nowait(refs[0])
                with cache.borrow(refs[1]) as view:
                    assert isinstance(got, type(view))
            assert owner.pressure.level == "normal"
            assert owner.endpoint

        _in_a_thread(use)
        _in_a_thread(lambda: asyncio.run(asyncio.to_thread(owner.statistics)))


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="module", autouse=True)
def _warmed_up() -> None:
    """A process's first loop of libuv opens a pipe that stays."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))


@pytest.fixture(params=LOOPS)
def runners(request: pytest.FixtureRequest) -> Iterator[tuple[asyncio.Runner, asyncio.Runner]]:
    """Two loops of one thread, of which one runs at a time."""
    with (
        asyncio.Runner(loop_factory=LOOPS[request.param]) as first,
        asyncio.Runner(loop_factory=LOOPS[request.param]) as second,
    ):
        yield first, second


@pytest.mark.parametrize("call", OWNERS)
def test_another_loop_of_the_same_thread(
    call: str, runners: tuple[asyncio.Runner, asyncio.Runner]
) -> None:
    first, second = runners
    owner = featcache.create(settings=small())
    first.run(owner.open())
    ref = first.run(owner.put(filled(1), key="k", readers=2))
    with pytest.raises(WrongLoop, match="belongs to"):
        second.run(_made(OWNERS[call], owner, ref))
    first.run(owner.release(ref))
    first.run(owner.aclose())
    second.run(owner.aclose())  # closed, which it may be told anywhere
    with pytest.raises(CacheClosed, match="create another"):
        second.run(owner.open())


def test_another_loop_once_its_own_has_ended() -> None:
    made = []

    async def leave_open() -> None:
        made.append(await featcache.create(settings=small()).open())

    async def use() -> None:
        await made[0].put(filled(1))

    asyncio.run(leave_open())
    with pytest.raises(WrongLoop, match="which has ended: close it before"):
        asyncio.run(use())
    owner = made.pop()
    Path(owner.endpoint).unlink()  # nothing of that loop will
    Path(f"{owner.endpoint}.lock").unlink()
    owner._forget()


async def test_closed_from_elsewhere_while_it_opens() -> None:
    async with pair() as (owner, _):
        client = featcache.connect(owner.endpoint)
        opening = asyncio.ensure_future(client.open())
        await asyncio.sleep(0)

        def misuse() -> None:
            with pytest.raises(WrongLoop):
                asyncio.run(client.aclose())

        _in_a_thread(misuse)
        await opening
        await client.aclose()


# --- with no loop of asyncio's -------------------------------------------------------------------


def _step(coroutine: Any) -> None:
    """Take a coroutine's first step, as another library would."""
    try:
        coroutine.send(None)
    finally:
        coroutine.close()


def test_opened_where_no_loop_of_asyncio_runs() -> None:
    for cache in (featcache.create(settings=small()), featcache.connect()):
        with pytest.raises(WrongLoop, match=r"asyncio.*'MainThread'.*featcache\.blocking"):
            _step(cache.open())
        assert not cache.is_open


def test_the_first_call_under_trio_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    here, running = threading.get_ident(), SimpleNamespace()

    def token() -> object:
        if threading.get_ident() != here:
            raise RuntimeError("must be called from async context")
        return running

    trio = SimpleNamespace(lowlevel=SimpleNamespace(current_trio_token=token))
    with featcache.blocking.create(settings=small()) as made:
        ref = made.put(filled(1))
    monkeypatch.setitem(sys.modules, "trio", trio)
    owner, client = featcache.create(settings=small()), featcache.connect()
    calls: list[tuple[User, Call]] = [(owner, call) for call in OWNERS.values()]
    calls += [(client, call) for call in AWAITED.values()]
    calls += [(cache, lambda cache, _: cache.open()) for cache in (owner, client)]
    calls += [(owner, lambda cache, _: cache.statistics())]
    for cache, call in calls:
        with pytest.raises(WrongLoop, match=r"where trio runs.*trio\.to_thread\.run_sync"):
            _step(_made(call, cache, ref))

    def work() -> None:
        with featcache.blocking.create(settings=small()) as cache:
            cache.get(cache.put(filled(1)))

    _in_a_thread(work)


def test_two_loops_of_one_thread_that_look_alike_are_told_apart() -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:

        async def home() -> Home:
            return Home()

        async def refused(home: Home) -> str:
            return str(home.refusal("client"))

        text = second.run_until_complete(refused(first.run_until_complete(home())))
        assert f"({id(first):#x}) of thread" in text
        assert f"({id(second):#x}), another loop of this thread" in text
    finally:
        first.close()
        second.close()
