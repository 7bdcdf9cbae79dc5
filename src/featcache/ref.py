"""`FeatureRef`: the name of a feature that travels between processes, and its validation.

On the wire: ``fR``, a version byte, the CRC-32 of the rest, then a msgpack array. The checksum
catches damage, the types and bounds below catch invalid fields, and the owner's slot table (which
readers map) catches forgery: a reader compares slot, generation and extent with it before it reads a
byte.
"""

import math
import struct
import zlib
from typing import Annotated, Any, Final, Self

import msgspec

from featcache.errors import MalformedRef

__all__ = [
    "DTYPE_BYTES",
    "MAX_ADDRESS_BYTES",
    "MAX_BYTES",
    "MAX_DIMS",
    "MAX_REF_BYTES",
    "FeatureRef",
    "TensorSpec",
    "path_of",
    "ref_bytes",
]

_MAGIC: Final = b"fR\x01"
_HEAD: Final = struct.Struct("<3sI")
_read_head: Final = _HEAD.unpack_from
_HEAD_BYTES: Final = _HEAD.size
MAX_REF_BYTES: Final = 64 << 10
"""Bytes of the longest ref."""
_MAX_BUT_SPECS_BYTES: Final = 320  # of a ref: its head and all of its fields but the specs
MAX_DIMS: Final = 1024
"""Dimensions that a tensor may have. torch has no bound; real tensors have far fewer."""
_POOL_ID_BYTES: Final = 16
_MAX_PATH_BYTES: Final = 107  # sun_path, less its final zero
MAX_ADDRESS_BYTES: Final = 120
"""Bytes of the longest address at which other hosts find an owner."""
_MAX_ENDPOINT_BYTES: Final = MAX_ADDRESS_BYTES + _MAX_PATH_BYTES
MAX_BYTES: Final = 1 << 48
"""Bytes of the largest feature that a ref can name, of any pool."""

DTYPE_BYTES: Final[dict[str, int]] = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
    "bits16": 2,
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of one element by torch's name of the dtype: all of torch's but the quantized ones, which
carry a scale beside their bytes. A test compares this table with torch."""

_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
_Shape = Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_DIMS)]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of a feature: its name, dtype, shape and offset in the slot. It is contiguous."""

    name: Annotated[str, msgspec.Meta(max_length=256)] | None
    """The key in the dict that was put, or None for a feature that is one bare tensor."""
    dtype: str
    """torch's name of the dtype, such as ``"bfloat16"``."""
    shape: _Shape
    offset_bytes: _Size
    """The tensor's offset from the slot's start."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


_PoolId = Annotated[bytes, msgspec.Meta(min_length=_POOL_ID_BYTES, max_length=_POOL_ID_BYTES)]
_Endpoint = Annotated[str, msgspec.Meta(max_length=_MAX_ENDPOINT_BYTES)]
_Slot = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Generation = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
_Specs = Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=4096)]


class FeatureRef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Names one feature in one pool, for as long as reads of it are owed.

    Immutable, hashable, picklable, and safe in any thread; `to_bytes` is about 100 bytes and goes over
    any transport.
    A ref grants nothing by itself: a reader checks it against the owner's slot table.
    """

    pool_id: _PoolId
    endpoint: _Endpoint
    """The path of the owner's socket; before it, if it listens to other hosts, its address there
    (``10.0.0.7:7400/run/user/1000/featcache/12-ab.sock``)."""
    slot: _Slot
    generation: _Generation
    offset_bytes: _Size
    nbytes: _Size
    specs: _Specs

    def __post_init__(self) -> None:
        """Validate it, however it was made: decoded, by hand, or by `msgspec.structs.replace`.

        Raises:
            MalformedRef: a field of another type or out of range, or specs that no pool can make.

        """
        try:
            slot, nbytes = self.slot, self.nbytes
            generation, offset_bytes = self.generation, self.offset_bytes
            # Hot path. By type: a bool, or numpy's integer, would pass as a number and is none on the
            # wire. A size that is known was found to be within its range. (Written out, the bounds are
            # constants of the code.)
            known = (
                type(slot) is type(generation) is type(offset_bytes) is type(nbytes) is int
                and 0 <= slot < 1 << 32
                and 0 < generation < 1 << 63
                and 0 <= offset_bytes <= 1 << 48
                and _sound[nbytes, self.pool_id, self.endpoint] == self.specs
            )
        except (KeyError, TypeError):
            known = False
        if not known:
            _check(self)
            _remember_sound(self)

    @property
    def address(self) -> str:
        """Where other hosts find the owner, ``host:port``; empty if it does not listen to them."""
        return self.endpoint[: len(self.endpoint) - len(path_of(self.endpoint))]

    def to_bytes(self) -> bytes:
        """Return the ref's wire form, about 100 bytes for one tensor."""
        body = _encode(self)
        return _HEAD.pack(_MAGIC, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """Return the ref that `to_bytes` wrote.

        Raises:
            MalformedRef: truncated, damaged, of another version, with invalid specs, or not bytes at
                all: a str, a number, None.

        """
        if type(data) is not bytes:
            data = _as_bytes(data)
        if not _HEAD_BYTES <= len(data) <= MAX_REF_BYTES:
            raise MalformedRef("these bytes are not a FeatureRef of this version")
        magic, checksum = _read_head(data)
        if magic != _MAGIC:
            raise MalformedRef("these bytes are not a FeatureRef of this version")
        body = data[_HEAD_BYTES:]
        if zlib.crc32(body) != checksum:
            raise MalformedRef("the ref was damaged or truncated on its way")
        try:
            ref = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedRef(f"a field of the ref is invalid: {_named(error)}") from None
        return ref  # type: ignore[return-value]  # Self is FeatureRef: the struct is not for subclassing

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the wire form, so that unpickling runs the same checks."""
        return _unpickle, (self.to_bytes(),)


_sound: dict[tuple[int, bytes, str], tuple[TensorSpec, ...]] = {}
"""The specs last validated for a size in bytes, a pool and its endpoint."""
_MAX_SOUND: Final = 256
_MAX_SOUND_SPECS: Final = 16  # a peer's specs are kept, and must stay small
_MAX_SOUND_DIMS: Final = 64


def _remember_sound(ref: FeatureRef) -> None:
    """Make the next ref of equal specs, size, pool and endpoint pass: servers share a few shapes."""
    specs = ref.specs
    if len(specs) > _MAX_SOUND_SPECS or any(len(spec.shape) > _MAX_SOUND_DIMS for spec in specs):
        return
    if len(_sound) >= _MAX_SOUND:
        _sound.clear()
    _sound[ref.nbytes, ref.pool_id, ref.endpoint] = specs


def _unpickle(data: bytes) -> FeatureRef:
    return FeatureRef.from_bytes(data)


def _as_bytes(data: Any) -> bytes:
    """Return a copy of a buffer's bytes. Not `bytes(data)`, which takes a number as a size."""
    try:
        view = memoryview(data)
        if view.nbytes <= MAX_REF_BYTES:
            return view.tobytes()
    except (TypeError, ValueError, BufferError):
        raise MalformedRef(
            f"a ref's bytes are bytes, a bytearray or a memoryview, not {type(data).__name__}"
        ) from None
    raise MalformedRef("these bytes are not a FeatureRef of this version")


def path_of(endpoint: str) -> str:
    """Return the path of the socket that a ref's endpoint names."""
    if endpoint.startswith("/"):
        return endpoint
    address, slash, _ = endpoint.partition("/")
    return endpoint[len(address) :] if slash and ":" in address else endpoint


def ref_bytes(specs: tuple[TensorSpec, ...]) -> int:
    """Return an upper bound of the bytes of a ref with these specs."""
    return _MAX_BUT_SPECS_BYTES + len(_encode(specs))


def _named(error: Exception) -> str:
    """Return msgspec's message about a field of an array, with the field's name."""
    text = str(error)
    for index, name in enumerate(FeatureRef.__struct_fields__):
        text = text.replace(f"`$[{index}]", f"`{name}")
    return text


def _check_fields(ref: FeatureRef) -> None:
    """Raise MalformedRef if it differs from its decoded wire form: a wrong type or range."""
    fields = msgspec.structs.astuple(ref)
    try:
        body = _encode(fields)
        found = _fields_decoder.decode(body)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise MalformedRef(f"no ref can be made of these fields: {_named(error)}") from None
    if found != fields or type(ref.pool_id) is not bytes:
        raise MalformedRef("no ref can be made of these fields: bytes and tuples are needed")
    if len(body) > MAX_REF_BYTES - _HEAD_BYTES:
        raise MalformedRef(
            f"the ref is longer than {MAX_REF_BYTES} bytes: put fewer tensors in one"
        )


def _check(ref: FeatureRef) -> None:
    """Raise MalformedRef for a ref that no pool can have made."""
    _check_fields(ref)
    if len(path_of(ref.endpoint).encode()) > _MAX_PATH_BYTES:
        raise MalformedRef("the ref's endpoint is longer than a Unix socket's path can be")
    if len(ref.address.encode()) > MAX_ADDRESS_BYTES:
        raise MalformedRef("the ref's address is longer than one of a host can be")
    specs = ref.specs
    if len(specs) > 1:
        names = {spec.name for spec in specs}
        if None in names or len(names) != len(specs):
            raise MalformedRef("the ref's tensors are neither one nor a dict of distinct names")
    for spec in specs:
        size_bytes = DTYPE_BYTES.get(spec.dtype)
        if size_bytes is None:
            raise MalformedRef(f"the ref has a dtype unknown here: {spec.dtype[:40]!r}")
        shape = spec.shape
        tensor_bytes = size_bytes * math.prod(shape)
        if spec.offset_bytes % size_bytes or spec.offset_bytes + tensor_bytes > ref.nbytes:
            raise MalformedRef("a tensor of the ref lies outside its extent")
        if not tensor_bytes and math.prod(size or 1 for size in shape) > MAX_BYTES:
            raise MalformedRef("an empty tensor of the ref has a shape that overflows")


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(FeatureRef)
_fields_decoder = msgspec.msgpack.Decoder(
    tuple[_PoolId, _Endpoint, _Slot, _Generation, _Size, _Size, _Specs]
)
