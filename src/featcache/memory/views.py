"""Cheap tensor views over foreign memory, and their invalidation.

`tensor.data` of a tensor without elements is the cheapest new tensor there is, with a version counter
of its own for autograd; `set_` gives it memory and a shape. Invalidation is the reverse: the view's
memory is exchanged for none, autograd is told of a change, and the class is one that refuses to compute.
"""

import torch
from torch.autograd.graph import increment_version

from featcache.memory.dlpack import storage_over
from featcache.memory.ended import EndedView
from featcache.memory.pack import DTYPES, contiguous_strides
from featcache.ref import TensorSpec

_blanks: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
"""One tensor without elements for each dtype and device, which are few."""


def _blank(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    blank = _blanks.get((dtype, device))
    if blank is None:
        # No allocator is behind its storage, so an invalidated view can't grow again: all share it.
        storage = storage_over(0, 0, device, lambda: None)
        with torch.inference_mode(mode=False):  # one made inside could not be used outside
            blank = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (0,), (1,))
        _blanks[dtype, device] = blank
    return blank


def view_over(
    storage: torch.UntypedStorage,
    at: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    """Return a tensor over a storage on this device, from its element `at` on.

    It is not a view in torch's sense: that would keep its base, and with it the mapping, for as long
    as the invalidated tensor lives.
    """
    return _blank(dtype, device).data.set_(storage, at, shape, strides)


def view_of(
    storage: torch.UntypedStorage, offset_bytes: int, spec: TensorSpec, device: torch.device
) -> torch.Tensor:
    """Return the tensor of a spec in the slot at `offset_bytes`."""
    dtype, shape = DTYPES[spec.dtype], spec.shape
    at = (offset_bytes + spec.offset_bytes) // dtype.itemsize
    return view_over(storage, at, dtype, shape, contiguous_strides(shape), device)


def invalidate(view: torch.Tensor) -> None:
    """Detach a view from its memory: its `numel()` is then 0, and what computes with it raises StaleRef."""
    dtype, device = view.dtype, view.device
    try:
        view.data = _blanks[dtype, device]
    except KeyError:
        view.data = _blank(dtype, device)
    increment_version(view)  # a backward that saved the view fails rather than read other bytes
    view.__class__ = EndedView  # a sum over nothing is 0, which looks like a value
