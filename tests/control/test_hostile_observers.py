"""An owner among observers that do not keep to the protocol: it serves the others, and loses nothing."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

import featcache
from control.peers import Peer, frame, own_pidfd
from featcache import FeatureCache
from featcache.control import messages, observers
from featcache.control.messages import VERSION, Hello, encode
from featcache.control.observers import Allowance
from featcache.control.observing import (
    Evict,
    ListKeys,
    ListSessions,
    MapSlab,
    Observe,
)
from support.caches import KIB, filled, small, spent, until

pytestmark = pytest.mark.usefixtures("no_leaks")

FORBIDDEN: Final = (
    messages.Find(1, b"k"),
    messages.Find(1, b"k", waits=True, makes=True),
    messages.KeyCommand(1, b"k", "pin"),
    messages.KeyCommand(1, b"k", "unpin"),
    messages.KeyCommand(1, b"k", "evict"),
    messages.Reserve(1, KIB, 1, None, None, waits=True),
    messages.OpenForWriting(1),
    messages.Discard(1, 0, 1),
    messages.Share(1, b"k", 1, None),
    messages.HostPool(1),
    messages.TailUnmapped(1),
    messages.Hello(VERSION, None, "cpu"),
)
"""What sessions may say."""


def observer_hello(version: int = VERSION, **changes: Any) -> bytes:
    return encode(Hello(version, None, "", kind="observer", **changes))


@contextmanager
def attached(owner: FeatureCache, **changes: Any) -> Iterator[Peer]:
    with Peer.connect(owner.endpoint) as peer, own_pidfd() as pidfd:
        peer.send(frame(observer_hello(**changes), 1), [pidfd])
        yield peer


def is_pidfd(fd: int) -> bool:
    return "pidfd" in str(Path(f"/proc/self/fd/{fd}").readlink())


def observers_of(owner: FeatureCache) -> int:
    assert owner._life.engine is not None
    return len(owner._life.engine.main.server.observers.peers)


async def serves(owner: FeatureCache) -> None:
    async with (
        featcache.connect(owner.endpoint) as client,
        featcache.observe(owner.endpoint) as observer,
    ):
        await client.get(await owner.put(filled(KIB)))
        assert (await observer.snapshot()).statistics.sessions == 1
    await spent(owner)


async def test_an_observer_is_given_one_descriptor_and_no_page() -> None:
    async with featcache.create(settings=small()) as owner:
        with attached(owner) as peer:
            welcome = await peer.message()
            assert welcome["type"] == "observer"
            (fd,) = peer.received
            assert is_pidfd(fd)
            assert owner._life.engine is not None
            assert owner._life.engine.pool.pages == {}
            assert owner.statistics().sessions == 0
        await serves(owner)


@pytest.mark.parametrize("message", FORBIDDEN, ids=lambda message: type(message).__name__)
async def test_what_only_a_session_may_say_ends_an_observer(message: Any) -> None:
    async with featcache.create(settings=small()) as owner:
        await owner.put(filled(KIB), key="k")
        before = owner.statistics()
        with attached(owner) as peer:
            await peer.message()
            peer.send(frame(encode(message)))
            await peer.hung_up()
        assert owner.statistics() == before
        assert observers_of(owner) == 0
        await owner.evict("k")
        await serves(owner)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "observe"},
        {"type": "observe", "request": -1},
        {"type": "list_sessions", "request": 1, "after": -2},
        {"type": "list_sessions", "request": 1, "after": (1 << 64) - 1},
        {"type": "list_keys", "request": 1, "order": "size", "after": "", "limit": 1 << 20},
        {"type": "list_keys", "request": 1, "order": "size", "after": "x" * 4000, "limit": 1},
        {"type": "list_keys", "request": 1, "order": "color", "after": "", "limit": 1},
        {"type": "map_slab", "request": 1, "cells": 0},
        {"type": "map_slab", "request": 1, "cells": 1 << 30},
        {"type": "evict", "request": 1, "key": b""},
        {"type": "evict", "request": 1, "key": b"x" * 2000},
        {"type": "nonsense"},
    ],
)
async def test_a_request_out_of_bounds_ends_an_observer(fields: dict[str, Any]) -> None:
    async with featcache.create(settings=small()) as owner:
        with attached(owner) as peer:
            await peer.message()
            peer.send(frame(msgspec.msgpack.encode(fields)))
            await peer.hung_up()
        await serves(owner)


async def test_a_request_with_a_descriptor_ends_an_observer() -> None:
    async with featcache.create(settings=small()) as owner:
        with attached(owner) as peer, own_pidfd() as pidfd:
            await peer.message()
            peer.send(frame(encode(Observe(1)), 1), [pidfd])
            await peer.hung_up()
        await serves(owner)


async def test_a_session_may_not_ask_what_observers_ask() -> None:
    async with featcache.create(settings=small()) as owner:
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            assert (await peer.message())["type"] == "welcome"
            peer.send(frame(encode(Observe(1))))
            await peer.hung_up()
        await until(lambda: owner.statistics().sessions <= 1)


async def test_an_observer_of_another_version_is_refused() -> None:
    async with featcache.create(settings=small()) as owner:
        with attached(owner, version=VERSION + 1) as peer:
            refused = await peer.message()
            assert refused["type"] == "refused"
            assert f"version {VERSION + 1}" in refused["reason"]
            await peer.hung_up()
        await serves(owner)


async def test_a_second_request_before_the_answer_ends_an_observer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with featcache.create(settings=small()) as owner:
        with attached(owner) as peer:
            await peer.message()
            assert owner._life.engine is not None
            table = owner._life.engine.main.server.observers
            with monkeypatch.context() as patch:
                patch.setattr(table, "_begin", lambda *_: None)  # it is yet to be answered
                peer.send(frame(encode(Observe(1))) + frame(encode(Observe(2))))
                await peer.hung_up()
        await serves(owner)


async def test_an_observer_that_reads_no_answers_is_dropped() -> None:
    async with featcache.create(settings=small()) as owner:
        for index in range(32):
            await owner.put(filled(KIB), key=f"{index:02}" + "x" * 1000)
        with attached(owner) as peer:
            await peer.message()
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            asked = 0
            assert owner._life.engine is not None
            table = owner._life.engine.main.server.observers
            monkey = pytest.MonkeyPatch()
            with monkey.context() as patch:
                patch.setattr(table._allowance, "delay_s", lambda _: 0.0)
                while observers_of(owner):
                    asked += 1
                    assert asked < 1000, "its answers pile up without end"
                    try:
                        peer.send(frame(encode(ListKeys(asked, "size", "", 32))))
                    except (BlockingIOError, BrokenPipeError):
                        break
                    await until(lambda: not table._busy)
            await until(lambda: not observers_of(owner))
        for index in range(32):
            await owner.evict(f"{index:02}" + "x" * 1000)
        await serves(owner)


def test_a_flood_of_requests_costs_an_owner_a_small_share_of_its_time() -> None:
    """Time here is the test's own: a request costs a millisecond, and nothing else takes any."""
    now_s, spent_s = 0.0, 0.0
    allowance = Allowance(now_s)
    while now_s < 100.0:
        now_s += allowance.delay_s(now_s)
        allowance.spend(0.001)
        now_s += 0.001
        spent_s += 0.001
    assert spent_s <= (observers._SHARE * now_s + observers._BURST_S) * 1.01


async def test_a_delayed_request_is_answered_later_and_dropped_with_its_observer() -> None:
    async with featcache.create(settings=small()) as owner:
        assert owner._life.engine is not None
        table = owner._life.engine.main.server.observers
        async with featcache.observe(owner.endpoint) as observer:
            table._allowance.spend(observers._BURST_S + 0.001)
            assert (await observer.snapshot()).observers == 1
        with attached(owner) as peer:
            await peer.message()
            table._allowance.spend(10.0)
            peer.send(frame(encode(MapSlab(1, 8))))
            await until(lambda: table._busy)
        await until(lambda: not table._busy and not table.peers)
        table._allowance.spend(-20.0)
        await serves(owner)


@pytest.mark.parametrize(
    "request_", [Observe(1), ListSessions(1, -1), ListKeys(1, "hits", "", 9), MapSlab(1, 9)]
)
async def test_an_observer_that_hangs_up_in_the_middle_leaves_nothing(request_: Any) -> None:
    async with featcache.create(settings=small()) as owner:
        with attached(owner) as peer:
            await peer.message()
            peer.send(frame(encode(request_)))
        await until(lambda: not observers_of(owner))
        await serves(owner)


async def test_an_answer_that_fails_is_told_and_the_owner_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with featcache.create(settings=small()) as owner:
        loop, told = asyncio.get_running_loop(), list[dict[str, Any]]()
        loop.set_exception_handler(lambda _, context: told.append(context))
        assert owner._life.engine is not None
        with monkeypatch.context() as patch:
            patch.setattr(owner._life.engine.pool.debtors, "holders", lambda: 1 // 0)
            async with featcache.observe(owner.endpoint) as observer:
                with pytest.raises(featcache.FeatcacheError, match="its log says why"):
                    await observer.snapshot()
        assert isinstance(told[0]["exception"], ZeroDivisionError)
        told.clear()
        loop.set_exception_handler(None)
        await serves(owner)


async def test_an_evict_by_an_observer_is_any_session_s() -> None:
    async with featcache.create(settings=small()) as owner:
        await owner.put(filled(KIB), key="k")
        with attached(owner) as peer:
            await peer.message()
            peer.send(frame(encode(Evict(7, b"k"))))
            reply = await peer.message()
            assert (reply["request"], reply["flag"]) == (7, True)
        assert not await owner.contains("k")
