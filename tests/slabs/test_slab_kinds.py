"""The same on every kind of slab, and wherever its reader is: what goes in comes out."""

from typing import Any

import msgspec
import pytest
import torch

import featcache
from api.test_put_get import COMPLEX, PLAIN, SHAPES, pattern
from featcache import (
    BackendUnavailable,
    CacheClosed,
    FeatureTooLarge,
    GetTimeout,
    MalformedRef,
    SettingsError,
    StaleRef,
    UnknownPool,
)
from support.caches import KIB, filled, pair, raw, spent, tensor, tensors
from support.hosted import all_spent
from support.slabs import HOME, Place, Slab, at, bytes_of, copy_of, same, same_dict

BASE = torch.arange(720, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")  # torch's own, once
async def test_every_dtype(place: Place) -> None:
    device = place.slab.device
    async with place.open() as (owner, reader):
        for dtype in PLAIN:
            value = pattern(dtype, 20)
            there = at(value, device)
            for put, expected in (
                (there.view(4, 5), value.view(4, 5)),
                (there[3], value[3]),
                (value.view(5, 4), value.view(5, 4)),  # from the host, whatever the slab
            ):
                copy = tensor(await reader.get(await owner.put(put)))
                assert copy.device == place.device, dtype
                assert same(copy, expected), dtype
            copy = tensor(await reader.get(await owner.put(there[::2])))
            every_second = b"".join(
                raw(value)[2 * n * dtype.itemsize :][: dtype.itemsize] for n in range(10)
            )
            assert bytes_of(copy) == every_second, dtype
            async with reader.borrow(await owner.put(there)) as view:
                assert same(view, value), dtype
        await all_spent(owner)


@pytest.mark.parametrize("source", ["there", "host"])
async def test_every_shape(place: Place, source: str) -> None:
    """Scalars, empty ones, strided, conjugated and negated ones; from the slab's device or the host."""
    async with place.open(slots=256) as (owner, reader):
        for name, value in SHAPES.items():
            there = strided_on(value, place.slab.device) if source == "there" else value
            copy = tensor(await reader.get(await owner.put(there)))
            assert same(copy, value), name
            assert (copy.is_conj(), copy.is_neg(), copy.requires_grad) == (False, False, False)
            async with reader.borrow(await owner.put(there)) as view:
                assert same(view, value), name
        await all_spent(owner)


def strided_on(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device with the strides and flags that it has here."""
    if value.is_conj():
        return value.conj().to(device).conj()
    if value.numel() == 0 or value.is_neg():
        return value.to(device)
    size = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    whole = torch.as_strided(value.detach(), (size,), (1,), value.storage_offset())
    there = whole.clone().to(device)
    return there.as_strided(value.shape, value.stride()).requires_grad_(value.requires_grad)


async def test_negated_on_its_device(place: Place) -> None:
    async with place.open() as (owner, reader):
        value = COMPLEX.to(place.slab.device).conj().imag
        assert value.is_neg()
        assert same(await reader.get(await owner.put(value)), COMPLEX.conj().imag)
        await all_spent(owner)


async def test_a_dict_of_tensors_in_several_places(place: Place) -> None:
    """As a processor makes them: the pixels on the GPU, their grid on the host."""
    device = place.slab.device
    feature = {
        "pixel_values": torch.rand(40, 30, device=device).T,
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "scale": torch.tensor(0.5, dtype=torch.bfloat16, device=device),
        "nothing": torch.empty(0, 5, device=device),
        "mask": BASE[:13] > 3,
        "conj": COMPLEX.to(device).conj(),
    }
    async with place.open() as (owner, reader):
        ref = copy_of(await owner.put(feature))
        assert owner.statistics().slots_used == 1
        copies = await reader.get(ref)
        assert same_dict(copies, feature)
        assert {value.device for value in tensors(copies).values()} == {place.device}
        async with reader.borrow(await owner.put(feature)) as views:
            assert same_dict(views, feature)
        out = {
            name: torch.empty(v.shape, dtype=v.dtype, device=place.device)
            for name, v in feature.items()
        }
        assert await reader.get(await owner.put(feature), out=out) is out
        assert same_dict(out, feature)
        await all_spent(owner)


async def test_out_and_device(place: Place) -> None:
    value = BASE.view(24, 30)
    async with place.open() as (owner, reader):
        outs = [
            torch.empty(24, 30, device=place.device),
            torch.empty(30, 24, device=place.device).T,
            torch.empty(24, 60, device=place.device)[:, ::2],
            torch.empty(24, 30),
            torch.empty(30, 24).T,
        ]
        for out in outs:
            ref = await owner.put(value.to(place.slab.device))
            assert await reader.get(ref, out=out) is out
            assert torch.equal(out.cpu(), value)
        for device in {torch.device("cpu"), place.device}:
            copy = tensor(await reader.get(await owner.put(value), device=device))
            assert copy.device == device
            assert same(copy, value)
        ref = await owner.put(value)
        for wrong in (torch.empty(720, device=place.device), torch.empty(24, 30).double()):
            with pytest.raises(SettingsError):
                await reader.get(ref, out=wrong)
        await reader.release(ref)
        await all_spent(owner)


async def test_out_of_a_dict_in_several_places(place: Place) -> None:
    """One get copies to one device: who wants them in several copies on."""
    if place.device.type == "cpu":
        pytest.skip("there is one place only")
    async with place.open() as (owner, reader):
        ref = await owner.put({"a": BASE, "b": BASE})
        mixed: Any = {"a": torch.empty(720), "b": torch.empty(720, device=place.device)}
        with pytest.raises(SettingsError, match="one device"):
            await reader.get(ref, out=mixed)
        await reader.release(ref)
        await all_spent(owner)


async def test_the_forms_without_await(place: Place) -> None:
    async with place.open() as (owner, reader):
        ref = owner.put_nowait(BASE.to(place.slab.device), readers=2)
        if place.relayed:
            with pytest.raises(GetTimeout):
                reader.get_nowait(ref)
            with pytest.raises(GetTimeout), reader.borrow(ref):
                pass
            await owner.discard(ref)
        else:
            if place.slab.kind != "host":
                torch.cuda.synchronize(HOME)  # what was put from there is there
            assert same(reader.get_nowait(ref), BASE)  # and whether or not its stream has paid it:
            with pytest.raises(StaleRef):
                reader.get_nowait(ref)
            other = owner.put_nowait(BASE)
            with reader.borrow(other) as view:
                assert same(view, BASE)
            assert tensor(view).numel() == 0
            with pytest.raises(StaleRef, match="end of its block"):
                tensor(view).sum()
            await owner.discard(ref)
        await all_spent(owner)


async def test_reads_are_paid_once(place: Place) -> None:
    async with place.open() as (owner, reader):
        for pay in ("get", "borrow", "release"):
            ref = await owner.put(BASE.to(place.slab.device), readers=2)
            if pay == "get":
                await reader.get(ref)
            elif pay == "borrow":
                async with reader.borrow(ref):
                    pass
            else:
                await reader.release(ref)
            for again in (reader.get(ref), reader.release(ref)):
                with pytest.raises(StaleRef, match="paid"):
                    await again
            await reader.discard(ref)
        await all_spent(owner)


async def test_refs_that_are_gone_or_forged(place: Place) -> None:
    async with place.open() as (owner, reader), pair() as (stranger, _):
        ref = await owner.put(BASE.to(place.slab.device))
        for change, kind in (
            ({"generation": ref.generation + 1}, StaleRef),
            ({"slot": 7}, StaleRef),
            ({"slot": 1 << 20}, MalformedRef),
            ({"offset_bytes": 256}, MalformedRef),
            ({"nbytes": 4 * KIB}, MalformedRef),
        ):
            forged = msgspec.structs.replace(ref, **change)
            with pytest.raises(kind):
                await reader.get(forged)
            with pytest.raises(kind):
                await reader.borrow(forged).__aenter__()
        with pytest.raises(UnknownPool):
            await reader.get(await stranger.put(BASE))
        await owner.discard(ref)
        with pytest.raises(StaleRef):
            await reader.get(ref)
        await all_spent(owner)


async def test_sizes(slab: Slab) -> None:
    async with slab.pair() as (owner, client):
        capacity = owner.statistics().capacity_bytes
        for nbytes in (0, 1, 255, 256, 257, capacity - 1, capacity):
            value = filled(nbytes, nbytes % 251)
            for source in (value, value.to(slab.device)):
                assert same(await client.get(await owner.put(source)), value)
                await spent(owner)
        with pytest.raises(FeatureTooLarge):
            await owner.put(torch.empty(capacity + 1, dtype=torch.uint8, device=slab.device))


async def test_statistics(slab: Slab) -> None:
    async with slab.pair() as (owner, client):
        refs = [await owner.put(BASE.to(slab.device), readers=2) for _ in range(3)]
        now = owner.statistics()
        assert (now.puts, now.slots_used, now.sessions) == (3, 3, 1)
        assert now.used_bytes == 3 * 3072
        assert now.free_bytes + now.used_bytes == now.capacity_bytes
        assert now.committed_bytes <= now.capacity_bytes
        await client.get(refs[0])
        async with owner.borrow(refs[0]):
            pass
        await client.discard(refs[1])
        await owner.discard(refs[2])
        await spent(owner)
        now = owner.statistics()
        assert (now.gets, now.reads_paid, now.recycled, now.discarded) == (1, 2, 3, 2)
        assert client.statistics().gets == 1


async def test_pinned_host_memory(slab: Slab) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch pins nothing without one")
    async with slab.pair() as (owner, client):
        value = torch.arange(100_000, dtype=torch.int32).pin_memory()
        for part in (value, value[::3], value[5:777]):
            ref = await owner.put(part, readers=2)
            assert same(await client.get(ref), part)
            out = torch.empty(part.shape, dtype=part.dtype).pin_memory()
            assert await owner.get(ref, out=out) is out
            assert torch.equal(out, part)
        await spent(owner)


async def test_closing_and_opening_again(slab: Slab) -> None:
    for _ in range(3):
        async with slab.pair() as (owner, client):
            ref = await owner.put(BASE.to(slab.device))
            async with client.borrow(ref) as view:
                assert same(view, BASE)
        with pytest.raises(CacheClosed):
            await owner.put(BASE)
        with pytest.raises(CacheClosed):
            await client.get(ref)


async def test_one_process_with_several_pools(slab: Slab) -> None:
    async with slab.pair() as (one, _), slab.pair() as (two, _), featcache.connect() as reader:
        for value in range(3):
            for owner in (one, two):
                feature = filled(KIB, value).to(slab.device)
                assert same(await reader.get(await owner.put(feature)), filled(KIB, value))
        await spent(one)
        await spent(two)


async def test_a_copy_that_torch_has_no_memory_for_is_still_owed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    async with place.open() as (owner, reader):
        value = pattern(torch.int32, 1000)
        for feature in (value, {"one": value, "other": value}):
            ref = await owner.put(feature)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", refuse)
                patch.setattr(torch, "empty_strided", refuse)
                with pytest.raises(BackendUnavailable, match="out of memory") as refused:
                    await reader.get(ref)
            assert isinstance(refused.value.__cause__, RuntimeError)
            found = await reader.get(ref)
            assert same(found["other"] if isinstance(found, dict) else found, value)
        await all_spent(owner)
