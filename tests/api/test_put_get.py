"""What goes in comes out: dtypes, shapes, dicts, where copies are and whose they are."""

import ctypes
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from featcache import (
    BackendUnavailable,
    FeatureCache,
    FeatureClient,
    FeatureRef,
    FeatureTooLarge,
    KeyNotFound,
    SettingsError,
    UnknownPool,
)
from support.caches import Feature, filled, pair, raw, spent, tensor, tensors

Pair = tuple[FeatureCache, FeatureClient]

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)
QUANTIZED = [dtype for dtype in DTYPES if str(dtype).startswith(("torch.qint", "torch.quint"))]
PLAIN = [dtype for dtype in DTYPES if dtype not in QUANTIZED]


def pattern(dtype: torch.dtype, count: int) -> torch.Tensor:
    """A tensor with bytes of its own in each element, made without any kernel of its dtype."""
    value = torch.empty(count, dtype=dtype)
    limit = 2 if dtype is torch.bool else 251
    content = bytes((7 * n + 1) % limit for n in range(value.nbytes))
    ctypes.memmove(value.data_ptr(), content, len(content))
    return value


@pytest_asyncio.fixture(params=["inline", "thread"])
async def both(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """An owner and a client whose copies run in the loop, or all in threads."""
    changes: dict[str, Any] = {"inline_bytes": 0} if request.param == "thread" else {}
    async with pair(**changes) as made:
        yield made


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")  # torch's own, once
@pytest.mark.parametrize("dtype", PLAIN, ids=str)
async def test_every_dtype_comes_back_as_it_was(dtype: torch.dtype) -> None:
    value = pattern(dtype, 24).view(2, 3, 4)
    async with pair() as (owner, client):
        copy = tensor(await client.get(await owner.put(value)))
        assert copy.dtype is dtype
        assert copy.shape == (2, 3, 4)
        assert copy.is_contiguous()
        assert raw(copy) == raw(value)
        async with client.borrow(await owner.put(value)) as feature:
            view = tensor(feature)
            assert (view.dtype, view.shape) == (dtype, value.shape)
            assert raw(view) == raw(value)


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")  # torch's own, once
@pytest.mark.parametrize("dtype", PLAIN, ids=str)
async def test_every_dtype_with_strides_and_as_a_scalar(dtype: torch.dtype) -> None:
    whole = pattern(dtype, 20)
    size = dtype.itemsize
    everything = raw(whole)
    strided = b"".join(everything[2 * n * size :][:size] for n in range(10))
    async with pair() as (owner, client):
        assert raw(tensor(await client.get(await owner.put(whole[::2])))) == strided
        scalar = tensor(await client.get(await owner.put(whole[3])))
        assert scalar.shape == ()
        assert raw(scalar) == everything[3 * size : 4 * size]


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
async def test_quantized_dtypes_are_refused(dtype: torch.dtype) -> None:
    try:
        value = torch._empty_affine_quantized([64], scale=1.0, zero_point=0, dtype=dtype)
    except RuntimeError as error:  # the packed ones have no tensor of their own here
        pytest.skip(f"torch can't make one: {error}")
    async with pair() as (owner, _):
        with pytest.raises(SettingsError, match=r"quint|qint"):
            await owner.put(value)
        await spent(owner)


# --- shapes --------------------------------------------------------------------------------------

BASE = torch.arange(720, dtype=torch.float32)
COMPLEX = torch.complex(BASE, -BASE)
SHAPES: dict[str, torch.Tensor] = {
    "scalar": torch.tensor(3.25),
    "empty": torch.empty(0, dtype=torch.int16),
    "empty 3-d": torch.empty(4, 0, 9),
    "one": BASE[:1],
    "vector": BASE,
    "5-d": BASE.view(2, 3, 4, 5, 6),
    "transposed": BASE.view(24, 30).T,
    "permuted 5-d": BASE.view(2, 3, 4, 5, 6).permute(4, 2, 0, 3, 1),
    "channels last": BASE.view(2, 3, 10, 12).contiguous(memory_format=torch.channels_last),
    "every third": BASE[1::3],
    "expanded": BASE[:7].view(7, 1).expand(7, 11),
    "expanded scalar": torch.tensor(2).expand(3, 5),
    "offset": BASE[17:400],
    "conj": COMPLEX.conj(),
    "conj scalar": COMPLEX[5].conj(),
    "conj transposed": COMPLEX.view(24, 30).mH,
    "neg": COMPLEX.conj().imag,
    "neg scalar": COMPLEX[5].conj().imag,
    "real part": COMPLEX.real,
    "requires grad": BASE.clone().requires_grad_(),
    "grad and strides": BASE.view(24, 30).clone().requires_grad_().T,
    "parameter": torch.nn.Parameter(BASE.clone()),
    "bool strided": (BASE > 100)[::5],
}


@pytest.mark.parametrize("name", SHAPES)
async def test_every_shape_comes_back_as_it_was(both: Pair, name: str) -> None:
    owner, client = both
    value = SHAPES[name]
    for reader in (owner, client):
        copy = tensor(await reader.get(await owner.put(value)))
        assert torch.equal(copy, value.detach())
        assert copy.shape == value.shape
        assert copy.dtype == value.dtype
        assert copy.is_contiguous()
        assert not copy.requires_grad
        assert not copy.is_conj()
        assert not copy.is_neg()
        async with reader.borrow(await owner.put(value)) as view:
            assert torch.equal(tensor(view), value.detach())
            assert tensor(view).is_contiguous()
    await spent(owner)


async def test_subclasses_and_numpy_memory_are_tensors_like_others(both: Pair) -> None:
    owner, client = both
    value = torch.from_numpy(BASE.numpy()[::2])
    assert torch.equal(tensor(await client.get(await owner.put(value))), BASE[::2])
    copy = tensor(await client.get(await owner.put(torch.nn.Parameter(BASE))))
    assert type(copy) is torch.Tensor


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        BASE.numpy(),
        None,
        "features",
        torch.empty(3, device="meta"),
        BASE.view(24, 30).to_sparse(),
        {},
        {"a": 1},
        {3: BASE},
        {"n" * 257: BASE},
        {"a": {"b": BASE}},
        {f"{n}": BASE[:1] for n in range(300)},
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_is_not_a_dense_tensor_is_refused(value: object) -> None:
    async with pair() as (owner, _):
        with pytest.raises(SettingsError):
            await owner.put(value)  # type: ignore[arg-type]  # the wrong type is the point
        with pytest.raises(SettingsError):
            owner.put_nowait(value)  # type: ignore[arg-type]
        await spent(owner)


async def test_nested_tensors_are_refused() -> None:
    with pytest.warns(UserWarning, match="prototype"):
        value = torch.nested.nested_tensor([BASE[:3], BASE[:5]])
    async with pair() as (owner, _):
        with pytest.raises(SettingsError):
            await owner.put(value)


# --- dicts ---------------------------------------------------------------------------------------


async def test_a_dict_travels_in_one_slot(both: Pair) -> None:
    owner, client = both
    feature = {
        "pixel_values": BASE.view(24, 30).T,
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "scale": torch.tensor(0.5, dtype=torch.bfloat16),
        "nothing": torch.empty(0, 5),
        "mask": (BASE > 3)[:13],
        "": COMPLEX.conj(),
    }
    ref = await owner.put(feature, readers=2)
    assert owner.statistics().slots_used == 1
    copies = tensors(await client.get(FeatureRef.from_bytes(ref.to_bytes())))
    assert list(copies) == list(feature)
    for name, value in feature.items():
        assert torch.equal(copies[name], value)
        assert copies[name].is_contiguous()
    async with owner.borrow(ref) as views:
        for name, value in feature.items():
            assert torch.equal(tensors(views)[name], value)
    assert {view.numel() for view in tensors(views).values()} == {0}
    await spent(owner)


async def test_a_ref_is_small() -> None:
    async with pair() as (owner, _):
        assert len((await owner.put(BASE.view(24, 30))).to_bytes()) < 160


# --- whose and where -----------------------------------------------------------------------------


async def test_copies_do_not_alias_the_slab(both: Pair) -> None:
    owner, client = both
    source = filled(4096, 1)
    ref = await owner.put(source, readers=2)
    source.fill_(9)  # the put copied: what the caller does to its tensor is its own affair
    mine = tensor(await client.get(ref))
    mine.fill_(5)
    theirs = tensor(await owner.get(ref))
    assert torch.equal(theirs, filled(4096, 1))
    await spent(owner)
    await owner.put(filled(4096, 7))  # into the same bytes
    assert torch.equal(theirs, filled(4096, 1))
    assert torch.equal(mine, filled(4096, 5))


OUTS: dict[str, torch.Tensor] = {
    "contiguous": torch.empty(24, 30),
    "transposed": torch.empty(30, 24).T,
    "strided": torch.empty(24, 60)[:, ::2],
    "in a larger one": torch.empty(30, 40)[3:27, 5:35],
}


@pytest.mark.parametrize("name", OUTS)
async def test_out_is_filled_and_returned(both: Pair, name: str) -> None:
    owner, client = both
    value, out = BASE.view(24, 30), OUTS[name].fill_(-1)
    ref = await owner.put(value, readers=2)
    assert await client.get(ref, out=out) is out
    assert torch.equal(out, value)
    out.fill_(-1)
    assert owner.get_nowait(ref, out=out) is out
    assert torch.equal(out, value)
    await spent(owner)


async def test_out_that_is_a_conjugate_view(both: Pair) -> None:
    owner, client = both
    out = torch.empty(720, dtype=torch.complex64).conj()
    await client.get(await owner.put(COMPLEX), out=out)
    assert torch.equal(out, COMPLEX)


async def test_out_of_a_dict(both: Pair) -> None:
    owner, client = both
    feature = {"a": BASE, "b": COMPLEX}
    ref = await owner.put(feature)
    out = {"b": torch.empty_like(COMPLEX), "a": torch.empty_like(BASE)}
    assert await client.get(ref, out=out) is out
    assert torch.equal(out["a"], BASE)
    assert torch.equal(out["b"], COMPLEX)


@pytest.mark.parametrize(
    "out",
    [
        pytest.param(torch.empty(719), id="short"),
        pytest.param(torch.empty(720, 1), id="2-d"),
        pytest.param(torch.empty(720, dtype=torch.float64), id="dtype"),
        pytest.param({"a": torch.empty(720)}, id="dict"),
        pytest.param([0.0] * 720, id="list"),
        pytest.param(torch.empty(1).expand(720), id="expanded"),
        pytest.param(torch.empty(720, device="meta"), id="meta"),
    ],
)
async def test_an_out_that_does_not_fit_leaves_the_read_owed(both: Pair, out: Feature) -> None:
    owner, client = both
    ref = await owner.put(BASE)
    with pytest.raises(SettingsError):
        await client.get(ref, out=out)
    with pytest.raises(SettingsError):
        client.get_nowait(ref, out=out)
    assert torch.equal(tensor(await client.get(ref)), BASE)
    await spent(owner)


async def test_devices(both: Pair) -> None:
    owner, client = both
    ref = await owner.put(BASE)
    with pytest.raises(SettingsError, match="not both"):
        await client.get(ref, device="cpu", out=torch.empty_like(BASE))
    for device in ("no such", "meta", "xpu", 3.5, "cpu:x"):
        with pytest.raises(SettingsError, match="device"):
            await client.get(ref, device=device)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable):
            await client.get(ref, device="cuda:0")
    assert tensor(await client.get(ref, device="cpu")).device == torch.device("cpu")


async def test_what_is_not_a_ref_is_refused(both: Pair) -> None:
    owner, client = both
    ref = await owner.put(BASE)
    for reader in (owner, client):
        for wrong in (None, ref.slot, [ref], bytearray(b"key")):  # a key is str or bytes
            with pytest.raises(SettingsError):
                await reader.get(wrong)  # type: ignore[arg-type]
            with pytest.raises(SettingsError):
                reader.borrow(wrong)  # type: ignore[arg-type]
        with pytest.raises(KeyNotFound, match="from_bytes"):
            await reader.get(ref.to_bytes())
        with pytest.raises(KeyNotFound, match="from_bytes"):
            reader.get_nowait(ref.to_bytes())
        for none in (None, ref.slot):
            with pytest.raises(SettingsError):
                reader.get_nowait(none)  # type: ignore[arg-type]
        for no_ref in (None, ref.to_bytes(), "key", ref.slot):
            with pytest.raises(SettingsError):
                await reader.release(no_ref)  # type: ignore[arg-type]
            with pytest.raises(SettingsError):
                await reader.discard(no_ref)  # type: ignore[arg-type]


# --- put_nowait, get_nowait, room ----------------------------------------------------------------


async def test_the_forms_without_await() -> None:
    async with pair() as (owner, client):
        ref = owner.put_nowait(BASE, readers=2)
        assert torch.equal(tensor(owner.get_nowait(ref)), BASE)
        with client.borrow(ref) as view:
            assert torch.equal(tensor(view), BASE)
        await spent(owner)


@pytest.mark.parametrize("capacity", [4096, 64 << 10, 100_000])
async def test_exactly_the_capacity_fits(capacity: int) -> None:
    async with pair(capacity=capacity, segment=4096) as (owner, client):
        rounded = owner.statistics().capacity_bytes
        assert capacity <= rounded < capacity + 4096
        for size in (rounded, rounded - 1):
            value = torch.arange(size).to(torch.uint8)
            assert torch.equal(tensor(await client.get(await owner.put(value))), value)
            await spent(owner)
            client_ref = owner.put_nowait(value)
            await client.release(client_ref)
            await spent(owner)
        for too_large in (filled(rounded + 1), {"a": filled(rounded - 256), "b": filled(257)}):
            with pytest.raises(FeatureTooLarge, match="capacity"):
                await owner.put(too_large)
            with pytest.raises(FeatureTooLarge):
                owner.put_nowait(too_large)
        await spent(owner)


async def test_a_feature_of_no_bytes_still_takes_a_slot_of_its_own() -> None:
    async with pair() as (owner, client):
        refs = [await owner.put(torch.empty(0)) for _ in range(3)]
        assert owner.statistics().slots_used == 3
        for ref in refs:
            await client.get(ref)
        await spent(owner)


async def test_a_ref_of_another_pool() -> None:
    async with pair() as (owner, client), pair() as (other, _):
        ref = await other.put(BASE)
        for call in (owner.get, client.get, owner.release, client.release, owner.discard):
            with pytest.raises(UnknownPool):
                await call(ref)
        with pytest.raises(UnknownPool):
            client.get_nowait(ref)
        with pytest.raises(UnknownPool):
            async with client.borrow(ref):
                pass
        with pytest.raises(UnknownPool):
            await client.discard(ref)
        assert torch.equal(tensor(await other.get(ref)), BASE)
