"""Reads by way of host memory: the owner copies, the client reads the copy, and nothing is left of it."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from structlog.testing import capture_logs

import featcache
from featcache import (
    FeatureCache,
    FeatureClient,
    FeatureRef,
    GetTimeout,
    SettingsError,
    StaleRef,
    UnknownPool,
)
from featcache.memory.unreachable import UnreachableSlab
from featcache.session.copier import place
from support.caches import KIB, MIB, filled, small, tensor, tensors, until
from support.hosted import all_spent, has_host_pool, holds, relayed, store, through_host

BASE = torch.arange(720, dtype=torch.float32)
FEATURES: dict[str, torch.Tensor] = {
    "scalar": torch.tensor(3.25),
    "empty": torch.empty(0, 4, dtype=torch.int16),
    "bf16": BASE.to(torch.bfloat16),
    "strided": BASE.view(24, 30).T,
    "conj": torch.complex(BASE, -BASE).conj(),
    "bool": BASE > 100,
}


def unmapped(client: FeatureClient) -> int:
    """How many pools a client reads through the host."""
    handles = client._opened().registry.connections
    return sum(isinstance(handle.attachment.mapping, UnreachableSlab) for handle in handles)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("inline_bytes", [0, 4 * MIB], ids=["thread", "inline"])
async def test_what_comes_back(name: str, inline_bytes: int, no_leaks: None) -> None:
    value = FEATURES[name]
    sizes: dict[str, Any] = {"inline_bytes": inline_bytes}
    async with relayed(client=sizes, **sizes) as (owner, client):
        assert unmapped(client) == 1
        assert not has_host_pool(owner), "made when it is first needed"
        copy = tensor(await client.get(await owner.put(value)))
        assert torch.equal(copy, value)
        assert (copy.dtype, copy.shape) == (value.dtype, value.shape)
        assert copy.is_contiguous()
        async with client.borrow(await owner.put(value)) as view:
            assert torch.equal(tensor(view), value)
        out = torch.empty(value.shape, dtype=value.dtype)
        assert await client.get(await owner.put(value), out=out) is out
        assert torch.equal(out, value)
        assert tensor(await client.get(await owner.put(value), device="cpu")).is_cpu
        await all_spent(owner)
        now = owner.statistics()
        assert (now.relayed, now.gets, now.reads_paid, now.expired) == (4, 0, 4, 0)
        assert client.statistics().gets == 4
        assert client.statistics().sessions == 2
        assert store(owner).expired == 0


async def test_a_dict() -> None:
    async with relayed() as (owner, client):
        ref = FeatureRef.from_bytes((await owner.put(FEATURES, readers=2)).to_bytes())
        out = {name: torch.empty(v.shape, dtype=v.dtype) for name, v in FEATURES.items()}
        async with client.borrow(ref) as views:
            copies = tensors(await client.get(ref, out=out))
            for name, value in FEATURES.items():
                assert torch.equal(tensors(views)[name], value)
                assert torch.equal(copies[name], value)
            assert list(tensors(views)) == list(FEATURES)
        await owner.release(ref)
        await all_spent(owner)


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
async def test_it_is_said_once(bound: bool) -> None:
    with capture_logs() as logs:
        async with (
            featcache.create(settings=small()) as owner,
            featcache.connect(owner.endpoint if bound else None, settings=through_host()) as client,
        ):
            for value in range(5):
                ref = await owner.put(filled(KIB, value))
                assert torch.equal(tensor(await client.get(ref)), filled(KIB, value))
            pool_id = ref.pool_id.hex()
            await all_spent(owner)
    (entry,) = [entry for entry in logs if entry["event"] == "featcache.peer.unreachable"]
    assert (entry["pool"], entry["log_level"]) == (pool_id, "warning")
    assert entry["device"] == "cpu" or torch.cuda.is_available()
    assert "through_host" in entry["reason"]


async def test_a_borrow_is_a_copy_that_is_paid_on_leaving() -> None:
    async with relayed() as (owner, client):
        ref = await owner.put(filled(KIB, 3))
        borrow = client.borrow(ref)
        copy = tensor(await borrow.__aenter__())
        await until(lambda: store(owner).table.used == 0)  # the copy in the host pool is gone
        assert owner.statistics().slots_used == 1
        assert holds(client) == 1
        copy.fill_(9)  # it is the client's own
        await borrow.__aexit__(None, None, None)
        await all_spent(owner)
        with pytest.raises(StaleRef):
            await client.get(ref)


async def test_release_and_discard_need_no_copy() -> None:
    async with relayed() as (owner, client):
        await client.release(await owner.put(filled(KIB)))
        await client.discard(await owner.put(filled(KIB)))
        await all_spent(owner)
        assert owner.statistics().relayed == 0
        assert not has_host_pool(owner)


async def test_the_forms_without_await_say_that_they_can_not() -> None:
    async with relayed() as (owner, client), featcache.connect(settings=through_host()) as other:
        ref = await owner.put(filled(KIB, 2))
        with pytest.raises(GetTimeout, match="another way"):
            client.get_nowait(ref)
        with pytest.raises(GetTimeout, match="another way"), client.borrow(ref):
            pass
        with pytest.raises(UnknownPool):
            other.get_nowait(ref)
        assert holds(client) == 0
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 2))
        await all_spent(owner)


async def test_stale_refs_and_outs_that_do_not_fit() -> None:
    async with relayed() as (owner, client):
        ref = await owner.put(filled(KIB, 2), readers=2)
        for out in (torch.empty(KIB), torch.empty(1, dtype=torch.uint8), {"a": filled(KIB)}):
            with pytest.raises(SettingsError):
                await client.get(ref, out=out)
        with pytest.raises(SettingsError, match="not both"):
            await client.get(ref, out=filled(KIB), device="cpu")
        await client.get(ref)
        for use in (client.get(ref), client.release(ref), client.borrow(ref).__aenter__()):
            with pytest.raises(StaleRef):
                await use
        await owner.release(ref)
        await all_spent(owner)
        gone = await owner.put(filled(KIB))
        await owner.discard(gone)
        with pytest.raises(StaleRef):
            await client.get(gone)
        assert owner.statistics().relayed == 1
        await all_spent(owner)


@pytest.mark.parametrize("how", ["get", "borrow", "release"])
async def test_after_the_owner_itself_has_read(how: str) -> None:
    """The owner's own read of a ref is no reason not to copy it for others."""
    async with relayed() as (owner, client):
        ref = await owner.put(filled(KIB, 4), readers=2)
        if how == "get":
            await owner.get(ref)
        elif how == "borrow":
            async with owner.borrow(ref):
                pass
        else:
            await owner.release(ref)
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 4))
        await all_spent(owner)


async def test_while_the_owner_itself_reads() -> None:
    async with relayed() as (owner, client):
        ref = await owner.put(filled(KIB, 4), readers=2)
        async with owner.borrow(ref) as view:
            assert torch.equal(tensor(await client.get(ref)), filled(KIB, 4))
            assert torch.equal(tensor(view), filled(KIB, 4))
        await all_spent(owner)


async def test_names_owe_whichever_way_they_read() -> None:
    async with (
        relayed(name="tp0") as (owner, tp0),
        featcache.connect(owner.endpoint, name="tp1", settings=small()) as tp1,
    ):
        ref = await owner.put(filled(KIB, 4), readers=["tp0", "tp1"])
        for reader in (tp0, tp1):
            assert torch.equal(tensor(await reader.get(ref)), filled(KIB, 4))
        await all_spent(owner)
        assert owner.statistics().relayed == 1


async def test_many_readers_at_once_and_some_that_need_no_detour() -> None:
    async with relayed(capacity=256 * KIB) as (owner, client):
        others = [featcache.connect(owner.endpoint, settings=through_host()) for _ in range(3)]
        direct = featcache.connect(owner.endpoint, settings=small())
        readers = [client, *others, direct]
        for reader in (*others, direct):
            await reader.open()

        async def read(reader: FeatureClient, ref: FeatureRef, value: int) -> None:
            assert torch.equal(tensor(await reader.get(ref)), filled(16 * KIB, value))

        async with asyncio.TaskGroup() as group:
            for value in range(30):
                ref = await owner.put(filled(16 * KIB, value), readers=len(readers))
                for reader in readers:
                    group.create_task(read(reader, ref, value))
        await all_spent(owner)
        assert owner.statistics().relayed == 120
        for reader in (*others, direct):
            await reader.aclose()


async def test_through_a_host_slab_that_spills_as_well() -> None:
    """One host pool serves both: what is spilled is mapped there, what is relayed copied there."""
    settings = small(capacity=64 * KIB, segment=64 * KIB)
    async with (
        featcache.create(spill="4MiB", settings=settings) as owner,
        featcache.connect(owner.endpoint, settings=through_host()) as client,
    ):
        here = await owner.put(filled(64 * KIB, 1), on_full="spill")
        there = await owner.put(filled(64 * KIB, 2), on_full="spill")
        assert torch.equal(tensor(await client.get(there)), filled(64 * KIB, 2))
        assert owner.statistics().relayed == 0
        assert torch.equal(tensor(client.get_nowait(await spilled(owner))), filled(KIB, 3))
        assert torch.equal(tensor(await client.get(here)), filled(64 * KIB, 1))
        assert (owner.statistics().relayed, owner.statistics().spilled) == (1, 2)
        assert unmapped(client) == 1
        await all_spent(owner)


async def spilled(owner: FeatureCache) -> FeatureRef:
    return await owner.put(filled(KIB, 3), on_full="spill")


def test_with_no_loop(no_leaks: None) -> None:
    with (
        featcache.blocking.create(settings=small()) as owner,
        featcache.blocking.connect(owner.endpoint, settings=through_host()) as client,
        featcache.blocking.connect(settings=through_host()) as unbound,
    ):
        for reader in (client, unbound):
            ref = owner.put(BASE)
            assert torch.equal(tensor(reader.get(ref)), BASE)
            with reader.borrow(owner.put({"a": BASE})) as view:
                assert torch.equal(tensors(view)["a"], BASE)
            out = torch.empty(720)
            assert reader.get(owner.put(BASE), out=out) is out
            assert torch.equal(out, BASE)
            reader.release(owner.put(BASE))
            with pytest.raises(StaleRef):
                reader.get(ref)
        assert owner.statistics().relayed == 6


async def test_a_client_with_one_attachment_has_room_for_the_pool_beside_it() -> None:
    async with relayed(client={"attachments": 1}) as (owner, client):
        for value in range(3):
            ref = await owner.put(filled(KIB, value))
            assert torch.equal(tensor(await client.get(ref)), filled(KIB, value))
        await all_spent(owner)


async def test_the_whole_of_a_relayed_read_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relayed() as (owner, client):
        ref = await owner.put(filled(KIB, 2))
        begun = client._opened().reader._await_ready

        async def late(*arguments: Any) -> Any:
            await asyncio.sleep(0.9)
            return await begun(*arguments)

        async def never(_: FeatureRef) -> FeatureRef:
            await asyncio.sleep(60)
            raise AssertionError

        monkeypatch.setattr(client._opened().reader, "_await_ready", late)
        monkeypatch.setattr(client._opened().registry, "relay", never)
        for use in (client.get(ref, timeout=1.0), client.borrow(ref, timeout=1.0).__aenter__()):
            began_s = time.monotonic()
            with pytest.raises(GetTimeout, match="still owed"):
                await use
            assert time.monotonic() - began_s < 1.8
        assert holds(client) == 0
        monkeypatch.undo()
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 2))


def test_the_tensors_of_one_out_are_on_one_device() -> None:
    here, there = (
        cast("torch.Tensor", SimpleNamespace(device=torch.device(name)))
        for name in ("cpu", "cuda:1")
    )
    assert place([there, there]) == torch.device("cuda:1")
    with pytest.raises(SettingsError, match="one device"):
        place([here, there])
