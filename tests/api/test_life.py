"""Opening, closing, using what is not open, and where an owner listens."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

import featcache
from featcache import (
    AttachRefused,
    CacheClosed,
    FeatureCache,
    FeatureClient,
    FeatureRef,
    OwnerLost,
    OwnerUnreachable,
    SettingsError,
    UnknownPool,
)
from support.caches import KIB, filled, pair, small, spent, until


@pytest_asyncio.fixture
async def ref() -> AsyncIterator[FeatureRef]:
    async with pair() as (owner, _):
        yield await owner.put(filled(KIB))


async def use_owner(cache: FeatureCache, ref: FeatureRef) -> None:
    value = filled(1)
    calls: list[Callable[[], Any]] = [
        lambda: cache.put_nowait(value),
        lambda: cache.get_nowait(ref),
        cache.statistics,
        lambda: cache.endpoint,
        lambda: cache.pressure.level,
        lambda: cache.borrow(ref).__enter__(),
    ]
    for call in calls:
        with pytest.raises(CacheClosed):
            call()
    awaited: list[Callable[[], Any]] = [
        lambda: cache.put(value),
        lambda: cache.get(ref),
        lambda: cache.release(ref),
        lambda: cache.discard(ref),
        lambda: cache.pressure.below("high"),
        lambda: cache.borrow(ref).__aenter__(),
    ]
    for call in awaited:
        with pytest.raises(CacheClosed):
            await call()


async def use_client(client: FeatureClient, ref: FeatureRef) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: client.get_nowait(ref),
        client.statistics,
        lambda: client.borrow(ref).__enter__(),
    ]
    for call in calls:
        with pytest.raises(CacheClosed):
            call()
    awaited: list[Callable[[], Any]] = [
        lambda: client.get(ref),
        lambda: client.release(ref),
        lambda: client.discard(ref),
        lambda: client.borrow(ref).__aenter__(),
    ]
    for call in awaited:
        with pytest.raises(CacheClosed):
            await call()


async def test_use_before_opening_and_after_closing(ref: FeatureRef) -> None:
    owner = featcache.create(settings=small())
    await use_owner(owner, ref)
    assert "not opened" in repr(owner)
    async with owner:
        assert owner.endpoint in repr(owner)
        client = featcache.connect(owner.endpoint, name="tp0")
        await use_client(client, ref)
        async with client:
            assert "tp0" in repr(client)
        await use_client(client, ref)
    await use_owner(owner, ref)
    assert "closed" in repr(owner)


async def test_a_cache_opens_once_and_closes_as_often_as_one_likes() -> None:
    owner = featcache.create(settings=small())
    await owner.aclose()  # not open, which is no error
    async with owner:
        with pytest.raises(CacheClosed, match="create another"):
            await owner.open()
        client = featcache.connect(owner.endpoint)
        async with client:
            with pytest.raises(CacheClosed, match="connect another"):
                await client.open()
            await client.aclose()
            await client.aclose()
        with pytest.raises(CacheClosed):
            await client.open()
        await owner.aclose()
        await owner.aclose()
    with pytest.raises(CacheClosed):
        await owner.open()


async def test_nothing_is_left(no_leaks: None) -> None:
    for _ in range(3):
        async with pair(inline_bytes=0) as (owner, client), featcache.connect() as other:
            ref = await owner.put(filled(KIB), readers=3)
            await client.get(ref)
            await other.get(ref)
            async with owner.borrow(ref):
                pass
            await spent(owner)
            await owner.put(filled(KIB))


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_nothing_is_left_if_the_owner_goes_first(who: str, no_leaks: None) -> None:
    owner = await featcache.create(settings=small()).open()
    client = await featcache.connect(owner.endpoint).open()
    ref = await owner.put(filled(KIB))
    with client.borrow(ref):
        await (owner if who == "owner" else client).aclose()
        await asyncio.sleep(0)
    await (client if who == "owner" else owner).aclose()


async def test_a_client_whose_owner_closed() -> None:
    async with pair() as (owner, client), featcache.connect() as unbound:
        ref = await owner.put(filled(KIB), readers=3)
        await unbound.get(ref)
        await owner.aclose()
        await until(lambda: client.statistics().sessions == unbound.statistics().sessions == 0)
        for call in (client.get, client.release, client.discard):
            with pytest.raises(OwnerLost):
                await call(ref)
        for reader in (client, unbound):
            with pytest.raises(OwnerLost):
                reader.get_nowait(ref)
            with pytest.raises(OwnerLost), reader.borrow(ref):
                pass
        with pytest.raises(OwnerUnreachable):  # it looks for the pool anew: nobody is there
            await unbound.get(ref)


async def test_another_pool_at_the_refs_endpoint(runtime_dir: Path) -> None:
    endpoint = str(runtime_dir / "same")
    async with featcache.connect() as client:
        async with featcache.create(endpoint=endpoint, settings=small()) as owner:
            ref = await owner.put(filled(KIB))
        async with featcache.create(endpoint=endpoint, settings=small()) as owner:
            with pytest.raises(UnknownPool):
                await client.get(ref)
            await client.get(await owner.put(filled(KIB)))


async def give_up(client: FeatureClient, attach: "asyncio.Task[Any]", turns: int, how: str) -> None:
    """Give an attach up after so many turns of the loop."""
    for _ in range(turns):
        await asyncio.sleep(0)
    if how == "cancel":
        attach.cancel()
    await client.aclose()
    await asyncio.wait([attach])
    assert not attach.cancelled() or how == "cancel"
    if not attach.cancelled():
        error = attach.exception()
        assert isinstance(error, CacheClosed | OwnerLost | AttachRefused | None)


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_an_attach_that_is_given_up_leaks_nothing(how: str, no_leaks: None) -> None:
    for turns in range(20):
        async with pair() as (owner, _):
            client = await featcache.connect(name="tp0").open()
            ref = await owner.put(filled(KIB))
            await give_up(client, asyncio.create_task(client.get(ref)), turns, how)


async def test_a_connect_that_is_cancelled_leaves_no_session() -> None:
    for turns in range(20):
        async with pair() as (owner, _):
            client = featcache.connect(owner.endpoint, name="tp0")
            await give_up(client, asyncio.create_task(client.open()), turns, "cancel")
            await until(lambda: owner.statistics().sessions == 1, 2.0)
            async with featcache.connect(owner.endpoint, name="tp0") as again:
                await again.release(await owner.put(filled(1)))
            await spent(owner)


async def test_a_pool_that_is_reached_by_two_spellings_of_its_endpoint(no_leaks: None) -> None:
    async with pair() as (owner, _):
        async with featcache.connect() as client:
            ref = await owner.put(filled(KIB))
            await client.get(ref)
            path = Path(owner.endpoint)
            crooked = f"{path.parent}/./{path.name}"
            forged = msgspec.structs.replace(ref, endpoint=crooked, pool_id=bytes(16))
            with pytest.raises(UnknownPool):
                await client.get(FeatureRef.from_bytes(forged.to_bytes()))
            await client.get(await owner.put(filled(KIB)))
        await spent(owner)
        await until(lambda: owner.statistics().sessions == 1)


# --- where an owner listens ----------------------------------------------------------------------


def modes(folder: Path) -> dict[str, int]:
    """The mode of a folder, under no name, and of all that is in it."""
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    return {"": stat.S_IMODE(folder.stat().st_mode)} | found


async def test_the_socket_is_this_users_alone(runtime_dir: Path) -> None:
    folder = runtime_dir / "featcache"
    async with featcache.create(settings=small()) as owner:
        path = Path(owner.endpoint)
        assert path.parent == folder
        assert modes(folder) == {"": 0o700, path.name: 0o600, f"{path.name}.lock": 0o600}
    assert modes(folder) == {"": 0o700}


async def test_an_endpoint_of_ones_own(runtime_dir: Path) -> None:
    endpoint = str(runtime_dir / ("x" * (106 - len(os.fsencode(runtime_dir)))))
    assert len(os.fsencode(endpoint)) == 107
    async with featcache.create(endpoint=endpoint, settings=small()) as owner:
        assert owner.endpoint == endpoint
        async with featcache.connect(endpoint) as client:
            await client.get(await owner.put(filled(1)))
    assert modes(runtime_dir) == {"": 0o700}


async def test_an_endpoint_in_use(runtime_dir: Path, no_leaks: None) -> None:
    endpoint = str(runtime_dir / "taken")
    async with featcache.create(endpoint=endpoint, settings=small()) as owner:
        with pytest.raises(SettingsError, match="in use"):
            async with featcache.create(endpoint=endpoint, settings=small()):
                pass
        async with featcache.connect(endpoint) as client:
            await client.get(await owner.put(filled(1)))


async def test_a_stale_socket_is_replaced(runtime_dir: Path) -> None:
    endpoint = runtime_dir / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(endpoint))
    async with (
        featcache.create(endpoint=str(endpoint), settings=small()) as owner,
        featcache.connect(str(endpoint)) as client,
    ):
        await client.get(await owner.put(filled(1)))


async def test_stale_sockets_of_the_default_folder_are_swept(runtime_dir: Path) -> None:
    folder = runtime_dir / "featcache"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "1-dead.sock"))
    (folder / "notes.txt").write_text("kept")
    (folder / "odd.sock").write_text("kept: no socket")
    async with featcache.create(settings=small()) as one, featcache.create(settings=small()) as two:
        found = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
        expected = {Path(one.endpoint).name, Path(two.endpoint).name, "notes.txt", "odd.sock"}
        assert found == expected


@pytest.mark.parametrize("kind", ["file", "folder", "missing folder", "not a folder"])
async def test_endpoints_that_no_owner_can_have(
    kind: str, runtime_dir: Path, no_leaks: None
) -> None:
    path = runtime_dir / "endpoint"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        if kind == "not a folder":
            path.write_text("precious")
        path /= "below"
    with pytest.raises(SettingsError, match="endpoint"):
        async with featcache.create(endpoint=str(path), settings=small()):
            pass
    if kind == "file":
        assert path.read_text() == "precious"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
async def test_a_folder_that_others_can_enter(mode: int, runtime_dir: Path, no_leaks: None) -> None:
    folder = runtime_dir / "featcache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(SettingsError, match="0700"):
        async with featcache.create(settings=small()):
            pass


async def test_a_folder_that_is_a_link_or_a_file(runtime_dir: Path, no_leaks: None) -> None:
    (runtime_dir / "elsewhere").mkdir(mode=0o700)
    folder = runtime_dir / "featcache"
    folder.symlink_to(runtime_dir / "elsewhere")
    with pytest.raises(SettingsError, match="0700"):
        await featcache.create(settings=small()).open()
    folder.unlink()
    folder.write_text("")
    with pytest.raises(SettingsError, match="XDG_RUNTIME_DIR"):
        await featcache.create(settings=small()).open()


async def test_with_no_runtime_folder(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(runtime_dir))
    async with featcache.create(settings=small()) as owner:
        assert Path(owner.endpoint).parent == runtime_dir / f"featcache-{os.geteuid()}"
