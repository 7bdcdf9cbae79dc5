"""`content_key`: a key made of content, so that equal inputs meet under one key."""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import torch

from featcache.errors import SettingsError
from featcache.memory.pack import Feature, pack
from featcache.memory.strided import copy, is_plain
from featcache.ref import TensorSpec

_MAX_TENSORS: Final = 4096  # as many as a ref can name

# The first bytes that are hashed: whose key it is, in which version, and of what kind of value. What
# follows is of one form for each kind, so no two values are hashed as the same bytes.
_BYTES: Final = b"featcache.content_key\x01b"
_TEXT: Final = b"featcache.content_key\x01s"
_TENSORS: Final = b"featcache.content_key\x01t"


def content_key(value: Feature | bytes | bytearray | memoryview | str) -> bytes:
    """Return a key of 32 bytes that equal content always has, and different content never.

    Content is the kind of value (tensor, dict, bytes, text) and its bytes; of tensors the dtype and
    the shape too, of a dict also the names, in any order. Strides, the device and ``requires_grad``
    do not count, nor does which bytes-like type it was. Zeros of either sign are different bytes, so
    they give different keys. The key is the same in every process and on every machine that stores
    numbers with the low byte first.

    What it costs: SHA-256, about half a millisecond per MiB on a processor with instructions for it,
    one to two on one without (``python -m timeit -s "import hashlib; x = bytes(1 << 20)"
    "hashlib.sha256(x)"``). A tensor whose memory
    is not its value in order (strided, conjugated) is copied first.

    **On a GPU** no sound hash is computed, so the tensor is copied to the host first: at best 20 µs
    per MiB over PCIe, and the caller's thread waits until its current stream has done all that was
    queued before. Where what the tensor was made from is still on the host (the file of an image),
    the key of that costs less.

    **In an event loop** a value of more than a few hundred KiB holds the loop up noticeably. Have it
    hashed in a thread, which runs beside the loop because hashing drops the GIL::

        key = await anyio.to_thread.run_sync(content_key, pixel_values)

    A thread has a current stream of its own: what another stream still writes to a GPU tensor must
    be done first (``await anyio.to_thread.run_sync(event.synchronize)``). Do not change the value
    meanwhile.

    Raises:
        SettingsError: the value is none of these kinds, or a tensor that can't be put: sparse,
            nested, meta, quantized.

    """
    if isinstance(value, str):
        # Text that is no valid Unicode (a path, say) has a key as well.
        return hashlib.sha256(_TEXT + value.encode("utf-8", "surrogatepass")).digest()
    if isinstance(value, bytes | bytearray | memoryview):
        return _of_bytes(value)
    return _of_tensors(value)


def _of_bytes(value: bytes | bytearray | memoryview) -> bytes:
    digest = hashlib.sha256(_BYTES)
    if isinstance(value, memoryview) and not value.c_contiguous:
        value = value.tobytes()
    digest.update(value)
    return digest.digest()


def _of_tensors(value: Any) -> bytes:
    """Hash the layout, then the bytes, of which it says how many each tensor has."""
    if not isinstance(value, torch.Tensor | Mapping):
        raise SettingsError(
            "content_key takes a torch.Tensor, a dict of them, bytes-like or str, "
            f"not {type(value).__name__}"
        )
    _, parts, _ = pack(value, _MAX_TENSORS, travels=False)
    named = sorted(parts, key=lambda part: part[0].name or "")
    layout = [(_name(spec), spec.dtype, spec.shape) for spec, _ in named]
    digest = hashlib.sha256(_TENSORS + msgspec.msgpack.encode(layout))
    for _, tensor in named:
        if tensor.numel():
            digest.update(_bytes_of(tensor))
    return digest.digest()


def _name(spec: TensorSpec) -> bytes | None:
    return None if spec.name is None else spec.name.encode("utf-8", "surrogatepass")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor if it can be read in order, else that of a copy."""
    if tensor.device.type != "cpu" or not is_plain(tensor):
        # Of one dimension at least, so that the copy can be one of bits: some dtypes have no other.
        source = tensor if tensor.ndim else tensor.reshape(1)
        tensor = torch.empty(source.shape, dtype=source.dtype, device="cpu")
        copy(tensor, source)
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
