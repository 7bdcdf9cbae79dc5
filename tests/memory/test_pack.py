"""Packing: what a dict of tensors becomes in one slot."""

import pytest
import torch

from featcache.errors import SettingsError
from featcache.memory.pack import DTYPES, pack, same_layout, unpack
from featcache.ref import DTYPE_BYTES, TensorSpec

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
    with pytest.raises(SettingsError, match="1 to 2"):
        pack({f"{n}": B for n in range(count)}, 2)


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
