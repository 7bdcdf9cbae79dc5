"""From what a user puts to specs and bytes: one tensor, or a dict of them packed in one slot."""

import functools
from collections.abc import Mapping
from typing import Any, Final

import torch

from featcache.errors import SettingsError
from featcache.ref import DTYPE_BYTES, TensorSpec

__all__ = [
    "DTYPES",
    "MAX_NAME",
    "Feature",
    "Packed",
    "contiguous_strides",
    "pack",
    "same_layout",
    "unpack",
]

Feature = torch.Tensor | dict[str, torch.Tensor]
Packed = tuple[tuple[TensorSpec, torch.Tensor], ...]

_ALIGNMENT_BYTES: Final = 256  # of each tensor inside a slot, as the slot itself
MAX_NAME = 256

DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, name) for name in DTYPE_BYTES if hasattr(torch, name)
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested


def _spec(name: str | None, tensor: Any, offset_bytes: int) -> TensorSpec:
    if not isinstance(tensor, torch.Tensor):
        where = "a feature" if name is None else f"feature[{name!r}]"
        raise SettingsError(f"{where} must be a torch.Tensor, not {type(tensor).__name__}")
    dtype = _NAMES.get(tensor.dtype)
    if dtype is None:
        raise SettingsError(f"tensors of {tensor.dtype} can't be shared: put their integers")
    if not _is_dense(tensor):
        raise SettingsError(
            "only dense tensors with bytes can be shared, not sparse, nested or meta ones"
        )
    return TensorSpec(name, dtype, tuple(tensor.shape), offset_bytes)


_bare_specs: dict[tuple[torch.dtype, torch.Size], tuple[TensorSpec, ...]] = {}
_MAX_BARE_SPECS: Final = 1024


def _new_bare_specs(tensor: torch.Tensor) -> tuple[TensorSpec, ...]:
    specs = (_spec(None, tensor, 0),)
    if len(_bare_specs) >= _MAX_BARE_SPECS:
        _bare_specs.clear()
    _bare_specs[tensor.dtype, tensor.shape] = specs
    return specs


def pack(feature: Any, most: int) -> tuple[tuple[TensorSpec, ...], Packed, int]:
    """Return the specs, the tensors beside them, and the bytes of the slot they need.

    Raises:
        SettingsError: neither a dense tensor nor a dict of 1 to `most` of them under str names.

    """
    if isinstance(feature, torch.Tensor):
        # Servers put the same few shapes again and again.
        if feature.layout is not torch.strided or feature.is_meta or feature.is_nested:
            _spec(None, feature, 0)  # which says what is wrong
        try:
            specs = _bare_specs[feature.dtype, feature.shape]
        except KeyError:
            specs = _new_bare_specs(feature)
        return specs, ((specs[0], feature),), feature.nbytes
    if not isinstance(feature, Mapping):
        raise SettingsError(
            f"a feature is a torch.Tensor or a dict of them, not {type(feature).__name__}"
        )
    if not 1 <= len(feature) <= most:
        raise SettingsError(f"a feature packs 1 to {most} tensors, not {len(feature)}")
    parts: list[tuple[TensorSpec, torch.Tensor]] = []
    end_bytes = 0
    for name, tensor in feature.items():
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise SettingsError(f"a tensor's name is a str of at most {MAX_NAME} characters")
        offset_bytes = -(-end_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        parts.append((_spec(name, tensor, offset_bytes), tensor))
        end_bytes = offset_bytes + tensor.nbytes
    return tuple(spec for spec, _ in parts), tuple(parts), end_bytes


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
    """Return tensors in the form in which they were put."""
    if specs[0].name is None:
        return tensors[0]
    return {str(spec.name): tensor for spec, tensor in zip(specs, tensors, strict=True)}


def same_layout(specs: tuple[TensorSpec, ...], out: Any) -> list[torch.Tensor]:
    """Return the tensors of `out` in the order of `specs`.

    Raises:
        SettingsError: `out` is not of the feature's form, names, shapes and dtypes.

    """
    if specs[0].name is None:
        tensors = [out]
    elif isinstance(out, Mapping) and set(out) == {spec.name for spec in specs}:
        tensors = [out[spec.name] for spec in specs]
    else:
        raise SettingsError(f"out must be a dict with the names {[spec.name for spec in specs]}")
    for spec, tensor in zip(specs, tensors, strict=True):
        dtype = DTYPES.get(spec.dtype)
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype is not dtype
            or not _is_dense(tensor)
            or tuple(tensor.shape) != spec.shape
        ):
            raise SettingsError(f"out must be a tensor of {spec.dtype} and shape {spec.shape}")
        if any(
            stride == 0 and size > 1
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise SettingsError("out must have memory for each element: it is an expanded view")
    return tensors
