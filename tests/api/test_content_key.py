"""Equal content has an equal key, and different content a different one."""

import array
import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from featcache import SettingsError
from featcache.api.content_key import content_key
from featcache.memory.pack import DTYPES
from support.caches import MIB
from support.slabs import HOME, at, busy, stream_on

Value = Any

complex_half = pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")  # torch's own


def pattern(dtype: torch.dtype, count: int) -> torch.Tensor:
    """A tensor with bytes of its own in each element, made without any kernel of its dtype."""
    value = torch.empty(count, dtype=dtype)
    limit = 2 if dtype is torch.bool else 251
    content = bytes((7 * n + 1) % limit for n in range(value.nbytes))
    ctypes.memmove(value.data_ptr(), content, len(content))
    return value


# --- what is the same ----------------------------------------------------------------------------


def tensor_value() -> Value:
    return torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


def dict_value() -> Value:
    return {"pixels": torch.arange(6).reshape(2, 3), "grid": torch.tensor([1, 2])}


def bytes_value() -> Value:
    return b"\x89PNG"


def text_value() -> Value:
    return "https://example.org/cat.png"


@pytest.mark.parametrize("make", [tensor_value, dict_value, bytes_value, text_value])
def test_a_key_is_32_bytes_and_the_same_each_time(make: Callable[[], Value]) -> None:
    first, second = (content_key(make()) for _ in range(2))
    assert type(first) is bytes
    assert len(first) == 32
    assert first == second


KNOWN = """
import torch
from featcache.api.content_key import content_key
for value in (torch.arange(6).reshape(2, 3), {"a": torch.ones(2)}, b"ab", "ab"):
    print(content_key(value).hex())
"""


def test_a_key_is_the_same_in_every_process() -> None:
    """Whatever Python's own hashes are salted with: here, and in a process with another salt."""
    here = os.environ.get("PYTHONHASHSEED", "random")
    done = subprocess.run(
        [sys.executable, "-c", KNOWN],
        env=os.environ | {"PYTHONHASHSEED": "2" if here == "1" else "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    values: list[Value] = [torch.arange(6).reshape(2, 3), {"a": torch.ones(2)}, b"ab", "ab"]
    assert done.stdout == "".join(f"{content_key(value).hex()}\n" for value in values)


def test_a_key_never_changes_between_versions() -> None:
    """Who stores keys beside results counts on it: a new form needs a new version in its prefix."""
    assert (
        content_key(b"").hex() == "3e58f78e5b30c0c5c02903bee9988df5bb614f5b17e65c43c0a6172bf74e6dd8"
    )
    assert (
        content_key("").hex() == "0cfcf5b58c40fc4f4bba5cc2cc4a0994850abce428a77711e2ae71e47de997b9"
    )
    assert (
        content_key(torch.zeros(2, dtype=torch.float16)).hex()
        == "071fa964885bd349241d57a96eb103180439a27478c6a9c0ff1e418121486d61"
    )
    assert (
        content_key({"a": torch.zeros(2, dtype=torch.float16)}).hex()
        == "5eef967c2b6d7f854c9ecc9dd95991fe3f293ba9ef8f7fed37a6c816ef75aa66"
    )


@pytest.mark.parametrize(
    "value",
    [
        bytearray(b"abcdef"),
        memoryview(b"abcdef"),
        memoryview(b"-abcdef-")[1:-1],
        memoryview(b"a-b-c-d-e-f")[::2],
        memoryview(b"fedcba")[::-1],
        np.frombuffer(b"abcdef", np.uint8).reshape(2, 3).data,
        np.asfortranarray(np.frombuffer(b"abcdef", np.uint8).reshape(3, 2)).data,
        np.frombuffer(b"abcdef", "<u2").data,
        np.frombuffer(b"abcdef", ">u2").data,
        memoryview(array.array("H", [0x6261, 0x6463, 0x6665])),
    ],
)
def test_bytes_count_whatever_holds_them(value: bytearray | memoryview) -> None:
    assert content_key(value) == content_key(b"abcdef")


@pytest.mark.parametrize("empty", [bytearray(), np.empty((2, 0), np.float32).data])
def test_no_bytes_are_no_bytes_whatever_holds_them(empty: bytearray | memoryview) -> None:
    assert content_key(empty) == content_key(b"")


@complex_half
@pytest.mark.parametrize("name", list(DTYPES))
def test_every_dtype_has_keys_contiguous_or_not(name: str) -> None:
    whole = pattern(DTYPES[name], 24)
    keys = {content_key(whole), content_key(whole.view(2, 12)), content_key(whole[1:])}
    assert len(keys) == 3
    assert content_key(whole.view(4, 6)[:, 1:3]) == content_key(spread(whole.view(4, 6)[:, 1:3]))
    assert content_key(whole[0]) == content_key(pattern(DTYPES[name], 1)[0])


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous: element by element, as bytes, with no kernel of the dtype."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    width = tensor.element_size()
    for count, index in enumerate(itertools.product(*(range(size) for size in tensor.shape))):
        offset = sum(n * stride for n, stride in zip(index, tensor.stride(), strict=True))
        ctypes.memmove(made.data_ptr() + count * width, tensor.data_ptr() + offset * width, width)
    return made


def test_strides_do_not_count() -> None:
    value = torch.arange(24.0).reshape(4, 6)
    for same in (value.t().contiguous().t(), value.repeat_interleave(2, 1)[:, ::2]):
        assert not same.is_contiguous()
        assert content_key(same) == content_key(value)
    assert content_key(value.t()) == content_key(value.t().contiguous())
    assert content_key(torch.ones(1).expand(5)) == content_key(torch.ones(5))
    assert content_key(value[2:]) == content_key(value[2:].clone())


def test_conjugated_and_negated_views_have_the_key_of_their_values() -> None:
    value = torch.complex(torch.arange(6.0), torch.arange(6.0) + 1).reshape(2, 3)
    for view in (value.conj(), value.conj().imag, value.conj().t(), value[0, 1].conj()):
        assert view.is_conj() or view.is_neg()
        resolved = view.resolve_conj().resolve_neg().contiguous()
        assert content_key(view) == content_key(resolved)
    assert content_key(value.conj()) != content_key(value)


def test_what_autograd_knows_of_a_tensor_does_not_count() -> None:
    value = torch.arange(4.0)
    parameter = torch.nn.Parameter(value.clone())
    assert content_key(parameter) == content_key(value)
    assert content_key(parameter * 1) == content_key(value)
    with torch.inference_mode():
        inferred = torch.arange(4.0)
        assert content_key(inferred) == content_key(value)
    assert content_key(inferred) == content_key(value)


def test_the_order_of_a_dict_does_not_count() -> None:
    a, b = torch.arange(3), torch.arange(3.0)
    assert content_key({"a": a, "b": b}) == content_key({"b": b, "a": a})


def test_a_value_is_not_changed_and_not_held() -> None:
    value, data = torch.arange(6.0), bytearray(b"abc")
    content_key(value)
    content_key(data)
    assert torch.equal(value, torch.arange(6.0))
    data.append(1)  # which Python refuses while somebody looks at the bytes
    assert data == b"abc\x01"


# --- what is different ---------------------------------------------------------------------------


def all_different(*values: Value) -> None:
    keys = [content_key(value) for value in values]
    assert len(set(keys)) == len(keys), [values[keys.index(key)] for key in keys]


def test_the_kind_of_value_counts() -> None:
    raw = torch.tensor([97, 98], dtype=torch.uint8)
    all_different(b"ab", "ab", raw, {"ab": raw}, {"": raw}, content_key(b"ab"))


def test_the_kinds_of_empty_values_are_different() -> None:
    none = torch.empty(0, dtype=torch.uint8)
    all_different(b"", "", none, {"": none}, torch.zeros((), dtype=torch.uint8))


@complex_half
def test_the_dtype_counts() -> None:
    """Also where the bytes are the same: all nought, or none at all."""
    for count in (0, 1):
        values = []
        for dtype in DTYPES.values():
            value = torch.empty(16 * count // dtype.itemsize, dtype=dtype)
            ctypes.memset(value.data_ptr(), 0, value.nbytes)
            values.append(value)
        all_different(*values)


def test_the_shape_counts() -> None:
    shapes: list[tuple[int, ...]] = [(6,), (2, 3), (3, 2), (1, 6), (6, 1), (1, 2, 3), (5,), (7,)]
    all_different(*(torch.zeros(shape) for shape in shapes))
    all_different(*(torch.zeros(shape) for shape in [(), (1,), (1, 1), (0,), (0, 3), (3, 0)]))


def test_each_byte_counts() -> None:
    value = bytes(range(64))
    flipped = [value[:n] + bytes([value[n] ^ 1]) + value[n + 1 :] for n in range(64)]
    all_different(value, *flipped, value[:-1], value + b"\0")
    all_different(*(torch.frombuffer(bytearray(data), dtype=torch.int32) for data in flipped))


def test_the_bytes_of_a_number_count_not_what_it_equals() -> None:
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    all_different(torch.tensor([0.0]), torch.tensor([-0.0]), nan[:1], nan[1:])
    assert content_key(nan) == content_key(nan.clone())


def test_the_names_of_a_dict_count() -> None:
    a, b = torch.arange(3), torch.arange(3) + 1
    all_different({"a": a}, {"b": a}, {"a": b}, {"a": a, "b": b}, {"a": b, "b": a})


def test_nothing_shifts_from_one_tensor_of_a_dict_to_the_next() -> None:
    data = torch.arange(6)
    cuts = [{"a": data[:cut], "b": data[cut:]} for cut in range(7)]
    all_different(*cuts, {"ab": data}, {"a": data, "b": data[:0]} | {"c": data[:0]})


@pytest.mark.parametrize("text", ["", "é", "e\u0301", "\0", "\ud800", "a" * 100_000])
def test_any_text_has_a_key_of_its_own(text: str) -> None:
    all_different(text, text + "a", text.encode("utf-8", "surrogatepass"))
    all_different({text[:256]: torch.ones(1)}, {text[:255] + "b": torch.ones(1)})


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "content_key takes .* not NoneType"),
        (7, "not int"),
        (1.5, "not float"),
        ([torch.ones(1)], "not list"),
        ((b"a", b"b"), "not tuple"),
        (np.ones(3), "not ndarray"),
        ({}, "1 to 4096 tensors, not 0"),
        ({"a": 1}, r"feature\['a'\] must be a torch.Tensor, not int"),
        ({"a": {"b": torch.ones(1)}}, "not dict"),
        ({1: torch.ones(1)}, "name is a str"),
        (torch.empty(3, device="meta"), "not sparse, nested or meta"),
        (torch.eye(3).to_sparse(), "not sparse, nested or meta"),
    ],
)
def test_what_is_no_such_value(value: Value, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        content_key(value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_a_quantized_tensor_has_a_scale_beside_its_bytes_and_so_no_key() -> None:
    value = torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8)
    with pytest.raises(SettingsError, match="qint8"):
        content_key(value)


# --- threads and GPUs ----------------------------------------------------------------------------


async def test_threads_hash_side_by_side() -> None:
    """As the docstring says to do for large values."""
    values = [torch.full((MIB,), n, dtype=torch.uint8) for n in range(8)]
    keys = dict[int, bytes]()

    async def key_of(n: int) -> None:
        keys[n] = await anyio.to_thread.run_sync(content_key, values[n])

    async with anyio.create_task_group() as group:
        for n in range(len(values)):
            group.start_soon(key_of, n)
    assert keys == {n: content_key(value) for n, value in enumerate(values)}


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_has_the_key_of_its_copy_on_the_host() -> None:
    value = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    for same in (value, value.bfloat16(), value.t(), value[:, ::2], value[0, 0], value[:0]):
        assert content_key(same.to(HOME)) == content_key(same)
    numbers = torch.complex(value, value + 1)
    assert content_key(numbers.to(HOME).conj()) == content_key(numbers.conj())
    assert content_key({"a": value.to(HOME), "b": numbers}) == content_key(
        {"a": value, "b": numbers}
    )


@pytest.mark.gpu
def test_the_key_of_a_tensor_on_a_gpu_waits_for_the_current_stream() -> None:
    with torch.cuda.stream(stream_on()):
        value = torch.zeros(MIB, dtype=torch.uint8, device=HOME)
        busy()
        value.fill_(7)
        assert content_key(value) == content_key(torch.full((MIB,), 7, dtype=torch.uint8))


@complex_half
@pytest.mark.gpu
@pytest.mark.parametrize("name", list(DTYPES))
def test_every_dtype_has_keys_on_a_gpu(name: str) -> None:
    whole = pattern(DTYPES[name], 24).view(4, 6)
    there = at(whole, HOME)
    for cut in (there, there[:, 1:3], there[0, 0]):
        here = whole.as_strided(cut.shape, cut.stride(), cut.storage_offset())
        assert content_key(cut) == content_key(here)
