"""`FeatureRef`: the small thing that travels, and the one place that trusts none of its bytes.

On the wire: ``fR``, a version byte, the CRC-32 of what follows, then a msgpack array. The checksum
catches damage, the types and bounds below catch nonsense, and the owner's slot table (which readers
map) catches forgery: a reader compares slot, generation and extent with it before it reads a byte.
"""

import math
import struct
import zlib
from typing import Annotated, Any, Final, Self

import msgspec

from featcache.errors import MalformedRef

__all__ = ["DTYPE_BYTES", "FeatureRef", "TensorSpec"]

_MAGIC: Final = b"fR\x01"
_HEAD: Final = struct.Struct("<3sI")
_read_head: Final = _HEAD.unpack_from
_MAX_REF_BYTES: Final = 64 << 10
_POOL_ID_BYTES: Final = 16
_MAX_ENDPOINT_BYTES: Final = 107  # sun_path, less its final zero
_MAX_BYTES: Final = 1 << 48

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
"""Bytes of one element, by torch's name of the dtype: all that torch has but the quantized ones,
which carry a scale beside their bytes. A test holds this table against torch."""

_Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_BYTES)]
_Dim = Annotated[int, msgspec.Meta(ge=0, le=_MAX_BYTES)]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of a feature: where in its slot, of what dtype and shape; contiguous."""

    name: Annotated[str, msgspec.Meta(max_length=256)] | None
    """The key in the dict that was put, or None for a feature that is one bare tensor."""
    dtype: str
    """torch's name of the dtype, such as ``"bfloat16"``."""
    shape: Annotated[tuple[_Dim, ...], msgspec.Meta(max_length=64)]
    offset_bytes: _Size
    """Where the tensor begins, counted from the slot's own start."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class FeatureRef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Names one feature in one pool, for as long as reads of it are owed.

    Immutable, hashable and picklable; `to_bytes` is about 100 bytes and goes over any transport.
    A ref grants nothing by itself: whoever maps the pool checks it against the owner's slot table.
    """

    pool_id: Annotated[bytes, msgspec.Meta(min_length=_POOL_ID_BYTES, max_length=_POOL_ID_BYTES)]
    endpoint: Annotated[str, msgspec.Meta(max_length=_MAX_ENDPOINT_BYTES)]
    slot: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    generation: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    offset_bytes: _Size
    nbytes: _Size
    specs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=4096)]

    def __post_init__(self) -> None:
        """Check what types alone don't: also of a ref that was made by hand.

        Raises:
            MalformedRef: specs that no pool ever made.

        """
        try:
            specs, endpoint = _sound[self.nbytes]
            known = specs == self.specs and endpoint == self.endpoint
        except KeyError:
            known = False
        if not known:
            _check(self)
            _remember_sound(self)

    def to_bytes(self) -> bytes:
        """Return the ref's wire form, about 100 bytes for one tensor."""
        body = _encode(self)
        return _HEAD.pack(_MAGIC, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """Return the ref that `to_bytes` wrote.

        Raises:
            MalformedRef: cut short, damaged, of another version, or with specs that can't be.

        """
        data = bytes(data)
        if not _HEAD.size <= len(data) <= _MAX_REF_BYTES:
            raise MalformedRef("these bytes are not a FeatureRef of this version")
        magic, checksum = _read_head(data)
        if magic != _MAGIC:
            raise MalformedRef("these bytes are not a FeatureRef of this version")
        body = data[_HEAD.size :]
        if zlib.crc32(body) != checksum:
            raise MalformedRef("the ref was damaged or cut short on its way")
        try:
            ref = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedRef(f"the ref makes no sense: {error}") from None
        return ref  # type: ignore[return-value]  # Self is FeatureRef: the struct is not for subclassing

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the wire form, so that unpickling runs the same checks."""
        return _unpickle, (self.to_bytes(),)


_sound: dict[int, tuple[tuple[TensorSpec, ...], str]] = {}
"""Specs and endpoint by bytes, as they were last found sound: all that a check looks at."""
_MAX_SOUND: Final = 256
_MAX_SOUND_SPECS: Final = 16  # what a peer sends is kept, and must stay small


def _remember_sound(ref: FeatureRef) -> None:
    """Let the next ref of equal specs, bytes and endpoint pass: servers share the same few shapes."""
    if len(ref.specs) > _MAX_SOUND_SPECS:
        return
    if len(_sound) >= _MAX_SOUND:
        _sound.clear()
    _sound[ref.nbytes] = (ref.specs, ref.endpoint)


def _unpickle(data: bytes) -> FeatureRef:
    return FeatureRef.from_bytes(data)


def _check(ref: FeatureRef) -> None:
    """Raise MalformedRef for what its types allow but no pool ever made."""
    if len(ref.endpoint.encode("utf-8", "surrogatepass")) > _MAX_ENDPOINT_BYTES:
        raise MalformedRef("the ref's endpoint is longer than a Unix socket's path can be")
    specs = ref.specs
    if len(specs) > 1:
        names = {spec.name for spec in specs}
        if None in names or len(names) != len(specs):
            raise MalformedRef("the ref's tensors are neither one nor a dict of distinct names")
    for spec in specs:
        size_bytes = DTYPE_BYTES.get(spec.dtype)
        if size_bytes is None:
            raise MalformedRef(f"the ref has a dtype that is not known here: {spec.dtype[:40]!r}")
        shape = spec.shape
        tensor_bytes = size_bytes * math.prod(shape)
        if spec.offset_bytes % size_bytes or spec.offset_bytes + tensor_bytes > ref.nbytes:
            raise MalformedRef("a tensor of the ref lies outside its extent")
        if not tensor_bytes and math.prod(size or 1 for size in shape) > _MAX_BYTES:
            raise MalformedRef("an empty tensor of the ref has a shape that overflows")


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(FeatureRef)
