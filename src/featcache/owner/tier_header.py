"""What a tier stores beside a feature's bytes: its key, size and specs, checked when they come back."""

import struct
import zlib
from typing import Annotated, Final

import msgspec

from featcache.errors import MalformedRef
from featcache.memory.pack import DTYPES
from featcache.ref import MAX_BYTES, MAX_REF_BYTES, FeatureRef, TensorSpec
from featcache.settings import MAX_KEY_BYTES

_HEAD: Final = struct.Struct("<3sI")
_MAGIC: Final = b"fT\x01"
_NO_POOL: Final = bytes(16)


class Described(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A feature in a tier."""

    key: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_KEY_BYTES)]
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
    specs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=4096)]


_encode = msgspec.msgpack.Encoder().encode
_decoder: Final = msgspec.msgpack.Decoder(Described)


def encode(key: bytes, ref: FeatureRef) -> bytes:
    """Return the header of a feature that is kept under a key."""
    body = _encode(Described(key, ref.nbytes, ref.specs))
    return _HEAD.pack(_MAGIC, zlib.crc32(body)) + body


def decode(header: object, key: bytes) -> Described:
    """Return what a tier has under a key; ValueError if the header is damaged, invalid, or another key's."""
    if not isinstance(header, bytes | bytearray | memoryview):
        raise TypeError(f"a header is bytes, not {type(header).__name__}")
    data = bytes(header) if memoryview(header).nbytes <= 2 * MAX_REF_BYTES else b""
    if len(data) < _HEAD.size:
        raise ValueError("these bytes are no header of a feature in a tier")
    magic, checksum = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if magic != _MAGIC or zlib.crc32(body) != checksum:
        raise ValueError("the header is of another version, or was damaged")
    try:
        described = _decoder.decode(body)
        # As a ref of any pool: this checks names, dtypes, shapes and places inside the size.
        FeatureRef(_NO_POOL, "/", 0, 1, 0, described.nbytes, described.specs)
    except (msgspec.MsgspecError, MalformedRef, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the header describes no feature: {error}") from None
    if described.key != key:
        raise ValueError("the header is another key's")
    if any(spec.dtype not in DTYPES for spec in described.specs):
        raise ValueError("the header has a dtype that this version of torch has not")
    return described
