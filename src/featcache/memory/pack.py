"""Flatten a feature, one tensor or a dict of them, into tensor specs and one slot's layout."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

from featcache.errors import FeatureTooLarge, SettingsError
from featcache.memory.dense import ORDINARY, check_target, dense, has_memory, is_backed
from featcache.ref import DTYPE_BYTES, MAX_BYTES, MAX_DIMS, MAX_REF_BYTES, TensorSpec, ref_bytes

Feature = torch.Tensor | dict[str, torch.Tensor]
Packed = tuple[tuple[TensorSpec, torch.Tensor], ...]

_ALIGNMENT_BYTES: Final = 256  # of each tensor inside a slot, as the slot itself
MAX_NAME = 256
_ALWAYS_FIT: Final = 16  # tensors whose specs fit a ref, whatever their names and shapes

DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, name) for name in DTYPE_BYTES if hasattr(torch, name)
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def is_name(value: Any, minimum: int = 1, *, travels: bool = True) -> bool:
    """Whether it can name a tensor, a reader or a session: of valid length and, if it `travels`, in UTF-8."""
    if not isinstance(value, str) or not minimum <= len(value) <= MAX_NAME:
        return False
    if travels and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate
            return False
    return True


def _part(name: str, tensor: Any) -> torch.Tensor:
    """Return a member of a dict, as a tensor that has memory."""
    if not isinstance(tensor, torch.Tensor):
        raise SettingsError(
            f"feature[{name!r}] must be a torch.Tensor, not {type(tensor).__name__}"
        )
    return tensor if is_backed(tensor) else dense(tensor, f"feature[{name!r}]")


def _spec(name: str | None, tensor: torch.Tensor, offset_bytes: int) -> TensorSpec:
    dtype = _NAMES.get(tensor.dtype)
    if dtype is None:
        raise SettingsError(f"tensors of {tensor.dtype} can't be shared: put their integers")
    if tensor.is_nested:
        dense(tensor)  # raises, with the reason
    shape = tuple(tensor.shape)
    _check_shape(shape, tensor.nbytes)
    return TensorSpec(name, dtype, shape, offset_bytes)


def _check_shape(shape: tuple[int, ...], nbytes: int) -> None:
    """Raise FeatureTooLarge or SettingsError if no ref can have a tensor of this shape."""
    if len(shape) > MAX_DIMS:
        raise SettingsError(
            f"a tensor of {len(shape)} dimensions: reshape it to {MAX_DIMS} or less"
        )
    if nbytes > MAX_BYTES:  # only an expanded view can be
        raise FeatureTooLarge(f"a tensor of {nbytes} bytes fits no pool: put its base")
    if not nbytes and math.prod(size or 1 for size in shape) > MAX_BYTES:
        raise SettingsError(f"an empty tensor of shape {list(shape)} can't be shared: reshape it")


_bare_specs: dict[tuple[torch.dtype, torch.Size], tuple[TensorSpec, ...]] = {}
_MAX_BARE_SPECS: Final = 1024


def _new_bare_specs(tensor: torch.Tensor) -> tuple[TensorSpec, ...]:
    specs = (_spec(None, tensor, 0),)
    if len(_bare_specs) >= _MAX_BARE_SPECS:
        _bare_specs.clear()
    _bare_specs[tensor.dtype, tensor.shape] = specs
    return specs


def pack(
    feature: Any, max_tensors: int, *, travels: bool = True
) -> tuple[tuple[TensorSpec, ...], Packed, int]:
    """Return the specs, the tensors beside them, and the bytes of the slot they need.

    Raises:
        SettingsError: neither a dense tensor nor a dict of 1 to `max_tensors` of them under str
            names; or, if it `travels` as a ref, the ref would be too long.
        FeatureTooLarge: it can fit no pool.

    """
    if isinstance(feature, torch.Tensor):
        try:  # as `is_backed`, inline
            nbytes, storage = feature.nbytes, feature.untyped_storage()
            backed = (
                type(feature) in ORDINARY
                and 0 < (start := storage.data_ptr()) <= (at := feature.data_ptr())
                and at + nbytes <= start + storage.nbytes()
            )
        except Exception:  # noqa: BLE001 - as there
            backed = False
        if not backed:
            feature = dense(feature)
            nbytes = feature.nbytes
        # Servers put the same few shapes again and again.
        try:
            specs = _bare_specs[feature.dtype, feature.shape]
        except (KeyError, RuntimeError):  # the latter of a nested tensor, which has no shape
            specs = _new_bare_specs(feature)
        return specs, ((specs[0], feature),), nbytes
    if not isinstance(feature, Mapping):
        raise SettingsError(
            f"a feature is a torch.Tensor or a dict of them, not {type(feature).__name__}"
        )
    if not 1 <= len(feature) <= max_tensors:
        raise SettingsError(
            f"a feature packs 1 to {max_tensors} tensors, not {len(feature)}: Settings.tensors "
            "(FEATCACHE_TENSORS) is the limit"
        )
    parts: list[tuple[TensorSpec, torch.Tensor]] = []
    end_bytes = 0
    for name, tensor in feature.items():
        if not is_name(name, 0, travels=travels):
            raise SettingsError(
                f"a tensor's name is a str of at most {MAX_NAME} characters that UTF-8 has"
            )
        offset_bytes = -(-end_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        part = _part(name, tensor)
        parts.append((_spec(name, part, offset_bytes), part))
        end_bytes = offset_bytes + part.nbytes
    specs = tuple(spec for spec, _ in parts)
    if travels and len(specs) > _ALWAYS_FIT:
        _check_length(specs)
    return specs, tuple(parts), end_bytes


def _check_length(specs: tuple[TensorSpec, ...]) -> None:
    """Raise SettingsError if a ref with these specs would be too long."""
    nbytes = ref_bytes(specs)
    if nbytes > MAX_REF_BYTES:
        raise SettingsError(
            f"the ref of these {len(specs)} tensors would have {nbytes} bytes, more than "
            f"{MAX_REF_BYTES}: shorten their names, or put them as several features"
        )


@functools.lru_cache(maxsize=1024)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor of this shape."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def unpack(specs: tuple[TensorSpec, ...], tensors: list[torch.Tensor]) -> Feature:
    """Return tensors in the form of the feature that was put."""
    if specs[0].name is None:
        return tensors[0]
    return {str(spec.name): tensor for spec, tensor in zip(specs, tensors, strict=True)}


def same_layout(specs: tuple[TensorSpec, ...], out: Any) -> list[torch.Tensor]:
    """Return the tensors of `out` in the order of `specs`.

    Raises:
        SettingsError: `out` differs from the feature in form, names, shapes or dtypes, or lacks
            memory of its own for each element.

    """
    if specs[0].name is None:
        tensors = [out]
    elif isinstance(out, Mapping) and set(out) == {spec.name for spec in specs}:
        tensors = [out[spec.name] for spec in specs]
    else:
        raise SettingsError(f"out must be a dict with the names {[spec.name for spec in specs]}")
    check_fit(specs, tensors)
    if len(tensors) > 1:
        places = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
        if len(set(places)) < len(places):
            raise SettingsError("out must have memory for each tensor: two begin at one address")
    return tensors


def check_fit(specs: tuple[TensorSpec, ...], targets: list[Any]) -> None:
    """Raise SettingsError unless tensors can be filled as the specs say, now.

    Asked again before they are filled: a caller may have freed or resized them while it waited.
    """
    for spec, tensor in zip(specs, targets, strict=True):
        what = "out" if spec.name is None else f"out[{spec.name!r}]"
        fits = isinstance(tensor, torch.Tensor) and tensor.dtype is DTYPES.get(spec.dtype)
        if fits:
            check_target(tensor, what)
        if not fits or tensor.shape != spec.shape:
            where = "" if spec.name is None else f" under {spec.name!r}"
            raise SettingsError(
                f"out must be a tensor of {spec.dtype} and shape {spec.shape}{where}"
            )


def check_parts(parts: Iterable[tuple[TensorSpec, torch.Tensor]]) -> None:
    """Raise SettingsError unless tensors that were packed a while ago are still what their specs say.

    A caller may have freed or resized them meanwhile: their put waited, or a thread has yet to copy.
    """
    for spec, tensor in parts:
        same = tensor.shape == spec.shape and tensor.dtype is DTYPES[spec.dtype]
        if not (same and (is_backed(tensor) or has_memory(tensor))):
            raise SettingsError("a tensor lost its memory, or its shape, while its put was waiting")
