"""Copies between tensors of which one is not plain memory: strided, conjugated, on another device."""

from typing import Final

import torch

COMPLEX: Final = frozenset({"complex32", "complex64", "complex128"})
"""The dtypes, by torch's names, that a conjugated tensor may have."""
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is its value, in order."""
    return tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as integers of its width: torch copies these for every dtype, strided or not."""
    integer = _INTEGERS.get(tensor.element_size())
    return tensor if integer is None or tensor.ndim == 0 else tensor.view(integer)


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between tensors of one dtype and shape."""
    if target.is_conj() or target.is_neg():
        target.detach().copy_(source)  # torch can copy the dtypes that can be conjugated or negated
        return
    source = source.detach().resolve_conj().resolve_neg()
    _bits(target).copy_(_bits(source))
