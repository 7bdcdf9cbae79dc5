"""One life for caches and clients, with and without a loop: NEW, OPENING, OPEN, CLOSED."""

import asyncio
import inspect
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import featcache
from featcache import (
    BackendUnavailable,
    CacheClosed,
    FeatureCache,
    FeatureClient,
    OwnerUnreachable,
    SettingsError,
)
from featcache.api.lifecycle import Lifecycle
from featcache.blocking.portal import Portal
from featcache.owner.owner import Owner
from featcache.owner.served_pool import ServedPool
from support.caches import KIB, filled, small, tensor, until
from support.leaks import endpoint_files, threads_ended

pytestmark = pytest.mark.usefixtures("no_leaks")

Opens = FeatureCache | FeatureClient


@asynccontextmanager
async def owned() -> AsyncIterator[FeatureCache]:
    async with featcache.create(settings=small()) as owner:
        yield owner


def made(kind: str, owner: FeatureCache) -> Opens:
    if kind == "owner":
        return featcache.create(settings=small())
    return featcache.connect(owner.endpoint, settings=small())


def is_open(one: Any) -> bool:
    """Asked through a function, since mypy takes the property for one that does not change."""
    return bool(one.is_open)


KINDS = pytest.mark.parametrize("kind", ["owner", "client"])


@KINDS
async def test_of_two_that_open_at_once_the_second_fails(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        first, second = await asyncio.gather(one.open(), one.open(), return_exceptions=True)
        assert first is one
        assert isinstance(second, CacheClosed)
        assert "opens once" in str(second)
        assert is_open(one)
        if kind == "client":
            assert owner.statistics().sessions == 1
        await one.aclose()
        await until(lambda: owner.statistics().sessions == 0)


async def test_a_named_client_that_opens_twice_at_once_keeps_its_name() -> None:
    async with owned() as owner:
        client = featcache.connect(owner.endpoint, name="tp0", settings=small())
        opened = await asyncio.gather(client.open(), client.open(), return_exceptions=True)
        assert sum(result is client for result in opened) == 1
        ref = await owner.put(filled(KIB), readers=["tp0"])
        assert tensor(await client.get(ref)).numel() == KIB
        await client.aclose()


@KINDS
@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16])
async def test_closed_while_it_opens_it_ends_closed(kind: str, turns: int) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        opening = asyncio.ensure_future(one.open())
        for _ in range(turns):
            await asyncio.sleep(0)
        early = not turns  # before its first step it is still new, and opens after this
        await one.aclose()
        (result,) = await asyncio.gather(opening, return_exceptions=True)
        if early:
            await one.aclose()
        else:
            assert isinstance(result, CacheClosed) or result is one
        assert not is_open(one)
        with pytest.raises(CacheClosed):
            await one.open()
        await until(lambda: owner.statistics().sessions == 0)


@KINDS
async def test_an_open_that_is_closed_meanwhile_says_so(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        opening = asyncio.ensure_future(one.open())
        await asyncio.sleep(0)
        await one.aclose()
        with pytest.raises(CacheClosed, match="was closed"):
            await opening
        with pytest.raises(CacheClosed, match="was closed"):
            one.statistics()


@KINDS
async def test_an_open_that_is_cancelled_can_be_tried_again(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        opening = asyncio.ensure_future(one.open())
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert not is_open(one)
        await one.open()
        assert is_open(one)
        await one.aclose()
        await until(lambda: owner.statistics().sessions == 0)


async def test_an_open_that_fails_can_be_tried_again() -> None:
    async with owned() as owner:
        endpoint = owner.endpoint
    client = featcache.connect(endpoint, settings=small(attach_timeout=0.05))
    for _ in range(2):
        with pytest.raises(OwnerUnreachable):
            await client.open()
        assert not is_open(client)
    async with featcache.create(endpoint=endpoint, settings=small()):
        await client.open()
        await client.aclose()


@KINDS
async def test_closing_what_was_never_opened_leaves_it_new(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        await one.aclose()
        async with one:
            assert is_open(one)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: featcache.blocking.create(settings=small()),
        lambda endpoint: featcache.blocking.connect(endpoint, settings=small()),
    ],
    ids=["owner", "client"],
)
def test_threads_that_open_one_object_at_once(
    make: Callable[[str], featcache.blocking.FeatureCache | featcache.blocking.FeatureClient],
) -> None:
    with featcache.blocking.create(settings=small()) as owner:
        one, start = make(owner.endpoint), threading.Barrier(4)
        results: list[BaseException | None] = []

        def run() -> None:
            start.wait()
            try:
                one.open()
                results.append(None)
            except CacheClosed as error:
                results.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.count(None) == 1
        assert len(results) == 4
        assert is_open(one)
        one.close()
        one.close()
        assert not is_open(one)
        with pytest.raises(CacheClosed):
            one.open()


@KINDS
async def test_an_open_that_is_cancelled_as_it_is_done_leaves_nothing(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        opening = asyncio.ensure_future(one.open())
        await asyncio.sleep(0)
        making = one._life._making
        assert making is not None
        while not making.done():  # noqa: ASYNC110 - it is the turns of the loop that count
            await asyncio.sleep(0)
        opening.cancel()  # before its caller goes on, if this comes first in the loop's turn
        (result,) = await asyncio.gather(opening, return_exceptions=True)
        assert isinstance(result, asyncio.CancelledError) is not is_open(one)
        await one.aclose()
        await until(lambda: owner.statistics().sessions == 0)


@KINDS
async def test_closed_as_its_open_is_done_it_ends_closed(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        opening = asyncio.ensure_future(one.open())
        await asyncio.sleep(0)
        making = one._life._making
        assert making is not None
        while not making.done():  # noqa: ASYNC110 - it is the turns of the loop that count
            await asyncio.sleep(0)
        await one.aclose()
        (result,) = await asyncio.gather(opening, return_exceptions=True)
        assert result is one or isinstance(result, CacheClosed)
        assert not is_open(one)
        await until(lambda: owner.statistics().sessions == 0)


@pytest.mark.parametrize("ends", ["aclose", "cancel"])
@pytest.mark.parametrize("turns", [*range(1, 40, 3), 60, 100])
async def test_an_owner_with_a_spill_pool_that_ends_while_it_opens(ends: str, turns: int) -> None:
    """The fixture sees descriptors and endpoints of the spill pool too."""
    one = featcache.create(settings=small(), spill=64 * KIB)
    opening = asyncio.ensure_future(one.open())
    for _ in range(turns):
        await asyncio.sleep(0 if turns < 60 else 0.0002)
    if ends == "aclose":
        await one.aclose()
    else:
        opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    await one.aclose()
    assert not is_open(one)


async def test_a_spill_pool_that_is_there_when_its_owner_is_given_up_goes_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host_pool = Owner.host_pool

    async def stuck(self: Owner) -> ServedPool:
        await host_pool(self)
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(Owner, "host_pool", stuck)
    one = featcache.create(settings=small(), spill=64 * KIB)
    opening = asyncio.ensure_future(one.open())
    await until(lambda: len(endpoint_files(Path(os.environ["XDG_RUNTIME_DIR"]))) == 4)  # two locks
    await one.aclose()
    with pytest.raises(CacheClosed):
        await opening


def test_of_threads_that_close_at_once_one_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    cache = featcache.blocking.create(settings=small()).open()
    begun, go_on = threading.Event(), threading.Event()
    aclose = FeatureCache.aclose

    async def slow(self: FeatureCache) -> None:
        await aclose(self)
        begun.set()
        await asyncio.to_thread(go_on.wait)

    monkeypatch.setattr(FeatureCache, "aclose", slow)
    first = threading.Thread(target=cache.close)
    first.start()
    assert begun.wait(20)
    cache.close()  # finds nothing left to do
    go_on.set()
    first.join(20)
    assert not cache.is_open
    threads_ended()
    assert threading.active_count() == before


def test_closed_before_its_loop_opens_it_it_ends_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with featcache.blocking.create(settings=small()) as owner:
        client = featcache.blocking.connect(owner.endpoint, settings=small())
        there, go_on = threading.Event(), threading.Event()
        opens = Portal._open

        async def late(self: Portal[FeatureClient]) -> None:
            there.set()
            await asyncio.to_thread(go_on.wait)
            await opens(self)

        monkeypatch.setattr(Portal, "_open", late)
        errors: list[BaseException] = []

        def run() -> None:
            try:
                client.open()
            except CacheClosed as error:
                errors.append(error)

        opening, closing = threading.Thread(target=run), threading.Thread(target=client.close)
        opening.start()
        assert there.wait(20)
        closing.start()
        while not client._portal._ends:
            closing.join(0.001)
        go_on.set()
        opening.join(20)
        closing.join(20)
        assert len(errors) == 1
        assert not client.is_open
        with pytest.raises(CacheClosed):
            client.open()


def test_an_interrupt_of_an_open_that_waits_ends_it(runtime_dir: Path) -> None:
    before = threading.active_count()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(runtime_dir / "silent"))
        door.listen()
        client = featcache.blocking.connect(str(runtime_dir / "silent"), settings=small())

        def interrupt() -> None:
            with door.accept()[0] as peer:
                peer.recv(1)  # it has said hello, and waits
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                peer.recv(1 << 16)

        guest = threading.Thread(target=interrupt)
        guest.start()
        with pytest.raises(KeyboardInterrupt):
            client.open()
        guest.join(20)
        assert not client.is_open
        with pytest.raises(CacheClosed):
            client.statistics()
    threads_ended()
    assert threading.active_count() == before


@pytest.mark.parametrize("what", ["thread", "loop"])
def test_a_blocking_object_for_which_there_is_no_loop(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = featcache.blocking.create(settings=small())

    def refused(*_: object) -> None:
        raise (
            RuntimeError("can't start new thread") if what == "thread" else OSError(24, "too many")
        )

    with monkeypatch.context() as patch:
        if what == "thread":
            patch.setattr(threading.Thread, "start", refused)
        else:
            patch.setattr(asyncio, "new_event_loop", refused)
        with pytest.raises(BackendUnavailable, match="ulimit"):
            cache.open()
    with cache:  # nothing is left of it
        cache.put(filled(1))


@pytest.mark.parametrize("on_full", [[], {}, None, 3, "Wait"], ids=repr)
def test_a_policy_that_is_none(on_full: Any) -> None:
    with (
        featcache.blocking.create(settings=small()) as owner,
        featcache.blocking.connect(owner.endpoint, settings=small()) as client,
    ):
        client.put(filled(KIB))
        for user in (owner, client):
            with pytest.raises(SettingsError, match="on_full"):
                user.put(filled(KIB), on_full=on_full)


def test_what_help_says_of_the_blocking_functions() -> None:
    for make, kind in (
        (featcache.blocking.create, featcache.blocking.FeatureCache),
        (featcache.blocking.connect, featcache.blocking.FeatureClient),
    ):
        assert inspect.signature(make).return_annotation is kind
        assert "async with" not in (make.__doc__ or "")


def test_the_public_objects_have_the_api_and_nothing_else() -> None:
    shared = {
        *("open", "aclose", "is_open", "statistics", "get", "get_nowait", "borrow", "release"),
        *("discard", "put", "get_or_put", "contains", "contains_nowait", "evict", "pin", "unpin"),
        *("share", "get_many", "put_many", "contains_many"),
    }
    blocking = shared - {"aclose"} | {"close"}

    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(FeatureCache) == shared | {
        *("address", "endpoint", "pressure", "put_nowait", "drain"),
    }
    bound = {"is_attached", "wait_attached"}
    assert public(FeatureClient) == shared | bound
    assert public(featcache.blocking.FeatureCache) == blocking | {
        *("address", "endpoint", "pressure", "put_nowait", "drain"),
    }
    assert public(featcache.blocking.FeatureClient) == blocking | bound
    observer = {"open", "aclose", "is_open", "endpoint", "snapshot", "keys", "map", "evict"}
    assert public(featcache.Observer) == observer
    assert public(featcache.blocking.Observer) == observer - {"aclose"} | {"close"}


@pytest.mark.parametrize(("noun", "verb"), [("cache", "create"), ("client", "connect")])
def test_a_fork_is_told_what_to_do(noun: str, verb: str) -> None:
    life: Lifecycle[Any] = Lifecycle(noun, verb)
    life.forget()
    told = str(life.closed())
    assert f"forked from the one that opened the {noun}" in told
    assert f"{verb} another in this process, after the fork" in told
