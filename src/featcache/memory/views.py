"""Views over memory that torch did not allocate, made and emptied at little cost.

`tensor.data` of a tensor without elements is the cheapest new tensor there is, with a count of changes
of its own, which autograd looks at; `set_` gives it memory and a shape. Emptied is a view by the way
back: what it had is exchanged for nothing, and autograd told that it has changed.
"""

import torch
from torch.autograd.graph import increment_version

from featcache.memory.dlpack import storage_over
from featcache.memory.pack import DTYPES, contiguous_strides
from featcache.ref import TensorSpec

_blanks: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
"""One tensor without elements for each dtype and device, all of which there are few."""


def _blank(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    blank = _blanks.get((dtype, device))
    if blank is None:
        # No allocator is behind its storage, so what was emptied can't grow again: many share it.
        storage = storage_over(0, 0, device, lambda: None)
        with torch.inference_mode(mode=False):  # made inside, it could not be used outside
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

    It is no view in torch's sense: such a one keeps its base, and with it the mapping, for as long as
    somebody keeps the emptied tensor.
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
    """Take a view's memory away; its `numel()` is then 0."""
    dtype, device = view.dtype, view.device
    try:
        view.data = _blanks[dtype, device]
    except KeyError:
        view.data = _blank(dtype, device)
    increment_version(view)
