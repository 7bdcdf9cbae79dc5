"""A client with ``reconnect=True`` outlives its owner: calls fail meanwhile, then go on with the next."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import featcache
import featcache.blocking
from featcache import (
    AttachRefused,
    CacheClosed,
    FeatureCache,
    FeatureClient,
    OwnerLost,
    OwnerUnreachable,
    SettingsError,
    UnknownPool,
    events,
)
from support.caches import KIB, filled, full, raw, small, tensor, until

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return str(tmp_path / "pool.sock")


@pytest.fixture
def heard() -> Iterator[list[Any]]:
    """What clients and owners tell."""
    told: list[Any] = []
    events.add_hook(told.append)
    yield told
    events.remove_hook(told.append)


def owner_at(endpoint: str, **changes: Any) -> FeatureCache:
    return featcache.create(endpoint=endpoint, settings=small(**changes))


def client_of(endpoint: str, **given: Any) -> FeatureClient:
    settings = small(reconnect_interval=0.02)
    return featcache.connect(endpoint, reconnect=True, settings=settings, **given)


def of(heard: list[Any], kind: type[events.Event]) -> list[Any]:
    return [event for event in heard if type(event) is kind]


def attached(client: FeatureClient) -> bool:
    return client.is_attached


async def gone(client: FeatureClient) -> None:
    await until(lambda: not client.is_attached)


async def round_trip(client: FeatureClient, value: int) -> None:
    """Put, with and without a key, and read it again."""
    copied = tensor(await client.get(await client.put(filled(KIB, value))))
    assert raw(copied) == bytes([value]) * KIB
    await client.put(filled(KIB, value), key="k")
    assert client.contains_nowait("k")
    assert raw(tensor(await client.get("k"))) == bytes([value]) * KIB


async def test_an_owner_may_come_after_its_client(endpoint: str, heard: list[Any]) -> None:
    async with client_of(endpoint) as client:
        assert not attached(client)
        calls: list[Callable[[], Any]] = [
            lambda: client.get("k"),
            lambda: client.get("k", timeout=1),
            lambda: client.contains("k"),
            lambda: client.put(filled(8)),
            lambda: client.put(filled(8), key="k"),
            lambda: client.put_many([filled(8)]),
            lambda: client.get_many(["k"]),
            lambda: client.contains_many(["k"]),
            lambda: client.get_or_put("k", lambda: filled(8)),
            lambda: client.share("k", readers=1),
            lambda: client.evict("k"),
            lambda: client.pin("k"),
        ]
        for call in calls:
            with pytest.raises(OwnerLost):
                await call()
        for look in (lambda: client.contains_nowait("k"), lambda: client.get_nowait("k")):
            with pytest.raises(OwnerLost):
                look()
        with pytest.raises(OwnerLost), client.borrow("k"):
            pass
        async with owner_at(endpoint):
            await client.wait_attached(timeout=30)
            assert attached(client)
            await round_trip(client, 3)
            assert len(of(heard, events.OwnerGone)) == 1
    assert len(of(heard, events.OwnerBack)) == 1


async def test_a_client_goes_on_with_the_next_owner(endpoint: str, heard: list[Any]) -> None:
    async with client_of(endpoint, name="reader") as client:
        lost = []
        for value in range(1, 6):
            async with owner_at(endpoint) as owner:
                await client.wait_attached(timeout=30)
                await round_trip(client, value)
                lost.append(await owner.put(filled(8), readers=["reader"]))
                assert raw(tensor(await client.get(lost[-1]))) == bytes(8)
                lost[-1] = await owner.put(filled(8), readers=["reader"])
            await gone(client)
            with pytest.raises(OwnerLost):
                await client.put(filled(8))
            with pytest.raises(OwnerLost):
                await client.get(lost[-1])
        async with owner_at(endpoint):
            await client.wait_attached(timeout=30)
            for ref in lost:
                with pytest.raises(OwnerLost):
                    await client.get(ref)
                with pytest.raises(OwnerLost):
                    client.get_nowait(ref)
            assert client.statistics().gets == 5 * 3
            assert client.statistics().puts == 5 * 2
            assert len(of(heard, events.OwnerGone)) == 1 + 5
    assert len(of(heard, events.OwnerBack)) == 6
    assert all(event.away_s > 0 for event in of(heard, events.OwnerBack))


async def test_calls_that_wait_end_with_their_owner(endpoint: str) -> None:
    async with client_of(endpoint) as client:
        async with owner_at(endpoint) as owner:
            await client.wait_attached(timeout=30)
            await full(owner)
            waits: list[Any] = [
                asyncio.ensure_future(client.put(filled(KIB))),
                asyncio.ensure_future(client.get("k", timeout=60)),
            ]
            await until(lambda: owner.statistics().waiters == 1)
        for wait in waits:
            with pytest.raises(OwnerLost):
                await wait
        async with owner_at(endpoint):
            await client.wait_attached(timeout=30)
            await round_trip(client, 7)


async def test_a_view_of_the_lost_pool_stays_right(endpoint: str) -> None:
    async with client_of(endpoint) as client:
        async with owner_at(endpoint) as owner:
            await client.wait_attached(timeout=30)
            ref = await owner.put(filled(KIB, 5))
            borrowed = client.borrow(ref)
            view = tensor(await borrowed.__aenter__())
            closing = asyncio.ensure_future(owner.aclose())
            await gone(client)
            await closing
        async with owner_at(endpoint):
            await client.wait_attached(timeout=30)
            await round_trip(client, 6)
            assert bool((view == 5).all())
            await borrowed.__aexit__(None, None, None)


async def test_a_client_that_is_refused_says_so_once_and_goes_on(
    endpoint: str, heard: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(endpoint, name="rank0") as client:
        async with owner_at(endpoint):
            await client.wait_attached(timeout=30)
        await gone(client)
        pause = asyncio.Event()
        monkeypatch.setattr(client._opened().registry, "attach", _held(pause))
        async with owner_at(endpoint):
            async with featcache.connect(endpoint, name="rank0"):
                monkeypatch.undo()
                pause.set()
                await until(lambda: bool(of(heard, events.ReconnectRefused)))
                with pytest.raises(OwnerUnreachable, match="no owner came back"):
                    await client.wait_attached(timeout=0.2)  # tries go on meanwhile
            await client.wait_attached(timeout=30)
            await round_trip(client, 1)
    assert len(of(heard, events.ReconnectRefused)) == 1
    assert "rank0" in of(heard, events.ReconnectRefused)[0].reason


def _held(pause: asyncio.Event) -> Any:
    async def attach(endpoint: str, *, sibling: bool = False) -> None:
        await pause.wait()
        raise OwnerUnreachable("held by the test")

    return attach


async def test_an_owner_that_is_lost_in_the_step_of_the_attach_is_tried_again(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(endpoint) as client:
        registry = client._opened().registry
        real, lost = registry.attach, 0

        async def attach(endpoint: str, *, sibling: bool = False) -> Any:
            nonlocal lost
            connection = await real(endpoint, sibling=sibling)
            if lost < 2:
                lost += 1
                registry._on_lost(connection.attachment.pool_id, "cut by the test")
                connection.link.close()
            return connection

        monkeypatch.setattr(registry, "attach", attach)
        async with owner_at(endpoint):
            await client.wait_attached(timeout=30)
            assert lost == 2
            await round_trip(client, 2)


async def test_a_client_closes_while_its_owner_is_away(endpoint: str) -> None:
    client = client_of(endpoint)
    async with client:
        pass
    assert not attached(client)
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert tasks == []


async def test_who_waits_for_an_owner_is_told_that_the_client_was_closed(endpoint: str) -> None:
    client = await client_of(endpoint).open()
    waits = asyncio.create_task(client.wait_attached())
    await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(CacheClosed):
        await asyncio.wait_for(waits, 30)


@pytest.mark.parametrize("reconnect", [False, True])
async def test_a_spill_pool_that_is_lost_alone_is_attached_anew(
    endpoint: str, *, reconnect: bool
) -> None:
    settings = small(spill_always=True)
    async with (
        featcache.create(endpoint=endpoint, settings=small(), spill="1MiB"),
        featcache.connect(endpoint, reconnect=reconnect, settings=settings) as client,
        featcache.create(settings=small()) as other,
    ):
        spilled = await client.put(filled(8), on_full="spill")
        registry = client._opened().registry
        (spill,) = (each for each in registry.connections if each is not registry.peek_bound())
        spill.link._lose("the connection broke")
        assert attached(client)
        with pytest.raises(UnknownPool):  # not OwnerLost: this client's owner is there
            await client.get(await other.put(filled(8)))
        await client.put(filled(8), key="k")
        await client.pin("k")
        assert raw(tensor(await client.get(spilled))) == bytes(8)


async def test_an_owner_that_refuses_the_first_attach_fails_the_open(endpoint: str) -> None:
    async with owner_at(endpoint), featcache.connect(endpoint, name="rank0"):
        with pytest.raises(AttachRefused, match="rank0"):
            await client_of(endpoint, name="rank0").open()


async def test_a_client_that_does_not_reconnect_stays_lost(endpoint: str) -> None:
    async with owner_at(endpoint):
        client = await featcache.connect(endpoint).open()
        await client.wait_attached()
    await gone(client)
    async with owner_at(endpoint):
        with pytest.raises(OwnerLost):
            await client.wait_attached(timeout=1)
        with pytest.raises(OwnerLost):
            await client.put(filled(8))
    await client.aclose()


async def test_an_endpoint_is_needed_to_come_back_to() -> None:
    with pytest.raises(SettingsError, match="endpoint"):
        featcache.connect(reconnect=True)
    with pytest.raises(SettingsError, match="True or False"):
        featcache.connect("/tmp/x", reconnect="yes")  # type: ignore[arg-type]  # noqa: S108
    async with featcache.connect() as client:
        with pytest.raises(SettingsError, match="connected"):
            await client.wait_attached()


async def test_nothing_is_kept_of_the_owners_that_were(endpoint: str) -> None:
    async with client_of(endpoint) as client:
        for _ in range(3):
            async with owner_at(endpoint):
                await client.wait_attached(timeout=30)
                await client.put(torch.zeros(8))
            await gone(client)
        engine = client._opened()
        registry = engine.registry
        await until(lambda: not registry._tasks)
        assert not registry.connections
        assert not registry._siblings
        assert not engine.puts._writers
