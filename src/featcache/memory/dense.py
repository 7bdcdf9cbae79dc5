"""Whether tensors have the memory that they speak of: asked before an address of theirs is used.

Some have none: zero tensors, wrapper subclasses (DTensor, FakeTensor, torchao's), tensors inside a
transform of torch.func, those whose storage was resized under them. Their address is null, or leads
past what is theirs. No one call of torch's tells them all, but a storage does: it refuses to name a
null address, and knows its size.
"""

import weakref
from collections.abc import Sequence
from typing import Final

import torch
from torch.nn.parameter import is_lazy

from featcache.errors import SettingsError
from featcache.memory.ended import ENDED, EndedView

NOT_MADE: Final = (
    "torch makes tensors without memory here (in a FakeTensorMode, or a transform of torch.func): get "
    "outside of it"
)
ORDINARY: Final = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types whose tensors can be asked for their address: torch warns where some others are."""
_lent: Final["weakref.WeakSet[torch.UntypedStorage]"] = weakref.WeakSet()
"""The storages that views of slabs are over: no get may fill those."""


def lend(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Note, and return, a storage that views of a slab will be over."""
    _lent.add(storage)
    return storage


def is_backed(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory at first sight: a quick yes, or a no that `has_memory` may overrule.

    Right for a dense tensor; of one with gaps `has_memory` knows the end.
    """
    if type(tensor) not in ORDINARY:
        return False
    try:
        storage = tensor.untyped_storage()
        start, at = storage.data_ptr(), tensor.data_ptr()
        return 0 < start <= at and at + tensor.nbytes <= start + storage.nbytes()
    except Exception:  # noqa: BLE001 - each kind of tensor without memory refuses in its own way
        return False


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether every element of a strided tensor lies in its storage, and that in memory."""
    try:
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch has no public name for it
            if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
                return False
            if is_lazy(tensor):
                return False
            storage = tensor.untyped_storage()
            if storage.device.type == "meta":
                return False  # a FakeTensor's: torch warns of whoever asks it for an address
            if not tensor.numel():
                return True
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            end = tensor.storage_offset() + 1 + sum((size - 1) * step for size, step in steps)
            return storage.data_ptr() != 0 and end * tensor.element_size() <= storage.nbytes()
    except Exception:  # noqa: BLE001 - as above
        return False


def dense(tensor: torch.Tensor, what: str = "a feature") -> torch.Tensor:
    """Return a tensor of the same value that has memory: this one, or zeros for a zero tensor.

    Raises:
        SettingsError: it has none, and torch does not say what it means.

    """
    if has_memory(tensor) and not isinstance(tensor, EndedView):
        return tensor
    if type(tensor) is torch.Tensor and tensor._is_zerotensor():  # noqa: SLF001 - torch's name for it
        zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if has_memory(zeros):  # not where a mode of torch's makes tensors that have none
            return zeros
    raise SettingsError(f"{what} {_why_not(tensor)}")


def check_target(tensor: torch.Tensor, what: str) -> None:
    """Raise SettingsError unless a tensor can be filled: with memory for each element, not a slab's."""
    in_order = is_backed(tensor) and not tensor.is_nested and tensor.is_contiguous()
    if not in_order and (isinstance(tensor, EndedView) or not has_memory(tensor)):
        raise SettingsError(f"{what} {_why_not(tensor)}")
    storage = tensor.untyped_storage()
    if not storage.resizable() and storage in _lent:
        raise SettingsError(f"{what} is a borrowed view, which is for reading: give a tensor")
    if not in_order and _overlaps_itself(tensor):
        raise SettingsError(f"{what} must have memory for each element: its elements share some")


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded view do."""
    reach = 0
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    for step, size in sorted(one for one in steps if one[1] > 1):
        if step <= reach:
            return True
        reach += (size - 1) * step
    return False


def _why_not(tensor: torch.Tensor) -> str:
    """Say what a tensor without memory is, and what to do."""
    if isinstance(tensor, EndedView):
        return f"is no tensor any more: {ENDED}"
    kind = type(tensor)
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as above
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
            return (
                "has no bytes in order: only dense tensors with bytes can be shared, not sparse, nested "
                "or meta ones (x.to_dense() makes a dense one)"
            )
        if tensor.is_quantized:  # those of less than a byte each speak of more than they have
            return f"is of {tensor.dtype}, which can't be shared: put its integers"
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return f"is a {kind.__name__}, which has no memory of its own: {_plain_form(kind)}"
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # noqa: SLF001 - as above
        try:
            nbytes = -1 if wrapped or is_lazy(tensor) else tensor.untyped_storage().nbytes()
        except Exception:  # noqa: BLE001 - as above
            nbytes = -1
        if nbytes < 0:
            return (
                "has no memory: it belongs to a transform of torch.func (vmap, grad, functionalize), or "
                "is a lazy parameter without a shape; put or get outside"
            )
    return (
        f"speaks of memory that it does not have: its storage has {nbytes} bytes at "
        "that address. It was freed or resized (resize_, FSDP), or a mode of torch's (FakeTensorMode) "
        "makes tensors without memory"
    )


def _plain_form(kind: type) -> str:
    own: Sequence[type] = [base for base in kind.__mro__ if base not in torch.Tensor.__mro__]
    for name in ("full_tensor", "to_local", "dequantize"):
        if any(name in vars(base) for base in own):
            return f"put what its {name}() returns"
    return "put the tensors that it is made of"
