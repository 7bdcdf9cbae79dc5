"""Every way out of a client's session says goodbye, or is told by its process's next one."""

import asyncio
import contextlib
import gc
import os
import resource
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import featcache
from faults.agents import feature, is_right
from faults.checks import Log, assert_whole, events
from featcache import AttachRefused, FeatcacheError, FeatureClient, FeatureRef
from featcache.control.messages import ProtocolError
from featcache.control.peer import Peer
from featcache.memory.words import Parting
from featcache.pool.attendance import Attendance
from featcache.settings import Settings
from support.caches import small
from support.processes import Pipe, Start, until

SIZE = 64 << 10
SETTINGS = Settings(capacity=2 * SIZE, initial=2 * SIZE, slots=8, sessions=4, recycle_interval=0.01)
NAME = "rank0"


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Leave this process so many descriptors that it may open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - names
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for fd in taken[:count]:
            os.close(fd)
        del taken[:count]
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def sessions(cache: featcache.FeatureCache) -> int:
    return cache.statistics().sessions


async def reattaches(endpoint: str) -> None:
    """The name is to be had, and the client that has it works."""
    async with featcache.connect(endpoint, name=NAME, settings=SETTINGS) as client:
        assert is_right(await client.get(await client.put(feature(3, 64))), 3)


def lose(cache: featcache.FeatureCache) -> None:
    """End the owner's side of all its sockets, as a peer that breaks the protocol would have it."""
    for peer in list(cache._opened().main.server.sessions.values()):
        peer.channel._lose(ProtocolError("this test says so"))


# --- an attach that fails ----------------------------------------------------------------------------


async def short_of_descriptors(pipe: Pipe, endpoint: str) -> None:
    """Attach in vain with few descriptors, by name and without; then with enough."""
    told: list[str] = []
    for spare in range(12):
        for name in (NAME, None):
            with descriptors_left(spare):
                client = featcache.connect(endpoint, name=name, settings=SETTINGS)
                try:
                    await client.open()
                except (FeatcacheError, OSError) as error:
                    told.append(f"{type(error).__name__}: {error}")
            await client.aclose()
    pipe.say("failed attaches", len(told))
    await reattaches(endpoint)
    pipe.say("attached")
    await pipe.hear()


async def test_attaches_that_fail_for_want_of_descriptors(start: Start, log: Log) -> None:
    """More of them than there are places, and by a name; the process lives all the while."""
    async with featcache.create(settings=SETTINGS) as cache:
        child = start(short_of_descriptors, cache.endpoint)
        what, failed = await child.hear()
        assert what == "failed attaches"
        assert failed > 2 * SETTINGS.sessions
        await child.expect("attached")
        await until(lambda: not sessions(cache))
        assert not events(log, "reader.quarantined")


@pytest.mark.parametrize(
    "step",
    [
        "featcache.client.registry.map_pool",
        "featcache.client.connection.PoolConnection.wait_mapped",
    ],
)
async def test_attaches_that_fail_at_a_later_step(
    step: str, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any, **__: Any) -> None:
        raise OSError("no room to map it")

    async with featcache.create(settings=SETTINGS) as cache:
        for name in (NAME, *[None] * SETTINGS.sessions):
            with monkeypatch.context() as patch:
                patch.setattr(step, fails)
                with pytest.raises((OSError, FeatcacheError), match="no room"):
                    await featcache.connect(cache.endpoint, name=name).open()
        await reattaches(cache.endpoint)
        await until(lambda: not sessions(cache))


async def test_an_owner_that_speaks_nonsense_before_anything_is_mapped(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client breaks off and says goodbye: it may be the owner's fault, but it holds nothing."""
    async with featcache.create(settings=SETTINGS) as cache:
        server = cache._opened().main.server
        with monkeypatch.context() as patch:
            patch.setattr(server._host, "segments", lambda: [(0, -1, -1)])
            patch.setattr(
                server, "_send_segments", lambda peer, _: peer.channel._sock.send(b"nonsense")
            )
            with pytest.raises(FeatcacheError):
                await featcache.connect(cache.endpoint, name=NAME).open()
        await until(lambda: not sessions(cache))
        await reattaches(cache.endpoint)


# --- a goodbye that has no room ------------------------------------------------------------------------


async def floods(pipe: Pipe, endpoint: str) -> None:
    """Fill the socket of an owner that stands still, close, and come back by the same name."""
    client = await featcache.connect(endpoint, name=NAME).open()
    await client.contains("x")
    pipe.say("attached")
    await pipe.hear()
    (connection,) = client._opened().registry.connections
    channel = connection.link._channel
    tasks = set()
    while not channel._outgoing:  # the socket is full: the rest waits here
        tasks.add(asyncio.ensure_future(client.evict("k" * 1000)))
        await asyncio.sleep(0)
    await client.aclose()
    await asyncio.gather(*tasks, return_exceptions=True)
    pipe.say("closed")
    await pipe.hear()
    await reattaches(endpoint)
    pipe.say("attached again")
    await pipe.hear()


async def test_a_goodbye_for_which_the_socket_has_no_room(start: Start, log: Log) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        child = start(floods, cache.endpoint)
        await child.expect("attached")
        child.tell("flood")
        assert child.hear_now() == ("closed",)  # the owner's loop stood still
        await until(lambda: not sessions(cache))
        assert len(events(log, "reader.left")) == 1
        assert not events(log, "reader.quarantined")
        await child.ask("come back")
        await until(lambda: not sessions(cache))
        await assert_whole(cache)


async def test_a_goodbye_without_room_and_then_the_end(start: Start, log: Log) -> None:
    """It said goodbye before it died: what its name owes waits for it."""
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, SIZE), readers=[NAME])
        child = start(floods, cache.endpoint)
        await child.expect("attached")
        child.tell("flood")
        assert child.hear_now() == ("closed",)
        child.kill()
        await until(lambda: not sessions(cache))
        assert not events(log, "reader.lost")
        async with featcache.connect(cache.endpoint, name=NAME) as client:
            assert is_right(await client.get(ref), 1)
        await until(lambda: not cache.statistics().used_bytes)


# --- a loop that is closed, a client that is dropped -----------------------------------------------------


def in_a_loop_of_its_own(work: Callable[[], Any]) -> Any:
    """Run a coroutine in another thread's loop, which is closed behind it."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(asyncio.run(work())))
    thread.start()
    return thread, done


async def left_open(endpoint: str, name: str | None) -> FeatureClient:
    """Attach, in a loop that is then closed under the client."""
    thread, done = in_a_loop_of_its_own(
        lambda: featcache.connect(endpoint, name=name, settings=SETTINGS).open()
    )
    await until(lambda: not thread.is_alive())
    (client,) = done
    assert isinstance(client, FeatureClient)
    return client


# That of the socket, which nobody closed: it is what is tested.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "collected"])
async def test_loops_that_are_closed_under_their_clients(kept: bool, no_leaks: None) -> None:
    """By name, and more without than there are places: the process's next session tells of them."""
    async with featcache.create(settings=SETTINGS) as cache:
        clients = []
        for name in (NAME, NAME, *[None] * SETTINGS.sessions, NAME):
            clients.append(await left_open(cache.endpoint, name))
            if not kept:
                clients.clear()
                gc.collect()
        await reattaches(cache.endpoint)
        await until(lambda: not sessions(cache))
        await assert_whole(cache)


async def test_a_loop_that_is_closed_in_a_borrow(no_leaks: None) -> None:
    """Its name is free at once for its process, its bytes when the borrow ends."""
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, 2 * SIZE))

        async def borrows() -> Any:
            client = await featcache.connect(cache.endpoint, name=NAME).open()
            borrow = client.borrow(ref)
            return client, borrow, await borrow.__aenter__()

        thread, done = in_a_loop_of_its_own(borrows)
        await until(lambda: not thread.is_alive())
        ((client, borrow, view),) = done
        async with featcache.connect(cache.endpoint, name=NAME):
            await cache.discard(ref)
            cache._opened().pool.collect()
            assert cache.statistics().used_bytes == 2 * SIZE
            assert is_right(view, 1)
            assert sessions(cache) == 2
        borrow.__exit__(None, None, None)
        await until(lambda: not cache.statistics().used_bytes)
        await reattaches(cache.endpoint)
        await until(lambda: not sessions(cache))
        del client, borrow, view, done


async def test_a_client_that_is_dropped_is_closed(no_leaks: None, log: Log) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        for _ in range(2 * SETTINGS.sessions):
            client = await featcache.connect(cache.endpoint, name=NAME).open()
            await client.get(await cache.put(feature(1, 64)))
            del client
            gc.collect()
            await until(lambda: not sessions(cache))
        assert len(events(log, "reader.left")) == 2 * SETTINGS.sessions


async def test_a_borrow_outlives_the_client_that_is_dropped(no_leaks: None) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, SIZE))
        async with (await featcache.connect(cache.endpoint, name=NAME).open()).borrow(ref) as view:
            gc.collect()
            for _ in range(20):
                await asyncio.sleep(0)
            assert is_right(view, 1)
            assert sessions(cache) == 1
            await reattaches(cache.endpoint)
        await until(lambda: not sessions(cache))


# --- a name goes on in its process -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "lost"])
async def test_a_process_comes_back_while_it_still_borrows(how: str, log: Log) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, SIZE), readers=[NAME])
        client = await featcache.connect(cache.endpoint, name=NAME).open()
        async with client.borrow(ref) as view:
            if how == "closed":
                await client.aclose()
            else:
                lose(cache)
                await until(lambda: client._opened().registry._lost)
            owed = await cache.put(feature(2, SIZE), readers=[NAME])
            async with featcache.connect(cache.endpoint, name=NAME) as again:
                assert is_right(await again.get(owed), 2)
                assert is_right(view, 1)
                await cache.discard(ref)
                cache._opened().pool.collect()
                assert cache.statistics().used_bytes >= SIZE, "recycled in the middle of a borrow"
                with pytest.raises(
                    AttachRefused, match=NAME
                ):  # two at once have it no more than ever
                    await featcache.connect(cache.endpoint, name=NAME).open()
        await client.aclose()
        await until(lambda: not cache.statistics().used_bytes)
        await reattaches(cache.endpoint)
        await until(lambda: not sessions(cache))
        assert not events(log, "reader.lost")
        await assert_whole(cache)


async def holds_on(pipe: Pipe, endpoint: str, data: bytes, comes_back: bool) -> None:
    """Close in a borrow, which stays; maybe come back by the name and close again."""
    client = await featcache.connect(endpoint, name=NAME).open()
    async with client.borrow(FeatureRef.from_bytes(data)):
        await client.aclose()
        if comes_back:
            async with featcache.connect(endpoint, name=NAME):
                pass
        pipe.say("holds")
        await pipe.hear()


async def test_another_process_does_not_get_the_name_of_one_that_still_borrows(
    start: Start,
) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, SIZE), ttl=None)
        child = start(holds_on, cache.endpoint, ref.to_bytes(), False)
        await child.expect("holds")
        with pytest.raises(AttachRefused, match=NAME):
            await featcache.connect(cache.endpoint, name=NAME).open()
        child.kill()
        await until(lambda: not sessions(cache))
        await reattaches(cache.endpoint)


async def test_the_death_of_one_that_passed_its_name_on_pays_nothing_by_it(start: Start) -> None:
    """The name has gone on, in the end to another process, whose reads these are."""
    async with featcache.create(settings=SETTINGS) as cache:
        held = await cache.put(feature(1, SIZE))
        child = start(holds_on, cache.endpoint, held.to_bytes(), True)
        await child.expect("holds")
        async with featcache.connect(cache.endpoint, name=NAME) as client:
            owed = await cache.put(feature(2, SIZE), readers=[NAME])
            child.kill()
            await until(lambda: sessions(cache) == 1)
            assert is_right(await client.get(owed), 2)
        await until(lambda: not sessions(cache))
        await assert_whole(cache)


async def leaves_open(pipe: Pipe, endpoint: str) -> None:
    """End without a goodbye, by a loop that is closed."""
    thread, done = in_a_loop_of_its_own(lambda: featcache.connect(endpoint, name=NAME).open())
    await until(lambda: not thread.is_alive())
    done.clear()
    gc.collect()
    pipe.say("left open")
    await pipe.hear()


async def test_the_death_of_one_that_only_lost_its_loop_is_a_death(start: Start, log: Log) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        await cache.put(feature(1, SIZE), readers=[NAME], ttl=None)
        child = start(leaves_open, cache.endpoint)
        await child.expect("left open")
        with pytest.raises(AttachRefused, match=NAME):  # it may come back
            await featcache.connect(cache.endpoint, name=NAME).open()
        child.tell("end")
        await until(lambda: events(log, "reader.lost"))
        await until(lambda: not cache.statistics().used_bytes)
        await assert_whole(cache)


async def test_what_was_abandoned_makes_place_for_others(start: Start) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        child = start(leaves_open, cache.endpoint)
        await child.expect("left open")
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(SETTINGS.sessions):
                await stack.enter_async_context(featcache.connect(cache.endpoint))
            with pytest.raises(AttachRefused, match="sessions are taken"):
                await featcache.connect(cache.endpoint).open()
        child.kill()
        await until(lambda: not sessions(cache))


# --- a first put that fails ---------------------------------------------------------------------------


async def puts_without_descriptors(pipe: Pipe, endpoint: str) -> None:
    """Put for the first time with no descriptor to spare, then go on with enough."""
    client = await featcache.connect(endpoint, name=NAME).open()
    with descriptors_left(0):
        try:
            await client.put(feature(1, 64))
        except FeatcacheError as error:
            pipe.say("refused", str(error))
    ref = await client.put(feature(1, 64))
    pipe.say("put", is_right(await client.get(ref), 1))
    await client.aclose()
    await reattaches(endpoint)
    pipe.say("attached again")
    await pipe.hear()


async def test_a_client_goes_on_after_a_first_put_that_had_no_descriptors(
    start: Start, log: Log
) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        child = start(puts_without_descriptors, cache.endpoint)
        what, why = await child.hear()
        assert what == "refused"
        assert "descriptors" in why
        await child.expect("put", True)
        await child.expect("attached again")
        await until(lambda: not sessions(cache))
        assert len(events(log, "reader.left")) == 2
        assert not events(log, "reader.quarantined")


async def test_an_owner_closes_though_a_sessions_settlement_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a fault of featcache's own")

    async with featcache.create(settings=small()) as owner:
        client = await featcache.connect(owner.endpoint, name="tp0").open()
        await client.contains("k")
        with monkeypatch.context() as patch:
            patch.setattr(Attendance, "ended", fail)
            await client.aclose()
            await until(lambda: failures)
        assert owner.statistics().sessions == 0
        async with featcache.connect(owner.endpoint, name="tp0") as again:
            assert not await again.contains("k")


async def test_a_goodbye_that_a_newcomer_has_read_ends_its_session_once(log: Log) -> None:
    """An owner that was stopped finds all at once: word, goodbye, closed socket, newcomer."""
    failures = list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with featcache.create(settings=small()) as owner:
        client = await featcache.connect(owner.endpoint).open()
        await client.contains("k")
        (connection,) = client._opened().registry.connections
        connection.attachment.part(Parting.LEFT)
        connection.link.say_goodbye()
        server = owner._opened().main.server
        server._end_those_left(Peer(99, os.getpid()))
        await until(lambda: not server.sessions)
        await client.aclose()
        assert not failures
        assert len(events(log, "reader.left")) == 1
