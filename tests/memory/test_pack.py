"""Packing: what a dict of tensors becomes in one slot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from featcache.errors import FeatureTooLarge, SettingsError
from featcache.memory.pack import DTYPES, pack, same_layout, unpack
from featcache.ref import DTYPE_BYTES, MAX_REF_BYTES, TensorSpec, ref_bytes

A, B = torch.zeros(3, 5), torch.zeros(1, dtype=torch.int8)


def test_a_bare_tensor() -> None:
    specs, parts, nbytes = pack(A, 1)
    assert specs == (TensorSpec(None, "float32", (3, 5), 0),)
    assert parts[0][1] is A
    assert nbytes == 60
    assert unpack(specs, [A]) is A


def test_a_dict_is_packed_in_order_and_aligned() -> None:
    feature = {"a": A, "b": B, "none": torch.empty(0), "c": torch.zeros(100, dtype=torch.float64)}
    specs, parts, nbytes = pack(feature, 4)
    assert [(spec.name, spec.offset_bytes, spec.nbytes) for spec in specs] == [
        ("a", 0, 60),
        ("b", 256, 1),
        ("none", 512, 0),
        ("c", 512, 800),
    ]
    assert nbytes == 1312
    assert unpack(specs, [tensor for _, tensor in parts]) == feature


@pytest.mark.parametrize("count", [0, 3])
def test_how_many_tensors(count: int) -> None:
    with pytest.raises(SettingsError, match=r"1 to 2 .*FEATCACHE_TENSORS"):
        pack({f"{n}": B for n in range(count)}, 2)


NAME = "n" * 250


@pytest.mark.parametrize(
    "names", [["\ud800"], ["a", "b\udfff"], [3], [None], ["n" * 257]], ids=ascii
)
def test_names_that_no_ref_can_say(names: list[Any]) -> None:
    with pytest.raises(SettingsError, match="name is a str"):
        pack(dict.fromkeys(names, B), 2)


@pytest.mark.parametrize("name", ["", "ü" * 256, "\U0001f600", "\0"], ids=ascii)
def test_names_that_are_odd_but_names(name: str) -> None:
    assert pack({name: B}, 1)[0][0].name == name


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"x": x}], ids=["bare", "dict"])
def test_shapes_that_no_ref_can_say(form: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(SettingsError, match="1025 dimensions"):
        pack(form(torch.ones(1).reshape([1] * 1025)), 1)
    with pytest.raises(SettingsError, match="empty"):
        pack(form(torch.empty(0, 1 << 31, 1 << 31)), 1)
    for expanded in (1 << 47, 1 << 60, 1 << 61):  # more than 48, 62 and 63 bits of bytes
        with pytest.raises(FeatureTooLarge):
            pack(form(torch.ones(1).expand(expanded)), 1)
    specs, _, _ = pack(form(torch.ones(1).reshape([1] * 1024)), 1)
    assert specs[0].shape == (1,) * 1024


def test_a_ref_that_would_be_too_long() -> None:
    feature = {f"{NAME}{n}": torch.ones(()) for n in range(255)}
    with pytest.raises(SettingsError, match="the ref of these 255 tensors would have"):
        pack(feature, 256)
    assert len(pack(feature, 256, travels=False)[0]) == 255  # of which no ref is to be made
    for n in range(50):
        del feature[f"{NAME}{n}"]
    pack(feature, 256)


def test_sixteen_tensors_fit_a_ref_whatever_they_are() -> None:
    """So `pack` need not look: no shape of 48 bits says its dimensions in more bytes than this one."""
    name, shape = "\U0001f600" * 255, (256,) * 6 + (1,) * 1018
    specs = [TensorSpec(f"{n:x}{name}", "float4_e2m1fn_x2", shape, 1 << 48) for n in range(16)]
    assert ref_bytes(tuple(specs)) < MAX_REF_BYTES


def test_what_fits_into_what() -> None:
    specs, _, _ = pack({"a": A, "b": B}, 2)
    out = {"b": B.clone(), "a": A.clone()}
    assert same_layout(specs, out) == [out["a"], out["b"]]
    wrong: list[object] = [A, [A, B], {"a": A}, out | {"c": B}, {"a": B, "b": B}, {"a": A, "b": 1}]
    for other in wrong:
        with pytest.raises(SettingsError, match="out must be"):
            same_layout(specs, other)


def test_the_table_of_dtypes_is_torchs() -> None:
    known = {
        str(dtype).removeprefix("torch."): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    }
    quantized = {name for name in known if name.startswith(("qint", "quint"))}
    assert set(DTYPES) == set(known) - quantized
    assert {name: dtype.itemsize for name, dtype in known.items() if name not in quantized} == {
        name: DTYPE_BYTES[name] for name in DTYPES
    }
