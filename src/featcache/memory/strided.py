"""Copies between tensors of which one is not plain memory: strided, conjugated, on another device."""

import contextlib
from collections.abc import Iterator
from typing import Final

import torch

from featcache.memory.dense import dense, has_memory

COMPLEX: Final = frozenset({"complex32", "complex64", "complex128"})
"""The dtypes, by torch's names, that a conjugated tensor may have."""
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is its value, in order."""
    return tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Reinterpret the elements as integers of their size, for which torch has copy kernels."""
    integer = _INTEGERS.get(tensor.element_size())
    return tensor if integer is None or tensor.ndim == 0 else tensor.view(integer)


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between tensors of one dtype and shape, whatever mode of torch's the caller is in.

    Raises:
        SettingsError: one of them has not the memory that it speaks of.

    """
    for tensor in (target, source):
        if not has_memory(tensor):
            dense(tensor, "a tensor")  # raises, with the reason
    with outside_modes():
        _copy(target.detach(), source.detach())


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Have torch act on the memory itself: under FakeTensorMode it would copy nothing, silently.

    In inference mode both may be any tensors, those that autograd or inference mode guards too: the
    bytes are no business of theirs.
    """
    guard = torch._C._DisableTorchDispatch()  # noqa: SLF001 - for as long as it lives; no public name
    try:
        with torch.inference_mode():
            yield
    finally:
        del guard


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.is_conj() or target.is_neg():
        target.copy_(source)  # torch can copy the dtypes that can be conjugated or negated
        return
    _bits(target).copy_(_bits(source.resolve_conj().resolve_neg()))
