"""Refs on the wire: whatever happened to the bytes, MalformedRef and nothing else."""

import copy
import pickle
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache import FeatureRef, MalformedRef, ref
from featcache.ref import TensorSpec, path_of, ref_bytes

SPEC = TensorSpec(None, "bfloat16", (2, 1176), 0)
REF = FeatureRef(
    bytes(range(16)), "/run/user/0/featcache/12-ab.sock", 7, 3, 512, SPEC.nbytes, (SPEC,)
)
PACKED = FeatureRef(
    bytes(range(16)),
    "/run/user/0/featcache/12-ab.sock",
    7,
    (1 << 63) - 1,
    1 << 40,
    1024,
    (TensorSpec("pixel_values", "float32", (4, 8), 0), TensorSpec("ü", "int64", (), 256)),
)
HEAD = len(b"fR\x01") + 4


def sealed(body: bytes) -> bytes:
    """These bytes as a ref with a valid checksum."""
    return b"fR\x01" + zlib.crc32(body).to_bytes(4, "little") + body


def fields(ref: FeatureRef) -> list[Any]:
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(ref))
    assert isinstance(decoded, list)
    return decoded


@pytest.mark.parametrize("ref", [REF, PACKED], ids=["bare", "packed"])
def test_there_and_back(ref: FeatureRef) -> None:
    data = ref.to_bytes()
    for form in (data, bytearray(data), memoryview(data)):
        assert FeatureRef.from_bytes(form) == ref
    assert len(REF.to_bytes()) < 110
    assert hash(FeatureRef.from_bytes(data)) == hash(ref)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol: int) -> None:
    assert pickle.loads(pickle.dumps([REF, PACKED], protocol)) == [REF, PACKED]
    assert copy.deepcopy(PACKED) == PACKED


def test_a_pickle_is_checked_as_its_bytes_are() -> None:
    data = pickle.dumps(REF)
    at = data.index(b"bfloat16")
    with pytest.raises(MalformedRef):
        pickle.loads(data[:at] + b"d" + data[at + 1 :])


def test_refs_are_immutable() -> None:
    with pytest.raises(AttributeError):
        REF.slot = 3  # type: ignore[misc]  # that it can't be set is the point


@pytest.mark.parametrize("ref", [REF, PACKED], ids=["bare", "packed"])
def test_any_byte_flipped(ref: FeatureRef) -> None:
    data = ref.to_bytes()
    for position in range(len(data)):
        for flip in (*(1 << bit for bit in range(8)), 0xFF, 0x5A):
            damaged = bytearray(data)
            damaged[position] ^= flip
            with pytest.raises(MalformedRef):
                FeatureRef.from_bytes(damaged)


@pytest.mark.parametrize("ref", [REF, PACKED], ids=["bare", "packed"])
def test_any_length_but_the_right_one(ref: FeatureRef) -> None:
    data = ref.to_bytes()
    for length in range(len(data)):
        with pytest.raises(MalformedRef):
            FeatureRef.from_bytes(data[:length])
        with pytest.raises(MalformedRef):
            FeatureRef.from_bytes(data[len(data) - length :])
        with pytest.raises(MalformedRef):  # cut, and sealed again
            FeatureRef.from_bytes(sealed(data[HEAD:length]))
    for more in (b"\0", b"x" * 70_000, data):
        with pytest.raises(MalformedRef):
            FeatureRef.from_bytes(data + more)
        with pytest.raises(MalformedRef):
            FeatureRef.from_bytes(sealed(data[HEAD:] + more))


# --- valid checksums, senseless contents ---------------------------------------------------------

CHANGES: list[tuple[int, Any]] = [
    (0, b"short"),
    (0, bytes(17)),
    (0, "text"),
    (1, 3),
    (1, "x" * 108),
    (2, -1),
    (2, 1 << 32),
    (2, 1.0),
    (3, 0),
    (3, -1),
    (3, 1 << 63),
    (3, True),
    (4, -256),
    (4, (1 << 48) + 1),
    (5, -1),
    (5, SPEC.nbytes - 1),
    (5, (1 << 64) - 1),
    (6, []),
    (6, None),
    (6, [None]),
]
SHAPES: list[Any] = [
    [-1],
    [2, -1176],
    [-2, -1176],
    [1 << 49],
    [1 << 63],
    [(1 << 64) - 1],
    [1 << 32, 1 << 32],
    [1 << 48, 1 << 48, 1 << 48],
    [2, 1177],
    [4704, 1],
    [1] * 1025,
    [2.0, 1176],
    "ab",
    None,
    2352,
]
SPECS: dict[str, list[Any]] = {
    **{f"shape {shape!r}"[:40]: [None, "bfloat16", shape, 0] for shape in SHAPES},
    **{
        f"dtype {dtype!r}"[:40]: [None, dtype, [2, 1176], 0]
        for dtype in ("float7", "", "qint8", "os", "x" * 5000, None, 3, "float64")
    },
    **{
        f"offset {offset}": [None, "bfloat16", [2, 1176], offset]
        for offset in (1, 2, -2, 1 << 48, (1 << 64) - 2, None)
    },
    "name too long": ["n" * 257, "bfloat16", [2, 1176], 0],
    "name no text": [3, "bfloat16", [2, 1176], 0],
    "a field too many": [None, "bfloat16", [2, 1176], 0, 0],
    "a field too few": [None, "bfloat16", [2, 1176]],
}


@pytest.mark.parametrize(("index", "value"), CHANGES, ids=str)
def test_invalid_fields_are_refused(index: int, value: Any) -> None:
    wrong = fields(REF)
    wrong[index] = value
    with pytest.raises(MalformedRef):
        FeatureRef.from_bytes(sealed(msgspec.msgpack.encode(wrong)))


@pytest.mark.parametrize("name", SPECS)
def test_invalid_tensor_specs_are_refused(name: str) -> None:
    wrong = fields(REF)
    wrong[6] = [SPECS[name]]
    with pytest.raises(MalformedRef):
        FeatureRef.from_bytes(sealed(msgspec.msgpack.encode(wrong)))


@pytest.mark.parametrize("shape", [[0, 1 << 48, 1 << 48], [1 << 40, 1 << 40, 0]])
def test_an_empty_shape_that_overflows_is_refused(shape: list[int]) -> None:
    wrong = fields(REF)
    wrong[6] = [[None, "bfloat16", shape, 0]]
    with pytest.raises(MalformedRef):
        FeatureRef.from_bytes(sealed(msgspec.msgpack.encode(wrong)))


@pytest.mark.parametrize("names", [[None, None], [None, "a"], ["a", None], ["a", "a"]], ids=str)
def test_tensors_that_are_neither_bare_nor_a_dict(names: list[str | None]) -> None:
    wrong = fields(REF)
    wrong[6] = [[name, "int8", [1], 0] for name in names]
    with pytest.raises(MalformedRef):
        FeatureRef.from_bytes(sealed(msgspec.msgpack.encode(wrong)))


def test_other_things_with_a_valid_checksum() -> None:
    others = [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x91" * 50_000,
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode("ref"),
        msgspec.msgpack.encode(fields(REF)[:-1]),
        msgspec.msgpack.encode([*fields(REF), 0]),
    ]
    for other in others:
        with pytest.raises(MalformedRef):
            FeatureRef.from_bytes(sealed(other))


@pytest.mark.parametrize("text", [b"\xff\xff\xff\xff", b"\xed\xa0\x80x", b"\xc0\x80\xc0\x80"])
@pytest.mark.parametrize("field", [b"/run", b"floa"])
def test_text_that_is_no_utf8(field: bytes, text: bytes) -> None:
    body = msgspec.msgpack.encode(REF)
    with pytest.raises(MalformedRef):
        FeatureRef.from_bytes(sealed(body.replace(field, text)))


FAR = msgspec.structs.replace(REF, endpoint=f"10.0.0.7:7400{REF.endpoint}")


def test_a_ref_carries_the_address_of_an_owner_that_listens_to_other_hosts() -> None:
    assert (REF.address, FAR.address) == ("", "10.0.0.7:7400")
    assert FeatureRef.from_bytes(FAR.to_bytes()) == FAR
    assert len(FAR.to_bytes()) < 150
    assert path_of(FAR.endpoint) == path_of(REF.endpoint) == REF.endpoint


def test_the_address_takes_nothing_of_the_paths_bound() -> None:
    longest = f"{'h' * 114}:65535/{'p' * 106}"
    ref = msgspec.structs.replace(REF, endpoint=longest)
    assert FeatureRef.from_bytes(ref.to_bytes()) == ref
    for wrong in (f"h{longest}", f"{longest}p", "/" + "p" * 107, f":1{'p' * 107}"):
        with pytest.raises(MalformedRef, match=r"endpoint|address"):
            msgspec.structs.replace(REF, endpoint=wrong)


def test_another_versions_ref() -> None:
    data = bytearray(REF.to_bytes())
    data[2] += 1
    with pytest.raises(MalformedRef, match="version"):
        FeatureRef.from_bytes(data)


@given(st.binary(max_size=200))
def test_any_bytes_at_all(data: bytes) -> None:
    for form in (data, sealed(data)):
        with pytest.raises(MalformedRef):
            FeatureRef.from_bytes(form)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)  # fmt: skip


@given(index=st.integers(0, 6), value=values)
def test_any_value_in_any_field(index: int, value: Any) -> None:
    """Either it is refused, or it is a ref that says what it holds and lies within its extent."""
    changed = fields(REF)
    changed[index] = value
    data = sealed(msgspec.msgpack.encode(changed))
    try:
        ref = FeatureRef.from_bytes(data)
    except MalformedRef:
        return
    assert FeatureRef.from_bytes(ref.to_bytes()) == ref
    assert all(spec.offset_bytes + spec.nbytes <= ref.nbytes for spec in ref.specs)


@given(shape=st.lists(st.integers(-2, 1 << 48), max_size=6), offset=st.integers(-1, 1 << 48))
def test_any_shape_at_any_offset(shape: list[int], offset: int) -> None:
    changed = fields(REF)
    changed[6] = [[None, "bfloat16", shape, offset]]
    try:
        ref = FeatureRef.from_bytes(sealed(msgspec.msgpack.encode(changed)))
    except MalformedRef:
        return
    assert 0 <= ref.specs[0].offset_bytes + ref.specs[0].nbytes <= ref.nbytes


def test_what_was_sound_once_says_nothing_of_what_differs() -> None:
    changed = fields(REF)
    assert FeatureRef.from_bytes(sealed(msgspec.msgpack.encode(changed))) == REF
    changed[6] = [[None, "bfloat16", [1 << 20], 0]]
    for _ in range(2):
        with pytest.raises(MalformedRef, match="outside"):
            FeatureRef.from_bytes(sealed(msgspec.msgpack.encode(changed)))
    assert FeatureRef.from_bytes(REF.to_bytes()) == REF


def test_what_was_found_sound_is_kept_within_bounds() -> None:
    for nbytes in range(64, 64 + 400):
        msgspec.structs.replace(REF, nbytes=REF.nbytes + nbytes)
    many = tuple(TensorSpec(str(n), "uint8", (1,), n) for n in range(100))
    FeatureRef(REF.pool_id, REF.endpoint, 0, 1, 0, 100, many)
    long = TensorSpec(None, "uint8", (1,) * 1024, 0)
    FeatureRef(REF.pool_id, REF.endpoint, 0, 1, 0, 1, (long,))
    assert len(ref._sound) <= 256
    assert all(len(specs) <= 16 for specs in ref._sound.values())
    assert all(len(spec.shape) <= 64 for specs in ref._sound.values() for spec in specs)


# --- made by hand --------------------------------------------------------------------------------

NONSENSE: dict[str, list[Any]] = {
    "slot": [-1, 1 << 32, 1 << 70, "a", 1.0, None, [], True, np.int64(1)],
    "generation": [-1, 0, 1 << 63, 1 << 70, "a", 1.0, None, True, np.int64(1)],
    "offset_bytes": [-1, (1 << 48) + 1, 1 << 70, "a", 1.0, None, True, np.int64(1)],
    "nbytes": [-1, (1 << 48) + 1, 1 << 70, "a", 4704.0, None, [], True, np.int64(4704)],
    "pool_id": [b"", b"x", bytes(17), bytearray(16), "x" * 16, None],
    "endpoint": [3, None, b"/run", "\ud800", "x" * 108, "é" * 54],
    "specs": [
        *((), None, [SPEC], (None,), (3,), "ab", SPEC),
        ([None, "bfloat16", [2, 1176], 0],),
    ],
}
SPEC_NONSENSE: list[list[Any]] = [
    [3, "bfloat16", (2,), 0],
    ["\ud800", "bfloat16", (2,), 0],
    [None, "bfloat16", [2], 0],
    [None, "bfloat16", (2.0,), 0],
    [None, "bfloat16", (-2,), 0],
    [None, "bfloat16", (1,) * 1025, 0],
    [None, "bfloat16", (2,), 0.0],
    [None, None, (2,), 0],
]
BY_HAND = [(field, value) for field, values in NONSENSE.items() for value in values]
BY_HAND += [("specs", (TensorSpec(*wrong),)) for wrong in SPEC_NONSENSE]


@pytest.mark.parametrize(("field", "value"), BY_HAND, ids=lambda value: ascii(value)[:40])
def test_no_ref_is_made_of_nonsense(field: str, value: Any) -> None:
    for _ in range(2):
        FeatureRef(
            **msgspec.structs.asdict(REF)
        )  # so what it is made of has been found sound before
        with pytest.raises(MalformedRef):
            msgspec.structs.replace(REF, **{field: value})
        made = msgspec.structs.asdict(REF) | {field: value}
        with pytest.raises(MalformedRef):
            FeatureRef(**made)


def test_what_is_wrong_is_said_by_the_name_of_its_field() -> None:
    with pytest.raises(MalformedRef, match="`generation`"):
        msgspec.structs.replace(REF, generation=0)


@pytest.mark.parametrize("most", [(1 << 32) - 1, 0], ids=["greatest", "least"])
def test_a_ref_at_the_bounds_is_read_back(most: int) -> None:
    made = msgspec.structs.replace(
        REF,
        pool_id=b"\xff" * 16,
        endpoint="é" * 53,
        slot=most,
        generation=(1 << 63) - 1 if most else 1,
        offset_bytes=1 << 48 if most else 0,
        nbytes=1 << 48,
    )
    assert FeatureRef.from_bytes(made.to_bytes()) == made


def test_the_longest_ref_that_specs_may_make_is_read_back() -> None:
    """What `ref_bytes` says of specs holds of every ref with them, and one that is longer is none."""
    named = [TensorSpec(f"{n:03d}" + "é" * 120, "int8", (1,), n) for n in range(300)]
    count = max(n for n in range(300) if ref_bytes(tuple(named[:n])) <= 1 << 16)
    specs = tuple(named[:count])
    longest = FeatureRef(
        *(b"x" * 16, "é" * 53, (1 << 32) - 1, (1 << 63) - 1, 1 << 48, 1 << 48),
        specs,
    )
    assert len(longest.to_bytes()) <= ref_bytes(specs) <= 1 << 16
    assert FeatureRef.from_bytes(longest.to_bytes()) == longest
    with pytest.raises(MalformedRef, match="fewer tensors"):
        msgspec.structs.replace(longest, specs=tuple(named))


@pytest.mark.parametrize(
    "data",
    ["text", REF.to_bytes().hex(), None, 3, 10**15, 1.5, [300], [102, 82], {}, REF, memoryview],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_bytes(data: Any) -> None:
    with pytest.raises(MalformedRef, match=f"not {type(data).__name__}"):
        FeatureRef.from_bytes(data)
